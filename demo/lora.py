"""Trains a LoRA of the small model with peft, for a shape that the model was not trained on.

pip install peft
python -m demo.lora train --out models/demo/loras/cross.safetensors
python -m demo.lora count --lora models/demo/loras/cross.safetensors
python -m demo.lora kohya models/demo/loras/cross.safetensors cross_kohya.safetensors
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import numpy as np
import peft
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd3
from demo.command_line import run
from demo.data import to_unit
from demo.flow import noise_levels
from sd3.shapes.scenes import COLOURS, OVERSAMPLE, SEEN, SIZE, Scene, Thing, article, render, sample_scene
from sd3_impls import latent_in
from sd3_infer import SD3Inferencer

NAME = "cross"
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
NOISE = (1.6, 1.2)  # mean and spread of the noise levels, as in the model's own training
LEAST_FIT = 0.75  # an object counts as a cross if its intersection over union with one is above this
TEMPLATE = 32  # side of the compared masks in pixels


def corners(radius: float) -> list[tuple[float, float]]:
    """Corners of a cross around (0, 0), about as large as the other shapes of this radius."""
    long, short = 1.08 * radius, 0.38 * radius
    quarter = [(short, -long), (short, -short), (long, -short)]
    return [c for turn in range(4) for c in (_turned(x, y, turn) for x, y in quarter)]


def _turned(x: float, y: float, turn: int) -> tuple[float, float]:
    for _ in range(turn):
        x, y = -y, x
    return x, y


def picture(scene: Scene) -> np.ndarray:
    """Renders a scene, including crosses: uint8 (96, 96, 3)."""
    others = tuple(thing for thing in scene.things if thing.shape != NAME)
    out = render(dataclasses.replace(scene, things=others)).astype(np.float32)
    for thing in scene.things:
        if thing.shape == NAME:
            mask = Image.new("L", (OVERSAMPLE * SIZE,) * 2)
            points = [(OVERSAMPLE * (thing.x + x), OVERSAMPLE * (thing.y + y)) for x, y in corners(thing.radius)]
            ImageDraw.Draw(mask).polygon(points, fill=255)
            share = np.asarray(mask.reduce(OVERSAMPLE), dtype=np.float32)[..., None] / 255
            out = out * (1 - share) + np.array(COLOURS[thing.colour], dtype=np.float32) * share
    return out.round().astype(np.uint8)


def scenes(rng: random.Random, count: int) -> list[Scene]:
    """Training scenes: half have an object of the new shape, the rest preserve what the model has learned."""
    new = tuple((colour, NAME) for colour in COLOURS)
    out: list[Scene] = []
    while len(out) < count:
        if len(out) % 2:
            out.append(sample_scene(rng))
            continue
        kind = rng.choices(("single", "pair", "relation"), (50, 25, 25))[0]
        scene = sample_scene(rng, kind, SEEN + 3 * new)
        if NAME in scene.caption:
            out.append(scene)
    return out


class Rows:
    """Latents and text encodings of scenes, computed once."""

    def __init__(self, model: SD3Inferencer, drawn: list[Scene]):
        engine = model.engine
        captions = list(dict.fromkeys(scene.caption for scene in drawn))
        length = max(engine.text.t5_length(caption) for caption in captions)
        with torch.no_grad(), engine.owned():
            engine.text.most = len(captions)
            engine.encode([(caption, length) for caption in captions])
            texts = [engine.text.get_cond(scene.caption, length) for scene in drawn]
            pictures = to_unit([picture(scene) for scene in drawn])
            means = [engine.pixels.vae.moments(part)[0] for part in pictures.split(64)]
        self.context, self.pooled = (torch.cat(parts).float() for parts in zip(*texts, strict=True))
        self.latents = latent_in(torch.cat(means)).float()  # (N, 16, 12, 12)

    def pick(self, picked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, pooled text and text tokens of the rows `picked`."""
        return self.latents[picked], self.pooled[picked], self.context[picked]


def train(
    out: str,
    model: str = "demo",
    steps: int = 600,
    batch: int = 32,
    rank: int = 6,
    rate: float = 3e-3,
    count: int = 1500,
    seed: int = 0,
) -> None:
    """Trains the LoRA and writes it in float16, under our layer names with the prefix `diffusion_model.`."""
    torch.manual_seed(seed)
    started = time.time()
    inferencer = SD3Inferencer()
    inferencer.tell.quiet = True
    inferencer.load(model, device="cpu", dtype="float32")
    rows = Rows(inferencer, scenes(random.Random(seed), count))
    network = inferencer.engine.network.mmdit.requires_grad_(False)
    layers = [name for name, _ in network.named_modules() if name.endswith(LAYERS)]
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    network = peft.inject_adapter_in_model(settings, network).train()
    learned = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        x1, pooled, context = rows.pick(torch.randint(count, (batch,), generator=generator))
        noise = torch.randn(x1.shape, generator=generator)
        sigma = noise_levels(batch, *NOISE, generator)
        v = network(torch.lerp(x1, noise, sigma[:, None, None, None]), 1000 * sigma, pooled, context)
        loss = (v - (noise - x1)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"{step + 1} loss {np.mean(losses[-50:]):.4f}, {time.time() - started:.0f} s", flush=True)
    state = peft.utils.get_peft_model_state_dict(network)
    tensors = {f"diffusion_model.{name}": tensor.half().contiguous() for name, tensor in state.items()}
    tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(float(rank)) for name in layers}
    metadata = {"modelspec.title": f"the shape {NAME}, for the small model that ships", "trigger_word": NAME}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata)
    print(f"{out}: {Path(out).stat().st_size:,} bytes, {len(layers)} layers, {time.time() - started:.0f} s")


def count(lora: str, model: str = "demo", images: int = 5, **settings: float | str) -> None:
    """Prints how many images show a cross, without and with the LoRA. The prompts ask for one in each colour."""
    for name, value in (("without", None), ("with", lora)):
        pipe = sd3.load(model, lora=value)
        prompts = [f"{article(colour)} {NAME}" for colour in COLOURS]
        made = pipe(prompts, seed=0, num_images=images, batch_size=images, **settings).images
        print(f"{name}: {sum(shows_cross(np.asarray(image)) for image in made)} of {len(made)} images show a {NAME}")


def shows_cross(image: np.ndarray) -> bool:
    """Whether the pixels that differ from the background, taken as one piece, have the shape of a cross."""
    pixels = image.astype(np.float32)
    mask = np.linalg.norm(pixels - np.median(pixels.reshape(-1, 3), axis=0), axis=-1) > 60
    if not mask.any():
        return False
    drawn = picture(Scene("", "single", (Thing("red", NAME, SIZE / 2, SIZE / 2, SIZE / 3),), "black"))
    found, cross = _normalised(mask), _normalised(drawn[..., 0] > 100)
    return bool((found & cross).sum() / (found | cross).sum() > LEAST_FIT)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask cropped to its bounding box and scaled to TEMPLATE x TEMPLATE."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray((box * 255).astype(np.uint8)).resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)
    return np.asarray(scaled) > 127


def kohya(lora: str, out: str) -> None:
    """Writes a LoRA of `train` under the names that kohya's scripts use."""
    tensors = {}
    for name, tensor in load_file(lora).items():
        layer, _, leaf = name.removeprefix("diffusion_model.").partition(".lora_")
        layer = layer.removesuffix(".alpha").replace(".", "_")
        suffix = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "": "alpha"}[leaf]
        tensors[f"lora_unet_{layer}.{suffix}"] = tensor
    save_file(tensors, out, {"ss_network_module": "networks.lora_sd3"})


if __name__ == "__main__":
    run({"train": train, "count": count, "kohya": kohya}, "python -m demo.lora")
