"""Runs a sweep, from its grid to its report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sd3.sweep.cluster import RayWorkers
from sd3.sweep.folder import SweepFolder
from sd3.sweep.grid import Grid
from sd3.sweep.layouts import Entry, check_sizes, read_picture, write_layout
from sd3.sweep.plan import Batch, Plan, PlannedImage, describe, make_plan
from sd3.sweep.report import Report
from sd3.sweep.scores import Scorer, clip_scorer, demo_scorer
from sd3.sweep.work import BatchResult, make_here
from sd3.telling import progress

Work = Callable[[Plan, Sequence[Batch], Callable[[Batch], None]], Iterator[BatchResult]]
Say = Callable[[str], Any]


def run(
    flags: Mapping[str, Any],
    grid: Grid,
    entries: Sequence[Entry] | None,
    arguments: Sequence[str],
    show: Say,
    say: Say,
) -> int:
    """Makes the missing images of a grid; returns how many failed. Raises Mistake before any weights load.

    entries: the prompts of a benchmark, for its layout; arguments: as typed, for sweep.json; show: receives the lines
    of the result; say: receives notes and progress.
    """
    started = time.monotonic()
    folder = SweepFolder(flags["out"], say)
    work: Work = make_here
    if "ray" in flags:
        work = workers = RayWorkers(flags["ray"], flags.get("cpus_per_worker"))
        say(f"{len(workers.workers)} worker{'s' if len(workers.workers) != 1 else ''} on Ray")
        plan, notes = workers.plan(grid)
    else:
        plan, notes = make_plan(grid)
    scorer = make_scorer(flags, grid)
    plan = plan.with_earlier_ids(folder.present())
    plan = plan.with_threads(folder.recorded_threads(plan))
    folder.check(plan)
    if entries is not None:
        check_sizes(flags["layout"], plan)
    for note in notes:
        say(note)
    if flags.get("dry_run"):
        for line in forecast(folder, plan):
            show(line)
        return 0
    folder.open()
    try:
        sweep = Sweep(folder, plan, scorer, flags.get("score"), arguments, say)
        sweep.make(work)
        if entries is not None:
            for path in write_layout(flags["layout"], entries, plan, folder):
                say(f"{flags['layout']}: {path}")
        if sweep.report.rows:
            show(sweep.report.table())
        seconds = time.monotonic() - started
        say(f"{sweep.counts()}, in {seconds:.1f} s: {folder.path / 'index.html'}")
        return sweep.failed
    finally:
        folder.close()


def make_scorer(flags: Mapping[str, Any], grid: Grid) -> Scorer | None:
    """The scorer that `score` names; raises Mistake."""
    if flags.get("score") == "demo":
        return demo_scorer(grid, flags.get("per_kind"))
    return clip_scorer(flags.get("clip_model")) if flags.get("score") == "clip" else None


def forecast(folder: SweepFolder, plan: Plan) -> Iterator[str]:
    """The lines of `dry_run`: how many images there are, how many are finished and how long the rest will take."""
    done, damaged = folder.finished(plan)
    yield from describe(plan)
    yield from damaged
    remaining = len({p.id for p in plan.pictures}) - len(done)
    seconds = folder.journal.seconds()
    when = "time unknown until the first are made"
    if seconds:
        each = sum(seconds.values()) / len(seconds)
        when = f"about {duration(remaining * each)} ({each:.2f} s per image, the mean of {len(seconds)} made)"
    yield f"{len(done)} finished, {remaining} to make: {when}"


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Sweep:
    """A plan carried out in an open folder: checks finished images, makes the rest, writes the report."""

    def __init__(
        self,
        folder: SweepFolder,
        plan: Plan,
        scorer: Scorer | None,
        score: str | None,
        arguments: Sequence[str],
        say: Say,
    ):
        """score: the name of the scorer; arguments: as typed, for sweep.json; say: receives notes and progress."""
        self.folder, self.plan, self.scorer, self.arguments, self.say = folder, plan, scorer, arguments, say
        self.report = Report(folder, plan, score)
        self.finished: set[str] = set()  # ids of the images that were finished before this run
        self.made = self.failed = 0
        self.hashes: dict[str, str] = {}  # sha256 by path, of the files hashed so far

    def make(self, work: Work) -> None:
        """Makes every missing image. When stopped, it still writes the report."""
        batches = self._begin()
        try:
            total, name = len(self.plan.pictures), str(self.folder.path)
            with progress(total, name, "image", done=len(self.finished), leave=True) as update:
                for batch in work(self.plan, batches, self._log_begin):
                    self._take(batch, update)
        except BaseException:
            count = f"{len(self.finished) + self.made} of {len(self.plan.pictures)} images"
            self.say(f"stopped: {count} are in {self.folder.path}; run the command again to resume")
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.folder.journal.log("stopped", made=self.made, failed=self.failed)
                self.report.write(running=False)
            raise
        self.folder.journal.log("finished", made=self.made, failed=self.failed)
        self.report.write(running=False, whole=True)

    def counts(self) -> str:
        """How many images were made, were already finished and failed."""
        return f"{self.made} made, {len(self.finished)} were already finished, {self.failed} failed"

    def _begin(self) -> list[Batch]:
        """Adds finished images to the report; returns the batches to make."""
        folder, plan = self.folder, self.plan
        self.finished, damaged = folder.finished(plan)
        for line in damaged:
            self.say(line)
        folder.record.write(plan, self.arguments)
        ids = {p.id for p in plan.pictures}
        batches = plan.batches(ids - self.finished)
        folder.journal.log("start", pictures=len(plan.pictures), done=len(self.finished), batches=len(batches))
        if earlier := len(folder.present() - ids):
            self.say(f"note: {earlier} images of an earlier grid stay in {folder.path} but are not in this report")
        finished = [p for p in plan.pictures if p.id in self.finished]
        with progress(len(finished), "checking finished images", "image") as update:
            for picture in finished:
                self._finish(picture)
                update(1)
        self.report.write(running=bool(batches))
        return batches

    def _log_begin(self, batch: Batch) -> None:
        self.folder.journal.log("begin", pictures=[p.id for p in batch.pictures])

    def _take(self, done: BatchResult, update: Callable[[int], Any]) -> None:
        """Saves the images of a batch; logs the failed ones."""
        journal = self.folder.journal
        for event in done.events:
            journal.log(**event)
        saved = []
        for picture, result in zip(done.batch.pictures, done.results, strict=True):
            if isinstance(result, str):
                self._fail(picture, result)
            else:
                self.folder.save(picture, result)
                journal.log("made", picture=picture.id)
                self.made += 1
                saved.append(picture.id)
                self._finish(picture)
            update(1)
        if saved:
            journal.log("batch", pictures=saved, seconds=round(done.seconds, 4))
        if dict(done.hashes).items() - self.hashes.items():
            self.hashes |= done.hashes
            self.folder.record.write(self.plan, self.arguments, self.hashes)
        self.report.write_now_and_then()

    def _fail(self, picture: PlannedImage, why: str) -> None:
        self.failed += 1
        variant, prompt = self.plan.variants[picture.variant].name, self.plan.grid.prompts[picture.prompt]
        self.say(f'failed: {variant}, seed {picture.seed}, "{prompt}": {why}')
        self.folder.journal.log("failed", picture=picture.id, why=why)

    def _finish(self, picture: PlannedImage) -> None:
        """Compares a finished image with its baseline, scores it and adds it to the report."""
        self.folder.save_difference(self.plan, picture)
        for other in self.plan.compared_to(picture):  # with several workers a baseline may finish later
            if other.id in self.report.differences:
                self.folder.save_difference(self.plan, other)
                self.report.add(other)
        key = (self.report.score, picture.id)
        if self.scorer is not None and key not in self.report.scores:
            scores = self.scorer(read_picture(self.folder.picture(picture.id)), self.plan.grid.prompts[picture.prompt])
            self.folder.journal.add_scores(picture.id, scores, self.report.score)
            self.report.scores[key] = scores
        self.report.add(picture)
