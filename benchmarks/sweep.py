"""What a sweep saves over separate runs, and what a second worker gains, as ratios of times from one measurement.

python benchmarks/sweep.py
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "demo" / "demo.safetensors"
PROMPTS = ("a red circle", "two green stars", "a red circle left of a blue square")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(script: str, *arguments: object, env: dict[str, str] | None = None) -> float:
    """Runs a command and returns its seconds, including start-up. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | (env or {}))
    return time.perf_counter() - start


def lines(folder: Path, event: str) -> list[dict]:
    """The lines of one kind in a sweep's log."""
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def working(folder: Path) -> float:
    """Seconds from the start of the first batch to the end of the last."""
    first, last = lines(folder, "begin")[0]["time"], lines(folder, "batch")[-1]["time"]
    return (datetime.datetime.fromisoformat(last) - datetime.datetime.fromisoformat(first)).total_seconds()


def separate_runs(place: Path) -> None:
    """Times twelve images in one sweep and in twelve runs of sd3_infer.py."""
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    grid = ["--seed", "0-1", "--prompt", place / "prompts.txt", "--residual_target_layers", "3,5"]
    sweep = run("sd3_sweep.py", "--out", place / "swept", "--model", MODEL, *grid)
    pictures = sorted((place / "swept" / "pictures").iterdir())
    apart = sum(run("sd3_infer.py", "--replay", p, "--out_dir", place / "apart") for p in pictures)
    encode = lines(place / "swept", "encode")
    texts = encode[0]["prompts"]
    print(f"{len(pictures)} images of {len(PROMPTS)} prompts: {len(lines(place / 'swept', 'load'))} load,")
    print(f"{len(encode)} encoding of {len(texts)} distinct texts: {', '.join(map(repr, texts))}")
    print(f"time per image, the sweep over separate runs of sd3_infer.py: {sweep / apart:.2f}")


def workers(place: Path) -> None:
    """Times the same sweep with one one-thread worker and with two on Ray, alternating, twice each."""
    grid = ["--model", MODEL, "--prompt", place / "prompts.txt", "--seed", "0-9", "--batch_size", 4]
    grid += ["--residual_target_layers", "3,5;4;2-7", "--residual_weights", "each:0.1;each:0.3"]
    ray = ["--ray", "auto", "--cpus_per_worker", 1]
    whole, alone = {}, {}
    for name, more in (("one", []), ("two", ray), ("one again", []), ("two again", ray)):
        whole[name] = run("sd3_sweep.py", "--out", place / name, *grid, *more, env=ONE_THREAD)
        alone[name] = working(place / name)
    count = len(list((place / "one" / "pictures").iterdir()))
    print(f"{count} images, one one-thread process and two one-thread workers on Ray:")
    for what, times in (("making images", alone), ("whole command, start of Ray and report included", whole)):
        print(
            f"  speed-up, {what}: {times['one'] / times['two']:.2f} and {times['one again'] / times['two again']:.2f} "
            f"(A/A: {times['one'] / times['one again']:.2f}, {times['two'] / times['two again']:.2f})"
        )


def main() -> None:
    """Prints the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        separate_runs(Path(folder))
        workers(Path(folder))


if __name__ == "__main__":
    main()
