"""User mistakes: one line each, with the field, its value and what would be right. Needs no torch."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sd3 import aliases


class Where(NamedTuple):
    """The field and value that a message starts with: `Mistake(*where, why)`."""

    field: str
    value: Any = ""

    def __str__(self) -> str:
        return f"{self.field} {display(self.value)}".strip()


class Mistake(ValueError):
    """A user's mistake. `str` gives `field value: why`; the command line puts dashes before the field.

    field: a name such as `seed`, perhaps followed by a part of it (`skip_layer_cfg scale`); empty where the value alone
    is clear (a path, a line of a file). value: as the user gave it; an empty text is not shown. why: what is wrong and
    what would be right, with field names between backquotes: "needs `vae`".
    """

    def __init__(self, field: str, value: Any, why: str):
        super().__init__(field, display(value), why)

    field = property(lambda self: self.args[0])
    value = property(lambda self: self.args[1])  # text, shortened for display
    why = property(lambda self: self.args[2])

    def __str__(self) -> str:
        return self.spelled(lambda name: name)

    def spelled(self, name: Callable[[str], str]) -> str:
        """The line with every field name spelled by `name`."""
        start = f"{name(self.field) if self.field else ''} {self.value}".strip()
        why = spell(self.why, name)
        return f"{start}: {why}" if start else why

    def nested(self) -> str:
        """The line for use in the `why` of another mistake: with the field between backquotes."""
        field, _, part = self.field.partition(" ")
        start = " ".join(filter(None, [f"`{field}`" if field else "", part, self.value]))
        return f"{start}: {self.why}" if start else self.why

    def renamed(self, names: Mapping[str, str]) -> Mistake:
        """The same mistake with other names of fields, such as a flag's in place of a keyword's."""
        why = re.sub(_BACKQUOTED, lambda m: f"`{names.get(m[1], m[1])}`" if m[1] else m[0], self.why)
        return _rebuilt(type(self), (names.get(self.field, self.field), self.value, why))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args)


def _rebuilt(kind: type[Mistake], args: tuple[str, str, str]) -> Mistake:
    mistake = kind(args[0], "", args[2])
    mistake.args = args  # the value is already text
    return mistake


class Missing(Mistake, FileNotFoundError):
    """A file or folder that does not exist."""


class Unwritable(Mistake, OSError):
    """A file or folder that cannot be written: a full disk, missing rights."""


_BACKQUOTED = r"``|`([a-z]\w*)`"


def spell(text: str, name: Callable[[str], str] = lambda name: name) -> str:
    """A text in which `name` spells every field name between backquotes; the backquotes are removed."""
    return re.sub(_BACKQUOTED, lambda m: name(m[1]) if m[1] else "`", text)


def verbatim(text: str) -> str:
    """A text from a file or a library, quoted for use in a `why`: its backquotes are kept and mark no field."""
    return text.replace("`", "``")


def flag_name(field: str) -> str:
    """A field as the command line spells it."""
    return f"--{field}"


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the fields of mistakes raised inside to the caller's names."""
    try:
        yield
    except Mistake as mistake:
        raise mistake.renamed(names) from None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 4, 60, 60
SHOWN = 200  # letters of a value shown in an error line


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
    """The Python value of a numpy scalar, or of an array or tensor without dimensions; anything else unchanged."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        try:
            return value.item()
        except (RuntimeError, NotImplementedError, TypeError, ValueError):  # a tensor without storage
            return value
    return value


def nearest(name: Any, candidates: Iterable[str], fields: bool = False) -> str:
    """`; did you mean X?` where one of the candidates is close, else an empty text.

    fields: the candidates are names of fields; X then stands between backquotes, and the command line adds its dashes.
    """
    close = _closest(name, candidates)
    return f"; did you mean {f'`{close}`' if fields else close}?" if close else ""


def _closest(name: Any, candidates: Iterable[str]) -> str:
    if not isinstance(name, str) or len(name) > 100:
        return ""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)), "")


def check_parameters(
    function: str,
    given: Iterable[str],
    names: Iterable[str],
    renamed: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Raises TypeError, as Python does, for an unknown parameter; the message names the right one if there is one.

    renamed: flags that the function takes under other names, and its parameters that are no flags (by their own names).
    elsewhere: flags that the function does not take, each with where it belongs: "belongs to sd3.load".
    """
    names, renamed = set(names), dict(renamed or {})
    elsewhere = {flag: place for flag, place in (elsewhere or {}).items() if flag not in names | renamed.keys()}
    unknown = sorted(set(given) - names)
    if unknown:
        reply = spell(_reply(unknown[0], names, renamed, elsewhere), lambda field: renamed.get(field, field))
        raise TypeError(f"{function}() has no parameter {unknown[0]}{reply}")


def _reply(name: str, names: set[str], renamed: Mapping[str, str], elsewhere: Mapping[str, str]) -> str:
    """The end of a message about an unknown parameter; names of fields between backquotes."""
    if renamed.get(name, name) != name:
        return f"; it is called `{name}` here"
    if name in elsewhere:
        return f"; it {elsewhere[name]}"
    reply = aliases.answer(name, names | renamed.keys() | elsewhere.keys())
    if reply:
        reply = f"; {'it ' if reply.startswith('is ') else ''}{reply}"
    elif close := _closest(name, [*sorted(names | set(renamed.values())), *elsewhere]):
        return f"; did you mean `{close}`?" + (f" It {elsewhere[close]}" if close in elsewhere else "")
    else:
        return ""
    fields = dict.fromkeys(re.findall(_BACKQUOTED, reply))
    places = [f"`{field}` {elsewhere[field]}" for field in fields if field in elsewhere]
    return "; ".join([reply, *places])
