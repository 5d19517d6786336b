"""The one door through which other people's files are read: whatever goes wrong inside becomes one line with the file.

Needs no torch. Readers open files inside `reading`, after `check_file`.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3.mistakes import Missing, Mistake, Where


class Note(UserWarning):
    """A warning of ours: something about a file that people are to know; the command lines always say it."""


class Unreadable(ValueError):
    """A file that cannot be used, said in one line that names it."""


@contextlib.contextmanager
def reading(where: Where | str, why: str = "cannot be read") -> Iterator[None]:
    """Turns whatever a library raises inside into `Unreadable` with one line: `where: why (what it said)`.

    where: how the file is named to the user, such as `--model x.safetensors`. `Unreadable` and running out
    of memory pass unchanged, and so does everything that is not an error (Ctrl-C, SIGTERM); a file that is gone stays a
    FileNotFoundError.
    """
    try:
        yield
    except (Mistake, Unreadable, MemoryError):
        raise
    except FileNotFoundError as error:
        if error.errno is None:  # it says which file by its flag
            raise
        raise _missing(where, f"{error.strerror}: it went away while it was read") from None
    except RecursionError:
        raise _mistake(where, f"{why} (it is nested too deeply)") from None
    except Exception as error:
        raise _mistake(where, f"{why}{_said(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a library written in Rust raises where it fails
            raise
        raise _mistake(where, f"{why}{_said(error)}") from None


def _mistake(where: Where | str, why: str) -> Mistake:
    return Mistake(*where, why) if isinstance(where, Where) else Unreadable(f"{where}: {why}")


def _missing(where: Where | str, why: str) -> FileNotFoundError:
    return Missing(*where, why) if isinstance(where, Where) else FileNotFoundError(f"{where}: {why}")


def _said(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = " ".join(said.split())[:200]
    return f" ({said})" if said else ""


def check_file(where: Where | str, path: str | Path) -> None:
    """Raises FileNotFoundError or `Unreadable` where `path` is no plain file: a pipe or a device would never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise _missing(where, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise _mistake(where, f"cannot be opened{_said(error)}") from None
    if stat.S_ISDIR(mode):
        raise _mistake(where, "is a folder; a file is needed")
    if not stat.S_ISREG(mode):
        raise _mistake(where, "is not a file (a pipe, a socket or a device)")


def parse_json(text: str | bytes, once: bool = False) -> Any:
    """The value of a JSON text; raises ValueError for anything that is none, nested too deeply among it.

    once: also where an object names something twice, as people's own files may by a slip; of others the last counts.
    """
    try:
        return json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.60} is there twice")
    return out
