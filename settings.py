"""What one picture is made from: every flag's default, check and range. Needs no torch, so bad input fails at once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import random
import re
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreign import check_file, parse_json, reading

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
MOST_SIDE = 65_536  # pixels
SHIFTS = (0.001, 1000.0)  # beyond them neighbouring steps are one number in float32
WEIGHT_LIMIT = 1000.0  # of weights, exponents and strengths, either way
GAIN_LIMIT = 60_000.0  # of a weight times its schedule: float16 ends at 65504
LAYER_LIMIT = 10_000  # layers are numbered below this
MOST_ITEMS = 100_000  # of a list
MOST_PICTURES = 100_000  # of a run, and of a sweep's grid
LONGEST_NAME = 255  # bytes of a file's name
LONGEST_PATH = 4095  # bytes
LONGEST_POSTFIX = 100  # bytes; with the longest folder name and a number it stays below LONGEST_NAME


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

    def __post_init__(self) -> None:
        """Reads every field and keeps what was read; raises ValueError naming the field."""
        flag = "skip_layer_cfg"
        read = {
            "scale": read_weight(f"{flag} scale", self.scale),
            "start": read_float(f"{flag} start", self.start, 0.0, 1.0),
            "end": read_float(f"{flag} end", self.end, 0.0, 1.0),
            "layers": read_layers(f"{flag} layers", self.layers),
            "cfg": read_float(f"{flag} cfg", self.cfg, 0.0, 100.0),
        }
        if read["start"] >= read["end"]:
            raise ValueError(f"--{flag} start {read['start']:g}: must be below --{flag} end {read['end']:g}")
        if not read["layers"]:
            raise ValueError(f"--{flag} layers: names no layer to skip")
        if len(set(read["layers"])) < len(read["layers"]):
            raise ValueError(f"--{flag} layers {display(self.layers)}: name every layer once")
        for name, value in read.items():
            object.__setattr__(self, name, value)


MODELS = {
    "sd3_medium": ModelDefaults(shift=1.0),
    "sd3.5_medium": ModelDefaults(),
    "sd3.5_large": ModelDefaults(steps=40, cfg=4.5),
    "sd3.5_large_turbo": ModelDefaults(steps=4, cfg=1.0, sampler="euler"),
}
OTHER_MODEL = ModelDefaults()
CONTROLNET = ModelDefaults(steps=60, cfg=3.5, sampler="euler")  # the released SD3.5 Large ControlNets


def read_skip_layer(values: Mapping[str, Any]) -> SkipLayerConfig:
    """Skip-layer guidance from its fields by name; raises ValueError for a field too many or too few."""
    names = [f.name for f in dataclasses.fields(SkipLayerConfig)]
    for name in values:
        if name not in names:
            raise ValueError(f"--skip_layer_cfg {display(name)}: unknown{nearest(name, names)} ({', '.join(names)})")
    for name in names:
        if name not in values:
            raise ValueError(f"--skip_layer_cfg {name}: is missing")
    return SkipLayerConfig(**values)


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


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 4, 60, 60
SHOWN = 200  # letters of a value that an error line shows


def display(value: Any) -> str:
    """A value as short printable text on one line, for an error message, whatever the value is."""
    value = plain_scalar(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"(a number of about {int(value.bit_length() * math.log10(2)) + 1} digits)"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = value if isinstance(value, str) else str(value) if isinstance(value, float) else _SHORT.repr(value)
    length = len(text)
    cut = text[:SHOWN]
    cut = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)
    return cut if length <= SHOWN else f"{cut}... ({length:,} letters)"


def plain_scalar(value: Any) -> Any:
    """What a numpy scalar, or an array or tensor without dimensions, holds as Python's own type; all else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        try:
            return value.item()
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # a tensor without storage
            return value
    return value


def nearest(name: Any, known: Iterable[str]) -> str:
    """`; did you mean X?` where one of `known` is close, else nothing."""
    if not isinstance(name, str) or len(name) > 100:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def read_int(flag: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number in [low, high]; raises ValueError naming flag, value and range."""
    number: float = read_float(flag, value, what="a whole number")
    plain = plain_scalar(value)
    if isinstance(plain, int) or (isinstance(plain, str) and re.fullmatch(r"\s*[+-]?\d+\s*", plain)):
        number = int(plain)  # a float would lose digits
    if number != int(number):
        raise ValueError(f"--{flag} {display(value)}: must be a whole number")
    number = int(number)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"--{flag} {display(value)}: must be {_range(low, high)}")
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
    plain = plain_scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, (str, numbers.Real)):
        raise ValueError(f"--{flag} {display(value)}: must be {what}")
    if isinstance(plain, str) and "_" in plain:  # Python reads 3_5 as 35; it is 3-5 with a slip of the finger
        raise ValueError(f"--{flag} {display(value)}: must be {what}; digits go without _ between them")
    try:
        number = float(plain)
    except (TypeError, ValueError):
        raise ValueError(f"--{flag} {display(value)}: must be {what}") from None
    except OverflowError:
        raise ValueError(f"--{flag} {display(value)}: too large") from None
    if not math.isfinite(number):
        raise ValueError(f"--{flag} {display(value)}: must be {what}")
    if above is not None and number <= above:
        raise ValueError(f"--{flag} {display(value)}: must be greater than {above:g}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"--{flag} {display(value)}: must be {_range(low, high)}")
    return number or 0.0  # no negative zero


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"from {low} to {high}"


def read_weight(flag: str, value: Any) -> float:
    """A number within -1000..1000; raises ValueError."""
    return read_float(flag, value, -WEIGHT_LIMIT, WEIGHT_LIMIT)


def read_shift(flag: str, value: Any) -> float:
    """A shift of the noise schedule, from 0.001 to 1000; raises ValueError."""
    return read_float(flag, value, *SHIFTS)


def read_bool(flag: str, value: Any) -> bool:
    """True or False from a bool or the usual words; raises ValueError."""
    plain = plain_scalar(value)
    if isinstance(plain, bool):
        return plain
    word = plain.strip().lower() if isinstance(plain, str) else str(plain) if type(plain) is int and plain < 2 else ""
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"--{flag} {display(value)}: must be True or False")


def read_choice(flag: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`, however it is spelt; raises ValueError with the nearest match."""
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in choices:
        raise ValueError(f"--{flag} {display(value)}: must be one of {', '.join(choices)}{nearest(name, choices)}")
    return name


def read_dtype(value: Any) -> str:
    """auto, float32, bfloat16 or float16, or torch's dtypes of these names; fp32, bf16 and fp16 are taken too."""
    plain = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    name = plain.strip().lower().removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPE_NAMES:
        near = nearest(name, DTYPE_NAMES)
        raise ValueError(f"--dtype {display(value)}: must be one of {', '.join(DTYPE_NAMES)}{near}")
    return name


def read_device(flag: str, value: Any) -> str:
    """auto, cpu, cuda, cuda:N or mps, or torch's devices of these names (whether it is there is checked when it is
    used).
    """
    plain = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    name = plain.strip().lower()
    if name in DEVICES:
        return name
    if match := re.fullmatch(r"cuda:0*([0-9]{1,2})", name):
        return f"cuda:{match[1]}"
    names = (*DEVICES, "cuda:0")
    told = f"must be auto, cpu, cuda, cuda:N or mps{nearest(name, names)}"
    raise ValueError(f"--{flag} {display(plain or value)}: {told}")


def read_text(flag: str, value: Any) -> str:
    """A text that can be written as UTF-8; raises ValueError.

    Bytes of the command line that are no UTF-8 arrive as lone surrogates, and so does `\\ud800` of a JSON file.
    """
    if not isinstance(value, str):
        raise ValueError(f"--{flag} {display(value)}: must be text")
    text = str(plain_scalar(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start + 1}"
        raise ValueError(f"--{flag} {display(value)}: cannot be written as UTF-8 ({place})") from None
    return text


def read_path(flag: str, value: Any) -> str:
    """A path, `~` at its beginning replaced by the home folder; raises ValueError for what no file can be called."""
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(named, str):
        raise ValueError(f"--{flag} {display(value)}: must be a path")
    if not named.strip():
        raise ValueError(f"--{flag}: is empty")
    path = home(read_text(flag, named))
    if "\0" in path:
        raise ValueError(f"--{flag} {display(path)}: no path holds a null character")
    longest = max(len(part.encode()) for part in path.split(os.sep))
    if longest > LONGEST_NAME or len(path.encode()) > LONGEST_PATH:
        raise ValueError(f"--{flag} {display(path)}: is too long for a path; a name has at most {LONGEST_NAME} bytes")
    return path


def home(path: str) -> str:
    """A path with `~` at its beginning replaced by the home folder, as a shell does where it sees it."""
    return os.path.expanduser(path)


def read_list(flag: str, value: Any) -> list[Any]:
    """The items of a list in any shape that a shell, fire or Python hands over.

    `3,5,7`, `3 5 7`, `3, 5 7`, `[3,5,7]`, `(3,5,7)`, `3`, `` and None; tuples, lists, arrays, ints and floats.
    """
    value = plain_scalar(value)
    if value is None:
        return []
    if isinstance(value, str):
        items = _split_list(flag, value)
    elif isinstance(value, (Mapping, Set, bytes, bytearray)):
        raise ValueError(f"--{flag} {display(value)}: must be a list such as 3,5,7")
    elif isinstance(value, Iterable):
        items = []
        for part in value:  # it may have no end
            items += _split_list(flag, part) if isinstance(part, str) else [part]
            if len(items) > MOST_ITEMS:
                break
    else:
        items = [value]
    if len(items) > MOST_ITEMS:
        raise ValueError(f"--{flag}: names more than {MOST_ITEMS:,} items")
    return items


def _split_list(flag: str, text: str) -> list[str]:
    shown, text = text, text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    if text.strip() and _empty_item(text):
        text = text.rstrip().removesuffix(",")  # one comma at the end is how Python writes (3,)
        if _empty_item(text):
            raise ValueError(f"--{flag} {display(shown)}: an item between two commas is empty")
    return [_unquote(item) for item in re.split(r"[,\s]+", text.strip()) if item]


def _empty_item(text: str) -> bool:
    return any(not part.strip() for part in text.split(","))


def _unquote(item: str) -> str:
    return item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item


def read_layers(flag: str, value: Any) -> tuple[int, ...]:
    """Layer numbers, each at least 0, and ranges: `2-22` (both ends count) and `2-22:2` (every second); `none`.

    The upper end is checked once the model's depth is known.
    """
    if isinstance(value, str) and value.strip().lower() == "none":
        return ()
    layers: list[int] = []
    for item in read_list(flag, value):
        layers += _layer_range(flag, item)
        if len(layers) > LAYER_LIMIT:
            raise ValueError(f"--{flag} {display(value)}: names more than {LAYER_LIMIT:,} layers")
    return tuple(layers)


def read_layer(flag: str, value: Any) -> int:
    """A layer's number; whether a model has it is checked later. Raises ValueError."""
    layer = read_int(flag, value, 0)
    if layer >= LAYER_LIMIT:
        raise ValueError(f"--{flag} {display(value)}: must be below {LAYER_LIMIT}")
    return layer


def _layer_range(flag: str, item: Any) -> Sequence[int]:
    match = re.fullmatch(r"([0-9]+)-([0-9]+)(?::([0-9]+))?", item) if isinstance(item, str) else None
    if match is None:
        return (read_layer(flag, item),)
    first, last, step = (int(n) if len(n) < 10 else LAYER_LIMIT for n in (match[1], match[2], match[3] or "1"))
    if last < first or step < 1 or last >= LAYER_LIMIT:
        raise ValueError(f"--{flag} {display(item)}: a range counts up, such as 2-22 or 2-22:2")
    return range(first, last + 1, step)


def read_weights(flag: str, value: Any) -> tuple[float, ...] | str:
    """Numbers within -1000..1000, or a ramp `linear:FIRST:LAST` over the targets, in that spelling."""
    items = read_list(flag, value)
    if any(isinstance(item, str) and ":" in item for item in items):
        ends = _ramp(items[0]) if len(items) == 1 else None
        if ends is None:
            raise ValueError(f"--{flag} {display(value)}: must be numbers, or a ramp such as linear:0.8:0.2")
        if max(map(abs, ends)) > WEIGHT_LIMIT:
            raise ValueError(f"--{flag} {display(value)}: must begin and end within -1000 to 1000")
        return f"linear:{ends[0]}:{ends[1]}"
    return tuple(read_weight(flag, item) for item in items)


def _ramp(text: str) -> tuple[float, float] | None:
    name, *ends = text.split(":")
    try:
        first, last = (read_float("", end) for end in ends)
    except ValueError:
        return None
    return (first, last) if name.lower() == "linear" and math.isfinite(first) and math.isfinite(last) else None


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
    """constant, linear, cosine or `exp:ALPHA` with an ALPHA within -1000..1000, in one spelling."""
    text = value.strip().lower() if isinstance(value, str) else ""
    name, _, alpha = text.partition(":")
    if name == "exp" and alpha.strip():
        return f"exp:{read_weight(flag, alpha)}"
    if text in RESIDUAL_SCHEDULES:
        return text
    names, near = ", ".join(RESIDUAL_SCHEDULES), nearest(text, RESIDUAL_SCHEDULES)
    raise ValueError(f"--{flag} {display(value)}: must be {names} or exp:ALPHA such as exp:2{near}")


def read_size(flag: str, value: Any) -> int:
    """Pixels: a positive multiple of 16; raises ValueError with the nearest sizes."""
    size = read_int(flag, value, SIZE_STEP)
    if size > MOST_SIDE:
        raise ValueError(f"--{flag} {display(value)}: must be at most {MOST_SIDE}")
    if size % SIZE_STEP:
        below = size // SIZE_STEP * SIZE_STEP
        near = f"{below} or {below + SIZE_STEP}"
        raise ValueError(f"--{flag} {display(value)}: must be a multiple of {SIZE_STEP}, such as {near}")
    return size


def read_tile(flag: str, value: Any) -> int | None:
    """Side of a VAE tile in pixels: a multiple of 16, at least 128; 0 and off: no tiles; auto: None."""
    plain = plain_scalar(value)
    word = str(plain).strip().lower() if isinstance(plain, str) or (type(plain) is int and plain == 0) else ""
    if word in ("auto", "off", "0"):
        return None if word == "auto" else 0
    size = read_size(flag, value)
    if size < LEAST_TILE:
        raise ValueError(f"--{flag} {display(value)}: must be auto, off, or at least {LEAST_TILE}")
    return size


SKIP_LAYERS = {"sd3.5_medium": SkipLayerConfig(2.5, 0.01, 0.20, (7, 8, 9), cfg=4.0)}


# ---- prompts -------------------------------------------------------------------------------------


PROMPT_FILES = (".txt", ".jsonl")  # a prompt that ends so names a file of prompts, where such files are taken


def read_prompts(prompt: Any, flag: str = "prompt") -> tuple[list[str], str]:
    """The prompts and the name of their folder, from a text or a `.txt` file with one prompt a line.

    Blank lines, CRLF and a byte-order mark are fine. Raises FileNotFoundError or ValueError.
    """
    text = read_text(flag, os.fspath(prompt) if isinstance(prompt, os.PathLike) else prompt)
    if not text.lower().endswith(".txt"):
        if not text.strip():
            raise ValueError(f"--{flag}: is empty; say what the picture should show, or name a .txt file")
        return [text], folder_name(text)
    path = read_path(flag, text)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"--{flag} {text}: no such file (a prompt that ends in .txt is a file of prompts)")
    prompts = [line.strip() for line in read_lines(flag, path) if line.strip()]
    if not prompts:
        raise ValueError(f"--{flag} {text}: the file holds no prompt")
    return prompts, folder_name(text)


def read_lines(flag: str, path: str | Path) -> list[str]:
    """The lines of a text file, as `wc -l` counts them; raises FileNotFoundError, or ValueError where it is none.

    A line ends with \\n or \\r\\n. Other marks that Unicode counts as ends of lines may stand inside one.
    """
    where = f"--{flag} {display(path)}"
    check_file(where, path)
    with reading(where, "cannot be read as UTF-8 text"):
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds null characters, as UTF-16 and programs do")
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_jsonl(flag: str, path: str, fits: Callable[[dict[str, Any]], bool], form: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line. fits: whether an object is as it should be, see `form`.

    Raises FileNotFoundError, or ValueError naming the line.
    """
    path = read_path(flag, path)
    out = []
    for number, line in enumerate(read_lines(flag, path), 1):
        if not line.strip():
            continue
        try:
            out.append(parse_json(line))
            good = fits(out[-1])
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise ValueError(f"--{flag} {path}: line {number} is not of the form {form}")
        try:
            json.dumps(out[-1], ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError(f"--{flag} {path}: line {number} cannot be written as UTF-8 (a lone surrogate)") from None
    if not out:
        raise ValueError(f"--{flag} {path}: the file holds no prompt")
    return out


def folder_name(text: str) -> str:
    """A folder name from a prompt, or from a prompt file's base name without extension: others than letters, digits,
    `_`, `-`, `.` turned into `_`, at most 50 characters and 150 bytes.
    """
    stem = text
    if text.lower().endswith(PROMPT_FILES):
        stem = os.path.splitext(os.path.basename(text))[0] or text
    name = re.sub(r"[^\w\-.]", "_", stem[:50])
    while len(name.encode()) > 150:
        name = name[:-1]
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
            if value is not None and value is not field.default and field.name in READERS:  # 5 equals 5.0
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
    if s.controlnet_cond_image:
        return {}, ""
    changes = {"controlnet_ckpt": None, "controlnet_strength": 1.0}
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
    seen: set[int] = set()
    for target in targets:
        if target < 0 or (depth is not None and target >= depth):
            raise ValueError(f"--residual_target_layers {target}: no such layer{last or '; layers count from 0'}")
        if target in seen:
            raise ValueError(f"--residual_target_layers: {target} is there twice; name every layer once")
        seen.add(target)
        if target < origin:
            raise ValueError(f"--residual_target_layers {target}: lies below the origin layer {origin}{last}")
    weights = spread_weights(weights, len(targets))
    if len(weights) != len(targets):
        raise ValueError(
            f"--residual_weights: {len(weights)} given for {len(targets)} target layers; "
            "give one each, one for all, or none for 1.0"
        )
    for weight in weights:
        read_weight("residual_weights", weight)


def check_residual_strength(weights: Sequence[float], schedule: str) -> None:
    """Raises ValueError where a weight times its schedule (as `read_schedule` spells it) grows beyond what float16
    holds: a negative ALPHA makes it e^-ALPHA times as large.
    """
    if not schedule.startswith("exp:"):
        return
    largest = max((abs(w) for w in weights), default=0.0)
    if largest and math.log(largest) - min(float(schedule.removeprefix("exp:")), 0.0) > math.log(GAIN_LIMIT):
        raise ValueError(
            f"--residual_schedule {schedule}: makes the weight {largest:g} larger than {GAIN_LIMIT:,.0f}; "
            "take a larger ALPHA or smaller weights"
        )


def check_residual_window(start: float, end: float) -> None:
    """Raises ValueError where the part of the steps in which residual streaming acts is empty or out of range."""
    read_float("residual_start", start, 0.0, 1.0)
    read_float("residual_end", end, 0.0, 1.0)
    if start >= end:
        raise ValueError(f"--residual_start {start:g}: must be below --residual_end {end:g}; no step is left")


# ---- the command line ----------------------------------------------------------------------------


def _optional_path(flag: str, value: Any) -> str | None:
    """A path; an empty one and `None` mean none (shell scripts pass empty variables)."""
    return None if isinstance(value, str) and value.strip() in ("", "None") else read_path(flag, value)


def read_postfix(flag: str, value: Any) -> str:
    """The end of a folder's name: a text of at most 100 bytes; raises ValueError."""
    text = read_text(flag, value)
    if "\0" in text or len(text.encode()) > LONGEST_POSTFIX:
        raise ValueError(f"--{flag} {display(text)}: must be at most {LONGEST_POSTFIX} bytes, without null characters")
    return text


def read_filled(flag: str, value: Any) -> str:
    """A text with something in it; raises ValueError."""
    if not read_text(flag, value).strip():
        raise ValueError(f"--{flag}: is empty")
    return read_text(flag, value)


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
        flags = cls(**read_values(raw))
        if flags.self_check:
            for name, value in raw.items():
                if name not in SELF_CHECK and value is not None:
                    raise ValueError(f"--{name}: does not go with --self_check, which runs the shipped model")
        if not flags.residual_config:  # else they are checked together with what the file says
            check_residual(
                flags.residual_origin_layer or 0, flags.residual_target_layers or (), flags.residual_weights or ()
            )
            end = 1.0 if flags.residual_end is None else flags.residual_end
            check_residual_window(flags.residual_start or 0.0, end)
            if flags.residual_target_layers:
                spread = spread_weights(flags.residual_weights or (), len(flags.residual_target_layers))
                check_residual_strength(spread, flags.residual_schedule or "constant")
            if flags.residual_mode == "aligned" and flags.residual_target_layers and not flags.residual_rotations:
                raise ValueError(NEEDS_ROTATIONS)
        if flags.controlnet_cond_image and not flags.controlnet_ckpt:
            raise ValueError("--controlnet_cond_image: needs --controlnet_ckpt, the ControlNet that reads it")
        if flags.controlnet_ckpt and not flags.controlnet_cond_image:
            raise ValueError("--controlnet_ckpt: needs --controlnet_cond_image, the picture that guides it")
        return flags

    def seeds(self, prompts: int) -> list[int]:
        """One seed per picture."""
        seed = DEFAULT_SEED if self.seed is None else self.seed
        return picture_seeds(seed, self.kind_of_seeds, prompts, self.num_images)

    @property
    def kind_of_seeds(self) -> str:
        """The seed_type; without one: fixed where a seed is given, else rand."""
        return self.seed_type or ("rand" if self.seed is None else "fixed")

    def residual(self) -> dict[str, Any]:
        """The residual flags that were given, by their names without `residual_`; the file's name is not among them."""
        names = [n for n in READERS if n.startswith("residual_") and n != "residual_config"]
        return {n.removeprefix("residual_"): v for n in names if (v := getattr(self, n)) is not None}


NEEDS_ROTATIONS = (
    "--residual_mode aligned: needs --residual_rotations FILE; `python sd3_probe.py calibrate` makes one for your model"
)

READERS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": read_text,
    "model": read_path,
    "out_dir": read_path,
    "postfix": read_postfix,
    "seed": range_int(0, SEED_LIMIT - 1),
    "seed_type": _choice(SEED_TYPES),
    "sampler": _choice(SAMPLERS),
    "steps": range_int(1, 10_000),
    "cfg": lambda flag, value: read_float(flag, value, 0.0, 100.0),
    "shift": read_shift,
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
    "residual_origin_layer": read_layer,
    "residual_target_layers": read_layers,
    "residual_weights": read_weights,
    "residual_mode": _choice(RESIDUAL_MODES),
    "residual_schedule": read_schedule,
    "residual_start": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_end": lambda flag, value: read_float(flag, value, 0.0, 1.0),
    "residual_branch": _choice(RESIDUAL_BRANCHES),
    "residual_rotations": _optional_path,
    "residual_config": _optional_path,
    "negative_prompt": read_text,
    "num_images": range_int(1, MOST_PICTURES),
    "batch_size": range_int(1, 1024),
    "controlnet_strength": read_weight,
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
    "replay": read_path,
    "serve_stdin": read_bool,
    "self_check": read_bool,
    "list_models": read_bool,
}


# What --self_check goes with; it brings its own model and settings.
SELF_CHECK = (
    "self_check", "device", "text_encoder_device", "dtype", "weights", "compile", "offload", "t5_resident", "verbose",
)  # fmt: skip


def read_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every value read by its flag's reader, None left out: what is used from then on. Raises ValueError for an unknown
    flag and for every value out of its range; says nothing of how they go together.
    """
    for name in raw:
        check_flag(name)
    return {name: READERS[name](name, value) for name, value in raw.items() if value is not None}


def check_flag(name: Any, readers: Mapping[str, Any] = READERS) -> None:
    """Raises ValueError with the nearest match where there is no such flag."""
    if name not in readers:
        raise ValueError(f"--{display(name)}: unknown flag{nearest(name, readers)} (--help lists all)")


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
                told = "not understood; flags start with --, and lists with spaces need quotes"
                raise ValueError(f"{display(word)}: {told}")
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
    """Whether a word is a switch's value, or several parted by `;`, which a sweep takes."""
    values = word.strip().lower().removesuffix(";").split(";")
    return all(value.strip() in ("true", "false", "1", "0", "yes", "no", "on", "off") for value in values)


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
    """One seed per picture, prompt by prompt; raises ValueError for values out of their ranges.

    fixed: every prompt starts at `seed`, its further images count up; roll: counts up over all pictures; rand: drawn,
    no two of them the same.
    """
    read = read_values({"seed": seed, "seed_type": seed_type, "num_images": num_images})
    seed, seed_type, num_images = read["seed"], read["seed_type"], read["num_images"]
    count = prompts * num_images
    if count > MOST_PICTURES:
        raise ValueError(
            f"--num_images {num_images}: for {prompts:,} prompts these are {count:,} pictures; "
            f"at most {MOST_PICTURES:,}"
        )
    if seed_type == "rand":
        return random.SystemRandom().sample(range(RANDOM_SEEDS), count)
    if seed_type == "roll":
        return [(seed + i) % SEED_LIMIT for i in range(count)]
    return [(seed + i) % SEED_LIMIT for _ in range(prompts) for i in range(num_images)]
