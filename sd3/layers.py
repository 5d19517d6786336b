"""How linear layers hold their weights: as they are, packed for a CPU's matrix products, or in 8 bits."""

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
ROOM = torch.finfo(FLOAT8).max


class HeldLinear(nn.Linear, ABC):
    """A linear layer on the meta device that `take`s its weight when it is loaded, and holds it in its own way.

    first: rows of the weight before this one are left out; activation: what is applied to the product.
    """

    def __init__(self, layer: nn.Linear, first: int = 0, activation: str = ""):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.first, self.activation = first, activation

    def take(self, leaf: str, tensor: Tensor) -> None:
        """Takes a loaded `weight` or `bias`, on the device and in the dtype of the computation."""
        if leaf == "bias":
            self.bias = nn.Parameter(tensor[self.first :], requires_grad=False)
            return
        self.in_features, self.out_features = tensor.shape[1], tensor.shape[0] - self.first
        del self.weight
        self.hold(tensor[self.first :])

    @abstractmethod
    def hold(self, weight: Tensor) -> None:
        """Keeps the rows that are used, (out, in)."""


_packed: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class PackedLinear(HeldLinear):
    """oneDNN's blocked layout, made once instead of in every product; the activation is part of the product."""

    def hold(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        number = next(_numbers)
        _packed[number] = self.packed
        self.number = torch.tensor(number)  # a tensor, so that compiled code is one for all layers

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _packed_linear(x, self.number, self.bias, self.out_features, self.activation)
        kind, approximate = FUSED[self.activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [], approximate)


@torch.library.custom_op("sd3::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, number: Tensor, bias: Tensor | None, out: int, activation: str) -> Tensor:
    kind, approximate = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, _packed[int(number)], bias, kind, [], approximate)


@_packed_linear.register_fake
def _(x: Tensor, number: Tensor, bias: Tensor | None, out: int, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing serves: bfloat16 on a CPU, in a torch that has it (the calls are not public)."""
    ops = torch.ops.mkldnn
    there = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    fast = there and dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    return bool(fast and torch.backends.mkldnn.is_available() and ops._is_mkldnn_bf16_supported())


class QuantLinear(HeldLinear):
    """8-bit weights with a scale per row, brought to the computation's dtype for each product."""

    def __init__(self, layer: nn.Linear, first: int = 0, activation: str = "", kind: str = "int8"):
        super().__init__(layer, first, activation)
        self.kind = kind

    def hold(self, weight: Tensor) -> None:
        stored, scale = quantise(weight, self.kind)
        self.register_buffer("stored", stored, persistent=False)  # (out, in), 1 byte each
        self.register_buffer("scale", scale, persistent=False)  # (out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.stored.to(x.dtype) * self.scale, self.bias)
        return ACTIVATIONS[self.activation](y) if self.activation else y


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """8-bit values (out, in) and scales (out, 1) in the weight's dtype; their product is near `weight` (out, in), of
    any dtype with a point (a scale in whole numbers would be 0 or 1).

    int8: rounded to 127ths of a row's largest; fp8: float8 e4m3 with scales that are powers of two, so that weights
    that come from such a file are kept.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weights in {weight.dtype} are not held in 8 bits: they have no scale")
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    if kind == "int8":
        scale = (largest / 127).to(weight.dtype)
        return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale
    scale = torch.exp2(torch.ceil(torch.log2(largest / ROOM)))
    return (weight.float() / scale).to(FLOAT8), scale.to(weight.dtype)


def hold_linears(blocks: Iterable[nn.Module], kind: str) -> None:
    """Replaces the linear layers of blocks by ones that hold weights as `kind` says: packed, int8 or fp8.

    Only layers on the meta device: those with memory are filled otherwise.
    """
    for block in blocks:
        for module in list(block.modules()):
            for name, layer in list(module.named_children()):
                if type(layer) is nn.Linear and layer.weight.is_meta:
                    setattr(module, name, _held(module, name, layer, kind))


def _held(owner: nn.Module, name: str, layer: nn.Linear, kind: str) -> HeldLinear:
    first = layer.in_features if name == "qkv" and not hasattr(owner, "proj") else 0  # there is no query
    activation = ""
    if isinstance(owner, Mlp) and name == "fc1" and owner.activation in FUSED:
        activation, owner.activation = owner.activation, ""
    if kind == "packed":
        return PackedLinear(layer, first, activation)
    return QuantLinear(layer, first, activation, kind)
