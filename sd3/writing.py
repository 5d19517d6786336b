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

from sd3.mistakes import Unwritable, verbatim

_umask_lock = threading.Lock()  # reading the umask changes it briefly


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that no half-written file is visible.

    Raises Unwritable naming the file; nothing is left behind.
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


def cannot_write(path: Path, error: OSError) -> Unwritable:
    """The Mistake for a file that could not be written, with the reason."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Unwritable("", path, f"cannot be written: {'the disk is full' if full else error.strerror or error}")


def open_folder(path: str) -> Path:
    """A folder to write in, created if it does not exist. Raises Unwritable."""
    check_writable(path)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def _sync(handle: int) -> None:
    """Flushes a file to disk, if the file system supports it."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def rename_finished(partial: Path, path: Path) -> None:
    """Renames a finished temporary file, and gives it the permissions of a new file if the file system has any."""
    with _umask_lock:
        umask = os.umask(0)
        os.umask(umask)
    with contextlib.suppress(OSError):
        os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)


def append_line(path: Path, value: Any) -> None:
    """Appends a value to a file as a line of JSON; first ends a line that a kill cut short.

    Raises Unwritable naming the file, and leaves it unchanged.
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
    """Creates `parent/<name><postfix or _date-time>`, with a number appended if that exists.

    Raises Unwritable, which names the field out_dir.
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
                raise Unwritable("out_dir", "", f"{verbatim(str(parent))} is not a folder") from None
            number += 1
        except (OSError, ValueError) as error:  # ValueError: an impossible file name
            why = getattr(error, "strerror", None) or error
            raise Unwritable("out_dir", "", f"cannot create {verbatim(str(folder))} ({why})") from None


def check_writable(out_dir: str, field: str = "out_dir") -> None:
    """Raises Unwritable if a folder, which need not exist, cannot be written; creates nothing."""
    place = Path(out_dir)
    while not os.path.exists(place):  # also false below a folder without permission to list it
        if os.path.islink(place) or place == place.parent:
            break
        place = place.parent
    if not os.path.isdir(place):
        raise Unwritable(field, out_dir, f"{verbatim(str(place))} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise Unwritable(field, out_dir, f"{verbatim(str(place))} cannot be written")


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; dataclasses become objects; paths and other types become text."""
    data = json_bytes(value, indent=1) + b"\n"
    atomic_write(path, lambda f: f.write(data))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8; parts that JSON cannot represent become their descriptions."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(_writable(value), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # lone surrogates are escaped as in JSON


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return _described(value)


def _described(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # an object's own text may fail
        return f"<{type(value).__name__}>"


def _writable(value: Any, depth: int = 0) -> Any:
    """A value with everything that JSON cannot represent replaced."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        try:
            json.dumps(value)
        except ValueError:  # an integer with more digits than Python prints
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
