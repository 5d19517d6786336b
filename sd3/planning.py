"""Planning: from flags, prompts and seeds to the settings of every picture, and what a model is usually run with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from other_impls import weighted_segments
from sd3.flags import FLAGS
from sd3.mistakes import Mistake, verbatim
from sd3.models import CONTROLNET, DEFAULT_SIZE, SkipLayerConfig, model_row
from sd3.pixels import open_images
from sd3.prompts import read_texts, shortened
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig
from sd3.settings import Flags, Settings, effective

if TYPE_CHECKING:
    from sd3.engine import Engine


@dataclass(frozen=True)
class PicturePlan:
    """The pictures that are asked for, prompt by prompt.

    pictures: their settings, what has no effect at its default; notes: lines that say so, fields between backquotes;
    as_given: fields that have no effect, as they were given.
    """

    pictures: list[Settings]
    notes: list[str]
    as_given: dict[str, Any]


# ---- what a model is usually run with ------------------------------------------------------------

MODEL_SETTINGS = tuple(model_row("").usual())
DECIDED_BY_MODEL = (*MODEL_SETTINGS, "width", "height")


def file_defaults(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Size, steps, shift, cfg and sampler that a file names in its safetensors metadata; what is wrong is left out."""
    out = {}
    for name in DECIDED_BY_MODEL:
        if name in metadata:
            try:
                out[name] = FLAGS[name].read(name, metadata[name])
            except Mistake:
                continue
    return out


def usual_settings(model: str, metadata: Mapping[str, str], large_controlnet: bool = False) -> dict[str, Any]:
    """shift, steps, cfg, sampler, width and height that a model is usually run with: the ControlNet's row
    (`large_controlnet`) wins over the model file's metadata, that over the model's row.
    """
    values = model_row(model).usual() | {"width": DEFAULT_SIZE, "height": DEFAULT_SIZE} | file_defaults(metadata)
    return values | CONTROLNET.usual() if large_controlnet else values


def resolve(
    flags: Flags, metadata: Mapping[str, str] | None = None, large_controlnet: bool = False
) -> tuple[dict[str, Any], SkipLayerConfig | None]:
    """shift, steps, cfg, sampler, width and height of a run, and its skip-layer guidance.

    A flag wins over what is usual, see `usual_settings`. Skip-layer guidance brings its own cfg unless one is given.
    """
    values = usual_settings(flags.model, metadata or {}, large_controlnet)
    skip_layer = model_row(flags.model).skip_layer if flags.skip_layer_cfg else None
    if skip_layer is not None:
        values["cfg"] = skip_layer.cfg
    return values | {name: given for name in values if (given := getattr(flags, name)) is not None}, skip_layer


# ---- pictures ------------------------------------------------------------------------------------


def plan_pictures(
    engine: Engine,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    recorded: bool = False,
    make: Callable[..., Settings] = Settings,
    **values: Any,
) -> PicturePlan:
    """Plans pictures with settings `values`, those left out as the engine's model usually has them.

    seeds: as many per prompt as there are pictures of it; recorded: the values come from a picture, perhaps of an
    earlier version, which encoded a prompt at the length of its negative prompt at cfg 1 too: it is kept where it is
    the longer one; make: `Settings.of` where the values were read before. Raises Mistake for what does not fit.
    """
    prompts, seeds = read_texts(prompts), [FLAGS["seed"].read("seed", seed) for seed in seeds]
    if not seeds or len(seeds) % len(prompts):
        raise Mistake("seed", "", f"{len(seeds)} given for {len(prompts)} prompts; give as many for each")
    per_prompt = len(seeds) // len(prompts)
    shift = {} if "shift" in values else {"shift": engine.defaults["shift"]}
    first = make(prompt=prompts[0], seed=seeds[0], **(engine.loaded_settings() | shift | values))
    shown, notes = effective(first)  # prompt and seed have no part in it
    kept = first.negative_prompt
    if (
        recorded
        and kept != shown.negative_prompt
        and any(engine.text.pair_length(p, kept) > engine.text.t5_length(p) for p in prompts)
    ):
        shown = shown.changed(negative_prompt=kept)
        notes = [note for note in notes if not note.startswith("note: `negative_prompt`")]
    notes = [*notes, *weight_notes(prompts)]
    names = [field.name for field in dataclasses.fields(Settings)]
    as_given = {n: getattr(first, n) for n in names if getattr(first, n) != getattr(shown, n)}
    pictures = [shown.changed(prompt=prompts[i // per_prompt], seed=seed) for i, seed in enumerate(seeds)]
    return PicturePlan(pictures, notes, as_given)


def plan_for(
    engine: Engine,
    flags: Flags,
    prompts: Sequence[str],
    seeds: Sequence[int],
    skip_layer: SkipLayerConfig | None = None,
    residual: ResidualConfig | None = None,
    recorded: bool = False,
) -> PicturePlan:
    """Plans the pictures that flags ask for, checked against the loaded model and the files they name.

    seeds, recorded: see `plan_pictures`; skip_layer, residual: in place of the model's own and of the flags'.
    Raises Mistake.
    """
    values, usual = resolve(flags, engine.model_file.metadata, engine.network.large_controlnet)
    if skip_layer is not None and flags.cfg is None:
        values["cfg"] = skip_layer.cfg
    residual = residual or ResidualConfig.from_flags(flags.residual(), flags.residual_config)
    wanted = flags.for_image() | values | residual_settings(residual) | {"skip_layer": skip_layer or usual}
    if wanted["vae_tile"] is None:
        wanted["vae_tile"] = engine.pixels.tile_for(values["width"], values["height"])
    plan = plan_pictures(engine, prompts, seeds, recorded=recorded, make=Settings.of, **wanted)
    if flags.skip_layer_cfg and not wanted["skip_layer"]:
        unknown = f"no skip-layer settings are known for {verbatim(Path(flags.model).name)}"
        plan.notes.append(f"note: {unknown}; `skip_layer_cfg` is off")
    plan.notes.extend(residual_notes(flags, residual))
    # Pictures differ in prompt and seed only; what has no effect is checked too.
    given = plan.pictures[0].changed(**plan.as_given)
    engine.check_settings(given)
    open_images([given])
    return plan


def residual_settings(config: ResidualConfig) -> dict[str, Any]:
    """A residual configuration as fields of `Settings`; rotations that no mode uses are left out."""
    values = {setting: getattr(config, name) for name, setting in RESIDUAL_FLAGS.items()}
    return values if config.mode == "aligned" else values | {"residual_rotations": None}


def batches(pictures: Sequence[Settings], length: Callable[[str, str], int]) -> Iterator[list[tuple[int, Settings]]]:
    """Pictures with their numbers, in order, in batches that can share a run: same but for prompt and seed.

    length: in T5 tokens, of a prompt and its negative prompt, which pictures of a batch share.
    """
    batch: list[tuple[int, Settings]] = []
    of_batch: tuple[Settings, int] | None = None
    for number, s in enumerate(pictures):
        of_picture = s.changed(prompt="", seed=0), length(s.prompt, s.negative_prompt)
        if batch and (len(batch) >= s.batch_size or of_picture != of_batch):
            yield batch
            batch = []
        batch.append((number, s))
        of_batch = of_picture
    if batch:
        yield batch


# ---- notes ---------------------------------------------------------------------------------------


def residual_notes(flags: Flags, config: ResidualConfig) -> Iterator[str]:
    """Lines about residual flags that have no effect."""
    given = flags.residual()
    if (given or flags.residual_config) and not config.active:
        yield "note: `residual_target_layers` is empty, so residual text streaming is off"
    elif "rotations" in given and config.mode != "aligned":
        yield f"note: `residual_rotations` is not used: `residual_mode` is {config.mode}, not aligned"


def weight_notes(prompts: Sequence[str]) -> Iterator[str]:
    """A line where a prompt gives words a weight."""
    if weighted := next((p for p in prompts if any(weight != 1 for _, weight in weighted_segments(p))), None):
        name = verbatim(shortened(weighted))
        yield f'note: "{name}": weights of words have no effect, and brackets are left out'


def unknown_words(metadata: Mapping[str, str], prompts: Sequence[str]) -> Iterator[str]:
    """A line about words that a model with a short vocabulary, which its file's metadata names, never saw."""
    known = metadata.get("words", "").split()
    used = (w for p in prompts for w in re.findall(r"\w+", p.lower()))
    unknown = [w for w in dict.fromkeys(used) if w not in known]
    if known and unknown:
        named = verbatim(", ".join(f'"{w}"' for w in unknown[:8]))
        yield f"note: this small model never saw {named}; it knows: {verbatim(' '.join(known))}"
