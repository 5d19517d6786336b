"""Which steps of a run something acts in. Needs no torch."""

from __future__ import annotations

from sd3.models import SkipLayerConfig


def acts_in_window(start: float, end: float, step: int, steps: int) -> bool:
    """Whether residual streaming acts in `step` (from 0) of `steps`: start <= step / steps < end."""
    place = step + 1e-9  # 0.7 * 10 is a little more than 7
    return start * steps <= place < end * steps


def skips_layers(config: SkipLayerConfig, step: int, steps: int) -> bool:
    """Whether skip-layer guidance acts in `step` (from 0) of a schedule of `steps`."""
    return config.start * steps < step < config.end * steps
