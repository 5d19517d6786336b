"""Runs with LoRAs: records, replay, sweeps resumed after a kill, serving, changed files, the probe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lora_writing as writing
import numpy as np
import pytest
from helpers import DEMO, DEMO_DEPTH, ROOT
from lora_writing import SPELLINGS, draw
from PIL import Image
from safetensors import safe_open

import sd3.probe.command
import sd3.sweep.command
import sd3_infer
from sd3 import png
from sd3.engine import load_for
from sd3.files import MMDIT_PREFIX, file_sha256
from sd3.serve import Server
from sd3.settings import Flags

QUICK = ["--model", DEMO, "--device", "cpu", "--dtype", "float32", "--steps", 2, "--prompt", "a red circle"]
MODULES = [("mmdit", f"transformer_blocks.{i}.{name}") for i in (0, 1) for name in ("attn.to_q", "attn.to_out.0")]
LAYERS = {
    f"transformer_blocks.{i}.attn.{theirs}": (f"joint_blocks.{i}.x_block.attn.{ours}", piece, pieces, False)
    for i in (0, 1)
    for theirs, ours, piece, pieces in (("to_q", "qkv", 0, 3), ("to_out.0", "proj", 0, 1))
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    """A folder with LoRAs of the shipped model: a and b as files, c as the folder of an adapter."""
    with safe_open(DEMO, "pt") as file:
        names = [name for name in file.keys() if name.startswith(MMDIT_PREFIX)]  # noqa: SIM118
        shapes = {"mmdit": {n[len(MMDIT_PREFIX) :]: tuple(file.get_slice(n).get_shape()) for n in names}}
    folder = tmp_path_factory.mktemp("loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "MMDIT", LAYERS)
        for seed, name in enumerate("ab"):
            pairs = draw(shapes, MODULES, lambda: 4, seed)
            SPELLINGS["diffusers"][0](pairs, folder / f"{name}.safetensors")
        SPELLINGS["PEFT folder"][0](draw(shapes, MODULES, lambda: 4, 3), folder / "c")
    return folder


def run(out: Path, *words) -> Path:
    assert sd3_infer.main([*map(str, words), "--out", str(out)]) == 0
    return out


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_record_has_names_strengths_and_hashes(loras, tmp_path, capsys):
    a, c = loras / "a.safetensors", loras / "c"
    path = run(tmp_path / "x.png", *QUICK, "--seed", 1, "--lora", f"{a}:0.5,{c}")
    record = png.read_record(path)
    assert record["settings"]["lora"] == [["a.safetensors", 0.5], ["c", 1.0]]
    parts = [c / "adapter_config.json", c / "adapter_model.safetensors"]
    assert record["files"]["lora"] == [file_sha256(a), file_sha256(*parts)]
    assert "LoRA: a.safetensors:0.5, c, " in Image.open(path).text["parameters"].replace('"', "")
    assert sd3_infer.main(["--info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "  lora                    a.safetensors:0.5,c\n" in told
    assert "--lora=a.safetensors:0.5,c" in told  # they are not found beside the image


def test_replay_finds_the_files_and_says_what_differs(loras, tmp_path, capsys, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(loras, here)
    out = tmp_path / "out"
    words = [*QUICK, "--seed", 1, "--lora", f"{here / 'a.safetensors'}:0.5,{here / 'c'}", "--out_dir", out]
    assert sd3_infer.main([*map(str, words)]) == 0
    (path,) = out.rglob("*.png")
    again = run(tmp_path / "again.png", "--replay", path)  # by run.json, which has the folder
    assert pixels(again) == pixels(path)
    assert "the same image" in capsys.readouterr().err
    alone = Path(shutil.copy(path, tmp_path / "alone.png"))
    assert sd3_infer.main(["--replay", str(alone), "--out", str(tmp_path / "y.png")]) == 2
    assert "was made with lora a.safetensors, which is not in" in capsys.readouterr().err
    monkeypatch.chdir(here)
    assert pixels(run(tmp_path / "z.png", "--replay", alone)) == pixels(path)
    run(tmp_path / "w.png", "--replay", path, "--lora", "none")
    assert "replay: changed lora a.safetensors:0.5,c -> None" in capsys.readouterr().err
    config = json.loads((here / "c" / "adapter_config.json").read_text())
    (here / "c" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {}}))
    assert pixels(run(tmp_path / "v.png", "--replay", path)) != pixels(path)
    assert "different from the record: contents of lora" in capsys.readouterr().err


def test_a_lora_without_effect_is_not_recorded(loras, tmp_path, capsys):
    a, b = loras / "a.safetensors", loras / "b.safetensors"
    path = run(tmp_path / "x.png", *QUICK, "--seed", 1, "--lora", f"{a}:0")
    note = f"note: --lora {a}: no effect at strength 0\n"
    err = capsys.readouterr().err
    assert note in err and err.count("--lora") == 1
    run(tmp_path / "z.png", *QUICK, "--seed", 1, "--lora", f"{a}:0,{b}")
    err = capsys.readouterr().err
    assert note in err and f"\n--lora {b}: LoRA, 4 modules of the MMDiT\n" in f"\n{err}" and err.count("--lora") == 2
    assert "lora" not in png.read_record(path)["settings"]
    assert path.read_bytes() == run(tmp_path / "y.png", *QUICK, "--seed", 1).read_bytes()


def test_a_sweep_says_a_note_once(loras, tmp_path, capsys):
    a, c = loras / "a.safetensors", loras / "c"
    again = a.parent / ".." / a.parent.name / a.name  # the same file, so the same variant
    values = f"none; {a}; {a}:0.5; {a},{c}; {a}:0; {again}"
    words = [*QUICK, "--out", tmp_path / "s", "--seed", "0-1", "--lora", values]
    assert sd3.sweep.command.main([*map(str, words)]) == 0
    err = capsys.readouterr().err
    assert len(list((tmp_path / "s" / "pictures").glob("*.png"))) == 8
    for path in (a, c):
        assert err.count(f"--lora {path}: LoRA, 4 modules of the MMDiT\n") == 1
    assert f"note: --lora {a}: no effect at strength 0 (" in err


def sweep(out: Path, *words) -> list[str]:
    return [sys.executable, str(ROOT / "sd3_sweep.py"), "--out", str(out), *map(str, words)]


def test_a_sweep_over_loras_resumed_after_a_kill(loras, tmp_path, capsys):
    a, b = loras / "a.safetensors", loras / "b.safetensors"
    words = [*QUICK, "--seed", "0-3", "--lora", f"none; {a}; {a}:0.5; {a},{b}"]
    process = subprocess.Popen(sweep(tmp_path / "s", *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pictures = lambda: {p: p.read_bytes() for p in (tmp_path / "s" / "pictures").glob("*.png")}  # noqa: E731
    deadline = time.time() + 120
    while process.poll() is None and len(pictures()) < 5 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = pictures()
    assert sd3.sweep.command.main(["--out", str(tmp_path / "s"), *map(str, words)]) == 0
    after = pictures()
    assert len(after) == 16 and before.items() <= after.items()
    loads = [line for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines() if '"load' in line]
    assert len(set(after.values())) == 16, loads
    labels = [
        v["name"] if isinstance(v, dict) else v
        for v in json.loads((tmp_path / "s" / "sweep.json").read_text())["variants"]
    ]
    assert labels == [
        "off, lora none",
        "off, lora a.safetensors",
        "off, lora a.safetensors:0.5",
        "off, lora a.safetensors,b.safetensors",
    ]
    capsys.readouterr()
    sets = set()
    for path in after:
        record = png.read_record(path)
        sets.add(json.dumps(record["settings"].get("lora")))
        again = run(tmp_path / "again.png", "--replay", path)
        assert pixels(again) == pixels(path)
    assert len(sets) == 4
    assert capsys.readouterr().err.count("the same image") == 16


def test_a_sweep_notices_another_lora(loras, tmp_path, capsys):
    """Files and folders, when it is resumed."""
    here = tmp_path / "here"
    shutil.copytree(loras, here)
    words = [*QUICK, "--out", tmp_path / "s", "--lora", f"{here / 'a.safetensors'}; {here / 'c'}", "--seed", 0]
    assert sd3.sweep.command.main([*map(str, words)]) == 0
    for path, other in (
        (here / "a.safetensors", here / "b.safetensors"),
        (here / "c" / "adapter_model.safetensors", ""),
    ):
        kept = path.read_bytes()
        path.write_bytes(Path(other).read_bytes() if other else kept[:-4] + b"\0\0\0\0")
        words[-1] = "0-1"
        assert sd3.sweep.command.main([*map(str, words)]) == 2
        assert "is not the file that this sweep began with" in capsys.readouterr().err
        path.write_bytes(kept)
    assert sd3.sweep.command.main([*map(str, words)]) == 0


def test_two_loras_of_one_name_are_refused(loras, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = Path(shutil.copy(loras / "b.safetensors", tmp_path / "other" / "a.safetensors"))
    words = [*QUICK, "--out", tmp_path / "s", "--lora", f"{loras / 'a.safetensors'}; {other}"]
    assert sd3.sweep.command.main([*map(str, words)]) == 2
    assert "has the same name as" in capsys.readouterr().err


def test_a_served_line_with_another_lora_is_refused(loras, tmp_path):
    """The LoRAs of the command line hold for all lines."""
    raw = {"model": str(DEMO), "device": "cpu", "steps": "2", "lora": str(loras / "a.safetensors")}
    flags = Flags.read(raw)
    engine = load_for(flags)
    server = Server(engine, flags, raw, tmp_path)
    answer = server.answer(json.dumps({"prompt": "a red circle", "seed": 1}))
    assert answer["ok"], answer
    assert png.read_record(answer["files"][0])["settings"]["lora"] == [["a.safetensors", 1.0]]
    answer = server.answer(json.dumps({"prompt": "a red circle", "lora": str(loras / "b.safetensors")}))
    assert answer["error"] == "--lora: belongs to the whole process; give it on the command line"
    assert not engine.damage()


def test_a_lora_that_changes_meanwhile_is_noticed(loras, tmp_path):
    path = Path(shutil.copy(loras / "a.safetensors", tmp_path / "a.safetensors"))
    raw = {"model": str(DEMO), "device": "cpu", "steps": "2", "lora": str(path)}
    server = Server(load_for(Flags.read(raw)), Flags.read(raw), raw, tmp_path)
    assert server.answer('{"prompt": "a red circle", "seed": 1}')["ok"]
    os.utime(path, (1, 1))
    assert "has changed since it was opened" in server.answer('{"prompt": "a red circle", "seed": 2}')["error"]


def test_the_probe_sees_the_lora(loras, tmp_path):
    words = ["measure", "--model", DEMO, "--device", "cpu", "--steps", 2, "--prompts", tmp_path / "p.txt"]
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    for name, more in (("plain", []), ("lora", ["--lora", loras / "a.safetensors"])):
        assert sd3.probe.command.main([*map(str, [*words, *more, "--out", tmp_path / name])]) == 0
    tables = [(tmp_path / name / "measure.csv").read_text() for name in ("plain", "lora")]
    assert tables[0] != tables[1]


def test_the_shipped_lora_draws_crosses_in_kohyas_names_too(tmp_path):
    pytest.importorskip("peft")
    from demo.lora import kohya, shows_cross

    shipped = ROOT / "models" / "demo" / "loras" / "cross.safetensors"
    assert shipped.stat().st_size < 10**6
    words = ["--model", "demo", "--device", "cpu", "--prompt", "a red cross", "--seed", 1]
    path = run(tmp_path / "a.png", *words, "--lora", shipped)
    assert shows_cross(np.asarray(Image.open(path)))
    assert not shows_cross(np.asarray(Image.open(run(tmp_path / "b.png", *words))))
    kohya(str(shipped), str(tmp_path / "k.safetensors"))
    assert pixels(run(tmp_path / "c.png", *words, "--lora", tmp_path / "k.safetensors")) == pixels(path)


def test_the_shipped_lora_is_listed_and_found_by_replay(tmp_path, capsys, monkeypatch):
    shipped = DEMO.parent / "loras" / "cross.safetensors"
    made = run(tmp_path / "made.png", *QUICK, "--seed", 1, "--lora", shipped)
    again = run(tmp_path / "again.png", "--replay", made)
    assert np.array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(again)))
    capsys.readouterr()
    assert sd3_infer.main(["--list_models"]) == 0
    assert f"cross.safetensors  a LoRA for a model ({DEMO_DEPTH} blocks of width 128)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"ss_tag_frequency": '{"a": {"x": 1e999}}'}, "a LoRA"),
        (
            {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {r"((\w|\.)*)*!": 3}})},
            "very long to match",
        ),
    ],
)
def test_hostile_metadata_is_no_traceback(loras, tmp_path, capsys, metadata, told):
    from safetensors.torch import load_file, save_file

    save_file(load_file(loras / "a.safetensors"), tmp_path / "x.safetensors", metadata)
    sd3_infer.main(["--info", str(tmp_path / "x.safetensors")])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    assert told in out.out + out.err
