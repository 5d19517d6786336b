"""Captioned scenes of coloured shapes, on which the shipped model is trained and scored.

An image is 96 x 96 pixels, split into 3 x 3 cells of 32 pixels. Each object is near the middle of a cell, so objects
never touch. Eight shape-colour combinations (`HELD_OUT`) never occur in training; scoring uses only those.

`sample_scene` samples the four kinds that the first shipped model was trained on. `training_scene` samples these and
more: sizes, up to three objects with two relations, a second phrasing of each relation, and captions of several
sentences.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # pixels along one side
CELLS = 3  # cells along one side
CELL = SIZE // CELLS
OVERSAMPLE = 3  # images are drawn this many times larger, then averaged down
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 205, 40),
    "purple": (140, 60, 190),
    "orange": (255, 127, 14),
    "pink": (247, 150, 200),
    "cyan": (40, 200, 210),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (20, 20, 20), "gray": (128, 128, 128)}
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # sign of first - second
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PHRASINGS = {  # by relation: the usual phrasing and another one
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

# Radii by shape, in pixels. The smallest object covers 2 % of the image; the largest leaves 2 pixels to its neighbour.
NORMAL = {"circle": (11.5, 12.8), "square": (11.5, 12.8), "triangle": (13.0, 14.0), "star": (12.8, 13.3)}
SMALL = {"circle": (7.75, 8.2), "square": (7.75, 8.2), "triangle": (10.6, 10.9), "star": (10.95, 11.15)}

# (colour, shape) pairs that never occur in training: one per colour, two per shape.
HELD_OUT = frozenset(
    {
        ("red", "triangle"),
        ("green", "circle"),
        ("blue", "star"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("orange", "star"),
        ("pink", "square"),
        ("cyan", "circle"),
    }
)
ALL_COMBINATIONS = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN = tuple(c for c in ALL_COMBINATIONS if c not in HELD_OUT)
Combination = tuple[str, str]  # (colour, shape)
Cell = tuple[int, int]  # (column, row), from the top left


@dataclass(frozen=True)
class Thing:
    """One drawn object: its centre and radius in pixels; small: whether the caption calls it small."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    small: bool = False


@dataclass(frozen=True)
class Scene:
    """A caption, the objects that it names, in its order, and the name of the background.

    relations: every (index, relation, index) that the caption states; words: for each word of the caption, 1 + the
    index of the object that it belongs to, or 0. Commas and full stops count as words.
    """

    caption: str
    kind: str  # one of `KINDS`
    things: tuple[Thing, ...]
    background: str
    relation: str = ""
    relations: tuple[tuple[int, str, int], ...] = ()
    words: tuple[int, ...] = ()


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a square, triangle or star around (0, 0), scaled so that all shapes look about equally large."""
    r = thing.radius
    if thing.shape == "square":
        h = 0.88 * r
        return [(-h, -h), (h, -h), (h, h), (-h, h)]
    if thing.shape == "triangle":
        big = 1.12 * r
        return [(0, -0.75 * big), (0.866 * big, 0.75 * big), (-0.866 * big, 0.75 * big)]
    corners = []
    for i in range(10):  # star with five points: outer and inner corners alternate
        radius, angle = (1.12 * r if i % 2 == 0 else 0.46 * r), math.pi * (i / 5 - 0.5)
        corners.append((radius * math.cos(angle), radius * math.sin(angle) + 0.08 * r))
    return corners


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Renders a scene as uint8 (size, size, 3)."""
    k = OVERSAMPLE * size / SIZE
    image = Image.new("RGB", (OVERSAMPLE * size, OVERSAMPLE * size), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = COLOURS[thing.colour]
        if thing.shape == "circle":
            r = thing.radius
            box = [k * (thing.x - r), k * (thing.y - r), k * (thing.x + r), k * (thing.y + r)]
            draw.ellipse(box, fill=fill)
        else:
            draw.polygon([(k * (thing.x + x), k * (thing.y + y)) for x, y in _outline(thing)], fill=fill)
    return np.asarray(image.reduce(OVERSAMPLE))


def article(colour: str) -> str:
    """The colour with its article: `a red`, `an orange`."""
    return f"{'an' if colour[0] in 'aeio' else 'a'} {colour}"


def place(
    combination: Combination,
    cell: Cell,
    radius: float,
    rng: random.Random,
    jitter: float = 1.5,
    small: bool = False,
) -> Thing:
    """Places an object near the middle of a cell, at most `jitter` pixels off along each axis."""
    x, y = (CELL * (c + 0.5) + rng.uniform(-jitter, jitter) for c in cell)
    return Thing(*combination, x=x, y=y, radius=radius, small=small)


_LINES = [[(c, r) for c in range(3)] for r in range(3)] + [[(c, r) for r in range(3)] for c in range(3)]
_ALL_CELLS = [(c, r) for r in range(CELLS) for c in range(CELLS)]

# Cells of several equal objects, by their number. There are few layouts, so that a small model can learn to count.
COUNT_LAYOUTS: dict[int, list[list[Cell]]] = {
    2: [[line[i], line[j]] for line in _LINES for i, j in ((0, 1), (1, 2), (0, 2))],
    3: [*_LINES, [(0, 0), (1, 1), (2, 2)], [(0, 2), (1, 1), (2, 0)]],
    4: [[(c, r), (c + 1, r), (c, r + 1), (c + 1, r + 1)] for c in (0, 1) for r in (0, 1)]
    + [[(0, 0), (2, 0), (0, 2), (2, 2)], [(1, 0), (0, 1), (2, 1), (1, 2)]],
}


def relation_cells(relation: str, rng: random.Random) -> tuple[Cell, Cell]:
    """Cells of the first and second object, in one row or column, so that `relation` holds between them."""
    dx, dy = RELATIONS[relation]
    low, high = rng.choice([(0, 1), (1, 2), (0, 2)])
    across = rng.randrange(CELLS)
    first, second = (low, high) if dx + dy < 0 else (high, low)
    return ((first, across), (second, across)) if dx else ((across, first), (across, second))


def sample_scene(
    rng: random.Random,
    kind: str | None = None,
    combinations: tuple[Combination, ...] = SEEN,
    background_share: float = 0.6,
) -> Scene:
    """A random scene and its caption.

    kind: single, pair, count or relation (None: random, as in training); background_share: share of captions that name
    the background. Two objects never have the same colour.
    """
    kind = kind or rng.choices(("single", "pair", "count", "relation"), (20, 20, 27, 33))[0]
    background = rng.choice(tuple(BACKGROUNDS))
    radius = rng.uniform(11.0, 12.5)
    relation = ""
    if kind in ("single", "count"):
        colour, shape = rng.choice(combinations)
        if kind == "single":
            cells, caption = [rng.choice(_ALL_CELLS)], f"{article(colour)} {shape}"
        else:
            count = rng.choice(tuple(COUNTS))
            cells, caption = rng.choice(COUNT_LAYOUTS[count]), f"{COUNTS[count]} {colour} {shape}s"
        things = [place((colour, shape), cell, radius, rng) for cell in cells]
    else:
        first = rng.choice(combinations)
        second = rng.choice([c for c in combinations if c[0] != first[0]])
        if kind == "pair":
            cells, joint = rng.sample(_ALL_CELLS, 2), "and"
        else:
            relation = joint = rng.choice(tuple(RELATIONS))
            cells = relation_cells(relation, rng)
        things = [place(c, cell, radius, rng) for c, cell in zip((first, second), cells, strict=True)]
        caption = f"{article(first[0])} {first[1]} {joint} {article(second[0])} {second[1]}"
    if rng.random() < background_share:
        caption += f" on a {background} background"
    return Scene(caption, kind, tuple(things), background, relation)


KINDS = {"single": 10, "pair": 16, "count": 26, "relation": 30, "three": 5, "relations": 13}  # shares in percent
LONGEST = 40  # most T5 tokens of a caption, end token included
SHORT_SHARE = 0.82  # share of captions in the short form
SIZED_SHARE = 0.3  # share of scenes whose captions name sizes
OTHER_PHRASING = 0.35  # share of relations in the second phrasing
GAP = 2.5  # least distance in pixels between objects in neighbouring cells
Word = tuple[str, int]  # a word, and 1 + the index of the object it belongs to (0: none)


@lru_cache
def relations_cells(first: str, second: str) -> tuple[tuple[Cell, Cell, Cell], ...]:
    """All cells of three objects for which `first` holds between objects 1 and 2, and `second` between 1 and 3."""

    def others(cell: Cell, relation: str) -> list[Cell]:
        dx, dy = RELATIONS[relation]
        steps = [(cell[0] - n * dx, cell[1] - n * dy) for n in (1, 2)]
        return [c for c in steps if c in _ALL_CELLS]

    return tuple((a, b, c) for a in _ALL_CELLS for b in others(a, first) for c in others(a, second) if b != c)


def two_combinations(combinations: tuple[Combination, ...], rng: random.Random) -> tuple[Combination, Combination]:
    """Picks two different combinations, in random order: a quarter have equal shapes, a quarter equal colours."""
    first = rng.choice(combinations)
    how = rng.random()
    rest = [c for c in combinations if c[0] != first[0] and c[1] != first[1]]
    if how < 0.25:
        rest = [c for c in combinations if c[0] != first[0] and c[1] == first[1]] or rest
    elif how < 0.5:
        rest = [c for c in combinations if c[0] == first[0] and c[1] != first[1]] or rest
    pair = [first, rng.choice(rest)]
    rng.shuffle(pair)
    return pair[0], pair[1]


def extent(combination: Combination, radius: float) -> float:
    """Half of the longer side of an object's bounding box, in pixels."""
    if combination[1] == "circle":
        return radius
    return max(max(abs(x), abs(y)) for x, y in _outline(Thing(*combination, 0.0, 0.0, radius)))


def training_scene(
    rng: random.Random,
    kind: str | None = None,
    combinations: tuple[Combination, ...] = SEEN,
    short: bool | None = None,
    sized: bool | None = None,
) -> Scene:
    """A random scene of any kind in `KINDS` (None: by their shares) and its caption.

    short: a caption in the short form (True) or in sentences (False); sized: sizes differ and the caption names them;
    None: random. An object whose size the caption does not name has the normal size.
    """
    kind = kind or rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    sized = rng.random() < SIZED_SHARE if sized is None else sized
    short = rng.random() < SHORT_SHARE if short is None else short
    background = rng.choice(tuple(BACKGROUNDS))
    stated: tuple[tuple[int, str, int], ...] = ()
    if kind in ("single", "count"):
        named = [rng.choice(combinations)]
        cells = [rng.choice(_ALL_CELLS)] if kind == "single" else rng.choice(COUNT_LAYOUTS[rng.choice(tuple(COUNTS))])
    elif kind in ("pair", "relation"):
        named = list(two_combinations(combinations, rng))
        cells = rng.sample(_ALL_CELLS, 2)
        if kind == "relation":
            stated = ((0, rng.choice(tuple(RELATIONS)), 1),)
            cells = relation_cells(stated[0][1], rng)
    else:
        named = list(two_combinations(combinations, rng))
        named.insert(rng.randrange(3), rng.choice([c for c in combinations if c not in named]))
        cells = rng.sample(_ALL_CELLS, 3)
        if kind == "relations":
            one, other = rng.sample(tuple(RELATIONS), 2)
            stated, cells = ((0, one, 1), (0, other, 2)), rng.choice(relations_cells(one, other))
    small = [sized and rng.random() < 0.5 for _ in named]
    large = [
        not s and rng.random() < (0.5 if sized else 0.04) for s in small
    ]  # adds the word only; the size stays normal
    names = [(("small",) if s else ("large",) if b else ()) + c for c, s, b in zip(named, small, large, strict=True)]
    share, things = rng.random(), []
    for i, cell in enumerate(cells):
        own = min(i, len(named) - 1)
        low, high = (SMALL if small[own] else NORMAL)[named[own][1]]
        radius = low + share * (high - low)
        jitter = min(1.5, CELL / 2 - GAP / 2 - extent(named[own], radius))
        things.append(place(named[own], cell, radius, rng, jitter, small[own]))
    write = _short_caption if short else _long_caption
    for _ in range(100):
        words = write(kind, names, len(things), stated, background, rng)
        if len(words) < LONGEST:
            break
    else:
        raise AssertionError(f"no caption of {kind} fits in {LONGEST} tokens")
    who = tuple(w for _, w in words)
    relation = stated[0][1] if kind == "relation" else ""
    return Scene(joined(words), kind, tuple(things), background, relation, stated, who)


def joined(words: list[Word]) -> str:
    """Joins words to a caption, without a space before a comma or full stop."""
    return "".join(w if w in ".," or not i else f" {w}" for i, (w, _) in enumerate(words))


def _words(text: str, who: int = 0) -> list[Word]:
    return [(w, who) for w in text.split()]


def _noun(names: list[tuple[str, ...]], index: int) -> list[Word]:
    """`a small red circle`."""
    return _words(f"{article(names[index][0])} {' '.join(names[index][1:])}", index + 1)


def _relation_words(relation: str, rng: random.Random) -> list[Word]:
    return _words(PHRASINGS[relation][rng.random() < OTHER_PHRASING])


def _listed(names: list[tuple[str, ...]], rng: random.Random) -> list[Word]:
    """`a red circle, a blue square and a green star`."""
    out = _noun(names, 0)
    comma = len(names) > 2 and rng.random() < 0.5
    for i in range(1, len(names)):
        out += _words("," if comma and i < len(names) - 1 else "and") + _noun(names, i)
    return out


def _counted(names: list[tuple[str, ...]], count: int) -> list[Word]:
    """`three small red circles`."""
    return _words(f"{COUNTS[count]} {' '.join(names[0])}s", 1)


Stated = tuple[tuple[int, str, int], ...]


def _short_caption(
    kind: str, names: list[tuple[str, ...]], count: int, stated: Stated, background: str, rng: random.Random
) -> list[Word]:
    """The short form: `a red circle left of a blue square and above a green star on a black background`."""
    if kind == "count":
        out = _counted(names, count)
    elif stated:
        out = _noun(names, 0)
        for n, (_, relation, other) in enumerate(stated):
            out += _words("and" if n else "") + _relation_words(relation, rng) + _noun(names, other)
    else:
        out = _listed(names, rng)
    if rng.random() < 0.6:
        out += _words(f"on a {background} background")
    return out


def _long_caption(
    kind: str, names: list[tuple[str, ...]], count: int, stated: Stated, background: str, rng: random.Random
) -> list[Word]:
    """A caption of several sentences that describes everything."""
    said = ("one", *COUNTS.values())[count - 1]
    are = "there is one object ." if count == 1 else f"there are {said} objects ."
    shows, rest = _words("the picture shows"), _words("there is nothing else .")
    stop = _words(".")

    def the(index: int) -> list[Word]:
        """`the circle`, or `the red circle` if another object has the same shape."""
        *_, colour, shape = names[index]
        alike = [n for n in names if n[-1] == shape]
        return _words(f"the {shape}" if len(alike) == 1 else f"the {colour} {shape}", index + 1)

    if kind == "count":
        out = shows + _counted(names, count) + stop
        if rng.random() < 0.5:
            out = _words("there are") + _counted(names, count) + _words("in the picture .")
        out += rest if rng.random() < 0.5 else []
    elif kind == "single":
        out = shows + _noun(names, 0) + stop + (rest if rng.random() < 0.5 else [])
        if rng.random() < 0.5:
            out = _words(are) + _words("it is", 1) + _noun(names, 0) + stop
    elif not stated:
        out = (_words(are) if rng.random() < 0.5 else []) + shows + _listed(names, rng) + stop
    elif rng.random() < 0.5:
        out = (_words(are) if rng.random() < 0.7 else []) + _noun(names, 0) + _words("is")
        for n, (_, relation, other) in enumerate(stated):
            out += _words("and" if n else "") + _relation_words(relation, rng) + _noun(names, other)
        out += stop
    else:
        out = shows + _listed(names, rng) + stop
        for first, relation, other in stated:
            if rng.random() < 0.5:
                first, relation, other = other, INVERSE[relation], first
            out += the(first) + _words("is") + _relation_words(relation, rng) + the(other) + stop
    if rng.random() < 0.8:
        out += _words(f"the background is {background} .")
    return out


def vocabulary() -> list[str]:
    """All words of the captions of `sample_scene`, in a fixed order."""
    words = ["a", "an", "and", "on", "background", "of", "left", "right", "above", "below"]
    words += COUNTS.values()
    words += [*COLOURS, *BACKGROUNDS, *SHAPES, *(f"{s}s" for s in SHAPES)]
    return words


def all_words() -> list[str]:
    """All words of the captions of `training_scene`. Token ids follow this order, so new words go at the end."""
    more = "small large to the over under there is are it in picture shows one object objects nothing else . ,"
    return vocabulary() + more.split()
