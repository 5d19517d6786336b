"""Reading weight files: dtypes, strictness, places, and one clear error per file."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from helpers import T5_SMALL, TOKENIZERS, controlnet_tensors, mmdit_config, modules, randomise, relative, tensors_of
from safetensors.torch import load_file, save_file

import sd3.weights
from mmditx import MMDiT, MMDiTConfig
from other_impls import T5
from sd3.diffusers_names import StoredAs
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX, WeightFile
from sd3.weights import ModelTensors, Patch, on_meta
from sd3_infer import SD3Inferencer


def engine(path, **options) -> SD3Inferencer:
    out = SD3Inferencer()
    out.tell.quiet = True
    return out.load(str(path), device="cpu", **({"dtype": "float32"} | options))


def loaded(path, dtype=torch.float32) -> MMDiT:
    part = ModelTensors(WeightFile(path), MMDIT_PREFIX)
    config = part.config(MMDiTConfig.from_shapes, "an MMDiT")
    return part.load_into(on_meta(lambda: MMDiT(config)), "cpu", dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_stored_dtype_loads_as_any_compute_dtype(tmp_path, stored, wanted):
    source = tensors_of({MMDIT_PREFIX: randomise(MMDiT(mmdit_config()), 0)}, stored)
    save_file(source, tmp_path / "m.safetensors")
    model = loaded(tmp_path / "m.safetensors", wanted)
    for name, value in model.state_dict().items():
        assert value.dtype == wanted
        assert torch.equal(value, source[MMDIT_PREFIX + name].to(wanted)), name


def test_scaled_float8(tmp_path):
    original = randomise(T5(T5_SMALL), 3).state_dict()
    stored, tolerance = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, 0.05
    for name, value in original.items():
        value = value * 300.0 if value.ndim == 2 and "SelfAttention.q" in name else value
        if value.ndim == 2 and "relative" not in name and "embed" not in name:
            scale = value.abs().max() / 448
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            stored[name] = value.to(torch.float16)
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    part = ModelTensors(WeightFile(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors"))
    model = on_meta(lambda: T5(T5_SMALL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part.check(model)
    part.load_into(model, "cpu", torch.float32)
    for name, value in model.state_dict().items():
        factor = 300.0 if "SelfAttention.q" in name else 1.0
        assert relative(value, original[name] * factor) < tolerance, name


def test_a_weight_that_keeps_its_dtype_is_the_mapping_itself(tmp_path):
    save_file(tensors_of({MMDIT_PREFIX: randomise(MMDiT(mmdit_config(width=256)), 0)}), tmp_path / "m.safetensors")
    model = loaded(tmp_path / "m.safetensors", torch.float32)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mappings are looked up in /proc")
    address = model.joint_blocks[0].x_block.mlp.fc1.weight.data_ptr()
    for line in maps.read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith("m.safetensors")
            break
    else:
        pytest.fail("the weight lies in no mapping")


def test_missing_and_wrong_tensors_are_listed_in_one_error(tmp_path, small_model):
    tensors = load_file(small_model)
    for name in ("final_layer.linear.weight", "joint_blocks.1.x_block.attn.proj.bias"):
        del tensors[MMDIT_PREFIX + name]
    tensors[MMDIT_PREFIX + "joint_blocks.2.x_block.mlp.fc2.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="tensors do not fit") as error:
        engine(tmp_path / "broken.safetensors")
    text = str(error.value)
    assert "2 missing" in text
    assert "final_layer.linear.weight" in text
    assert "joint_blocks.1.x_block.attn.proj.bias" in text
    assert "fc2.bias has 5, needs 128" in text


def test_harmless_extras_pass_and_unknown_ones_are_named(tmp_path, small_model):
    tensors = load_file(small_model)
    tensors[ENCODER_PREFIX.format("clip_l") + "text_model.embeddings.position_ids"] = torch.arange(16)
    tensors[ENCODER_PREFIX.format("clip_l") + "logit_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "m.safetensors")
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(tmp_path / "m.safetensors")
    tensors[MMDIT_PREFIX + "joint_blocks.0.mystery"] = torch.ones(1)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=r"not used, unknown: joint_blocks\.0\.mystery"):
        engine(tmp_path / "m.safetensors")


def write_raw(path, data: bytes):
    path.write_bytes(data)
    return path


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BAD_FILES = {
    "empty": (b"", "is not a safetensors file"),
    "text": (b"not a model at all, just some words", "is not a safetensors file"),
    "pickle": (b"PK\x03\x04" + b"\0" * 100, "pickled checkpoints are not loaded"),
    "cut in its header": (struct.pack("<Q", 5000) + b'{"a":', "is truncated"),
    "cut in its data": (
        header({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}) + b"\0" * 10,
        "is truncated",
    ),
    "damaged header": (struct.pack("<Q", 10) + b"{{{{{{{{{{", "its header is damaged"),
    "no tensors": (header({}), "holds no usable tensors"),
    "sizes that lie": (
        header({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 8]}}) + b"\0" * 8,
        "its header is damaged",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    data, message = BAD_FILES[case]
    path = write_raw(tmp_path / "bad.safetensors", data)
    with pytest.raises(ValueError, match=message) as error:
        engine(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 encoder"),
        ("decoder.up.0.block.0.conv1.weight", "a VAE"),
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", "an SD 1, SD 2 or SDXL model"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
        ("lora_unet_x.lora_down.weight", "a LoRA"),
    ],
)
def test_a_file_of_another_model_is_called_what_it_is(tmp_path, name, kind):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an SD3 or") as error:
        engine(tmp_path / "other.safetensors")
    assert kind in str(error.value)


def split_folder(folder, below="", t5="t5xxl_fp16.safetensors", embedding="encoder.embed_tokens.weight"):
    """A models folder as people have it: model, encoders and tokenizers apart."""
    parts = modules()
    place = folder / below
    place.mkdir(parents=True, exist_ok=True)
    own = {k: v for k, v in parts.items() if not k.startswith("text_encoders")}
    save_file(tensors_of(own), folder / "model.safetensors")
    for role, name in (("clip_l", "clip_l.safetensors"), ("clip_g", "clip_g.safetensors"), ("t5xxl", t5)):
        tensors = tensors_of({"": parts[ENCODER_PREFIX.format(role)]})
        if role == "t5xxl":
            weight = tensors.pop("encoder.embed_tokens.weight")
            for name_ in embedding.split("+"):
                tensors[name_] = weight.clone()
        if role == "clip_l":
            del tensors["text_projection.weight"]  # such files exist; it is not used for L
        save_file(tensors, place / name)
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, place / name, dirs_exist_ok=True)
    return folder / "model.safetensors"


@pytest.mark.parametrize("below", ["", "text_encoders"])
@pytest.mark.parametrize("t5", ["t5xxl.safetensors", "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"])
@pytest.mark.parametrize(
    "embedding", ["encoder.embed_tokens.weight", "shared.weight", "shared.weight+encoder.embed_tokens.weight"]
)
def test_encoders_are_found_wherever_they_lie(tmp_path, small_engine, below, t5, embedding):
    path = split_folder(tmp_path, below, t5, embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = engine(path).get_cond("a red circle")
    for ours, wanted in zip(got, small_engine.get_cond("a red circle"), strict=True):
        assert relative(ours, wanted) < 1e-6  # not bit for bit: the mapping's alignment differs between files


def test_a_whole_float8_t5_runs(tmp_path, small_engine):
    """Plain float8, as the hub has it: the embedding too."""
    path = split_folder(tmp_path, "text_encoders", "t5xxl_fp8_e4m3fn.safetensors")
    file = tmp_path / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items()}, file)
    got = engine(path).get_cond("a red circle")[0]
    assert relative(got, small_engine.get_cond("a red circle")[0]) < 0.2
    assert relative(got[:, :16], small_engine.get_cond("a red circle")[0][:, :16]) < 1e-6


def test_a_second_load_forgets_the_first(tmp_path, small_model):
    both = engine(small_model)
    first = both.get_cond("a star")[0], both.engine.network.mmdit
    tensors = {k: v * 0.5 for k, v in load_file(small_model).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    both.load(str(tmp_path / "half.safetensors"), device="cpu", dtype="float32", model_folder=str(small_model.parent))
    assert not torch.equal(both.get_cond("a star")[0], first[0])
    assert both.engine.network.mmdit is not first[1]


@pytest.mark.parametrize(("kind", "steps"), [("8b", 60), ("2b", 4)])
def test_a_large_controlnet_of_any_name_brings_its_settings(small_model, kind, steps):
    net = small_model.parent / f"control_{kind}.safetensors"
    assert engine(small_model, controlnet_ckpt=str(net)).engine.defaults["steps"] == steps


def test_model_folder_is_searched_first(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    split_folder(elsewhere)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(elsewhere / "model.safetensors", alone)
    engine(alone / "model.safetensors", model_folder=str(elsewhere))
    with pytest.raises(FileNotFoundError, match="no clip_l") as error:
        engine(alone / "model.safetensors", model_folder=str(alone))
    assert f"{alone}/text_encoders/" in str(error.value)
    assert "hf download" in str(error.value)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("clip_g.safetensors", "no clip_g.safetensors in"),
        ("t5xxl_fp16.safetensors", "or give no_t5"),
        ("tokenizer", "no tokenizer"),
        ("tokenizer_3", "no tokenizer"),
    ],
)
def test_what_is_missing_is_said_with_the_command_that_gets_it(tmp_path, gone, message):
    path = split_folder(tmp_path)
    target = tmp_path / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(FileNotFoundError, match="get it with: hf download") as error:
        engine(path)
    assert message in str(error.value)


def test_no_t5_needs_neither_encoder_nor_tokenizer(tmp_path):
    path = split_folder(tmp_path)
    (tmp_path / "t5xxl_fp16.safetensors").unlink()
    shutil.rmtree(tmp_path / "tokenizer_3")
    context, _ = engine(path, no_t5=True).get_cond("a red circle")
    assert context.shape == (1, 32, 160)
    assert not context[:, 16:].any()
    assert context[:, :16, :128].any()


def test_a_separate_vae_and_a_model_without_one(tmp_path, small_model):
    tensors = load_file(small_model)
    own = {k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    save_file(own, tmp_path / "sd3_vae.safetensors")
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, tmp_path / name)
    rest = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    save_file(rest, tmp_path / "bare.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no VAE; give one with vae"):
        engine(tmp_path / "bare.safetensors")
    vae = engine(tmp_path / "bare.safetensors", vae=str(tmp_path / "sd3_vae.safetensors")).engine.pixels.vae
    assert torch.equal(vae.encoder.conv_in.weight, own["encoder.conv_in.weight"])
    with pytest.raises(ValueError, match="is not a VAE: it looks like an SD3-type MMDiT"):
        engine(tmp_path / "bare.safetensors", vae=str(tmp_path / "bare.safetensors"))


def test_an_mmdit_without_prefix_loads(tmp_path, small_model):
    tensors = {k.removeprefix(MMDIT_PREFIX): v for k, v in load_file(small_model).items() if k.startswith(MMDIT_PREFIX)}
    save_file(tensors, tmp_path / "bare.safetensors")
    got = engine(tmp_path / "bare.safetensors", vae=str(small_model), load_tokenizers=False).engine.network.mmdit
    assert torch.equal(got.pos_embed, tensors["pos_embed"])


def test_controlnets_of_another_model_are_refused(tmp_path, small_model):
    tensors = controlnet_tensors(mmdit_config(width=192, pooled_width=256), chained=True)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="has width 192, the model has 128"):
        engine(small_model, controlnet_ckpt=str(tmp_path / "wide.safetensors"))
    with pytest.raises(ValueError, match="is not an SD3 ControlNet"):
        engine(small_model, controlnet_ckpt=str(small_model))


def test_encoders_of_another_width_are_refused(tmp_path, small_model):
    tensors = load_file(small_model)
    config = mmdit_config(pooled_width=96)
    old = {k: v for k, v in tensors.items() if not k.startswith(MMDIT_PREFIX)}
    save_file(old | tensors_of({MMDIT_PREFIX: randomise(MMDiT(config), 0)}), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"64 \+ 64, the model needs 96: wrong text encoders"):
        engine(tmp_path / "m.safetensors")


def test_the_sizes_are_read_off_the_tensors(small_model):
    part = ModelTensors(WeightFile(small_model), MMDIT_PREFIX)
    assert part.config(MMDiTConfig.from_shapes, "") == mmdit_config()


def test_chunked_reading_gives_every_tensor_once(small_model, monkeypatch):
    part = ModelTensors(WeightFile(small_model), MMDIT_PREFIX)
    monkeypatch.setattr(sd3.weights, "CHUNK", 10_000)
    names = list(part.shapes)
    got = dict(part.read(names, "cpu", torch.float32))
    assert sorted(got) == sorted(names)
    source = load_file(small_model)
    assert all(torch.equal(got[n], source[MMDIT_PREFIX + n]) for n in names)


def test_patches_come_after_scales_and_joining_in_float32_and_are_rounded_once(tmp_path):
    draw = torch.Generator().manual_seed(2)
    stored = {
        "q.weight": torch.randn(4, 8, generator=draw).to(torch.float8_e4m3fn),
        "q.scale_weight": torch.tensor([3.7]),
        "k.weight": torch.randn(2, 8, generator=draw).half(),
        "other.weight": torch.randn(3, 8, generator=draw),
    }
    save_file(stored, tmp_path / "m.safetensors")
    layout = {"qk.weight": StoredAs(("q.weight", "k.weight"), "swap")}
    added = torch.randn(6, 8, generator=draw) / 300  # below the last bit of many a sum in bfloat16
    twice = [
        Patch({"qk.weight": lambda weight: weight + added}, "a"),
        Patch({"qk.weight": lambda weight: weight * 2}, "b"),
    ]
    part = ModelTensors(WeightFile(tmp_path / "m.safetensors"), "", layout, tuple(twice))
    exact = torch.cat([stored["q.weight"].float() * 3.7, stored["k.weight"].float()])
    exact = (torch.cat(exact.chunk(2)[::-1]) + added) * 2
    got = dict(part.read(["qk.weight", "other.weight"], "cpu", torch.bfloat16))
    assert torch.equal(got["qk.weight"], exact.bfloat16())
    plain = dict(ModelTensors(part.file, "", layout).read(["qk.weight"], "cpu", torch.bfloat16))["qk.weight"]
    assert not torch.equal(((plain + added.bfloat16()) * 2), exact.bfloat16())  # what rounding at each step would give
    assert torch.equal(got["other.weight"], stored["other.weight"].bfloat16())
    assert part.not_finite() == ""
