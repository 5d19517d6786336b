"""Token ids of captions, exactly as in inference, and batches of equal text length."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from demo.data import FACTS, NUMBERS, SIDES
from demo.tokenizers import clip_files, t5_file
from other_impls import T5Tokenizer
from sd3.shapes.scenes import LONGEST, all_words
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer

POSITIONS = 20  # CLIP tokens with start and end (the real models have 77); longer captions are cut
PARTS = {"sides": (0, len(SIDES)), "numbers": (len(SIDES), len(SIDES) + len(NUMBERS))}  # ranges in `FACTS`


class Captions:
    """Makes token ids of captions. Writes the tokenizers if the folder has none."""

    def __init__(self, folder: Path):
        if not (folder / "tokenizer_3" / "tokenizer.json").exists():
            clip_files(all_words(), folder / "tokenizer", POSITIONS)
            t5_file(all_words(), folder / "tokenizer_3")
        config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.positions = config["model_max_length"]
        self._clip, self._t5 = open_clip_tokenizer(folder / "tokenizer"), open_t5_tokenizer(folder / "tokenizer_3")
        self.clip_vocabulary = self._clip.tokenizer.get_vocab_size()
        self.t5_vocabulary = json.loads((folder / "tokenizer_3" / "tokenizer.json").read_text(encoding="utf-8"))
        self.t5_vocabulary = len(self.t5_vocabulary["model"]["vocab"])
        self._words: dict[str, tuple[list[int], list[int]]] = {}

    def _ids(self, word: str) -> tuple[list[int], list[int]]:
        if word not in self._words:
            clip = self._clip.tokenizer.encode(word, add_special_tokens=False).ids
            self._words[word] = clip, self._t5.tokenize(word, 0).ids[:-1]
        return self._words[word]

    def tokens(self, caption: str) -> tuple[list[int], list[int]]:
        """CLIP's ids with start and end token, cut but not padded, and T5's ids with its end token."""
        clip, t5, cut = [self._clip.start], [], False
        for word in caption.split():
            c, t = self._ids(word)
            t5 += t
            cut = cut or len(clip) + len(c) > self.positions - 1
            clip += [] if cut else c
        return [*clip, self._clip.end], [*t5, T5Tokenizer.end]

    def ids(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids (B, positions) for `l` (padded with the end token) and `g` (padded with 0), and ids (B, L) for `t5`. L is
        the length of the longest caption, but at least `positions`.
        """
        return TextRows(self, captions).ids(torch.arange(len(captions)))


class TextRows:
    """Token ids of many captions, one per row."""

    def __init__(self, captions: Captions, texts: list[str]):
        self.end, self.positions = captions._clip.end, captions.positions
        both = [captions.tokens(text) for text in texts]
        self.clip = torch.tensor([c + [-1] * (self.positions - len(c)) for c, _ in both])
        self.lengths = torch.tensor([max(self.positions, len(t)) for _, t in both])  # T5 tokens
        longest = max(LONGEST, int(self.lengths.max()))
        self.t5 = torch.tensor([t + [T5Tokenizer.pad] * (longest - len(t)) for _, t in both])

    def ids(self, rows: Tensor, length: int | None = None) -> dict[str, Tensor]:
        """Like `Captions.ids`; length: number of T5 tokens (None: that of the longest row)."""
        clip = self.clip[rows]
        length = length or int(self.lengths[rows].max())
        pad = clip < 0
        return {
            "l": clip.masked_fill(pad, self.end),
            "g": clip.masked_fill(pad, 0),
            "t5": self.t5[rows, :length],
        }


class Batches:
    """Picks the rows of a batch, all of one text length. Lengths are picked as often as they occur.

    more: weights of kinds, 1 if not given.
    """

    def __init__(self, lengths: Tensor, kinds: list[str], more: dict[str, float] | None = None):
        weights = torch.tensor([(more or {}).get(kind, 1.0) for kind in kinds], dtype=torch.float64)
        self.lengths = lengths.unique().tolist()
        self.rows = [(lengths == n).nonzero()[:, 0] for n in self.lengths]
        self.cumulative = [weights[rows].cumsum(0) for rows in self.rows]
        self.shares = torch.stack([c[-1] for c in self.cumulative]).cumsum(0)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[int, Tensor]:
        """A T5 length and `batch` rows of that length."""

        def pick(cumulative: Tensor, count: int) -> Tensor:
            u = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
            return torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)

        group = int(pick(self.shares, 1))
        return self.lengths[group], self.rows[group][pick(self.cumulative[group], batch)]


def said_of(spoken: Tensor, facts: Tensor, length: int, offset: int) -> tuple[Tensor, Tensor]:
    """For each of `length` tokens, 1 + the index of the object that it belongs to or 0 (B, length), and what the
    caption says about that object (B, length, facts).

    offset: number of tokens before the caption's first word.
    """
    who = torch.zeros(len(spoken), length, dtype=torch.long)
    n = min(length - offset, spoken.shape[1])
    who[:, offset : offset + n] = spoken[:, :n].long()
    index = (who - 1).clamp(min=0)[..., None].expand(-1, -1, len(FACTS))
    return who, facts.float().gather(1, index)


def right_parts(logits: Tensor, target: Tensor, mask: Tensor) -> dict[str, tuple[int, int]]:
    """(correct, counted) tokens of `mask` for the side and for the number of their object. Sides count for objects with
    exactly one, numbers for objects that are one of several.
    """
    out = {}
    for name, (low, high) in PARTS.items():
        wanted = target[..., low:high]
        counted = mask & (wanted.sum(-1) == 1)
        if name == "numbers":
            counted &= wanted[..., 0] == 0
        hits = (logits[..., low:high].argmax(-1) == wanted.argmax(-1)) & counted
        out[name] = int(hits.sum()), int(counted.sum())
    return out
