"""Prompts as tokens: which part of a prompt each text encoder reads, and what its tokens are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmditx import TokenKinds
from other_impls import CLIPTokenizer, T5Tokenizer, Tokens
from sd3.mistakes import Mistake
from sd3.prompts import shortened
from sd3.settings import Settings
from sd3.spans import read_spans

MOST_CHUNKS = 16  # of a prompt's CLIP tokens


class Key(NamedTuple):
    """A prompt as it is encoded. length: T5 tokens that it is padded to; chunks: of CLIP tokens, those beyond its own
    are the empty prompt's; t5_prompt: what T5 reads, None for the prompt; dialect: whose rule of brackets, see
    `readers.DIALECTS`, in whole prompts; empty: it is read as the public reference reads it.
    """

    prompt: str
    length: int
    chunks: int = 1
    t5_prompt: str | None = None
    dialect: str = ""


EMPTY = Key("", 0)


class PromptTokens:
    """Turns prompts into tokens."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer | None, positions: int):
        """t5_tokenizer: None for a run without T5; positions: of CLIP's tokens."""
        self.clip_tokenizer, self.t5_tokenizer, self.positions = clip_tokenizer, t5_tokenizer, positions

    def keys(self, s: Settings) -> tuple[Key, Key]:
        """An image's prompt and its negative prompt, both with as many tokens as the longer one needs.

        Raises Mistake for a prompt whose weights cannot be read, and for one that is too long.
        """
        prompt = s.prompt if s.clip_prompt is None else s.clip_prompt
        t5_prompt = s.prompt if s.t5_prompt is None else s.t5_prompt
        if s.prompt_mode == "reference":
            length, chunks, dialect = self.pair_length(t5_prompt, s.negative_prompt), 1, ""
        else:
            length, dialect = s.t5_tokens, s.prompt_weights
            named = {"clip_prompt" if s.clip_prompt is not None else "prompt": prompt}
            named |= {"negative_prompt": s.negative_prompt}
            chunks = max(self._count_chunks(name, text, dialect) for name, text in named.items())
            if t5_prompt != prompt:
                read_spans(t5_prompt, dialect, "prompt" if s.t5_prompt is None else "t5_prompt")
        cond = Key(prompt, length, chunks, None if t5_prompt == prompt else t5_prompt, dialect)
        return cond, Key(s.negative_prompt, length, chunks, None, dialect)

    def shape(self, s: Settings) -> tuple[int, int]:
        """Chunks of CLIP tokens and T5 tokens of an image's prompts: images that share a run have the same."""
        key = self.keys(s)[0]
        return key.chunks, key.length

    def _count_chunks(self, field: str, prompt: str, dialect: str) -> int:
        spans = read_spans(prompt, dialect, field)
        count = len(self.clip_tokenizer.chunks(spans, self.positions, commas=dialect == "a1111"))
        if count > MOST_CHUNKS:
            why = f"has {count} chunks of {self.positions - 2} CLIP tokens; at most {MOST_CHUNKS} are allowed"
            raise Mistake(field, shortened(prompt), why)
        return count

    def t5_length(self, prompt: str) -> int:
        """How many T5 tokens a prompt has as the reference reads it (at least as many as CLIP takes: 77)."""
        if self.t5_tokenizer is None:
            return self.positions
        return len(self.t5_tokenizer.tokenize(prompt, self.positions).ids)

    def pair_length(self, prompt: str, negative: str) -> int:
        """The T5 length at which the reference encodes both halves of a guided run."""
        return max(self.t5_length(prompt), self.t5_length(negative))

    def clip_tokens(self, key: Key, role: str = "clip_l") -> list[Tokens]:
        """A prompt's tokens for a CLIP, by chunk."""
        pad = 0 if role == "clip_g" else None
        if not key.dialect:
            return [self.clip_tokenizer.tokenize(key.prompt, self.positions, pad).plain()]
        commas = key.dialect == "a1111"
        own = self.clip_tokenizer.chunks(read_spans(key.prompt, key.dialect), self.positions, pad, commas)
        return own + self.clip_tokenizer.chunks([], self.positions, pad) * (key.chunks - len(own))

    def t5_tokens(self, key: Key) -> Tokens:
        """A prompt's tokens for T5, which there must be."""
        prompt = key.prompt if key.t5_prompt is None else key.t5_prompt
        if not key.dialect:
            return self.t5_tokenizer.tokenize(prompt, key.length).plain()
        return self.t5_tokenizer.whole(read_spans(prompt, key.dialect), key.length)

    def clip_length(self, key: Key) -> int:
        """How many of a prompt's text tokens are CLIP's."""
        return self.positions * key.chunks

    def t5_length_of(self, key: Key) -> int:
        """How many of a prompt's text tokens are T5's, zeros where there is no T5."""
        return self.positions if self.t5_tokenizer is None and not key.dialect else key.length

    def kinds(self, key: Key) -> TokenKinds:
        """What a prompt's text tokens are, on the CPU. Without T5 its zeros are padding."""
        parts = self.clip_tokens(key)
        places = [self.positions] * len(parts)
        if self.t5_tokenizer is not None:
            parts.append(self.t5_tokens(key))
            places.append(len(parts[-1].ids))
        else:
            places.append(self.t5_length_of(key))
        words = torch.zeros(1, sum(places), dtype=torch.bool)
        weights = torch.ones(words.shape)
        start = 0
        for part, place in zip(parts, places, strict=False):
            words[0, start : start + part.words] = True
            weights[0, start : start + len(part.stream)] = torch.tensor(part.stream)
            start += place
        return TokenKinds(self.clip_length(key), words, None if bool((weights == 1).all()) else weights)

    def cost(self, key: Key) -> int:
        """How many prompts of usual length, 2 x 77 tokens, a prompt takes the memory of."""
        key = Key(*key)
        return max(1, (self.clip_length(key) + self.t5_length_of(key)) // (2 * self.positions))
