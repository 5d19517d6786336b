"""What changes weights while they load: a row for each flag that asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sd3.lora import read_lora
from sd3.settings import Setup
from sd3.weights import ModelTensors, Patch

Models = Mapping[str, ModelTensors]  # by part: mmdit, vae, controlnet, clip_l, clip_g, t5xxl, as far as they are there
# From a flag's value and the models, whose headers have been read, to a patch for each model that it changes. Raises
# Mistake where it fits none of them.
PATCHES: dict[str, Callable[[Any, Models], Mapping[str, Patch]]] = {"lora": read_lora}


def patched(models: Models, setup: Setup) -> dict[str, ModelTensors]:
    """The models with the patches that flags ask for, in the order of the table."""
    out = dict(models)
    for flag, read in PATCHES.items():
        if value := getattr(setup, flag):
            for part, patch in read(value, models).items():
                out[part] = replace(out[part], patches=(*out[part].patches, patch))
    return out
