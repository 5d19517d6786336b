"""Memory: what runs out is known as that, with the flags to turn down; long runs hold few texts and short records."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT
from PIL import Image

import sd3.png
import sd3.probe.command
import sd3.probe.suggesting
import sd3.sweep.command
import sd3.sweep.work
import sd3.text
import sd3.weights
import sd3_infer
from sd3.engine import Engine
from sd3.memory import OutOfMemory, explained, out_of_memory
from sd3.network import Network
from sd3.record import RunRecord
from sd3.settings import Flags, Settings
from sd3.streams import MOST_LINES
from sd3.telling import Terminal
from sd3.text import TextEncoders, in_groups
from sd3_infer import SD3Inferencer

SMALL = f"--model {DEMO} --device cpu --steps 1 --width 32 --height 32 --dtype float32".split()
CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def infer(out: Path, *more) -> int:
    return sd3_infer.main([*SMALL, "--out_dir", str(out), *map(str, more)])


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (RuntimeError(CPU), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:80] . DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("unable to mmap 17 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("--prompt: out of memory is a prompt"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known(error, known):
    assert out_of_memory(error) == known
    with pytest.raises(OutOfMemory if known else type(error)), explained("sampling", "a smaller --width"):
        raise error


@pytest.mark.parametrize(
    ("owner", "place", "more", "told"),
    [
        (Network, "sample", (), "out of memory while sampling; try a smaller --width or --height"),
        (
            Network,
            "sample",
            ("--num_images", 2, "--batch_size", 2),
            "try a smaller --batch_size, --width or --height",
        ),
        (Engine, "decode", (), "out of memory while decoding; try a smaller --vae_tile"),
        (TextEncoders, "_run_clip", (), "out of memory while encoding prompts; try --text_encoder_device cpu"),
    ],
)
def test_the_flags_to_turn_down_are_those_of_the_stage(tmp_path, monkeypatch, capsys, owner, place, more, told):
    def full(*_, **__):
        raise RuntimeError(CPU)

    monkeypatch.setattr(owner, place, full)
    assert infer(tmp_path, "--prompt", "red", *more) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert told in line
    assert not list(tmp_path.rglob("*.png"))


def test_weights_that_do_not_fit_name_other_flags(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError(CPU)

    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", full)
    monkeypatch.setattr(TextEncoders, "encode", lambda *_: None)
    assert infer(tmp_path, "--prompt", "red") == 1
    assert "out of memory while loading the MMDiT; try --weights int8" in capsys.readouterr().err


def test_a_sweep_goes_on_without_what_did_not_fit(tmp_path, monkeypatch, capsys):
    real = Network.sample

    def wide_fails(self, settings, start, *arguments, **options):
        if start.shape[-1] > 4:
            raise RuntimeError(CPU)
        return real(self, settings, start, *arguments, **options)

    monkeypatch.setattr(Network, "sample", wide_fails)
    flags = [flag if flag != "32" else "32;64" for flag in SMALL[:8]] + SMALL[8:]
    assert sd3.sweep.command.main([*flags, "--out", str(tmp_path / "o"), "--prompt", "red", "--seed", "0-1"]) == 1
    error = capsys.readouterr().err
    assert error.count("failed: off") == 2
    assert "out of memory while sampling; try a smaller --width" in error
    assert len(list((tmp_path / "o" / "pictures").glob("*.png"))) == 2


def test_suggest_does_not_name_the_width(tmp_path, monkeypatch, capsys):
    rows = [{"step": 0, "sigma": 1.0, "block": block, "retrieval": 0.5} for block in range(2)]
    record = {"depth": 2, "rows": rows, "chance": {"retrieval": 0.1}}
    (tmp_path / "m.json").write_text(json.dumps(record))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(sd3.probe.suggesting, "suggest", full)
    assert sd3.probe.command.main(["suggest", "--measurement", str(tmp_path / "m.json")]) == 1
    error = capsys.readouterr().err
    assert "blocks in --measurement" in error
    assert "--width" not in error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_a_real_limit_is_one_line(tmp_path):
    flags = ["--prompt", "red", "--num_images", "1024", "--batch_size", "1024", "--width", "256", "--height", "256"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "sd3_infer.py"), *SMALL[:6], *flags, "--dtype", "float32", "--out_dir", tmp_path],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "out of memory" in line
    assert "--batch_size" in line
    assert "Traceback" not in done.stderr


# ---- many prompts --------------------------------------------------------------------------------


def files(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.rglob("[0-9]*.png"))]


def test_prompts_are_encoded_in_groups_and_the_pictures_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("".join(f"a red circle {i}\n" for i in range(10)))
    flags = ["--prompt", tmp_path / "p.txt", "--seed", 1, "--batch_size", 3, "--pad_batch", "True"]
    assert infer(tmp_path / "whole", *flags) == 0
    made: list[tuple[str, int]] = []
    encode, save = TextEncoders.encode, sd3.png.save_picture

    def noted(self, wanted):
        encode(self, wanted)
        made.append(("encode", self.count))

    monkeypatch.setattr(sd3.text, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(TextEncoders, "encode", noted)
    monkeypatch.setattr(sd3.png, "save_picture", lambda *a: (save(*a), made.append(("picture", 0))))
    assert infer(tmp_path / "groups", *flags) == 0
    assert files(tmp_path / "groups") == files(tmp_path / "whole")
    assert [name for name, _ in made[:2]] == ["encode", "picture"]
    assert sum(name == "encode" for name, _ in made) == 4
    assert max(held for _, held in made) <= 4


def test_so_are_those_of_a_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("".join(f"a red circle {i}\n" for i in range(7)))
    flags = [*SMALL, "--prompt", str(tmp_path / "p.txt"), "--seed", "0", "--residual_target_layers", "3"]
    assert sd3.sweep.command.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(sd3.sweep.work, "TEXTS_AT_ONCE", 4)
    assert sd3.sweep.command.main([*flags, "--out", str(tmp_path / "groups")]) == 0
    both = [
        {p.name: p.read_bytes() for p in (tmp_path / name / "pictures").glob("*.png")} for name in ("whole", "groups")
    ]
    assert both[0] == both[1]
    log = [json.loads(line) for line in (tmp_path / "groups" / "log.jsonl").read_text().splitlines()]
    assert max(line["texts"] for line in log if line["event"] == "encode") <= 4


def test_the_first_of_very_many_prompts_does_not_wait_for_the_last(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("".join(f"a red circle {i}\n" for i in range(3000)))
    encoded: list[int] = []
    encode = TextEncoders.encode

    def noted(self, wanted):
        encode(self, wanted)
        encoded.append(self.count)

    monkeypatch.setattr(TextEncoders, "encode", noted)

    def first(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sd3.png, "save_picture", first)
    assert infer(tmp_path / "o", "--prompt", tmp_path / "p.txt") == 130
    assert len(encoded) == 1
    assert encoded[0] <= sd3.text.TEXTS_AT_ONCE


def test_encoded_prompts_are_dropped_when_there_are_many(small_model):
    """1,000 prompts, each encoded once: never more than `most` are held, the last used among them."""
    text = SD3Inferencer().load(str(small_model), device="cpu", dtype="float32").engine.text
    text.most = 50
    wanted = [(f"a red circle {i}", 16) for i in range(1000)]
    first = text.get_cond(*wanted[0])
    for group in in_groups(wanted, lambda key: [key, ("", 16)], 40):
        text.encode([*group, ("", 16)])
        assert text.count <= 50
    assert text.opened == 3 * (1 + -(-1000 // 39))
    text.get_cond("", 16), text.get_cond(*wanted[-1])
    assert text.opened == 3 * 27  # both are held
    assert torch.equal(text.get_cond(*wanted[0])[0], first[0])  # dropped, and encoded again
    assert text.opened == 3 * 28
    text.encode(wanted[:70])  # all that are wanted at once are held
    assert text.count == 70
    text.encode([("a star", 16)])
    assert text.count == 50


def test_what_was_said_is_not_remembered_for_ever():
    terminal = Terminal(quiet=True)
    for number in range(3 * MOST_LINES):
        terminal.note(f"line {number}")
        terminal.say(f"other {number}")
    assert len(terminal.first.lines) <= MOST_LINES


def test_a_long_record_is_written_once_and_not_again_with_every_picture(small_engine, tmp_path, monkeypatch):
    """10,000 pictures: a line for each, and all of them once more in the end."""
    written: list[int] = []
    atomic_write, append_line = sd3.writing.atomic_write, sd3.writing.append_line

    def counted(path, write):
        atomic_write(path, write)
        written.append(path.stat().st_size)

    def appended(path, value):
        before = path.stat().st_size if path.exists() else 0
        append_line(path, value)
        written.append(path.stat().st_size - before)

    monkeypatch.setattr(sd3.writing, "atomic_write", counted)
    monkeypatch.setattr(sd3.writing, "append_line", appended)
    record = RunRecord(tmp_path, Flags(), [], 0, small_engine.engine)
    with record.recording():
        for number in range(10_000):
            record.add(tmp_path / f"{number:06d}.png", Settings("a", "m", seed=number), {"model_sha256": "x"})
    run = json.loads((tmp_path / "run.json").read_text())
    assert [p["settings"]["seed"] for p in run["pictures"]] == list(range(10_000))
    assert (run["status"], run["planned"], run["model_sha256"]) == ("finished", 10_000, "x")
    assert len(written) == 10_003  # with a first and a last line
    assert sum(written) < 2.1 * written[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
