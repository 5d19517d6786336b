"""What a user did wrong, in one line. Needs no torch."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
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
