"""Variants and settings in words, for the report: `anchored, block 0 into 2 to 7, weight 0.1`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sd3.settings import IMAGE_ROWS
from sd3.sweep.grid import OFF, Variant, is_residual, residual_label

MOST_LISTED = 4  # weights that are listed one by one; of more, the first and the last


def variant_words(variants: Sequence[Variant], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each variant is, in words. A variant that the user named keeps its name; two that would read alike get
    their codes.

    settings: of each variant, as `Settings.named` gives them.
    """
    words = [_words(v, s) for v, s in zip(variants, settings, strict=True)]
    return [f"{w} ({v.name})" if words.count(w) > 1 else w for w, v in zip(words, variants, strict=True)]


def variant_code(variant: Variant) -> str:
    """`[MODE:]ORIGIN:TARGETS:WEIGHTS` and what else is set."""
    return variant.name if _is_label(variant) else residual_label(variant.raw)


def setting_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """The value of every setting in words; `off` for those of residual text streaming if it is off."""
    streaming = bool(settings["residual_target_layers"])
    return {n: OFF if is_residual(n) and not streaming else _value(n, v) for n, v in settings.items()}


def layers(numbers: Sequence[int]) -> str:
    """`2 to 7`, `3, 5 and 7`, `1, 4 to 9 and 12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return _listed([part for r in runs for part in ([f"{r[0]} to {r[-1]}"] if len(r) > 2 else map(str, r))])


def _words(variant: Variant, settings: Mapping[str, Any]) -> str:
    if not _is_label(variant):
        return variant.name
    rest = variant.name.removeprefix(residual_label(variant.raw))  # settings that are not residual: `, cfg 4`
    return _residual(settings) + rest


def _is_label(variant: Variant) -> bool:
    """Whether a variant is named after its settings, and not by the user."""
    label = residual_label(variant.raw)
    return variant.name == label or variant.name.startswith((f"{label}, ", f"{label} ("))


def _residual(settings: Mapping[str, Any]) -> str:
    """The residual settings of a variant."""
    values = setting_words(settings)
    if not settings["residual_target_layers"]:
        return OFF
    mode = values["residual_mode"]
    parts = [] if mode == IMAGE_ROWS["residual_mode"].default else [mode]
    parts.append(f"block {values['residual_origin_layer']} into {values['residual_target_layers']}")
    several = len(set(settings["residual_weights"])) > 1
    parts.append(f"weight{'s' if several else ''} {values['residual_weights']}")
    names = {
        "residual_schedule": "{} schedule",
        "residual_branch": "{} pass only",
        "residual_rotations": "rotated by {}",
        "residual_tokens": "{} tokens only",
    }
    parts += [text.format(values[n]) for n, text in names.items() if settings[n] != IMAGE_ROWS[n].default]
    start, end = settings["residual_start"], settings["residual_end"]
    if (start, end) != (0.0, 1.0):
        parts.append(f"steps {100 * start:g} % to {100 * end:g} %")
    return ", ".join(parts)


def _value(name: str, value: Any) -> str:
    if name.endswith("_layers") and value:
        return layers(value)
    if name == "residual_weights" and value:
        weights = [f"{w:g}" for w in value]
        if len(set(weights)) == 1:
            return weights[0]
        return _listed(weights) if len(weights) <= MOST_LISTED else f"{weights[0]} to {weights[-1]}"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value in ("", [], ()):
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int)) else json.dumps(value)


def _listed(parts: Sequence[str]) -> str:
    """`3`, `3 and 5`, `3, 5 and 7`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
