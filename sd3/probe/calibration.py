"""`calibrate`: computes rotations for `residual_mode` aligned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3 import writing
from sd3.engine import Engine
from sd3.mistakes import Mistake, verbatim
from sd3.planning import plan_pictures
from sd3.probe.procrustes import Calibration, Distances
from sd3.probe.running import Collector, LabelledPrompt, load, read_labelled, run_prompts
from sd3.probe.state import State, identity, save_tensors
from sd3.readers import SEED_LIMIT
from sd3.residual import ResidualConfig
from sd3.rotations import orthogonality
from sd3_impls import schedule

LONGEST_OUT = 200  # bytes of the name of a rotation file; its state and temporary file have longer names


def calibrate(flags: Mapping[str, Any], show: Callable[[str], Any]) -> Path:
    """Runs `calibrate`; returns the rotation file. show: receives the lines of the result."""
    prompts, others = _read_prompts(flags)
    out = Path(flags["out"])
    _check_out(out)
    engine, values = load(flags)
    sums = _plan_sums(engine, prompts, values, flags)
    out.parent.mkdir(parents=True, exist_ok=True)
    state = State(sums, out, identity(engine, prompts, values, flags))
    _collect(engine, prompts, values, flags, sums, state)
    rotations = sums.solve(flags["centre"], engine.tell.quiet)
    engine.files.check()
    _save(rotations, out, engine, sums, prompts, values, flags)
    state.remove()
    worst = max(orthogonality(matrix.double()) for matrix in rotations.flatten(0, 1))
    show(
        f"{out}: {len(sums.targets)} rotations, {engine.config.width} x {engine.config.width}, for origin {sums.origin}"
        f"{f' in {sums.buckets} buckets' if sums.buckets > 1 else ''}, from {int(sums.tokens.sum())} tokens of "
        f"{len(prompts)} prompts; R^T R differs from the identity by at most {worst:.1e}"
    )
    if others:
        distances = Distances(sums, rotations)
        jobs = _jobs(others, flags.get("seed", 0) + len(prompts))
        run_prompts(engine, jobs, values, _collectors(sums, distances.add), "checking")
        show(f"on {len(others)} other prompts, distance between the standardised tokens of origin and target:")
        show(distances.table())
    return out


def _read_prompts(flags: Mapping[str, Any]) -> tuple[list[LabelledPrompt], list[LabelledPrompt]]:
    """The prompts to calibrate on and the prompts to check on, which may not overlap."""
    prompts = read_labelled(flags["prompts"])
    others = read_labelled(flags["check_prompts"], "check_prompts") if "check_prompts" in flags else []
    texts = {p.prompt for p in prompts}
    if shared := [p.prompt for p in others if p.prompt in texts]:
        raise Mistake("check_prompts", flags["check_prompts"], f'"{verbatim(shared[0])}" is in `prompts` too')
    return prompts, others


def _check_out(out: Path) -> None:
    if os.path.isdir(out):
        raise Mistake("out", out, "is a folder")
    if len(out.name.encode()) > LONGEST_OUT:
        raise Mistake("out", out, f"its name is too long: at most {LONGEST_OUT} bytes")
    writing.check_writable(str(out.parent), "out")


def _plan_sums(
    engine: Engine, prompts: Sequence[LabelledPrompt], values: Mapping[str, Any], flags: Mapping[str, Any]
) -> Calibration:
    """Empty sums for the blocks and buckets of the flags; raises Mistake if those or the settings do not fit."""
    config = ResidualConfig(flags["origin"], flags["targets"])
    config.check(engine.config.depth)
    engine.check_settings(plan_pictures(engine, [prompts[0].prompt], [0], **values).pictures[0])
    sums = Calibration(config.origin, config.targets, flags["buckets"], engine.config.width)
    sigmas = schedule(values["scheduler"], values["steps"], values["shift"]).tolist()
    reached = {sums.bucket(sigma) for sigma in sigmas[:-1]}
    if empty := sorted(set(range(sums.buckets)) - reached):
        why = f"no step falls into bucket {empty[0]}; take fewer buckets or more `steps`"
        raise Mistake("buckets", sums.buckets, why)
    return sums


def _collect(
    engine: Engine,
    prompts: Sequence[LabelledPrompt],
    values: Mapping[str, Any],
    flags: Mapping[str, Any],
    sums: Calibration,
    state: State,
) -> None:
    """Accumulates the tokens of all prompts; resumes an interrupted run."""
    done = state.resume(len(prompts))
    if done:
        engine.tell.say(f"resuming after {done} of {len(prompts)} prompts")
    jobs = _jobs(prompts, flags.get("seed", 0))
    run_prompts(engine, jobs, values, _collectors(sums, sums.add), "calibrating", state.save_now_and_then, done)
    if int(sums.tokens.min()) < engine.config.width:
        few = f"only {int(sums.tokens.min())} tokens for width {engine.config.width}"
        engine.tell.say(f"note: {few}; take more prompts or fewer buckets")


def _jobs(prompts: Sequence[LabelledPrompt], seed: int) -> list[tuple[int, str, int]]:
    """(number, prompt, seed), with consecutive seeds."""
    return [(i, p.prompt, (seed + i) % SEED_LIMIT) for i, p in enumerate(prompts)]


def _collectors(sums: Calibration, add: Callable[..., None]) -> Callable[[Sequence[int], Sequence[Tensor]], Collector]:
    """Collectors for `run_prompts` that pass the tokens entering origin and targets at every step to `add`."""
    layers = sorted({sums.origin, *sums.targets})
    return lambda numbers, masks: Collector(masks, lambda at: True, layers, add)


def _save(
    rotations: Tensor,
    out: Path,
    engine: Engine,
    sums: Calibration,
    prompts: Sequence[LabelledPrompt],
    values: Mapping[str, Any],
    flags: Mapping[str, Any],
) -> None:
    """Writes the rotation file."""
    metadata = {
        "format": "sd3-residual rotations",
        "origin_layer": json.dumps(sums.origin),
        "target_layers": json.dumps(sums.targets),
        "model": engine.model_file.path.name,
        "prompts": str(len(prompts)),
        "tokens": json.dumps(sums.tokens.tolist()),
        "centred": json.dumps(flags["centre"]),
        "settings": json.dumps(values, default=list),
    }
    tensors = {"rotation_matrices": rotations if sums.buckets > 1 else rotations[0]}
    if sums.buckets > 1:
        tensors["timestep_bucket_edges"] = torch.tensor(sums.edges())
    save_tensors(tensors, out, metadata)
