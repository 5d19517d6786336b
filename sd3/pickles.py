"""Files of torch.save, as the published weights and rotations come: recognised, and read without running their code.

Torch is imported only where such a file is met: a JSON configuration needs none.
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

MOST_VALUES = 100_000  # in a list of a file


def is_pickle(where: Where, path: str | Path) -> bool:
    """Whether torch.save wrote a file: a zip archive or a bare pickle. A safetensors file may start with the same two
    bytes, its header's length, but has the header's brace after eight.

    Raises Missing, or Mistake for what is no file.
    """
    check_file(where, path)
    with reading(where, "cannot be read"), open(path, "rb") as f:
        start = f.read(64)
    return (start[:2] == b"PK" or b"\x80\x02" <= start[:2] <= b"\x80\x0f") and not is_safetensors(start)


def read_pickle(where: Where, path: str | Path) -> Any:
    """What a file of torch.save holds: tensors, numbers, texts, lists and dictionaries; raises Mistake for more."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about kinds of pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's own words are many lines about how to load it all the same
        raise Mistake(*where, "is damaged, or holds more than tensors and numbers; it is not loaded") from None


def plain_value(value: Any, where: Where, name: str) -> Any:
    """A tensor as numbers and lists, anything else as it is; raises Mistake for a tensor that is no plain list of real
    numbers. name: the value's, in the file.
    """
    if not hasattr(value, "tolist"):
        return value
    check_tensor(value, where, name)
    if value.numel() > MOST_VALUES:
        raise Mistake(*where, f"{name}: has {value.numel():,} numbers; at most {MOST_VALUES:,} are read")
    return value.tolist()


def check_tensor(tensor: Tensor, where: Where, name: str) -> None:
    """Raises Mistake for a tensor that is sparse, without memory, quantised, complex or nested."""
    import torch

    wrong = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    if wrong or tensor.is_nested:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise Mistake(*where, f"{name}: is not a plain tensor of real numbers ({kind})")
