"""Images to pixels and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd3 import png
from sd3.mistakes import Mistake, Where, display, verbatim
from sd3.reading import Note
from sd3.settings import Settings

VAE_TILE = 576  # pixels, where a picture is too large to be decoded whole: 1024 and 2048 divide well with the overlap


def open_image(field: str, path: str, width: int, height: int) -> Image.Image:
    """An image as every viewer shows it, RGB, resized with Lanczos: rotated as its EXIF says, transparent pixels over
    white, the first frame of an animation. Raises Missing or Mistake, which names `field`.
    """
    where = Where(field, path)
    with png.open_picture(where, path) as image:
        opaque, transparent = as_shown(image)
        opaque = opaque.resize((width, height), Image.Resampling.LANCZOS)
    if transparent and where not in _TRANSPARENT:
        _TRANSPARENT.add(where)
        why = "is transparent in places; white is taken for what lies behind"
        warnings.warn(f"`{field}` {verbatim(display(path))}: {why}", Note, stacklevel=2)
    return opaque


_TRANSPARENT: set[Where] = set()  # pictures with a warning already: they are opened for every batch
_FEW_GREYS = {"L;2": 3, "L;4": 15}  # the highest value of a grey PNG of so few bits, by Pillow's name for it


def as_shown(image: Image.Image) -> tuple[Image.Image, bool]:
    """An opened image as RGB, see `open_image`, and whether any of it was transparent.

    Raises ValueError for grey values of 32 bits: which of them is white is unknown.
    """
    levels = _FEW_GREYS.get(image.tile[0].args if image.format == "PNG" and image.tile else None)
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if levels and isinstance(key, int):  # Pillow widens the values and leaves the clear one as it stands in the file
        key = image.info["transparency"] = key * 255 // levels
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its grey values have 32 bits; save it with 8 or 16")
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 is white
        clear = values != key if isinstance(key, int) else np.ones(values.shape, bool)
        image = Image.merge("LA", (grey, Image.fromarray(clear.astype(np.uint8) * 255)))
    if not (image.has_transparency_data or image.mode in ("La", "RGBa")):
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), True


def open_images(pictures: Sequence[Settings]) -> dict[tuple[str, str, int, int], Image.Image]:
    """The images that settings start from or are guided by: {(field, path, width, height): image}; raises as
    `open_image`.
    """
    wanted = {
        (field, path, s.width, s.height)
        for s in pictures
        for field, path in (("init_image", s.init_image), ("controlnet_cond_image", s.controlnet_cond_image))
        if path
    }
    return {key: open_image(*key) for key in sorted(wanted)}


def unit_pixels(image: Image.Image) -> Tensor:
    """A PIL image -> (1, 3, H, W) float32 in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1] -> PIL: clamp((x + 1) / 2) * 255, truncated."""
    scaled = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return Image.fromarray(scaled.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def check_finite(x: Tensor, what: str, dtype: torch.dtype, cause: Callable[[], str] = str) -> None:
    """Raises Mistake where `x` holds NaN or infinity: with the cause, where it is known, else the dtype to try."""
    if not torch.isfinite(x).all():
        if line := cause():
            raise Mistake("", "", f"{line}; {what} became NaN or infinite by it; no picture is saved")
        others = {torch.float16: "try `dtype` bfloat16 or float32", torch.bfloat16: "try `dtype` float32"}
        advice = others.get(dtype, "the model file may be damaged: download it again")
        name = str(dtype).removeprefix("torch.")
        raise Mistake("", "", f"{what} became NaN or infinite in {name}; no picture is saved; {advice}")
