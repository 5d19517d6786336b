"""Scores the shipped model on prompts that never occur in training, and the scorer on rendered ground truth.

python -m demo.score --check_scorer    the scorer on rendered ground truth, right and shuffled
python -m demo.score                   the shipped model on 400 prompts, a few residual settings
python -m demo.record                  writes demo/score.json for new weights, unless they are worse
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from demo.command_line import run
from sd3 import writing
from sd3.files import file_sha256
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures, residual_settings
from sd3.residual import ResidualConfig
from sd3.shapes.prompts import KINDS, SCENE_KINDS, Prompt, draw, held_out_prompts, scene_prompts
from sd3.shapes.scenes import SIZE, Scene, Thing
from sd3.shapes.scorer import ERRORS, Seen, interval, read_picture, score
from sd3.sheet import tile
from sd3_infer import SD3Inferencer

LABELLED = Path(__file__).parent / "labelled.json"  # a person's verdicts on the 96 x 96 images in labelled.png
SHUFFLED = "off, shuffled prompts"
RECORD = Path(__file__).parent / "score.json"  # how many images of each kind the shipped weights draw right
TUNED_ON = 200  # the scorer was tuned on these first images, and tried once on the others when it was finished


@dataclass(frozen=True)
class Labelled:
    """An image with a person's verdict: whether it shows its prompt."""

    prompt: Prompt
    right: bool
    image: np.ndarray

    def seen(self) -> list[Seen]:
        """The objects that the scorer detects."""
        return read_picture(self.image)


def labelled() -> list[Labelled]:
    """The 300 labelled images, made with several weights and settings. The labels came before the scorer's verdicts."""
    sheet = np.asarray(Image.open(LABELLED.with_suffix(".png")).convert("RGB"))
    columns = sheet.shape[1] // SIZE
    out = []
    for i, row in enumerate(json.loads(LABELLED.read_text(encoding="utf-8"))):
        values = row["prompt"]
        if scene := values.pop("scene", None):
            things = tuple(Thing(colour, shape, 0, 0, 0, small) for colour, shape, small in scene["things"])
            relations = tuple((a, name, b) for a, name, b in scene["relations"])
            values["scene"] = Scene(values["text"], "", things, "", relations=relations)
        values["wanted"] = tuple((colour, shape) for colour, shape in values.get("wanted", ()))
        y, x = i // columns * SIZE, i % columns * SIZE
        out.append(Labelled(Prompt(**values), row["right"], sheet[y : y + SIZE, x : x + SIZE]))
    return out


def table(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown table of the share of hits with Wilson's interval: a row per kind, a column per setting.

    The overall score is the mean over the images of the six kinds in `KINDS`; every kind has the same number of them.
    """
    lines = [
        "| kind | " + " | ".join(results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for kind in shown_kinds(prompts):
        cells = []
        for hits in results.values():
            own = of_kind(hits, prompts, kind)
            low, high = wilson(sum(own), len(own))
            cells.append(f"{np.mean(own):.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown_kinds(prompts: Sequence[Prompt]) -> list[str]:
    """The kinds of the prompts, with `overall` after the six in `KINDS` if all of them are there."""
    own = {p.kind for p in prompts}
    overall = ["overall"] if own.issuperset(KINDS) else []
    return [*(k for k in KINDS if k in own), *overall, *(k for k in SCENE_KINDS if k in own)]


def of_kind(values: Sequence, prompts: Sequence[Prompt], kind: str) -> list:
    """The values of the prompts of a kind; of all six kinds in `KINDS` if it is `overall`."""
    kinds = KINDS if kind == "overall" else (kind,)
    return [v for v, p in zip(values, prompts, strict=True) if p.kind in kinds]


def paired(results: dict[str, list[bool]], prompts: Sequence[Prompt]) -> str:
    """Markdown table with a row per setting: its gain over `off` with the same prompts and seeds, with the 95 %
    bootstrap interval of the paired differences, or without one where all are equal.
    """
    names = shown_kinds(prompts)
    lines = ["| setting minus off | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for setting, hits in results.items():
        if setting in ("off", SHUFFLED):
            continue
        gains = [float(a) - float(b) for a, b in zip(hits, results["off"], strict=True)]
        cells = []
        for kind in names:
            own = of_kind(gains, prompts, kind)
            low, high = interval(own)
            cells.append(f"{np.mean(own):+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if np.ptp(own) else ""))
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- what ships never gets worse -----------------------------------------------------------------


def by_kind(hits: Sequence[bool], prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """By kind: the number of right images, and of all."""
    own = {kind: of_kind(hits, prompts, kind) for kind in dict.fromkeys(p.kind for p in prompts)}
    return {kind: [int(sum(values)), len(values)] for kind, values in own.items()}


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval, which has a width at 0 and 1, too)."""
    share, n = right / count, count + z * z
    middle = (right + z * z / 2) / n
    half = z / n * (count * share * (1 - share) + z * z / 4) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def worse(new: dict[str, list[int]], old: dict[str, list[int]]) -> list[str]:
    """The kinds of `old` in which `new` is worse: its interval lies below the old one's."""
    return [kind for kind in old if wilson(*new.get(kind, (0, old[kind][1])))[1] < wilson(*old[kind])[0]]


def record(model: str = "models/demo/demo.safetensors") -> None:
    """Scores a model on the 400 prompts of seed 7 and writes its score to demo/score.json, unless it is worse in any
    kind than the best weights so far. Weights that ship need that file, see tests/test_demo.py.
    """
    prompts = [*held_out_prompts(), *scene_prompts()]
    engine = opened(model)
    seen = [read_picture(p) for p in sample(engine, prompts, "off", seed=1000, batch=40)]
    new = by_kind([score(p, s) for p, s in zip(prompts, seen, strict=True)], prompts)
    old = json.loads(RECORD.read_text(encoding="utf-8"))["best"] if RECORD.exists() else {}
    if kinds := worse(new, old):
        raise Mistake("model", model, f"is worse than earlier weights in {', '.join(kinds)}: {new}")
    best = {kind: max(score, old.get(kind, score)) for kind, score in new.items()}
    text = json.dumps({"sha256": file_sha256(Path(model)), "right": new, "best": best}, indent=1)
    writing.atomic_write(RECORD, lambda f: f.write(f"{text}\n".encode()))
    print(f"{RECORD}: {new}")


def check(per_kind: int = 40, seed: int = 3) -> dict[str, list[bool]]:
    """Scores rendered ground truth against its own prompts, against shuffled prompts, and with random relations."""
    rng = random.Random(seed)
    prompts = [*held_out_prompts(per_kind), *scene_prompts(per_kind)]
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
    for kind in dict.fromkeys(p.kind for p in prompts):
        own = [i for i, p in enumerate(prompts) if p.kind == kind]
        for i, j in zip(own, rng.sample(own, len(own)), strict=True):
            order[i] = j
    return [score(p, seen[order[i]]) for i, p in enumerate(prompts)]


def wrong_verdicts() -> str:
    """The scorer's error rate, to print above every table."""
    return f"scorer: {ERRORS[0]} of {ERRORS[1]} verdicts differ from a person's (demo/labelled.json)"


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


def opened(model: str) -> SD3Inferencer:
    """A model on the CPU, silent unless somebody watches."""
    engine = SD3Inferencer().load(model, device="cpu")
    engine.tell.quiet = not sys.stderr.isatty()
    return engine


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
    return images(engine.engine, pictures)


def images(engine, pictures: Sequence) -> list[np.ndarray]:
    """The images of planned pictures, uint8 (H, W, 3). Raises the Mistake of one that fails."""
    out = []
    for _, _, image in engine.make(pictures):
        if isinstance(image, Mistake):
            raise image
        out.append(np.asarray(image))
    return out


def main(
    check_scorer: bool = False,
    model: str = "models/demo/demo.safetensors",
    per_kind: int = 40,
    seed: int = 1000,
    batch: int = 40,
    settings: Sequence[str] = RESIDUAL_SETTINGS,
    save: str = "",
    rotations: str | None = None,
    prompt_seed: int | str = 7,
    against: str = "",
    kinds: Sequence[str] = (),
    **values,
) -> None:
    """Prints the table of scores with a column per setting (`off;0:3,5,7:each:0.1`, [MODE:]ORIGIN:TARGETS:WEIGHTS).
    If one setting is `off`, it also prints the differences to that.

    rotations: the rotation file of mode aligned; prompt_seed: which prompts are drawn, a number, or `file` for one that
    comes from the model file, so that nobody could choose it; save: a file for a sheet of the images of `off`; against:
    another model file, which gets a column too; kinds: only these (`counting;two relations`). `values` (steps, cfg,
    shift, sampler) replace the models' defaults.
    """
    if check_scorer:
        print(f"{wrong_verdicts()}\n{table(check(per_kind), [*held_out_prompts(per_kind), *scene_prompts(per_kind)])}")
        return
    seed_of_prompts = int(file_sha256(Path(model))[:8], 16) if prompt_seed == "file" else int(prompt_seed)
    prompts = [*held_out_prompts(per_kind, seed_of_prompts), *scene_prompts(per_kind, seed_of_prompts)]
    if kinds:
        wanted = kinds.split(";") if isinstance(kinds, str) else kinds
        if unknown := set(wanted) - {p.kind for p in prompts}:
            raise Mistake("kinds", ";".join(unknown), f"must be some of {', '.join((*KINDS, *SCENE_KINDS))}")
        prompts = [p for p in prompts if p.kind in wanted]
    engine = opened(model)
    results, columns = {}, settings.split(";") if isinstance(settings, str) else settings
    for setting in columns:
        pictures = sample(engine, prompts, setting, seed, batch, rotations, **values)
        seen = [read_picture(p) for p in pictures]
        results[setting] = [score(p, s) for p, s in zip(prompts, seen, strict=True)]
        if setting == "off":
            results[SHUFFLED] = shuffled(prompts, seen)
            if save:
                tile([Image.fromarray(p) for p in pictures], 20).save(save)
    if against:
        others = sample(opened(against), prompts, "off", seed, batch, **values)
        results[against] = [score(p, read_picture(o)) for p, o in zip(prompts, others, strict=True)]
    used = engine.engine.defaults | values
    used_values = ", ".join(f"{k} {used[k]}" for k in ("steps", "sampler", "cfg", "shift"))
    drawn = f"{len(prompts)} prompts (prompt_seed {seed_of_prompts})"
    print(f"{drawn}, seeds {seed} to {seed + len(prompts) - 1}, {used_values}, {engine.engine.dtype}")
    print(f"{wrong_verdicts()}\n{table(results, prompts)}")
    if "off" in results and len(results) > 2:
        print("\n" + paired(results, prompts))


if __name__ == "__main__":
    run(main, "demo.score")
