"""Attention, MLP and the text encoders: CLIP, T5 and their tokenizers."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn


def count_layers(names: Iterable[str], stem: str) -> int:
    """One more than the highest layer number after `stem`. If some numbers are missing, loading lists their tensors.

    Raises ValueError if most are missing, so that a huge number does not build that many layers.
    """
    numbers = {name[len(stem) :].split(".", 1)[0] for name in names if name.startswith(stem)}
    found = {int(n) if len(n) < 7 else 10**7 for n in numbers if re.fullmatch(r"[0-9]+", n)}
    count = max(found, default=-1) + 1
    if count > 4 * len(found) + 16:
        raise ValueError(f"{stem}{max(found)}, of which {len(found)} are there")
    return count


Shapes = Mapping[str, Sequence[int]]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options) -> Tensor:
    """Scaled dot-product attention over (B, L, D) tensors with D split into `heads`; returns (B, L, D).

    mask: added to the scores; options: `is_causal` and `scale`, see torch's scaled_dot_product_attention.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, D/heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out.transpose(1, 2).flatten(2)


ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """Two-layer MLP. An empty activation means fc1 applies it itself (fused)."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu_tanh"):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(ACTIVATIONS[self.activation](h) if self.activation else h)


CLIP_LAYERS = "text_model.encoder.layers."


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder; `positions` is the length of the longest token sequence that it accepts (77)."""

    width: int
    depth: int
    mlp_width: int
    vocabulary: int
    positions: int
    projection: bool
    activation: str

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str, projection: bool) -> CLIPConfig:
        """Reads the sizes from tensor names and shapes (no prefix). activation, projection: depend on the role of the
        file (a projection in a CLIP-L file is not used).
        """
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        if width > 64 and width % 64:
            raise ValueError(f"width {width}, which is not a multiple of 64")
        return cls(
            width=width,
            depth=count_layers(shapes, CLIP_LAYERS),
            mlp_width=shapes[f"{CLIP_LAYERS}0.mlp.fc1.weight"][0],
            vocabulary=vocabulary,
            positions=shapes["text_model.embeddings.position_embedding.weight"][0],
            projection=projection,
            activation=activation,
        )


class CLIPAttention(nn.Module):
    """Causal self-attention with 64 features per head."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 64)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.heads, is_causal=True))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CLIPAttention(config.width)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _CLIPTables(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)


class _CLIPLayers(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.depth))


class _CLIPTextModel(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = _CLIPTables(config)
        self.encoder = _CLIPLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIP(nn.Module):
    """A CLIP text encoder."""

    LAYERS = CLIP_LAYERS  # names of a layer's tensors start with this and its number
    TABLES = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = _CLIPTextModel(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.width, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, in order."""
        return self.text_model.encoder.layers

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> hidden (B, L, D) and pooled (B, D), see `encode`."""
        tables = self.text_model.embeddings
        x = tables.token_embedding(ids) + tables.position_embedding.weight[: ids.shape[1]]
        return self.encode([x], [ids], self.layers)[0]

    def encode(
        self, texts: Iterable[Tensor], ids: Sequence[Tensor], layers: Iterable[nn.Module]
    ) -> list[tuple[Tensor, Tensor]]:
        """Encodes texts, given as token embeddings (B, L, D) and ids (B, L). Returns hidden (B, L, D) and pooled (B, D)
        for each.

        hidden: the output of the second-to-last layer, without the final norm; pooled: the output of the last layer
        after the final norm, at the end token (the first position of the largest id), projected if the model has a
        projection. layers: those of the encoder, or a generator that loads them; each layer runs on every text, one by
        one, before the next layer is requested.
        """
        states = list(texts)
        hidden = list(states)
        for layer in layers:
            for i, x in enumerate(states):
                hidden[i], states[i] = x, layer(x)
        return [(h, self._pooled(x, row)) for h, x, row in zip(hidden, states, ids, strict=True)]

    def _pooled(self, x: Tensor, ids: Tensor) -> Tensor:
        rows = torch.arange(ids.shape[0], device=ids.device)
        pooled = self.text_model.final_layer_norm(x[rows, ids.argmax(dim=-1)])
        return self.text_projection(pooled) if self.config.projection else pooled


T5_MAX_DISTANCE = 128  # larger distances share the last bucket
T5_LAYERS, T5_EMBEDDING = "encoder.block.", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; `inner` is the number of heads times the width of a head."""

    width: int
    depth: int
    heads: int
    inner: int
    mlp_width: int
    buckets: int
    vocabulary: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> T5Config:
        """Reads the sizes from tensor names and shapes (no prefix); the embedding table is `T5_EMBEDDING`."""
        first = f"{T5_LAYERS}0.layer."
        buckets, heads = shapes[first + "0.SelfAttention.relative_attention_bias.weight"]
        vocabulary, width = shapes[T5_EMBEDDING]
        inner = shapes[first + "0.SelfAttention.q.weight"][0]
        if buckets < 4 or inner % heads:
            raise ValueError(f"relative_attention_bias of {buckets} x {heads}")
        return cls(
            width=width,
            depth=count_layers(shapes, T5_LAYERS),
            heads=heads,
            inner=inner,
            mlp_width=shapes[first + "1.DenseReluDense.wi_0.weight"][0],
            buckets=buckets,
            vocabulary=vocabulary,
        )


class T5Norm(nn.Module):
    """RMS norm with a scale, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return n.to(self.weight.dtype) * self.weight


class _T5SelfAttention(nn.Module):
    def __init__(self, config: T5Config, bias: bool):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.inner, bias=False)
        self.k = nn.Linear(config.width, config.inner, bias=False)
        self.v = nn.Linear(config.width, config.inner, bias=False)
        self.o = nn.Linear(config.inner, config.width, bias=False)
        if bias:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(attention(q, k, v, self.heads, mask=position_bias.to(q.dtype), scale=1.0))


class _T5AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, bias: bool):
        super().__init__()
        self.SelfAttention = _T5SelfAttention(config, bias)
        self.layer_norm = T5Norm(config.width)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), position_bias).to(x.dtype)


class _T5GatedMlp(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(ACTIVATIONS["gelu_tanh"](self.wi_0(x)) * self.wi_1(x))


class _T5MlpLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = _T5GatedMlp(config)
        self.layer_norm = T5Norm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x)).to(x.dtype)


class T5Block(nn.Module):
    """Attention and gated MLP; the residual stream x (B, L, D) stays in float32."""

    def __init__(self, config: T5Config, bias: bool = False):
        super().__init__()
        self.layer = nn.ModuleList([_T5AttentionLayer(config, bias), _T5MlpLayer(config)])

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, position_bias))


def t5_buckets(length: int, buckets: int, device: torch.device) -> Tensor:
    """Buckets (L, L) of relative positions, key minus query. Half of the buckets are for keys after the query; in each
    half, the first half holds one distance each and the rest is logarithmic up to `T5_MAX_DISTANCE`.
    """
    places = torch.arange(length, device=device)
    offset = places[None, :] - places[:, None]  # (query, key)
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact)
    far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def t5_position_bias(table: Tensor, length: int) -> Tensor:
    """Bias on the scores of every block, (1, heads, L, L), from the table (buckets, heads) of block 0."""
    return table[t5_buckets(length, table.shape[0], table.device)].permute(2, 0, 1)[None]


class _T5Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.block = nn.ModuleList(T5Block(config, bias=i == 0) for i in range(config.depth))
        self.final_layer_norm = T5Norm(config.width)


class T5(nn.Module):
    """A T5 v1.1 encoder."""

    LAYERS = T5_LAYERS
    TABLES = (T5_EMBEDDING,)

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.encoder = _T5Stack(config)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return self.encoder.block

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, D), see `encode`."""
        return self.encode([self.encoder.embed_tokens(ids).float()], self.layers)[0]

    def encode(self, texts: Iterable[Tensor], layers: Iterable[nn.Module]) -> list[Tensor]:
        """Encodes texts of any lengths, given as token embeddings (B, L, D) in float32. Returns the hidden states
        (B, L, D) of each after the final norm; padding is not masked. layers: see `CLIP.encode`.
        """
        states = list(texts)
        biases: dict[int, Tensor] = {}  # by text length
        for block in layers:
            if not biases:  # only the first block has the table; all use it
                table = block.layer[0].SelfAttention.relative_attention_bias.weight
                biases = {length: t5_position_bias(table, length) for length in {x.shape[1] for x in states}}
            for i, x in enumerate(states):
                states[i] = block(x, biases[x.shape[1]])
        return [self.encoder.final_layer_norm(x) for x in states]


def join_text(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Text tokens (B, L1 + L2, D5): [CLIP-L | CLIP-G | zeros up to T5's width], followed by those of T5."""
    clip = torch.cat([clip_l, clip_g], dim=-1)
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)


T5_CHARACTERS = 226  # T5 reads this many characters of a prompt, as in the public reference
LARGE_WORD = 8  # a CLIP word of at least this many tokens is cut if it does not fit; a shorter one is left out
COMMA_REACH = 20  # how many tokens A1111 looks back for a comma if a chunk is full


NESTING_WEIGHT = 1.1  # weight of a pair of brackets without a number
LONGEST_NUMBER = 400  # maximum characters of a weight; a longer text is not parsed as a number


@dataclass(frozen=True)
class Span:
    """A part of a prompt. weight: in the text encoders; stream: weight in residual text streaming; starts: whether
    `BREAK` precedes it, so that its CLIP tokens begin a new chunk.
    """

    text: str
    weight: float = 1.0
    stream: float = 1.0
    starts: bool = False


def weighted_segments(text: str) -> list[tuple[str, float]]:
    """Splits a prompt at its brackets into pairs (text, weight), see `bracketed`."""
    return [(unescaped(text[a:b]), weight) for a, b, weight, _, _ in bracketed(text)]


def unescaped(text: str) -> str:
    """Replaces escaped brackets with plain ones."""
    return text.replace("\\(", "(").replace("\\)", ")")


def bracketed(
    text: str,
    in_stream: Callable[[int], float | None] = lambda place: None,
    only: Collection[int] | None = None,
) -> Iterator[tuple[int, int, float, float, bool]]:
    """Yields (start, end, weight, weight in the stream, whether outside all brackets) for each part of a prompt. As in
    ComfyUI, `(x)` weighs 1.1 times the text around it and `(x:1.4)` exactly 1.4; `\\(`, `\\)` and everything from an
    unclosed `(` on are plain text.

    in_stream: returns the weight in the stream of the brackets that end at a position, or None; only: positions of
    closing brackets that count; all other brackets are plain text. Not recursive, as brackets may be nested deeply.
    """
    comfy = only is None
    escaped = {i + 1 for i in range(len(text) - 1) if text[i] == "\\" and text[i + 1] in "()"} if comfy else set()
    closing = _closing(text, escaped)
    if not comfy:
        closing = {a: b for a, b in closing.items() if b in only}
    colons = [i for i, char in enumerate(text) if char == ":"]
    todo = [(0, len(text), 1.0, 1.0, True, True)]  # start, end, weights, outermost, whether to look for brackets inside
    while todo:
        start, end, weight, stream, outermost, nested = todo.pop()
        if not nested:
            yield start, end, weight, stream, outermost
            continue
        inside = []
        for a, b in _pieces(text, start, end, closing, escaped, comfy):
            enclosed = b - a > 1 and text[a] == "(" and text[b - 1] == ")" and b - 1 not in escaped
            if not enclosed or not (comfy or closing.get(a) == b - 1):
                inside.append((a, b, weight, stream, outermost, False))
                continue
            stream_weight, stop, number = in_stream(b - 1), b - 1, None
            if comfy:
                stop, number = _number(text, a + 1, b - 1, colons)
            usual = weight * NESTING_WEIGHT if comfy and stream_weight is None else weight
            inner = usual if number is None else number, stream if stream_weight is None else stream_weight
            inside.append((a + 1, stop, *inner, False, True))
        todo += inside[::-1]


def _closing(text: str, escaped: set[int]) -> dict[int, int]:
    """Positions of closing brackets by those of their opening brackets."""
    closing, opened = {}, []
    for i, char in enumerate(text):
        if char == "(" and i not in escaped:
            opened.append(i)
        elif char == ")" and i not in escaped and opened:
            closing[opened.pop()] = i
    return closing


def _pieces(
    text: str, start: int, end: int, closing: dict[int, int], escaped: set[int], comfy: bool
) -> list[tuple[int, int]]:
    """Splits text[start:end] into bracketed pieces, including their brackets, and the pieces between them. In ComfyUI's
    dialect an unclosed `(` starts a last piece, and a `(` after a surplus `)` only balances it.
    """
    pieces, depth, i = [], 0, start
    while i < end:
        if text[i] == "(" and depth == 0 and i not in escaped and (comfy or i in closing):
            pieces.append((start, i))
            start, close = i, closing.get(i, end)
            if close >= end:
                break
            pieces.append((start, close + 1))
            start = i = close + 1
            continue
        if comfy and i not in escaped:
            depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
    pieces.append((start, end))
    return [(a, b) for a, b in pieces if a < b]


def _number(text: str, start: int, end: int, colons: list[int]) -> tuple[int, float | None]:
    """Where a bracketed text ends, and its weight: the number after its last colon, None if there is none."""
    place = bisect.bisect_left(colons, end) - 1
    colon = colons[place] if place >= 0 else -1
    number = read_number(text[colon + 1 : end]) if colon > start and end - colon <= LONGEST_NUMBER else None
    return (end, None) if number is None else (colon, number)


def read_number(number: str | None) -> float | None:
    """Parses a number; None if the text is not one."""
    if number is None or len(number) > LONGEST_NUMBER:
        return None
    try:
        return float(number)
    except ValueError:
        return None


def weighted_words(text: str) -> list[tuple[str, float]]:
    """Splits a prompt at spaces, newlines and segment borders into pairs (word, weight)."""
    return [(word, weight) for segment, weight in weighted_segments(text) for word in words_of(segment)]


def words_of(text: str) -> list[str]:
    """Splits a text at spaces and newlines."""
    return [word for _, word in words_in(text)]


def words_in(text: str) -> list[tuple[int, str]]:
    """Splits a text at spaces and newlines into pairs (position, word)."""
    return [(match.start(), match[0]) for match in re.finditer(r"[^ \n]+", text)]


class Run:
    """Consecutive spans of a prompt, joined into one text."""

    def __init__(self, spans: Sequence[Span], at_break: str = ""):
        """at_break: text to insert in place of `BREAK`."""
        texts = [at_break + span.text if span.starts else span.text for span in spans]
        self.spans, self.text = list(spans), "".join(texts)
        self.ends = list(itertools.accumulate(map(len, texts)))
        self.starts = bool(spans) and spans[0].starts

    def at(self, place: int) -> Span:
        """The span that contains the character at a position."""
        return self.spans[min(bisect.bisect_right(self.ends, max(place, 0)), len(self.spans) - 1)]


def runs_of(spans: Sequence[Span]) -> list[Run]:
    """Joins consecutive spans of equal weight, up to the next `BREAK`. Weights in the stream do not split words."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and not span.starts and groups[-1][-1].weight == span.weight:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [Run(group) for group in groups]


@dataclass(frozen=True)
class Tokens:
    """Token ids and weights of a prompt or of a chunk of it. cut: whether part of the prompt did not fit; words: number
    of tokens before the padding; stream: weights of the first tokens in residual text streaming (of the others: 1).
    """

    ids: list[int]
    weights: list[float]
    cut: bool
    words: int
    stream: list[float] = field(default_factory=list)

    def plain(self) -> Tokens:
        """The tokens without weights: the public reference parses weights but does not use them."""
        return replace(self, weights=[1.0] * len(self.ids))

    @property
    def weighted(self) -> bool:
        """Whether any token has a weight other than 1."""
        return any(weight != 1 for weight in self.weights)


class CLIPTokenizer:
    """CLIP's byte-level BPE. `tokenizer` splits text into tokens; this class adds weights, start, end and padding."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises ValueError for a tokenizer without CLIP's start and end tokens."""
        self.tokenizer = tokenizer
        self.start = tokenizer.token_to_id(CLIP_START)
        self.end = tokenizer.token_to_id(CLIP_END)
        if self.start is None or self.end is None:
            raise ValueError(f"is not a CLIP tokenizer: {CLIP_START} or {CLIP_END} is missing")

    def tokenize(self, prompt: str, length: int, pad: int | None = None) -> Tokens:
        """Exactly `length` tokens: start, as many words as fit, end, and padding with `pad` (None: the end token)."""
        ids, weights, cut = [self.start], [1.0], False
        for word, weight in weighted_words(prompt):
            tokens = self.tokenizer.encode(word, add_special_tokens=False).ids
            room = length - 1 - len(ids)
            if len(tokens) > room:
                cut = True
                tokens = tokens[:room] if len(tokens) >= LARGE_WORD else []
            ids += tokens
            weights += [weight] * len(tokens)
            if cut:
                break
        return self._filled(ids, weights, [], length, pad, cut)

    def chunks(self, spans: Sequence[Span], length: int, pad: int | None = None, commas: bool = False) -> list[Tokens]:
        """All tokens, in chunks of `length`, each with start, end and padding; at least one chunk.

        commas: if a chunk is full, move the tokens after its last comma to the next one, as A1111 does; otherwise move
        a word that does not fit, or split it if it is long, as ComfyUI does.
        """
        room = length - 2
        chunks = self._by_commas(spans, room) if commas else self._by_words(spans, room)
        return [
            self._filled(
                [self.start, *(token for token, _ in chunk)],
                [1.0, *(span.weight for _, span in chunk)],
                [1.0, *(span.stream for _, span in chunk)],
                length,
                pad,
            )
            for chunk in chunks
        ]

    def _by_words(self, spans: Sequence[Span], room: int) -> list[list[tuple[int, Span]]]:
        out: list[list[tuple[int, Span]]] = [[]]
        for run in runs_of(spans):
            if run.starts and out[-1]:
                out.append([])
            for place, word in words_in(run.text):
                tokens = self._tokens(word, run, place)
                if out[-1] and len(out[-1]) + len(tokens) > room and len(tokens) < LARGE_WORD:
                    out.append([])
                while tokens:
                    if len(out[-1]) == room:
                        out.append([])
                    fitting = room - len(out[-1])
                    out[-1] += tokens[:fitting]
                    tokens = tokens[fitting:]
        return out if out[-1] or len(out) == 1 else out[:-1]

    def _by_commas(self, spans: Sequence[Span], room: int) -> list[list[tuple[int, Span]]]:
        out: list[list[tuple[int, Span]]] = [[]]
        comma, last = self.tokenizer.token_to_id(",</w>"), -1
        for run in runs_of(spans):
            if run.starts:
                out.append([])
                last = -1
            for token, span in self._tokens(run.text, run):
                full = len(out[-1]) == room
                if token == comma:
                    last = len(out[-1])
                elif full and last != -1 and room - last <= COMMA_REACH:
                    moved = out[-1][last + 1 :]
                    del out[-1][last + 1 :]
                    out.append(moved)
                    last = -1
                if len(out[-1]) == room:
                    out.append([])
                    last = -1
                out[-1].append((token, span))
        return out if out[-1] or len(out) == 1 else out[:-1]

    def _tokens(self, text: str, run: Run, place: int = 0) -> list[tuple[int, Span]]:
        """The tokens of a text at a position of a run, each with its span."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = zip(encoding.ids, encoding.offsets, strict=True)
        return [(token, run.at(place + end - 1)) for token, (_, end) in tokens]

    def _filled(
        self, ids: list[int], weights: list[float], stream: list[float], length: int, pad: int | None, cut: bool = False
    ) -> Tokens:
        words = len(ids) + 1
        ids = [*ids, self.end, *[self.end if pad is None else pad] * (length - words)]
        return Tokens(ids, weights + [1.0] * (length - len(weights)), cut, words, stream)


CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_BPE = {"unk_token": CLIP_END, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}


def clip_pipeline(bpe: models.BPE) -> Tokenizer:
    """The published CLIP tokenizer, built around its merges (a BPE with the options `CLIP_BPE`): NFC, lower case,
    collapsed white space, split into words, byte-level BPE.
    """
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([CLIP_START, CLIP_END])
    return tokenizer


class T5Tokenizer:
    """T5's unigram tokenizer. `places` returns the piece ids of a text and the positions at which they end; this class
    adds weights, the end token and padding.
    """

    end, pad = 1, 0

    def __init__(self, places: Callable[[str], list[tuple[int, int]]]):
        self.places = places

    def split(self, text: str) -> list[int]:
        """The piece ids of a text."""
        return [token for token, _ in self.places(text)]

    def tokenize(self, prompt: str, minimum: int) -> Tokens:
        """The tokens of the first 226 characters and the end token, padded with 0 to at least `minimum` tokens."""
        ids, weights = [], []
        for word, weight in weighted_words(prompt[:T5_CHARACTERS]):
            tokens = self.split(word)
            ids += tokens
            weights += [weight] * len(tokens)
        return self._filled(ids, weights, [], minimum, len(prompt) > T5_CHARACTERS)

    def whole(self, spans: Sequence[Span], length: int) -> Tokens:
        """Exactly `length` tokens: as many as fit, the end token and padding. The spans are joined into one text, with
        a space in place of `BREAK`, and split at white space. A token has the weight of the span in which it ends.
        """
        run = Run(spans, " ")
        words = re.finditer(r"\S+", run.text)
        rows = [(token, run.at(word.start() + end - 1)) for word in words for token, end in self.places(word[0])]
        fitting = rows[: length - 1]
        weights, stream = [span.weight for _, span in fitting], [span.stream for _, span in fitting]
        return self._filled([token for token, _ in fitting], weights, stream, length, len(fitting) < len(rows))

    def _filled(self, ids: list[int], weights: list[float], stream: list[float], minimum: int, cut: bool) -> Tokens:
        words = len(ids) + 1
        ids = [*ids, self.end, *[self.pad] * (minimum - words)]
        return Tokens(ids, weights + [1.0] * (len(ids) - len(weights)), cut, words, stream)


def sentencepiece_places(
    model: SentencePieceProcessor, rows: int | None = None
) -> Callable[[str], list[tuple[int, int]]]:
    """Returns a function from a word to its piece ids, each with the position at which it ends (approximate if
    normalisation changes the length of the word). `</s>` and similar words become special tokens, as on the hub.

    rows: number of rows of the encoder's embedding table, if known; extra ids beyond it are not used.
    """
    size = model.get_piece_size()
    extra = {f"<extra_id_{i}>": size + 99 - i for i in range(100) if rows is None or size + 99 - i < rows}
    special = {model.id_to_piece(i): i for i in range(3)} | extra
    borders = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def places(text: str) -> list[tuple[int, int]]:
        out, start = [], 0
        for part in borders.split(text):
            if part in special:
                out.append((special[part], start + len(part)))
            elif part:
                lengths = (len(piece.lstrip("\u2581")) for piece in model.encode(part, out_type=str))
                ends = (start + min(end, len(part)) for end in itertools.accumulate(lengths))
                out += zip(model.encode(part), ends, strict=True)
            start += len(part)
        return out

    return places
