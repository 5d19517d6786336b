"""The flags: one row each. The command line and its help, `docs/flags.md`, the fields and checks of `Settings` and
`Setup`, metadata, replay, sweep axes, what serving fixes and what the probe takes are read off this table. Needs no
torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3 import effects
from sd3.effects import Rule
from sd3.methods import SAMPLERS, SCHEDULES
from sd3.mistakes import Mistake, display, nearest
from sd3.models import DEFAULT_SIZE, OTHER_MODEL
from sd3.readers import (
    DEVICE,
    DTYPE,
    FILE,
    FOLDER,
    LAYER,
    LAYERS,
    OPTIONAL_FILE,
    OPTIONAL_FOLDER,
    POSTFIX,
    SCHEDULE,
    SEED_LIMIT,
    SHIFT,
    SIZE,
    STORAGE,
    SWITCH,
    TEXT,
    TILE,
    WEIGHT,
    WEIGHTS,
    Reader,
    choice,
    number,
    whole,
)

DEFAULT_SEED = 23
DEFAULT_DENOISE = 0.8
SEED_TYPES = ("fixed", "rand", "roll")
RESIDUAL_MODES = ("add", "anchored", "aligned")
RESIDUAL_BRANCHES = ("both", "cond", "uncond")
MOST_PICTURES = 100_000  # of a run, and of a sweep's grid

# Groups of flags in the order of the help, each with an example.
GROUPS = {
    "prompt and image": '--prompt "a red circle left of a blue square" --seed 5 --num_images 4 --width 768',
    "starting from an image, ControlNet": "--init_image sketch.png --denoise 0.6",
    "sampling": "--steps 28 --cfg 4.5 --sampler euler",
    "residual text streaming": "--residual_target_layers 2-22 --residual_weights each:0.1 --residual_mode anchored",
    "model and text encoders": "--model models/sd3.5_medium.safetensors --t5xxl t5xxl_fp16.safetensors",
    "device, memory and speed": "--dtype bfloat16 --weights int8 --offload --batch_size 4",
    "output": "--out_dir pictures --postfix _test",
    "instead of new images": "--replay outputs/sd3_medium/a_fox/000000.png",
}


@dataclass(frozen=True)
class Flag:
    """One row: everything there is to know about a flag."""

    name: str
    read: Reader
    default: Any  # of an image's settings too, where the flag is part of them
    help: str
    scope: str  # picture: may differ between images of one load; load: decides what is loaded; run: the rest
    pixels: bool = True  # part of an image's identity and of its record
    usual: str = ""  # what decides a flag that is not given, in words; its value is None until then
    field: str = ""  # its name among an image's settings, where that is another one (which then keeps another value)
    always: bool = False  # recorded at its default too, as the first version recorded it; else only other values are
    matters: Rule | None = None  # when it has no effect and is set back to its default
    sweep: str = ""  # why a sweep cannot vary it
    also: str = ""  # what else takes it: probe (all that run a model), measure, self_check
    group: str = ""

    @property
    def stored(self) -> str:
        """Its name among an image's settings."""
        return self.field or self.name

    @property
    def given(self) -> Any:
        """The value of a flag that is not given."""
        return None if self.usual else self.default


picture, load, run = (functools.partial(Flag, scope=scope) for scope in ("picture", "load", "run"))
_TABLE: dict[str, tuple[Flag, ...]] = {
"prompt and image": (
    picture("prompt", TEXT, "cute wallpaper art of a cat",
            "what the image should show, or a .txt file with one prompt a line", always=True),
    picture("negative_prompt", TEXT, "", "what the image should not show", always=True, matters=effects.guidance,
            also="probe"),
    picture("seed", whole(0, SEED_LIMIT - 1), DEFAULT_SEED, "first seed, for seed_type fixed and roll",
            usual="23 for fixed and roll", always=True, also="probe"),
    picture("seed_type", choice(*SEED_TYPES), None,
            "fixed: every prompt starts at the seed; roll: seeds count up; rand: drawn, printed and recorded",
            pixels=False, usual="fixed where a seed is given, else rand", sweep="name the seeds, such as `seed` 0-3"),
    picture("num_images", whole(1, MOST_PICTURES), 1, "images per prompt", pixels=False,
            sweep="name the seeds, such as `seed` 0-3"),
    picture("width", SIZE, DEFAULT_SIZE, "pixels, a multiple of 16", usual="1024, or what the model file names",
            always=True, also="probe"),
    picture("height", SIZE, DEFAULT_SIZE, "pixels, a multiple of 16", usual="1024, or what the model file names",
            always=True, also="probe"),
),
"starting from an image, ControlNet": (
    picture("init_image", OPTIONAL_FILE, None, "an image to start from", always=True, matters=effects.initial_image),
    picture("denoise", number(0.0, 1.0), DEFAULT_DENOISE, "how much of the initial image is made anew", always=True,
            matters=effects.initial_image),
    load("controlnet_ckpt", OPTIONAL_FILE, None, "a ControlNet file", always=True, matters=effects.control),
    picture("controlnet_cond_image", OPTIONAL_FILE, None, "the image that guides the ControlNet", always=True),
    picture("controlnet_strength", WEIGHT, 1.0, "factor on what the ControlNet adds", always=True,
            matters=effects.control),
),
"sampling": (
    picture("sampler", choice(*SAMPLERS), OTHER_MODEL.sampler,
            f"how to step from noise to image: {', '.join(SAMPLERS)}", usual="the model's", always=True, also="probe"),
    picture("scheduler", choice(*SCHEDULES), "normal",
            f"how the noise levels of the steps are spaced: {', '.join(SCHEDULES)}", matters=effects.schedule,
            also="probe"),
    picture("steps", whole(1, 10_000), OTHER_MODEL.steps, "sampling steps", usual="the model's", always=True,
            also="probe"),
    picture("cfg", number(0.0, 100.0), OTHER_MODEL.cfg, "scale of classifier-free guidance; 1 turns it off",
            usual="the model's", always=True, also="probe"),
    picture("shift", SHIFT, OTHER_MODEL.shift, "shift of the noise schedule", usual="the model's", always=True,
            also="probe"),
    picture("skip_layer_cfg", SWITCH, False, "skip-layer guidance, with SD3.5 Medium's settings", field="skip_layer",
            always=True, matters=effects.skip_layer),
    picture("guidance_start", number(0.0, 1.0), 0.0,
            "fraction of the steps before classifier-free guidance starts; the conditional pass runs alone there",
            matters=effects.guidance_interval, also="probe"),
    picture("guidance_end", number(0.0, 1.0), 1.0,
            "fraction of the steps after which classifier-free guidance stops; the steps left take half the time",
            matters=effects.guidance_interval, also="probe"),
    picture("guidance_rescale", number(0.0, 1.0), 0.0,
            "share of the conditional velocity's deviation that the guided one gets, against overexposure; 0: off",
            matters=effects.only_guided("guidance_rescale"), also="probe"),
),
"residual text streaming": (
    picture("residual_origin_layer", LAYER, 0, "block whose incoming text tokens are kept", usual="0", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_target_layers", LAYERS, (),
            "blocks they are mixed in before, such as 3,5,7 or 2-22 or 2-22:2; none: off", usual="off", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_weights", WEIGHTS, (),
            "one weight per target; each:0.1, one for all; or a ramp linear:FIRST:LAST", usual="1.0 each",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_mode", choice(*RESIDUAL_MODES), "add",
            "add; anchored (both normalised first); aligned (and the origin rotated)", usual="add", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_schedule", SCHEDULE, "constant", "factor on the weights by sigma", usual="constant",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_start", number(0.0, 1.0), 0.0, "fraction of the steps before it starts", usual="0", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_end", number(0.0, 1.0), 1.0, "fraction of the steps after which it stops", usual="1",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_branch", choice(*RESIDUAL_BRANCHES), "both",
            "the passes it acts in: both, or only the conditional or the unconditional one", usual="both",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_rotations", OPTIONAL_FILE, None,
            "the rotation file of mode aligned (sd3_probe.py calibrate makes one)", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_config", OPTIONAL_FILE, None,
            "a file with all of these, such as residual.json in a run's folder; flags replace its fields",
            pixels=False, also="measure"),
),
"model and text encoders": (
    load("model", FILE, "models/sd3_medium.safetensors",
         "the .safetensors file with the MMDiT, a folder in diffusers layout, or demo", always=True, also="probe"),
    load("vae", OPTIONAL_FILE, None, "a VAE file in place of the model's own", always=True, also="probe"),
    load("model_folder", OPTIONAL_FOLDER, None, "where text encoders and tokenizers are", pixels=False,
         usual="the model's folder, then models", also="probe"),
    load("clip_l", OPTIONAL_FILE, None, "the file of the text encoder CLIP-L", pixels=False,
         usual="in the model file, or found in model_folder", also="probe"),
    load("clip_g", OPTIONAL_FILE, None, "the file of the text encoder CLIP-G", pixels=False, usual="as clip_l",
         also="probe"),
    load("t5xxl", OPTIONAL_FILE, None, "the file of the text encoder T5", pixels=False, usual="as clip_l",
         also="probe"),
    load("no_t5", SWITCH, False, "zeros in place of T5's tokens; T5 is not needed then", always=True, also="probe"),
),
"device, memory and speed": (
    load("device", DEVICE, "auto", "where the model runs", always=True, also="probe self_check"),
    load("text_encoder_device", DEVICE, "auto", "where the text encoders run; auto: as device", always=True,
         also="probe self_check"),
    load("dtype", DTYPE, "auto", "precision of the model (fp32, bf16 and fp16 are taken too)", always=True,
         also="probe self_check"),
    load("weights", STORAGE, "full", "full (as the dtype says), or the blocks' weights in 8 bits, for small cards",
         also="probe self_check"),
    load("offload", SWITCH, False, "keeps the blocks in main memory and brings each to the device for its turn",
         also="probe self_check"),
    load("threads", whole(1, 1024), None, "threads that compute on a CPU; they change the last bits of an image",
         pixels=False, usual="1 for a model under 100 million parameters, else as many as torch takes",
         also="probe self_check"),
    load("compile", SWITCH, False, "compiles the MMDiT's blocks: a slower first step, faster later ones",
         also="self_check"),
    load("t5_resident", SWITCH, False, "keeps the text encoders in memory once they ran", pixels=False,
         also="self_check"),
    load("embed_cache", OPTIONAL_FOLDER, None,
         "a folder that keeps encoded prompts; a known prompt opens no text encoder", pixels=False, also="probe"),
    picture("batch_size", whole(1, 1024), 1, "images sampled at once", always=True, matters=effects.step_cache,
            also="probe"),
    picture("pad_batch", SWITCH, False,
            "fills a partial batch up, so that no image depends on how many are made with it", pixels=False,
            sweep="batches are always filled up"),
    picture("cache", number(0.0, 1.0), 0.0,
            "step cache: skip blocks 1 to N when block 0's output changed by less than this fraction (try 0.1)",
            matters=effects.step_cache),
    picture("vae_tile", TILE, 0, "auto, off, or the side in pixels of the tiles that the VAE works on one at a time",
            usual="auto", matters=effects.tiles),
),
"output": (
    run("out_dir", FOLDER, "outputs", "images go to OUT_DIR/<model>/<prompt><postfix>/000000.png", pixels=False,
        sweep="use `out`"),
    run("postfix", POSTFIX, None, "end of the folder's name", pixels=False, usual="date and time", sweep="use `out`"),
    run("no_metadata", SWITCH, False, "images carry no settings", pixels=False,
        sweep="finished pictures are known by their settings"),
    run("verbose", SWITCH, False, "says more", pixels=False, sweep="log.jsonl has it all", also="self_check"),
),
"instead of new images": (
    run("replay", FILE, None, "regenerates an image from its metadata; other flags override", pixels=False,
        sweep="that is for sd3_infer.py"),
    run("serve_stdin", SWITCH, False, "loads once, then makes images for every line of JSON that it reads",
        pixels=False, sweep="that is for sd3_infer.py"),
    run("self_check", SWITCH, False, "runs the small model on this device and compares it with stored results",
        pixels=False, sweep="that is for sd3_infer.py", also="self_check"),
    run("list_models", SWITCH, False, "shows what is in the models folder, what is missing and how to get it",
        pixels=False, sweep="that is for sd3_infer.py"),
),
}  # fmt: skip
FLAGS: dict[str, Flag] = {
    row.name: dataclasses.replace(row, group=group) for group, rows in _TABLE.items() for row in rows
}


def names(scope: str = "", **wanted: Any) -> tuple[str, ...]:
    """Flags of a scope, and of rows whose columns are as `wanted`; `also` by a command that takes it."""
    return tuple(
        name
        for name, row in FLAGS.items()
        if scope in ("", row.scope)
        and all(value in row.also.split() if n == "also" else getattr(row, n) == value for n, value in wanted.items())
    )


def read_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every value read by its flag's reader, None left out: what is used from then on. Raises Mistake for an unknown
    flag and for every value out of its range; how they go together is checked elsewhere.
    """
    for name in raw:
        check_flag(name)
    return {name: FLAGS[name].read(name, value) for name, value in raw.items() if value is not None}


def check_flag(name: Any, flags: Mapping[str, Any] = FLAGS) -> None:
    """Raises Mistake with the nearest match where there is no such flag."""
    if name not in flags:
        raise Mistake(display(name), "", f"unknown flag{nearest(name, flags)} (`help` lists all)")
