"""Readers of single values: each turns a value from the shell, a file or Python into a checked one. Needs no torch."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from sd3.mistakes import Mistake, nearest, plain_scalar

RESIDUAL_SCHEDULES = ("constant", "linear", "cosine")  # and exp:ALPHA
DIALECTS = ("comfy", "a1111", "off")  # whose rule of brackets in a prompt; off: they are text
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
STORAGES = ("full", "int8", "fp8")  # of the blocks' weights
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
SIZE_STEP = 16  # pixels: VAE cell (8) times patch (2)
SEED_LIMIT = 2**63
LEAST_TILE = 128  # pixels; smaller tiles would be mostly overlap
MOST_SIDE = 65_536  # pixels
SHIFTS = (0.001, 1000.0)  # outside this range neighbouring noise levels are equal in float32
WEIGHT_LIMIT = 1000.0  # largest absolute value of weights, exponents and strengths
LAYER_LIMIT = 10_000  # layer numbers are below this
MOST_ITEMS = 100_000  # of a list
LONGEST_NAME = 255  # bytes of a file's name
LONGEST_PATH = 4095  # bytes
MOST_PATCH_FILES = 100  # of one flag
LONGEST_POSTFIX = 100  # bytes; fits into LONGEST_NAME with the longest folder name and a number


def read_int(flag: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number in [low, high]; raises Mistake naming flag, value and range."""
    number: float = read_float(flag, value, what="a whole number")
    plain = plain_scalar(value)
    if isinstance(plain, int) or (isinstance(plain, str) and re.fullmatch(r"\s*[+-]?\d+\s*", plain)):
        number = int(plain)  # a float would lose digits
    if number != int(number):
        raise Mistake(flag, value, "must be a whole number")
    number = int(number)
    if (low is not None and number < low) or (high is not None and number > high):
        raise Mistake(flag, value, f"must be {_range(low, high)}")
    return number


def read_float(
    flag: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    what: str = "a number",
    above: float | None = None,
) -> float:
    """A finite number in [low, high] and greater than `above`; raises Mistake naming flag, value and range."""
    plain = plain_scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, (str, numbers.Real)):
        raise Mistake(flag, value, f"must be {what}")
    if isinstance(plain, str) and "_" in plain:  # Python reads 3_5 as 35; likely a typo of 3-5
        raise Mistake(flag, value, f"must be {what}, without _ between digits")
    try:
        number = float(plain)
    except (TypeError, ValueError):
        raise Mistake(flag, value, f"must be {what}") from None
    except OverflowError:
        raise Mistake(flag, value, "too large") from None
    if not math.isfinite(number):
        raise Mistake(flag, value, f"must be {what}")
    if above is not None and number <= above:
        raise Mistake(flag, value, f"must be greater than {above:g}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise Mistake(flag, value, f"must be {_range(low, high)}")
    return number or 0.0  # 0.0 for -0.0


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"from {low} to {high}"


def read_weight(flag: str, value: Any) -> float:
    """A number within -1000..1000; raises Mistake."""
    return read_float(flag, value, -WEIGHT_LIMIT, WEIGHT_LIMIT)


def read_shift(flag: str, value: Any) -> float:
    """A shift of the noise schedule, from 0.001 to 1000; raises Mistake."""
    return read_float(flag, value, *SHIFTS)


def read_bool(flag: str, value: Any) -> bool:
    """A bool, or one of true, false, 1, 0, yes, no, on, off; raises Mistake."""
    plain = plain_scalar(value)
    if isinstance(plain, bool):
        return plain
    word = plain.strip().lower() if isinstance(plain, str) else str(plain) if type(plain) is int and plain < 2 else ""
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise Mistake(flag, value, "must be True or False")


def read_choice(flag: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`, in upper or lower case; raises Mistake with the nearest match."""
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in choices:
        raise Mistake(flag, value, f"must be one of {', '.join(choices)}{nearest(name, choices)}")
    return name


def read_dtype(flag: str, value: Any) -> str:
    """auto, float32, bfloat16 or float16; also fp32, bf16, fp16 and torch's dtypes. Raises Mistake."""
    plain = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    name = plain.strip().lower().removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPE_NAMES:
        near = nearest(name, DTYPE_NAMES)
        raise Mistake(flag, value, f"must be one of {', '.join(DTYPE_NAMES)}{near}")
    return name


def read_device(flag: str, value: Any) -> str:
    """auto, cpu, cuda, cuda:N or mps, or a torch device of such a name; raises Mistake. Whether the device exists is
    checked when it is used.
    """
    plain = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    name = plain.strip().lower()
    if name in DEVICES:
        return name
    if match := re.fullmatch(r"cuda:0*([0-9]{1,2})", name):
        return f"cuda:{match[1]}"
    names = (*DEVICES, "cuda:0")
    raise Mistake(flag, plain or value, f"must be auto, cpu, cuda, cuda:N or mps{nearest(name, names)}")


def read_text(flag: str, value: Any) -> str:
    """A text that can be written as UTF-8; raises Mistake.

    Python turns command-line bytes that are not UTF-8, and `\\ud800` in a JSON file, into lone surrogates.
    """
    if not isinstance(value, str):
        raise Mistake(flag, value, "must be text")
    text = str(plain_scalar(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start + 1}"
        raise Mistake(flag, value, f"cannot be written as UTF-8 ({place})") from None
    return text


def read_path(flag: str, value: Any) -> str:
    """A path, with a leading `~` replaced by the home folder; raises Mistake for a name that no file can have."""
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(named, str):
        raise Mistake(flag, value, "must be a path")
    if not named.strip():
        raise Mistake(flag, "", "is empty")
    path = home(read_text(flag, named))
    if "\0" in path:
        raise Mistake(flag, path, "must not contain a null character")
    longest = max(len(part.encode()) for part in path.split(os.sep))
    if longest > LONGEST_NAME or len(path.encode()) > LONGEST_PATH:
        raise Mistake(flag, path, f"is too long for a path; a name has at most {LONGEST_NAME} bytes")
    return path


def home(path: str) -> str:
    """A path with a leading `~` replaced by the home folder; a shell does not do so in `--flag=~/file`."""
    return os.path.expanduser(path)


def read_list(flag: str, value: Any) -> list[Any]:
    """The items of a list, in any form from a shell, fire or Python.

    `3,5,7`, `3 5 7`, `3, 5 7`, `[3,5,7]`, `(3,5,7)`, `3`, `` and None; tuples, lists, arrays, ints and floats.
    """
    value = plain_scalar(value)
    if value is None:
        return []
    if isinstance(value, str):
        items = _split_list(flag, value)
    elif isinstance(value, (Mapping, Set, bytes, bytearray)):
        raise Mistake(flag, value, "must be a list such as 3,5,7")
    elif isinstance(value, Iterable):
        items = []
        for part in value:  # may be endless
            items += _split_list(flag, part) if isinstance(part, str) else [part]
            if len(items) > MOST_ITEMS:
                break
    else:
        items = [value]
    if len(items) > MOST_ITEMS:
        raise Mistake(flag, "", f"names more than {MOST_ITEMS:,} items")
    return items


def _split_list(flag: str, text: str) -> list[str]:
    shown, text = text, text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    if text.strip() and _empty_item(text):
        text = text.rstrip().removesuffix(",")  # Python writes (3,)
        if _empty_item(text):
            raise Mistake(flag, shown, "an item between two commas is empty")
    return [_unquote(item) for item in re.split(r"[,\s]+", text.strip()) if item]


def _empty_item(text: str) -> bool:
    return any(not part.strip() for part in text.split(","))


def _unquote(item: str) -> str:
    return item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item


def read_layers(flag: str, value: Any) -> tuple[int, ...]:
    """Layer numbers from 0, ranges with both ends such as `2-22`, with a step such as `2-22:2`; or `none`.

    The upper bound is checked when the model's depth is known.
    """
    if isinstance(value, str) and value.strip().lower() == "none":
        return ()
    layers: list[int] = []
    for item in read_list(flag, value):
        layers += _layer_range(flag, item)
        if len(layers) > LAYER_LIMIT:
            raise Mistake(flag, value, f"names more than {LAYER_LIMIT:,} layers")
    return tuple(layers)


def read_layer(flag: str, value: Any) -> int:
    """A layer number; the model's depth is checked later. Raises Mistake."""
    layer = read_int(flag, value, 0)
    if layer >= LAYER_LIMIT:
        raise Mistake(flag, value, f"must be below {LAYER_LIMIT}")
    return layer


def _layer_range(flag: str, item: Any) -> Sequence[int]:
    match = re.fullmatch(r"([0-9]+)-([0-9]+)(?::([0-9]+))?", item) if isinstance(item, str) else None
    if match is None:
        return (read_layer(flag, item),)
    first, last, step = (int(n) if len(n) < 10 else LAYER_LIMIT for n in (match[1], match[2], match[3] or "1"))
    if last < first or step < 1 or last >= LAYER_LIMIT:
        raise Mistake(flag, item, "a range counts up, such as 2-22 or 2-22:2")
    return range(first, last + 1, step)


def read_weights(flag: str, value: Any) -> tuple[float, ...] | str:
    """Numbers from -1000 to 1000, one per target; or, normalised, `each:W` for all targets or `linear:FIRST:LAST` for
    a ramp over them. Raises Mistake.
    """
    items = read_list(flag, value)
    if not any(isinstance(item, str) and ":" in item for item in items):
        return tuple(read_weight(flag, item) for item in items)
    name, numbers = _named_numbers(items[0]) if len(items) == 1 else ("", ())
    if (name, len(numbers)) not in (("each", 1), ("linear", 2)):
        raise Mistake(flag, value, "must be numbers, each:0.5, or a ramp such as linear:0.8:0.2")
    if max(map(abs, numbers)) > WEIGHT_LIMIT:
        raise Mistake(flag, value, "must be within -1000 to 1000")
    return ":".join([name, *map(str, numbers)])


def _named_numbers(text: str) -> tuple[str, tuple[float, ...]]:
    """The name and the numbers of `linear:0.8:0.2`; no numbers where one cannot be read."""
    name, *texts = str(text).split(":")
    try:
        return name.strip().lower(), tuple(read_float("", text) for text in texts)
    except Mistake:
        return "", ()


def spread_weights(weights: Sequence[float] | str, count: int) -> tuple[float, ...]:
    """One weight for each of `count` targets: 1.0 if none is given; `each:W` and ramps, as `read_weights` returns
    them, are expanded.

    A wrong number of weights is returned unchanged: `ResidualConfig` reports it.
    """
    if isinstance(weights, str):
        name, *ends = weights.split(":")
        first, last = (float(ends[0]), float(ends[-1]))
        if name == "each":
            return (first,) * count
        return tuple(round(first + (last - first) * i / max(count - 1, 1), 12) for i in range(count))
    return tuple(weights) or (1.0,) * count


def read_schedule(flag: str, value: Any) -> str:
    """constant, linear, cosine or `exp:ALPHA`, normalised, with ALPHA from -1000 to 1000; raises Mistake."""
    text = value.strip().lower() if isinstance(value, str) else ""
    name, _, alpha = text.partition(":")
    if name == "exp" and alpha.strip():
        return f"exp:{read_weight(flag, alpha)}"
    if text in RESIDUAL_SCHEDULES:
        return text
    names, near = ", ".join(RESIDUAL_SCHEDULES), nearest(text, RESIDUAL_SCHEDULES)
    raise Mistake(flag, value, f"must be {names} or exp:ALPHA such as exp:2{near}")


def read_size(flag: str, value: Any) -> int:
    """Pixels: a positive multiple of 16; raises Mistake with the nearest sizes."""
    size = read_int(flag, value, SIZE_STEP)
    if size > MOST_SIDE:
        raise Mistake(flag, value, f"must be at most {MOST_SIDE}")
    if size % SIZE_STEP:
        below = size // SIZE_STEP * SIZE_STEP
        near = f"{below} or {below + SIZE_STEP}"
        raise Mistake(flag, value, f"must be a multiple of {SIZE_STEP}, such as {near}")
    return size


def read_tile(flag: str, value: Any) -> int | None:
    """Side of a VAE tile in pixels: a multiple of 16, at least 128; 0 for `off`, None for `auto`. Raises Mistake."""
    plain = plain_scalar(value)
    word = str(plain).strip().lower() if isinstance(plain, str) or (type(plain) is int and plain == 0) else ""
    if word in ("auto", "off", "0"):
        return None if word == "auto" else 0
    size = read_size(flag, value)
    if size < LEAST_TILE:
        raise Mistake(flag, value, f"must be auto, off, or at least {LEAST_TILE}")
    return size


def read_optional_path(flag: str, value: Any) -> str | None:
    """A path; None for an empty text and `None`, since shell scripts pass empty variables. Raises Mistake."""
    return None if isinstance(value, str) and value.strip() in ("", "None") else read_path(flag, value)


class PatchFile(NamedTuple):
    """A file that changes weights, and its strength; as text `FILE` or `FILE:STRENGTH`."""

    path: str
    strength: float = 1.0

    def __str__(self) -> str:
        return self.path if self.strength == 1 else f"{self.path}:{str(self.strength).removesuffix('.0')}"


def read_patch_files(flag: str, value: Any) -> tuple[PatchFile, ...] | None:
    """Files with strengths, `FILE[:STRENGTH][,FILE[:STRENGTH]...]`, or a list of these, of paths and of pairs of path
    and strength; None for an empty text or list and `none`. A text that names an existing file is one path, commas and
    colons included. Raises Mistake.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
        return None
    if isinstance(value, (str, os.PathLike)) or _is_patch_pair(value):
        value = [value]
    elif isinstance(value, (Mapping, Set, bytes, bytearray)) or not isinstance(value, Iterable):
        raise Mistake(flag, value, "must be FILE, FILE:STRENGTH, or several of these")
    files: list[PatchFile] = []
    for item in value:
        files += _split_patch_files(flag, item) if isinstance(item, str) else [_read_patch_file(flag, item)]
        if len(files) > MOST_PATCH_FILES:
            raise Mistake(flag, "", f"names more than {MOST_PATCH_FILES} files")
    names: dict[str, str] = {}
    for path, _ in files:
        place = os.path.realpath(path)
        if names.setdefault(os.path.basename(os.path.normpath(path)), place) != place:  # records have names alone
            raise Mistake(flag, path, "has the same name as another file of this flag; rename one of them")
    return tuple(files) or None


def _is_patch_pair(value: Any) -> bool:
    """Whether a value is a path with a strength, such as a record holds: ["a.safetensors", 0.5]."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return isinstance(value[0], (str, os.PathLike)) and not isinstance(value[1], (str, os.PathLike, list, tuple))


def _read_patch_file(flag: str, item: Any) -> PatchFile:
    if isinstance(item, os.PathLike):
        return PatchFile(read_path(flag, item))
    if not _is_patch_pair(item):
        raise Mistake(flag, item, "must be FILE, FILE:STRENGTH, or several of these")
    path = read_path(flag, item[0])
    return PatchFile(path, _read_strength(flag, path, item[1]))


def _read_strength(flag: str, path: str, value: Any) -> float:
    try:
        return read_weight(flag, value)
    except Mistake as mistake:
        raise Mistake(flag, f"{path}:{plain_scalar(value)}", f"its strength {mistake.why}") from None


def _split_patch_files(flag: str, text: str) -> list[PatchFile]:
    """The files of a text. Of pieces between commas, as many as name an existing file together are one path."""
    pieces = text.split(",")
    files: list[PatchFile] = []
    if len(pieces) > MOST_PATCH_FILES:
        raise Mistake(flag, "", f"names more than {MOST_PATCH_FILES} files")
    while pieces:
        for count in range(len(pieces), 0, -1):
            path, strength = _split_strength(",".join(pieces[:count]).strip())
            if count == 1 or _exists(path):
                break
        del pieces[:count]
        if not path:
            raise Mistake(flag, text, "a file between two commas is missing")
        path = read_path(flag, path)
        files.append(PatchFile(path, 1.0 if strength is None else _read_strength(flag, path, strength)))
    return files


def _split_strength(text: str) -> tuple[str, str | None]:
    """A path, and the strength behind its last colon where what is there is one, or was meant to be one."""
    path, colon, strength = text.rpartition(":")
    if not colon or _exists(text):
        return text, None
    try:
        float(strength)
    except ValueError:
        meant = bool(re.search(r"\.\w+$", path)) or _exists(path)
        return (path, strength) if meant and "," not in strength else (text, None)
    return path, strength


def _exists(path: str) -> bool:
    try:
        return bool(path) and os.path.exists(home(path))
    except ValueError:  # a null character
        return False


def read_png_path(flag: str, value: Any) -> str | None:
    """The path of a PNG file to write; None for an empty text and `None`. Raises Mistake."""
    path = read_optional_path(flag, value)
    if path is not None and not path.lower().endswith(".png"):
        raise Mistake(flag, path, "must end in .png")
    return path


def read_postfix(flag: str, value: Any) -> str:
    """The end of a folder's name: a text of at most 100 bytes; raises Mistake."""
    text = read_text(flag, value)
    if "\0" in text or len(text.encode()) > LONGEST_POSTFIX:
        raise Mistake(flag, text, f"must be at most {LONGEST_POSTFIX} bytes, without null characters")
    return text


def read_filled(flag: str, value: Any) -> str:
    """A text that is not empty; raises Mistake."""
    if not read_text(flag, value).strip():
        raise Mistake(flag, "", "is empty")
    return read_text(flag, value)


@dataclass(frozen=True)
class Reader:
    """Reads one kind of value: called with a field's name and a value of any type, it returns the checked value or
    raises Mistake. kind, low, high and choices serve forms and documentation.
    """

    kind: str  # switch, whole, number, choice, text, file, patch files, folder, layers, weights, size, device
    read: Callable[[str, Any], Any]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def __call__(self, field: str, value: Any) -> Any:
        """The checked value; raises Mistake."""
        return self.read(field, value)

    def range(self) -> str:
        """The allowed values in words; empty if the kind is enough."""
        if self.kind == "switch":
            return "switch"
        words = ", ".join(self.choices)
        if self.low is None:
            return words
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high or 0))
        numbers = f"at least {low}" if self.high is None else f"{low} to {high}"
        return f"{words}, {numbers}" if words else numbers


def whole(low: int, high: int | None = None) -> Reader:
    """Whole numbers in [low, high]."""
    return Reader("whole", lambda field, value: read_int(field, value, low, high), low, high)


def number(low: float, high: float) -> Reader:
    """Numbers in [low, high]."""
    return Reader("number", lambda field, value: read_float(field, value, low, high), low, high)


def choice(*choices: str) -> Reader:
    """One of some words."""
    return Reader("choice", lambda field, value: read_choice(field, value, choices), choices=choices)


def read_storage(flag: str, value: Any) -> str:
    """How the blocks' weights are stored: full, int8 or fp8; raises Mistake; if the value looks like
    residual weights, it names that flag.
    """
    try:
        return read_choice(flag, value, STORAGES)
    except Mistake as mistake:
        if isinstance(value, str) and re.match(r"(each|linear):|[-+.]*[0-9]", value.strip()):
            why = f"{mistake.why}; weights of residual text streaming are `residual_weights`"
            raise Mistake(flag, value, why) from None
        raise


SWITCH = Reader("switch", read_bool, choices=("True", "False"))
TEXT = Reader("text", read_text)
FILLED = Reader("text", read_filled)
POSTFIX = Reader("text", read_postfix)
FILE = Reader("file", read_path)
FOLDER = Reader("folder", read_path)
PATCH_FILES = Reader("patch files", read_patch_files)
PNG_FILE = Reader("file", read_png_path)
OPTIONAL_FILE = Reader("file", read_optional_path)
OPTIONAL_FOLDER = Reader("folder", read_optional_path)
DEVICE = Reader("device", read_device, choices=("auto", "cpu", "cuda", "cuda:N", "mps"))
DTYPE = Reader("choice", read_dtype, choices=DTYPE_NAMES)
SIZE = Reader("size", read_size, SIZE_STEP, MOST_SIDE)
TILE = Reader("size", read_tile, LEAST_TILE, MOST_SIDE, ("auto", "off"))
SHIFT = Reader("number", read_shift, *SHIFTS)
WEIGHT = Reader("number", read_weight, -WEIGHT_LIMIT, WEIGHT_LIMIT)
LAYER = Reader("whole", read_layer, 0)
LAYERS = Reader("layers", read_layers)
WEIGHTS = Reader("weights", read_weights, -WEIGHT_LIMIT, WEIGHT_LIMIT)
STORAGE = Reader("choice", read_storage, choices=STORAGES)
SCHEDULE = Reader("choice", read_schedule, choices=(*RESIDUAL_SCHEDULES, "exp:ALPHA"))
