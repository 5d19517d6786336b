"""Fixtures: a small random checkpoint, and an engine with it."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from helpers import TOKENIZERS, controlnet_tensors, mmdit_config, modules, tensors_of
from safetensors.torch import save_file

from sd3_infer import SD3Inferencer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)  # what lands must not depend on luck
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A random float32 checkpoint with everything in one file, tokenizers beside it."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("tokenizer", "tokenizer_3"):
        (folder / name).symlink_to(TOKENIZERS / name)
    save_file(tensors_of(modules()), folder / "small.safetensors", {"width": "64", "height": "48", "steps": "4"})
    save_file(controlnet_tensors(mmdit_config(), chained=True), folder / "control_8b.safetensors")
    save_file(controlnet_tensors(mmdit_config(), chained=False), folder / "control_2b.safetensors")
    return folder / "small.safetensors"


@pytest.fixture(scope="session")
def small_engine(small_model) -> SD3Inferencer:
    """The small random model, loaded once, float32."""
    engine = SD3Inferencer().load(str(small_model), device="cpu", dtype="float32")
    engine.tell.quiet = True
    return engine
