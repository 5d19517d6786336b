"""Linear layers that store their weights packed for a CPU's matrix products, or in 8 bits."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from other_impls import ACTIVATIONS, Mlp

FUSED = {"": ("none", ""), "gelu_tanh": ("gelu", "tanh")}  # activations that oneDNN runs as part of a product
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max


class StoredLinear(nn.Linear, ABC):
    """A linear layer on the meta device that converts its weight when it is loaded, see `store`.

    activation: applied to the product, see `ACTIVATIONS`.
    """

    def __init__(self, layer: nn.Linear, activation: str = ""):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.activation = activation

    def store(self, leaf: str, tensor: Tensor) -> None:
        """Stores a loaded `weight` or `bias`, already on the compute device and in the compute dtype."""
        if leaf == "bias":
            self.bias = nn.Parameter(tensor, requires_grad=False)
            return
        self._parameters.pop("weight", None)  # absent where it is stored a second time
        self.store_weight(tensor)

    @abstractmethod
    def store_weight(self, weight: Tensor) -> None:
        """Stores a weight (out, in)."""


_packed: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class PackedLinear(StoredLinear):
    """Weights in oneDNN's blocked layout, converted once rather than in every product; the activation is fused."""

    # Without it a step of SD3 Medium takes 1.07 times as long at 512 x 512, 1.06 at 256 (benchmarks/cleverness.py).
    def store_weight(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        number = next(_numbers)
        _packed[number] = self.packed
        self.number = torch.tensor(number)  # a tensor, so that all layers share one compiled graph

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _packed_linear(x, self.number, self.bias, self.out_features, self.activation)
        kind, approximate = FUSED[self.activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [], approximate)


# torch.compile cannot trace a packed weight. Compiled without packing, a step takes 1.04 times as long at 256 x 256.
@torch.library.custom_op("sd3::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, number: Tensor, bias: Tensor | None, out: int, activation: str) -> Tensor:
    kind, approximate = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, _packed[int(number)], bias, kind, [], approximate)


@_packed_linear.register_fake
def _(x: Tensor, number: Tensor, bias: Tensor | None, out: int, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing is faster: bfloat16 on a CPU, if this torch has the (private) operators."""
    ops = torch.ops.mkldnn
    available = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    fast = available and dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    return bool(fast and torch.backends.mkldnn.is_available() and ops._is_mkldnn_bf16_supported())


class QuantLinear(StoredLinear):
    """8-bit weights with one scale per row, converted to the compute dtype for each product."""

    def __init__(self, layer: nn.Linear, activation: str = "", kind: str = "int8"):
        super().__init__(layer, activation)
        self.kind = kind

    def store_weight(self, weight: Tensor) -> None:
        stored, scale = quantise(weight, self.kind)
        self.register_buffer("stored", stored, persistent=False)  # (out, in), 1 byte each
        self.register_buffer("scale", scale, persistent=False)  # (out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.stored.to(x.dtype) * self.scale, self.bias)
        return ACTIVATIONS[self.activation](y) if self.activation else y


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """8-bit values (out, in) and scales (out, 1) in the weight's dtype; their product approximates `weight` (out, in).

    int8: 127 steps up to a row's largest absolute value; fp8: float8 e4m3 with scales that are powers of two, so that
    weights from a float8 file stay exact. Raises TypeError for integers, whose dtype cannot hold a scale.
    """
    if not weight.is_floating_point():
        raise TypeError(f"integer weights ({weight.dtype}) cannot be quantised to 8 bits")
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    if kind == "int8":
        scale = (largest / 127).to(weight.dtype)
        return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale
    scale = torch.exp2(torch.ceil(torch.log2(largest / FLOAT8_MAX)))
    return (weight.float() / scale).to(FLOAT8), scale.to(weight.dtype)


def replace_linears(blocks: Iterable[nn.Module], kind: str) -> None:
    """Replaces the linear layers of blocks by `StoredLinear`s of a kind: packed, int8 or fp8.

    Skips layers that already have storage: they share it with other modules.
    """
    for block in blocks:
        for module in list(block.modules()):
            for name, layer in list(module.named_children()):
                if type(layer) is nn.Linear and layer.weight.is_meta:
                    setattr(module, name, _stored_linear(module, name, layer, kind))


def _stored_linear(owner: nn.Module, name: str, layer: nn.Linear, kind: str) -> StoredLinear:
    activation = ""
    if isinstance(owner, Mlp) and name == "fc1" and owner.activation in FUSED:
        activation, owner.activation = owner.activation, ""
    if kind == "packed":
        return PackedLinear(layer, activation)
    return QuantLinear(layer, activation, kind)
