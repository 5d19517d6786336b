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

    depth, width: sizes of the model that it is for; source: where it was published; measured: what we measured with it
    and what we did not; sampling: the sampling settings that it is used with.
    """

    name: str
    model: str
    depth: int
    width: int
    source: str
    measured: str
    sampling: str

    @property
    def path(self) -> Path:
        """The preset's file, in the format of `residual.read_fields`."""
        return FOLDER / f"{self.name}.json"

    def check(self, depth: int, width: int) -> None:
        """Raises Mistake if the model has another depth or width."""
        if (depth, width) != (self.depth, self.width):
            needed, given = (f"{d} blocks of width {w}" for d, w in ((self.depth, self.width), (depth, width)))
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
    base = os.path.basename(name)
    if name == base or base in ROTATION_FILES:
        for folder in (*folders, *ROTATION_FOLDERS):
            if (folder / base).is_file():
                return replace(config, rotations=str(folder / base))
    if base in ROTATION_FILES:
        get = f"`hf download {ROTATION_FILES[base]} {base} --local-dir models`"
        raise Missing("residual_rotations", verbatim(base), f"no such file here or in ./models; {get} fetches it")
    return config
