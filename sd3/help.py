"""The help of the command line and `docs/flags.md`, from the flag table: `python -m sd3.help` prints the latter.

Needs no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from sd3.flags import FLAGS, GROUPS, Flag
from sd3.methods import GUIDANCE, SAMPLERS, SCHEDULES
from sd3.mistakes import flag_name, spell

WIDTH = 110
COLUMN = 28


def text() -> str:
    """All flags by group, an example for each group."""
    lines = [
        "usage: sd3_infer.py [--flag value ...]",
        "",
        "Makes images from an SD3 or SD3.5 weight file, with residual text streaming.",
    ]
    for group, rows in _by_group():
        lines += ["", f"{group}, such as {GROUPS[group]}", *table(rows)]
    return "\n".join([*lines, "", "--version prints the version; every flag with its range: docs/flags.md"])


def table(rows: Iterable[Flag]) -> Iterator[str]:
    """Lines of flags, what they do and their defaults."""
    for row in rows:
        about = textwrap.wrap(f"{spell(row.help, flag_name)}{_default(row, ' ({})')}", WIDTH - COLUMN)
        yield f"  --{row.name:<{COLUMN - 4}}{about[0]}"
        yield from (" " * COLUMN + line for line in about[1:])


def markdown() -> str:
    """The page `docs/flags.md`."""
    lines = [
        "# Flags",
        "",
        "Made from the table in `sd3/flags.py` by `python -m sd3.help > docs/flags.md`; a test holds it current.",
        "`sweep`: whether a sweep can vary it. `probe`: whether `sd3_probe.py` takes it. `load`: it decides what is",
        "loaded, and a serving process takes it on its command line only.",
    ]
    for group, rows in _by_group():
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", f"    python sd3_infer.py {GROUPS[group]}", ""]
        lines += ["| flag | what | range | default | |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `--{row.name}` | {_about(row)} | {row.read.range()} | {_default(row, '{}')} | {', '.join(_uses(row))} |"
            for row in rows
        ]
    return "\n".join([*lines, *_methods()]) + "\n"


def _methods() -> Iterator[str]:
    """Tables of the samplers, schedules and methods of guidance."""
    yield from ("", "## Samplers", "", "| `--sampler` | elsewhere | what |", "| --- | --- | --- |")
    for row in SAMPLERS.values():
        noise = "; adds noise of its own in every step" if row.noise else ""
        yield f"| `{row.name}` | {row.title} | {row.help}{noise} |"
    yield from ("", "## Schedules", "", "| `--scheduler` | elsewhere | what |", "| --- | --- | --- |")
    yield from (f"| `{row.name}` | {row.title} | {row.help} |" for row in SCHEDULES.values())
    yield from ("", "## Guidance", "", "In the order in which it acts.", "", "| what | flags |", "| --- | --- |")
    stored = {row.stored: name for name, row in FLAGS.items()}
    for row in GUIDANCE.values():
        yield f"| {row.help} | {', '.join(f'`--{stored[name]}`' for name in row.settings)} |"


def _by_group() -> Iterator[tuple[str, list[Flag]]]:
    for group in GROUPS:
        yield group, [row for row in FLAGS.values() if row.group == group]


def _about(row: Flag) -> str:
    return spell(row.help)


def _default(row: Flag, form: str) -> str:
    if row.usual:
        return form.format(row.usual)
    return "" if row.default in (None, False, "") else form.format(row.default)


def _uses(row: Flag) -> list[str]:
    return [
        *(["load"] if row.scope == "load" else []),
        *(["sweep"] if not row.sweep else []),
        *(["probe"] if {"probe", "measure"} & set(row.also.split()) else []),
    ]


if __name__ == "__main__":
    print(markdown(), end="")
