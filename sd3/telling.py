"""Notes, progress and stage times. An engine prints nothing itself: commands give it a `Terminal`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from sd3.mistakes import spell
from sd3.reading import warn
from sd3.streams import Once

SECONDS_BETWEEN_LINES = 60.0  # for the same work, without a terminal
SECONDS_WORTH_A_LINE = 1.0


def size_in_words(count: int) -> str:
    """Bytes as `4.18 GB` or `26.89 MB`."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


class Reporter:
    """Receives lines, notes and progress. This base class ignores them."""

    quiet = True

    def say(self, text: str) -> None:
        """A line about the work."""

    def note(self, text: str) -> None:
        """A line for the user, with field names between backquotes; repetitions are shown once. It begins with `note: `
        if it is about something unexpected.
        """

    @contextlib.contextmanager
    def progress(self, total: int, what: str, unit: str = "step") -> Iterator[Callable[[int], Any]]:
        """Encloses work of `total` units (`B`: bytes); yields a function to call with the units done since the last
        call.
        """
        yield lambda done: None


SILENT = Reporter()


class NoteList(Reporter):
    """Collects lines and notes, each note once, with its fields spelled. quiet: collects nothing; may be set at any
    time.
    """

    def __init__(self, spelling: Callable[[str], str] = str):
        """spelling: how notes name a field, such as `flag_name`."""
        self.spelling, self.quiet = spelling, False
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Adds a line."""
        if not self.quiet:
            self.lines.append(text)

    def note(self, text: str) -> None:
        """Adds a note, unless it is among the lines."""
        if (line := spell(text, self.spelling)) not in self.lines:
            self.say(line)


class Warnings(Reporter):
    """Notes as warnings of class `Note` at the caller's line. Ignores lines and progress."""

    def note(self, text: str) -> None:
        """Warns of something unexpected. Python shows a warning once per line of code that caused it."""
        if text.startswith("note: "):
            warn(text.removeprefix("note: "))


class Terminal(Reporter):
    """Notes on stderr, each once, and progress: bars on a terminal, lines elsewhere. quiet: writes nothing; may be set
    at any time.
    """

    def __init__(self, spelling: Callable[[str], str] = str, quiet: bool = False):
        """spelling: how notes name a field, such as `flag_name`."""
        self.spelling = spelling
        self.quiet = quiet or sys.stderr is None  # no stderr, as in programs without a console
        self.first = Once()

    def say(self, text: str) -> None:
        """Writes a line above any progress bar."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """Writes a note once, with its fields spelled."""
        line = spell(text, self.spelling)
        if self.first(line):
            self.say(line)

    @contextlib.contextmanager
    def progress(self, total: int, what: str, unit: str = "step") -> Iterator[Callable[[int], Any]]:
        """See `progress`."""
        with progress(total, what, unit, quiet=self.quiet) as update:
            yield update


@contextlib.contextmanager
def progress(
    total: int, what: str, unit: str = "step", *, done: int = 0, quiet: bool = False, leave: bool = False
) -> Iterator[Callable[[int], Any]]:
    """Encloses work of `total` units (`B`: bytes). Shows a bar on a terminal; elsewhere writes a line per minute, and a
    last line if the work took a second. Yields a function to call with the units done since the last call.

    done: units that an earlier run did; leave: whether the bar stays after the work.
    """
    in_bytes = unit == "B"
    if quiet or sys.stderr is None:
        yield lambda count: None
    elif sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=in_bytes, leave=leave) as bar:
            yield bar.update
    else:
        log = ProgressLog(total, what, unit, done)
        yield log.update
        log.end()


class ProgressLog:
    """Progress as lines on stderr, for logs: `loading MMDiT 4.2 GB ... 3.1 s`."""

    def __init__(self, total: int, what: str, unit: str, done: int):
        self.total, self.what, self.unit, self.done = total, what, unit, done
        self.start = self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Counts finished units; writes a line if the last one is a minute old."""
        self.done += count
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self._write(f"{self._amount(self.done)} of {self._amount(self.total)}")

    def end(self) -> None:
        """Writes the last line, unless the work was too short for one."""
        if time.monotonic() - self.start >= SECONDS_WORTH_A_LINE:
            self._write(self._amount(self.done))

    def _amount(self, count: int) -> str:
        return size_in_words(count) if self.unit == "B" else f"{count} {self.unit}{'s' if count != 1 else ''}"

    def _write(self, amount: str) -> None:
        tqdm.write(f"{self.what} {amount} ... {time.monotonic() - self.start:.1f} s", file=sys.stderr)


class Stages(dict[str, float]):
    """Seconds by stage."""

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + time.perf_counter() - start
