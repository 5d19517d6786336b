"""Training set of the small model: scenes, rendered and encoded once. Files may be added while the model trains."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sd3.shapes.scenes import BACKGROUNDS, COLOURS, COUNTS, LONGEST, SHAPES, SIZE, Scene, render, training_scene
from sd3.vae import VAE
from sd3_impls import latent_in

PATCH_PIXELS = 16  # pixels under one image token
TOKENS = SIZE // PATCH_PIXELS
ORDER = ("first", "second", "third")  # order in the caption
CLASSES = (*SHAPES, *COLOURS, *BACKGROUNDS, "small", *ORDER)
SIDES = ("left of", "right of", "above", "below")
NUMBERS = (1, *COUNTS)
FACTS = (*SIDES, *NUMBERS, *ORDER, "small", *COLOURS, *SHAPES)  # what a caption can say about one object


def save(path: Path, state: dict) -> None:
    """Writes a training state to a temporary file and renames that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load(path: Path) -> dict | None:
    """Reads the training state at `path`; None if there is no file."""
    return torch.load(path, weights_only=True) if path.exists() else None


def to_unit(pictures: list[np.ndarray]) -> Tensor:
    """uint8 images (H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def what_is_where(scene: Scene) -> np.ndarray:
    """Share of each image token that each class of `CLASSES` covers: uint8 (tokens, classes), 255 means all of it."""
    out = np.zeros((TOKENS * TOKENS, len(CLASSES)), dtype=np.float32)
    free = np.ones(TOKENS * TOKENS, dtype=np.float32)
    for i, thing in enumerate(scene.things):
        alone = render(Scene("", "", (thing,), "black")).max(axis=2) > 60
        share = alone.reshape(TOKENS, PATCH_PIXELS, TOKENS, PATCH_PIXELS).mean(axis=(1, 3)).reshape(-1)
        place = ORDER[0 if scene.kind == "count" else i]
        for name in (thing.shape, thing.colour, place, *(("small",) if thing.small else ())):
            out[:, CLASSES.index(name)] += share
        free -= share
    out[:, CLASSES.index(scene.background)] = free
    return (out.clip(0, 1) * 255).astype(np.uint8)


def facts(scene: Scene) -> np.ndarray:
    """What the caption says about each object (`FACTS`): uint8 (3, facts), 0 or 1; unused rows are zero."""
    out = np.zeros((len(ORDER), len(FACTS)), dtype=np.uint8)
    counted = scene.kind == "count"
    sides = [(a, relation) for a, relation, _ in scene.relations]
    sides += [(b, SIDES[SIDES.index(relation) ^ 1]) for _, relation, b in scene.relations]
    for i, thing in enumerate(scene.things[: 1 if counted else len(ORDER)]):
        names = [len(scene.things) if counted else 1, ORDER[i], thing.colour, thing.shape]
        names += ["small"] if thing.small else []
        names += [side for j, side in sides if j == i]
        out[i, [FACTS.index(name) for name in names]] = 1
    return out


def spoken(scene: Scene) -> np.ndarray:
    """`Scene.words`, padded with 0 to `LONGEST`: uint8 (LONGEST,)."""
    return np.array([*scene.words, *[0] * (LONGEST - len(scene.words))], dtype=np.uint8)


def text_set(scenes: list[Scene]) -> dict:
    """The text columns of `Data` for some scenes."""
    return {
        "captions": [s.caption for s in scenes],
        "kinds": [s.kind for s in scenes],
        "spoken": torch.from_numpy(np.stack([spoken(s) for s in scenes])),
        "facts": torch.from_numpy(np.stack([facts(s) for s in scenes])),
    }


def set_path(work: Path, number: int) -> Path:
    """Path of the file of one set."""
    return Path(work) / f"set-{number:03d}.pt"


@torch.no_grad()
def encode_set(model: VAE, path: Path, count: int, seed: int, batch: int = 64) -> None:
    """Renders and encodes `count` scenes and writes them to `path`: latents (posterior means, in the space of the
    MMDiT), the classes of each image token, and the captions.
    """
    model = model.eval().to(memory_format=torch.channels_last)
    rng = random.Random(seed)
    scenes, latents, classes = [], [], []
    for _ in tqdm(range(count // batch), desc=path.name, mininterval=10):
        new = [training_scene(rng) for _ in range(batch)]
        images = to_unit([render(s) for s in new]).to(memory_format=torch.channels_last)
        latents.append(latent_in(model.moments(images)[0]).to(torch.bfloat16).contiguous())
        classes += [what_is_where(s) for s in new]
        scenes += new
    out = torch.cat(latents)
    print(f"{path.name}: {len(out)} scenes, latents: mean {out.float().mean():.3f}, deviation {out.float().std():.3f}")
    save(path, text_set(scenes) | {"latents": out, "classes": torch.from_numpy(np.stack(classes))})


@dataclass
class Data:
    """All sets concatenated, one row per scene."""

    latents: Tensor  # (N, C, h, w), bfloat16
    classes: Tensor  # (N, tokens, classes), uint8
    captions: list[str]
    kinds: list[str]
    spoken: Tensor  # (N, LONGEST), uint8
    facts: Tensor  # (N, 3, facts), uint8

    @classmethod
    def read(cls, work: Path, sets: int) -> Data:
        """Reads the first `sets` sets of a work folder."""
        parts = [load(set_path(work, i)) for i in range(sets)]
        whole = {k: torch.cat([p[k] for p in parts]) for k in ("latents", "classes", "spoken", "facts")}
        lists = {k: [x for p in parts for x in p[k]] for k in ("captions", "kinds")}
        return cls(**whole, **lists)


def count_sets(work: Path) -> int:
    """Number of sets in a work folder, counted from 0 up to the first missing number."""
    n = 0
    while set_path(work, n).exists():
        n += 1
    return n
