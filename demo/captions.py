"""Writes captions of coloured-shape scenes with labels, in the format that `sd3_probe.py` reads.

python -m demo.captions --count 400 --out captions.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from demo.command_line import run
from sd3.shapes.scenes import ALL_COMBINATIONS, HELD_OUT, SEEN, Scene, sample_scene, training_scene

MORE_KINDS = ("three", "relations")  # of `training_scene`: three objects, without relations or with two
SETS = {"seen": SEEN, "held_out": tuple(sorted(HELD_OUT)), "all": ALL_COMBINATIONS}


def labels(scene: Scene) -> dict[str, str]:
    """Labels of a scene: shape and colour of the first object, and, if the caption states them, relation and number."""
    first = scene.things[0]
    out = {"shape": first.shape, "colour": first.colour}
    if scene.kind == "relation":
        out["relation"] = scene.relation
    if scene.kind == "count":
        out["count"] = str(len(scene.things))
    return out


def captions(count: int, combinations: str = "seen", seed: int = 0, kind: str | None = None) -> list[dict]:
    """`count` distinct captions with their labels.

    combinations: shape-colour combinations to use: seen (in training), held_out or all; kind: single, pair, count,
    relation (None: any of these), three or relations. Raises ValueError for other values, and if there are fewer
    captions than `count`.
    """
    if combinations not in SETS:
        raise ValueError(f"--combinations {combinations}: must be {', '.join(SETS)}")
    if kind not in (None, "single", "pair", "count", "relation", *MORE_KINDS):
        raise ValueError(f"--kind {kind}: must be single, pair, count, relation, {' or '.join(MORE_KINDS)}")
    rng = random.Random(seed)
    out: dict[str, dict] = {}
    for _ in range(200 * count):
        if kind in MORE_KINDS:
            scene = training_scene(rng, kind, SETS[combinations], short=True, sized=False)
        else:
            scene = sample_scene(rng, kind, SETS[combinations])
        out.setdefault(scene.caption, {"prompt": scene.caption, "labels": labels(scene)})
        if len(out) == count:
            return list(out.values())
    raise ValueError(f"--count {count}: there are only about {len(out)} such captions")


def main(
    count: int = 400, out: str = "captions.jsonl", combinations: str = "seen", seed: int = 0, kind: str | None = None
) -> None:
    """Writes a .jsonl file of captions."""
    try:
        rows = captions(count, combinations, seed, kind)
    except ValueError as error:
        sys.exit(f"error: {error}")
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} captions")


if __name__ == "__main__":
    run(main, "demo.captions")
