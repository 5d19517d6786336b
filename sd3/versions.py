"""Versions of this tool and of the packages it uses. Needs no torch."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

NAME = "sd3-residual"
__version__ = "0.2.0"

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow")


@functools.cache  # takes 2 ms, and every image records them
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change an image."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
