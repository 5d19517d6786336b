"""A sweep's folder: its finished images, and the lock of the process that works in it.

pictures/ID.png       finished images, each written under a temporary name and renamed
difference/ID.png     how each image differs from its baseline, as a heat map
scores.jsonl          one line per score, see `journal`
log.jsonl             one line per event, see `journal`
sweep.json            the grid and its files, see `record`
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from sd3 import png, sheet, writing
from sd3.flags import FLAGS
from sd3.mistakes import Mistake, Unwritable, display, verbatim
from sd3.run import hashes_by_path
from sd3.settings import digest_of
from sd3.sweep.journal import LOG, Journal
from sd3.sweep.plan import ID_LENGTH, Plan, PlannedImage
from sd3.sweep.record import SWEEP, SweepRecord

BEFORE_RECORD = (".lock", LOG, "pictures", "difference")  # written before sweep.json


class SweepFolder:
    """The folder that `out` names. Raises Mistake if it cannot be read or holds files that no sweep wrote."""

    def __init__(self, path: str | Path, say: Callable[[str], Any] = lambda line: None):
        """say: receives notes about files of the folder that cannot be read, each once."""
        self.path = Path(path)
        self.journal = Journal(self.path, say)
        self.record = SweepRecord(self.path)
        self.lock: FileLock | None = None
        if not os.path.exists(self.path):
            writing.check_writable(str(path), "out")
            return
        if not self.path.is_dir():
            raise Mistake("out", path, "is not a folder")
        if not os.access(self.path, os.R_OK | os.X_OK):
            raise Mistake("out", path, "may not be read")
        if (self.path / SWEEP).exists():
            self.record = SweepRecord.read(self.path, say)
        elif foreign := sorted(p.name for p in self.path.iterdir() if not self._is_own(p.name)):
            raise Mistake(
                "out", path, f"holds {verbatim(display(foreign[0]))} but no sweep; name a new or empty folder"
            )

    def _is_own(self, name: str) -> bool:
        """Whether a sweep wrote this file, in a folder that has no sweep.json yet, or lost it."""
        lost = (self.path / "pictures").is_dir() and (self.path / LOG).is_file()
        return lost or name in BEFORE_RECORD or (name.startswith(".") and name.endswith(".partial"))

    def open(self) -> None:
        """Creates the folder and locks it; raises Mistake if another process holds the lock."""
        try:
            for name in ("pictures", "difference"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            why = "another sweep is running in this folder; wait for it or name another folder"
            raise Mistake("out", self.path, why) from None
        except OSError as error:
            raise Unwritable("out", self.path, f"cannot be written ({error.strerror})") from None
        for partial in (*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")):
            with contextlib.suppress(OSError):
                partial.unlink()  # left by a process that was killed

    def close(self) -> None:
        """Releases the lock."""
        if self.lock is not None:
            self.lock.release()

    def check(self, plan: Plan) -> None:
        """Raises Mistake if the folder holds another sweep, or if files of this one have changed."""
        self.record.check(plan, self.present(), self.recorded_hashes)

    def picture(self, id: str) -> Path:
        """The path of an image."""
        return self.path / "pictures" / f"{id}.png"

    def difference(self, id: str) -> Path:
        """The path of the heat map of an image against its baseline."""
        return self.path / "difference" / f"{id}.png"

    def present(self) -> set[str]:
        """Ids of all images in the folder, damaged or not, of this or an earlier grid."""
        return {p.stem for p in (self.path / "pictures").glob("*.png")}

    def finished(self, plan: Plan) -> tuple[set[str], list[str]]:
        """Ids of the planned images that are in the folder and intact, and a note for each damaged one."""
        done, damaged = set(), []
        present = self.present()
        for p in plan.pictures:
            if p.id in present:
                if self._is_intact(p.id):
                    done.add(p.id)
                else:
                    damaged.append(f"note: {self.picture(p.id)} is damaged and is made again")
        return done, damaged

    def _is_intact(self, id: str) -> bool:
        """Whether a file is a complete PNG that carries the settings of its name."""
        try:
            with Image.open(self.picture(id)) as image:
                record = json.loads(image.info[png.SETTINGS_CHUNK])
                image.verify()  # every chunk's checksum, up to the last
            return digest_of(record["settings"])[:ID_LENGTH] == id
        except Exception:  # a damaged file may raise anything
            return False

    def recorded_hashes(self, ids: Collection[str]) -> dict[str, str]:
        """sha256 by name of the files that finished images were made from, read from their metadata."""
        out: dict[str, str] = {}
        for id in sorted(ids):
            if not self._is_intact(id):
                continue
            record = png.read_record(self.picture(id), "out")
            out = hashes_by_path(record["settings"], record) | out
        return out

    def recorded_threads(self, plan: Plan) -> dict[int, int]:
        """Number of CPU threads that made the images of each engine, read from the metadata of its first image: an
        earlier version may have chosen another number.
        """
        out: dict[int, int] = {}
        present = self.present()
        for p in plan.pictures:
            engine = plan.engine_of[p.variant]
            if engine in out or p.id not in present or not self._is_intact(p.id):
                continue
            with contextlib.suppress(Mistake):  # absent, or not a valid number
                record = png.read_record(self.picture(p.id), "out")
                out[engine] = FLAGS["threads"].read("threads", png.recorded_threads(record))
        return out

    def save(self, planned: PlannedImage, data: bytes) -> Path:
        """Writes a finished image."""
        path = self.picture(planned.id)
        writing.atomic_write(path, lambda f: f.write(data))
        return path

    def save_difference(self, plan: Plan, planned: PlannedImage) -> None:
        """Writes the heat map of an image against its baseline, unless it exists or an image is missing."""
        target, baseline = self.difference(planned.id), plan.baseline(planned)
        if baseline.id == planned.id or self._is_intact_difference(planned.id):
            return
        try:
            first, second = (pixels(self.picture(i)) for i in (planned.id, baseline.id))
        except Exception:  # not yet made, or damaged
            return
        if first.shape == second.shape:
            mean = np.abs(first - second).mean(axis=-1)  # (H, W), 0 to 255
            info = png.PngInfo()
            info.add_text("mean_difference", f"{mean.mean():.4f}")
            buffer = io.BytesIO()
            sheet.heat_map(mean / 255).save(buffer, format="PNG", pnginfo=info)
            writing.atomic_write(target, lambda f: f.write(buffer.getvalue()))

    def mean_difference(self, id: str) -> float | None:
        """Mean absolute difference to the baseline, 0 to 255; None without a heat map."""
        try:
            with Image.open(self.difference(id)) as image:
                value = float(image.info["mean_difference"])
            return value if math.isfinite(value) else None
        except Exception:  # missing or damaged
            return None

    def _is_intact_difference(self, id: str) -> bool:
        """Whether a heat map exists, complete and with its mean."""
        if self.mean_difference(id) is None:
            return False
        try:
            with Image.open(self.difference(id)) as image:
                image.verify()
            return True
        except Exception:  # a damaged file may raise anything
            return False


def pixels(path: Path) -> np.ndarray:
    """An image as (H, W, 3) float32, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)
