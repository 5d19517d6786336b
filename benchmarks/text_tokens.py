"""Cost of longer texts: time of a denoising step and peak memory by number of T5 tokens, at SD3 Medium's size.

    python benchmarks/text_tokens.py

Random weights from the manifest, 512 x 512, conditional and unconditional pass, 77 CLIP tokens in addition to T5's,
bfloat16. Each step with another number of tokens runs between two steps with 77; the ratio is its time over their mean.
The A/A row runs 77 tokens again: its difference from 1 is noise. Memory is measured in a separate process for each
number: the peak after loading, and after one step.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
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

from sd3.engine import Engine
from sd3.settings import Setup
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, seeded_noise

CLIP, FEWEST = 77, 77
COUNTS = {"77 again (A/A)": 77, "256": 256, "512": 512}


def stepper(engine: Engine, tokens: int, size: int) -> Callable[[], object]:
    """One step with the given number of T5 tokens."""
    config = engine.config
    draw = lambda seed, *shape: seeded_noise(seed, shape).to(engine.dtype)  # noqa: E731
    texts = [
        Conditioning(draw(i, 1, CLIP + tokens, config.context_width), draw(9 + i, 1, config.pooled_width))
        for i in (0, 1)
    ]
    x = seeded_noise(5, (1, config.latent_channels, size // 8, size // 8))
    denoiser = Denoiser(engine.network.mmdit, *texts, torch.tensor([1.0, 0.7, 0.0]), [ClassifierFreeGuidance(5.0)])
    return lambda: denoiser(x, 0.7)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak() -> float:
    """Peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.no_grad()
def memory(path: str, tokens: int, size: int, dtype: str) -> None:
    """Prints the peak after loading and after a step, as JSON."""
    engine = Engine(Setup(model=path, device="cpu", dtype=dtype), load_tokenizers=False)
    run = stepper(engine, tokens, size)
    loaded = peak()
    run()
    print(json.dumps([loaded, peak()]))


@torch.no_grad()
def main(rounds: int = 5, size: int = 512, dtype: str = "bfloat16", folder: str = "") -> None:
    """Prints a row per number of tokens."""
    with tempfile.TemporaryDirectory(dir=folder or None) as place:
        path = Path(place) / "sd3_medium.safetensors"
        write_random("sd3_medium", path)
        engine = Engine(Setup(model=str(path), device="cpu", dtype=dtype), load_tokenizers=False)
        base = stepper(engine, FEWEST, size)
        steps = {name: stepper(engine, tokens, size) for name, tokens in COUNTS.items()}
        for run in tqdm([base, *steps.values()], desc="warming up", leave=False):
            run()
        ratios: dict[str, list[float]] = {name: [] for name in steps}
        order, own = random.Random(0), [seconds(base)]
        for _ in tqdm(range(rounds), desc="measuring", leave=False):
            for name in order.sample(list(steps), len(steps)):
                took = seconds(steps[name])
                own.append(seconds(base))
                ratios[name].append(took / (sum(own[-2:]) / 2))
        del engine, base, steps
        peaks = {}
        for name, tokens in {"77": FEWEST, **{n: t for n, t in COUNTS.items() if t != FEWEST}}.items():
            command = [sys.executable, __file__, "memory", str(path), str(tokens), str(size), dtype]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[name] = json.loads(out.splitlines()[-1])
    print(f"SD3 Medium's size, {size} x {size}, 2 x {CLIP} CLIP tokens, {dtype}, {torch.get_num_threads()} threads")
    print("| T5 tokens | step time / step time with 77: median | middle half | peak memory, GB | ratio to 77 tokens |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        top = peaks.get(name, peaks["77"])[1]
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {top:.2f} | {top / peaks['77'][1]:.3f} |")


if __name__ == "__main__":
    fire.Fire({"memory": memory, "main": main} if sys.argv[1:2] == ["memory"] else main)
