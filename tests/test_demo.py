"""The shipped model: its file, its scenes, its scorer, its training script, and what it scores."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from checkpoint import MMDIT_PREFIX, WeightFile
from demo import optim, scenes, score, train
from demo.scenes import ALL_COMBINATIONS, COLOURS, HELD_OUT, SEEN, SHAPES, sample_scene
from mmditx import MMDiTConfig
from sd3_impls import latent_in
from sd3_infer import SD3Inferencer


def test_the_file_is_small_and_of_the_promised_architecture():
    assert DEMO.stat().st_size <= 40e6
    config = WeightFile(DEMO).part(MMDIT_PREFIX).config(MMDiTConfig.from_shapes, "an MMDiT")
    assert config.depth >= 8
    assert config.qk_norm
    assert config.latent_channels == 16
    assert all(torch.isfinite(t).all() for t in load_file(DEMO).values())


def test_held_out_combinations_cover_every_colour_and_shape_and_are_never_trained_on():
    assert {c for c, _ in HELD_OUT} == set(COLOURS)
    assert {s for _, s in HELD_OUT} == set(SHAPES)
    assert set(SEEN) | HELD_OUT == set(ALL_COMBINATIONS)
    rng = random.Random(1)
    words = set(scenes.vocabulary())
    for _ in range(2000):
        scene = sample_scene(rng)
        assert not {(t.colour, t.shape) for t in scene.things} & HELD_OUT
        assert set(scene.caption.split()) <= words


def test_scored_prompts_are_all_unseen_and_forty_of_each_kind():
    prompts = score.held_out_prompts()
    assert len(prompts) == 240
    for kind in score.KINDS:
        assert sum(p.kind == kind for p in prompts) == 40
    assert all(set(p.wanted) <= HELD_OUT for p in prompts)
    assert prompts == score.held_out_prompts()
    longest = max(len(p.text.split()) for p in prompts)
    assert longest + 2 <= train.TEXT_LENGTH


def test_objects_never_touch_and_relations_hold():
    rng = random.Random(2)
    for _ in range(300):
        scene = sample_scene(rng)
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > 2 * 12.5
        if scene.relation:
            a, b = (score.Seen(t.shape, t.colour, t.x / 96, t.y / 96) for t in scene.things)
            assert score.holds(scene.relation, a, b)


def test_the_scorer_reads_ground_truth_and_not_shuffled_prompts():
    results = score.check(per_kind=40, seed=11)
    assert np.mean(results["ground truth"]) >= 0.99
    assert np.mean(results["shuffled"]) < 0.25


@pytest.mark.parametrize("blur", [0, 1])
def test_the_scorer_reads_every_combination_on_every_background(blur):
    rng = random.Random(4)
    for colour, shape in ALL_COMBINATIONS:
        for background in scenes.BACKGROUNDS:
            thing = scenes.place((colour, shape), (rng.randrange(3), rng.randrange(3)), 11.5, rng)
            drawn = Image.fromarray(scenes.render(scenes.Scene("", "single", (thing,), background)))
            if blur:
                drawn = drawn.filter(ImageFilter.GaussianBlur(0.6))
            (seen,) = score.read_picture(np.asarray(drawn))
            assert (seen.colour, seen.shape) == (colour, shape)
            assert abs(seen.x - thing.x / 96) < 0.05
            assert abs(seen.y - thing.y / 96) < 0.05


def test_the_scorer_refuses_what_is_wrong():
    circle = score.Seen("circle", "red", 0.2, 0.5)
    square = score.Seen("square", "blue", 0.8, 0.5)
    wanted = (("red", "circle"), ("blue", "square"))

    def said(kind, seen, count=1, relation="", wanted=wanted):
        return score.score(score.Prompt("", kind, wanted, count, relation), seen)

    assert said("position", [circle, square], relation="left of")
    assert not said("position", [circle, square], relation="right of")
    assert not said("position", [circle, square], relation="above")
    assert not said("position", [circle], relation="left of")
    assert said("counting", [circle, circle, square], count=2)
    assert not said("counting", [circle] * 3, count=2)
    assert not said("single object", [circle, circle], wanted=wanted[:1])
    assert said("colours", [circle], wanted=wanted[:1])
    assert not said("colours", [circle], wanted=(("blue", "circle"),))
    swapped = [score.Seen("circle", "blue", 0.2, 0.5), score.Seen("square", "red", 0.8, 0.5)]
    assert said("two objects", swapped)
    assert not said("colour attribution", swapped)
    assert said("colour attribution", [square, circle])
    assert score.read_picture(np.full((96, 96, 3), 128, np.uint8)) == []


def test_the_bootstrap_interval_holds_the_mean():
    low, high = score.interval([True] * 30 + [False] * 10)
    assert 0.55 < low < 0.75 < high < 0.92


def test_the_shipped_model_draws_what_it_is_asked_for():
    """A small part of the score that the README reports, so that broken weights or a broken path are noticed."""
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.quiet = True
    prompts = [p for p in score.held_out_prompts() if p.kind in ("single object", "colours")][::8]
    pictures = score.sample(engine, prompts, "off", seed=50, batch=10)
    hits = [score.score(p, score.read_picture(picture)) for p, picture in zip(prompts, pictures, strict=True)]
    assert np.mean(hits) >= 0.6


def test_newton_schulz_makes_matrices_nearly_orthogonal():
    g = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(optim.orthogonalise(g, iterations=8).float())
    assert s.min() > 0.5
    assert s.max() < 1.5


def test_folding_the_latent_format_keeps_the_autoencoder():
    model = train.VAE(train.VAE_CONFIG)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean, logvar = model.moments(images)
        taken_in = model.decoder.conv_in(mean)
        train.fold_latent_format(model, scale=1.7)
        folded, folded_logvar = model.moments(images)
        torch.testing.assert_close(latent_in(folded), mean / 1.7, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded_logvar, logvar - 2 * np.log(1.5305 * 1.7))
        inside = (..., slice(1, -1), slice(1, -1))  # the border's zero padding stands for another value
        torch.testing.assert_close(model.decoder.conv_in(folded)[inside], taken_in[inside], rtol=1e-4, atol=1e-4)


def test_the_shipped_autoencoder_gives_scenes_back():
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.quiet = True
    rng = random.Random(8)
    for _ in range(4):
        picture = scenes.render(sample_scene(rng))
        again = np.asarray(engine.vae_decode(engine.vae_encode(Image.fromarray(picture), 1)))
        assert np.square((picture.astype(float) - again) / 127.5).mean() < 0.006


@pytest.mark.slow
def test_training_runs_saves_resumes_and_exports(tmp_path):
    """Every stage for a moment, the flow stage twice: the second run goes on where the first stopped."""

    def stage(*arguments):
        command = [sys.executable, "-m", "demo.train", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    stage("vae", "--work", tmp_path, "--steps", 4)
    stage("encode", "--work", tmp_path, "--count", 128)
    first = ["flow", "--work", tmp_path, "--batch", 4, "--compile=False"]
    stage(*first, "--minutes", 0.1)
    steps = train.load(tmp_path / "flow.pt")["step"]
    stage(*first, "--minutes", 0.2)
    assert train.load(tmp_path / "flow.pt")["step"] > steps > 0
    stage("export", "--work", tmp_path, "--out", tmp_path / "out")
    engine = SD3Inferencer().load(str(tmp_path / "out" / "demo.safetensors"), device="cpu")
    engine.quiet = True
    assert engine.defaults["width"] == scenes.SIZE
    ((_, _, image),) = engine.make(engine.plan(["a red circle"], [1], **engine.defaults | {"steps": 1}))
    assert image.size == (96, 96)
