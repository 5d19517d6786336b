"""sweep.json: what a sweep is, and whether a plan goes on with it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from sd3 import writing
from sd3.files import file_sha256
from sd3.mistakes import Mistake, Where, display, verbatim
from sd3.reading import parse_json, reading
from sd3.settings import TEXT_FILES, Settings, base_name
from sd3.sweep.plan import Plan, file_paths

SWEEP = "sweep.json"
FORMAT = 1


class SweepRecord:
    """What a folder's sweep.json says: the planned pictures, and the files and text encoders they come from."""

    def __init__(self, folder: Path, values: Mapping[str, Any] | None = None):
        """values: none where no sweep has begun in the folder, or where its record was lost."""
        self.folder = folder
        self.values: dict[str, Any] = dict(values or {})
        self.stats: dict[str, os.stat_result | None] = {}  # of the files as this process found them

    @classmethod
    def read(cls, folder: Path, say: Callable[[str], Any]) -> SweepRecord:
        """From a folder. Raises Mistake for the record of another version, and for a damaged one where no pictures say
        what they are; say: takes the note that a damaged record is written anew.
        """
        path = folder / SWEEP
        try:
            values = parse_json(path.read_bytes())
            line, why = (0, "") if is_record(values) else (1, "it is not of a sweep's form")
        except json.JSONDecodeError as error:
            values, line, why = None, error.lineno, error.msg
        except OSError as error:
            raise Mistake("out", folder, f"its {SWEEP} cannot be read ({error.strerror})") from None
        except ValueError as error:  # invalid UTF-8, or nested too deeply
            values, line, why = None, 1, str(error)
        version = values.get("format") if isinstance(values, dict) else FORMAT
        if isinstance(version, int) and version != FORMAT:
            raise Mistake("out", folder, f"its {SWEEP} is of version {version}, this is {FORMAT}; name a new folder")
        if not why:
            return cls(folder, values)
        if not (folder / "pictures").is_dir():
            raise Mistake("out", folder, f"its {SWEEP} cannot be read ({verbatim(why)}); name a new folder")
        say(f"note: {path}, line {line}: is damaged ({why}); the pictures say what they are, it is written anew")
        return cls(folder)

    def check(
        self, plan: Plan, present: Collection[str], recorded: Callable[[Collection[str]], dict[str, str]]
    ) -> None:
        """Raises Mistake where the folder holds another sweep, or one made from files that changed since.

        present: ids of the pictures in the folder; recorded: hashes of files by name, from the records of pictures.
        """
        if not self.values and not present:
            return
        ids = {p.id for p in plan.pictures}
        before = set(self.values.get("planned", present))
        if not ids & (before | set(present)):
            why = f"holds another sweep ({len(before)} pictures, none of them of this grid); name another folder"
            raise Mistake("out", self.folder, why)
        self._check_files(plan, lambda: recorded(ids & set(present)))
        self._check_encoders(plan)

    def _check_files(self, plan: Plan, recorded: Callable[[], dict[str, str]]) -> None:
        """Files are compared by name and content: they may be elsewhere by now."""
        records = {base_name(path): record for path, record in self.values.get("files", {}).items()}
        hashes = {name: record["sha256"] for name, record in records.items() if record["sha256"]}
        if not hashes:  # stopped before they were known, or the record was lost
            hashes = recorded()
        for path in files_of(plan):
            name, place = base_name(path), Path(path)
            if name not in hashes or not place.is_file():
                continue
            with reading(Where("", path)):
                if not _is_as_recorded(place, records.get(name, {})) and file_sha256(place) != hashes[name]:
                    why = f"{verbatim(display(path))} is not the file that this sweep began with; name another folder"
                    raise Mistake("out", self.folder, why)

    def _check_encoders(self, plan: Plan) -> None:
        began: dict[tuple[str, str], set[str]] = {}  # identities of text encoders, by role and name
        for role, record in itertools.chain.from_iterable(e.items() for e in self.values.get("encoders", [])):
            began.setdefault((role, record["name"]), set()).add(record["identity"])
        for role, now in itertools.chain.from_iterable(e.items() for e in plan.encoders):
            if now["identity"] not in began.get((role, now["name"]), {now["identity"]}):
                encoder = f"the {role} in {verbatim(now['name'])}"
                why = f"{encoder} is not the one that this sweep began with; name another folder"
                raise Mistake("out", self.folder, why)

    def write(self, plan: Plan, arguments: Collection[str], hashes: Mapping[str, str] | None = None) -> None:
        """Writes sweep.json. hashes: sha256 by path, as far as they are known by now."""
        before = {base_name(path): record["sha256"] for path, record in self.values.get("files", {}).items()}
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
    """Whether a file's size and time are those of its record, which has a hash then: it need not be read again."""
    stat = path.stat()
    same = (stat.st_size, stat.st_mtime_ns) == (record.get("bytes"), record.get("mtime_ns"))
    return same and bool(record["sha256"])


def is_record(values: Any) -> bool:
    """Whether a sweep.json has the form that `SweepRecord.write` gives it."""
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
    """Paths of all files that the flags of a plan name."""
    first: list[Settings] = [plan.of(i)[0].settings for i in range(len(plan.variants))]
    return list(dict.fromkeys(path for s in first for path in file_paths(s).values()))
