"""`measure`: how similar each block's text tokens are to the origin's, and how much of the prompt they retain."""

from __future__ import annotations

import csv
import io
import math
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3 import writing
from sd3.engine import Engine
from sd3.flags import names
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures, residual_of, residual_settings
from sd3.probe.running import Collector, LabelledPrompt, load, read_labelled, run_prompts
from sd3.probe.suggesting import by_block, measures
from sd3.readers import SEED_LIMIT
from sd3.settings import Flags
from sd3.versions import versions
from sd3_impls import schedule

RIDGE = 1e-2  # regularisation of the linear probes, as a share of the features' mean variance
FOLDS = 5
PLOT_COLUMNS = 4


class Sums:
    """Sums over the tokens of one block at one timestep, and products with those of the origin. Subtracts a first guess
    of the mean from the features: no result changes, and float32 is exact enough.
    """

    def __init__(self, width: int):
        self.tokens = 0
        self.cosine = self.norm = 0.0
        self.total = torch.zeros(width)
        self.gram = torch.zeros(width, width)
        self.cross = torch.zeros(width, width)
        self.guess: Tensor | None = None

    def add(self, x: Tensor, origin: Tensor, origin_guess: Tensor | None) -> None:
        """x and origin: (n, D), the same tokens at this block and at the origin."""
        if self.guess is None:
            self.guess = x.mean(0)
        z = x - self.guess
        o = origin - (self.guess if origin_guess is None else origin_guess)
        self.tokens += len(x)
        self.cosine += torch.nn.functional.cosine_similarity(x, origin, dim=-1).double().sum().item()
        self.norm += x.norm(dim=-1).double().sum().item()
        self.total += z.sum(0).cpu()
        self.gram += (z.T @ z).cpu()
        self.cross += (o.T @ z).cpu()


def cka(x: Sums, origin: Sums) -> float:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) between the tokens at a block and at the origin, from sums.

    ||X^T Y||^2 / (||X^T X|| ||Y^T Y||), features centred over all tokens.
    """
    mean, origin_mean = (s.total.double() / s.tokens for s in (x, origin))
    cross = x.cross.double() - x.tokens * torch.outer(origin_mean, mean)
    gram = x.gram.double() - x.tokens * torch.outer(mean, mean)
    origin_gram = origin.gram.double() - x.tokens * torch.outer(origin_mean, origin_mean)
    scale = gram.norm() * origin_gram.norm()
    return (cross.norm() ** 2 / scale).item() if scale > 0 else math.nan


def spread(x: Sums) -> float:
    """Root mean square distance of tokens from their mean."""
    mean = x.total.double() / x.tokens
    return math.sqrt(max((x.gram.double().trace() / x.tokens - mean @ mean).item(), 0.0))


def neighbours(x: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k nearest other rows of x (n, D), by the cosine of centred features."""
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-math.inf).topk(k, dim=-1).indices


def neighbour_overlap(x: Tensor, y: Tensor, k: int) -> float:
    """Mutual k-nearest-neighbour overlap (Huh et al. 2024, arXiv 2405.07987): the mean share of a row's k nearest
    neighbours in x (n, D) that are also among its k nearest in y (n, E). Chance is k / (n - 1).
    """
    a, b = neighbours(x, k), neighbours(y, k)
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean().item()


def retrieval(first: Tensor, second: Tensor) -> float:
    """Share of rows of `second` (N, D) whose nearest row of `first` (N, D) has the same index, by the cosine of
    features centred over the prompts. Chance is 1 / N.
    """
    a, b = (torch.nn.functional.normalize(x - x.mean(0), dim=-1) for x in (first, second))
    return ((b @ a.T).argmax(-1) == torch.arange(len(a))).double().mean().item()


def linear_probe(features: Tensor, classes: Sequence[str], folds: int = FOLDS) -> float:
    """Accuracy of a ridge regression on one-hot classes, by cross-validation over prompts in `folds` parts.

    features: (N, R, D), with R runs of each prompt, which stay in the same part.
    """
    names = sorted(set(classes))
    wanted = torch.tensor([names.index(c) for c in classes])
    count, runs, _ = features.shape
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    hits = 0
    for part in range(min(folds, count)):
        test = torch.zeros(count, dtype=torch.bool)
        test[order[part::folds]] = True
        x = features[~test].flatten(0, 1).double()  # (n, D)
        mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - mean) / deviation
        y = torch.nn.functional.one_hot(wanted[~test].repeat_interleave(runs), len(names)).double()
        centre = y.mean(0)
        kernel = x @ x.T if len(x) < x.shape[1] else x.T @ x
        kernel.diagonal().add_(RIDGE * len(x))
        solved = torch.linalg.solve(kernel, (y - centre) if len(x) < x.shape[1] else x.T @ (y - centre))
        weights = x.T @ solved if len(x) < x.shape[1] else solved  # (D, classes)
        guess = (((features[test].flatten(0, 1).double() - mean) / deviation) @ weights + centre).argmax(-1)
        hits += (guess == wanted[test].repeat_interleave(runs)).sum().item()
    return hits / (count * runs)


class Measurement:
    """Sums over all prompts, and a bounded sample of prompts and tokens for the measures that need neighbours."""

    RUNS = 2  # of each kept prompt, with different noise

    def __init__(self, engine: Engine, prompts: Sequence[LabelledPrompt], values: Mapping[str, Any], flags: Mapping):
        self.engine, self.prompts, self.values, self.flags = engine, prompts, values, flags
        self.depth, width = engine.config.depth, engine.config.width
        self.origin = flags["origin"]
        if self.origin >= self.depth:
            raise Mistake("origin", self.origin, f"this model has {self.depth} joint blocks: 0 to {self.depth - 1}")
        sigmas = schedule(values["scheduler"], values["steps"], values["shift"]).tolist()
        steps = len(sigmas) - 1
        count = min(flags["timesteps"], steps)
        places = torch.linspace(0, steps - 1, count).round().int().tolist() if count > 1 else [0]
        self.steps = {step: m for m, step in enumerate(places)}
        self.sigmas = [sigmas[step] for step in places]
        draw = random.Random(flags.get("seed", 0))
        kept = sorted(draw.sample(range(len(prompts)), min(len(prompts), flags["kept_prompts"])))
        self.kept = {number: k for k, number in enumerate(kept)}
        self.draw = draw
        self.each = max(1, flags["kept_tokens"] // len(kept))
        self.pooled = torch.zeros(count, self.depth, len(kept), self.RUNS, width)
        self.tokens = torch.zeros(count, self.depth, min(flags["kept_tokens"], self.each * len(kept)), width)
        self.token_places: dict[int, Tensor] = {}
        self.token_count = 0
        self.sums = [[Sums(width) for _ in range(self.depth)] for _ in range(count)]

    def jobs(self) -> list[tuple[int, str, int]]:
        """(number, prompt, seed): all prompts once, then the kept prompts again with different noise."""
        seed, count = self.flags.get("seed", 0), len(self.prompts)
        first = [(i, p.prompt, (seed + i) % SEED_LIMIT) for i, p in enumerate(self.prompts)]
        return first + [(i + count, self.prompts[i].prompt, (seed + count + i) % SEED_LIMIT) for i in self.kept]

    def collector(self, numbers: Sequence[int], masks: Sequence[Tensor]) -> Collector:
        """The hook for a batch of jobs."""
        for number, mask in zip(numbers, masks, strict=True):
            if number in self.kept and number not in self.token_places:
                room = min(self.each, self.tokens.shape[2] - self.token_count, int(mask.sum()))
                places = sorted(self.draw.sample(range(int(mask.sum())), room))
                self.token_places[number] = torch.tensor([self.token_count, *places])
                self.token_count += room
        use = lambda at, states: self.add(self.steps[at.step], numbers, states)  # noqa: E731
        return Collector(masks, lambda at: at.step in self.steps, range(self.depth), use)

    def add(self, m: int, numbers: Sequence[int], states: Mapping[int, Sequence[Tensor]]) -> None:
        """Adds the tokens of a batch at measured timestep m: {block: one (n, D) per image}."""
        count = len(self.prompts)
        first = [row for row, number in enumerate(numbers) if number < count]
        origin = self.sums[m][self.origin]
        for i in (self.origin, *(i for i in range(self.depth) if i != self.origin)):
            if first:
                x, o = (torch.cat([states[layer][row] for row in first]) for layer in (i, self.origin))
                self.sums[m][i].add(x, o, None if i == self.origin else origin.guess)
            for row, number in enumerate(numbers):
                if number % count in self.kept:
                    k, run = self.kept[number % count], number // count
                    self.pooled[m, i, k, run] = states[i][row].mean(0).cpu()
                if number in self.token_places:
                    start, *places = self.token_places[number].tolist()
                    self.tokens[m, i, start : start + len(places)] = states[i][row][places].cpu()

    def rows(self) -> list[dict[str, Any]]:
        """One row per measured timestep and block."""
        out = []
        total = len(self.sums) * self.depth
        with self.engine.tell.progress(total, "comparing", "block") as update:
            for m in range(len(self.sums)):
                for block in range(self.depth):
                    out.append(self._row(m, block) | self._probes(self.pooled[m, block]))
                    update(1)
        return out

    def _row(self, m: int, block: int) -> dict[str, Any]:
        """The measures of a block at measured timestep m, without the linear probes."""
        sums, pooled = self.sums[m][block], self.pooled[m, block]
        tokens, origin_tokens = (self.tokens[m, i, : self.token_count] for i in (block, self.origin))
        return {
            "step": list(self.steps)[m],
            "sigma": self.sigmas[m],
            "block": block,
            "cosine": sums.cosine / sums.tokens,
            "cka": cka(sums, self.sums[m][self.origin]),
            "neighbours": neighbour_overlap(tokens, origin_tokens, min(self.flags["neighbours"], self.token_count - 1)),
            "norm": sums.norm / sums.tokens,
            "spread": spread(sums),
            "retrieval": retrieval(pooled[:, 0], pooled[:, 1]),
        }

    def _probes(self, pooled: Tensor) -> dict[str, float]:
        """Accuracy of a linear probe for each label that enough prompts have. pooled: (kept prompts, runs, D)."""
        out = {}
        for name in self._labels():
            labelled = [
                (k, self.prompts[i].labels[name]) for i, k in self.kept.items() if name in self.prompts[i].labels
            ]
            if len(labelled) >= 2 * FOLDS:
                places, classes = zip(*labelled, strict=True)
                out[f"probe {name}"] = linear_probe(pooled[list(places)], classes)
        return out

    def _labels(self) -> list[str]:
        """Names of the labels of the kept prompts."""
        return sorted({name for number in self.kept for name in self.prompts[number].labels})

    def record(self) -> dict[str, Any]:
        """The contents of measure.json."""
        flags = self.flags
        return {
            "model": self.engine.model_file.path.name,
            "depth": self.depth,
            "origin": self.origin,
            "prompts": len(self.prompts),
            "kept_prompts": len(self.kept),
            "kept_tokens": self.token_count,
            "neighbours": min(flags["neighbours"], self.token_count - 1),
            "tokens": self.sums[0][0].tokens,
            "settings": plan_pictures(self.engine, [""], [flags.get("seed", 0)], **self.values).pictures[0].public(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "versions": versions(),
            "chance": self.chance(),
            "rows": self.rows(),
        }

    def chance(self) -> dict[str, float]:
        """The value of each measure for tokens that contain no information about the prompt."""
        out = {
            "retrieval": 1 / len(self.kept),
            "neighbours": min(1.0, self.flags["neighbours"] / max(self.token_count - 1, 1)),
        }
        for name in self._labels():
            classes = [p.labels[name] for i, p in enumerate(self.prompts) if i in self.kept and name in p.labels]
            out[f"probe {name}"] = max(classes.count(c) for c in set(classes)) / len(classes)
        return out


def measure(flags: Mapping[str, Any], show: Callable[[str], Any]) -> Path:
    """Runs `measure`; returns the folder of the results. show: receives the lines of the result."""
    prompts = read_labelled(flags["prompts"])
    if len(prompts) < 2:
        raise Mistake("prompts", flags["prompts"], "needs at least two different prompts")
    writing.check_writable(flags["out"], "out")
    engine, values = load(flags)
    residual_flags = Flags(**{name: flags[name] for name in names(also="measure") if name in flags})
    residual = residual_of(residual_flags, engine)
    values = values | residual_settings(residual)
    plan = plan_pictures(engine, [prompts[0].prompt], [0], **values)
    engine.check_settings(plan.pictures[0])
    for note in plan.notes:
        engine.tell.note(note)
    measurement = Measurement(engine, prompts, values, flags)
    run_prompts(engine, measurement.jobs(), values, measurement.collector, "measuring")
    record = measurement.record()
    folder = Path(flags["out"])
    write_results(record, folder)
    show(summary(record))
    try:
        plot(record, folder / "measure.png")
    except ImportError:
        engine.tell.say("note: no plots; they need matplotlib: pip install matplotlib")
    show(f"{folder}: " + ", ".join(sorted(p.name for p in folder.glob("measure.*"))))
    return folder


def write_results(record: Mapping[str, Any], folder: Path) -> None:
    """Writes measure.json and measure.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    writing.write_json(folder / "measure.json", record)
    text = io.StringIO()
    table = csv.DictWriter(text, list(record["rows"][0]))
    table.writeheader()
    table.writerows(record["rows"])
    writing.atomic_write(folder / "measure.csv", lambda f: f.write(text.getvalue().encode()))


def summary(record: Mapping[str, Any]) -> str:
    """Markdown: a row per block with means over the timesteps, and a row for chance."""
    names = measures(record)
    lines = ["| block | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    columns = [by_block(record, name) for name in names]
    for block in range(record["depth"]):
        lines.append(f"| {block} | " + " | ".join(f"{column[block]:.3g}" for column in columns) + " |")
    chance = [f"{record['chance'][n]:.3g}" if n in record["chance"] else "" for n in names]
    return "\n".join([*lines, "| chance | " + " | ".join(chance) + " |"])


# Panels of the plot: the label of the y axis, and a sentence that says which values are good.
PANELS = {
    "cosine": ("cosine to the origin's token", "1: the token still points where the origin's did."),
    "cka": ("linear CKA with the origin", "1: the tokens have the same geometry as at the origin."),
    "neighbours": ("share of neighbours kept", "1: each token keeps its nearest neighbours."),
    "norm": ("mean length of a token", "The longer a token, the less an added copy of the origin counts."),
    "spread": ("distance from the mean token", "High is good: tokens that are alike tell little apart."),
    "retrieval": ("share of prompts recognised", "High is good: the tokens still tell prompts apart."),
}
LOG_SCALE = ("norm", "spread")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """One panel per measure, blocks along x, a line per timestep. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = measures(record)
    columns = min(PLOT_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    style = {"font.size": 15, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        size = (4.9 * columns, 4.2 * rows + 1.3)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(shown) :]:
            axis.remove()
        for name, axis in zip(shown, axes.flat, strict=False):
            _plot_panel(axis, record, name, pyplot.get_cmap("viridis"))
        lines, labels = axes.flat[0].get_legend_handles_labels()
        lines.append(pyplot.Line2D([], [], color="gray", linestyle=":", linewidth=2))
        figure.legend(lines, [*labels, "chance"], loc="outside lower center", ncols=len(labels) + 1, frameon=False)
        title = f"{record['model']}: the text tokens that enter each block, compared with block {record['origin']}"
        figure.suptitle(title, fontsize=20)
        writing.atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=100))
        pyplot.close(figure)


def _plot_panel(axis: Any, record: Mapping[str, Any], name: str, colours: Callable[[float], Any]) -> None:
    """One measure: a line per timestep, dotted chance, and what is good as its title."""
    sigmas = sorted({row["sigma"] for row in record["rows"]}, reverse=True)
    label = name.removeprefix("probe ")
    unit, good = PANELS.get(name, (f"accuracy for {label}", f"High is good: a linear probe reads the {label}."))
    for n, sigma in enumerate(sigmas):
        rows = [row for row in record["rows"] if row["sigma"] == sigma]
        colour = colours(n / max(len(sigmas) - 1, 1) * 0.85)
        x, y = [r["block"] for r in rows], [r[name] for r in rows]
        axis.plot(x, y, color=colour, linewidth=2.5, label=f"$\\sigma$ = {sigma:.2f}")
    if name in record["chance"]:
        axis.axhline(record["chance"][name], color="gray", linestyle=":", linewidth=2)
    axis.axvline(record["origin"], color="gray", linewidth=0.8)
    axis.set_title(name, fontsize=17, fontweight="bold", loc="left", pad=42)  # points: above the two lines below
    below = {"xytext": (0, 38), "textcoords": "offset points", "va": "top", "fontsize": 13, "color": "#444444"}
    axis.annotate(textwrap.fill(good, 44), (0, 1), xycoords="axes fraction", **below)
    axis.set_xlabel("block that the tokens enter")
    axis.set_ylabel(unit)
    axis.grid(axis="y", color="#dddddd")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if name in LOG_SCALE:
        axis.set_yscale("log")
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.minorticks_off()
    else:
        axis.set_ylim(min(0.0, *(row[name] for row in record["rows"])), 1.03)
