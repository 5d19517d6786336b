"""The block loop: what streams see and change, controls, and parts of a run."""

from __future__ import annotations

import torch
from helpers import mmdit_config, randomise, relative

from dit_embedder import spread
from mmditx import Hook, MMDiT, ResidualStream, Stream, Streams, run_blocks
from sd3_impls import Conditioning, Denoiser

CONFIG = mmdit_config(depth=4, width=64, mlp_width=64)
MODEL = randomise(MMDiT(CONFIG), 5)
DRAW = torch.Generator().manual_seed(3)
CONTEXT, X, C = (torch.randn(2, *shape, 64, generator=DRAW) for shape in ((5,), (7,), ()))


@torch.no_grad()
def image_tokens(**options) -> torch.Tensor:
    return run_blocks(MODEL.joint_blocks, CONTEXT, X, C, **options)[1]


def test_streams_keep_what_arrives_and_mix_in_their_order():
    seen = []

    class Probe(Stream):
        def keep(self, i, context):
            seen.append(("keep", i, context))

        def mix(self, i, context):
            seen.append(("mix", i, context))
            return context

    doubled = Hook(lambda i, context: 2 * context if i == 1 else context)
    plain, changed = image_tokens(stream=Probe()), image_tokens(stream=Streams([doubled, None, Probe()]))
    assert [(what, i) for what, i, _ in seen] == [(what, i) for i in range(4) for what in ("keep", "mix")] * 2
    assert torch.equal(plain, image_tokens())
    assert relative(changed, plain) > 0.01
    (_, _, kept), (_, _, mixed) = seen[10:12]  # of the second run, at block 1
    assert torch.equal(mixed, 2 * kept)


def test_a_residual_stream_keeps_what_arrives_whatever_mixes_before_it():
    other = Hook(lambda i, context: 3 * context)
    stream = ResidualStream(0, {1: 0.5})
    image_tokens(stream=Streams([other, stream]))
    assert stream.origin_context is CONTEXT


@torch.no_grad()
def test_a_function_may_look_on_or_change_the_text():
    cond = Conditioning(torch.randn(1, 5, 160, generator=DRAW), torch.randn(1, 128, generator=DRAW))
    x = torch.randn(1, 16, 8, 6, generator=DRAW)
    run = lambda *hooks: Denoiser(MODEL, cond, None, torch.tensor([0.7, 0.0]), streams=hooks)(x, 0.7)  # noqa: E731
    seen = []
    looked_on = run(lambda i, context: seen.append(i) or context)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(looked_on, run())
    assert not torch.equal(run(lambda i, context: context.flip(1) if i == 2 else 0.5 * context), run())


def test_a_block_without_a_control_adds_nothing():
    control = torch.randn(2, 7, 64, generator=DRAW)
    zeros = torch.zeros_like(control)
    assert torch.equal(image_tokens(controls=[None] * 4), image_tokens())
    got = image_tokens(controls=[None, control, None, None])
    assert torch.equal(got, image_tokens(controls=[zeros, control, zeros, zeros]))
    assert not torch.equal(got, image_tokens())
    assert torch.equal(image_tokens(controls=[None, control, None, None], skip=[1]), image_tokens(skip=[1]))


@torch.no_grad()
def test_a_run_in_two_parts_is_one_run():
    controls = spread(list(torch.randn(3, 2, 7, 64, generator=DRAW)), 4)
    whole = image_tokens(stream=ResidualStream(0, {1: 0.3, 3: 0.2}), controls=controls)
    stream = ResidualStream(0, {1: 0.3, 3: 0.2})
    context, x = run_blocks(MODEL.joint_blocks[:2], CONTEXT, X, C, stream, controls)
    _, x = run_blocks(MODEL.joint_blocks[2:], context, x, C, stream, controls, first=2)
    assert torch.equal(x, whole)


def test_states_are_spread_over_neighbouring_blocks():
    states = list(torch.arange(3))
    assert [int(s) for s in spread(states, 7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [int(s) for s in spread(states, 3)] == [0, 1, 2]
