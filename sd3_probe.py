"""What the text stream of a model still knows at each block, and the rotations of `--residual_mode aligned`.

python sd3_probe.py measure --prompts prompts.txt --out measured
python sd3_probe.py suggest --measurement measured/measure.json
python sd3_probe.py calibrate --prompts prompts.txt --origin 1 --targets 2-22 --out rotations.safetensors
"""

from __future__ import annotations

import sys

import shell_streams

if __name__ == "__main__":
    shell_streams.begin()

import bisect
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreign import check_file, parse_json, reading
from settings import (
    READERS,
    SEED_LIMIT,
    display,
    nearest,
    range_int,
    read_arguments,
    read_bool,
    read_float,
    read_jsonl,
    read_layers,
    read_path,
    read_prompts,
)

if TYPE_CHECKING:
    from torch import Tensor

    from residual import Pass
    from sd3_infer import SD3Inferencer

GROUP = 64  # prompts whose text is held encoded at once
LONGEST_OUT = 200  # bytes of a rotation file's name; its state and what is half written have longer ones
SAVE_EVERY = 30.0  # seconds between writes of a calibration's state
RIDGE = 1e-2  # regularisation of the linear probes, as a share of the features' mean variance
FOLDS = 5

# ---- flags ---------------------------------------------------------------------------------------

_ENGINE = (
    "model", "vae", "model_folder", "clip_l", "clip_g", "t5xxl", "text_encoder_device", "device", "dtype", "no_t5",
    "embed_cache", "weights", "offload",
)  # fmt: skip
_RUN = ("steps", "cfg", "shift", "sampler", "width", "height", "negative_prompt", "batch_size", "seed")
_SHARED = {name: READERS[name] for name in (*_ENGINE, *_RUN)} | {"prompts": READERS["model"]}


def _fraction(flag: str, value: Any) -> float:
    return read_float(flag, value, 0.0, 1.0)


COMMANDS: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "measure": _SHARED
    | {name: reader for name, reader in READERS.items() if name.startswith("residual_")}
    | {
        "out": READERS["model"],
        "origin": range_int(0, 10_000),
        "timesteps": range_int(1, 1000),
        "kept_prompts": range_int(2, 100_000),
        "kept_tokens": range_int(16, 1_000_000),
        "neighbours": range_int(1, 1000),
    },
    "suggest": {"measurement": READERS["model"], "tolerance": _fraction},
    "calibrate": _SHARED
    | {
        "out": READERS["model"],
        "origin": range_int(0, 10_000),
        "targets": read_layers,
        "buckets": range_int(1, 100),
        "centre": read_bool,
        "check_prompts": READERS["model"],
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "measure": {
        "origin": 0,
        "timesteps": 4,
        "kept_prompts": 256,
        "kept_tokens": 512,
        "neighbours": 10,
        "out": "measured",
    },
    "suggest": {"tolerance": 0.05},
    "calibrate": {"origin": 0, "buckets": 1, "centre": False},
}
NEEDED = {"measure": ("prompts",), "suggest": ("measurement",), "calibrate": ("prompts", "targets", "out")}

HELP = """usage: sd3_probe.py measure | suggest | calibrate [--flag value ...]

measure: runs prompts and reports, per block and timestep, what the text tokens entering it still have of the origin's
and still know of the prompt; writes measure.json, measure.csv and, with matplotlib, measure.png
  --prompts               a .txt file with a prompt a line, or .jsonl with {"prompt": ..., "labels": {"shape": ...}} a
                          line: a linear probe is then fitted for every label
  --out                   folder for the results (measured)
  --origin                block that all others are compared with (0)
  --timesteps             how many of the steps are measured (4)
  --kept_prompts          prompts kept for retrieval and linear probes; these run twice, with different noise (256)
  --kept_tokens           tokens kept for the overlap of nearest neighbours (512)
  --neighbours            how many nearest neighbours are compared (10)
  --residual_...          measures with residual text streaming, flags as in sd3_infer.py

suggest: proposes an origin and targets from a measurement, and says why
  --measurement           measure.json
  --tolerance             how much of what is known counts as nothing lost (0.05)

calibrate: one rotation per target that turns the origin's standardised tokens to the target's, from the text tokens met
while sampling (orthogonal Procrustes); run again after a stop, it goes on
  --prompts               a .txt or .jsonl file
  --origin, --targets     layers, such as 1 and 2-22 (origin 0)
  --out                   the .safetensors file for --residual_rotations
  --buckets               parts of the noise range with rotations of their own (1)
  --centre                subtracts the mean over tokens first
  --check_prompts         other prompts, on which the rotations are checked

all that run a model: --model --vae --model_folder --clip_l --clip_g --t5xxl --text_encoder_device --device --dtype
--no_t5 --embed_cache --weights --offload --steps --cfg --shift
--sampler --width --height --negative_prompt --batch_size --seed, as in sd3_infer.py (python sd3_infer.py --help)"""


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Lets an error about residual flags name those of `calibrate`, which were typed."""
    try:
        yield
    except ValueError as error:
        told = str(error).replace("residual_origin_layer", "origin").replace("residual_target_layers", "targets")
        raise ValueError(told) from None


def read_flags(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and its flags, read and checked; raises ValueError."""
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        told = display(command) if command else "no command"
        raise ValueError(f"{told}: must be {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    readers = COMMANDS[command]
    raw = read_arguments(arguments[1:], readers, bare=None)
    flags = DEFAULTS[command] | {name: readers[name](name, value) for name, value in raw.items()}
    for name in NEEDED[command]:
        if flags.get(name) in (None, ()):
            raise ValueError(f"--{name}: is needed by {command}")
    if command == "calibrate":
        from settings import check_residual

        with own_names():
            check_residual(flags["origin"], flags["targets"], ())
        if not flags["out"].endswith(".safetensors"):
            raise ValueError(f"--out {flags['out']}: must end in .safetensors")
    return command, flags


if __name__ == "__main__" and not {"--help", "-h"} & set(sys.argv[1:]):
    try:
        read_flags(sys.argv[1:])  # a mistyped flag need not wait for torch
    except (ValueError, OSError) as early:
        with shell_streams.bearing():
            print(f"error: {' '.join(str(early).split())}", file=sys.stderr)
        sys.exit(2)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

import embed_cache  # noqa: E402
import saving  # noqa: E402
from residual import (  # noqa: E402
    TIMESTEPS,
    ResidualConfig,
    orthogonality,
    standardise,
)
from sd3_impls import flow_schedule  # noqa: E402
from sd3_infer import USER_ERRORS, SD3Inferencer, guarded, load_for, residual_settings  # noqa: E402
from settings import Flags, resolve  # noqa: E402

# ---- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A prompt and what a linear probe should read off its tokens."""

    prompt: str
    labels: Mapping[str, str] = field(default_factory=dict)


def read_labelled(path: str, flag: str = "prompts") -> list[Labelled]:
    """Prompts of a .txt or .jsonl file, each once. Raises FileNotFoundError or ValueError with the line's number."""
    path = read_path(flag, path)
    if not path.lower().endswith(".jsonl"):
        if not path.lower().endswith(".txt"):
            raise ValueError(f"--{flag} {path}: must be a .txt or .jsonl file")
        return [Labelled(p) for p in dict.fromkeys(read_prompts(path, flag)[0])]
    form = '{"prompt": "...", "labels": {"shape": "star"}}'
    out: dict[str, Labelled] = {}
    for row in read_jsonl(flag, path, _is_labelled, form):
        labels = {str(k): str(v) for k, v in (row.get("labels") or {}).items() if v is not None}
        out.setdefault(row["prompt"], Labelled(row["prompt"], labels))
    return list(out.values())


def _is_labelled(row: dict[str, Any]) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row.get("labels") or {}, dict)


# ---- running prompts -----------------------------------------------------------------------------


def load(flags: Mapping[str, Any]) -> tuple[SD3Inferencer, dict[str, Any]]:
    """The engine for some flags, and the settings that its pictures share."""
    given = {name: flags[name] for name in (*_ENGINE, *_RUN) if name in flags}
    read = Flags(**given)
    engine = load_for(read)
    values, _ = resolve(read, engine.model_file.metadata)
    return engine, values | {"negative_prompt": read.negative_prompt, "batch_size": read.batch_size}


class Collector:
    """A hook that hands over the text tokens of a pass: conditional rows, without padding."""

    def __init__(
        self,
        masks: Sequence[Tensor],
        wanted: Callable[[Pass], bool],
        layers: Sequence[int],
        use: Callable[[Pass, dict[int, list[Tensor]]], None],
    ):
        """masks: (T,) of each picture; wanted: whether a pass counts; layers: blocks whose incoming tokens are handed
        to use(pass, {layer: one (n, D) float32 per picture}) once the last of them is reached.
        """
        self.masks, self.wanted, self.use = masks, wanted, use
        self.layers, self.last = frozenset(layers), max(layers)

    def begin(self, at: Pass) -> Collector | None:
        """Gets ready for a pass, or sits it out: skip-layer passes, and steps that are not wanted."""
        self.at, self.states = at, {}
        return None if at.skip_layers or not self.wanted(at) else self

    def __call__(self, i: int, context: Tensor) -> Tensor:
        """context (B, T, D) enters block i, and stays as it is."""
        if i in self.layers:
            rows = context[self.at.cond]
            masks = [m.to(rows.device) for m in self.masks]
            self.states[i] = [row[mask].float() for row, mask in zip(rows, masks, strict=True)]
            if i == self.last:
                self.use(self.at, self.states)
        return context


def run_prompts(
    engine: SD3Inferencer,
    jobs: Sequence[tuple[int, str, int]],
    values: Mapping[str, Any],
    collect: Callable[[Sequence[int], Sequence[Tensor]], Collector],
    what: str,
    done: Callable[[int], None] = lambda count: None,
    before: int = 0,
) -> None:
    """Samples every (number, prompt, seed) in order, with a hook that `collect(numbers, masks)` gives for each batch.

    `done(count)` after each batch. Text is encoded for `GROUP` prompts at a time and then dropped. before: how many
    jobs at the start were done by an earlier run; batches are then those that one run would have had.
    """
    with tqdm(total=len(jobs), initial=before, desc=what, unit="prompt", disable=engine.quiet) as bar:
        count = before
        for start in range(before - before % GROUP, len(jobs), GROUP):
            group = jobs[max(start, before) : start + GROUP]
            plan = engine.plan([p for _, p, _ in group], [seed for _, _, seed in group], **values)
            lengths = [engine.pair_length(s.prompt, s.negative_prompt) for s in plan]
            wanted = [
                pair for s, n in zip(plan, lengths, strict=True) for pair in ((s.prompt, n), (s.negative_prompt, n))
            ]
            engine.encode(wanted if values["cfg"] != 1 else wanted[::2])
            for batch in engine.batches(plan):
                places, settings = zip(*batch, strict=True)
                masks = [engine.text_mask(s.prompt, lengths[place]) for place, s in batch]
                collector = collect([group[place][0] for place in places], masks)
                engine.sample(settings, what=what, hooks=[collector])
                engine.files.check()  # what is measured is of the files that were opened
                count += len(batch)
                bar.update(len(batch))
                done(count)
            engine.forget_text()


# ---- measure -------------------------------------------------------------------------------------


class Sums:
    """What is added up for one block at one timestep, against the origin. Features are taken about a first guess of
    their mean, which changes nothing in the end and keeps float32 sums exact enough.
    """

    def __init__(self, width: int):
        self.tokens = 0
        self.cosine = self.norm = 0.0
        self.total = torch.zeros(width)
        self.own = torch.zeros(width, width)
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
        self.own += (z.T @ z).cpu()
        self.cross += (o.T @ z).cpu()


def cka(x: Sums, origin: Sums) -> float:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the tokens at a block and at the origin, from sums.

    ||X^T Y||^2 / (||X^T X|| ||Y^T Y||), features centred over all tokens.
    """
    mean, origin_mean = (s.total.double() / s.tokens for s in (x, origin))
    cross = x.cross.double() - x.tokens * torch.outer(origin_mean, mean)
    own = x.own.double() - x.tokens * torch.outer(mean, mean)
    origin_own = origin.own.double() - x.tokens * torch.outer(origin_mean, origin_mean)
    scale = own.norm() * origin_own.norm()
    return (cross.norm() ** 2 / scale).item() if scale > 0 else math.nan


def spread(x: Sums) -> float:
    """Root mean squared distance of tokens from their mean."""
    mean = x.total.double() / x.tokens
    return math.sqrt(max((x.own.double().trace() / x.tokens - mean @ mean).item(), 0.0))


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

    def __init__(self, engine: SD3Inferencer, prompts: Sequence[Labelled], values: Mapping[str, Any], flags: Mapping):
        self.engine, self.prompts, self.values, self.flags = engine, prompts, values, flags
        self.depth, width = engine.config.depth, engine.config.width
        self.origin = flags["origin"]
        if self.origin >= self.depth:
            raise ValueError(f"--origin {self.origin}: this model has {self.depth} joint blocks: 0 to {self.depth - 1}")
        sigmas = flow_schedule(values["steps"], values["shift"]).tolist()
        count = min(flags["timesteps"], values["steps"])
        places = torch.linspace(0, values["steps"] - 1, count).round().int().tolist() if count > 1 else [0]
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
        k = min(self.flags["neighbours"], self.filled - 1)
        names = sorted({name for number in self.kept for name in self.prompts[number].labels})
        total = len(self.sums) * self.depth
        out = []
        with tqdm(total=total, desc="comparing", unit="block", disable=self.engine.quiet, leave=False) as bar:
            for m, step in enumerate(self.steps):
                origin_tokens = self.tokens[m, self.origin, : self.filled]
                for i in range(self.depth):
                    x, pooled = self.sums[m][i], self.pooled[m, i]
                    row = {
                        "step": step,
                        "sigma": self.sigmas[m],
                        "block": i,
                        "cosine": x.cosine / x.tokens,
                        "cka": cka(x, self.sums[m][self.origin]),
                        "neighbours": neighbour_overlap(self.tokens[m, i, : self.filled], origin_tokens, k),
                        "norm": x.norm / x.tokens,
                        "spread": spread(x),
                        "retrieval": retrieval(pooled[:, 0], pooled[:, 1]),
                    }
                    for name in names:
                        labelled = [
                            (n, self.prompts[j].labels[name])
                            for j, n in self.kept.items()
                            if name in self.prompts[j].labels
                        ]
                        if len(labelled) >= 2 * FOLDS:
                            places, classes = zip(*labelled, strict=True)
                            row[f"probe {name}"] = linear_probe(pooled[list(places)], classes)
                    out.append(row)
                    bar.update()
        return out

    def chance(self) -> dict[str, float]:
        """What each measure would be if nothing was known."""
        out = {
            "retrieval": 1 / len(self.kept),
            "neighbours": min(1.0, self.flags["neighbours"] / max(self.filled - 1, 1)),
        }
        for name in sorted({name for number in self.kept for name in self.prompts[number].labels}):
            classes = [p.labels[name] for i, p in enumerate(self.prompts) if i in self.kept and name in p.labels]
            out[f"probe {name}"] = max(classes.count(c) for c in set(classes)) / len(classes)
        return out


def measure(flags: Mapping[str, Any]) -> Path:
    """Runs `measure`; returns the folder with the results."""
    prompts = read_labelled(flags["prompts"])
    if len(prompts) < 2:
        raise ValueError(f"--prompts {flags['prompts']}: needs at least two different prompts")
    saving.check_writable(flags["out"], "out")
    engine, values = load(flags)
    residual_flags = Flags(**{k: v for k, v in flags.items() if k.startswith("residual_")})
    residual = ResidualConfig.from_flags(residual_flags.residual(), residual_flags.residual_config)
    values = values | residual_settings(residual)
    engine.check_settings(engine.plan([prompts[0].prompt], [0], **values)[0])
    measurement = Measurement(engine, prompts, values, flags)
    run_prompts(engine, measurement.jobs(), values, measurement.collector, "measuring")
    rows = measurement.rows()
    folder = Path(flags["out"])
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "model": engine.model_file.path.name,
        "depth": measurement.depth,
        "origin": measurement.origin,
        "prompts": len(prompts),
        "kept_prompts": len(measurement.kept),
        "kept_tokens": measurement.filled,
        "neighbours": min(flags["neighbours"], measurement.filled - 1),
        "tokens": measurement.sums[0][0].tokens,
        "settings": engine.plan([""], [flags.get("seed", 0)], **values)[0].public(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "versions": saving.versions(),
        "chance": measurement.chance(),
        "rows": rows,
    }
    saving.write_json(folder / "measure.json", record)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    saving.atomic_write(folder / "measure.csv", lambda f: f.write(text.getvalue().encode()))
    print(summary(record))
    try:
        plot(record, folder / "measure.png")
    except ImportError:
        engine.say("note: no plots: they need matplotlib (pip install matplotlib)")
    print(f"{folder}: " + ", ".join(sorted(p.name for p in folder.glob("measure.*"))))
    return folder


def measures(record: Mapping[str, Any]) -> list[str]:
    """Names of what a measurement holds per block."""
    return [name for name in record["rows"][0] if name not in ("step", "sigma", "block")]


def by_block(record: Mapping[str, Any], name: str) -> list[float]:
    """A measure per block, mean over the timesteps."""
    out = []
    for block in range(record["depth"]):
        values = [row[name] for row in record["rows"] if row["block"] == block]
        out.append(sum(values) / len(values))
    return out


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
    saving.atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=100))
    pyplot.close(figure)


# ---- suggest -------------------------------------------------------------------------------------


def knowing(record: Mapping[str, Any]) -> list[str]:
    """Names of the measures that say how much of the prompt is known."""
    return [name for name in measures(record) if name == "retrieval" or name.startswith("probe ")]


def known(record: Mapping[str, Any]) -> list[float]:
    """How much of the prompt the tokens entering each block let one know: 1 all, 0 no more than chance.

    The mean over retrieval and the linear probes of (measure - chance) / (1 - chance).
    """
    names = knowing(record)
    out = [0.0] * record["depth"]
    for name in names:
        chance = record["chance"][name]
        for block, value in enumerate(by_block(record, name)):
            out[block] += (value - chance) / max(1 - chance, 1e-9) / len(names)
    return out


def suggest(record: Mapping[str, Any], tolerance: float = 0.05) -> tuple[int, list[int], str]:
    """Origin, targets and the reason, from a measurement.

    Origin: of the first third of the blocks, the earliest whose tokens know as much as the best there, up to a fifth
    of the tolerance. Targets: from the first block after it that knows less by more than the tolerance to the last.
    """
    level, depth = known(record), record["depth"]
    early = level[: max(2, depth // 3)]
    origin = next(i for i, value in enumerate(early) if value >= max(early) - tolerance / 5)
    forgetful = [i for i in range(origin + 1, depth) if level[i] < level[origin] - tolerance]
    why = [
        f"origin {origin}: its tokens know {level[origin]:.2f} of the prompt (1: all, 0: chance; mean of "
        f"{', '.join(knowing(record))}), the most of blocks 0 to {len(early) - 1} is {max(early):.2f}"
    ]
    if not forgetful:
        lowest = min(range(origin + 1, depth), key=lambda i: level[i])
        why.append(
            f"no targets: no later block knows less by more than {tolerance:g} (least: block {lowest} with "
            f"{level[lowest]:.2f}); by this measure nothing is forgotten, and there is little to bring back"
        )
        return origin, [], "\n".join(why)
    targets = list(range(forgetful[0], depth))
    worst = min(forgetful, key=lambda i: level[i])
    why.append(
        f"targets {targets[0]} to {targets[-1]}: block {targets[0]} is the first to know less by more than "
        f"{tolerance:g} ({level[targets[0]]:.2f}); least is known at block {worst} ({level[worst]:.2f}), at the last "
        f"{level[-1]:.2f}"
    )
    return origin, targets, "\n".join(why)


def read_measurement(path: str | Path, flag: str = "measurement") -> dict[str, Any]:
    """A measure.json of ours; raises FileNotFoundError, or ValueError that says what is wrong with it."""
    where = f"--{flag} {path}"
    check_file(where, path)
    not_one = "is not a measurement of sd3_probe.py"
    with reading(where, not_one):
        record = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(record, dict):
            raise ValueError("it is no object")
        depth, rows, chance = (record[name] for name in ("depth", "rows", "chance"))
        if type(depth) is not int or not 2 <= depth <= 10_000:
            raise ValueError(f"depth {depth!r:.40}: must be a number of blocks, from 2 to 10000")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("rows must be a list of objects")
        if missing := set(range(depth)) - {row["block"] for row in rows if type(row["block"]) is int}:
            raise ValueError(f"block {min(missing)} has no row")
        for name in knowing(record):
            values = [(f"{name} of block {row['block']}", row[name]) for row in rows]
            for what, value in [*values, (f"chance of {name}", chance[name])]:
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"{what} is {value!r:.40}, not a number")
        if not knowing(record):
            raise ValueError("nothing in it says how much of a prompt is known")
        return record
    raise AssertionError  # `reading` returns or raises


def run_suggest(flags: Mapping[str, Any]) -> None:
    """Prints what `suggest` proposes."""
    path = flags["measurement"]
    if not os.path.lexists(path):
        raise FileNotFoundError(f"--measurement {path}: no such file; sd3_probe.py measure makes one")
    origin, targets, why = suggest(read_measurement(path), flags["tolerance"])
    print(why)
    if targets:
        print(f"--residual_origin_layer {origin} --residual_target_layers {targets[0]}-{targets[-1]}")


# ---- calibrate -----------------------------------------------------------------------------------


class Calibration:
    """Sums of standardised tokens for orthogonal Procrustes, per bucket of sigma and target; never the tokens."""

    def __init__(self, origin: int, targets: Sequence[int], buckets: int, width: int):
        self.origin, self.targets, self.buckets = origin, list(targets), buckets
        count = len(self.targets)
        self.cross = torch.zeros(buckets, count, width, width)  # sum of o^T t
        self.origin_sum = torch.zeros(buckets, width, dtype=torch.float64)
        self.target_sum = torch.zeros(buckets, count, width, dtype=torch.float64)
        self.tokens = torch.zeros(buckets, dtype=torch.int64)

    def bucket(self, sigma: float) -> int:
        """Buckets split [0, 1] evenly; an edge belongs to the upper, as in `Rotations.bucket`."""
        return bisect.bisect_right(self.edges()[1:-1], TIMESTEPS * sigma)

    def edges(self) -> list[float]:
        """Timesteps 0 to 1000 between and around the buckets."""
        return [TIMESTEPS * b / self.buckets for b in range(self.buckets + 1)]

    def add(self, at: Pass, states: Mapping[int, Sequence[Tensor]]) -> None:
        """Takes the tokens of a pass: {block: one (n, D) per picture}."""
        b = self.bucket(at.sigma)
        origin = standardise(torch.cat(list(states[self.origin])))
        self.tokens[b] += len(origin)
        self.origin_sum[b] += origin.sum(0).double().cpu()
        for j, target in enumerate(self.targets):
            t = standardise(torch.cat(list(states[target])))
            self.cross[b, j] += (origin.T @ t).cpu()
            self.target_sum[b, j] += t.sum(0).double().cpu()

    def solve(self, centre: bool, quiet: bool) -> Tensor:
        """(B, N, D, D): the orthogonal R that makes o R nearest to t, U V^T of the cross product's U S V^T
        (Schoenemann 1966). centre: of features without their means over tokens.
        """
        out = torch.zeros_like(self.cross)
        pairs = [(b, j) for b in range(self.buckets) for j in range(len(self.targets))]
        for b, j in tqdm(pairs, desc="solving", unit="rotation", disable=quiet, leave=False):
            cross = self.cross[b, j].double()
            if centre:
                cross -= torch.outer(self.origin_sum[b], self.target_sum[b, j]) / self.tokens[b]
            u, _, vt = torch.linalg.svd(cross)
            out[b, j] = u @ vt
        return out

    def state(self) -> dict[str, Tensor]:
        """Everything, for a file."""
        return {name: getattr(self, name) for name in ("cross", "origin_sum", "target_sum", "tokens")}


class Distances:
    """Mean squared distance of the target's standardised tokens from the origin's, as they are and rotated."""

    def __init__(self, calibration: Calibration, rotations: Tensor):
        self.calibration, self.rotations = calibration, rotations
        self.plain, self.turned = (torch.zeros(len(calibration.targets), dtype=torch.float64) for _ in range(2))
        self.count = 0

    def add(self, at: Pass, states: Mapping[int, Sequence[Tensor]]) -> None:
        """Takes the tokens of a pass."""
        origin = standardise(torch.cat(list(states[self.calibration.origin])))
        self.count += origin.numel()
        for j, target in enumerate(self.calibration.targets):
            t = standardise(torch.cat(list(states[target])))
            turn = self.rotations[self.calibration.bucket(at.sigma), j].to(origin.device)
            self.plain[j] += (origin - t).square().double().sum().cpu()
            self.turned[j] += (origin @ turn - t).square().double().sum().cpu()

    def table(self) -> str:
        """Markdown, a row per target."""
        lines = ["| target | mean squared distance | rotated |", "| --- | --- | --- |"]
        for target, plain, turned in zip(self.calibration.targets, self.plain, self.turned, strict=True):
            lines.append(f"| {target} | {plain / self.count:.4f} | {turned / self.count:.4f} |")
        return "\n".join(lines)


def calibrate(flags: Mapping[str, Any]) -> Path:
    """Runs `calibrate`; returns the file with the rotations."""
    prompts = read_labelled(flags["prompts"])
    others = read_labelled(flags["check_prompts"], "check_prompts") if "check_prompts" in flags else []
    known_prompts = {p.prompt for p in prompts}
    if shared := [p.prompt for p in others if p.prompt in known_prompts]:
        raise ValueError(f'--check_prompts {flags["check_prompts"]}: "{shared[0]}" is in --prompts too')
    out = Path(flags["out"])
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    if len(out.name.encode()) > LONGEST_OUT:
        raise ValueError(
            f"--out {display(out)}: its name is too long; at most {LONGEST_OUT} bytes, for files beside it"
        )
    saving.check_writable(str(out.parent), "out")
    engine, values = load(flags)
    config = ResidualConfig(flags["origin"], flags["targets"])
    with own_names():
        config.check(engine.config.depth)
    engine.check_settings(engine.plan([prompts[0].prompt], [0], **values)[0])
    work = Calibration(config.origin, config.targets, flags["buckets"], engine.config.width)
    met = {work.bucket(sigma) for sigma in flow_schedule(values["steps"], values["shift"]).tolist()[:-1]}
    if empty := sorted(set(range(work.buckets)) - met):
        raise ValueError(f"--buckets {work.buckets}: no step falls into bucket {empty[0]}; take fewer, or more --steps")
    out.parent.mkdir(parents=True, exist_ok=True)
    seed = flags.get("seed", 0)
    identity = _identity(engine, prompts, values, flags)
    state_file = out.with_name(f".{out.name}.state")
    done = _resume(work, state_file, identity, len(prompts))
    if done:
        engine.say(f"going on after {done} of {len(prompts)} prompts")
    jobs = [(i, p.prompt, (seed + i) % SEED_LIMIT) for i, p in enumerate(prompts)]
    layers = sorted({config.origin, *config.targets})
    saved = time.monotonic()

    def note(count: int) -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_EVERY:
            state = work.state()
            _save(state, state_file, {"identity": identity, "done": str(count), "sums": _checksum(state)})
            saved = time.monotonic()

    collect = lambda numbers, masks: Collector(masks, lambda at: True, layers, work.add)  # noqa: E731
    run_prompts(engine, jobs, values, collect, "calibrating", note, done)
    if int(work.tokens.min()) < engine.config.width:
        few = f"only {int(work.tokens.min())} tokens for width {engine.config.width}"
        engine.say(f"note: {few}; take more prompts or fewer buckets")
    rotations = work.solve(flags["centre"], engine.quiet)
    worst = max(orthogonality(matrix.double()) for matrix in rotations.flatten(0, 1))
    metadata = {
        "format": "sd3-residual rotations",
        "origin_layer": json.dumps(work.origin),
        "target_layers": json.dumps(work.targets),
        "model": engine.model_file.path.name,
        "prompts": str(len(prompts)),
        "tokens": json.dumps(work.tokens.tolist()),
        "centred": json.dumps(flags["centre"]),
        "settings": json.dumps(values, default=list),
    }
    tensors = {"rotation_matrices": rotations if flags["buckets"] > 1 else rotations[0]}
    if flags["buckets"] > 1:
        tensors["timestep_bucket_edges"] = torch.tensor(work.edges())
    engine.files.check()
    _save(tensors, out, metadata)
    state_file.unlink(missing_ok=True)
    print(
        f"{out}: {len(work.targets)} rotations, {engine.config.width} x {engine.config.width}, for origin {work.origin}"
        f"{f' in {work.buckets} buckets' if work.buckets > 1 else ''}, from {int(work.tokens.sum())} tokens of "
        f"{len(prompts)} prompts; R^T R differs from the identity by at most {worst:.1e}"
    )
    if others:
        distances = Distances(work, rotations)
        collect = lambda numbers, masks: Collector(masks, lambda at: True, layers, distances.add)  # noqa: E731
        others_jobs = [(i, p.prompt, (seed + len(prompts) + i) % SEED_LIMIT) for i, p in enumerate(others)]
        run_prompts(engine, others_jobs, values, collect, "checking")
        print(f"on {len(others)} other prompts, between standardised tokens of origin and target:")
        print(distances.table())
    return out


STATE_VERSION = 2  # of what the sums are; older states are then begun anew


def _identity(engine: SD3Inferencer, prompts: Sequence[Labelled], values: Mapping, flags: Mapping) -> str:
    """A hash of all that decides a calibration's sums; its state goes on only with the same."""
    files = {"model": {entry.path for entry in engine.model_file.entries.values()}, **engine.text_files()}
    decides = {
        "version": STATE_VERSION,
        "files": {
            role: [(path.name, *embed_cache.file_identity(path)) for path in sorted(paths)]
            for role, paths in files.items()
        },
        "prompts": [p.prompt for p in prompts],
        "values": dict(values),
        "dtype": str(engine.dtype),
        "devices": [str(engine.device), str(engine.encoder_device)],
        "engine": {name: getattr(engine, name) for name in ("no_t5", "weights", "offload", "compile")},
        "seed": flags.get("seed", 0),
        "origin": flags["origin"],
        "targets": list(flags["targets"]),
        "buckets": flags["buckets"],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=list).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(memoryview(tensors[name].contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
        saving.rename_finished(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, USER_ERRORS) or "SafetensorError" in type(error).__name__:
            raise OSError(f"{path}: cannot be written ({error})") from None
        raise


def _resume(work: Calibration, path: Path, identity: str, most: int) -> int:
    """Takes up a state that an interrupted run left; returns how many prompts it holds, of `most`.

    All of it, or, where anything of it is not as it was written or is of another run, nothing.
    """
    if not path.is_file():
        return 0
    wanted = work.state()
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        if metadata.get("identity") != identity:
            return 0
        done, tensors = int(metadata["done"]), load_file(path)
        same = {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in wanted.items()
        }
        whole = same and metadata["sums"] == _checksum(tensors) and 0 < done <= most
        if not whole or not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            return 0
    except Exception:  # whatever a damaged file makes a reader raise: the run begins anew
        return 0
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
    return done


# ---- the command line ----------------------------------------------------------------------------


SMALLER = {
    "measure": "--width, --height, --batch_size or --kept_prompts",
    "suggest": "number of blocks in --measurement",
    "calibrate": "--buckets, --targets, --width, --height or --batch_size",
}  # what to turn down where memory runs out


@shell_streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `sd3_infer.guarded`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0 if arguments else 2

    def work() -> None:
        command, flags = read_flags(arguments)
        {"measure": measure, "suggest": run_suggest, "calibrate": calibrate}[command](flags)

    return guarded(work, SMALLER.get(arguments[0], SMALLER["measure"]))


if __name__ == "__main__":
    sys.exit(main())
