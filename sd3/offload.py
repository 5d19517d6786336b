"""`--offload`: the MMDiT's blocks stay in main memory; each comes to the device while the one before it runs.

On a CUDA device copies run on a stream of their own, from pinned memory. Elsewhere they are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Offload:
    """Blocks whose weights are in main memory, and a device they are brought to."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        """Takes the blocks' weights as they are: all on the CPU. Pins them where the device reads pinned memory."""
        self.device = torch.device(device)
        self.streams = self.device.type == "cuda"
        self.places: list[list[tuple[dict, str]]] = []  # where each block's parameters and buffers are
        self.host: list[list[Tensor]] = []
        for block in blocks:
            owners = [owned for module in block.modules() for owned in (module._parameters, module._buffers)]
            places = [(owned, name) for owned in owners for name, tensor in owned.items() if tensor is not None]
            self.places.append(places)
            self.host.append([self._home(owned[name].detach()) for owned, name in places])
        self.copies = torch.Stream(self.device) if self.streams else None

    def _home(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.streams else tensor

    def _bring(self, i: int) -> tuple[list[Tensor], torch.Event | None]:
        """Starts to copy block i; returns the copies and what says that they are there."""
        if self.copies is None:
            return [t.to(self.device) for t in self.host[i]], None
        with self.copies:
            there = [t.to(self.device, non_blocking=True) for t in self.host[i]]
            return there, self.copies.record_event()

    def run(self, order: Sequence[int]) -> Iterator[int]:
        """Yields the numbers of the blocks in `order`, each when its weights are on the device, for as long as the
        caller works with it.
        """
        order = list(order)
        following = self._bring(order[0]) if order else None
        for place, i in enumerate(order):
            (copies, ready), following = following, None
            if ready is not None:
                current = torch.accelerator.current_stream(self.device)
                current.wait_event(ready)
                for t in copies:
                    t.record_stream(current)  # its memory is not given away before this stream is done with it
            self._give(i, copies)
            if place + 1 < len(order):
                following = self._bring(order[place + 1])
            try:
                yield i
            finally:
                self._give(i, self.host[i])
                del copies

    def _give(self, i: int, tensors: Sequence[Tensor]) -> None:
        for (owned, name), tensor in zip(self.places[i], tensors, strict=True):
            is_parameter = isinstance(owned[name], nn.Parameter)
            owned[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
