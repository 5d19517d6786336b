"""Reads files that users supply: every error becomes one `Mistake` that names the file. Needs no torch.

A reader calls `check_file`, then opens the file inside `reading`.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3.mistakes import Missing, Mistake, Where, spell, verbatim


class Note(UserWarning):
    """A warning of this tool, about a file or a setting without effect; the command lines always show it. Fields stand
    between backquotes.
    """

    def __str__(self) -> str:
        return spell(self.args[0])


def warn(text: str) -> None:
    """Warns with a `Note`, at the line outside of this package that led here."""
    frame, level, outermost = sys._getframe(), 1, 1
    while frame := frame.f_back:
        level += 1
        if frame.f_globals.get("__name__", "").startswith("sd3."):
            outermost = level
    warnings.warn(Note(text), stacklevel=outermost + 1)


@contextlib.contextmanager
def reading(where: Where, why: str = "cannot be read") -> Iterator[None]:
    """Turns errors raised inside into a `Mistake`: where, why and the error's message.

    where: the field that names the file, and its path. A `Mistake` and running out of memory pass
    unchanged, as do Ctrl-C and SIGTERM. A file that disappears becomes `Missing`.
    """
    try:
        yield
    except (Mistake, MemoryError):
        raise
    except FileNotFoundError as error:
        reason = error.strerror or " ".join(str(error).split())[:200] or "no such file"
        raise Missing(*where, f"{verbatim(reason)}: it disappeared while it was read") from None
    except RecursionError:
        raise Mistake(*where, f"{why} (it is nested too deeply)") from None
    except Exception as error:
        raise Mistake(*where, f"{why}{_reason(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by libraries written in Rust
            raise
        raise Mistake(*where, f"{why}{_reason(error)}") from None


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = verbatim(" ".join(text.split())[:200])
    return f" ({text})" if text else ""


def check_file(where: Where, path: str | Path) -> None:
    """Raises `Missing`, or `Mistake` if `path` is not a regular file: a pipe or a device might never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise Missing(*where, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise Mistake(*where, f"cannot be opened{_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise Mistake(*where, "is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise Mistake(*where, "is not a file (a pipe, a socket or a device)")


def parse_json(text: str | bytes, once: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError for text that is not JSON or is nested too deeply.

    once: refuses repeated keys, a likely mistake in a file written by hand; otherwise the last one counts.
    """
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeats if once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.60} is listed twice")
    return out
