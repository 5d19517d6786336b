"""`--replay FILE.png`: turns the settings in an image back into flags, and reports what differs now."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd3 import png
from sd3.files import ENCODERS
from sd3.flags import FLAGS
from sd3.mistakes import Missing, Mistake, display, verbatim
from sd3.models import SkipLayerConfig, read_skip_layer, shipped_folder
from sd3.reading import parse_json
from sd3.settings import FILE_SETTINGS, LEFT_OUT, TEXT_FILES, Settings, base_name, effective, paths_of, with_paths
from sd3.versions import versions

LISTS = tuple(name for name, row in FLAGS.items() if row.read.kind in ("layers", "weights"))
DECIDE_INITIAL_IMAGE = {"denoise", "steps", "shift"}  # flags that decide whether an initial image has an effect
# Files beside or above an image that name its files with their folders; run.jsonl while the run goes on.
RECORDS = ("run.json", "run.jsonl", "sweep.json")


@dataclass(frozen=True)
class Replay:
    """An image's record, and the flags given with `--replay`, which override its settings."""

    path: Path
    record: Mapping[str, Any]
    given: Mapping[str, Any]

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Replay:
        """From the given flags, including `replay`; raises Missing, or Mistake if the file has no settings that this
        version can use.
        """
        path = FLAGS["replay"].read("replay", given["replay"])
        record = png.read_record(path)
        fields = {field.name for field in dataclasses.fields(Settings)}
        if unknown := sorted(set(record["settings"]) - fields):
            names = display(", ".join(unknown))
            raise Mistake("replay", path, f"was made by another version; unknown here: {names}")
        if missing := [name for name in ("prompt", "model") if record["settings"].get(name) is None]:
            raise Mistake("replay", path, f"its settings cannot be read: {', '.join(missing)} missing")
        replay = cls(Path(path), record, given)
        replay._flags()
        replay.settings()  # raises mistakes in them before anything is loaded
        return replay

    def flags(self, available: Mapping[str, str]) -> dict[str, Any]:
        """Flags that make the image again; given flags override recorded ones.

        available: replacements for recorded devices, by flag. Raises Missing for a file that `find` does not find,
        Mistake for a recorded value that is out of range.
        """
        raw = self._flags() | dict(available)
        found = {
            n: with_paths(raw[n], functools.partial(self._found, n))
            for n in FILE_SETTINGS
            if raw.get(n) is not None and n not in self.given
        }
        return raw | found | self._text_files() | dict(self.given)

    def _found(self, flag: str, name: str) -> str | None:
        """As `find`; None for a missing file without effect: earlier versions recorded those too."""
        try:
            return self.find(flag, name)
        except FileNotFoundError:
            if getattr(effective(self.settings())[0], flag) is None and not self.given.keys() & DECIDE_INITIAL_IMAGE:
                return None
            raise

    def _read(self, name: str, value: Any) -> Any:
        """A recorded value, read by its flag's reader; raises Mistake naming the image."""
        try:
            if name in LISTS and not isinstance(value, list):
                raise Mistake(name, value, "must be a list")
            return FLAGS[name].read(name, value)
        except Mistake as mistake:
            raise Mistake("replay", self.path, f"its settings cannot be read: {mistake.nested()}") from None

    def _given(self, name: str) -> Any:
        """The value of a flag given with --replay, else None."""
        value = self.given.get(name)
        return None if value is None else FLAGS[name].read(name, value)

    def _flags(self) -> dict[str, Any]:
        recorded = self.record["settings"]
        raw = {n: self._read(n, v) for n, v in recorded.items() if v is not None and n in FLAGS and n not in self.given}
        raw = LEFT_OUT | raw
        if {"residual_config", "residual_preset"} & self.given.keys():
            raw = {n: v for n, v in raw.items() if not n.startswith("residual_")}
        targets = self._given("residual_target_layers")
        if not (
            raw.get("residual_target_layers") if targets is None else targets
        ):  # off: the other residual settings would be mistakes
            raw = {n: v for n, v in raw.items() if not n.startswith("residual_")}
        weights = raw.get("residual_weights")
        if weights and len(set(weights)) == 1:
            raw["residual_weights"] = f"each:{weights[0]}"  # so that it also fits other targets
        if (self._given("residual_mode") or raw.get("residual_mode")) != "aligned":
            raw.pop("residual_rotations", None)
        if raw.get("controlnet_ckpt") and not (
            raw.get("controlnet_cond_image") or self.given.get("controlnet_cond_image")
        ):
            raw.pop("controlnet_ckpt")  # earlier versions recorded a ControlNet without an image
        raw["skip_layer_cfg"] = self.record["settings"].get("skip_layer") is not None
        return {"offload": self._offload()} | self._threads() | raw | {"pad_batch": True}

    def _threads(self) -> dict[str, int]:
        """The number of CPU threads that made the image or encoded its text; empty if a GPU did both."""
        threads = png.recorded_threads(self.record)
        return {} if threads is None else {"threads": self._read("threads", threads)}

    def _offload(self) -> bool:
        """`offload` from the run's record: images of earlier versions do not name it."""
        return any(_object(values.get("flags")).get("offload") is True for values in self._records())

    def _text_files(self) -> dict[str, str]:
        """Paths of the text encoders, from the record of the run."""
        out: dict[str, str] = {}
        for values in self._records():
            flags = _object(values.get("flags"))
            for name in TEXT_FILES:
                path = flags.get(name)
                if isinstance(path, str) and (os.path.isdir if name == "model_folder" else os.path.isfile)(path):
                    out.setdefault(name, path)
        return out

    def skip_layer(self) -> SkipLayerConfig | None:
        """The recorded skip-layer guidance; None if its flag was given."""
        return None if "skip_layer_cfg" in self.given else self._skip_layer()

    def settings(self) -> Settings:
        """The recorded settings; raises Mistake naming the image."""
        recorded = {"offload": self._offload()} | self.record["settings"] | {"skip_layer": self._skip_layer()}
        weights = recorded.get("residual_weights")
        if isinstance(weights, list) and len(weights) == 1:  # earlier versions recorded one number for all
            recorded["residual_weights"] = f"each:{self._read('residual_weights', weights)[0]}"
        try:
            return Settings(**recorded)
        except Mistake as mistake:
            raise Mistake("replay", self.path, f"its settings cannot be read: {mistake.nested()}") from None

    def _skip_layer(self) -> SkipLayerConfig | None:
        values = self.record["settings"].get("skip_layer")
        if values is None:
            return None
        why = "its skip-layer settings cannot be read"
        if not isinstance(values, dict):
            raise Mistake("replay", self.path, f"{why}: {display(values)}")
        try:
            return read_skip_layer(values)
        except Mistake as mistake:
            raise Mistake("replay", self.path, f"{why}: {mistake.nested()}") from None

    def find(self, flag: str, name: str) -> str:
        """The path of a file that the image names without its folder. Searches where the record of the run says, beside
        the image, in the current folder, in `models` (or --model_folder), and beside the model that ships. Raises
        Missing.
        """
        places = list(dict.fromkeys(self._places(flag, name)))
        for place in places:
            if os.path.exists(place):
                return str(place)
        looked = ", ".join(sorted({os.path.dirname(p) or "." for p in map(str, places)}))
        why = f"was made with {flag} {verbatim(name)}, which is not in {verbatim(looked)}; name it with `{flag}`"
        raise Missing("replay", self.path, why)

    def _places(self, flag: str, name: str) -> Iterator[Path]:
        for values in self._records():
            paths = [*paths_of(_object(values.get("flags")).get(flag)), *_object(values.get("files"))]
            yield from (Path(p) for p in paths if base_name(p) == name)
        models = Path(self._given("model_folder") or "models")
        yield from (self.path.parent / name, Path(name), models / name)
        for place in ("*", "loras", "*/loras"):
            yield from sorted(models.glob(f"{place}/{glob.escape(name)}"))
        yield from (shipped_folder() / name, shipped_folder() / "loras" / name)

    def _records(self) -> Iterator[dict[str, Any]]:
        """The run records in the image's folder and its parent."""
        for folder in (self.path.parent, self.path.parent.parent):
            for record in RECORDS:
                values: Any = None
                with contextlib.suppress(OSError, ValueError):
                    if (folder / record).is_file():
                        with open(folder / record, encoding="utf-8") as file:
                            values = parse_json(file.readline() if record.endswith(".jsonl") else file.read())
                if isinstance(values, dict):
                    yield values

    def changed(self, settings: Settings) -> list[str]:
        """Settings that differ from the recorded ones, without those that had no effect."""
        recorded = self.settings()
        had_effect = effective(recorded)[0].changed(batch_size=recorded.batch_size)  # it matters with a cache
        now, then = (json.loads(json.dumps(_as_shown(s))) for s in (effective(settings)[0], had_effect))
        return [f"{n} {then[n]} -> {now[n]}" for n in now if then[n] != now[n]]

    def differs(self, provenance: Mapping[str, Any]) -> list[str]:
        """Other differences from the record: files, versions, the device."""
        now = json.loads(json.dumps({**provenance, "versions": versions()}))
        out = []
        if self.record.get("model_sha256") and now.get("model_sha256") != self.record["model_sha256"]:
            out.append("the model file's contents")
        then, had_effect = _object(self.record.get("files")), effective(self.settings())[0]
        without = [n for n in FILE_SETTINGS if getattr(had_effect, n) is None]
        out += [f"contents of {n}" for n in then if n not in without and now.get("files", {}).get(n) != then[n]]
        for kind, what in (("encoders", "text encoder {}"), ("components", "the {} in the model's folder")):
            then = _object(self.record.get(kind))
            for name, was in then.items():
                before, here = _object(was), _object(now.get(kind, {}).get(name))
                if {n: here.get(n) for n in before} != before:  # earlier records have fewer entries
                    out.append(what.format(name))
        then, here = _object(self.record.get("encoders")), now.get("encoders", {})
        for name in ENCODERS if "clip tokenizer" in then else ():  # earlier records have no tokenizers
            if name in here and name not in then and not (name == "t5xxl" and had_effect.no_t5):
                out.append(f"text encoder {name}")  # it was in the model file
        if "environment" not in _object(self.record.get("hardware")) and _changing_while_cached(had_effect):
            out.append(
                "which steps the cache reuses while residual text streaming changes"
            )  # as environment is recorded
        for kind in ("versions", "hardware"):
            then, here = _object(self.record.get(kind)), now.get(kind, {})
            out += [f"{n} {then[n] or 'none'} -> {here.get(n) or 'none'}" for n in then if then[n] != here.get(n)]
        return out

    def report(self, image: Image.Image, settings: Settings, provenance: Mapping[str, Any]) -> list[str]:
        """Lines for the user: whether `image` is the recorded one bit for bit, and the known differences."""
        changed, differs = self.changed(settings), self.differs(provenance)
        lines = [f"replay: changed {', '.join(changed)}"] if changed else []
        lines += [f"replay: different from the record: {', '.join(differs)}"] if differs else []
        difference = compare(self.path, image)
        if difference and not changed and not differs:
            difference += "; nothing that was recorded differs"
        return [*lines, f"replay: {difference or f'the same image as {self.path}, bit for bit'}"]


def _as_shown(s: Settings) -> dict[str, Any]:
    """Settings with files by their names, several of one flag as they are typed."""
    values = s.by_file_names()
    return values | {n: ",".join(map(str, values[n])) for n in FILE_SETTINGS if isinstance(values[n], tuple)}


def _changing_while_cached(s: Settings) -> bool:
    """Whether residual streaming changes from step to step in a run with a cache."""
    window = s.residual_start > 0 or s.residual_end < 1
    return s.cache > 0 and (window or s.residual_schedule != "constant" or s.residual_mode == "aligned")


def _object(value: Any) -> dict[str, Any]:
    """A part of a record if it is an object, else an empty object."""
    return value if isinstance(value, dict) else {}


def compare(path: Path, image: Image.Image) -> str:
    """How an image differs from the one in a file; empty if all pixels are equal."""
    with Image.open(path) as file:
        then = np.asarray(file.convert("RGB"), dtype=np.int16)
    now = np.asarray(image.convert("RGB"), dtype=np.int16)
    if then.shape != now.shape:
        return f"{path} is {then.shape[1]} x {then.shape[0]}, this one {now.shape[1]} x {now.shape[0]}"
    difference = np.abs(then - now).max(axis=-1)
    if not difference.any():
        return ""
    return f"{(difference > 0).mean():.1%} of the pixels differ from {path}, by at most {difference.max()} of 255"
