"""Reads pictures of coloured shapes back and scores them against their prompts, six kinds as GenEval has them.

python -m demo.score --check_scorer        the scorer on rendered ground truth, right and shuffled
python -m demo.score                the shipped model on 240 prompts that training never saw, a few residual settings
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from demo.command_line import run
from demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_LAYOUTS,
    COUNTS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZE,
    Combination,
    Scene,
    Thing,
    article,
    place,
    relation_cells,
    render,
)
from sd3.sheet import tile

KINDS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
LEAST_AREA = 0.008  # of the picture; smaller specks are no objects (a drawn object covers 0.03 and more)
LEAST_FIT = 0.75  # intersection over union with the best shape, below which an object has no shape
TEMPLATE = 32  # pixels of a shape's template
COLOUR_NAMES, COLOUR_VALUES = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Seen:
    """An object read off a picture; x and y as shares of its width and height, shape `` where it is none; area as a
    share of the picture.
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A scored prompt: its kind and what has to be there."""

    text: str
    kind: str
    wanted: tuple[Combination, ...]
    count: int = 1
    relation: str = ""


# ---- reading a picture ---------------------------------------------------------------------------


def _templates() -> dict[str, np.ndarray]:
    out = {}
    for shape in SHAPES:
        thing = Thing("red", shape, SIZE / 2, SIZE / 2, SIZE / 3)
        drawn = render(Scene("", "single", (thing,), "black"), 2 * SIZE)
        out[shape] = _normalised(np.abs(drawn.astype(float) - BACKGROUNDS["black"]).sum(-1) > 90)
    return out


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask cut to its box and scaled to TEMPLATE x TEMPLATE."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((box * 255).astype(np.uint8)).resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)
    return np.asarray(image) > 127


_TEMPLATES: dict[str, np.ndarray] = {}


def shape_of(mask: np.ndarray) -> str:
    """The shape that a mask is most like (intersection over union, box against box), or `` if like none."""
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
    """The objects of a picture, uint8 (H, W, 3): what differs from the background, in connected pieces."""
    from scipy import ndimage  # here, so that the statistics below need no scipy

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
        # An edge pixel belongs to the object if it is nearer to its colour than to the background.
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


# ---- scoring it ----------------------------------------------------------------------------------


def holds(relation: str, first: Seen, second: Seen) -> bool:
    """Whether `first` lies left of, right of, above or below `second`, by more than it lies off to the side."""
    dx, dy = first.x - second.x, first.y - second.y
    wx, wy = RELATIONS[relation]
    along, across = (dx * wx, dy) if wx else (dy * wy, dx)
    return along > 0.1 and along > abs(across)


def score(prompt: Prompt, seen: Sequence[Seen]) -> bool:
    """Whether a picture in which `seen` was found shows what the prompt asks for."""
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


# ---- prompts that training never saw -------------------------------------------------------------


def held_out_prompts(per_kind: int = 40, seed: int = 7) -> list[Prompt]:
    """`per_kind` prompts of each kind from shape-colour combinations (and so pairs) that training never saw."""
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


def draw(prompt: Prompt, rng: random.Random) -> np.ndarray:
    """A picture that shows exactly what the prompt says: the scorer's ground truth."""
    radius = rng.uniform(11.0, 12.5)
    if prompt.kind == "counting":
        cells = rng.choice(COUNT_LAYOUTS[prompt.count])
        wanted = prompt.wanted * prompt.count
    elif prompt.relation:
        cells, wanted = relation_cells(prompt.relation, rng), prompt.wanted
    else:
        cells = rng.sample([(c, r) for c in range(3) for r in range(3)], len(prompt.wanted))
        wanted = prompt.wanted
    named = [b for b in BACKGROUNDS if b in prompt.text.split()]
    background = named[0] if named else rng.choice(list(BACKGROUNDS))
    things = tuple(place(w, c, radius, rng) for w, c in zip(wanted, cells, strict=True))
    return render(Scene(prompt.text, prompt.kind, things, background))


# ---- tables --------------------------------------------------------------------------------------


def interval(hits: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: of hits, their share."""
    rng = np.random.default_rng(seed)
    values = np.asarray(hits, dtype=float)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def table(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown: a row per kind and one overall, a column per setting, share of hits with its bootstrap interval.

    Overall is the mean over pictures; all kinds have as many.
    """
    lines = [
        "| kind | " + " | ".join(results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for kind in (*KINDS, "overall"):
        cells = []
        for hits in results.values():
            own = [h for h, p in zip(hits, prompts, strict=True) if kind in (p.kind, "overall")]
            low, high = interval(own)
            cells.append(f"{np.mean(own):.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown: a row per setting, what it gains on `off` with the same prompts and seeds, with bootstrap intervals
    of the paired differences.
    """
    names = ("overall", *KINDS)
    lines = ["| setting less off | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for setting, hits in results.items():
        if setting.startswith("off"):
            continue
        gains = [float(a) - float(b) for a, b in zip(hits, results["off"], strict=True)]
        cells = []
        for kind in names:
            own = [g for g, p in zip(gains, prompts, strict=True) if kind in (p.kind, "overall")]
            low, high = interval(own)
            cells.append(f"{np.mean(own):+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(per_kind: int = 40, seed: int = 3) -> dict[str, list[bool]]:
    """Scores rendered ground truth against its own prompts and shuffled ones, and with relations left to chance."""
    rng = random.Random(seed)
    prompts = held_out_prompts(per_kind)
    seen = [read_picture(draw(p, rng)) for p in prompts]
    return {
        "ground truth": [score(p, s) for p, s in zip(prompts, seen, strict=True)],
        "shuffled": shuffled(prompts, seen),
        "placed at random": [score(p, read_picture(draw(replace(p, relation=""), rng))) for p in prompts],
    }


def shuffled(prompts: Sequence[Prompt], seen: Sequence[list[Seen]], seed: int = 5) -> list[bool]:
    """Scores against prompts of the same kind, moved to other pictures."""
    rng = random.Random(seed)
    order = list(range(len(prompts)))
    for kind in KINDS:
        own = [i for i, p in enumerate(prompts) if p.kind == kind]
        for i, j in zip(own, rng.sample(own, len(own)), strict=True):
            order[i] = j
    return [score(p, seen[order[i]]) for i, p in enumerate(prompts)]


RESIDUAL_SETTINGS = ("off", "0:3,5,7:0.1", "0:3,5,7:0.3", "0:3,5,7:0.8,0.6,0.4", "1:2,3,4,5,6,7:0.1")


def residual_of(setting: str, rotations: str | None = None):
    """The configuration of `off` or `[MODE:]ORIGIN:TARGETS:WEIGHTS`; raises ValueError for anything else."""
    from sd3.residual import ResidualConfig

    if setting == "off":
        return ResidualConfig()
    fields = setting.split(":", 3)
    mode = fields.pop(0) if fields[0].isalpha() else "add"
    if len(fields) != 3:
        raise ValueError(f"--settings {setting}: must be off or [MODE:]ORIGIN:TARGETS:WEIGHTS")
    return ResidualConfig.parse(*fields, mode=mode, rotations=rotations if mode == "aligned" else None)


def sample(
    engine, prompts: Sequence[Prompt], setting: str, seed: int, batch: int, rotations: str | None = None, **values
) -> list[np.ndarray]:
    """A picture for every prompt (seeds count up from `seed`) under `off` or `[MODE:]ORIGIN:TARGETS:WEIGHTS`."""
    from sd3.engine import residual_settings

    pictures = engine.plan(
        [p.text for p in prompts],
        [seed + i for i in range(len(prompts))],
        batch_size=batch,
        **(engine.defaults | values | residual_settings(residual_of(setting, rotations))),
    )
    return [np.asarray(image) for _, _, image in engine.make(pictures)]


def main(
    check_scorer: bool = False,
    model: str = "models/demo/demo.safetensors",
    per_kind: int = 40,
    seed: int = 1000,
    batch: int = 40,
    settings: Sequence[str] = RESIDUAL_SETTINGS,
    save: str = "",
    rotations: str | None = None,
    **values,
) -> None:
    """Prints the table of scores: a column per setting (`off;0:3,5,7:0.1`, [MODE:]ORIGIN:TARGETS:WEIGHTS), and where
    one of them is `off`, the differences to it.

    rotations: the file of mode aligned. `values` (steps, cfg, shift, sampler) replace the model's usual ones.
    """
    prompts = held_out_prompts(per_kind)
    if check_scorer:
        print(table(check(per_kind), prompts))
        return
    from sd3_infer import SD3Inferencer

    engine = SD3Inferencer().load(model, device="cpu")
    engine.quiet = not sys.stderr.isatty()
    results, columns = {}, settings.split(";") if isinstance(settings, str) else settings
    for setting in columns:
        pictures = sample(engine, prompts, setting, seed, batch, rotations, **values)
        seen = [read_picture(p) for p in pictures]
        results[setting] = [score(p, s) for p, s in zip(prompts, seen, strict=True)]
        if setting == "off":
            results["off, shuffled prompts"] = shuffled(prompts, seen)
            if save:
                tile([Image.fromarray(p) for p in pictures], 20).save(save)
    used = engine.defaults | values
    told = ", ".join(f"{k} {used[k]}" for k in ("steps", "sampler", "cfg", "shift"))
    print(f"{len(prompts)} prompts, seeds {seed} to {seed + len(prompts) - 1}, {told}, {engine.dtype}")
    print(table(results, prompts))
    if "off" in results and len(columns) > 1:
        print("\n" + paired(results, prompts))


if __name__ == "__main__":
    run(main, "demo.score")
