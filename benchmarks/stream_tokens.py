"""Makes the figures of docs/prompts.md for `--residual_tokens` on the shipped model: images, and how much of the prompt
can be read from each block's text tokens.

    python benchmarks/stream_tokens.py --out docs

Needs matplotlib. Takes a few minutes on one CPU core.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fire
from side_by_side import side_by_side

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle left of a blue square"
RESIDUAL = ["--residual_target_layers", "6-15", "--residual_weights", "each:0.3", "--residual_mode", "anchored"]
SETTINGS = {"off": [], **{t: [*RESIDUAL, "--residual_tokens", t] for t in ("all", "words", "padding", "clip", "t5")}}
MEASURES = ("retrieval", "probe relation")


def call(*words: object) -> None:
    """Runs a command of this repository. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def means(path: Path, measures: Sequence[str] = MEASURES) -> dict[str, list[float]]:
    """Reads a measure.csv: for each measure, its mean over the timesteps, by block."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    blocks = sorted({int(row["block"]) for row in rows})
    of = lambda b, m: [float(row[m]) for row in rows if int(row["block"]) == b]  # noqa: E731
    return {m: [sum(of(b, m)) / len(of(b, m)) for b in blocks] for m in measures}


def plot(measured: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draws a plot per measure, with a line per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(10, 3.6), layout="constrained")
    for axis, measure in zip(axes, MEASURES, strict=True):
        for name, values in measured.items():
            axis.plot(values[measure], label=name, marker="o", markersize=3)
        axis.set(title=measure, xlabel="block", ylim=(0, 1.02))
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(out: str, prompts: int = 240, seed: int = 3) -> None:
    """Writes tokens.png (images) and tokens_measured.png (plots) to the folder `out`, and prints the means."""
    with tempfile.TemporaryDirectory() as place:
        folder, measured = Path(place), {}
        call(
            "-m", "demo.captions", "--count", prompts, "--combinations", "all", "--seed", 1, "--out", folder / "c.jsonl"
        )
        for name, flags in SETTINGS.items():
            image = folder / f"{name}.png"
            call("sd3_infer.py", "--model", "demo", "--prompt", PROMPT, "--seed", seed, "--out", image, *flags)
            command = ["sd3_probe.py", "measure", "--model", "demo", "--prompts", folder / "c.jsonl"]
            command += ["--kept_prompts", prompts, "--batch_size", 20, "--steps", 12, "--out", folder / name]
            call(*command, *flags)
            measured[name] = means(folder / name / "measure.csv")
        side_by_side(str(Path(out) / "tokens.png"), *(str(folder / f"{name}.png") for name in SETTINGS))
        plot(measured, Path(out) / "tokens_measured.png")
    blocks = range(len(next(iter(measured.values()))[MEASURES[0]]))
    for measure in MEASURES:
        print(f"{measure}:")
        print(f"| tokens | {' | '.join(f'block {b}' for b in blocks)} |")
        print("| --- |" + " --- |" * len(blocks))
        for name, values in measured.items():
            print(f"| {name} | {' | '.join(f'{v:.3f}' for v in values[measure])} |")


if __name__ == "__main__":
    fire.Fire(main)
