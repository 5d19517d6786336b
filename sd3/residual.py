"""The configuration of residual text streaming: fields, checks, files. `mmditx` has the method itself."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.files import describe
from sd3.flags import FLAGS
from sd3.mistakes import Mistake, Where, display, nearest, renaming, verbatim
from sd3.pickles import is_pickle, plain_value, read_pickle
from sd3.readers import read_path, read_weights, spread_weights
from sd3.reading import parse_json, reading, warn
from sd3.versions import __version__

if TYPE_CHECKING:
    from mmditx import ResidualStream
    from sd3.rotations import Rotations

NEEDS_ROTATIONS = "needs `rotations` FILE; `python sd3_probe.py calibrate` makes one for your model"
GAIN_LIMIT = 60_000.0  # largest weight times schedule: float16 ends at 65504


@dataclass(frozen=True)
class ResidualConfig:
    """What is mixed where, when and how. Without targets it is off.

    origin: block whose incoming text tokens are streamed; targets: blocks in front of which they are mixed in; weights:
    one per target (`each:W`, a ramp, or none for 1.0 are expanded); mode: add, anchored or aligned; schedule: factor on
    all weights as a function of sigma, see `mmditx.schedule_factor`; start, end: fractions of the steps that run, it
    acts where start <= step / steps < end; branch: the passes in which it acts, both, cond or uncond; rotations: the
    file for mode aligned; tokens: which text tokens are mixed: all, words (all but padding), padding, clip or t5.
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
    tokens: str = "all"

    def __post_init__(self) -> None:
        """Replaces every field by its checked value and expands the weights; raises Mistake for values out of range
        and for contradictory fields.
        """
        for name, read in _READ.items():
            if (value := getattr(self, name)) is not None or name != "rotations":
                object.__setattr__(self, name, read(name, value))
        self._check_targets()
        weights = spread_weights(self.weights, len(self.targets)) if self.active else ()
        object.__setattr__(self, "weights", weights)
        self._check_weights()
        if self.start >= self.end:
            raise Mistake("start", f"{self.start:g}", f"must be below `end` {self.end:g}; no step is left")

    @classmethod
    def parse(cls, origin: Any = None, targets: Any = None, weights: Any = None, **others: Any) -> ResidualConfig:
        """From values; None means not given. Raises Mistake, also for an unknown name."""
        values = {"origin": origin, "targets": targets, "weights": weights, **others}
        for name in values:
            if name not in _READ:
                raise Mistake(name, "", f"unknown{nearest(name, _READ)}")
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_flags(cls, given: Mapping[str, Any], path: str | None = None) -> ResidualConfig:
        """From the file `path` and flags that override its fields, under their names without `residual_` (origin_layer,
        target_layers, weights, mode, ...). Raises Mistake, which names flags.
        """
        fields = read_fields(path) if path else {}
        fields |= {_NAMES.get(name, name): value for name, value in given.items()}
        with renaming(RESIDUAL_FLAGS):
            return cls.parse(**fields)

    @classmethod
    def read(cls, path: str | Path) -> ResidualConfig:
        """From a file, see `read_fields`; raises Missing and Mistake."""
        return cls(**read_fields(path))

    @property
    def active(self) -> bool:
        """Whether there are targets."""
        return bool(self.targets)

    @property
    def aligned(self) -> bool:
        """Whether rotations are needed."""
        return self.active and self.mode == "aligned"

    def acts(self, step: float, steps: int) -> bool:
        """Whether start <= step / steps < end, for `step` (from 0) of the `steps` that run."""
        place = step + 1e-9  # for rounding: 0.7 * 10 is slightly above 7
        return self.start * steps <= place < self.end * steps

    def check(self, depth: int) -> None:
        """Raises Mistake for a layer that a model with `depth` joint blocks does not have."""
        if not self.active:
            return
        for name, layers in (("origin", (self.origin,)), ("targets", self.targets)):
            for layer in layers:
                if layer >= depth:
                    why = f"no such layer (this model has {depth} joint blocks: 0 to {depth - 1})"
                    raise Mistake(name, layer, why)

    def check_rotations(self) -> None:
        """Raises Mistake if the mode needs a rotation file and none is given."""
        if self.aligned and self.rotations is None:
            raise Mistake("mode", self.mode, NEEDS_ROTATIONS)

    def _check_targets(self) -> None:
        seen: set[int] = set()
        for target in self.targets:
            if target in seen:
                raise Mistake("targets", "", f"layer {target} is listed twice")
            if target < self.origin:
                raise Mistake("targets", target, f"lies below the origin layer {self.origin}")
            seen.add(target)

    def _check_weights(self) -> None:
        """Raises Mistake if the number of weights is not that of targets, and if a weight times its schedule exceeds
        the range of float16: a negative ALPHA makes it e^-ALPHA times as large.
        """
        if len(self.weights) != len(self.targets):
            given = f"{len(self.weights)} given for {len(self.targets)} target layers"
            raise Mistake("weights", "", f"{given}; give one each, each:{self.weights[0]:g} for all, or none for 1.0")
        if not self.schedule.startswith("exp:"):
            return
        largest = max(map(abs, self.weights), default=0.0)
        if largest and math.log(largest) - min(float(self.schedule.removeprefix("exp:")), 0.0) > math.log(GAIN_LIMIT):
            why = f"makes the weight {largest:g} larger than {GAIN_LIMIT:,.0f}; take a larger ALPHA or smaller weights"
            raise Mistake("schedule", self.schedule, why)

    def as_file(self, folder: str | Path = ".") -> dict[str, Any]:
        """The JSON object for a file in `folder`, as `read_fields` reads it: the fields, the rotation file relative to
        the folder, and this tool's version.
        """
        values = dataclasses.asdict(self)
        if self.tokens == "all":  # earlier versions do not know this key
            del values["tokens"]
        if self.rotations is not None:
            try:
                values["rotations"] = Path(os.path.relpath(self.rotations, folder)).as_posix()
            except ValueError:  # another drive
                values["rotations"] = os.path.abspath(self.rotations)
        return {"version": __version__} | {_KEYS.get(name, name): value for name, value in values.items()}


def _read_named_file(field: str, value: Any) -> str:
    if isinstance(value, str) and not value.strip():
        raise Mistake(field, value, "must name a file")
    return read_path(field, value)


_FLAGS = {"origin": "origin_layer", "targets": "target_layers"}  # field -> flag without `residual_`
# field -> flag, which is also the field of `Settings`
RESIDUAL_FLAGS = {f.name: f"residual_{_FLAGS.get(f.name, f.name)}" for f in dataclasses.fields(ResidualConfig)}
_NAMES = {flag: name for name, flag in _FLAGS.items()}
_KEYS = _FLAGS | {"weights": "residual_weights"}  # field -> key in a file, as in the published files
_READ: dict[str, Callable[[str, Any], Any]] = {name: FLAGS[flag].read for name, flag in RESIDUAL_FLAGS.items()}
_READ["rotations"] = _read_named_file


def read_fields(path: str | Path) -> dict[str, Any]:
    """Fields of a `ResidualConfig` from a file: JSON with the flags' names, with or without `residual_`; or a published
    weight file {"residual_weights", "origin_layer", "target_layers"}, JSON or .pth (read with weights_only).

    In a file by an earlier version of this tool (all keys but no version), a single weight applies to all targets.
    Raises Missing, or Mistake that names file and key.
    """
    where = Where("residual_config", path)
    pickled = is_pickle(where, path)
    raw = read_pickle(where, path) if pickled else _read_json(where, path)
    if not isinstance(raw, Mapping):
        raise Mistake(*where, 'must hold an object such as {"origin_layer": 1, "target_layers": "2-22"}')
    fields = {}
    for key, value in raw.items():
        if key in ("version", "preset"):  # what wrote it; about a published preset
            continue
        key = str(key).removeprefix("residual_")
        name = _NAMES.get(key, key)
        if name in fields:
            raise Mistake(*where, f"{key} is listed twice, in two spellings")
        if name in _READ:
            fields[name] = plain_value(value, where, key)
        elif pickled:
            file, unknown = verbatim(display(path)), verbatim(display(key))
            warn(f"`{where.field}` {file}: not used, unknown: {unknown}")
        else:
            keys = [_KEYS.get(name, name) for name in _READ]
            others = f"{nearest(key, keys)} (known: {', '.join(keys)})"
            raise Mistake(*where, f"unknown key {verbatim(display(key))}{others}")
    earlier = "version" not in raw and fields.keys() == _READ.keys() - {"tokens"}
    fields = {name: value for name, value in fields.items() if value is not None}
    if isinstance(fields.get("rotations"), str):
        beside = Path(path).parent / fields["rotations"]
        fields["rotations"] = str(beside if os.path.exists(beside) else fields["rotations"])
    try:
        with renaming(RESIDUAL_FLAGS):
            if earlier and "weights" in fields:
                fields["weights"] = _one_for_all(fields["weights"])
            ResidualConfig(**fields)
    except Exception as error:  # values may have any type
        raise Mistake(*where, verbatim(str(error))) from None
    return fields


def _one_for_all(weights: Any) -> tuple[float, ...] | str:
    read = read_weights("weights", weights)
    return f"each:{read[0]}" if isinstance(read, tuple) and len(read) == 1 else read


def _read_json(where: Where, path: str | Path) -> Any:
    with reading(where, "is neither JSON nor a .pth file"):
        data = Path(path).read_bytes()
        if (what := describe(data[:512], len(data))) and what != "JSON":
            raise Mistake(*where, f"is neither JSON nor a .pth file: it is {what}")
        return parse_json(data.decode("utf-8-sig"), once=True)


def build_residual_config(
    origin_layer: Any = None, target_layers: Any = None, weights: Sequence[Any] | Any = None, **others: Any
) -> ResidualConfig | None:
    """A configuration from values in any form; None without targets: residual streaming is then off.

    others: mode, schedule, start, end, branch, rotations, tokens.
    """
    config = ResidualConfig.parse(origin_layer, target_layers, weights, **others)
    return config if config.active else None


def read_residual(config: ResidualConfig | None, field: str = "residual_config") -> ResidualConfig:
    """Checks a configuration from Python; None means off. Raises Mistake for another type; field: what it names."""
    if config is None or isinstance(config, ResidualConfig):
        return config or ResidualConfig()
    raise Mistake(field, config, 'must be a ResidualConfig, such as ResidualConfig(targets="3-7", weights="each:0.1")')


def residual_stream(config: ResidualConfig | None, rotations: Rotations | None = None) -> ResidualStream | None:
    """The stream of a configuration, or None if it is off.

    Raises Mistake if the mode is aligned and no rotations are given.
    """
    from mmditx import ResidualStream  # imports torch, which checking settings does not need

    if config is None or not config.active:
        return None
    if config.aligned and rotations is None:
        raise Mistake("mode", config.mode, NEEDS_ROTATIONS)
    return ResidualStream(
        config.origin,
        dict(zip(config.targets, config.weights, strict=True)),
        config.mode,
        config.schedule,
        config.branch,
        acts=config.acts,
        rotations=rotations if config.aligned else None,
        tokens=config.tokens,
    )
