"""One sweep from its grid to its report."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from sd3.sweep.folder import SweepFolder
from sd3.sweep.grid import Grid
from sd3.sweep.plan import Batch, Plan, describe, make_plan
from sd3.sweep.report import Report
from sd3.sweep.scores import Scorer, clip_scorer, demo_scorer
from sd3.sweep.work import Done, make_here

Work = Callable[[Plan, Sequence[Batch], Callable[[Batch], None]], Iterator[Done]]


def say(text: str) -> None:
    """A line for the person at the shell, above any progress bar."""
    tqdm.write(text, file=sys.stderr)


def run(flags: Mapping[str, Any], grid: Grid, entries: Sequence[Any] | None, arguments: Sequence[str]) -> int:
    """Makes what the grid still lacks; returns how many pictures failed. Raises Mistake before any weights load."""
    started = time.monotonic()
    folder = SweepFolder(flags["out"], say)
    work: Any = make_here
    if "ray" in flags:
        from sd3.sweep.cluster import OnRay

        work = OnRay(flags["ray"], flags.get("cpus_per_worker"))
        say(f"{len(work.workers)} worker{'s' if len(work.workers) != 1 else ''} on Ray")
        plan, notes = work.plan(grid)
    else:
        plan, notes = make_plan(grid)
    scorer = make_scorer(flags, grid)
    plan = plan.continued(folder.present())
    folder.check(plan)
    if entries is not None:
        from sd3.sweep.layouts import check_sizes

        check_sizes(flags["layout"], plan)
    for note in notes:
        say(note)
    if flags.get("dry_run"):
        dry_run(folder, plan)
        return 0
    folder.open()
    try:
        return _run(flags, folder, plan, entries, arguments, work, scorer, started)
    finally:
        folder.close()


def make_scorer(flags: Mapping[str, Any], grid: Grid) -> Scorer | None:
    """The scorer that --score names; raises Mistake."""
    if flags.get("score") == "demo":
        return demo_scorer(grid, flags.get("per_kind"))
    return clip_scorer(flags.get("clip_model")) if flags.get("score") == "clip" else None


def dry_run(folder: SweepFolder, plan: Plan) -> None:
    """Prints how many pictures there are, how many are done and how long the rest will take."""
    done, damaged = folder.finished(plan)
    for line in [*describe(plan), *damaged]:
        print(line)
    left = len({p.id for p in plan.pictures}) - len(done)
    spent = folder.seconds()
    told = "time unknown until the first pictures are made here"
    if spent:
        each = sum(spent.values()) / len(spent)
        told = f"about {duration(left * each)} ({each:.2f} s a picture, from the {len(spent)} made here)"
    print(f"{len(done)} done, {left} to make: {told}")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _run(
    flags: Mapping[str, Any],
    folder: SweepFolder,
    plan: Plan,
    entries: Sequence[Any] | None,
    arguments: Sequence[str],
    work: Work,
    scorer: Scorer | None,
    started: float,
) -> int:
    done, damaged = folder.finished(plan)
    for line in damaged:
        say(line)
    folder.write_record(plan, arguments)
    wanted = {p.id for p in plan.pictures} - done
    batches = plan.batches(wanted)
    folder.log("start", pictures=len(plan.pictures), done=len(done), batches=len(batches))
    if earlier := len(folder.present() - {p.id for p in plan.pictures}):
        say(f"note: {earlier} pictures of an earlier grid stay in {folder.path}, and are not in this report")
    report = Report(folder, plan, flags.get("score"))
    there = [p for p in plan.pictures if p.id in done]
    for p in tqdm(there, desc="looking at what is there", unit="picture", leave=False):
        finish(folder, plan, p, scorer, report)
    report.write(running=bool(batches))
    failed = made = 0
    hashes: dict[str, str] = {}
    try:
        with tqdm(total=len(plan.pictures), initial=len(done), unit="picture", desc=str(folder.path)) as bar:
            for one in work(plan, batches, lambda b: folder.log("begin", pictures=[p.id for p in b.pictures])):
                for event in one.events:
                    folder.log(**event)
                for picture, result in zip(one.batch.pictures, one.results, strict=True):
                    if isinstance(result, str):
                        failed += 1
                        where = f"{plan.variants[picture.variant].name}, seed {picture.seed}"
                        say(f'failed: {where}, "{plan.grid.prompts[picture.prompt]}": {result}')
                        folder.log("failed", picture=picture.id, why=result)
                    else:
                        folder.save(picture, result)
                        folder.log("made", picture=picture.id)
                        made += 1
                        finish(folder, plan, picture, scorer, report)
                    bar.update()
                kept = [p.id for p, r in zip(one.batch.pictures, one.results, strict=True) if not isinstance(r, str)]
                if kept:
                    folder.log("batch", pictures=kept, seconds=round(one.seconds, 4))
                if dict(one.hashes).items() - hashes.items():
                    hashes |= one.hashes
                    folder.write_record(plan, arguments, hashes)
                report.write_now_and_then()
    except BaseException:
        say(f"stopped: {len(done) + made} of {len(plan.pictures)} pictures are in {folder.path}; run it again to go on")
        with contextlib.suppress(Exception):  # the first error is the one to be told
            folder.log("stopped", made=made, failed=failed)
            report.write(running=False)
        raise
    folder.log("finished", made=made, failed=failed)
    report.write(running=False, whole=True)
    if entries is not None:
        from sd3.sweep.layouts import write_layout

        for path in write_layout(flags["layout"], entries, plan, folder):
            say(f"{flags['layout']}: {path}")
    if report.rows:
        print(report.table())
    seconds = time.monotonic() - started
    say(f"{made} made, {len(done)} were there, {failed} failed, in {seconds:.1f} s: {folder.path / 'index.html'}")
    return failed


def finish(folder: SweepFolder, plan: Plan, picture: Any, scorer: Scorer | None, report: Report) -> None:
    """What follows from a finished picture: its difference to the baseline, its score, its place in the report."""
    folder.save_difference(plan, picture)
    for other in plan.compared_with(picture):  # on several workers a baseline need not be the first
        if other.id in report.done:
            folder.save_difference(plan, other)
            report.add(other)
    if scorer is not None and (report.score, picture.id) not in report.scores:
        with Image.open(folder.picture(picture.id)) as image:
            scores = scorer(image, plan.grid.prompts[picture.prompt])
        folder.add_scores(picture.id, scores, report.score)
        report.scores[report.score, picture.id] = scores
    report.add(picture)
