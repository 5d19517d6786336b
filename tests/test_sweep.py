"""Sweeps: the grid, one load for many pictures, resuming after a kill, and one line for every mistake."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import DEMO, ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import settings_of

import sd3.engine
import sd3.png
import sd3.sweep.command
import sd3.weights
import sd3_infer
from sd3.mistakes import Mistake
from sd3.settings import Flags, digest_of
from sd3.sweep.grid import Grid, read_seeds

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
QUICK = ["--model", DEMO, "--device", "cpu", "--steps", "2"]
PROMPTS = ["a red circle", "two green stars", "a red circle left of a blue square"]


def sweep(out: Path, *arguments) -> int:
    return sd3.sweep.command.main(["--out", str(out), *map(str, arguments)])


def shell(out: Path, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / "sd3_sweep.py"), "--out", str(out), *map(str, arguments)]


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (out / "pictures").glob("*.png")}


def log(out: Path, event: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def results(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


# ---- the grid ------------------------------------------------------------------------------------


def names(raw: dict, file: str | None = None) -> list[tuple[str, str | None]]:
    return [(v.name, v.baseline) for v in Grid.read({"prompt": "x"} | raw, file).variants]


def test_off_is_always_there_and_made_first():
    assert names({}) == [("off", None)]
    targets = {"residual_target_layers": "3,5,7; 4,8 ;none", "residual_weights": "each:0.3;each:0.6"}
    assert names(targets) == [
        ("off", None),
        ("0:3,5,7:each:0.3", "off"),
        ("0:3,5,7:each:0.6", "off"),
        ("0:4,8:each:0.3", "off"),
        ("0:4,8:each:0.6", "off"),
    ]
    assert names({"cfg": "2;3", "residual_target_layers": "3", "steps": "5"}) == [
        ("off, cfg 2", None),
        ("off, cfg 3", None),
        ("0:3:1.0, cfg 2", "off, cfg 2"),
        ("0:3:1.0, cfg 3", "off, cfg 3"),
    ]


def test_weights_are_one_per_target_or_each():
    def weights(given):
        (_, variant) = Grid.read({"prompt": "x", "residual_target_layers": "3,5", "residual_weights": given}).variants
        return Flags.read(variant.raw).residual_weights, variant.name

    assert weights("each:0.3") == ("each:0.3", "0:3,5:each:0.3")
    assert weights(["0.3", "0.2"]) == ((0.3, 0.2), "0:3,5:0.3,0.2")
    with pytest.raises(
        Mistake, match=r"residual_weights: 1 given for 2 target layers; give one each, each:0\.3 for all"
    ):
        weights("0.3")
    many = Grid.read({"prompt": "x", "residual_target_layers": "3,5", "residual_weights": "each:0.3; 0.3,0.2;each:1"})
    assert [v.name for v in many.variants] == ["off", "0:3,5:each:0.3", "0:3,5:0.3,0.2", "0:3,5:each:1"]


def test_a_yaml_grid_with_named_variants(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        """
model: models/demo/demo.safetensors
prompt: [a red circle, "a star; or two"]
seed: [0-2, 7]
cfg: [2, 3]
residual_target_layers: [3, 5, 7]
residual_weights: [[0.3, 0.2, 0.1], "each:0.6"]
variants:
  gentle: {residual_target_layers: 2-7, residual_weights: "each:0.05", residual_mode: anchored}
  strong guidance: {cfg: 7}
""",
        encoding="utf-8",
    )
    grid = Grid.read({}, str(path))
    assert grid.prompts == ("a red circle", "a star; or two")
    assert grid.seeds == (0, 1, 2, 7)
    assert [(v.name, v.baseline) for v in grid.variants] == [
        ("off, cfg 2", None),
        ("off, cfg 3", None),
        ("0:3,5,7:0.3,0.2,0.1, cfg 2", "off, cfg 2"),
        ("0:3,5,7:each:0.6, cfg 2", "off, cfg 2"),
        ("0:3,5,7:0.3,0.2,0.1, cfg 3", "off, cfg 3"),
        ("0:3,5,7:each:0.6, cfg 3", "off, cfg 3"),
        ("gentle, cfg 2", "off, cfg 2"),
        ("gentle, cfg 3", "off, cfg 3"),
        ("strong guidance", "off, cfg 2"),
    ]
    assert Grid.read({"seed": "9", "cfg": "4"}, str(path)).seeds == (9,)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, unique=True), st.sampled_from([",", ";", " "]))
def test_seeds_are_taken_as_typed(seeds, between):
    assert read_seeds(between.join(map(str, seeds))) == tuple(seeds)


@given(st.integers(0, 2**62), st.integers(0, 50), st.integers(0, 2**62))
def test_ranges_of_seeds_hold_both_ends_and_each_seed_once(first, more, other):
    got = read_seeds(f"{first}-{first + more};{other}")
    assert list(got) == list(dict.fromkeys([*range(first, first + more + 1), other]))


# ---- mistakes ------------------------------------------------------------------------------------

BAD = [
    ([], "--prompt: is required"),
    (["--prompt", "x", "--promt", "y"], "--promt: unknown flag; did you mean --prompt?"),
    (["--prompt", "none.txt"], "--prompt none.txt: no such file"),
    (["--prompt", "empty.txt"], "the file holds no prompt"),
    (["--prompt", "x", "--seed", ""], "--seed: names no seed"),
    (["--prompt", "x", "--seed", "3-1"], "--seed 3-1: a range counts up"),
    (["--prompt", "x", "--seed", "0-x"], "--seed 0-x: must be a whole number"),
    (["--prompt", "x", "--seed", "0-99999999999"], "has at most 100,000 seeds"),
    (["--prompt", "x", "--seed", "0-99999", "--cfg", ";".join(map(str, range(1, 12)))], "at most 100,000"),
    (["--prompt", "x", "--num_images", "4"], "--num_images: is not allowed in a sweep; name the seeds"),
    (["--prompt", "x", "--out_dir", "y"], "--out_dir: is not allowed in a sweep; use --out"),
    (["--prompt", "x", "--replay", "y.png"], "--replay: is not allowed in a sweep"),
    (["--prompt", "x", "--cfg", "2;-1"], "--cfg -1: must be from 0"),
    (["--prompt", "x", "--cfg", "2;;3"], "--cfg: must be a number"),
    (["--prompt", "x", "--residual_target_layers", "1,2;3", "--residual_weights", "0.1,0.2"],
     "2 given for 1 target layers"),
    (["--prompt", "x", "--residual_target_layers", "1,2;3", "--residual_weights", "0.1"],
     "--residual_weights: 1 given for 2 target layers; give one each, each:0.1 for all"),
    (["--prompt", "x", "--residual_target_layers", "3;99"], "99: no such layer (this model has "),
    (["--prompt", "x", "--model", "a.safetensors;b.safetensors"], "--model a.safetensors: no such file"),
    (["--prompt", "x", "--width", "96;5000"], "--width 5000: must be a multiple of 16"),
    (["--prompt", "x", "--score", "clap"], "--score clap: must be one of demo, clip; did you mean clip?"),
    (["--prompt", "a cat", "--score", "demo"], '"a cat" is not a caption of coloured shapes'),
    (["--prompt", "x", "--score", "clip"], "--score clip: needs --clip_model"),
    (["--prompt", "x", "--score", "clip", "--clip_model", "nowhere"], "--clip_model nowhere: no such folder"),
    (["--prompt", "x", "--score", "clip", "--clip_model", "."], "--clip_model .: cannot be loaded"),
    (["--prompt", "x", "--clip_model", "."], "--clip_model: is for --score clip"),
    (["--prompt", "x", "--cpus_per_worker", "2"], "--cpus_per_worker: is for --ray"),
    (["--prompt", "x", "--grid", "none.yaml"], "--grid none.yaml: no such file"),
    (["--prompt", "x", "--grid", "torn.yaml"], "--grid torn.yaml: cannot be read as YAML"),
    (["--prompt", "x", "--grid", "list.yaml"], "must name flags and their values"),
    (["--prompt", "x", "--grid", "off.yaml"], "off is the baseline"),
    (["--prompt", "x", "--grid", "typo.yaml"], "--residual_target_layer: unknown flag; did you mean --residual_target"),
    (["--prompt", "x", "--grid", "two.yaml"], "cfg must have one value in a named variant"),
    (["--score", "demo", "--per_kind", "3", "--grid", "prompt.yaml"], "--per_kind: is for --score demo without"),
    (["--layout", "geneval"], "--layout geneval: needs --prompt"),
    (["--prompt", "x", "--out", "file"], "--out file: is not a folder"),
    (["--prompt", "x", "--out", "full"], "--out full: holds notes.txt but no sweep; name a new or empty folder"),
    (["--prompt", "x", "--out", "broken"], "its sweep.json cannot be read"),
    (["--prompt", "a star", "--out", "/proc/pictures"], "--out /proc/pictures: "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_grids(tmp_path, monkeypatch, capsys, arguments, message):
    if "/proc/pictures" in arguments and not os.path.isdir("/proc/self"):
        pytest.skip("needs a folder that even root cannot write")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "torn.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "prompt.yaml").write_text("prompt: a red circle")
    (tmp_path / "off.yaml").write_text("variants: {off: {cfg: 3}}")
    (tmp_path / "typo.yaml").write_text("variants: {a: {residual_target_layer: 3}}")
    (tmp_path / "two.yaml").write_text("variants: {a: {cfg: 2;3}}")
    (tmp_path / "file").write_text("")
    for name, inside in {"full": "notes.txt", "broken": "sweep.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("notes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    assert sd3.sweep.command.main(["--model", str(DEMO), "--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_mistakes_as_a_real_process(tmp_path):
    done = subprocess.run(shell(tmp_path / "o", "--prompt", "x", "--cgf", "2"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --cgf: unknown flag; did you mean --cfg? (--help_all lists all)\n"


def test_help_names_every_flag(capsys):
    assert sd3.sweep.command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    own = set(sd3.sweep.command.OWN)
    assert own <= set(re.findall(r"^  --(\w+)", shown, re.MULTILINE))
    assert own <= set(re.findall(r"--(\w+)", page))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["--out", "o", "--prompt", "x", "--cgf", "2"],
        ["--out", "o", "--prompt", "x", "--cfg", "-2"],
    ],
    ids=" ".join,
)
def test_an_answer_that_needs_only_the_words_imports_no_torch(words, tmp_path):
    code = (
        "import sys; from sd3.sweep.command import main; status = main(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.splitlines()[-1] == f"{0 if len(words) == 1 else 2} False"
    assert done.stderr.count("\n") == (len(words) > 1)


# ---- pictures ------------------------------------------------------------------------------------


def test_one_load_one_encoding_and_what_the_folder_holds(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-1", "--residual_target_layers", "3,5;4", "--batch_size", 4]
    assert sweep(out, *arguments, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "3 prompts x 2 seeds x 3 variants = 18 images" in shown
    assert "0 finished, 18 to make: time unknown" in shown
    assert not out.exists()
    assert sweep(out, *arguments) == 0
    assert len(hashes(out)) == 18
    (load,), (encode,) = log(out, "load"), log(out, "encode")
    assert load["model"] == "demo.safetensors"
    assert encode["prompts"] == sorted(["", *PROMPTS])
    assert [line["variant"] for line in results(out)] == ["off"] * 6 + ["0:3,5:each:1.0"] * 6 + ["0:4:1.0"] * 6
    for line in results(out):
        settings = settings_of(out / line["file"])
        assert line["file"] == f"pictures/{digest_of(settings)[:20]}.png"
        assert (settings["batch_size"], settings["prompt"], str(settings["seed"])) == (4, line["prompt"], line["seed"])
        heat = out / line["file"].replace("pictures", "difference")
        assert heat.exists() == (line["variant"] != "off")
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 96
        assert sheet.height > 6 * 96
    assert not [*out.rglob("*.partial")]
    before = {p: p.stat().st_mtime_ns for p in (out / "pictures").iterdir()}
    assert sweep(out, *arguments) == 0  # nothing to do
    assert "0 made, 18 were already finished, 0 failed" in capsys.readouterr().err
    assert sweep(out, *arguments, "--dry_run") == 0
    assert "18 finished, 0 to make: about 0 s" in capsys.readouterr().out
    assert sweep(out, *arguments[:-4], "--residual_target_layers", "3,5;4;6", "--batch_size", 4) == 0  # it grows
    assert "6 made, 18 were already finished, 0 failed" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_weights_for_all_targets_are_the_pictures_of_as_many_weights(tmp_path, prompts, capsys):
    """Earlier versions recorded one number as one weight per target: their sweeps go on when it is spelled `each:`."""
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0", "--residual_target_layers", "3,5", "--residual_weights"]
    assert sweep(tmp_path / "out", *arguments, "0.3,0.3") == 0
    capsys.readouterr()
    assert sweep(tmp_path / "out", *arguments, "each:0.3") == 0
    assert "0 made, 6 were already finished, 0 failed" in capsys.readouterr().err


def test_a_picture_does_not_depend_on_its_neighbours(tmp_path, prompts):
    assert sweep(tmp_path / "a", *QUICK, "--prompt", prompts, "--seed", "0-2", "--batch_size", 4) == 0
    assert sweep(tmp_path / "b", *QUICK, "--prompt", PROMPTS[1], "--seed", "2", "--batch_size", 4) == 0
    ((name, value),) = hashes(tmp_path / "b").items()
    assert hashes(tmp_path / "a")[name] == value


def test_the_copied_command_and_replay_make_the_same_picture(tmp_path, prompts, monkeypatch):
    out = tmp_path / "out"
    more = ["--residual_target_layers", "3,5", "--residual_weights", "0.2,0.1", "--residual_end", 0.6, "--cfg", "1;3"]
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "5", "--batch_size", 2, *more) == 0
    text = (out / "data.js").read_text().removeprefix("window.sweepData(").removesuffix(");\n")
    data = json.loads(text)
    for number in (1, 3):
        variant, prompt, seed, name, *_ = next(p for p in data["pictures"] if p[0] == number and p[1] == 2)
        words = shlex.split(data["variants"][variant]["command"])[2:]
        again = tmp_path / f"again{number}"
        extra = [f"--prompt={data['prompts'][prompt]}", f"--seed={data['seeds'][seed]}", f"--out_dir={again}"]
        assert sd3_infer.main([*words, *extra]) == 0
        assert next(again.rglob("*.png")).read_bytes() == (out / "pictures" / f"{name}.png").read_bytes()
        elsewhere = tmp_path / f"replayed{number}"
        replay = ["--replay", str(out / "pictures" / f"{name}.png"), "--out_dir", str(elsewhere)]
        assert sd3_infer.main(replay) == 0  # sweep.json says where the model lies
        assert next(elsewhere.rglob("*.png")).read_bytes() == (out / "pictures" / f"{name}.png").read_bytes()


def test_two_models_and_image_to_image(tmp_path, small_model, prompts):
    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "in.png")
    out = tmp_path / "out"
    more = ["--prompt", PROMPTS[0], "--init_image", tmp_path / "in.png", "--denoise", "0.5;0.7", "--device", "cpu"]
    assert sweep(out, "--model", f"{DEMO};{small_model}", "--steps", 4, "--width", 64, "--height", 48, *more) == 0
    assert len(hashes(out)) == 4
    assert len(log(out, "load")) == 2
    assert {line["baseline"] for line in results(out)} == {line["variant"] for line in results(out)}
    records = [sd3.png.read_record(p) for p in (out / "pictures").iterdir()]
    assert len({r["files"]["init_image"] for r in records}) == 1
    assert len({r["model_sha256"] for r in records}) == 2


def test_killed_three_times_it_ends_with_the_same_pictures(tmp_path, prompts):
    arguments = [
        *("--model", DEMO, "--device", "cpu", "--steps", 4, "--prompt", prompts, "--seed", "0-4", "--batch_size", 4),
        *("--residual_target_layers", "3,5;4;2-7", "--residual_weights", "each:0.1;each:0.3"),
    ]
    subprocess.run(shell(tmp_path / "whole", *arguments), check=True, capture_output=True, env=ENV)
    wanted = hashes(tmp_path / "whole")
    assert len(wanted) == 105
    out, luck = tmp_path / "killed", random.Random()
    for part in (1, 2, 3):
        process = subprocess.Popen(
            shell(out, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV
        )
        moment = luck.randrange(30 * part - 28, 30 * part)
        while process.poll() is None and (not out.exists() or len([*out.glob("pictures/*.png")]) < moment):
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert {n: h for n, h in hashes(out).items() if wanted[n] != h} == {}  # none half-written, none different
    subprocess.run(shell(out, *arguments), check=True, capture_output=True, env=ENV)
    assert hashes(out) == wanted
    assert not [*out.rglob("*.partial")]
    made = Counter(line["picture"] for line in log(out, "made"))
    assert max(made.values()) == 1  # no finished picture again
    runs = list(dict.fromkeys(line["process"] for line in log(out)))
    assert len(runs) == 4
    for run in runs:
        begun, ended = ([e for e in log(out, event) if e["process"] == run] for event in ("begin", "batch"))
        assert len(begun) - len(ended) <= 1  # at most one batch lost
    assert len(log(out, "load")) <= 4


def test_an_early_stop_leaves_whole_columns(tmp_path, prompts):
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-9", "--residual_target_layers", "3;4;5"]
    process = subprocess.Popen(
        shell(out, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    while process.poll() is None and (not out.exists() or len([*out.glob("pictures/*.png")]) < 35):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143
    assert "run the command again to resume" in error
    counts = Counter(line["variant"] for line in results(out))
    assert counts["off"] == 30
    assert list(counts) == ["off", "0:3:1.0", "0:4:1.0", "0:5:1.0"][: len(counts)]
    assert all(count == 30 for count in list(counts.values())[:-1])


def test_a_failure_is_one_line_and_the_rest_goes_on(tmp_path, prompts, monkeypatch, capsys):
    real = sd3.engine.Engine.sample

    def sample(self, batch, *more, **others):
        if any(s.seed == 1 for s in batch):
            raise RuntimeError("no luck\nat all")
        return real(self, batch, *more, **others)

    monkeypatch.setattr(sd3.engine.Engine, "sample", sample)
    out = tmp_path / "out"
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "0-2") == 1
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("failed")]
    assert lines == [f'failed: off, seed 1, "{p}": RuntimeError: no luck at all' for p in PROMPTS]
    assert "6 made, 0 were already finished, 3 failed" in error
    monkeypatch.undo()
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "0-2") == 0
    assert "3 made, 6 were already finished, 0 failed" in capsys.readouterr().err


def test_nan_in_one_picture_fails_it_alone(tmp_path, prompts, monkeypatch, capsys):
    real = sd3.engine.Engine.sample

    def sample(self, batch, *more, **others):
        latents = real(self, batch, *more, **others)
        latents[1, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(sd3.engine.Engine, "sample", sample)
    assert sweep(tmp_path / "out", *QUICK, "--prompt", prompts, "--seed", "0", "--batch_size", 3) == 1
    assert f'failed: off, seed 0, "{PROMPTS[1]}": the latent became NaN' in capsys.readouterr().err
    assert len(hashes(tmp_path / "out")) == 2


def test_a_damaged_picture_is_made_again(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-1"]
    assert sweep(out, *arguments) == 0
    wanted = hashes(out)
    cut, flipped, other, swapped, *_ = sorted((out / "pictures").iterdir())
    cut.write_bytes(cut.read_bytes()[:-40])
    data = bytearray(flipped.read_bytes())
    data[-100] ^= 1
    flipped.write_bytes(bytes(data))
    other.write_text("notes")
    swapped.write_bytes(sorted((out / "pictures").iterdir())[-1].read_bytes())  # another's settings
    capsys.readouterr()
    assert sweep(out, *arguments) == 0
    error = capsys.readouterr().err
    for path in (cut, flipped, other, swapped):
        assert f"note: {path} is damaged and is made again" in error
    assert "4 made, 2 were already finished" in error
    assert hashes(out) == wanted


def test_a_folder_of_another_sweep(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "0") == 0
    before = hashes(out)
    capsys.readouterr()
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "0", "--shift", "1.7") == 2
    assert "holds another sweep (3 images, none of this grid); name another folder" in capsys.readouterr().err
    assert sweep(out, *QUICK, "--prompt", prompts, "--seed", "0", "--shift", "1.7", "--dry_run") == 2
    assert hashes(out) == before


def test_a_file_that_changed_since(tmp_path, capsys):
    picture = tmp_path / "in.png"
    Image.effect_noise((96, 96), 90).convert("RGB").save(picture)
    arguments = [*QUICK, "--prompt", PROMPTS[0], "--init_image", picture, "--denoise", 0.5]
    assert sweep(tmp_path / "out", *arguments) == 0
    os.utime(picture)  # touched, but the same
    assert sweep(tmp_path / "out", *arguments) == 0
    Image.effect_noise((96, 96), 50).convert("RGB").save(picture)
    capsys.readouterr()
    assert sweep(tmp_path / "out", *arguments, "--seed", "23-24") == 2
    assert "is not the file that this sweep began with" in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    moved = picture.rename(tmp_path / "moved" / "in.png")
    arguments[arguments.index(picture)] = moved
    assert sweep(tmp_path / "out", *arguments) == 2
    assert f"{moved} is not the file that this sweep began with" in capsys.readouterr().err


def test_the_folder_and_the_model_may_move(tmp_path, prompts, monkeypatch, capsys):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    (tmp_path / "here" / "models").symlink_to(DEMO.parent)
    arguments = ["--device", "cpu", "--steps", 2, "--prompt", prompts, "--model"]
    monkeypatch.chdir(tmp_path / "here")
    assert sweep(Path("out"), *arguments, "models/demo.safetensors") == 0
    (tmp_path / "here" / "out").rename(tmp_path / "there" / "swept")
    monkeypatch.chdir(tmp_path / "there")
    capsys.readouterr()
    assert sweep(Path("swept"), *arguments, DEMO) == 0
    assert "0 made, 3 were already finished" in capsys.readouterr().err
    copy = tmp_path / "demo"
    shutil.copytree(DEMO.parent, copy)
    assert sweep(Path("swept"), *arguments, copy / DEMO.name) == 0  # copied: another time, the same contents
    with open(copy / DEMO.name, "r+b") as f:
        f.seek(-2, os.SEEK_END)
        f.write(b"xy")
    capsys.readouterr()
    assert sweep(Path("swept"), *arguments, copy / DEMO.name) == 2
    assert "is not the file that this sweep began with" in capsys.readouterr().err


def test_two_files_of_one_name(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.effect_noise((96, 96), 90).convert("RGB").save(tmp_path / name / "in.png")
    paths = f"{tmp_path / 'a' / 'in.png'};{tmp_path / 'b' / 'in.png'}"
    assert sweep(tmp_path / "out", *QUICK, "--prompt", PROMPTS[0], "--init_image", paths, "--denoise", "0.4") == 2
    assert "rename one of them" in capsys.readouterr().err


def test_a_folder_in_use(tmp_path, prompts):
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-40"]
    process = subprocess.Popen(shell(out, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    try:
        while process.poll() is None and not [*out.glob("pictures/*.png")]:
            time.sleep(0.01)
        second = subprocess.run(shell(out, *arguments), capture_output=True, text=True, env=ENV)
        assert process.poll() is None
        assert second.returncode == 2
        assert "another sweep is running in this folder" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        process.kill()
        process.wait()


def test_folders_of_text_encoders_cannot_be_told_apart(tmp_path, small_model, capsys):
    folders = f"{small_model.parent};{small_model.parent}/"
    assert sweep(tmp_path / "out", "--model", small_model, "--prompt", "a star", "--model_folder", folders) == 2
    assert "differ only in the folder or files of the text encoders" in capsys.readouterr().err


def test_settings_that_come_to_the_same_are_made_once(tmp_path, capsys):
    assert sweep(tmp_path / "out", *QUICK, "--prompt", PROMPTS[0], "--cfg", "2;2.0") == 0
    assert "note: off, cfg 2.0 has the same settings as off, cfg 2; made once" in capsys.readouterr().err
    assert len(hashes(tmp_path / "out")) == 1
    assert sweep(tmp_path / "b", "--model", DEMO, "--steps", 1, "--prompt", PROMPTS[0], "--device", "auto;cpu") == 0


def test_a_baseline_that_comes_late_is_compared_all_the_same(tmp_path, prompts, monkeypatch):
    real = sd3.engine.Engine.sample

    def sample(self, batch, *more, **others):
        if not batch[0].residual_target_layers:
            raise RuntimeError("not now")
        return real(self, batch, *more, **others)

    monkeypatch.setattr(sd3.engine.Engine, "sample", sample)
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-1", "--residual_target_layers", "3;4"]
    assert sweep(out, *arguments) == 1
    assert not [*(out / "difference").iterdir()]
    monkeypatch.undo()
    assert sweep(out, *arguments) == 0
    assert len([*(out / "difference").iterdir()]) == 12
    assert all(line["mean_difference"] for line in results(out) if line["variant"] != "off")


def test_scores_can_be_asked_for_afterwards(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    arguments = [*QUICK, "--prompt", prompts, "--seed", "0-1", "--residual_target_layers", "3"]
    assert sweep(out, *arguments) == 0
    assert not (out / "scores.csv").exists()
    assert sweep(out, *arguments, "--score", "demo") == 0
    assert "0 made, 12 were already finished" in capsys.readouterr().err
    scored = (out / "scores.jsonl").read_text().splitlines()
    assert len(scored) == 12
    assert sweep(out, *arguments, "--score", "demo") == 0
    assert (out / "scores.jsonl").read_text().splitlines() == scored  # each once
