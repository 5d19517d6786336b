"""The shipped model: its file, its scenes, its scorer, its training script, and what it scores."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DEMO, ROOT
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from demo import data, flow, optim, readme, score, text, train
from demo.captions import captions as captions_of
from mmditx import MMDiTConfig
from sd3.files import MMDIT_PREFIX, WeightFile, file_sha256
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures
from sd3.residual import ResidualConfig
from sd3.shapes import prompts as shape_prompts
from sd3.shapes import scenes, scorer
from sd3.shapes.prompts import read_caption
from sd3.shapes.scenes import ALL_COMBINATIONS, COLOURS, HELD_OUT, SEEN, SHAPES, sample_scene, training_scene
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer
from sd3.weights import ModelTensors
from sd3_impls import latent_in
from sd3_infer import SD3Inferencer


def test_the_file_is_small_and_of_the_promised_architecture():
    assert DEMO.stat().st_size <= 40e6
    config = ModelTensors(WeightFile(DEMO), MMDIT_PREFIX).config(MMDiTConfig.from_shapes, "an MMDiT")
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
    prompts = shape_prompts.held_out_prompts()
    assert len(prompts) == 240
    for kind in shape_prompts.KINDS:
        assert sum(p.kind == kind for p in prompts) == 40
    assert all(set(p.wanted) <= HELD_OUT for p in prompts)
    assert prompts == shape_prompts.held_out_prompts()
    longest = max(len(p.text.split()) for p in prompts)
    assert longest + 2 <= 16


def words_of(caption: str) -> list[str]:
    return caption.replace(".", " .").replace(",", " ,").split()


@pytest.fixture(scope="module")
def trained_on() -> list[scenes.Scene]:
    """Scenes as training draws them."""
    rng = random.Random(2)
    return [training_scene(rng) for _ in range(3000)]


def test_training_draws_every_kind_and_mostly_short_captions(trained_on):
    kinds = Counter(s.kind for s in trained_on)
    for kind, percent in scenes.KINDS.items():
        assert kinds[kind] / len(trained_on) == pytest.approx(percent / 100, abs=0.03)
    lengths = [len(words_of(s.caption)) + 1 for s in trained_on]
    assert max(lengths) <= scenes.LONGEST
    assert np.mean([n <= text.POSITIONS for n in lengths]) > 0.8
    assert max(lengths) > scenes.LONGEST - 4
    assert max(len(s.caption) for s in trained_on) <= 226  # characters that reach T5
    assert np.mean([" background" in s.caption for s in trained_on]) > 0.5


def test_training_never_sees_what_is_held_out_and_knows_all_words(trained_on):
    seen = {(t.colour, t.shape) for s in trained_on for t in s.things}
    assert seen == set(SEEN)
    words = Counter(w for s in trained_on for w in words_of(s.caption))
    assert set(words) == set(scenes.all_words())
    assert scenes.all_words()[: len(scenes.vocabulary())] == scenes.vocabulary()
    assert len(set(scenes.all_words())) == len(scenes.all_words())


def test_every_word_names_the_object_it_belongs_to(trained_on):
    for scene in trained_on:
        words = words_of(scene.caption)
        assert len(words) == len(scene.words)
        named = {i: {w for w, who in zip(words, scene.words, strict=True) if who == i + 1} for i in range(3)}
        things = scene.things[:1] if scene.kind == "count" else scene.things
        for i, thing in enumerate(things):
            plural = "s" if scene.kind == "count" else ""
            assert {thing.colour, thing.shape + plural} <= named[i]
            assert ("small" in named[i]) == thing.small
        assert not any(named[i] for i in range(len(things), 3))


def test_objects_never_touch_and_none_is_smaller_than_two_percent(trained_on):
    from scipy import ndimage

    areas: dict[tuple[str, bool], list[float]] = {}
    for scene in trained_on[:600]:
        picture = scenes.render(scene).astype(float)
        drawn = np.abs(picture - scenes.BACKGROUNDS[scene.background]).sum(-1) > 0
        assert ndimage.label(drawn, np.ones((3, 3)))[1] == len(scene.things)
        for thing in scene.things:
            alone = scenes.render(scenes.Scene("", "", (thing,), "black")).astype(float) - 20
            covered = (alone / np.subtract(COLOURS[thing.colour], 20)).mean(axis=-1)
            areas.setdefault((thing.shape, thing.small), []).append(covered.mean())
    assert min(map(min, areas.values())) >= 0.02
    for shape in SHAPES:
        assert max(areas[shape, True]) < 0.85 * min(areas[shape, False])


def test_stated_relations_and_sizes_hold_in_the_picture(trained_on):
    for scene in trained_on:
        seen = [scorer.Seen(t.shape, t.colour, t.x / 96, t.y / 96) for t in scene.things]
        assert len(scene.relations) == {"relation": 1, "relations": 2}.get(scene.kind, 0)
        for first, relation, second in scene.relations:
            assert scorer.holds(relation, seen[first], seen[second])
            assert any(p in scene.caption for r in (relation, scenes.INVERSE[relation]) for p in scenes.PHRASINGS[r])
    read = trained_on[:200]
    assert all(scorer.shown(s, scorer.read_picture(scenes.render(s))) for s in read)
    others = [s for s in read if s.relations]
    turned = [scorer.read_picture(scenes.render(s)[::-1, ::-1]) for s in others]  # triangles and stars upside down too
    assert not any(scorer.shown(s, seen) for s, seen in zip(others, turned, strict=True))


def test_word_order_matters_and_both_orders_are_as_frequent():
    """Pairs of equal shape and of equal colour, either object first, either relation: all equally often."""
    rng = random.Random(3)
    drawn = [training_scene(rng, "relation", short=True, sized=False) for _ in range(6000)]
    pairs = [((a.colour, a.shape), (b.colour, b.shape)) for a, b in (s.things for s in drawn)]
    assert all(a != b for a, b in pairs)
    assert np.mean([a[1] == b[1] for a, b in pairs]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([a[0] == b[0] for a, b in pairs]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([a < b for a, b in pairs]) == pytest.approx(0.5, abs=0.03)
    relations = Counter(s.relation for s in drawn)
    assert max(relations.values()) / min(relations.values()) < 1.15
    phrasings = Counter(
        p for s in drawn for p in ("to the left of", "to the right of", " over ", " under ") if p in s.caption
    )
    assert sum(phrasings.values()) / len(drawn) == pytest.approx(scenes.OTHER_PHRASING, abs=0.03)


def test_short_captions_of_usual_size_are_those_of_the_first_model(trained_on):
    old, new = set(scenes.vocabulary()), Counter()
    for scene in trained_on:
        if set(words_of(scene.caption)) <= old and scene.kind in ("single", "pair", "count", "relation"):
            new[scene.kind] += 1
    assert set(new) == {"single", "pair", "count", "relation"}
    assert sum(new.values()) / len(trained_on) > 0.3


def test_facts_say_what_the_caption_does():
    rng = random.Random(5)
    scene = training_scene(rng, "relations", short=True, sized=True)
    facts = data.facts(scene)
    for i, thing in enumerate(scene.things):
        said = {name for name, is_so in zip(data.FACTS, facts[i], strict=True) if is_so}
        assert {thing.colour, thing.shape, data.ORDER[i], 1} <= said
        assert ("small" in said) == thing.small
    for first, relation, second in scene.relations:
        assert facts[first, data.FACTS.index(relation)]
        assert facts[second, data.FACTS.index(scenes.INVERSE[relation])]
    counted = training_scene(rng, "count")
    facts = data.facts(counted)
    assert facts[0, data.FACTS.index(len(counted.things))]
    assert not facts[1:].any()


def test_what_is_where_covers_the_picture_once():
    rng = random.Random(6)
    for kind in scenes.KINDS:
        scene = training_scene(rng, kind)
        shares = dict(zip(data.CLASSES, data.what_is_where(scene).T.astype(float) / 255, strict=True))
        shapes = sum(shares[s] for s in SHAPES)
        np.testing.assert_allclose(shapes + shares[scene.background], 1, atol=0.02)
        np.testing.assert_allclose(sum(shares[c] for c in COLOURS), shapes, atol=0.02)
        np.testing.assert_allclose(sum(shares[o] for o in data.ORDER), shapes, atol=0.02)


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> text.Captions:
    """Tokenizers of all words."""
    return text.Captions(tmp_path_factory.mktemp("tokenizers"))


def test_training_sees_the_token_ids_that_inference_makes(tmp_path, trained_on):
    captions = text.Captions(tmp_path)
    clip, t5 = open_clip_tokenizer(tmp_path / "tokenizer"), open_t5_tokenizer(tmp_path / "tokenizer_3")
    vocabulary = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    for word in scenes.all_words():
        assert len(clip.tokenize(word, 16).ids[1:-1]) == 14
        assert clip.tokenize(word, 16).ids[2] == clip.end == max(vocabulary.values())
        if word not in ".,":
            assert len(t5.tokenize(word, 0).ids) == 2
    for scene in trained_on[:400]:
        ids = captions.ids([scene.caption])
        assert ids["l"][0].tolist() == clip.tokenize(scene.caption, text.POSITIONS).ids
        assert ids["g"][0].tolist() == clip.tokenize(scene.caption, text.POSITIONS, 0).ids
        assert ids["t5"][0].tolist() == t5.tokenize(scene.caption, text.POSITIONS).ids
        assert len(t5.tokenize(scene.caption, 0).ids) == len(scene.words) + 1  # `facts` rely on a token per word
    again = tmp_path / "again"
    text.Captions(again)
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_3/tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_batch_has_one_text_length_and_lengths_are_as_frequent_as_in_the_set(captions, trained_on):
    rows = text.TextRows(captions, [s.caption for s in trained_on])
    batches = text.Batches(rows.lengths, [s.kind for s in trained_on], {"relation": 2.0})
    drawn = [batches.draw(8, flow.draws(0, step)) for step in range(600)]
    assert all((rows.lengths[picked] == length).all() for length, picked in drawn)
    short = np.mean([length == text.POSITIONS for length, _ in drawn])
    assert short == pytest.approx((rows.lengths == text.POSITIONS).float().mean().item(), abs=0.04)
    relation = np.mean([trained_on[i].kind == "relation" for _, picked in drawn for i in picked])
    assert relation == pytest.approx(0.6 / 1.3, abs=0.04)


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
            (seen,) = scorer.read_picture(np.asarray(drawn))
            assert (seen.colour, seen.shape) == (colour, shape)
            assert abs(seen.x - thing.x / 96) < 0.05
            assert abs(seen.y - thing.y / 96) < 0.05


def test_settings_of_the_scorer():
    """The same rule of weights as everywhere; weights may hold colons."""
    assert score.residual_of("off") == ResidualConfig()
    assert score.residual_of("0:3,5:each:0.1") == ResidualConfig(0, (3, 5), (0.1, 0.1))
    assert score.residual_of("anchored:1:3-5:linear:0.3:0.1") == ResidualConfig(
        1, (3, 4, 5), (0.3, 0.2, 0.1), "anchored"
    )
    assert score.residual_of("0:3,5,7:0.8,0.6,0.4").weights == (0.8, 0.6, 0.4)
    with pytest.raises(Mistake, match=r"weights: 1 given for 2 target layers; give one each, each:0\.1 for all"):
        score.residual_of("0:3,5:0.1")
    for setting in ("add", "0:3", "add:0:3", ""):
        with pytest.raises(Mistake, match=r"must be off or \[MODE:\]ORIGIN:TARGETS:WEIGHTS"):
            score.residual_of(setting)
    assert all(score.residual_of(setting).targets for setting in score.RESIDUAL_SETTINGS[1:])


def test_the_scorer_refuses_what_is_wrong():
    circle = scorer.Seen("circle", "red", 0.2, 0.5)
    square = scorer.Seen("square", "blue", 0.8, 0.5)
    wanted = (("red", "circle"), ("blue", "square"))

    def said(kind, seen, count=1, relation="", wanted=wanted):
        return scorer.score(shape_prompts.Prompt("", kind, wanted, count, relation), seen)

    assert said("position", [circle, square], relation="left of")
    assert not said("position", [circle, square], relation="right of")
    assert not said("position", [circle, square], relation="above")
    assert not said("position", [circle], relation="left of")
    assert not said("position", [circle, square, square], relation="left of")
    assert said("counting", [circle, circle], count=2, wanted=wanted[:1])
    assert not said("counting", [circle, circle, square], count=2, wanted=wanted[:1])
    assert not said("counting", [circle, circle, replace(circle, shape="")], count=2, wanted=wanted[:1])
    assert not said("counting", [circle] * 3, count=2, wanted=wanted[:1])
    assert not said("single object", [circle, circle], wanted=wanted[:1])
    assert said("colours", [circle], wanted=wanted[:1])
    assert not said("colours", [circle], wanted=(("blue", "circle"),))
    swapped = [scorer.Seen("circle", "blue", 0.2, 0.5), scorer.Seen("square", "red", 0.8, 0.5)]
    assert said("two objects", swapped)
    assert not said("two objects", [*swapped, circle])
    assert not said("colour attribution", swapped)
    assert said("colour attribution", [square, circle])
    assert scorer.read_picture(np.full((96, 96, 3), 128, np.uint8)) == []


def test_the_bootstrap_interval_holds_the_mean():
    low, high = scorer.interval([True] * 30 + [False] * 10)
    assert 0.55 < low < 0.75 < high < 0.92


def test_tables_show_how_far_equal_values_reach():
    """All right of 40 is no certainty, and equal differences have no interval."""
    prompts = [shape_prompts.Prompt("", "counting")] * 40
    results = {"off": [True] * 40, "same": [True] * 40, "none": [False] * 40, "half": [True, False] * 20}
    assert score.table(results, prompts).splitlines()[-1] == (
        "| counting | 1.00 (0.91 to 1.00) | 1.00 (0.91 to 1.00) | 0.00 (0.00 to 0.09) | 0.50 (0.35 to 0.65) |"
    )
    rows = score.paired(results, prompts).splitlines()[2:]
    assert rows[:2] == ["| same | +0.00 |", "| none | -1.00 |"]
    assert rows[2].startswith("| half | -0.50 (-0.6")


def test_the_shipped_model_draws_what_it_is_asked_for():
    """A small part of the score that the README reports, so that broken weights or a broken path are noticed."""
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.tell.quiet = True
    prompts = [p for p in shape_prompts.held_out_prompts() if p.kind in ("single object", "colours")][::8]
    pictures = score.sample(engine, prompts, "off", seed=50, batch=10)
    hits = [scorer.score(p, scorer.read_picture(picture)) for p, picture in zip(prompts, pictures, strict=True)]
    assert np.mean(hits) >= 0.6


def test_the_score_of_what_ships_is_in_the_repository():
    """New weights need `python -m demo.record`, which refuses worse ones."""
    recorded = json.loads(score.RECORD.read_text(encoding="utf-8"))
    assert recorded["sha256"] == file_sha256(DEMO)
    assert set(recorded["right"]) == {*shape_prompts.KINDS, *shape_prompts.SCENE_KINDS}
    assert all(0 <= right <= count == 40 for right, count in recorded["right"].values())


def test_worse_weights_are_refused(tmp_path, monkeypatch):
    assert score.worse({"a": [36, 40], "b": [40, 40]}, {"a": [38, 40], "b": [40, 40]}) == []
    assert score.worse({"a": [20, 40], "b": [40, 40]}, {"a": [38, 40], "b": [40, 40]}) == ["a"]
    assert score.worse({"b": [40, 40]}, {"a": [38, 40], "b": [40, 40]}) == ["a"]
    low, high = score.wilson(40, 40)
    assert (low, high) == pytest.approx((0.912, 1.0), abs=1e-3)
    path = tmp_path / "score.json"
    best = {kind: [40, 40] for kind in (*shape_prompts.KINDS, *shape_prompts.SCENE_KINDS)}
    path.write_text(json.dumps({"sha256": "", "right": {}, "best": best}))
    monkeypatch.setattr(score, "RECORD", path)
    monkeypatch.setattr(
        score, "sample", lambda engine, prompts, *_, **__: [np.zeros((96, 96, 3), np.uint8)] * len(prompts)
    )
    with pytest.raises(Mistake, match="is worse than earlier weights in single object, two objects"):
        score.record(str(DEMO))
    assert json.loads(path.read_text())["best"] == best
    path.unlink()
    score.record(str(DEMO))
    assert json.loads(path.read_text())["right"] == {kind: [0, 40] for kind in best}


def test_the_first_command_of_the_readme_is_counted(capsys):
    flags = readme.first_command()
    assert flags["prompt"].startswith("a ")
    assert any(name.startswith("residual_") for name in flags)
    readme.main(seeds=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("without residual flags: ")


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
    engine.tell.quiet = True
    rng = random.Random(8)
    for _ in range(4):
        picture = scenes.render(sample_scene(rng))
        again = np.asarray(engine.vae_decode(engine.vae_encode(Image.fromarray(picture), 1)))
        assert np.square((picture.astype(float) - again) / 127.5).mean() < 0.006


# ---- training ------------------------------------------------------------------------------------


def stage(*arguments, **options) -> str:
    """Runs a command of `demo.train`; returns what it prints."""
    command = [sys.executable, "-m", "demo.train", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


TINY = ("--fresh", "--batch", 2, "--width", 64, "--depth", 2, "--compile=False", "--threads", 1, "--save_every", 0)


def tiny_work(folder) -> None:
    """A work folder with a small set (of noise instead of latents) and untrained text encoders."""
    rng = random.Random(1)
    drawn = [training_scene(rng) for _ in range(200)]
    classes = torch.from_numpy(np.stack([data.what_is_where(s) for s in drawn]))
    latents = torch.randn(200, 16, 12, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    data.save(data.set_path(folder, 0), data.text_set(drawn) | {"latents": latents, "classes": classes})
    model = flow.Flow(text.Captions(folder / "tokenizers"), 64, 2)
    data.save(folder / "text.pt", {k: v for k, v in model.state_dict().items() if k.startswith(("clip_", "t5"))})


def logged(folder) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if k != "minutes"} for line in lines]


def test_killed_at_any_moment_training_goes_on_with_the_same_losses(tmp_path):
    for name in ("whole", "killed"):
        torch.manual_seed(0)
        tiny_work(tmp_path / name)
    stage("flow", "--work", tmp_path / "whole", *TINY, "--steps", 100)
    command = [sys.executable, "-m", "demo.train", "flow", "--work", tmp_path / "killed", *TINY, "--steps", 100]
    for lines in (1, 2):
        run = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(lines):
            run.stdout.readline()
        time.sleep(0.1)  # somewhere between two lines, or in the middle of saving
        run.kill()
        run.wait()
        run.stdout.close()
    assert 25 <= data.load(tmp_path / "killed" / "flow.pt")["step"] < 100
    stage(*command[3:])
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "whole")] == [25, 50, 75, 100]
    states = [data.load(tmp_path / name / "flow.pt") for name in ("whole", "killed")]
    for part in ("model", *flow.AVERAGES):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def test_a_half_written_line_of_the_log_and_lines_after_the_state_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 25, "loss": 1}\n{"step": 50, "loss": 2}\n{"step": 75, "lo')
    log = flow.Log(path, 25)
    log.write({"step": 50, "loss": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 25, "loss": 1},
        {"step": 50, "loss": 3},
    ]


def test_the_history_keeps_scores_and_a_line_every_hundred_steps(tmp_path):
    lines = [{"step": step, "loss": 0.5} for step in range(25, 225, 25)] + [{"step": 150, "score": {"position": 1.0}}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2')
    flow.write_history(tmp_path / "log.jsonl", tmp_path / "history.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert kept == [{"step": 100, "loss": 0.5}, {"step": 200, "loss": 0.5}, {"step": 150, "score": {"position": 1.0}}]


def test_a_set_added_while_training_is_taken_in(tmp_path):
    tiny_work(tmp_path)
    tiny = {"batch": 2, "width": 64, "depth": 2, "compile": False, "fresh": True, "save_every": 0.0}
    train.flow(str(tmp_path), steps=25, **tiny)
    (tmp_path / "set-001.pt").write_bytes((tmp_path / "set-000.pt").read_bytes())
    train.flow(str(tmp_path), steps=75, **tiny)
    assert [line["scenes"] for line in logged(tmp_path)] == [200, 200, 400]


def random_state(captions, width: int = 64, depth: int = 3) -> dict:
    """The state of a model in which nothing is zero."""
    run = flow.Training(captions, None, width, depth, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    for average in run.averages.values():
        average.values = {k: v.detach() + 0.01 for k, v in run.model.named_parameters()}
    return run.state() | {"step": 50, "spent": 90.0}


@torch.no_grad()
def outputs(state: dict, captions, weights: str = "model"):
    """Velocity and what the head reads off, for two captions."""
    model = flow.Flow(captions, state["width"], state["depth"], state["read_after"])
    model.load_state_dict(state["model"] | state[weights])
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(3))
    context, pooled = model.text(captions.ids(["a red circle above a blue star", "two small pink circles"]))
    v = model.mmdit(x, torch.tensor([900.0, 300.0]), pooled, context)
    return v, model.where(model.middle)


def test_growing_a_state_changes_nothing_it_computes(captions):
    state = random_state(captions)
    deeper = flow.grown(state, 7, captions)
    assert deeper["depth"] == 7
    assert deeper["fresh_from"] == 50
    for weights in ("model", *flow.AVERAGES):
        for before, after in zip(outputs(state, captions, weights), outputs(deeper, captions, weights), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    run = flow.Training(captions, deeper, 0, 0, seed=1)
    assert run.model.mmdit.config.depth == 7
    with pytest.raises(Mistake, match="already has 3 blocks"):
        flow.grown(state, 2, captions)


def test_growing_by_copies_shares_the_gates(captions):
    state = random_state(captions)
    deeper = flow.grown(state, 7, captions, copy=True)
    stem, gates = "mmdit.joint_blocks.", "x_block.adaLN_modulation.1.weight"
    for old, copies in ((0, (0, 1, 2)), (1, (3, 4, 5)), (2, (6,))):
        parts = state["model"][f"{stem}{old}.{gates}"].chunk(6)
        for new in copies:
            for i, part in enumerate(deeper["model"][f"{stem}{new}.{gates}"].chunk(6)):
                torch.testing.assert_close(part, parts[i] / (len(copies) if i in (2, 5) else 1))
            name = "x_block.mlp.fc1.weight"
            assert torch.equal(deeper["average"][f"{stem}{new}.{name}"], state["average"][f"{stem}{old}.{name}"])
    run = flow.Training(captions, deeper, 0, 0, seed=1)
    assert run.model.mmdit.config.depth == 7


def test_pruning_undoes_growing(captions):
    state = random_state(captions)
    back = flow.pruned(flow.grown(state, 7, captions), [0, 3, 6])
    assert (back["depth"], back["read_after"]) == (state["depth"], state["read_after"])
    for part in ("model", "average"):
        assert back[part].keys() >= state[part].keys()
        assert all(torch.equal(back[part][name], value) for name, value in state[part].items())
    with pytest.raises(Mistake, match="must be ascending and end with the last block, 2"):
        flow.pruned(state, [0, 1])


def test_a_fresh_checkout_goes_on_from_the_unfinished_weights(captions, tmp_path):
    state = random_state(captions)
    flow.write_resume(state, tmp_path / "resume.safetensors")
    again = flow.newest(tmp_path, tmp_path / "resume.safetensors")
    assert (again["step"], again["spent"], again["fresh_from"]) == (50, 90.0, 50)
    run = flow.Training(captions, again, 0, 0, seed=1)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.detach(), state["average"].get(name, p.detach()), rtol=0.01, atol=1e-6)
    data.save(tmp_path / "flow.pt", state | {"step": 75})
    assert flow.newest(tmp_path, tmp_path / "resume.safetensors")["step"] == 75
    data.save(tmp_path / "flow.pt", state | {"step": 25})
    assert flow.newest(tmp_path, tmp_path / "resume.safetensors")["step"] == 50
    assert flow.newest(tmp_path, tmp_path / "none.safetensors")["step"] == 25


@pytest.mark.slow
def test_text_alone_teaches_t5_which_side_an_object_is_on(captions):
    """It takes T5's own initialisation: with Xavier the head stays at one in two."""
    rng = random.Random(7)
    drawn = [training_scene(rng, "relation", short=True, sized=False) for _ in range(4000)]
    others = tuple(sorted(HELD_OUT))
    unseen = [training_scene(rng, "relation", others, short=True, sized=False) for _ in range(200)]
    torch.manual_seed(0)
    model = flow.Flow(captions, 64, 1)
    for _ in flow.train_text(model, captions, data.text_set(drawn), steps=100, batch=64):
        pass
    accuracies = flow.read_text(model, captions, data.text_set(unseen))
    assert accuracies["t5 sides"] > 0.95
    assert accuracies["clip sides"] > 0.95  # of the object named last


def test_captions_of_every_kind():
    for kind in ("single", "pair", "count", "relation", "three", "relations"):
        made = captions_of(4, "held_out", seed=2, kind=kind)
        assert len({c["prompt"] for c in made}) == 4
        assert all(read_caption(c["prompt"]) for c in made)
    with pytest.raises(ValueError, match=r"--kind circle: must be single, pair, count, relation, three or relations"):
        captions_of(4, kind="circle")


def test_the_rate_warms_up_stays_and_falls_where_told():
    assert flow.rate(0, 0, None, None) == 1 / flow.WARMUP
    assert flow.rate(5000, 0, None, None) == 1
    assert flow.rate(5000, 5000, None, None) == 1 / flow.WARMUP
    assert flow.rate(5000, 0, 4000, 6000) == pytest.approx(0.51)
    assert flow.rate(7000, 0, 4000, 6000) == 0.02


@pytest.mark.parametrize(
    "module", ["demo.score", "demo.record", "demo.readme", "demo.train", "demo.captions", "demo.curve"]
)
def test_help_is_printed_also_to_a_reader_that_stops(module):
    command = f"{sys.executable} -m {module} --help"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert module in done.stdout
    done = subprocess.run(f"{command} | true", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["grow"], "has no state to grow"),
        (["prune", "--keep", "0,1"], "has no state to prune"),
        (["all", "--steps", "5"], "--steps 5: is set by all for each stage; to choose it, run the stages one by one"),
    ],
)
def test_mistakes_of_the_training_are_one_line(tmp_path, words, told):
    command = [
        sys.executable,
        "-m",
        "demo.train",
        *words,
        "--work",
        str(tmp_path),
        "--fresh" if words[0] == "grow" else "",
    ]
    done = subprocess.run([w for w in command if w], cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("error: --")
    assert told in line


def test_all_runs_the_stages_in_order_and_never_exports_half_trained_weights(tmp_path, monkeypatch):
    """The stages themselves are tested above; here they only leave a state."""
    ran, states = [], [None]

    def flow_stage(work, steps, depth, decay_from, decay_to, fresh, minutes, more=None, **values):
        ran.append(("flow", steps, depth, decay_from, decay_to, values))
        states.append({"step": steps if minutes > 1 else states[-1]["step"] + 5 if states[-1] else 5, "depth": depth})

    def grow_stage(work, depth, fresh, copy):
        ran.append(("grow", depth, copy))
        states.append(states[-1] | {"depth": depth})

    monkeypatch.setattr(train, "RESUME", tmp_path / "none")
    monkeypatch.setattr(train, "newest", lambda *_: states[-1])
    monkeypatch.setattr(train, "flow", flow_stage)
    monkeypatch.setattr(train, "grow", grow_stage)
    stages = ({"depth": 2, "decay_from": 15, "steps": 20}, {"depth": 4, "decay_from": 25, "steps": 30, "more": {}})
    monkeypatch.setattr(train, "FLOW_STAGES", stages)
    for name in ("vae", "encode", "export"):
        monkeypatch.setattr(train, name, lambda *_, name=name, **__: ran.append(name))
    train.all("w", batch=4)
    first = ("flow", 20, 2, 15, 20, {"batch": 4})
    second = [("grow", 4, True), ("flow", 30, 4, 25, 30, {"batch": 4})]
    assert ran == ["vae", "encode", first, *second, "export"]

    for begun, done, rest in (
        (None, "5", [first]),
        ({"step": 20, "depth": 2}, "25", second),
        ({"step": 23, "depth": 4}, "28", second[1:]),
    ):
        ran.clear()
        states[:] = [begun]
        with pytest.raises(SystemExit, match=f"stopped after {done} of 30 steps"):
            train.all("w", batch=4, minutes=1)
        assert ran == ["vae", "encode", *rest]  # and no export
    with pytest.raises(Mistake, match="steps 4: is set by all for each stage"):
        train.all("w", steps=4)


@pytest.mark.slow
def test_training_runs_saves_resumes_and_exports(tmp_path):
    """Every stage for a moment, the flow stage twice: the second run goes on where the first stopped."""
    stage("vae", "--work", tmp_path, "--steps", 4)
    stage("encode", "--work", tmp_path, "--scenes", 128, "--sets", 1)
    stage("text", "--work", tmp_path, "--steps", 2, "--scenes", 300)
    first = ["flow", "--work", tmp_path, "--batch", 4, "--compile=False", "--fresh"]
    stage(*first, "--steps", 3)
    stage(*first, "--steps", 5)
    assert data.load(tmp_path / "flow.pt")["step"] == 5
    stage("grow", "--work", tmp_path, "--depth", 10)
    stage("export", "--work", tmp_path, "--out", tmp_path / "out")
    engine = SD3Inferencer().load(str(tmp_path / "out" / "demo.safetensors"), device="cpu")
    engine.tell.quiet = True
    assert engine.engine.defaults["width"] == scenes.SIZE
    assert engine.engine.config.depth == 10
    ((_, _, image),) = engine.engine.make(
        plan_pictures(engine.engine, ["a red circle"], [1], **engine.engine.defaults | {"steps": 1}).pictures
    )
    assert image.size == (96, 96)
