"""`--replay`: the picture again, bit for bit, and what is said where something is not as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DEMO, controlnet_tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import pictures, settings_of, text_of

import sd3.png
import sd3.versions
import sd3_infer
from sd3.models import SkipLayerConfig
from sd3.residual import ResidualConfig
from sd3_infer import SD3Inferencer

BASE = ["--model", str(DEMO), "--device", "cpu", "--steps", "4", "--prompt", "a red circle left of a blue square"]


def run(out: Path, *arguments) -> list[Path]:
    """The pictures of one run of the command line."""
    before = set(pictures(out))
    assert sd3_infer.main([*map(str, arguments), "--out_dir", str(out)]) == 0
    return [p for p in pictures(out) if p not in before]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A photo and two random ControlNets at the shipped model's width, and rotations."""
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((120, 90), 90).convert("RGB").save(folder / "photo.png")
    config = SD3Inferencer().load(str(DEMO), device="cpu").engine.config
    assert config.width == 128
    save_file(controlnet_tensors(config, chained=True), folder / "control_8b.safetensors")
    save_file(controlnet_tensors(config, chained=False), folder / "control_2b.safetensors")
    turn = torch.linalg.qr(torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1)))[0].contiguous()
    notes = {"origin_layer": "0", "target_layers": "[3, 5]"}
    save_file({"rotation_matrices": turn}, folder / "turn.safetensors", notes)
    return folder


def cases(files: Path) -> list[list]:
    control = ["--controlnet_cond_image", files / "photo.png", "--controlnet_ckpt"]
    targets = ["--residual_target_layers", "3,5"]
    return [
        ["--seed", 7],
        ["--seed_type", "rand", "--sampler", "dpmpp_2m", "--cfg", 1],
        [*targets, "--residual_weights", "0.3,-0.1", "--negative_prompt", "a star"],
        [*targets, "--residual_weights", "each:0.1", "--num_images", 3, "--batch_size", 2],
        [*targets, "--residual_mode", "anchored", "--residual_schedule", "exp:2", "--residual_end", "0.6"],
        [*targets, "--residual_mode", "aligned", "--residual_rotations", files / "turn.safetensors"],
        ["--init_image", files / "photo.png", "--denoise", 0.6, "--dtype", "float32"],
        [*control, files / "control_8b.safetensors", "--controlnet_strength", 0.7],
        [*control, files / "control_2b.safetensors", "--width", 80, "--height", 64, "--shift", 1.3],
        ["--no_t5", "--prompt", "notes ;.txt #1, 'naïve'\n --seed 3"],
    ]


@pytest.mark.parametrize("number", range(10))
def test_ten_settings_bit_for_bit(files, tmp_path, capsys, number):
    made = run(tmp_path / "out", *BASE, *cases(files)[number])
    for path in made:
        capsys.readouterr()
        (again,) = run(tmp_path / "again", "--replay", path)
        assert again.read_bytes() == path.read_bytes()  # settings and all
        assert f"replay: the same image as {path}, bit for bit" in capsys.readouterr().err


def test_other_flags_replace_single_settings(tmp_path, capsys):
    residual = ["--residual_target_layers", "3,5", "--residual_weights", "each:0.2"]
    (path,) = run(tmp_path / "a", *BASE, *residual, "--seed", 7)
    capsys.readouterr()
    (other,) = run(tmp_path / "b", "--replay", path, "--seed", "8", "--residual_target_layers", "2-4")
    then, now = settings_of(path), settings_of(other)
    assert {n for n in now if now[n] != then[n]} == {"seed", "residual_target_layers", "residual_weights"}
    assert now["residual_weights"] == [0.2] * 3
    assert "replay: changed seed 7 -> 8, residual_target_layers [3, 5] -> [2, 3, 4]" in capsys.readouterr().err
    (off,) = run(tmp_path / "c", "--replay", path, "--residual_target_layers", "none")
    (plain,) = run(tmp_path / "d", *BASE, "--seed", 7)
    assert off.read_bytes() == plain.read_bytes()
    more = run(tmp_path / "e", "--replay", path, "--prompt", "a star", "--num_images", 2)
    assert [settings_of(p)["prompt"] for p in more] == ["a star"] * 2
    assert [settings_of(p)["seed"] for p in more] == [7, 8]


def test_skip_layer_guidance_of_an_unknown_model_comes_back(tmp_path):
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.tell.quiet = True
    skip = SkipLayerConfig(1.5, 0.0, 0.9, (2, 3), cfg=2.0)
    residual = ResidualConfig(1, (2, 4), (0.1, 0.2))
    (path,) = engine.gen_image(
        ["a star"], steps=4, out_dir=str(tmp_path / "a"), skip_layer_config=skip, residual_config=residual
    )
    (again,) = run(tmp_path / "b", "--replay", path, "--model", DEMO)
    assert again.read_bytes() == path.read_bytes()
    (without,) = run(tmp_path / "c", "--replay", path, "--model", DEMO, "--skip_layer_cfg", "false")
    assert settings_of(without)["skip_layer"] is None


def test_what_is_not_as_it_was_is_said(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "in.png").write_bytes((files / "photo.png").read_bytes())
    (path,) = run(tmp_path / "a", *BASE, "--init_image", tmp_path / "in.png", "--denoise", 0.5, "--seed", 7)
    record = json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])
    assert record["hardware"]["threads"] == 1  # it is a small model
    capsys.readouterr()
    Image.effect_noise((120, 90), 50).convert("RGB").save(tmp_path / "in.png")
    real = sd3.versions.versions()
    monkeypatch.setattr(sd3.replay, "versions", lambda: real | {"torch": "9.9"})
    run(tmp_path / "b", "--replay", path)
    told = capsys.readouterr().err
    assert f"replay: different from the record: contents of init_image, torch {real['torch']} -> 9.9" in told
    assert "% of the pixels differ from" in told


def test_files_are_looked_for_by_name(tmp_path, monkeypatch, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--seed", 7)
    alone = tmp_path / "elsewhere" / "picture.png"
    alone.parent.mkdir()
    alone.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd3.replay, "shipped_folder", lambda: tmp_path)  # else the model that ships is found
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(alone)]) == 2
    assert "was made with model demo.safetensors, which is not in" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(DEMO.parent)
    (again,) = run(tmp_path / "b", "--replay", alone)
    assert again.read_bytes() == path.read_bytes()


def test_text_encoders_in_a_folder_of_their_own(small_model, tmp_path, monkeypatch):
    whole = load_file(small_model)
    encoders, models = tmp_path / "encoders", tmp_path / "models"
    for folder in (encoders, models):
        folder.mkdir()
    for role in ("clip_l", "clip_g", "t5xxl"):
        prefix = f"text_encoders.{role}.transformer."
        own = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        save_file(own, encoders / f"{role}.safetensors")
    for name in ("tokenizer", "tokenizer_3"):
        (encoders / name).symlink_to(DEMO.parent / name)
    rest = {k: v for k, v in whole.items() if not k.startswith("text_encoders.")}
    save_file(rest, models / "bare.safetensors", {"width": "64", "height": "48", "steps": "2"})
    base = ["--model", models / "bare.safetensors", "--model_folder", encoders, "--device", "cpu"]
    (path,) = run(tmp_path / "a", *base, "--prompt", "a star")
    assert sd3.png.read_record(path)["encoders"]["clip_l"]["name"] == "clip_l.safetensors"
    (again,) = run(tmp_path / "b", "--replay", path)  # run.json says where they lie
    assert again.read_bytes() == path.read_bytes()
    record = path.parent / "run.json"
    head = {name: value for name, value in json.loads(record.read_text()).items() if name != "pictures"}
    record.with_name("run.jsonl").write_text(f'{json.dumps(head)}\n{{"file": "000000.png"}}\n')
    record.unlink()
    (again,) = run(tmp_path / "c", "--replay", path)  # so does run.jsonl while the run goes on
    assert again.read_bytes() == path.read_bytes()


def test_bad_pictures(tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    (tmp_path / "words.png").write_text("words")
    (path,) = run(tmp_path / "a", *BASE)
    (tmp_path / "half.png").write_bytes(path.read_bytes()[:-200])
    record = json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])
    for name, change in {
        "newer": {"hat": 1},
        "odd": {"steps": "many"},
        "list": {"seed": [1, 2]},
        "number": {"model": 3},
        "nested": {"residual_target_layers": [3, 5], "residual_weights": 0.5},
    }.items():
        info = sd3.png.PngInfo()
        info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record | {"settings": record["settings"] | change}))
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png", pnginfo=info)
    capsys.readouterr()
    for name, message in {
        "none": "no such file",
        "plain": "holds no settings",
        "words": "is not an image",
        "half": "cannot be read",
        "newer": "was made by another version; unknown here: hat",
        "odd": "--steps many: must be a whole number",
        "list": "--seed [1, 2]: must be a whole number",
        "nested": "its settings cannot be read",
    }.items():
        assert sd3_infer.main(["--replay", str(tmp_path / f"{name}.png"), "--model", str(DEMO)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert sd3_infer.main(["--replay", str(tmp_path / "number.png")]) == 2
    assert "its settings cannot be read" in capsys.readouterr().err
