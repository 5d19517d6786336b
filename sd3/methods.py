"""The samplers, schedules and guidance methods, one row each. A row names a function or class of `sd3_impls`. Needs no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd3_impls import Guidance


@dataclass(frozen=True)
class Sampler:
    """How to step from noise to an image: `sd3_impls.sample_NAME`."""

    name: str
    title: str  # its name in A1111 and similar programs, for the text in a PNG
    help: str
    noise: bool = False  # whether its steps add noise, drawn from a separate stream of the seed


@dataclass(frozen=True)
class Schedule:
    """How the noise levels of the steps are spaced: `sd3_impls.sigmas_NAME`."""

    name: str
    title: str  # see `Sampler`
    help: str


@dataclass(frozen=True)
class GuidanceMethod:
    """A method of guidance: the class `sd3_impls.NAME`, constructed with the values of `settings`, in order."""

    name: str
    settings: tuple[str, ...]
    help: str


SAMPLERS = {
    row.name: row
    for row in (
        Sampler("euler", "Euler", "first order, one model call a step"),
        Sampler("euler_ancestral", "Euler a", "first order, one model call a step", noise=True),
        Sampler("heun", "Heun", "second order, two model calls a step"),
        Sampler("dpmpp_2m", "DPM++ 2M", "second order from the step before, one model call a step"),
    )
}

SCHEDULES = {
    row.name: row
    for row in (
        Schedule("normal", "Normal", "the public reference's: timesteps evenly spaced, shifted at both ends and again"),
        Schedule("simple", "Simple", "timesteps evenly spaced from the top, shifted once; usual for SD3 in ComfyUI"),
        Schedule("beta", "Beta", "dense at both ends: quantiles of a Beta(0.6, 0.6) distribution, shifted once"),
    )
}

# In the order in which they act.
GUIDANCE = {
    row.name: row
    for row in (
        GuidanceMethod(
            "ClassifierFreeGuidance",
            ("cfg", "guidance_start", "guidance_end"),
            "classifier-free guidance: away from the unconditional pass",
        ),
        GuidanceMethod(
            "SkipLayerGuidance", ("skip_layer",), "skip-layer guidance: away from a pass without some blocks"
        ),
        GuidanceMethod(
            "GuidanceRescale", ("guidance_rescale",), "rescaling: the deviation of the conditional velocity"
        ),
    )
}


def make_guidance(s: Any) -> list[Guidance]:
    """All methods of guidance for an image's settings, in the order in which they act."""
    import sd3_impls  # imports torch; checking flags does not need it

    return [getattr(sd3_impls, row.name)(*(getattr(s, name) for name in row.settings)) for row in GUIDANCE.values()]
