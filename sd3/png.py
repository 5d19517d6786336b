"""Images as PNG files: their metadata, written and read."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sd3.effects import executed_steps, planned_steps
from sd3.flags import FLAGS, names
from sd3.methods import SAMPLERS, SCHEDULES
from sd3.mistakes import Mistake, Where
from sd3.reading import check_file, parse_json, reading
from sd3.settings import Settings, base_name, with_paths
from sd3.versions import NAME, __version__, versions
from sd3.writing import atomic_write

SETTINGS_CHUNK = "sd3_residual"  # the PNG text chunk with the full settings as JSON


def _quoted(value: Any) -> str:
    """A value of an A1111 parameter line: quoted as JSON where it would break the line apart."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parameters(settings: Settings, model_hash: str, software: Mapping[str, str]) -> str:
    """The `parameters` text of A1111-style readers: prompt, negative prompt, one line of `Name: value` pairs."""
    model = base_name(settings.model) or ""
    pairs: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.sampler].title,
        "CFG scale": settings.cfg,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_hash[:10],
        "Model": model.removesuffix(".safetensors"),
        "Shift": settings.shift,
    }
    for name in names("picture", group=FLAGS["sampler"].group, always=False):
        if (value := getattr(settings, name)) != FLAGS[name].default:
            known = {"scheduler": ("Schedule type", SCHEDULES[settings.scheduler].title)}
            label, text = known.get(name, (name.replace("_", " ").capitalize(), value))
            pairs[label] = text
    if settings.vae:
        pairs["VAE"] = base_name(settings.vae)
    if settings.init_image:
        pairs["Denoising strength"] = settings.denoise
        pairs["Init image"] = base_name(settings.init_image)
    if settings.controlnet_ckpt:
        pairs["ControlNet"] = base_name(settings.controlnet_ckpt)
        pairs["ControlNet image"] = base_name(settings.controlnet_cond_image)
        pairs["ControlNet strength"] = settings.controlnet_strength
    if settings.lora:
        pairs["LoRA"] = ", ".join(map(str, with_paths(settings.lora, base_name)))
    if settings.skip_layer:
        slg = settings.skip_layer
        pairs["Skip layers"] = ", ".join(map(str, slg.layers))
        pairs["Skip layer guidance"] = f"scale {slg.scale:g} from {slg.start:g} to {slg.end:g}"
    if settings.residual_target_layers:
        pairs["Residual origin layer"] = settings.residual_origin_layer
        pairs["Residual target layers"] = ", ".join(map(str, settings.residual_target_layers))
        pairs["Residual weights"] = ", ".join(f"{w:.6g}" for w in settings.residual_weights)
        for name, usual in (
            ("mode", "add"),
            ("schedule", "constant"),
            ("start", 0),
            ("end", 1),
            ("branch", "both"),
            ("tokens", "all"),
        ):
            if (value := getattr(settings, f"residual_{name}")) != usual:
                pairs[f"Residual {name}"] = value
        if settings.residual_rotations:
            pairs["Residual rotations"] = base_name(settings.residual_rotations)
    if settings.no_t5:
        pairs["T5"] = "off"
    pairs["Dtype"] = settings.dtype
    pairs["Version"] = f"{NAME}, torch {software.get('torch', '?')}"
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    negative = f"\nNegative prompt: {settings.negative_prompt}" if settings.negative_prompt else ""
    return f"{settings.prompt}{negative}\n{line}"


def save_picture(
    path: Path, image: Image.Image, settings: Settings, provenance: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG atomically. With `provenance` (at least model_sha256), it carries its settings as text chunks."""
    data = encode_picture(image, settings, provenance)
    atomic_write(path, lambda f: f.write(data))


def encode_picture(image: Image.Image, settings: Settings, provenance: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG; `provenance` as for `save_picture`."""
    info = PngInfo()
    if provenance is not None:
        software = versions()
        record = {"settings": settings.public(), **provenance, "version": __version__, "versions": software}
        if planned_steps(settings) != settings.steps:
            record["steps_run"] = executed_steps(settings)
        info.add_text("parameters", parameters(settings, provenance.get("model_sha256", ""), software))
        info.add_text(SETTINGS_CHUNK, json.dumps(record, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


@contextlib.contextmanager
def open_picture(where: Where, path: str | Path) -> Iterator[Image.Image]:
    """Opens an image file with Pillow; raises Missing, or Mistake for any error inside."""
    check_file(where, path)
    with reading(where, "cannot be read"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's: what matters of them follows as an error
                # by its handle: by its path, Pillow maps some TIFFs into memory, rotated ones with a wrong line length
                with open(path, "rb") as file, Image.open(file) as image:
                    yield image
        except UnidentifiedImageError:
            raise Mistake(*where, "is not an image") from None


def read_record(path: str | Path, field: str = "replay") -> dict[str, Any]:
    """The record in a PNG that this tool wrote: settings, model_sha256, versions and more.

    Raises Missing, or Mistake for a file that is damaged or holds no record.
    """
    where = Where(field, path)
    with open_picture(where, path) as image:
        image.load()
        text = getattr(image, "text", {}).get(SETTINGS_CHUNK)
    if text is None:
        why = "holds no settings: made with `no_metadata`, by another program, or saved again by one"
        raise Mistake(*where, why)
    with reading(where, "its settings cannot be read"):
        record = parse_json(text)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise Mistake(*where, "its settings cannot be read")
    return record


def recorded_threads(record: Mapping[str, Any]) -> Any:
    """The recorded number of CPU threads that made an image, or else encoded its text; None if a CPU did neither."""
    hardware = record.get("hardware")
    hardware = hardware if isinstance(hardware, dict) else {}
    return hardware.get("threads", hardware.get("text_encoder_threads"))
