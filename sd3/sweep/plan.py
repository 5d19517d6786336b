"""The plan of a sweep: settings, ids and batches of all images of a grid."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd3.engine import Engine, load_for
from sd3.mistakes import Mistake, flag_name, spell, verbatim
from sd3.models import model_row
from sd3.planning import DECIDED_BY_MODEL, plan_for, unknown_words
from sd3.run import component_files
from sd3.settings import (
    FILE_SETTINGS,
    IMAGE_ROWS,
    TEXT_FILES,
    Flags,
    Settings,
    Setup,
    base_name,
    earlier_digest,
    paths_of,
)
from sd3.sweep.grid import Grid, Variant
from sd3.telling import NoteList

ID_LENGTH = 20  # letters of the digest in a file name


@dataclass(frozen=True)
class PlannedImage:
    """One image of a sweep: its place in the grid (index of variant and prompt, seed), and its settings."""

    variant: int
    prompt: int
    seed: int
    settings: Settings
    shape: tuple[int, int]  # of the encoded prompts, see `TextEncoders.shape`; one for all images of a batch
    id: str
    earlier: tuple[str, ...] = ()  # ids from versions that hashed flags without effect too


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together, at most batch_size; `engine`: index of their engine."""

    engine: int
    pictures: tuple[PlannedImage, ...]


@dataclass(frozen=True)
class Plan:
    """All images of a sweep, in the order in which they are made."""

    grid: Grid
    variants: tuple[Variant, ...]  # those of the grid, duplicates removed
    baselines: tuple[int, ...]  # by variant: index of its baseline; a baseline has its own index
    engines: tuple[Flags, ...]  # flags of each engine
    engine_of: tuple[int, ...]  # by variant
    pictures: tuple[PlannedImage, ...]
    # By engine: text encoders and components of a diffusers folder, see `TextEncoders.record` and
    # `run.component_files`.
    encoders: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    def batches(self, wanted: Collection[str]) -> list[Batch]:
        """The images with the `wanted` ids, in order, in batches of one variant and one number of text tokens."""
        out: list[Batch] = []
        for number in range(len(self.variants)):
            pictures = sorted((p for p in self.of(number) if p.id in wanted), key=lambda p: p.shape)
            for _, group in itertools.groupby(pictures, lambda p: p.shape):
                together = list(group)
                size = together[0].settings.batch_size
                for start in range(0, len(together), size):
                    out.append(Batch(self.engine_of[number], tuple(together[start : start + size])))
        out.sort(key=lambda b: b.engine)  # stable: one load per engine
        return out

    def with_earlier_ids(self, present: Collection[str]) -> Plan:
        """The plan with earlier ids for images that are present under them, so that a sweep begun by an earlier version
        resumes without making any image twice. Each earlier id stands for one image, the first that has it.
        """
        taken: set[str] = set()
        out = []
        for p in self.pictures:
            if p.id not in present and (earlier := [i for i in p.earlier if i in present and i not in taken]):
                p = replace(p, id=earlier[0])
            taken.add(p.id)
            out.append(p)
        return replace(self, pictures=tuple(out))

    def with_threads(self, recorded: Mapping[int, int]) -> Plan:
        """The plan with the `recorded` number of threads per engine, unless a flag sets it."""
        given = {e for e, v in zip(self.engine_of, self.variants, strict=True) if "threads" in v.raw}
        engines = [
            flags if number in given else replace(flags, threads=recorded.get(number, flags.threads))
            for number, flags in enumerate(self.engines)
        ]
        return replace(self, engines=tuple(engines))

    def of(self, variant: int) -> Sequence[PlannedImage]:
        """The images of a variant."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        return self.pictures[variant * each : (variant + 1) * each]

    def compared_to(self, picture: PlannedImage) -> list[PlannedImage]:
        """The images that have this one as their baseline."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = picture.prompt * len(self.grid.seeds) + self.grid.places[picture.seed]
        number = picture.variant
        return [self.pictures[v * each + place] for v, base in enumerate(self.baselines) if base == number != v]

    def baseline(self, picture: PlannedImage) -> PlannedImage:
        """The baseline of this image, with the same prompt and seed."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = self.grid.places[picture.seed]
        return self.pictures[self.baselines[picture.variant] * each + picture.prompt * len(self.grid.seeds) + place]


def make_plan(grid: Grid) -> tuple[Plan, list[str]]:
    """Resolves and checks the settings of every image. Reads the headers of the models, no weights.

    Returns the plan, and notes to print. Raises Mistake as `sd3_infer.py` would.
    """
    planner = _Planner(grid)
    for variant in grid.variants:
        planner.add(variant)
    return planner.plan(), planner.notes()


class _Planner:
    """Builds a plan variant by variant. Opens each engine once; merges variants with equal settings."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.engines: dict[Setup, tuple[Flags, Engine]] = {}
        self.variants: list[Variant] = []
        self.engine_of: list[int] = []  # by variant
        self.pictures: list[list[PlannedImage]] = []  # by variant
        self.numbers: dict[str, int] = {}  # index of a variant by its name; equal variants share one
        self.first: dict[str, tuple[int, tuple]] = {}  # digest of a first image -> index of its variant, text encoders
        self.paths: dict[tuple[str, str], str] = {}  # by flag and file name
        self.loading = NoteList(flag_name)  # notes of the engines, each once
        self.lines: list[str] = []
        self.without_effect: dict[str, list[str]] = {}  # names of variants by note

    def add(self, variant: Variant) -> None:
        """Plans the images of a variant."""
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
            earlier = [(earlier_digest(replace(s, **plan.as_given))[:ID_LENGTH],) for s in settings]
        if number < len(self.variants):
            self.lines.append(f"note: {variant.name} has the same settings as {self.variants[number].name}; made once")
            merged = zip(self.pictures[number], earlier, strict=True)
            self.pictures[number] = [replace(p, earlier=p.earlier + more) for p, more in merged]
            return
        self.variants.append(variant)
        self.engine_of.append(place)
        shapes = [engine.text.shape(s) for s in settings[:: len(self.grid.seeds)]]
        prompts = [i // len(self.grid.seeds) for i in range(len(settings))]
        self.pictures.append(
            [
                PlannedImage(number, prompt, s.seed, s, shapes[prompt], s.digest()[:ID_LENGTH], ids)
                for s, prompt, ids in zip(settings, prompts, earlier, strict=True)
            ]
        )

    def _engine(self, flags: Flags) -> tuple[int, Engine]:
        """The engine for these flags, with its index."""
        key = Setup.of(flags)
        if key not in self.engines:
            self.loading.quiet = False
            engine = load_for(flags, self.loading)
            for note in unknown_words(engine.model_file.metadata, [*self.grid.prompts, flags.negative_prompt]):
                self.loading.note(note)
            self.loading.quiet = True  # notes on prompts come when images are made
            self.engines[key] = (resolve_flags(flags, engine), engine)
        return list(self.engines).index(key), self.engines[key][1]

    def _number(self, variant: Variant, first: Settings, text_files: tuple) -> int:
        """The index of a variant: that of an earlier one with the same settings, else the next."""
        number, same = self.first.setdefault(first.digest(), (len(self.variants), text_files))
        self.numbers[variant.name] = number
        if same != text_files:
            raise Mistake(
                "",
                f"{variant.name} and {self.variants[number].name}",
                "differ only in the folder or files of the text encoders, which ids do not cover; make two sweeps",
            )
        return number

    def notes(self) -> list[str]:
        """Notes to print; each flag without effect is named once, with its variants."""
        out = [*self.loading.lines, *self.lines]
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


def resolve_flags(flags: Flags, engine: Engine) -> Flags:
    """Flags with the devices, dtype and threads that an engine chose, so that all workers use the same."""
    devices = {"device": str(engine.device), "text_encoder_device": str(engine.encoder_device)}
    return replace(flags, dtype=str(engine.dtype).removeprefix("torch."), threads=engine.threads, **devices)


def check_names(settings: Settings, paths: dict[tuple[str, str], str]) -> None:
    """Raises Mistake if two files of a sweep share a name: ids are hashed from names, not paths."""
    for (flag, name), path in file_paths(settings).items():
        first = paths.setdefault((flag, name), path)
        if first != path and os.path.realpath(first) != os.path.realpath(path):
            raise Mistake(flag, path, f"has the same name as {verbatim(first)}; rename one of them")


def file_paths(settings: Settings) -> dict[tuple[str, str], str]:
    """Paths of the files that an image is made from, by flag and file name."""
    return {(name, base_name(path)): path for name in FILE_SETTINGS for path in paths_of(getattr(settings, name))}


def command(settings: Settings, raw: Flags) -> list[str]:
    """The command that makes an image with these settings, quoted for a shell, without prompt and seed."""
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
    """Lines that describe a plan: counts, then one line per variant."""
    prompts, seeds = len(plan.grid.prompts), len(plan.grid.seeds)
    parts = [(prompts, "prompt"), (seeds, "seed"), (len(plan.variants), "variant")]
    counts = " x ".join(f"{n} {what}{'s' if n != 1 else ''}" for n, what in parts)
    yield f"{counts} = {len(plan.pictures)} image{'s' if len(plan.pictures) != 1 else ''}"
    for variant in plan.variants:
        against = f"  (against {variant.baseline})" if variant.baseline not in (None, "off") else ""
        yield f"  {variant.name}{against}"
