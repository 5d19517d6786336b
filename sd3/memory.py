"""Reports running out of memory in one line. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from sd3.mistakes import Mistake, flag_name, spell, verbatim


class OutOfMemory(MemoryError):
    """Memory ran out. The text says during which work and which settings to reduce, with their names between
    backquotes.
    """

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return spell(self.why)

    def spelled(self, name: Callable[[str], str]) -> str:
        """The text, every name of a setting spelled by `name`."""
        return spell(self.why, name)


NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to allocate",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch has a type for it on GPUs only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return foreign and any(sign in str(error).lower() for sign in NO_MEMORY)


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of an error, on one line."""
    text = error.spelled(flag_name) if isinstance(error, (Mistake, OutOfMemory)) else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


@contextlib.contextmanager
def explained(doing: str, turn: str) -> Iterator[None]:
    """Turns torch's errors about memory and compiling into one line with advice.

    turn: the settings to reduce if memory runs out, their names between backquotes. Raises `OutOfMemory`, and Mistake
    if the blocks cannot be compiled.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if out_of_memory(error):
            said = verbatim(one_line(error))
            raise OutOfMemory(f"out of memory while {doing}; try {turn} ({said})") from None
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = lines[0] if lines else type(error).__name__
            why = f"the blocks cannot be compiled here ({verbatim(why[:300])}); leave it out, or install a compiler"
            raise Mistake("compile", "", why) from None
        raise
