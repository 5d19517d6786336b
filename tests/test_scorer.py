"""The scorer of coloured shapes against a person's verdicts, and on kinds of prompts with scenes."""

import random
from dataclasses import replace

import numpy as np
import pytest

from demo import score
from sd3.mistakes import Mistake
from sd3.shapes import scenes, scorer
from sd3.shapes.prompts import SCENE_KINDS, Prompt, draw, read_caption, scene_prompts
from sd3.shapes.scenes import Scene, Thing


@pytest.fixture(scope="module")
def labelled():
    return score.labelled()


def test_the_scorer_agrees_with_a_person(labelled):
    """On the images that it was tuned on, and on those that were used once, after it was finished."""
    wrong = [scorer.score(item.prompt, item.seen()) != item.right for item in labelled]
    first, later = labelled[: score.TUNED_ON], labelled[score.TUNED_ON :]
    assert (len(first), len(later)) == (200, 100)
    assert 0.1 < np.mean([not item.right for item in first]) < 0.3  # enough of both
    assert 0.1 < np.mean([not item.right for item in later]) < 0.3
    assert sum(wrong[: score.TUNED_ON]) <= 1
    assert (sum(wrong[score.TUNED_ON :]), len(later)) == scorer.ERRORS


def test_scene_prompts_are_read_on_ground_truth_and_not_on_others():
    prompts = scene_prompts(12, seed=3)
    assert {p.kind for p in prompts} == set(SCENE_KINDS)
    seen = [scorer.read_picture(draw(p, random.Random(0))) for p in prompts]
    assert all(scorer.score(p, s) for p, s in zip(prompts, seen, strict=True))
    assert np.mean(score.shuffled(prompts, seen)) < 0.2
    for p, s in zip(prompts, seen, strict=True):
        assert not scorer.score(p, s[1:])
        assert not scorer.score(p, [*s, replace(s[0], x=0.5, y=0.5)])
        assert not scorer.score(p, [replace(s[0], shape=""), *s[1:]])


@pytest.mark.parametrize("text", ["a red circle on a black background", "the background is black. a red circle."])
def test_a_background_that_the_prompt_names_counts(text):
    things = (Thing("red", "circle", 48, 48, 12),)
    seen = {b: scorer.read_picture(scenes.render(Scene("", "", things, b))) for b in scenes.BACKGROUNDS}
    prompts = [
        Prompt(text, "single object", (("red", "circle"),)),
        Prompt(text, "sentences", scene=Scene(text, "", things, "black")),
    ]
    for prompt in prompts:
        assert {b: scorer.score(prompt, s) for b, s in seen.items()} == {"white": False, "black": True, "gray": False}
        assert all(scorer.score(replace(prompt, text="a red circle"), s) for s in seen.values())


def test_there_are_two_hundred_prompts_of_every_kind_of_scene():
    """Also of sizes, although there are only 32 captions of one small object."""
    prompts = scene_prompts(200, seed=5)
    assert len({p.text for p in prompts}) == 800
    assert all(any(t.small for t in p.scene.things) for p in prompts if p.kind == "sizes")


@pytest.mark.parametrize("relation", scenes.RELATIONS)
def test_a_diagonal_is_no_relation(relation):
    dx, dy = scenes.RELATIONS[relation]
    second = scorer.Seen("square", "blue", 0.5, 0.5)
    assert scorer.holds(relation, scorer.Seen("circle", "red", 0.5 + 0.33 * dx, 0.5 + 0.33 * dy), second)
    assert not scorer.holds(
        relation, scorer.Seen("circle", "red", 0.5 + 0.33 * (dx or 1), 0.5 + 0.33 * (dy or 1)), second
    )
    assert not scorer.holds(relation, scorer.Seen("circle", "red", 0.5 - 0.33 * dx, 0.5 - 0.33 * dy), second)


def test_sizes_count_where_the_caption_names_them():
    def seen(radius: float) -> list[scorer.Seen]:
        return scorer.read_picture(scenes.render(Scene("", "", (Thing("red", "circle", 48, 48, radius),), "white")))

    small = Scene("a small red circle", "single", (Thing("red", "circle", 48, 48, 8, small=True),), "white")
    large = Scene("a large red circle", "single", (Thing("red", "circle", 48, 48, 12),), "white")
    plain = replace(large, caption="a red circle")
    verdicts = [[scorer.shown(scene, seen(radius)) for radius in (8, 12)] for scene in (small, large, plain)]
    assert verdicts == [[True, False], [False, True], [True, True]]


def test_captions_are_read_back():
    """Every caption in the short form, with what it says."""
    rng = random.Random(8)
    for _ in range(400):
        scene = scenes.training_scene(rng, short=True)
        for prompt in read_caption(scene.caption):
            assert prompt.text == scene.caption
            if prompt.scene is not None:
                wanted = [(t.colour, t.shape, t.small) for t in scene.things]
                assert [(t.colour, t.shape, t.small) for t in prompt.scene.things] == wanted
                assert prompt.scene.relations == scene.relations
            else:
                assert prompt.relation == scene.relation
                assert prompt.wanted == tuple(dict.fromkeys((t.colour, t.shape) for t in scene.things))
                assert prompt.count == (len(scene.things) if scene.kind == "count" else 1)
            assert scorer.score(prompt, scorer.read_picture(scenes.render(scene)))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a red circle", ["single object", "colours"]),
        ("A red circle to the left of a blue square", ["position"]),
        ("a large red circle on a gray background", ["sizes"]),
        ("three small red circles", ["sizes"]),
        ("a red circle, a blue square and a green star", ["three objects"]),
        ("a red circle above a blue square and left of a small green star", ["two relations"]),
    ],
)
def test_kinds_of_captions(text, kinds):
    assert [p.kind for p in read_caption(text)] == kinds


@pytest.mark.parametrize(
    "text", ["a cat", "red circle", "a red circle and", "five red circles", "a red circle, a star"]
)
def test_other_texts_are_no_captions(text):
    with pytest.raises(Mistake, match="is not a caption of coloured shapes"):
        read_caption(text)


def test_two_equal_objects():
    left, right = (scorer.Seen("circle", "red", x, 0.5) for x in (0.2, 0.8))
    both = (("red", "circle"), ("red", "circle"))
    assert scorer.score(Prompt("", "position", both, relation="left of"), [right, left])
    assert not scorer.score(Prompt("", "position", both, relation="above"), [right, left])
    assert scorer.score(Prompt("", "colour attribution", both), [left, right])
    assert not scorer.score(Prompt("", "colour attribution", both), [left, replace(right, colour="blue")])
    things = tuple(Thing("red", "circle", 0, 0, 0) for _ in range(2))
    assert scorer.shown(Scene("", "", things, "", relations=((0, "right of", 1),)), [left, right])
    assert not scorer.shown(Scene("", "", things, "", relations=((0, "above", 1),)), [left, right])


def test_large_images_are_read_like_small_ones():
    scene = Scene("", "", (Thing("red", "star", 30, 40, 13), Thing("blue", "square", 70, 60, 12)), "gray")
    small, large = (scorer.read_picture(scenes.render(scene, side)) for side in (96, 960))
    assert [(s.colour, s.shape) for s in large] == [(s.colour, s.shape) for s in small]
    assert len(large) == 2
    for a, b in zip(small, large, strict=True):
        assert (a.x, a.y, a.area) == pytest.approx((b.x, b.y, b.area), abs=0.01)
