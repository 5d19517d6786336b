"""Captioned scenes of coloured shapes: what the small model that ships is trained and scored on.

A picture is 96 x 96, split into 3 x 3 cells of 32 pixels; an object sits near the middle of a cell, so objects
never touch. Eight shape-colour combinations (`HELD_OUT`) never occur in training; scoring uses only those.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # pixels along one side
CELLS = 3  # cells along one side
CELL = SIZE // CELLS
OVERSAMPLE = 3  # drawn this many times larger, then averaged down

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
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y) of first - second

# One combination per colour, two per shape: (colour, shape) pairs that training never sees.
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
    """One drawn object: its centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption, the objects it speaks of (in its order) and the background's name."""

    caption: str
    kind: str  # single, pair, count or relation
    things: tuple[Thing, ...]
    background: str
    relation: str = ""


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a square, triangle or star around (0, 0), scaled so that all shapes look about as large."""
    r = thing.radius
    if thing.shape == "square":
        h = 0.88 * r
        return [(-h, -h), (h, -h), (h, h), (-h, h)]
    if thing.shape == "triangle":
        big = 1.12 * r
        return [(0, -0.75 * big), (0.866 * big, 0.75 * big), (-0.866 * big, 0.75 * big)]
    corners = []
    for i in range(10):  # star: five points, outer and inner corners in turn
        radius, angle = (1.12 * r if i % 2 == 0 else 0.46 * r), math.pi * (i / 5 - 0.5)
        corners.append((radius * math.cos(angle), radius * math.sin(angle) + 0.08 * r))
    return corners


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture of a scene: uint8 (size, size, 3)."""
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
    """`a red`, `an orange`."""
    return f"{'an' if colour[0] in 'aeio' else 'a'} {colour}"


def place(combination: Combination, cell: Cell, radius: float, rng: random.Random) -> Thing:
    """An object near the middle of a cell."""
    jitter = 1.5  # pixels
    x, y = (CELL * (c + 0.5) + rng.uniform(-jitter, jitter) for c in cell)
    return Thing(*combination, x=x, y=y, radius=radius)


_LINES = [[(c, r) for c in range(3)] for r in range(3)] + [[(c, r) for r in range(3)] for c in range(3)]
_ALL_CELLS = [(c, r) for r in range(CELLS) for c in range(CELLS)]
# Where several equal objects go: few enough layouts that a small model can learn to count.
COUNT_LAYOUTS: dict[int, list[list[Cell]]] = {
    2: [[line[i], line[j]] for line in _LINES for i, j in ((0, 1), (1, 2), (0, 2))],
    3: [*_LINES, [(0, 0), (1, 1), (2, 2)], [(0, 2), (1, 1), (2, 0)]],
    4: [[(c, r), (c + 1, r), (c, r + 1), (c + 1, r + 1)] for c in (0, 1) for r in (0, 1)]
    + [[(0, 0), (2, 0), (0, 2), (2, 2)], [(1, 0), (0, 1), (2, 1), (1, 2)]],
}


def relation_cells(relation: str, rng: random.Random) -> tuple[Cell, Cell]:
    """Cells of the first and second object, on one line, so that `relation` holds between them."""
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

    `kind` is single, pair, count or relation (None: drawn as in training). The share `background_share` of
    captions name the background. Two objects never share a colour.
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


def vocabulary() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    words = ["a", "an", "and", "on", "background", "of", "left", "right", "above", "below"]
    words += COUNTS.values()
    words += [*COLOURS, *BACKGROUNDS, *SHAPES, *(f"{s}s" for s in SHAPES)]
    return words
