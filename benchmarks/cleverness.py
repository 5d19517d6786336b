"""What each optimisation of a step gains: time of a step without it over a step with it, at SD3 Medium's size.

    python benchmarks/cleverness.py                      512 x 512, eager
    python benchmarks/cleverness.py --size 256
    python benchmarks/cleverness.py --compiled           the optimisations that affect compiled blocks

Random weights from the manifest, conditional and unconditional pass, 154 text tokens, bfloat16. Each step without the
optimisation runs between two steps with it; the ratio is its time over their mean. The A/A row measures the same with
nothing switched off: its difference from 1 is noise. An optimisation is kept if its ratio exceeds 1.01 by more than
that noise. docs/performance.md lists those that were dropped, and the commit whose script measured them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from step import TOKENS, seconds, table, weights_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmditx import MMDiT
from other_impls import ACTIVATIONS
from sd3.engine import Engine
from sd3.layers import PackedLinear
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations
from sd3.settings import Setup
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, seeded_noise

TARGETS = tuple(range(2, 23))
MODES = {mode: ResidualConfig(0, TARGETS, "each:0.1", mode=mode) for mode in ("anchored", "aligned")}
DTYPE = torch.bfloat16
Run = Callable[[], object]


class Steps:
    """An MMDiT, and variants of its denoising step."""

    def __init__(self, size: int, file: Path, compiled: bool):
        setup = Setup(model=str(file), device="cpu", dtype="bfloat16", compile=compiled)
        engine = Engine(setup, load_tokenizers=False)
        self.model: MMDiT = engine.network.mmdit
        config = engine.config
        draw = lambda seed, *shape: seeded_noise(seed, shape).to(DTYPE)  # noqa: E731
        self.texts = [
            Conditioning(draw(i, 1, TOKENS, config.context_width), draw(9 + i, 1, config.pooled_width)) for i in (0, 1)
        ]
        self.x = seeded_noise(5, (1, config.latent_channels, size // 8, size // 8))
        turns = torch.eye(config.width).roll(1, 0).expand(1, len(TARGETS), -1, -1)
        self.rotations = Rotations(0, TARGETS, turns)

    def denoiser(self, mode: str = "") -> Denoiser:
        """A denoiser with residual text streaming in the given mode (empty: without)."""
        stream = residual_stream(MODES[mode], self.rotations) if mode else None
        sigmas = torch.tensor([1.0, 0.7, 0.0])
        return Denoiser(self.model, *self.texts, sigmas, [ClassifierFreeGuidance(5.0)], streams=[stream])

    def step(self, mode: str = "") -> Run:
        """A denoising step that reuses the prepared origin, as all steps but the first do."""
        denoiser = self.denoiser(mode)
        return lambda: denoiser(self.x, 0.7)

    def unprepared(self, mode: str) -> Run:
        """A step that prepares the origin's tokens again, as the first step of a run does."""
        denoiser = self.denoiser(mode)

        def run() -> None:
            denoiser.texts["both"].prepared.clear()
            denoiser(self.x, 0.7)

        return run

    def unpacked(self) -> Run:
        """A step with plain layers instead of the packed ones, which are put back afterwards."""
        step, places = self.step(), []
        for owner in self.model.joint_blocks.modules():
            for name, layer in owner.named_children():
                if isinstance(layer, PackedLinear):
                    places.append((owner._modules, name, layer, Plain(layer)))
        if not places:
            raise SystemExit("this CPU does without packing: nothing to measure")

        def run() -> None:
            for modules, name, _, plain in places:
                modules[name] = plain
            try:
                step()
            finally:
                for modules, name, layer, _ in places:
                    modules[name] = layer

        return run


class Plain(nn.Module):
    """A layer with the size of a packed one and random weights, computed with torch's public functions."""

    def __init__(self, layer: PackedLinear):
        super().__init__()
        weight = torch.randn(layer.out_features, layer.in_features).mul_(layer.in_features**-0.5).to(DTYPE)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        self.activation = layer.activation

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return ACTIVATIONS[self.activation](y) if self.activation else y


def measure(rows: dict[str, tuple[Run, Run]], rounds: int) -> dict[str, list[float]]:
    """Time ratios of each pair's first run over its second, which runs before and after the first. Consecutive pairs
    share such a run if they have the same second.
    """
    for run in dict.fromkeys(run for pair in rows.values() for run in pair):
        run()
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    last: tuple[Run | None, float] = (None, 0.0)
    with tqdm(total=rounds * len(rows), desc="measuring", unit="pair", leave=False) as bar:
        for _ in range(rounds):
            for name, (without, with_) in rows.items():
                before = last[1] if last[0] is with_ else seconds(with_)
                between = seconds(without)
                last = with_, seconds(with_)
                ratios[name].append(between / ((before + last[1]) / 2))
                bar.update()
    return ratios


@torch.no_grad()
def main(size: int = 512, rounds: int = 3, compiled: bool = False, folder: str = "") -> None:
    """Prints a row per optimisation."""
    with tempfile.TemporaryDirectory() as place:
        steps = Steps(size, weights_file("sd3_medium", folder or place), compiled)
    step = steps.step()
    rows = {"A/A": (step, step), "packed weights": (steps.unpacked(), step)}
    if not compiled:
        rows |= {f"{mode}: origin 0 prepared once": (steps.unprepared(mode), steps.step(mode)) for mode in MODES}
    how = "compiled" if compiled else "eager"
    threads = torch.get_num_threads()
    print(f"SD3 Medium's size, {size} x {size}, 2 x {TOKENS} text tokens, bfloat16, {how}, {threads} threads")
    table(measure(rows, rounds), "step without / step with")


if __name__ == "__main__":
    fire.Fire(main)
