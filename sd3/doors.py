"""The command `sd3-infer` of an installed package. Needs no torch."""

from __future__ import annotations

import runpy


def infer() -> None:
    """Runs `sd3_infer` as `python sd3_infer.py` does: a mistake in the flags is answered before torch is imported."""
    runpy.run_module("sd3_infer", run_name="__main__", alter_sys=True)
