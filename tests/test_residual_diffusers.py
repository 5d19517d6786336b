"""The residual stream by hooks on diffusers' models: the same numbers as ours, and nothing left behind."""

from __future__ import annotations

import inspect

import pytest
import to_diffusers
import torch
from helpers import mmdit_config, randomise, relative

from mmditx import MMDiT
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, flow_schedule, guided_sampling, start_noise

pytest.importorskip("diffusers")

import diffusers

from sd3.diffusers_hooks import apply_residual

CONFIG = mmdit_config(mlp_width=512, dual_layers=frozenset({0}), depth=5)
OURS = randomise(MMDiT(CONFIG), 31)
STEPS, SHIFT = 6, 3.0


def orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))[0]


def tensor(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations_for(config: ResidualConfig, buckets: int = 1) -> Rotations:
    count = len(config.targets)
    edges = tuple(b / buckets for b in range(1, buckets))
    return Rotations(config.origin, config.targets, orthogonal(buckets, count, CONFIG.width, CONFIG.width), edges)


@pytest.fixture
def transformer():
    model = to_diffusers.peer_transformer(CONFIG)
    model.load_state_dict(to_diffusers.transformer(OURS))
    return model


@pytest.fixture
def pipe(transformer):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, **dict.fromkeys(parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


TEXT = (tensor(1, 20, 160, seed=1), tensor(1, 128, seed=2))
NEGATIVE = (tensor(1, 20, 160, seed=3), tensor(1, 128, seed=4))


def theirs(pipe, cfg: float = 4.5, **others) -> torch.Tensor:
    """The final latent (1, 16, 8, 6) of their pipeline, in model space."""
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipe(
        **dict(zip(names, (*TEXT, *NEGATIVE), strict=True)),
        width=48,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        latents=start_noise([5], (1, 16, 8, 6)),
        output_type="latent",
        **others,
    ).images


def ours(config: ResidualConfig, rotations: Rotations | None = None, cfg: float = 4.5) -> torch.Tensor:
    """The same by our own pipeline."""
    hooks = [residual_stream(config, rotations)]
    neg_cond = None if cfg == 1 else Conditioning(*NEGATIVE)
    guidance = [ClassifierFreeGuidance(cfg)]
    denoiser = Denoiser(OURS, Conditioning(*TEXT), neg_cond, flow_schedule(STEPS, SHIFT), guidance, streams=hooks)
    return guided_sampling(denoiser, "euler", torch.zeros(1, 16, 8, 6), [5])


CASES = {
    "off": ResidualConfig(),
    "add": ResidualConfig(0, (1, 3), (0.5, -0.3)),
    "add inner": ResidualConfig(2, (2, 4), (0.5, 0.4)),
    "anchored": ResidualConfig(1, (2, 3, 4), "each:0.5", mode="anchored"),
    "anchored origin 0": ResidualConfig(0, (1, 2, 3), "linear:0.9:0.1", mode="anchored"),
    "aligned": ResidualConfig(1, (2, 4), (0.5, 0.25), mode="aligned"),
    "aligned origin 0": ResidualConfig(0, (2, 4), (0.5, 0.25), mode="aligned"),
    "cosine": ResidualConfig(0, (1, 2), "each:0.8", schedule="cosine"),
    "exp": ResidualConfig(0, (1, 2), "each:0.8", mode="anchored", schedule="exp:1.5"),
    "window": ResidualConfig(0, (1, 2), "each:0.8", start=0.2, end=0.6),
    "cond": ResidualConfig(0, (1, 2), "each:0.8", branch="cond"),
    "uncond": ResidualConfig(0, (1, 2), "each:0.8", mode="anchored", branch="uncond"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_final_latent_as_ours(pipe, case):
    config = CASES[case]
    rotations = rotations_for(config, 2) if config.mode == "aligned" else None
    plain = theirs(pipe)
    with apply_residual(pipe, config, rotations):
        got = theirs(pipe)
    assert relative(got, ours(config, rotations)) < 1e-3
    assert (relative(got, plain) > 0.01) == config.active
    assert torch.equal(theirs(pipe), plain)  # nothing is left behind


@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
def test_without_guidance(pipe, branch):
    config = ResidualConfig(0, (1, 2), "each:0.8", branch=branch)
    with apply_residual(pipe, config):
        assert relative(theirs(pipe, cfg=1.0), ours(config, cfg=1)) < 1e-3


def test_one_handle_serves_many_pictures(pipe):
    """What is prepared of one prompt is not used for the next, though the first tensor may be gone."""
    config = ResidualConfig(0, (1, 2), "each:0.9", mode="anchored")
    with apply_residual(pipe, config):
        wanted = theirs(pipe)
        for _ in range(3):
            other = {"prompt_embeds": tensor(1, 20, 160, seed=8), "pooled_prompt_embeds": TEXT[1]}
            pipe(**other, guidance_scale=1, width=48, height=64, num_inference_steps=2, output_type="latent")
            assert torch.equal(theirs(pipe), wanted)


def state_of(model) -> list:
    return [
        (name, sorted(k for k in m.__dict__ if k in ("forward", "_diffusers_hook")))
        for name, m in model.named_modules()
    ]


def test_it_removes_itself_completely(transformer):
    before = state_of(transformer)
    handle = apply_residual(transformer, CASES["add"])
    assert state_of(transformer) != before
    handle.remove()
    handle.remove()  # no harm
    assert state_of(transformer) == before
    with pytest.raises(RuntimeError, match="on purpose"), apply_residual(transformer, CASES["add"]):
        raise RuntimeError("on purpose")
    assert state_of(transformer) == before


INPUTS = {
    "hidden_states": tensor(2, 16, 8, 6, seed=5),
    "encoder_hidden_states": tensor(2, 9, 160, seed=6),
    "pooled_projections": tensor(2, 128, seed=7),
    "timestep": torch.tensor([700.0, 700.0]),
}


@torch.no_grad()
def velocity(model, **others) -> torch.Tensor:
    return model(**INPUTS, **others).sample


@torch.no_grad()
def by_ours(config: ResidualConfig, rotations: Rotations | None = None, skip=()) -> torch.Tensor:
    x, context, y, t = INPUTS.values()
    return OURS(x, t, y, context, skip_layers=skip, stream=residual_stream(config, rotations))


@pytest.mark.parametrize("skip", [(0,), (1, 2), (2, 3)])
def test_blocks_that_a_pass_skips(transformer, skip):
    """The origin is kept and the mix applied at skipped blocks too, as ours does."""
    config = ResidualConfig(1, (2, 3), (0.7, -0.5))
    with apply_residual(transformer, config):
        assert relative(velocity(transformer, skip_layers=list(skip)), by_ours(config, skip=skip)) < 1e-5


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_it_lives_with_other_hooks_of_the_registry(transformer, first):
    """Put on before or after diffusers' own hooks, and taken off before them."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubled(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            context, x = self.fn_ref.original_forward(*args, **kwargs)
            return context, 2 * x

    def put() -> None:
        for block in transformer.transformer_blocks:
            HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubled(), "doubled")

    put()
    wanted_off = velocity(transformer)
    with apply_residual(transformer, CASES["add"]):
        wanted_on = velocity(transformer)
    assert torch.equal(velocity(transformer), wanted_off)
    if first == "ours":
        for block in transformer.transformer_blocks:
            HookRegistry.check_if_exists_or_initialize(block).remove_hook("doubled", recurse=False)
    handle = apply_residual(transformer, CASES["add"])
    if first == "ours":
        put()
    assert torch.equal(velocity(transformer), wanted_on)
    handle.remove()
    assert torch.equal(velocity(transformer), wanted_off)
    for block in transformer.transformer_blocks:
        HookRegistry.check_if_exists_or_initialize(block).remove_hook("doubled", recurse=False)
    assert relative(velocity(transformer), by_ours(ResidualConfig())) < 1e-5


def test_group_offloading(transformer):
    pytest.importorskip("accelerate")
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(transformer, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    with apply_residual(transformer, CASES["anchored"]):
        assert relative(velocity(transformer), by_ours(CASES["anchored"])) < 1e-5
    assert relative(velocity(transformer), by_ours(ResidualConfig())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("when", ["blocks before, one graph", "blocks after", "the whole model"])
def test_torch_compile(transformer, when):
    config = CASES["aligned"]
    rotations = rotations_for(config)
    torch.compiler.reset()
    model = torch.compile(transformer) if when == "the whole model" else transformer
    if when == "blocks before, one graph":
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True)
    with apply_residual(model, config, rotations):
        if when == "blocks after":
            for block in transformer.transformer_blocks:
                block.compile()
        assert relative(velocity(model), by_ours(config, rotations)) < 1e-4
    assert relative(velocity(model), by_ours(ResidualConfig())) < 1e-4


# ---- other models --------------------------------------------------------------------------------


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": tensor(1, 12, 16, seed=1),
        "encoder_hidden_states": tensor(1, 7, 24, seed=2),
        "pooled_projections": tensor(1, 20, seed=3),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.zeros(12, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs


def qwen():
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    inputs = {
        "hidden_states": tensor(1, 12, 16, seed=1),
        "encoder_hidden_states": tensor(1, 7, 24, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool),
        "timestep": torch.tensor([0.4]),
        "img_shapes": [[(1, 3, 4)]],
    }
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # older ones ask for it
        inputs["txt_seq_lens"] = [7]
    return model, inputs


def entering_second(model, inputs) -> torch.Tensor:
    """The normalised text tokens that the second block's attention gets."""
    caught = {}
    block = model.transformer_blocks[1]
    handle = block.attn.register_forward_pre_hook(lambda m, args, kwargs: caught.update(kwargs), with_kwargs=True)
    model(**inputs)
    handle.remove()
    return caught["encoder_hidden_states"]


@pytest.mark.parametrize("make", [flux, qwen])
@torch.no_grad()
def test_other_models(make):
    """The second block gets the tokens of the definition; sigma (0.4 here) is read right by the linear schedule."""
    model, inputs = make()
    plain = model(**inputs).sample
    with apply_residual(model, ResidualConfig(0, (1, 2), (0.8, -0.5), schedule="linear")):
        assert relative(model(**inputs).sample, plain) > 1e-4
        got = entering_second(model, inputs)
    assert torch.equal(model(**inputs).sample, plain)
    first = model.transformer_blocks[0]
    original = first.forward

    def by_definition(*args, **kwargs):
        text, x = original(*args, **kwargs)
        return text + 0.4 * 0.8 * kwargs["encoder_hidden_states"], x

    first.forward = by_definition
    assert relative(got, entering_second(model, inputs)) < 1e-5
    del first.forward
    assert relative(got, entering_second(model, inputs)) > 1e-3


@torch.no_grad()
def test_two_calls_with_names():
    """Guidance in two calls: diffusers' cache_context says which one is conditional."""
    model, inputs = flux()
    config = ResidualConfig(0, (1, 2), "each:0.8", branch="cond")
    plain = model(**inputs).sample
    with apply_residual(model, ResidualConfig(0, (1, 2), "each:0.8")):
        mixed = model(**inputs).sample
    with apply_residual(model, config):
        with model.cache_context("uncond"):
            assert torch.equal(model(**inputs).sample, plain)
        with model.cache_context("cond"):
            assert torch.equal(model(**inputs).sample, mixed)
        with pytest.raises(ValueError, match="cannot tell conditional from unconditional rows"):
            model(**inputs)


def test_first_block_cache_of_flux():
    """A cache that never leaves a block out changes nothing, and the hooks come off before it."""
    from diffusers.hooks import FirstBlockCacheConfig

    model, inputs = flux()
    config = ResidualConfig(0, (1, 2), "each:0.8")
    with torch.no_grad(), apply_residual(model, config):
        wanted = model(**inputs).sample
        model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
        with model.cache_context("cond"):
            assert torch.equal(model(**inputs).sample, wanted)
    with torch.no_grad(), model.cache_context("cond"):
        plain = model(**inputs).sample
    model.disable_cache()
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, plain)


# ---- mistakes ------------------------------------------------------------------------------------


def test_mistakes(transformer, pipe):
    with pytest.raises(ValueError, match="9: no such layer"):
        apply_residual(pipe, ResidualConfig(0, (9,)))
    with pytest.raises(ValueError, match="mode aligned: needs rotations FILE"):
        apply_residual(pipe, ResidualConfig(0, (1,), mode="aligned"))
    narrow = Rotations(0, (1,), orthogonal(1, 1, 64, 64))
    with pytest.raises(ValueError, match="is for a model of width 64, this one has 128"):
        apply_residual(pipe, ResidualConfig(0, (1,), mode="aligned"), narrow)
    with pytest.raises(ValueError, match="need a pipeline"):
        apply_residual(transformer, ResidualConfig(0, (1,), end=0.5))
    with pytest.raises(ValueError, match="Linear: has no transformer_blocks"):
        apply_residual(torch.nn.Linear(2, 2), ResidualConfig(0, (1,)))
    with apply_residual(pipe, CASES["add"]), pytest.raises(ValueError, match="already has residual text streaming"):
        apply_residual(pipe, CASES["add"])
    assert not [m for m in transformer.modules() if "_diffusers_hook" in m.__dict__]
