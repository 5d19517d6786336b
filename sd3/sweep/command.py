"""`python -m sd3.sweep`: a grid over any flag of sd3_infer.py, with one load per model, resumable, with a report.

python -m sd3.sweep --out swept --prompt prompts.txt --seed 0-3 --residual_target_layers "3,5;4" --cfg "2.5;4"
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from sd3 import help, streams
from sd3.command import Failed, answer_early, execute, read_arguments
from sd3.flags import DEFAULT_SEED, FLAGS, Flag
from sd3.mistakes import Mistake
from sd3.readers import FILE, FILLED, FOLDER, SWITCH, TEXT, choice, read_path, whole
from sd3.shapes.prompts import held_out_texts
from sd3.sweep.grid import Grid, read_yaml
from sd3.sweep.layouts import READERS as LAYOUTS
from sd3.sweep.layouts import check_entries, read_entries

flag = functools.partial(Flag, scope="sweep")
PER_KIND = 40
EXAMPLE = '--model demo --out swept --prompt "a red circle" --seed 0-3 --residual_target_layers "3,5;4"'
OWN = {
    row.name: row
    for row in (
        flag("out", FOLDER, None, "the sweep's folder: pictures/, index.html, sheet.png, results.csv, log.jsonl",
            usual=help.REQUIRED),
        flag("grid", FILE, None, "a YAML file with the same flags and, under variants, named settings"),
        flag("dry_run", SWITCH, False,
            "print how many images there are, how many are finished and how long the rest will take"),
        flag("score", choice("demo", "clip"), None,
            "demo: the six kinds of prompts of the shipped model (without `prompt`, its own prompts); clip"),
        flag("per_kind", whole(1, 10_000), PER_KIND, "prompts of each kind, for `score` demo without `prompt`"),
        flag("clip_model", FOLDER, None, "for `score` clip: a folder with a CLIP model as transformers saves it"),
        flag("layout", choice(*LAYOUTS), None,
            "geneval, dpg or t2i_compbench: `prompt` is that benchmark's prompt file or folder, and "
            "FOLDER/<layout>/<variant> is what its evaluator reads"),
        flag("ray", FILLED, None,
            "auto, or the address of a Ray cluster: one worker per GPU, or per `cpus_per_worker` CPUs"),
        flag("cpus_per_worker", whole(1, 10_000), None, "threads of a worker if there is no GPU",
            usual="all of a machine"),
    )
}  # fmt: skip
# Flags of sd3_infer.py that accept more in a sweep.
AXES = (
    flag("prompt", TEXT, None,
        'a text, a .txt file with one prompt per line, or a .jsonl file with {"prompt": ...} per line'),
    flag("seed", TEXT, DEFAULT_SEED, 'seeds and ranges, such as 0-3 or "0-3;10"'),
    flag("batch_size", FLAGS["batch_size"].read, 1,
        "images of one variant per batch; a partial batch is padded"),
)  # fmt: skip


def help_text() -> str:
    """The help of the command."""
    lines = [
        "usage: sd3_sweep.py --out FOLDER [--flag value ...]",
        "",
        "Makes every combination of prompts, seeds and settings, and the baseline of each without residual text",
        "streaming, named off. Run the same command again to resume.",
        f"  example: python sd3_sweep.py {EXAMPLE}",
        "",
        *help.table([*OWN.values(), *AXES]),
        "",
        "any other flag of sd3_infer.py, alternatives separated by `;`: "
        '--residual_weights "each:0.3;each:0.6" --cfg "3;5"',
        "(python sd3_infer.py --help_all); exit status: 0 all made, 1 some failed, 2 a mistake in flags or files",
    ]
    return "\n".join(lines)


def read_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of the sweep's own flags, and the flags of the grid as typed; raises Mistake."""
    raw = read_arguments(arguments, FLAGS | OWN)
    flags = {name: OWN[name].read(name, value) for name, value in raw.items() if name in OWN}
    if "out" not in flags:
        raise Mistake("out", "", "is required: the sweep's folder")
    if "clip_model" in flags and flags.get("score") != "clip":
        raise Mistake("clip_model", "", "is for `score` clip")
    if "cpus_per_worker" in flags and "ray" not in flags:
        raise Mistake("cpus_per_worker", "", "is for `ray`")
    return flags, {name: value for name, value in raw.items() if name not in OWN}


def read_grid(flags: dict[str, Any], raw: Mapping[str, str]) -> tuple[Grid, Any]:
    """The grid and, with `layout`, its entries; raises Mistake.

    Sets per_kind in `flags` if the prompts are those of `score` demo.
    """
    prompts, entries = None, None
    named = "prompt" in raw or ("grid" in flags and "prompt" in read_yaml(flags["grid"])[0])
    if "per_kind" in flags and (flags.get("score") != "demo" or named):
        raise Mistake("per_kind", "", "is for `score` demo without `prompt`")
    if "layout" in flags:
        if "prompt" not in raw:
            raise Mistake("layout", flags["layout"], "needs `prompt`: the prompt file or folder of the benchmark")
        entries = read_entries(flags["layout"], read_path("prompt", raw["prompt"]))
        prompts = [e.prompt for e in entries]
    elif flags.get("score") == "demo" and not named:
        prompts = held_out_texts(flags.setdefault("per_kind", PER_KIND))
    if "layout" in flags and not ("grid" in flags and "prompt_mode" in read_yaml(flags["grid"])[0]):
        raw = {"prompt_mode": "whole"} | raw  # a benchmark measures prompts with their ends
    grid = Grid.read(raw, flags.get("grid"), prompts)
    if entries is not None:
        check_entries(flags["layout"], entries, grid)
    return grid, entries


def read(arguments: Sequence[str]) -> dict[str, Any]:
    """The sweep that the command line asks for; raises Mistake."""
    flags, raw = read_flags(arguments)
    grid, entries = read_grid(flags, raw)
    return {"flags": flags, "grid": grid, "entries": entries, "arguments": arguments}


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if images failed, else see `execute`."""
    status, request = answer_early(arguments, read, help_text, bare=False)
    if status is not None:
        return status
    from sd3.sweep.run import run  # imports torch; mistakes in the flags are reported before

    def work() -> None:
        if run(**request, show=print, say=say):
            raise Failed

    return execute(work, "--width, --height or --batch_size", request["arguments"])


def say(line: str) -> None:
    """Prints a note above any progress bar."""
    tqdm.write(line, file=sys.stderr)
