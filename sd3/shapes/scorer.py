"""Detects coloured shapes in images and scores the images against their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sd3.shapes.prompts import Prompt
from sd3.shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZE, Scene, Thing, render

LEAST_AREA = 0.008  # share of the image; smaller pieces are no objects (a drawn object covers 0.03 and more)
LEAST_FIT = 0.75  # an object has no shape if its intersection over union with the best shape is below this
TEMPLATE = 32  # side of a shape's template in pixels
COLOUR_NAMES, COLOUR_VALUES = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Seen:
    """A detected object. x, y: centre as shares of the image's width and height; shape: empty if it is like no known
    shape; area: share of the image.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float = 0.0


def _templates() -> dict[str, np.ndarray]:
    out = {}
    for shape in SHAPES:
        thing = Thing("red", shape, SIZE / 2, SIZE / 2, SIZE / 3)
        drawn = render(Scene("", "single", (thing,), "black"), 2 * SIZE)
        out[shape] = _normalised(np.abs(drawn.astype(float) - BACKGROUNDS["black"]).sum(-1) > 90)
    return out


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask cropped to its bounding box and scaled to TEMPLATE x TEMPLATE."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((box * 255).astype(np.uint8)).resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)
    return np.asarray(image) > 127


_TEMPLATES: dict[str, np.ndarray] = {}


def shape_of(mask: np.ndarray) -> str:
    """The shape that fits a mask best (intersection over union of the cropped masks), or an empty string."""
    if not _TEMPLATES:
        _TEMPLATES.update(_templates())
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    if not 0.6 < width / height < 1.67:
        return ""
    own = _normalised(mask)
    fits = {s: (own & t).sum() / (own | t).sum() for s, t in _TEMPLATES.items()}
    best = max(fits, key=lambda s: fits[s])
    return best if fits[best] >= LEAST_FIT else ""


def read_picture(picture: np.ndarray) -> list[Seen]:
    """Detects the objects of an image, uint8 (H, W, 3): the connected pieces that differ from the background."""
    from scipy import ndimage  # optional: only reading images needs it

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
        pieces, n = ndimage.label(solid)
        if n == 0:
            continue
        sizes = ndimage.sum_labels(solid, pieces, range(1, n + 1))
        for j in np.flatnonzero(sizes >= LEAST_AREA * piece.size) + 1:
            mask = pieces == j
            y, x = ndimage.center_of_mass(mask)
            name = COLOUR_NAMES[int(np.linalg.norm(COLOUR_VALUES - colour, axis=-1).argmin())]
            out.append(Seen(shape_of(mask), name, x / picture.shape[1], y / picture.shape[0], mask.mean()))
    return out


def holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether `first` is left of, right of, above or below `second`, by more than it is off along the other axis."""
    dx, dy = first.x - second.x, first.y - second.y
    wx, wy = RELATIONS[relation]
    along, across = (dx * wx, dy) if wx else (dy * wy, dx)
    return along > 0.1 and along > abs(across)


def score(prompt: Prompt, seen: Sequence[Seen]) -> bool:
    """Whether an image in which `seen` was found shows what the prompt asks for."""
    shapes = [s.shape for s in seen]
    matches = [[s for s in seen if (s.colour, s.shape) == w] for w in prompt.wanted]
    if prompt.kind == "single object":
        return shapes == [prompt.wanted[0][1]]
    if prompt.kind == "two objects":
        return all(w[1] in shapes for w in prompt.wanted)
    if prompt.kind == "counting":
        return len(matches[0]) == prompt.count
    if prompt.kind == "colours":
        return len(seen) == 1 and bool(matches[0])
    if prompt.kind == "colour attribution":
        return all(matches) and len(seen) == 2
    return any(holds(prompt.relation, a, b) for a in matches[0] for b in matches[1])


def interval(hits: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (for hits: of their share)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(hits, dtype=float)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
