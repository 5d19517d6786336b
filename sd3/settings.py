"""What one picture is made from: every flag's default, check and range. Needs no torch, so bad input fails at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sd3.flags import DEFAULT_DENOISE, DEFAULT_SEED, READERS, Flags
from sd3.mistakes import renaming
from sd3.models import CONTROLNET, DEFAULT_SIZE, MODELS, OTHER_MODEL, SKIP_LAYERS, SkipLayerConfig, model_key
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig

TEXT_FILES = ("model_folder", "clip_l", "clip_g", "t5xxl")  # where text encoders lie; pictures do not name it
FILE_SETTINGS = ("model", "vae", "init_image", "controlnet_ckpt", "controlnet_cond_image", "residual_rotations")


def base_name(path: str | None) -> str | None:
    """A path without its folders, whichever system wrote it."""
    return None if path is None else os.path.basename(path.replace("\\", "/").rstrip("/"))


@dataclass(frozen=True)
class Settings:
    """Everything that decides one picture. Files are named as given; what they hold is the business of others."""

    prompt: str
    model: str
    negative_prompt: str = ""
    seed: int = DEFAULT_SEED
    sampler: str = OTHER_MODEL.sampler
    steps: int = OTHER_MODEL.steps
    cfg: float = OTHER_MODEL.cfg
    shift: float = OTHER_MODEL.shift
    width: int = DEFAULT_SIZE
    height: int = DEFAULT_SIZE
    vae: str | None = None
    init_image: str | None = None
    denoise: float = DEFAULT_DENOISE
    controlnet_ckpt: str | None = None
    controlnet_cond_image: str | None = None
    controlnet_strength: float = 1.0
    skip_layer: SkipLayerConfig | None = None
    residual_origin_layer: int = 0
    residual_target_layers: tuple[int, ...] = ()
    residual_weights: tuple[float, ...] = ()
    residual_mode: str = "add"
    residual_schedule: str = "constant"
    residual_start: float = 0.0
    residual_end: float = 1.0
    residual_branch: str = "both"
    residual_rotations: str | None = None
    no_t5: bool = False
    dtype: str = "auto"
    device: str = "auto"
    text_encoder_device: str = "auto"
    batch_size: int = 1  # rows that were sampled at once
    compile: bool = False
    weights: str = "full"
    cache: float = 0.0
    vae_tile: int = 0  # side of a tile in pixels; 0: the VAE runs on the whole picture
    offload: bool = False  # other products are computed at once then, which changes the last bits

    def __post_init__(self) -> None:
        """Reads every field as its flag is read, and keeps what was read; raises ValueError naming the flag."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value is not field.default and field.name in READERS:  # 5 equals 5.0
                object.__setattr__(self, field.name, READERS[field.name](field.name, value))
        if self.vae_tile is None:
            raise ValueError("--vae_tile auto: must be a number here; the size is chosen before a picture is described")
        residual = self.residual  # checks the fields against each other
        if residual.active:
            object.__setattr__(self, "residual_weights", residual.weights)

    @property
    def residual(self) -> ResidualConfig:
        """The residual settings in the form that checks them and that a stream is made from."""
        with renaming(RESIDUAL_FLAGS):
            return ResidualConfig(**{name: getattr(self, flag) for name, flag in RESIDUAL_FLAGS.items()})

    def asdict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def public(self) -> dict[str, Any]:
        """Plain values for a record that others may see: files by their names, without folders.

        Settings that came later are left out at their defaults, so that pictures made before keep their digests.
        What has no effect is not seen here: `effective` sets it to its default before a picture is made.
        """
        return {n: v for n, v in self.named().items() if n not in LATER or v != LATER[n]}

    def named(self) -> dict[str, Any]:
        """All plain values, files by their names without folders."""
        values = self.asdict()
        return values | {name: base_name(values[name]) for name in FILE_SETTINGS}

    def digest(self) -> str:
        """A canonical hash of what decides the picture: the same for the same settings on any machine, wherever the
        files lie there.
        """
        return digest_of(self.public())


LATER = {
    f.name: f.default
    for f in dataclasses.fields(Settings)
    if f.name in ("compile", "weights", "cache", "vae_tile", "offload")
}


def digest_of(public: Mapping[str, Any]) -> str:
    """The digest of settings by their public values, as a picture's record holds them."""
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def earlier_digest(as_given: Settings) -> str:
    """The digest that pictures of these settings had in versions that counted every flag as it was given, and did not
    count `offload`.
    """
    return digest_of({n: v for n, v in as_given.public().items() if n != "offload"})


FILE_DEFAULTS: dict[str, Callable[[str, Any], Any]] = {
    k: READERS[k] for k in ("width", "height", "steps", "shift", "cfg", "sampler")
}


def file_defaults(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Size, steps, shift, cfg and sampler that a file names in its safetensors metadata; what is wrong is left out."""
    out = {}
    for name, read in FILE_DEFAULTS.items():
        if name in metadata:
            try:
                out[name] = read(name, metadata[name])
            except ValueError:
                continue
    return out


def resolve(
    flags: Flags, metadata: Mapping[str, str] | None = None, large_controlnet: bool = False
) -> tuple[dict[str, Any], SkipLayerConfig | None]:
    """shift, steps, cfg, sampler, width and height of a run, and its skip-layer guidance.

    A flag wins over the ControlNet's row (`large_controlnet`), that over the model file's metadata, that over the
    model's row. Skip-layer guidance brings its own cfg unless one is given.
    """
    key = model_key(flags.model)
    values = dataclasses.asdict(MODELS.get(key, OTHER_MODEL)) | {"width": DEFAULT_SIZE, "height": DEFAULT_SIZE}
    values |= file_defaults(metadata or {})
    if large_controlnet:
        values |= dataclasses.asdict(CONTROLNET)
    skip_layer = SKIP_LAYERS.get(key) if flags.skip_layer_cfg else None
    if skip_layer is not None:
        values["cfg"] = skip_layer.cfg
    for name in values:
        if (given := getattr(flags, name)) is not None:
            values[name] = given
    return values, skip_layer
