"""Images from SD3 and SD3.5 weight files, with residual text streaming.

    import sd3

    pipe = sd3.load("models/demo/demo.safetensors")
    image = pipe("a red circle", seed=5, residual_target_layers="3-7").images[0]

What `__all__` names is public; everything else in this package may change. Names are imported when they are first used,
so that a command can answer without torch.
"""

import importlib
from typing import Any

_PLACES = {
    "load": "sd3.api",
    "Pipeline": "sd3.api",
    "Output": "sd3.api",
    "ResidualConfig": "sd3.residual",
    "SkipLayerConfig": "sd3.models",
    "Settings": "sd3.settings",
    "Mistake": "sd3.mistakes",
    "Note": "sd3.reading",
    "Reporter": "sd3.telling",
    "Terminal": "sd3.telling",
    "apply_residual": "sd3.diffusers_hooks",  # needs diffusers
    "token_kinds": "sd3.diffusers_hooks",
    "__version__": "sd3.versions",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module sd3 has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(_PLACES)
