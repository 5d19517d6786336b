"""Residual text streaming: off is bit-identical, on equals the definition, flags in every shape, each mistake said."""

from __future__ import annotations

import pytest
import torch
from helpers import mmdit_config, randomise, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmditx import MMDiT
from sd3.mistakes import Mistake
from sd3.residual import ResidualConfig, build_residual_config, residual_stream

DEPTH = 6
CONFIG = mmdit_config(depth=DEPTH, width=64, mlp_width=64, dual_layers=frozenset({0}))
MODEL = randomise(MMDiT(CONFIG), 5)
INPUTS = (
    torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(1)),
    torch.tensor([700.0, 30.0]),
    torch.randn(2, 128, generator=torch.Generator().manual_seed(2)),
    torch.randn(2, 9, 160, generator=torch.Generator().manual_seed(3)),
)


def by_definition(origin: int, mix: dict[int, float], skip: frozenset[int] = frozenset()) -> torch.Tensor:
    """The definition, written down block by block: C_i <- C_i + w_i * C_o right before block i."""
    x, t, y, context = INPUTS
    tokens, c = MODEL.embed_image(x), MODEL.t_embedder(t) + MODEL.y_embedder(y)
    context = MODEL.context_embedder(context)
    kept = None
    for i in range(DEPTH):
        if i == origin:
            kept = context.clone()
        if i in mix:
            context = context + mix[i] * kept
        if i not in skip:
            context, tokens = MODEL.joint_blocks[i](context, tokens, c)
    return MODEL.unpatchify(MODEL.final_layer(tokens, c), x.shape[2], x.shape[3])


@st.composite
def mixes(draw):
    origin = draw(st.integers(0, DEPTH - 1))
    targets = draw(st.lists(st.integers(origin, DEPTH - 1), min_size=1, max_size=DEPTH, unique=True))
    weights = [draw(st.floats(-2, 2, allow_nan=False, width=32)) for _ in targets]
    skip = draw(st.frozensets(st.integers(0, DEPTH - 2), max_size=2))
    return origin, targets, weights, skip


@settings(max_examples=25, deadline=None)
@given(mixes())
@torch.no_grad()
def test_equals_the_definition(mix):
    origin, targets, weights, skip = mix
    at_origin = dict(zip(targets, weights, strict=True)).get(origin, 0.0)
    assume(abs(1 + at_origin) > 0.05)  # C_o - C_o leaves only rounding, which the next norm blows up
    stream = residual_stream(build_residual_config(origin, targets, weights))
    got = MODEL(*INPUTS, skip_layers=skip, stream=stream)
    wanted = by_definition(origin, dict(zip(targets, weights, strict=True)), skip)
    assert relative(got, wanted) < 1e-5
    again = MODEL(*INPUTS, skip_layers=skip, stream=stream)  # a stream serves every step of a picture
    assert torch.equal(got, again)


@torch.no_grad()
def test_it_changes_the_result_and_in_the_given_direction():
    plain = MODEL(*INPUTS)
    one = MODEL(*INPUTS, stream=residual_stream(build_residual_config(0, [3], [0.8])))
    other = MODEL(*INPUTS, stream=residual_stream(build_residual_config(0, [3], [-0.8])))
    assert not torch.allclose(plain, one, atol=1e-4)
    assert not torch.allclose(one, other, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.none(), st.integers(0, 99)), st.sampled_from([None, "", [], ()]), st.lists(st.floats(-3, 3)))
@torch.no_grad()
def test_no_targets_means_off_bit_for_bit(origin, targets, weights):
    config = build_residual_config(origin, targets, weights)
    assert config is None
    assert torch.equal(MODEL(*INPUTS), MODEL(*INPUTS, stream=residual_stream(config)))


SHAPES = [
    "3,5,7",
    "3 5 7",
    "3, 5 7",
    "[3,5,7]",
    "(3, 5, 7)",
    "3,5,7,",
    (3, 5, 7),
    [3, 5, 7],
    ["3", "5", "7"],
    (3.0, 5, "7"),
]


@pytest.mark.parametrize("targets", SHAPES, ids=repr)
def test_layers_in_every_shape(targets):
    assert ResidualConfig.parse(0, targets).targets == (3, 5, 7)


@pytest.mark.parametrize("targets", [3, 3.0, "3", " 3 ", "[3]", "(3,)", (3,), [3]], ids=repr)
def test_a_single_layer(targets):
    config = ResidualConfig.parse(1, targets, 0.5)
    assert (config.targets, config.weights) == ((3,), (0.5,))


@pytest.mark.parametrize("weights", ["0.8,0.6,-.4", "0.8 0.6 -0.4", (0.8, 0.6, -0.4), "[0.8, 0.6, -0.4]"], ids=repr)
def test_weights_in_every_shape(weights):
    assert ResidualConfig.parse(0, "1,2,3", weights).weights == (0.8, 0.6, -0.4)


def test_weights_default_to_one_each_and_a_target_may_be_the_origin():
    assert ResidualConfig.parse(2, "2,4").weights == (1.0, 1.0)
    assert ResidualConfig.parse(None, "0", "").weights == (1.0,)


MISTAKES = [
    ((0, "1,2,3", "0.5,0.4"), "2 given for 3 target layers"),
    ((0, "1,1", None), "layer 1 is listed twice"),
    ((3, "2,4", None), "2: lies below the origin layer 3"),
    ((0, "1,x", None), "x: must be a whole number"),
    ((0, "1.5", None), "1.5: must be a whole number"),
    ((0, "1,,2", None), "item between two commas is empty"),
    ((0, "-1", None), "-1: must be at least 0"),
    ((-1, "1", None), "-1: must be at least 0"),
    ((0, "1", "nan"), "nan: must be a number"),
    ((0, "1", "inf"), "inf: must be a number"),
    ((0, "1", "much"), "much: must be a number"),
    ((0, [True], None), "True: must be a whole number"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_each_mistake_is_named(flags, message):
    with pytest.raises(Mistake, match=r"^(origin|targets|weights)") as error:
        ResidualConfig.parse(*flags)
    assert message in str(error.value)


@pytest.mark.parametrize(("origin", "targets"), [(6, (6,)), (0, (6,)), (0, (2, 17))])
def test_layers_beyond_the_model(origin, targets):
    with pytest.raises(ValueError, match="this model has 6 joint blocks: 0 to 5"):
        ResidualConfig(origin, targets).check(6)
    ResidualConfig(5, (5,)).check(6)
