"""Parses prompts into spans of text with weights, for `prompt_mode` whole: the brackets of ComfyUI or A1111, `BREAK`,
and `{stream=W}`, the weight of a phrase in residual text streaming.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from other_impls import NESTING_WEIGHT, Span, bracketed, read_number, unescaped
from sd3.mistakes import Mistake, verbatim
from sd3.readers import WEIGHT_LIMIT

BREAK = re.compile(r"\bBREAK\b")
STREAM = "{stream="
_A1111 = re.compile(r"\\[()\[\]\\]|[\\(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
_LIMITS = f"a number from -{WEIGHT_LIMIT:g} to {WEIGHT_LIMIT:g}"


def read_spans(prompt: str, dialect: str = "comfy", field: str = "prompt") -> list[Span]:
    """The spans of a prompt, in order. Joins consecutive spans of equal weights, so that `(x:1.0)` is the same as `x`.

    dialect: one of `readers.DIALECTS`. `(red circle){stream=0.6}` gives the phrase a weight in the stream; its weight
    in the encoders changes only if the brackets contain a number. `BREAK` has an effect outside brackets only. Raises
    Mistake with `field`.
    """
    text, streams = _take_streams(prompt, field)
    spans = list(_read_a1111(text, streams) if dialect == "a1111" else _read_nested(text, streams, dialect == "comfy"))
    if streams.used != streams.keys():
        why = f"{STREAM}W}} belongs behind a phrase in brackets that are no text: (red circle){STREAM}0.6}}"
        raise Mistake(field, _shown(prompt), why)
    for span in spans:
        if not abs(span.weight) <= WEIGHT_LIMIT:  # also refuses NaN
            raise Mistake(field, _shown(prompt), f'the weight of "{_shown(span.text)}" must be {_LIMITS}')
    return _joined(spans)


def plain_text(spans: Sequence[Span]) -> str:
    """The text without brackets and weights, with a space in place of `BREAK`."""
    return "".join(f" {span.text}" if span.starts else span.text for span in spans).strip(" ")


def _shown(text: str) -> str:
    return verbatim(text if len(text) <= 40 else text[:37] + "...")


def _joined(spans: Sequence[Span]) -> list[Span]:
    out: list[Span] = []
    for span in spans:
        if out and not span.starts and (out[-1].weight, out[-1].stream) == (span.weight, span.stream):
            out[-1] = replace(out[-1], text=out[-1].text + span.text)
        else:
            out.append(span)
    return out


def _at_breaks(text: str) -> list[str]:
    """Splits a text at `BREAK` and removes the white space around it."""
    parts = BREAK.split(text)
    last = len(parts) - 1
    parts = [part.lstrip() if i else part for i, part in enumerate(parts)]
    return [part.rstrip() if i < last else part for i, part in enumerate(parts)]


# ---- weights in the stream -----------------------------------------------------------------------


class _StreamWeights(dict[int, float]):
    """Weights in the stream by the position of the closing bracket before them. used: positions that ended a phrase."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def use(self, place: int) -> float | None:
        """The weight of the phrase that ends with the bracket at position `place`, or None."""
        if place in self:
            self.used.add(place)
        return self.get(place)


def _take_streams(prompt: str, field: str) -> tuple[str, _StreamWeights]:
    """Removes all `{stream=W}` from a prompt; returns the rest and the weights. Raises Mistake."""
    streams = _StreamWeights()
    first, *rest = prompt.split(STREAM)
    pieces, length = [first], len(first)
    for part in rest:
        number, brace, after = part.partition("}")
        if not brace:
            raise Mistake(field, _shown(prompt), f"{STREAM} is not closed; write (red circle){STREAM}0.6}}")
        weight = read_number(number)
        if weight is None or not abs(weight) <= WEIGHT_LIMIT or "_" in number:
            raise Mistake(field, _shown(prompt), f"{STREAM}{_shown(number)}}} must hold {_LIMITS}")
        if length - 1 in streams:
            raise Mistake(field, _shown(prompt), f"a phrase has two {STREAM}W}}; keep one")
        streams[length - 1] = weight
        pieces.append(after)
        length += len(after)
    return "".join(pieces), streams


# ---- dialects comfy and none ---------------------------------------------------------------------


def _read_nested(text: str, streams: _StreamWeights, comfy: bool) -> Iterator[Span]:
    for a, b, weight, stream, outermost in bracketed(text, streams.use, None if comfy else streams):
        for i, part in enumerate(_at_breaks(text[a:b]) if outermost else [text[a:b]]):
            yield Span(unescaped(part) if comfy else part, weight, stream, starts=i > 0)


# ---- A1111's brackets ----------------------------------------------------------------------------


class _A1111Parts:
    """The parts of a prompt while it is parsed: a closing bracket changes the weights of all parts since it opened."""

    def __init__(self, most: int, streams: _StreamWeights):
        """most: maximum number of parts."""
        self.texts: list[str] = []
        self.starts: list[bool] = []
        self.weights = np.ones(most)
        self.in_stream = np.full(most, np.nan)
        self.streams = streams

    def add(self, text: str, starts: bool = False) -> None:
        self.texts.append(text)
        self.starts.append(starts)

    def close(self, first: int, number: float | None, usual: float, place: int | None = None) -> None:
        """Closes brackets that were opened before part `first`, and applies their number or the `usual` factor. place:
        position of the closing bracket, None if a phrase cannot end here.
        """
        inside = slice(first, len(self.texts))
        stream_weight = None if place is None else self.streams.use(place)
        if stream_weight is not None:
            part = self.in_stream[inside]
            part[np.isnan(part)] = stream_weight  # phrases inside that have a weight keep it
        with np.errstate(over="ignore"):  # `read_spans` refuses infinite weights
            self.weights[inside] *= number if number is not None else usual if stream_weight is None else 1.0

    def spans(self) -> Iterator[Span]:
        weights, in_stream = self.weights.tolist(), np.nan_to_num(self.in_stream, nan=1.0).tolist()
        for row in zip(self.texts, weights, in_stream, self.starts, strict=False):
            yield Span(*row)


def _read_a1111(text: str, streams: _StreamWeights) -> Iterator[Span]:
    """A1111's rules: `(x)` multiplies the weight by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3, and
    nested factors multiply; `\\` escapes a bracket or a `\\`; unclosed brackets extend to the end of the prompt.
    """
    matches = list(_A1111.finditer(text))
    parts = _A1111Parts(len(matches) + text.count("BREAK") + 1, streams)
    opened: dict[str, list[int]] = {"(": [], "[": []}
    usual = {"(": NESTING_WEIGHT, "[": 1 / NESTING_WEIGHT}
    for match in matches:
        token, last = match[0], match.end() - 1
        if token[0] == "\\":
            parts.add(token[1:])
        elif token in opened:
            opened[token].append(len(parts.texts))
        elif token[-1] in ")]" and opened[kind := "(" if token[-1] == ")" else "["]:
            number = read_number(match[1])
            if len(token) > 1 and number is None:
                parts.add(token[:-1])  # without a number, the colon is text
            parts.close(opened[kind].pop(), number, usual[kind], last if kind == "(" else None)
        elif opened["("] or opened["["]:
            parts.add(token)
        else:
            for i, part in enumerate(_at_breaks(token)):
                parts.add(part, i > 0)
    for kind, places in opened.items():
        for first in places:
            parts.close(first, None, usual[kind])
    return parts.spans()
