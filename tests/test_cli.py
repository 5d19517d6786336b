"""The command line: what reaches the engine, what is written, and one line and status 2 for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import sd3.files
import sd3.png
import sd3.run
import sd3.weights
import sd3.writing
import sd3_infer
from sd3.command import read_arguments
from sd3.flags import FLAGS
from sd3.mistakes import Mistake
from sd3.models import SkipLayerConfig
from sd3.planning import resolve
from sd3.prompts import folder_name, read_prompts
from sd3.settings import Flags, Settings

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def cli(*arguments: str) -> int:
    return sd3_infer.main([str(a) for a in arguments])


def shell(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sd3_infer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, **options)


def quick(small_model, out, *more: str) -> list[str]:
    return [
        "--model",
        str(small_model),
        "--out_dir",
        str(out),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        *map(str, more),
    ]


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.rglob("[0-9]*.png"))


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


def settings_of(path: Path) -> dict:
    return json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])["settings"]


# ---- flags as typed ------------------------------------------------------------------------------

PROMPTS = [
    "2024",
    "cat,dog",
    "cat # dog",
    "None",
    "True",
    "[1, 2]",
    "{'a': 1}",
    "-",
    "-0.5",
    "a = b",
    "(a:1.2), b",
    '"quoted"',
    " spaces ",
    "--x",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_arrive_as_typed(prompt, monkeypatch):
    seen = []
    monkeypatch.setattr(sd3_infer, "run", lambda flags, given: seen.append(flags))
    assert cli(f"--prompt={prompt}", "--postfix", "1e3", "--model", "007", "--negative_prompt", "3.10") == 0
    if prompt != "--x":
        assert cli("--prompt", prompt, "--seed", "5") == 0
        assert seen[1].prompt == prompt
        assert seen[1].seed == 5
    assert (seen[0].prompt, seen[0].postfix, seen[0].model) == (prompt, "1e3", "007")
    assert seen[0].negative_prompt == "3.10"


def test_every_flag_of_the_table_is_taken_and_documented(monkeypatch, capsys):
    names = set(Flags.__dataclass_fields__)
    assert cli("--help_all") == 0
    shown = capsys.readouterr()
    assert names <= set(re.findall(r"^  --(\w+)", shown.out, re.MULTILINE))
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert not [n for n in names if f"`--{n}`" not in page]


def test_the_short_help_fits_two_screens_and_names_the_long_one(capsys):
    assert cli("--help") == 0
    short = capsys.readouterr().out
    shown = set(re.findall(r"^  --(\w+)", short, re.MULTILINE))
    assert {"prompt", "seed", "steps", "residual_target_layers", "model", "lora"} <= shown < set(FLAGS)
    assert len(short.splitlines()) < 80
    assert "--help_all lists all" in short
    assert cli("--help-all", "--steps", "x") == 0
    assert len(capsys.readouterr().out) > 1.5 * len(short)


def test_switches_and_repeats():
    got = read_arguments(
        ["--verbose", "--skip-layer-cfg", "false", "--nono_metadata", "--seed", "1", "--seed=2", "a cat"]
    )
    assert got == {
        "verbose": "True", "skip_layer_cfg": "false", "no_metadata": "False", "seed": "2", "prompt": "a cat"
    }  # fmt: skip


def test_a_prompt_without_quotes_is_recognised():
    with pytest.raises(Mistake, match=r'^circle: not understood; a text with spaces needs quotes: prompt "red circle'):
        read_arguments(["--steps", "3", "red", "circle"])


# ---- one bad input for every rule ----------------------------------------------------------------

BAD_FLAGS = [
    (["--prompt", "a", "red", "circle"],
     'error: red: not understood; a text with spaces needs quotes: --prompt "a red ..."'),
    (["--negative_prompt", "dull", "gray"], 'needs quotes: --negative_prompt "dull gray ..."'),
    (["--steps", "3", "-x"], "-x: not understood; flags start with --"),
    (["--promt", "x"], "--promt: unknown flag; did you mean --prompt?"),
    (["--residual_target_layer", "3"], "did you mean --residual_target_layers?"),
    (["--seed"], "--seed: needs a value"),
    (["--prompt", "--seed", "3"], "--prompt: needs a value"),
    (["--residual_target_layers", "3", "5", "-7"], "lists with spaces need quotes"),
    (["-p", "x"], "flags start with --"),
    (["--seed", "x"], "--seed x: must be a whole number"),
    (["--seed", "-1"], "--seed -1: must be from 0 to"),
    (["--seed_type", "random"], "--seed_type random: must be one of fixed, rand, roll; did you mean rand?"),
    (["--sampler", "eular"], "--sampler eular: must be one of euler, euler_ancestral, heun, dpmpp_2m; did"),
    (["--device", "gpu"], "--device gpu: must be auto, cpu, cuda, cuda:N or mps"),
    (["--device", "cuda:77"], "--device cuda:77: not available"),
    (["--text_encoder_device", "cuda:77"], "--text_encoder_device cuda:77: not available"),
    (["--dtype", "float61"], "--dtype float61: must be one of auto, float32, bfloat16, float16; did you mean"),
    (["--steps", "0"], "--steps 0: must be from 1 to"),
    (["--steps", "2.5"], "--steps 2.5: must be a whole number"),
    (["--cfg", "-1"], "--cfg -1: must be from 0"),
    (["--cfg", "nan"], "--cfg nan: must be a number"),
    (["--shift", "0"], "--shift 0: must be from 0.001 to 1000"),
    (["--denoise", "1.5"], "--denoise 1.5: must be from 0.0 to 1.0"),
    (["--width", "100"], "--width 100: must be a multiple of 16, such as 96 or 112"),
    (["--height", "0"], "--height 0: must be at least 16"),
    (["--width", "4096"], "--width 4096: is beyond this model's position grid; at most 192"),
    (["--num_images", "0"], "--num_images 0"),
    (["--batch_size", "0"], "--batch_size 0"),
    (["--verbose=perhaps"], "--verbose perhaps: must be True or False"),
    (["--controlnet_strength", "inf"], "--controlnet_strength inf: must be a number"),
    (["--prompt", ""], "--prompt: is empty"),
    (["--prompt", "missing.txt"], "--prompt missing.txt: no such file"),
    (["--model", "nothing.safetensors"], "--model nothing.safetensors: no such file"),
    (["--model", "models/sd3.5_large.safetensors"], "hf download stabilityai/stable-diffusion-3.5-large"),
    (["--vae", "nothing.safetensors"], "--vae nothing.safetensors: no such file"),
    (["--init_image", "nothing.png"], "--init_image nothing.png: no such file"),
    (["--controlnet_ckpt", "x.safetensors"], "--controlnet_ckpt: needs --controlnet_cond_image"),
    (["--controlnet_cond_image", "x.png"], "--controlnet_cond_image: needs --controlnet_ckpt"),
    (["--controlnet_ckpt", "x.safetensors", "--controlnet_cond_image", "x.png"], "x.safetensors: no such file"),
    (["--residual_target_layers", "3,9"], "9: no such layer (this model has 4 joint blocks: 0 to 3)"),
    (["--residual_target_layers", "9", "--residual_origin_layer", "7"], "7: no such layer"),
    (["--residual_target_layers", "1-3", "--residual_weights", "1,2"], "2 given for 3 target layers"),
    (["--residual_target_layers", "3-1"], "--residual_target_layers 3-1: a range counts up"),
    (["--residual_target_layers", "1-9"], "4: no such layer (this model has 4 joint blocks: 0 to 3)"),
    (["--residual_target_layers", "1", "--residual_weights", "linear:1"], "a ramp such as linear:0.8:0.2"),
    (["--residual_mode", "anchor"], "--residual_mode anchor: must be one of add, anchored, aligned; did you mean"),
    (["--residual_target_layers", "1", "--residual_mode", "aligned"], "aligned: needs --residual_rotations FILE"),
    (["--residual_schedule", "cosin"], "--residual_schedule cosin: must be constant, linear, cosine or exp:ALPHA"),
    (["--residual_schedule", "exp:a"], "--residual_schedule a: must be a number"),
    (["--residual_start", "0.5", "--residual_end", "0.4"], "--residual_start 0.5: must be below --residual_end 0.4"),
    (["--residual_end", "1.5"], "--residual_end 1.5: must be from 0.0 to 1.0"),
    (["--residual_branch", "conds"], "--residual_branch conds: must be one of both, cond, uncond; did you mean cond?"),
    (["--residual_config", "none.json"], "--residual_config none.json: no such file"),
    (["--residual_target_layers", "1", "--residual_mode", "aligned", "--residual_rotations", "none.pt"],
     "--residual_rotations none.pt: no such file"),
    (["--residual_target_layers", "1,1"], "layer 1 is listed twice"),
    (["--residual_target_layers", "0", "--residual_origin_layer", "1"], "lies below the origin layer 1"),
    (["--residual_target_layers", "a"], "--residual_target_layers a: must be a whole number"),
    (["--residual_target_layers", "1", "--residual_weights", "nan"], "--residual_weights nan: must be a number"),
    (["--model_folder", "nowhere", "--list_models"], "--model_folder nowhere: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_FLAGS, ids=[" ".join(a) for a, _ in BAD_FLAGS])
def test_bad_flags(small_model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    base = quick(small_model, tmp_path / "out", "--prompt", "a red circle")
    assert cli(*base, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def bad_files(tmp_path: Path, small_model: Path) -> dict[str, tuple[list[str], str]]:
    whole = load_file(small_model)
    (tmp_path / "cut.safetensors").write_bytes(small_model.read_bytes()[:-100])
    for name, kept in (
        ("bare", ("model.diffusion_model.", "first_stage_model.")),
        ("no_t5", ("model.", "first_stage_model.", "text_encoders.clip")),
        ("no_vae", ("model.", "text_encoders.")),
        ("vae", ("first_stage_model.",)),
    ):
        save_file({k: v for k, v in whole.items() if k.startswith(kept)}, tmp_path / f"{name}.safetensors")
    lost = {k: v for k, v in whole.items() if "final_layer.linear" not in k}
    save_file(lost, tmp_path / "lost.safetensors")
    (tmp_path / "whole.safetensors").symlink_to(small_model)
    (tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf\r\n  \r\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "notes.png").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "file").write_text("")
    (tmp_path / "words.safetensors").write_text("just words")
    (tmp_path / "typo.json").write_text('{"orgin_layer": 1}')
    (tmp_path / "deep.json").write_text('{"target_layers": [2, 22]}')
    (tmp_path / "aligned.json").write_text('{"target_layers": [2], "mode": "aligned"}')
    notes = {"origin_layer": "0", "target_layers": "[1]"}
    save_file({"rotation_matrices": torch.eye(64)[None]}, tmp_path / "narrow.safetensors", notes)
    aligned = ["--residual_target_layers", "1", "--residual_mode", "aligned", "--residual_rotations"]
    return {
        "empty prompt file": (["--prompt", "blank.txt"], "the file holds no prompt"),
        "binary prompt file": (["--prompt", "binary.txt"], "cannot be read as UTF-8"),
        "no picture": (["--init_image", "notes.png"], "--init_image notes.png: is not an image"),
        "half a picture": (["--init_image", "half.png"], "--init_image half.png: cannot be read"),
        "a file for a folder": (["--out_dir", "file/below"], "is not a folder"),
        "words for a model": (["--model", "words.safetensors"], "is not a safetensors file"),
        "a folder for a model": (["--model", "."], "is a folder"),
        "words for a VAE": (["--vae", "words.safetensors"], "--vae words.safetensors: is not a safetensors file"),
        "a model cut short": (["--model", "cut.safetensors"], "cut.safetensors: is truncated"),
        "another model": (["--model", "vae.safetensors"], "is not an SD3 or SD3.5 model: it looks like a VAE"),
        "lost tensors": (["--model", "lost.safetensors"], "2 missing: model.diffusion_model.final_layer.linear."),
        "no encoders": (["--model", "bare.safetensors"], "no clip_l.safetensors in ./ and ./text_encoders/"),
        "no T5": (["--model", "no_t5.safetensors"], "no t5xxl.safetensors or t5xxl_fp16.safetensors"),
        "no VAE": (["--model", "no_vae.safetensors"], "holds no VAE; give one with --vae"),
        "no tokenizer": (["--model", "whole.safetensors"], "no tokenizer (vocab.json and merges.txt"),
        "a typo in a config": (
            ["--residual_config", "typo.json"],
            "unknown key orgin_layer; did you mean origin_layer?",
        ),
        "a config for more layers": (["--residual_config", "deep.json"], "22: no such layer (this model has 4"),
        "a config without rotations": (["--residual_config", "aligned.json"], "aligned: needs --residual_rotations"),
        "words for a config": (["--residual_config", "blank.txt"], "is neither JSON nor a .pth file"),
        "rotations of another width": (
            [*aligned, "narrow.safetensors"],
            "is for a model of width 64, this one has 128",
        ),
        "a model for rotations": ([*aligned, str(small_model)], "has no rotation_matrices: not a rotation file"),
    }


BAD_FILES = (
    "empty prompt file",
    "binary prompt file",
    "no picture",
    "half a picture",
    "a file for a folder",
    "words for a model",
    "a folder for a model",
    "words for a VAE",
    "a model cut short",
    "another model",
    "lost tensors",
    "no encoders",
    "no T5",
    "no VAE",
    "no tokenizer",
    "a typo in a config",
    "a config for more layers",
    "a config without rotations",
    "words for a config",
    "rotations of another width",
    "a model for rotations",
)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(small_model, tmp_path, monkeypatch, capsys, case):
    arguments, message = bad_files(tmp_path, small_model)[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    assert cli(*quick(small_model, "out", "--prompt", "a star"), *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written(small_model, monkeypatch, capsys):
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    assert cli(*quick(small_model, "/proc/pictures", "--prompt", "a star")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out_dir")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "--stepz: unknown flag; did you mean --steps?"),
        (["--model", "nothing.safetensors", "--prompt", "x"], "--model nothing.safetensors: no such file"),
        (["--prompt", "a dog", "--model", str(DEMO), "--residual_target_layers", "99"], "joint blocks: 0 to "),
    ],
)
def test_mistakes_as_a_real_process(tmp_path, arguments, message):
    done = shell(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


# ---- what is written -----------------------------------------------------------------------------


def test_a_run_writes_what_it_says(small_model, tmp_path, capsys):
    (tmp_path / "list.txt").write_bytes("\ufeffa red circle\r\n\r\n  a star\r\n".encode())
    arguments = quick(
        small_model, tmp_path / "out", "--prompt", tmp_path / "list.txt", "--postfix", "_x", "--num_images", 2
    )
    residual = ["--residual_target_layers", "1,2", "--residual_weights", "0.5,0.25", "--negative_prompt", "blue, gray"]
    assert cli(*arguments, *residual, "--seed_type", "fixed", "--seed", "7") == 0
    folder = tmp_path / "out" / "small" / "list_x"
    assert [p.name for p in pictures(tmp_path)] == [f"{i:06d}.png" for i in range(4)]
    assert pictures(tmp_path)[0].parent == folder
    assert sorted(p.name for p in folder.iterdir())[-1] == "run.json"
    settings = [settings_of(p) for p in pictures(folder)]
    assert [s["seed"] for s in settings] == [7, 8, 7, 8]
    assert [s["prompt"] for s in settings] == ["a red circle"] * 2 + ["a star"] * 2
    first = text_of(folder / "000000.png")
    record = json.loads(first[sd3.png.SETTINGS_CHUNK])
    assert record["model_sha256"] == sd3.files.WeightFile(small_model).sha256
    assert record["settings"]["model"] == "small.safetensors"
    assert record["settings"]["steps"] == 4  # named by the file
    assert record["versions"]["torch"] == torch.__version__ or record["versions"]["torch"] in torch.__version__
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished"
    assert [p["file"] for p in run["pictures"]] == [p.name for p in pictures(folder)]
    assert run["pictures"][3]["settings"] == settings[3]
    assert "4 images in" in capsys.readouterr().err
    with Image.open(folder / "000000.png") as image:
        assert image.size == (64, 48)
    assert str(small_model.parent) not in "".join(first.values())


def parse_a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """As A1111's own reader does: last line of `Name: value` pairs, quoted where needed."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    cut = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[cut:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:cut]).strip(), negative, {k: json.loads(v) if v[:1] == '"' else v for k, v in pairs}


def test_parameters_read_as_a1111_reads_them(small_model, tmp_path):
    prompt = 'a "red" circle, Steps: 9\nsecond line, naïve 東京'
    more = ["--residual_target_layers", "1 2", "--residual_weights", "0.5, 0.25", "--negative_prompt", "gray: all"]
    assert cli(*quick(small_model, tmp_path, "--prompt", prompt, "--seed_type", "roll", "--seed", 3), *more) == 0
    (path,) = pictures(tmp_path)
    got, negative, pairs = parse_a1111(text_of(path)["parameters"])
    assert (got, negative) == (prompt, "gray: all")
    assert pairs["Steps"] == "4"
    assert pairs["Sampler"] == "DPM++ 2M"
    assert pairs["CFG scale"] == "5.0"
    assert pairs["Seed"] == "3"
    assert pairs["Size"] == "64x48"
    assert pairs["Model"] == "small"
    assert pairs["Model hash"] == sd3.files.WeightFile(small_model).sha256[:10]
    assert pairs["Residual target layers"] == "1, 2"
    assert pairs["Residual weights"] == "0.5, 0.25"


def test_no_metadata(small_model, tmp_path):
    assert cli(*quick(small_model, tmp_path, "--prompt", "a star", "--no_metadata")) == 0
    assert text_of(pictures(tmp_path)[0]) == {}


def test_the_same_folder_twice_gets_a_number(small_model, tmp_path):
    for _ in range(3):
        assert cli(*quick(small_model, tmp_path, "--prompt", "a star", "--postfix", "_x", "--steps", 1)) == 0
    assert sorted(p.parent.name for p in pictures(tmp_path)) == ["a_star_x", "a_star_x_1", "a_star_x_2"]


def test_residual_off_with_other_flags_set_says_so_and_changes_nothing(small_model, tmp_path, capsys):
    base = ["--prompt", "a star", "--seed_type", "fixed"]
    assert cli(*quick(small_model, tmp_path / "a", *base)) == 0
    capsys.readouterr()
    empty = ["--residual_target_layers", "", "--residual_origin_layer", 2, "--residual_weights", "0.5"]
    assert cli(*quick(small_model, tmp_path / "b", *base, *empty)) == 0
    error = capsys.readouterr().err
    assert error.count("residual text streaming is off") == 1
    one, two = pictures(tmp_path)
    assert Image.open(one).tobytes() == Image.open(two).tobytes()


@pytest.mark.parametrize("kind", ["text", "init_image", "control_8b", "control_2b"])
def test_the_same_flags_give_the_same_picture_bit_for_bit(small_model, tmp_path, kind):
    Image.effect_noise((80, 50), 90).convert("RGB").save(tmp_path / "in.png")
    more = ["--prompt", "a red circle", "--seed_type", "fixed", "--cfg", "3"]
    if kind == "init_image":
        more += ["--init_image", tmp_path / "in.png", "--denoise", "0.5"]
    elif kind.startswith("control"):
        net = small_model.parent / f"{kind}.safetensors"
        more += ["--controlnet_ckpt", net, "--controlnet_cond_image", tmp_path / "in.png", "--steps", "3"]
    for name in ("a", "b"):
        assert cli(*quick(small_model, tmp_path / name, *more)) == 0
    assert cli(*quick(small_model, tmp_path / "c", *more, "--seed", "24")) == 0
    one, two, other = (Image.open(p).tobytes() for p in pictures(tmp_path))
    assert one == two
    assert one != other
    if kind != "text":
        assert (
            settings_of(pictures(tmp_path)[0])["init_image" if kind == "init_image" else "controlnet_cond_image"]
            == "in.png"
        )


def test_random_seeds_are_recorded_and_make_the_picture_again(small_model, tmp_path):
    assert cli(*quick(small_model, tmp_path / "a", "--prompt", "a star", "--num_images", 2)) == 0
    first, second = pictures(tmp_path)
    seeds = [settings_of(p)["seed"] for p in (first, second)]
    assert all(0 <= s < 100_000 for s in seeds)
    assert (
        cli(*quick(small_model, tmp_path / "b", "--prompt", "a star", "--seed_type", "fixed", "--seed", seeds[1])) == 0
    )
    assert Image.open(pictures(tmp_path / "b")[0]).tobytes() == Image.open(second).tobytes()


def test_a_nan_latent_saves_nothing_and_names_the_dtype_to_try(small_model, tmp_path, capsys):
    tensors = load_file(small_model)
    tensors["model.diffusion_model.final_layer.linear.bias"] += 1e6  # sound in the file, infinite in float16
    save_file(tensors, tmp_path / "nan.safetensors")
    for name in ("tokenizer", "tokenizer_3"):
        (tmp_path / name).symlink_to(small_model.parent / name)
    flags = ["--model", tmp_path / "nan.safetensors", "--prompt", "x", "--out_dir", tmp_path / "out", "--width", 32]
    assert cli(*flags, "--height", 32, "--steps", 1, "--dtype", "float16", "--device", "cpu") == 2
    assert "NaN or infinite in float16; no image is saved; try --dtype bfloat16 or float32" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_full_disk_leaves_no_half_written_file(tmp_path):
    def write(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the disk is full"):
        sd3.writing.atomic_write(tmp_path / "000000.png", write)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(small_model, tmp_path, monkeypatch, capsys):
    def full(handle):
        if os.pread(handle, 4, 0) == b"\x89PNG":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sd3.writing.os, "fsync", full)
    assert cli(*quick(small_model, tmp_path, "--prompt", "a star", "--steps", 1)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert "000000.png: cannot be written: the disk is full" in error[0]
    assert not pictures(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_being_stopped_keeps_what_is_finished(small_model, tmp_path, number, status):
    command = [sys.executable, ROOT / "sd3_infer.py", *quick(small_model, tmp_path, "--prompt", "a star")]
    command += ["--num_images", "500", "--steps", "20"]
    process = subprocess.Popen(
        [str(c) for c in command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENV,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job inherits SIGINT as ignored
    )
    deadline = time.time() + 120
    while len(pictures(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    assert "images are kept in" in error
    kept = pictures(tmp_path)
    assert 2 <= len(kept) < 500
    for path in kept:
        Image.open(path).load()
    run = json.loads(next(tmp_path.rglob("run.json")).read_text())
    assert run["status"] == "stopped"
    assert len(run["pictures"]) == len(kept)
    assert not list(tmp_path.rglob("*.partial"))


def test_notes_on_cut_prompts_and_unknown_words_come_once(tmp_path, capsys):
    prompt = "a red circle " * 30 + "dog"
    demo = ["--model", DEMO, "--out_dir", tmp_path, "--steps", 1, "--num_images", 2, "--device", "cpu"]
    assert cli(*demo, "--prompt", prompt) == 0
    error = capsys.readouterr().err
    assert error.count("CLIP takes 20 tokens") == 1
    assert error.count("CLIP takes 20 tokens, T5 takes the first 226 characters") == 1
    assert error.count('never saw "dog"; it knows: ') == 1


def test_list_models(small_model, capsys):
    assert cli("--list_models", "--model_folder", small_model.parent) == 0
    out = capsys.readouterr().out
    assert "found    small.safetensors" in out
    assert "missing  sd3.5_medium.safetensors  hf download stabilityai/stable-diffusion-3.5-medium" in out
    assert "clip tokenizer in" in out


# ---- defaults ------------------------------------------------------------------------------------

TABLE = [
    ("sd3_medium", 1.0, 50, 5.0, "dpmpp_2m"),
    ("sd3_medium_incl_clips_t5xxlfp8", 1.0, 50, 5.0, "dpmpp_2m"),
    ("sd3.5_medium", 3.0, 50, 5.0, "dpmpp_2m"),
    ("sd3.5_large", 3.0, 40, 4.5, "dpmpp_2m"),
    ("sd3.5_large_turbo", 3.0, 4, 1.0, "euler"),
    ("my_finetune", 3.0, 50, 5.0, "dpmpp_2m"),
]


@pytest.mark.parametrize(("name", "shift", "steps", "cfg", "sampler"), TABLE, ids=[row[0] for row in TABLE])
def test_defaults_per_model(name, shift, steps, cfg, sampler):
    flags = Flags.read({"model": f"some/where/{name}.safetensors"})
    values, skip_layer = resolve(flags)
    assert skip_layer is None
    assert values == {
        "shift": shift, "steps": steps, "cfg": cfg, "sampler": sampler, "width": 1024, "height": 1024,
        "prompt_mode": "reference",
    }  # fmt: skip


def test_a_flag_wins_even_at_zero_and_the_controlnet_over_the_file():
    model = {"model": "sd3.5_large.safetensors"}
    metadata = {"steps": "9", "cfg": "2.5", "width": "96", "shift": "nonsense"}
    values, _ = resolve(Flags.read(model), metadata)
    assert (values["steps"], values["cfg"], values["width"], values["shift"]) == (9, 2.5, 96, 3.0)
    values, _ = resolve(Flags.read(model | {"cfg": "0", "steps": "1"}), metadata, large_controlnet=True)
    assert (values["steps"], values["cfg"], values["sampler"], values["width"]) == (1, 0.0, "euler", 96)
    values, _ = resolve(Flags.read(model), metadata, large_controlnet=True)
    assert (values["steps"], values["cfg"]) == (60, 3.5)


def test_skip_layer_guidance_brings_its_own_cfg_unless_one_is_given():
    medium = {"model": "sd3.5_medium.safetensors", "skip_layer_cfg": "True"}
    values, slg = resolve(Flags.read(medium))
    assert values["cfg"] == 4.0
    assert slg == SkipLayerConfig(2.5, 0.01, 0.20, (7, 8, 9), cfg=4.0)
    assert resolve(Flags.read(medium | {"cfg": "5"}))[0]["cfg"] == 5.0
    assert resolve(Flags.read(medium | {"skip_layer_cfg": "False"})) == (resolve(Flags.read({"model": "x"}))[0], None)


def test_settings_hash_is_of_the_values_alone():
    one = Settings("a", "m.safetensors", seed=3)
    assert one.digest() == Settings(seed=3, model="m.safetensors", prompt="a").digest()
    assert (
        len({one.digest(), Settings("a", "m.safetensors", seed=4).digest(), Settings("b", "m", seed=3).digest()}) == 3
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a cat, on a mat!", "a_cat__on_a_mat_"),
        ("prompts/list-1.txt", "list-1"),
        ("..", "__"),
        ("x" * 80, "x" * 50),
        ("naïve 東京", "naïve_東京"),
        ("a/b", "a_b"),
        ("portrait of a cat, f/1.8, 35mm", "portrait_of_a_cat__f_1.8__35mm"),
        ("a/", "a_"),
    ],
)
def test_folder_names(text, name):
    assert folder_name(text) == name


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\r\n \ntwo # not a comment\n".encode())
    assert read_prompts(tmp_path / "p.txt") == (["one", "two # not a comment"], "p")
