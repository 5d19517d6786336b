"""Residual text streaming: the text tokens entering an early block, mixed into those entering later blocks.

C_i are the text tokens about to enter block i. C_o of the origin o is kept as it arrives; right before every target
block i runs, C_i is mixed with it under the weight w = w_i f(sigma), f the schedule:

add       C_i + w C_o
anchored  LN(standardise(C_i) + w standardise(C_o)), back on C_i's own mean and deviation (token by token)
aligned   the same with standardise(C_o) R_i, R_i an orthogonal matrix that turns the origin's features to block i's

anchored and aligned after "Prompt Reinjection", arXiv 2602.06886.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.files import FLOATS, WeightFile
from sd3.flags import READERS
from sd3.headers import describe, is_safetensors
from sd3.mistakes import Mistake, display, nearest, renaming
from sd3.readers import read_float, read_int, read_layers, read_path, read_weight, spread_weights
from sd3.reading import Note, Unreadable, check_file, parse_json, reading

if TYPE_CHECKING:
    from torch import Tensor


TIMESTEPS = 1000  # timesteps are 1000 sigma
LEAST_ORTHOGONAL = 1e-2  # largest entry of R^T R - I that a rotation file may have (stored in bfloat16: 4e-3)


GAIN_LIMIT = 60_000.0  # of a weight times its schedule: float16 ends at 65504


def check_residual(
    origin: int, targets: Sequence[int], weights: Sequence[float] | str, depth: int | None = None
) -> None:
    """Checks residual settings against each other and, where known, the number of joint blocks.

    Raises Mistake naming the value and the valid range. Without targets the feature is off and nothing is wrong.
    """
    if not targets:
        return
    last = "" if depth is None else f" (this model has {depth} joint blocks: 0 to {depth - 1})"
    if origin < 0 or (depth is not None and origin >= depth):
        raise Mistake("origin", origin, f"no such layer{last or '; layers count from 0'}")
    seen: set[int] = set()
    for target in targets:
        if target < 0 or (depth is not None and target >= depth):
            raise Mistake("targets", target, f"no such layer{last or '; layers count from 0'}")
        if target in seen:
            raise Mistake("targets", "", f"layer {target} is listed twice; name every layer once")
        seen.add(target)
        if target < origin:
            raise Mistake("targets", target, f"lies below the origin layer {origin}{last}")
    weights = spread_weights(weights, len(targets))
    if len(weights) != len(targets):
        all_alike = f"each:{weights[0]:g} for all" if len(weights) == 1 else "each:W for all"
        why = f"{len(weights)} given for {len(targets)} target layers; give one each, {all_alike}, or none for 1.0"
        raise Mistake("weights", "", why)
    for weight in weights:
        read_weight("weights", weight)


def check_residual_strength(weights: Sequence[float], schedule: str) -> None:
    """Raises Mistake where a weight times its schedule (as `read_schedule` spells it) grows beyond what float16 holds:
    a negative ALPHA makes it e^-ALPHA times as large.
    """
    if not schedule.startswith("exp:"):
        return
    largest = max((abs(w) for w in weights), default=0.0)
    if largest and math.log(largest) - min(float(schedule.removeprefix("exp:")), 0.0) > math.log(GAIN_LIMIT):
        why = f"makes the weight {largest:g} larger than {GAIN_LIMIT:,.0f}; take a larger ALPHA or smaller weights"
        raise Mistake("schedule", schedule, why)


def check_residual_window(start: float, end: float) -> None:
    """Raises Mistake where the part of the steps in which residual streaming acts is empty or out of range."""
    read_float("start", start, 0.0, 1.0)
    read_float("end", end, 0.0, 1.0)
    if start >= end:
        raise Mistake("start", f"{start:g}", f"must be below `end` {end:g}; no step is left")


@dataclass(frozen=True)
class ResidualConfig:
    """What is mixed where, when and how. No targets means off.

    targets and weights: one weight per target (given as one for all, a ramp, or none for 1.0, they are spread);
    schedule: factor on all weights by sigma, see `schedule_factor`; start, end: the part of a run's steps in which it
    acts, start <= step / steps < end; branch: both halves of guidance, or one; rotations: a file, for `aligned`.
    """

    origin: int = 0
    targets: tuple[int, ...] = ()
    weights: tuple[float, ...] | str = ()
    mode: str = "add"
    schedule: str = "constant"
    start: float = 0.0
    end: float = 1.0
    branch: str = "both"
    rotations: str | None = None

    def __post_init__(self) -> None:
        """Reads every field and keeps what was read, the weights spread over the targets; raises ValueError for a
        value out of its range and for anything that contradicts itself.
        """
        for name, read in _READ.items():
            if (value := getattr(self, name)) is not None or name != "rotations":
                object.__setattr__(self, name, read(name, value))
        check_residual(self.origin, self.targets, self.weights)
        check_residual_window(self.start, self.end)
        weights = spread_weights(self.weights, len(self.targets)) if self.targets else ()
        check_residual_strength(weights, self.schedule)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def parse(cls, origin: Any = None, targets: Any = None, weights: Any = None, **others: Any) -> ResidualConfig:
        """From flags in any shape (see `settings.read_list`); raises ValueError naming the flag."""
        read: dict[str, Any] = {}
        for name, value in {"origin": origin, "targets": targets, "weights": weights, **others}.items():
            if name not in _READ:
                raise Mistake(name, "", f"unknown{nearest(name, _READ)}")
            if value is not None:
                read[name] = _READ[name](name, value)
        return cls(**read)

    @classmethod
    def from_flags(cls, given: Mapping[str, Any], path: str | None = None) -> ResidualConfig:
        """Flags by their names without `residual_` (origin_layer, target_layers, weights, mode, ...), each of which
        replaces that field of the file `path`. Raises ValueError or FileNotFoundError.
        """
        fields = read_fields(path) if path else {}
        fields |= {_NAMES.get(name, name): value for name, value in given.items()}
        with renaming(RESIDUAL_FLAGS):
            return cls.parse(**fields)

    @classmethod
    def read(cls, path: str | Path) -> ResidualConfig:
        """From a file of ours or of the published kind, see `read_fields`."""
        return cls.from_flags({}, str(path))

    @property
    def active(self) -> bool:
        """Whether there is anything to mix."""
        return bool(self.targets)

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in `step` (from 0) of `steps`: start <= step / steps < end."""
        place = step + 1e-9  # 0.7 * 10 is a little more than 7
        return self.start * steps <= place < self.end * steps

    def check(self, depth: int) -> None:
        """Raises ValueError for a layer that a model of `depth` joint blocks does not have."""
        check_residual(self.origin, self.targets, self.weights, depth)

    def as_file(self, folder: str | Path = ".") -> dict[str, Any]:
        """What a file in `folder` holds, ready for JSON; a rotation file is named as seen from there."""
        values = dataclasses.asdict(self)
        if self.rotations is not None:
            try:
                values["rotations"] = Path(os.path.relpath(self.rotations, folder)).as_posix()
            except ValueError:  # another drive
                values["rotations"] = os.path.abspath(self.rotations)
        return {_KEYS.get(name, name): value for name, value in values.items()}


def _named_file(flag: str, value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"--{flag} {display(value)}: must name a file")
    return read_path(flag, value)


_FLAGS = {"origin": "origin_layer", "targets": "target_layers"}  # field -> flag without `residual_`
# field -> flag, which is also the field of `Settings`
RESIDUAL_FLAGS = {f.name: f"residual_{_FLAGS.get(f.name, f.name)}" for f in dataclasses.fields(ResidualConfig)}
_NAMES = {flag: name for name, flag in _FLAGS.items()}
_KEYS = _FLAGS | {"weights": "residual_weights"}  # field -> key in a file, as the published ones spell it
_READ: dict[str, Callable[[str, Any], Any]] = {name: READERS[flag] for name, flag in RESIDUAL_FLAGS.items()}
_READ["rotations"] = _named_file


def read_fields(path: str | Path) -> dict[str, Any]:
    """Fields of a `ResidualConfig` from a file: JSON with the flags' names less `residual_`, or a published weight
    file {"residual_weights", "origin_layer", "target_layers"}, JSON or .pth (read with weights_only).

    Raises FileNotFoundError, or ValueError that names file and key.
    """
    where = f"--residual_config {path}"
    pickled = _pickled(path, where)
    if pickled:
        raw = _unpickle(path, where)
    else:
        with reading(where, "is neither JSON nor a .pth file"):
            data = Path(path).read_bytes()
            if (what := describe(data[:512], len(data))) and what != "JSON":
                raise Unreadable(f"{where}: is neither JSON nor a .pth file: it is {what}")
            raw = parse_json(data.decode("utf-8-sig"), once=True)
    if not isinstance(raw, Mapping):
        raise ValueError(f'{where}: must hold an object such as {{"origin_layer": 1, "target_layers": "2-22"}}')
    fields = {}
    for key, value in raw.items():
        key = str(key).removeprefix("residual_")
        name = _NAMES.get(key, key)
        if name in fields:
            raise Unreadable(f"{where}: {key} is there twice, in two spellings")
        if name in _NAMES.values() or name in _READ:
            fields[name] = _plain(value, f"{where}: {key}")
        elif pickled:
            warnings.warn(f"{where}: not used, unknown: {key}", Note, stacklevel=2)
        else:
            keys = [_KEYS.get(name, name) for name in _READ]
            raise ValueError(f"{where}: unknown key {display(key)}{nearest(key, keys)} (known: {', '.join(keys)})")
    fields = {name: value for name, value in fields.items() if value is not None}
    if isinstance(fields.get("rotations"), str):
        beside = Path(path).parent / fields["rotations"]
        fields["rotations"] = str(beside if os.path.exists(beside) else fields["rotations"])
    try:
        ResidualConfig.parse(**{k: v for k, v in fields.items() if k in _READ})
    except Exception as error:  # values may be of any kind
        raise Unreadable(f"{where}: {error}") from None
    return fields


MOST_VALUES = 100_000  # in a list of a file


def _plain(value: Any, where: str) -> Any:
    """Tensors become numbers and lists; raises ValueError for one that is no plain list of real numbers."""
    if not hasattr(value, "tolist"):
        return value
    _check_tensor(value, where)
    if value.numel() > MOST_VALUES:
        raise Unreadable(f"{where}: has {value.numel():,} numbers; at most {MOST_VALUES:,} are read")
    return value.tolist()


def _check_tensor(tensor: Tensor, where: str) -> None:
    """Raises ValueError for a tensor from a pickle that is sparse, without memory, quantised or complex."""
    import torch

    wrong = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    if wrong or tensor.is_nested:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise Unreadable(f"{where}: is not a plain tensor of real numbers ({kind})")


def _pickled(path: str | Path, where: str) -> bool:
    """Whether a file is one of torch.save's: a zip archive or a bare pickle. A safetensors file may start with the
    same two bytes, its header's length, but has the header's brace after eight.

    Raises FileNotFoundError, or ValueError for what is no file.
    """
    check_file(where, path)
    with reading(where, "cannot be read"), open(path, "rb") as f:
        start = f.read(64)
    return (start[:2] == b"PK" or b"\x80\x02" <= start[:2] <= b"\x80\x0f") and not is_safetensors(start)


def _unpickle(path: str | Path, where: str) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about kinds of pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own words are many lines about how to load it all the same
        raise Unreadable(f"{where}: is damaged, or holds more than tensors and numbers; it is not loaded") from None


def build_residual_config(
    origin_layer: Any = None, target_layers: Any = None, weights: Sequence[Any] | Any = None, **others: Any
) -> ResidualConfig | None:
    """The configuration that flags describe, or None where they leave the feature off.

    others: mode, schedule, start, end, branch, rotations.
    """
    config = ResidualConfig.parse(origin_layer, target_layers, weights, **others)
    return config if config.active else None


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
        """Which bucket holds sigma; one on an edge belongs to the upper."""
        return bisect.bisect_right(self.edges, sigma)

    def matrix(self, target: int, sigma: float) -> Tensor:
        """(D, D) for a target."""
        return self.matrices[self.bucket(sigma), self.targets.index(target)]

    def check(self, config: ResidualConfig, width: int, where: str = "--residual_rotations") -> None:
        """Raises ValueError where they do not fit a configuration and a model of `width`."""
        _check_fit(self.origin, self.targets, self.matrices.shape[-1], config, width, where)


def _check_fit(
    origin: int, targets: Sequence[int], size: int, config: ResidualConfig, width: int | None, where: str
) -> None:
    if width is not None and size != width:
        raise ValueError(f"{where}: is for a model of width {size}, this one has {width}")
    if origin != config.origin:
        raise ValueError(f"{where}: was made for origin layer {origin}, not {config.origin}")
    missing = [t for t in config.targets if t not in targets]
    if missing:
        raise ValueError(
            f"{where}: has no rotation for target layers {', '.join(map(str, missing))}; "
            f"it has {', '.join(map(str, targets))}"
        )


def read_rotations(path: str | Path, config: ResidualConfig | None = None, width: int | None = None) -> Rotations:
    """Rotations from our .safetensors or a published .pt file: "rotation_matrices" (N, D, D) or (B, N, D, D) with
    "timestep_bucket_edges" (timesteps 0..1000 or sigmas 0..1; the inner ones, or with both ends), "target_layers",
    "origin_layer".

    Where a `config` is given, only its targets are read, and must be there. Raises FileNotFoundError, or ValueError
    that says what is wrong: not such a file, sizes that contradict each other, another origin, missing layers, a
    model of another `width`, a matrix that is not orthogonal.
    """
    import torch

    where = f"--residual_rotations {path}"
    if _pickled(path, where):
        raw = _unpickle(path, where)
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: must hold a dictionary with rotation_matrices")
        wanted_notes = ("target_layers", "origin_layer", "timestep_bucket_edges")
        notes = {k: _plain(raw[k], f"{where}: {k}") for k in wanted_notes if k in raw}
        matrices = raw.get("rotation_matrices")
        shape = tuple(matrices.shape) if isinstance(matrices, torch.Tensor) else None
        if shape is not None:
            _check_tensor(matrices, f"{where}: rotation_matrices")
            if not matrices.is_floating_point():
                raise Unreadable(f"{where}: rotation_matrices are {matrices.dtype}; numbers with a point are needed")
        take = lambda places: matrices[..., places, :, :]  # noqa: E731
    else:
        file = WeightFile(path, "residual_rotations")
        shape = file.entries["rotation_matrices"].shape if "rotation_matrices" in file.entries else None
        if shape is not None and (dtype := file.entries["rotation_matrices"].dtype) not in FLOATS:
            raise Unreadable(f"{where}: rotation_matrices are {dtype}; numbers with a point are needed")
        notes, take = _safetensors_notes(file, where)
    if shape is None:
        raise Unreadable(f"{where}: has no rotation_matrices: not a rotation file")
    for name in ("target_layers", "origin_layer"):
        if name not in notes:
            raise Unreadable(f"{where}: does not say its {name}")
    try:
        targets = read_layers("target_layers", notes["target_layers"])
        origin = read_int("origin_layer", notes["origin_layer"], 0)
        if not targets:
            raise ValueError("target_layers: none are there")
    except Exception as error:  # values may be of any kind
        raise Unreadable(f"{where}: {error}") from None
    square = len(shape) in (3, 4) and shape[-1] == shape[-2] and shape[-3] == len(targets)
    if not square or 0 in shape:
        told = "x".join(map(str, shape))
        raise ValueError(f"{where}: rotation_matrices is {told}; {len(targets)} square matrices are needed")
    edges, falling = _edges(notes.get("timestep_bucket_edges"), shape[0] if len(shape) == 4 else 1, where)
    if config is not None:
        _check_fit(origin, targets, shape[-1], config, width, where)
    wanted = targets if config is None else config.targets
    with reading(where, "cannot be read"):
        stacked = take([targets.index(t) for t in wanted]).float()
    stacked = stacked if stacked.ndim == 4 else stacked[None]  # (B, N, D, D)
    if falling:
        stacked = stacked.flip(0)
    for j, target in enumerate(wanted):
        for b in range(stacked.shape[0]):
            error = orthogonality(stacked[b, j])
            if not error <= LEAST_ORTHOGONAL:
                raise ValueError(
                    f"{where}: the matrix for target layer {target} is not orthogonal: R^T R differs from the "
                    f"identity by up to {error:.2g}; at most {LEAST_ORTHOGONAL:g} is taken"
                )
    return Rotations(origin, wanted, stacked.contiguous(), edges)


def _safetensors_notes(file: WeightFile, where: str) -> tuple[dict[str, Any], Callable[[list[int]], Tensor]]:
    import torch
    from safetensors import safe_open

    with reading(where, "its metadata is damaged"):
        names = ("target_layers", "origin_layer")
        notes = {k: parse_json(v) for k, v in file.metadata.items() if k in names}

    def take(places: list[int]) -> Tensor:
        with safe_open(file.path, framework="pt", device="cpu") as f:
            rows = f.get_slice("rotation_matrices")
            if len(rows.get_shape()) == 3:
                return torch.stack([rows[j] for j in places])
            return torch.stack([torch.stack([rows[b, j] for j in places]) for b in range(rows.get_shape()[0])])

    edges = file.entries.get("timestep_bucket_edges")
    if edges is not None:
        if edges.dtype in ("BOOL", "C64") or len(edges.shape) != 1 or edges.shape[0] > MOST_VALUES:
            kind = f"{edges.dtype} {list(edges.shape)}"
            raise Unreadable(f"{where}: timestep_bucket_edges must be a list of real numbers, not {kind}")
        with reading(where, "cannot be read"), safe_open(file.path, framework="pt", device="cpu") as f:
            notes["timestep_bucket_edges"] = f.get_tensor("timestep_bucket_edges").tolist()
    return notes, take


def _edges(given: Any, buckets: int, where: str) -> tuple[tuple[float, ...], bool]:
    """The sigmas between buckets, rising, and whether the file counts from high to low."""
    if buckets == 1:
        return (), False
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else []
    for edge in listed:
        if type(edge) not in (int, float) or abs(edge) > TIMESTEPS:
            raise Unreadable(f"{where}: timestep_bucket_edges must be numbers from 0 to {TIMESTEPS}, not {edge!r:.40}")
    edges = [float(edge) for edge in listed]
    if len(edges) not in (buckets - 1, buckets + 1):
        raise ValueError(
            f"{where}: {buckets} timestep buckets need {buckets - 1} or {buckets + 1} timestep_bucket_edges, "
            f"there are {len(edges)}"
        )
    falling = len(edges) > 1 and edges[0] > edges[-1]
    rising = edges[::-1] if falling else edges
    if not all(a < b for a, b in itertools.pairwise(rising)) or not all(map(math.isfinite, edges)):
        raise ValueError(f"{where}: timestep_bucket_edges must rise from each to the next: {given}")
    if max(rising) > 1:
        rising = [e / TIMESTEPS for e in rising]
    return tuple(rising[1:-1] if len(rising) == buckets + 1 else rising), falling


def orthogonality(matrix: Tensor) -> float:
    """Largest entry of |R^T R - I|; NaN where there is one in R."""
    import torch

    product = matrix.T @ matrix
    return (product - torch.eye(len(product), dtype=product.dtype, device=product.device)).abs().max().item()


def needs_rotations(config: ResidualConfig) -> None:
    """Raises Mistake where the mode is aligned and no rotation file is named."""
    if config.active and config.mode == "aligned" and not config.rotations:
        why = "needs `residual_rotations` FILE; `python sd3_probe.py calibrate` makes one for your model"
        raise Mistake("residual_mode", "aligned", why)
