"""What a command line prints must never cost a picture: streams that may be closed, and quiet stops. Needs no torch."""

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
INTERRUPTED, TERMINATED = 130, 143  # exit statuses, as shells count signals


MOST_SAID = 1000  # lines that `Once` remembers


class Stopped(BaseException):
    """SIGTERM arrived."""


class Once:
    """Whether a line is said for the first time; of many lines the last are remembered."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}

    def __call__(self, line: str) -> bool:
        """True for a line that is new."""
        if line in self.lines:
            return False
        while len(self.lines) >= MOST_SAID:
            self.lines.pop(next(iter(self.lines)))
        self.lines[line] = None
        return True


class Bearing:
    """A text stream that can always be written to: what its reader does not take is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes, and hands on at the end of every line, so that a reader sees it now."""
        try:
            self.stream.write(text)
            if "\n" in text:
                self.stream.flush()
        except UnicodeEncodeError:  # letters that the stream's encoding lacks are spelled out
            encoding = getattr(self.stream, "encoding", None) or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # the reader left, the disk is full, or the stream was closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Hands on what is buffered."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Leads the stream to nowhere, so that what it still holds fails no later flush either."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self.stream.fileno())
            finally:
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_descriptors() -> None:
    """Opens those of stdin, stdout and stderr that are closed: else the next file that is opened, an image perhaps,
    gets their number, and what a library prints goes into it.
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
    """First thing of a process: opens what is closed, and makes it end quietly if it is stopped during imports.

    `imported` takes the handlers back.
    """
    open_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupted)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


def _interrupted(*_: Any) -> None:
    os._exit(INTERRUPTED)


def _terminated(*_: Any) -> None:
    os._exit(TERMINATED)


def imported() -> None:
    """Takes the handlers of `begin` back, once there is work whose results a stop must keep."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, a stop (Ctrl-C, SIGTERM) waits until what belongs together is done; a second one does not wait."""
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
def bearing() -> Iterator[None]:
    """Inside, stdout and stderr can be written to whatever became of their readers."""
    open_descriptors()
    before = {name: getattr(sys, name) for name in STREAMS}
    for name, stream in before.items():
        setattr(sys, name, stream if isinstance(stream, Bearing) else Bearing(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def command_line(main: Callable[..., int]) -> Callable[..., int]:
    """A `main` that writes to streams that bear being closed, and whose status is 130 if Ctrl-C ends it."""

    @functools.wraps(main)
    def guarded(*arguments: Any, **options: Any) -> int:
        with bearing():
            try:
                return main(*arguments, **options)
            except KeyboardInterrupt:
                return INTERRUPTED

    return guarded
