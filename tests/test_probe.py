"""`python -m sd3.probe`: measures equal direct ones, rotations are the best there are, runs go on after a stop."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import DEMO, ROOT, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import sd3.probe.command
import sd3.probe.running
import sd3.probe.state
import sd3.weights
import sd3_infer
from mmditx import standardise
from sd3.files import WeightFile
from sd3.planning import plan_pictures
from sd3.probe.measuring import Measurement, Sums, cka, linear_probe, neighbour_overlap, retrieval, spread
from sd3.probe.procrustes import Calibration
from sd3.probe.running import Collector, LabelledPrompt, read_labelled, run_prompts
from sd3.probe.suggesting import suggest
from sd3.prompt_tokens import Key
from sd3.residual import ResidualConfig
from sd3.rotations import orthogonality, read_rotations

PROMPTS = [
    "a red circle", "a star", "two green squares", "a blue square on a white background", "an orange triangle",
    "a pink star and a cyan circle", "four yellow circles", "a purple star left of a red square",
]  # fmt: skip
VALUES = {
    "sampler": "euler", "scheduler": "normal", "steps": 3, "cfg": 4.0, "shift": 3.0, "width": 64, "height": 48,
    "batch_size": 2,
}  # fmt: skip


def tensor(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- measures ------------------------------------------------------------------------------------


def direct_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """By the kernels' centred inner products, which never form a feature covariance."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    a, b = x @ x.T, y @ y.T
    return ((a * b).sum() / (a.norm() * b.norm())).item()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 1.0, 1000.0]), st.integers(1, 7))
def test_streamed_sums_equal_direct_ones(seed, offset, pieces):
    """Also where the mean is a thousand times the spread, and however the tokens arrive."""
    origin = tensor(60, 12, seed=seed) + offset
    x = 0.5 * origin @ tensor(12, 12, seed=seed + 1) + tensor(60, 12, seed=seed + 2) + 2 * offset
    own, against = Sums(12), Sums(12)
    for o, part in zip(origin.chunk(pieces), x.chunk(pieces), strict=True):
        against.add(o, o, None)
        own.add(part, o, against.guess)
    assert own.tokens == 60
    assert cka(own, against) == pytest.approx(direct_cka(x, origin), rel=1e-3)
    assert cka(against, against) == pytest.approx(1, abs=1e-5)
    assert spread(own) == pytest.approx((x - x.mean(0)).double().square().sum(1).mean().sqrt().item(), rel=1e-4)
    assert own.norm / 60 == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-5)
    assert own.cosine / 60 == pytest.approx(torch.cosine_similarity(x, origin).mean().item(), abs=1e-5)


def test_neighbours_and_retrieval():
    x = tensor(200, 16, seed=1)
    turn = torch.linalg.qr(tensor(16, 16, seed=2))[0]
    assert neighbour_overlap(x, 3 * x @ turn + 5, 10) == pytest.approx(1, abs=0.02)
    assert neighbour_overlap(x, tensor(200, 16, seed=3), 10) == pytest.approx(10 / 199, abs=0.03)
    assert retrieval(x, x + 0.1 * tensor(200, 16, seed=4)) == 1
    assert retrieval(x, tensor(200, 16, seed=5)) < 0.05


@pytest.mark.parametrize("width", [8, 300])  # fewer and more features than prompts
def test_linear_probe(width):
    classes = ["abc"[i % 3] for i in range(90)]
    means = 3 * tensor(3, width, seed=1)
    labels = torch.tensor([i % 3 for i in range(90)])
    features = (means[labels] + tensor(90, width, seed=2))[:, None] + 0.1 * tensor(90, 2, width, seed=3)
    assert linear_probe(features, classes) > 0.95
    shuffled = [classes[i] for i in torch.randperm(90, generator=torch.Generator().manual_seed(4))]
    assert linear_probe(features, shuffled) < 0.55
    assert linear_probe(tensor(90, 2, width, seed=5), classes) < 0.55


def test_the_two_runs_of_a_prompt_never_lie_on_both_sides():
    """Features that only tell prompts apart, not classes, must not let the probe do better than chance."""
    alone = torch.eye(60)[:, None].expand(60, 2, 60)
    classes = ["ab"[i] for i in torch.randint(2, (60,), generator=torch.Generator().manual_seed(0))]
    assert linear_probe(alone, classes) < 0.65


def everything(engine, jobs, values, layers):
    """Every masked token of every pass: {(step, layer): one (n, D) per job}."""
    out: dict = {}

    def collect(numbers, masks):
        def use(at, states):
            for layer, rows in states.items():
                out.setdefault((at.step, layer), []).extend(row.clone() for row in rows)

        return Collector(masks, lambda at: True, layers, use)

    run_prompts(engine, jobs, values, collect, "all")
    return out


@pytest.mark.parametrize("group", [64, 3])
def test_a_measurement_equals_direct_computing(small_engine, monkeypatch, group):
    monkeypatch.setattr(sd3.probe.running, "GROUP", group)
    prompts = [LabelledPrompt(p) for p in PROMPTS]
    flags = {"origin": 1, "timesteps": 2, "kept_prompts": 5, "kept_tokens": 40, "neighbours": 3, "seed": 2}
    measurement = Measurement(small_engine.engine, prompts, VALUES, flags)
    run_prompts(small_engine.engine, measurement.jobs(), VALUES, measurement.collector, "measuring")
    jobs = measurement.jobs()
    assert [j[1] for j in jobs[:8]] == PROMPTS
    assert len(jobs) == 13
    assert len({seed for _, _, seed in jobs}) == 13
    states = everything(small_engine.engine, jobs, VALUES, range(4))
    rows = measurement.rows()
    assert [(r["step"], r["block"]) for r in rows] == [(s, b) for s in (0, 2) for b in range(4)]
    for row in rows:
        x, o = (torch.cat(states[row["step"], layer][:8]) for layer in (row["block"], 1))
        assert len(x) == measurement.sums[0][0].tokens
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(x, o).mean().item(), abs=1e-4)
        assert row["cka"] == pytest.approx(direct_cka(x, o), rel=1e-3)
        assert row["norm"] == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-4)
        pooled = [s.mean(0) for s in states[row["step"], row["block"]]]
        kept = sorted(measurement.kept)
        first, second = torch.stack([pooled[i] for i in kept]), torch.stack(pooled[8:])
        assert row["retrieval"] == retrieval(first, second)
        assert 0 <= row["neighbours"] <= 1
        if row["block"] == 1:
            assert (row["cosine"], row["neighbours"]) == (pytest.approx(1), 1)
    assert measurement.token_count == 40 or measurement.token_count == sum(
        min(8, len(states[0, 0][number])) for number in measurement.kept
    )


def test_masks_leave_padding_out(small_engine):
    prompt = "a red circle"
    length = small_engine.engine.text.pair_length(prompt, "a star left of a blue square")
    mask = small_engine.engine.text.kinds(Key(prompt, length)).words[0]
    clip = small_engine.engine.text.clip_tokenizer.tokenize(prompt, small_engine.engine.text.positions)
    t5 = small_engine.engine.text.t5_tokenizer.tokenize(prompt, length)
    assert len(mask) == small_engine.engine.text.positions + length
    padding = [i for i, token in enumerate(t5.ids) if token == 0]
    assert not mask[[small_engine.engine.text.positions + i for i in padding]].any()
    assert int(mask.sum()) == (3 + 2) + (length - len(padding))  # start, three words, end; pieces and end
    assert clip.ids[4] == small_engine.engine.text.clip_tokenizer.end
    assert mask[4]
    assert not mask[5]


def test_a_probe_changes_nothing(small_engine):
    (picture,) = plan_pictures(small_engine.engine, ["a star"], [1], **VALUES).pictures
    plain = small_engine.engine.sample([picture])
    states = everything(small_engine.engine, [(0, "a star", 1)], VALUES, [0, 3])
    assert set(states) == {(step, layer) for step in range(3) for layer in (0, 3)}
    assert torch.equal(small_engine.engine.sample([picture]), plain)


# ---- suggest -------------------------------------------------------------------------------------


def record(levels: list[float]) -> dict:
    rows = [
        {"step": s, "sigma": 1 - s, "block": b, "cosine": 0.5, "retrieval": v + (0.01 if s else -0.01)}
        for s in (0, 1)
        for b, v in enumerate(levels)
    ]
    return {"depth": len(levels), "origin": 0, "rows": rows, "chance": {"retrieval": 0.1}}


def test_suggest():
    origin, targets, why = suggest(record([0.9, 0.98, 0.98, 0.97, 0.8, 0.7, 0.72, 0.6, 0.5]))
    assert (origin, targets) == (1, [4, 5, 6, 7, 8])
    assert "block 4 is the first that loses more" in why
    origin, targets, why = suggest(record([0.9, 0.9, 0.89, 0.9, 0.88, 0.9]))
    assert (origin, targets) == (0, [])
    assert "the model forgets nothing" in why


# ---- calibrate -----------------------------------------------------------------------------------


class At:
    sigma = 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_procrustes_finds_the_rotation(seed, centre):
    width = 12
    wanted = torch.linalg.qr(tensor(width, width, seed=seed))[0]
    work = Calibration(0, [1, 2], 1, width)
    origin = tensor(40, width, seed=seed + 1)
    noise = tensor(40, width, seed=seed + 2)
    for start in (0, 25):
        part = slice(start, start + 25)
        states = {0: [origin[part]], 1: [standardise(origin[part]) @ wanted], 2: [noise[part]]}
        work.add(At, states)
    got = work.solve(centre, quiet=True)[0]
    # what `add` sees of target 1 is standardised once more, so it is a rotation of the origin up to a little
    o, t = standardise(origin), standardise(standardise(origin) @ wanted)
    if centre:
        o, t = o - o.mean(0), t - t.mean(0)
    best = (o @ got[0] - t).norm()
    assert best <= (o @ wanted - t).norm() + 1e-4
    for j, target in ((0, t), (1, standardise(noise) - (standardise(noise).mean(0) if centre else 0))):
        assert orthogonality(got[j]) < 1e-5
        distance = (o @ got[j] - target).norm()
        for k in range(5):
            other = torch.linalg.qr(tensor(width, width, seed=seed + 10 + k))[0]
            near = torch.linalg.qr(got[j] + 0.05 * tensor(width, width, seed=k))[0]
            near = near * torch.sign((near * got[j]).sum(0))
            assert distance <= (o @ other - target).norm() + 1e-5
            assert distance <= (o @ near - target).norm() + 1e-5


def files(tmp_path, prompts=PROMPTS, name="prompts.txt"):
    path = tmp_path / name
    path.write_text("\n".join(prompts))
    return path


def flags_for(small_model, *more) -> list[str]:
    run = {"steps": 3, "width": 64, "height": 48, "dtype": "float32", "device": "cpu", "batch_size": 2}
    return [f"--{k}={v}" for k, v in ({"model": small_model} | run).items()] + [str(m) for m in more]


def probe(command: str, *arguments) -> int:
    return sd3.probe.command.main([command, *map(str, arguments)])


@pytest.mark.parametrize("buckets", [1, 2])
def test_calibrate(small_model, tmp_path, capsys, buckets):
    out = tmp_path / "new" / "r.safetensors"
    check = files(tmp_path, ["three pink stars", "a cyan square"], "check.txt")
    calibration = [
        "calibrate", *flags_for(small_model, "--prompts", files(tmp_path), "--check_prompts", check),
        "--origin", 1, "--targets", "1-3:2", "--out", out, "--buckets", buckets,
    ]  # fmt: skip
    assert probe(*calibration) == 0
    told = capsys.readouterr()
    assert "2 rotations, 128 x 128, for origin 1" in told.out
    few = min(json.loads(WeightFile(out).metadata["tokens"])) < 128
    assert ("note: only" in told.err) == few
    assert os.listdir(out.parent) == ["r.safetensors"]
    check.touch()
    assert out.stat().st_mode == check.stat().st_mode  # as readable as any new file
    got = read_rotations(out, ResidualConfig(1, (1, 3)), 128)
    assert got.matrices.shape == (buckets, 2, 128, 128)
    assert got.edges == ((0.5,) if buckets == 2 else ())
    for matrix in got.matrices.flatten(0, 1):
        assert orthogonality(matrix) < 1e-5
    # the origin onto itself: nothing to turn, as far as its tokens reach
    rows = [line.split("|")[1:4] for line in told.out.splitlines() if line.startswith(("| 1 ", "| 3 "))]
    assert [float(rows[0][1]), float(rows[0][2])] == [0, pytest.approx(0, abs=0.05)]
    assert float(rows[1][2]) != float(rows[1][1])


def test_calibrated_on_the_shipped_model_it_carries_over(tmp_path, capsys):
    """On prompts it never saw the rotated origin is nearer to every target than the plain one."""
    from demo.captions import captions

    made = {s: [c["prompt"] for c in captions(n, s, seed=1)] for s, n in (("seen", 24), ("held_out", 8))}
    seen, others = (files(tmp_path, prompts, f"{s}.txt") for s, prompts in made.items())
    flags = ["--model", DEMO, "--prompts", seen, "--check_prompts", others, "--batch_size", 8, "--steps", 6]
    assert probe("calibrate", *flags, "--origin", 1, "--targets", "2-7", "--out", tmp_path / "r.safetensors") == 0
    told = capsys.readouterr().out
    rows = [[float(x) for x in m.groups()] for m in re.finditer(r"\| (\d) \| ([\d.]+) \| ([\d.]+) \|", told)]
    assert [row[0] for row in rows] == [2, 3, 4, 5, 6, 7]
    assert all(turned < 0.8 * plain for _, plain, turned in rows)


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_stopped_calibration_goes_on(small_model, tmp_path, monkeypatch, capsys, after):
    monkeypatch.setattr(sd3.probe.state, "SAVE_EVERY", -1.0)
    prompts = files(tmp_path)
    command = ["calibrate", *flags_for(small_model, "--prompts", prompts, "--targets", "1,3")]
    assert probe(*command, "--out", tmp_path / "whole.safetensors") == 0
    real, calls = Calibration.add, []

    def add(self, at, states):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        real(self, at, states)

    monkeypatch.setattr(Calibration, "add", add)
    out = tmp_path / "r.safetensors"
    assert probe(*command, "--out", out) == 130
    assert not out.exists()
    monkeypatch.setattr(Calibration, "add", real)
    capsys.readouterr()
    assert probe(*command, "--out", out) == 0
    done = after // 3 * 2  # three steps a batch of two
    assert (f"resuming after {done} of 8 prompts" in capsys.readouterr().err) == (done > 0)
    first, second = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.txt", "r.safetensors", "whole.safetensors"]


def test_the_state_of_other_settings_is_not_taken_up(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sd3.probe.state, "SAVE_EVERY", -1.0)
    command = ["calibrate", *flags_for(small_model, "--prompts", files(tmp_path)), "--out", tmp_path / "r.safetensors"]
    real, calls = Calibration.add, []

    def add(self, at, states):
        calls.append(1)
        if len(calls) > 8:
            raise Stop
        real(self, at, states)

    monkeypatch.setattr(Calibration, "add", add)
    assert probe(*command, "--targets", "1,3") == 130
    monkeypatch.setattr(Calibration, "add", real)
    capsys.readouterr()
    assert probe(*command, "--targets", "2,3") == 0
    assert "going on" not in capsys.readouterr().err


def peak(arguments: list[str]) -> int:
    """Peak resident memory of a run in KiB."""
    code = (
        "import sys, resource, sd3.probe.command; status = sd3.probe.command.main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout.rsplit("peak", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["calibrate", "measure"])
def test_memory_does_not_grow_with_the_prompts(tmp_path, command):
    from demo.captions import captions

    few, many = (files(tmp_path, [c["prompt"] for c in captions(n, seed=1)], f"{n}.txt") for n in (2, 200))
    base = [command, "--model", DEMO, "--batch_size", 2, "--steps", 4, "--out"]
    if command == "calibrate":
        base += [tmp_path / "r.safetensors", "--origin", 1, "--targets", "2-7"]
    else:
        base += [tmp_path / "m", "--kept_prompts", 2]
    assert peak([*base, "--prompts", many]) < 1.05 * peak([*base, "--prompts", few])


# ---- from measurement and calibration to pictures ------------------------------------------------


def test_measure_writes_what_suggest_reads(small_model, tmp_path, capsys):
    lines = [
        json.dumps({"prompt": p, "labels": {"shape": "star" if "star" in p else "other", "number": None}})
        for p in [*PROMPTS, *(f"{p} on a black background" for p in PROMPTS)]
    ]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, "", lines[0]]))
    out = tmp_path / "m"
    flags = flags_for(small_model, "--prompts", tmp_path / "p.jsonl", "--out", out, "--timesteps", 2)
    assert probe("measure", *flags) == 0
    told = capsys.readouterr().out
    assert "| block | cosine | cka | neighbours | norm | spread | retrieval | probe shape |" in told
    held = json.loads((out / "measure.json").read_text())
    assert (held["prompts"], held["kept_prompts"], held["depth"]) == (16, 16, 4)
    assert len(held["rows"]) == 8
    assert held["chance"]["probe shape"] == 10 / 16
    assert str(small_model.parent) not in json.dumps(held)
    with open(out / "measure.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["cka"]) for r in rows] == [r["cka"] for r in held["rows"]]
    assert held["rows"][0]["retrieval"] == 1  # what enters block 0 does not depend on the noise
    if (out / "measure.png").exists():
        with Image.open(out / "measure.png") as image:
            assert image.size[0] > 600
    assert probe("suggest", "--measurement", out / "measure.json") == 0
    assert "can be recovered from its tokens" in capsys.readouterr().out


def test_measuring_with_residual_streaming(small_model, tmp_path, capsys):
    flags = flags_for(small_model, "--prompts", files(tmp_path), "--timesteps", 1)
    for name, more in (("off", []), ("on", ["--residual_target_layers", "3", "--residual_weights", "1"])):
        assert probe("measure", *flags, "--out", tmp_path / name, *more) == 0
    off, on = (json.loads((tmp_path / n / "measure.json").read_text())["rows"] for n in ("off", "on"))
    assert [r["cosine"] for r in off[:3]] == [r["cosine"] for r in on[:3]]
    assert on[3]["cosine"] > off[3]["cosine"]


def test_rotations_and_settings_files_make_pictures(small_model, tmp_path, capsys):
    rotations = tmp_path / "r.safetensors"
    flags = flags_for(small_model)
    assert probe("calibrate", *flags, "--prompts", files(tmp_path), "--targets", "1-3", "--out", rotations) == 0
    aligned = [
        "--residual_mode=aligned", "--residual_target_layers=1-3", "--residual_weights=linear:0.5:0.2",
        f"--residual_rotations={rotations}",
    ]  # fmt: skip
    picture = [*flags, "--prompt", "a star", "--seed", "4", "--out_dir", str(tmp_path / "out")]
    runs = {
        "_aligned": aligned,
        "_again": ["--residual_config", str(tmp_path / "out" / "small" / "a_star_aligned" / "residual.json")],
        "_anchored": [*aligned, "--residual_mode=anchored"],
        "_off": [],
        "_off_again": [*aligned, "--residual_target_layers="],
    }
    pixels = {}
    for postfix, more in runs.items():
        assert sd3_infer.main([*picture, "--postfix", postfix, *more]) == 0
        with Image.open(tmp_path / "out" / "small" / f"a_star{postfix}" / "000000.png") as image:
            pixels[postfix] = image.tobytes()
            text = image.text
        if postfix == "_again":
            settings = json.loads(text["sd3_residual"])["settings"]
            assert settings["residual_mode"] == "aligned"
            assert settings["residual_rotations"] == "r.safetensors"
            assert settings["residual_weights"] == pytest.approx([0.5, 0.35, 0.2])
            assert "Residual mode: aligned, Residual rotations: r.safetensors" in text["parameters"]
    assert pixels["_aligned"] == pixels["_again"]
    assert pixels["_off"] == pixels["_off_again"]
    assert len({pixels[k] for k in ("_aligned", "_anchored", "_off")}) == 3
    told = capsys.readouterr().err
    assert "note: --residual_rotations is not used: --residual_mode is anchored, not aligned" in told
    assert "note: --residual_target_layers is empty, so residual text streaming is off" in told


# ---- mistakes ------------------------------------------------------------------------------------

BAD = [
    ([], "usage: sd3_probe.py"),
    (["meassure"], "meassure: must be measure, suggest, calibrate; did you mean measure?"),
    (["measure"], "--prompts: is required by measure"),
    (["measure", "--prompt", "x.txt"], "--prompt: unknown flag; did you mean --prompts?"),
    (["measure", "stray"], "stray: not understood"),
    (["measure", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
    (["measure", "--prompts", "none.jsonl"], "--prompts none.jsonl: no such file"),
    (["measure", "--prompts", "words"], "--prompts words: must be a .txt or .jsonl file"),
    (["measure", "--prompts", "blank.txt"], "--prompts blank.txt: the file holds no prompt"),
    (["measure", "--prompts", "bad.jsonl"], "--prompts bad.jsonl: line 2 is not of the form"),
    (["measure", "--prompts", "one.txt"], "--prompts one.txt: needs at least two different prompts"),
    (["measure", "--prompts", "p.txt", "--origin", "9"], "--origin 9: this model has 4 joint blocks: 0 to 3"),
    (["measure", "--prompts", "p.txt", "--timesteps", "0"], "--timesteps 0: must be from 1"),
    (["measure", "--prompts", "p.txt", "--kept_tokens", "x"], "--kept_tokens x: must be a whole number"),
    (["measure", "--prompts", "p.txt", "--out", "p.txt/x"], "is not a folder"),
    (["measure", "--prompts", "p.txt", "--residual_target_layers", "7"], "7: no such layer (this model has 4"),
    (["measure", "--prompts", "p.txt", "--width", "40"], "--width 40: must be a multiple of 16"),
    (["suggest"], "--measurement: is required by suggest"),
    (["suggest", "--measurement", "none.json"], "--measurement none.json: no such file"),
    (["suggest", "--measurement", "p.txt"], "--measurement p.txt: is not a measurement"),
    (["suggest", "--measurement", "empty.json"], "--measurement empty.json: is not a measurement"),
    (["calibrate", "--prompts", "p.txt"], "--targets: is required by calibrate"),
    (["calibrate", "--prompts", "p.txt", "--targets", "2-3"], "--out: is required by calibrate"),
    (["calibrate", "--prompts", "p.txt", "--targets", "2", "--out", "r.pt"], "--out r.pt: must end in .safetensors"),
    (["calibrate", "--prompts", "p.txt", "--targets", "1", "--origin", "2", "--out", "r.safetensors"],
     "--targets 1: lies below the origin layer 2"),
    (["calibrate", "--prompts", "p.txt", "--targets", "2-9", "--out", "r.safetensors"], "4: no such layer"),
    (["calibrate", "--prompts", "p.txt", "--targets", "2", "--out", "r.safetensors", "--check_prompts", "p.txt"],
     '--check_prompts p.txt: "a red circle" is in --prompts too'),
    (["calibrate", "--prompts", "p.txt", "--targets", "2", "--out", "r.safetensors", "--buckets", "9"],
     "--buckets 9: no step falls into bucket 1"),
    (["calibrate", "--prompts", "p.txt", "--targets", "2", "--out", "r.safetensors", "--model", "none.safetensors"],
     "--model none.safetensors: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_mistakes_are_one_line(small_model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    files(tmp_path, PROMPTS[:3], "p.txt")
    files(tmp_path, ["a star", "a star"], "one.txt")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "words").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.json").write_text("{}")
    before = sorted(os.listdir(tmp_path))
    command, *rest = arguments or [""]
    model = flags_for(small_model) if command in ("measure", "calibrate") else []
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    assert sd3.probe.command.main([command, *model, *rest] if command else []) == 2
    told = capsys.readouterr()
    if command:
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
    assert message in told.err + told.out
    assert sorted(os.listdir(tmp_path)) == before


def test_as_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sd3_probe.py", "calibrate", "--promts", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: --promts: unknown flag; did you mean --prompts? (--help_all lists all)\n"
    shown = subprocess.run([sys.executable, ROOT / "sd3_probe.py", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for readers in sd3.probe.command.COMMANDS.values():
        assert not [n for n in readers if f"--{n}" not in shown.stdout and not n.startswith("residual_")]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["measure", "--promts", "x"],
        ["calibrate", "--prompts", "x", "--targets", "1", "--origin", "2", "--out", "r.pt"],
    ],
    ids=" ".join,
)
def test_an_answer_that_needs_only_the_words_imports_no_torch(words, tmp_path):
    code = (
        "import sys; from sd3.probe.command import main; status = main(sys.argv[1:]); "
        "print(status, 'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.splitlines()[-1] == f"{0 if len(words) == 1 else 2} False"
    assert done.stderr.count("\n") == (len(words) > 1)


def test_labelled_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a", "labels": {"n": 2}}\r\n{"prompt": "b"}\n{"prompt": "a"}\n')
    assert read_labelled(str(tmp_path / "p.jsonl")) == [LabelledPrompt("a", {"n": "2"}), LabelledPrompt("b", {})]
    assert [p.prompt for p in read_labelled(str(files(tmp_path, ["x", "y", "x"])))] == ["x", "y"]


def test_nothing_here_is_nan():
    constant = Sums(4)
    constant.add(torch.ones(5, 4), torch.ones(5, 4), None)
    assert math.isnan(cka(constant, constant))  # no spread, no similarity to speak of
    assert spread(constant) == 0
    assert relative(standardise(torch.ones(2, 3)) + 1, torch.ones(2, 3)) == 0
