"""The grid of a sweep: prompts, seeds, and variants of all other settings. Needs no torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3.flags import DEFAULT_SEED, FLAGS, MOST_PICTURES, check_flag
from sd3.mistakes import Mistake, Where, display, verbatim
from sd3.prompts import read_jsonl, read_prompts
from sd3.readers import SEED_LIMIT, read_float, read_int, read_layers, read_list, read_path, read_text
from sd3.reading import check_file, reading
from sd3.settings import Flags, base_name, with_paths

SWEPT = {name: row for name, row in FLAGS.items() if not row.sweep}
WHOLE = (
    "seed",
    *(name for name, row in SWEPT.items() if row.read.kind == "text"),
)  # `;` is an ordinary letter in these
LISTS = tuple(name for name, row in SWEPT.items() if row.read.kind in ("layers", "weights"))
MOST_SEEDS = MOST_PICTURES
OFF = "off"


@dataclass(frozen=True)
class Variant:
    """One choice of all flags of `sd3_infer.py` but prompt and seed, as typed, and the name of its baseline (None for a
    baseline).
    """

    name: str
    raw: Mapping[str, Any]
    baseline: str | None = None


@dataclass(frozen=True)
class Grid:
    """Every prompt with every seed and every variant; variants in the order in which they are made, baselines first."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    @cached_property
    def places(self) -> dict[int, int]:
        """Index of each seed."""
        return {seed: i for i, seed in enumerate(self.seeds)}

    @classmethod
    def read(cls, raw: Mapping[str, Any], file: str | None = None, prompts: Sequence[str] | None = None) -> Grid:
        """Reads flags as typed, alternatives separated by `;`, over the values of a YAML file.

        prompts: in place of --prompt. Raises Mistake for every value that `sd3_infer.py` refuses.
        """
        values, named = read_yaml(file) if file else ({}, {})
        values |= raw
        check_names(values)
        if prompts is None:
            prompts = read_axis_prompts(values.get("prompt"))
        prompts = tuple(dict.fromkeys(prompts))
        seeds = read_seeds(values.get("seed", DEFAULT_SEED))
        axes = {n: alternatives(n, v) for n, v in values.items() if n not in ("prompt", "seed")}
        for flag, items in [*axes.items(), *((n, [v]) for flags in named.values() for n, v in flags.items())]:
            for item in items:
                SWEPT[flag].read(flag, item)
        each = len(prompts) * len(seeds)
        check_count(each * count_variants(axes, named))  # before building them, which may take long
        variants = cross(axes, named)
        check_count(each * len(variants))
        return cls(prompts, seeds, variants)


def check_count(pictures: int) -> None:
    """Raises Mistake if a grid has too many images."""
    if pictures > MOST_PICTURES:
        raise Mistake("", "", f"this grid has {pictures:,} images; at most {MOST_PICTURES:,}")


def count_variants(axes: Mapping[str, Sequence[Any]], named: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of variants that `cross` makes, found by multiplication, without the baselines that it adds for named
    variants.
    """
    product = lambda names: math.prod(len(axes[n]) for n in names)  # noqa: E731
    plain = [n for n in axes if not is_residual(n)]
    residual = [n for n in axes if is_residual(n)]
    off = 0
    if not {"residual_config", "residual_preset"} & axes.keys():
        targets = axes.get("residual_target_layers", [None])
        others = (n for n in residual if n != "residual_target_layers")
        off = sum(not read_layers("residual_target_layers", t) for t in targets) * product(others)
    mixed = product(residual) - off if residual else 0
    return product(plain) * (1 + mixed) + sum(product(n for n in plain if n not in flags) for flags in named.values())


def check_names(values: Iterable[str]) -> None:
    """Raises Mistake for an unknown flag and for one that a sweep does not allow."""
    for name in values:
        if name in FLAGS and FLAGS[name].sweep:
            raise Mistake(name, "", f"is not allowed in a sweep; {FLAGS[name].sweep}")
        check_flag(name, SWEPT)


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Values by flag, and named variants, of a YAML file; numbers and words stay text, as written."""
    try:
        import yaml
    except ImportError:
        raise Mistake("grid", "", "needs PyYAML; get it with: pip install -r requirements-sweep.txt") from None
    path = read_path("grid", path)
    where = Where("grid", path)
    check_file(where, path)

    class Loader(yaml.BaseLoader):
        """Refuses duplicate keys: PyYAML would keep the last one only and could drop a whole named variant."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{display(twice)} is listed twice")
            return super().construct_mapping(node, deep)

    with reading(where, "cannot be read as YAML"):
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=Loader)
    if not isinstance(values, dict):
        raise Mistake(*where, "must name flags and their values, such as `seed: 0-3`")
    named = values.pop("variants", None) or {}
    if not isinstance(named, dict) or not all(isinstance(v, dict) for v in named.values()):
        raise Mistake(*where, "variants must be names with flags under them")
    for name, flags in named.items():
        read_text("grid", name)
        if name.strip().lower() in (OFF, ""):
            raise Mistake(*where, f"a variant {verbatim(repr(name))} cannot have that name; off is the baseline")
        check_names(flags)
        for flag in ("prompt", "seed"):
            if flag in flags:
                raise Mistake(*where, f"{verbatim(display(name))}: {flag} cannot differ between variants")
        for flag, value in flags.items():
            items = alternatives(flag, value)
            if len(items) != 1:
                raise Mistake(*where, f"{verbatim(display(name))}: {flag} must have one value in a named variant")
            flags[flag] = items[0]
    return values, named


def alternatives(flag: str, value: Any) -> list[Any]:
    """The values of an axis: separated by `;`, or the items of a list. For flags that take a list, a list of numbers
    is one value.
    """
    if isinstance(value, (list, tuple)):
        items = [value] if flag in LISTS and all(map(_is_number, value)) else list(value)
    elif isinstance(value, str) and ";" in value and flag not in WHOLE:
        items = [part.strip() for part in value.split(";")]
        items = items[:-1] if items[-1] == "" else items
    else:
        items = [value]
    if not items:
        raise Mistake(flag, "", "is an empty list")
    return items


def _is_number(value: Any) -> bool:
    try:
        read_float("", value)
    except Mistake:
        return False
    return True


def read_axis_prompts(value: Any) -> list[str]:
    """Prompts from a text, a .txt or .jsonl file, or a list of texts; raises Mistake."""
    if value is None:
        raise Mistake("prompt", "", "is required: a text, or a .txt file with one prompt per line")
    if isinstance(value, (list, tuple)):
        texts = [read_text("prompt", v) for v in value]
        if not texts or not all(text.strip() for text in texts):
            raise Mistake("prompt", "", "must be texts")
        return texts
    if read_text("prompt", value).lower().endswith(".jsonl"):
        form = '{"prompt": "..."}'
        return [row["prompt"] for row in read_jsonl("prompt", value, lambda r: isinstance(r["prompt"], str), form)]
    return read_prompts(value)[0]


def read_seeds(value: Any) -> tuple[int, ...]:
    """Seeds and ranges of seeds, duplicates removed: `0-3`, `0-3;10`, `1,5,9`."""
    items = value.split(";") if isinstance(value, str) else value
    seeds: dict[int, None] = {}
    for item in read_list("seed", items):
        match = re.fullmatch(r"([0-9]+)-([0-9]+)", item) if isinstance(item, str) else None
        ends = (match[1], match[2]) if match else (item, item)
        first, last = (read_int("seed", n, 0, SEED_LIMIT - 1) for n in ends)
        if last < first or last - first >= MOST_SEEDS:
            raise Mistake("seed", item, f"a range counts up, such as 0-3, and has at most {MOST_SEEDS:,} seeds")
        seeds |= dict.fromkeys(range(first, last + 1))
        if len(seeds) > MOST_SEEDS:
            raise Mistake("seed", "", f"names more than {MOST_SEEDS:,} seeds")
    if not seeds:
        raise Mistake("seed", "", "names no seed")
    return tuple(seeds)


def is_residual(flag: str) -> bool:
    """Whether a flag belongs to residual text streaming."""
    return flag.startswith("residual_")


def cross(axes: Mapping[str, Sequence[Any]], named: Mapping[str, Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The baselines, one per combination of the plain axes (those that are not residual), then the combinations with
    residual axes, then the named variants, which ignore the residual axes.
    """
    plain = {n: v for n, v in axes.items() if not is_residual(n)}
    residual = {n: v for n, v in axes.items() if is_residual(n)}
    variants = _Variants(plain)
    for raw in combinations(plain):
        variants.off(raw)
    replaced = []  # named variants: name, values of the axes, raw flags, raw flags of the baseline
    for name, flags in named.items():
        for raw in combinations({n: v for n, v in plain.items() if n not in flags}):
            whole, first = raw | dict(flags), {n: v[0] for n, v in plain.items() if n in flags}
            without = whole if any(map(is_residual, flags)) else first | raw
            replaced.append((name, raw, whole, without))
            variants.off(without)
    if residual:
        for raw in combinations(plain | residual):
            if residual_label(raw) != OFF:
                variants.add(", ".join([residual_label(raw), *labels(raw, plain)]), raw, variants.off(raw))
    for name, raw, whole, without in replaced:
        variants.add(", ".join([name, *labels(raw, plain)]), whole, variants.off(without))
    return tuple(variants.by_name.values())


class _Variants:
    """Variants in the order in which they are made, each with a unique name."""

    def __init__(self, plain: Mapping[str, Sequence[Any]]):
        """plain: the axes that do not belong to residual text streaming."""
        self.plain = plain
        self.by_name: dict[str, Variant] = {}
        self.baselines: dict[str, str] = {}  # names of the baselines by their settings
        self.numbers: dict[str, int] = {}  # variants per label

    def add(self, label: str, raw: dict[str, Any], baseline: str | None) -> str:
        """Adds a variant; returns its name: the label, numbered if that is taken. Raises Mistake."""
        Flags.read(raw)
        name = label
        while name in self.by_name:
            self.numbers[label] = self.numbers.get(label, 1) + 1
            name = f"{label} ({self.numbers[label]})"
        self.by_name[name] = Variant(name, raw, baseline)
        return name

    def off(self, raw: Mapping[str, Any]) -> str:
        """The name of the baseline for these settings, added on first use."""
        settings = {n: v for n, v in raw.items() if not is_residual(n)}
        key = repr(sorted(settings.items()))
        if key not in self.baselines:
            self.baselines[key] = self.add(", ".join([OFF, *labels(settings, self.plain)]), settings, None)
        return self.baselines[key]


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value per axis; the last axis varies fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def labels(raw: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[str]:
    """`cfg 3`, for every plain flag that differs between variants."""
    differs = [n for n in raw if not is_residual(n) and (n not in axes or len(axes[n]) > 1)]
    return [f"{n} {_short(n, raw[n])}" for n in differs]


def _short(flag: str, value: Any) -> str:
    """A value for a label, files without their folders."""
    if SWEPT[flag].read.kind == "patch files":
        files = with_paths(SWEPT[flag].read(flag, value), base_name) or ["none"]
        return ",".join(map(str, files))
    return base_name(str(value))


def residual_label(raw: Mapping[str, Any]) -> str:
    """`[MODE:]ORIGIN:TARGETS:WEIGHTS` and other residual flags, or off."""
    targets = read_layers("residual_target_layers", raw.get("residual_target_layers"))
    if not {"residual_config", "residual_preset"} & raw.keys() and not targets:
        return OFF
    text = {n.removeprefix("residual_"): _as_text(v) for n, v in raw.items() if is_residual(n)}
    out = [base_name(text.pop(name)) for name in ("config", "preset") if name in text]
    mode = text.pop("mode", "add")
    usual = "1.0" if len(targets) == 1 else "each:1.0"
    main = [text.pop("origin_layer", "0"), text.pop("target_layers", ""), text.pop("weights", usual)]
    if main[1]:
        out.insert(0, ":".join([*([mode] if mode != "add" else []), *main]))
    elif mode != "add":
        out.append(mode)
    return ", ".join(out + [f"{n} {base_name(v)}" for n, v in text.items()])


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else re.sub(r"\s*,\s*|\s+", ",", str(value))
