"""Makes the images of a sweep, batch by batch, with one load per engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd3 import png
from sd3.engine import load_for
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake, flag_name
from sd3.pixels import open_images
from sd3.prompt_tokens import Key
from sd3.record import Picture
from sd3.run import Provenance, make_pictures
from sd3.settings import FILE_SETTINGS, Flags, Settings
from sd3.sweep.plan import Batch, Plan
from sd3.telling import Terminal
from sd3.text import Text, in_groups
from sd3.unchanged import Changed

TEXTS_AT_ONCE = 1024  # encoded prompts kept in memory: every variant uses each of them
Result = bytes | str  # a PNG file, or why the image failed


class Maker:
    """An engine that makes batches of a sweep. `events`: events to log."""

    def __init__(self, flags: Flags, quiet: bool = False):
        """Reads headers only, and prints no notes about them: planning has printed them. Raises as `Engine` does."""
        self.engine = load_for(flags, Terminal(flag_name, quiet=True))
        self.engine.tell.quiet = quiet
        self.engine.text.most = TEXTS_AT_ONCE
        self.events: list[dict[str, Any]] = []
        self._provenance: dict[tuple, Provenance] = {}

    def texts(self, batch: Batch) -> list[Key]:
        """The texts of a batch, each with its length in tokens."""
        return [t for p in batch.pictures for t in self.engine.texts(p.settings)]

    def encode(self, pictures: Sequence[Settings]) -> None:
        """Encodes every distinct text of these images once; the cache may drop others."""
        texts = list(dict.fromkeys(t for s in pictures for t in self.engine.texts(s)))
        start = time.perf_counter()
        self.engine.encode(texts)
        self.events.append(
            {
                "event": "encode",
                "texts": len({key.prompt for key in texts}),
                "prompts": sorted({key.prompt for key in texts}),
                "seconds": round(time.perf_counter() - start, 3),
            }
        )

    def encoded_texts(self, pictures: Sequence[Settings]) -> dict[Key, Text]:
        """Encodes the texts of these images; returns them on the CPU."""
        texts = {t for s in pictures for t in self.engine.texts(s)}
        self.engine.encode(list(texts))
        return {t: tuple(part.cpu() for part in self.engine.text.get(t)) for t in texts}

    def add_texts(self, texts: Mapping[Key, Text]) -> None:
        """Adds texts that another worker encoded."""
        self.engine.text.add(texts)

    def load(self) -> None:
        """Loads the weights on first use."""
        if not self.engine.network.loaded:
            start = time.perf_counter()
            self.engine.load()
            model = str(self.engine.model_file.path.name)
            self.events.append({"event": "load", "model": model, "seconds": round(time.perf_counter() - start, 3)})

    def make(self, batch: Sequence[Settings]) -> list[Result]:
        """Makes a batch, padded to its batch_size. Returns a PNG file per image, or why it failed.

        Raises `Changed` if a file has changed since it was opened.
        """
        self.load()
        self.engine.tell.quiet = True
        provenance = self.provenance(batch[0])
        try:
            making = self.engine.make_batch(batch, open_images(batch[:1]), pad_batch=True)
            numbered = ((number, *made) for number, made in enumerate(making))
            return [result for _, result in make_pictures(numbered, provenance, encode_result)]
        except Changed:
            raise
        except Exception as error:  # other batches may still succeed
            provenance.wait()  # raises Changed if that is why
            why = one_line(error, 500)
            if not isinstance(error, OutOfMemory):
                kind = "out of memory" if out_of_memory(error) else type(error).__name__
                why = f"{kind}: {why}"
            return [why] * len(batch)

    def provenance(self, settings: Settings) -> Provenance:
        """Metadata about files and device; each file is hashed once."""
        key = tuple(getattr(settings, name) for name in FILE_SETTINGS)
        if key not in self._provenance:
            self._provenance[key] = Provenance(self.engine, settings)
        return self._provenance[key]

    def hashes(self) -> dict[str, str]:
        """sha256 by path, of the files hashed so far."""
        out = {}
        for provenance in self._provenance.values():
            out |= provenance.hashes()
        return out

    def take_events(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events


def encode_result(picture: Picture) -> Result:
    """An image of a batch as a PNG file, or why it failed."""
    if isinstance(picture.image, Mistake):
        return one_line(picture.image, 500)
    return png.encode_picture(picture.image, picture.settings, picture.record)


@dataclass(frozen=True)
class BatchResult:
    """The results of a batch, in order, with seconds, events to log and sha256 by path of the files hashed so far."""

    batch: Batch
    results: Sequence[Result]
    seconds: float
    events: Sequence[Mapping[str, Any]] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)


def make_here(plan: Plan, batches: Sequence[Batch], begin: Callable[[Batch], None]) -> Iterator[BatchResult]:
    """Makes batches in this process, engine by engine. begin: called with each batch before it is made."""
    for number, group in itertools.groupby(batches, lambda b: b.engine):
        maker = None  # frees the last engine before the next loads
        maker = Maker(plan.engines[number])
        for part in in_groups(group, maker.texts, maker.engine.text.most, maker.engine.text.cost):
            maker.encode([p.settings for b in part for p in b.pictures])
            maker.load()
            for batch in part:
                start = time.perf_counter()
                begin(batch)
                results = maker.make([p.settings for p in batch.pictures])
                yield BatchResult(batch, results, time.perf_counter() - start, maker.take_events(), maker.hashes())
