"""The report of a sweep: index.html and its data.js, results.csv, scores.csv, scores.md and contact sheets."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3 import sheet, writing
from sd3.sweep import scores as scoring
from sd3.sweep.folder import SweepFolder
from sd3.sweep.grid import OFF, is_residual
from sd3.sweep.plan import Plan, PlannedImage, command
from sd3.sweep.words import setting_words, variant_code, variant_words

PAGE = Path(__file__).with_name("page.html")
SHEET_ROWS = 40  # rows per contact sheet
WRITE_EVERY = 3.0  # least seconds between writes while a sweep runs
OF_IMAGE = ("prompt", "seed")  # differ within a variant
FACTS = ("model", "steps", "cfg", "sampler")  # settings in the header of the page


def cell(value: Any) -> Any:
    """A value for a CSV file. A text that a spreadsheet would run as a formula is prefixed with `'`, which marks it as
    text.
    """
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


class Report:
    """The report of a sweep: `add` takes each finished image, `write` updates the files."""

    def __init__(self, folder: SweepFolder, plan: Plan, score: str | None = None):
        self.folder, self.plan, self.score = folder, plan, score
        self.scores = folder.journal.scores()
        self.rows: list[scoring.Row] = []
        self.differences: dict[str, float | None] = {}  # by finished image: mean difference to its baseline
        self.seconds = self.folder.journal.seconds()
        self.written_at = self.write_seconds = 0.0
        first = [plan.of(i)[0].settings for i in range(len(plan.variants))]
        self.settings = [{n: v for n, v in s.by_file_names().items() if n not in OF_IMAGE} for s in first]
        self.words = variant_words(plan.variants, self.settings)
        self.choices = [setting_words(s) for s in self.settings]
        self.varying = [n for n in self.settings[0] if self._varies(n)]
        flags = [plan.engines[plan.engine_of[i]] for i in range(len(plan.variants))]
        self.commands = [" ".join(command(s, f)) for s, f in zip(first, flags, strict=True)]

    def _varies(self, name: str) -> bool:
        """Whether a setting differs between variants; those that turn residual text streaming off do not count."""
        off = {OFF} if is_residual(name) else set()
        return len({c[name] for c in self.choices} - off) > 1

    def add(self, picture: PlannedImage) -> None:
        """Adds a finished image."""
        self.differences[picture.id] = self.folder.mean_difference(picture.id)

    def write_now_and_then(self) -> None:
        """Writes all files unless they were written a moment ago."""
        if time.perf_counter() - self.written_at > max(WRITE_EVERY, 20 * self.write_seconds):
            self.write(running=True)

    def write(self, running: bool, whole: bool = False) -> None:
        """Writes all files; contact sheets only if `whole`."""
        start = time.perf_counter()
        if not running:
            self.seconds = self.folder.journal.seconds()
        chosen = {id: s for (scorer, id), s in self.scores.items() if scorer == self.score and id in self.differences}
        self.rows = scoring.summarise(self.plan, chosen) if chosen else []
        data = "window.sweepData(" + json.dumps(self.data(chosen, running), ensure_ascii=False) + ");\n"
        data = data.replace("</", "<\\/")
        writing.atomic_write(self.folder.path / "data.js", lambda f: f.write(data.encode()))
        with open(PAGE, "rb") as page:
            writing.atomic_write(self.folder.path / "index.html", lambda f: shutil.copyfileobj(page, f))
        self._write_csv("results.csv", self.results(chosen))
        if self.rows:
            self._write_csv("scores.csv", self.score_lines())
            writing.atomic_write(self.folder.path / "scores.md", lambda f: f.write((self.table() + "\n").encode()))
        if whole:
            self.write_sheets()
        self.written_at = time.perf_counter()
        self.write_seconds = self.written_at - start

    def table(self) -> str:
        """Scores as Markdown."""
        return scoring.table(self.plan, self.rows, self.words)

    def data(self, scores: Mapping[str, Mapping[str, float]], running: bool) -> dict[str, Any]:
        """The contents of data.js."""
        grid = self.plan.grid
        pictures = []
        for p in self.plan.pictures:
            if p.id in self.differences:
                difference = self.differences[p.id]
                short = {k: round(v, 3) for k, v in scores.get(p.id, {}).items()}
                pictures.append([p.variant, p.prompt, grid.places[p.seed], p.id, difference, short])
        first = self.plan.pictures[0].settings
        return {
            "title": self.folder.path.resolve().name,
            "running": running,
            "planned": len(self.plan.pictures),
            "size": [first.width, first.height],
            "facts": self.facts(),
            "dates": self.folder.journal.dates(),
            "prompts": grid.prompts,
            "seeds": [str(s) for s in grid.seeds],  # text: JavaScript's numbers lose digits beyond 2^53
            "varying": self.varying,
            "variants": [
                {
                    "name": variant.name,
                    "words": words,
                    "code": variant_code(variant),
                    "baseline": self.plan.baselines[i],
                    "settings": self.settings[i],
                    "choices": {n: self.choices[i][n] for n in self.varying},
                    "command": self.commands[i],
                }
                for i, (variant, words) in enumerate(zip(self.plan.variants, self.words, strict=True))
            ],
            "score": self.score,
            "rows": [
                [r.variant, r.kind, r.count, r.mean, r.low, r.high, r.gain, r.gain_low, r.gain_high, r.pairs]
                for r in self.rows
            ],
            "scorer": scoring.DESCRIPTIONS.get(self.score, self.score),
            "least_units": scoring.LEAST_UNITS,
            "least_pairs": scoring.LEAST_PAIRS,
            "best": scoring.best(self.plan, self.rows),
            "pictures": pictures,
        }

    def facts(self) -> list[tuple[str, list[str]]]:
        """What the header of the page says: names of settings, each with its values over all variants."""
        facts = [(name, list(dict.fromkeys(c[name] for c in self.choices))) for name in FACTS]
        sizes = dict.fromkeys(f"{s['width']} × {s['height']}" for s in self.settings)
        return [*facts, ("size", list(sizes))]

    def results(self, scores: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        """Rows of results.csv: one per finished image."""
        kinds = sorted({k for s in scores.values() for k in s})
        out = []
        for p in self.plan.pictures:
            if p.id not in self.differences:
                continue
            line: dict[str, Any] = {
                "file": f"pictures/{p.id}.png",
                "variant": self.plan.variants[p.variant].name,
                "baseline": self.plan.variants[self.plan.baselines[p.variant]].name,
                "prompt": self.plan.grid.prompts[p.prompt],
                "seed": p.seed,
                "mean_difference": self.differences[p.id],
                "seconds": round(self.seconds[p.id], 3) if p.id in self.seconds else None,
            }
            line |= {f"{self.score}: {k}": scores.get(p.id, {}).get(k) for k in kinds}
            settings = self.settings[p.variant].items()
            line |= {n: v if v is None or isinstance(v, (str, int, float)) else json.dumps(v) for n, v in settings}
            out.append(line)
        return out

    def score_lines(self) -> list[dict[str, Any]]:
        """Rows of scores.csv: one per variant and kind."""
        names = ("count", "mean", "low", "high", "gain", "gain_low", "gain_high")
        return [
            {"scorer": self.score, "variant": self.plan.variants[r.variant].name, "kind": r.kind}
            | {n: getattr(r, n) for n in names}
            for r in self.rows
        ]

    def _write_csv(self, name: str, lines: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]) if lines else ["file"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: cell(v) for k, v in line.items()} for line in lines)
        writing.atomic_write(self.folder.path / name, lambda f: f.write(text.getvalue().encode()))

    def write_sheets(self) -> None:
        """Writes sheet.png, sheet_2.png ...: a row per prompt and seed, a column per variant."""
        grid = self.plan.grid
        columns = [self.plan.of(i) for i in range(len(self.plan.variants))]
        labels = [f"{prompt}  [{seed}]" for prompt in grid.prompts for seed in grid.seeds]
        names = [v.name for v in self.plan.variants]
        for start in range(0, len(labels), SHEET_ROWS):
            rows = range(start, min(start + SHEET_ROWS, len(labels)))
            paths = [[self.folder.picture(c[i].id) for c in columns] for i in rows]
            image = sheet.contact_sheet(paths, [labels[i] for i in rows], names)
            name = "sheet.png" if start == 0 else f"sheet_{start // SHEET_ROWS + 1}.png"
            writing.atomic_write(self.folder.path / name, lambda f, s=image: s.save(f, format="PNG"))
