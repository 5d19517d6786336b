"""Writing files: under a temporary name, then renamed; folders; JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

_umask_lock = threading.Lock()  # reading the umask sets it for a moment


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that no half-written file is ever seen.

    Raises OSError naming the file; nothing is left behind.
    """
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".partial")
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            _sync(f.fileno())
        rename_finished(Path(name), path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise


def cannot_write(path: Path, error: OSError) -> OSError:
    """The error of a file that could not be written, with the file's name in it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else error.strerror or error
    return OSError(error.errno, f"{path}: cannot be written: {why}")


def _sync(handle: int) -> None:
    """Waits until a file is on its disk; where the file system has no such call, it is written as well as it can be."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def rename_finished(partial: Path, path: Path) -> None:
    """Gives a finished temporary file its name, and, where the file system has them, the rights of any new file."""
    with _umask_lock:
        umask = os.umask(0)
        os.umask(umask)
    with contextlib.suppress(OSError):
        os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)


def append_line(path: Path, value: Any) -> None:
    """Adds a value as a line of JSON to a file; a line that a kill tore stays apart from it.

    Raises OSError naming the file, which is then as it was.
    """
    try:
        with open(path, "ab") as f:
            size = f.tell()
            line = json_bytes(value) + b"\n"
            if size and not _ends_with_newline(path):
                line = b"\n" + line
            try:
                f.write(line)
                f.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(f.fileno(), size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from None


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def make_folder(parent: Path, name: str, postfix: str | None, now: datetime.datetime | None = None) -> Path:
    """Makes `parent/<name><postfix or _date-time>`, with a number behind it where that exists already.

    Raises ValueError for a place that cannot be written.
    """
    stamp = postfix if postfix else (now or datetime.datetime.now()).strftime("_%Y-%m-%dT%H-%M-%S")
    stamp = stamp.replace("/", "_").replace("\\", "_")
    number = 0
    while True:
        folder = parent / f"{name}{stamp}{f'_{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise ValueError(f"--out_dir: {parent} is not a folder") from None
            number += 1
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"--out_dir: cannot make {folder} ({why})") from None


def check_writable(out_dir: str, flag: str = "out_dir") -> None:
    """Raises ValueError where pictures could not be written below `out_dir`; makes nothing."""
    place = Path(out_dir)
    while not os.path.exists(place):  # also where one may not look
        if os.path.islink(place) or place == place.parent:
            break
        place = place.parent
    if not os.path.isdir(place):
        raise ValueError(f"--{flag} {out_dir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag} {out_dir}: {place} cannot be written")


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; dataclasses become objects, paths and what JSON does not know text."""
    data = json_bytes(value, indent=1) + b"\n"
    atomic_write(path, lambda f: f.write(data))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8, whatever is in it: a part that cannot be written becomes its description."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(_writable(value), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # lone surrogates come out as JSON writes them


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return _described(value)


def _described(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a foreign object's own text
        return f"<{type(value).__name__}>"


def _writable(value: Any, depth: int = 0) -> Any:
    """A value with only what JSON can hold in it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        try:
            json.dumps(value)
        except ValueError:  # a whole number with more digits than Python prints
            return f"<{type(value).__name__}>"
        return value
    if depth > 20:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        keys = ((k if isinstance(k, str) else _described(k), v) for k, v in value.items())
        return {k: _writable(v, depth + 1) for k, v in keys}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_writable(v, depth + 1) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _writable(getattr(value, f.name, None), depth + 1) for f in dataclasses.fields(value)}
    return _writable(value.tolist(), depth + 1) if isinstance(value, (np.generic, np.ndarray)) else _described(value)
