"""LoRA algorithms: the tensors each needs, and the shape and value of the weight difference they make.

Formulas as in peft 0.21 and LyCORIS 4.1: LoRA is B A, LoHa (w1_a w1_b) * (w2_a w2_b), LoKr the Kronecker product of
two factors. Each may have Tucker cores for convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3.lora_file import Module, PeftSettings, rank_of, read_number

Shape = tuple[int, ...]


def matrix(tensor: Tensor) -> Tensor:
    """Flattens (out, in, ...) to (out, rest)."""
    return tensor.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (r, s, k, l), a (r, p), b (s, q) -> (p, q, k, l)."""
    return torch.einsum("rskl,rp,sq->pqkl", core, a, b).contiguous()  # torch.kron needs this


def _fits(*pairs: tuple[str, int, int]) -> None:
    for what, one, other in pairs:
        if one != other:
            raise ValueError(f"has {what} that do not match: {one} and {other}")


def _sides(module: Module, *roles: str, least: int = 2) -> list[Shape]:
    for role in roles:
        if len(module[role].shape) < least:
            kind = "a matrix" if least == 2 else f"a tensor of {least} dimensions"
            raise ValueError(f"has the wrong shape: {role} must be {kind}, not {list(module[role].shape)}")
    return [module[role].shape for role in roles]


def _lora_shape(module: Module) -> Shape:
    down, up = _sides(module, "down", "up")
    if "mid" not in module:
        _fits(("ranks", down[0], math.prod(up[1:])))
        return up[0], math.prod(down[1:])
    (mid,) = _sides(module, "mid", least=4)
    _fits(("ranks", mid[0], math.prod(up[1:])), ("ranks", mid[1], down[0]))
    return up[0], math.prod(down[1:]) * math.prod(mid[2:])


def _lora(t: Mapping[str, Tensor]) -> Tensor:
    """B A; with a Tucker core T: sum over m, n of T[m, n] B[o, m] A[n, i]."""
    down, up = matrix(t["down"]), matrix(t["up"])
    return _tucker(t["mid"], up.T, down) if "mid" in t else up @ down


def _loha_shape(module: Module) -> Shape:
    sides = []
    for n in "12":
        a, b = _sides(module, f"hada_w{n}_a", f"hada_w{n}_b")
        if (core := f"hada_t{n}") in module:
            (t,) = _sides(module, core, least=4)
            _fits(("ranks", t[0], a[0]), ("ranks", t[1], b[0]))
            sides.append((a[1], b[1] * math.prod(t[2:])))
        else:
            _fits(("ranks", a[1], b[0]))
            sides.append((a[0], math.prod(b[1:])))
    if sides[0] != sides[1]:
        raise ValueError(f"has two products of different shapes: {list(sides[0])} and {list(sides[1])}")
    return sides[0]


def _loha(t: Mapping[str, Tensor]) -> Tensor:
    """(w1_a w1_b) * (w2_a w2_b), elementwise."""

    def product(n: str) -> Tensor:
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        return matrix(_tucker(t[f"hada_t{n}"], a, b) if f"hada_t{n}" in t else a @ matrix(b))

    return product("1") * product("2")


def _lokr_factor(module: Module, n: str) -> Shape:
    if f"lokr_w{n}" in module:
        return _sides(module, f"lokr_w{n}")[0]
    a, b = _sides(module, f"lokr_w{n}_a", f"lokr_w{n}_b")
    if n == "2" and "lokr_t2" in module:
        (t,) = _sides(module, "lokr_t2", least=4)
        _fits(("ranks", t[0], a[0]), ("ranks", t[1], b[0]))
        return (a[1], b[1], *t[2:])
    _fits(("ranks", a[1], b[0]))
    return (a[0], *b[1:])


def _lokr_shape(module: Module) -> Shape:
    w1, w2 = _lokr_factor(module, "1"), _lokr_factor(module, "2")
    return w1[0] * w2[0], math.prod(w1[1:]) * math.prod(w2[1:])


def _lokr(t: Mapping[str, Tensor]) -> Tensor:
    """Kronecker product of w1 and w2. Each is stored whole or as a product of two matrices."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim)), w2)


@dataclass(frozen=True)
class Kind:
    """An algorithm.

    needs: the required roles; each entry lists alternatives, and every role of one of them must be present; may:
    optional roles; shape, product: the shape and value of the weight difference.
    """

    name: str
    needs: tuple[tuple[tuple[str, ...], ...], ...]
    may: tuple[str, ...]
    shape: Callable[[Module], Shape]
    product: Callable[[Mapping[str, Tensor]], Tensor]

    @property
    def roles(self) -> set[str]:
        """All roles of this algorithm."""
        return {role for options in self.needs for option in options for role in option} | set(self.may)

    def missing(self, module: Module) -> str:
        """A required role that the module does not have, or an empty string."""
        for options in self.needs:
            if not any(all(role in module for role in option) for option in options):
                return next(role for role in options[-1] if role not in module)
        return ""


def _need(*roles: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(((role,),) for role in roles)


KINDS = (
    Kind("LoRA", _need("down", "up"), ("mid",), _lora_shape, _lora),
    Kind("LoHa", _need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2"), _loha_shape, _loha),
    Kind(
        "LoKr",
        tuple(((f"lokr_w{n}",), (f"lokr_w{n}_a", f"lokr_w{n}_b")) for n in "12"),
        ("lokr_t2",),
        _lokr_shape,
        _lokr,
    ),
    Kind("full difference", _need("diff"), (), lambda m: m["diff"].shape, lambda t: t["diff"]),
    Kind("set weight", _need("set_weight"), (), lambda m: m["set_weight"].shape, lambda t: t["set_weight"]),
)
BIASES = ("up_bias", "diff_b")
MAGNITUDES = ("magnitude", "dora_scale")


def kind_of(module: Module) -> Kind | None:
    """The algorithm of a module's weight, or None if the module only changes a bias. Raises ValueError if tensors are
    missing or belong to two algorithms.
    """
    kinds = [kind for kind in KINDS if kind.roles & module.keys()]
    if len(kinds) > 1:
        raise ValueError(f"mixes two algorithms, {kinds[0].name} and {kinds[1].name}")
    if kinds and (missing := kinds[0].missing(module)):
        has = ", ".join(sorted(kinds[0].roles & module.keys()))
        raise ValueError(f"is incomplete: it has {has} but no {missing}")
    if not kinds and not module.keys() & set(BIASES):
        raise ValueError(f"is incomplete: it has only {' and '.join(sorted(module))}")
    if not kinds and (lone := module.keys() & {*MAGNITUDES, "up_bias"}):
        raise ValueError(f"is incomplete: it has {lone.pop()} but no weight change")
    return kinds[0] if kinds else None


def scale_of(kind: Kind | None, module: Module, name: str, settings: PeftSettings | None) -> float:
    """The factor on a module's product: alpha / rank, or as PEFT's settings give it; 1 if the file has neither.

    name: the module's name in diffusers, for PEFT's patterns. An alpha of 0 counts as alpha = rank, as in kohya's and
    LyCORIS' loaders.
    """
    if kind is None or kind.name not in ("LoRA", "LoHa", "LoKr"):
        return 1.0
    rank = rank_of(module)
    if "alpha" in module:
        alpha = read_number(module["alpha"])
        return alpha / rank if rank and alpha else 1.0  # LoKr with two whole factors has no rank: 1 for any alpha
    if settings is None or (alpha := settings.alpha_of(name)) is None:
        return 1.0
    if rank is None:
        rank = settings.rank_of(name)
    return alpha / (math.sqrt(rank) if settings.rslora else rank) if rank else 1.0
