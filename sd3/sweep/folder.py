"""A sweep's folder: what is finished and who works in it.

pictures/ID.png       finished pictures, written under another name and renamed
difference/ID.png     how each differs from its baseline
scores.jsonl          one line per score, see `journal`
log.jsonl             one line per event, see `journal`
sweep.json            what this sweep is, see `record`
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
from sd3.settings import digest_of
from sd3.sweep.journal import LOG, Journal
from sd3.sweep.plan import SHORT, Plan, Planned
from sd3.sweep.record import SWEEP, SweepRecord

FIRST = (".lock", LOG, "pictures", "difference")  # written before sweep.json


class SweepFolder:
    """The folder that `out` names. Raises Mistake where it is in use, belongs to another sweep, or is no sweep's."""

    def __init__(self, path: str | Path, say: Callable[[str], Any] = lambda line: None):
        """say: takes a note about a file of the folder that cannot be read; each comes once."""
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
                "out", path, f"holds {verbatim(display(foreign[0]))}, and no sweep; name a new or empty folder"
            )

    def _is_own(self, name: str) -> bool:
        """Whether a file may be there without a sweep.json: after a kill at the very start, or where that was lost."""
        lost = (self.path / "pictures").is_dir() and (self.path / LOG).is_file()
        return lost or name in FIRST or (name.startswith(".") and name.endswith(".partial"))

    def open(self) -> None:
        """Makes the folder and takes it for this process; raises Mistake where another one has it."""
        try:
            for name in ("pictures", "difference"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            why = "another sweep is running in this folder; wait for it or name another"
            raise Mistake("out", self.path, why) from None
        except OSError as error:
            raise Unwritable("out", self.path, f"cannot be written ({error.strerror})") from None
        for partial in (*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")):
            with contextlib.suppress(OSError):
                partial.unlink()  # left by a process that was killed

    def close(self) -> None:
        """Gives the folder back."""
        if self.lock is not None:
            self.lock.release()

    def check(self, plan: Plan) -> None:
        """Raises Mistake where the folder holds another sweep, or one made from files that changed since."""
        self.record.check(plan, self.present(), self.recorded_hashes)

    def picture(self, id: str) -> Path:
        """The path of a picture."""
        return self.path / "pictures" / f"{id}.png"

    def difference(self, id: str) -> Path:
        """The path of a picture's difference to its baseline."""
        return self.path / "difference" / f"{id}.png"

    def present(self) -> set[str]:
        """Ids of all pictures in the folder, damaged or not, of this grid or an earlier one."""
        return {p.stem for p in (self.path / "pictures").glob("*.png")}

    def finished(self, plan: Plan) -> tuple[set[str], list[str]]:
        """Ids of the planned pictures that are there and intact, and a line for each damaged one."""
        done, damaged = set(), []
        present = self.present()
        for p in plan.pictures:
            if p.id in present:
                if self._is_intact(p.id):
                    done.add(p.id)
                else:
                    damaged.append(f"note: {self.picture(p.id)} is damaged; it is made again")
        return done, damaged

    def _is_intact(self, id: str) -> bool:
        """Whether a file is a complete PNG that carries the settings of its name."""
        try:
            with Image.open(self.picture(id)) as image:
                record = json.loads(image.info[png.SETTINGS_CHUNK])
                image.verify()  # every chunk's checksum, up to the last
            return digest_of(record["settings"])[:SHORT] == id
        except Exception:  # whatever a damaged file makes a reader raise
            return False

    def recorded_hashes(self, ids: Collection[str]) -> dict[str, str]:
        """sha256 by name of the files that finished pictures were made from, as their records say."""
        out: dict[str, str] = {}
        for id in sorted(ids):
            if not self._is_intact(id):
                continue
            record = png.read_record(self.picture(id), "out")
            files = record.get("files") if isinstance(record.get("files"), dict) else {}
            for flag, sha256 in {"model": record.get("model_sha256"), **files}.items():
                if (name := record["settings"].get(flag)) and sha256:
                    out.setdefault(name, sha256)
        return out

    def recorded_threads(self, plan: Plan) -> dict[int, int]:
        """How many threads of a CPU made the pictures of a plan so far, by engine, as the first picture's record says;
        a folder may have been begun by a version that took another number by itself.
        """
        out: dict[int, int] = {}
        present = self.present()
        for p in plan.pictures:
            engine = plan.engine_of[p.variant]
            if engine in out or p.id not in present or not self._is_intact(p.id):
                continue
            with contextlib.suppress(Mistake):  # a record without it, or with what no machine has
                record = png.read_record(self.picture(p.id), "out")
                out[engine] = FLAGS["threads"].read("threads", png.recorded_threads(record))
        return out

    def save(self, planned: Planned, data: bytes) -> Path:
        """Writes a finished picture."""
        path = self.picture(planned.id)
        writing.atomic_write(path, lambda f: f.write(data))
        return path

    def save_difference(self, plan: Plan, planned: Planned) -> None:
        """Writes a picture's heat map against its baseline, unless it is there; nothing where one of the two is not."""
        target, baseline = self.difference(planned.id), plan.baseline(planned)
        if baseline.id == planned.id or self._is_intact_difference(planned.id):
            return
        try:
            first, second = (pixels(self.picture(i)) for i in (planned.id, baseline.id))
        except Exception:  # not there yet, or damaged
            return
        if first.shape == second.shape:
            mean = np.abs(first - second).mean(axis=-1)  # (H, W), 0 to 255
            info = png.PngInfo()
            info.add_text("mean_difference", f"{mean.mean():.4f}")
            buffer = io.BytesIO()
            sheet.heat_map(mean / 255).save(buffer, format="PNG", pnginfo=info)
            writing.atomic_write(target, lambda f: f.write(buffer.getvalue()))

    def mean_difference(self, id: str) -> float | None:
        """Mean absolute difference to the baseline, 0 to 255; None where there is none."""
        try:
            with Image.open(self.difference(id)) as image:
                value = float(image.info["mean_difference"])
            return value if math.isfinite(value) else None
        except Exception:  # none, or damaged
            return None

    def _is_intact_difference(self, id: str) -> bool:
        """Whether a heat map is there, complete and with its number."""
        if self.mean_difference(id) is None:
            return False
        try:
            with Image.open(self.difference(id)) as image:
                image.verify()
            return True
        except Exception:  # whatever a damaged file makes a reader raise
            return False


def pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) float32, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)
