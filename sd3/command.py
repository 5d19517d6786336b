"""Shared by all command lines: reading flags, help, exit statuses, signals, notes. Needs no torch."""

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
from sd3.flag_files import read_flag_file
from sd3.flags import FLAGS, Flag, check_flag
from sd3.info import as_word
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake, flag_name, spell, verbatim
from sd3.reading import Note
from sd3.settings import Flags
from sd3.versions import NAME, __version__

MISTAKE, FAILED = 2, 1  # exit statuses; shells count signals from 128
Values = dict[str, Any]
HELP, HELP_ALL = ("--help", "-h", "-help", "-?"), ("--help_all", "--help-all")
Read = TypeVar("Read")  # a command's flags, as its own `read` returns them


class Failed(Exception):
    """The command ran and failed; details were printed."""


def begin(
    read: Callable[[Sequence[str]], Read],
    help_text: Callable[[], str],
    answer: Callable[[Read], str | None] = lambda request: None,
    short_help: Callable[[], str] | None = None,
) -> Read:
    """Reads the command line of the process; a program calls it before it imports torch.

    Exits on --help, --version, a mistake in the words, and if `answer` returns a text to print.
    """
    status, request = answer_early(None, read, help_text, answer, short_help=short_help)
    if status is not None:
        sys.exit(status)
    return request


def answer_early(
    words: Sequence[str] | None,
    read: Callable[[Sequence[str]], Read],
    help_text: Callable[[], str],
    answer: Callable[[Read], str | None] = lambda request: None,
    bare: bool = True,
    short_help: Callable[[], str] | None = None,
) -> tuple[int | None, Read | None]:
    """Handles what needs no model: help, version, mistakes. Returns the exit status if that ends the command, else
    None; and the result of `read`.

    words: None for those of the process; then torch, not yet imported, is also asked for large pages, because page
    faults dominate the time of loading on a CPU. answer: returns the text to print if the request needs no model, else
    None. bare: whether the command runs without any words; otherwise the help is shown. short_help: what --help shows
    where `help_text` is long; --help_all shows that.
    """
    if words is None:
        streams.begin()
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        words = sys.argv[1:]
    with streams.safe_output():
        everything = bool(set(HELP_ALL) & set(words))
        if everything or set(HELP) & set(words) or list(words[:1]) == ["help"] or not (words or bare):
            print(help_text() if everything or short_help is None else short_help())
            return (0 if words else MISTAKE), None
        if "--version" in words:
            print(f"{NAME} {__version__}")
            return 0, None
        try:
            request = read(words)
            if (reply := answer(request)) is not None:
                print(reply)
                return 0, None
            return None, request
        except Exception as error:
            return _explain(error, "file", words), None


def read_arguments(
    arguments: Sequence[str], flags: Mapping[str, Flag] = FLAGS, bare: str | None = "prompt"
) -> dict[str, str]:
    """Flags and their values exactly as typed: `--name value`, `--name=value`, a switch, one word for flag `bare`.

    The word after a flag is its value, whatever it looks like (`-0.5`, `-`, `None`), unless it is a flag itself. The
    last value of a repeated flag counts. Raises Mistake for an unknown flag, a missing value and stray words.
    """
    switches = [name for name, row in flags.items() if row.read.kind == "switch"]
    is_flag = lambda word: word.startswith("--") and word[2:].partition("=")[0].replace("-", "_") in flags  # noqa: E731
    out: dict[str, str] = {}
    previous: tuple[str, str] | None = None  # the text that the next word follows
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if bare is None or bare in out or word.startswith("-"):
                raise _stray(word, previous)
            out[bare], previous = word, (bare, word)
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
        previous = (name, value) if flags[name].read.kind == "text" else None
    return out


@dataclass(frozen=True)
class Request:
    """The flags of `sd3_infer.py`.

    values: the given flags, read; words: the same as `--name=value`, for records; flags: all flags, checked together;
    None with `--replay`, because the image's settings have not been read yet.
    """

    values: Values
    words: Sequence[str]
    flags: Flags | None


def read_infer_flags(words: Sequence[str]) -> Request:
    """Reads the words of `sd3_infer.py`, each value by its flag's reader; raises Mistake.

    Flags in a settings file count as if typed first: records list these flags, not the file.
    """
    typed = read_arguments(words)
    spelled = [f"--{name}={value}" for name, value in typed.items() if name != "settings"]
    values = fire.Fire(_collect, command=spelled, serialize=lambda _: None)
    if "settings" in typed:
        path = FLAGS["settings"].read("settings", typed["settings"])
        of_file = {name: value for name, value in read_flag_file(path).items() if name not in values}
        spelled = [f"--{name}={as_word(value)}" for name, value in of_file.items()] + spelled
        values = of_file | values
    for name in values if "info" in values else ():
        if name != "info":
            raise Mistake(name, "", "does not go with `info`, which only prints an image's settings")
    return Request(values, spelled, None if "replay" in values else Flags.of(values))


@fire.decorators.SetParseFns(**{name: functools.partial(row.read, name) for name, row in FLAGS.items()})
def _collect(**values: Any) -> Values:
    """The flags that were given, by name; fire calls it."""
    return values


_collect.__signature__ = inspect.Signature(
    [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in FLAGS]
)


def _stray(word: str, previous: tuple[str, str] | None) -> Mistake:
    """The mistake of a word that belongs to no flag: most often a part of a text or a list without quotes.

    previous: name and value of the text that it follows; None after anything else.
    """
    if previous is None or word.startswith("-"):
        return Mistake("", word, "not understood; flags start with --, and lists with spaces need quotes")
    name, text = previous
    return Mistake("", word, f'not understood; a text with spaces needs quotes: `{name}` "{verbatim(text)} {word} ..."')


def _is_bool(word: str) -> bool:
    """Whether a word is the value of a switch, or several values separated by `;`, as in a sweep."""
    values = word.strip().lower().removesuffix(";").split(";")
    return all(value.strip() in ("true", "false", "1", "0", "yes", "no", "on", "off") for value in values)


def fail(mistake: Mistake) -> int:
    """Prints a user's mistake as one line on stderr; returns the exit status."""
    print(f"error: {' '.join(mistake.spelled(flag_name).split())}", file=sys.stderr)
    return MISTAKE


def execute(work: Callable[[], Any], smaller: str, words: Sequence[str] = ()) -> int:
    """Runs a command; returns the exit status: 0; 2 for a mistake in flags or files; 1 if memory ran out, the work
    failed, or for a bug; 130 or 143 if stopped.

    smaller: the flags to reduce if memory runs out; words: the command line, for bug reports.
    """
    previous = None
    if threading.current_thread() is threading.main_thread():
        streams.imported()
        previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with streams.safe_output(), warnings.catch_warnings():
            warnings.showwarning = _note_once()
            warnings.simplefilter("always", Note)  # regardless of PYTHONWARNINGS
            work()
        return 0
    except Failed:
        return FAILED
    except KeyboardInterrupt:
        return streams.INTERRUPTED
    except streams.Stopped:
        return streams.TERMINATED
    except Exception as error:
        with streams.safe_output():
            return _explain(error, smaller, words)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _explain(error: Exception, smaller: str, words: Sequence[str]) -> int:
    """Prints what went wrong: a mistake, memory that ran out, or a bug; returns the exit status."""
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
    """The program as it was called: a file, or `python -m` with a package."""
    path = sys.argv[0]
    if os.path.basename(path) != "__main__.py":
        return os.path.basename(path)
    return f"python -m sd3.{os.path.basename(os.path.dirname(path))}"


def _stop(*_: Any) -> None:
    raise streams.Stopped


def _note_once() -> Callable[..., None]:
    """Prints each warning once, as a note: a file may be opened several times."""
    from tqdm import tqdm  # imported late: --help and mistakes in flags do not need it

    first = streams.Once()

    def show(message: Any, *_: Any, **__: Any) -> None:
        text = spell(message.args[0], flag_name) if isinstance(message, Note) else str(message)
        if first(text):
            tqdm.write(f"note: {text}", file=sys.stderr)

    return show
