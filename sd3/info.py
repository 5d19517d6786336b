"""`--info FILE`: the settings of an image and the commands that make it again, or what is in a LoRA. Needs no torch."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3 import png
from sd3.files import find_format
from sd3.flags import FLAGS, GROUPS, Flag
from sd3.headers import read_header
from sd3.lora_file import describe
from sd3.mistakes import Missing, Mistake, Where, display
from sd3.models import model_row, read_skip_layer
from sd3.replay import Replay
from sd3.settings import FILE_SETTINGS, IMAGE_ROWS, with_paths

RESIDUAL = FLAGS["residual_weights"].group
ALWAYS = ("seed", "width", "height", "sampler", "steps", "cfg", "shift", "model", "device", "dtype")


def answer(values: Mapping[str, Any]) -> str | None:
    """The reply to `--info`; None if that flag is not given. Raises Mistake."""
    if "info" not in values:
        return None
    path = values["info"]
    is_weights = os.path.isdir(path) or (os.path.isfile(path) and find_format(Where("info", path), Path(path)))
    return describe(path) if is_weights else text(path)


def text(path: str) -> str:
    """The settings in an image, by group, and the commands that make it again.

    Raises Missing, or Mistake for a file that is damaged or holds no settings.
    """
    record = png.read_record(path, "info")
    settings = record["settings"]
    lines = [f"{path}: {display(settings.get('width'))} x {display(settings.get('height'))}, {_made_with(record)}"]
    for group in GROUPS:
        rows = list(_rows(settings, group))
        lines += ["", f"{group[0].upper()}{group[1:]}", *rows] if rows else []
    lines += ["", "The same image again:", f"  {shlex.join(['python', 'sd3_infer.py', '--replay', path])}"]
    lines += ["The same settings as flags:", f"  {shlex.join(command(Path(path), record))}"]
    return "\n".join(lines)


def _made_with(record: Mapping[str, Any]) -> str:
    versions = record.get("versions")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    parts = [f"made by version {display(record.get('version', 'unknown'))}"]
    parts += [f"torch {display(torch)}"] if torch else []
    parts += [f"model sha256 {display(record['model_sha256'])[:16]}"] if record.get("model_sha256") else []
    return ", ".join(parts)


def _rows(settings: Mapping[str, Any], group: str) -> Iterator[str]:
    """A line for every setting of a group that is not at its default; unknown settings are in the last group."""
    off = group == RESIDUAL and not settings.get("residual_target_layers")
    for name, value in settings.items():
        row = IMAGE_ROWS.get(name)
        if off or (row.group if row else list(GROUPS)[-1]) != group:
            continue
        if row is None or name == "prompt" or name in ALWAYS or not _is_default(name, value):
            yield f"  {name:<24}{_shown_files(row, value) or _shown(value)}"


def _is_default(name: str, value: Any) -> bool:
    row = IMAGE_ROWS[name]
    default = None if row.field else row.default
    if row.read.kind == "text" and default is None:
        return value is None  # an empty text is another prompt
    return value == default or (value in (None, [], "") and default in (None, (), ""))


def _shown_files(row: Flag | None, value: Any) -> str:
    """The value of a flag of several files, as it is typed; empty for other flags."""
    if row is None or row.read.kind != "patch files":
        return ""
    with contextlib.suppress(Mistake):
        return _shown(as_word(row.read(row.name, value)))
    return ""


def _shown(value: Any) -> str:
    """A value on one line; text in full."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in value)
    if isinstance(value, list):
        return ", ".join(display(item) for item in value)
    return display(value)


def command(path: Path, record: Mapping[str, Any]) -> list[str]:
    """The words of the command for an image's recorded settings. A file that cannot be found beside the run or the
    image is named as recorded, without its folder.
    """
    words = ["python", "sd3_infer.py"]
    image, settings = Replay(path, record, {}), dict(record["settings"])
    for name in FILE_SETTINGS:
        with contextlib.suppress(Mistake):
            value = FLAGS[name].read(name, settings[name]) if settings.get(name) is not None else None
            settings[name] = with_paths(value, functools.partial(_found, image, name))
    residual = bool(settings.get("residual_target_layers"))
    for name, value in settings.items():
        row = IMAGE_ROWS.get(name)
        if row is None or row.field or (_is_default(name, value) and name not in (*ALWAYS, "prompt", "vae_tile")):
            continue
        if row.group != RESIDUAL or residual:
            words.append(f"--{name}={as_word(value)}")
    if "vae_tile" not in settings:  # recorded unless 0; the flag's default is auto
        words.append("--vae_tile=off")
    if "prompt_mode" not in settings and _names_mode(settings.get("model")):
        words.append("--prompt_mode=reference")
    if settings.get("batch_size", 1) != 1:
        words.append("--pad_batch")
    if (threads := png.recorded_threads(record)) is not None:
        words.append(f"--threads={threads}")
    return [*words, *_skip_layer(settings)]


def _names_mode(model: Any) -> bool:
    """Whether a model file names a prompt mode of its own, or may do so, as it cannot be read."""
    if isinstance(model, str) and os.path.isdir(model):
        return False  # a folder in diffusers layout has no metadata
    with contextlib.suppress(Mistake, TypeError, OSError):
        return "prompt_mode" in read_header(Where("model", model), Path(model))[1]
    return True


def _found(image: Replay, flag: str, name: str) -> str:
    """The path of a file that an image names; its name where it is not found."""
    with contextlib.suppress(Missing):
        return image.find(flag, name)
    return name


def _skip_layer(settings: Mapping[str, Any]) -> list[str]:
    """The flag of skip-layer guidance, if the recorded one is the model's own."""
    values = settings.get("skip_layer")
    try:
        usual = isinstance(values, dict) and read_skip_layer(values) == model_row(str(settings.get("model"))).skip_layer
    except Mistake:
        usual = False
    return ["--skip_layer_cfg"] if usual else []


def as_word(value: Any) -> str:
    """A flag's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
