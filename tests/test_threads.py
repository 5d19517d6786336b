"""How many threads of a CPU compute: decided when a model is opened, recorded, and taken again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT
from PIL import Image, PngImagePlugin
from test_cli import text_of
from test_replay import run
from test_sweep import sweep

import sd3.device
import sd3.engine
import sd3.png
import sd3_infer
from mmditx import Stream
from sd3.device import SMALL_MODEL, choose_threads
from sd3.engine import Engine
from sd3.planning import plan_pictures
from sd3.settings import Settings, Setup
from sd3.telling import Terminal

BASE = ["--model", DEMO, "--device", "cpu", "--steps", 2, "--prompt", "a red circle", "--seed", 7]


@pytest.fixture
def two():
    """A process that torch lets compute on two threads, as on a machine of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def recorded(path: Path) -> int:
    return json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])["hardware"]["threads"]


def rewrite(path: Path, change) -> None:
    """Changes the record in a picture."""
    record = json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])
    change(record)
    with Image.open(path) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record))
        image.save(path, pnginfo=info)


def test_a_small_model_takes_one_thread_and_a_large_one_as_many_as_torch(two):
    assert [choose_threads(None, n) for n in (10**6, SMALL_MODEL - 1, SMALL_MODEL, 2 * 10**9)] == [1, 1, 2, 2]
    assert [choose_threads(5, n) for n in (10**6, 2 * 10**9)] == [5, 5]


class Watch(Stream):
    """A hook that notes the threads of every model call."""

    def __init__(self):
        self.seen = []

    def begin(self, at) -> bool:
        self.seen.append(torch.get_num_threads())
        return False


def test_an_engine_computes_on_its_own_number_and_gives_the_process_its_own_back(two):
    engines = [Engine(Setup(model=str(DEMO), device="cpu", threads=n)) for n in (None, 3)]
    assert [engine.threads for engine in engines] == [1, 3]
    for engine in (*engines, engines[0]):  # in turn, in one process
        watch = Watch()
        plan = plan_pictures(engine, ["a star"], [1], steps=2, width=64, height=64)
        engine.sample(plan.pictures, streams=[watch])
        assert watch.seen == [engine.threads] * 2
        assert torch.get_num_threads() == 2
    plan = plan_pictures(engines[1], ["a star"], [1, 2], steps=1, width=64, height=64)
    for _ in engines[1].make(plan.pictures):
        assert torch.get_num_threads() == 2  # between pictures too


def test_threads_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, capsys):
    for value, why in (("0", "must be from 1 to 1024"), ("1.5", "must be a whole number"), ("x", "must be a whole")):
        words = ["--threads", value, "--model", tmp_path / "none.safetensors", "--prompt", "x"]
        assert sd3_infer.main(list(map(str, words))) == 2
        assert capsys.readouterr().err.startswith(f"error: --threads {value}: {why}")


def test_more_threads_than_cores_are_said(capsys, monkeypatch):
    monkeypatch.setattr(sd3.engine.os, "cpu_count", lambda: 2)
    assert Engine(Setup(model=str(DEMO), device="cpu", threads=3), Terminal()).threads == 3
    assert "note: threads 3: this machine has 2 CPUs" in capsys.readouterr().err


def test_the_number_is_no_part_of_a_pictures_identity():
    assert "threads" not in Settings(prompt="x", model="m").asdict()


def test_replay_takes_the_recorded_number(two, tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--threads", 2)
    (plain,) = run(tmp_path / "b", *BASE)
    assert [recorded(p) for p in (path, plain)] == [2, 1]
    capsys.readouterr()
    (again,) = run(tmp_path / "c", "--replay", path)
    assert again.read_bytes() == path.read_bytes()
    assert "bit for bit" in capsys.readouterr().err
    (other,) = run(tmp_path / "d", "--replay", path, "--threads", 1)
    assert recorded(other) == 1
    assert "different from the record: threads 2 -> 1" in capsys.readouterr().err


def test_a_record_of_text_encoders_on_a_cpu_counts_too_and_nonsense_is_named(tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE)
    rewrite(path, lambda r: r.update(hardware={"device": "some GPU", "text_encoder_threads": 2}))
    (again,) = run(tmp_path / "b", "--replay", path)
    assert recorded(again) == 2
    rewrite(path, lambda r: r.update(hardware={"device": "some GPU"}))
    (again,) = run(tmp_path / "c", "--replay", path)
    assert recorded(again) == 1
    rewrite(path, lambda r: r.update(hardware={"threads": 10**9}))
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(path), "--out_dir", str(tmp_path / "d")]) == 2
    assert "its settings cannot be read: --threads 1000000000: must be from 1 to 1024" in capsys.readouterr().err


def test_a_sweep_that_goes_on_takes_the_number_it_began_with(two, tmp_path):
    """One that an earlier version began took all of the machine's threads; here its pictures say two."""
    out, words = tmp_path / "out", [*BASE[:6], "--prompt", "a star", "--cfg", "1;2"]
    assert sweep(out, *words, "--seed", "0", "--threads", 2) == 0
    began = {p.name for p in (out / "pictures").iterdir()}
    (out / "sweep.json").unlink()
    assert sweep(out, *words, "--seed", "0-1") == 0
    made = [p for p in (out / "pictures").iterdir() if p.name not in began]
    assert [recorded(p) for p in made] == [2, 2]
    assert "--threads=2" in (out / "data.js").read_text(encoding="utf-8")
    assert sweep(out, *words, "--seed", "0-2", "--threads", 1) == 0  # who names a number gets it
    third = {p.name for p in (out / "pictures").iterdir()} - began - {p.name for p in made}
    assert [recorded(out / "pictures" / name) for name in third] == [1, 1]


def test_each_engine_of_a_sweep_goes_on_with_its_own_number(two, tmp_path):
    out, words = tmp_path / "out", [*BASE[:6], "--prompt", "a star"]
    assert sweep(out, *words, "--seed", "0", "--dtype", "float32", "--threads", 3) == 0
    assert sweep(out, *words, "--seed", "0-1", "--dtype", "float32;bfloat16") == 0
    numbers = {}
    for path in (out / "pictures").iterdir():
        record = json.loads(text_of(path)[sd3.png.SETTINGS_CHUNK])
        numbers.setdefault(record["settings"]["dtype"], []).append(record["hardware"]["threads"])
    assert numbers == {"float32": [3, 3], "bfloat16": [1, 1]}


def test_the_page_of_the_flag_says_the_rule():
    assert f"{SMALL_MODEL // 10**6} million" in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
