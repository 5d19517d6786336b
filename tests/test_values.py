"""A value is read once and what was read is what is used; what cannot be used is one line before anything is made."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import os
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEMO, DEMO_DEPTH, READERS
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import sd3.engine
import sd3.png
import sd3.probe.command
import sd3.probe.running
import sd3.run
import sd3.serve
import sd3.sweep.command
import sd3.sweep.grid
import sd3.weights
import sd3.writing
import sd3_impls
import sd3_infer
from mmditx import schedule_factor
from sd3.command import read_arguments
from sd3.device import choose_device
from sd3.engine import NotLoaded
from sd3.flags import MOST_PICTURES
from sd3.methods import SAMPLERS
from sd3.mistakes import display
from sd3.models import SkipLayerConfig
from sd3.planning import plan_pictures, residual_settings
from sd3.prompts import folder_name, read_jsonl, read_lines, read_prompts
from sd3.readers import SEED_LIMIT, read_layers
from sd3.replay import Replay
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig, build_residual_config
from sd3.settings import Flags, Settings, picture_seeds
from sd3.sweep.grid import MOST_SEEDS, Grid
from sd3.sweep.report import cell
from sd3_infer import SD3Inferencer

OFF = {"model": str(DEMO), "device": "cpu"}


@pytest.fixture(scope="module")
def engine() -> SD3Inferencer:
    out = SD3Inferencer().load(str(DEMO), device="cpu")
    out.tell.quiet = True
    return out


def refused(command, words: list[str], capsys, monkeypatch=None) -> str:
    """The one line with which a command line ends."""
    capsys.readouterr()
    assert command([str(w) for w in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ---- E: numbers that the computation cannot bear -------------------------------------------------

TARGETS = {"residual_target_layers": "3"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (TARGETS | {"residual_weights": "1e39"}, "residual_weights 1e39: must be from -1000.0 to 1000.0"),  # E1
        (TARGETS | {"residual_weights": "1000.5"}, "residual_weights 1000.5"),
        ({"residual_weights": [1.0, -1001]}, "residual_weights -1001"),
        ({"residual_weights": "linear:0:2000"}, "residual_weights linear:0:2000"),
        (TARGETS | {"residual_schedule": "exp:-10000"}, "residual_schedule -10000"),  # E3
        (TARGETS | {"residual_schedule": "exp:-800"}, "residual_schedule exp:-800"),
        (TARGETS | {"residual_schedule": "exp:-4.2", "residual_weights": "1000"}, "larger than 60,000"),
        (TARGETS | {"residual_schedule": "exp:1e9"}, "residual_schedule 1e9"),
        ({"shift": "1e-20"}, "shift 1e-20: must be from 0.001 to 1000.0"),  # E4
        ({"shift": "1e39"}, "shift 1e39"),  # E6
        ({"shift": "1e8"}, "shift 1e8"),  # reading.md 9
        ({"shift": 5e-4}, "shift 0.0005"),
        ({"shift": np.float32(1001)}, "shift 1001"),
        ({"controlnet_strength": "-1e6"}, "controlnet_strength -1e6"),
        ({"num_images": "100001"}, "num_images 100001"),
    ],
)
def test_numbers_are_bounded(flags, told):
    with pytest.raises(ValueError) as error:
        Flags.read(flags)
    assert told in str(error.value)
    assert "--" not in str(error.value)


def test_what_is_within_the_bounds_is_finite_where_it_is_used():
    for weight, alpha in itertools.product((-1000.0, 0.5, 1000.0), (-1000.0, -11.0, -4.0, 0.0, 1000.0)):
        try:
            config = ResidualConfig(0, (3,), (weight,), schedule=f"exp:{alpha}")
        except ValueError:
            assert abs(weight) * math.exp(min(-alpha, 700)) > 60_000
            continue
        for sigma in (0.0, 1e-9, 0.3, 1.0):
            strength = config.weights[0] * schedule_factor(config.schedule, sigma)
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                x = torch.ones(1, 2, 4, dtype=dtype)
                assert torch.isfinite(x.add(0.5 * x, alpha=strength)).all()
    assert (
        Flags.read(TARGETS | {"residual_schedule": "exp:-5", "residual_weights": "0.1"}).residual_schedule == "exp:-5.0"
    )


def test_a_config_file_is_bounded_too(tmp_path):
    (tmp_path / "c.json").write_text('{"target_layers": [3], "residual_weights": [1e39]}')
    with pytest.raises(ValueError, match=r"c.json: residual_weights 1e.39: must be from"):
        ResidualConfig.read(tmp_path / "c.json")


SHIFTS = st.one_of(st.sampled_from([0.001, 1000.0, 1.0]), st.floats(0.001, 1000.0))


@given(SHIFTS, st.integers(1, 120), st.sampled_from(list(SAMPLERS)), st.floats(0, 1))
@hypothesis_settings(deadline=None, max_examples=60)
def test_samplers_bear_every_schedule(shift, steps, sampler, denoise):
    check_sampler(READERS["shift"]("shift", shift), steps, sampler, denoise)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("shift", "steps"), [(1000.0, 10_000), (0.001, 2000), (700.0, 3000), (1000.0, 1)])
def test_samplers_bear_neighbouring_sigmas_that_are_one_number(shift, steps, sampler):
    check_sampler(shift, steps, sampler, 1.0)
    if steps == 10_000:
        assert (sd3_impls.flow_schedule(steps, shift).diff() == 0).any()  # else this tests nothing


def check_sampler(shift: float, steps: int, sampler: str, denoise: float) -> None:
    """Whatever the schedule: with a network that always says the same picture, that picture is the result."""
    sigmas = sd3_impls.img2img_sigmas(sd3_impls.flow_schedule(steps, shift), denoise)
    picture = torch.full((1, 1, 1, 2), 0.7)
    noise = lambda sigma, following: torch.ones_like(picture)  # noqa: E731
    got = sd3_impls.find_sampler(sampler)(lambda x, sigma: picture, torch.ones_like(picture), sigmas, noise)
    if len(sigmas) > 1:
        assert torch.allclose(got, picture, atol=1e-3)


# ---- F: text that cannot be written as UTF-8 -----------------------------------------------------

TEXT_FLAGS = [
    "prompt", "negative_prompt", "postfix", "model", "out_dir", "vae", "init_image", "model_folder", "embed_cache",
    "residual_rotations", "residual_config", "controlnet_ckpt", "replay",
]  # fmt: skip


@pytest.mark.parametrize("flag", TEXT_FLAGS)
@pytest.mark.parametrize("text", ["red \udcff circle", "\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused_by_name(flag, text, tmp_path, monkeypatch, capsys):  # F1, F2
    monkeypatch.chdir(tmp_path)
    error = refused(sd3_infer.main, [f"--{flag}={text}"], capsys)
    assert f"--{flag} " in error
    assert "cannot be written as UTF-8" in error
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_in_files_and_lines(tmp_path, monkeypatch, capsys, engine):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "good"}\n{"prompt": "a \\ud800"}\n')
    error = refused(sd3.sweep.command.main, ["--out", "o", "--prompt", "p.jsonl", "--model", DEMO], capsys)
    assert "--prompt p.jsonl: line 2 cannot be written as UTF-8" in error
    Path("p.txt").write_bytes(b"good\nhalf \xed\xa0\x80 a pair\n")
    assert "--prompt p.txt: cannot be read as UTF-8" in refused(sd3_infer.main, ["--prompt", "p.txt"], capsys)
    with pytest.raises(ValueError, match=r"prompts p.jsonl: line 2 cannot be written as UTF-8"):
        sd3.probe.running.read_labelled("p.jsonl")
    Path("g.yaml").write_text('prompt: "a \\ud800"\n')
    refused(sd3.sweep.command.main, ["--out", "o", "--grid", "g.yaml"], capsys)
    answers: list[str] = []
    raw = OFF | {"out_dir": "served"}
    lines = [json.dumps({"prompt": "a \ud800"}), json.dumps({"prompt": "a", "negative_prompt": "\udfff"})]
    with redirect_stderr(io.StringIO()):
        sd3.serve.serve(Flags.read(raw), raw, lines, answers.append)
    for answer in map(json.loads, answers):
        assert not answer["ok"]
        assert "cannot be written as UTF-8" in answer["error"]
    for prompts in ("\ud800", ["good", "\udcff"]):
        with pytest.raises(ValueError, match=r"prompt .*cannot be written as UTF-8"):
            engine.gen_image(prompts, out_dir="out")
    assert not Path("out").exists()


# ---- L: types of a record ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture(tmp_path_factory, engine) -> Path:
    skip = SkipLayerConfig(1.5, 0.0, 0.9, (2, 3), cfg=2.0)
    folder = tmp_path_factory.mktemp("picture")
    (path,) = engine.gen_image("a star", steps=2, seed=7, out_dir=folder, skip_layer_config=skip)
    return path


def with_settings(path: Path, picture: Path, **settings) -> Path:
    record = sd3.png.read_record(picture)
    info = sd3.png.PngInfo()
    info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record | {"settings": record["settings"] | settings}))
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)
    return path


SKIP = {"scale": 1.5, "start": 0.0, "end": 0.9, "layers": [2, 3], "cfg": 2.0}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"skip_layer": SKIP | {"layers": ["a"]}}, "layers a: must be a whole number"),  # L1
        ({"skip_layer": SKIP | {"layers": []}}, "names no layer to skip"),
        ({"skip_layer": SKIP | {"scale": "x"}}, "scale x: must be a number"),  # L2
        ({"skip_layer": SKIP | {"end": None}}, "end None: must be a number"),
        ({"skip_layer": SKIP | {"layers": [-3]}}, "layers -3"),  # L6
        ({"skip_layer": SKIP | {"layers": [1.5]}}, "layers 1.5"),
        ({"skip_layer": SKIP | {"layers": [2, 2]}}, "lists a layer more than once"),
        ({"skip_layer": SKIP | {"start": 1.0}}, "start 1: must be below"),
        ({"skip_layer": SKIP | {"cfg": True}}, "cfg True: must be a number"),
        ({"skip_layer": "on"}, "skip-layer settings cannot be read: on"),
        ({"device": ["cpu"]}, "--device ['cpu']: must be auto, cpu"),  # L4
        ({"device": {}}, "--device {}: must be auto, cpu"),
        ({"text_encoder_device": 5}, "--text_encoder_device 5"),
        ({"prompt": None}, "prompt missing"),  # L6
        ({"prompt": 5}, "--prompt 5: must be text"),
        ({"prompt": ["a"]}, "--prompt ['a']: must be text"),
        ({"no_t5": 5}, "--no_t5 5: must be True or False"),
        ({"seed": True}, "--seed True: must be a whole number"),
        ({"model": {"a": 1}}, "--model {'a': 1}: must be a path"),
        ({"residual_target_layers": {"3": 1}}, "--residual_target_layers {'3': 1}: must be a list"),
        ({"init_image": 3}, "--init_image 3: must be a path"),
    ],
)
def test_types_of_a_record(picture, tmp_path, capsys, settings, told):
    path = with_settings(tmp_path / "p.png", picture, **settings)
    error = refused(sd3_infer.main, ["--replay", path, "--out_dir", tmp_path / "out"], capsys)
    assert f"--replay {path}" in error
    assert told in error
    assert not (tmp_path / "out").exists()


def test_skip_layer_guidance_checks_itself():
    config = SkipLayerConfig(np.float32(2), "0.25", 1, [np.int64(3), 4], cfg=4)
    assert config == SkipLayerConfig(2.0, 0.25, 1.0, (3, 4), 4.0)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["layers"] == [3, 4]
    for values in ({"scale": math.nan}, {"scale": 1e5}, {"layers": "none"}, {"layers": {3: 1}}, {"cfg": -1}):
        with pytest.raises(ValueError, match="skip_layer_cfg"):
            SkipLayerConfig(**{"scale": 2.0, "start": 0.0, "end": 1.0, "layers": (3,), "cfg": 4.0} | values)


# ---- N: sizes are looked at before anything is built ---------------------------------------------


def test_a_grid_is_counted_before_it_is_built(tmp_path, monkeypatch, capsys):  # N1
    monkeypatch.chdir(tmp_path)
    many = ";".join(f"{1 + i / 20:g}" for i in range(981))
    words = [
        "--prompt",
        "red",
        "--out",
        "s",
        "--cfg",
        many,
        "--shift",
        many,
        "--steps",
        ";".join(map(str, range(1, 1001))),
    ]
    error = refused(sd3.sweep.command.main, words, capsys)
    assert f"this grid has {981 * 981 * 1000:,} images; at most 100,000" in error
    axes = {f"residual_{name}": ";".join(f"0.{i:04}" for i in range(900)) for name in ("start", "weights", "end")}
    with pytest.raises(ValueError, match=r"this grid has 729,000,001 images"):
        Grid.read({"prompt": "a", "residual_target_layers": "3"} | axes)
    named = {f"v{i}": {"cfg": "3"} for i in range(400)}
    Path("g.yaml").write_text(json.dumps({"prompt": "a", "steps": [str(i) for i in range(1, 300)], "variants": named}))
    with pytest.raises(ValueError, match=r"this grid has 119,\d+ images"):
        Grid.read({}, "g.yaml")
    assert not Path("s").exists()


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.sampled_from(["3", "5", "none", "2-4"]), unique=True),
    st.booleans(),
)
@hypothesis_settings(deadline=None)
def test_the_count_is_the_number_of_variants(cfgs, weights, targets, named):
    from sd3.sweep.grid import alternatives, count_variants, cross

    raw = {"cfg": ";".join(map(str, range(2, 2 + cfgs)))}
    if targets:
        raw |= {
            "residual_target_layers": ";".join(targets),
            "residual_weights": ";".join(f"each:0.{i}" for i in range(1, weights + 1)),
        }
    axes = {n: alternatives(n, v) for n, v in raw.items()}
    variants = (
        {"one": {"residual_target_layers": "6"}, "two": {"residual_target_layers": "7", "steps": "3"}} if named else {}
    )
    made = cross(axes, variants)
    extra = cfgs if named else 0  # what `two` is compared with
    assert count_variants(axes, variants) == len(made) - extra
    assert len({v.name for v in made}) == len(made)


def test_seeds_and_prompts_of_a_grid_are_counted(tmp_path):
    with pytest.raises(ValueError, match="names more than 100,000 seeds"):
        Grid.read({"prompt": "a", "seed": "0-99999;200000-299999"})
    with pytest.raises(ValueError, match="this grid has 200,000 images"):
        Grid.read({"prompt": ["a", "b"], "seed": f"0-{MOST_SEEDS - 1}"})
    (tmp_path / "p.txt").write_text("a\n" * 50_000 + "b\n" * 50_001)
    assert len(Grid.read({"prompt": str(tmp_path / "p.txt"), "seed": "0-49999"}).prompts) == 2  # each once
    with pytest.raises(ValueError, match="num_images 50001: for 2 prompts these are 100,002 images"):
        Flags.read({"num_images": 50_001}).seeds(2)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("0-9999", "2 given for 10000 target layers"),  # N4
        (range(10_000), "2 given for 10000 target layers"),
        ("0-9999,0-9999", "names more than 10,000 layers"),
        ("1,2-4999,4999", "layer 4999 is listed twice"),
        ("1-20000", "a range counts up"),
        ("10000", "must be below 10000"),
        ([3, 10**30], "must be below 10000"),
        ("9" * 4000 + "-" + "9" * 4500, "a range counts up"),
    ],
)
def test_many_layers(layers, told):
    with pytest.raises(ValueError) as error:
        ResidualConfig(0, layers, "linear:1:2" if "twice" in told else (1, 2))
    assert told in str(error.value)
    assert "--" not in str(error.value)


# ---- P: Python -----------------------------------------------------------------------------------


def test_a_config_keeps_what_was_read():
    config = ResidualConfig(
        np.int64(0), [3, "5"], "each:0.5", " Anchored", "EXP:2", "0.25", np.float32(1), "COND"
    )  # P1, P3
    assert config == ResidualConfig(0, (3, 5), (0.5, 0.5), "anchored", "exp:2.0", 0.25, 1.0, "cond")
    assert [type(v) for v in dataclasses.astuple(config)] == [
        int,
        tuple,
        tuple,
        str,
        str,
        float,
        float,
        str,
        type(None),
        str,
    ]
    assert ResidualConfig(0, (3,), branch="UNCOND").branch == "uncond"
    assert ResidualConfig(0, (3,), mode="ALIGNED", rotations=Path("r.pt")).rotations == "r.pt"
    for values in ({"branch": "half"}, {"origin": True}, {"targets": "3;5"}, {"weights": {1: 2}}, {"rotations": 5}):
        with pytest.raises(ValueError, match=next(iter(values))):
            ResidualConfig(**{"targets": (3,)} | values)
    with pytest.raises(ValueError, match="branches: unknown; did you mean branch"):
        build_residual_config(0, 3, branches="cond")


def test_the_wrong_half_is_not_acted_on(engine):
    """`COND` acts on the conditional half, as `cond` does."""
    settings = [
        plan_pictures(
            engine.engine,
            ["a star"],
            [3],
            steps=2,
            cfg=4.0,
            width=96,
            height=96,
            **residual_settings(ResidualConfig(0, (3,), 0.5, branch=b)),
        ).pictures
        for b in ("cond", "COND", "uncond")
    ]
    cond, spelt, uncond = (next(iter(engine.engine.make(s)))[2].tobytes() for s in settings)
    assert spelt == cond != uncond


def test_gen_image_takes_what_python_has(engine, tmp_path):  # P8, reading.md 6
    Image.effect_noise((96, 96), 60).convert("RGB").save(tmp_path / "in.png")
    (path,) = engine.gen_image(
        ("a star",), np.int64(96), "96", np.int64(4), np.float32(2.5), "Euler", np.uint8(5),
        out_dir=tmp_path / "out", init_image=tmp_path / "in.png", denoise=np.float64(0.5), negative_prompt=None,
        batch_size=1.0, vae_tile="auto", skip_layer_config={"scale": 2, "layers": [3], "end": 0.9},
    )  # fmt: skip
    record = sd3.png.read_record(path)["settings"]
    assert [record[n] for n in ("width", "height", "steps", "cfg", "sampler", "seed")] == [96, 96, 4, 2.5, "euler", 5]
    assert (record["init_image"], record["denoise"], record["batch_size"]) == ("in.png", 0.5, 1)
    assert record["skip_layer"] == {"scale": 2.0, "start": 0.01, "end": 0.9, "layers": [3], "cfg": 4.0}
    assert (tmp_path / "in.png").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompts": ()}, "prompt: no prompt is given"),  # P8
        ({"prompts": [None]}, "prompt None: must be text"),
        ({"prompts": {"a": 1}}, "prompt {'a': 1}: must be a text"),
        ({"prompts": b"a"}, "prompt b'a'"),
        ({"num_images": 0}, "num_images 0"),
        ({"seed": -1}, "seed -1"),  # P5
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"seed_type": "ROLLS"}, "seed_type ROLLS: must be one of fixed, rand, roll; did you mean roll?"),
        ({"width": 0}, "width 0"),
        ({"width": True}, "width True"),
        ({"steps": math.nan}, "steps nan"),
        ({"cache": np.float32("inf")}, "cache inf"),
        ({"skip_layer_config": {"scale": 2}}, "skip_layer_cfg layers: is missing"),
        ({"skip_layer_config": {"scale": 2, "layer": [3]}}, "skip_layer_cfg layer: unknown; did you mean layers?"),
        ({"skip_layer_config": {"scale": 2, "layers": [DEMO_DEPTH]}}, f"this model has {DEMO_DEPTH}"),
        ({"skip_layer_config": [1]}, "must be a SkipLayerConfig"),
        ({"residual_config": {"targets": [3]}}, "must be a ResidualConfig"),
        ({"controlnet_cond_image": "x.png"}, "controlnet_cond_image: needs controlnet_ckpt"),  # reading.md 7
        ({"init_image": "none.png"}, "init_image none.png: no such file"),
        ({"out_dir": 5}, "out_dir 5: must be a path"),
        ({"with_metadata": "perhaps"}, "with_metadata perhaps"),
    ],
)
def test_gen_image_refuses_before_weights_load(tmp_path, monkeypatch, values, told):
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        engine.gen_image(**{"prompts": ["a"], "out_dir": "out"} | values)
    assert told in str(error.value)
    assert "--" not in str(error.value)
    assert not Path("out").exists()


def test_a_seed_means_that_seed_in_python(engine, tmp_path):
    def seeds(**values) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        paths = engine.gen_image(["a", "b"], steps=1, out_dir=folder, **values)
        return [sd3.png.read_record(p)["settings"]["seed"] for p in paths]

    assert seeds(seed=5) == [5, 5]
    assert seeds(seed=5, num_images=2) == [5, 6, 5, 6]
    assert seeds(seed=5, seed_type="ROLL") == [5, 6]
    assert seeds(seed_type="fixed") == [23, 23]
    drawn = seeds(seed=5, seed_type="rand", num_images=3)
    assert len(set(drawn)) == 6
    assert seeds() != seeds()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"weights": "int4"}, "weights int4: must be one of full, int8, fp8"),  # P7
        ({"dtype": "float64"}, "dtype float64"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"device": "gpu"}, "device gpu: must be auto"),
        ({"device": "cuda:4096"}, "device cuda:4096: must be auto"),
        ({"device": torch.float16}, "device torch.float16"),
        ({"offload": "maybe"}, "offload maybe"),
        ({"model": None, "shift": 0}, "shift 0"),
        ({"model": 5}, "model 5: must be a path"),
        ({"vae": ["a"]}, "vae ['a']: must be a path"),
    ],
)
def test_load_reads_its_arguments(values, told):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        SD3Inferencer().load(**{"model": str(DEMO)} | values)
    assert told in str(error.value)
    assert "--" not in str(error.value)


def test_load_keeps_what_was_read():
    engine = SD3Inferencer().load(DEMO, device="CPU", dtype="FP32", weights="INT8", no_t5="yes", shift="2")  # P7
    assert (engine.engine.dtype, engine.engine.setup.weights, engine.engine.setup.no_t5, engine.shift) == (
        torch.float32,
        "int8",
        True,
        2.0,
    )
    assert engine.engine.device == torch.device("cpu")
    assert SD3Inferencer().load(DEMO, device=torch.device("cpu"), dtype=torch.float16).engine.dtype == torch.float16


def test_an_engine_without_a_model_says_so(tmp_path):  # P9
    engine = SD3Inferencer()
    with pytest.raises(FileNotFoundError):
        engine.load("nothing.safetensors")
    broken = SD3Inferencer().load(DEMO, device="cpu")
    with pytest.raises(FileNotFoundError):
        broken.load(DEMO, device="cpu", vae="nothing.safetensors")  # the model was opened, the VAE is not there
    wrong = SD3Inferencer().load(DEMO, device="cpu")
    with pytest.raises(ValueError, match="weights"):
        wrong.load(DEMO, weights="int4")
    zeros = torch.zeros(1, 16, 4, 4)
    for one in (SD3Inferencer(), engine, broken, wrong):
        calls = [
            lambda e: e.gen_image("a", out_dir=tmp_path / "out"),
            lambda e: e.do_sampling(zeros, 1, (zeros, zeros), None, 2, 1.0),
            lambda e: e.vae_encode(Image.new("RGB", (64, 64))),
            lambda e: e.get_cond("a"),
            lambda e: plan_pictures(e.engine, ["a"], [1]),
            lambda e: e.engine.network.mmdit,
            lambda e: e.engine.pixels.vae,
            lambda e: e.engine.text.encode([("a", 77)]),
            lambda e: e.engine.device,
        ]
        for call in calls:
            with pytest.raises(NotLoaded, match=r"no model is loaded; call SD3Inferencer.load first"):
                call(one)
        assert issubclass(NotLoaded, ValueError)
    assert not (tmp_path / "out").exists()
    assert broken.load(DEMO, device="cpu").gen_image("a", steps=1, out_dir=tmp_path / "out")
    without = SD3Inferencer().load(DEMO, device="cpu", load_tokenizers=False)
    with pytest.raises(NotLoaded, match="loaded without text encoders"):
        without.gen_image("a", steps=1, out_dir=tmp_path / "out2")


def test_do_sampling_reads_its_arguments(small_engine):  # reading.md 7, 8, 14
    length = small_engine.engine.text.pair_length("a", "")
    cond, neg = (small_engine.get_cond(t, length) for t in ("a", ""))
    one, three = torch.zeros(1, 16, 4, 4), torch.zeros(3, 16, 4, 4)
    for values, told in [
        ({"sampler": "x"}, "sampler x: must be one of"),
        ({"cfg_scale": 7.0, "neg_cond": None}, "cfg 7: needs neg_cond"),
        ({"controlnet_cond": one}, "no ControlNet is loaded"),
        ({"latent": three}, "seed: 1 given for 3 rows"),
        ({"latent": three, "seed": [1, 2]}, "seed: 2 given for 3 rows"),
        ({"latent": one[0]}, "latent: must be"),
        ({"seed": -1}, "seed -1"),
        ({"seed": [True]}, "seed True"),
        ({"steps": 0}, "steps 0"),
        ({"steps": None}, "steps None: is missing"),
        ({"cfg_scale": math.nan}, "cfg nan"),
        ({"denoise": 1.5}, "denoise 1.5"),
        ({"shift": 1e-20}, "shift 1e-20"),
        ({"cache": "x"}, "cache x"),
        ({"skip_layer_config": {"layers": []}}, "skip_layer_cfg scale: is missing"),
        ({"residual_config": "3,5"}, "must be a ResidualConfig"),
    ]:
        given = {"latent": one, "seed": 1, "conditioning": cond, "neg_cond": neg, "steps": 2, "cfg_scale": 2.0} | values
        with pytest.raises(ValueError) as error:
            small_engine.do_sampling(**given)
        assert told in str(error.value)
        assert "--" not in str(error.value)
    plain = small_engine.do_sampling(one, 3, cond, neg, 2, 2.0, "euler")
    spelt = small_engine.do_sampling(one, np.int64(3), cond, neg, np.int32(2), "2", " EULER", denoise=1)
    assert torch.equal(plain, spelt)
    rows = small_engine.do_sampling(three, np.array([3, 4, 5]), cond, neg, 2, 2.0, "euler")
    assert not torch.allclose(rows[0], rows[1])


def test_a_controlnet_and_its_picture_belong_together(small_model, tmp_path):  # reading.md 7
    control = small_model.parent / "control_8b.safetensors"
    engine = SD3Inferencer().load(small_model, device="cpu", dtype="float32", controlnet_ckpt=control)
    engine.tell.quiet = True
    (path,) = engine.gen_image("a", steps=1, out_dir=tmp_path / "without")  # loaded, but this picture does not use it
    assert sd3.png.read_record(path)["settings"]["controlnet_ckpt"] is None
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "in.png")
    (path,) = engine.gen_image("a", steps=1, out_dir=tmp_path / "out", controlnet_cond_image=tmp_path / "in.png")
    assert sd3.png.read_record(path)["settings"]["controlnet_cond_image"] == "in.png"
    plain = SD3Inferencer().load(small_model, device="cpu", dtype="float32")
    plan = plan_pictures(plain.engine, ["a"], [1], controlnet_cond_image="in.png", width=64, height=48)
    for call in (
        lambda: plain.engine.check_settings(plan.pictures[0]),
        lambda: plain.vae_encode(Image.open(tmp_path / "in.png"), control=True),
    ):
        with pytest.raises(ValueError, match=r"no ControlNet is loaded|needs a ControlNet"):
            call()
    for seed, image in (("x", Image.new("RGB", (64, 48))), (1, "in.png")):
        with pytest.raises(ValueError, match=r"seed x|must be a PIL image"):
            plain.vae_encode(image, seed)


def test_plan_wants_as_many_seeds_for_each_prompt(engine):
    for prompts, seeds in ((["a", "b"], [1, 2, 3]), (["a"], []), ([], [1])):
        with pytest.raises(ValueError, match=r"seed|prompt"):
            plan_pictures(engine.engine, prompts, seeds)


# ---- U: what a line is ---------------------------------------------------------------------------

ODD_ENDS = ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"]


@pytest.mark.parametrize("mark", ODD_ENDS, ids=[f"U+{ord(m):04X}" for m in ODD_ENDS])
def test_lines_are_those_of_wc(mark, tmp_path):  # U1 and case 6
    text = f"a red circle{mark}left of a blue square\r\n\n a green star"
    path = tmp_path / "p.txt"
    path.write_bytes(text.encode())
    assert read_prompts(path)[0] == [f"a red circle{mark}left of a blue square", "a green star"]
    assert len(read_lines("prompt", path)) == text.count("\n") + 1
    path.write_bytes(text.encode() + b"\n")
    assert len(read_lines("prompt", path)) == text.count("\n") + 1
    if mark.isprintable() or mark in "\u2028\u2029\x85":  # JSON allows these inside a text
        rows = tmp_path / "p.jsonl"
        rows.write_text(json.dumps({"prompt": f"a{mark}b"}, ensure_ascii=False) + "\r\n" + '{"prompt": "c"}\n')
        got = read_jsonl("prompt", str(rows), lambda r: True, "")
        assert [row["prompt"] for row in got] == [f"a{mark}b", "c"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"))))
@hypothesis_settings(deadline=None)
def test_lines_round_trip(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("lines") / "p.txt"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    wanted = [line.removesuffix("\r") for line in lines]
    if wanted:
        wanted[0] = wanted[0].removeprefix("\ufeff")
    assert read_lines("prompt", path) == wanted


# ---- D8, Y3: files and names ---------------------------------------------------------------------


def test_nested_lines_and_grids(tmp_path, monkeypatch, capsys):  # D8
    monkeypatch.chdir(tmp_path)
    deep = "[" * 100_000
    Path("deep.jsonl").write_text('{"prompt": "a"}\n' + deep + "\n")
    Path("closed.jsonl").write_text('{"prompt": ' + deep + "]" * 100_000 + "}\n")
    for name, line in (("deep.jsonl", 2), ("closed.jsonl", 1)):
        error = refused(sd3.sweep.command.main, ["--out", "o", "--prompt", name], capsys)
        assert f"--prompt {name}: line {line} is not of the form" in error
        with pytest.raises(ValueError, match=f"prompts {name}: line {line} is not of the form"):
            sd3.probe.running.read_labelled(name)
    Path("g.yaml").write_text("prompt: " + "[" * 20_000 + "]" * 20_000)
    Path("h.yaml").write_text("".join(" " * i + "a:\n" for i in range(2000)))
    Path("i.yaml").write_text("prompt: a\ncfg: &a [*a]\n")
    Path("j.yaml").write_text(
        "prompt: a\nl0: &l0 x\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30))
    )
    for name in ("g", "h", "i"):
        assert f"--grid {name}.yaml: cannot be read as YAML" in refused(
            sd3.sweep.command.main, ["--out", "o", "--grid", f"{name}.yaml"], capsys
        )
    refused(sd3.sweep.command.main, ["--out", "o", "--grid", "j.yaml"], capsys)
    Path("k.yaml").write_text(Path("j.yaml").read_text().replace("l29", "cfg").replace("prompt: a\n", ""))
    refused(sd3.sweep.command.main, ["--out", "o", "--grid", "k.yaml"], capsys)
    assert not Path("o").exists()


def test_pipes_and_folders_are_no_prompt_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    os.mkfifo("pipe.yaml")
    Path("folder.txt").mkdir()
    assert "--prompt pipe.txt: is not a file" in refused(sd3_infer.main, ["--prompt", "pipe.txt"], capsys)
    assert "--prompt folder.txt: is a folder" in refused(sd3_infer.main, ["--prompt", "folder.txt"], capsys)
    assert "--grid pipe.yaml: is not a file" in refused(
        sd3.sweep.command.main, ["--out", "o", "--grid", "pipe.yaml"], capsys
    )
    refused(sd3.probe.command.main, ["suggest", "--measurement", "pipe.yaml"], capsys)


@pytest.mark.parametrize(
    "flag", ["prompt", "model", "out_dir", "vae", "residual_config", "replay", "init_image", "embed_cache"]
)
def test_names_that_are_too_long(flag, tmp_path, monkeypatch, capsys):  # Y3
    monkeypatch.chdir(tmp_path)
    for name in ("x" * 5000 + ".txt", "é" * 130 + ".txt", "ab/" * 2000 + ".txt"):
        error = refused(sd3_infer.main, [f"--{flag}={name}"], capsys)
        assert f"--{flag} " in error
        assert "is too long for a path" in error
        assert len(error) < 500
    assert "is too long" not in refused(sd3_infer.main, [f"--{flag}={'x' * 250}.txt"], capsys)


def test_a_postfix_that_no_folder_can_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for postfix in ("x" * 101, "é" * 51, "a\0b"):
        assert "--postfix " in refused(sd3_infer.main, [f"--postfix={postfix}", "--prompt", "𠀀" * 60], capsys)
    name = sd3.writing.make_folder(tmp_path, folder_name("𠀀" * 60), "x" * 100)  # the longest there can be
    assert name.is_dir()


def measurement() -> dict:
    rows = [{"step": 0, "sigma": 1.0, "block": b, "cosine": 1.0, "retrieval": 0.9 - 0.1 * b} for b in range(4)]
    return {"depth": 4, "rows": rows, "chance": {"retrieval": 0.1}}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [r | {"retrieval": math.nan} for r in measurement()["rows"]]},  # StopIteration
        {"rows": [r | {"retrieval": math.inf} for r in measurement()["rows"]]},
        {"rows": [r | {"retrieval": "0.5"} for r in measurement()["rows"]][:3]},
        {"depth": 10**9},  # S2: "out of memory"
        {"depth": 1},
        {"depth": 5},
        {"depth": "four"},
        {"rows": []},
        {"rows": 5},
        {"chance": {"retrieval": math.nan}},
        {"chance": {}},
    ],
)
def test_a_measurement_that_is_none(tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text(json.dumps(measurement()))
    assert sd3.probe.command.main(["suggest", "--measurement", "m.json"]) == 0
    assert "origin 0" in capsys.readouterr().out
    Path("m.json").write_text(json.dumps(measurement() | change))
    error = refused(sd3.probe.command.main, ["suggest", "--measurement", "m.json"], capsys)
    assert "--measurement m.json: is not a measurement of sd3_probe.py" in error
    Path("m.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused(sd3.probe.command.main, ["suggest", "--measurement", "m.json"], capsys)


def test_the_probe_names_its_own_flags(tmp_path, monkeypatch, capsys):  # Y3, reading.md 16
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\nb\n")
    Path("file").write_text("")
    base = ["--prompts", "p.txt", "--model", DEMO, "--device", "cpu"]
    assert "--out file/x" in refused(sd3.probe.command.main, ["measure", *base, "--out", "file/x"], capsys)
    words = ["calibrate", *base, "--targets", "3", "--out", "file/r.safetensors"]
    assert "--out file" in refused(sd3.probe.command.main, words, capsys)
    for targets, told in (
        ("3-99", f"--targets {DEMO_DEPTH}: no such layer"),
        ("3,3", "--targets: layer 3 is listed twice"),
    ):
        words = ["calibrate", *base, "--out", "r.safetensors", "--targets", targets]
        error = refused(sd3.probe.command.main, words, capsys)
        assert told in error
        assert "residual" not in error
    words = [
        "calibrate",
        *base,
        "--out",
        "r.safetensors",
        "--targets",
        str(DEMO_DEPTH + 1),
        "--origin",
        str(DEMO_DEPTH),
    ]
    assert f"--origin {DEMO_DEPTH}: no such layer" in refused(sd3.probe.command.main, words, capsys)


def test_cells_of_results_are_no_formulas(tmp_path):  # Y4
    for text in ("=1+1", "+1", "-1 red circle", "@SUM(A1)", "\t=1", "\r=1"):
        assert cell(text) == "'" + text
    for value in (-0.5, -3, "a=b", "", 0, True):
        assert cell(value) == value
    assert cell(None) == ""


def test_results_of_a_sweep_begin_no_cell_with_a_formula(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "=HYPERLINK(1)"}\n{"prompt": "-red"}\n')
    words = [
        "--out",
        str(tmp_path / "s"),
        "--prompt",
        str(tmp_path / "p.jsonl"),
        "--model",
        str(DEMO),
        "--device",
        "cpu",
    ]
    assert sd3.sweep.command.main([*words, "--steps", "1", "--negative_prompt", "@x"]) == 0
    with open(tmp_path / "s" / "results.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["prompt"] for row in rows] == ["'=HYPERLINK(1)", "'-red"]
    assert {row["negative_prompt"] for row in rows} <= {"'@x", ""}


# ---- seeds, switches, self check, names, home ----------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60))
@hypothesis_settings(deadline=None, max_examples=30)
def test_random_seeds_do_not_repeat(prompts, images):  # reading.md 12
    seeds = picture_seeds(0, "rand", prompts, images)
    assert len(set(seeds)) == len(seeds) == prompts * images
    assert all(0 <= s < 100_000 for s in seeds)


def test_as_many_random_seeds_as_there_can_be():
    assert sorted(picture_seeds(0, "rand", 1, MOST_PICTURES)) == list(range(100_000))


def test_drawn_seeds_are_printed(tmp_path, capsys):
    words = ["--prompt", "a", "--model", str(DEMO), "--device", "cpu", "--steps", "1", "--num_images", "2"]
    assert sd3_infer.main([*words, "--out_dir", str(tmp_path)]) == 0
    seeds = [sd3.png.read_record(p)["settings"]["seed"] for p in sorted(tmp_path.rglob("*.png"))]
    assert f"seeds drawn: {seeds[0]}, {seeds[1]}\n" in capsys.readouterr().err
    assert sd3_infer.main([*words, "--out_dir", str(tmp_path), "--seed", "3"]) == 0
    assert "seed drawn" not in capsys.readouterr().err
    assert sd3.run.drawn_seeds([5]) == "seed drawn: 5"
    assert sd3.run.drawn_seeds(range(20)).endswith("14, 15 and 4 more, in run.json")


def test_a_sweep_varies_switches(tmp_path, capsys):  # reading.md 13
    for words in (["--no_t5", "False;True"], ["--no_t5=False;True"], ["--no_t5", "no; yes;"], ["--no-t5", "0;1"]):
        raw = read_arguments([*words, "--prompt", "a"], sd3.sweep.grid.SWEPT)
        assert [Flags.read(v.raw).no_t5 for v in Grid.read(raw).variants] == [False, True]
    assert read_arguments(["--no_t5", "a;b"]) == {"no_t5": "True", "prompt": "a;b"}
    error = refused(sd3_infer.main, ["--no_t5", "False;True", "--prompt", "a"], capsys)
    assert "--no_t5 False;True: must be True or False" in error


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "x"],
        ["--prompt", "a"],
        ["--steps", "3"],
        ["--no_t5"],
        ["--shift", "2"],
        ["--vae", "x"],
        ["--seed", "1"],
    ],
)
def test_self_check_goes_with_few_flags(words, tmp_path, monkeypatch, capsys):  # reading.md 16
    monkeypatch.chdir(tmp_path)
    error = refused(sd3_infer.main, ["--self_check", *words], capsys)
    assert f"{words[0]}: does not go with --self_check" in error
    assert Flags.read({"self_check": "True", "device": "cpu", "dtype": "fp32", "weights": "int8"}).self_check


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("portrait of a cat, f/1.8, 35mm", "portrait_of_a_cat__f_1.8__35mm"),  # case 9
        ("and/or", "and_or"),
        ("http://example.org/a.png in a frame", "http___example.org_a.png_in_a_frame"),
        ("a cat.", "a_cat."),
        ("1/2 and 3/4", "1_2_and_3_4"),
        ("a\\b", "a_b"),
        ("../../etc", ".._.._etc"),
        ("/", "_"),
        ("prompts/list-1.txt", "list-1"),
        ("~/my prompts.TXT", "my_prompts"),
        ("x/dogs.jsonl", "dogs"),
        ("京" * 60, "京" * 50),
    ],
)
def test_folder_names_begin_with_the_prompt(prompt, name):
    assert folder_name(prompt) == name


@given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis_settings(deadline=None)
def test_folder_names_are_names(text):
    name = folder_name(text)
    assert "/" not in name
    assert len(name) <= 50
    assert len(name.encode()) <= 150
    assert name not in (".", "..")
    if not text.lower().endswith((".txt", ".jsonl")) and len(text.encode()) <= 50 and text.strip("."):
        assert len(name) == len(text)  # nothing of it is lost


PATH_FLAGS = [
    "model", "out_dir", "vae", "init_image", "controlnet_ckpt", "controlnet_cond_image", "model_folder", "embed_cache",
    "residual_rotations", "residual_config", "replay",
]  # fmt: skip


def test_home(tmp_path, monkeypatch, capsys, engine):  # case 10
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for flag in PATH_FLAGS:
        assert READERS[flag](flag, "~/x") == str(tmp_path / "home" / "x")
        assert READERS[flag](flag, Path("~/x")) == str(tmp_path / "home" / "x")
        assert READERS[flag](flag, "x~/y") == "x~/y"
    for rows in (sd3.sweep.command.OWN, *sd3.probe.command.COMMANDS.values()):
        for flag in {"out", "grid", "clip_model", "prompts", "measurement", "check_prompts", "model"} & set(rows):
            assert rows[flag].read(flag, "~/x") == str(tmp_path / "home" / "x")
    (tmp_path / "home" / "p.txt").write_text("a star\n")
    base = ["--model", str(DEMO), "--device", "cpu", "--steps", "1", "--seed", "1"]
    assert sd3_infer.main([*base, "--prompt", "~/p.txt", "--out_dir=~/out", "--postfix", "_x"]) == 0
    assert (tmp_path / "home" / "out" / "demo" / "p_x" / "000000.png").is_file()
    (path,) = engine.gen_image("a star", steps=1, out_dir="~/python", init_image=None)
    assert (tmp_path / "home" / "python" / path.name).is_file()
    (tmp_path / "home" / "g.yaml").write_text("prompt: ~/p.txt\nembed_cache: ~/cache\nsteps: 1\n")
    assert sd3.sweep.command.main(["--grid", "~/g.yaml", "--out=~/swept", "--model", str(DEMO), "--device", "cpu"]) == 0
    assert list((tmp_path / "home" / "swept" / "pictures").glob("*.png"))
    assert (tmp_path / "home" / "cache").is_dir()
    assert read_prompts("~ a cat, home")[0] == ["~ a cat, home"]
    assert list(work.iterdir()) == []


def test_a_device_is_read_where_it_is_chosen():
    for name in (["cpu"], {}, "meta", "cpu:0:1", "cuda:99999999999999999999"):
        with pytest.raises(ValueError, match="device"):
            choose_device(name)


# ---- properties of readers -----------------------------------------------------------------------

ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=4),
        st.sampled_from(["Euler", "AUTO", "1e3", " 7", "0-3", "linear:1:2", "EXP:2", "cuda:1", "96", "-0.0", "~"]),
        st.integers(-5, 200), st.integers(0, 20).map(lambda n: 16 * n), st.floats(-2, 2),
        st.integers(-5, 5).map(np.int32), st.floats(-2, 2).map(np.float64),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(sorted(READERS)), ANYTHING)
@hypothesis_settings(deadline=None, max_examples=600)
def test_reading_what_was_read_gives_the_same(flag, value):
    try:
        read = READERS[flag](flag, value)
    except ValueError as error:
        assert str(error).startswith(flag)
        assert "\n" not in str(error)
        str(error).encode()
        return
    assert type(read) in (str, int, float, bool, tuple, type(None))
    json.dumps(read, allow_nan=False).encode()
    if read is not None:
        again = READERS[flag](flag, read)
        assert again == read
        assert type(again) is type(read)
        if isinstance(read, (str, int, float)):  # as a shell would hand it over
            assert READERS[flag](flag, str(read)) == read
    if isinstance(read, tuple) and read:
        assert READERS[flag](flag, ",".join(map(str, read))) == read
        assert READERS[flag](flag, list(read)) == read


@given(st.one_of(ANYTHING, st.integers(-(10**60), 10**60)))
@hypothesis_settings(deadline=None)
def test_every_value_is_shown_on_one_short_line(value):
    shown = display(value)
    assert "\n" not in shown
    shown.encode()
    assert len(shown) < 3000
    assert len(display("x" * 10_000)) < 300
    assert len(display(10**5000)) < 60


@given(st.lists(st.integers(0, 9999), max_size=20), st.sampled_from([",", " ", ", "]))
@hypothesis_settings(deadline=None)
def test_layers_in_any_spelling(layers, between):
    text = between.join(map(str, layers))
    for value in (
        text,
        f"[{text}]",
        tuple(layers),
        list(layers),
        np.array(layers, dtype=np.int64),
        torch.tensor(layers).long(),
    ):
        assert read_layers("x", value) == tuple(layers)


# ---- records: settings -> record -> flags -> settings --------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SETTINGS = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "seed": st.integers(0, SEED_LIMIT - 1),
        "sampler": st.sampled_from(["euler", "dpmpp_2m"]),
        "steps": st.integers(1, 10_000),
        "cfg": st.floats(1.5, 100),
        "shift": st.floats(0.001, 1000),
        "width": st.integers(1, 64).map(lambda n: 16 * n),
        "height": st.integers(1, 64).map(lambda n: 16 * n),
        "residual_origin_layer": st.just(0),
        "residual_target_layers": st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True).map(tuple),
        "weight": st.floats(-1000, 1000),
        "residual_mode": st.sampled_from(["add", "anchored"]),
        "residual_schedule": st.one_of(
            st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 9).map("exp:{}".format)
        ),
        "residual_start": st.floats(0, 0.4),
        "residual_end": st.floats(0.5, 1),
        "residual_branch": st.sampled_from(["both", "cond", "uncond"]),
        "no_t5": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "batch_size": st.integers(1, 64),
        "vae_tile": st.sampled_from([0, 128, 576]),
    }
)


@given(SETTINGS)
@hypothesis_settings(deadline=None, max_examples=150)
def test_a_record_gives_its_settings_back(tmp_path_factory, values):
    weight = values.pop("weight")
    values["residual_weights"] = (weight,) * len(values["residual_target_layers"])
    settings = Settings(model=str(DEMO), device="cpu", text_encoder_device="cpu", **values)
    record = {"settings": json.loads(json.dumps(settings.public()))}
    picture = Replay(DEMO.parent / "picture.png", record, {"replay": "picture.png"})
    flags = Flags.read(picture.flags({}))
    config = ResidualConfig.from_flags(flags.residual())
    again = {n: getattr(flags, n) for n in values if not n.startswith("residual_")}
    again |= {flag: getattr(config, name) for name, flag in RESIDUAL_FLAGS.items()}
    made = Settings(model=flags.model, device=flags.device, text_encoder_device=flags.text_encoder_device, **again)
    assert made.public() == settings.public()
    assert made.digest() == settings.digest()
