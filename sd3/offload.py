"""Keeps the MMDiT's blocks in main memory (`offload`); each is copied to the device while the previous one runs.

On a CUDA device, copies run on a separate stream, from pinned memory. Elsewhere they are plain copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn


class Offload:
    """Blocks whose weights are in main memory, and the device that runs them."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        """The blocks' weights must be on the CPU; they are pinned for a CUDA device."""
        self.blocks = list(blocks)
        self.device = torch.device(device)
        self.streams = self.device.type == "cuda"
        self.places: list[list[tuple[dict, str]]] = []  # locations of each block's parameters and buffers
        self.host: list[list[Tensor]] = []
        for block in self.blocks:
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

    def bring(self, skip: Collection[int] = ()) -> Iterator[nn.Module]:
        """Yields the blocks in order, each with its weights on the device until the next is requested; blocks in
        `skip`, which do not run, are not copied.
        """
        copied = map(self._start_copy, [i for i in range(len(self.blocks)) if i not in skip])  # started when asked for
        following = next(copied, None)
        for i, block in enumerate(self.blocks):
            if i in skip:
                yield block
                continue
            (copies, ready), following = following, None
            if ready is not None:
                current = torch.accelerator.current_stream(self.device)
                current.wait_event(ready)
                for t in copies:
                    t.record_stream(current)  # keeps its memory until this stream has finished with it
            self._place(i, copies)
            following = next(copied, None)
            try:
                yield block
            finally:
                self._place(i, self.host[i])
                del copies

    def _place(self, i: int, tensors: Sequence[Tensor]) -> None:
        for (owned, name), tensor in zip(self.places[i], tensors, strict=True):
            is_parameter = isinstance(owned[name], nn.Parameter)
            owned[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
