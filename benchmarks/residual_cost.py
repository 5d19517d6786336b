"""Cost of residual text streaming: time of a denoising step with it over a step without it, at SD3 Medium's size.

    python benchmarks/residual_cost.py

Random weights from the manifest, 512 x 512, conditional and unconditional pass, 154 text tokens, bfloat16, targets 2 to
22. Each step with a setting runs between two steps without; the ratio is its time over their mean. The A/A row measures
the same with nothing switched on: its difference from 1 is noise. "in the stream" is the time that these steps spend in
the stream's own calls. On a CPU, which runs all calls synchronously, this is the time that the stream adds.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from random_weights import write_random
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmditx import ModelCall, ResidualStream, Stream, TokenKinds
from sd3.engine import Engine
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations
from sd3.settings import Setup
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, seeded_noise

TOKENS = 154
WORDS = 12  # tokens that are not padding, of CLIP's and of T5's each
TARGETS = tuple(range(2, 23))
SETTINGS = {
    "A/A": ResidualConfig(),
    "add, origin 0": ResidualConfig(0, TARGETS, "each:0.1"),
    "add, origin 1": ResidualConfig(1, TARGETS, "each:0.1"),
    "anchored, origin 0": ResidualConfig(0, TARGETS, "each:0.1", mode="anchored"),
    "anchored, origin 1": ResidualConfig(1, TARGETS, "each:0.1", mode="anchored"),
    "aligned, origin 0": ResidualConfig(0, TARGETS, "each:0.1", mode="aligned"),
    "aligned, origin 1": ResidualConfig(1, TARGETS, "each:0.1", mode="aligned"),
    "add, words": ResidualConfig(1, TARGETS, "each:0.1", tokens="words"),
    "anchored, words": ResidualConfig(1, TARGETS, "each:0.1", mode="anchored", tokens="words"),
    "anchored, padding": ResidualConfig(1, TARGETS, "each:0.1", mode="anchored", tokens="padding"),
}


class Timed(Stream):
    """Wraps a stream and sums the time spent in its calls."""

    def __init__(self, stream: ResidualStream):
        self.stream, self.spent = stream, 0.0

    def begin(self, at: ModelCall) -> bool:
        """Calls the wrapped stream."""
        return self.stream.begin(at)

    def mix(self, i: int, context: torch.Tensor) -> torch.Tensor:
        """Calls the wrapped stream and adds the time."""
        start = time.perf_counter()
        self.stream.keep(i, context)
        context = self.stream.mix(i, context)
        self.spent += time.perf_counter() - start
        return context


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def main(rounds: int = 7, size: int = 512, dtype: str = "bfloat16", folder: str = "", only: str = "") -> None:
    """Prints a row per setting: the median ratio, the middle half of all ratios, and their number.

    only: measure A/A and the settings whose names end with this.
    """
    chosen = {n: s for n, s in SETTINGS.items() if n == "A/A" or n.endswith(only)}
    with tempfile.TemporaryDirectory(dir=folder or None) as place:
        path = Path(place) / "sd3_medium.safetensors"
        write_random("sd3_medium", path)
        engine = Engine(Setup(model=str(path), device="cpu", dtype=dtype), load_tokenizers=False)
        model = engine.network.mmdit
        config = engine.config
        rotations = {
            origin: Rotations(origin, TARGETS, torch.eye(config.width).roll(1, 0).expand(1, len(TARGETS), -1, -1))
            for origin in (0, 1)
        }
        draw = lambda seed, *shape: seeded_noise(seed, shape).to(engine.dtype)  # noqa: E731
        kinds = TokenKinds(TOKENS // 2, torch.arange(TOKENS)[None] % (TOKENS // 2) < WORDS)
        texts = [
            Conditioning(draw(i, 1, TOKENS, config.context_width), draw(9 + i, 1, config.pooled_width), kinds)
            for i in (0, 1)
        ]
        sigmas = torch.tensor([1.0, 0.7, 0.0])
        x = seeded_noise(5, (1, config.latent_channels, size // 8, size // 8))

        def stepper(setting: ResidualConfig, clock: dict[str, Timed], name: str) -> Callable[[], object]:
            """One step with a setting. The first call also does the work that is done once per image."""
            stream = residual_stream(setting, rotations[setting.origin])
            if stream is not None:
                clock[name] = Timed(stream)
            denoiser = Denoiser(model, *texts, sigmas, [ClassifierFreeGuidance(5.0)], streams=[clock.get(name)])
            return lambda: denoiser(x, 0.7)

        clock: dict[str, Timed] = {}
        off = stepper(ResidualConfig(), clock, "off")
        steps = {name: stepper(setting, clock, name) for name, setting in chosen.items()}
        for run in tqdm([off, *steps.values()], desc="warming up", leave=False):
            run()
        once = {name: timed.spent for name, timed in clock.items()}
        for timed in clock.values():
            timed.spent = 0.0
        ratios: dict[str, list[float]] = {name: [] for name in chosen}
        order, without = random.Random(0), []
        with tqdm(total=rounds * len(chosen), desc="measuring", unit="pair", leave=False) as bar:
            for _ in range(rounds):
                without.append(seconds(off))
                for name in order.sample(list(chosen), len(chosen)):
                    between = seconds(steps[name])
                    without.append(seconds(off))
                    ratios[name].append(between / (sum(without[-2:]) / 2))
                    bar.update()
        step = statistics.median(without)
    print(f"SD3 Medium's size, {size} x {size}, 2 x {TOKENS} text tokens, {dtype}, {torch.get_num_threads()} threads")
    print(
        "| setting | step with the setting / step without: median | middle half | pairs | "
        "time in the stream, share of a step | the same in the first step |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        inside = first = ""
        if name in clock:
            inside, first = f"{clock[name].spent / rounds / step:.4f}", f"{once[name] / step:.4f}"
        print(f"| {name} | {middle:.4f} | {low:.4f} to {high:.4f} | {len(values)} | {inside} | {first} |")


if __name__ == "__main__":
    fire.Fire(main)
