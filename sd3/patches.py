"""Weight patches, applied while weights load: a table with one row per flag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sd3.lora import read_lora
from sd3.settings import Setup
from sd3.weights import ModelTensors, Patch

Models = Mapping[str, ModelTensors]  # the models present, by part: mmdit, vae, controlnet, clip_l, clip_g, t5xxl
# Flag -> function that takes the flag's value and the models (headers only) and returns the patches of each model that
# it changes. The function raises Mistake if the value fits no model.
PATCHES: dict[str, Callable[[Any, Models], Mapping[str, Sequence[Patch]]]] = {"lora": read_lora}


def patched(models: Models, setup: Setup) -> dict[str, ModelTensors]:
    """The models with the patches of all flags that are set, in the order of the table."""
    out = dict(models)
    for flag, read in PATCHES.items():
        if value := getattr(setup, flag):
            for part, patches in read(value, models).items():
                out[part] = replace(out[part], patches=(*out[part].patches, *patches))
    return out
