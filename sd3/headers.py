"""The interface of a weight file format, and its first implementation, safetensors. Headers are checked by the rules of
the safetensors library. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.mistakes import Mistake, Where, verbatim
from sd3.reading import reading

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER = 100_000_000  # bytes, the limit of the library
DEEPEST = 125  # levels of lists and objects in an unknown field, the limit of the library
WORD = 2**64
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FIELDS = ("dtype", "shape", "data_offsets")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file's header. name: as in the header; size: bytes of its data; place: offset of the data in the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    name: str
    size: int
    place: int


@dataclass(frozen=True)
class Format:
    """A format of weight files: a row of `sd3.files.FORMATS`, which is all that a new one needs.

    `open` is a context manager that gives a function from an entry to its tensor on the CPU, with the entry's shape. A
    quantised format returns dequantised float32; the entry's dtype then names the kind of block.
    """

    name: str  # in messages
    suffix: str  # of the files listed in a models folder; the contents decide what a file is
    recognise: Callable[[bytes], bool]  # by its first `START` bytes
    read_header: Callable[[Where, Path], tuple[dict[str, Entry], dict[str, str]]]  # tensors by name, texts by name
    open: Callable[[Path], AbstractContextManager[Callable[[Entry], Tensor]]]
    floats: tuple[str, ...]  # dtypes that are read as floating-point numbers


def is_safetensors(start: bytes) -> bool:
    """Whether a file's first bytes are those of a safetensors file: a length and an opening brace."""
    return len(start) >= 8 and any(start[:8]) and start[8:].lstrip()[:1] in (b"", b"{")


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Callable[[Entry], Tensor]]:
    """Tensors are views of a memory mapping, which lasts as long as any of them."""
    from safetensors import safe_open  # mistakes in the flags are reported even if the package is not installed

    with safe_open(path, framework="pt", device="cpu") as file:
        yield lambda entry: file.get_tensor(entry.name)


def read_header(where: Where, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    where: the field that names the file, and its path. Raises `Mistake` for every file that the library refuses
    and for a file without tensors.
    """
    with reading(where, "cannot be read"), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if length > MOST_HEADER:
            raise Mistake(*where, f"its header is damaged (it claims {length:,} bytes)")
        if 8 + length > size:
            raise Mistake(*where, f"is truncated: its header alone needs {8 + length} bytes, the file has {size}")
        text = f.read(length)
    try:
        metadata, tensors = _parse(text)
        end = _check_places(tensors)
    except RecursionError:
        raise Mistake(*where, "its header is damaged (it is nested too deeply)") from None
    except ValueError as error:
        raise Mistake(*where, f"its header is damaged ({verbatim(' '.join(str(error).split())[:200])})") from None
    needed = 8 + length + end
    if size < needed:
        raise Mistake(*where, f"is truncated: {size} bytes of {needed}; download it again")
    if size > needed:
        raise Mistake(*where, f"its header is damaged ({size - needed} bytes follow the last tensor)")
    if not tensors:
        raise Mistake(*where, "holds no usable tensors")
    return {
        name: Entry(dtype, shape, path, name, last - first, 8 + length + first)
        for name, (dtype, shape, (first, last)) in tensors.items()
    }, metadata


class _Object(dict):
    """A JSON object that keeps repeated keys in `pairs`."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs
        for name, _ in pairs:
            name.encode()  # raises for a lone surrogate, as the library does

    def check_unique(self, names: Iterable[str]) -> None:
        """Raises ValueError where one of the names is a repeated key."""
        for wanted in names:
            if len(self.pairs) > len(self) and sum(name == wanted for name, _ in self.pairs) > 1:
                raise ValueError(f"{wanted} is listed twice")


def _read_int(text: str) -> int | float:
    """A number without a decimal point; as in the library, `-0` and numbers beyond 64 bits become floats."""
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number if text == "-0" or abs(number) >= 2 * WORD else int(text)


def _read_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


Tensors = dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]


def _parse(text: bytes) -> tuple[dict[str, str], Tensors]:
    """Metadata, and dtype, shape and offsets by name; raises ValueError."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    header = json.loads(
        decoded,
        object_pairs_hook=_Object,
        parse_int=_read_int,
        parse_float=_read_float,
        parse_constant=_refuse_constant,
    )
    if not isinstance(header, _Object):
        raise ValueError("it is not an object")
    header.check_unique(["__metadata__"])
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, _Object):
        raise ValueError("__metadata__ is not an object")
    for name, value in metadata.pairs if metadata else ():
        if not isinstance(value, str):
            raise ValueError(f"__metadata__ {name} is not text")
        value.encode()
    tensors = {name: _read_tensor(name, value) for name, value in header.pairs if name != "__metadata__"}
    return dict(metadata or {}), tensors


def _read_tensor(name: str, value: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if isinstance(value, list) and len(value) == len(FIELDS):  # the library accepts that too
        value = _Object(list(zip(FIELDS, value, strict=True)))
    if not isinstance(value, _Object):
        raise ValueError(f"{name} is not an object")
    value.check_unique(FIELDS)
    if missing := [field for field in FIELDS if field not in value]:
        raise ValueError(f"{name} has no {missing[0]}")
    for field, other in value.pairs:
        if field not in FIELDS:
            _check_unknown_field(other)
    dtype, shape, offsets = (value[field] for field in FIELDS)
    if isinstance(dtype, _Object) and [v for _, v in dtype.pairs] == [None]:
        (dtype,) = dtype
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has an unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"{name} has an invalid shape {shape}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"{name} has invalid data_offsets {offsets}")
    return dtype, tuple(shape), tuple(offsets)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < WORD


def _check_unknown_field(value: Any) -> None:
    """Raises ValueError for an unused value that the library refuses."""
    level = [value]
    for _ in range(DEEPEST + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()
            elif isinstance(item, _Object):
                following += [v for _, v in item.pairs]
            elif isinstance(item, list):
                following += item
        if not any(isinstance(item, (list, dict)) for item in level):
            return
        level = following
    raise ValueError("it is nested too deeply")


def _check_places(tensors: Tensors) -> int:
    """Where the last tensor ends; raises ValueError for gaps, overlaps and sizes that do not fit shape and dtype."""
    end = 0
    for name, (dtype, shape, (first, last)) in sorted(tensors.items(), key=lambda item: item[1][2]):
        if first != end or last < first:
            raise ValueError(f"{name} lies at {first} to {last}, expected to start at {end}")
        bits = DTYPE_BITS[dtype]
        count = 1
        for side in shape:
            count *= side
            if count >= WORD:
                raise ValueError(f"{name} is too large")
        if count * bits >= WORD or count * bits % 8:
            raise ValueError(f"{name} does not fill whole bytes")
        if last - first != count * bits // 8:
            raise ValueError(f"{name} has {last - first} bytes; its shape needs {count * bits // 8}")
        end = last
    return end


SAFETENSORS = Format("safetensors", ".safetensors", is_safetensors, read_header, open_safetensors, FLOATS)
