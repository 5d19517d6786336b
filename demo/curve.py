"""Plots the training of the small model: loss, and share of right images by kind, over the hours.

python -m demo.curve --out docs/training.png
"""

from __future__ import annotations

import json
from pathlib import Path

from demo.command_line import run
from demo.flow import HISTORY

LOG = Path(__file__).parent / HISTORY
SHOWN = ("position", "counting", "colour attribution", "relations", "three", "sentences")  # kinds of `demo.watch`
FIRST_LOSS = 500  # step from which losses are shown: earlier ones would stretch the axis


def read(path: Path = LOG) -> tuple[list[dict], list[dict]]:
    """The log's lines with losses and those with scores."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if "loss" in line and line["step"] >= FIRST_LOSS]
    return losses, [line for line in lines if line.get("score")]


def main(out: str = "docs/training.png", log: str = str(LOG)) -> None:
    """Writes the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, scores = read(Path(log))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    hours = [line["minutes"] / 60 for line in losses]
    left.plot(hours, [line["loss"] for line in losses], linewidth=0.8)
    left.set(xlabel="hours on two CPU cores", ylabel="flow loss", title="Loss (lower is better)")
    for kind in SHOWN:
        own = [(line["minutes"] / 60, line["score"][kind]) for line in scores if kind in line["score"]]
        right.plot(*zip(*own, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
    right.set(xlabel="hours on two CPU cores", ylabel="share of right images", ylim=(0, 1.05))
    right.set_title("Score of 4 to 24 fixed prompts each")
    right.legend(fontsize=7, loc="lower right")
    figure.savefig(out, dpi=150)
    print(out)


if __name__ == "__main__":
    run(main, "demo.curve")
