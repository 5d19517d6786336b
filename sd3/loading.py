"""Opens weight files and loads modules, with progress, times and advice if memory runs out."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sd3.files import WeightFile
from sd3.memory import explained
from sd3.mistakes import Missing, Where
from sd3.telling import Reporter, Stages
from sd3.unchanged import Unchanged, stamp
from sd3.weights import ModelTensors

Model = TypeVar("Model", bound=nn.Module)


class Loader:
    """What the parts of an engine share: the files opened so far, which must not change, and the reporter."""

    def __init__(self, tell: Reporter):
        self.tell = tell
        self.stages = Stages()
        self.files = Unchanged()

    def open(self, field: str, path: str | Path, fetch: str = "") -> WeightFile:
        """Opens a weight file or a diffusers folder. fetch: how to get a missing file, as the end of the message.

        Raises Missing or Mistake, which names `field`.
        """
        if not os.path.exists(path):
            raise Missing(field, path, f"no such file{fetch}")
        before = stamp(path)
        file = WeightFile(path, field)
        for own in sorted({entry.path for entry in file.entries.values()}):
            self.files.add(Where(field, own), own, before if own == Path(path) else None)
        return file

    def load(
        self,
        part: ModelTensors,
        model: Model,
        what: str,
        device: torch.device,
        dtype: torch.dtype,
        names: Collection[str] | None = None,
    ) -> Model:
        """Gives a module on the meta device its weights. what: its name in messages; names: of the tensors to load,
        None for all.
        """
        shapes = (part.shapes[n] for n in names) if names else (p.shape for p in model.parameters())
        size = sum(map(math.prod, shapes)) * dtype.itemsize
        turn = "`weights` int8, `dtype` bfloat16 or, with a GPU, `offload` True"
        bar = self.tell.progress(size, f"loading {what}", "B")
        with (
            self.files.watch(),
            explained(f"loading the {what}", turn),
            self.stages.timed(f"loading {what}"),
            bar as up,
        ):
            return part.load_into(model, device, dtype, up, names)
