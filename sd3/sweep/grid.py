"""The grid of a sweep: which prompts, which seeds, which variants of all other settings. Needs no torch."""

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
from sd3.settings import Flags, base_name

SWEPT = {name: row for name, row in FLAGS.items() if not row.sweep}
WHOLE = ("seed", *(name for name, row in SWEPT.items() if row.read.kind == "text"))  # `;` separates nothing in these
LISTS = tuple(name for name, row in SWEPT.items() if row.read.kind in ("layers", "weights"))
MOST_SEEDS = MOST_PICTURES
OFF = "off"


@dataclass(frozen=True)
class Variant:
    """A column: raw flags of `sd3_infer.py` but for prompt and seed, and the column it is compared with (None for a
    baseline itself).
    """

    name: str
    raw: Mapping[str, Any]
    baseline: str | None = None


@dataclass(frozen=True)
class Grid:
    """prompts times seeds times variants; variants are in the order in which they are made, baselines first."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each seed stands among them."""
        return {seed: i for i, seed in enumerate(self.seeds)}

    @classmethod
    def read(cls, raw: Mapping[str, Any], file: str | None = None, prompts: Sequence[str] | None = None) -> Grid:
        """From flags as typed, alternatives separated by `;`, and a YAML file whose values they replace.

        prompts: in place of --prompt. Raises Mistake for every value that `sd3_infer.py`
        refuses too.
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
        check_count(each * count_variants(axes, named))  # before any of them is built
        variants = cross(axes, named)
        check_count(each * len(variants))
        return cls(prompts, seeds, variants)


def check_count(pictures: int) -> None:
    """Raises Mistake for a grid of too many pictures."""
    if pictures > MOST_PICTURES:
        raise Mistake("", "", f"this grid has {pictures:,} pictures; at most {MOST_PICTURES:,}")


def count_variants(axes: Mapping[str, Sequence[Any]], named: Mapping[str, Mapping[str, Any]]) -> int:
    """How many variants `cross` makes, by multiplication, without those that it adds for named variants to be compared
    with.
    """
    product = lambda names: math.prod(len(axes[n]) for n in names)  # noqa: E731
    plain = [n for n in axes if not is_residual(n)]
    residual = [n for n in axes if is_residual(n)]
    off = 0
    if "residual_config" not in axes:
        targets = axes.get("residual_target_layers", [None])
        others = (n for n in residual if n != "residual_target_layers")
        off = sum(not read_layers("residual_target_layers", t) for t in targets) * product(others)
    mixed = product(residual) - off if residual else 0
    return product(plain) * (1 + mixed) + sum(product(n for n in plain if n not in flags) for flags in named.values())


def check_names(values: Iterable[str]) -> None:
    """Raises Mistake for a flag that there is not, or that has no place in a sweep."""
    for name in values:
        if name in FLAGS and FLAGS[name].sweep:
            raise Mistake(name, "", f"has no place in a sweep; {FLAGS[name].sweep}")
        check_flag(name, SWEPT)


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Values by flag and named variants of a YAML file; every number and word stays the text that stands there."""
    try:
        import yaml
    except ImportError:
        raise Mistake("grid", "", "needs PyYAML; get it with: pip install -r requirements-sweep.txt") from None
    path = read_path("grid", path)
    where = Where("grid", path)
    check_file(where, path)

    class Loader(yaml.BaseLoader):
        """Takes no key twice: PyYAML would drop all but the last, a whole named variant perhaps."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{display(twice)} is there twice")
            return super().construct_mapping(node, deep)

    with reading(where, "cannot be read as YAML"):
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=Loader)
    if not isinstance(values, dict):
        raise Mistake(*where, "must name flags and their values, such as `seed: 0-3`")
    named = values.pop("variants", None) or {}
    if not isinstance(named, dict) or not all(isinstance(v, dict) for v in named.values()):
        raise Mistake(*where, "variants must be names with flags below them")
    for name, flags in named.items():
        read_text("grid", name)
        if name.strip().lower() in (OFF, ""):
            raise Mistake(*where, f"a variant {verbatim(repr(name))} cannot be named so; off is always there")
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
    """The values of an axis: separated by `;`, or the items of a list. A list of plain numbers is one value of the
    flags that take lists.
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
        raise Mistake("prompt", "", "is needed: a text, or a .txt file with one prompt a line")
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
    """Seeds and ranges of seeds: `0-3`, `0-3;10`, `1,5,9`, each once."""
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
    """Whether a flag says something of residual text streaming only."""
    return flag.startswith("residual_")


def cross(axes: Mapping[str, Sequence[Any]], named: Mapping[str, Mapping[str, Any]]) -> tuple[Variant, ...]:
    """The off variants, one for each combination of the axes that are not residual, then the combinations with residual
    axes, then the named variants, which replace residual axes.
    """
    plain = {n: v for n, v in axes.items() if not is_residual(n)}
    residual = {n: v for n, v in axes.items() if is_residual(n)}
    variants = _Variants(plain)
    for raw in combinations(plain):
        variants.off(raw)
    replaced = []  # named variants: name, values of the axes, raw flags, raw flags of what it is compared with
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
    """Variants in the order in which they are made, each with a name of its own."""

    def __init__(self, plain: Mapping[str, Sequence[Any]]):
        """plain: the axes that are not residual."""
        self.plain = plain
        self.by_name: dict[str, Variant] = {}
        self.baselines: dict[str, str] = {}  # names of the off variants by their settings
        self.numbers: dict[str, int] = {}  # how many variants have a label

    def add(self, label: str, raw: dict[str, Any], baseline: str | None) -> str:
        """Adds a variant; returns its name: the label, with a number where that is taken. Raises Mistake."""
        Flags.read(raw)
        name = label
        while name in self.by_name:
            self.numbers[label] = self.numbers.get(label, 1) + 1
            name = f"{label} ({self.numbers[label]})"
        self.by_name[name] = Variant(name, raw, baseline)
        return name

    def off(self, raw: Mapping[str, Any]) -> str:
        """The name of the baseline of some settings, which is added on first use."""
        settings = {n: v for n, v in raw.items() if not is_residual(n)}
        key = repr(sorted(settings.items()))
        if key not in self.baselines:
            self.baselines[key] = self.add(", ".join([OFF, *labels(settings, self.plain)]), settings, None)
        return self.baselines[key]


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value per axis; the last axis turns fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def labels(raw: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[str]:
    """`cfg 3`, for every flag that is not residual and not the same in all variants."""
    differs = [n for n in raw if not is_residual(n) and (n not in axes or len(axes[n]) > 1)]
    return [f"{n} {base_name(str(raw[n]))}" for n in differs]


def residual_label(raw: Mapping[str, Any]) -> str:
    """`[MODE:]ORIGIN:TARGETS:WEIGHTS` and what else is set, or off."""
    targets = read_layers("residual_target_layers", raw.get("residual_target_layers"))
    if "residual_config" not in raw and not targets:
        return OFF
    text = {n.removeprefix("residual_"): _spelt(v) for n, v in raw.items() if is_residual(n)}
    out = [base_name(text.pop("config"))] if "config" in text else []
    mode = text.pop("mode", "add")
    usual = "1.0" if len(targets) == 1 else "each:1.0"
    main = [text.pop("origin_layer", "0"), text.pop("target_layers", ""), text.pop("weights", usual)]
    if main[1]:
        out.insert(0, ":".join([*([mode] if mode != "add" else []), *main]))
    elif mode != "add":
        out.append(mode)
    return ", ".join(out + [f"{n} {base_name(v)}" for n, v in text.items()])


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else re.sub(r"\s*,\s*|\s+", ",", str(value))
