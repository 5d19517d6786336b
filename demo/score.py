"""Scores the shipped model on prompts that never occur in training, and the scorer on rendered ground truth.

python -m demo.score --check_scorer        the scorer on rendered ground truth, right and shuffled
python -m demo.score                the shipped model on 240 prompts, a few residual settings
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from demo.command_line import run
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures, residual_settings
from sd3.residual import ResidualConfig
from sd3.shapes.prompts import KINDS, Prompt, draw, held_out_prompts
from sd3.shapes.scorer import Seen, interval, read_picture, score
from sd3.sheet import tile
from sd3_infer import SD3Inferencer


def table(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown table of the share of hits with its bootstrap interval: a row per kind and one for all, a column per
    setting.

    The overall score is the mean over images; every kind has the same number of them.
    """
    lines = [
        "| kind | " + " | ".join(results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for kind in (*KINDS, "overall"):
        cells = []
        for hits in results.values():
            own = [h for h, p in zip(hits, prompts, strict=True) if kind in (p.kind, "overall")]
            low, high = interval(own)
            cells.append(f"{np.mean(own):.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown table with a row per setting: its gain over `off` with the same prompts and seeds, with bootstrap
    intervals of the paired differences.
    """
    names = ("overall", *KINDS)
    lines = ["| setting less off | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for setting, hits in results.items():
        if setting.startswith("off"):
            continue
        gains = [float(a) - float(b) for a, b in zip(hits, results["off"], strict=True)]
        cells = []
        for kind in names:
            own = [g for g, p in zip(gains, prompts, strict=True) if kind in (p.kind, "overall")]
            low, high = interval(own)
            cells.append(f"{np.mean(own):+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(per_kind: int = 40, seed: int = 3) -> dict[str, list[bool]]:
    """Scores rendered ground truth against its own prompts, against shuffled prompts, and with random relations."""
    rng = random.Random(seed)
    prompts = held_out_prompts(per_kind)
    seen = [read_picture(draw(p, rng)) for p in prompts]
    return {
        "ground truth": [score(p, s) for p, s in zip(prompts, seen, strict=True)],
        "shuffled": shuffled(prompts, seen),
        "placed at random": [score(p, read_picture(draw(replace(p, relation=""), rng))) for p in prompts],
    }


def shuffled(prompts: Sequence[Prompt], seen: Sequence[list[Seen]], seed: int = 5) -> list[bool]:
    """Scores images against the prompts of other images of the same kind."""
    rng = random.Random(seed)
    order = list(range(len(prompts)))
    for kind in KINDS:
        own = [i for i, p in enumerate(prompts) if p.kind == kind]
        for i, j in zip(own, rng.sample(own, len(own)), strict=True):
            order[i] = j
    return [score(p, seen[order[i]]) for i, p in enumerate(prompts)]


RESIDUAL_SETTINGS = ("off", "0:3,5,7:each:0.1", "0:3,5,7:each:0.3", "0:3,5,7:0.8,0.6,0.4", "1:2,3,4,5,6,7:each:0.1")


def residual_of(setting: str, rotations: str | None = None):
    """The configuration for `off` or `[MODE:]ORIGIN:TARGETS:WEIGHTS`. Raises Mistake for any other text."""
    if setting == "off":
        return ResidualConfig()
    mode, rest = setting.split(":", 1) if setting[:1].isalpha() and ":" in setting else ("add", setting)
    fields = rest.split(":", 2)  # at most 2 splits: weights may contain colons (each:0.1, linear:0.8:0.2)
    if len(fields) != 3:
        raise Mistake("settings", setting, "must be off or [MODE:]ORIGIN:TARGETS:WEIGHTS")
    return ResidualConfig.parse(*fields, mode=mode, rotations=rotations if mode == "aligned" else None)


def sample(
    engine, prompts: Sequence[Prompt], setting: str, seed: int, batch: int, rotations: str | None = None, **values
) -> list[np.ndarray]:
    """One image per prompt, with seeds counted up from `seed`; setting: `off` or `[MODE:]ORIGIN:TARGETS:WEIGHTS`."""
    pictures = plan_pictures(
        engine.engine,
        [p.text for p in prompts],
        [seed + i for i in range(len(prompts))],
        batch_size=batch,
        **(engine.engine.defaults | values | residual_settings(residual_of(setting, rotations))),
    ).pictures
    return [np.asarray(image) for _, _, image in engine.engine.make(pictures)]


def main(
    check_scorer: bool = False,
    model: str = "models/demo/demo.safetensors",
    per_kind: int = 40,
    seed: int = 1000,
    batch: int = 40,
    settings: Sequence[str] = RESIDUAL_SETTINGS,
    save: str = "",
    rotations: str | None = None,
    **values,
) -> None:
    """Prints the table of scores with a column per setting (`off;0:3,5,7:each:0.1`, [MODE:]ORIGIN:TARGETS:WEIGHTS).
    If one setting is `off`, it also prints the differences to that.

    rotations: the rotation file of mode aligned. `values` (steps, cfg, shift, sampler) replace the model's defaults.
    """
    prompts = held_out_prompts(per_kind)
    if check_scorer:
        print(table(check(per_kind), prompts))
        return
    engine = SD3Inferencer().load(model, device="cpu")
    engine.tell.quiet = not sys.stderr.isatty()
    results, columns = {}, settings.split(";") if isinstance(settings, str) else settings
    for setting in columns:
        pictures = sample(engine, prompts, setting, seed, batch, rotations, **values)
        seen = [read_picture(p) for p in pictures]
        results[setting] = [score(p, s) for p, s in zip(prompts, seen, strict=True)]
        if setting == "off":
            results["off, shuffled prompts"] = shuffled(prompts, seen)
            if save:
                tile([Image.fromarray(p) for p in pictures], 20).save(save)
    used = engine.engine.defaults | values
    used_values = ", ".join(f"{k} {used[k]}" for k in ("steps", "sampler", "cfg", "shift"))
    print(f"{len(prompts)} prompts, seeds {seed} to {seed + len(prompts) - 1}, {used_values}, {engine.engine.dtype}")
    print(table(results, prompts))
    if "off" in results and len(columns) > 1:
        print("\n" + paired(results, prompts))


if __name__ == "__main__":
    run(main, "demo.score")
