"""Command lines of this folder's scripts, by fire, with help on standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

import fire
from fire import helptext
from fire.trace import FireTrace


def run(component: Callable | Mapping[str, Callable], name: str) -> None:
    """`fire.Fire` of a function or of commands by name; `--help`, which fire would hand to a function that takes any
    flag, prints its help, to a reader that may stop reading.
    """
    arguments = sys.argv[1:]
    if not {"--help", "-h"} & set(arguments):
        fire.Fire(component, name=name)
        return
    trace = FireTrace(component, name=name)
    if isinstance(component, Mapping) and (command := next((a for a in arguments if a in component), None)):
        component = component[command]
        trace.AddAccessedProperty(component, command, [command], None, None)
    try:
        print(helptext.HelpText(component, trace=trace), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
