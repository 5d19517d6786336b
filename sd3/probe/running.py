"""Samples prompts with a hook that receives the text tokens entering each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmditx import ModelCall, Stream
from sd3.engine import Engine, load_for
from sd3.flags import names
from sd3.mistakes import Mistake
from sd3.planning import batches, plan_pictures, resolve
from sd3.prompts import read_jsonl, read_prompts
from sd3.readers import read_path
from sd3.settings import Flags
from sd3.telling import progress

GROUP = 64  # prompts whose encoded text is in memory at the same time


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt, and labels that a linear probe should predict from its tokens."""

    prompt: str
    labels: Mapping[str, str] = field(default_factory=dict)


def read_labelled(path: str, flag: str = "prompts") -> list[LabelledPrompt]:
    """The distinct prompts of a .txt or .jsonl file. Raises Mistake with the number of the line."""
    path = read_path(flag, path)
    if not path.lower().endswith(".jsonl"):
        if not path.lower().endswith(".txt"):
            raise Mistake(flag, path, "must be a .txt or .jsonl file")
        return [LabelledPrompt(p) for p in dict.fromkeys(read_prompts(path, flag)[0])]
    form = '{"prompt": "...", "labels": {"shape": "star"}}'
    out: dict[str, LabelledPrompt] = {}
    for row in read_jsonl(flag, path, _is_labelled, form):
        labels = {str(k): str(v) for k, v in (row.get("labels") or {}).items() if v is not None}
        out.setdefault(row["prompt"], LabelledPrompt(row["prompt"], labels))
    return list(out.values())


def _is_labelled(row: dict[str, Any]) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row.get("labels") or {}, dict)


def load(flags: Mapping[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """The engine for these flags, and the settings that all its images share."""
    read = Flags(**{name: flags[name] for name in names(also="probe") if name in flags})
    engine = load_for(read)
    values, _ = resolve(read, engine.model_file.metadata)
    return engine, {name: value for name, value in read.for_image().items() if value is not None} | values


class Collector(Stream):
    """A stream that changes nothing and passes on the tokens of the conditional pass, without padding."""

    def __init__(
        self,
        masks: Sequence[Tensor],
        wanted: Callable[[ModelCall], bool],
        layers: Sequence[int],
        use: Callable[[ModelCall, dict[int, list[Tensor]]], None],
    ):
        """masks: (T,) of each image, true for tokens that are not padding; wanted: whether a model call counts;
        layers: blocks whose incoming tokens are passed to use(call, {layer: one (n, D) float32 per image}) once a step.
        """
        self.masks, self.wanted, self.use = masks, wanted, use
        self.layers = frozenset(layers)
        self.at: ModelCall | None = None
        self.states: dict[int, list[Tensor]] = {}  # of the last call, until they are passed on

    def begin(self, at: ModelCall) -> bool:
        """Prepares for a model call; False for skip-layer calls and unwanted steps. Of several calls at one step, which
        some samplers make, the last one counts.
        """
        if at.skip_layers or not self.wanted(at):
            return False
        if self.at is not None and self.at.step != at.step:
            self.finish()
        self.at, self.states = at, {}
        return True

    def finish(self) -> None:
        """Passes on the tokens of the last call; call it once more after the run."""
        if self.states:
            self.use(self.at, self.states)
        self.states = {}

    def mix(self, i: int, context: Tensor) -> Tensor:
        """context: (B, T, D), the tokens entering block i; returned unchanged."""
        if i in self.layers:
            rows = context[self.at.cond]
            masks = [m.to(rows.device) for m in self.masks]
            self.states[i] = [row[mask].float() for row, mask in zip(rows, masks, strict=True)]
        return context


def run_prompts(
    engine: Engine,
    jobs: Sequence[tuple[int, str, int]],
    values: Mapping[str, Any],
    collect: Callable[[Sequence[int], Sequence[Tensor]], Collector],
    what: str,
    done: Callable[[int], None] = lambda count: None,
    before: int = 0,
) -> None:
    """Samples every (number, prompt, seed) in order, with the stream that `collect(numbers, masks)` returns per batch.

    Calls `done(count)` after each batch. Encodes the text of `GROUP` prompts at a time, then drops it. before: jobs
    that an earlier run finished; the batches are the same as in one uninterrupted run.
    """
    with progress(len(jobs), what, "prompt", done=before, quiet=engine.tell.quiet, leave=True) as update:
        count = before
        for start in range(before - before % GROUP, len(jobs), GROUP):
            group = jobs[max(start, before) : start + GROUP]
            plan = plan_pictures(engine, [p for _, p, _ in group], [seed for _, _, seed in group], **values).pictures
            engine.encode([text for s in plan for text in engine.texts(s)])
            for batch in batches(plan, engine.text.shape):
                places, settings = zip(*batch, strict=True)
                masks = [engine.text.kinds(engine.text.keys(s)[0]).words[0] for s in settings]
                collector = collect([group[place][0] for place in places], masks)
                engine.sample(settings, what=what, streams=[collector])
                collector.finish()
                engine.files.check()  # raises if a file changed since it was opened
                count += len(batch)
                update(len(batch))
                done(count)
            engine.text.forget()
