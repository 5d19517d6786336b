"""Plots what each block's text tokens still know, for several models: docs/forgetting.png.

    python benchmarks/forgetting.py docs/forgetting.png "8 blocks=old/measure.csv" "16 blocks=measured/measure.csv"

A measure.csv is written by `sd3_probe.py measure`. Needs matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stream_tokens import means

MEASURES = ("retrieval", "probe relation", "probe count", "probe colour", "probe shape")


def plot(out: Path, measured: dict[str, Path]) -> None:
    """Writes a plot per measure, with a line per model over the share of its depth; means over the timesteps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(12, 2.9), layout="constrained", sharey=True)
    for name, path in measured.items():
        values = means(path, MEASURES)
        for axis, measure in zip(axes, MEASURES, strict=True):
            last = len(values[measure]) - 1
            depth = [block / last for block in range(last + 1)]
            axis.plot(depth, values[measure], label=name, marker="o", markersize=3, linewidth=1.2)
            axis.set(title=measure, xlabel="block / last block", ylim=(0, 1.03))
    axes[0].set_ylabel("share right (higher: more is known)")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), {name: Path(path) for name, path in (word.split("=", 1) for word in sys.argv[2:])})
