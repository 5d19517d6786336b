"""The released models: their usual settings, and where to download them. Needs no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3.mistakes import Mistake, nearest
from sd3.readers import read_float, read_layers, read_weight

DEFAULT_SIZE = 1024  # pixels
DEFAULT_MODEL = "models/sd3_medium.safetensors"
SHIPPED = "demo"


@dataclass(frozen=True)
class SkipLayerConfig:
    """Skip-layer guidance: `scale` (cond - cond without `layers`) while start * steps < step < end * steps."""

    scale: float
    start: float
    end: float
    layers: tuple[int, ...]
    cfg: float  # cfg used with it, unless one is given

    def __post_init__(self) -> None:
        """Replaces every field by its checked value; raises Mistake."""
        field = "skip_layer_cfg"
        read = {
            "scale": read_weight(f"{field} scale", self.scale),
            "start": read_float(f"{field} start", self.start, 0.0, 1.0),
            "end": read_float(f"{field} end", self.end, 0.0, 1.0),
            "layers": read_layers(f"{field} layers", self.layers),
            "cfg": read_float(f"{field} cfg", self.cfg, 0.0, 100.0),
        }
        if read["start"] >= read["end"]:
            raise Mistake(f"{field} start", f"{read['start']:g}", f"must be below `{field}` end {read['end']:g}")
        if not read["layers"]:
            raise Mistake(f"{field} layers", "", "names no layer to skip")
        if len(set(read["layers"])) < len(read["layers"]):
            raise Mistake(f"{field} layers", self.layers, "lists a layer more than once")
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def acts(self, step: float, steps: int) -> bool:
        """Whether it acts at `step` (from 0) of a schedule of `steps`."""
        return self.start * steps < step < self.end * steps


def read_skip_layer(values: Mapping[str, Any]) -> SkipLayerConfig:
    """Skip-layer guidance from its fields by name; raises Mistake for unknown and missing fields."""
    names = [f.name for f in dataclasses.fields(SkipLayerConfig)]
    for name in values:
        if name not in names:
            raise Mistake("skip_layer_cfg", name, f"unknown{nearest(name, names)} ({', '.join(names)})")
    for name in names:
        if name not in values:
            raise Mistake("skip_layer_cfg", name, "is missing")
    return SkipLayerConfig(**values)


def read_skip_layer_config(config: SkipLayerConfig | Mapping[str, Any] | None) -> SkipLayerConfig | None:
    """Accepts the public reference's dictionary {"scale", "start", "end", "layers", "cfg"} too; raises Mistake."""
    if config is None or isinstance(config, SkipLayerConfig):
        return config
    if not isinstance(config, Mapping):
        raise Mistake("skip_layer_config", config, "must be a SkipLayerConfig or a dictionary")
    if not config:
        return None
    return read_skip_layer({"start": 0.01, "end": 0.20, "cfg": 4.0} | dict(config))


@dataclass(frozen=True)
class Model:
    """The row of a model: its usual settings, its repository on the hub, its skip-layer guidance."""

    shift: float = 3.0
    steps: int = 50
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"
    hub: str = ""  # repository that holds NAME.safetensors
    skip_layer: SkipLayerConfig | None = None

    def usual(self) -> dict[str, Any]:
        """Settings by flag."""
        return {name: getattr(self, name) for name in ("shift", "steps", "cfg", "sampler")}


MODELS = {
    "sd3_medium": Model(shift=1.0, hub="stabilityai/stable-diffusion-3-medium"),
    "sd3.5_medium": Model(
        hub="stabilityai/stable-diffusion-3.5-medium",
        skip_layer=SkipLayerConfig(scale=2.5, start=0.01, end=0.20, layers=(7, 8, 9), cfg=4.0),
    ),
    "sd3.5_large": Model(steps=40, cfg=4.5, hub="stabilityai/stable-diffusion-3.5-large"),
    "sd3.5_large_turbo": Model(steps=4, cfg=1.0, sampler="euler", hub="stabilityai/stable-diffusion-3.5-large-turbo"),
}
OTHER_MODEL = Model()
CONTROLNET = Model(steps=60, cfg=3.5, sampler="euler")  # the released SD3.5 Large ControlNets


def own_models_folder() -> Path:
    """The models folder of the clone; for an installed package, the folder of the small model that ships."""
    folder = shipped_folder()
    return folder.parent if folder.name == SHIPPED else folder


def shipped_folder() -> Path:
    """The folder of the small model that ships: `models/demo` in a clone, beside this file in an installed package."""
    clone = Path(__file__).parent.parent / "models" / "demo"
    return clone if clone.is_dir() else Path(__file__).parent / "shipped"


def model_path(model: str) -> str:
    """The file or folder of a model: `demo` is the small one that ships, anything else a path."""
    return str(shipped_folder() / f"{SHIPPED}.safetensors") if model == SHIPPED else model


def model_key(model: str | Path) -> str:
    """The released model that a file's name starts with (`sd3_medium_incl_clips` -> `sd3_medium`), or the name of a
    folder, as on the hub or in its cache (`stable-diffusion-3.5-medium` -> `sd3.5_medium`); empty if none.
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


def model_row(model: str | Path) -> Model:
    """The row of a model file or folder, by its name."""
    return MODELS.get(model_key(model), OTHER_MODEL)


def fetch_model(path: str) -> str:
    """How to download a released model, as the end of an error line."""
    name = Path(path).name
    row = MODELS.get(name.removesuffix(".safetensors"), OTHER_MODEL)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not name.endswith(".safetensors") and not Path(path).parent.exists():
        return f"; if it is a repository of the Hugging Face hub: hf download {path} --local-dir models/{name}"
    if not row.hub:
        return "; `list_models` lists the models"
    small = f"; `model` {SHIPPED} is the small model that ships" if Path(path) == Path(DEFAULT_MODEL) else ""
    file = f"{name.removesuffix('.safetensors')}.safetensors"
    folder = Path(path).parent if name == file else Path(DEFAULT_MODEL).parent
    give = "" if name == file else f", then give {folder / file}"
    return f"; get it with: hf download {row.hub} {file} --local-dir {folder}{give}{small}"
