"""What the text stream of a model still knows at each block, and the rotations of `--residual_mode aligned`.

python sd3_probe.py measure --prompts prompts.txt --out measured
python sd3_probe.py suggest --measurement measured/measure.json
python sd3_probe.py calibrate --prompts prompts.txt --origin 1 --targets 2-22 --out rotations.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from sd3 import streams
from sd3.command import answer_early, execute, read_arguments
from sd3.flags import READERS, names
from sd3.mistakes import Mistake, nearest
from sd3.readers import SWITCH, read_float, read_layers, whole
from sd3.residual import ResidualConfig

_SHARED = {name: READERS[name] for name in names(also="probe")} | {"prompts": READERS["model"]}


def _fraction(flag: str, value: Any) -> float:
    return read_float(flag, value, 0.0, 1.0)


COMMANDS: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "measure": _SHARED
    | {name: reader for name, reader in READERS.items() if name.startswith("residual_")}
    | {
        "out": READERS["model"],
        "origin": whole(0, 10_000),
        "timesteps": whole(1, 1000),
        "kept_prompts": whole(2, 100_000),
        "kept_tokens": whole(16, 1_000_000),
        "neighbours": whole(1, 1000),
    },
    "suggest": {"measurement": READERS["model"], "tolerance": _fraction},
    "calibrate": _SHARED
    | {
        "out": READERS["model"],
        "origin": whole(0, 10_000),
        "targets": read_layers,
        "buckets": whole(1, 100),
        "centre": SWITCH,
        "check_prompts": READERS["model"],
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "measure": {
        "origin": 0,
        "timesteps": 4,
        "kept_prompts": 256,
        "kept_tokens": 512,
        "neighbours": 10,
        "out": "measured",
    },
    "suggest": {"tolerance": 0.05},
    "calibrate": {"origin": 0, "buckets": 1, "centre": False},
}
NEEDED = {"measure": ("prompts",), "suggest": ("measurement",), "calibrate": ("prompts", "targets", "out")}
HELP = """usage: sd3_probe.py measure | suggest | calibrate [--flag value ...]

measure: runs prompts and reports, per block and timestep, what the text tokens entering it still have of the origin's
and still know of the prompt; writes measure.json, measure.csv and, with matplotlib, measure.png
  --prompts               a .txt file with a prompt a line, or .jsonl with {"prompt": ..., "labels": {"shape": ...}} a
                          line: a linear probe is then fitted for every label
  --out                   folder for the results (measured)
  --origin                block that all others are compared with (0)
  --timesteps             how many of the steps are measured (4)
  --kept_prompts          prompts kept for retrieval and linear probes; these run twice, with different noise (256)
  --kept_tokens           tokens kept for the overlap of nearest neighbours (512)
  --neighbours            how many nearest neighbours are compared (10)
  --residual_...          measures with residual text streaming, flags as in sd3_infer.py

suggest: proposes an origin and targets from a measurement, and says why
  --measurement           measure.json
  --tolerance             how much of what is known counts as nothing lost (0.05)

calibrate: one rotation per target that turns the origin's standardised tokens to the target's, from the text tokens met
while sampling (orthogonal Procrustes); run again after a stop, it goes on
  --prompts               a .txt or .jsonl file
  --origin, --targets     layers, such as 1 and 2-22 (origin 0)
  --out                   the .safetensors file for --residual_rotations
  --buckets               parts of the noise range with rotations of their own (1)
  --centre                subtracts the mean over tokens first
  --check_prompts         other prompts, on which the rotations are checked

all that run a model: --model --vae --model_folder --clip_l --clip_g --t5xxl --text_encoder_device --device --dtype
--no_t5 --embed_cache --weights --offload --steps --cfg --shift
--sampler --width --height --negative_prompt --batch_size --seed, as in sd3_infer.py (python sd3_infer.py --help)"""


def read_flags(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and its flags, read and checked; raises Mistake."""
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        raise Mistake("", command or "no command", f"must be {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    readers = COMMANDS[command]
    raw = read_arguments(arguments[1:], readers, bare=None)
    flags = DEFAULTS[command] | {name: readers[name](name, value) for name, value in raw.items()}
    for name in NEEDED[command]:
        if flags.get(name) in (None, ()):
            raise Mistake(name, "", f"is needed by {command}")
    if command == "calibrate":
        ResidualConfig(flags["origin"], flags["targets"])
        if not flags["out"].endswith(".safetensors"):
            raise Mistake("out", flags["out"], "must end in .safetensors")
    return command, flags


SMALLER = {
    "measure": "--width, --height, --batch_size or --kept_prompts",
    "suggest": "number of blocks in --measurement",
    "calibrate": "--buckets, --targets, --width, --height or --batch_size",
}  # what to turn down where memory runs out


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `sd3.command.execute`."""
    if arguments is None:
        streams.begin()
        arguments = sys.argv[1:]
    status, read = answer_early(arguments, read_flags, lambda: HELP, bare=False)
    if status is not None:
        return status
    # here: a mistake in the flags need not wait for torch
    from sd3.probe.calibration import calibrate
    from sd3.probe.measuring import measure
    from sd3.probe.suggesting import run_suggest

    def work() -> None:
        command, flags = read
        {"measure": measure, "suggest": run_suggest, "calibrate": calibrate}[command](flags, print)

    return execute(work, SMALLER.get(arguments[0], SMALLER["measure"]))
