"""`python -m sd3.probe`: measures the text stream block by block, and computes rotations for `residual_mode` aligned.

python -m sd3.probe measure --prompts prompts.txt --out measured
python -m sd3.probe suggest --measurement measured/measure.json
python -m sd3.probe calibrate --prompts prompts.txt --origin 1 --targets 2-22 --out rotations.safetensors
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

from sd3 import help, streams
from sd3.command import answer_early, execute, read_arguments
from sd3.flags import FLAGS, Flag, names
from sd3.mistakes import Mistake, nearest
from sd3.probe.suggesting import run_suggest
from sd3.readers import FILE, FOLDER, LAYERS, SWITCH, number, whole
from sd3.residual import ResidualConfig

flag = functools.partial(Flag, scope="probe")
ORIGIN = whole(0, 10_000)
ABOUT = {
    "measure": "samples prompts and reports, per block and timestep, how similar the text tokens that enter the block "
    "are to those of the origin, and how much of the prompt can be recovered from them; writes measure.json, "
    "measure.csv and, with matplotlib, measure.png",
    "suggest": "proposes an origin and targets from a measurement, with the reason; the measurement needs about 100 "
    "different prompts for the usual tolerance of 0.05, (0.5 / tolerance)^2 for another",
    "calibrate": "computes one rotation per target, from the standardised tokens of the origin to those of the target, "
    "by orthogonal Procrustes over all sampling steps; run the same command again to resume",
}
EXAMPLES = {
    "measure": "--model demo --prompts prompts.txt --out measured",
    "suggest": "--measurement measured/measure.json",
    "calibrate": "--model demo --prompts prompts.txt --origin 1 --targets 2-7 --out rotations.safetensors",
}
OWN = {
    "measure": (
        flag("prompts", FILE, None,
            'a .txt file with one prompt per line, or .jsonl with {"prompt": ..., "labels": {"shape": ...}} per '
            "line: every label then gets a linear probe", usual=help.REQUIRED),
        flag("out", FOLDER, "measured", "the folder of the results"),
        flag("origin", ORIGIN, 0, "the block that all others are compared with", usual="0"),
        flag("timesteps", whole(1, 1000), 4, "number of sampling steps to measure"),
        flag("kept_prompts", whole(2, 100_000), 256,
            "prompts used for retrieval and linear probes; they are sampled twice, with different noise"),
        flag("kept_tokens", whole(16, 1_000_000), 512, "tokens used for the overlap of nearest neighbours"),
        flag("neighbours", whole(1, 1000), 10, "number of nearest neighbours to compare"),
    ),
    "suggest": (
        flag("measurement", FILE, None, "measure.json", usual=help.REQUIRED),
        flag("tolerance", number(0.0, 1.0), 0.05, "how much of the prompt a block may lose and not become a target"),
    ),
    "calibrate": (
        flag("prompts", FILE, None, "a .txt or .jsonl file", usual=help.REQUIRED),
        flag("origin", ORIGIN, 0, "the block whose tokens are rotated", usual="0"),
        flag("targets", LAYERS, None, "the blocks that they are rotated to, such as 2-22", usual=help.REQUIRED),
        flag("out", FILE, None, "the .safetensors file to write, for `residual_rotations`", usual=help.REQUIRED),
        flag("buckets", whole(1, 100), 1, "number of equal parts of the noise range, each with its own rotations"),
        flag("centre", SWITCH, False, "subtract the mean over tokens first"),
        flag("check_prompts", FILE, None, "a file of other prompts, to check the rotations on"),
    ),
}  # fmt: skip
SHARED = [FLAGS[name] for name in names(also="probe")]  # of the commands that run a model
RESIDUAL = [FLAGS[name] for name in names(also="measure")]
COMMANDS: dict[str, dict[str, Flag]] = {
    "measure": {row.name: row for row in (*SHARED, *RESIDUAL, *OWN["measure"])},
    "suggest": {row.name: row for row in OWN["suggest"]},
    "calibrate": {row.name: row for row in (*SHARED, *OWN["calibrate"])},
}
SMALLER = {
    "measure": "--width, --height, --batch_size or --kept_prompts",
    "suggest": "number of blocks in --measurement",
    "calibrate": "--buckets, --targets, --width, --height or --batch_size",
}  # what to reduce if memory runs out


def help_text() -> str:
    """The help of the command."""
    lines = ["usage: sd3_probe.py measure | suggest | calibrate [--flag value ...]"]
    for command, rows in OWN.items():
        lines += ["", *textwrap.wrap(f"{command}: {ABOUT[command]}", help.WIDTH)]
        lines += [f"  example: python sd3_probe.py {command} {EXAMPLES[command]}", *help.table(rows)]
        if command == "measure":
            lines.append(f"  --{'residual_... ':<31}measure with residual text streaming; flags as in sd3_infer.py")
    shared = " ".join(f"--{row.name}" for row in SHARED)
    about = f"measure and calibrate also take {shared}, as in sd3_infer.py (python sd3_infer.py --help_all)"
    return "\n".join([*lines, "", *textwrap.wrap(about, help.WIDTH)])


def read_flags(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Reads and checks the command and its flags; raises Mistake."""
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise Mistake("", command or "no command", f"must be {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    rows = COMMANDS[command]
    raw = read_arguments(arguments[1:], rows, bare=None)
    flags = {row.name: row.default for row in OWN[command] if row.default is not None}
    flags |= {name: rows[name].read(name, value) for name, value in raw.items()}
    for row in OWN[command]:
        if row.usual == help.REQUIRED and flags.get(row.name) in (None, ()):
            raise Mistake(row.name, "", f"is required by {command}")
    if command == "calibrate":
        ResidualConfig(flags["origin"], flags["targets"])
        if not flags["out"].endswith(".safetensors"):
            raise Mistake("out", flags["out"], "must end in .safetensors")
    return command, flags


def read(arguments: Sequence[str]) -> dict[str, Any]:
    """The command and its flags; raises Mistake."""
    command, flags = read_flags(arguments)
    return {"command": command, "flags": flags, "words": arguments}


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `execute`."""
    status, request = answer_early(arguments, read, help_text, bare=False)
    if status is not None:
        return status
    words = request.pop("words")
    return execute(lambda: run(**request), SMALLER[request["command"]], words)


def run(command: str, flags: dict[str, Any]) -> None:
    """Runs a command and prints its results."""
    if command == "suggest":
        run_suggest(flags, print)
        return
    # These import torch; mistakes in the flags are reported before.
    from sd3.probe.calibration import calibrate
    from sd3.probe.measuring import measure

    {"measure": measure, "calibrate": calibrate}[command](flags, print)
