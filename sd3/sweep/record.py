"""sweep.json: the identity of a sweep, and whether a plan may resume it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from sd3 import writing
from sd3.files import contents, file_sha256, lora_in
from sd3.mistakes import Mistake, Where, display, verbatim
from sd3.reading import parse_json, reading
from sd3.settings import TEXT_FILES, Settings, base_name
from sd3.sweep.plan import Plan, file_paths

SWEEP = "sweep.json"
FORMAT = 1


class SweepRecord:
    """The contents of sweep.json: the planned images, and the files and text encoders they are made from."""

    def __init__(self, folder: Path, values: Mapping[str, Any] | None = None):
        """values: None if no sweep has begun in the folder, or if its record was lost."""
        self.folder = folder
        self.values: dict[str, Any] = dict(values or {})
        self.stats: dict[str, os.stat_result | None] = {}  # of files, when this process first saw them

    @classmethod
    def read(cls, folder: Path, say: Callable[[str], Any]) -> SweepRecord:
        """Reads sweep.json. Raises Mistake if it is from another version, or damaged without images to rebuild it from;
        say: receives the note that a damaged record is rewritten.
        """
        path = folder / SWEEP
        try:
            values = parse_json(path.read_bytes())
            line, why = (0, "") if is_record(values) else (1, "not written by this tool")
        except json.JSONDecodeError as error:
            values, line, why = None, error.lineno, error.msg
        except OSError as error:
            raise Mistake("out", folder, f"its {SWEEP} cannot be read ({error.strerror})") from None
        except ValueError as error:  # invalid UTF-8, or nested too deeply
            values, line, why = None, 1, str(error)
        version = values.get("format") if isinstance(values, dict) else FORMAT
        if isinstance(version, int) and version != FORMAT:
            raise Mistake(
                "out", folder, f"its {SWEEP} has format {version}, this version writes {FORMAT}; name a new folder"
            )
        if not why:
            return cls(folder, values)
        if not (folder / "pictures").is_dir():
            raise Mistake("out", folder, f"its {SWEEP} cannot be read ({verbatim(why)}); name a new folder")
        say(f"note: {path}, line {line}: is damaged ({why}); it is rewritten from the metadata of the images")
        return cls(folder)

    def check(
        self, plan: Plan, present: Collection[str], recorded: Callable[[Collection[str]], dict[str, str]]
    ) -> None:
        """Raises Mistake if the folder holds another sweep, or if files of this one have changed.

        present: ids of the images in the folder; recorded: reads hashes of files by name from the metadata of images.
        """
        if not self.values and not present:
            return
        ids = {p.id for p in plan.pictures}
        before = set(self.values.get("planned", present))
        if not ids & (before | set(present)):
            why = f"holds another sweep ({len(before)} images, none of this grid); name another folder"
            raise Mistake("out", self.folder, why)
        self._check_files(plan, lambda: recorded(ids & set(present)))
        self._check_encoders(plan)

    def _check_files(self, plan: Plan, recorded: Callable[[], dict[str, str]]) -> None:
        """Compares files by name and content: they may have moved."""
        records = {base_name(path): record for path, record in self.values.get("files", {}).items()}
        hashes = {name: record["sha256"] for name, record in records.items() if record["sha256"]}
        if not hashes:  # stopped before hashing ended, or the record was lost
            hashes = recorded()
        for path in files_of(plan):
            name, place = base_name(path), Path(path)
            folder = lora_in(place) is not None  # of a LoRA: it is hashed whole, unlike a model's
            if name not in hashes or not (place.is_file() or folder):
                continue
            with reading(Where("", path)):
                same = not folder and _is_as_recorded(place, records.get(name, {}))
                if not same and file_sha256(*contents(place)) != hashes[name]:
                    file = verbatim(display(path))
                    why = f"{file} is not the file that this sweep began with; restore it or name another folder"
                    raise Mistake("out", self.folder, why)

    def _check_encoders(self, plan: Plan) -> None:
        began: dict[tuple[str, str], set[str]] = {}  # identities of text encoders, by role and name
        for role, record in itertools.chain.from_iterable(e.items() for e in self.values.get("encoders", [])):
            began.setdefault((role, record["name"]), set()).add(record["identity"])
        for role, now in itertools.chain.from_iterable(e.items() for e in plan.encoders):
            if now["identity"] not in began.get((role, now["name"]), {now["identity"]}):
                encoder = f"the {role} in {verbatim(now['name'])}"
                why = f"{encoder} is not the one that this sweep began with; restore it or name another folder"
                raise Mistake("out", self.folder, why)

    def write(self, plan: Plan, arguments: Collection[str], hashes: Mapping[str, str] | None = None) -> None:
        """Writes sweep.json. hashes: sha256 by path, of the files hashed so far."""
        before = {base_name(path): record["sha256"] for path, record in self.values.get("files", {}).items()}
        files = {}
        for path in files_of(plan):
            place = Path(path)
            if path not in self.stats:  # once: a hash must not be stored with the time of a later change
                self.stats[path] = place.stat() if place.is_file() else None
            stat = self.stats[path]
            files[path] = {
                "bytes": stat.st_size if stat else None,
                "mtime_ns": stat.st_mtime_ns if stat else None,
                "sha256": (hashes or {}).get(path) or before.get(base_name(path)),
            }
        self.values = {
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
        writing.write_json(self.folder / SWEEP, self.values)


def _is_as_recorded(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file has the recorded size and time, and a recorded hash: then it is not hashed again."""
    stat = path.stat()
    same = (stat.st_size, stat.st_mtime_ns) == (record.get("bytes"), record.get("mtime_ns"))
    return same and bool(record["sha256"])


def is_record(values: Any) -> bool:
    """Whether values have the form that `SweepRecord.write` writes."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return False
    planned, files, encoders = values.get("planned"), values.get("files", {}), values.get("encoders", [])
    return (
        isinstance(planned, list)
        and all(isinstance(p, str) for p in planned)
        and isinstance(files, dict)
        and all(map(_is_file_record, files.values()))
        and isinstance(encoders, list)
        and all(isinstance(by_role, dict) and all(map(_is_encoder, by_role.values())) for by_role in encoders)
    )


def _is_file_record(record: Any) -> bool:
    complete = isinstance(record, dict) and {"bytes", "mtime_ns", "sha256"} <= record.keys()
    return complete and isinstance(record["sha256"], (str, type(None)))


def _is_encoder(record: Any) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("name", "identity"))


def files_of(plan: Plan) -> list[str]:
    """Paths of all files that the variants of a plan name."""
    first: list[Settings] = [plan.of(i)[0].settings for i in range(len(plan.variants))]
    return list(dict.fromkeys(path for s in first for path in file_paths(s).values()))
