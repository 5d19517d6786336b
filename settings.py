"""What one picture is made from: every flag's default, check and range. Needs no torch, so bad input fails at once."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import os
import random
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED_TYPES = ("fixed", "rand", "roll")
SAMPLERS = ("euler", "dpmpp_2m")
RESIDUAL_MODES = ("add", "anchored", "aligned")
RESIDUAL_SCHEDULES = ("constant", "linear", "cosine")  # and exp:ALPHA
RESIDUAL_BRANCHES = ("both", "cond", "uncond")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
SIZE_STEP = 16  # pixels: VAE cell (8) times patch (2)
SEED_LIMIT = 2**63
RANDOM_SEEDS = 100_000  # seed_type rand draws below this
DEFAULT_SEED = 23
DEFAULT_SIZE = 1024
DEFAULT_DENOISE = 0.8
WEIGHTS = ("full", "int8", "fp8")
LEAST_TILE = 128  # pixels; smaller tiles would be mostly overlap


@dataclass(frozen=True)
class ModelDefaults:
    """What a model file is usually run with."""

    shift: float = 3.0
    steps: int = 50
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"


@dataclass(frozen=True)
class SkipLayerConfig:
    """Skip-layer guidance: `scale` (cond - cond without `layers`) while start * steps < step < end * steps."""

    scale: float
    start: float
    end: float
    layers: tuple[int, ...]
    cfg: float  # classifier-free guidance used with it, unless one is given


MODELS = {
    "sd3_medium": ModelDefaults(shift=1.0),
    "sd3.5_medium": ModelDefaults(),
    "sd3.5_large": ModelDefaults(steps=40, cfg=4.5),
    "sd3.5_large_turbo": ModelDefaults(steps=4, cfg=1.0, sampler="euler"),
}
OTHER_MODEL = ModelDefaults()
CONTROLNET = ModelDefaults(steps=60, cfg=3.5, sampler="euler")  # the released SD3.5 Large ControlNets
SKIP_LAYERS = {"sd3.5_medium": SkipLayerConfig(2.5, 0.01, 0.20, (7, 8, 9), cfg=4.0)}


def model_key(model: str | Path) -> str:
    """The released model that a file's name starts with (`sd3_medium_incl_clips` -> `sd3_medium`), or a folder's, as
    the hub or its cache names it (`stable-diffusion-3.5-medium` -> `sd3.5_medium`), or ``.
    """
    path = Path(model)
    names = [path.name.removesuffix(".safetensors")]
    if not path.name.endswith(".safetensors"):
        parts = [p.rsplit("--", 1)[-1] for p in reversed(path.parts)]
        names += [p.replace("stable-diffusion-", "sd").replace("-", "_") for p in parts if "stable-diffusion-" in p]
    for name in names:
        fits = [k for k in MODELS if name == k or re.match(re.escape(k) + r"[_.\-]", name)]
        if fits:
            return max(fits, key=len)
    return ""


# ---- reading single values -----------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` where one of `known` is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_int(flag: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number in [low, high]; raises ValueError naming flag, value and range."""
    number = read_float(flag, value, what="a whole number")
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        number = int(value)
    elif isinstance(value, int):
        number = value
    if number != int(number):
        raise ValueError(f"--{flag} {value}: must be a whole number")
    number = int(number)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"--{flag} {value}: must be {_range(low, high)}")
    return number


def read_float(
    flag: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    what: str = "a number",
    above: float | None = None,
) -> float:
    """A finite number in [low, high] and greater than `above`; raises ValueError naming flag, value and range."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"--{flag} {value}: must be {what}") from None
    except OverflowError:
        raise ValueError(f"--{flag} {value}: too large") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"--{flag} {value}: must be {what}")
    if above is not None and number <= above:
        raise ValueError(f"--{flag} {value}: must be greater than {above:g}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"--{flag} {value}: must be {_range(low, high)}")
    return number


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"from {low} to {high}"


def read_bool(flag: str, value: Any) -> bool:
    """True or False from a bool or the usual words; raises ValueError."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"--{flag} {value}: must be True or False")


def read_choice(flag: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`; raises ValueError with the nearest match."""
    name = str(value).strip().lower()
    if name not in choices:
        raise ValueError(f"--{flag} {value}: must be one of {', '.join(choices)}{nearest(name, choices)}")
    return name


def read_dtype(value: Any) -> str:
    """auto, float32, bfloat16 or float16; the short names fp32, bf16 and fp16 are taken too."""
    name = str(value).strip().lower()
    return read_choice("dtype", DTYPES.get(name, name), DTYPE_NAMES)


def read_device(flag: str, value: Any) -> str:
    """auto, cpu, cuda, cuda:N or mps (whether it is there is checked when it is used)."""
    name = str(value).strip().lower()
    if name in DEVICES or re.fullmatch(r"cuda:\d+", name):
        return name
    names = (*DEVICES, "cuda:0")
    raise ValueError(f"--{flag} {value}: must be auto, cpu, cuda, cuda:N or mps{nearest(name, names)}")


def read_list(flag: str, value: Any) -> list[Any]:
    """The items of a list in any shape that a shell, fire or Python hands over.

    `3,5,7`, `3 5 7`, `3, 5 7`, `[3,5,7]`, `(3,5,7)`, `3`, `` and None; tuples, lists, ints and floats.
    """
    if value is None:
        return []
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("[]", "()"):
            text = text[1:-1]
        if re.search(r"(^|,)\s*(,|$)", text) and text.strip():
            text = re.sub(r",\s*$", "", text)  # one comma at the end is how Python writes (3,)
            if re.search(r"(^|,)\s*(,|$)", text):
                raise ValueError(f"--{flag} {value}: an item between two commas is empty")
        return [_unquote(item) for item in re.split(r"[,\s]+", text.strip()) if item]
    if isinstance(value, Iterable):
        return [item for part in value for item in (read_list(flag, part) if isinstance(part, str) else [part])]
    return [value]


def _unquote(item: str) -> str:
    try:
        literal = ast.literal_eval(item)
    except (ValueError, SyntaxError):
        return item
    return literal if isinstance(literal, str) else item


def read_layers(flag: str, value: Any) -> tuple[int, ...]:
    """Layer numbers, each at least 0, and ranges: `2-22` (both ends count) and `2-22:2` (every second); `none`.

    The upper end is checked once the model's depth is known.
    """
    if isinstance(value, str) and value.strip().lower() == "none":
        return ()
    return tuple(layer for item in read_list(flag, value) for layer in _layer_range(flag, item))


def _layer_range(flag: str, item: Any) -> Sequence[int]:
    match = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?", item) if isinstance(item, str) else None
    if match is None:
        return (read_int(flag, item, 0),)
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if last < first or step < 1 or last >= 10_000:
        raise ValueError(f"--{flag} {item}: a range counts up, such as 2-22 or 2-22:2")
    return range(first, last + 1, step)


def read_weights(flag: str, value: Any) -> tuple[float, ...] | str:
    """Any real numbers, or a ramp `linear:FIRST:LAST` over the targets, in that spelling."""
    items = read_list(flag, value)
    if any(isinstance(item, str) and ":" in item for item in items):
        ramp = _ramp(items[0]) if len(items) == 1 else None
        if ramp is None:
            raise ValueError(f"--{flag} {value}: must be numbers, or a ramp such as linear:0.8:0.2")
        return f"linear:{ramp[0]}:{ramp[1]}"
    return tuple(read_float(flag, item) for item in items)


def _ramp(text: str) -> tuple[float, float] | None:
    name, *ends = text.split(":")
    try:
        first, last = map(float, ends)
    except ValueError:
        return None
    return (first, last) if name == "linear" and math.isfinite(first) and math.isfinite(last) else None


def spread_weights(weights: Sequence[float] | str, count: int) -> tuple[float, ...]:
    """One weight for each of `count` targets: none given means 1.0, one holds for all, a ramp (as `read_weights` spells
    it) is filled in.

    Another number of weights comes back as it is, for `check_residual` to name.
    """
    if isinstance(weights, str):
        first, last = map(float, weights.split(":")[1:])
        return tuple(round(first + (last - first) * i / max(count - 1, 1), 12) for i in range(count))
    return (*(weights or (1.0,)),) * count if len(weights) < 2 else tuple(weights)


def read_schedule(flag: str, value: Any) -> str:
    """constant, linear, cosine or `exp:ALPHA` with any real ALPHA, in one spelling."""
    text = str(value).strip().lower()
    name, colon, alpha = text.partition(":")
    if name == "exp" and colon:
        return f"exp:{read_float(flag, alpha)}"
    if text in RESIDUAL_SCHEDULES:
        return text
    names = ", ".join(RESIDUAL_SCHEDULES)
    raise ValueError(f"--{flag} {value}: must be {names} or exp:ALPHA such as exp:2{nearest(text, RESIDUAL_SCHEDULES)}")


def read_size(flag: str, value: Any) -> int:
    """Pixels: a positive multiple of 16; raises ValueError with the nearest sizes."""
    size = read_int(flag, value, SIZE_STEP)
    if size % SIZE_STEP:
        below = size // SIZE_STEP * SIZE_STEP
        raise ValueError(f"--{flag} {value}: must be a multiple of {SIZE_STEP}, such as {below} or {below + SIZE_STEP}")
    return size


def read_tile(flag: str, value: Any) -> int | None:
    """Side of a VAE tile in pixels: a multiple of 16, at least 128; 0 and off: no tiles; auto: None."""
    word = str(value).strip().lower()
    if word in ("auto", "off", "0"):
        return None if word == "auto" else 0
    size = read_size(flag, value)
    if size < LEAST_TILE:
        raise ValueError(f"--{flag} {value}: must be auto, off, or at least {LEAST_TILE}")
    return size


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(prompt: Any, flag: str = "prompt") -> tuple[list[str], str]:
    """The prompts and the name of their folder, from a text or a `.txt` file with one prompt a line.

    Blank lines, CRLF and a byte-order mark are fine. Raises FileNotFoundError or ValueError.
    """
    text = str(prompt)
    if not text.lower().endswith(".txt"):
        if not text.strip():
            raise ValueError(f"--{flag}: is empty; say what the picture should show, or name a .txt file")
        return [text], folder_name(text)
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"--{flag} {text}: no such file (a prompt that ends in .txt is a file of prompts)")
    prompts = [line.strip() for line in read_lines(flag, path) if line.strip()]
    if not prompts:
        raise ValueError(f"--{flag} {text}: the file holds no prompt")
    return prompts, folder_name(text)


def read_lines(flag: str, path: str | Path) -> list[str]:
    """The lines of a text file; raises ValueError where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--{flag} {path}: cannot be read as UTF-8 text ({error})") from None


def read_jsonl(flag: str, path: str, fits: Callable[[dict[str, Any]], bool], form: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line. fits: whether an object is as it should be, see `form`.

    Raises FileNotFoundError, or ValueError naming the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--{flag} {path}: no such file")
    out = []
    for number, line in enumerate(read_lines(flag, path), 1):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
            good = fits(out[-1])
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise ValueError(f"--{flag} {path}: line {number} is not of the form {form}")
    if not out:
        raise ValueError(f"--{flag} {path}: the file holds no prompt")
    return out


def folder_name(text: str) -> str:
    """A folder name from a prompt or prompt file: base name without extension, others than letters, digits, `_`,
    `-`, `.` turned into `_`, at most 50 characters.
    """
    stem = os.path.splitext(os.path.basename(text))[0] or text
    name = re.sub(r"[^\w\-.]", "_", stem)[:50]
    return name if name.strip(".") else name.replace(".", "_")  # `..` would be another folder


# ---- one picture ---------------------------------------------------------------------------------


TEXT_FILES = ("model_folder", "clip_l", "clip_g", "t5xxl")  # where text encoders lie; pictures do not name it
FILE_SETTINGS = ("model", "vae", "init_image", "controlnet_ckpt", "controlnet_cond_image", "residual_rotations")


def base_name(path: str | None) -> str | None:
    """A path without its folders, whichever system wrote it."""
    return None if path is None else os.path.basename(path.replace("\\", "/").rstrip("/"))


@dataclass(frozen=True)
class Settings:
    """Everything that decides one picture. Files are named as given; what they hold is the business of others."""

    prompt: str
    model: str
    negative_prompt: str = ""
    seed: int = DEFAULT_SEED
    sampler: str = OTHER_MODEL.sampler
    steps: int = OTHER_MODEL.steps
    cfg: float = OTHER_MODEL.cfg
    shift: float = OTHER_MODEL.shift
    width: int = DEFAULT_SIZE
    height: int = DEFAULT_SIZE
    vae: str | None = None
    init_image: str | None = None
    denoise: float = DEFAULT_DENOISE
    controlnet_ckpt: str | None = None
    controlnet_cond_image: str | None = None
    controlnet_strength: float = 1.0
    skip_layer: SkipLayerConfig | None = None
    residual_origin_layer: int = 0
    residual_target_layers: tuple[int, ...] = ()
    residual_weights: tuple[float, ...] = ()
    residual_mode: str = "add"
    residual_schedule: str = "constant"
    residual_start: float = 0.0
    residual_end: float = 1.0
    residual_branch: str = "both"
    residual_rotations: str | None = None
    no_t5: bool = False
    dtype: str = "auto"
    device: str = "auto"
    text_encoder_device: str = "auto"
    batch_size: int = 1  # rows that were sampled at once
    compile: bool = False
    weights: str = "full"
    cache: float = 0.0
    vae_tile: int = 0  # side of a tile in pixels; 0: the VAE runs on the whole picture
    offload: bool = False  # other products are computed at once then, which changes the last bits

    def __post_init__(self) -> None:
        """Reads every field as its flag is read, and keeps what was read; raises ValueError naming the flag."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value != field.default and field.name in READERS:
                object.__setattr__(self, field.name, READERS[field.name](field.name, value))
        if self.vae_tile is None:
            raise ValueError("--vae_tile auto: must be a number here; the size is chosen before a picture is described")
        weights = self.residual_weights
        if isinstance(weights, str) or (self.residual_target_layers and len(weights) < 2):
            weights = spread_weights(weights, len(self.residual_target_layers))
            object.__setattr__(self, "residual_weights", weights)
        check_residual(self.residual_origin_layer, self.residual_target_layers, self.residual_weights)
        check_residual_window(self.residual_start, self.residual_end)

    def asdict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def public(self) -> dict[str, Any]:
        """Plain values for a record that others may see: files by their names, without folders.

        Settings that came later are left out at their defaults, so that pictures made before keep their digests.
        What has no effect is not seen here: `effective` sets it to its default before a picture is made.
        """
        return {n: v for n, v in self.named().items() if n not in LATER or v != LATER[n]}

    def named(self) -> dict[str, Any]:
        """All plain values, files by their names without folders."""
        values = self.asdict()
        return values | {name: base_name(values[name]) for name in FILE_SETTINGS}

    def digest(self) -> str:
        """A canonical hash of what decides the picture: the same for the same settings on any machine, wherever the
        files lie there.
        """
        return digest_of(self.public())


LATER = {
    f.name: f.default
    for f in dataclasses.fields(Settings)
    if f.name in ("compile", "weights", "cache", "vae_tile", "offload")
}


def digest_of(public: Mapping[str, Any]) -> str:
    """The digest of settings by their public values, as a picture's record holds them."""
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()


def earlier_digest(as_given: Settings) -> str:
    """The digest that pictures of these settings had in versions that counted every flag as it was given, and did not
    count `offload`.
    """
    return digest_of({n: v for n, v in as_given.public().items() if n != "offload"})


# ---- flags without effect ------------------------------------------------------------------------


def effective(s: Settings) -> tuple[Settings, list[str]]:
    """Settings in which every flag that has no effect on the picture is at its default, and a line for each of them.

    Two flags may be without effect only together with others: the rules run in an order in which each sees the
    result of those before it.
    """
    notes: list[str] = []
    for rule in _RULES:
        wanted, why = rule(s)
        changes = {name: value for name, value in wanted.items() if getattr(s, name) != value}
        if changes:
            s = dataclasses.replace(s, **changes)
        if why and (changes or not wanted):
            notes.append(f"note: {why}")
    return s, notes


def executed_steps(s: Settings) -> int:
    """How many sampling steps run: all, or with an initial picture the part that `denoise` leaves."""
    return s.steps - skipped_steps(s.steps, s.denoise if s.init_image else 1.0)


def skipped_steps(steps: int, denoise: float) -> int:
    """How many steps of a schedule an image-to-image run of strength `denoise` in [0, 1] leaves out at its start."""
    return int(steps * (1 - denoise))


def starts_from_noise(steps: int, denoise: float, shift: float) -> bool:
    """Whether an image-to-image run begins at sigma 1 exactly: the initial picture then weighs nothing.

    Follows `sd3_impls.flow_schedule` in its float32 arithmetic: for some shifts its first sigma is not quite 1.
    """
    if skipped_steps(steps, denoise):
        return False
    single = lambda x: struct.unpack("f", struct.pack("f", x))[0]  # noqa: E731
    t = single(single(1000.0 * (shift / (1 + (shift - 1)))) / 1000.0)
    return single(single(single(shift) * t) / single(1 + single(single(shift - 1) * t))) == 1.0


def acts_in_window(start: float, end: float, step: int, steps: int) -> bool:
    """Whether residual streaming acts in `step` (from 0) of `steps`: start <= step / steps < end."""
    place = step + 1e-9  # 0.7 * 10 is a little more than 7
    return start * steps <= place < end * steps


def skips_layers(config: SkipLayerConfig, step: int, steps: int) -> bool:
    """Whether skip-layer guidance acts in `step` (from 0) of a schedule of `steps`."""
    return config.start * steps < step < config.end * steps


_Rule = tuple[dict[str, Any], str]
_RESIDUAL_OFF = {f.name: f.default for f in dataclasses.fields(Settings) if f.name.startswith("residual_")}


def _initial_picture(s: Settings) -> _Rule:
    if s.init_image is None:
        return {"denoise": DEFAULT_DENOISE}, "--denoise has no effect without --init_image"
    if starts_from_noise(s.steps, s.denoise, s.shift):
        why = f"--denoise {s.denoise:g} at {s.steps} steps starts from pure noise, so --init_image has no effect"
        return {"init_image": None, "denoise": DEFAULT_DENOISE}, why
    if executed_steps(s) == 0:
        return {}, f"--denoise {s.denoise:g} leaves no step to run: the initial picture is only encoded and decoded"
    return {}, ""


def _control(s: Settings) -> _Rule:
    if s.controlnet_ckpt and s.controlnet_cond_image:
        return {}, ""
    changes = {"controlnet_ckpt": None, "controlnet_cond_image": None, "controlnet_strength": 1.0}
    if s.controlnet_ckpt:
        return changes, "the ControlNet has no effect without --controlnet_cond_image"
    return changes, "--controlnet_strength has no effect without --controlnet_cond_image"


def _negative_prompt(s: Settings) -> _Rule:
    if s.cfg != 1:
        return {}, ""
    return {"negative_prompt": ""}, "--negative_prompt has no effect at --cfg 1 (guidance is off)"


def _skip_layer(s: Settings) -> _Rule:
    config = s.skip_layer
    if config is None or (
        config.scale != 0 and any(skips_layers(config, i, s.steps) for i in range(executed_steps(s)))
    ):
        return {}, ""
    if config.scale == 0:
        return {"skip_layer": None}, "skip-layer guidance has no effect at scale 0"
    window = f"between {config.start:g} and {config.end:g} of {s.steps} steps"
    return {"skip_layer": None}, f"skip-layer guidance has no effect: it acts {window}, and no step lies there"


def _residual(s: Settings) -> _Rule:
    if not s.residual_target_layers:
        return _RESIDUAL_OFF, ""
    if s.residual_mode == "add" and not any(s.residual_weights):
        return _RESIDUAL_OFF, "residual text streaming has no effect: all weights are 0"
    if s.cfg == 1 and s.residual_branch == "uncond":
        return _RESIDUAL_OFF, "residual text streaming has no effect: --cfg 1 runs no unconditional pass"
    steps = executed_steps(s)
    acts = [acts_in_window(s.residual_start, s.residual_end, i, steps) for i in range(steps)]
    if not any(acts):
        window = f"--residual_start {s.residual_start:g} to --residual_end {s.residual_end:g}"
        return _RESIDUAL_OFF, f"residual text streaming has no effect: {window} holds none of the {steps} steps"
    changes: dict[str, Any] = {}
    if all(acts):
        changes |= {"residual_start": 0.0, "residual_end": 1.0}
    if s.cfg == 1:
        changes["residual_branch"] = "both"
    if s.residual_mode != "aligned":
        changes["residual_rotations"] = None
    return changes, ""


def _cache(s: Settings) -> _Rule:
    if not s.cache:
        return {}, ""
    if executed_steps(s) < 2:
        return {"cache": 0.0}, "--cache has no effect: there is no earlier step to reuse"
    why = f"--batch_size {s.batch_size} with --cache: pictures are made one by one, so that each decides for itself"
    return {"batch_size": 1}, why


def _tiles(s: Settings) -> _Rule:
    return ({"vae_tile": 0}, "") if s.vae_tile >= max(s.width, s.height) else ({}, "")


_RULES: tuple[Callable[[Settings], _Rule], ...] = (
    _initial_picture, _control, _negative_prompt, _skip_layer, _residual, _cache, _tiles,
)  # fmt: skip


def check_residual(
    origin: int, targets: Sequence[int], weights: Sequence[float] | str, depth: int | None = None
) -> None:
    """Checks residual settings against each other and, where known, the number of joint blocks.

    Raises ValueError naming the value and the valid range. Without targets the feature is off and nothing is wrong.
    """
    if not targets:
        return
    last = "" if depth is None else f" (this model has {depth} joint blocks: 0 to {depth - 1})"
    if origin < 0 or (depth is not None and origin >= depth):
        raise ValueError(f"--residual_origin_layer {origin}: no such layer{last or '; layers count from 0'}")
    for i, target in enumerate(targets):
        if target < 0 or (depth is not None and target >= depth):
            raise ValueError(f"--residual_target_layers {target}: no such layer{last or '; layers count from 0'}")
        if target in targets[:i]:
            raise ValueError(f"--residual_target_layers: {target} is there twice; name every layer once")
        if target < origin:
            raise ValueError(f"--residual_target_layers {target}: lies below the origin layer {origin}{last}")
    weights = spread_weights(weights, len(targets))
    if len(weights) != len(targets):
        raise ValueError(
            f"--residual_weights: {len(weights)} given for {len(targets)} target layers; "
            "give one each, one for all, or none for 1.0"
        )
    for weight in weights:
        read_float("residual_weights", weight)


def check_residual_window(start: float, end: float) -> None:
    """Raises ValueError where the part of the steps in which residual streaming acts is empty or out of range."""
    read_float("residual_start", start, 0.0, 1.0)
    read_float("residual_end", end, 0.0, 1.0)
    if start >= end:
        raise ValueError(f"--residual_start {start:g}: must be below --residual_end {end:g}; no step is left")


def check_residual_choices(mode: str, schedule: str, branch: str) -> None:
    """Raises ValueError for a mode, schedule or branch that there is not."""
    read_choice("residual_mode", mode, RESIDUAL_MODES)
    read_schedule("residual_schedule", schedule)
    read_choice("residual_branch", branch, RESIDUAL_BRANCHES)


# ---- the command line ----------------------------------------------------------------------------


def _text(flag: str, value: Any) -> str:
    return str(value)


def _filled(flag: str, value: Any) -> str:
    if not str(value).strip():
        raise ValueError(f"--{flag}: is empty")
    return str(value)


def _optional_path(flag: str, value: Any) -> str | None:
    """A path; an empty one and `None` mean none (shell scripts pass empty variables)."""
    return None if str(value).strip() in ("", "None") else str(value)


def range_int(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    """A reader of whole numbers in [low, high]."""
    return lambda flag, value: read_int(flag, value, low, high)


def _choice(choices: Sequence[str]) -> Callable[[str, Any], str]:
    return lambda flag, value: read_choice(flag, value, choices)


@dataclass(frozen=True)
class Flags:
    """The flags of `sd3_infer.py`, read and checked one by one; None means not given."""

    prompt: str = "cute wallpaper art of a cat"
    model: str = "models/sd3_medium.safetensors"
    out_dir: str = "outputs"
    postfix: str | None = None
    seed: int | None = None
    seed_type: str | None = None
    sampler: str | None = None
    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    width: int | None = None
    height: int | None = None
    controlnet_ckpt: str | None = None
    controlnet_cond_image: str | None = None
    vae: str | None = None
    init_image: str | None = None
    denoise: float = DEFAULT_DENOISE
    skip_layer_cfg: bool = False
    verbose: bool = False
    model_folder: str | None = None
    clip_l: str | None = None
    clip_g: str | None = None
    t5xxl: str | None = None
    text_encoder_device: str = "auto"
    residual_origin_layer: int | None = None
    residual_target_layers: tuple[int, ...] | None = None
    residual_weights: tuple[float, ...] | str | None = None
    residual_mode: str | None = None
    residual_schedule: str | None = None
    residual_start: float | None = None
    residual_end: float | None = None
    residual_branch: str | None = None
    residual_rotations: str | None = None
    residual_config: str | None = None
    negative_prompt: str = ""
    num_images: int = 1
    batch_size: int = 1
    controlnet_strength: float = 1.0
    device: str = "auto"
    dtype: str = "auto"
    no_t5: bool = False
    pad_batch: bool = False
    t5_resident: bool = False
    embed_cache: str | None = None
    compile: bool = False
    weights: str = "full"
    offload: bool = False
    cache: float = 0.0
    vae_tile: int | None = None
    no_metadata: bool = False
    replay: str | None = None
    serve_stdin: bool = False
    self_check: bool = False
    list_models: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Flags:
        """From raw values as typed (text) or given in Python; None values keep the default.

        Raises ValueError for an unknown flag (with the nearest match) and for every value out of its range.
        """
        for name in raw:
            check_flag(name)
        read = {name: READERS[name](name, value) for name, value in raw.items() if value is not None}
        flags = cls(**read)
        if not flags.residual_config:  # else they are checked together with what the file says
            check_residual(
                flags.residual_origin_layer or 0, flags.residual_target_layers or (), flags.residual_weights or ()
            )
            end = 1.0 if flags.residual_end is None else flags.residual_end
            check_residual_window(flags.residual_start or 0.0, end)
            if flags.residual_mode == "aligned" and flags.residual_target_layers and not flags.residual_rotations:
                raise ValueError(NEEDS_ROTATIONS)
        if flags.controlnet_cond_image and not flags.controlnet_ckpt:
            raise ValueError("--controlnet_cond_image: needs --controlnet_ckpt, the ControlNet that reads it")
        if flags.controlnet_ckpt and not flags.controlnet_cond_image:
            raise ValueError("--controlnet_ckpt: needs --controlnet_cond_image, the picture that guides it")
        return flags

    def seeds(self, prompts: int) -> list[int]:
        """One seed per picture. Without a seed_type: fixed where a seed is given, else rand."""
        seed_type = self.seed_type or ("rand" if self.seed is None else "fixed")
        seed = DEFAULT_SEED if self.seed is None else self.seed
        return picture_seeds(seed, seed_type, prompts, self.num_images)

    def residual(self) -> dict[str, Any]:
        """The residual flags that were given, by their names without `residual_`; the file's name is not among them."""
        names = [n for n in READERS if n.startswith("residual_") and n != "residual_config"]
        return {n.removeprefix("residual_"): v for n in names if (v := getattr(self, n)) is not None}


NEEDS_ROTATIONS = (
    "--residual_mode aligned: needs --residual_rotations FILE; `python sd3_probe.py calibrate` makes one for your model"
)

READERS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "model": _filled,
    "out_dir": _filled,
    "postfix": _text,
    "seed": range_int(0, SEED_LIMIT - 1),
    "seed_type": _choice(SEED_TYPES),
    "sampler": _choice(SAMPLERS),
    "steps": range_int(1, 10_000),
    "cfg": lambda flag, value: read_float(flag, value, 0.0, 100.0),
    "shift": lambda flag, value: read_float(flag, value, above=0.0),
    "width": read_size,
    "height": read_size,
    "controlnet_ckpt": _optional_path,
    "controlnet_cond_image": _optional_path,
    "vae": _optional_path,
    "init_image": _optional_path,
    "denoise": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "skip_layer_cfg": read_bool,
    "verbose": read_bool,
    "model_folder": _optional_path,
    "clip_l": _optional_path,
    "clip_g": _optional_path,
    "t5xxl": _optional_path,
    "text_encoder_device": read_device,
    "residual_origin_layer": range_int(0),
    "residual_target_layers": read_layers,
    "residual_weights": read_weights,
    "residual_mode": _choice(RESIDUAL_MODES),
    "residual_schedule": read_schedule,
    "residual_start": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_end": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_branch": _choice(RESIDUAL_BRANCHES),
    "residual_rotations": _optional_path,
    "residual_config": _optional_path,
    "negative_prompt": _text,
    "num_images": range_int(1, 1_000_000),
    "batch_size": range_int(1, 1024),
    "controlnet_strength": read_float,
    "device": read_device,
    "dtype": lambda flag, value: read_dtype(value),
    "no_t5": read_bool,
    "pad_batch": read_bool,
    "t5_resident": read_bool,
    "embed_cache": _optional_path,
    "compile": read_bool,
    "weights": _choice(WEIGHTS),
    "offload": read_bool,
    "cache": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "vae_tile": read_tile,
    "no_metadata": read_bool,
    "replay": _filled,
    "serve_stdin": read_bool,
    "self_check": read_bool,
    "list_models": read_bool,
}


def check_flag(name: str, readers: Mapping[str, Any] = READERS) -> None:
    """Raises ValueError with the nearest match where there is no such flag."""
    if name not in readers:
        raise ValueError(f"--{name}: unknown flag{nearest(name, readers)} (--help lists all)")


def read_arguments(
    arguments: Sequence[str], readers: Mapping[str, Any] = READERS, bare: str | None = "prompt"
) -> dict[str, str]:
    """Flags and their values exactly as typed: `--name value`, `--name=value`, a switch, one word for flag `bare`.

    The word after a flag is its value whatever it looks like (`-0.5`, `-`, `None`), unless it is a flag itself.
    readers: the flags there are; those read by `read_bool` are switches. Raises ValueError for an unknown flag, a
    missing value and for stray words; the last of equal flags counts.
    """
    switches = [name for name, reader in readers.items() if reader is read_bool]
    is_flag = lambda word: word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in readers  # noqa: E731
    out: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare is None or bare in out or word.startswith("-"):
                raise ValueError(f"{word}: not understood; flags start with --, and lists with spaces need quotes")
            out[bare] = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no") and name[2:] in switches:  # fire's way to say False
            name, equals, value = name[2:], "=", "False"
        check_flag(name, readers)
        if not equals:
            following = words[0] if words else None
            if name in switches:
                value = words.pop(0) if following is not None and _is_bool(following) else "True"
            elif following is None or is_flag(following):
                raise ValueError(f"--{name}: needs a value")
            else:
                value = words.pop(0)
        out[name] = value
    return out


def _is_bool(word: str) -> bool:
    return word.strip().lower() in ("true", "false", "1", "0", "yes", "no", "on", "off")


# ---- from flags to pictures ----------------------------------------------------------------------

FILE_DEFAULTS: dict[str, Callable[[str, Any], Any]] = {
    k: READERS[k] for k in ("width", "height", "steps", "shift", "cfg", "sampler")
}


def file_defaults(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Size, steps, shift, cfg and sampler that a file names in its safetensors metadata; what is wrong is left out."""
    out = {}
    for name, read in FILE_DEFAULTS.items():
        if name in metadata:
            try:
                out[name] = read(name, metadata[name])
            except ValueError:
                continue
    return out


def resolve(
    flags: Flags, metadata: Mapping[str, str] | None = None, large_controlnet: bool = False
) -> tuple[dict[str, Any], SkipLayerConfig | None]:
    """shift, steps, cfg, sampler, width and height of a run, and its skip-layer guidance.

    A flag wins over the ControlNet's row (`large_controlnet`), that over the model file's metadata, that over the
    model's row. Skip-layer guidance brings its own cfg unless one is given.
    """
    key = model_key(flags.model)
    values = dataclasses.asdict(MODELS.get(key, OTHER_MODEL)) | {"width": DEFAULT_SIZE, "height": DEFAULT_SIZE}
    values |= file_defaults(metadata or {})
    if large_controlnet:
        values |= dataclasses.asdict(CONTROLNET)
    skip_layer = SKIP_LAYERS.get(key) if flags.skip_layer_cfg else None
    if skip_layer is not None:
        values["cfg"] = skip_layer.cfg
    for name in values:
        if (given := getattr(flags, name)) is not None:
            values[name] = given
    return values, skip_layer


def picture_seeds(seed: int, seed_type: str, prompts: int, num_images: int) -> list[int]:
    """One seed per picture, prompt by prompt.

    fixed: every prompt starts at `seed`, its further images count up; roll: counts up over all pictures; rand: drawn.
    """
    if seed_type == "rand":
        draw = random.SystemRandom()
        return [draw.randrange(RANDOM_SEEDS) for _ in range(prompts * num_images)]
    if seed_type == "roll":
        return [(seed + i) % SEED_LIMIT for i in range(prompts * num_images)]
    return [(seed + i) % SEED_LIMIT for _ in range(prompts) for i in range(num_images)]
