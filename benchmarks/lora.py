"""Memory, loading time and step time with and without a LoRA of rank 64 over all linear layers of SD3 Medium.

    python benchmarks/lora.py

Random float16 weights of real size, computed in bfloat16, conditional and unconditional pass at 512 x 512. Every run is
a separate process with a warm file cache. Runs with and without the LoRA alternate; the spread between runs of one kind
is noise. Text encoders are left out: they load when prompts are encoded, not with the model.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import numpy as np
import torch
from random_weights import read_manifest, write_random
from real_size import GB, ROOT, status

sys.path.insert(0, str(ROOT))

from sd3.engine import Engine
from sd3.files import MMDIT_PREFIX
from sd3.settings import Setup

STEPS = 4  # timed steps, after one step to warm up


def write_lora(path: Path, rank: int) -> tuple[int, int]:
    """Writes a random float16 LoRA of every matrix of the MMDiT. Returns its size in bytes and number of modules."""
    shapes = {n: s for n, s in read_manifest("sd3_medium").items() if n.startswith(MMDIT_PREFIX)}
    tensors: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            key = f"diffusion_model.{name[len(MMDIT_PREFIX) :].removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = (rank, shape[1]), (shape[0], rank)
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            f.write((rng.standard_normal(math.prod(shape), dtype=np.float32) * 0.01).astype(np.float16).data)
    return path.stat().st_size, len(tensors) // 2


def one(model: str, lora: str = "", size: int = 512) -> None:
    """One run: prints the seconds to open and to load, the median seconds of a step, and the peak memory, as JSON."""
    started = time.perf_counter()
    engine = Engine(Setup(model=model, lora=lora or None, device="cpu", dtype="bfloat16"), load_tokenizers=False)
    opened = time.perf_counter()
    with engine.owned(), torch.no_grad():
        network = engine.network.mmdit
        loaded = time.perf_counter()
        draw = torch.Generator().manual_seed(0)
        cells = size // 8
        inputs = ((2, 16, cells, cells), (2, 154, engine.config.context_width), (2, engine.config.pooled_width))
        x, context, y = (torch.randn(*shape, generator=draw).bfloat16() for shape in inputs)
        times = []
        for _ in range(STEPS + 1):
            at = time.perf_counter()
            network(x, torch.full((2,), 500.0), y, context)
            times.append(time.perf_counter() - at)
    out = {"open": opened - started, "load": loaded - opened, "step": statistics.median(times[1:])}
    print(json.dumps(out | {"peak": status(os.getpid())["VmHWM"]}))


def main(folder: str = "", rank: int = 64, rounds: int = 2, size: int = 512) -> None:
    """Alternates runs without and with the LoRA. Prints a row per run, relative to the mean of the runs without."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        place.mkdir(parents=True, exist_ok=True)
        model, lora = place / "sd3_medium.safetensors", place / f"rank{rank}.safetensors"
        if not model.exists():
            write_random("sd3_medium", model)
        size_of_lora, modules = write_lora(lora, rank)
        got: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
        command = [sys.executable, __file__, "one", str(model)]
        subprocess.run(command, check=True, capture_output=True)  # fills the file cache
        for number in range(rounds):
            for name, more in (("without", []), ("with", [str(lora)])):
                done = subprocess.run([*command, *more, f"--size={size}"], check=True, capture_output=True, text=True)
                got[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, number + 1, got[name][-1], file=sys.stderr)
    print(f"SD3 Medium, a LoRA of rank {rank} over {modules} layers ({size_of_lora / GB:.2f} GB), {size} x {size}")
    print("| LoRA | peak memory | open and check, load | load | step |\n| --- | --- | --- | --- | --- |")
    mean = {key: statistics.mean(run[key] for run in got["without"]) for key in got["without"][0]}
    mean["whole"] = mean["open"] + mean["load"]
    for name, runs in got.items():
        for number, run in enumerate(runs):
            whole = run["open"] + run["load"]
            ratios = (whole / mean["whole"], run["load"] / mean["load"], run["step"] / mean["step"])
            peak = f"{run['peak'] / GB:.2f} GB ({run['peak'] / mean['peak']:.3f})"
            print(f"| {name}, run {number + 1} | {peak} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


if __name__ == "__main__":
    fire.Fire({"main": main, "one": one} if sys.argv[1:2] == ["one"] else main)
