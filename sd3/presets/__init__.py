"""Published settings of residual text streaming: one JSON file per name in this folder. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3.mistakes import Missing, Mistake, verbatim

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
# Published rotation files -> their repository on the Hugging Face hub.
ROTATION_FILES = dict.fromkeys(("sd3_coco5k_o1.pt", "flux_coco5k_o2.pt"), "LewisYao/PromptReinjection")
ROTATION_FOLDERS = (Path("prompt_reinjection/rotations"), Path("models"), Path("models/rotations"))


@dataclass(frozen=True)
class Preset:
    """Facts about a preset.

    depth, width, dual_layers: sizes of the model that it is for (dual_layers: number of blocks with a second
    attention); source: where it was published; measured: what was measured with it and what was not; sampling: the
    sampling settings that it is used with.
    """

    name: str
    model: str
    depth: int
    width: int
    source: str
    measured: str
    sampling: str
    dual_layers: int = 0

    @property
    def path(self) -> Path:
        """The preset's file, in the format of `residual.read_fields`."""
        return FOLDER / f"{self.name}.json"

    def check(self, depth: int, width: int, dual_layers: int = 0) -> None:
        """Raises Mistake if the model has another depth, width, or number of blocks with a second attention."""
        sizes = (self.depth, self.width, self.dual_layers), (depth, width, dual_layers)
        if sizes[0] != sizes[1]:
            needed, given = (f"{d} blocks of width {w}" + f", {n} with dual attention" * bool(n) for d, w, n in sizes)
            raise Mistake("residual_preset", self.name, f"is for {self.model} ({needed}); this model has {given}")


def read_preset(name: str) -> Preset:
    """Reads a preset by its name, one of `PRESETS`."""
    about: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["preset"]
    return Preset(name, **about)


def list_presets() -> str:
    """Text that lists all presets: settings (flag names between backquotes), source and measurements."""
    lines = []
    for preset in map(read_preset, PRESETS):
        fields = json.loads(preset.path.read_text(encoding="utf-8"))
        flags = {"origin_layer": "origin_layer", "target_layers": "target_layers", "residual_weights": "weights"}
        flags |= {"mode": "mode", "rotations": "rotations"}
        words = [f"`residual_{flags[key]}` {fields[key]}" for key in flags if key in fields]
        lines += [f"{preset.name}: for {preset.model}", f"  {' '.join(words)}", f"  used with {preset.sampling}"]
        lines += [f"  source: {preset.source}", f"  measured: {preset.measured}"]
    return "\n".join(lines)


def with_rotations(config: Any, folders: Iterable[Path]) -> Any:
    """Returns a `ResidualConfig` with the path of its rotation file, which is searched for by name in the current
    folder, in `folders` and in `ROTATION_FOLDERS`. Raises Missing if a published file is not found.
    """
    name = config.rotations
    if not config.aligned or name is None or os.path.exists(name):
        return config
    if name != os.path.basename(name):
        return config
    for folder in (*folders, *ROTATION_FOLDERS):
        if (folder / name).is_file():
            return replace(config, rotations=str(folder / name))
    if name in ROTATION_FILES:
        get = f"`hf download {ROTATION_FILES[name]} {name} --local-dir models`"
        raise Missing("residual_rotations", verbatim(name), f"no such file here or in ./models; {get} fetches it")
    return config
