"""Scored prompts of coloured shapes, in the six kinds of GenEval."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np

from sd3.mistakes import Mistake, verbatim
from sd3.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_LAYOUTS,
    COUNTS,
    HELD_OUT,
    PHRASINGS,
    RELATIONS,
    SHAPES,
    Combination,
    Scene,
    Thing,
    article,
    place,
    relation_cells,
    render,
    training_scene,
)

KINDS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
SCENE_KINDS = ("two relations", "three objects", "sizes", "sentences")  # of `scene_prompts`


@dataclass(frozen=True)
class Prompt:
    """A scored prompt: its text, its kind, and what the image has to show.

    scene: for the kinds in `SCENE_KINDS`, everything that the text says; then wanted, count and relation do not count.
    """

    text: str
    kind: str
    wanted: tuple[Combination, ...] = ()
    count: int = 1
    relation: str = ""
    scene: Scene | None = None


def held_out_prompts(per_kind: int = 40, seed: int = 7) -> list[Prompt]:
    """`per_kind` prompts of each kind, from shape-colour combinations (and so pairs) that never occur in training."""
    rng = random.Random(seed)
    out = []
    for kind in KINDS:
        texts: set[str] = set()
        tries = 0
        while len(texts) < per_kind and tries < 100 * per_kind:
            tries += 1
            prompt = _held_out(kind, rng)
            if prompt.text not in texts or tries > 50 * per_kind:
                texts.add(prompt.text if prompt.text not in texts else f"{prompt.text}#{tries}")
                out.append(prompt)
    return out


def scene_prompts(per_kind: int = 40, seed: int = 7) -> list[Prompt]:
    """`per_kind` prompts of each kind in `SCENE_KINDS`, from the combinations of `held_out_prompts`: three objects with
    two relations or with none, up to two objects with sizes, and everything in sentences.
    """
    rng = random.Random(f"scenes {seed}")
    combinations = tuple(sorted(HELD_OUT))
    kinds = {
        "two relations": ("relations",),
        "three objects": ("three",),
        "sizes": ("single", "pair", "relation"),
        "sentences": ("relation", "count", "pair", "relations"),
    }
    out = []
    for kind in SCENE_KINDS:
        own: dict[str, Prompt] = {}
        repeated = 0
        while len(own) < per_kind:
            # The next kind of scene where this one has hardly any new captions left.
            scene_kind = kinds[kind][(len(own) + repeated // 100) % len(kinds[kind])]
            scene = training_scene(rng, scene_kind, combinations, short=kind != "sentences", sized=kind == "sizes")
            known = len(own)
            if kind != "sizes" or any(thing.small for thing in scene.things):
                own[scene.caption] = Prompt(scene.caption, kind, scene=scene)
            repeated += len(own) == known
        out += own.values()
    return out


def held_out_texts(per_kind: int = 40) -> list[str]:
    """The distinct texts of `held_out_prompts`."""
    return list(dict.fromkeys(p.text for p in held_out_prompts(per_kind)))


def _held_out(kind: str, rng: random.Random) -> Prompt:
    combinations = sorted(HELD_OUT)
    background = rng.choice(["", *(f" on a {b} background" for b in BACKGROUNDS)])
    first = rng.choice(combinations)
    name = f"{article(first[0])} {first[1]}"
    if kind in ("single object", "colours"):
        return Prompt(name + background, kind, (first,))
    if kind == "counting":
        count = rng.choice(list(COUNTS))
        return Prompt(f"{COUNTS[count]} {first[0]} {first[1]}s{background}", kind, (first,), count)
    second = rng.choice([c for c in combinations if c[0] != first[0] and c[1] != first[1]])
    relation = rng.choice(list(RELATIONS)) if kind == "position" else ""
    text = f"{name} {relation or 'and'} {article(second[0])} {second[1]}{background}"
    return Prompt(text, kind, (first, second), relation=relation)


_NOUN = rf"(?:(?:small|large) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_RELATION_OF = {phrase: relation for relation, phrases in PHRASINGS.items() for phrase in phrases}
_RELATED = "|".join(_RELATION_OF)
_CAPTION_FORMS = [
    re.compile(rf"{form}(?: on an? (?:{'|'.join(BACKGROUNDS)}) background)?")
    for form in (
        rf"(?P<number>{'|'.join(COUNTS.values())}) (?P<first>{_NOUN})s",
        rf"an? (?P<first>{_NOUN})",
        rf"an? (?P<first>{_NOUN}) (?P<joint>and|{_RELATED}) an? (?P<second>{_NOUN})",
        rf"an? (?P<first>{_NOUN})(?:,| and) an? (?P<second>{_NOUN}) and an? (?P<third>{_NOUN})",
        rf"an? (?P<first>{_NOUN}) (?P<joint>{_RELATED}) an? (?P<second>{_NOUN}) "
        rf"and (?P<other_joint>{_RELATED}) an? (?P<third>{_NOUN})",
    )
]


def read_caption(text: str) -> list[Prompt]:
    """Parses a caption into prompts, one for each kind that it belongs to: one object, several of a kind, two or three
    objects, one object with relations to one or two others; with sizes or without. Captions in sentences are not read.
    Raises Mistake for any other text.
    """
    text = text.strip().lower()
    match = next(filter(None, (form.fullmatch(text) for form in _CAPTION_FORMS)), None)
    if match is None:
        why = f'"{verbatim(text)}" is not a caption of coloured shapes, such as "a red circle left of a blue square"'
        raise Mistake("score", "demo", why)
    found = match.groupdict()
    named = [found[n].split() for n in ("first", "second", "third") if found.get(n)]  # [size,] colour, shape
    count = next((n for n, word in COUNTS.items() if word == found.get("number")), 1)
    joints = [_RELATION_OF.get(found.get(n) or "", "") for n in ("joint", "other_joint")]
    wanted = tuple((words[-2], words[-1]) for words in named)
    if len(named) > 2 or any(len(words) > 2 for words in named):
        things = tuple(Thing(w[-2], w[-1], 0, 0, 0, small=w[0] == "small") for w in named) * count
        relations = tuple((0, relation, i) for i, relation in enumerate(joints, 1) if relation)
        kind = "sizes" if len(named) < 3 else "two relations" if relations else "three objects"
        return [Prompt(text, kind, scene=Scene(text, "", things, "", relations=relations))]
    if count > 1:
        return [Prompt(text, "counting", wanted, count)]
    if joints[0]:
        return [Prompt(text, "position", wanted, relation=joints[0])]
    kinds = ("single object", "colours") if len(named) == 1 else ("two objects", "colour attribution")
    return [Prompt(text, kind, wanted) for kind in kinds]


def named_background(text: str) -> str:
    """The background that a caption names; empty if it names none."""
    return next((b for b in BACKGROUNDS if re.search(rf"\b{b}\b", text)), "")


def draw(prompt: Prompt, rng: random.Random) -> np.ndarray:
    """Renders an image that shows exactly what the prompt says, as ground truth for the scorer."""
    if prompt.scene is not None:
        return render(prompt.scene)
    radius = rng.uniform(11.0, 12.5)
    if prompt.kind == "counting":
        cells = rng.choice(COUNT_LAYOUTS[prompt.count])
        wanted = prompt.wanted * prompt.count
    elif prompt.relation:
        cells, wanted = relation_cells(prompt.relation, rng), prompt.wanted
    else:
        cells = rng.sample([(c, r) for c in range(3) for r in range(3)], len(prompt.wanted))
        wanted = prompt.wanted
    background = named_background(prompt.text) or rng.choice(list(BACKGROUNDS))
    things = tuple(place(w, c, radius, rng) for w, c in zip(wanted, cells, strict=True))
    return render(Scene(prompt.text, prompt.kind, things, background))
