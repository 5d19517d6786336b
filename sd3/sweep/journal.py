"""The events and scores of a sweep, one JSON object per line: log.jsonl and scores.jsonl."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3 import writing
from sd3.reading import parse_json

LOG, SCORES = "log.jsonl", "scores.jsonl"
MOST_NOTES = 5  # notes about damaged lines of a file


class Journal:
    """The lines that a sweep appends to its folder, and reads back when it resumes."""

    def __init__(self, folder: Path, say: Callable[[str], Any] = lambda line: None):
        """say: receives a note about each line that cannot be read, once."""
        self.folder, self.say = folder, say
        self.damaged: set[tuple[str, int]] = set()  # (file, line) already seen

    def log(self, event: str, **values: Any) -> None:
        """Adds a line to log.jsonl."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        self._append(LOG, {"time": now, "process": os.getpid(), "event": event, **values})

    def add_scores(self, id: str, scores: Mapping[str, float], scorer: str) -> None:
        """Adds the scores of an image, by kind."""
        self._append(SCORES, {"id": id, "scorer": scorer, "scores": dict(scores)})

    def scores(self) -> dict[tuple[str, str], dict[str, float]]:
        """Scores by (scorer, image)."""
        return {(line["scorer"], line["id"]): line["scores"] for line in self._lines(SCORES, is_score)}

    def seconds(self) -> dict[str, float]:
        """Seconds per image: its share of the time of its batch."""
        batches = [line for line in self._lines(LOG, is_event) if line["event"] == "batch"]
        return {id: line["seconds"] / len(line["pictures"]) for line in batches for id in line["pictures"]}

    def dates(self) -> tuple[str, str] | None:
        """When the first and the last batch were made, in ISO 8601; None before the first."""
        times = [
            t for line in self._lines(LOG, is_event) if line["event"] == "batch" and is_time(t := line.get("time"))
        ]
        return (times[0], times[-1]) if times else None

    def _append(self, name: str, value: Any) -> None:
        writing.append_line(self.folder / name, value)

    def _lines(self, name: str, fits: Callable[[Any], bool]) -> Iterator[dict[str, Any]]:
        """The objects of a file. Skips lines that were cut off or not written by a sweep, with one note each."""
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        value = parse_json(line)
                        why = "" if fits(value) else "not written by this tool"
                    except ValueError as error:  # includes invalid UTF-8
                        why = " ".join(str(error).split())[:100]
                    if why:
                        self._note(path, number, why)
                    else:
                        yield value
        except OSError:
            return

    def _note(self, path: Path, number: int, why: str) -> None:
        if (path.name, number) in self.damaged:
            return
        self.damaged.add((path.name, number))
        count = sum(name == path.name for name, _ in self.damaged)
        if count <= MOST_NOTES:
            self.say(f"note: {path}, line {number}: cannot be read ({why}) and is skipped")
        elif count == MOST_NOTES + 1:
            self.say(f"note: {path}: further lines cannot be read and are skipped")


def is_event(line: Any) -> bool:
    """Whether a line has the form that `Journal.log` writes."""
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return False
    if line["event"] != "batch":
        return True
    pictures, seconds = line.get("pictures"), line.get("seconds")
    named = isinstance(pictures, list) and bool(pictures) and all(isinstance(p, str) for p in pictures)
    return named and _is_number(seconds) and seconds >= 0


def is_time(value: Any) -> bool:
    """Whether a value is a time as `Journal.log` writes it."""
    try:
        return isinstance(value, str) and datetime.datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def is_score(line: Any) -> bool:
    """Whether a line has the form that `Journal.add_scores` writes."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("id", "scorer")):
        return False
    scores = line.get("scores")
    return isinstance(scores, dict) and bool(scores) and all(map(_is_number, scores.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
