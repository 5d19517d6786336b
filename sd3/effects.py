"""Flags that have no effect on a picture, found and named. Needs no torch."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

from sd3.flags import DEFAULT_DENOISE
from sd3.settings import Settings


def effective(s: Settings) -> tuple[Settings, list[str]]:
    """Settings in which every flag that has no effect on the picture is at its default, and a line for each of them.

    Two flags may be without effect only together with others: the rules run in an order in which each sees the
    result of those before it.
    """
    notes: list[str] = []
    for rule in _RULES:
        wanted, why = rule(s)
        changes = {name: value for name, value in wanted.items() if getattr(s, name) != value}
        if changes:
            s = dataclasses.replace(s, **changes)
        if why and (changes or not wanted):
            notes.append(f"note: {why}")
    return s, notes


def executed_steps(s: Settings) -> int:
    """How many sampling steps run: all, or with an initial picture the part that `denoise` leaves."""
    return s.steps - skipped_steps(s.steps, s.denoise if s.init_image else 1.0)


def skipped_steps(steps: int, denoise: float) -> int:
    """How many steps of a schedule an image-to-image run of strength `denoise` in [0, 1] leaves out at its start, as
    `sd3_impls.img2img_sigmas` does.
    """
    return int(steps * (1 - denoise))


def starts_from_noise(steps: int, denoise: float, shift: float) -> bool:
    """Whether an image-to-image run begins at sigma 1 exactly: the initial picture then weighs nothing.

    Follows `sd3_impls.flow_schedule` in its float32 arithmetic: for some shifts its first sigma is not quite 1.
    """
    if skipped_steps(steps, denoise):
        return False
    single = lambda x: struct.unpack("f", struct.pack("f", x))[0]  # noqa: E731
    t = single(single(1000.0 * (shift / (1 + (shift - 1)))) / 1000.0)
    return single(single(single(shift) * t) / single(1 + single(single(shift - 1) * t))) == 1.0


_Rule = tuple[dict[str, Any], str]
_RESIDUAL_OFF = {f.name: f.default for f in dataclasses.fields(Settings) if f.name.startswith("residual_")}


def _initial_picture(s: Settings) -> _Rule:
    if s.init_image is None:
        return {"denoise": DEFAULT_DENOISE}, "--denoise has no effect without --init_image"
    if starts_from_noise(s.steps, s.denoise, s.shift):
        why = f"--denoise {s.denoise:g} at {s.steps} steps starts from pure noise, so --init_image has no effect"
        return {"init_image": None, "denoise": DEFAULT_DENOISE}, why
    if executed_steps(s) == 0:
        return {}, f"--denoise {s.denoise:g} leaves no step to run: the initial picture is only encoded and decoded"
    return {}, ""


def _control(s: Settings) -> _Rule:
    if s.controlnet_cond_image:
        return {}, ""
    changes = {"controlnet_ckpt": None, "controlnet_strength": 1.0}
    if s.controlnet_ckpt:
        return changes, "the ControlNet has no effect without --controlnet_cond_image"
    return changes, "--controlnet_strength has no effect without --controlnet_cond_image"


def _negative_prompt(s: Settings) -> _Rule:
    if s.cfg != 1:
        return {}, ""
    return {"negative_prompt": ""}, "--negative_prompt has no effect at --cfg 1 (guidance is off)"


def _skip_layer(s: Settings) -> _Rule:
    config = s.skip_layer
    if config is None or (config.scale != 0 and any(config.acts(i, s.steps) for i in range(executed_steps(s)))):
        return {}, ""
    if config.scale == 0:
        return {"skip_layer": None}, "skip-layer guidance has no effect at scale 0"
    window = f"between {config.start:g} and {config.end:g} of {s.steps} steps"
    return {"skip_layer": None}, f"skip-layer guidance has no effect: it acts {window}, and no step lies there"


def _residual(s: Settings) -> _Rule:
    if not s.residual_target_layers:
        return _RESIDUAL_OFF, ""
    if s.residual_mode == "add" and not any(s.residual_weights):
        return _RESIDUAL_OFF, "residual text streaming has no effect: all weights are 0"
    if s.cfg == 1 and s.residual_branch == "uncond":
        return _RESIDUAL_OFF, "residual text streaming has no effect: --cfg 1 runs no unconditional pass"
    steps = executed_steps(s)
    acts = [s.residual.acts(i, steps) for i in range(steps)]
    if not any(acts):
        window = f"--residual_start {s.residual_start:g} to --residual_end {s.residual_end:g}"
        return _RESIDUAL_OFF, f"residual text streaming has no effect: {window} holds none of the {steps} steps"
    changes: dict[str, Any] = {}
    if all(acts):
        changes |= {"residual_start": 0.0, "residual_end": 1.0}
    if s.cfg == 1:
        changes["residual_branch"] = "both"
    if s.residual_mode != "aligned":
        changes["residual_rotations"] = None
    return changes, ""


def _cache(s: Settings) -> _Rule:
    if not s.cache:
        return {}, ""
    if executed_steps(s) < 2:
        return {"cache": 0.0}, "--cache has no effect: there is no earlier step to reuse"
    why = f"--batch_size {s.batch_size} with --cache: pictures are made one by one, so that each decides for itself"
    return {"batch_size": 1}, why


def _tiles(s: Settings) -> _Rule:
    return ({"vae_tile": 0}, "") if s.vae_tile >= max(s.width, s.height) else ({}, "")


_RULES: tuple[Callable[[Settings], _Rule], ...] = (
    _initial_picture, _control, _negative_prompt, _skip_layer, _residual, _cache, _tiles,
)  # fmt: skip
