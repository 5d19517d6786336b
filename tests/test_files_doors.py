"""Every kind of bad file through every flag that names a file: one line, status 2, and nothing is made."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

import sd3_infer

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def one_tensor(**changes) -> bytes:
    return raw(json.dumps({"a": ENTRY | changes}).encode(), bytes(8))


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("model.safetensors", "x" * 100)
    return out.getvalue()


def torch_saved() -> bytes:
    out = io.BytesIO()
    torch.save([torch.ones(2)], out)
    return out.getvalue()


def cut_picture() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "PNG")
    return out.getvalue()[:1000]


GOOD = save({"a": torch.arange(64.0)})
BAD = {
    "empty": b"",
    "one byte": b"{",
    "zeros": bytes(4096),
    "a web page": b"<!DOCTYPE html>\n<html><head><title>401</title></head></html>",
    "a web page with a mark": b"\xef\xbb\xbf\n <html>sorry</html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5232\n",
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(100),
    "pickle 0": pickle.dumps({"a": [1.5] * 20}, 0),
    "pickle 1": pickle.dumps({"a": [1.5] * 20}, 1),
    "pickle 2": pickle.dumps({"a": [1.5] * 20}, 2),
    "pickle 5": pickle.dumps({"a": [1.5] * 20}, 5),
    "pickle of code": b"cposix\nsystem\n(S'true'\ntR.",
    "torch.save": torch_saved(),
    "a torch.save cut off": torch_saved()[:-30],
    "zip": zipped(),
    "gzip": gzip.compress(b"words"),
    "nested JSON": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a nested header": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "not UTF-8": b"\xff\xfe\xfd words \xff",
    "a header that is not UTF-8": raw(b'{"\xff\xff": {}}', bytes(8)),
    "a dtype that nobody knows": one_tensor(dtype="I4"),
    "bytes behind": one_tensor() + b"x" * 100,
    "cut off": GOOD[:-7],
    "a header beyond all bounds": struct.pack("<Q", 2**40) + b'{"a":',
    "metadata that is no text": raw(b'{"__metadata__":{"words":5},"a":' + json.dumps(ENTRY).encode() + b"}", bytes(8)),
    "a file of numbers": GOOD,
    "DDS": b"DDS " + struct.pack("<I", 124) + bytes(200),
    "half a picture": cut_picture(),
    "a TIFF of nothing": b"II*\x00\x08\x00\x00\x00\x00\x00",
}  # fmt: skip
PLACES = ("missing", "a folder", "a pipe", "a socket's device")
FLAGS = {
    "model": (),
    "vae": (),
    "clip_l": (),
    "clip_g": (),
    "t5xxl": (),
    "controlnet_ckpt": ("--controlnet_cond_image", "{picture}"),
    "controlnet_cond_image": ("--controlnet_ckpt", "{control}"),
    "init_image": (),
    "residual_rotations": ("--residual_mode", "aligned", "--residual_target_layers", "2"),
    "residual_config": (),
    "replay": (),
}


@pytest.fixture(scope="module")
def world(small_model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("doors")
    Image.new("RGB", (64, 48), "red").save(folder / "picture.png")
    for kind, data in BAD.items():
        (folder / kind).write_bytes(data)
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "a pipe")
    (folder / "a socket's device").symlink_to("/dev/zero")
    return {
        "folder": str(folder),
        "model": str(small_model),
        "picture": str(folder / "picture.png"),
        "control": str(small_model.parent / "control_8b.safetensors"),
    }


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", [*BAD, *PLACES])
def test_a_bad_file_is_one_line_and_nothing_is_made(world, tmp_path, capsys, flag, kind):
    path = f"{world['folder']}/{kind}"
    words = [f"--{flag}", path, *(w.format(**world) for w in FLAGS[flag])]
    words += [
        "--out_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--steps",
        "1",
        "--prompt",
        "x",
    ]
    if flag not in ("model", "replay"):
        words += ["--model", world["model"]]
    assert sd3_infer.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert f"--{flag}" in lines[0]
    assert path in lines[0]
    assert "Traceback" not in lines[0]
    assert len(lines[0]) < 1000
    assert not (tmp_path / "out").exists()


NAMED = {
    "empty": "is empty",
    "a web page": "a web page",
    "a web page with a mark": "a web page",
    "a git-lfs pointer": "a git-lfs pointer",
    "gguf": "a GGUF file",
    "pickle 0": "a pickle",
    "pickle 1": "a pickle",
    "pickle 2": "a pickle",
    "pickle 5": "a pickle",
    "pickle of code": "a pickle",
    "torch.save": "a zip archive",
    "zip": "a zip archive",
    "gzip": "a gzip archive",
    "nested JSON": "JSON",
    "zeros": "all zeros at the start",
    "bytes behind": "its header is damaged (100 bytes follow",
    "cut off": "is truncated",
    "a folder": "is a folder",
    "a pipe": "is not a file",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("flag", ["vae", "t5xxl", "model"])
def test_a_bad_download_is_called_what_it_is(world, capsys, flag, kind):
    words = [f"--{flag}", f"{world['folder']}/{kind}", "--device", "cpu"]
    assert sd3_infer.main(words + ([] if flag == "model" else ["--model", world["model"]])) == 2
    assert NAMED[kind] in capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["clip_l.safetensors", "t5xxl_fp16.safetensors"])
def test_a_bad_encoder_in_a_folder_names_the_file(small_model, tmp_path, capsys, kind, name):
    from safetensors.torch import load_file

    own = {k: v for k, v in load_file(small_model).items() if not k.startswith("text_encoders.")}
    save_file(own, tmp_path / "m.safetensors")
    for role in ("clip_l", "clip_g", "t5xxl_fp16"):
        prefix = f"text_encoders.{role.removesuffix('_fp16')}.transformer."
        tensors = {k.removeprefix(prefix): v for k, v in load_file(small_model).items() if k.startswith(prefix)}
        save_file(tensors, tmp_path / f"{role}.safetensors")
    (tmp_path / name).write_bytes(BAD[kind])
    words = ["--model", str(tmp_path / "m.safetensors"), "--model_folder", str(tmp_path), "--device", "cpu"]
    assert sd3_infer.main([*words, "--out_dir", str(tmp_path / "out"), "--prompt", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: --model_folder")
    assert str(tmp_path / name) in lines[0]
    assert not Path(tmp_path / "out").exists()
