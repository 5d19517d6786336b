"""What users of diffusers do with a pipeline that has residual text streaming on."""

from __future__ import annotations

import pytest
import torch
from helpers import relative

from sd3.residual import ResidualConfig, build_residual_config

pytest.importorskip("diffusers")

import diffusers
from test_residual_diffusers import SHIFT, ours, pipe, theirs, transformer  # noqa: F401

from sd3.diffusers_hooks import apply_residual

ALIGNED = ResidualConfig(1, (2,), (0.3,), mode="aligned")


@pytest.mark.parametrize(
    "config",
    [
        ResidualConfig(1, (2, 3), "each:0.3"),
        ResidualConfig(1, (2, 3), "each:0.3", start=0.5),
        ResidualConfig(1, (2, 3), "each:0.3", schedule="linear", end=0.7),
    ],
)
def test_a_scheduler_that_takes_the_place_of_another(pipe, config):  # noqa: F811
    with apply_residual(pipe, config):
        before = theirs(pipe)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert torch.equal(theirs(pipe), before)
        assert relative(before, ours(config)) < 1e-4


@pytest.mark.parametrize("bad", [{"origin": 1}, 5, "x", (3,)])
def test_a_configuration_that_is_none(pipe, bad):  # noqa: F811
    with pytest.raises(ValueError, match="must be a ResidualConfig"):
        apply_residual(pipe, bad)


def test_off_as_it_is_said_elsewhere(pipe, transformer):  # noqa: F811
    assert build_residual_config(target_layers="") is None
    with apply_residual(pipe, build_residual_config(target_layers="")):
        assert not hasattr(transformer, "_diffusers_hook")


@pytest.mark.parametrize("bad", [5, 0, {"a": 1}, torch.eye(3), True, "", b"x"])
def test_rotations_that_are_neither_rotations_nor_a_path(pipe, transformer, bad):  # noqa: F811
    with pytest.raises(ValueError, match=r"^rotations"):
        apply_residual(pipe, ALIGNED, bad)
    assert not hasattr(transformer, "_diffusers_hook")
