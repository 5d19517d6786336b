"""Output streams that may be closed, and clean stops, so that printing never loses an image. Needs no torch."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

STREAMS = ("stdout", "stderr")
STOPS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED, TERMINATED = 130, 143  # exit statuses, 128 + signal number as in shells


MOST_LINES = 1000  # number of lines that `Once` remembers


class Stopped(BaseException):
    """Raised on SIGTERM."""


class Once:
    """Filters out repeated lines; remembers only the most recent ones."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}

    def __call__(self, line: str) -> bool:
        """Whether a line is new."""
        if line in self.lines:
            return False
        while len(self.lines) >= MOST_LINES:
            self.lines.pop(next(iter(self.lines)))
        self.lines[line] = None
        return True


class SafeStream:
    """A text stream to which writing never fails: text that cannot be written is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes text; flushes after every line, so that a reader sees it at once."""
        try:
            self.stream.write(text)
            if "\n" in text:
                self.stream.flush()
        except UnicodeEncodeError:  # characters that the stream's encoding lacks are escaped
            encoding = getattr(self.stream, "encoding", None) or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # the reader is gone, the disk is full, or the stream is closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Writes buffered text."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Redirects the stream to the null device, so that flushing its buffer later does not fail either."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self.stream.fileno())
            finally:
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_descriptors() -> None:
    """Opens the null device in place of stdin, stdout and stderr if they are closed. Otherwise the next file that is
    opened, perhaps an image, would get their descriptor, and a library would print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
    for name in ("stdin", *STREAMS):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def begin() -> None:
    """Call this first in a process: opens closed descriptors, and lets a stop during imports end the process without a
    traceback, until `imported` restores the handlers.
    """
    open_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless SIGINT is ignored
        signal.signal(signal.SIGINT, _interrupted)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


def _interrupted(*_: Any) -> None:
    os._exit(INTERRUPTED)


def _terminated(*_: Any) -> None:
    os._exit(TERMINATED)


def imported() -> None:
    """Restores the signal handlers that `begin` replaced; call it before work whose results a stop must keep."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def delayed_stops() -> Iterator[None]:
    """Context in which a stop (Ctrl-C, SIGTERM) is delayed to its end; a second stop acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: handler for number in STOPS if callable(handler := signal.getsignal(number))}
    arrived: list[int] = []

    def wait(number: int, frame: Any) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if len(arrived) == 1:
            before[arrived[0]](arrived[0], None)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Context in which writing to stdout and stderr never fails, even if their readers are gone."""
    open_descriptors()
    before = {name: getattr(sys, name) for name in STREAMS}
    for name, stream in before.items():
        setattr(sys, name, stream if isinstance(stream, SafeStream) else SafeStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def command_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a `main`: output streams may be closed, and the exit status after Ctrl-C is 130."""

    @functools.wraps(main)
    def guarded(*arguments: Any, **options: Any) -> int:
        with safe_output():
            try:
                return main(*arguments, **options)
            except KeyboardInterrupt:
                return INTERRUPTED

    return guarded
