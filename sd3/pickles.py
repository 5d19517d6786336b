"""Recognises files of torch.save (published weights and rotations), and reads them without running code in them.

Imports torch only for such a file: a JSON configuration does not need it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd3.headers import is_safetensors
from sd3.mistakes import Mistake, Where
from sd3.reading import check_file, reading

if TYPE_CHECKING:
    from torch import Tensor

MOST_VALUES = 100_000  # of a list in a file


def is_pickle(where: Where, path: str | Path) -> bool:
    """Whether torch.save wrote a file: a zip archive or a bare pickle. A safetensors file may start with the same two
    bytes, its header's length, but has the header's brace after eight.

    Raises Missing, or Mistake if it is not a regular file.
    """
    check_file(where, path)
    with reading(where, "cannot be read"), open(path, "rb") as f:
        start = f.read(64)
    return (start[:2] == b"PK" or b"\x80\x02" <= start[:2] <= b"\x80\x0f") and not is_safetensors(start)


def read_pickle(where: Where, path: str | Path) -> Any:
    """The contents of a torch.save file: tensors, numbers, texts, lists, dictionaries. Raises Mistake for more."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about pickle formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own message explains at length how to load it anyway
        raise Mistake(*where, "is damaged, or contains more than tensors and numbers; it is not loaded") from None


def plain_value(value: Any, where: Where, name: str) -> Any:
    """A tensor as numbers and lists, anything else unchanged; raises Mistake for a tensor that is not a plain list of
    real numbers. name: of the value in the file.
    """
    if not hasattr(value, "tolist"):
        return value
    check_tensor(value, where, name)
    if value.numel() > MOST_VALUES:
        raise Mistake(*where, f"{name}: has {value.numel():,} numbers; the limit is {MOST_VALUES:,}")
    return value.tolist()


def check_tensor(tensor: Tensor, where: Where, name: str) -> None:
    """Raises Mistake for a sparse, meta, quantised, complex or nested tensor."""
    import torch

    wrong = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    if wrong or tensor.is_nested:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise Mistake(*where, f"{name}: is not a plain tensor of real numbers ({kind})")
