"""From a grid to pictures: their settings, identities and batches."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd3.engine import Engine, load_for
from sd3.mistakes import Mistake, flag_name, spell, verbatim
from sd3.models import model_row
from sd3.planning import DECIDED_BY_MODEL, plan_for, unknown_words
from sd3.run import component_files
from sd3.settings import FILE_SETTINGS, IMAGE_ROWS, TEXT_FILES, Flags, Settings, Setup, earlier_digest
from sd3.sweep.grid import Grid, Variant

SHORT = 20  # letters of a digest in a file's name


@dataclass(frozen=True)
class Planned:
    """One picture of a sweep: where it stands (variant, prompt and seed by number) and what decides it."""

    variant: int
    prompt: int
    seed: int
    settings: Settings
    length: int  # T5 tokens, which pictures of a batch share
    id: str
    earlier: tuple[str, ...] = ()  # ids that versions had for it which counted flags without effect


@dataclass(frozen=True)
class Batch:
    """Pictures that share a run, at most batch_size; `engine` is the number of the engine that makes them."""

    engine: int
    pictures: tuple[Planned, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will hold, in the order in which it is made."""

    grid: Grid
    variants: tuple[Variant, ...]  # those of the grid, duplicates removed
    baselines: tuple[int, ...]  # by variant: the variant it is compared with, itself for a baseline
    engines: tuple[Flags, ...]  # flags that an engine is loaded with
    engine_of: tuple[int, ...]  # by variant
    pictures: tuple[Planned, ...]
    # By engine: what encodes text, and the components of a folder, see `TextEncoders.record`
    # and `run.component_files`.
    encoders: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    def batches(self, wanted: Collection[str]) -> list[Batch]:
        """The pictures whose ids are wanted, in order, in batches of one variant and one T5 length."""
        out: list[Batch] = []
        for number in range(len(self.variants)):
            pictures = sorted((p for p in self.of(number) if p.id in wanted), key=lambda p: p.length)
            for _, group in itertools.groupby(pictures, lambda p: p.length):
                together = list(group)
                size = together[0].settings.batch_size
                for start in range(0, len(together), size):
                    out.append(Batch(self.engine_of[number], tuple(together[start : start + size])))
        out.sort(key=lambda b: b.engine)  # stable: one load per engine
        return out

    def continued(self, present: Collection[str]) -> Plan:
        """The plan with those earlier ids under which pictures are present, so that a sweep begun by an earlier version
        goes on without making any twice. Each earlier id stands for one picture, the first that has it.
        """
        taken: set[str] = set()
        out = []
        for p in self.pictures:
            if p.id not in present and (earlier := [i for i in p.earlier if i in present and i not in taken]):
                p = replace(p, id=earlier[0])
            taken.add(p.id)
            out.append(p)
        return replace(self, pictures=tuple(out))

    def on_threads(self, recorded: Mapping[int, int]) -> Plan:
        """The plan with the threads that earlier pictures were made on, by engine, where no flag names others."""
        given = {e for e, v in zip(self.engine_of, self.variants, strict=True) if "threads" in v.raw}
        engines = [
            flags if number in given else replace(flags, threads=recorded.get(number, flags.threads))
            for number, flags in enumerate(self.engines)
        ]
        return replace(self, engines=tuple(engines))

    def of(self, variant: int) -> Sequence[Planned]:
        """The pictures of a variant."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        return self.pictures[variant * each : (variant + 1) * each]

    def compared_with(self, picture: Planned) -> list[Planned]:
        """The pictures whose baseline this one is."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = picture.prompt * len(self.grid.seeds) + self.grid.places[picture.seed]
        number = picture.variant
        return [self.pictures[v * each + place] for v, base in enumerate(self.baselines) if base == number != v]

    def baseline(self, picture: Planned) -> Planned:
        """The picture of the same prompt and seed that this one is compared with."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = self.grid.places[picture.seed]
        return self.pictures[self.baselines[picture.variant] * each + picture.prompt * len(self.grid.seeds) + place]


def make_plan(grid: Grid) -> tuple[Plan, list[str]]:
    """Settings of every picture, checked against the models that the variants name; headers are read, no weights.

    Returns the plan and notes for the shell. Raises Mistake as `sd3_infer.py` would.
    """
    planner = _Planner(grid)
    for variant in grid.variants:
        planner.add(variant)
    return planner.plan(), planner.notes()


class _Planner:
    """A plan as it grows, variant by variant. Engines are opened once; variants of equal settings become one."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.engines: dict[Setup, tuple[Flags, Engine]] = {}
        self.variants: list[Variant] = []
        self.engine_of: list[int] = []  # by variant
        self.pictures: list[list[Planned]] = []  # by variant
        self.numbers: dict[str, int] = {}  # a variant's number by its name; equal variants have one number
        self.first: dict[str, tuple[int, tuple]] = {}  # a first picture's digest -> variant's number, text encoders
        self.paths: dict[tuple[str, str], str] = {}  # by flag and name of a file
        self.lines: list[str] = []
        self.without_effect: dict[str, list[str]] = {}  # names of variants by note

    def add(self, variant: Variant) -> None:
        """Plans the pictures of a variant."""
        flags = Flags.read(variant.raw)
        place, engine = self._engine(flags)
        plan = plan_for(engine, flags, self.grid.prompts, list(self.grid.seeds) * len(self.grid.prompts))
        settings = plan.pictures
        for note in plan.notes:
            self.without_effect.setdefault(spell(note, flag_name), []).append(variant.name)
        check_names(settings[0], self.paths)
        number = self._number(variant, settings[0], tuple(getattr(flags, name) for name in TEXT_FILES))
        earlier = [()] * len(settings)
        if plan.as_given or settings[0].offload:
            earlier = [(earlier_digest(replace(s, **plan.as_given))[:SHORT],) for s in settings]
        if number < len(self.variants):
            self.lines.append(f"note: {variant.name} comes to the same as {self.variants[number].name}; made once")
            merged = zip(self.pictures[number], earlier, strict=True)
            self.pictures[number] = [replace(p, earlier=p.earlier + more) for p, more in merged]
            return
        self.variants.append(variant)
        self.engine_of.append(place)
        lengths = [engine.text.pair_length(p, settings[0].negative_prompt) for p in self.grid.prompts]
        prompts = [i // len(self.grid.seeds) for i in range(len(settings))]
        self.pictures.append(
            [
                Planned(number, prompt, s.seed, s, lengths[prompt], s.digest()[:SHORT], ids)
                for s, prompt, ids in zip(settings, prompts, earlier, strict=True)
            ]
        )

    def _engine(self, flags: Flags) -> tuple[int, Engine]:
        """The engine for some flags, with its number."""
        key = Setup.of(flags)
        if key not in self.engines:
            engine = load_for(flags)
            engine.tell.quiet = True
            self.engines[key] = (resolved(flags, engine), engine)
            words = unknown_words(engine.model_file.metadata, [*self.grid.prompts, flags.negative_prompt])
            self.lines.extend(spell(line, flag_name) for line in words)
        return list(self.engines).index(key), self.engines[key][1]

    def _number(self, variant: Variant, first: Settings, text_files: tuple) -> int:
        """A variant's number: that of an earlier one with the same settings, else the next."""
        number, same = self.first.setdefault(first.digest(), (len(self.variants), text_files))
        self.numbers[variant.name] = number
        if same != text_files:
            raise Mistake(
                "",
                f"{variant.name} and {self.variants[number].name}",
                "differ only in the text encoders' folder or files, which pictures do not name; make two sweeps",
            )
        return number

    def notes(self) -> list[str]:
        """Lines for the shell; flags without effect are named once, with the variants."""
        out = list(self.lines)
        for note, names in self.without_effect.items():
            where = names[0] if len(names) == 1 else f"{len(names)} of {len(self.grid.variants)} variants"
            out.append(f"{note} ({where})")
        return out

    def plan(self) -> Plan:
        """The whole plan."""
        engines = self.engines.values()
        return Plan(
            self.grid,
            tuple(self.variants),
            tuple(self.numbers[v.baseline] if v.baseline else i for i, v in enumerate(self.variants)),
            tuple(flags for flags, _ in engines),
            tuple(self.engine_of),
            tuple(itertools.chain.from_iterable(self.pictures)),
            tuple({**engine.text.record(), **component_files(engine)} for _, engine in engines),
        )


def resolved(flags: Flags, engine: Engine) -> Flags:
    """Flags with what an engine decided on (devices, dtype, threads), so that all workers take the same."""
    devices = {"device": str(engine.device), "text_encoder_device": str(engine.encoder_device)}
    return replace(flags, dtype=str(engine.dtype).removeprefix("torch."), threads=engine.threads, **devices)


def check_names(settings: Settings, paths: dict[tuple[str, str], str]) -> None:
    """Raises Mistake where two files of a sweep share a name, by which pictures are known."""
    for (flag, name), path in file_paths(settings).items():
        if paths.setdefault((flag, name), path) != path:
            raise Mistake(flag, path, f"is called as {verbatim(paths[flag, name])} is; rename one of them")


def file_paths(settings: Settings) -> dict[tuple[str, str], str]:
    """Paths of the files that a picture is made from, by flag and public name."""
    public, values = settings.public(), settings.asdict()
    return {(name, public[name]): values[name] for name in FILE_SETTINGS if values[name]}


def command(settings: Settings, raw: Flags) -> list[str]:
    """The words of the command that makes a picture of these settings, but for prompt and seed."""
    values, model = settings.asdict(), model_row(settings.model)
    words = ["python", "sd3_infer.py", f"--model={settings.model}"]
    words += [f"--{name}={values[name]}" for name in DECIDED_BY_MODEL]
    for name, row in IMAGE_ROWS.items():
        implied = name in ("prompt", "seed", "model", *DECIDED_BY_MODEL) or row.field or values[name] == row.default
        if not implied:
            value = values[name]
            words.append(f"--{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    if not settings.vae_tile:  # the flag's default is auto
        words.append("--vae_tile=off")
    words += [f"--{name}={path}" for name in TEXT_FILES if (path := getattr(raw, name))]
    if raw.threads is not None:
        words.append(f"--threads={raw.threads}")
    if settings.skip_layer is not None and settings.skip_layer == model.skip_layer:
        words.append("--skip_layer_cfg")
    if settings.batch_size > 1:
        words.append("--pad_batch")
    return [shlex.quote(w) for w in words]


def describe(plan: Plan) -> Iterator[str]:
    """Lines that name the parts of a plan."""
    prompts, seeds = len(plan.grid.prompts), len(plan.grid.seeds)
    parts = [(prompts, "prompt"), (seeds, "seed"), (len(plan.variants), "variant")]
    counts = " x ".join(f"{n} {what}{'s' if n != 1 else ''}" for n, what in parts)
    yield f"{counts} = {len(plan.pictures)} picture{'s' if len(plan.pictures) != 1 else ''}"
    for variant in plan.variants:
        against = f"  (against {variant.baseline})" if variant.baseline not in (None, "off") else ""
        yield f"  {variant.name}{against}"
