"""Puts images side by side in one PNG, enlarged by an integer factor without smoothing, so that pixels stay sharp.

python benchmarks/side_by_side.py docs/demo.png outputs/demo/off/000000.png outputs/demo/on/000000.png
"""

from __future__ import annotations

import sys

from PIL import Image

FACTOR = 4
GAP = 16  # white pixels between images


def side_by_side(out: str, *paths: str) -> None:
    """Writes the images `paths`, which must have the same size, to the PNG `out`, from left to right."""
    images = [Image.open(path).convert("RGB") for path in paths]
    width, height = (FACTOR * side for side in images[0].size)
    sheet = Image.new("RGB", (len(images) * (width + GAP) - GAP, height), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (i * (width + GAP), 0))
    sheet.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    side_by_side(*sys.argv[1:])
