"""Readers of single values: from what a shell, a file or Python hands over to a checked value. Needs no torch."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from sd3.mistakes import display, nearest, plain_scalar

RESIDUAL_SCHEDULES = ("constant", "linear", "cosine")  # and exp:ALPHA
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")
SIZE_STEP = 16  # pixels: VAE cell (8) times patch (2)
SEED_LIMIT = 2**63
LEAST_TILE = 128  # pixels; smaller tiles would be mostly overlap
MOST_SIDE = 65_536  # pixels
SHIFTS = (0.001, 1000.0)  # beyond them neighbouring steps are one number in float32
WEIGHT_LIMIT = 1000.0  # of weights, exponents and strengths, either way
LAYER_LIMIT = 10_000  # layers are numbered below this
MOST_ITEMS = 100_000  # of a list
LONGEST_NAME = 255  # bytes of a file's name
LONGEST_PATH = 4095  # bytes
LONGEST_POSTFIX = 100  # bytes; with the longest folder name and a number it stays below LONGEST_NAME


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
