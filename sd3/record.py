"""The record of a run: `run.jsonl` while images are made, `run.json` after the run."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout
from PIL import Image

from sd3 import png, streams, writing
from sd3.engine import Engine
from sd3.mistakes import Mistake
from sd3.reading import parse_json
from sd3.settings import Flags, Settings
from sd3.versions import __version__, versions

RUN, LINES, LOCK = "run.json", "run.jsonl", ".lock"
RUNNING = "running"


class Picture(NamedTuple):
    """A finished image: its number in the run, its settings, its pixels (or a Mistake if it
    failed), and the record of files, text encoders and device.
    """

    number: int
    settings: Settings
    image: Image.Image | Mistake
    record: Mapping[str, Any]


class SingleFile:
    """Saves one image to a given file, without a run folder or record."""

    def __init__(self, path: Path, no_metadata: bool):
        self.path, self.no_metadata, self.count = path, no_metadata, 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """As `RunRecord.recording`, but there is no record to write."""
        yield

    def save(self, picture: Picture) -> Path:
        """Writes the image, creating its folder; returns its path. Raises Unwritable."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing.cannot_write(self.path, error) from None
        png.save_picture(self.path, picture.image, picture.settings, None if self.no_metadata else picture.record)
        self.count += 1
        return self.path


class RunRecord:
    """Saves a run's images and keeps their record: `run.jsonl` has a line about the run, then a line per image.
    At the end of the run, or at the start of the next one after a kill (see `finish_killed`), it becomes `run.json`.
    """

    def __init__(self, folder: Path, flags: Flags, given: Sequence[str], total: int, engine: Engine):
        """total: number of planned images, 0 if unknown; given: the flags as typed."""
        self.folder, self.flags, self.given, self.total, self.engine = folder, flags, list(given), total, engine
        self.count = 0
        self.provenance: Mapping[str, Any] = {}
        self.beside: dict[str, Any] = {}  # additional files by name, written with the first image
        self.unwritten: list[Any] = []  # lines not written because the disk was full
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.start = time.monotonic()
        self.lock = FileLock(folder / LOCK, timeout=0)  # released by the system when the process is killed

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the making of the images: writes the record at the end, also after an error or a stop. Removes a
        folder without images.
        """
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, streams.Stopped))
            with streams.delayed_stops(), contextlib.suppress(OSError):  # report the first error
                self.end("stopped" if stopped else "failed")
            raise
        with streams.delayed_stops():
            self.end("finished")

    def save(self, picture: Picture) -> Path:
        """Writes a finished image under the next number and adds it to the record; returns its path. Raises
        Unwritable.
        """
        path = self.folder / f"{self.count:06d}.png"
        png.save_picture(path, picture.image, picture.settings, None if self.flags.no_metadata else picture.record)
        self.add(path, picture.settings, picture.record)
        return path

    def add(self, path: Path, settings: Settings, provenance: Mapping[str, Any]) -> None:
        """Adds a finished image to the record. A full disk is reported at the next image or in `end`."""
        self.provenance = provenance
        if not self.count:
            self._take_lock()
            self.unwritten.append(self._head(RUNNING))
        self.count += 1
        self.unwritten.append({"file": path.name, "settings": settings.public()})
        with contextlib.suppress(OSError):
            self._write_lines()
            self._write_beside()

    def end(self, status: str) -> None:
        """Writes run.json, or removes the folder if it holds no image; raises Unwritable."""
        try:
            if not self.count:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
                return
            self.unwritten.append(self._head(status))
            self._write_lines()
            finish(self.folder)
            self._write_beside()
        finally:
            self._release_lock()

    def _head(self, status: str) -> dict[str, Any]:
        """The record without its images."""
        return {
            "status": status,
            "started": self.started,
            "seconds": round(time.monotonic() - self.start, 2),
            "stages": {name: round(spent, 2) for name, spent in self.engine.stages.items()},
            "device": str(self.engine.device),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "arguments": self.given,
            "flags": self.flags,
            **self.provenance,
            "version": __version__,
            "versions": versions(),
            "planned": self.total,
        }

    def _write_lines(self) -> None:
        while self.unwritten:
            writing.append_line(self.folder / LINES, self.unwritten[0])
            self.unwritten.pop(0)

    def _write_beside(self) -> None:
        for name, value in self.beside.items():
            if not (self.folder / name).exists():
                writing.write_json(self.folder / name, value)

    def _take_lock(self) -> None:
        with contextlib.suppress(OSError, NotImplementedError):  # the file system has no locks
            self.lock.acquire()

    def _release_lock(self) -> None:
        if self.lock.is_locked:
            give_back(self.lock)


def give_back(lock: FileLock) -> None:
    """Releases a lock and removes its file."""
    lock.release()
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The objects of a run.jsonl and their lines; skips a line that was cut short by a kill."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = parse_json(line)
                if isinstance(value, dict):
                    yield value, line.strip()


def finish(folder: Path) -> int:
    """Turns a folder's run.jsonl into run.json; returns the number of images.

    The last line that is not about an image says how the run ended; if it is the first line, the run was killed. Raises
    Unwritable, and KeyError if there is no such line. Reads one line at a time.
    """
    lines, head, count = folder / LINES, {}, 0
    for value, _ in read_lines(lines):
        if "file" in value:
            count += 1
        else:
            head = value
    if head["status"] == RUNNING:
        last = lines.stat().st_mtime - datetime.datetime.fromisoformat(head["started"]).timestamp()
        head |= {"status": "killed", "seconds": round(max(last, 0.0), 2), "stages": {}}  # only written when a run ends
    head["planned"] = max(head["planned"], count)
    start = writing.json_bytes(head, indent=1).removesuffix(b"\n}")

    def write(file: IO[bytes]) -> None:
        file.write(start + b',\n "pictures": [')
        between = b"\n  "
        for value, line in read_lines(lines):
            if "file" in value:
                file.write(between + line)
                between = b",\n  "
        file.write(b"\n ]\n}\n")

    writing.atomic_write(folder / RUN, write)
    with contextlib.suppress(OSError):
        lines.unlink()
    return count


def finish_killed(parent: Path) -> list[str]:
    """Writes run.json for every run in the folders of `parent` that was killed; returns a line for each.

    Skips runs in progress, which lock their folder, and unreadable records. Raises nothing.
    """
    reports = []
    with contextlib.suppress(OSError):
        for lines in sorted(parent.glob(f"*/{LINES}")):
            with contextlib.suppress(Exception):  # a damaged record may raise anything
                reports.append(_finish_if_killed(lines))
    return [line for line in reports if line]


def _finish_if_killed(lines: Path) -> str:
    """Writes the run.json of a run that was killed and returns a line about it; empty for another run."""
    if not lines.is_file():  # a pipe might never end
        return ""
    lock = FileLock(lines.with_name(LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return ""
    try:
        if not lines.exists():  # the run ended, or another process finished it
            return ""
        count = finish(lines.parent)
        images = f"{count} image{'s' if count != 1 else ''}"
        return f"note: a run in {lines.parent} was killed; its {RUN} is written now, with {images}"
    finally:
        give_back(lock)
