"""Checks unfinished weights: makes images of a few fixed prompts with the real sampler, scores them and tiles them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

from demo.score import sample
from sd3.shapes.prompts import held_out_prompts
from sd3.shapes.scenes import INVERSE, Scene, training_scene
from sd3.shapes.scorer import read_picture, score, shown
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
