"""What makes the pictures of a sweep: one engine, loaded once, batch after batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd3 import png
from sd3.engine import load_for
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake
from sd3.pixels import open_images
from sd3.record import Picture
from sd3.run import MadeWith, make_pictures
from sd3.settings import FILE_SETTINGS, Flags, Settings
from sd3.sweep.plan import Batch, Plan
from sd3.text import Key, Text, in_groups
from sd3.unchanged import Changed

TEXTS_AT_ONCE = 1024  # encoded prompts kept in memory; every variant of a sweep needs each of them again
Result = bytes | str  # a finished PNG, or why there is none


class Maker:
    """An engine with what a sweep needs around it. `events`: what is to be logged."""

    def __init__(self, flags: Flags, quiet: bool = False):
        """Reads headers only; raises as `Engine.open` does."""
        self.engine = load_for(flags)
        self.engine.tell.quiet = quiet
        self.engine.text.most = TEXTS_AT_ONCE
        self.events: list[dict[str, Any]] = []
        self._made_with: dict[tuple, MadeWith] = {}

    def texts(self, batch: Batch) -> list[Key]:
        """The texts of a batch's pictures with the length they are encoded in."""
        return [t for p in batch.pictures for t in self.engine.texts(p.settings)]

    def encode(self, pictures: Sequence[Settings]) -> None:
        """Encodes every distinct text of these pictures, each once; drops others where there are many."""
        texts = list(dict.fromkeys(t for s in pictures for t in self.engine.texts(s)))
        start = time.perf_counter()
        self.engine.encode(texts)
        self.events.append(
            {
                "event": "encode",
                "texts": len({prompt for prompt, _ in texts}),
                "prompts": sorted({prompt for prompt, _ in texts}),
                "seconds": round(time.perf_counter() - start, 3),
            }
        )

    def encoded(self, pictures: Sequence[Settings]) -> dict[Key, Text]:
        """The encoded texts of these pictures, on the CPU."""
        texts = {t for s in pictures for t in self.engine.texts(s)}
        self.engine.encode(list(texts))
        return {t: tuple(part.cpu() for part in self.engine.text.get_cond(*t)) for t in texts}

    def add_texts(self, texts: Mapping[Key, Text]) -> None:
        """Takes texts that were encoded elsewhere."""
        self.engine.text.add(texts)

    def load(self) -> None:
        """Loads the weights on first use."""
        if not self.engine.network.loaded:
            start = time.perf_counter()
            self.engine.load()
            model = str(self.engine.model_file.path.name)
            self.events.append({"event": "load", "model": model, "seconds": round(time.perf_counter() - start, 3)})

    def make(self, batch: Sequence[Settings]) -> list[Result]:
        """The pictures of a batch, filled up to its batch_size; where that failed, why.

        Raises `Changed` where a file that the pictures come from is not what it was when it was opened.
        """
        self.load()
        self.engine.tell.quiet = True
        made_with = self.made_with(batch[0])
        try:
            making = self.engine.make_batch(batch, open_images(batch[:1]), pad_batch=True)
            numbered = ((number, *made) for number, made in enumerate(making))
            return [result for _, result in make_pictures(numbered, made_with, encode_result)]
        except Changed:
            raise
        except Exception as error:  # the other batches may do well
            made_with.wait()  # unless the files changed
            why = one_line(error, 500)
            if not isinstance(error, OutOfMemory):
                kind = "out of memory" if out_of_memory(error) else type(error).__name__
                why = f"{kind}: {why}"
            return [why] * len(batch)

    def made_with(self, settings: Settings) -> MadeWith:
        """The record of files and device; files are read once."""
        key = tuple(getattr(settings, name) for name in FILE_SETTINGS)
        if key not in self._made_with:
            self._made_with[key] = MadeWith(self.engine, settings)
        return self._made_with[key]

    def hashes(self) -> dict[str, str]:
        """sha256 by path of the files that were hashed so far."""
        out = {}
        for key, made_with in self._made_with.items():
            paths = dict(zip(FILE_SETTINGS, key, strict=True))
            out |= {paths[name]: value for name, value in made_with.hashes().items()}
        return out

    def take_events(self) -> list[dict[str, Any]]:
        """The events since the last time."""
        events, self.events = self.events, []
        return events


def encode_result(picture: Picture) -> Result:
    """A picture of a batch as a PNG, or why there is none."""
    if isinstance(picture.image, Mistake):
        return one_line(picture.image, 500)
    return png.encode_picture(picture.image, picture.settings, picture.record)


@dataclass(frozen=True)
class Done:
    """A batch with its results, the seconds it took, events to log and the hashes of files known by then."""

    batch: Batch
    results: Sequence[Result]
    seconds: float
    events: Sequence[Mapping[str, Any]] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)


def make_here(plan: Plan, batches: Sequence[Batch], begin: Callable[[Batch], None]) -> Iterator[Done]:
    """Makes batches in this process, one engine after the other. begin: called with each batch first."""
    for number, group in itertools.groupby(batches, lambda b: b.engine):
        maker = None  # the former engine's memory goes first
        maker = Maker(plan.engines[number])
        for part in in_groups(group, maker.texts, maker.engine.text.most):
            maker.encode([p.settings for b in part for p in b.pictures])
            maker.load()
            for batch in part:
                start = time.perf_counter()
                begin(batch)
                results = maker.make([p.settings for p in batch.pictures])
                yield Done(batch, results, time.perf_counter() - start, maker.take_events(), maker.hashes())
