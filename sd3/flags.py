"""The flags. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sd3.mistakes import display, nearest, renaming
from sd3.readers import (
    SEED_LIMIT,
    _choice,
    _optional_path,
    range_int,
    read_bool,
    read_device,
    read_dtype,
    read_float,
    read_layer,
    read_layers,
    read_path,
    read_postfix,
    read_schedule,
    read_shift,
    read_size,
    read_text,
    read_tile,
    read_weight,
    read_weights,
)

SEED_TYPES = ("fixed", "rand", "roll")
SAMPLERS = ("euler", "dpmpp_2m")
RESIDUAL_MODES = ("add", "anchored", "aligned")
RESIDUAL_BRANCHES = ("both", "cond", "uncond")
RANDOM_SEEDS = 100_000  # seed_type rand draws below this
DEFAULT_SEED = 23
DEFAULT_DENOISE = 0.8
WEIGHTS = ("full", "int8", "fp8")
MOST_PICTURES = 100_000  # of a run, and of a sweep's grid


@dataclass(frozen=True)
class Flags:
    """The flags of `sd3_infer.py`, read and checked one by one; None means not given."""

    prompt: str = "cute wallpaper art of a cat"
    model: str = "models/sd3_medium.safetensors"
    out_dir: str = "outputs"
    postfix: str | None = None
    seed: int | None = None
    seed_type: str | None = None
    sampler: str | None = None
    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    width: int | None = None
    height: int | None = None
    controlnet_ckpt: str | None = None
    controlnet_cond_image: str | None = None
    vae: str | None = None
    init_image: str | None = None
    denoise: float = DEFAULT_DENOISE
    skip_layer_cfg: bool = False
    verbose: bool = False
    model_folder: str | None = None
    clip_l: str | None = None
    clip_g: str | None = None
    t5xxl: str | None = None
    text_encoder_device: str = "auto"
    residual_origin_layer: int | None = None
    residual_target_layers: tuple[int, ...] | None = None
    residual_weights: tuple[float, ...] | str | None = None
    residual_mode: str | None = None
    residual_schedule: str | None = None
    residual_start: float | None = None
    residual_end: float | None = None
    residual_branch: str | None = None
    residual_rotations: str | None = None
    residual_config: str | None = None
    negative_prompt: str = ""
    num_images: int = 1
    batch_size: int = 1
    controlnet_strength: float = 1.0
    device: str = "auto"
    dtype: str = "auto"
    no_t5: bool = False
    pad_batch: bool = False
    t5_resident: bool = False
    embed_cache: str | None = None
    compile: bool = False
    weights: str = "full"
    offload: bool = False
    cache: float = 0.0
    vae_tile: int | None = None
    no_metadata: bool = False
    replay: str | None = None
    serve_stdin: bool = False
    self_check: bool = False
    list_models: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Flags:
        """From raw values as typed (text) or given in Python; None values keep the default.

        Raises ValueError for an unknown flag (with the nearest match) and for every value out of its range.
        """
        flags = cls(**read_values(raw))
        if flags.self_check:
            for name, value in raw.items():
                if name not in SELF_CHECK and value is not None:
                    raise ValueError(f"--{name}: does not go with --self_check, which runs the shipped model")
        if not flags.residual_config:  # else they are checked together with what the file says
            from sd3.residual import RESIDUAL_FLAGS, ResidualConfig

            with renaming(RESIDUAL_FLAGS):
                ResidualConfig.from_flags(flags.residual()).check_rotations()
        if flags.controlnet_cond_image and not flags.controlnet_ckpt:
            raise ValueError("--controlnet_cond_image: needs --controlnet_ckpt, the ControlNet that reads it")
        if flags.controlnet_ckpt and not flags.controlnet_cond_image:
            raise ValueError("--controlnet_ckpt: needs --controlnet_cond_image, the picture that guides it")
        return flags

    def seeds(self, prompts: int) -> list[int]:
        """One seed per picture."""
        seed = DEFAULT_SEED if self.seed is None else self.seed
        return picture_seeds(seed, self.kind_of_seeds, prompts, self.num_images)

    @property
    def kind_of_seeds(self) -> str:
        """The seed_type; without one: fixed where a seed is given, else rand."""
        return self.seed_type or ("rand" if self.seed is None else "fixed")

    def residual(self) -> dict[str, Any]:
        """The residual flags that were given, by their names without `residual_`; the file's name is not among them."""
        names = [n for n in READERS if n.startswith("residual_") and n != "residual_config"]
        return {n.removeprefix("residual_"): v for n in names if (v := getattr(self, n)) is not None}


READERS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": read_text,
    "model": read_path,
    "out_dir": read_path,
    "postfix": read_postfix,
    "seed": range_int(0, SEED_LIMIT - 1),
    "seed_type": _choice(SEED_TYPES),
    "sampler": _choice(SAMPLERS),
    "steps": range_int(1, 10_000),
    "cfg": lambda flag, value: read_float(flag, value, 0.0, 100.0),
    "shift": read_shift,
    "width": read_size,
    "height": read_size,
    "controlnet_ckpt": _optional_path,
    "controlnet_cond_image": _optional_path,
    "vae": _optional_path,
    "init_image": _optional_path,
    "denoise": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "skip_layer_cfg": read_bool,
    "verbose": read_bool,
    "model_folder": _optional_path,
    "clip_l": _optional_path,
    "clip_g": _optional_path,
    "t5xxl": _optional_path,
    "text_encoder_device": read_device,
    "residual_origin_layer": read_layer,
    "residual_target_layers": read_layers,
    "residual_weights": read_weights,
    "residual_mode": _choice(RESIDUAL_MODES),
    "residual_schedule": read_schedule,
    "residual_start": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_end": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_branch": _choice(RESIDUAL_BRANCHES),
    "residual_rotations": _optional_path,
    "residual_config": _optional_path,
    "negative_prompt": read_text,
    "num_images": range_int(1, MOST_PICTURES),
    "batch_size": range_int(1, 1024),
    "controlnet_strength": read_weight,
    "device": read_device,
    "dtype": lambda flag, value: read_dtype(value),
    "no_t5": read_bool,
    "pad_batch": read_bool,
    "t5_resident": read_bool,
    "embed_cache": _optional_path,
    "compile": read_bool,
    "weights": _choice(WEIGHTS),
    "offload": read_bool,
    "cache": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "vae_tile": read_tile,
    "no_metadata": read_bool,
    "replay": read_path,
    "serve_stdin": read_bool,
    "self_check": read_bool,
    "list_models": read_bool,
}
# What --self_check goes with; it brings its own model and settings.
SELF_CHECK = (
    "self_check", "device", "text_encoder_device", "dtype", "weights", "compile", "offload", "t5_resident", "verbose",
)  # fmt: skip


def read_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every value read by its flag's reader, None left out: what is used from then on. Raises ValueError for an unknown
    flag and for every value out of its range; says nothing of how they go together.
    """
    for name in raw:
        check_flag(name)
    return {name: READERS[name](name, value) for name, value in raw.items() if value is not None}


def check_flag(name: Any, readers: Mapping[str, Any] = READERS) -> None:
    """Raises ValueError with the nearest match where there is no such flag."""
    if name not in readers:
        raise ValueError(f"--{display(name)}: unknown flag{nearest(name, readers)} (--help lists all)")


def picture_seeds(seed: int, seed_type: str, prompts: int, num_images: int) -> list[int]:
    """One seed per picture, prompt by prompt; raises ValueError for values out of their ranges.

    fixed: every prompt starts at `seed`, its further images count up; roll: counts up over all pictures; rand: drawn,
    no two of them the same.
    """
    read = read_values({"seed": seed, "seed_type": seed_type, "num_images": num_images})
    seed, seed_type, num_images = read["seed"], read["seed_type"], read["num_images"]
    count = prompts * num_images
    if count > MOST_PICTURES:
        raise ValueError(
            f"--num_images {num_images}: for {prompts:,} prompts these are {count:,} pictures; "
            f"at most {MOST_PICTURES:,}"
        )
    if seed_type == "rand":
        return random.SystemRandom().sample(range(RANDOM_SEEDS), count)
    if seed_type == "roll":
        return [(seed + i) % SEED_LIMIT for i in range(count)]
    return [(seed + i) % SEED_LIMIT for _ in range(prompts) for i in range(num_images)]
