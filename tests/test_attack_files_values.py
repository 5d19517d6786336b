"""Values and foreign files that an attack from outside found to be taken wrongly, or refused too late."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEMO, ROOT, TOKENIZERS
from safetensors.torch import load_file, save_file

import sd3.command
import sd3.pixels
import sd3.probe.command
import sd3.sweep.command
import sd3_infer
from sd3.files import ENCODER_FOLDERS, ENCODER_PREFIX, WeightFile
from sd3.find import Fit, find_encoders, list_models
from sd3.mistakes import Missing, Mistake, Where, flag_name
from sd3.pixels import open_image
from sd3.prompts import read_prompts
from sd3.reading import check_file, reading
from sd3.residual import ResidualConfig
from sd3.settings import Flags
from sd3.sweep.grid import read_seeds, read_yaml
from sd3.tokenizers import open_clip_tokenizer
from sd3_infer import SD3Inferencer

SMALL = ["--model", str(DEMO), "--steps", "1", "--width", "64", "--height", "64"]


def told(capsys, main, *arguments) -> str:
    """The one line that a command line ends with where something is wrong."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("residual_target_layers", "3_5"),
        ("residual_target_layers", "3,1_2"),
        ("residual_weights", "0_5"),
        ("residual_weights", "linear:1_0:2"),
        ("residual_schedule", "exp:1_0"),
        ("residual_origin_layer", "1_0"),
        ("seed", "1_000"),
        ("steps", "1_0"),
        ("cfg", "1_0.5"),
        ("width", "1_024"),
        ("vae_tile", "1_28"),
        ("cache", "0_1"),
    ],
)
def test_digits_with_an_underscore_are_no_number(flag, value):
    with pytest.raises(ValueError, match=f"{flag} "):
        Flags.read({flag: value})


def test_seeds_of_a_sweep_with_an_underscore():
    with pytest.raises(ValueError, match="seed 0_3"):
        read_seeds("0_3")


@pytest.mark.parametrize("text", ["1_0", "0.5", "-3", " 7 ", "1e2", "\uff13"])
def test_other_spellings_of_numbers_hold(text):
    if "_" in text:
        with pytest.raises(ValueError):
            Flags.read({"residual_weights": text, "residual_target_layers": "3"})
    else:
        assert Flags.read({"residual_weights": text, "residual_target_layers": "3"}).residual_weights == (float(text),)


@pytest.mark.parametrize("command", ["infer", "list", "sweep", "measure"])
@pytest.mark.parametrize("kind", ["missing", "file", "loop"])
def test_a_model_folder_that_is_none(tmp_path, capsys, command, kind):
    place = tmp_path / "f"
    if kind == "file":
        place.write_text("x")
    elif kind == "loop":
        place.symlink_to("f")
    (tmp_path / "p.txt").write_text("red\nblue\n")
    more = ["--model_folder", place]
    main, arguments = {
        "infer": (sd3_infer.main, [*SMALL, "--prompt", "red", "--out_dir", tmp_path / "o"]),
        "list": (sd3_infer.main, ["--list_models"]),
        "sweep": (sd3.sweep.command.main, [*SMALL, "--prompt", "red", "--out", tmp_path / "o"]),
        "measure": (
            sd3.probe.command.main,
            ["measure", *SMALL, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o"],
        ),
    }[command]
    error = told(capsys, main, *arguments, *more)
    assert error.startswith(f"error: --model_folder {place}: ")
    assert not (tmp_path / "o").exists() or not [*(tmp_path / "o").rglob("*.png")]


@pytest.mark.parametrize("data", ["red\nblue\n".encode("utf-16-le"), b"red\0circle\n", b"PK\3\4\0\0"])
def test_a_prompt_file_with_null_characters_is_no_text(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(Mistake, match=r"p\.txt: .*null characters"):
        read_prompts(str(tmp_path / "p.txt"))


def test_a_long_name_for_rotations_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("red\n")
    arguments = ["calibrate", *SMALL[:2], "--prompts", tmp_path / "p.txt", "--origin", 1, "--targets", 2]
    for length in (236, 246, 255):
        error = told(
            capsys, sd3.probe.command.main, *arguments, "--out", tmp_path / ("x" * (length - 12) + ".safetensors")
        )
        assert error.startswith("error: --out ") and "too long" in error
    assert [p.name for p in tmp_path.iterdir()] == ["p.txt"]


# ---- YAML and benchmarks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("cfg: 3\ncfg: 4\n", "cfg"),
        ("seed: 0-3\nprompt: red\nseed: 4\n", "seed"),
        ("variants: {a: {cfg: 3}, a: {cfg: 4}}\n", "a"),
        ("variants: {a: {cfg: 3, cfg: 4}}\n", "cfg"),
        ("'cfg': 3\ncfg: 4\n", "cfg"),
        ("variants:\n  a: {cfg: 3}\nvariants:\n  b: {cfg: 3}\n", "variants"),
    ],
)
def test_a_key_of_a_grid_that_is_there_twice(tmp_path, text, key):
    pytest.importorskip("yaml")
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"g\.yaml: cannot be read as YAML \({key} is listed twice"):
        read_yaml(str(tmp_path / "g.yaml"))


def test_a_grid_may_name_a_value_twice(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "g.yaml").write_text("cfg: &x [3, 4]\nshift: *x\nvariants: {a: {steps: 3}, b: {steps: 3}}\n")
    values, named = read_yaml(str(tmp_path / "g.yaml"))
    assert values == {"cfg": ["3", "4"], "shift": ["3", "4"]} and set(named) == {"a", "b"}


@pytest.mark.parametrize(
    ("layout", "name", "text"),
    [
        ("dpg", "p.csv", "item_id,text\n" + "x" * 252 + ",red\n"),
        ("dpg", "p.csv", "item_id,text\n" + "\u661f" * 84 + ",red\n"),
        ("dpg", "p.csv", "item_id,text\na\0b,red\n"),
        ("dpg", "p.csv", "item_id,text\n1,   \n"),
        ("dpg", "p.csv", "item_id,text\n  ,red\n"),
        ("geneval", "p.jsonl", '{"tag": "x", "prompt": ""}\n'),
        ("geneval", "p.jsonl", '{"tag": "x", "prompt": " "}\n'),
    ],
)
def test_a_benchmark_that_no_folder_could_be_made_of(tmp_path, capsys, layout, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    arguments = ["--out", tmp_path / "s", "--layout", layout, "--prompt", tmp_path / name, "--seed", "0-3"]
    assert told(capsys, sd3.sweep.command.main, *SMALL, *arguments, "--dry_run").startswith("error: --prompt")


# ---- text encoders and tokenizers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(small_model) -> dict[str, torch.Tensor]:
    return load_file(small_model)


def in_hub_folders(folder: Path, whole, shards: bool = False) -> Path:
    """A model of one file, and beside it the text encoders as the hub keeps them."""
    for kind in ("tokenizer", "tokenizer_3"):
        (folder / kind).symlink_to(TOKENIZERS / kind)
    bare = {k: v for k, v in whole.items() if not k.startswith("text_encoders.")}
    save_file(bare, folder / "m.safetensors", {"width": "64", "height": "48", "steps": "1"})
    for role, place in ENCODER_FOLDERS.items():
        prefix = ENCODER_PREFIX.format(role)
        tensors = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        (folder / place).mkdir()
        if shards and role == "t5xxl":
            names = sorted(tensors)
            halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
            for file, held in halves.items():
                save_file({k: tensors[k] for k in held}, folder / place / file)
            index = ", ".join(f'"{k}": "{file}"' for file, held in halves.items() for k in held)
            (folder / place / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
        else:
            save_file(tensors, folder / place / "model.safetensors")
    return folder / "m.safetensors"


def engine(path, **options) -> SD3Inferencer:
    out = SD3Inferencer()
    out.tell.quiet = True
    return out.load(str(path), device="cpu", dtype="float32", **options)


@pytest.mark.parametrize("shards", [False, True])
def test_encoders_in_the_hubs_folders_beside_a_model_file(tmp_path, small_model, whole, shards):
    got = engine(in_hub_folders(tmp_path, whole, shards)).get_cond("a red circle")
    wanted = engine(small_model, model_folder=str(TOKENIZERS)).get_cond("a red circle")
    # not bit for bit: the last bits of a product may depend on where in memory the weights of a file lie
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_encoders_in_the_hubs_folders_of_a_model_folder(tmp_path, small_model, whole):
    path = in_hub_folders(tmp_path, whole)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(path, tmp_path / "elsewhere" / "m.safetensors")
    got = engine(tmp_path / "elsewhere" / "m.safetensors", model_folder=str(tmp_path)).get_cond("a red circle")
    wanted = engine(small_model, model_folder=str(TOKENIZERS)).get_cond("a red circle")[0]
    assert torch.allclose(got[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_hub_folder_with_another_encoder_does_not_count(tmp_path, whole):
    path = in_hub_folders(tmp_path, whole)
    shutil.rmtree(tmp_path / "text_encoder_2")
    (tmp_path / "text_encoder_3").rename(tmp_path / "text_encoder_2")  # as FLUX keeps its T5
    with pytest.raises(FileNotFoundError, match="name it with clip_g"):
        engine(path)


def test_a_damaged_encoder_in_a_hub_folder_is_named(tmp_path, whole):
    path = in_hub_folders(tmp_path, whole)
    (tmp_path / "text_encoder_2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(Mistake, match=r"^model_folder .*text_encoder_2/model\.safetensors: .*empty"):
        engine(path)


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_merges_that_were_cut_off(tmp_path, part, ends):
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZERS / "tokenizer", folder)
    lines = (folder / "merges.txt").read_bytes().splitlines()
    (folder / "merges.txt").write_bytes(ends.join(lines) + ends)
    whole = open_clip_tokenizer(folder).tokenize("a red circle", 77).ids
    assert whole == open_clip_tokenizer(TOKENIZERS / "tokenizer").tokenize("a red circle", 77).ids
    (folder / "merges.txt").write_bytes(ends.join(lines[: int(len(lines) * part)]))
    with pytest.raises(Mistake, match=r"merges\.txt: does not fit vocab\.json .*cut off"):
        open_clip_tokenizer(folder)


# ---- pictures ------------------------------------------------------------------------------------


def grey_png(path: Path, bits: int, values: list[int], clear: int | None) -> None:
    """A grey PNG of one row."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    packed = int("".join(f"{v:0{bits}b}" for v in values), 2).to_bytes(len(values) * bits // 8, "big")
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0))
    seen = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + seen + chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore:.*partly transparent")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_clear_grey_of_few_bits_is_white(tmp_path, bits):
    most = 2**bits - 1
    values = [0, most] * 4
    for clear, wanted in ((0, [255, 255]), (most, [0, 255]), (None, [0, 255])):
        grey_png(tmp_path / "a.png", bits, values, clear)
        assert np.asarray(open_image("init_image", str(tmp_path / "a.png"), 8, 1))[0, :2, 0].tolist() == wanted
    if bits > 1:  # what is clear is not white anyway
        middle = most // 2
        grey_png(tmp_path / "a.png", bits, [middle, 0] * 4, middle)
        assert np.asarray(open_image("init_image", str(tmp_path / "a.png"), 8, 1))[0, :2, 0].tolist() == [255, 0]


# ---- files of residual text streaming ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"target_layers": [3], "target_layers": [4]}',
        '{"target_layers": [3], "residual_target_layers": [4]}',
        '{"weights": [1], "target_layers": [4], "residual_weights": [2]}',
        '{"origin_layer": 0, "origin": 1, "target_layers": [4]}',
    ],
)
def test_a_residual_configuration_that_says_something_twice(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(Mistake, match=r"^residual_config .*r\.json: .*is listed twice"):
        ResidualConfig.read(tmp_path / "r.json")


def test_a_rotation_file_named_by_what_no_file_can_be_called(tmp_path):
    for name in ("x" * 5000, "x" * 300, "a/" * 2500 + "b"):
        (tmp_path / "r.json").write_text(json.dumps({"target_layers": [3], "mode": "aligned", "rotations": name}))
        with pytest.raises(Mistake, match=r"^residual_config .*r\.json: residual_rotations .*too long"):
            ResidualConfig.read(tmp_path / "r.json")


def test_a_shard_named_by_what_no_file_can_be_called(tmp_path):
    (tmp_path / "transformer").mkdir()
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"^model .*no such file, though"):
        WeightFile(tmp_path, "model")


def test_a_note_about_a_file_comes_once(tmp_path, capsys):
    torch.save({1: 2, "target_layers": [3]}, tmp_path / "r.pth")
    arguments = [*SMALL, "--prompt", "red", "--out_dir", tmp_path, "--residual_config", tmp_path / "r.pth"]
    assert sd3_infer.main([str(a) for a in arguments]) == 0
    assert capsys.readouterr().err.count("not used, unknown: 1") == 1


# ---- the environment -----------------------------------------------------------------------------


def python(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )


def test_help_without_docstrings():
    plain = python("sd3_infer.py", "--help")
    stripped = python("sd3_infer.py", "--help", PYTHONOPTIMIZE="2")
    assert stripped.returncode == 0 and stripped.stderr == "" and stripped.stdout == plain.stdout
    assert "--residual_target_layers" in plain.stdout


def test_notes_are_notes_whatever_is_said_of_warnings(tmp_path):
    grey_png(tmp_path / "a.png", 8, [0, 255], 0)
    program = (
        "import sd3.command, sd3.pixels, warnings\n"
        "for action in ('error', 'ignore'):\n"
        "    warnings.simplefilter(action)\n"
        "    sd3.pixels._TRANSPARENT.clear()\n"
        f"    look = lambda: sd3.pixels.open_image('init_image', {str(tmp_path / 'a.png')!r}, 8, 8)\n"
        "    assert sd3.command.execute(look, '') == 0\n"
    )
    got = python("-c", program)
    assert got.returncode == 0 and got.stderr.count("note: ") == 2 and "is partly transparent" in got.stderr


def test_a_file_that_goes_away_between_two_looks(tmp_path):
    for read in (lambda p: p.read_bytes(), lambda p: p.open(), lambda p: [*os.scandir(p)], lambda p: np.load(p)):
        with pytest.raises(FileNotFoundError, match=r"^flag name: .*disappeared"), reading(Where("flag", "name")):
            read(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"^flag name: no such file$"), reading(Where("other")):
        check_file(Where("flag", "name"), tmp_path / "gone")


def test_backquotes_of_a_library_mark_no_flag(tmp_path):
    with pytest.raises(Mistake) as error, reading(Where("model", "x")):
        raise ValueError("unknown variant `vae`, expected ``a``")
    assert str(error.value) == "model x: cannot be read (unknown variant `vae`, expected ``a``)"
    assert error.value.spelled(flag_name) == f"--{error.value}"
    assert error.value.renamed({"vae": "y", "model": "z"}).spelled(flag_name) == f"--{error.value}".replace(
        "model", "z"
    )


def test_a_link_to_itself_beside_a_model_is_passed_over(tmp_path):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Missing, match="no clip_l"):
        find_encoders(["clip_l"], WeightFile(tmp_path / "model.safetensors"), [tmp_path], {}, Fit(8, 8))
    assert f"damaged  {tmp_path}/loop.safetensors: cannot be opened" in list_models(str(tmp_path))


WITHOUT_RIGHTS = """
import ctypes, os, sys
import sd3_infer, sd3.sweep.command
folder = sys.argv[1]
small, out = sys.argv[2:], os.path.join(folder, "o")
runs = [
    (sd3_infer.main, [*small, "--out_dir", out, "--model_folder", folder + "/d"]),
    (sd3_infer.main, ["--out_dir", out, "--prompt", "red", "--model", folder + "/d"]),
    (sd3_infer.main, [*small, "--out_dir", folder + "/d/x"]),
    (sd3_infer.main, ["--list_models", "--model_folder", folder + "/d"]),
    (sd3.sweep.command.main, [*small, "--out", folder + "/d"]),
    (sd3.sweep.command.main, [*small, "--out", folder + "/d/x/y"]),
]
os.mkdir(folder + "/d")
os.chmod(folder + "/d", 0)
# root gives up what lets it look everywhere
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
print([main(arguments) for main, arguments in runs])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capset is of Linux")
def test_folders_that_may_not_be_looked_into_are_named(tmp_path):
    got = python("-c", WITHOUT_RIGHTS, tmp_path, *SMALL, "--prompt", "red")
    (tmp_path / "d").chmod(0o700)
    assert got.stdout == f"{[2] * 6}\n"
    flags = ("model_folder", "model", "out_dir", "model_folder", "out", "out")
    lines = got.stderr.splitlines()
    assert len(lines) == len(flags)
    for flag, line in zip(flags, lines, strict=True):
        assert line.startswith(f"error: --{flag} {tmp_path}/d")
