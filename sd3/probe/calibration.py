"""`calibrate`: rotations for `--residual_mode aligned`."""

from __future__ import annotations

import bisect
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mmditx import TIMESTEPS, standardise
from sd3 import writing
from sd3.embed_cache import file_identity
from sd3.engine import Engine
from sd3.mistakes import Mistake, Unwritable
from sd3.probe.running import Collector, Labelled, load, read_labelled, run_prompts
from sd3.readers import SEED_LIMIT
from sd3.residual import ResidualConfig
from sd3.rotations import orthogonality
from sd3_impls import flow_schedule

if TYPE_CHECKING:
    from torch import Tensor

    from mmditx import ModelCall
    from sd3.engine import Engine


LONGEST_OUT = 200  # bytes of a rotation file's name; its state and what is half written have longer ones
SAVE_EVERY = 30.0  # seconds between writes of a calibration's state


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

    def add(self, at: ModelCall, states: Mapping[int, Sequence[Tensor]]) -> None:
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

    def add(self, at: ModelCall, states: Mapping[int, Sequence[Tensor]]) -> None:
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
        raise Mistake("check_prompts", flags["check_prompts"], f'"{shared[0]}" is in `prompts` too')
    out = Path(flags["out"])
    if out.is_dir():
        raise Mistake("out", out, "is a folder")
    if len(out.name.encode()) > LONGEST_OUT:
        raise Mistake("out", out, f"its name is too long; at most {LONGEST_OUT} bytes, for files beside it")
    writing.check_writable(str(out.parent), "out")
    engine, values = load(flags)
    config = ResidualConfig(flags["origin"], flags["targets"])
    config.check(engine.config.depth)
    engine.check_settings(engine.plan([prompts[0].prompt], [0], **values)[0])
    work = Calibration(config.origin, config.targets, flags["buckets"], engine.config.width)
    met = {work.bucket(sigma) for sigma in flow_schedule(values["steps"], values["shift"]).tolist()[:-1]}
    if empty := sorted(set(range(work.buckets)) - met):
        raise Mistake("buckets", work.buckets, f"no step falls into bucket {empty[0]}; take fewer, or more `steps`")
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


def _identity(engine: Engine, prompts: Sequence[Labelled], values: Mapping, flags: Mapping) -> str:
    """A hash of all that decides a calibration's sums; its state goes on only with the same."""
    files = {"model": {entry.path for entry in engine.model_file.entries.values()}, **engine.text_files()}
    decides = {
        "version": STATE_VERSION,
        "files": {role: [(path.name, *file_identity(path)) for path in sorted(paths)] for role, paths in files.items()},
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
        writing.rename_finished(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise Unwritable("", path, f"cannot be written ({error})") from None
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
