"""What every command line shares: words to values, exit statuses, signals, notes. Needs no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from sd3 import streams
from sd3.flags import READERS, Flags, check_flag
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake, display, flag_name
from sd3.readers import read_bool
from sd3.reading import Note


def begin(words: Sequence[str]) -> None:
    """First thing of `sd3_infer.py` as a program, before torch is imported: ends the process on a mistake in the flags.

    Asks torch for large pages too, which it reads once: most of the time that loading takes on a CPU is for pages.
    """
    streams.begin()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if {"--help", "-h"} & set(words):
        return
    try:
        raw = read_arguments(words)
        if "replay" not in raw:  # else they are checked together with the picture's own
            Flags.read(raw)
    except USER_ERRORS as error:
        with streams.bearing():
            status = fail(error)
        sys.exit(status)


def read_arguments(
    arguments: Sequence[str], readers: Mapping[str, Any] = READERS, bare: str | None = "prompt"
) -> dict[str, str]:
    """Flags and their values exactly as typed: `--name value`, `--name=value`, a switch, one word for flag `bare`.

    The word after a flag is its value whatever it looks like (`-0.5`, `-`, `None`), unless it is a flag itself.
    readers: the flags there are; those read by `read_bool` are switches. Raises ValueError for an unknown flag, a
    missing value and for stray words; the last of equal flags counts.
    """
    switches = [name for name, reader in readers.items() if reader is read_bool]
    is_flag = lambda word: word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in readers  # noqa: E731
    out: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare is None or bare in out or word.startswith("-"):
                told = "not understood; flags start with --, and lists with spaces need quotes"
                raise ValueError(f"{display(word)}: {told}")
            out[bare] = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no") and name[2:] in switches:  # fire's way to say False
            name, equals, value = name[2:], "=", "False"
        check_flag(name, readers)
        if not equals:
            following = words[0] if words else None
            if name in switches:
                value = words.pop(0) if following is not None and _is_bool(following) else "True"
            elif following is None or is_flag(following):
                raise ValueError(f"--{name}: needs a value")
            else:
                value = words.pop(0)
        out[name] = value
    return out


def _is_bool(word: str) -> bool:
    """Whether a word is a switch's value, or several parted by `;`, which a sweep takes."""
    values = word.strip().lower().removesuffix(";").split(";")
    return all(value.strip() in ("true", "false", "1", "0", "yes", "no", "on", "off") for value in values)


USER_ERRORS = (ValueError, FileNotFoundError, OSError)


def fail(error: BaseException) -> int:
    """One line on stderr for a mistake of the user's; returns the exit status."""
    text = error.spelled(flag_name) if isinstance(error, Mistake) else str(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


class SelfCheckFailed(Exception):
    """A device computes what it should not; what it is has been printed."""


def _stop(*_: Any) -> None:
    raise streams.Stopped


def _note_once() -> Callable[..., None]:
    """Shows warnings as notes, each once: files are opened more than once."""
    first = streams.Once()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if first(str(message)):
            tqdm.write(f"note: {message}", file=sys.stderr)

    return show


def guarded(work: Callable[[], Any], smaller: str) -> int:
    """Does a command line's work; returns the exit status: 0, 2 for a mistake in flags or files, 1 where memory ran out
    (`smaller`: the flags to turn down), 130 and 143 if stopped.
    """
    previous = None
    if threading.current_thread() is threading.main_thread():
        streams.imported()
        previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with streams.bearing(), warnings.catch_warnings():
            warnings.showwarning = _note_once()
            warnings.simplefilter("always", Note)  # whatever PYTHONWARNINGS says of warnings
            work()
        return 0
    except SelfCheckFailed:
        return 1
    except KeyboardInterrupt:
        return streams.INTERRUPTED
    except streams.Stopped:
        return streams.TERMINATED
    except Exception as error:
        with streams.bearing():
            if out_of_memory(error):
                told = f"out of memory; try a smaller {smaller} ({one_line(error)})"
                print(f"error: {error if isinstance(error, OutOfMemory) else told}", file=sys.stderr)
                return 1
            if isinstance(error, USER_ERRORS):
                return fail(error)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
