"""Files that a process uses must stay as they were when it opened them: else a record names what was not used."""

from __future__ import annotations

import os
from pathlib import Path

from sd3.mistakes import Mistake, Where

Stamp = tuple[int, int, int]


class Changed(Mistake):
    """A file that was replaced, edited or deleted since it was opened."""


def stamp(path: str | Path) -> Stamp | None:
    """Size, time of the last change and inode of a file; None where there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class Unchanged:
    """Files with the stamps that they had when they were opened."""

    def __init__(self) -> None:
        self.stamps: dict[Where, tuple[str, Stamp | None]] = {}

    def add(self, where: Where, path: str | Path, known: Stamp | None = None) -> None:
        """Notes a file, before it is read. where: the field that names it, and its path; known: its stamp, where it
        was read before.
        """
        # from the root, as the working folder may change; not abspath, which takes `link/..` for the folder of the link
        self.stamps[where] = os.path.join(os.getcwd(), path), known or stamp(path)

    def check(self) -> None:
        """Raises `Changed` naming the first file that is not what it was."""
        for where, (path, then) in self.stamps.items():
            now = stamp(path)
            if now != then:
                how = "is gone" if now is None else "has changed"
                raise Changed(*where, f"{how} since it was opened; no picture is made of two files: start again")
