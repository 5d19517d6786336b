"""`--settings FILE`: flags from a JSON file; flags on the command line replace them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3.flags import FLAGS, check_flag
from sd3.mistakes import Mistake, Where, verbatim
from sd3.models import model_row, read_skip_layer
from sd3.reading import check_file, parse_json, reading
from sd3.settings import IMAGE_ROWS, LEFT_OUT

RESIDUAL = FLAGS["residual_weights"].group
COMMANDS = ("settings", *(name for name, row in FLAGS.items() if row.group == FLAGS["replay"].group))


def read_flag_file(path: str) -> dict[str, Any]:
    """Flags by name, each read by its reader; null values are left out. Raises Mistake naming file and key.

    The file is an object of flags, a run.json (its `flags` are used) or an image's record (its `settings` are used).
    Paths in it are relative to the current folder, as on the command line.
    """
    where = Where("settings", path)
    check_file(where, path)
    with reading(where, "is not JSON"):
        value = parse_json(Path(path).read_bytes().decode("utf-8-sig"), once=True)
    if not isinstance(value, dict):
        raise Mistake(*where, 'must hold an object of flags such as {"prompt": "a red circle", "steps": 28}')
    of_run = isinstance(value.get("flags"), dict)
    raw = value["flags"] if of_run else value
    if not of_run and isinstance(value.get("settings"), dict):
        raw = LEFT_OUT | value["settings"]
    try:
        return _without_idle_residual(_read(raw, of_run))
    except Mistake as mistake:
        raise Mistake(*where, verbatim(str(mistake))) from None


def _read(raw: Mapping[str, Any], of_run: bool) -> dict[str, Any]:
    """of_run: these are all flags of a run: ignores those at their defaults and those that start another command."""
    out: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "skip_layer" and name in IMAGE_ROWS:
            name, value = "skip_layer_cfg", _own_skip_layer(value, raw)
        if value is None:
            continue
        check_flag(name)
        if name in COMMANDS:
            if of_run or value is False:
                continue
            raise Mistake(name, "", "does not belong in a settings file")
        read = FLAGS[name].read(name, value)
        if not (of_run and read == FLAGS[name].unset):
            out[name] = read
    return out


def _own_skip_layer(value: Any, raw: Mapping[str, Any]) -> bool | None:
    """True if the recorded skip-layer guidance is the model's own, which a flag turns on; None if there is none."""
    if not value:
        return None
    if not isinstance(value, dict) or read_skip_layer(value) != model_row(str(raw.get("model"))).skip_layer:
        raise Mistake("skip_layer", value, "is not the model's own skip-layer guidance; `replay` an image with it")
    return True


def _without_idle_residual(values: dict[str, Any]) -> dict[str, Any]:
    """The values without residual settings if they are off: an image's record lists all of them."""
    if values.get("residual_target_layers", True):
        return values
    files = ("residual_config", "residual_preset")
    return {n: v for n, v in values.items() if FLAGS[n].group != RESIDUAL or n in files}
