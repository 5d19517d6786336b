"""Notes, progress and stage times of an engine, which prints nothing itself: a command gives it a `Terminal`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from sd3.mistakes import spell
from sd3.streams import Once


class Reporter:
    """Receives lines, notes and progress. This one drops them."""

    quiet = True

    def say(self, text: str) -> None:
        """A line about the work."""

    def note(self, text: str) -> None:
        """A line for the user; names of fields stand between backquotes. A repeated one counts once."""

    @contextlib.contextmanager
    def progress(self, total: int, what: str, unit: str = "step") -> Iterator[Callable[[int], Any]]:
        """Around work of `total` units, `B` for bytes; gives a function to call with the units done since its last
        call.
        """
        yield lambda done: None


SILENT = Reporter()


class Terminal(Reporter):
    """Notes on stderr, each once, above progress bars. quiet: says nothing, may be set at any time."""

    def __init__(self, spelling: Callable[[str], str] = str, quiet: bool = False):
        """spelling: how notes name a field, such as `flag_name`."""
        self.spelling = spelling
        self.quiet = quiet or sys.stderr is None  # as in programs without a console
        self.first = Once()

    def say(self, text: str) -> None:
        """A line as it is, above any progress bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A line that was not said before, its fields spelled."""
        line = spell(text, self.spelling)
        if self.first(line):
            self.say(line)

    @contextlib.contextmanager
    def progress(self, total: int, what: str, unit: str = "step") -> Iterator[Callable[[int], Any]]:
        """A bar, which goes when the work is done."""
        in_bytes = unit == "B"
        with tqdm(total=total, desc=what, unit=unit, unit_scale=in_bytes, disable=self.quiet, leave=False) as bar:
            yield bar.update


class Stages(dict[str, float]):
    """Seconds by stage."""

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - start
