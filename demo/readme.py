"""Counts how often the README's first command draws what it says, with and without its residual flags.

python -m demo.readme    seeds 1 to 20
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from demo.command_line import run
from demo.score import images, opened, wrong_verdicts
from sd3.command import read_arguments
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures
from sd3.shapes.prompts import read_caption
from sd3.shapes.scorer import read_picture, score

ROOT = Path(__file__).parent.parent
LAUNCHER = "./run_inference.sh demo "


def first_command() -> dict[str, str]:
    """The flags of the README's first command, and its prompt."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(rf"^{re.escape(LAUNCHER)}.*$", text, re.MULTILINE)
    if command is None:
        raise Mistake("README.md", "", f"has no line that begins with {LAUNCHER}")
    return read_arguments(shlex.split(command[0].removeprefix(LAUNCHER)))


def main(seeds: int = 20, model: str = "models/demo/demo.safetensors") -> None:
    """Prints how many images of the seeds 1 to `seeds` match the prompt."""
    flags = first_command()
    prompt = flags.pop("prompt")
    residual = {name: value for name, value in flags.items() if name.startswith("residual_")}
    others = {name: value for name, value in flags.items() if name not in residual and name != "seed"}
    engine = opened(model).engine
    print(f"{prompt!r}, seeds 1 to {seeds}; {wrong_verdicts()}")
    for name, settings in (("without residual flags", {}), (" ".join(residual.values()) or "with none", residual)):
        plan = plan_pictures(engine, prompt, range(1, seeds + 1), **(engine.defaults | others | settings))
        seen = [read_picture(image) for image in images(engine, plan.pictures)]
        wrong = [i for i, s in enumerate(seen, 1) if not all(score(p, s) for p in read_caption(prompt))]
        print(
            f"{name}: {seeds - len(wrong)} right" + (f", wrong with seed {', '.join(map(str, wrong))}" if wrong else "")
        )


if __name__ == "__main__":
    run(main, "demo.readme")
