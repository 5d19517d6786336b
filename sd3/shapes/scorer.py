"""Detects coloured shapes in images and scores the images against their prompts.

`tests/test_scorer.py` compares its verdicts with a person's on 300 generated images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from sd3.shapes.prompts import Prompt, named_background
from sd3.shapes.scenes import BACKGROUNDS, COLOURS, NORMAL, RELATIONS, SHAPES, SIZE, SMALL, Scene, Thing, render

LEAST_AREA = 0.008  # share of the image; smaller pieces are ignored (the smallest drawn object covers 0.016)
# An object has no shape if its overlap with the best shape is below this. Circles overlap with blobs most.
LEAST_FIT = {"circle": 0.87, "square": 0.79, "triangle": 0.79, "star": 0.79}
LEAST_LEAD = 0.05  # ... or if the best shape overlaps with it by no more than this beyond the second best
MOST_SIDE = 2 * SIZE  # pixels; larger images are reduced to this
FINE = 3  # points per pixel along each axis at which a shape is drawn for comparison
MAIN_DIRECTION = 1.25  # an object is left of another if it is further left by this times what it is above or below
ERRORS = (1, 100)  # wrong verdicts, and images: those that a person labelled and that were used once, at the end


@dataclass(frozen=True)
class Seen:
    """A detected object. x, y: centre as shares of the image's width and height; shape: empty if it is like no known
    shape; area: share of the image; background: the nearest of `BACKGROUNDS`.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float = 0.0
    background: str = ""


@lru_cache
def _drawn(shape: str) -> tuple[np.ndarray, float, float]:
    """A large drawing of a shape as coverage from 0 to 1, and the row and column of its centre of mass."""
    from scipy import ndimage

    scene = Scene("", "", (Thing("red", shape, SIZE / 2, SIZE / 2, SIZE / 3),), "black")
    red, black = COLOURS["red"][0], BACKGROUNDS["black"][0]
    cover = np.clip((render(scene, 4 * SIZE)[..., 0].astype(np.float32) - black) / (red - black), 0, 1)
    return cover, *ndimage.center_of_mass(cover)


def _overlap(cover: np.ndarray, shape: str) -> float:
    """Intersection over union of `cover` (H, W), from 0 to 1, with the shape of the same area and centre."""
    from scipy import ndimage

    drawn, row, column = _drawn(shape)
    scale = np.sqrt(cover.sum() / drawn.sum())
    y, x = ndimage.center_of_mass(cover)
    height, width = cover.shape
    rows = ((np.arange(FINE * height) + 0.5) / FINE - 0.5 - y) / scale + row
    columns = ((np.arange(FINE * width) + 0.5) / FINE - 0.5 - x) / scale + column
    fine = ndimage.map_coordinates(drawn, np.meshgrid(rows, columns, indexing="ij"), order=1)
    other = fine.reshape(height, FINE, width, FINE).mean(axis=(1, 3))
    return float(np.minimum(cover, other).sum() / np.maximum(cover, other).sum())


def shape_of(cover: np.ndarray) -> str:
    """The shape that an object (H, W), its coverage of each pixel from 0 to 1, is like; empty if it is like none."""
    fits = {shape: _overlap(cover, shape) for shape in SHAPES}
    best, second = sorted(fits, key=lambda shape: fits[shape], reverse=True)[:2]
    return best if fits[best] >= LEAST_FIT[best] and fits[best] - fits[second] > LEAST_LEAD else ""


def read_picture(picture: np.ndarray) -> list[Seen]:
    """Detects the objects of an image, uint8 (H, W, 3): the connected pieces that differ from the background."""
    from scipy import ndimage  # optional: only reading images needs it

    if max(picture.shape) > MOST_SIDE:  # details that small make no difference, and cost time
        side = [max(1, round(x * MOST_SIDE / max(picture.shape))) for x in (picture.shape[1], picture.shape[0])]
        picture = np.asarray(Image.fromarray(picture).resize(side, Image.Resampling.BOX))
    pixels = picture.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)
    labels, count = ndimage.label(difference > 40)
    out = []
    for i in range(1, count + 1):
        piece = labels == i
        if piece.sum() < LEAST_AREA * piece.size:
            continue
        inside = ndimage.binary_erosion(piece, iterations=2)
        colour = np.median(pixels[inside if inside.any() else piece], axis=0)
        # An edge pixel belongs to the object if its colour is nearer to the object's than to the background's.
        solid = piece & (np.linalg.norm(pixels - colour, axis=-1) < difference)
        parts, n = ndimage.label(solid)
        sizes = ndimage.sum_labels(solid, parts, range(1, n + 1)) if n else np.zeros(0)
        for j in np.flatnonzero(sizes >= LEAST_AREA * piece.size) + 1:
            out.append(_seen(pixels, parts == j, colour, background))
    return out


def _seen(pixels: np.ndarray, mask: np.ndarray, colour: np.ndarray, background: np.ndarray) -> Seen:
    """The object that covers the pixels of `mask`."""
    from scipy import ndimage

    near = ndimage.binary_dilation(mask, iterations=2)
    ink = colour - background
    # Along the line from the background's colour (0) to the object's (1), so that soft edges count in part.
    cover = np.clip((pixels - background) @ ink / (ink @ ink), 0, 1) * near
    y, x = ndimage.center_of_mass(cover)
    shape = shape_of(cover[ndimage.find_objects(near.astype(int))[0]])
    names = _nearest(colour, COLOURS), _nearest(background, BACKGROUNDS)
    return Seen(shape, names[0], float(x) / mask.shape[1], float(y) / mask.shape[0], float(cover.mean()), names[1])


def _nearest(colour: np.ndarray, named: Mapping[str, tuple[int, int, int]]) -> str:
    """The name of the colour (RGB, 0 to 255) that is nearest."""
    return min(named, key=lambda name: np.linalg.norm(colour - named[name]))


def holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether `first` is left of, right of, above or below `second`, and this is the main direction between them."""
    dx, dy = first.x - second.x, first.y - second.y
    wx, wy = RELATIONS[relation]
    along, across = (dx * wx, dy) if wx else (dy * wy, dx)
    return along > 0.1 and along > MAIN_DIRECTION * abs(across)


def score(prompt: Prompt, seen: Sequence[Seen]) -> bool:
    """Whether an image in which `seen` was found shows what the prompt asks for. An object too many, or of no known
    shape, is a miss, and so is another background than the prompt names.
    """
    background = named_background(prompt.text)
    if background and any(s.background != background for s in seen):
        return False
    if prompt.scene is not None:
        return shown(prompt.scene, seen)
    if prompt.kind in ("single object", "two objects"):
        return sorted(s.shape for s in seen) == sorted(shape for _, shape in prompt.wanted)
    if Counter((s.colour, s.shape) for s in seen) != Counter(prompt.wanted * prompt.count):
        return False
    if not prompt.relation:
        return True
    first, second = ([s for s in seen if (s.colour, s.shape) == w] for w in prompt.wanted)
    return any(holds(prompt.relation, a, b) for a in first for b in second)


def shown(scene: Scene, seen: Sequence[Seen]) -> bool:
    """Whether the detected objects are those of the scene's caption and no others, with the relations that it states.
    If it names any size, objects without one must have the normal size.
    """
    sized = any(t.small for t in scene.things) or "large" in scene.caption.split()

    def key(thing: Thing | Seen) -> tuple[str, str, bool]:
        small = thing.small if isinstance(thing, Thing) else bool(thing.shape) and _is_small(thing)
        return thing.colour, thing.shape, sized and small

    if Counter(map(key, scene.things)) != Counter(map(key, seen)):
        return False
    return any(
        all(key(t) == key(s) for t, s in zip(scene.things, order, strict=True))
        and all(holds(relation, order[a], order[b]) for a, relation, b in scene.relations)
        for order in permutations(seen)
    )


def _is_small(thing: Seen) -> bool:
    return thing.area < _middle_area(thing.shape)


@lru_cache
def _middle_area(shape: str) -> float:
    """Share of the image that an object covers whose size is halfway between small and normal. Generated objects are a
    little smaller than drawn ones, hence 0.95.
    """
    radius = (SMALL[shape][1] + NORMAL[shape][0]) / 2
    picture = render(Scene("", "", (Thing("red", shape, SIZE / 2, SIZE / 2, radius),), "white"))
    return 0.95 * read_picture(picture)[0].area


def interval(hits: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (for hits: of their share)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(hits, dtype=float)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
