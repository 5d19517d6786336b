"""Regenerates docs/tutorial.md, for example after a change of the shipped model: runs its commands in order and
replaces their output and images. Check the text between them yourself: it quotes numbers.

python benchmarks/tutorial.py        two to three minutes; leaves its folders in ./tutorial
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
WORK = Path("tutorial")  # where the commands run
# A block of commands and the block of their output; an image and the file that it is copied from.
PRINTED = re.compile(r"```sh\n(.*?)```\n\n```text\n.*?```\n", re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\(([\w./]+)\) <!-- ([\w./*]+)(?: top (\d+))? -->")
SMALL = 100  # pixels; narrower images are enlarged
PROGRESS = re.compile(r"%\||/s\]| \.\.\. [\d.]+ s$")  # progress bars, and the lines that replace them in a log
ESCAPE = re.compile(r"\x1b\[\w")  # cursor movements


def printed_by(commands: str) -> str:
    """Runs commands and returns their output without progress lines. Raises RuntimeError if one fails."""
    joined = commands.replace("\\\n", "")
    done = subprocess.run(["bash", "-ec", joined], capture_output=True, text=True, cwd=WORK, env=environment())
    if done.returncode:
        raise RuntimeError(f"{commands}\n{done.stdout}\n{done.stderr}")
    lines = [ESCAPE.sub("", line).rpartition("\r")[2].rstrip() for line in (done.stdout + done.stderr).split("\n")]
    return "\n".join(line for line in lines if line and not PROGRESS.search(line))


def environment() -> dict[str, str]:
    """This process's environment, with this Python as `python` and the project on the module path, for `WORK`."""
    folder = WORK / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{folder.absolute()}:{os.environ['PATH']}"}


def copy_image(source: Path, target: Path, top: str = "") -> None:
    """Copies an image, or its first `top` rows, in 256 colours. Narrow images are enlarged three times."""
    image = Image.open(source).convert("RGB")
    if top:
        image = image.crop((0, 0, image.width, int(top)))
    if image.width < SMALL:
        image = image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)
    target.parent.mkdir(exist_ok=True)
    image.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Runs all commands, then copies all images, then writes the page."""
    WORK.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("outputs", WORK.name):
            (WORK / path.name).symlink_to(path)
    text = PAGE.read_text(encoding="utf-8")
    text = PRINTED.sub(lambda m: f"```sh\n{m[1]}```\n\n```text\n{printed_by(m[1])}\n```\n", text)
    for name, source, top in IMAGE.findall(text):
        copy_image(next(WORK.glob(source)), PAGE.parent / name, top)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
