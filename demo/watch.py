"""Checks unfinished weights: makes images of a few fixed prompts with the real sampler, scores them and tiles them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from demo.score import sample
from sd3.shapes.prompts import held_out_prompts
from sd3.shapes.scenes import INVERSE, NORMAL, SIZE, SMALL, Scene, Thing, render, training_scene
from sd3.shapes.scorer import Seen, holds, read_picture, score
from sd3.sheet import tile
from sd3_infer import SD3Inferencer

COUNTS = {
    "position": 24,
    "counting": 12,
    "colour attribution": 12,
    "colours": 8,
    "single object": 4,
    "two objects": 4,
}  # numbers of prompts of `python -m demo.score`, whose combinations never occur in training
SCENES = {"relations": 12, "sizes": 8, "three": 4, "sentences": 8}  # numbers of scenes with trained combinations


def watched() -> tuple[list, list[tuple[str, Scene]]]:
    """The fixed prompts, and the fixed scenes of the newer kinds with the names of their groups."""
    prompts = [p for kind, n in COUNTS.items() for p in [p for p in held_out_prompts() if p.kind == kind][:n]]
    rng = random.Random(64)
    scenes = []
    for name, count in SCENES.items():
        for i in range(count):
            kinds = {"relations": "relations", "three": "three", "sizes": ("single", "pair", "relation")[i % 3]}
            kind = kinds.get(name, ("relation", "count", "pair", "relations")[i % 4])
            scenes.append((name, training_scene(rng, kind, short=name != "sentences", sized=name == "sizes")))
    return prompts, scenes


@lru_cache
def _middle_area(shape: str) -> float:
    """Share of the image that an object covers whose size is halfway between small and normal."""
    radius = (SMALL[shape][1] + NORMAL[shape][0]) / 2
    picture = render(Scene("", "", (Thing("red", shape, SIZE / 2, SIZE / 2, radius),), "white"))
    return float((np.abs(picture.astype(float) - 245).sum(-1) > 100).mean()) * 0.95


def shown(scene: Scene, seen: list[Seen]) -> bool:
    """Whether the detected objects `seen` agree with the scene's caption: all its objects and no others, with their
    sizes and relations.
    """

    def key(thing: Thing | Seen) -> tuple[str, str, bool]:
        small = (
            thing.small if isinstance(thing, Thing) else bool(thing.shape) and thing.area < _middle_area(thing.shape)
        )
        return thing.colour, thing.shape, small

    if Counter(map(key, scene.things)) != Counter(map(key, seen)):
        return False
    by_key = {key(s): s for s in seen}
    return all(holds(r, by_key[key(scene.things[a])], by_key[key(scene.things[b])]) for a, r, b in scene.relations)


def look(model: Path, folder: Path, seed: int = 9000, batch: int = 48, **values) -> dict[str, float]:
    """Share of correct images by kind; `reversed`: share of images that show the opposite relation. Writes all images
    to `FOLDER/watch/STEP.png`, and what was detected to STEP.json. values: passed to `demo.score.sample`.
    """
    started = time.time()
    engine = SD3Inferencer().load(str(model), device="cpu")
    engine.tell.quiet = True
    with safe_open(model, "pt") as file:
        step = int(file.metadata()["training_steps"])
    prompts, scenes = watched()

    class Asked:
        def __init__(self, text: str):
            self.text = text

    asked = [*prompts, *(Asked(s.caption) for _, s in scenes)]
    pictures = sample(engine, asked, "off", seed, batch, **values)
    seen = [read_picture(p) for p in pictures]
    hits: dict[str, list[bool]] = {}
    for prompt, objects in zip(prompts, seen, strict=False):
        hits.setdefault(prompt.kind, []).append(score(prompt, objects))
        if prompt.relation:
            other = score(type(prompt)("", prompt.kind, prompt.wanted, relation=INVERSE[prompt.relation]), objects)
            hits.setdefault("reversed", []).append(other)
    for (name, scene), objects in zip(scenes, seen[len(prompts) :], strict=True):
        hits.setdefault(name, []).append(shown(scene, objects))
    (folder / "watch").mkdir(exist_ok=True)
    tile([Image.fromarray(p) for p in pictures], 12).save(folder / "watch" / f"{step:06d}.png")
    texts = [{"prompt": a.text, "seen": [f"{s.colour} {s.shape}" for s in o]} for a, o in zip(asked, seen, strict=True)]
    (folder / "watch" / f"{step:06d}.json").write_text(json.dumps(texts, indent=0), encoding="utf-8")
    out = {name: round(float(np.mean(of_kind)), 3) for name, of_kind in hits.items()}
    return out | {"watched step": step, "seconds": round(time.time() - started, 1)}
