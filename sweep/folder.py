"""A sweep's folder: what is finished, who works in it, what it belongs to.

pictures/ID.png       finished pictures, written under another name and renamed
difference/ID.png     how each differs from its baseline
scores.jsonl          one line per score
log.jsonl             one line per thing that happened
sweep.json            what this sweep is
"""

from __future__ import annotations

import datetime
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

import saving
from checkpoint import file_sha256
from settings import TEXT_FILES, Settings, base_name, digest_of
from sweep.plan import SHORT, Plan, Planned, file_paths

SWEEP = "sweep.json"
FORMAT = 1


class SweepFolder:
    """The folder that --out names. Raises ValueError where it is in use, belongs to another sweep, or is no sweep's."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock: FileLock | None = None
        self.record: dict[str, Any] = {}
        if self.path.exists():
            if not self.path.is_dir():
                raise ValueError(f"--out {path}: is not a folder")
            if (self.path / SWEEP).exists():
                self.record = self._read()
            elif left := [p.name for p in self.path.iterdir() if p.name not in (".lock", "log.jsonl")]:
                raise ValueError(f"--out {path}: holds {left[0]}, and no sweep; name a new or empty folder")
        else:
            saving.check_writable(str(path), "out")

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads((self.path / SWEEP).read_text(encoding="utf-8"))
            if record["format"] != FORMAT or not isinstance(record["planned"], list):
                raise ValueError
            return record
        except (OSError, ValueError, KeyError, TypeError):
            told = "cannot be read, or is of another version; name a new folder"
            raise ValueError(f"--out {self.path}: its {SWEEP} {told}") from None

    def open(self) -> None:
        """Makes the folder and takes it for this process; raises ValueError where another one has it."""
        try:
            for name in ("pictures", "difference"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            raise ValueError(
                f"--out {self.path}: another sweep is running in this folder; wait for it or name another"
            ) from None
        except OSError as error:
            raise ValueError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        for partial in (*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")):
            partial.unlink(missing_ok=True)  # left by a process that was killed

    def close(self) -> None:
        """Gives the folder back."""
        if self.lock is not None:
            self.lock.release()

    # -- pictures --

    def picture(self, id: str) -> Path:
        """Where a picture lies."""
        return self.path / "pictures" / f"{id}.png"

    def difference(self, id: str) -> Path:
        """Where its difference to the baseline lies."""
        return self.path / "difference" / f"{id}.png"

    def present(self) -> set[str]:
        """Ids of all pictures in the folder, whole or not, of this grid or an earlier one."""
        return {p.stem for p in (self.path / "pictures").glob("*.png")}

    def finished(self, plan: Plan) -> tuple[set[str], list[str]]:
        """Ids of the planned pictures that are there and whole, and a line for each that is not."""
        done, damaged = set(), []
        present = self.present()
        for p in plan.pictures:
            if p.id in present:
                if self._whole(p.id):
                    done.add(p.id)
                else:
                    damaged.append(f"note: {self.picture(p.id)} is damaged; it is made again")
        return done, damaged

    def _whole(self, id: str) -> bool:
        """Whether a file is a complete PNG that carries the settings of its name."""
        try:
            with Image.open(self.picture(id)) as image:
                record = json.loads(image.info[saving.SETTINGS_CHUNK])
                image.verify()  # every chunk's checksum, up to the last
            return digest_of(record["settings"])[:SHORT] == id
        except Exception:  # whatever a damaged file makes a reader raise
            return False

    def save(self, planned: Planned, data: bytes) -> Path:
        """Writes a finished picture."""
        path = self.picture(planned.id)
        saving.atomic_write(path, lambda f: f.write(data))
        return path

    def save_difference(self, plan: Plan, planned: Planned) -> None:
        """Writes a picture's heat map against its baseline, where both are there and it is not."""
        target, baseline = self.difference(planned.id), plan.baseline(planned)
        if baseline.id == planned.id or target.exists():
            return
        try:
            own, other = (pixels(self.picture(i)) for i in (planned.id, baseline.id))
        except OSError:
            return
        if own.shape == other.shape:
            mean = np.abs(own - other).mean(axis=-1)  # (H, W), 0 to 255
            info = saving.PngInfo()
            info.add_text("mean_difference", f"{mean.mean():.4f}")
            buffer = io.BytesIO()
            saving.heat_map(mean / 255).save(buffer, format="PNG", pnginfo=info)
            saving.atomic_write(target, lambda f: f.write(buffer.getvalue()))

    def mean_difference(self, id: str) -> float | None:
        """Mean absolute difference to the baseline, 0 to 255; None where there is none."""
        try:
            with Image.open(self.difference(id)) as image:
                return float(image.info["mean_difference"])
        except (OSError, KeyError, ValueError, SyntaxError):
            return None

    # -- what it belongs to --

    def check(self, plan: Plan) -> None:
        """Raises ValueError where the folder holds another sweep, or one made from files that changed since."""
        if not self.record:
            return
        own = {p.id for p in plan.pictures}
        if not own & (set(self.record["planned"]) | self.present()):
            raise ValueError(
                f"--out {self.path}: holds another sweep ({len(self.record['planned'])} pictures, none of them "
                "of this grid); name another folder"
            )
        now = {base_name(path): path for path in files_of(plan)}  # they may lie elsewhere by now
        for before, was in self.record.get("files", {}).items():
            path = now.get(base_name(before))
            if path is None or not was.get("sha256") or not (place := Path(path)).is_file():
                continue
            stat = place.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (was["bytes"], was["mtime_ns"])
            if not same and file_sha256(place) != was["sha256"]:
                raise ValueError(
                    f"--out {self.path}: {path} is not the file that this sweep began with; name another folder"
                )

    def write_record(self, plan: Plan, arguments: Collection[str], hashes: Mapping[str, str] | None = None) -> None:
        """Writes sweep.json. hashes: sha256 by path, where they are known by now."""
        before = {base_name(path): was["sha256"] for path, was in self.record.get("files", {}).items()}
        files = {}
        for path in files_of(plan):
            place = Path(path)
            stat = place.stat() if place.is_file() else None
            files[path] = {
                "bytes": stat.st_size if stat else None,
                "mtime_ns": stat.st_mtime_ns if stat else None,
                "sha256": (hashes or {}).get(path) or before.get(base_name(path)),
            }
        self.record = {
            "format": FORMAT,
            "arguments": list(arguments),
            "variants": {v.name: v.raw for v in plan.variants},
            "prompts": plan.grid.prompts,
            "seeds": plan.grid.seeds,
            "flags": {name: getattr(plan.engines[0], name) for name in TEXT_FILES},
            "files": files,
            "planned": [p.id for p in plan.pictures],
        }
        saving.write_json(self.path / SWEEP, self.record)

    # -- what happened --

    def log(self, event: str, **values: Any) -> None:
        """Adds a line to log.jsonl."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        self._append("log.jsonl", {"time": now, "process": os.getpid(), "event": event, **values})

    def add_scores(self, id: str, scores: Mapping[str, float], scorer: str) -> None:
        """Adds a picture's scores by kind."""
        self._append("scores.jsonl", {"id": id, "scorer": scorer, "scores": dict(scores)})

    def scores(self) -> dict[tuple[str, str], dict[str, float]]:
        """Scores by (scorer, picture)."""
        return {(line["scorer"], line["id"]): line["scores"] for line in self._lines("scores.jsonl") if "id" in line}

    def seconds(self) -> dict[str, float]:
        """Seconds that each picture made here took, its share of its batch."""
        batches = [line for line in self._lines("log.jsonl") if line.get("event") == "batch"]
        return {id: line["seconds"] / len(line["pictures"]) for line in batches for id in line["pictures"]}

    def _append(self, name: str, value: Any) -> None:
        path = self.path / name
        torn = False
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as f:
                f.seek(-1, os.SEEK_END)
                torn = f.read(1) != b"\n"
        with open(path, "a", encoding="utf-8") as f:
            f.write(("\n" if torn else "") + json.dumps(value, ensure_ascii=False) + "\n")

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a file with one JSON object a line; a line that a kill tore is left out."""
        try:
            lines = (self.path / name).read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) float32, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)


def files_of(plan: Plan) -> list[str]:
    """Paths of all files that the flags of a plan name."""
    first: list[Settings] = [plan.of(i)[0].settings for i in range(len(plan.variants))]
    return list(dict.fromkeys(path for s in first for path in file_paths(s).values()))
