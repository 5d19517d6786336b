"""Rotations of mode `aligned`, and their files: orthogonal matrices that turn the origin's features to a target's."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmditx import TIMESTEPS
from sd3.files import WeightFile
from sd3.headers import FLOATS
from sd3.mistakes import Mistake, Where, verbatim
from sd3.pickles import MOST_VALUES, check_tensor, is_pickle, plain_value, read_pickle
from sd3.readers import read_int, read_layers
from sd3.reading import parse_json, reading
from sd3.residual import ResidualConfig

LEAST_ORTHOGONAL = 1e-2  # largest entry of R^T R - I that a rotation file may have (stored in bfloat16: 4e-3)
MATRICES, EDGES = "rotation_matrices", "timestep_bucket_edges"  # keys of a rotation file


@dataclass(frozen=True, eq=False)
class Rotations:
    """Orthogonal matrices of an origin's targets: standardised origin rows times `matrices[b, j]` (from the right).

    matrices: (B, N, D, D) float32 on the CPU, one per bucket of sigma and target; edges: the B - 1 sigmas between
    buckets, rising.
    """

    origin: int
    targets: tuple[int, ...]
    matrices: Tensor
    edges: tuple[float, ...] = ()

    def bucket(self, sigma: float) -> int:
        """Index of the bucket of sigma; a sigma on an edge belongs to the upper bucket."""
        return bisect.bisect_right(self.edges, sigma)

    def matrix(self, target: int, sigma: float) -> Tensor:
        """(D, D) for a target."""
        return self.matrices[self.bucket(sigma), self.targets.index(target)]

    def check(self, config: ResidualConfig, width: int) -> None:
        """Raises Mistake if they do not fit the configuration or the model width."""
        _check_fit(Where("rotations"), self.origin, self.targets, self.matrices.shape[-1], config, width)


def _check_fit(
    where: Where, origin: int, targets: Sequence[int], size: int, config: ResidualConfig, width: int | None
) -> None:
    if width is not None and size != width:
        raise Mistake(*where, f"is for a model of width {size}, this one has {width}")
    if origin != config.origin:
        raise Mistake(*where, f"was made for origin layer {origin}, not {config.origin}")
    missing = [t for t in config.targets if t not in targets]
    if missing:
        raise Mistake(
            *where,
            f"has no rotation for target layers {', '.join(map(str, missing))}; it has {', '.join(map(str, targets))}",
        )


@dataclass(frozen=True)
class _Stored:
    """The contents of a rotation file: its metadata, the shape of its matrices (None without any), and `read(places)`,
    which returns the matrices at some indices of target_layers, (..., n, D, D).
    """

    where: Where
    notes: Mapping[str, Any]
    shape: tuple[int, ...] | None
    read: Callable[[Sequence[int]], Tensor]


def read_rotations(path: str | Path, config: ResidualConfig | None = None, width: int | None = None) -> Rotations:
    """Rotations from our .safetensors or a published .pt file: "rotation_matrices" (N, D, D) or (B, N, D, D) with
    "timestep_bucket_edges" (timesteps 0..1000 or sigmas 0..1; the inner ones, or with both ends), "target_layers",
    "origin_layer".

    Where a `config` is given, only its targets are read, and must be there. Raises Missing, or Mistake that says what
    is wrong: not such a file, sizes that contradict each other, another origin, missing layers, a model of another
    `width`, a matrix that is not orthogonal.
    """
    where = Where("rotations", path)
    stored = _open_pickle(where, path) if is_pickle(where, path) else _open_safetensors(path)
    origin, targets = _read_layers(stored)
    shape = stored.shape
    square = len(shape) in (3, 4) and shape[-1] == shape[-2] and shape[-3] == len(targets)
    if not square or 0 in shape:
        sizes = "x".join(map(str, shape))
        raise Mistake(*where, f"{MATRICES} is {sizes}; {len(targets)} square matrices are required")
    edges, falling = _read_edges(stored.notes.get(EDGES), shape[0] if len(shape) == 4 else 1, where)
    if config is not None:
        _check_fit(where, origin, targets, shape[-1], config, width)
    wanted = targets if config is None else config.targets
    with reading(where, "cannot be read"):
        matrices = stored.read([targets.index(t) for t in wanted]).float()
    matrices = matrices if matrices.ndim == 4 else matrices[None]  # (B, N, D, D)
    if falling:
        matrices = matrices.flip(0)
    _check_orthogonal(matrices, wanted, where)
    return Rotations(origin, wanted, matrices.contiguous(), edges)


def _open_pickle(where: Where, path: str | Path) -> _Stored:
    raw = read_pickle(where, path)
    if not isinstance(raw, Mapping):
        raise Mistake(*where, f"must hold a dictionary with {MATRICES}")
    notes = {k: plain_value(raw[k], where, k) for k in ("target_layers", "origin_layer", EDGES) if k in raw}
    matrices = raw.get(MATRICES)
    if not isinstance(matrices, Tensor):
        return _Stored(where, notes, None, torch.empty)
    check_tensor(matrices, where, MATRICES)
    if not matrices.is_floating_point():
        raise Mistake(*where, f"{MATRICES} are {matrices.dtype}; floating-point numbers are required")
    return _Stored(where, notes, tuple(matrices.shape), lambda places: matrices[..., places, :, :])


def _open_safetensors(path: str | Path) -> _Stored:
    file = WeightFile(path, "rotations")
    where, entry, edges = Where("rotations", path), file.entries.get(MATRICES), file.entries.get(EDGES)
    if entry is not None and entry.dtype not in FLOATS:
        raise Mistake(*where, f"{MATRICES} are {entry.dtype}; floating-point numbers are required")
    with reading(where, "its metadata is damaged"):
        notes = {k: parse_json(v) for k, v in file.metadata.items() if k in ("target_layers", "origin_layer")}
    if edges is not None:
        if edges.dtype in ("BOOL", "C64") or len(edges.shape) != 1 or edges.shape[0] > MOST_VALUES:
            kind = f"{edges.dtype} {list(edges.shape)}"
            raise Mistake(*where, f"{EDGES} must be a list of real numbers, not {kind}")
        with reading(where, "cannot be read"), safe_open(file.path, framework="pt", device="cpu") as f:
            notes[EDGES] = f.get_tensor(EDGES).tolist()

    def read(places: Sequence[int]) -> Tensor:
        with safe_open(file.path, framework="pt", device="cpu") as f:
            rows = f.get_slice(MATRICES)
            if len(rows.get_shape()) == 3:
                return torch.stack([rows[j] for j in places])
            return torch.stack([torch.stack([rows[b, j] for j in places]) for b in range(rows.get_shape()[0])])

    return _Stored(where, notes, None if entry is None else entry.shape, read)


def _read_layers(stored: _Stored) -> tuple[int, tuple[int, ...]]:
    """The origin and targets in a file; raises Mistake if they or the matrices are missing."""
    if stored.shape is None:
        raise Mistake(*stored.where, f"has no {MATRICES}: not a rotation file")
    for name in ("target_layers", "origin_layer"):
        if name not in stored.notes:
            raise Mistake(*stored.where, f"does not say its {name}")
    try:
        targets = read_layers("target_layers", stored.notes["target_layers"])
        origin = read_int("origin_layer", stored.notes["origin_layer"], 0)
    except Exception as error:  # values may have any type
        raise Mistake(*stored.where, verbatim(str(error))) from None
    if not targets:
        raise Mistake(*stored.where, "target_layers is empty")
    return origin, targets


def _read_edges(given: Any, buckets: int, where: Where) -> tuple[tuple[float, ...], bool]:
    """The sigmas between buckets, rising, and whether the file counts from high to low."""
    if buckets == 1:
        return (), False
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else []
    for edge in listed:
        if type(edge) not in (int, float) or abs(edge) > TIMESTEPS:
            raise Mistake(*where, f"{EDGES} must be numbers from 0 to {TIMESTEPS}, not {edge!r:.40}")
    edges = [float(edge) for edge in listed]
    if len(edges) not in (buckets - 1, buckets + 1):
        needed = f"{buckets} timestep buckets need {buckets - 1} or {buckets + 1} {EDGES}"
        raise Mistake(*where, f"{needed}, the file has {len(edges)}")
    falling = len(edges) > 1 and edges[0] > edges[-1]
    rising = edges[::-1] if falling else edges
    if not all(a < b for a, b in itertools.pairwise(rising)) or not all(map(math.isfinite, edges)):
        raise Mistake(*where, f"{EDGES} must be increasing: {given}")
    if max(rising) > 1:
        rising = [e / TIMESTEPS for e in rising]
    return tuple(rising[1:-1] if len(rising) == buckets + 1 else rising), falling


def _check_orthogonal(matrices: Tensor, targets: Sequence[int], where: Where) -> None:
    """Raises Mistake for the first of (B, N, D, D) that is not orthogonal."""
    for j, target in enumerate(targets):
        for b in range(matrices.shape[0]):
            error = orthogonality(matrices[b, j])
            if not error <= LEAST_ORTHOGONAL:
                raise Mistake(
                    *where,
                    f"the matrix for target layer {target} is not orthogonal: R^T R differs from the identity by up to "
                    f"{error:.2g}; at most {LEAST_ORTHOGONAL:g} is taken",
                )


def orthogonality(matrix: Tensor) -> float:
    """Largest entry of |R^T R - I|; NaN where there is one in R."""
    product = matrix.T @ matrix
    return (product - torch.eye(len(product), dtype=product.dtype, device=product.device)).abs().max().item()
