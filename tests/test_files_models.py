"""Weight files as people have them: scales, shards, prefixes, names, layouts, dtypes; and what is wrong inside them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import to_diffusers
import torch
from helpers import CLIP_L, T5_SMALL, TOKENIZERS, controlnet_tensors, mmdit_config, modules, randomise, relative
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import sd3.find
import sd3_infer
from dit_embedder import ControlNet, ControlNetConfig
from mmditx import MMDiT, MMDiTConfig
from other_impls import CLIP, T5
from sd3.files import ENCODER_PREFIX, ENCODERS, MMDIT_PREFIX, VAE_PREFIX, WeightFile, weight_files
from sd3.mistakes import Mistake
from sd3.weights import find_controlnet, find_mmdit, on_meta
from sd3_infer import SD3Inferencer

META = {"width": "64", "height": "48", "steps": "2"}


def engine(path, **options) -> SD3Inferencer:
    out = SD3Inferencer()
    out.tell.quiet = True
    return out.load(str(path), device="cpu", **({"dtype": "float32"} | options))


def text(path, **options) -> torch.Tensor:
    return engine(path, **options).get_cond("a red circle")[0]


def place(folder: Path, tensors, name="m.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    for kind in ("tokenizer", "tokenizer_3"):
        if not (folder / kind).exists():
            (folder / kind).symlink_to(TOKENIZERS / kind)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, META)
    return folder / name


@pytest.fixture(scope="module")
def whole(small_model) -> dict[str, torch.Tensor]:
    return load_file(small_model)


def encoder(whole, role) -> dict[str, torch.Tensor]:
    prefix = ENCODER_PREFIX.format(role)
    return {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}


def without_encoders(whole) -> dict[str, torch.Tensor]:
    return {k: v for k, v in whole.items() if not k.startswith("text_encoders.")}


# ---- float8 and its scales -----------------------------------------------------------------------

SPELLINGS = {
    "one number": ("scale_weight", lambda s: s.max().reshape(1)),
    "no dimension": ("weight_scale", lambda s: s.max().reshape(())),
    "a number a row": ("weight_scale", lambda s: s[:, 0]),
    "a column": ("scale_weight", lambda s: s),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scales_of_float8_weights(tmp_path, whole, spelling, stored):
    leaf, shape = SPELLINGS[spelling]
    tensors, truth = {}, {}
    for name, value in whole.items():
        if value.ndim == 2 and name.endswith(("mlp.fc1.weight", "attn.qkv.weight", "SelfAttention.q.weight")):
            rows = value.abs().amax(dim=1, keepdim=True) / 400
            scale = shape(rows)
            factor = scale.reshape(-1, 1) if scale.numel() > 1 else scale
            tensors[name] = (value / factor).to(stored)
            stem = name.removesuffix("weight")
            tensors[stem + leaf] = scale
            tensors[stem + "comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            truth[name] = tensors[name].float() * factor
    path = place(tmp_path, whole | tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = engine(path)
    got = dict(made.engine.network.part.read(list(made.engine.network.part.shapes), "cpu", torch.float32))
    for name, value in truth.items():
        if name.startswith(MMDIT_PREFIX):
            assert torch.equal(got[name.removeprefix(MMDIT_PREFIX)], value), name
    assert (
        relative(made.get_cond("a star")[0], engine(place(tmp_path / "t", whole | truth)).get_cond("a star")[0]) < 1e-6
    )


@pytest.mark.parametrize(
    ("leaf", "scale", "wrong"),
    [
        ("weight_scale", torch.ones(4, 2), "weight_scale has 4x2, needs a single number or"),
        ("scale_weight", torch.ones(3), "scale_weight has 3, needs a single number or"),
        ("weight_scale", torch.ones(1, dtype=torch.int32), "weight_scale is I32"),
        ("weight_scale_inv", torch.ones(1), "weight_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, whole, leaf, scale, wrong):
    name = MMDIT_PREFIX + "joint_blocks.1.x_block.mlp.fc1."
    with pytest.raises(Mistake, match="unsupported scales") as error:
        engine(place(tmp_path, whole | {name + leaf: scale}))
    assert wrong in str(error.value)


class NoFloat8(TorchDispatchMode):
    """`meta` stands for a device without float8 and float64, such as Apple's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            assert out.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float64)
        return out


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_device_without_float8_gets_what_it_has(tmp_path, whole, stored, scaled):
    tensors = {k: v.to(stored) if v.ndim == 2 else v for k, v in whole.items() if k.startswith(MMDIT_PREFIX)}
    if scaled:
        tensors |= {
            k[:-6] + "weight_scale": torch.ones(())
            for k, v in tensors.items()
            if v.dtype == stored and k.endswith(".weight")
        }
    save_file(tensors, tmp_path / "m.safetensors")
    part = find_mmdit(WeightFile(tmp_path / "m.safetensors"))
    model = on_meta(lambda: MMDiT(part.config(MMDiTConfig.from_shapes, "an SD3 model")))
    with NoFloat8():
        part.load_into(model, torch.device("meta"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- dtypes that hold no weights -----------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.uint16], ids=str
)
@pytest.mark.parametrize(
    "name",
    [
        MMDIT_PREFIX + "joint_blocks.3.x_block.mlp.fc1.weight",
        VAE_PREFIX + "decoder.conv_in.bias",
        ENCODER_PREFIX.format("clip_l") + "text_model.final_layer_norm.weight",
        ENCODER_PREFIX.format("t5xxl") + "encoder.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("weights", ["full", "int8"])
def test_weights_without_a_point_are_refused_by_name(tmp_path, whole, capsys, dtype, name, weights):
    path = place(tmp_path, whole | {name: whole[name].to(dtype)})
    words = ["--model", str(path), "--prompt", "red", "--device", "cpu", "--weights", weights]
    assert sd3_infer.main([*words, "--out_dir", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --model {path}: ")
    assert f"{name} is " in line
    assert not (tmp_path / "o").exists()


def test_eight_bits_need_weights_with_a_point():
    from sd3.layers import quantise

    with pytest.raises(TypeError, match=r"torch\.int8"):
        quantise(torch.ones(2, 2, dtype=torch.int8), "int8")


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    return to_diffusers.folder(
        tmp_path_factory.mktemp("layout") / "plain", modules(mmdit_config(mlp_width=512)), TOKENIZERS
    )


def as_variant(folder: Path, stem: str, name: str) -> None:
    """Shards of a component with another naming: `{variant}` in place of the plain name's end."""
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
    new = {
        n: name.format(number=n.removeprefix(f"{stem}-").removesuffix(".safetensors"))
        for n in index["weight_map"].values()
    }
    for before, after in new.items():
        (folder / before).rename(folder / after)
    index["weight_map"] = {k: new[v] for k, v in index["weight_map"].items()}
    (folder / f"{stem}.safetensors.index.json").unlink()
    (folder / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["model.fp16-{number}.safetensors", "model-{number}.fp16.safetensors"])
def test_the_fp16_variant_alone(tmp_path, layout, name):
    folder = tmp_path / "fp16"
    shutil.copytree(layout, folder, symlinks=True)
    as_variant(folder / "text_encoder_3", "model", name)
    as_variant(folder / "transformer", "diffusion_pytorch_model", name.replace("model", "diffusion_pytorch_model", 1))
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").rename(folder / part / "model.fp16.safetensors")
    got, wanted = engine(folder), engine(layout)
    assert relative(got.get_cond("a star")[0], wanted.get_cond("a star")[0]) < 1e-6
    assert got.engine.network.part.shapes == wanted.engine.network.part.shapes


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        ('{"weight_map": {"a": 5}}', "a is said to be in 5"),
        ('{"weight_map": {"a": null}}', "a is said to be in None"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "which is not a file in that folder"),
        ('{"weight_map": {"a": ["x"]}}', "a is said to be in"),
        ('{"weight_map": {"a": ""}}', "which is not a file in that folder"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[]", "no weight_map"),
        ("{", "is damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "is damaged"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, index, wrong):
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    with pytest.raises(Mistake) as error:
        weight_files(tmp_path, "model")
    assert wrong in str(error.value)
    assert str(error.value).startswith(f"model {tmp_path}/model.safetensors.index.json: is damaged")


def test_shards_without_an_index_are_said(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="no index that names all shards"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ('{"shift": 2.5}', 2.5),
        ('{"shift": 2}', 2.0),
        ('{"shift": null}', 3.0),
        ('{"shift": [1]}', 3.0),
        ('{"shift": true}', 3.0),
        ('{"shift": -1}', 3.0),
        ('{"shift": NaN}', 3.0),
        ("[1]", 3.0),
        ("5", 3.0),
    ],
)
def test_a_schedulers_configuration_may_hold_anything(tmp_path, layout, config, shift):
    folder = tmp_path / "m"
    shutil.copytree(layout, folder, symlinks=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(config)
    assert engine(folder, load_tokenizers=False).shift == shift


@pytest.mark.parametrize("config", ["{", "[" * 100_000, "\udcff"])
def test_a_damaged_schedulers_configuration_is_said(tmp_path, layout, config):
    folder = tmp_path / "m"
    shutil.copytree(layout, folder, symlinks=True)
    (folder / "scheduler" / "scheduler_config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    with pytest.raises(Mistake, match=r"^model .*scheduler_config\.json: is damaged"):
        engine(folder, load_tokenizers=False)


# ---- prefixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.", "transformer.", "net.model.", "model.diffusion_model.", ""]
)
def test_an_mmdit_behind_any_prefix(tmp_path, whole, prefix):
    tensors = {prefix + k.removeprefix(MMDIT_PREFIX) if k.startswith(MMDIT_PREFIX) else k: v for k, v in whole.items()}
    path = place(tmp_path, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = engine(path).engine.network.mmdit
    assert torch.equal(got.pos_embed, whole[MMDIT_PREFIX + "pos_embed"])


@pytest.mark.parametrize("prefix", ["vae.", "autoencoder.", "model.vae.", "first_stage_model.", ""])
@pytest.mark.parametrize("alone", [True, False])
def test_a_vae_behind_any_prefix(tmp_path, small_model, whole, prefix, alone):
    own = {prefix + k.removeprefix(VAE_PREFIX): v for k, v in whole.items() if k.startswith(VAE_PREFIX)}
    if alone:
        save_file(own, tmp_path / "v.safetensors")
        got = engine(small_model, vae=str(tmp_path / "v.safetensors"), load_tokenizers=False)
    else:
        got = engine(place(tmp_path, {k: v for k, v in whole.items() if not k.startswith(VAE_PREFIX)} | own))
    assert torch.equal(got.engine.pixels.vae.encoder.conv_in.weight, whole[VAE_PREFIX + "encoder.conv_in.weight"])


def test_diffusers_names_behind_a_prefix(tmp_path, small_model, whole):
    parts = modules()
    own = {
        f"transformer.{k}": v.detach().contiguous() for k, v in to_diffusers.transformer(parts[MMDIT_PREFIX]).items()
    }
    own |= {f"vae.{k}": v.detach().contiguous() for k, v in to_diffusers.vae(parts[VAE_PREFIX]).items()}
    got = engine(place(tmp_path, {k: v for k, v in whole.items() if k.startswith("text_encoders.")} | own))
    for name, value in parts[MMDIT_PREFIX].state_dict().items():
        assert torch.equal(dict(got.engine.network.part.read([name], "cpu", None))[name], value), name
    assert torch.equal(got.engine.pixels.vae.encoder.conv_in.weight, whole[VAE_PREFIX + "encoder.conv_in.weight"])


@pytest.mark.parametrize("form", ["text_encoders.{}.", "{}.transformer.", "cond.{}.model."])
def test_encoders_behind_other_prefixes(tmp_path, whole, small_engine, form):
    tensors = without_encoders(whole)
    for role in ENCODERS:
        tensors |= {form.format(role) + k: v for k, v in encoder(whole, role).items()}
    assert relative(text(place(tmp_path, tensors)), small_engine.get_cond("a red circle")[0]) < 1e-6


def test_the_copy_that_training_averaged_is_not_taken(tmp_path, whole):
    own = {k.removeprefix(MMDIT_PREFIX): v for k, v in whole.items() if k.startswith(MMDIT_PREFIX)}
    tensors = {k: v for k, v in whole.items() if not k.startswith(MMDIT_PREFIX)}
    tensors |= {f"ema.{k}": v * 2 for k, v in own.items()} | {f"net.{k}": v for k, v in own.items()}
    assert torch.equal(engine(place(tmp_path, tensors)).engine.network.mmdit.pos_embed, own["pos_embed"])


# ---- text encoders under other names -------------------------------------------------------------

NAMES = {
    "clip": {
        "clip_l": "clip/clip_l.safetensors",
        "clip_g": "clip/clip_g.safetensors",
        "t5xxl": "clip/t5xxl_fp16.safetensors",
    },
    "another T5": {"t5xxl": "google_t5-v1_1-xxl_encoderonly-fp8_e4m3fn.safetensors"},
    "e5m2": {"t5xxl": "text_encoders/t5xxl_fp8_e5m2.safetensors"},
    "another L": {"clip_l": "text_encoders/ViT-L-14-TEXT.safetensors"},
    "another G": {"clip_g": "clip/open_clip.safetensors"},
    "named in part": {"clip_l": "my-clip-l.safetensors", "clip_g": "my-clip-g.safetensors"},
}


def split(folder: Path, whole, names=None, prefix="") -> Path:
    names = {"clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors", "t5xxl": "t5xxl.safetensors"} | (
        names or {}
    )
    path = place(folder, without_encoders(whole))
    for role, name in names.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({prefix + k: v for k, v in encoder(whole, role).items()}, folder / name)
    return path


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_encoders_are_known_by_what_they_hold(tmp_path, whole, small_engine, case, prefix):
    path = split(tmp_path, whole, NAMES[case], prefix)
    save_file({"lora_down.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"<html>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(text(path), small_engine.get_cond("a red circle")[0]) < 1e-6


def test_a_known_name_comes_first(tmp_path, whole, small_engine):
    path = split(tmp_path, whole)
    save_file({k: v * 2 for k, v in encoder(whole, "t5xxl").items()}, tmp_path / "a_t5.safetensors")
    assert relative(text(path), small_engine.get_cond("a red circle")[0]) < 1e-6


@pytest.mark.parametrize(("role", "names"), [("t5xxl", ("one", "two")), ("clip_l", ("a", "b"))])
def test_two_that_fit_are_one_line_with_the_flag(tmp_path, whole, capsys, role, names):
    path = split(tmp_path, whole)
    for name in names:
        save_file(encoder(whole, role), tmp_path / f"{name}.safetensors")
    (tmp_path / f"{role}.safetensors").unlink()
    words = ["--model", str(path), "--prompt", "x", "--device", "cpu", "--out_dir", str(tmp_path / "o")]
    assert sd3_infer.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --{role}: ")
    assert all(str(tmp_path / f"{name}.safetensors") in line for name in names)
    assert (
        engine(path, **{role: str(tmp_path / f"{names[1]}.safetensors")}).engine.text.record()[role]["name"]
        == f"{names[1]}.safetensors"
    )


@pytest.mark.parametrize("role", ENCODERS)
def test_a_flag_names_an_encoder_over_the_model_files_own(tmp_path, small_model, whole, small_engine, role):
    other = {k: v * 0.5 for k, v in encoder(whole, role).items()}
    save_file(other, tmp_path / "mine.safetensors")
    made = engine(small_model, **{role: str(tmp_path / "mine.safetensors")})
    told = made.engine.text.record()[role]
    assert (told["name"], told["bytes"]) == ("mine.safetensors", (tmp_path / "mine.safetensors").stat().st_size)
    assert {"clip_l", "clip_g", "t5xxl"} & made.engine.text.record().keys() == {role}
    assert relative(made.get_cond("a star")[0], small_engine.get_cond("a star")[0]) > 1e-3
    save_file(encoder(whole, role), tmp_path / "same.safetensors")
    same = text(small_model, **{role: str(tmp_path / "same.safetensors")})
    assert relative(same, small_engine.get_cond("a red circle")[0]) < 1e-6


def test_the_flag_is_in_the_runs_record_and_replay_finds_it(tmp_path, small_model, whole, capsys):
    save_file({k: v * 0.5 for k, v in encoder(whole, "t5xxl").items()}, tmp_path / "mine.safetensors")
    base = ["--out_dir", str(tmp_path / "o"), "--device", "cpu"]
    words = [
        "--model",
        str(small_model),
        "--steps",
        "1",
        "--seed",
        "1",
        "--prompt",
        "x",
        "--t5xxl",
        str(tmp_path / "mine.safetensors"),
    ]
    assert sd3_infer.main([*words, *base, "--dtype", "float32"]) == 0
    (picture,) = (tmp_path / "o").rglob("000000.png")
    flags = json.loads((picture.parent / "run.json").read_text())["flags"]
    assert flags["t5xxl"] == str(tmp_path / "mine.safetensors")
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(picture), *base]) == 0
    assert "bit for bit" in capsys.readouterr().err


def test_an_encoder_of_another_kind_is_called_what_it_is(tmp_path, small_model, whole):
    save_file(encoder(whole, "t5xxl"), tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match=r"^clip_l .*is not a CLIP text encoder: it looks like a T5 encoder"):
        engine(small_model, clip_l=str(tmp_path / "t5.safetensors"))


@pytest.mark.parametrize(("role", "more"), [("clip_l", 32), ("clip_g", 5)])
def test_a_clip_with_more_positions(tmp_path, whole, small_engine, role, more):
    name = ENCODER_PREFIX.format(role) + "text_model.embeddings.position_embedding.weight"
    longer = torch.cat([whole[name], torch.randn(more, whole[name].shape[1])])
    assert relative(text(place(tmp_path, whole | {name: longer})), small_engine.get_cond("a red circle")[0]) < 1e-6


# ---- ControlNets in diffusers' layout ------------------------------------------------------------


def peer_controlnet(base: MMDiTConfig, **changes):
    diffusers = pytest.importorskip("diffusers")
    sizes = {
        "sample_size": 24, "patch_size": 2, "in_channels": 16, "num_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": base.heads, "caption_projection_dim": base.width,
        "pooled_projection_dim": base.pooled_width,
        "out_channels": 16, "pos_embed_max_size": 12, "joint_attention_dim": None, "pos_embed_type": None,
        "use_pos_embed": False, "force_zeros_for_pooled_projection": False,
    } | changes  # fmt: skip
    net = diffusers.SD3ControlNetModel(**sizes)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "controlnet."])
@pytest.mark.parametrize("folder", [False, True])
def test_a_controlnet_of_diffusers_gives_its_states(tmp_path, small_model, prefix, folder):
    base_config = mmdit_config()
    theirs = peer_controlnet(base_config)
    if folder and not prefix:
        theirs.save_pretrained(tmp_path / "net")
        path = tmp_path / "net"
    else:
        path = tmp_path / "net.safetensors"
        save_file({prefix + k: v.contiguous() for k, v in theirs.state_dict().items()}, path)
    made = engine(small_model, controlnet_ckpt=str(path), load_tokenizers=False)
    assert made.engine.network.large_controlnet
    ours, base = made.engine.network.controlnet, made.engine.network.mmdit
    draw = torch.Generator().manual_seed(4)
    x, control = torch.randn(2, 16, 8, 6, generator=draw), torch.randn(2, 16, 8, 6, generator=draw)
    t, y = torch.tensor([700.0, 300.0]), torch.randn(2, base_config.pooled_width, generator=draw)
    states = ours(base, x, t, y, control, 0.7)
    wanted = theirs(base.embed_image(x), control, 0.7, None, y, t, return_dict=False)[0]
    for a, b in zip(states, wanted, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"joint_attention_dim": 160, "pos_embed_type": "sincos", "use_pos_embed": True}, "with text blocks"),
        ({"pos_embed_type": "sincos", "use_pos_embed": True}, "with its own position embedding"),
    ],
)
def test_other_layouts_are_refused_with_those_that_load(tmp_path, small_model, capsys, changes, why):
    save_file(peer_controlnet(mmdit_config(), **changes).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(Mistake, match=f"^controlnet_ckpt .*{why}.*supported: those that") as error:
        engine(small_model, controlnet_ckpt=str(tmp_path / "net.safetensors"))
    assert "\n" not in str(error.value)


def test_a_controlnet_of_sd_1_is_called_so(tmp_path, small_model):
    save_file({"input_hint_block.0.weight": torch.ones(2, 2)}, tmp_path / "net.safetensors")
    with pytest.raises(Mistake, match="is a ControlNet for SD 1"):
        engine(small_model, controlnet_ckpt=str(tmp_path / "net.safetensors"))


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.tensor([True]), torch.ones(0), torch.ones(1, dtype=torch.complex64)]
)
def test_a_control_type_that_is_no_number(tmp_path, small_model, value):
    save_file(controlnet_tensors(mmdit_config(), True) | {"control_type": value}, tmp_path / "net.safetensors")
    with pytest.raises(Mistake, match="its control_type is not a number"):
        engine(small_model, controlnet_ckpt=str(tmp_path / "net.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7.0, 0.5])
def test_an_unknown_control_type_is_none(tmp_path, small_model, value):
    from sd3.weights import read_control_kind

    save_file(
        controlnet_tensors(mmdit_config(), True) | {"control_type": torch.tensor([value])}, tmp_path / "net.safetensors"
    )
    part = find_controlnet(WeightFile(tmp_path / "net.safetensors"))
    part.check(on_meta(lambda: ControlNet(part.config(ControlNetConfig.from_shapes, "x"), True)))
    assert read_control_kind(part) == ""


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        MMDIT_PREFIX + "joint_blocks.2.x_block.mlp.fc2.weight",
        VAE_PREFIX + "decoder.conv_in.weight",
        ENCODER_PREFIX.format("clip_g") + "text_model.final_layer_norm.bias",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weight_that_is_no_number_is_the_files_damage(tmp_path, whole, capsys, name, value, dtype):
    tensor = whole[name].clone()
    tensor.view(-1)[3] = value
    path = place(tmp_path, whole | {name: tensor})
    words = [
        "--model",
        str(path),
        "--prompt",
        "red",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        "--out_dir",
        str(tmp_path / "o"),
    ]
    assert sd3_infer.main(words) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"--model {path}: {name} holds NaN or infinity" in line
    assert "--dtype" not in line


@pytest.mark.parametrize("prefix", [MMDIT_PREFIX, VAE_PREFIX, ENCODER_PREFIX.format("t5xxl")])
def test_a_download_that_never_filled_is_refused(tmp_path, whole, capsys, prefix):
    path = place(tmp_path, {k: torch.zeros_like(v) if k.startswith(prefix) else v for k, v in whole.items()})
    words = ["--model", str(path), "--prompt", "red", "--device", "cpu", "--out_dir", str(tmp_path / "o")]
    assert sd3_infer.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "contains only zeros" in line
    assert not (tmp_path / "o").exists()


def test_one_that_filled_in_part_is_noted(tmp_path, whole):
    late = [k for k in whole if k.startswith(MMDIT_PREFIX + "joint_blocks.3.")]
    path = place(tmp_path, whole | {k: torch.zeros_like(whole[k]) for k in late})
    with pytest.warns(UserWarning, match="checked weights contain only zeros"):
        engine(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("joint_blocks.999999.x_block.mlp.fc1.weight", (1,)),
        ("joint_blocks.99999999999999999999.x_block.mlp.fc1.weight", (1,)),
        ("joint_blocks.²³.x_block.mlp.fc1.weight", (1,)),
        ("x_embedder.proj.weight", (128, 0, 2, 2)),
        ("x_embedder.proj.weight", (0, 16, 2, 2)),
        ("x_embedder.proj.weight", (128,)),
        ("x_embedder.proj.weight", (100, 16, 2, 2)),
        ("pos_embed", (1, 0, 128)),
        ("y_embedder.mlp.0.weight", (0, 2**40)),
    ],
)
def test_sizes_of_no_model_are_one_line(tmp_path, whole, capsys, name, shape):
    tensors = dict(whole) | {MMDIT_PREFIX + name: torch.ones(shape)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = sd3_infer.main(
            [
                "--model",
                str(place(tmp_path, tensors)),
                "--prompt",
                "x",
                "--device",
                "cpu",
                "--steps",
                "1",
                "--out_dir",
                str(tmp_path / "o"),
            ]
        )
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert status == (0 if "²" in name else 2)
    if status:
        assert err.startswith(f"error: --model {tmp_path}/m.safetensors: ")


@pytest.mark.parametrize("width", [96, 32])
def test_a_whole_model_whose_heads_do_not_fit(tmp_path, whole, capsys, width):
    """Every shape fits every other; only the attention could not be computed."""
    net = randomise(MMDiT(mmdit_config(width=width, qk_norm=False)), 0)
    tensors = {k: v for k, v in whole.items() if not k.startswith(MMDIT_PREFIX)}
    path = place(tmp_path, tensors | {MMDIT_PREFIX + k: v.detach() for k, v in net.state_dict().items()})
    assert sd3_infer.main(["--model", str(path), "--prompt", "x", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"width {width}, which is not a multiple of 64" in line


@pytest.mark.parametrize("width", [100, 200])
def test_a_clip_whose_heads_do_not_fit(tmp_path, whole, width):
    prefix = ENCODER_PREFIX.format("clip_l")
    net = randomise(CLIP(dataclasses.replace(CLIP_L, width=width)), 0)
    tensors = {k: v for k, v in whole.items() if not k.startswith(prefix)}
    path = place(tmp_path, tensors | {prefix + k: v.detach() for k, v in net.state_dict().items()})
    with pytest.raises(Mistake, match=f"width {width}, which is not a multiple of 64"):
        engine(path)


def test_t5_encoders_that_cannot_be_computed(tmp_path, whole):
    prefix = ENCODER_PREFIX.format("t5xxl")
    for changes in ({"buckets": 2}, {"heads": 5}):
        net = randomise(T5(dataclasses.replace(T5_SMALL, **changes)), 0)
        tensors = {k: v for k, v in whole.items() if not k.startswith(prefix)}
        path = place(tmp_path, tensors | {prefix + k: v.detach() for k, v in net.state_dict().items()})
        with pytest.raises(Mistake, match="no usable relative_attention_bias of"):
            engine(path)


def test_t5_that_is_not_asked_for_is_said(tmp_path, small_model, capsys):
    SD3Inferencer().load(str(small_model), device="cpu", no_t5=True, t5xxl=str(small_model))
    assert "note: t5xxl is not used: no_t5" in capsys.readouterr().err


def test_what_lies_in_a_models_folder_is_listed_whatever_it_is(tmp_path, whole):
    import os

    split(tmp_path, whole, NAMES["clip"])
    (tmp_path / "page.safetensors").write_bytes(b"<!doctype html>")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    listed = sd3_infer_list(tmp_path)
    assert "page.safetensors: is not a safetensors file: it is a web page" in listed
    assert "pipe.safetensors: is not a file" in listed
    assert "folder.safetensors: is a folder" in listed


def sd3_infer_list(folder) -> str:
    return sd3.find.list_models(str(folder))
