"""Attention, MLP and the text encoders: CLIP, T5 and their tokenizers."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn


def count_layers(names: Iterable[str], stem: str) -> int:
    """One more than the highest layer number after `stem`; a gap becomes a list of missing tensors later.

    Raises ValueError where most are missing, before a huge number becomes that many layers.
    """
    numbers = {name[len(stem) :].split(".", 1)[0] for name in names if name.startswith(stem)}
    found = {int(n) if len(n) < 7 else 10**7 for n in numbers if re.fullmatch(r"[0-9]+", n)}
    count = max(found, default=-1) + 1
    if count > 4 * len(found) + 16:
        raise ValueError(f"{stem}{max(found)}, of which {len(found)} are there")
    return count


Shapes = Mapping[str, Sequence[int]]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options) -> Tensor:
    """Scaled dot-product attention of (B, L, D) tensors, D split into `heads`; returns (B, L, D).

    mask: added to the scores; options: `is_causal`, `scale` of torch's scaled_dot_product_attention.
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
    """Sizes of a CLIP text encoder; `positions` is the longest token sequence it takes (77)."""

    width: int
    depth: int
    mlp_width: int
    vocabulary: int
    positions: int
    projection: bool
    activation: str

    @classmethod
    def from_shapes(cls, shapes: Shapes, activation: str, projection: bool) -> CLIPConfig:
        """Reads the sizes off tensor names and shapes (no prefix); the file's role decides activation and projection
        (a projection that CLIP-L's file may hold is not used).
        """
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        if width > 64 and width % 64:
            raise ValueError(f"width {width}, which is no multiple of 64")
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
    """Causal self-attention, heads of 64."""

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

    LAYERS = CLIP_LAYERS  # names of the layers' tensors begin with it and the layer's number
    TABLES = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = _CLIPTextModel(config)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.width, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers, in order."""
        return self.text_model.encoder.layers

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> hidden (B, L, D) and pooled (B, D), see `encode`."""
        tables = self.text_model.embeddings
        x = tables.token_embedding(ids) + tables.position_embedding.weight[: ids.shape[1]]
        return self.encode([x], [ids], self.layers)[0]

    def encode(
        self, texts: Iterable[Tensor], ids: Sequence[Tensor], layers: Iterable[nn.Module]
    ) -> list[tuple[Tensor, Tensor]]:
        """Embedded texts (B, L, D) of ids (B, L) -> of each, hidden (B, L, D), the last but one layer's output without
        the final norm, and pooled (B, D): the last layer's output at the end token (the first place of the largest
        id), with the final norm, projected where the model has a projection.

        layers: the encoder's, or a generator that loads them: a layer runs on all texts, each alone, before the next
        one is asked for.
        """
        states = list(texts)
        hidden = list(states)
        for layer in layers:
            for i, x in enumerate(states):
                hidden[i], states[i] = x, layer(x)
        return [(h, self._pooled(x, own)) for h, x, own in zip(hidden, states, ids, strict=True)]

    def _pooled(self, x: Tensor, ids: Tensor) -> Tensor:
        rows = torch.arange(ids.shape[0], device=ids.device)
        pooled = self.text_model.final_layer_norm(x[rows, ids.argmax(dim=-1)])
        return self.text_projection(pooled) if self.config.projection else pooled


T5_MAX_DISTANCE = 128  # all larger distances share the last bucket
T5_LAYERS, T5_EMBEDDING = "encoder.block.", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; `inner` is heads times the width of a head."""

    width: int
    depth: int
    heads: int
    inner: int
    mlp_width: int
    buckets: int
    vocabulary: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> T5Config:
        """Reads the sizes off tensor names and shapes (no prefix); the embedding is `T5_EMBEDDING`."""
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
    """Attention and gated MLP; the stream x (B, L, D) itself stays in float32."""

    def __init__(self, config: T5Config, bias: bool = False):
        super().__init__()
        self.layer = nn.ModuleList([_T5AttentionLayer(config, bias), _T5MlpLayer(config)])

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, position_bias))


def t5_buckets(length: int, buckets: int, device: torch.device) -> Tensor:
    """Relative-position bucket (L, L) of key minus query: half the buckets for keys after the query, in each half
    the first half exact and the rest logarithmic up to `T5_MAX_DISTANCE`.
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
    """Score bias (1, heads, L, L) of every block, from the table (buckets, heads) of block 0."""
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
        """The transformer's blocks, in order."""
        return self.encoder.block

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, D), see `encode`."""
        return self.encode([self.encoder.embed_tokens(ids).float()], self.layers)[0]

    def encode(self, texts: Iterable[Tensor], layers: Iterable[nn.Module]) -> list[Tensor]:
        """Embedded texts (B, L, D), float32, of any lengths -> of each, hidden states (B, L, D) after the final norm;
        padding is not masked. layers: see `CLIP.encode`.
        """
        states = list(texts)
        biases: dict[int, Tensor] = {}  # by length
        for block in layers:
            if not biases:  # the first block: it alone has the table, for all
                table = block.layer[0].SelfAttention.relative_attention_bias.weight
                biases = {length: t5_position_bias(table, length) for length in {x.shape[1] for x in states}}
            for i, x in enumerate(states):
                states[i] = block(x, biases[x.shape[1]])
        return [self.encoder.final_layer_norm(x) for x in states]


def join_text(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Text tokens (B, L1 + L2, D5): [CLIP-L | CLIP-G | zeros up to T5's width], followed by T5's."""
    clip = torch.cat([clip_l, clip_g], dim=-1)
    return torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=1)


T5_CHARACTERS = 226  # of a prompt that T5 reads, as in the public reference
LARGE_WORD = 8  # tokens from which on a CLIP word is cut where it does not fit; a smaller one is left out
NESTING_WEIGHT = 1.1
_ESCAPES = (("\\(", "\0\1"), ("\\)", "\0\2"))


def weighted_segments(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """Splits a prompt at its parentheses into (text, weight): `(x)` weighs 1.1 times its surroundings, `(x:1.4)`
    exactly 1.4; `\\(`, `\\)` and everything from an unclosed `(` on are plain text.
    """
    for written, hidden in _ESCAPES:
        text = text.replace(written, hidden)
    return [(_unescape(t), w) for t, w in _segments(text, weight)]


def _unescape(text: str) -> str:
    for written, hidden in _ESCAPES:
        text = text.replace(hidden, written[1])
    return text


LONGEST_NUMBER = 400  # characters of a weight; longer text is not parsed as one


def _segments(text: str, weight: float) -> list[tuple[str, float]]:
    """Without recursion: a prompt may be nested as deeply as it is long."""
    closing = _closing(text)
    colons = [i for i, char in enumerate(text) if char == ":"]
    out: list[tuple[str, float]] = []
    todo = [(0, len(text), weight, True)]  # from, to, weight, whether there may be parentheses inside
    while todo:
        start, end, weight, nested = todo.pop()
        if not nested:
            out.append((text[start:end], weight))
            continue
        inside = []
        for a, b in _pieces(text, start, end, closing):
            if b - a < 2 or text[a] != "(" or text[b - 1] != ")":
                inside.append((a, b, weight, False))
            else:
                inside.append((a + 1, *_weighted(text, a + 1, b - 1, weight, colons), True))
        todo += inside[::-1]
    return out


def _closing(text: str) -> dict[int, int]:
    """Place of the `)` by place of its `(`."""
    closing, opened = {}, []
    for i, char in enumerate(text):
        if char == "(":
            opened.append(i)
        elif char == ")" and opened:
            closing[opened.pop()] = i
    return closing


def _pieces(text: str, start: int, end: int, closing: dict[int, int]) -> list[tuple[int, int]]:
    """Splits text[start:end] into parenthesised pieces, with the parentheses, and the pieces between. An unclosed `(`
    starts one last piece; after a surplus `)` the next `(` only balances it.
    """
    pieces, depth, i = [], 0, start
    while i < end:
        if text[i] == "(" and depth == 0:
            pieces.append((start, i))
            start, close = i, closing.get(i, end)
            if close >= end:
                break
            pieces.append((start, close + 1))
            start = i = close + 1
            continue
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
    pieces.append((start, end))
    return [(a, b) for a, b in pieces if a < b]


def _weighted(text: str, start: int, end: int, weight: float, colons: list[int]) -> tuple[int, float]:
    """End and weight of a text in parentheses: the number after its last colon, else 1.1 times the surroundings'."""
    place = bisect.bisect_left(colons, end) - 1
    colon = colons[place] if place >= 0 else -1
    if colon > start and end - colon <= LONGEST_NUMBER:
        try:
            return colon, float(text[colon + 1 : end])
        except ValueError:
            pass  # not a number: the colon is text
    return end, weight * NESTING_WEIGHT


def weighted_words(text: str) -> list[tuple[str, float]]:
    """The words of a prompt, split at spaces, newlines and segment borders, each with its weight."""
    return [
        (word, weight)
        for segment, weight in weighted_segments(text)
        for word in segment.replace("\n", " ").split(" ")
        if word
    ]


@dataclass(frozen=True)
class Tokens:
    """Token ids and weights of one prompt; cut: whether some of the prompt did not fit."""

    ids: list[int]
    weights: list[float]
    cut: bool


class CLIPTokenizer:
    """CLIP's byte-level BPE: `tokenizer` splits a word, this adds weights, start, end and padding."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises ValueError for a tokenizer without CLIP's start and end tokens."""
        self.tokenizer = tokenizer
        self.start = tokenizer.token_to_id(CLIP_START)
        self.end = tokenizer.token_to_id(CLIP_END)
        if self.start is None or self.end is None:
            raise ValueError(f"is no CLIP tokenizer: it has no {CLIP_START} or {CLIP_END}")

    def tokenize(self, prompt: str, length: int, pad: int | None = None) -> Tokens:
        """Exactly `length` tokens: start, as many words as fit, end, padding (`pad`; None: the end token)."""
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
        ids.append(self.end)
        ids += [self.end if pad is None else pad] * (length - len(ids))
        return Tokens(ids, weights + [1.0] * (length - len(weights)), cut)


CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_BPE = {"unk_token": CLIP_END, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}


def clip_pipeline(bpe: models.BPE) -> Tokenizer:
    """The published CLIP tokenizer around its merges, a BPE with the options `CLIP_BPE`: NFC, lower case, white space
    collapsed, words split off, then byte-level BPE.
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
    """T5's unigram pieces: `split` turns a word into piece ids, this adds weights, the end token and padding."""

    end, pad = 1, 0

    def __init__(self, split: Callable[[str], list[int]]):
        self.split = split

    def tokenize(self, prompt: str, minimum: int) -> Tokens:
        """The first 226 characters' tokens and the end token, padded with 0 to at least `minimum`."""
        ids, weights = [], []
        for word, weight in weighted_words(prompt[:T5_CHARACTERS]):
            tokens = self.split(word)
            ids += tokens
            weights += [weight] * len(tokens)
        ids.append(self.end)
        ids += [self.pad] * (minimum - len(ids))
        return Tokens(ids, weights + [1.0] * (len(ids) - len(weights)), len(prompt) > T5_CHARACTERS)


def sentencepiece_split(model: SentencePieceProcessor, rows: int | None = None) -> Callable[[str], list[int]]:
    """A function from a word to its piece ids; `</s>` and the like in a word are their own ids, as on the hub.

    rows: of the encoder's embedding table, where known; extra ids beyond it are not used.
    """
    size = model.get_piece_size()
    extra = {f"<extra_id_{i}>": size + 99 - i for i in range(100) if rows is None or size + 99 - i < rows}
    special = {model.id_to_piece(i): i for i in range(3)} | extra
    borders = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def split(word: str) -> list[int]:
        parts = [p for p in borders.split(word) if p]
        return [i for p in parts for i in ([special[p]] if p in special else model.encode(p))]

    return split
