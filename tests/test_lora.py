"""LoRAs: every family's spelling gives the weights of the sum computed directly, whatever the weights become."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import lora_writing as writing
import numpy as np
import pytest
import to_diffusers
import torch
from helpers import TOKENIZERS, modules, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_writing import SPELLINGS, add, draw, every_module

import sd3
import sd3_infer
from sd3.engine import Busy, Engine
from sd3.files import WeightFile, contents
from sd3.lora import layer_names, read_lora
from sd3.mistakes import Mistake, Where
from sd3.patches import patched
from sd3.readers import PatchFile, read_patch_files
from sd3.settings import Setup
from sd3.weights import ModelTensors, Patch

LIMIT = 1e-6  # of rounding in float32; a missing module or a wrong factor is off by 1e-2 at least
CHANGED = ("mmdit", "clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def models(small_model):
    """The parts of the small model, without patches."""
    return {role: replace(part, patches=()) for role, part in Engine(Setup(model=str(small_model))).parts.items()}


@pytest.fixture(scope="module")
def shapes(models):
    return {role: models[role].shapes for role in CHANGED}


def weights(models, lora=None):
    """All weights by part, with LoRAs in a flag's spelling."""
    parts = models
    if lora:
        parts = patched(models, Setup(model="x", lora=lora))
    return {role: dict(parts[role].read(list(parts[role].shapes), "cpu", torch.float32)) for role in CHANGED}


def check(models, lora, wanted, limit=LIMIT):
    """Compares all weights, those that no LoRA names bit by bit."""
    got, plain = weights(models, lora), weights(models)
    changed = 0
    for role in CHANGED:
        for name, tensor in got[role].items():
            if torch.equal(wanted[role][name].float(), plain[role][name]):
                assert torch.equal(tensor, plain[role][name]), name
            else:
                assert relative(tensor, wanted[role][name]) < limit, name
                changed += 1
    assert changed
    return changed


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(models, shapes, tmp_path, spelling):
    write, encoders = SPELLINGS[spelling]
    pairs = draw(shapes, every_module(CHANGED if encoders else ("mmdit",)), iter([1, 4, 3, 2] * 99).__next__)
    if spelling == "old diffusers":  # it had no LoRA on these
        pairs = [p for p in pairs if p.part != "t5xxl"]
    path = write(pairs, tmp_path / "a.safetensors")
    layers = {(p.part, writing.MMDIT.get(p.name, (p.name,))[0]) for p in pairs}
    assert check(models, path, add(weights(models), pairs)) == len(layers)


def test_names_without_the_level_text_model(models, shapes, tmp_path):
    """As newer transformers have them."""
    pairs = draw(shapes, every_module(["clip_l"]), lambda: 2)
    tensors = writing.pieces(pairs, writing.FOLDERS, *writing.AB)
    path = writing.write({k.replace("text_model.", ""): v for k, v in tensors.items()}, tmp_path / "a.safetensors")
    check(models, path, add(weights(models), pairs))


def test_no_two_layers_share_a_name(models):
    """A flattened name stands for one layer: none is split by guessing."""
    for role, names in layer_names(models).items():
        dotted = {name for name in names if "." in name}
        flat = [name.replace(".", "_") for name in dotted]
        for name in dotted:
            a, b = names[name], names[name.replace(".", "_")]
            assert (a.layer, a.piece, a.pieces, a.swap) == (b.layer, b.piece, b.pieces, b.swap)
        assert len(flat) == len(set(flat)) and len(names) > 10, role


# ---- sums ----------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_loras_against_a_direct_computation(models, shapes, tmp_path, data):
    """Random ranks, subsets of modules, strengths and spellings; up to three LoRAs."""
    wanted, lora = weights(models), []
    for number in range(data.draw(st.integers(1, 3))):
        seed = data.draw(st.integers(0, 10**6))
        rng = random.Random(seed)
        spelling = data.draw(st.sampled_from([s for s in SPELLINGS if "old" not in s]))
        write, encoders = SPELLINGS[spelling]
        pool = every_module(CHANGED if encoders else ("mmdit",))
        pairs = draw(shapes, rng.sample(pool, rng.randint(1, len(pool))), lambda rng=rng: rng.randint(1, 9), seed)
        path = tmp_path / f"{number} {seed} {spelling}"
        if not path.exists():
            write(pairs, path)
        strength = rng.choice([1.0, 0.5, -0.75, 2.0])
        lora.append(PatchFile(str(path), strength))
        wanted = add(wanted, pairs, strength)
    check(models, lora, wanted, 3e-6)


def test_a_model_in_diffusers_layout(models, shapes, tmp_path):
    """q, k and v lie apart in such a model's files, and halves are swapped; the LoRA is the same."""
    folder = to_diffusers.folder(tmp_path / "diffusers", modules(config_of_diffusers()), TOKENIZERS)
    parts = {r: replace(p, patches=()) for r, p in Engine(Setup(model=str(folder))).parts.items()}
    own = {role: parts[role].shapes for role in CHANGED}
    pairs = draw(own, every_module(), lambda: 3)
    for number, spelling in enumerate(("diffusers", "kohya")):
        path = SPELLINGS[spelling][0](pairs, tmp_path / f"{number}.safetensors")
        check(parts, path, add(weights(parts), pairs))


def config_of_diffusers():
    from helpers import mmdit_config

    return mmdit_config(mlp_width=512)


# ---- algorithms ----------------------------------------------------------------------------------

FC1 = "joint_blocks.2.x_block.mlp.fc1"
KEY = "diffusion_model." + FC1


def patched_layer(models, tmp_path, tensors, layer=FC1, strength=1.0, leaf="weight", metadata=None):
    """The base weight of a layer and the patched one, in float64."""
    path = writing.write(tensors, tmp_path / "one.safetensors", metadata)
    name = f"{layer}.{leaf}"
    parts = patched(models, Setup(model="x", lora=[(path, strength)]))
    ((_, base),) = models["mmdit"].read([name], "cpu", torch.float32)
    ((_, got),) = parts["mmdit"].read([name], "cpu", torch.float32)
    return base.double(), got.double()


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_full_differences_and_biases(models, tmp_path):
    diff, diff_b = rand(256, 128), rand(256)
    base, got = patched_layer(models, tmp_path, {f"{KEY}.diff": diff, f"{KEY}.diff_b": diff_b}, strength=0.5)
    assert relative(got, base + 0.5 * diff.double()) < LIMIT
    base, got = patched_layer(models, tmp_path, {f"{KEY}.diff_b": diff_b}, strength=0.5, leaf="bias")
    assert relative(got, base + 0.5 * diff_b.double()) < LIMIT


def test_norms(models, tmp_path):
    layer, diff = "joint_blocks.1.x_block.attn.ln_q", rand(64)
    for key in (f"diffusion_model.{layer}", "transformer.transformer_blocks.1.attn.norm_q"):
        base, got = patched_layer(models, tmp_path, {f"{key}.w_norm": diff}, layer)
        assert relative(got, base + diff.double()) < LIMIT


def test_a_difference_of_swapped_halves(models, tmp_path):
    layer, diff = "final_layer.adaLN_modulation.1", rand(256, 128)
    base, got = patched_layer(models, tmp_path, {"transformer.norm_out.linear.diff": diff}, layer)
    assert relative(got, base + torch.cat([diff[128:], diff[:128]]).double()) < LIMIT


def test_a_set_weight_replaces_at_every_strength_but_0(models, tmp_path):
    value = rand(256, 128)
    for strength, wanted in ((1.0, value), (0.3, value), (0.0, None)):
        base, got = patched_layer(models, tmp_path, {f"{KEY}.set_weight": value}, strength=strength)
        assert torch.equal(got, base if wanted is None else wanted.double())


def test_a_bias_has_the_scale_of_its_weight(models, tmp_path):
    name = "transformer.transformer_blocks.2.ff.net.0.proj"
    tensors = {f"{name}.lora_A.weight": rand(4, 128), f"{name}.lora_B.weight": rand(256, 4)}
    tensors[f"{name}.lora_B.bias"] = rand(256)
    values = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(values)}
    base, got = patched_layer(models, tmp_path, tensors, metadata=metadata, leaf="bias")
    assert relative(got, base + 3.0 * rand(256).double()) < LIMIT  # 6 / sqrt(4)
    base, got = patched_layer(models, tmp_path, tensors, metadata=metadata)
    assert relative(got, base + 3.0 * (rand(256, 4) @ rand(4, 128)).double()) < LIMIT


def test_the_core_of_a_convolution(models, tmp_path):
    """Three convolutions one after the other are one with a Tucker core."""
    layer = "x_embedder.proj"
    down, mid, up = rand(3, 16, 1, 1), rand(3, 3, 2, 2), rand(128, 3, 1, 1)
    key = f"diffusion_model.{layer}"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    base, got = patched_layer(models, tmp_path, tensors, layer)
    x = rand(1, 16, 4, 4).double()
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down.double()), mid.double(), stride=2), up.double())
    assert relative(conv(x, got - base, stride=2), wanted) < 1e-5


def test_dora_by_row_and_by_column(models, tmp_path):
    down, up = rand(4, 128), rand(256, 4)
    pair = {f"{KEY}.lora_down.weight": down, f"{KEY}.lora_up.weight": up, f"{KEY}.alpha": torch.tensor(2.0)}
    for suffix, magnitude, dim in (
        ("dora_scale", rand(256, 1).abs(), 1), ("dora_scale", rand(1, 128).abs(), 0), ("magnitude", rand(256).abs(), 1),
        ("lora_magnitude_vector", rand(256).abs(), 1), ("lora_magnitude_vector.weight", rand(256).abs(), 1),
    ):  # fmt: skip
        base, got = patched_layer(models, tmp_path, pair | {f"{KEY}.{suffix}": magnitude}, strength=0.5)
        v = base + 0.5 * (up @ down).double()
        m = magnitude.double() if magnitude.ndim == 2 else magnitude.double()[:, None]
        assert relative(got, base + 0.5 * (m * v / v.norm(dim=dim, keepdim=True) - base)) < 3e-6


def test_a_square_layer_is_told_by_the_place_of_the_one(models, tmp_path):
    """DoRA on to_q alone: the norm of a column counts the rows of q only."""
    layer, name = "joint_blocks.0.x_block.attn.qkv", "lycoris_transformer_blocks_0_attn_to_q"
    pair = {f"{name}.lora_down.weight": rand(4, 128), f"{name}.lora_up.weight": rand(128, 4)}
    for shape, dim in (((128, 1), 1), ((1, 128), 0)):
        magnitude = rand(*shape).abs()
        base, got = patched_layer(models, tmp_path, pair | {f"{name}.dora_scale": magnitude}, layer)
        v = base[:128] + (rand(128, 4) @ rand(4, 128)).double()
        assert relative(got[:128], magnitude.double() * v / v.norm(dim=dim, keepdim=True)) < 3e-6
        assert torch.equal(got[128:], base[128:])


def test_alpha_of_lokr(models, tmp_path):
    """Whole factors have the scale 1, whatever alpha says; PEFT's settings say alpha / r for them too."""
    w1, w2 = rand(4, 8), rand(64, 16)
    tensors = {f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2}
    wanted = torch.kron(w1, w2).double()
    base, got = patched_layer(models, tmp_path, tensors | {f"{KEY}.alpha": torch.tensor(1e9)})
    assert relative(got, base + wanted) < LIMIT
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.alpha": 6})}
    base, got = patched_layer(models, tmp_path, tensors, metadata=metadata)
    assert relative(got, base + 1.5 * wanted) < LIMIT


def test_patterns_of_peft(models, tmp_path):
    """A key matches a whole name or the end of one, and may be a regular expression; the first that matches counts."""
    name = "transformer.transformer_blocks.2.ff.net.0.proj"
    tensors = {f"{name}.lora_A.weight": rand(4, 128), f"{name}.lora_B.weight": rand(256, 4)}
    product = (rand(256, 4) @ rand(4, 128)).double()
    for pattern, alpha in (
        ({"net.0.proj": 8}, 8), ({"et.0.proj": 8}, 2), ({r"transformer_blocks\.[0-2]\.ff\.net.0.proj": 8}, 8),
        ({"^transformer_blocks.2.ff.net.0.proj": 8}, 8), ({"net": 8}, 2), ({"proj": 8, "net.0.proj": 16}, 8),
    ):  # fmt: skip
        values = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": pattern}
        metadata = {"lora_adapter_metadata": json.dumps(values)}
        base, got = patched_layer(models, tmp_path, tensors, metadata=metadata)
        assert relative(got, base + alpha / 4 * product) < LIMIT, pattern


def test_weights_in_half_precision_are_rounded_once(models, shapes, tmp_path):
    pairs = draw(shapes, every_module(["mmdit"]), lambda: 3)
    path = SPELLINGS["kohya"][0](pairs, tmp_path / "a.safetensors")
    part = patched(models, Setup(model="x", lora=path))["mmdit"]
    for (name, half), (_, full) in zip(
        part.read(list(part.shapes), "cpu", torch.bfloat16), part.read(list(part.shapes), "cpu", None), strict=True
    ):
        assert torch.equal(half, full.bfloat16()), name


# ---- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_lora(shapes, tmp_path_factory):
    """A LoRA of everything, in kohya's names."""
    pairs = draw(shapes, every_module(), lambda: 4)
    return SPELLINGS["kohya"][0](pairs, tmp_path_factory.mktemp("lora") / "whole.safetensors")


def image(pipe, **options):
    return pipe("a red circle", seed=1, residual_target_layers="1-3", residual_weights="each:0.3", **options).images[0]


def test_strength_0_gives_the_same_image_bit_for_bit(small_model, whole_lora):
    plain, none = (sd3.load(small_model, device="cpu", lora=v) for v in (None, (whole_lora, 0)))
    assert image(plain).tobytes() == image(none).tobytes()
    assert image(sd3.load(small_model, device="cpu", lora=whole_lora)).tobytes() != image(plain).tobytes()


@pytest.mark.parametrize(
    "words",
    [{}, {"dtype": "float32"}, {"weights": "int8"}, {"weights": "fp8"}, {"offload": True}, {"t5_resident": True}],
    ids=str,
)
def test_set_lora_is_as_if_loaded_anew(small_model, whole_lora, words):
    """Also where weights are packed, in 8 bits or in main memory, and back again."""
    words = {"device": "cpu", **words}
    pipe = sd3.load(small_model, **words)
    plain = image(pipe).tobytes()
    pipe.set_lora([(whole_lora, 0.5)])
    with_lora = image(pipe).tobytes()
    assert with_lora == image(sd3.load(small_model, lora=f"{whole_lora}:0.5", **words)).tobytes() != plain
    with pytest.raises(Mistake, match="no such file"):
        pipe.set_lora("missing.safetensors")
    assert image(pipe).tobytes() == with_lora
    pipe.set_lora()
    assert image(pipe).tobytes() == plain


def test_set_lora_reads_nothing_that_it_does_not_change(small_model, shapes, tmp_path, monkeypatch):
    pairs = draw(shapes, [("mmdit", "transformer_blocks.0.attn.to_q")], lambda: 2)
    path = SPELLINGS["diffusers"][0](pairs, tmp_path / "a.safetensors")
    pipe = sd3.load(small_model, device="cpu")
    image(pipe)
    read = []
    load = type(pipe.engine.network.part).load_into
    monkeypatch.setattr(type(pipe.engine.network.part), "load_into", lambda *a, **k: read.append(a[5]) or load(*a, **k))
    pipe.set_lora(path)
    assert read == [{"joint_blocks.0.x_block.attn.qkv.weight"}]
    pipe.set_lora(path)
    assert len(read) == 1


def test_a_lora_of_text_encoders_alone(small_model, shapes, tmp_path):
    pairs = draw(shapes, every_module(["clip_l", "t5xxl"]), lambda: 2)
    path = SPELLINGS["kohya"][0](pairs, tmp_path / "a.safetensors")
    alone = SPELLINGS["kohya"][0]([p for p in pairs if p.part == "t5xxl"], tmp_path / "t5.safetensors")
    plain = image(sd3.load(small_model, device="cpu"))
    assert image(sd3.load(small_model, device="cpu", lora=path)).tobytes() != plain.tobytes()
    assert image(sd3.load(small_model, device="cpu", lora=alone)).tobytes() != plain.tobytes()
    lines = []

    class Listener(sd3.Reporter):
        def note(self, text):
            lines.append(text)

    sd3.load(small_model, lora=path, no_t5=True, tell=Listener())
    assert lines[-1].endswith("LoRA, 2 modules of CLIP-L; 2 without effect: T5 is not loaded")
    with pytest.raises(Mistake, match=r"has no effect: T5 is not loaded \(such as lora_te3_encoder_block_"):
        sd3.load(small_model, lora=alone, no_t5=True)


def test_text_encoders_have_another_key_in_the_cache(small_model, shapes, tmp_path):
    """A LoRA of the MMDiT alone shares the cached prompts of the plain model."""
    files = {}
    for parts in ("mmdit",), ("clip_l",), ("t5xxl",):
        pairs = draw(shapes, every_module(parts), lambda: 2)
        files[parts[0]] = SPELLINGS["kohya"][0](pairs, tmp_path / f"{parts[0]}.safetensors")
    cache, seen = tmp_path / "cache", []
    for lora in (None, files["mmdit"], files["clip_l"], (files["clip_l"], 0.5), files["t5xxl"]):
        pipe = sd3.load(small_model, device="cpu", embed_cache=cache, lora=lora)
        image(pipe)
        seen.append(len(list(cache.iterdir())))
    assert seen == [2, 2, 4, 6, 8]


def test_notes_count_modules(small_model, shapes, tmp_path):
    pairs = draw(shapes, every_module(["mmdit", "clip_g"]), lambda: 2)
    tensors = writing.pieces(pairs, {"mmdit": "transformer.", **writing.FOLDERS}, *writing.AB)
    for name, rows in (
        ("transformer.transformer_blocks.3.attn.to_add_out", 128), ("lora_te1_text_projection", 64),
        ("transformer.transformer_blocks.3.ff_context.net.2", 128), ("transformer.hat", 128), ("text_encoder_3.hat", 3),
    ):  # fmt: skip
        tensors |= {f"{name}.lora_A.weight": rand(2, 64), f"{name}.lora_B.weight": rand(rows, 2)}
    tensors["bundle_emb.fox.clip_l"] = rand(1, 64)
    path = writing.write(tensors, tmp_path / "a.safetensors")
    lines = []

    class Listener(sd3.Reporter):
        def note(self, text):
            lines.append(text)

    sd3.load(small_model, lora=path, no_t5=True, tell=Listener())
    assert lines[-1] == (
        f"note: `lora` {path}: LoRA, 27 modules of the MMDiT, 2 modules of CLIP-G; 3 without effect: the model does "
        "not use these layers; 1 without effect: T5 is not loaded; 1 matches no layer of the model, such as "
        "transformer.hat; 1 textual inversion, not loaded"
    )


def test_split_qkv_is_said(models, shapes, tmp_path):
    """kohya's split_qkv saves a block-diagonal up with the alpha of one block, and everybody divides by three ranks."""
    key = "lora_unet_joint_blocks_2_x_block_attn_qkv"
    down, ups = rand(6, 128), [rand(128, 2, seed=i) for i in range(3)]
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": torch.block_diag(*ups)}
    tensors[f"{key}.alpha"] = torch.tensor(2.0)
    base, got = patched_layer(models, tmp_path, tensors, "joint_blocks.2.x_block.attn.qkv")
    assert relative(got, base + 2 / 6 * (torch.block_diag(*ups) @ down).double()) < LIMIT
    (patch,) = read_lora([PatchFile(str(tmp_path / "one.safetensors"))], models)["mmdit"]
    assert "if they were trained with kohya's split_qkv, they act at a third" in patch.notes[0]
    tensors[f"{key}.lora_up.weight"] = rand(384, 6)
    path = writing.write(tensors, tmp_path / "whole.safetensors")
    (patch,) = read_lora([PatchFile(str(path))], models)["mmdit"]
    assert "kohya's split_qkv" not in patch.notes[0]


# ---- values of the flag --------------------------------------------------------------------------


def test_values_of_the_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = lambda value: read_patch_files("lora", value)  # noqa: E731
    a, b = PatchFile("a.safetensors"), PatchFile("b.safetensors", 0.5)
    assert read("a.safetensors,b.safetensors:0.5") == read(["a.safetensors", ("b.safetensors", 0.5)]) == (a, b)
    assert read([["a.safetensors", 1.0], ["b.safetensors", 0.5]]) == read((a, b)) == (a, b)
    assert read(("b.safetensors", 0.5)) == (b,)
    assert read(tmp_path / "b.safetensors") == (PatchFile(str(tmp_path / "b.safetensors")),)
    assert read("none") is read("") is read(None) is read([]) is None
    for name in ("a,b:0.5.safetensors", "c:2", "d"):
        (tmp_path / name).touch()
        assert read(name) == (PatchFile(name),)
        assert read(f"{name}:0.25") == (PatchFile(name, 0.25),)
        assert read(f"d:2,{name},x:3") == (PatchFile("d", 2.0), PatchFile(name), PatchFile("x", 3.0))
    assert ",".join(map(str, read("a.safetensors:0.1,b.safetensors:2"))) == "a.safetensors:0.1,b.safetensors:2"
    assert math.isclose(read(f"x:{0.1 + 0.2}")[0].strength, 0.30000000000000004, rel_tol=0)


def test_one_file_in_two_spellings_is_one_file_given_twice(models, shapes, tmp_path, monkeypatch):
    """Its change is added twice, however the file is named."""
    monkeypatch.chdir(tmp_path)
    pairs = draw(shapes, every_module(["mmdit"]), lambda: 2)
    SPELLINGS["kohya"][0](pairs, tmp_path / "a.safetensors")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    twice = weights(models, "a.safetensors,a.safetensors:0.5")["mmdit"]
    check(models, "a.safetensors,a.safetensors:0.5", add(add(weights(models), pairs), pairs, 0.5))
    for again in ("./a.safetensors", tmp_path / "a.safetensors", "links/a.safetensors", "b.safetensors"):
        got = weights(models, f"a.safetensors,{again}:0.5")["mmdit"]
        assert all(torch.equal(tensor, twice[name]) for name, tensor in got.items()), again


# ---- products that are too large -----------------------------------------------------------------


def patched_part(models, lora):
    return patched(models, Setup(model="x", lora=lora))["mmdit"]


def filled(tmp_path, name, down, up, **more):
    """A LoRA of one layer whose matrices hold one number each."""
    tensors = {f"{KEY}.lora_down.weight": torch.full((2, 128), down), f"{KEY}.lora_up.weight": torch.full((256, 2), up)}
    return str(writing.write(tensors | {f"{KEY}.{k}": v for k, v in more.items()}, tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize(
    ("numbers", "strength", "dtype"),
    [
        ((1e30, 1e30), 1, torch.float32),
        ((1e30, 1e30), 1, torch.bfloat16),
        ((1e20, 1e17), 900, torch.float32),
        ((300.0, 300.0), 1, torch.float16),
    ],
)
def test_a_product_that_is_too_large_names_the_lora(models, tmp_path, numbers, strength, dtype):
    good, bad = filled(tmp_path, "good", 0.1, 0.1), filled(tmp_path, "bad", *numbers)
    for order in ([(good, 1.0), (bad, strength)], [(bad, strength), (good, 1.0)]):
        part = patched_part(models, order)
        with pytest.raises(Mistake) as told:
            list(part.read([f"{FC1}.weight"], "cpu", dtype))
        kind = str(dtype).removeprefix("torch.")
        why = f"makes {part.full_name(f'{FC1}.weight')} NaN or infinite in {kind}: its values or its strength are"
        assert str(told.value).startswith(f"lora {bad}: {why}")
    list(patched_part(models, [(good, 1.0), (bad, 1e-30)]).read([f"{FC1}.weight"], "cpu", torch.float32))


def test_a_dora_whose_norm_is_too_large_names_the_lora(models, tmp_path):
    """An infinite norm would make the weight zero."""
    bad = filled(tmp_path, "bad", 1e10, 1e12, dora_scale=torch.ones(256, 1))
    with pytest.raises(Mistake, match="NaN or infinite"):
        list(patched_part(models, [(bad, 1.0)]).read([f"{FC1}.weight"], "cpu", torch.float32))


def test_a_model_that_is_damaged_itself_is_not_blamed_on_a_patch(tmp_path):
    path = writing.write({"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2)}, tmp_path / "m.safetensors")
    patch = Patch({"a": lambda t: t + 1, "b": lambda t: t / 0}, "x", where=Where("lora", "file"))
    part = ModelTensors(WeightFile(path, "model"), patches=(patch, replace(patch, where=Where("lora", "other"))))
    assert len(list(part.read(["a"], "cpu", torch.float32))) == 1
    with pytest.raises(Mistake, match="lora file: makes b NaN"):
        list(part.read(["b"], "cpu", torch.float32))


def test_a_lora_that_is_too_large_is_one_line_and_changes_nothing(small_model, tmp_path, capsys):
    bad = filled(tmp_path, "bad", 1e30, 1e30)
    words = ["--model", small_model, "--prompt", "a", "--device", "cpu", "--lora", bad, "--out", tmp_path / "x.png"]
    assert sd3_infer.main([*map(str, words)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --lora {bad}: makes ") and f"{FC1}.weight NaN or infinite" in error
    assert not (tmp_path / "x.png").exists()
    strong = filled(tmp_path, "strong", 1e18, 1e18)
    with pytest.raises(Mistake, match=r"the latent became NaN .*; try a smaller strength of lora or dtype float32$"):
        image(sd3.load(small_model, device="cpu", dtype="bfloat16", lora=strong))
    pipe = sd3.load(small_model, device="cpu")
    plain = image(pipe).tobytes()
    with pytest.raises(Mistake, match="NaN or infinite"):
        pipe.set_lora(bad)
    assert image(pipe).tobytes() == plain


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a.safetensors:x", "its strength must be a number"),
        ("a.safetensors:nan", "its strength must be a number"),
        ("a.safetensors:", "its strength must be a number"),
        ("a.safetensors:1e9", "its strength must be from -1000.0 to 1000.0"),
        ("a,,b", "a file between two commas is missing"),
        ({"a": 1}, "must be FILE"),
        (3, "must be FILE"),
        ([3], "must be FILE"),
        (["a", None], "its strength must be a number"),
        ("a/x,b/x", "has the same name as another file of this flag"),
        ("a/x,./b/../b/x", "has the same name as another file of this flag"),
        ("a\0b", "null character"),
        (",".join(f"{i}.s" for i in range(101)), "names more than 100 files"),
    ],
)
def test_values_that_are_refused(value, why):
    with pytest.raises(Mistake, match=why):
        read_patch_files("lora", value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_set_lora_that_fails_half_way_changes_nothing(small_model, whole_lora, monkeypatch, dtype):
    pipe = sd3.load(small_model, device="cpu", dtype=dtype)
    plain = image(pipe)

    def full(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.engine.network), "_fill", full)
        with pytest.raises(MemoryError):
            pipe.set_lora(whole_lora)
    assert pipe.engine.setup.lora is None
    assert np.array_equal(image(pipe), plain)
    pipe.set_lora(whole_lora)
    assert np.array_equal(image(pipe), image(sd3.load(small_model, device="cpu", dtype=dtype, lora=whole_lora)))


def test_loras_do_not_change_under_images_that_are_being_made(small_model, whole_lora):
    pipe = sd3.load(small_model, device="cpu", dtype="float32")
    values = {"seed": 1, "steps": 1, "width": 64, "height": 48}
    making = pipe.stream(["a star", "a circle"], **values)
    next(making)
    with pytest.raises(Busy):
        pipe.set_lora(whole_lora)
    assert len(list(making)) == 1
    planned = pipe.stream("a star", **values)
    pipe.set_lora(whole_lora)
    with pytest.raises(Mistake, match="lora: was changed since these images were planned"):
        next(planned)
    assert len(list(pipe.stream("a star", **values))) == 1


def test_a_folder_of_an_adapter_stands_for_its_weights_and_configuration_alone(tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-1/adapter_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert {path.name for path in contents(tmp_path)} == {"adapter_model.safetensors", "adapter_config.json"}
    assert all(path.parent == tmp_path for path in contents(tmp_path))
