"""`measure`: how similar each block's text tokens are to the origin's, and how much of the prompt they tell."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3 import writing
from sd3.engine import Engine
from sd3.flags import names
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures, residual_settings
from sd3.probe.running import Collector, Labelled, load, read_labelled, run_prompts
from sd3.probe.suggesting import by_block, measures
from sd3.readers import SEED_LIMIT
from sd3.residual import ResidualConfig
from sd3.settings import Flags
from sd3.versions import versions
from sd3_impls import schedule

RIDGE = 1e-2  # regularisation of the linear probes, as a share of the features' mean variance
FOLDS = 5


class Sums:
    """Sums over the tokens of one block at one timestep, and over the origin's. A first guess of the mean is subtracted
    from the features, which changes no result and keeps float32 sums exact enough.
    """

    def __init__(self, width: int):
        self.tokens = 0
        self.cosine = self.norm = 0.0
        self.total = torch.zeros(width)
        self.gram = torch.zeros(width, width)
        self.cross = torch.zeros(width, width)
        self.guess: Tensor | None = None

    def add(self, x: Tensor, origin: Tensor, origin_guess: Tensor | None) -> None:
        """x and origin (n, D): the same tokens here and at the origin."""
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
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the tokens at a block and at the origin, from sums.

    ||X^T Y||^2 / (||X^T X|| ||Y^T Y||), features centred over all tokens.
    """
    mean, origin_mean = (s.total.double() / s.tokens for s in (x, origin))
    cross = x.cross.double() - x.tokens * torch.outer(origin_mean, mean)
    gram = x.gram.double() - x.tokens * torch.outer(mean, mean)
    origin_gram = origin.gram.double() - x.tokens * torch.outer(origin_mean, origin_mean)
    scale = gram.norm() * origin_gram.norm()
    return (cross.norm() ** 2 / scale).item() if scale > 0 else math.nan


def spread(x: Sums) -> float:
    """Root mean squared distance of tokens from their mean."""
    mean = x.total.double() / x.tokens
    return math.sqrt(max((x.gram.double().trace() / x.tokens - mean @ mean).item(), 0.0))


def neighbours(x: Tensor, k: int) -> Tensor:
    """Places (n, k) of the k nearest rows of x (n, D) by the cosine of centred features, the row itself apart."""
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-math.inf).topk(k, dim=-1).indices


def neighbour_overlap(x: Tensor, y: Tensor, k: int) -> float:
    """Mutual k-nearest-neighbour overlap (Huh et al. 2024, arXiv 2405.07987): the mean share of a row's k nearest
    neighbours in x (n, D) that are among its k nearest in y (n, E) too. By chance it is k / (n - 1).
    """
    a, b = neighbours(x, k), neighbours(y, k)
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean().item()


def retrieval(first: Tensor, second: Tensor) -> float:
    """Share of rows of `second` (N, D) whose nearest row of `first` (N, D) is the one of the same place, by the cosine
    of features centred over the prompts. By chance it is 1 / N.
    """
    a, b = (torch.nn.functional.normalize(x - x.mean(0), dim=-1) for x in (first, second))
    return ((b @ a.T).argmax(-1) == torch.arange(len(a))).double().mean().item()


def linear_probe(features: Tensor, classes: Sequence[str], folds: int = FOLDS) -> float:
    """Accuracy of a ridge regression on one-hot classes, on prompts that it was not fitted on (`folds` parts in turn).

    features: (N, R, D), R runs of each prompt, which stay in the same part.
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
    """Sums over all prompts, and a bounded number of prompts and tokens where neighbours are needed."""

    RUNS = 2  # noises of a kept prompt

    def __init__(self, engine: Engine, prompts: Sequence[Labelled], values: Mapping[str, Any], flags: Mapping):
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
        self.picked: dict[int, Tensor] = {}
        self.filled = 0
        self.sums = [[Sums(width) for _ in range(self.depth)] for _ in range(count)]

    def jobs(self) -> list[tuple[int, str, int]]:
        """(number, prompt, seed): all prompts once, then the kept ones again with other noise."""
        seed, count = self.flags.get("seed", 0), len(self.prompts)
        first = [(i, p.prompt, (seed + i) % SEED_LIMIT) for i, p in enumerate(self.prompts)]
        return first + [(i + count, self.prompts[i].prompt, (seed + count + i) % SEED_LIMIT) for i in self.kept]

    def collector(self, numbers: Sequence[int], masks: Sequence[Tensor]) -> Collector:
        """The hook for a batch of jobs."""
        for number, mask in zip(numbers, masks, strict=True):
            if number in self.kept and number not in self.picked:
                room = min(self.each, self.tokens.shape[2] - self.filled, int(mask.sum()))
                places = sorted(self.draw.sample(range(int(mask.sum())), room))
                self.picked[number] = torch.tensor([self.filled, *places])
                self.filled += room
        use = lambda at, states: self.add(self.steps[at.step], numbers, states)  # noqa: E731
        return Collector(masks, lambda at: at.step in self.steps, range(self.depth), use)

    def add(self, m: int, numbers: Sequence[int], states: Mapping[int, Sequence[Tensor]]) -> None:
        """Takes the tokens of a batch at measured timestep m: {block: one (n, D) per picture}."""
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
                if number in self.picked:
                    start, *places = self.picked[number].tolist()
                    self.tokens[m, i, start : start + len(places)] = states[i][row][places].cpu()

    def rows(self) -> list[dict[str, Any]]:
        """One per measured timestep and block."""
        out = []
        total = len(self.sums) * self.depth
        with self.engine.tell.progress(total, "comparing", "block") as update:
            for m in range(len(self.sums)):
                for block in range(self.depth):
                    out.append(self._row(m, block) | self._probes(self.pooled[m, block]))
                    update(1)
        return out

    def _row(self, m: int, block: int) -> dict[str, Any]:
        """The measures of a block at measured timestep m, but for the linear probes."""
        sums, pooled = self.sums[m][block], self.pooled[m, block]
        tokens, origin_tokens = (self.tokens[m, i, : self.filled] for i in (block, self.origin))
        return {
            "step": list(self.steps)[m],
            "sigma": self.sigmas[m],
            "block": block,
            "cosine": sums.cosine / sums.tokens,
            "cka": cka(sums, self.sums[m][self.origin]),
            "neighbours": neighbour_overlap(tokens, origin_tokens, min(self.flags["neighbours"], self.filled - 1)),
            "norm": sums.norm / sums.tokens,
            "spread": spread(sums),
            "retrieval": retrieval(pooled[:, 0], pooled[:, 1]),
        }

    def _probes(self, pooled: Tensor) -> dict[str, float]:
        """Accuracy of a linear probe for each label that enough prompts have; pooled (kept prompts, runs, D)."""
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
        """Names of the labels of kept prompts."""
        return sorted({name for number in self.kept for name in self.prompts[number].labels})

    def record(self) -> dict[str, Any]:
        """All results, for measure.json."""
        flags = self.flags
        return {
            "model": self.engine.model_file.path.name,
            "depth": self.depth,
            "origin": self.origin,
            "prompts": len(self.prompts),
            "kept_prompts": len(self.kept),
            "kept_tokens": self.filled,
            "neighbours": min(flags["neighbours"], self.filled - 1),
            "tokens": self.sums[0][0].tokens,
            "settings": plan_pictures(self.engine, [""], [flags.get("seed", 0)], **self.values).pictures[0].public(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "versions": versions(),
            "chance": self.chance(),
            "rows": self.rows(),
        }

    def chance(self) -> dict[str, float]:
        """Each measure by chance, where the tokens say nothing of the prompt."""
        out = {
            "retrieval": 1 / len(self.kept),
            "neighbours": min(1.0, self.flags["neighbours"] / max(self.filled - 1, 1)),
        }
        for name in self._labels():
            classes = [p.labels[name] for i, p in enumerate(self.prompts) if i in self.kept and name in p.labels]
            out[f"probe {name}"] = max(classes.count(c) for c in set(classes)) / len(classes)
        return out


def measure(flags: Mapping[str, Any], show: Callable[[str], Any]) -> Path:
    """Runs `measure`; returns the folder with the results. show: takes the lines of the result."""
    prompts = read_labelled(flags["prompts"])
    if len(prompts) < 2:
        raise Mistake("prompts", flags["prompts"], "needs at least two different prompts")
    writing.check_writable(flags["out"], "out")
    engine, values = load(flags)
    residual_flags = Flags(**{name: flags[name] for name in names(also="measure") if name in flags})
    residual = ResidualConfig.from_flags(residual_flags.residual(), residual_flags.residual_config)
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
        engine.tell.say("note: no plots: they need matplotlib (pip install matplotlib)")
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
    """Markdown: a row per block, means over the timesteps, and what chance would give."""
    names = measures(record)
    lines = ["| block | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    columns = [by_block(record, name) for name in names]
    for block in range(record["depth"]):
        lines.append(f"| {block} | " + " | ".join(f"{column[block]:.3g}" for column in columns) + " |")
    chance = [f"{record['chance'][n]:.3g}" if n in record["chance"] else "" for n in names]
    return "\n".join([*lines, "| chance | " + " | ".join(chance) + " |"])


def plot(record: Mapping[str, Any], path: Path) -> None:
    """One panel per measure, blocks along x, a line per timestep. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = measures(record)
    columns = min(4, len(names))
    figure, axes = pyplot.subplots(
        -(-len(names) // columns), columns, figsize=(3.2 * columns, 2.5 * -(-len(names) // columns)), squeeze=False
    )
    sigmas = sorted({row["sigma"] for row in record["rows"]}, reverse=True)
    colours = pyplot.get_cmap("viridis")
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for name, axis in zip(names, axes.flat, strict=False):
        for n, sigma in enumerate(sigmas):
            rows = [row for row in record["rows"] if row["sigma"] == sigma]
            colour = colours(n / max(len(sigmas) - 1, 1) * 0.9)
            axis.plot(
                [r["block"] for r in rows], [r[name] for r in rows], color=colour, label=f"$\\sigma$ = {sigma:.2f}"
            )
        if name in record["chance"]:
            axis.axhline(record["chance"][name], color="gray", linestyle=":", linewidth=1)
        axis.axvline(record["origin"], color="gray", linewidth=0.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("tokens entering block", fontsize=8)
        axis.tick_params(labelsize=8)
        if name in ("norm", "spread"):
            axis.set_yscale("log")
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{record['model']}: text tokens against those entering block {record['origin']} (dotted: chance)")
    figure.tight_layout()
    writing.atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=100))
    pyplot.close(figure)
