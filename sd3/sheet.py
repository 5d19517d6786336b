"""Contact sheets and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles images of one size, row by row, without gaps."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def contact_sheet(
    rows: Sequence[Sequence[Path]], labels: Sequence[str], columns: Sequence[str], size: int = 256
) -> Image.Image:
    """A table of images from files, with column names and row labels; each at most `size` pixels on a side.

    The cell of a missing or damaged file stays empty.
    """
    shown = [[_thumbnail(path, size) for path in row] for row in rows]
    sizes = [picture.size for row in shown for picture in row if picture is not None] or [(size, size)]
    width, height = (max(side) for side in zip(*sizes, strict=True))
    font, line, gap = ImageFont.load_default(12), 15, 4
    left = max(width, 160)
    heads = [_wrap(name, font, width) for name in columns]
    top = line * max(map(len, heads), default=1) + gap
    full = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    sheet = Image.new("RGB", full, "white")
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        draw.multiline_text((left + i * (width + gap), 0), "\n".join(head), "black", font, spacing=2)
    for r, (row, label) in enumerate(zip(shown, labels, strict=True)):
        y = top + r * (height + gap)
        text = _wrap(label, font, left - gap)[: max(height // line, 1)]
        draw.multiline_text((0, y), "\n".join(text), "black", font, spacing=2)
        for i, picture in enumerate(row):
            if picture is not None:
                sheet.paste(picture, (left + i * (width + gap), y))
    return sheet


def _thumbnail(path: Path, size: int) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except Exception:  # missing or damaged
        return None
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Wraps a text to a width in pixels, between words if possible."""
    lines, words = [""], text.replace("\n", " ").split(" ")
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            cut = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines


def heat_map(amount: np.ndarray) -> Image.Image:
    """Values (H, W) in [0, 1] as black, red, yellow and white, by their square root, so that small ones are visible."""
    x = 3 * np.sqrt(np.clip(amount, 0, 1))[..., None]  # (H, W, 1)
    colours = np.clip(x - np.arange(3), 0, 1) * 255  # red, then green, then blue
    return Image.fromarray(colours.astype(np.uint8))
