"""Every golden tensor of `SD3_GOLDEN`, and every row of its tokens.json with the tokenizers of `SD3_TOKENIZERS`.

Any folder laid out like the fixtures can be checked; what each tensor is stands in the fixtures' own notes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import relative
from safetensors.torch import load_file

from dit_embedder import ControlNet, ControlNetConfig, spread
from mmditx import MMDiT, MMDiTConfig
from other_impls import CLIP, T5, CLIPConfig, T5Config
from sd3.files import MMDIT_PREFIX, VAE_PREFIX, WeightFile
from sd3.find import select_encoder
from sd3.models import SkipLayerConfig
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations
from sd3.text import StreamedEncoder
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer
from sd3.vae import VAE, VAEConfig
from sd3.weights import ModelTensors, find_controlnet, find_mmdit
from sd3_impls import (
    ClassifierFreeGuidance,
    Conditioning,
    Denoiser,
    SkipLayerGuidance,
    find_sampler,
    flow_schedule,
    guided_sampling,
    img2img_sigmas,
    latent_in,
    latent_out,
    seeded_noise,
)

MODULE, RUN = 1e-5, 1e-4
FOLDER = Path(os.environ.get("SD3_GOLDEN", ""))
TOKENIZERS = os.environ.get("SD3_TOKENIZERS")
if not os.environ.get("SD3_GOLDEN"):
    pytest.skip("SD3_GOLDEN is not set", allow_module_level=True)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.golden.safetensors")


def keys(name: str) -> list[str]:
    return sorted(WeightFile(FOLDER / f"{name}.golden.safetensors").entries)


def build(part: ModelTensors, make, config) -> torch.nn.Module:
    """A module in float32 through the same loading path as everything else."""
    config = part.config(config, "the module of this fixture")
    with torch.device("meta"):
        module = make(config)
    part.check(module)
    return part.load_into(module, "cpu", torch.float32)


def mmdit(file: str) -> MMDiT:
    return build(ModelTensors(WeightFile(FOLDER / file), MMDIT_PREFIX), MMDiT, MMDiTConfig.from_shapes)


@torch.no_grad()
@pytest.mark.parametrize("key", keys("sampling"))
def test_sampling(key):
    g = golden("sampling")
    start = g["start"]
    if match := re.fullmatch(r"sigmas_shift([\d.]+)_steps(\d+)", key):
        got = flow_schedule(int(match[2]), float(match[1]))
    elif match := re.fullmatch(r"(euler|dpmpp_2m)_(shift.*)", key):
        closed_form = lambda x, sigma: 0.8 * torch.tanh(x * (1 - 0.3 * sigma.view(-1, 1, 1, 1)))  # noqa: E731
        got = find_sampler(match[1])(closed_form, start, g[f"sigmas_{match[2]}"])
    elif match := re.fullmatch(r"noise_seed(\d+)", key):
        got = seeded_noise(int(match[1]), g[key].shape)
        assert torch.equal(got, g[key])
    else:
        got = {"latent_process_in": latent_in(start), "latent_process_out": latent_out(start), "start": start}[key]
    assert relative(got, g[key]) < (RUN if key.startswith(("euler", "dpmpp_2m")) else MODULE)


RESIDUAL = {
    "one": ResidualConfig(0, (1,), (0.7,)),
    "many": ResidualConfig(0, (1, 2), (0.8, 0.4)),
    "inner": ResidualConfig(1, (2,), (-0.4,)),
    "self": ResidualConfig(1, (1,), (0.5,)),
}
INPUTS = ("x", "t", "y", "context", "controls")
MMDITS = [p.name.removesuffix(".golden.safetensors") for p in sorted(FOLDER.glob("mmdit_*.golden.safetensors"))]


@torch.no_grad()
@pytest.mark.parametrize(("name", "key"), [(n, k) for n in MMDITS for k in keys(n) if k not in INPUTS])
def test_mmdit(name, key):
    g, model = golden(name), mmdit(f"{name}.weights.safetensors")
    options = {}
    if key == "control":
        options["controls"] = spread(list(g["controls"]), model.config.depth)
    if key.endswith("skip"):
        options["skip_layers"] = [1]
    if key.startswith("residual_"):
        options["stream"] = residual_stream(RESIDUAL[key.split("_")[1]])
    got = model(g["x"], g["t"], g["y"], g["context"], **options)
    assert relative(got, g[key]) < MODULE


REINJECTION = {
    "plain": ResidualConfig(),
    "anchored": ResidualConfig(1, (2, 3), (0.5, 0.25), mode="anchored"),
    "anchored_origin0": ResidualConfig(0, (1, 2, 3), (0.9, 0.4, 0.1), mode="anchored"),
    "aligned": ResidualConfig(1, (2, 3), (0.5, 0.25), mode="aligned"),
}
REINJECTION_KEYS = [k for k in keys("reinjection_diffusers") if k in REINJECTION]


@torch.no_grad()
@pytest.mark.parametrize("key", REINJECTION_KEYS)
def test_reinjection(key):
    g, file = golden("reinjection_diffusers"), FOLDER / "reinjection_diffusers.weights.safetensors"
    model = build(find_mmdit(WeightFile(file)), MMDiT, MMDiTConfig.from_shapes)
    stream = residual_stream(REINJECTION[key], Rotations(1, (2, 3), g["rotations"][None]))
    text = (g["pooled_projections"], g["encoder_hidden_states"])
    got = model(g["hidden_states"], g["timestep"], *text, stream=stream)
    assert relative(got, g[key]) < MODULE


@torch.no_grad()
@pytest.mark.parametrize("key", REINJECTION_KEYS)
def test_reinjection_by_hooks_on_diffusers_own_model(key):
    diffusers = pytest.importorskip("diffusers")
    from sd3.diffusers_hooks import apply_residual

    g, weights = golden("reinjection_diffusers"), load_file(FOLDER / "reinjection_diffusers.weights.safetensors")
    width, context = weights["context_embedder.weight"].shape
    dual = [i for i in range(4) if f"transformer_blocks.{i}.attn2.to_q.weight" in weights]
    model = diffusers.SD3Transformer2DModel(
        num_layers=4,
        num_attention_heads=width // 64,
        attention_head_dim=64,
        joint_attention_dim=context,
        caption_projection_dim=width,
        pooled_projection_dim=weights["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        pos_embed_max_size=round(weights["pos_embed.pos_embed"].shape[1] ** 0.5),
        dual_attention_layers=dual,
        qk_norm="rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in weights else None,
    ).eval()
    model.load_state_dict(weights)
    names = ("hidden_states", "timestep", "pooled_projections", "encoder_hidden_states")
    rotations = Rotations(1, (2, 3), g["rotations"][None]) if key == "aligned" else None
    with apply_residual(model, REINJECTION[key], rotations):
        got = model(**{name: g[name] for name in names}).sample
    assert relative(got, g[key]) < MODULE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["8b", "2b"])
def test_controlnet(kind):
    g, base = golden(f"controlnet_{kind}"), mmdit(f"controlnet_{kind}.base.safetensors")
    part = find_controlnet(WeightFile(FOLDER / f"controlnet_{kind}.weights.safetensors"))
    net = build(part, lambda c: ControlNet(c, c.chained(base.config)), ControlNetConfig.from_shapes)
    assert net.chained == (kind == "8b")
    states = net(base, g["x"], 1000 * g["sigma"], g["y"], g["cond"])
    assert relative(torch.stack(states), g["hidden_states"]) < MODULE
    got = base(g["x"], 1000 * g["sigma"], g["y"], g["context"], controls=spread(states, base.config.depth))
    assert relative(got, g["out"]) < MODULE


def on_meta(part: ModelTensors, make, config) -> torch.nn.Module:
    with torch.device("meta"):
        return make(part.config(config, "the module of this fixture"))


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
@pytest.mark.parametrize(("name", "activation"), [("clip_l", "quick_gelu"), ("clip_g", "gelu")])
def test_clip(name, activation, whole):
    g, part = golden(name), ModelTensors(WeightFile(FOLDER / f"{name}.weights.safetensors"))
    config = lambda shapes: CLIPConfig.from_shapes(shapes, activation, name == "clip_g")  # noqa: E731
    if whole:
        hidden, pooled = build(part, CLIP, config)(g["ids"])
    else:
        encoder = StreamedEncoder(on_meta(part, CLIP, config), part, torch.device("cpu"), torch.float32)
        (places,) = encoder.embed(1, [range(g["ids"].shape[1])])
        texts = [(rows + places)[None] for rows in encoder.embed(0, g["ids"].tolist())]
        hidden, pooled = map(torch.cat, zip(*encoder.run(texts, g["ids"].split(1)), strict=True))
    assert relative(hidden, g["hidden"]) < MODULE
    assert relative(pooled, g["pooled"]) < MODULE


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "streamed"])
def test_t5(whole):
    g, part = golden("t5"), select_encoder("t5xxl", WeightFile(FOLDER / "t5.weights.safetensors"), "")
    if whole:
        model = build(part, T5, T5Config.from_shapes)
        got = [model(g["ids"]), model(g["short_ids"])]
    else:  # both lengths in one pass
        encoder = StreamedEncoder(on_meta(part, T5, T5Config.from_shapes), part, torch.device("cpu"), torch.float32)
        ids = [g["ids"], g["short_ids"]]
        got = encoder.run(torch.stack(list(encoder.embed(0, rows.tolist()))) for rows in ids)
    assert relative(got[0], g["hidden"]) < MODULE
    assert relative(got[1], g["short_hidden"]) < MODULE


@torch.no_grad()
def test_vae():
    g = golden("vae")
    model = build(ModelTensors(WeightFile(FOLDER / "vae.weights.safetensors"), VAE_PREFIX), VAE, VAEConfig.from_shapes)
    mean, logvar = model.moments(g["image"])
    assert relative(mean, g["mean"]) < MODULE
    assert relative(logvar, g["logvar"]) < MODULE
    assert relative(model.decode(g["latent"]), g["decoded"]) < MODULE


@torch.no_grad()
@pytest.mark.parametrize("key", [k for k in keys("pipeline") if "_shift" in k])
def test_pipeline(key):
    g = golden("pipeline")
    name, shift, case, sampler = re.fullmatch(r"(.+)_shift([\d.]+)_(.+)_(euler|dpmpp_2m)", key).groups()
    words = case.split("_")
    assert set(words) <= {"plain", "residual", "slg", "img2img"}
    slg = SkipLayerConfig(2.5, 0.01, 0.5, (1,), cfg=4.5) if "slg" in words else None
    stream = residual_stream(ResidualConfig(0, (1, 2), (0.6, 0.3))) if "residual" in words else None
    cond, neg_cond = (Conditioning(g[f"{half}_context"], g[f"{half}_pooled"]) for half in ("cond", "neg"))
    steps, sigmas, latent = 8, flow_schedule(8, float(shift)), torch.zeros(1, 16, 12, 8)
    if "img2img" in words:
        latent, sigmas = g["init_latent"], img2img_sigmas(sigmas, 0.6)
        assert len(sigmas) == 6
    model = mmdit(f"{name}.weights.safetensors")
    guidance = [ClassifierFreeGuidance(4.5), SkipLayerGuidance(slg)]
    denoiser = Denoiser(model, cond, neg_cond, sigmas, guidance, streams=[stream], planned=steps)
    got = latent_out(guided_sampling(denoiser, sampler, latent, [23]))
    assert relative(got, g[key]) < RUN


ROWS = json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not TOKENIZERS, reason="SD3_TOKENIZERS is not set")
@pytest.mark.parametrize("row", ROWS, ids=[row["prompt"][:20] for row in ROWS])
def test_tokens(row):
    clip, t5 = open_clip_tokenizer(Path(TOKENIZERS) / "clip"), open_t5_tokenizer(Path(TOKENIZERS) / "t5")
    length = len(row["l"]["ids"])
    got = {
        "l": clip.tokenize(row["prompt"], length),
        "g": clip.tokenize(row["prompt"], length, pad=0),
        "t5xxl": t5.tokenize(row["prompt"], length),
    }
    for name, tokens in got.items():
        assert tokens.ids == row[name]["ids"], name
        assert tokens.weights == row[name]["weights"], name
