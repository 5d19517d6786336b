"""Keeps the MMDiT's blocks in main memory (`offload`); each is copied to the device while the one before it runs.

On a CUDA device copies run on a stream of their own, from pinned memory. Elsewhere they are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Offload:
    """Blocks whose weights are in main memory, and the device that runs them."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        """The blocks' weights must be on the CPU; they are pinned for a CUDA device."""
        self.device = torch.device(device)
        self.streams = self.device.type == "cuda"
        self.places: list[list[tuple[dict, str]]] = []  # where each block's parameters and buffers are
        self.host: list[list[Tensor]] = []
        for block in blocks:
            owners = [owned for module in block.modules() for owned in (module._parameters, module._buffers)]
            places = [(owned, name) for owned in owners for name, tensor in owned.items() if tensor is not None]
            self.places.append(places)
            self.host.append([self._pinned(owned[name].detach()) for owned, name in places])
        self.copies = torch.Stream(self.device) if self.streams else None

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.streams else tensor

    def _start_copy(self, i: int) -> tuple[list[Tensor], torch.Event | None]:
        """Starts to copy block i; returns the copies and the event that marks their end, or None."""
        if self.copies is None:
            return [t.to(self.device) for t in self.host[i]], None
        with self.copies:
            copies = [t.to(self.device, non_blocking=True) for t in self.host[i]]
            return copies, self.copies.record_event()

    def run(self, order: Sequence[int]) -> Iterator[int]:
        """Yields the numbers of the blocks in `order`, each while its weights are on the device."""
        order = list(order)
        following = self._start_copy(order[0]) if order else None
        for place, i in enumerate(order):
            (copies, ready), following = following, None
            if ready is not None:
                current = torch.accelerator.current_stream(self.device)
                current.wait_event(ready)
                for t in copies:
                    t.record_stream(current)  # its memory is not reused before this stream is done with it
            self._place(i, copies)
            if place + 1 < len(order):
                following = self._start_copy(order[place + 1])
            try:
                yield i
            finally:
                self._place(i, self.host[i])
                del copies

    def _place(self, i: int, tensors: Sequence[Tensor]) -> None:
        for (owned, name), tensor in zip(self.places[i], tensors, strict=True):
            is_parameter = isinstance(owned[name], nn.Parameter)
            owned[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
