"""The state of an interrupted calibration: taken whole, of the same run only, or not at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DEMO, TOKENIZERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd3.probe.command
import sd3.probe.procrustes
import sd3.probe.running
import sd3.probe.state

PROMPTS = [f"a red circle {word}" for word in ("left of a star", "above a square", "and a star", "alone", "x", "y")]


class Killed(BaseException):
    pass


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(sd3.probe.state, "SAVE_EVERY", -1.0)
    return tmp_path


def calibrate(folder: Path, out: str = "r.safetensors", *more: str) -> int:
    flags = ["--model", str(DEMO), "--prompts", str(folder / "p.txt"), "--targets", "3,5", "--steps", "2", "--dtype",
             "float32", "--device", "cpu", "--width", "32", "--height", "32", "--batch_size", "2"]  # fmt: skip
    return sd3.probe.command.main(["calibrate", *flags, "--out", str(folder / out), *more])


def rotations(folder: Path, out: str = "r.safetensors") -> torch.Tensor:
    return load_file(folder / out)["rotation_matrices"]


def interrupt(folder: Path, monkeypatch, *more: str, after: int = 4) -> Path:
    """A state that a kill after some passes left."""
    real, count = sd3.probe.procrustes.Calibration.add, []

    def add(self, *arguments):
        count.append(1)
        if len(count) > after:
            raise Killed
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sd3.probe.procrustes.Calibration, "add", add)
        with pytest.raises(Killed):
            calibrate(folder, "r.safetensors", *more)
    state = folder / ".r.safetensors.state"
    assert state.is_file()
    return state


def test_a_whole_state_goes_on_to_the_same_rotations(files, monkeypatch, capsys):
    assert calibrate(files, "whole.safetensors") == 0
    interrupt(files, monkeypatch)
    assert calibrate(files) == 0
    assert re.search(r"resuming after [1-5] of 6 prompts", capsys.readouterr().err)
    assert rotations(files).equal(rotations(files, "whole.safetensors"))
    assert not (files / ".r.safetensors.state").exists()


def test_batches_are_those_of_one_run(files, monkeypatch, capsys):
    """A stop in the middle of a group of prompts must not move the groups, and so the batches, of the rest."""
    monkeypatch.setattr(sd3.probe.running, "GROUP", 3)
    assert calibrate(files, "whole.safetensors") == 0
    interrupt(files, monkeypatch, after=6)
    assert calibrate(files) == 0
    assert re.search(r"resuming after [1245] of 6 prompts", capsys.readouterr().err)  # in the middle of a group
    assert rotations(files).equal(rotations(files, "whole.safetensors"))


def rewrite(state: Path, change) -> None:
    with safe_open(state, framework="pt") as f:
        metadata = dict(f.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(state).items()}
    tensors, metadata = change(tensors, metadata)
    save_file(tensors, state, metadata)


def value(tensors: dict, name: str, number: float) -> dict:
    tensors[name].view(-1)[0] = number
    return tensors


DAMAGE = {
    "without tokens": lambda t, m: ({n: x for n, x in t.items() if n != "tokens"}, m),
    "without cross": lambda t, m: ({n: x for n, x in t.items() if n != "cross"}, m),
    "one more": lambda t, m: (t | {"more": torch.zeros(1)}, m),
    "another shape": lambda t, m: (t | {"target_sum": t["target_sum"][:, :1].contiguous()}, m),
    "that would broadcast": lambda t, m: (t | {"origin_sum": t["origin_sum"][:, :1].contiguous()}, m),
    "another dtype": lambda t, m: (t | {"cross": t["cross"].double()}, m),
    "NaN": lambda t, m: (value(t, "cross", float("nan")), m),
    "infinity": lambda t, m: (value(t, "origin_sum", float("inf")), m),
    "another value": lambda t, m: (value(t, "cross", 1e6), m),
    "done is no number": lambda t, m: (t, m | {"done": "many"}),
    "done beyond all prompts": lambda t, m: (t, m | {"done": "7"}),
    "done below zero": lambda t, m: (t, m | {"done": "-2"}),
    "without done": lambda t, m: (t, {n: v for n, v in m.items() if n != "done"}),
    "without checksum": lambda t, m: (t, {n: v for n, v in m.items() if n != "sums"}),
    "of another run": lambda t, m: (t, m | {"identity": "0" * 64}),
    "without identity": lambda t, m: (t, {"format": "pt"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_left_alone(files, monkeypatch, capsys, damage):
    assert calibrate(files, "whole.safetensors") == 0
    rewrite(interrupt(files, monkeypatch), DAMAGE[damage])
    assert calibrate(files) == 0
    assert "going on" not in capsys.readouterr().err
    assert rotations(files).equal(rotations(files, "whole.safetensors"))


@pytest.mark.parametrize("data", [b"", b"\x10\0\0\0\0\0\0\0{}", b"[" * 100_000, b"<html>", None])
def test_a_state_that_is_no_file_of_tensors_is_left_alone(files, monkeypatch, data):
    state = interrupt(files, monkeypatch)
    raw = state.read_bytes()
    state.write_bytes(raw[:-30] if data is None else data)
    assert calibrate(files) == 0
    assert not state.exists()


OTHERS = [("--no_t5", "True"), ("--weights", "int8"), ("--offload", "True"), ("--dtype", "bfloat16"), ("--cfg", "1"),
          ("--steps", "3"), ("--seed", "5"), ("--buckets", "2"), ("--negative_prompt", "blur"), ("--shift", "2.5"),
          ("--sampler", "dpmpp_2m"), ("--batch_size", "1"), ("--targets", "3,6"), ("--origin", "1")]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=[" ".join(o) for o in OTHERS])
def test_a_state_of_other_settings_is_never_taken(files, monkeypatch, capsys, other):
    interrupt(files, monkeypatch)
    capsys.readouterr()
    assert calibrate(files, "r.safetensors", *other) == 0
    assert "going on" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.safetensors", "tokenizer/vocab.json"])
def test_nor_one_of_other_files(files, monkeypatch, capsys, name):
    models = files / "models"
    models.mkdir()
    for folder in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / folder, models / folder)
    shutil.copyfile(DEMO, models / "m.safetensors")
    more = ("--model", str(models / "m.safetensors"))
    interrupt(files, monkeypatch, *more)
    path = models / name
    raw = bytearray(path.read_bytes())
    if name.endswith("json"):
        raw += b"\n"
    else:
        raw[-2] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert calibrate(files, "r.safetensors", *more) == 0
    assert "going on" not in capsys.readouterr().err
