"""Detects files that change while a process uses them, so that an image's record never names the wrong contents."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sd3.mistakes import Mistake, Where

Stamp = tuple[int, int, int]


class Changed(Mistake):
    """A file that was replaced, edited or deleted since it was opened."""


def stamp(path: str | Path) -> Stamp | None:
    """Size, time of the last change and inode of a file; None for a missing file."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class Unchanged:
    """Files, and their stamps when they were opened."""

    def __init__(self, stamps: Mapping[Where, tuple[str, Stamp | None]] | None = None) -> None:
        """stamps: of files that were opened before."""
        self.stamps: dict[Where, tuple[str, Stamp | None]] = dict(stamps or {})

    def add(self, where: Where, path: str | Path, first: Stamp | None = None) -> None:
        """Adds a file; call before reading it. where: the field that names it, and its path; first: its stamp if it was
        read before.
        """
        # absolute, because the working folder may change; abspath would resolve `link/..` to the folder of the link
        self.stamps[where] = os.path.join(os.getcwd(), path), first or stamp(path)

    def check(self) -> None:
        """Raises `Changed` for the first file that differs from when it was added."""
        for where, (path, then) in self.stamps.items():
            now = stamp(path)
            if now != then:
                how = "is gone" if now is None else "has changed"
                raise Changed(
                    *where, f"{how} since it was opened; no image is made from two versions of a file; start again"
                )

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """If the code inside fails and a file has changed, raises `Changed` instead."""
        try:
            yield
        except Exception:
            self.check()
            raise
