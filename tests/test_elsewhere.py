"""For people who come from other programs: names of flags, one file for one image, its settings, files of settings,
models from any folder, progress in logs, help.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import DEMO, ROOT
from PIL import Image

import sd3
import sd3.find
import sd3.models
import sd3.png
import sd3.probe.command
import sd3.sweep.command
import sd3.telling
import sd3_infer
from sd3.aliases import ALIASES
from sd3.command import read_infer_flags
from sd3.flags import FLAGS
from sd3.mistakes import Mistake
from sd3.probe.suggesting import needed_prompts, too_few_prompts

FEW = ["--model", DEMO, "--device", "cpu", "--steps", 2, "--width", 64, "--height", 64, "--prompt", "a star"]
OUTPUTS = "--out names the file of one image, --out_dir the folder of many"
SKIP_LAYER = "--skip_layer_cfg turns on skip-layer guidance with the model's own layers, scale and interval"
LORA = "--lora takes a strength behind the file: a.safetensors:0.5"
ANSWERS = {
    "cfg_scale": "is called --cfg here",
    "guidance_scale": "is called --cfg here",
    "scale": "is called --cfg here",
    "strength": "is called --denoise here",
    "denoising_strength": "is called --denoise here",
    "num_inference_steps": "is called --steps here",
    "ddim_steps": "is called --steps here",
    "n_iter": "is called --num_images here",
    "n_samples": "--num_images is the number of images per prompt, --batch_size how many are sampled at once",
    "num_images_per_prompt": "is called --num_images here",
    "batch_count": "is called --num_images here",
    "ckpt": "is called --model here",
    "ckpt_name": "is called --model here",
    "checkpoint": "is called --model here",
    "neg": "is called --negative_prompt here",
    "neg_prompt": "is called --negative_prompt here",
    "negative": "is called --negative_prompt here",
    "positive": "is called --prompt here",
    "output": OUTPUTS,
    "save_path": OUTPUTS,
    "outdir": "is called --out_dir here",
    "output_dir": "is called --out_dir here",
    "W": "is called --width here",
    "H": "is called --height here",
    "size": "give --width and --height in pixels",
    "seed_resize": "seeds cannot be blended; an image has one --seed",
    "noise_seed": "is called --seed here",
    "generator": "is called --seed here",
    "sampler_name": "is called --sampler here",
    "schedule_type": "is called --scheduler here",
    "init_img": "is called --init_image here",
    "image": "is called --init_image here",
    "control_image": "is called --controlnet_cond_image here",
    "controlnet_conditioning_scale": "is called --controlnet_strength here",
    "torch_dtype": "is called --dtype here",
    "precision": "is called --dtype here",
    "fp16": "--dtype float16",
    "from_file": "--prompt takes a .txt file with one prompt a line",
    "enable_model_cpu_offload": "is called --offload here",
    "medvram": "--offload and --weights int8 save GPU memory",
    "clip_skip": "is fixed: SD3 reads the hidden states before CLIP's last layer",
    "prompt_2": "all three text encoders read the same --prompt",
    "skip_guidance_layers": SKIP_LAYER,
    "target_layers": "is called --residual_target_layers here",
    "loras": "is called --lora here",
    "lora_scale": LORA,
}


def cli(*arguments: object) -> int:
    return sd3_infer.main([str(a) for a in arguments])


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


# ---- names of flags ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANSWERS)
def test_an_alias_is_answered_with_the_flag_or_the_truth(name, capsys):
    assert cli(f"--{name}", "3") == 2
    assert capsys.readouterr().err == f"error: --{name}: {ANSWERS[name]}\n"


def test_every_alias_has_an_answer_that_names_flags_that_exist(capsys):
    assert not ALIASES.keys() & FLAGS.keys()
    for name, reply in ALIASES.items():
        assert cli(f"--{name.replace('_', '-')}=3") == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: --{name}: ")
        assert line.count("\n") == 1
        assert "unknown flag" not in line
        assert "`" not in line
        assert re.fullmatch(r"\w+", reply) is None or f"is called --{reply} here" in line


def test_the_sweep_and_the_probe_answer_where_they_have_the_flag(tmp_path, capsys):
    assert sd3.sweep.command.main(["--out", str(tmp_path / "o"), "--guidance_scale", "3;5"]) == 2
    assert capsys.readouterr().err == "error: --guidance_scale: is called --cfg here\n"
    assert sd3.probe.command.main(["measure", "--cfg_scale", "3"]) == 2
    assert capsys.readouterr().err == "error: --cfg_scale: is called --cfg here\n"
    assert sd3.probe.command.main(["suggest", "--cfg_scale", "3"]) == 2
    assert "--cfg_scale: unknown flag" in capsys.readouterr().err


def test_python_gets_the_same_answers_without_dashes():
    engine = sd3_infer.SD3Inferencer()
    pipe = sd3.api.Pipeline(None)
    for call, name, told in (
        (pipe, "guidance_scale", "Pipeline() has no parameter guidance_scale; it is called cfg here"),
        (pipe, "num_inference_steps", "has no parameter num_inference_steps; it is called steps here"),
        (pipe, "lora", "has no parameter lora; load() and set_lora() take it"),
        (pipe, "save_path", f"save_path; {OUTPUTS}; out is for the command line only".replace("--", "")),
        (pipe, "dtype", "has no parameter dtype; it belongs to sd3.load"),
        (pipe, "dtipe", "has no parameter dtipe; did you mean dtype? It belongs to sd3.load"),
        (pipe, "torch_dtype", "torch_dtype; it is called dtype here; dtype belongs to sd3.load"),
        (pipe, "on_stepp", "has no parameter on_stepp; did you mean on_step?"),
        (pipe, "verbose", "has no parameter verbose; it is for the command line only"),
        (sd3.load, "steps", "load() has no parameter steps; it belongs to the call of the pipeline"),
        (sd3.load, "tel", "load() has no parameter tel; did you mean tell?"),
        (engine.load, "num_images", "load() has no parameter num_images; it belongs to gen_image"),
        (engine.gen_image, "offload", "has no parameter offload; it belongs to SD3Inferencer.load"),
        (engine.gen_image, "residual_mode", "has no parameter residual_mode; it belongs to residual_config"),
        (engine.gen_image, "residual_confg", "has no parameter residual_confg; did you mean residual_config?"),
        (
            engine.gen_image,
            "guidance_scale",
            "gen_image() has no parameter guidance_scale; it is called cfg_scale here",
        ),
        (engine.gen_image, "cfg", "has no parameter cfg; it is called cfg_scale here"),
        (engine.gen_image, "outdir", "has no parameter outdir; it is called out_dir here"),
        (engine.gen_image, "num_steps", "has no parameter num_steps; it is called steps here"),
    ):
        with pytest.raises(TypeError) as error:
            call("a star", **{name: 3})
        assert str(error.value).endswith(told)
        assert "--" not in str(error.value)
        assert "`" not in str(error.value)
    with pytest.raises(TypeError, match=r"load\(\) has no parameter torch_dtype; it is called dtype here"):
        sd3.load(DEMO, torch_dtype="float16")


# Modules that print what a shell takes: help, and commands that make an image again.
COMMANDS = (
    "sd3.command", "sd3.flags", "sd3.help", "sd3.info", "sd3.probe.command", "sd3.probe.suggesting",
    "sd3.sweep.command", "sd3.sweep.plan",
)  # fmt: skip
# And single texts elsewhere: what the command line in sd3_infer.py says when memory runs out, the dashes that
# `flag_name` puts before a field, and a separator in the hub's folder names.
SPELLED = {("sd3_infer", "--width, --height or --batch_size"), ("sd3.mistakes", "--"), ("sd3.models", "--")}


def test_only_commands_write_flags_with_dashes():
    """Messages name fields between backquotes, and a command spells them as flags: from Python they have no dashes.
    `hf download ... --local-dir`, which messages recommend, is another program's.
    """
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "sd3").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, holders)}
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        dashes = [t for t in texts if t not in docstrings and re.search(r"(?<![\w-])--(?!local-dir)(\w|$)", t)]
        found += [(name, text) for text in dashes if name not in COMMANDS]
    assert set(found) <= SPELLED


# ---- one file for one image ----------------------------------------------------------------------


def test_one_image_goes_into_a_file_and_is_made_again_from_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(*FEW, "--seed", 5, "--out", "new/fox.png") == 0
    captured = capsys.readouterr()
    assert captured.out == "new/fox.png\n"
    assert "1 image in " in captured.err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["fox.png"]
    assert not (tmp_path / "outputs").exists()
    assert sd3.png.read_record("new/fox.png")["settings"]["seed"] == 5
    assert cli("--replay", "new/fox.png", "--out", "again.png") == 0
    assert "bit for bit" in capsys.readouterr().err
    assert same(Image.open("new/fox.png"), Image.open("again.png"))
    assert cli(*FEW, "--seed", 6, "--out", "again.png", "--no_metadata") == 0
    assert not same(Image.open("new/fox.png"), Image.open("again.png"))
    assert "sd3_residual" not in Image.open("again.png").info


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num_images", 2], "is for one image, but the flags ask for 2; give --out_dir instead"),
        (["--out_dir", "x"], "does not go with --out_dir: it names a file, and no folder is made"),
        (["--postfix", "x"], "does not go with --postfix: it names a file, and no folder is made"),
        (["--serve_stdin"], "does not go with --serve_stdin"),
        (["--out", "a.jpg"], "must end in .png"),
        (["--out", "folder.png"], "is a folder"),
        (["--out", "file/a.png"], "file is not a folder"),
        (["--init_image", "a.png"], "is the file of --init_image, which would be lost; name another file"),
    ],
)
def test_what_a_single_file_does_not_go_with(tmp_path, monkeypatch, capsys, more, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    Image.new("RGB", (64, 64)).save("a.png")
    assert cli(*FEW, "--out", "a.png", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out ")
    assert error.count("\n") == 1
    assert told in error
    assert not (tmp_path / "outputs").exists()


# ---- the settings of an image --------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "one.png"
    more = ["--residual_target_layers", "3-7", "--residual_weights", "each:0.2", "--negative_prompt", "blue, 'gray'"]
    assert cli(*FEW, *more, "--seed", 7, "--out", path) == 0
    return path


def test_info_prints_the_settings_and_commands_that_make_the_image_again(image, tmp_path, capsys):
    assert cli("--info", image) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{image}: 64 x 64, made by version {sd3.__version__}, torch ")
    for line in (
        "  prompt                  a star",
        "  seed                    7",
        "  negative_prompt         blue, 'gray'",
    ):
        assert line in shown.splitlines()
    assert "residual_target_layers  3, 4, 5, 6, 7" in shown
    assert "residual_mode" not in shown  # at its default
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  python sd3_infer.py ")]
    assert commands[0] == f"python sd3_infer.py --replay {image}"
    for number, command in enumerate(commands):
        out = tmp_path / f"{number}.png"
        run = f"{command} --out {out}".replace("python sd3_infer.py", f"{sys.executable} {ROOT / 'sd3_infer.py'}")
        subprocess.run(["bash", "-c", run], check=True, capture_output=True)
        assert same(Image.open(image), Image.open(out))


def test_info_imports_no_torch(image):
    code = f"""import runpy, sys
sys.argv = ["sd3_infer.py", "--info", {str(image)!r}]
try:
    runpy.run_path({str(ROOT / "sd3_infer.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_answers_a_damaged_file_in_one_line(image, tmp_path, capsys):
    (tmp_path / "half.png").write_bytes(image.read_bytes()[:200])
    (tmp_path / "words.png").write_text("words")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, told in (
        ("half.png", "cannot be read"),
        ("words.png", "is not an image"),
        ("plain.png", "holds no settings: made with --no_metadata"),
        ("none.png", "no such file"),
    ):
        assert cli("--info", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --info {tmp_path / name}: ")
        assert told in error
        assert error.count("\n") == 1
    assert cli("--info", image, "--steps", 3) == 2
    assert capsys.readouterr().err == "error: --steps: does not go with --info, which only prints an image's settings\n"


def test_info_shows_whatever_a_record_holds(tmp_path, capsys):
    odd = {"settings": {"prompt": 3, "model": ["x"], "hat": {"a": 1}, "steps": "many", "skip_layer": 5}, "version": {}}
    info = sd3.png.PngInfo()
    info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(odd))
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=info)
    assert cli("--info", tmp_path / "odd.png") == 0
    assert "hat" in capsys.readouterr().out


# ---- files of settings ---------------------------------------------------------------------------


def test_flags_replace_those_of_a_file_of_settings_and_a_record_has_the_values(tmp_path):
    values = {"steps": 2, "cfg": 3, "residual_target_layers": [3, 4], "no_t5": True, "prompt": "a b, c", "vae": None}
    (tmp_path / "s.json").write_text(json.dumps(values))
    request = read_infer_flags(["--settings", str(tmp_path / "s.json"), "--cfg", "4", "--seed=5"])
    assert request.values == {
        "steps": 2, "cfg": 4.0, "residual_target_layers": (3, 4), "no_t5": True, "prompt": "a b, c", "seed": 5
    }  # fmt: skip
    assert request.words == [
        "--steps=2", "--residual_target_layers=3,4", "--no_t5=True", "--prompt=a b, c", "--cfg=4", "--seed=5"
    ]  # fmt: skip
    assert request.flags.settings is None
    assert read_infer_flags(request.words).values == request.values


def test_a_run_record_and_an_images_settings_are_files_of_settings(image, tmp_path):
    assert cli(*FEW, "--seed", 7, "--out_dir", tmp_path, "--residual_target_layers", "3") == 0
    (path,) = tmp_path.rglob("*.png")
    out = tmp_path / "a.png"
    assert cli("--settings", path.parent / "run.json", "--postfix", "_x") == 0
    assert len(list(tmp_path.rglob("000000.png"))) == 2
    record = sd3.png.read_record(path)
    record["settings"]["model"] = str(DEMO)
    (tmp_path / "image.json").write_text(json.dumps(record["settings"]))
    assert cli("--settings", tmp_path / "image.json", "--out", out) == 0
    assert same(Image.open(path), Image.open(out))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"steps": 0}', "steps 0: must be from 1 to 10000"),
        ('{"cfg_scale": 3}', "cfg_scale: is called cfg here"),
        ('{"stepz": 3}', "stepz: unknown flag; did you mean steps?"),
        ('{"replay": "x.png"}', "replay: does not belong in a settings file"),
        ('{"steps": 1, "steps": 2}', "'steps' is listed twice"),
        ('{"prompt": ["a"]}', "must be text"),
        ('{"skip_layer": 3}', "skip_layer 3: is not the model's own skip-layer guidance"),
        ("[1]", "must hold an object of flags such as"),
        ("steps: 3", "is not JSON"),
    ],
)
def test_a_mistake_in_a_file_of_settings_names_file_and_key(tmp_path, capsys, text, told):
    (tmp_path / "s.json").write_text(text)
    assert cli("--settings", tmp_path / "s.json") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --settings {tmp_path / 's.json'}: ")
    assert told in error
    assert error.count("\n") == 1


# ---- models from any folder ----------------------------------------------------------------------


def test_without_a_model_the_small_one_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("--prompt", "a star", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model models/sd3_medium.safetensors: no such file; get it with: hf download ")
    assert error.endswith("; --model demo is the small model that ships\n")
    assert cli("--model", "other/sd3_medium.safetensors", "--prompt", "a star", "--device", "cpu") == 2
    assert "demo" not in capsys.readouterr().err


def test_models_are_listed_from_any_folder_with_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toy.safetensors").symlink_to(DEMO)
    assert cli("--list_models", "--model_folder", "mine") == 0
    lines = capsys.readouterr().out.splitlines()
    own = sd3.models.own_models_folder()
    assert [line for line in lines if line.endswith(":")] == ["mine:", "models:", f"{own}:"]
    assert any(re.fullmatch(r"  found    toy\.safetensors  an SD3.*, \d\d\.\d\d MB", line) for line in lines)
    assert any("demo/demo.safetensors" in line for line in lines)
    assert sum("missing  sd3_medium.safetensors" in line for line in lines) == 1
    assert cli("--list_models") == 0
    assert f"{own}:" in capsys.readouterr().out
    monkeypatch.chdir(own.parent)
    assert sd3.find.model_folders(None) == [sd3.find.Path("models")]


# ---- progress and help ---------------------------------------------------------------------------


def test_a_log_gets_lines_and_no_bars(tmp_path):
    command = [sys.executable, ROOT / "sd3_infer.py", *FEW, "--steps", 20, "--out_dir", tmp_path]
    done = subprocess.run([str(c) for c in command], capture_output=True, check=True, env=os.environ)
    assert b"\r" not in done.stderr + done.stdout
    assert b"\x1b" not in done.stderr + done.stdout
    assert done.stderr.count(b"\n") < 10


def test_lines_of_a_log(monkeypatch):
    shown, now = io.StringIO(), [100.0]
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(sd3.telling.time, "monotonic", lambda: now[0])
    with sd3.telling.progress(4_200_000_000, "loading MMDiT", "B") as update:
        update(1_000_000_000)
        now[0] += 61
        update(1_000_000_000)
        now[0] += 1
        update(2_200_000_000)
    with sd3.telling.progress(3, "too short for a line") as update:
        update(3)
    with sd3.telling.progress(3, "silent", quiet=True) as update:
        now[0] += 61
        update(3)
    with sd3.telling.progress(18_400_000, "loading T5", "B") as update:  # a small model has no 0.02 GB
        now[0] += 2
        update(18_400_000)
    assert shown.getvalue() == (
        "loading MMDiT 2.00 GB of 4.20 GB ... 61.0 s\nloading MMDiT 4.20 GB ... 62.0 s\nloading T5 18.40 MB ... 2.0 s\n"
    )


def test_a_terminal_gets_a_bar(monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", shown)
    with sd3.telling.progress(3, "image 1/1") as update:
        update(3)
    assert "\rimage 1/1: " in shown.getvalue()


@pytest.mark.parametrize("word", ["help", "-help", "--help", "-h"])
@pytest.mark.parametrize("main", [sd3_infer.main, sd3.sweep.command.main, sd3.probe.command.main])
def test_help_is_help(main, word, capsys):
    assert main([word]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: sd3_")
    assert captured.err == ""


@pytest.mark.parametrize(
    ("main", "lines"),
    [
        (sd3.sweep.command.main, ["python sd3_sweep.py --model demo --out swept "]),
        (sd3.probe.command.main, [f"python sd3_probe.py {name} --" for name in sd3.probe.command.COMMANDS]),
    ],
)
def test_the_help_of_sweep_and_probe_has_an_example_each(main, lines, capsys):
    assert main(["--help"]) == 0
    examples = re.findall(r"example: (.*)", capsys.readouterr().out)
    assert len(examples) == len(lines)
    assert all(map(str.startswith, examples, lines))


def test_defaults_and_required_flags_in_the_help():
    text = " ".join(sd3_infer.help.text().split())
    assert "only the conditional pass runs there (default: 0)" in text
    assert "after which CFG stops; the steps after it take half the time (default: 1)" in text
    assert "(required)" in " ".join(sd3.sweep.command.help_text().split())
    assert sd3.probe.command.help_text().count("(required)") == 5
    assert FLAGS["no_t5"].read.range() == "switch"


def test_the_help_has_groups_examples_kinds_of_values_and_defaults():
    text = sd3_infer.help.text()
    assert max(map(len, text.splitlines())) <= 115
    assert text.index("Prompt and image") < text.index("Sampling") < text.index("Instead of new images")
    for part in (
        "  --steps N ",
        "  --cfg X ",
        "  --no_t5  ",
        "(default: the model's)",
        "example: python sd3_infer.py ",
    ):
        assert part in text
    assert "`" not in text


def test_suggest_says_how_many_prompts_it_needs(capsys):
    assert sd3.probe.command.main(["help"]) == 0
    assert "about 100 different prompts" in " ".join(capsys.readouterr().out.split())
    assert needed_prompts(0.05) == 100
    assert too_few_prompts({"kept_prompts": 100}, 0.05) == ""
    told = "with 25 prompts the standard error of retrieval is up to 0.10; for a tolerance of 0.05, measure about 100"
    assert told in too_few_prompts({"kept_prompts": 25}, 0.05)
    assert too_few_prompts({}, 0.05) == too_few_prompts({"kept_prompts": 3}, 0.0) == ""


def test_a_mistake_about_a_flag_reads_without_dashes_in_python():
    with pytest.raises(Mistake) as error:
        sd3.flags.check_flag("cfg_scale")
    assert str(error.value) == "cfg_scale: is called cfg here"


def test_where_to_get_a_model(tmp_path, monkeypatch, capsys):
    """A released model by its bare name, and a repository of the hub."""
    monkeypatch.chdir(tmp_path)
    assert sd3_infer.main(["--prompt", "x", "--model", "sd3.5_medium"]) == 2
    file = "sd3.5_medium.safetensors"
    wanted = f"hf download stabilityai/stable-diffusion-3.5-medium {file} --local-dir models, then give models/{file}"
    assert wanted in capsys.readouterr().err
    name = "stabilityai/stable-diffusion-3-medium-diffusers"
    assert sd3_infer.main(["--prompt", "x", "--model", name]) == 2
    folder = "models/stable-diffusion-3-medium-diffusers"
    assert f"hf download {name} --local-dir {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "right"), [("--vae_path", "--vae"), ("--unet", "--model"), ("--eta", "--sampler")])
def test_more_names_from_elsewhere(flag, right, capsys):
    assert sd3_infer.main([flag, "1", "--prompt", "x"]) == 2
    assert right in capsys.readouterr().err
