"""The released models: what they are usually run with and where they are. Needs no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3.mistakes import display, nearest
from sd3.readers import read_float, read_layers, read_weight

DEFAULT_SIZE = 1024


@dataclass(frozen=True)
class ModelDefaults:
    """What a model file is usually run with."""

    shift: float = 3.0
    steps: int = 50
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"


@dataclass(frozen=True)
class SkipLayerConfig:
    """Skip-layer guidance: `scale` (cond - cond without `layers`) while start * steps < step < end * steps."""

    scale: float
    start: float
    end: float
    layers: tuple[int, ...]
    cfg: float  # classifier-free guidance used with it, unless one is given

    def __post_init__(self) -> None:
        """Reads every field and keeps what was read; raises ValueError naming the field."""
        flag = "skip_layer_cfg"
        read = {
            "scale": read_weight(f"{flag} scale", self.scale),
            "start": read_float(f"{flag} start", self.start, 0.0, 1.0),
            "end": read_float(f"{flag} end", self.end, 0.0, 1.0),
            "layers": read_layers(f"{flag} layers", self.layers),
            "cfg": read_float(f"{flag} cfg", self.cfg, 0.0, 100.0),
        }
        if read["start"] >= read["end"]:
            raise ValueError(f"--{flag} start {read['start']:g}: must be below --{flag} end {read['end']:g}")
        if not read["layers"]:
            raise ValueError(f"--{flag} layers: names no layer to skip")
        if len(set(read["layers"])) < len(read["layers"]):
            raise ValueError(f"--{flag} layers {display(self.layers)}: name every layer once")
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in `step` (from 0) of a schedule of `steps`."""
        return self.start * steps < step < self.end * steps


MODELS = {
    "sd3_medium": ModelDefaults(shift=1.0),
    "sd3.5_medium": ModelDefaults(),
    "sd3.5_large": ModelDefaults(steps=40, cfg=4.5),
    "sd3.5_large_turbo": ModelDefaults(steps=4, cfg=1.0, sampler="euler"),
}
OTHER_MODEL = ModelDefaults()
CONTROLNET = ModelDefaults(steps=60, cfg=3.5, sampler="euler")  # the released SD3.5 Large ControlNets


def read_skip_layer(values: Mapping[str, Any]) -> SkipLayerConfig:
    """Skip-layer guidance from its fields by name; raises ValueError for a field too many or too few."""
    names = [f.name for f in dataclasses.fields(SkipLayerConfig)]
    for name in values:
        if name not in names:
            raise ValueError(f"--skip_layer_cfg {display(name)}: unknown{nearest(name, names)} ({', '.join(names)})")
    for name in names:
        if name not in values:
            raise ValueError(f"--skip_layer_cfg {name}: is missing")
    return SkipLayerConfig(**values)


def model_key(model: str | Path) -> str:
    """The released model that a file's name starts with (`sd3_medium_incl_clips` -> `sd3_medium`), or a folder's, as
    the hub or its cache names it (`stable-diffusion-3.5-medium` -> `sd3.5_medium`), or ``.
    """
    path = Path(model)
    names = [path.name.removesuffix(".safetensors")]
    if not path.name.endswith(".safetensors"):
        parts = [p.rsplit("--", 1)[-1] for p in reversed(path.parts)]
        names += [p.replace("stable-diffusion-", "sd").replace("-", "_") for p in parts if "stable-diffusion-" in p]
    for name in names:
        fits = [k for k in MODELS if name == k or re.match(re.escape(k) + r"[_.\-]", name)]
        if fits:
            return max(fits, key=len)
    return ""


SKIP_LAYERS = {"sd3.5_medium": SkipLayerConfig(2.5, 0.01, 0.20, (7, 8, 9), cfg=4.0)}
FETCH = {
    "sd3_medium": "stabilityai/stable-diffusion-3-medium",
    "sd3.5_medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5_large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5_large_turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}


def fetch_model(path: str) -> str:
    """How to get a released model, as the end of an error line, or ``."""
    name = Path(path).name
    repository = FETCH.get(name.removesuffix(".safetensors"))
    if repository is None:
        return "; --list_models shows what there is"
    return f"; get it with: hf download {repository} {name} --local-dir {Path(path).parent}"
