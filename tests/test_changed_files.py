"""A file that changes while a process uses it is noticed before a picture is recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DEMO, TOKENIZERS, mmdit_config, modules, tensors_of
from PIL import Image
from safetensors.torch import save_file

import sd3.png
import sd3.probe.command
import sd3.probe.procrustes
import sd3.sweep.command
import sd3_infer
from sd3.engine import load_for
from sd3.mistakes import Where
from sd3.serve import Server
from sd3.settings import Flags
from sd3.sweep.folder import SweepFolder
from sd3.unchanged import Changed, Unchanged, stamp
from sd3_infer import SD3Inferencer

SHAPE = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--seed", "0"]


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the shipped model with its own encoders and tokenizers, to be spoiled."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, folder / name)
    shutil.copyfile(DEMO, folder / "m.safetensors")
    return folder / "m.safetensors"


def overwrite(path: Path) -> None:
    """Other weights into the same file, as `cp` does."""
    raw = bytearray(path.read_bytes())
    raw[-8:] = bytes(8)
    with open(path, "r+b") as f:
        f.write(raw)


def replace(path: Path) -> None:
    """Another file by rename, of equal size and time."""
    stat = path.stat()
    shutil.copyfile(path, path.with_name("new"))
    os.utime(path.with_name("new"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(path.with_name("new"), path)


def grow(path: Path) -> None:
    with open(path, "ab") as f:
        f.write(b"x")


def remove(path: Path) -> None:
    path.unlink()


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


CHANGES = [overwrite, replace, grow, remove, touch]


def after_the_first_picture(monkeypatch, change, path: Path) -> None:
    save = sd3.png.save_picture
    done = []

    def saved(*arguments):
        save(*arguments)
        if not done:
            done.append(change(path))

    monkeypatch.setattr(sd3.png, "save_picture", saved)


def one_line(error: str, *told: str) -> None:
    (line,) = [line for line in error.splitlines() if line.startswith("error")]
    assert all(text in line for text in told), line
    assert "Traceback" not in error


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("metadata", [True, False])
def test_a_run_stops_and_keeps_what_it_has(tmp_path, model, monkeypatch, capsys, change, metadata):
    after_the_first_picture(monkeypatch, change, model)
    more = [] if metadata else ["--no_metadata"]
    flags = ["--model", str(model), "--prompt", "red", "--num_images", "3", "--out_dir", str(tmp_path / "o"), *more]
    assert sd3_infer.main([*SHAPE, *flags]) == 2
    one_line(capsys.readouterr().err, f"--model {model}: ", "since it was opened")
    (record,) = (tmp_path / "o").rglob("run.json")
    assert [p["file"] for p in json.loads(record.read_text())["pictures"]] == ["000000.png"]
    assert [p.name for p in record.parent.glob("*.png")] == ["000000.png"]
    assert json.loads(record.read_text())["status"] == "failed"


USED = ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_3/tokenizer.json"]


@pytest.mark.parametrize("name", USED)
def test_tokenizers_count_too(tmp_path, model, monkeypatch, capsys, name):
    after_the_first_picture(monkeypatch, touch, model.parent / name)
    flags = ["--model", str(model), "--prompt", "red", "--num_images", "2", "--out_dir", str(tmp_path / "o")]
    assert sd3_infer.main([*SHAPE, *flags]) == 2
    one_line(capsys.readouterr().err, name, "has changed since it was opened")


def pieces(folder: Path) -> Path:
    """A model in pieces: MMDiT, VAE, three encoders, tokenizers."""
    folder.mkdir()
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, folder / name)
    (folder / "text_encoders").mkdir()
    parts = modules(mmdit_config())
    for prefix, module in parts.items():
        if "text_encoders" in prefix:
            role = prefix.split(".")[1]
            role = "t5xxl_fp16" if role == "t5xxl" else role
            save_file(tensors_of({"": module}), folder / "text_encoders" / f"{role}.safetensors")
        elif "diffusion" in prefix:
            save_file(tensors_of({prefix: module}), folder / "m.safetensors")
        else:
            save_file(tensors_of({prefix: module}), folder / "vae.safetensors")
    Image.new("RGB", (32, 32), "red").save(folder / "in.png")
    eye = torch.eye(128).expand(2, 128, 128).contiguous()
    told = {"origin_layer": "0", "target_layers": "[1, 2]"}
    save_file({"rotation_matrices": eye}, folder / "r.safetensors", told)
    return folder


NAMED = ["vae.safetensors", "text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors",
         "text_encoders/t5xxl_fp16.safetensors", "in.png", "r.safetensors"]  # fmt: skip


def flags_of(folder: Path) -> list[str]:
    residual = ["--residual_target_layers", "1,2", "--residual_mode", "aligned", "--residual_rotations"]
    return [*SHAPE, "--model", f"{folder}/m.safetensors", "--vae", f"{folder}/vae.safetensors", "--prompt", "red",
            "--init_image", f"{folder}/in.png", "--denoise", "0.5", *residual, f"{folder}/r.safetensors",
            "--steps", "3"]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_so_does_every_other_file(tmp_path, monkeypatch, capsys, name):
    folder = pieces(tmp_path / "models")
    after_the_first_picture(monkeypatch, touch, folder / name)
    assert sd3_infer.main([*flags_of(folder), "--num_images", "2", "--out_dir", str(tmp_path / "o")]) == 2
    one_line(capsys.readouterr().err, name, "has changed since it was opened")
    assert len(list((tmp_path / "o").rglob("*.png"))) == 1


def test_files_that_stay_as_they_are_are_no_trouble(tmp_path):
    folder = pieces(tmp_path / "models")
    assert sd3_infer.main([*flags_of(folder), "--num_images", "2", "--out_dir", str(tmp_path / "o")]) == 0
    assert len(list((tmp_path / "o").rglob("*.png"))) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_a_served_request_fails_with_one_line(tmp_path, model, change):
    raw = {"model": str(model), "device": "cpu", "steps": "1", "width": "32", "height": "32"}
    flags = Flags.read(raw)
    server = Server(load_for(flags), flags, raw, tmp_path)
    server.engine.tell.quiet = True
    assert server.answer('{"prompt": "red", "seed": 1}')["ok"]
    change(model)
    for prompt in ("red", "a new prompt"):
        answer = server.answer(json.dumps({"prompt": prompt, "seed": 1}))
        assert not answer["ok"]
        assert f"--model {model}: " in answer["error"]
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_a_served_picture_may_come_from_another_image_each_time(tmp_path, model):
    raw = {"model": str(model), "device": "cpu", "steps": "2", "width": "32", "height": "32"}
    flags = Flags.read(raw)
    server = Server(load_for(flags), flags, raw, tmp_path)
    line = json.dumps({"prompt": "red", "seed": 1, "denoise": 0.5, "init_image": str(tmp_path / "in.bmp")})
    hashes = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "in.bmp")
        answer = server.answer(line)
        assert answer["ok"], answer
        hashes.append(sd3.png.read_record(answer["files"][0])["files"]["init_image"])
    assert len(set(hashes)) == 2


def test_rotations_that_change_between_requests_are_read_again(tmp_path):
    folder = pieces(tmp_path / "models")
    raw = {"model": f"{folder}/m.safetensors", "vae": f"{folder}/vae.safetensors", "device": "cpu", "steps": "2",
           "width": "32", "height": "32", "dtype": "float32", "residual_mode": "aligned",
           "residual_target_layers": "1,2", "residual_weights": "each:5",
           "residual_rotations": f"{folder}/r.safetensors"}  # fmt: skip
    flags = Flags.read(raw)
    server = Server(load_for(flags), flags, raw, tmp_path)
    first = server.answer('{"prompt": "red", "seed": 1}')
    told = {"origin_layer": "0", "target_layers": "[1, 2]"}
    turned = torch.eye(128).flip(0).expand(2, 128, 128).contiguous()
    save_file({"rotation_matrices": turned}, folder / "r.safetensors", told)
    second = server.answer('{"prompt": "red", "seed": 1}')
    assert first["ok"], first
    assert second["ok"], second
    assert Image.open(first["files"][0]).tobytes() != Image.open(second["files"][0]).tobytes()


def test_a_sweep_stops_and_goes_on_with_the_right_file_only(tmp_path, model, monkeypatch, capsys):
    original = model.read_bytes()
    stat = model.stat()
    save = SweepFolder.save
    done = []

    def saved(self, *arguments):
        path = save(self, *arguments)
        if not done:
            done.append(overwrite(model))
        return path

    monkeypatch.setattr(SweepFolder, "save", saved)
    flags = ["--model", str(model), "--prompt", "red", *SHAPE[:-2], "--seed", "0-3", "--out", str(tmp_path / "s")]
    assert sd3.sweep.command.main(flags) == 2
    one_line(capsys.readouterr().err, f"--model {model}: ", "since it was opened")
    assert len(list((tmp_path / "s" / "pictures").glob("*.png"))) == 1
    monkeypatch.setattr(SweepFolder, "save", save)
    assert sd3.sweep.command.main(flags) == 2  # the changed file is not what it began with
    assert "is not the file that this sweep began with" in capsys.readouterr().err
    model.write_bytes(original)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sd3.sweep.command.main(flags) == 0
    assert "3 made, 1 were already finished" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", [True, False])
def test_the_python_api_notices_it_too(tmp_path, model, metadata):
    engine = SD3Inferencer().load(str(model), device="cpu")
    engine.tell.quiet = True
    options = {"steps": 1, "width": 32, "height": 32, "with_metadata": metadata}
    engine.gen_image("red", out_dir=str(tmp_path / "a"), **options)
    replace(model)
    with pytest.raises(Changed, match="since it was opened"):
        engine.gen_image("red", out_dir=str(tmp_path / "b"), **options)
    assert not list((tmp_path / "b").glob("*.png"))


def test_an_embedding_cache_takes_no_text_of_a_changed_file(tmp_path, model):
    engine = SD3Inferencer().load(str(model), device="cpu", embed_cache=str(tmp_path / "cache"))
    engine.tell.quiet = True
    engine.get_cond("red")
    known = set((tmp_path / "cache").iterdir())
    overwrite(model)
    with pytest.raises(Changed):
        engine.get_cond("blue")
    assert set((tmp_path / "cache").iterdir()) == known


def test_a_calibration_stops_too(tmp_path, model, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("red\nblue\n")
    real = sd3.probe.procrustes.Calibration.add

    def added(self, *arguments):
        real(self, *arguments)
        touch(model)

    monkeypatch.setattr(sd3.probe.procrustes.Calibration, "add", added)
    flags = ["--model", str(model), "--prompts", str(tmp_path / "p.txt"), "--targets", "3", "--steps", "1"]
    assert (
        sd3.probe.command.main(["calibrate", *flags, "--out", str(tmp_path / "r.safetensors"), "--device", "cpu"]) == 2
    )
    one_line(capsys.readouterr().err, f"--model {model}: ", "since it was opened")
    assert not (tmp_path / "r.safetensors").exists()


def test_stamps(tmp_path):
    path = tmp_path / "x"
    path.write_text("a")
    files = Unchanged()
    files.add(Where("x"), path)
    files.add(Where("none"), tmp_path / "none")
    files.check()
    first = stamp(path)
    path.write_text("bb")
    with pytest.raises(Changed, match=r"^x: has changed since"):
        files.check()
    files.add(Where("x"), path)
    files.check()
    files.add(Where("x"), path, first)
    with pytest.raises(Changed):
        files.check()
    (tmp_path / "none").write_text("")
    files.add(Where("x"), path)
    with pytest.raises(Changed, match=r"^none: "):
        files.check()
    assert stamp("a\0b") is None
