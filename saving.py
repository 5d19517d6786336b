"""Pictures on disk: folder names, PNG metadata, atomic writes and the record of a run."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from settings import Settings

A1111_SAMPLERS = {"euler": "Euler", "dpmpp_2m": "DPM++ 2M"}
SETTINGS_CHUNK = "sd3_residual"  # the PNG text chunk with the full settings as JSON
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a picture."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that no half-written file is ever seen.

    Raises OSError naming the file; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        rename_finished(Path(name), path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise OSError(error.errno, f"{path}: cannot be written: {why}") from None
        raise


def rename_finished(partial: Path, path: Path) -> None:
    """Gives a finished temporary file its name, and the rights that any new file here gets."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)


def make_folder(parent: Path, name: str, postfix: str | None, now: datetime.datetime | None = None) -> Path:
    """Makes `parent/<name><postfix or _date-time>`, with a number behind it where that exists already.

    Raises ValueError for a place that cannot be written.
    """
    stamp = postfix if postfix else (now or datetime.datetime.now()).strftime("_%Y-%m-%dT%H-%M-%S")
    stamp = stamp.replace("/", "_").replace("\\", "_")
    number = 0
    while True:
        folder = parent / f"{name}{stamp}{f'_{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise ValueError(f"--out_dir: {parent} is not a folder") from None
            number += 1
        except OSError as error:
            raise ValueError(f"--out_dir: cannot make {folder} ({error.strerror})") from None


def check_writable(out_dir: str) -> None:
    """Raises ValueError where pictures could not be written below `out_dir`; makes nothing."""
    place = Path(out_dir)
    while not place.exists():
        if place.is_symlink() or place == place.parent:
            break
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--out_dir {out_dir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out_dir {out_dir}: {place} cannot be written")


def _base(path: str | None) -> str | None:
    return None if path is None else os.path.basename(path.replace("\\", "/"))


def public_settings(settings: Settings) -> dict[str, Any]:
    """Settings for a record that others may see: file names without their folders."""
    values = settings.asdict()
    for name in ("model", "vae", "init_image", "controlnet_ckpt", "controlnet_cond_image", "residual_rotations"):
        values[name] = _base(values[name])
    return values


def _quoted(value: Any) -> str:
    """A value of an A1111 parameter line: quoted as JSON where it would break the line apart."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parameters(settings: Settings, model_hash: str, software: Mapping[str, str]) -> str:
    """The `parameters` text of A1111-style readers: prompt, negative prompt, one line of `Name: value` pairs."""
    model = _base(settings.model) or ""
    pairs: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": A1111_SAMPLERS[settings.sampler],
        "CFG scale": settings.cfg,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_hash[:10],
        "Model": model.removesuffix(".safetensors"),
        "Shift": settings.shift,
    }
    if settings.vae:
        pairs["VAE"] = _base(settings.vae)
    if settings.init_image:
        pairs["Denoising strength"] = settings.denoise
        pairs["Init image"] = _base(settings.init_image)
    if settings.controlnet_ckpt:
        pairs["ControlNet"] = _base(settings.controlnet_ckpt)
        pairs["ControlNet image"] = _base(settings.controlnet_cond_image)
        pairs["ControlNet strength"] = settings.controlnet_strength
    if settings.skip_layer:
        slg = settings.skip_layer
        pairs["Skip layers"] = ", ".join(map(str, slg.layers))
        pairs["Skip layer guidance"] = f"scale {slg.scale:g} from {slg.start:g} to {slg.end:g}"
    if settings.residual_target_layers:
        pairs["Residual origin layer"] = settings.residual_origin_layer
        pairs["Residual target layers"] = ", ".join(map(str, settings.residual_target_layers))
        pairs["Residual weights"] = ", ".join(f"{w:.6g}" for w in settings.residual_weights)
        for name, usual in (("mode", "add"), ("schedule", "constant"), ("start", 0), ("end", 1), ("branch", "both")):
            if (value := getattr(settings, f"residual_{name}")) != usual:
                pairs[f"Residual {name}"] = value
        if settings.residual_rotations:
            pairs["Residual rotations"] = _base(settings.residual_rotations)
    if settings.no_t5:
        pairs["T5"] = "off"
    pairs["Dtype"] = settings.dtype
    pairs["Version"] = f"sd3-residual, torch {software.get('torch', '?')}"
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    negative = f"\nNegative prompt: {settings.negative_prompt}" if settings.negative_prompt else ""
    return f"{settings.prompt}{negative}\n{line}"


def save_picture(
    path: Path, image: Image.Image, settings: Settings, model_hash: str = "", with_metadata: bool = True
) -> None:
    """Writes a PNG atomically, with its settings as text chunks unless `with_metadata` is off."""
    info = PngInfo()
    if with_metadata:
        software = versions()
        record = {"settings": public_settings(settings), "model_sha256": model_hash, "versions": software}
        info.add_text("parameters", parameters(settings, model_hash, software))
        info.add_text(SETTINGS_CHUNK, json.dumps(record, ensure_ascii=False))
    atomic_write(path, lambda f: image.save(f, format="PNG", pnginfo=info))


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; dataclasses become objects, paths text."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=_plain)
    atomic_write(path, lambda f: f.write(text.encode() + b"\n"))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)
