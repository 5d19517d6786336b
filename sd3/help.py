"""The help of the command line and `docs/flags.md`, both made from the flag table; `python -m sd3.help` prints the
latter. Needs no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from sd3.flags import FLAGS, GROUPS, Flag
from sd3.methods import GUIDANCE, SAMPLERS, SCHEDULES
from sd3.mistakes import flag_name, spell

REQUIRED = "required"  # `usual` of a flag that has to be given
WIDTH = 110
COLUMN = 35
# What stands for a value, by the kind of its reader; a switch needs none.
PLACEHOLDERS = {
    "whole": "N", "number": "X", "choice": "NAME", "text": "TEXT", "file": "FILE", "folder": "FOLDER",
    "layers": "LAYERS", "weights": "WEIGHTS", "size": "PIXELS", "device": "DEVICE",
    "patch files": "FILE[:X],...",
}  # fmt: skip
START = """\
usage: sd3_infer.py --prompt TEXT [--flag value ...]

Makes images with an SD3 or SD3.5 model, with or without residual text streaming.

  python sd3_infer.py --model demo --prompt "a red circle"          the small model that ships, on any computer
  python sd3_infer.py --list_models                                 which models are here, how to get the others
  python sd3_infer.py --model models/sd3.5_medium.safetensors --prompt "a fox in the snow" --seed 5

Settings that you leave out take the model's defaults. Images are saved below outputs/, with their settings."""
END = """\
docs/flags.md has the range of every flag.
exit status: 0 done, 1 failed, 2 a mistake in flags or files, 130 or 143 stopped"""


def short() -> str:
    """The flags that are used most, by group."""
    lines = [START]
    for group, rows in _by_group():
        if rows := [row for row in rows if row.common]:
            lines += ["", _heading(group), *table(rows)]
    return "\n".join([*lines, "", f"--help_all lists all {len(FLAGS)} flags with examples, --version the version."])


def text() -> str:
    """All flags by group, each group with an example."""
    lines = [START]
    for group, rows in _by_group():
        lines += ["", _heading(group), f"  example: python sd3_infer.py {GROUPS[group]}", *table(rows)]
    return "\n".join([*lines, "", "--help lists the most used flags, --version the version.", END])


def table(rows: Iterable[Flag]) -> Iterator[str]:
    """Lines of flags: name, kind of value, help and default."""
    for row in rows:
        about = textwrap.wrap(f"{spell(row.help, flag_name)}{spell(default(row), flag_name)}", WIDTH - COLUMN)
        name = f"--{row.name} {PLACEHOLDERS.get(row.read.kind, '')}".rstrip()
        yield f"  {name:<{COLUMN - 2}}{about[0]}"
        yield from (" " * COLUMN + line for line in about[1:])


def markdown() -> str:
    """The page `docs/flags.md`."""
    lines = [
        "# Flags",
        "",
        "Made from the table in `sd3/flags.py` by `python -m sd3.help > docs/flags.md`; a test keeps it current.",
        "In the last column, `sweep`: a sweep can vary the flag; `probe`: `sd3_probe.py` takes it; `load`: it decides",
        "what is loaded, so a serving process takes it only on its command line. In Python, `sd3.load` takes those of",
        "`load`, and a call of its pipeline the others, under the same names.",
    ]
    for group, rows in _by_group():
        lines += ["", f"## {_heading(group)}", "", f"    python sd3_infer.py {GROUPS[group]}", ""]
        lines += ["| flag | what it sets | range | default | |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `--{row.name}` | {spell(row.help)} | {row.read.range()} | {spell(usual(row))} | "
            f"{', '.join(_uses(row))} |"
            for row in rows
        ]
    return "\n".join([*lines, *_methods()]) + "\n"


def _methods() -> Iterator[str]:
    """Tables of the samplers, schedules and methods of guidance."""
    yield from ("", "## Samplers", "", "| `--sampler` | elsewhere | what |", "| --- | --- | --- |")
    for row in SAMPLERS.values():
        noise = "; adds noise in every step" if row.noise else ""
        yield f"| `{row.name}` | {row.title} | {row.help}{noise} |"
    yield from ("", "## Schedules", "", "| `--scheduler` | elsewhere | what |", "| --- | --- | --- |")
    yield from (f"| `{row.name}` | {row.title} | {row.help} |" for row in SCHEDULES.values())
    yield from ("", "## Guidance", "", "In the order in which they act.", "", "| what | flags |", "| --- | --- |")
    flags = {row.setting: name for name, row in FLAGS.items()}
    for row in GUIDANCE.values():
        yield f"| {row.help} | {', '.join(f'`--{flags[name]}`' for name in row.settings)} |"


def _by_group() -> Iterator[tuple[str, list[Flag]]]:
    for group in GROUPS:
        yield group, [row for row in FLAGS.values() if row.group == group]


def _heading(group: str) -> str:
    return f"{group[0].upper()}{group[1:]}"


def usual(row: Flag) -> str:
    """The default in words; empty where there is none."""
    if row.usual:
        return row.usual
    return "" if row.default is None or row.default is False or row.default == "" else _value(row.default)


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def default(row: Flag) -> str:
    """The default in brackets, for the end of a line; empty where there is none."""
    words = usual(row)
    return f" ({words})" if words == REQUIRED else f" (default: {words})" if words else ""


def _uses(row: Flag) -> list[str]:
    return [
        *(["load"] if row.scope == "load" else []),
        *(["sweep"] if not row.sweep else []),
        *(["probe"] if {"probe", "measure"} & set(row.also.split()) else []),
    ]


if __name__ == "__main__":
    print(markdown(), end="")
