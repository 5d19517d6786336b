"""Running out of memory, said in one line. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from sd3.mistakes import Mistake, flag_name, verbatim


class OutOfMemory(MemoryError):
    """Memory ran out; the text says while doing what, and which flags to turn down."""


NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to allocate",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a type for that on GPUs only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return foreign and any(sign in str(error).lower() for sign in NO_MEMORY)


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line."""
    text = error.spelled(flag_name) if isinstance(error, Mistake) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


@contextlib.contextmanager
def explained(doing: str, turn: str) -> Iterator[None]:
    """Turns what torch raises without saying what to do about it into one line.

    turn: the flags to turn down where memory runs out. Raises `OutOfMemory`, and Mistake where nothing can be
    compiled.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(f"out of memory while {doing}; try {turn} ({one_line(error)})") from None
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = lines[0] if lines else type(error).__name__
            why = f"the blocks cannot be compiled here ({verbatim(why[:300])}); leave it out, or install a compiler"
            raise Mistake("compile", "", why) from None
        raise
