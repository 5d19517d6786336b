"""LoRA files that do not fit, or are damaged: one line, status 2, before weights load; and what good ones are."""

from __future__ import annotations

import json
import pickle
import re
import struct
from dataclasses import replace

import lora_writing as writing
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_writing import SPELLINGS, draw, every_module
from safetensors.torch import save, save_file

import sd3_infer
from sd3.engine import Engine
from sd3.files import contents, lora_in
from sd3.find import list_models
from sd3.headers import DTYPE_BITS
from sd3.lora import read_lora
from sd3.lora_file import ROLES, LoraFile, describe
from sd3.mistakes import Mistake
from sd3.readers import PatchFile
from sd3.settings import Setup

KEY = "lora_unet_joint_blocks_0_x_block_attn_proj"
PAIR = {f"{KEY}.lora_down.weight": torch.ones(2, 128), f"{KEY}.lora_up.weight": torch.ones(128, 2)}


@pytest.fixture(scope="module")
def models(small_model):
    return {role: replace(part, patches=()) for role, part in Engine(Setup(model=str(small_model))).parts.items()}


def large(width=2432, blocks=38, prefix="transformer.", names=("attn.to_q",)):
    """Pairs of a rank of 1 for a model of another size."""
    out = {}
    for i in range(blocks):
        for name in names:
            key = f"{prefix}transformer_blocks.{i}.{name}"
            out |= {f"{key}.lora_A.weight": torch.ones(1, width), f"{key}.lora_B.weight": torch.ones(width, 1)}
    return out


def other_lokr():
    """A LoKr of SD3.5 Large, one factor of which is a product of two."""
    out = {}
    for i in range(38):
        for name, rows in (("attn_to_q", 2432), ("ff_net_0_proj", 4 * 2432)):
            key = f"lycoris_transformer_blocks_{i}_{name}"
            out |= {f"{key}.lokr_w1": torch.ones(8, 8), f"{key}.lokr_w2_a": torch.ones(rows // 8, 1)}
            out |= {f"{key}.lokr_w2_b": torch.ones(1, 304), f"{key}.alpha": torch.tensor(1.0)}
    return out


def with_nan(name):
    tensors = {name: tensor.clone() for name, tensor in PAIR.items()} | {f"{KEY}.alpha": torch.tensor(1.0)}
    tensors[name].view(-1)[0] = torch.nan
    return tensors


ALPHA = f"{KEY}.alpha"
FC1 = "diffusion_model.joint_blocks.1.x_block.mlp.fc1"
BAD = {
    "SD3.5 Large": (large(), "is for SD3.5 Large (38 blocks of width 2432); this model has 4 of 128"),
    "more blocks": (large(128, 7), "is for a model (7 blocks of width 128); this model has 4 of 128"),
    "LoKr": (other_lokr(), "is for SD3.5 Large (38 blocks of width 2432); this model has 4 of 128"),
    "LoKr of whole factors": (
        {"lycoris_transformer_blocks_23_ff_net_2.lokr_w1": torch.ones(8, 8)}
        | {"lycoris_transformer_blocks_23_ff_net_2.lokr_w2": torch.ones(192, 768)},
        "is for SD3 Medium or SD3.5 Medium (24 blocks of width 1536); this model has 4 of 128",
    ),
    "LoHa of another model": (
        {f"lycoris_transformer_blocks_37_attn_to_q.hada_w{n}_{k}": torch.ones(s)
         for n in "12" for k, s in (("a", (2432, 2)), ("b", (2, 2432)))},
        "is for SD3.5 Large (38 blocks of width 2432); this model has 4 of 128",
    ),
    "adaLN of dual attention": (
        {f"transformer.transformer_blocks.3.norm1.linear.lora_{k}.weight": torch.ones(s)
         for k, s in (("A", (1, 128)), ("B", (9 * 128, 1)))},
        "with a second attention in block 3; this model has one in 2 blocks",
    ),
    "dual attention": (
        large(128, 4, names=("attn2.to_q",)),
        "second attention in block 2; this model has one in 2 blocks",
    ),
    "FLUX": (
        large(3072, 2) | {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 3072)},
        "is for FLUX; this model has 4 blocks of width 128",
    ),
    "SDXL": (
        {f"lora_unet_down_blocks_1_attentions_0_proj_in.lora_{n}.weight": torch.ones(2, 2) for n in ("down", "up")},
        "matches no layer of this model: it is for SD 1, SD 2 or SDXL (such as lora_unet_down_blocks_1_attentions_0_",
    ),
    "unknown names": ({"hat.lora_A.weight": torch.ones(2, 2)}, "matches no layer of this model (such as hat)"),
    "nothing that acts": (
        {f"lora_te1_text_projection.lora_{n}.weight": torch.ones(2, 2) for n in ("down", "up")},
        "has no effect: the model does not use these layers (such as lora_te1_text_projection)",
    ),
    "half of a pair": ({k: v for k, v in PAIR.items() if "down" in k}, f"{KEY} is incomplete: it has down but no up"),
    "the other half": ({k: v for k, v in PAIR.items() if "up" in k}, f"{KEY} is incomplete: it has up but no down"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, f"{KEY} is incomplete: it has only alpha"),
    "a magnitude alone": ({f"{KEY}.dora_scale": torch.ones(128, 1)}, "is incomplete: it has only dora_scale"),
    "half of LoKr": ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, "is incomplete: it has lokr_w1 but no lokr_w2_a"),
    "half of LoHa": ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, "is incomplete: it has hada_w1_a but no hada_w1_b"),
    "NaN": (with_nan(f"{KEY}.lora_up.weight"), f"{KEY}.lora_up.weight contains NaN or infinity"),
    "NaN as alpha": (with_nan(ALPHA), "has a scale (alpha / rank) of nan"),
    "a huge alpha": (PAIR | {ALPHA: torch.tensor(1e30)}, "has a scale (alpha / rank) of 5e+29; at most 1e+06"),
    "ranks": (PAIR | {f"{KEY}.lora_up.weight": torch.ones(128, 3)}, f"{KEY} has ranks that do not match: 2 and 3"),
    "a vector": (
        PAIR | {f"{KEY}.lora_up.weight": torch.ones(128)},
        f"{KEY} has the wrong shape: up must be a matrix, not [128]",
    ),
    "rows": (
        PAIR | {f"{KEY}.lora_up.weight": torch.ones(64, 2)},
        f"{KEY}.lora_down.weight does not fit: the change is 64x128, the model has 128x128",
    ),
    "columns of the MLP": (
        {f"{FC1}.lora_A.weight": torch.ones(2, 64), f"{FC1}.lora_B.weight": torch.ones(256, 2)},
        "is for a model (2 blocks of width 64); this model has 4 of 128",
    ),
    "a difference": ({f"{FC1}.diff": torch.ones(256, 127)}, "this model has 4 of 128"),
    "a bias": ({f"{FC1}.diff_b": torch.ones(255)}, f"{FC1}.diff_b does not fit: it is 255, the model has 256"),
    "no bias": (
        {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff_b": torch.ones(96)},
        "does not fit: it is 96, the model has no bias",
    ),
    "a magnitude": (
        PAIR | {f"{KEY}.dora_scale": torch.ones(127, 1)},
        f"{KEY}.dora_scale does not fit: it is 127x1, the model has 128 rows and 128 columns",
    ),
    "LoHa": (
        {
            f"{KEY}.hada_{n}": torch.ones(s)
            for n, s in (("w1_a", (128, 2)), ("w1_b", (2, 128)), ("w2_a", (128, 2)), ("w2_b", (2, 64)))
        },
        f"{KEY} has two products of different shapes: [128, 128] and [128, 64]",
    ),
    "two algorithms": (PAIR | {f"{KEY}.diff": torch.ones(128, 128)}, "mixes two algorithms, LoRA and full difference"),
    "an alpha that is a matrix": (
        PAIR | {ALPHA: torch.ones(2, 2)}, f"{ALPHA} must be a single number, not [2, 2]"
    ),
    "an empty tensor": (PAIR | {f"{KEY}.lora_up.weight": torch.ones(128, 0)}, "is empty: its shape is [128, 0]"),
    "two spellings": (
        PAIR | {f"{KEY}.lora_A.weight": torch.ones(2, 128)}, "contains the same tensor twice"
    ),
    "one layer twice": (
        PAIR | {k.replace("lora_unet_", "lycoris_"): v.clone() for k, v in PAIR.items()}, "changes the same layer twice"
    ),
    "integers": (
        PAIR | {f"{KEY}.lora_up.weight": torch.ones(128, 2, dtype=torch.int32)},
        "has the unsupported dtype I32 (supported: F64, F32, ",
    ),
    "OFT": ({f"{KEY}.oft_blocks": torch.ones(2, 2, 2)}, "uses OFT, which this program does not support (lora_"),
    "GLoRA": ({f"{KEY}.{n}.weight": torch.ones(2, 2) for n in ("a1", "b1")}, "uses GLoRA, which this program does not"),
    "IA3": ({f"{KEY}.on_input": torch.ones(1)}, "uses IA3, which this program does not support"),
    "reshape": (PAIR | {f"{KEY}.reshape_weight": torch.ones(2)}, "uses reshape_weight (a control LoRA), which"),
    "control": (PAIR | {"lora_controlnet": torch.ones(1)}, "is a control LoRA, which this program does not support"),
    "an unknown suffix": (PAIR | {f"{KEY}.hat": torch.ones(1)}, f"contains an unknown tensor: {KEY}.hat"),
}  # fmt: skip


def refused(small_model, path, capsys, monkeypatch):
    """The one line that the command line says about a LoRA."""
    monkeypatch.setattr("sd3.weights.ModelTensors.load_into", lambda *_: pytest.fail("weights were loaded"))
    words = ["--model", small_model, "--prompt", "a", "--device", "cpu", "--lora", path]
    assert sd3_infer.main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --lora ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_files(small_model, tmp_path, capsys, monkeypatch, case):
    tensors, why = BAD[case]
    path = writing.write(tensors, tmp_path / "bad.safetensors")
    error = refused(small_model, path, capsys, monkeypatch)
    assert error.startswith(f"error: --lora {path}: ") and why in error, error


FILES = {
    "empty": (b"", "it is empty"),
    "pickle": (pickle.dumps({"a": 1}), "it is a pickle; pickled checkpoints are not loaded"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "it is a zip archive, as torch.save writes them"),
    "half": (save(PAIR)[:-100], "is truncated"),
    "text": (b"words", "is not a safetensors file"),
    "no tensors": (struct.pack("<Q", 2) + b"{}", "holds no usable tensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_another_kind(small_model, tmp_path, capsys, monkeypatch, case):
    data, why = FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    assert why in refused(small_model, path, capsys, monkeypatch)


def test_a_checkpoint_as_a_lora_and_the_reverse(small_model, tmp_path, capsys, monkeypatch):
    why = "is not a LoRA: it looks like an SD3-type MMDiT (such as first_stage_model."
    error = refused(small_model, small_model, capsys, monkeypatch)
    assert why in error and error.endswith("give it with --model\n")
    path = writing.write(PAIR, tmp_path / "a.safetensors")
    assert sd3_infer.main(["--model", str(path), "--prompt", "a"]) == 2
    assert "is not an SD3 or SD3.5 model: it looks like a LoRA" in capsys.readouterr().err


def test_missing_files_and_folders(small_model, tmp_path, capsys, monkeypatch):
    assert "no such file" in refused(small_model, tmp_path / "none.safetensors", capsys, monkeypatch)
    neither = f"{tmp_path}: contains neither adapter_model.safetensors nor pytorch_lora_weights.safetensors"
    assert refused(small_model, tmp_path, capsys, monkeypatch).endswith(f"{neither}\n")
    (tmp_path / "adapter_model.bin").touch()
    pickled = f"{neither}; adapter_model.bin is a pickle, which is not loaded\n"
    assert refused(small_model, tmp_path, capsys, monkeypatch).endswith(pickled)
    (tmp_path / "adapter_model.bin").unlink()
    only = writing.write(PAIR, tmp_path / "fox.safetensors")
    error = refused(small_model, tmp_path, capsys, monkeypatch)
    assert error.endswith(f"{neither}; if you mean the file in it, give {only}\n")
    writing.write(PAIR, tmp_path / "hen.safetensors")
    assert refused(small_model, tmp_path, capsys, monkeypatch).endswith(f"{neither}\n")


def test_the_folder_that_diffusers_saves(models, tmp_path, capsys):
    shapes = {role: models[role].shapes for role in models}
    pairs = draw(shapes, every_module(["mmdit", "clip_l"]), lambda: 2)
    folder = tmp_path / "fox"
    folder.mkdir()
    file = SPELLINGS["diffusers with metadata"][0](pairs, folder / "pytorch_lora_weights.safetensors")
    (folder / "other.safetensors").touch()
    assert contents(folder) == contents(file) == [file]
    (in_folder,), (alone,) = (read_lora([PatchFile(str(path))], models)["mmdit"] for path in (folder, file))
    assert in_folder.identity == alone.identity and in_folder.changes.keys() == alone.changes.keys()
    assert sd3_infer.main(["--info", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}: a LoRA for a model (4 blocks of width 128)")
    (folder / "model_index.json").touch()  # a model's folder, into which a LoRA was saved too: hashed as a model
    assert lora_in(folder) is None


SETTINGS = {
    "no JSON": ("{", "is damaged"),
    "no object": ("[1]", "is damaged (it is not a JSON object)"),
    "alpha": ('{"lora_alpha": "x"}', "is damaged (alpha must be a number, not 'x')"),
    "NaN": ('{"lora_alpha": NaN}', "is damaged (alpha must be a number, not nan)"),
    "pattern": ('{"alpha_pattern": {"(": 1}}', "is damaged (alpha_pattern '(' is not a regular expression"),
    "a pattern with flags": ('{"alpha_pattern": {"(?i)x": 1}}', "is not a regular expression"),
    "pattern's value": ('{"rank_pattern": {"a": null}}', "is damaged (rank_pattern a must be a number, not null)"),
    "rslora": ('{"use_rslora": 3}', "is damaged (use_rslora must be true or false, not 3)"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_damaged_settings_of_peft(small_model, tmp_path, capsys, monkeypatch, case):
    text, why = SETTINGS[case]
    path = writing.write(PAIR, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    error = refused(small_model, path, capsys, monkeypatch)
    assert "damaged" in error and why.replace("is damaged", "its lora_adapter_metadata is damaged") in error
    folder = tmp_path / "adapter"
    folder.mkdir()
    writing.write(PAIR, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(text)
    error = refused(small_model, folder, capsys, monkeypatch)
    assert error.startswith(f"error: --lora {folder / 'adapter_config.json'}: is damaged") and why in error


# ---- fuzzed headers ------------------------------------------------------------------------------

MODULES = (
    KEY, FC1, "transformer.norm_out.linear", "lycoris_transformer_blocks_0_attn_to_q", "transformer.pos_embed.proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "diffusion_model.joint_blocks.0.x_block.attn.ln_q", "transformer.transformer_blocks.3.norm1_context.linear", "hat",
)  # fmt: skip
SIDES = st.sampled_from([0, 1, 2, 4, 16, 64, 128, 256, 2**40])
SHAPES = st.lists(SIDES, max_size=5).map(tuple) | st.sampled_from([(2, 128), (128, 2), (256, 128), (128, 16, 2, 2), ()])
TENSORS = st.dictionaries(
    st.tuples(st.sampled_from(MODULES), st.sampled_from([*ROLES, ".lora_mid", ".oft_blocks", ".weight"])),
    st.tuples(st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "F4"]), SHAPES),
    min_size=1,
    max_size=5,
)
# Of each module that fits a matrix (256, 128): complete tensors of every algorithm, by suffix.
WHOLE = {
    "LoRA": {".lora_A.weight": (2, 128), ".lora_B.weight": (256, 2), ".alpha": ()},
    "DoRA": {".lora_down.weight": (2, 128), ".lora_up.weight": (256, 2), ".dora_scale": (1, 128)},
    "LoHa": {".hada_w1_a": (256, 2), ".hada_w1_b": (2, 128), ".hada_w2_a": (256, 2), ".hada_w2_b": (2, 128)},
    "LoKr": {".lokr_w1": (16, 4), ".lokr_w2_a": (16, 2), ".lokr_w2_b": (2, 32)},
    "full": {".diff": (256, 128), ".diff_b": (256,)},
    "bias": {".diff_b": (256,)},
}
FITTING = (FC1, "transformer.norm_out.linear", "transformer.transformer_blocks.3.norm1_context.linear")


@st.composite
def nearly_good(draw_one):
    """Good modules, of which some tensors have other shapes and dtypes, or are left out."""
    out = {}
    for module in draw_one(st.lists(st.sampled_from(FITTING), min_size=1, unique=True)):
        for suffix, shape in WHOLE[draw_one(st.sampled_from(list(WHOLE)))].items():
            out[module, suffix] = (draw_one(st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"])), shape)
    for key in draw_one(st.lists(st.sampled_from(list(out)), max_size=2)):
        dtype, shape = draw_one(st.sampled_from(["F64", "I32", out[key][0]])), list(out[key][1])
        if shape and draw_one(st.booleans()):
            shape[draw_one(st.integers(0, len(shape) - 1))] = draw_one(SIDES)
        out[key] = (dtype, tuple(shape))
    return out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "^", "(", "net"]), inner),
    max_leaves=4,
)
CONFIGS = st.dictionaries(
    st.sampled_from(["transformer.r", "r", "transformer.lora_alpha", "alpha", "transformer.use_rslora",
                     "transformer.alpha_pattern", "text_encoder.rank_pattern"]), JSON,
)  # fmt: skip


def file_of(tensors, metadata) -> bytes:
    """A safetensors file of these headers; tensors too large to write have no bytes, which the header contradicts."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for (module, suffix), (dtype, shape) in tensors.items():
        size = DTYPE_BITS[dtype]
        for side in shape:
            size *= side
        size = -(-size // 8) if size < 2**22 else 8
        header[module + suffix] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@given(
    TENSORS | nearly_good() | nearly_good(),
    CONFIGS | st.none(),
    st.just([]) | st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_thousand_fuzzed_headers(models, tmp_path_factory, tensors, config, flips):
    """Each is read, or refused with one line; where it is read, its weights can be made."""
    data = bytearray(file_of(tensors, config and {"lora_adapter_metadata": json.dumps(config)}))
    for place, value in flips:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        patches = read_lora([PatchFile(str(path))], models)
    except Mistake as mistake:
        assert mistake.field == "lora" and "\n" not in str(mistake)
        return
    for part, (patch,) in patches.items():
        model = replace(models[part], patches=(patch,))
        for name, tensor in model.read(list(patch.changes), "cpu", None):
            assert tensor.shape == model.shapes[name]


# ---- what is said of good ones -------------------------------------------------------------------


def test_info_and_lists(models, tmp_path, capsys):
    shapes = {role: models[role].shapes for role in models}
    pairs = draw(shapes, every_module(["mmdit", "clip_l"]), iter([2, 4] * 50).__next__)
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "fox.safetensors"
    SPELLINGS["kohya"][0](pairs, path)
    tags = {"img": {"fox": 30, "a red fox": 10}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_output_name": "fox", "modelspec.trigger_phrase": "fxx"}
    save_file(writing.fused(pairs, {"mmdit": "lora_unet_", **writing.FLAT}, flat=True), path, metadata)
    assert sd3_infer.main(["--info", str(path)]) == 0
    told = capsys.readouterr().out
    for line in (
        f"{path}: a LoRA for a model (4 blocks of width 128), rank 2 to 10\n",
        "  family                          kohya",
        "  alpha                           2 to 10",
        "  modules                         23",
        "    CLIP-L                        2",
        "    context_block_adaLN_modulation_1 2",
        "  trigger words                   fxx, fox, a red fox",
    ):
        assert line in told, told
    listed = list_models(tmp_path / "models")
    assert re.search(r"fox.safetensors  a LoRA for a model \(4 blocks of width 128\), rank 2 to 10, 0\.\d\d MB", listed)
    with pytest.raises(Mistake, match="is not a LoRA"):
        describe(str(writing.write({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors")))


@pytest.mark.parametrize(
    ("tensors", "made_for"),
    [
        (large(), "SD3.5 Large (38 blocks of width 2432)"),
        (large(1536, 24), "SD3 Medium or SD3.5 Medium (24 blocks of width 1536)"),
        (large(1536, 13, names=("attn.to_q", "attn2.to_k")), "SD3.5 Medium (13 blocks of width 1536)"),
        (PAIR, "a model (1 block of width 128)"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(2, 2)}, ""),
    ],
)
def test_the_model_that_a_lora_is_for(tmp_path, tensors, made_for):
    assert LoraFile(writing.write(tensors, tmp_path / "a.safetensors")).made_for() == made_for
