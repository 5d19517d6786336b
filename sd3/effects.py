"""Rules that find flags without effect on an image. A rule takes an image's settings and returns the fields to reset (a
dictionary: to these values; else to their defaults) and a note that says why, or an empty text. Needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sd3.methods import make_guidance
from sd3.mistakes import display, verbatim

Effect = tuple[Sequence[str] | Mapping[str, Any], str]
Rule = Callable[[Any], Effect]  # takes `Settings`, which cannot be imported here: its fields come from the flag table


@functools.lru_cache(maxsize=1024)
def _levels(scheduler: str, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
    """The sigmas of a run, with 0 at the end."""
    from sd3_impls import img2img_sigmas, schedule  # imports torch, which checking flags does not need

    return tuple(img2img_sigmas(schedule(scheduler, steps, shift), denoise).tolist())


def executed_levels(s: Any) -> tuple[float, ...]:
    """The sigmas of the steps that run: all, or with an initial image those that `denoise` selects."""
    return _levels(s.scheduler, s.steps, s.shift, s.denoise if s.init_image else 1.0)


def executed_steps(s: Any) -> int:
    """Number of sampling steps that run."""
    return len(executed_levels(s)) - 1


def planned_steps(s: Any) -> int:
    """Number of steps of the whole schedule: fewer than `steps` where noise levels would repeat."""
    return len(_levels(s.scheduler, s.steps, s.shift)) - 1


def whole_prompts(s: Any) -> Effect:
    """Settings of whole prompts have no effect where prompts are read as the reference reads them."""
    if s.prompt_mode == "whole":
        return (), ""
    why = "`t5_tokens` and `prompt_weights` have no effect: `prompt_mode` is reference, not whole"
    return ("t5_tokens", "prompt_weights"), why


def t5_prompt(s: Any) -> Effect:
    """T5's prompt has no effect without T5; a prompt that no encoder reads gets a note."""
    if s.no_t5:
        return ("t5_prompt",), "`t5_prompt` has no effect with `no_t5`"
    if s.clip_prompt is not None and s.t5_prompt is not None:
        return (), "`prompt` has no effect: `clip_prompt` and `t5_prompt` are read in its place"
    return (), ""


def guidance(s: Any) -> Effect:
    """The negative prompt has no effect if no unconditional pass runs; an interval that contains no step turns guidance
    off, as `cfg` 1 does.
    """
    if needs_uncond(s):
        return (), ""
    if s.cfg == 1:
        return ("negative_prompt",), "`negative_prompt` has no effect at `cfg` 1 (guidance is off)"
    if executed_steps(s) == 0:
        return (), ""
    interval = f"`guidance_start` {s.guidance_start:g} to `guidance_end` {s.guidance_end:g}"
    why = f"`cfg` has no effect: {interval} contains none of the {executed_steps(s)} steps (guidance is off)"
    return {"cfg": 1.0, "negative_prompt": "", "guidance_start": 0.0, "guidance_end": 1.0}, why


def guidance_interval(s: Any) -> Effect:
    """The guidance interval has no effect without guidance; an end of it has none if it excludes no step."""
    if s.cfg == 1:
        return ("guidance_start", "guidance_end"), "`guidance_start` and `guidance_end` have no effect at `cfg` 1"
    steps = executed_steps(s)
    idle = (
        ("guidance_start", int(s.guidance_start * steps) == 0),
        ("guidance_end", int(s.guidance_end * steps) == steps),
    )
    return [name for name, whole in idle if whole], ""


def initial_image(s: Any) -> Effect:
    """`denoise` has no effect without an initial image; the image has none if sampling starts from pure noise."""
    if s.init_image is None:
        return ("denoise",), "`denoise` has no effect without `init_image`"
    if executed_levels(s)[0] == 1:
        why = f"`denoise` {s.denoise:g} at {s.steps} steps starts from pure noise, so `init_image` has no effect"
        return ("init_image", "denoise"), why
    if executed_steps(s) == 0:
        return (), f"`denoise` {s.denoise:g} leaves no step to run: the initial image is only encoded and decoded"
    return (), ""


def control(s: Any) -> Effect:
    """A ControlNet and its strength have no effect without a control image."""
    if s.controlnet_cond_image:
        return (), ""
    fields = ("controlnet_ckpt", "controlnet_strength")
    if s.controlnet_ckpt:
        return fields, "the ControlNet has no effect without `controlnet_cond_image`"
    return fields, "`controlnet_strength` has no effect without `controlnet_cond_image`"


def lora(s: Any) -> Effect:
    """A LoRA has no effect at strength 0."""
    idle = dict.fromkeys(file.path for file in s.lora or () if not file.strength)
    if not idle:
        return (), ""
    why = f"`lora` {verbatim(', '.join(map(display, idle)))}: no effect at strength 0"
    return {"lora": tuple(file for file in s.lora if file.strength) or None}, why


def schedule(s: Any) -> Effect:
    """Notes that the schedule has fewer noise levels than `steps`; resets nothing."""
    if (steps := planned_steps(s)) == s.steps:
        return (), ""
    return (), f"{steps} steps run instead of {s.steps}: `scheduler` {s.scheduler} has no more noise levels"


def skip_layer(s: Any) -> Effect:
    """Skip-layer guidance has no effect at scale 0 or if its window contains no step."""
    config = s.skip_layer
    if config is None or (
        config.scale != 0 and any(config.acts(i, planned_steps(s)) for i in range(executed_steps(s)))
    ):
        return (), ""
    if config.scale == 0:
        return ("skip_layer",), "skip-layer guidance has no effect at scale 0"
    window = f"between {config.start:g} and {config.end:g} of {planned_steps(s)} steps"
    return ("skip_layer",), f"skip-layer guidance has no effect: it acts {window}, which contains no step"


def residual(s: Any) -> Effect:
    """Residual text streaming has no effect if nothing is mixed in; single settings may have none either."""
    config, every = s.residual, [name for name in s.__dataclass_fields__ if name.startswith("residual_")]
    if not config.active:
        return every, ""
    if config.mode == "add" and not any(config.weights):
        return every, "residual text streaming has no effect: all weights are 0"
    if config.branch == "uncond" and not needs_uncond(s):
        return every, "residual text streaming has no effect: `cfg` 1 runs no unconditional pass"
    steps = executed_steps(s)
    acts = [config.acts(i, steps) for i in range(steps)]
    if not any(acts):
        window = f"`residual_start` {config.start:g} to `residual_end` {config.end:g}"
        return every, f"residual text streaming has no effect: {window} contains none of the {steps} steps"
    guided = any(acts[i] for i in guided_steps(s))
    if not guided and config.branch == "uncond":
        why = "`guidance_start` to `guidance_end` runs no unconditional pass in its steps"
        return every, f"residual text streaming has no effect: {why}"
    idle = ["residual_start", "residual_end"] if all(acts) else []
    idle += [] if guided else ["residual_branch"]
    return idle + (["residual_rotations"] if config.mode != "aligned" else []), ""


def step_cache(s: Any) -> Effect:
    """The step cache has no effect on a single step. `batch_size` has none with a cache, which decides per image."""
    if not s.cache:
        return (), ""
    if executed_steps(s) < 2:
        return ("cache",), "`cache` has no effect: there is no earlier step to reuse"
    why = f"`batch_size` {s.batch_size} with `cache`: images are made one by one, so that the cache decides for each"
    return ("batch_size",), why


def tiles(s: Any) -> Effect:
    """A VAE tile has no effect if it is as large as the image."""
    return (("vae_tile",) if s.vae_tile >= max(s.width, s.height) else (), "")


def guided_steps(s: Any) -> list[int]:
    """The steps in which any guidance method needs an unconditional pass."""
    return list(_guided_steps(s))


def needs_uncond(s: Any) -> bool:
    """Whether any step runs an unconditional pass, so that the negative prompt is encoded."""
    return any(True for _ in _guided_steps(s))


def _guided_steps(s: Any) -> Iterator[int]:
    from sd3_impls import Place

    methods, levels, planned = make_guidance(s), executed_levels(s), planned_steps(s)
    for step, sigma in enumerate(levels[:-1]):
        at = Place(step, len(levels) - 1, planned, sigma)
        if any(one.text == "uncond" for method in methods for one in method.passes(at)):
            yield step


def only_guided(field: str) -> Rule:
    """The rule of a field that has no effect if only the conditional pass runs."""

    def rule(s: Any) -> Effect:
        return ((), "") if guided_steps(s) or s.skip_layer else ((field,), f"`{field}` has no effect without guidance")

    return rule


def only_with(field: str, needed: str) -> Rule:
    """The rule of a field that has no effect unless `needed` is given."""

    def rule(s: Any) -> Effect:
        return ((), "") if getattr(s, needed) else ((field,), f"`{field}` has no effect without `{needed}`")

    return rule
