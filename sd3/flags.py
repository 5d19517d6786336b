"""The table of flags, one row each. It defines the command line and its help, `docs/flags.md`, the fields and checks
of `Settings` and `Setup`, metadata, replay, the axes of a sweep, the flags that a served line may set and those of the
probe. Names that other programs use are in `aliases.py`. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3 import aliases, effects
from sd3.effects import Rule
from sd3.methods import SAMPLERS, SCHEDULES
from sd3.mistakes import Mistake, display, nearest
from sd3.models import DEFAULT_MODEL, DEFAULT_SIZE, OTHER_MODEL
from sd3.presets import PRESETS
from sd3.readers import (
    DEVICE,
    DIALECTS,
    DTYPE,
    FILE,
    FOLDER,
    LAYER,
    LAYERS,
    OPTIONAL_FILE,
    OPTIONAL_FOLDER,
    PATCH_FILES,
    PNG_FILE,
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
RESIDUAL_TOKENS = ("all", "words", "padding", "clip", "t5")
PROMPT_MODES = ("reference", "whole")
RESIDUAL_BRANCHES = ("both", "cond", "uncond")
MOST_PICTURES = 100_000  # of a run, and of a sweep's grid

# Groups of flags, each with an example, in the order of the help: the most used first. The rows of the table below have
# an order of their own, in which the rules of `effects.py` run.
GROUPS = {
    "prompt and image": '--prompt "a red circle left of a blue square" --seed 5 --num_images 4',
    "output": "--out fox.png",
    "model and text encoders": "--model models/sd3.5_medium.safetensors",
    "sampling": "--steps 28 --cfg 4.5 --sampler euler",
    "residual text streaming": "--residual_target_layers 2-22 --residual_weights each:0.1 --residual_mode anchored",
    "starting from an image, ControlNet": "--init_image sketch.png --denoise 0.6",
    "device, memory and speed": "--dtype bfloat16 --weights int8 --offload --batch_size 4",
    "instead of new images": "--replay outputs/sd3_medium/a_fox/000000.png",
}


@dataclass(frozen=True)
class Flag:
    """One row of the table: the definition of a flag."""

    name: str
    read: Reader
    default: Any  # also of the field in an image's settings, where there is one
    help: str
    scope: str  # picture: may differ between images of one load; load: decides what is loaded; run: all others
    pixels: bool = True  # part of an image's identity and of its record
    usual: str = ""  # what decides the value where the flag is not given, in words; until then it is None
    field: str = ""  # its field in an image's settings, where that has another name and holds another value
    always: bool = False  # recorded at its default too, as the first version did; others only at other values
    matters: Rule | None = None  # finds out that the flag has no effect; it is then set to its default
    sweep: str = ""  # why a sweep cannot vary it
    also: str = ""  # other commands that take it: probe (all that run a model), measure, self_check
    common: bool = False  # in the short help
    group: str = ""

    @property
    def setting(self) -> str:
        """The name of its field in an image's settings."""
        return self.field or self.name

    @property
    def unset(self) -> Any:
        """The value where the flag is not given; None where something else decides it."""
        return None if self.usual else self.default


picture, load, run = (functools.partial(Flag, scope=scope) for scope in ("picture", "load", "run"))
_TABLE: dict[str, tuple[Flag, ...]] = {
"prompt and image": (
    picture("prompt", TEXT, "cute wallpaper art of a cat",
            "what the image shows, or a .txt file with one prompt a line", always=True, common=True),
    picture("negative_prompt", TEXT, "", "what the image does not show", always=True, matters=effects.guidance,
            also="probe", common=True),
    picture("prompt_mode", choice(*PROMPT_MODES), "reference",
            "reference: as the public reference reads it (the first 77 CLIP tokens and 226 characters, no weights); "
            "whole: every token, weights such as (red:1.3), and BREAK",
            usual="reference, or what the model file names", also="probe"),
    picture("t5_tokens", whole(77, 512), 256,
            "T5 tokens to which whole prompts are padded, and cut where they are longer",
            matters=effects.whole_prompts, also="probe"),
    picture("prompt_weights", choice(*DIALECTS), "comfy",
            "brackets in whole prompts: as comfy or a1111 read them, or off, where they are text",
            matters=effects.whole_prompts, also="probe"),
    picture("clip_prompt", TEXT, None, "what the CLIP encoders read in place of the prompt"),
    picture("t5_prompt", TEXT, None, "what T5 reads in place of the prompt", matters=effects.t5_prompt),
    picture("seed", whole(0, SEED_LIMIT - 1), DEFAULT_SEED, "the first seed; images of one prompt count up from it",
            usual="random; 23 if `seed_type` is fixed or roll", always=True, also="probe", common=True),
    picture("seed_type", choice(*SEED_TYPES), None,
            "fixed: every prompt starts at `seed`; roll: seeds count up over all images; rand: drawn, printed and "
            "recorded",
            pixels=False, usual="fixed with `seed`, else rand", sweep="name the seeds, such as `seed` 0-3"),
    picture("num_images", whole(1, MOST_PICTURES), 1, "images per prompt", pixels=False,
            sweep="name the seeds, such as `seed` 0-3", common=True),
    picture("width", SIZE, DEFAULT_SIZE, "pixels, a multiple of 16", usual="1024, or what the model file names",
            always=True, also="probe", common=True),
    picture("height", SIZE, DEFAULT_SIZE, "pixels, a multiple of 16", usual="1024, or what the model file names",
            always=True, also="probe", common=True),
),
"starting from an image, ControlNet": (
    picture("init_image", OPTIONAL_FILE, None, "an image to start from", always=True, matters=effects.initial_image,
            common=True),
    picture("denoise", number(0.0, 1.0), DEFAULT_DENOISE,
            "how much of the initial image is replaced: 0 keeps it, 1 starts from noise", always=True,
            matters=effects.initial_image, common=True),
    load("controlnet_ckpt", OPTIONAL_FILE, None, "the ControlNet's file", always=True, matters=effects.control),
    picture("controlnet_cond_image", OPTIONAL_FILE, None,
            "the image that guides it, prepared for the ControlNet (edges, depth)", always=True),
    picture("controlnet_strength", WEIGHT, 1.0, "factor on the ControlNet's output", always=True,
            matters=effects.control),
),
"sampling": (
    picture("sampler", choice(*SAMPLERS), OTHER_MODEL.sampler,
            f"the sampler: {', '.join(SAMPLERS)}", usual="the model's", always=True, also="probe", common=True),
    picture("scheduler", choice(*SCHEDULES), "normal",
            f"the spacing of the noise levels: {', '.join(SCHEDULES)}", matters=effects.schedule,
            also="probe"),
    picture("steps", whole(1, 10_000), OTHER_MODEL.steps, "number of sampling steps", usual="the model's", always=True,
            also="probe", common=True),
    picture("cfg", number(0.0, 100.0), OTHER_MODEL.cfg,
            "scale of classifier-free guidance (CFG); 1 turns it off and halves the time", usual="the model's",
            always=True, also="probe", common=True),
    picture("shift", SHIFT, OTHER_MODEL.shift, "shift of the noise schedule", usual="the model's", always=True,
            also="probe"),
    picture("skip_layer_cfg", SWITCH, False, "skip-layer guidance with the settings published for SD3.5 Medium",
            field="skip_layer", always=True, matters=effects.skip_layer),
    picture("guidance_start", number(0.0, 1.0), 0.0,
            "fraction of the steps before CFG starts; only the conditional pass runs there",
            matters=effects.guidance_interval, also="probe"),
    picture("guidance_end", number(0.0, 1.0), 1.0,
            "fraction of the steps after which CFG stops; the steps after it take half the time",
            matters=effects.guidance_interval, also="probe"),
    picture("guidance_rescale", number(0.0, 1.0), 0.0,
            "0 to 1: how far the guided velocity's standard deviation is brought back to the conditional one's, "
            "against overexposure; 0 turns it off",
            matters=effects.only_guided("guidance_rescale"), also="probe"),
),
"residual text streaming": (
    picture("residual_origin_layer", LAYER, 0, "the block whose incoming text tokens are streamed", usual="0",
            always=True, matters=effects.residual, also="measure", common=True),
    picture("residual_target_layers", LAYERS, (),
            "the blocks that receive them, such as 3,5,7 or 2-22 or 2-22:2; none turns it off",
            usual="off", always=True, matters=effects.residual, also="measure", common=True),
    picture("residual_weights", WEIGHTS, (),
            "one weight per target, each:W for all targets, or linear:FIRST:LAST for a ramp over them",
            usual="1.0 each", always=True, matters=effects.residual, also="measure", common=True),
    picture("residual_mode", choice(*RESIDUAL_MODES), "add",
            "add: weighted sum; anchored: both normalised first; aligned: anchored, with the origin rotated",
            usual="add", always=True, matters=effects.residual, also="measure", common=True),
    picture("residual_schedule", SCHEDULE, "constant", "factor on the weights as a function of sigma", usual="constant",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_start", number(0.0, 1.0), 0.0, "fraction of the steps before it acts", usual="0", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_end", number(0.0, 1.0), 1.0, "fraction of the steps after which it no longer acts", usual="1",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_branch", choice(*RESIDUAL_BRANCHES), "both",
            "the passes in which it acts: both, cond (conditional) or uncond (unconditional)", usual="both",
            always=True, matters=effects.residual, also="measure"),
    picture("residual_rotations", OPTIONAL_FILE, None,
            "the rotation file for mode aligned; sd3_probe.py calibrate makes one", always=True,
            matters=effects.residual, also="measure"),
    picture("residual_tokens", choice(*RESIDUAL_TOKENS), "all",
            "the text tokens that are mixed: all, words (all but padding), padding, clip or t5", usual="all",
            matters=effects.residual, also="measure"),
    picture("residual_config", OPTIONAL_FILE, None,
            "a file with all of these, such as residual.json in a run's folder; flags replace its values",
            pixels=False, also="measure"),
    picture("residual_preset", choice(*PRESETS), None,
            "published settings by name, see `list_presets`; flags replace its values", pixels=False, also="measure",
            common=True),
),
"model and text encoders": (
    load("model", FILE, DEFAULT_MODEL,
         "a .safetensors file with the MMDiT, a folder in diffusers layout, or demo, the small model that ships",
         always=True, also="probe", common=True),
    load("vae", OPTIONAL_FILE, None, "a VAE file, in place of the one in the model file", always=True, also="probe"),
    load("lora", PATCH_FILES, None,
         "LoRA files, or folders that PEFT or diffusers saved, each with a strength (1 where it is left out), such as "
         "a.safetensors:0.8,b.safetensors; they add up",
         matters=effects.lora, also="probe", common=True),
    load("model_folder", OPTIONAL_FOLDER, None, "the folder with text encoders and tokenizers", pixels=False,
         usual="the model's folder, then ./models", also="probe"),
    load("clip_l", OPTIONAL_FILE, None, "the file with text encoder CLIP-L", pixels=False,
         usual="in the model file, else searched in `model_folder`", also="probe"),
    load("clip_g", OPTIONAL_FILE, None, "the file with text encoder CLIP-G", pixels=False, usual="as `clip_l`",
         also="probe"),
    load("t5xxl", OPTIONAL_FILE, None, "the file with text encoder T5", pixels=False, usual="as `clip_l`",
         also="probe"),
    load("no_t5", SWITCH, False, "runs without T5: zeros in place of its tokens", always=True, also="probe"),
),
"device, memory and speed": (
    load("device", DEVICE, "auto", "the device that the model runs on", always=True, also="probe self_check",
         common=True),
    load("text_encoder_device", DEVICE, "auto", "the device that the text encoders run on; auto: as `device`",
         always=True, also="probe self_check"),
    load("dtype", DTYPE, "auto", "precision of the model: auto, float32, bfloat16 or float16 (or fp32, bf16, fp16)",
         always=True, also="probe self_check", common=True),
    load("weights", STORAGE, "full",
         "full: as `dtype`; int8 or fp8: the blocks' weights in 8 bits, for GPUs with little memory",
         also="probe self_check", common=True),
    load("offload", SWITCH, False, "keeps the blocks in main memory and copies each to the GPU when it runs",
         also="probe self_check", common=True),
    load("threads", whole(1, 1024), None, "number of CPU threads; it changes the last bits of an image",
         pixels=False, usual="1 for a model under 100 million parameters, else PyTorch's",
         also="probe self_check"),
    load("compile", SWITCH, False, "compiles the MMDiT's blocks: the first step is slower, later ones are faster",
         also="self_check"),
    load("t5_resident", SWITCH, False, "keeps the text encoders in memory after they ran", pixels=False,
         also="self_check"),
    load("embed_cache", OPTIONAL_FOLDER, None,
         "a folder for a cache of encoded prompts; a cached prompt loads no text encoder", pixels=False, also="probe"),
    picture("batch_size", whole(1, 1024), 1, "number of images sampled at once", always=True,
            matters=effects.step_cache, also="probe", common=True),
    picture("pad_batch", SWITCH, False,
            "fills up the last batch, so that no bit of an image depends on how many are made with it", pixels=False,
            sweep="batches are always filled up"),
    picture("cache", number(0.0, 1.0), 0.0,
            "step cache: skip blocks 1 to N when block 0's output changed by less than this fraction (try 0.1)",
            matters=effects.step_cache),
    picture("vae_tile", TILE, 0, "auto, off, or the side of the VAE's tiles in pixels; smaller tiles take less memory",
            usual="auto", matters=effects.tiles),
),
"output": (
    run("out_dir", FOLDER, "outputs",
        "folder for images: OUT_DIR/<model>/<prompt><postfix>/000000.png, beside run.json", pixels=False,
        sweep="use `out`", common=True),
    run("postfix", POSTFIX, None, "the end of that folder's name", pixels=False, usual="date and time",
        sweep="use `out`"),
    run("out", PNG_FILE, None,
        "a .png file for one image, in place of the folders; no run.json is written, and an existing file is replaced",
        pixels=False, sweep="the sweep's own `out` is its folder", common=True),
    run("no_metadata", SWITCH, False, "saves images without their settings", pixels=False,
        sweep="finished images are recognised by their settings"),
    run("settings", FILE, None,
        'a JSON file of flags such as {"steps": 28}, or a run.json; flags on the command line replace its values',
        pixels=False, sweep="settings of a sweep go into the file of `grid`", common=True),
    run("verbose", SWITCH, False, "prints more about the model and the time of each stage", pixels=False,
        sweep="see log.jsonl", also="self_check"),
),
"instead of new images": (
    run("replay", FILE, None, "recreates an image from its metadata; other flags replace single settings",
        pixels=False, sweep="that is for sd3_infer.py", common=True),
    run("serve_stdin", SWITCH, False, "loads once, then makes images for every line of JSON on stdin",
        pixels=False, sweep="that is for sd3_infer.py"),
    run("self_check", SWITCH, False, "runs the small model on this device and compares the results with stored ones",
        pixels=False, sweep="that is for sd3_infer.py", also="self_check"),
    run("info", FILE, None,
        "prints the settings of an image and the command that makes it again, or what is in a LoRA", pixels=False,
        sweep="that is for sd3_infer.py", common=True),
    run("list_presets", SWITCH, False,
        "lists the settings that `residual_preset` names, where they come from, and what was measured", pixels=False,
        sweep="that is for sd3_infer.py", common=True),
    run("list_models", SWITCH, False,
        "lists the models in `model_folder`, ./models and the clone, and how to download those that are missing",
        pixels=False, sweep="that is for sd3_infer.py", common=True),
),
}  # fmt: skip
FLAGS: dict[str, Flag] = {
    row.name: dataclasses.replace(row, group=group) for group, rows in _TABLE.items() for row in rows
}


def names(scope: str = "", **wanted: Any) -> tuple[str, ...]:
    """Names of the flags of a scope (all if empty) whose columns equal `wanted`; `also`: a command that takes them."""
    return tuple(
        name
        for name, row in FLAGS.items()
        if scope in ("", row.scope)
        and all(value in row.also.split() if n == "also" else getattr(row, n) == value for n, value in wanted.items())
    )


def places(load: str, picture: str) -> dict[str, str]:
    """Where a flag that a function does not take belongs, for `check_parameters`.

    load, picture: the functions that take the flags of these scopes.
    """
    where = {"load": f"belongs to {load}", "picture": f"belongs to {picture}", "run": "is for the command line only"}
    return {name: where[row.scope] for name, row in FLAGS.items()}


def read_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Values read by their flags' readers; those that are None are left out. Raises Mistake for an unknown flag and
    for a value out of its range. `Flags.of` checks how they go together.
    """
    for name in raw:
        check_flag(name)
    return {name: FLAGS[name].read(name, value) for name, value in raw.items() if value is not None}


def check_flag(name: Any, flags: Mapping[str, Any] = FLAGS) -> None:
    """Raises Mistake where there is no such flag, with the flag that another program calls so, or the nearest one."""
    if name not in flags:
        why = aliases.answer(name, flags) or f"unknown flag{nearest(name, flags, fields=True)} (`help_all` lists all)"
        raise Mistake(display(name), "", why)
