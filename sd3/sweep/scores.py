"""Scores of finished images, and their means per variant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sd3.device import choose_device
from sd3.mistakes import Missing, Mistake, verbatim
from sd3.shapes.prompts import KINDS, SCENE_KINDS, Prompt, held_out_prompts, read_caption
from sd3.shapes.scorer import ERRORS, interval, read_picture, score
from sd3.sweep.grid import Grid
from sd3.sweep.plan import Plan

Scorer = Callable[[Image.Image, str], dict[str, float]]  # image and prompt -> scores by kind
OVERALL = "overall"
LEAST_UNITS = 5  # resampled prompts or images; of fewer, the bootstrap's intervals say nothing
LEAST_PAIRS = 10  # images with a baseline; below, the bootstrap's intervals are too narrow to mark a best row
DESCRIPTIONS = {  # what the report says about each scorer
    "demo": f"share of images that match their prompts; {ERRORS[0]} of {ERRORS[1]} verdicts on labelled "
    "images were wrong",
    "clip": "100 × the cosine of image and prompt, CLIP",
}


@dataclass(frozen=True)
class Row:
    """Mean score of a variant with its 95 % interval; gain: mean difference to the baseline on the same prompts and
    seeds, with its interval, None for a baseline; pairs: images with such a baseline. Intervals of fewer than
    `LEAST_UNITS` prompts (or images of one prompt), and of equal values, are None.
    """

    variant: int
    kind: str
    count: int
    mean: float
    low: float | None
    high: float | None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    pairs: int = 0


def demo_scorer(grid: Grid, per_kind: int | None = None) -> Scorer:
    """Scores images of coloured shapes. per_kind: the prompts are `held_out_texts`, which come with their kinds; else
    kinds are parsed from the texts. Raises Mistake for a prompt that does not describe such a scene.
    """
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError:
        raise Mistake("score", "demo", "needs scipy; get it with: pip install -r requirements-demo.txt") from None
    wanted: dict[str, list[Prompt]] = {}
    if per_kind is not None:
        for prompt in held_out_prompts(per_kind):
            if prompt not in wanted.setdefault(prompt.text, []):
                wanted[prompt.text].append(prompt)
    else:
        wanted = {text: read_caption(text) for text in grid.prompts}

    def scorer(image: Image.Image, text: str) -> dict[str, float]:
        seen = read_picture(np.asarray(image.convert("RGB")))
        return {p.kind: float(score(p, seen)) for p in wanted[text]}

    return scorer


def clip_scorer(model: str | None, device: str = "auto") -> Scorer:
    """100 times the cosine of the embeddings of image and prompt, at least 0 (CLIPScore, arXiv 2104.08718, without its
    factor 2.5), by a CLIP model in a local folder, as transformers saves it.

    Raises Mistake if transformers or the model is missing.
    """
    if model is None:
        raise Mistake("score", "clip", "needs `clip_model` FOLDER, such as a clone of openai/clip-vit-large-patch14")
    if not os.path.isdir(model):
        raise Missing("clip_model", model, "no such folder")
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
    except ImportError:
        raise Mistake("score", "clip", "needs transformers; get it with: pip install transformers") from None
    try:
        network = CLIPModel.from_pretrained(model, local_files_only=True, use_safetensors=True).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(model, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise Mistake(
            "clip_model", model, f"cannot be loaded ({verbatim(' '.join(str(error).split())[:300])})"
        ) from None
    place = choose_device(device)
    network = network.to(place)
    texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def scorer(image: Image.Image, text: str) -> dict[str, float]:
        if text not in texts:
            tokens = tokenizer([text], truncation=True, return_tensors="pt").to(place)
            texts[text] = embedding(network.get_text_features(**tokens))
        inputs = processor(images=[image.convert("RGB")], return_tensors="pt").to(place)
        picture = embedding(network.get_image_features(**inputs))
        return {"clip": max(0.0, 100 * torch.nn.functional.cosine_similarity(picture, texts[text]).item())}

    def embedding(output) -> torch.Tensor:
        """(1, D); transformers 5 wraps it, transformers 4 does not."""
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    return scorer


def summarise(plan: Plan, scores: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row per variant and kind, and one over all kinds (the mean over images, of each the mean over its kinds).

    scores: by image, then by kind. The bootstrap resamples prompts, each with all its seeds; with one prompt it
    resamples images. A gain is over the images whose baseline is scored too.
    """
    kinds = [k for k in (*KINDS, *SCENE_KINDS) if any(k in s for s in scores.values())]
    kinds += sorted({k for s in scores.values() for k in s} - set(kinds))
    rows = []
    for number in range(len(plan.variants)):
        for kind in ([OVERALL] if len(kinds) > 1 else []) + kinds:
            if values := list(_values(plan, scores, number, kind)):
                mean, low, high = spread([(prompt, value) for prompt, value, _ in values])
                gains = [(prompt, gain) for prompt, _, gain in values if gain is not None]
                gain = spread(gains) if gains else (None, None, None)
                rows.append(Row(number, kind, len(values), mean, low, high, *gain, _pairs(plan, scores, number, kind)))
    return rows


def _values(
    plan: Plan, scores: Mapping[str, Mapping[str, float]], variant: int, kind: str
) -> Iterator[tuple[int, float, float | None]]:
    """(prompt, score, gain over the baseline) of each scored image of a variant, of one kind or of all."""
    for picture in plan.of(variant):
        own = scores.get(picture.id, {})
        baseline = scores.get(plan.baseline(picture).id, {}) if plan.baselines[variant] != variant else {}
        kinds = list(own) if kind == OVERALL else [kind] if kind in own else []
        if kinds:
            both = [k for k in kinds if k in baseline]
            gain = float(np.mean([own[k] - baseline[k] for k in both])) if both else None
            yield picture.prompt, float(np.mean([own[k] for k in kinds])), gain


def _pairs(plan: Plan, scores: Mapping[str, Mapping[str, float]], variant: int, kind: str) -> int:
    """Number of images of a variant with a score of a kind (or any) that their baseline has too."""
    if plan.baselines[variant] == variant:
        return 0
    both = [scores.get(p.id, {}).keys() & scores.get(plan.baseline(p).id, {}).keys() for p in plan.of(variant)]
    return sum(kind in kinds or (kind == OVERALL and bool(kinds)) for kinds in both)


def spread(values: Sequence[tuple[int, float]]) -> tuple[float, float | None, float | None]:
    """Mean of (prompt, value) and its 95 % bootstrap interval. Prompts are resampled with all their values, or the
    values if there is one prompt; of fewer than `LEAST_UNITS`, or of equal values, the interval is None and None.
    """
    groups: dict[int, list[float]] = {}
    for prompt, value in values:
        groups.setdefault(prompt, []).append(value)
    units = [float(np.mean(g)) for g in groups.values()] if len(groups) > 1 else [v for _, v in values]
    enough = len(units) >= LEAST_UNITS and np.ptp(units) > 1e-9  # else it has no width
    low, high = interval(units) if enough else (None, None)
    return float(np.mean(units)), low, high


def best(plan: Plan, rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(variant, kind) of the highest mean of each kind, if its interval lies above its baseline's, and at least
    `LEAST_PAIRS` images are compared.
    """
    out = []
    for kind in dict.fromkeys(r.kind for r in rows):
        of_kind = {r.variant: r for r in rows if r.kind == kind}
        top = max(of_kind.values(), key=lambda r: r.mean)
        baseline = of_kind.get(plan.baselines[top.variant])
        if baseline is None or top.low is None or baseline.high is None:
            continue
        if top.low > baseline.high and top.pairs >= LEAST_PAIRS:
            out.append((top.variant, kind))
    return out


def table(plan: Plan, rows: Sequence[Row], words: Sequence[str]) -> str:
    """Markdown: a row per variant, with mean, gain over its baseline and their intervals.

    words: every variant in words, as the report names it.
    """
    kinds = list(dict.fromkeys(r.kind for r in rows))
    lines = ["| variant | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for number, variant in enumerate(plan.variants):
        cells = {r.kind: r for r in rows if r.variant == number}
        name = words[number] if variant.name in words[number] else f"{words[number]} ({variant.name})"
        shown = [_cell(cells[kind]) if kind in cells else "" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    if any(r.low is None or (r.gain is not None and r.gain_low is None) for r in rows):
        few = f"fewer than {LEAST_UNITS} prompts (or images of one prompt), or all values are equal"
        lines += ["", f"Where no interval is shown, there are {few}."]
    return "\n".join(lines)


def _cell(r: Row) -> str:
    """`0.75 (0.60 to 0.88); +0.05 (-0.02 to +0.11)`."""
    text = f"{r.mean:.2f}" + (f" ({r.low:.2f} to {r.high:.2f})" if r.low is not None else "")
    if r.gain is not None:
        text += f"; {r.gain:+.2f}" + (f" ({r.gain_low:+.2f} to {r.gain_high:+.2f})" if r.gain_low is not None else "")
    return text
