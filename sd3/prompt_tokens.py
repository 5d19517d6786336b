"""Prompts to tokens: which part of a prompt each text encoder reads, and of which kind its tokens are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmditx import TokenKinds
from other_impls import CLIPTokenizer, T5Tokenizer, Tokens
from sd3.mistakes import Mistake
from sd3.prompts import shortened
from sd3.settings import Settings
from sd3.spans import read_spans

MOST_CHUNKS = 16  # maximum chunks of CLIP tokens per prompt


class Key(NamedTuple):
    """A prompt and how it is encoded. length: number of T5 tokens to pad to; chunks: number of chunks of CLIP tokens,
    filled up with those of the empty prompt; t5_prompt: text for T5, None for `prompt`; dialect: the bracket syntax of
    a whole prompt, see `readers.DIALECTS`; if empty, the prompt is read as in the public reference.
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
        """t5_tokenizer: None for a run without T5; positions: number of tokens in a chunk of CLIP (77)."""
        self.clip_tokenizer, self.t5_tokenizer, self.positions = clip_tokenizer, t5_tokenizer, positions

    def keys(self, s: Settings) -> tuple[Key, Key]:
        """Keys of an image's prompt and negative prompt, both with the number of tokens that the longer one needs.

        Raises Mistake if the weights of a prompt cannot be parsed, or if it is too long.
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
        """Number of CLIP chunks and of T5 tokens of an image's prompts; equal for all images of a batch."""
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
        """Number of T5 tokens of a prompt that is read as in the public reference (at least 77, as for CLIP)."""
        if self.t5_tokenizer is None:
            return self.positions
        return len(self.t5_tokenizer.tokenize(prompt, self.positions).ids)

    def pair_length(self, prompt: str, negative: str) -> int:
        """Number of T5 tokens to which the public reference pads the prompt and the negative prompt."""
        return max(self.t5_length(prompt), self.t5_length(negative))

    def clip_tokens(self, key: Key, role: str = "clip_l") -> list[Tokens]:
        """The tokens of a prompt for one of the CLIP encoders, one item per chunk."""
        pad = 0 if role == "clip_g" else None
        if not key.dialect:
            return [self.clip_tokenizer.tokenize(key.prompt, self.positions, pad).plain()]
        commas = key.dialect == "a1111"
        chunks = self.clip_tokenizer.chunks(read_spans(key.prompt, key.dialect), self.positions, pad, commas)
        return chunks + self.clip_tokenizer.chunks([], self.positions, pad) * (key.chunks - len(chunks))

    def t5_tokens(self, key: Key) -> Tokens:
        """The tokens of a prompt for T5; needs the T5 tokenizer."""
        prompt = key.prompt if key.t5_prompt is None else key.t5_prompt
        if not key.dialect:
            return self.t5_tokenizer.tokenize(prompt, key.length).plain()
        return self.t5_tokenizer.whole(read_spans(prompt, key.dialect), key.length)

    def clip_length(self, key: Key) -> int:
        """Number of text tokens of a prompt from CLIP."""
        return self.positions * key.chunks

    def t5_length_of(self, key: Key) -> int:
        """Number of text tokens of a prompt from T5; in a run without T5, of the zeros in their place."""
        return self.positions if self.t5_tokenizer is None and not key.dialect else key.length

    def kinds(self, key: Key) -> TokenKinds:
        """The kinds of a prompt's text tokens, on the CPU. The zeros of a run without T5 count as padding."""
        parts = self.clip_tokens(key)
        lengths = [self.positions] * len(parts)
        if self.t5_tokenizer is not None:
            parts.append(self.t5_tokens(key))
            lengths.append(len(parts[-1].ids))
        else:
            lengths.append(self.t5_length_of(key))
        words = torch.zeros(1, sum(lengths), dtype=torch.bool)
        weights = torch.ones(words.shape)
        start = 0
        for part, length in zip(parts, lengths, strict=False):
            words[0, start : start + part.words] = True
            weights[0, start : start + len(part.stream)] = torch.tensor(part.stream)
            start += length
        return TokenKinds(self.clip_length(key), words, None if bool((weights == 1).all()) else weights)

    def cost(self, key: Key) -> int:
        """Memory of an encoded prompt, as a number of prompts of the usual length of 2 x 77 tokens; at least 1."""
        key = Key(*key)
        return max(1, (self.clip_length(key) + self.t5_length_of(key)) // (2 * self.positions))
