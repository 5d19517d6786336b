"""When a flag has no effect on an image. A rule takes an image's settings and returns the fields to set back to their
defaults, and a line that says why (empty: nothing to say). Needs no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

Effect = tuple[Sequence[str], str]
Rule = Callable[[Any], Effect]  # of `Settings`, whose fields come from the table that names these rules


def executed_steps(s: Any) -> int:
    """How many sampling steps run: all, or with an initial image the part that `denoise` leaves."""
    return s.steps - skipped_steps(s.steps, s.denoise if s.init_image else 1.0)


def skipped_steps(steps: int, denoise: float) -> int:
    """How many steps of a schedule an image-to-image run of strength `denoise` in [0, 1] leaves out at its start."""
    return int(steps * (1 - denoise))


def starts_from_noise(steps: int, denoise: float, shift: float) -> bool:
    """Whether an image-to-image run begins at sigma 1 exactly: the initial image then weighs nothing.

    Follows `sd3_impls.flow_schedule` in its float32 arithmetic: for some shifts its first sigma is not quite 1.
    """
    if skipped_steps(steps, denoise):
        return False
    single = lambda x: struct.unpack("f", struct.pack("f", x))[0]  # noqa: E731
    t = single(single(1000.0 * (shift / (1 + (shift - 1)))) / 1000.0)
    return single(single(single(shift) * t) / single(1 + single(single(shift - 1) * t))) == 1.0


def guidance(s: Any) -> Effect:
    """The negative prompt, where no unconditional pass runs."""
    if s.cfg != 1:
        return (), ""
    return ("negative_prompt",), "`negative_prompt` has no effect at `cfg` 1 (guidance is off)"


def initial_image(s: Any) -> Effect:
    """`denoise` without an initial image, and an initial image that only noise is left of."""
    if s.init_image is None:
        return ("denoise",), "`denoise` has no effect without `init_image`"
    if starts_from_noise(s.steps, s.denoise, s.shift):
        why = f"`denoise` {s.denoise:g} at {s.steps} steps starts from pure noise, so `init_image` has no effect"
        return ("init_image", "denoise"), why
    if executed_steps(s) == 0:
        return (), f"`denoise` {s.denoise:g} leaves no step to run: the initial picture is only encoded and decoded"
    return (), ""


def control(s: Any) -> Effect:
    """A ControlNet and its strength without an image that guides it."""
    if s.controlnet_cond_image:
        return (), ""
    fields = ("controlnet_ckpt", "controlnet_strength")
    if s.controlnet_ckpt:
        return fields, "the ControlNet has no effect without `controlnet_cond_image`"
    return fields, "`controlnet_strength` has no effect without `controlnet_cond_image`"


def skip_layer(s: Any) -> Effect:
    """Skip-layer guidance of scale 0, or in whose window no step lies."""
    config = s.skip_layer
    if config is None or (config.scale != 0 and any(config.acts(i, s.steps) for i in range(executed_steps(s)))):
        return (), ""
    if config.scale == 0:
        return ("skip_layer",), "skip-layer guidance has no effect at scale 0"
    window = f"between {config.start:g} and {config.end:g} of {s.steps} steps"
    return ("skip_layer",), f"skip-layer guidance has no effect: it acts {window}, and no step lies there"


def residual(s: Any) -> Effect:
    """Residual text streaming that mixes nothing in, and those of its settings that change nothing."""
    config, every = s.residual, [name for name in s.__dataclass_fields__ if name.startswith("residual_")]
    if not config.active:
        return every, ""
    if config.mode == "add" and not any(config.weights):
        return every, "residual text streaming has no effect: all weights are 0"
    if s.cfg == 1 and config.branch == "uncond":
        return every, "residual text streaming has no effect: `cfg` 1 runs no unconditional pass"
    steps = executed_steps(s)
    acts = [config.acts(i, steps) for i in range(steps)]
    if not any(acts):
        window = f"`residual_start` {config.start:g} to `residual_end` {config.end:g}"
        return every, f"residual text streaming has no effect: {window} holds none of the {steps} steps"
    idle = ["residual_start", "residual_end"] if all(acts) else []
    idle += ["residual_branch"] if s.cfg == 1 else []
    return idle + (["residual_rotations"] if config.mode != "aligned" else []), ""


def step_cache(s: Any) -> Effect:
    """A step cache that has no earlier step; and batches with it: each image decides for itself."""
    if not s.cache:
        return (), ""
    if executed_steps(s) < 2:
        return ("cache",), "`cache` has no effect: there is no earlier step to reuse"
    why = f"`batch_size` {s.batch_size} with `cache`: pictures are made one by one, so that each decides for itself"
    return ("batch_size",), why


def tiles(s: Any) -> Effect:
    """A tile as large as the image."""
    return (("vae_tile",) if s.vae_tile >= max(s.width, s.height) else (), "")


def only_with(field: str, needed: str) -> Rule:
    """The rule of a field that has no effect where another one is not given."""

    def rule(s: Any) -> Effect:
        return ((), "") if getattr(s, needed) else ((field,), f"`{field}` has no effect without `{needed}`")

    return rule
