"""Decoding 1024 x 1024 at once and in tiles: memory, time, largest pixel difference, and visibility of the seams.

    python benchmarks/vae_tiles.py

Memory and time: SD3's VAE at real size (random weights), float32, each run in a separate process, interleaved.
Differences: the shipped small VAE, on a 1024 x 1024 image of shapes and ramps; with random weights there would be no
image in which to see seams. A seam is a jump between neighbouring pixels at the edge of a tile that the decoding
without tiles does not have. The last column is the largest such jump; it could be visible from 1 (of 255) on.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import torch
from random_weights import write_random

sys.path.insert(0, str(Path(__file__).parent.parent))

import sd3.weights
from sd3.engine import Engine
from sd3.files import WeightFile
from sd3.settings import Setup
from sd3.vae import OVERLAP, VAE, VAEConfig, pieces
from sd3.weights import on_meta

ROOT = Path(__file__).parent.parent


@torch.no_grad()
def one(file: str, size: int, tile: int) -> None:
    """Decodes once. Prints the peak memory in bytes, without the weights, and the seconds, as JSON."""
    part = sd3.weights.find_vae(WeightFile(file))
    config = part.config(VAEConfig.from_shapes, "a VAE")
    vae = part.load_into(on_meta(lambda: VAE(config)), "cpu", torch.float32).to(memory_format=torch.channels_last)
    latent = torch.randn(1, config.latent_channels, size // 8, size // 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    vae.decode(latent, tile)
    spent = time.perf_counter() - started
    print(json.dumps([1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), spent]))


def test_picture(size: int) -> torch.Tensor:
    """A test image (1, 3, size, size) in [-1, 1] of discs, bars and ramps."""
    down, across = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    pixels = torch.stack([across, down, -across * down])
    for i, (x, y, r) in enumerate([(-0.4, -0.3, 0.35), (0.5, 0.1, 0.25), (-0.1, 0.6, 0.3), (0.6, -0.6, 0.15)]):
        inside = (across - x) ** 2 + (down - y) ** 2 < r**2
        pixels[:, inside] = torch.tensor(
            [[0.9, -0.8, -0.6], [-0.7, -0.5, 0.9], [0.8, 0.8, -0.9], [-0.8, 0.6, -0.7]][i]
        )[:, None]
    return pixels[None]


@torch.no_grad()
def main(size: int = 1024, tiles="576,256", rounds: int = 2, folder: str = "") -> None:
    """Prints both tables. rounds: 0 skips the first."""
    ways = [0, *(int(t) for t in str(tiles).strip("()").split(","))]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        file = place / "sd3_medium.safetensors"
        if not file.exists():
            write_random("sd3_medium", file)
        got: dict[int, list[list[float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                command = [sys.executable, __file__, "one", str(file), str(size), str(way)]
                got[way].append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    if rounds:
        costs(got, size)
    setup = Setup(model="demo", device="cpu", dtype="float32")
    vae = Engine(setup, load_tokenizers=False).pixels.vae
    picture = test_picture(size)
    mean, _ = vae.moments(picture)
    whole = vae.decode(mean)
    print(f"\nthe shipped VAE, {size} x {size}, pixels from 0 to 255")
    print("| decoding | largest difference to whole | mean difference to whole | largest jump at an edge of a tile |")
    print("| --- | --- | --- | --- |")
    for way in ways:
        got_pixels = vae.decode(mean, way)
        difference = (got_pixels - whole).abs() * 127.5
        jump = f"{127.5 * border_jump(got_pixels - whole, way, size):.2f}" if way else ""
        print(f"| {_name(way)} | {difference.max():.2f} | {difference.mean():.3f} | {jump} |")


def costs(got: dict[int, list[list[float]]], size: int) -> None:
    """Prints the memory and time of every run."""
    base = [statistics.mean(v) for v in zip(*got[0], strict=True)]
    print(f"SD3's VAE, {size} x {size}, float32; ratios to the mean of the runs without tiles (their rows are the A/A)")
    print("| decoding | peak memory beside the weights (ratio) | time, ratio |\n| --- | --- | --- |")
    for way, runs in got.items():
        for peak, spent in runs:
            print(f"| {_name(way)} | {peak / 1e9:.2f} GB ({peak / base[0]:.2f}) | {spent / base[1]:.2f} |")


def border_jump(difference: torch.Tensor, tile: int, size: int) -> float:
    """Largest jump of the difference (1, 3, H, W) between neighbouring rows or columns at the edges of tiles."""
    ends = sorted({e for piece in pieces(size, tile, min(OVERLAP, tile // 4)) for e in piece if 0 < e < size})
    before = [e - 1 for e in ends]
    columns, rows = difference.diff(dim=-1)[..., before], difference.diff(dim=-2)[..., before, :]
    return max(columns.abs().max().item(), rows.abs().max().item())


def _name(way: int) -> str:
    return f"tiles of {way}" if way else "whole"


if __name__ == "__main__":
    fire.Fire({"main": main, "one": one}, command=sys.argv[1:] if sys.argv[1:2] == ["one"] else ["main", *sys.argv[1:]])
