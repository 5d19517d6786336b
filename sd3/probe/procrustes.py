"""Rotations from the standardised text tokens of an origin to those of a target, computed from sums over tokens."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmditx import TIMESTEPS, ModelCall, standardise
from sd3.telling import progress


class Calibration:
    """Sums over standardised tokens for orthogonal Procrustes, per bucket of sigma and target; keeps no tokens."""

    def __init__(self, origin: int, targets: Sequence[int], buckets: int, width: int):
        self.origin, self.targets, self.buckets = origin, list(targets), buckets
        count = len(self.targets)
        self.cross = torch.zeros(buckets, count, width, width)  # sum of o^T t
        self.origin_sum = torch.zeros(buckets, width, dtype=torch.float64)
        self.target_sum = torch.zeros(buckets, count, width, dtype=torch.float64)
        self.tokens = torch.zeros(buckets, dtype=torch.int64)

    def bucket(self, sigma: float) -> int:
        """Bucket of a sigma: equal parts of [0, 1]; an edge belongs to the upper one, as in `Rotations.bucket`."""
        return bisect.bisect_right(self.edges()[1:-1], TIMESTEPS * sigma)

    def edges(self) -> list[float]:
        """Edges of all buckets, as timesteps from 0 to 1000."""
        return [TIMESTEPS * b / self.buckets for b in range(self.buckets + 1)]

    def add(self, at: ModelCall, states: Mapping[int, Sequence[Tensor]]) -> None:
        """Adds the tokens of a model call: {block: one (n, D) per image}."""
        b = self.bucket(at.sigma)
        origin = standardise(torch.cat(list(states[self.origin])))
        self.tokens[b] += len(origin)
        self.origin_sum[b] += origin.sum(0).double().cpu()
        for j, target in enumerate(self.targets):
            t = standardise(torch.cat(list(states[target])))
            self.cross[b, j] += (origin.T @ t).cpu()
            self.target_sum[b, j] += t.sum(0).double().cpu()

    def solve(self, centre: bool, quiet: bool) -> Tensor:
        """(B, N, D, D): the orthogonal R that minimises |o R - t|, which is U V^T for the SVD U S V^T of o^T t
        (Schoenemann 1966). centre: subtract the means over tokens first.
        """
        out = torch.zeros_like(self.cross)
        pairs = [(b, j) for b in range(self.buckets) for j in range(len(self.targets))]
        with progress(len(pairs), "solving", "rotation", quiet=quiet) as update:
            for b, j in pairs:
                cross = self.cross[b, j].double()
                if centre:
                    cross -= torch.outer(self.origin_sum[b], self.target_sum[b, j]) / self.tokens[b]
                u, _, vt = torch.linalg.svd(cross)
                out[b, j] = u @ vt
                update(1)
        return out

    def state(self) -> dict[str, Tensor]:
        """All sums by name, to be saved."""
        return {name: getattr(self, name) for name in ("cross", "origin_sum", "target_sum", "tokens")}


class Distances:
    """Mean squared distance between the standardised tokens of origin and target, before and after rotation."""

    def __init__(self, calibration: Calibration, rotations: Tensor):
        self.calibration, self.rotations = calibration, rotations
        self.unrotated, self.rotated = (torch.zeros(len(calibration.targets), dtype=torch.float64) for _ in range(2))
        self.count = 0

    def add(self, at: ModelCall, states: Mapping[int, Sequence[Tensor]]) -> None:
        """Adds the tokens of a model call."""
        origin = standardise(torch.cat(list(states[self.calibration.origin])))
        self.count += origin.numel()
        for j, target in enumerate(self.calibration.targets):
            t = standardise(torch.cat(list(states[target])))
            turn = self.rotations[self.calibration.bucket(at.sigma), j].to(origin.device)
            self.unrotated[j] += (origin - t).square().double().sum().cpu()
            self.rotated[j] += (origin @ turn - t).square().double().sum().cpu()

    def table(self) -> str:
        """Markdown, a row per target."""
        lines = ["| target | mean squared distance | rotated |", "| --- | --- | --- |"]
        for target, plain, turned in zip(self.calibration.targets, self.unrotated, self.rotated, strict=True):
            lines.append(f"| {target} | {plain / self.count:.4f} | {turned / self.count:.4f} |")
        return "\n".join(lines)
