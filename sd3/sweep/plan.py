"""From a grid to pictures: their settings, identities and batches."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sd3.engine import Engine, load_for, plan_for
from sd3.flags import Flags
from sd3.mistakes import Mistake
from sd3.models import SKIP_LAYERS, model_key
from sd3.settings import FILE_SETTINGS, TEXT_FILES, Settings, earlier_digest
from sd3.sweep.grid import Grid, Variant

ENGINE = (
    "model", "vae", "controlnet_ckpt", "model_folder", "clip_l", "clip_g", "t5xxl", "device", "text_encoder_device",
    "dtype", "no_t5", "t5_resident", "embed_cache", "weights", "compile", "offload",
)  # fmt: skip
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
    variants: tuple[Variant, ...]  # those of the grid, without such as come to the same settings
    baselines: tuple[int, ...]  # by variant: the variant it is compared with, itself for a baseline
    engines: tuple[Flags, ...]  # flags that an engine is loaded with
    engine_of: tuple[int, ...]  # by variant
    pictures: tuple[Planned, ...]
    # By engine: what encodes text, and the components of a folder, see `encoder_files` and `component_files`.
    encoders: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    def batches(self, wanted: Collection[str]) -> list[Batch]:
        """The pictures whose ids are wanted, in order, in batches of one variant and one T5 length."""
        out: list[Batch] = []
        for number in range(len(self.variants)):
            own = sorted((p for p in self.of(number) if p.id in wanted), key=lambda p: p.length)
            for _, group in itertools.groupby(own, lambda p: p.length):
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
            if p.id not in present and (known := [i for i in p.earlier if i in present and i not in taken]):
                p = replace(p, id=known[0])
            taken.add(p.id)
            out.append(p)
        return replace(self, pictures=tuple(out))

    def of(self, variant: int) -> Sequence[Planned]:
        """The pictures of a variant."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        return self.pictures[variant * each : (variant + 1) * each]

    def compared_with(self, picture: Planned) -> list[Planned]:
        """The pictures whose baseline this one is."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = picture.prompt * len(self.grid.seeds) + self.grid.places[picture.seed]
        own = picture.variant
        return [self.pictures[v * each + place] for v, base in enumerate(self.baselines) if base == own != v]

    def baseline(self, picture: Planned) -> Planned:
        """The picture of the same prompt and seed that this one is compared with."""
        each = len(self.grid.prompts) * len(self.grid.seeds)
        place = self.grid.places[picture.seed]
        return self.pictures[self.baselines[picture.variant] * each + picture.prompt * len(self.grid.seeds) + place]


def make_plan(grid: Grid) -> tuple[Plan, list[str]]:
    """Settings of every picture, checked against the models that the variants name; headers are read, no weights.

    Returns the plan and notes for the shell. Raises Mistake as `sd3_infer.py` would.
    """
    engines: dict[tuple, tuple[Flags, Engine]] = {}
    kept: dict[str, tuple[int, tuple]] = {}  # first picture's digest -> variant's number, where text encoders lie
    numbers: dict[str, int] = {}
    variants, engine_of, notes = [], [], []
    without_effect: dict[str, list[str]] = {}  # variants by note
    pictures: list[list[Planned]] = []  # by variant
    paths: dict[tuple[str, str], str] = {}
    for variant in grid.variants:
        flags = Flags.read(variant.raw)
        key = tuple(getattr(flags, name) for name in ENGINE)
        if key not in engines:
            engine = load_for(flags)
            engine.quiet = True
            engines[key] = (resolved(flags, engine), engine)
            if line := engine.unknown_words([*grid.prompts, flags.negative_prompt]):
                notes.append(line)
        engine = engines[key][1]
        seeds = list(grid.seeds) * len(grid.prompts)
        settings = plan_for(engine, flags, grid.prompts, seeds)
        for note in engine.notes:
            without_effect.setdefault(note, []).append(variant.name)
        check_names(settings[0], paths)
        text_files = tuple(getattr(flags, name) for name in TEXT_FILES)
        number, same = kept.setdefault(settings[0].digest(), (len(variants), text_files))
        numbers[variant.name] = number
        if same != text_files:
            raise Mistake(
                "",
                f"{variant.name} and {variants[number].name}",
                "differ only in the text encoders' folder or files, which pictures do not name; make two sweeps",
            )
        earlier = [()] * len(settings)
        if engine.as_given or settings[0].offload:
            earlier = [(earlier_digest(replace(s, **engine.as_given))[:SHORT],) for s in settings]
        if number < len(variants):
            notes.append(f"note: {variant.name} comes to the same as {variants[number].name}; made once")
            merged = zip(pictures[number], earlier, strict=True)
            pictures[number] = [replace(p, earlier=p.earlier + more) for p, more in merged]
            continue
        variants.append(variant)
        engine_of.append(list(engines).index(key))
        lengths = [engine.pair_length(p, settings[0].negative_prompt) for p in grid.prompts]
        places = [i // len(grid.seeds) for i in range(len(settings))]
        pictures.append(
            [
                Planned(number, place, s.seed, s, lengths[place], s.digest()[:SHORT], ids)
                for s, place, ids in zip(settings, places, earlier, strict=True)
            ]
        )
    for note, names in without_effect.items():
        notes.append(f"{note} ({names[0] if len(names) == 1 else f'{len(names)} of {len(grid.variants)} variants'})")
    return Plan(
        grid,
        tuple(variants),
        tuple(numbers[v.baseline] if v.baseline else i for i, v in enumerate(variants)),
        tuple(flags for flags, _ in engines.values()),
        tuple(engine_of),
        tuple(itertools.chain.from_iterable(pictures)),
        tuple({**engine.encoder_files(), **engine.component_files()} for _, engine in engines.values()),
    ), notes


def resolved(flags: Flags, engine: Engine) -> Flags:
    """Flags with the devices and the dtype that an engine decided on, so that all workers take the same."""
    devices = {"device": str(engine.device), "text_encoder_device": str(engine.encoder_device)}
    return replace(flags, dtype=str(engine.dtype).removeprefix("torch."), **devices)


def check_names(settings: Settings, paths: dict[tuple[str, str], str]) -> None:
    """Raises Mistake where two files of a sweep share a name, by which pictures are known."""
    for (flag, name), path in file_paths(settings).items():
        if paths.setdefault((flag, name), path) != path:
            raise Mistake(flag, path, f"is called as {paths[flag, name]} is; rename one of them")


def file_paths(settings: Settings) -> dict[tuple[str, str], str]:
    """Paths of the files that a picture is made from, by flag and public name."""
    public, values = settings.public(), settings.asdict()
    return {(name, public[name]): values[name] for name in FILE_SETTINGS if values[name]}


def command(settings: Settings, raw: Flags) -> list[str]:
    """The words of the command that makes a picture of these settings, but for prompt and seed."""
    usual = {field.name: field.default for field in fields(Settings)}
    words = ["python", "sd3_infer.py", f"--model={settings.model}"]
    for name in ("sampler", "steps", "cfg", "shift", "width", "height"):
        words.append(f"--{name}={getattr(settings, name)}")
    for name, value in settings.asdict().items():
        skipped = ("prompt", "seed", "model", "skip_layer", "sampler", "steps", "cfg", "shift", "width", "height")
        if name in skipped or value == usual[name]:
            continue
        words.append(f"--{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    if not settings.vae_tile:  # the flag's default is auto
        words.append("--vae_tile=off")
    words += [f"--{name}={path}" for name in TEXT_FILES if (path := getattr(raw, name))]
    if settings.skip_layer is not None and settings.skip_layer == SKIP_LAYERS.get(model_key(settings.model)):
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
