"""`suggest`: proposes an origin and targets from a measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sd3.mistakes import Missing, Where
from sd3.reading import check_file, parse_json, reading


def measures(record: Mapping[str, Any]) -> list[str]:
    """Names of the measures of a record."""
    return [name for name in record["rows"][0] if name not in ("step", "sigma", "block")]


def by_block(record: Mapping[str, Any], name: str) -> list[float]:
    """The mean of a measure over the timesteps, per block."""
    out = []
    for block in range(record["depth"]):
        values = [row[name] for row in record["rows"] if row["block"] == block]
        out.append(sum(values) / len(values))
    return out


def prompt_measures(record: Mapping[str, Any]) -> list[str]:
    """Names of the measures of how much of the prompt can be recovered from the tokens."""
    return [name for name in measures(record) if name == "retrieval" or name.startswith("probe ")]


def recoverable(record: Mapping[str, Any]) -> list[float]:
    """How much of the prompt can be recovered from the tokens entering each block: 1 all of it, 0 chance.

    The mean over retrieval and the linear probes of (measure - chance) / (1 - chance).
    """
    names = prompt_measures(record)
    out = [0.0] * record["depth"]
    for name in names:
        chance = record["chance"][name]
        for block, value in enumerate(by_block(record, name)):
            out[block] += (value - chance) / max(1 - chance, 1e-9) / len(names)
    return out


def suggest(record: Mapping[str, Any], tolerance: float = 0.05) -> tuple[int, list[int], str]:
    """Origin, targets and the reason, from a measurement.

    Origin: of the first third of the blocks, the earliest from which as much of the prompt can be recovered as from
    the best of them, within a fifth of the tolerance. Targets: from the first later block where the loss exceeds the
    tolerance to the last block.
    """
    level, depth = recoverable(record), record["depth"]
    early = level[: max(2, depth // 3)]
    origin = next(i for i, value in enumerate(early) if value >= max(early) - tolerance / 5)
    losing = [i for i in range(origin + 1, depth) if level[i] < level[origin] - tolerance]
    why = [
        f"origin {origin}: {level[origin]:.2f} of the prompt can be recovered from its tokens (1: all, 0: chance; mean "
        f"of {', '.join(prompt_measures(record))}); the best of blocks 0 to {len(early) - 1} has {max(early):.2f}"
    ]
    if not losing:
        lowest = min(range(origin + 1, depth), key=lambda i: level[i])
        why.append(
            f"no targets: no later block loses more than {tolerance:g} (lowest: block {lowest} with "
            f"{level[lowest]:.2f}); by this measure the model forgets nothing, so there is little to bring back"
        )
        return origin, [], "\n".join(why)
    targets = list(range(losing[0], depth))
    worst = min(losing, key=lambda i: level[i])
    why.append(
        f"targets {targets[0]} to {targets[-1]}: block {targets[0]} is the first that loses more than {tolerance:g} "
        f"({level[targets[0]]:.2f}); the lowest is block {worst} ({level[worst]:.2f}), the last has {level[-1]:.2f}"
    )
    return origin, targets, "\n".join(why)


def needed_prompts(tolerance: float) -> int:
    """How many prompts a measurement needs for a tolerance: with n prompts the standard error of retrieval, which is
    the share of recognised prompts, is at most 0.5 / sqrt(n). From this number on, it is below the tolerance.
    """
    return math.ceil((0.5 / tolerance) ** 2 - 1e-9) if tolerance else 0


def too_few_prompts(record: Mapping[str, Any], tolerance: float) -> str:
    """A note if a measurement has fewer prompts than `needed_prompts`; empty otherwise."""
    count, needed = record.get("kept_prompts"), needed_prompts(tolerance)
    if type(count) is not int or not 0 < count < needed:
        return ""
    error = f"with {count} prompts the standard error of retrieval is up to {0.5 / math.sqrt(count):.2f}"
    return f"note: {error}; for a tolerance of {tolerance:g}, measure about {needed} prompts or more"


def read_measurement(path: str | Path, flag: str = "measurement") -> dict[str, Any]:
    """Reads a measure.json; raises Mistake."""
    where = Where(flag, path)
    check_file(where, path)
    wrong = "is not a measurement of sd3_probe.py"
    with reading(where, wrong):
        record = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        depth, rows, chance = (record[name] for name in ("depth", "rows", "chance"))
        if type(depth) is not int or not 2 <= depth <= 10_000:
            raise ValueError(f"depth {depth!r:.40}: must be a number of blocks, from 2 to 10000")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("rows must be a list of objects")
        if missing := set(range(depth)) - {row["block"] for row in rows if type(row["block"]) is int}:
            raise ValueError(f"block {min(missing)} has no row")
        for name in prompt_measures(record):
            values = [(f"{name} of block {row['block']}", row[name]) for row in rows]
            for what, value in [*values, (f"chance of {name}", chance[name])]:
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"{what} is {value!r:.40}, not a number")
        if not prompt_measures(record):
            raise ValueError("it has no measure of how much of the prompt can be recovered")
        return record


def run_suggest(flags: Mapping[str, Any], show: Callable[[str], Any]) -> None:
    """Runs `suggest`. show: receives the lines of the result."""
    path = flags["measurement"]
    if not os.path.lexists(path):
        raise Missing("measurement", path, "no such file; sd3_probe.py measure makes one")
    record = read_measurement(path)
    origin, targets, why = suggest(record, flags["tolerance"])
    show(why)
    if note := too_few_prompts(record, flags["tolerance"]):
        show(note)
    if targets:
        show(f"--residual_origin_layer {origin} --residual_target_layers {targets[0]}-{targets[-1]}")
