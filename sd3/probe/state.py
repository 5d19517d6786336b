"""The saved state of a calibration, from which the same command resumes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3 import writing
from sd3.device import device_record
from sd3.embed_cache import file_identity
from sd3.engine import Engine
from sd3.files import contents
from sd3.mistakes import Unwritable, verbatim
from sd3.planning import plan_pictures
from sd3.probe.procrustes import Calibration
from sd3.probe.running import LabelledPrompt
from sd3.settings import paths_of

SAVE_EVERY = 30.0  # seconds between writes
VERSION = 4  # changes when the sums do; states of other versions are ignored


class State:
    """The sums of a calibration, in a file beside the rotation file."""

    def __init__(self, sums: Calibration, out: Path, identity: str):
        """identity: a hash of everything that the sums depend on."""
        self.sums, self.identity = sums, identity
        self.path = out.with_name(f".{out.name}.state")
        self.saved_at = time.monotonic()

    def save_now_and_then(self, prompts: int) -> None:
        """Writes the sums over the first `prompts` prompts, unless they were written a moment ago."""
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            sums = self.sums.state()
            save_tensors(sums, self.path, {"identity": self.identity, "done": str(prompts), "sums": _checksum(sums)})
            self.saved_at = time.monotonic()

    def resume(self, most: int) -> int:
        """Reads the sums of an interrupted run; returns how many prompts, of `most`, they cover.

        Returns 0 and reads nothing if the file belongs to another run or is damaged.
        """
        if not self.path.is_file():
            return 0
        sums = self.sums.state()
        try:
            with safe_open(self.path, framework="pt") as f:
                metadata = f.metadata() or {}
            if metadata.get("identity") != self.identity:
                return 0
            done, tensors = int(metadata["done"]), load_file(self.path)
            intact = _forms(tensors) == _forms(sums) and metadata["sums"] == _checksum(tensors) and 0 < done <= most
            if not intact or not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
                return 0
        except Exception:  # a damaged file may raise anything: start over
            return 0
        for name, tensor in sums.items():
            tensor.copy_(tensors[name])
        return done

    def remove(self) -> None:
        """Deletes the file after the calibration."""
        self.path.unlink(missing_ok=True)


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


def identity(
    engine: Engine, prompts: Sequence[LabelledPrompt], values: Mapping[str, Any], flags: Mapping[str, Any]
) -> str:
    """A hash of everything that the sums depend on."""
    files = {"model": {entry.path for entry in engine.model_file.entries.values()}, **engine.text.files()}
    if loras := {file for path in paths_of(engine.setup.lora) for file in contents(Path(path))}:
        files["lora"] = loras
    settings = plan_pictures(engine, [prompts[0].prompt], [0], **values).pictures[0].public()
    inputs = {
        "version": VERSION,
        "files": {role: [(path.name, *file_identity(path)) for path in sorted(paths)] for role, paths in files.items()},
        "prompts": [p.prompt for p in prompts],
        "settings": {name: value for name, value in settings.items() if name not in ("prompt", "seed")},
        "seed": flags.get("seed", 0),
        "origin": flags["origin"],
        "targets": list(flags["targets"]),
        "buckets": flags["buckets"],
        "device": device_record(engine.device, engine.threads),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=list).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(memoryview(tensors[name].contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it; raises Unwritable."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        writing.rename_finished(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise Unwritable("", path, f"cannot be written ({verbatim(str(error))})") from None
        raise
