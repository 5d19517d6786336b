"""A sweep's folder: what is finished, who works in it, what it belongs to.

pictures/ID.png       finished pictures, written under another name and renamed
difference/ID.png     how each differs from its baseline
scores.jsonl          one line per score
log.jsonl             one line per thing that happened
sweep.json            what this sweep is
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from sd3 import png, sheet, writing
from sd3.files import file_sha256
from sd3.mistakes import Mistake, Unwritable, Where, display
from sd3.reading import parse_json, reading
from sd3.settings import TEXT_FILES, Settings, base_name, digest_of
from sd3.sweep.plan import SHORT, Plan, Planned, file_paths

SWEEP = "sweep.json"
FORMAT = 1
OWN = (".lock", "log.jsonl", "pictures", "difference")  # there before sweep.json is
MOST_NOTES = 5  # damaged lines of a file that are named


class SweepFolder:
    """The folder that --out names. Raises Mistake where it is in use, belongs to another sweep, or is no sweep's."""

    def __init__(self, path: str | Path, tell: Callable[[str], Any] = lambda text: None):
        """tell: takes a line about what of the folder's own files could not be read; each comes once."""
        self.path = Path(path)
        self.tell = tell
        self.told: set[tuple[str, int]] = set()
        self.lock: FileLock | None = None
        self.record: dict[str, Any] = {}
        self.stats: dict[str, os.stat_result | None] = {}  # of the files as this process found them
        if os.path.exists(self.path):
            if not self.path.is_dir():
                raise Mistake("out", path, "is not a folder")
            if not os.access(self.path, os.R_OK | os.X_OK):
                raise Mistake("out", path, "may not be read")
            if (self.path / SWEEP).exists():
                self.record = self._read()
            elif left := sorted(p.name for p in self.path.iterdir() if not self._is_own(p.name)):
                raise Mistake("out", path, f"holds {display(left[0])}, and no sweep; name a new or empty folder")
        else:
            writing.check_writable(str(path), "out")

    def _is_own(self, name: str) -> bool:
        """Whether a file may be there without a sweep.json: after a kill at the very start, or where that was lost."""
        lost = (self.path / "pictures").is_dir() and (self.path / "log.jsonl").is_file()
        return lost or name in OWN or (name.startswith(".") and name.endswith(".partial"))

    def _read(self) -> dict[str, Any]:
        path = self.path / SWEEP
        try:
            record = parse_json(path.read_bytes())
            if isinstance(record, dict) and isinstance(record.get("format"), int) and record["format"] != FORMAT:
                told = f"is of version {record['format']}, this is {FORMAT}; name a new folder"
                raise Mistake("out", self.path, f"its {SWEEP} {told}")
            if is_record(record):
                return record
            line, why = 1, "it is not of a sweep's form"
        except json.JSONDecodeError as error:
            line, why = error.lineno, error.msg
        except OSError as error:
            raise Mistake("out", self.path, f"its {SWEEP} cannot be read ({error.strerror})") from None
        except Mistake:
            raise
        except ValueError as error:
            line, why = 1, str(error)
        if not (self.path / "pictures").is_dir():
            raise Mistake("out", self.path, f"its {SWEEP} cannot be read ({why}); name a new folder")
        self.tell(f"note: {path}, line {line}: is damaged ({why}); the pictures say what they are, it is written anew")
        return {}

    def open(self) -> None:
        """Makes the folder and takes it for this process; raises Mistake where another one has it."""
        try:
            for name in ("pictures", "difference"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            told = "another sweep is running in this folder; wait for it or name another"
            raise Mistake("out", self.path, told) from None
        except OSError as error:
            raise Unwritable("out", self.path, f"cannot be written ({error.strerror})") from None
        for partial in (*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")):
            with contextlib.suppress(OSError):
                partial.unlink()  # left by a process that was killed

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
                record = json.loads(image.info[png.SETTINGS_CHUNK])
                image.verify()  # every chunk's checksum, up to the last
            return digest_of(record["settings"])[:SHORT] == id
        except Exception:  # whatever a damaged file makes a reader raise
            return False

    def save(self, planned: Planned, data: bytes) -> Path:
        """Writes a finished picture."""
        path = self.picture(planned.id)
        writing.atomic_write(path, lambda f: f.write(data))
        return path

    def save_difference(self, plan: Plan, planned: Planned) -> None:
        """Writes a picture's heat map against its baseline, where both are there and it is not, or is damaged."""
        target, baseline = self.difference(planned.id), plan.baseline(planned)
        if baseline.id == planned.id or self._whole_difference(planned.id):
            return
        try:
            own, other = (pixels(self.picture(i)) for i in (planned.id, baseline.id))
        except Exception:  # not there yet, or damaged
            return
        if own.shape == other.shape:
            mean = np.abs(own - other).mean(axis=-1)  # (H, W), 0 to 255
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

    def _whole_difference(self, id: str) -> bool:
        """Whether a heat map is there, complete and with its number."""
        if self.mean_difference(id) is None:
            return False
        try:
            with Image.open(self.difference(id)) as image:
                image.verify()
            return True
        except Exception:  # whatever a damaged file makes a reader raise
            return False

    # -- what it belongs to --

    def check(self, plan: Plan) -> None:
        """Raises Mistake where the folder holds another sweep, or one made from files that changed since."""
        present = self.present()
        if not self.record and not present:
            return
        own = {p.id for p in plan.pictures}
        before = set(self.record.get("planned", present))
        if not own & (before | present):
            told = f"holds another sweep ({len(before)} pictures, none of them of this grid); name another folder"
            raise Mistake("out", self.path, told)
        records = {base_name(path): was for path, was in self.record.get("files", {}).items()}
        hashes = {name: was["sha256"] for name, was in records.items() if was["sha256"]}
        if not hashes:  # killed before they were known, or the record was lost
            hashes = self._hashes_of_pictures(own & present)
        for path in files_of(plan):  # they may lie elsewhere by now
            name, place = base_name(path), Path(path)
            if name not in hashes or not place.is_file():
                continue
            stat, was = place.stat(), records.get(name, {})
            same = (stat.st_size, stat.st_mtime_ns) == (was.get("bytes"), was.get("mtime_ns")) and was["sha256"]
            with reading(Where("", path)):
                if not same and file_sha256(place) != hashes[name]:
                    told = f"{display(path)} is not the file that this sweep began with; name another folder"
                    raise Mistake("out", self.path, told)
        began: dict[tuple[str, str], set[str]] = {}  # identities of text encoders, by role and name
        for role, was in itertools.chain.from_iterable(e.items() for e in self.record.get("encoders", [])):
            began.setdefault((role, was["name"]), set()).add(was["identity"])
        for role, now in itertools.chain.from_iterable(e.items() for e in plan.encoders):
            if now["identity"] not in began.get((role, now["name"]), {now["identity"]}):
                told = f"the {role} in {now['name']} is not the one that this sweep began with; name another folder"
                raise Mistake("out", self.path, told)

    def _hashes_of_pictures(self, ids: Collection[str]) -> dict[str, str]:
        """sha256 by name of the files that finished pictures were made from, as they say."""
        out: dict[str, str] = {}
        for id in sorted(ids):
            if not self._whole(id):
                continue
            record = png.read_record(self.picture(id), "out")
            files = record.get("files") if isinstance(record.get("files"), dict) else {}
            for flag, sha256 in {"model": record.get("model_sha256"), **files}.items():
                if (name := record["settings"].get(flag)) and sha256:
                    out.setdefault(name, sha256)
        return out

    def write_record(self, plan: Plan, arguments: Collection[str], hashes: Mapping[str, str] | None = None) -> None:
        """Writes sweep.json. hashes: sha256 by path, where they are known by now."""
        before = {base_name(path): was["sha256"] for path, was in self.record.get("files", {}).items()}
        files = {}
        for path in files_of(plan):
            place = Path(path)
            if path not in self.stats:  # once: a hash must not stand beside the time of a later change
                self.stats[path] = place.stat() if place.is_file() else None
            stat = self.stats[path]
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
            "encoders": list(plan.encoders),
            "planned": [p.id for p in plan.pictures],
        }
        writing.write_json(self.path / SWEEP, self.record)

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
        return {(line["scorer"], line["id"]): line["scores"] for line in self._lines("scores.jsonl", is_score)}

    def seconds(self) -> dict[str, float]:
        """Seconds that each picture made here took, its share of its batch."""
        batches = [line for line in self._lines("log.jsonl", is_event) if line["event"] == "batch"]
        return {id: line["seconds"] / len(line["pictures"]) for line in batches for id in line["pictures"]}

    def _append(self, name: str, value: Any) -> None:
        writing.append_line(self.path / name, value)

    def _lines(self, name: str, fits: Callable[[Any], bool]) -> Iterator[dict[str, Any]]:
        """The objects of a file with one JSON object a line. A line that a kill tore, or that is not of ours, is named
        once and passed over.
        """
        path = self.path / name
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        value = parse_json(line)
                        why = "" if fits(value) else "it is not one of ours"
                    except ValueError as error:  # no UTF-8 among them
                        why = " ".join(str(error).split())[:100]
                    if why:
                        self._note(path, number, why)
                    else:
                        yield value
        except OSError:
            return

    def _note(self, path: Path, number: int, why: str) -> None:
        if (path.name, number) in self.told:
            return
        self.told.add((path.name, number))
        count = sum(name == path.name for name, _ in self.told)
        if count <= MOST_NOTES:
            self.tell(f"note: {path}, line {number}: cannot be read ({why}); it is passed over")
        elif count == MOST_NOTES + 1:
            self.tell(f"note: {path}: further lines cannot be read; they are passed over")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_event(line: Any) -> bool:
    """Whether a line of log.jsonl is one of ours."""
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return False
    if line["event"] != "batch":
        return True
    pictures, seconds = line.get("pictures"), line.get("seconds")
    named = isinstance(pictures, list) and bool(pictures) and all(isinstance(p, str) for p in pictures)
    return named and _is_number(seconds) and seconds >= 0


def is_score(line: Any) -> bool:
    """Whether a line of scores.jsonl is one of ours."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("id", "scorer")):
        return False
    scores = line.get("scores")
    return isinstance(scores, dict) and bool(scores) and all(map(_is_number, scores.values()))


def is_record(record: Any) -> bool:
    """Whether a sweep.json has the form that is written here."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return False
    planned, files, encoders = record.get("planned"), record.get("files", {}), record.get("encoders", [])
    return (
        isinstance(planned, list)
        and all(isinstance(p, str) for p in planned)
        and isinstance(files, dict)
        and all(isinstance(was, dict) and {"bytes", "mtime_ns", "sha256"} <= was.keys() for was in files.values())
        and all(isinstance(was["sha256"], (str, type(None))) for was in files.values())
        and isinstance(encoders, list)
        and all(isinstance(by_role, dict) for by_role in encoders)
        and all(
            isinstance(was, dict) and isinstance(was.get("name"), str) and isinstance(was.get("identity"), str)
            for by_role in encoders
            for was in by_role.values()
        )
    )


def pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) float32, 0 to 255."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32)


def files_of(plan: Plan) -> list[str]:
    """Paths of all files that the flags of a plan name."""
    first: list[Settings] = [plan.of(i)[0].settings for i in range(len(plan.variants))]
    return list(dict.fromkeys(path for s in first for path in file_paths(s).values()))
