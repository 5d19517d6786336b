"""Many settings at once: a grid over any flag of sd3_infer.py, made with one load, resumable, with a report.

python sd3_sweep.py --out swept --prompt prompts.txt --seed 0-3 --residual_target_layers "3,5;4" --cfg "2.5;4"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from sd3 import streams
from sd3.command import answer_early, execute, read_arguments
from sd3.mistakes import Mistake
from sd3.readers import SWITCH, read_choice, read_filled, read_path, whole
from sd3.shapes.prompts import held_out_texts
from sd3.sweep.grid import NO_PLACE, SWEPT, Grid, read_yaml
from sd3.sweep.layouts import check_entries, read_entries

LAYOUTS = ("geneval", "dpg", "t2i_compbench")
SCORERS = ("demo", "clip")
OWN: dict[str, Callable[[str, Any], Any]] = {
    "out": read_path,
    "grid": read_path,
    "dry_run": SWITCH,
    "score": lambda flag, value: read_choice(flag, value, SCORERS),
    "per_kind": whole(1, 10_000),
    "clip_model": read_path,
    "layout": lambda flag, value: read_choice(flag, value, LAYOUTS),
    "ray": read_filled,
    "cpus_per_worker": whole(1, 10_000),
}
HELP = """usage: sd3_sweep.py --out FOLDER [--flag value ...]

makes every combination of prompts, seeds and settings, and for each of them one without residual text streaming, off;
run again, it goes on where it was
  --out                   the sweep's folder: pictures/, index.html, sheet.png, results.csv, log.jsonl (needed)
  --grid                  a YAML file with the same flags and, below `variants`, named settings
  --dry_run               prints how many pictures there are, how many are done, and how long the rest will take
  --prompt                a text, or a .txt file with a prompt a line, or .jsonl with {"prompt": ...} a line
  --seed                  seeds and ranges, such as 0-3 or "0-3;10" (23)
  --batch_size            pictures of one variant that share a run; a partial batch is filled up (1)
  --score                 demo: the six kinds of the shipped model (without --prompt on its own prompts); clip
  --per_kind              prompts of each kind with --score demo and no --prompt (40)
  --clip_model            for --score clip: a folder with a CLIP model in transformers' layout
  --layout                geneval, dpg or t2i_compbench: --prompt is that benchmark's own prompt file or folder, and
                          FOLDER/<layout>/<variant> what its evaluator reads
  --ray                   auto, or a cluster's address: one worker per GPU, or per --cpus_per_worker CPUs
  --cpus_per_worker       threads of a worker where there is no GPU (all of a machine)

any other flag of sd3_infer.py, with alternatives parted by `;`: --residual_weights "0.3;0.6" --cfg "3;5"
(python sd3_infer.py --help); status: 0 all made, 1 some failed, 2 a mistake in flags or files"""


def read_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The sweep's own flags, read, and those of the grid as typed; raises Mistake."""
    raw = read_arguments(arguments, OWN | SWEPT | dict.fromkeys(NO_PLACE, read_filled))
    flags = {name: OWN[name](name, value) for name, value in raw.items() if name in OWN}
    if "out" not in flags:
        raise Mistake("out", "", "is needed: the sweep's folder")
    if "clip_model" in flags and flags.get("score") != "clip":
        raise Mistake("clip_model", "", "is for `score` clip")
    if "cpus_per_worker" in flags and "ray" not in flags:
        raise Mistake("cpus_per_worker", "", "is for `ray`")
    return flags, {name: value for name, value in raw.items() if name not in OWN}


def read_grid(flags: dict[str, Any], raw: Mapping[str, str]) -> tuple[Grid, Any]:
    """The grid and, with --layout, its entries; raises Mistake.

    `flags` keep per_kind only where the prompts are those of --score demo.
    """
    prompts, entries = None, None
    named = "prompt" in raw or ("grid" in flags and "prompt" in read_yaml(flags["grid"])[0])
    if "per_kind" in flags and (flags.get("score") != "demo" or named):
        raise Mistake("per_kind", "", "is for `score` demo without prompts of your own")
    if "layout" in flags:
        if "prompt" not in raw:
            raise Mistake("layout", flags["layout"], "needs `prompt`, the benchmark's own prompts")
        entries = read_entries(flags["layout"], read_path("prompt", raw["prompt"]))
        prompts = [e.prompt for e in entries]
    elif flags.get("score") == "demo" and not named:
        prompts = held_out_texts(flags.setdefault("per_kind", 40))
    grid = Grid.read(raw, flags.get("grid"), prompts)
    if entries is not None:
        check_entries(flags["layout"], entries, grid)
    return grid, entries


def read_words(words: Sequence[str]) -> tuple[dict[str, Any], Grid, Any]:
    """The sweep's own flags, its grid and, with --layout, its entries; raises Mistake."""
    flags, raw = read_flags(words)
    return flags, *read_grid(flags, raw)


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 where pictures failed, else see `sd3.command.execute`."""
    if arguments is None:
        streams.begin()
        arguments = sys.argv[1:]
    status, read = answer_early(arguments, read_words, lambda: HELP, bare=False)
    if status is not None:
        return status
    from sd3.sweep.run import run  # here: a mistake in the flags need not wait for torch

    flags, grid, entries = read

    failed: list[int] = []
    status = execute(
        lambda: failed.append(run(flags, grid, entries, arguments, print, say)), "--width, --height or --batch_size"
    )
    return status or int(bool(failed and failed[0]))


def say(line: str) -> None:
    """A line about the work, above any progress bar."""
    tqdm.write(line, file=sys.stderr)
