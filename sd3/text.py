"""Prompts to text tokens: CLIP-L, CLIP-G and T5, streamed from their files layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from other_impls import CLIP, T5
from sd3.weights import ModelTensors


class StreamedEncoder:
    """A text encoder of which one layer at a time is in memory: its parameters are on the meta device, those of a
    layer are read when its turn comes and dropped after it. resident: they stay instead.
    """

    def __init__(
        self, model: CLIP | T5, part: ModelTensors, device: torch.device, dtype: torch.dtype, resident: bool = False
    ):
        """model: on the meta device; device, dtype: where and in what it runs."""
        self.model, self.part = model, part
        self.device, self.dtype, self.resident = device, dtype, resident
        self.names = list(model.state_dict())
        self.opened = 0  # how often it was read from disk

    def run(self, *texts: Any, update: Callable[[int], Any] = lambda layers: None) -> list[Any]:
        """What the model's `encode` gives for texts, embedded by `embed`. update: called after every layer."""
        stays = False
        try:
            out = self.model.encode(*texts, self._layers(update))
            stays = self.resident
            return out
        finally:
            if not stays:  # nor does half of a layer, after an error
                self.model.to("meta")

    def embed(self, number: int, ids: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Rows (L, D) of an embedding table of the model for each list of ids, on the CPU, as stored. The table is
        mapped: of it only these rows are read, one by one as float8 has no gather.
        """
        ((_, table),) = self.part.read([self.model.TABLES[number]], "cpu", None)
        for row in ids:
            yield torch.stack([table[i] for i in row])

    def _layers(self, update: Callable[[int], Any]) -> Iterator[nn.Module]:
        stem, loaded = self.model.LAYERS, (self.model.LAYERS, *self.model.TABLES)
        self.opened += self._load([n for n in self.names if not n.startswith(loaded)])  # norms and projections
        for number, layer in enumerate(self.model.layers):
            self._load([n for n in self.names if n.startswith(f"{stem}{number}.")])
            yield layer
            if not self.resident:
                layer.to("meta")
            update(1)

    def _load(self, names: list[str]) -> bool:
        """Reads those parameters that are not in memory; returns whether there are any."""
        missing = [name for name in names if self.model.get_parameter(name).is_meta]
        self.part.load_into(self.model, self.device, self.dtype, names=missing)
        return bool(missing)
