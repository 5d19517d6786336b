"""The settings of an image, the setup of what is loaded, and all flags: dataclasses with the fields and checks of the
flag table. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from sd3.flags import DEFAULT_SEED, FLAGS, MOST_PICTURES, Flag, names, read_values
from sd3.mistakes import Mistake, renaming
from sd3.presets import read_preset
from sd3.readers import SEED_LIMIT, PatchFile, read_list
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig

RANDOM_SEEDS = 100_000  # seed_type rand draws seeds below this
REQUIRED = ("prompt", "model")  # fields of an image's settings without a default
OF_ONE_IMAGE = {"prompt", "seed", "batch_size"}  # fields that contradict no other field
IMAGE_ROWS = {row.setting: row for row in FLAGS.values() if row.pixels}
# What a record leaves out at its default, though a model or a file decides it where the flag is not given.
LEFT_OUT = {name: row.default for name, row in IMAGE_ROWS.items() if row.usual and not row.always}
# Flags of files; the value of one that takes several is read by `paths_of` and `with_paths`.
FILE_SETTINGS = tuple(name for name, row in IMAGE_ROWS.items() if row.read.kind in ("file", "patch files"))
# Flags that say where text encoders are. They are not settings of an image; its record lists the encoders found.
TEXT_FILES = tuple(name for name in names("load", pixels=False) if FLAGS[name].group == FLAGS["model"].group)

Record = TypeVar("Record")


def with_fields(rows: Mapping[str, Flag], default: Callable[[Flag], Any], required: Iterable[str] = ()) -> Callable:
    """A decorator that makes a class a frozen dataclass with a field per row, in which required fields come first;
    default(row): its default.
    """
    required = tuple(required)

    def make(cls: type[Record]) -> type[Record]:
        order = sorted(rows, key=lambda name: name not in required)
        cls.__annotations__ = dict.fromkeys(order, "Any")
        for name in order:
            if name not in required:
                setattr(cls, name, default(rows[name]))
        return dataclasses.dataclass(frozen=True, slots=True)(
            cls
        )  # slots: a file of prompts creates thousands of objects

    return make


# ---- one image -----------------------------------------------------------------------------------


@with_fields(IMAGE_ROWS, lambda row: None if row.field else row.default, REQUIRED)
class Settings:
    """Everything that decides one image. Files are named as given; their contents are hashed elsewhere.

    The constructor reads its values, which come from anywhere; `of` and `changed` take values that were read.
    """

    def __post_init__(self) -> None:
        """Replaces every field by its checked value; raises Mistake."""
        for name, row in IMAGE_ROWS.items():
            value = getattr(self, name)
            if value is not None and not row.field and value is not row.default:  # 5 equals 5.0
                object.__setattr__(self, name, row.read(name, value))
        self._check()

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """From values that readers returned, those left out at their defaults; raises Mistake where they do not go
        together.
        """
        return cls._from({n: None if row.field else row.default for n, row in IMAGE_ROWS.items()} | values)

    def changed(self, **values: Any) -> Settings:
        """A copy with other values, which readers returned; raises as `of` does."""
        return self._from(
            {name: getattr(self, name) for name in IMAGE_ROWS} | values, check=not values.keys() <= OF_ONE_IMAGE
        )

    @classmethod
    def _from(cls, values: Mapping[str, Any], check: bool = True) -> Settings:
        s = object.__new__(cls)
        for name in IMAGE_ROWS:
            object.__setattr__(s, name, values[name])
        if check:
            s._check()
        return s

    def _check(self) -> None:
        for name, row in IMAGE_ROWS.items():
            if not row.field and row.default is not None and getattr(self, name) is None:
                raise Mistake(name, "None", "is missing")
        if self.vae_tile is None:
            why = "must be a number: settings are made after the tile size is chosen"
            raise Mistake("vae_tile", "auto", why)
        check_guidance(self.guidance_start, self.guidance_end)
        if self.residual_target_layers:
            object.__setattr__(self, "residual_weights", self.residual.weights)
        else:
            self.residual  # noqa: B018  # checks the window

    @property
    def residual(self) -> ResidualConfig:
        """The residual settings as a `ResidualConfig`, which checks them; raises Mistake."""
        with renaming(RESIDUAL_FLAGS):
            return ResidualConfig(**{name: getattr(self, flag) for name, flag in RESIDUAL_FLAGS.items()})

    def asdict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def public(self) -> dict[str, Any]:
        """Plain values for a shared record: files by name, without folders.

        Fields newer than the first version are left out at their defaults, so that digests of earlier images stay
        valid. `effective` sets fields without effect to their defaults.
        """
        rows = IMAGE_ROWS
        return {n: v for n, v in self.by_file_names().items() if rows[n].always or v != rows[n].default}

    def by_file_names(self) -> dict[str, Any]:
        """All plain values, files by name without folders."""
        values = self.asdict()
        return values | {name: with_paths(values[name], base_name) for name in FILE_SETTINGS}

    def digest(self) -> str:
        """A hash of the public settings; it does not depend on the machine or on where files are."""
        return digest_of(self.public())


def check_guidance(start: float, end: float) -> None:
    """Raises Mistake if the guidance interval is empty."""
    if start >= end:
        raise Mistake("guidance_start", f"{start:g}", f"must be below `guidance_end` {end:g}; no step is left")


def base_name(path: str | None) -> str | None:
    """The last part of a Windows or POSIX path."""
    return None if path is None else os.path.basename(path.replace("\\", "/").rstrip("/"))


def paths_of(value: Any) -> tuple[str, ...]:
    """The paths in the value of a flag of files, which may also be a record's: none, one or several."""
    if isinstance(value, (list, tuple)):
        return tuple(item[0] for item in value if isinstance(item, (list, tuple)) and item and isinstance(item[0], str))
    return (value,) if isinstance(value, str) and value else ()


def with_paths(value: Any, change: Callable[[str], str | None]) -> Any:
    """The value of a flag of files with every path changed; without those that `change` makes None."""
    if not isinstance(value, (list, tuple)):
        return None if value is None else change(value)
    changed = [PatchFile(change(path), strength) for path, strength in value]
    return tuple(file for file in changed if file.path is not None) or None


def digest_of(public: Mapping[str, Any]) -> str:
    """The digest of public settings from an image's record."""
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def earlier_digest(as_given: Settings) -> str:
    """The digest of these settings in earlier versions, which included flags without effect but not `offload`."""
    return digest_of({n: v for n, v in as_given.public().items() if n != "offload"})


def effective(s: Settings) -> tuple[Settings, list[str]]:
    """The settings with every flag without effect at its default, and notes about those flags.

    The rules run in the order of the flag table, each on the result of the previous ones: one flag can leave another
    without effect.
    """
    notes: list[str] = []
    for rule in dict.fromkeys(row.matters for row in IMAGE_ROWS.values() if row.matters):
        idle, why = rule(s)
        if not isinstance(idle, Mapping):
            idle = {name: None if IMAGE_ROWS[name].field else IMAGE_ROWS[name].default for name in idle}
        changes = {name: value for name, value in idle.items() if getattr(s, name) != value}
        if changes:
            s = s.changed(**changes)
        if why and (changes or not idle):
            notes.append(f"note: {why}")
    return s, notes


# ---- what is loaded ------------------------------------------------------------------------------


@with_fields({name: FLAGS[name] for name in names("load")}, lambda row: row.unset)
class Setup:
    """What is loaded and on which device: the flags shared by all images of one load."""

    def __post_init__(self) -> None:
        """Replaces every field except torch devices by its checked value; raises Mistake."""
        for name in names("load"):
            value, row = getattr(self, name), FLAGS[name]
            if value is None and row.unset is None:
                continue
            if row.read.kind != "device" or type(value).__module__ != "torch":
                object.__setattr__(self, name, row.read(name, value))

    @classmethod
    def of(cls, flags: Flags) -> Setup:
        """The setup for these flags."""
        return cls(**{name: getattr(flags, name) for name in names("load")})

    def seen_in_images(self) -> dict[str, Any]:
        """The fields that are also part of an image's settings."""
        return {name: getattr(self, name) for name in names("load", pixels=True)}


# ---- all flags -----------------------------------------------------------------------------------


@with_fields(FLAGS, lambda row: row.unset)
class Flags:
    """The flags of `sd3_infer.py`, read and checked one by one; None means not given."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Flags:
        """From text as typed, or values from Python; None keeps the default.

        Raises Mistake for an unknown flag, a value out of its range, and conflicting flags.
        """
        return cls.of(read_values(raw))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Flags:
        """From values that readers returned; raises Mistake for conflicting flags."""
        flags = cls(**values)
        if flags.self_check:
            for name in values:
                if name not in names(also="self_check"):
                    raise Mistake(name, "", "does not go with `self_check`, which runs the shipped model")
        check_guidance(flags.guidance_start, flags.guidance_end)
        if flags.residual_config and flags.residual_preset:
            why = "does not go with `residual_config`: both hold all residual settings"
            raise Mistake("residual_preset", flags.residual_preset, why)
        if not flags.residual_file:  # else they are checked together with the file's values
            with renaming(RESIDUAL_FLAGS):
                ResidualConfig.from_flags(flags.residual()).check_rotations()
        if flags.controlnet_cond_image and not flags.controlnet_ckpt:
            raise Mistake("controlnet_cond_image", "", "needs `controlnet_ckpt`, the ControlNet that reads it")
        if flags.controlnet_ckpt and not flags.controlnet_cond_image:
            raise Mistake("controlnet_ckpt", "", "needs `controlnet_cond_image`, the image that guides it")
        if flags.out:
            _check_out(flags, values)
        return flags

    def seeds(self, prompts: int) -> list[int]:
        """One seed per image."""
        seed = DEFAULT_SEED if self.seed is None else self.seed
        return picture_seeds(seed, self.kind_of_seeds, prompts, self.num_images)

    @property
    def kind_of_seeds(self) -> str:
        """The seed_type; by default fixed if a seed is given, else rand."""
        return self.seed_type or ("rand" if self.seed is None else "fixed")

    @property
    def residual_file(self) -> str | None:
        """The file with residual settings that the flags name, None where they name none."""
        return str(read_preset(self.residual_preset).path) if self.residual_preset else self.residual_config

    def residual(self) -> dict[str, Any]:
        """The residual flags that were given, by their names without `residual_`; without residual_config and
        residual_preset.
        """
        given = {name: getattr(self, name) for name in RESIDUAL_FLAGS.values()}
        return {name.removeprefix("residual_"): value for name, value in given.items() if value is not None}

    def for_image(self) -> dict[str, Any]:
        """Image settings from the flags; None if the model, its files or the device decide."""
        residual = RESIDUAL_FLAGS.values()
        others = ("prompt", "seed", *residual)  # prompt and seed differ between images
        return {
            n: getattr(self, n)
            for n, row in IMAGE_ROWS.items()
            if row.scope == "picture" and not row.field and n not in others
        }


def _check_out(flags: Flags, values: Mapping[str, Any]) -> None:
    """Raises Mistake if `out` contradicts another flag, or would overwrite a file that the image is made from."""
    for name in ("out_dir", "postfix"):
        if values.get(name) is not None:
            raise Mistake("out", flags.out, f"does not go with `{name}`: it names a file, and no folder is made")
    if flags.serve_stdin:
        raise Mistake("out", flags.out, "does not go with `serve_stdin`, which makes images until its input ends")
    for name in (*FILE_SETTINGS, "residual_config", "replay"):
        for path in paths_of(getattr(flags, name)):
            if not (os.path.exists(path) and os.path.exists(flags.out) and os.path.samefile(path, flags.out)):
                continue
            raise Mistake("out", flags.out, f"is the file of `{name}`, which would be lost; name another file")


def picture_seeds(seed: int, seed_type: str, prompts: int, num_images: int) -> list[int]:
    """One seed per image, prompt by prompt; raises Mistake for values out of range.

    seed_type fixed: every prompt starts at `seed`, and its further images count up; roll: seeds count up over all
    images; rand: drawn without repeats.
    """
    read = read_values({"seed": seed, "seed_type": seed_type, "num_images": num_images})
    seed, seed_type, num_images = read["seed"], read["seed_type"], read["num_images"]
    count = prompts * num_images
    if count > MOST_PICTURES:
        why = f"for {prompts:,} prompts these are {count:,} images; at most {MOST_PICTURES:,} are allowed"
        raise Mistake("num_images", num_images, why)
    if seed_type == "rand":
        return random.SystemRandom().sample(range(RANDOM_SEEDS), count)
    if seed_type == "roll":
        return [(seed + i) % SEED_LIMIT for i in range(count)]
    return [(seed + i) % SEED_LIMIT for _ in range(prompts) for i in range(num_images)]


def read_row_seeds(seed: Any) -> list[int]:
    """The seeds of a batch's rows, from a single seed or a list; raises Mistake."""
    rows = read_list("seed", seed) if isinstance(seed, Iterable) else [seed]
    return [FLAGS["seed"].read("seed", one) for one in rows]
