"""What every command line shares: words to values, help, exit statuses, signals, notes. Needs no torch."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import fire

from sd3 import streams
from sd3.flags import FLAGS, Flag, check_flag
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake, flag_name, spell
from sd3.reading import Note
from sd3.settings import Flags
from sd3.versions import NAME, __version__

MISTAKE, FAILED = 2, 1  # exit statuses; shells count signals from 128
Values = dict[str, Any]
Read = TypeVar("Read")  # what a command makes of its words


class Failed(Exception):
    """The work was done and went wrong; what about it has been printed."""


def begin(read: Callable[[Sequence[str]], Read], help_text: Callable[[], str], bare: bool = True) -> Read:
    """The words of the process, read: first thing of a program, before torch is imported.

    Ends the process on --help, --version and a mistake in the words. bare: whether no words at all are fine, else the
    help is shown.
    """
    status, request = answer_early(None, read, help_text, bare)
    if status is not None:
        sys.exit(status)
    return request


def answer_early(
    words: Sequence[str] | None,
    read: Callable[[Sequence[str]], Read],
    help_text: Callable[[], str],
    bare: bool = True,
) -> tuple[int | None, Read | None]:
    """The exit status where nothing but the words is needed for the answer (else None), and what they say.

    words: None for those of the process, which is then a program; torch, which looks once, is asked for large pages:
    most of the time that loading takes on a CPU is for pages.
    """
    if words is None:
        streams.begin()
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        words = sys.argv[1:]
    with streams.bearing():
        if {"--help", "-h"} & set(words) or not (words or bare):
            print(help_text())
            return (0 if words else MISTAKE), None
        if "--version" in words:
            print(f"{NAME} {__version__}")
            return 0, None
        try:
            return None, read(words)
        except Exception as error:
            return _explain(error, "file", words), None


def read_arguments(
    arguments: Sequence[str], flags: Mapping[str, Flag] = FLAGS, bare: str | None = "prompt"
) -> dict[str, str]:
    """Flags and their values exactly as typed: `--name value`, `--name=value`, a switch, one word for flag `bare`.

    The word after a flag is its value whatever it looks like (`-0.5`, `-`, `None`), unless it is a flag itself.
    Raises Mistake for an unknown flag, a missing value and for stray words; the
    last of equal flags counts.
    """
    switches = [name for name, row in flags.items() if row.read.kind == "switch"]
    is_flag = lambda word: word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in flags  # noqa: E731
    out: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare is None or bare in out or word.startswith("-"):
                raise Mistake("", word, "not understood; flags start with --, and lists with spaces need quotes")
            out[bare] = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no") and name[2:] in switches:  # fire's way to say False
            name, equals, value = name[2:], "=", "False"
        check_flag(name, flags)
        if not equals:
            following = words[0] if words else None
            if name in switches:
                value = words.pop(0) if following is not None and _is_bool(following) else "True"
            elif following is None or is_flag(following):
                raise Mistake(name, "", "needs a value")
            else:
                value = words.pop(0)
        out[name] = value
    return out


@dataclass(frozen=True)
class Request:
    """The words of `sd3_infer.py`: each flag's value as its row reads it, and the words in one form for records.

    flags: all of them, checked together; None beside `--replay`, where those of the picture are still to come.
    """

    values: Values
    words: Sequence[str]
    flags: Flags | None


def read_infer_flags(words: Sequence[str]) -> Request:
    """The words of `sd3_infer.py`, read once, each by its flag's reader; raises Mistake."""
    spelled = [f"--{name}={value}" for name, value in read_arguments(words).items()]
    values = fire.Fire(_collect, command=spelled, serialize=lambda _: None)
    return Request(values, spelled, None if "replay" in values else Flags.of(values))


@fire.decorators.SetParseFns(**{name: functools.partial(row.read, name) for name, row in FLAGS.items()})
def _collect(**values: Any) -> Values:
    """What fire fills in: flags by name, those that were given."""
    return values


_collect.__signature__ = inspect.Signature(
    [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in FLAGS]
)


def _is_bool(word: str) -> bool:
    """Whether a word is a switch's value, or several separated by `;`, which a sweep takes."""
    values = word.strip().lower().removesuffix(";").split(";")
    return all(value.strip() in ("true", "false", "1", "0", "yes", "no", "on", "off") for value in values)


def fail(mistake: Mistake) -> int:
    """One line on stderr for a mistake of the user's; returns the exit status."""
    print(f"error: {' '.join(mistake.spelled(flag_name).split())}", file=sys.stderr)
    return MISTAKE


def execute(work: Callable[[], Any], smaller: str, words: Sequence[str] = ()) -> int:
    """Does a command's work; returns the exit status: 0, 2 for a mistake in flags or files, 1 where memory ran out
    (`smaller`: the flags to turn down), where the work failed and for a bug, 130 and 143 if stopped.

    words: those of the command, for the report of a bug.
    """
    previous = None
    if threading.current_thread() is threading.main_thread():
        streams.imported()
        previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with streams.bearing(), warnings.catch_warnings():
            warnings.showwarning = _note_once()
            warnings.simplefilter("always", Note)  # whatever PYTHONWARNINGS says of warnings
            work()
        return 0
    except Failed:
        return FAILED
    except KeyboardInterrupt:
        return streams.INTERRUPTED
    except streams.Stopped:
        return streams.TERMINATED
    except Exception as error:
        with streams.bearing():
            return _explain(error, smaller, words)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _explain(error: Exception, smaller: str, words: Sequence[str]) -> int:
    """Says what went wrong: a mistake, no memory, or a bug; returns the exit status."""
    if isinstance(error, Mistake):
        return fail(error)
    if out_of_memory(error):
        why = f"out of memory; try a smaller {smaller} ({one_line(error)})"
        print(f"error: {error.spelled(flag_name) if isinstance(error, OutOfMemory) else why}", file=sys.stderr)
        return FAILED
    traceback.print_exception(error)
    line = f"error: this is a bug of {NAME} {__version__}; please report it with the lines above and the command:"
    print(line, shlex.join([program(), *words]), file=sys.stderr)
    return FAILED


def program() -> str:
    """How the program was called: a file, or a package by `python -m`."""
    path = sys.argv[0]
    if os.path.basename(path) != "__main__.py":
        return os.path.basename(path)
    return f"python -m sd3.{os.path.basename(os.path.dirname(path))}"


def _stop(*_: Any) -> None:
    raise streams.Stopped


def _note_once() -> Callable[..., None]:
    """Shows warnings as notes, each once: files are opened more than once."""
    from tqdm import tqdm  # here: the help and a mistake in the flags need not wait for it

    first = streams.Once()

    def show(message: Any, *_: Any, **__: Any) -> None:
        text = spell(message.args[0], flag_name) if isinstance(message, Note) else str(message)
        if first(text):
            tqdm.write(f"note: {text}", file=sys.stderr)

    return show
