"""Planning: from flags, prompts and seeds to the settings of every image; the usual settings of a model."""

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
from sd3.models import CONTROLNET, SkipLayerConfig, model_row
from sd3.pixels import open_images
from sd3.presets import read_preset, with_rotations
from sd3.prompts import read_texts, shortened
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig
from sd3.settings import Flags, Settings, effective
from sd3.spans import STREAM, plain_text, read_spans

if TYPE_CHECKING:
    from sd3.engine import Engine


@dataclass(frozen=True)
class PicturePlan:
    """The requested images, prompt by prompt.

    pictures: their settings, with settings without effect at their defaults; notes: lines about those, fields between
    backquotes; as_given: their values as given.
    """

    pictures: list[Settings]
    notes: list[str]
    as_given: dict[str, Any]


# ---- usual settings of a model -------------------------------------------------------------------

MODEL_SETTINGS = tuple(model_row("").usual())
DECIDED_BY_MODEL = (*MODEL_SETTINGS, "width", "height", "prompt_mode")


def file_defaults(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Size, steps, shift, cfg, sampler and prompt_mode from a file's safetensors metadata; bad values are left out."""
    out = {}
    for name in DECIDED_BY_MODEL:
        if name in metadata:
            try:
                out[name] = FLAGS[name].read(name, metadata[name])
            except Mistake:
                continue
    return out


def usual_settings(model: str, metadata: Mapping[str, str], large_controlnet: bool = False) -> dict[str, Any]:
    """The usual shift, steps, cfg, sampler, width, height and prompt_mode of a model: the ControlNet's row
    (`large_controlnet`) takes precedence over the model file's metadata, and that over the model's row.
    """
    values = model_row(model).usual() | {name: FLAGS[name].default for name in ("width", "height", "prompt_mode")}
    values |= file_defaults(metadata)
    return values | CONTROLNET.usual() if large_controlnet else values


def resolve(
    flags: Flags, metadata: Mapping[str, str] | None = None, large_controlnet: bool = False
) -> tuple[dict[str, Any], SkipLayerConfig | None]:
    """shift, steps, cfg, sampler, width, height and prompt_mode of a run, and its skip-layer guidance.

    Flags take precedence over `usual_settings`. Skip-layer guidance sets its own cfg unless one is given.
    """
    values = usual_settings(flags.model, metadata or {}, large_controlnet)
    skip_layer = model_row(flags.model).skip_layer if flags.skip_layer_cfg else None
    if skip_layer is not None:
        values["cfg"] = skip_layer.cfg
    return values | {name: given for name in values if (given := getattr(flags, name)) is not None}, skip_layer


# ---- images ------------------------------------------------------------------------------------


def plan_pictures(
    engine: Engine,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    recorded: bool = False,
    make: Callable[..., Settings] = Settings,
    **values: Any,
) -> PicturePlan:
    """Plans images with the settings `values`; the others are the model's usual ones.

    seeds: one per image, prompt by prompt; recorded: the values come from an image, perhaps by an earlier version. At
    cfg 1 that version, too, padded a prompt to the length of its negative prompt, so a longer negative prompt is kept.
    make: `Settings.of` for values that were already read. Raises Mistake for settings that do not fit.
    """
    prompts, seeds = read_texts(prompts), [FLAGS["seed"].read("seed", seed) for seed in seeds]
    if not seeds or len(seeds) % len(prompts):
        raise Mistake("seed", "", f"{len(seeds)} given for {len(prompts)} prompts; give the same number for each")
    per_prompt = len(seeds) // len(prompts)
    shift = {} if "shift" in values else {"shift": engine.defaults["shift"]}
    first = make(prompt=prompts[0], seed=seeds[0], **(engine.loaded_settings() | shift | values))
    shown, notes = effective(first)  # independent of prompt and seed
    kept = first.negative_prompt
    if (
        recorded
        and first.prompt_mode == "reference"
        and kept != shown.negative_prompt
        and any(engine.text.pair_length(p, kept) > engine.text.t5_length(p) for p in prompts)
    ):
        shown = shown.changed(negative_prompt=kept)
        notes = [note for note in notes if not note.startswith("note: `negative_prompt`")]
    if first.prompt_mode == "reference":
        texts = [*prompts, first.negative_prompt, first.clip_prompt, first.t5_prompt]
        notes = [*notes, *weight_notes([text for text in texts if text])]
    names = [field.name for field in dataclasses.fields(Settings)]
    as_given = {n: getattr(first, n) for n in names if getattr(first, n) != getattr(shown, n)}
    pictures = [shown.changed(prompt=prompts[i // per_prompt], seed=seed) for i, seed in enumerate(seeds)]
    if shown.prompt_mode == "whole":
        for s in pictures[::per_prompt]:
            engine.text.keys(s)  # raises where weights cannot be read, before the first image
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
    """Plans the images that flags ask for, and checks them against the model and their files.

    seeds, recorded: see `plan_pictures`; skip_layer, residual: replace the model's own and the flags'.
    Raises Mistake.
    """
    values, usual = resolve(flags, engine.model_file.metadata, engine.network.large_controlnet)
    if skip_layer is not None and flags.cfg is None:
        values["cfg"] = skip_layer.cfg
    residual = residual or residual_of(flags, engine)
    wanted = flags.for_image() | values | residual_settings(residual) | {"skip_layer": skip_layer or usual}
    if wanted["vae_tile"] is None:
        wanted["vae_tile"] = engine.pixels.tile_for(values["width"], values["height"])
    plan = plan_pictures(engine, prompts, seeds, recorded=recorded, make=Settings.of, **wanted)
    if flags.skip_layer_cfg and not wanted["skip_layer"]:
        unknown = f"no skip-layer settings are known for {verbatim(Path(flags.model).name)}"
        plan.notes.append(f"note: {unknown}; `skip_layer_cfg` is off")
    plan.notes.extend(residual_notes(flags, residual))
    # Images differ only in prompt and seed. Settings without effect are checked too.
    given = plan.pictures[0].changed(**plan.as_given)
    engine.check_settings(given)
    open_images([given])
    return plan


def residual_of(flags: Flags, engine: Engine) -> ResidualConfig:
    """The residual settings that flags ask for; raises Mistake, also for a preset of another model."""
    if flags.residual_preset:
        own = engine.config
        read_preset(flags.residual_preset).check(own.depth, own.width, len(own.dual_layers))
    config = ResidualConfig.from_flags(flags.residual(), flags.residual_file)
    folder = engine.model_file.path if engine.model_file.folder else engine.model_file.path.parent
    return with_rotations(config, [folder])


def residual_settings(config: ResidualConfig) -> dict[str, Any]:
    """A residual configuration as fields of `Settings`, without unused rotations."""
    values = {setting: getattr(config, name) for name, setting in RESIDUAL_FLAGS.items()}
    return values if config.mode == "aligned" else values | {"residual_rotations": None}


def batches(pictures: Sequence[Settings], shape: Callable[[Settings], Any]) -> Iterator[list[tuple[int, Settings]]]:
    """Groups images, with their numbers and in order, into batches that differ only in prompt and seed.

    shape: of the encoded prompts, see `TextEncoders.shape`; the same within a batch.
    """
    batch: list[tuple[int, Settings]] = []
    of_batch: tuple[Settings, int] | None = None
    for number, s in enumerate(pictures):
        of_picture = s.changed(prompt="", seed=0), shape(s)
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
    if (given or flags.residual_file) and not config.active:
        yield "note: `residual_target_layers` is empty, so residual text streaming is off"
    elif "rotations" in given and config.mode != "aligned":
        yield f"note: `residual_rotations` is not used: `residual_mode` is {config.mode}, not aligned"


def weight_notes(prompts: Sequence[str]) -> Iterator[str]:
    """A line about prompts with weighted words, such as `(red:1.2)`, which the reference does not use."""
    for why, found in (
        ("word weights have no effect, and the brackets are removed", _has_weights),
        (f"{STREAM}W}} is text", lambda prompt: STREAM in prompt),
    ):
        if named := next(filter(found, prompts), None):
            yield f'note: "{verbatim(shortened(named))}": {why}; `prompt_mode` whole reads them'


def _has_weights(prompt: str) -> bool:
    return any(weight != 1 for _, weight in weighted_segments(prompt))


def words_read(s: Settings, prompts: Sequence[str]) -> list[str]:
    """Prompts, and the other texts of an image, without brackets and weights, as the encoders read them."""
    texts = [text for text in (*prompts, s.negative_prompt, s.clip_prompt, s.t5_prompt) if text]
    if s.prompt_mode == "whole":
        return [plain_text(read_spans(text, s.prompt_weights)) for text in texts]
    return [" ".join(part for part, _ in weighted_segments(text)) for text in texts]


def unknown_words(metadata: Mapping[str, str], prompts: Sequence[str]) -> Iterator[str]:
    """A line about words outside the vocabulary that the metadata of a small model lists."""
    known = metadata.get("words", "").split()
    used = (w for p in prompts for w in re.findall(r"\w+", p.lower()))
    unknown = [w for w in dict.fromkeys(used) if w not in known]
    if known and unknown:
        named = verbatim(", ".join(f'"{w}"' for w in unknown[:8]))
        yield f"note: this small model never saw {named}; it knows: {verbatim(' '.join(known))}"
