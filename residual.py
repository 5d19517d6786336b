"""Residual text streaming: the text tokens entering an early block, added to those entering later blocks.

C_i are the text tokens about to enter block i. C_o of the origin o is kept as it arrives; right before every target
block i runs, C_i <- C_i + w_i * C_o.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from settings import check_residual, read_int, read_layers, read_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ResidualConfig:
    """Origin layer, target layers and one weight per target; no targets means off."""

    origin: int = 0
    targets: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Missing weights mean 1.0 each; raises ValueError for anything that contradicts itself."""
        check_residual(self.origin, self.targets, self.weights)
        if self.targets and not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.targets))

    @classmethod
    def parse(cls, origin: Any = None, targets: Any = None, weights: Any = None) -> ResidualConfig:
        """From flags in any shape (see `settings.read_list`); raises ValueError naming the flag."""
        return cls(
            origin=0 if origin is None else read_int("residual_origin_layer", origin, 0),
            targets=read_layers("residual_target_layers", targets),
            weights=read_weights("residual_weights", weights),
        )

    @property
    def active(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.targets)

    def check(self, depth: int) -> None:
        """Raises ValueError for a layer that a model of `depth` joint blocks does not have."""
        check_residual(self.origin, self.targets, self.weights, depth)


class ResidualStream:
    """The hook of one picture (or batch): called with (i, context) right before block i, returns what enters it."""

    def __init__(self, config: ResidualConfig):
        self.origin = config.origin
        self.weights = dict(zip(config.targets, config.weights, strict=True))
        self.kept: Tensor | None = None

    def __call__(self, i: int, context: Tensor) -> Tensor:
        """context (B, T, D) about to enter block i, with the origin's tokens added where i is a target."""
        if i == self.origin:
            self.kept = context  # before any addition here
        if i not in self.weights:
            return context
        return context.add(self.kept, alpha=self.weights[i])


def residual_stream(config: ResidualConfig | None) -> ResidualStream | None:
    """A stream for `config`, or None where there is nothing to add (the model then runs as without it)."""
    return ResidualStream(config) if config is not None and config.active else None


def build_residual_config(
    origin_layer: Any = None, target_layers: Any = None, weights: Sequence[Any] | Any = None
) -> ResidualConfig | None:
    """The configuration that three flags describe, or None where they leave the feature off."""
    config = ResidualConfig.parse(origin_layer, target_layers, weights)
    return config if config.active else None
