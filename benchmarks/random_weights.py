"""Writes random weights of real size to disk, from a manifest of tensor names and shapes."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
from tqdm import tqdm

MANIFESTS = Path(__file__).parent / "manifests"
POOL = 2**24  # random numbers per scale; each tensor is a piece of them from a random position


def read_manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Reads tensor shapes by name from `manifests/NAME.tsv`."""
    out = {}
    for line in (MANIFESTS / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            tensor, size = line.split("\t")
            out[tensor] = tuple(int(n) for n in size.split("x"))
    return out


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: matrices scaled by fan-in, norm weights of 1, small biases."""
    if len(shape) == 1:
        return (1.0, 0.0) if name.endswith("weight") else (0.0, 0.02)
    if "embed" in name and "proj" not in name and "mlp" not in name and "context" not in name:
        return 0.0, 0.5
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def write_random(name: str, path: Path, seed: int = 0) -> int:
    """Writes the model of a manifest as a float16 safetensors file. Returns its size in bytes."""
    shapes = read_manifest(name)
    header, offset = {}, 0
    for tensor, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[tensor] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(POOL, dtype=np.float32)
    pools: dict[tuple[float, float], np.ndarray] = {}
    with open(path, "wb") as f, tqdm(total=offset, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor, shape in shapes.items():
            key = _spread(tensor, shape)
            if key not in pools:
                pools[key] = (drawn * key[1] + key[0]).astype(np.float16)
            left, start = math.prod(shape), int(rng.integers(POOL))
            while left:
                piece = pools[key][start : start + left]
                f.write(piece.data)
                left, start = left - len(piece), 0
            bar.update(2 * math.prod(shape))
    return path.stat().st_size
