"""Scores of a sweep: the six kinds, CLIP against transformers' own forward pass, intervals and paired gains."""

from __future__ import annotations

import csv
import random
import re

import numpy as np
import pytest
import torch
from helpers import DEMO, TOKENIZERS
from PIL import Image

import sd3.sweep.command
from sd3.settings import Flags, Settings
from sd3.shapes.prompts import KINDS, draw, held_out_prompts, held_out_texts, read_caption
from sd3.sweep.grid import Grid
from sd3.sweep.plan import Plan, PlannedImage
from sd3.sweep.scores import best, clip_scorer, demo_scorer, spread, summarise, table


def test_captions_are_read_as_they_were_written():
    for prompt in held_out_prompts(40):
        read = {p.kind: p for p in read_caption(prompt.text)}
        got = read[prompt.kind]
        assert (got.wanted, got.count, got.relation) == (prompt.wanted, prompt.count, prompt.relation)
    with pytest.raises(ValueError, match="is not a caption of coloured shapes"):
        read_caption("a red circle near a blue square")


def test_the_demo_scorer_tells_right_pictures_from_wrong_ones():
    rng = random.Random(2)
    prompts = held_out_prompts(10)
    score = demo_scorer(Grid(tuple(held_out_texts(10)), (0,), ()), per_kind=10)
    right = [score(Image.fromarray(draw(p, rng)), p.text)[p.kind] for p in prompts]
    assert np.mean(right) > 0.95
    blank = Image.new("RGB", (96, 96), "white")
    assert {v for p in prompts for v in score(blank, p.text).values()} == {0.0}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model of random weights in transformers' layout, with the shipped model's tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((TOKENIZERS / "tokenizer" / name).read_bytes())
    tokenizer = transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = small | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(3)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


def test_clip_scores_are_transformers_own(clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    score = clip_scorer(str(clip_folder), "cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizerFast.from_pretrained(clip_folder)
    images = CLIPImageProcessor.from_pretrained(clip_folder)
    seen = []
    for i, text in enumerate(["a red circle", "two green stars", "a red circle"]):
        image = Image.effect_noise((96, 64), 40 + 40 * i).convert("RGB")
        with torch.no_grad():
            out = model(**tokens([text], return_tensors="pt"), **images(images=[image], return_tensors="pt"))
        cosine = (out.logits_per_image / model.logit_scale.exp()).item()
        assert score(image, text)["clip"] == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
        seen.append(cosine)
    assert len(set(seen)) == 3


def test_a_sweep_with_clip_scores(clip_folder, tmp_path, capsys):
    arguments = ["--model", DEMO, "--device", "cpu", "--steps", 2, "--prompt", "a red circle", "--seed", "0-3"]
    arguments += ["--residual_target_layers", "3", "--score", "clip", "--clip_model", clip_folder]
    assert sd3.sweep.command.main(["--out", str(tmp_path), *map(str, arguments)]) == 0
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as f:
        off, residual = csv.DictReader(f)
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as f:
        lines = list(csv.DictReader(f))
    means = {v: np.mean([float(x["clip: clip"]) for x in lines if x["variant"] == v]) for v in ("off", "0:3:1.0")}
    assert float(off["mean"]) == pytest.approx(means["off"])
    assert float(residual["gain"]) == pytest.approx(means["0:3:1.0"] - means["off"])
    assert off["gain"] == ""
    assert "| off | " in capsys.readouterr().out


def plan_of(prompts: int, seeds: int) -> Plan:
    """Two variants, the first the baseline."""
    grid = Grid(tuple(f"p{i}" for i in range(prompts)), tuple(range(seeds)), ())
    pictures = [
        PlannedImage(v, p, s, Settings(prompt=f"p{p}", model="m", seed=s), 77, f"{v}-{p}-{s}")
        for v in range(2)
        for p in range(prompts)
        for s in range(seeds)
    ]
    variants = Grid.read({"prompt": "x", "residual_target_layers": "3"}).variants
    return Plan(grid, variants, (0, 0), (Flags(),), (0, 0), tuple(pictures))


def test_gains_are_paired_with_the_same_prompt_and_seed():
    plan, rng = plan_of(20, 3), random.Random(1)
    scores = {p.id: {"clip": rng.gauss(30, 10)} for p in plan.of(0)}
    scores |= {p.id: {"clip": scores[plan.baseline(p).id]["clip"] + 0.5} for p in plan.of(1)}
    off, residual = summarise(plan, scores)
    assert residual.gain == pytest.approx(0.5)
    assert (residual.gain_low, residual.gain_high) == (None, None)  # no spread, though scores have much
    assert off.high - off.low > 2
    del scores["0-0-0"]  # not made yet: its partner counts for the mean, not for the gain
    off, residual = summarise(plan, scores)
    assert (off.count, residual.count) == (59, 60)
    assert (off.pairs, residual.pairs) == (0, 59)
    assert residual.gain == pytest.approx(0.5)


def test_intervals_draw_prompts_whole():
    rng = random.Random(1)
    prompts = [rng.gauss(0, 1) for _ in range(30)]
    one = [(i, x) for i, x in enumerate(prompts)]
    many = [(i, x) for i, x in enumerate(prompts) for _ in range(50)]  # the same said fifty times
    assert spread(many) == pytest.approx(spread(one))
    mean, low, high = spread(one)
    assert high - low == pytest.approx(2 * 1.96 * np.std(prompts) / 30**0.5, rel=0.1)
    assert low < mean < high
    _, low, high = spread([(0, 1.0), (0, 0.0), (0, 1.0), (0, 1.0), (0, 1.0)])  # one prompt: over images
    assert low < high


def test_the_mean_over_kinds_and_the_table():
    plan = plan_of(2, 1)
    scores = {
        "0-0-0": {"colours": 1.0, "single object": 0.0},
        "0-1-0": {"position": 0.0},
        "1-0-0": {"colours": 1.0, "single object": 1.0},
        "1-1-0": {"position": 1.0},
    }
    rows = {(r.variant, r.kind): r for r in summarise(plan, scores)}
    assert {k for _, k in rows} == {"overall", *(k for k in KINDS if k in ("colours", "single object", "position"))}
    assert rows[0, "position"].mean == 0
    assert rows[1, "overall"].gain == pytest.approx((0.5 + 1) / 2)
    assert (rows[1, "overall"].pairs, rows[1, "colours"].pairs) == (2, 1)  # images, not scores
    text = table(plan, list(rows.values()), ["off", "add, block 0 into 3"])
    assert "| add, block 0 into 3 (0:3:1.0) | " in text
    assert "1.00; +1.00 |" in text
    assert not re.search(r"\d to ", text)  # intervals of two prompts say nothing
    assert text.endswith("there are fewer than 5 prompts (or images of one prompt), or all values are equal.")


def test_intervals_are_shown_from_five_prompts_on():
    for prompts, seeds, shown in ((4, 9, False), (5, 1, True), (1, 5, True), (1, 4, False)):
        plan = plan_of(prompts, seeds)
        scores = {p.id: {"clip": p.prompt + p.seed + float(p.variant)} for p in plan.pictures}
        text = table(plan, summarise(plan, scores), ["off", "on"])
        assert ("; +1.00 |" in text) and ("Where no interval is shown" in text)  # all gains are equal
        assert bool(re.search(r"\d to \d", text)) == shown


def test_kinds_of_one_image_are_no_more_images():
    """`overall` of three images of one prompt, of two kinds each, has too few images for an interval."""
    plan = plan_of(1, 3)
    rows = summarise(plan, {p.id: {"single object": 1.0, "colours": float(p.seed > 0)} for p in plan.pictures})
    overall = next(r for r in rows if (r.variant, r.kind) == (0, "overall"))
    assert (overall.count, overall.low) == (3, None)
    assert overall.mean == pytest.approx(5 / 6)


def test_the_best_row_needs_intervals():
    """Two prompts with nine seeds each are enough images, but no interval."""
    for prompts, wanted in ((2, []), (6, [(1, "clip")])):
        plan = plan_of(prompts, 9)
        rows = summarise(plan, {p.id: {"clip": p.variant + 0.01 * p.prompt + 0.01 * p.seed} for p in plan.pictures})
        assert best(plan, rows) == wanted


def test_a_gain_of_few_prompts_has_no_interval():
    plan = plan_of(8, 1)
    scores = {p.id: {"clip": float(p.prompt)} for p in plan.of(1)}
    scores |= {p.id: {"clip": 0.0} for p in plan.of(0) if p.prompt < 3}
    _, residual = summarise(plan, scores)
    assert residual.low < 3.5 < residual.high
    assert (residual.gain, residual.gain_low) == (1.0, None)
