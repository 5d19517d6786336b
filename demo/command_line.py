"""Command lines of this folder's scripts, made with fire, with help on standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import fire
from fire import helptext
from fire.trace import FireTrace

from sd3.mistakes import Mistake, flag_name


def run(component: Callable | Mapping[str, Callable], name: str) -> None:
    """Runs `fire.Fire` on a function, or on a table of commands. `--help` prints the help even if the function takes
    arbitrary flags (fire would pass it to the function), and the reader of the output may close it early.
    """
    arguments = sys.argv[1:]
    if not {"--help", "-h"} & set(arguments):
        try:
            fire.Fire(component, name=name)
        except Mistake as mistake:
            sys.exit(f"error: {mistake.spelled(flag_name)}")
        return
    trace = FireTrace(component, name=name)
    if isinstance(component, Mapping) and (command := next((a for a in arguments if a in component), None)):
        component = component[command]
        trace.AddAccessedProperty(component, command, [command], None, None)
    try:
        print(helptext.HelpText(component, trace=trace), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
