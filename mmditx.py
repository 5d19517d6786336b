"""The MMDiT-X: joint transformer blocks in which text and image tokens share one attention.

Supports SD3 Medium, SD3.5 Medium (dual attention), SD3.5 Large (qk-norm) and models of the same structure: all sizes
are read from the tensors. Architecture: Esser et al. 2024, arXiv 2403.03206.

Residual text streaming: C_i are the text tokens that enter block i. At the origin block o, C_o is kept before anything
is mixed in. Before each target block i, C_o is mixed into C_i with weight w = w_i f(sigma), where f is the schedule:

add       C_i + w C_o
anchored  LN(standardise(C_i) + w standardise(C_o)), rescaled to the mean and deviation of C_i, per token
aligned   as anchored, with standardise(C_o) R_i: the orthogonal R_i rotates the origin's features onto block i's

anchored and aligned follow "Prompt Reinjection", arXiv 2602.06886. `run_blocks` is the loop; `ResidualStream` mixes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from other_impls import Mlp, Shapes, count_layers

HEAD_WIDTH = 64  # features per attention head in every MMDiT of the family
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
NORM_EPS = 1e-6
TIMESTEPS = 1000  # timesteps are 1000 sigma
MIX_EPS = 1e-6  # lower bound of standard deviations, added to them in divisions, and epsilon of the layer norm
MOST_CODES = 64  # compiled variants: kinds of block (plain, dual, last), and batch size 1 on its own
# (i, context (B, T, D)) -> the text tokens that enter block i in its place.
ContextHook = Callable[[int, Tensor], Tensor]
# (context (B, T, D), x (B, L, D), c (B, D)) -> both streams: a JointBlock or a wrapper of one.
Block = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor]]


def run_blocks(
    blocks: Iterable[Block],
    context: Tensor,
    x: Tensor,
    c: Tensor,
    stream: Stream | None = None,
    controls: Sequence[Tensor | None] | None = None,
    skip: Collection[int] = (),
    first: int = 0,
) -> tuple[Tensor | None, Tensor]:
    """Runs the blocks, conditioned on c (B, D), on text tokens context (B, T, D) and image tokens x (B, L, D).

    stream: observes the text tokens and may change them; controls: tensors (B, L, D) or None, added to the image tokens
    after each block; skip: blocks that do not run; first: number of the first of `blocks`. Returns both streams;
    context is None after the model's last block.
    """
    for i, block in enumerate(blocks, first):
        if stream is not None:
            stream.keep(i, context)  # C_o, as it arrives at the origin
            context = stream.mix(i, context)  # C_i <- C_i + w_i f(sigma) C_o at a target
        if i in skip:
            continue
        context, x = block(context, x, c)
        if controls is not None and controls[i] is not None:
            x = x + controls[i]
    return context, x


class Stream:
    """Observes the text tokens that enter each block, and may change them. The base class changes nothing."""

    effect: Any = None  # what the current call mixes in, which `Reuse` compares; None: nothing

    def begin(self, at: ModelCall) -> bool:
        """Prepares for a model call; returns whether this stream takes part in it."""
        return True

    def keep(self, i: int, context: Tensor) -> None:
        """Receives context (B, T, D) as it arrives at block i, before any stream mixes into it there."""

    def mix(self, i: int, context: Tensor) -> Tensor:
        """Returns what enters block i in place of context (B, T, D): a new tensor, or context itself."""
        return context


class ResidualStream(Stream):
    """Residual text streaming for one image or batch. Before the first `begin`, sigma is 1 and all rows are mixed."""

    def __init__(
        self,
        origin: int,
        weights: Mapping[int, float],
        mode: str = "add",
        schedule: str = "constant",
        branch: str = "both",
        acts: Callable[[float, int], bool] = lambda step, steps: True,
        rotations: Rotations | None = None,
        tokens: str = "all",
    ):
        """origin: the block whose text tokens are kept; weights: by target block; mode: add, anchored or aligned;
        schedule: see `schedule_factor`; branch: cond, uncond or both; acts(step, steps): whether to mix in this step of
        `steps`; rotations: required by aligned; tokens: which tokens are mixed, see `TokenKinds.share`. Raises
        ValueError if aligned has no rotations.
        """
        self.origin, self.weights = origin, dict(weights)
        self.mode, self.schedule, self.branch, self.acts = mode, schedule, branch, acts
        if mode == "aligned" and rotations is None:
            raise ValueError("mode aligned needs rotations")
        self.rotations, self.tokens = rotations, tokens
        self.origin_context: Tensor | None = None  # C_o of the rows that are mixed
        self.prepared: dict[Any, Tensor] = {}  # standardised C_o (key None), and rotated C_o by (target, bucket)
        self.matrices: dict[Any, Tensor] = {}  # rotations by (target, bucket), on the model's device and in its dtype
        self.sigma, self.factor = 1.0, schedule_factor(schedule, 1.0)
        self.rows: slice | None = None  # rows of the batch that are mixed; None: all
        self.text: Text | None = None
        self.kinds: TokenKinds | None = None
        self.share: Tensor | None = None  # factor on the weights per token; None: 1
        self.shares: dict[tuple, Tensor | None] = {}  # cache of `share`, per text
        self.mixes = True  # whether the current call mixes anything in

    def begin(self, at: ModelCall) -> bool:
        """Prepares for a model call; returns False if it mixes nothing in."""
        self.sigma, self.factor, self.text = at.sigma, schedule_factor(self.schedule, at.sigma), at.text
        self.kinds = at.kinds
        rows, others = (at.cond, at.uncond) if self.branch == "cond" else (at.uncond, at.cond)
        all_rows = self.branch == "both" or others.start == others.stop
        self.rows = None if all_rows else rows
        self.mixes = self.acts(at.step, at.steps) and (self.branch == "both" or rows.start < rows.stop)
        return self.mixes

    def keep(self, i: int, context: Tensor) -> None:
        """Keeps context (B, T, D) if block i is the origin."""
        if i == self.origin:
            self.origin_context = context if self.rows is None else context[self.rows]
            self.share = self._share(context)
            text_alone = i == 0 and self.text is not None and not context.requires_grad
            self.prepared = self.text.prepared.setdefault(self, {}) if text_alone else {}

    def _share(self, context: Tensor) -> Tensor | None:
        """Factor on the weights per token of context (B, T, D): (mixed rows or 1, T, 1); None: 1."""
        key = self.kinds, context.shape[1], context.device
        if key not in self.shares:
            self.shares[key] = share_of(self.kinds, self.tokens, context)
        share = self.shares[key]
        return share if share is None or self.rows is None or share.shape[0] == 1 else share[self.rows]

    def mix(self, i: int, context: Tensor) -> Tensor:
        """Returns context (B, T, D) with the origin's tokens mixed in, or context itself if block i is not a target."""
        if i not in self.weights:
            return context
        if self.rows is None:
            return self._mixed(i, context)
        before, after = context[: self.rows.start], context[self.rows.stop :]
        return torch.cat([before, self._mixed(i, context[self.rows]), after])

    def _mixed(self, i: int, context: Tensor) -> Tensor:
        w = self.weights[i] * self.factor
        if self.mode == "add":
            if self.share is None:
                return context.add(self.origin_context, alpha=w)  # C_i + w C_o
            mixed = (context + w * self.share * self.origin_context).to(context.dtype)
        elif self.share is None:
            return anchored_mix(context, self._direction(i), w)
        else:
            mixed = anchored_mix(context, self._direction(i) * self.share, w)
        return torch.where(self.share == 0, context, mixed)

    def _direction(self, i: int) -> Tensor:
        """standardise(C_o) in float32, for aligned times R_i. Computed once per call, or once per text if the origin is
        block 0, whose input does not change between steps.
        """
        if None not in self.prepared:
            self.prepared[None] = standardise(self.origin_context)
        if self.mode != "aligned":
            return self.prepared[None]
        key = i, self.rotations.bucket(self.sigma)
        if key not in self.prepared:
            if key not in self.matrices:
                self.matrices[key] = self.rotations.matrix(i, self.sigma).to(
                    self.origin_context.device, self.origin_context.dtype
                )
            self.prepared[key] = (self.prepared[None].to(self.origin_context.dtype) @ self.matrices[key]).float()
        return self.prepared[key]

    @property
    def effect(self) -> tuple[float, Any] | None:
        """Schedule factor and rotation bucket (None unless aligned) of the current call; None if nothing is mixed."""
        if not self.mixes or self.factor == 0:
            return None
        return self.factor, self.rotations.bucket(self.sigma) if self.mode == "aligned" else None


@dataclass(frozen=True, eq=False)
class TokenKinds:
    """Kinds of the text tokens of a batch. clip: number of CLIP's tokens, which come first, before T5's; words: (B, T)
    bool, False for padding, None if unknown; weights: (B, T) factors on the residual weights, None for 1.
    """

    clip: int
    words: Tensor | None = None
    weights: Tensor | None = None

    def share(self, tokens: str, length: int) -> Tensor | None:
        """Factor on the residual weights for each of `length` tokens, (B or 1, T, 1); None for 1.

        tokens: all, words, padding, clip or t5. Raises ValueError if words or padding are asked for but unknown.
        """
        chosen = None
        if tokens in ("words", "padding"):
            if self.words is None:
                raise ValueError(f"tokens {tokens}: it is not known which tokens are words")
            chosen = self.words if tokens == "words" else ~self.words
        elif tokens != "all":
            clip = torch.arange(length)[None] < self.clip
            chosen = clip if tokens == "clip" else ~clip
        if chosen is None:
            return None if self.weights is None else self.weights[..., None]
        chosen = chosen.float()
        return (chosen if self.weights is None else chosen * self.weights.to(chosen.device))[..., None]

    def rows(self, rows: slice) -> TokenKinds:
        """The kinds of some rows of the batch."""
        return TokenKinds(self.clip, *(None if part is None else part[rows] for part in (self.words, self.weights)))


def share_of(kinds: TokenKinds | None, tokens: str, context: Tensor) -> Tensor | None:
    """`TokenKinds.share` for context (B, T, D), on its device, in float32. Raises ValueError if the kinds are needed
    but unknown.
    """
    if kinds is None:
        if tokens != "all":
            raise ValueError(f"tokens {tokens}: it is not known what the text tokens are")
        return None
    share = kinds.share(tokens, context.shape[1])
    return None if share is None else share.to(context.device)


def anchored_mix(context: Tensor, direction: Tensor, w: float) -> Tensor:
    """Mixes context (B, T, D) with direction (B, T, D) float32, the standardised and, for aligned, rotated origin.

    m = standardise(context) + w direction; then layer norm of m, rescaled to the context's mean and deviation.
    """
    x = context.float()
    mean, deviation = moments(x)
    m = ((x - mean) / (deviation + MIX_EPS)).add(direction, alpha=w)
    return torch.addcmul(mean, F.layer_norm(m, m.shape[-1:], eps=MIX_EPS), deviation).to(context.dtype)


def standardise(x: Tensor) -> Tensor:
    """Scales every token of x (..., D) to mean 0 and standard deviation 1; float32."""
    x = x.float()
    mean, deviation = moments(x)
    return (x - mean) / (deviation + MIX_EPS)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (at least 1e-6) of every token of x (..., D): both (..., 1)."""
    variance, mean = torch.var_mean(x, dim=-1, correction=1, keepdim=True)
    return mean, variance.sqrt().clamp(min=MIX_EPS)


def schedule_factor(schedule: str, sigma: float) -> float:
    """f(s) for s = sigma in [0, 1]: constant 1, linear s, cosine (1 + cos(pi (1 - s))) / 2, exp:A e^(-A s)."""
    if schedule == "linear":
        return sigma
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - sigma))) / 2
    if schedule.startswith("exp:"):
        return math.exp(-float(schedule.removeprefix("exp:")) * sigma)
    return 1.0


class Rotations(Protocol):
    """Orthogonal matrices that rotate the origin's standardised features onto a target's, for mode `aligned`."""

    def bucket(self, sigma: float) -> int:
        """Index of the matrix to use at sigma, among those of a target."""

    def matrix(self, target: int, sigma: float) -> Tensor:
        """The matrix (D, D), multiplied from the right."""


@dataclass(frozen=True, eq=False)
class Text:
    """Text that is embedded once for all steps. context: tokens (B, T, D); pooled: its term of the conditioning vector,
    (B, D); y: raw pooled text (B, Y), for a ControlNet.
    """

    context: Tensor
    pooled: Tensor
    y: Tensor
    # Cache of streams with origin block 0: they cost 0.6 % of a step, not 1.9 % (benchmarks/residual_cost.py, aligned).
    prepared: dict[Stream, dict] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the model, as announced to streams.

    step: number of the step, from 0, of `steps` that run; fractional between two steps; sigma in [0, 1]; cond, uncond:
    batch rows of the conditional and the unconditional pass, as slices with start and stop, possibly empty; text: the
    embedded text; kinds: of its tokens; both None if unknown; skip_layers: blocks that do not run.
    """

    step: float
    steps: int
    sigma: float
    cond: slice
    uncond: slice
    text: Text | None = None
    skip_layers: Collection[int] = ()
    kinds: TokenKinds | None = None

    @classmethod
    def of_rows(
        cls, step: float, steps: int, sigma: float, rows: int, first: str, halves: bool, **others: Any
    ) -> ModelCall:
        """A call with `rows` rows of branch `first` (cond or uncond); with `halves`, half of both, `first` first."""
        middle = rows // 2 if halves else rows
        places = (slice(0, middle), slice(middle, rows))
        cond, uncond = places if first == "cond" else places[::-1]
        return cls(step, steps, sigma, cond, uncond, **others)


class Hook(Stream):
    """Wraps a function (i, context) -> text tokens that enter block i, as a stream."""

    def __init__(self, function: ContextHook):
        self.mix = function


class Streams(Stream):
    """Several streams as one: at each block, all keep the tokens that arrive; then they mix, in order."""

    def __init__(self, streams: Iterable[Stream | ContextHook | None]):
        """Functions become `Hook`s, None is dropped, and nested `Streams` are flattened."""
        self.streams: list[Stream] = []
        for s in streams:
            if s is not None:
                self.streams += s.streams if isinstance(s, Streams) else [s if isinstance(s, Stream) else Hook(s)]
        self.ready = self.streams  # those that take part in the current call

    def begin(self, at: ModelCall) -> bool:
        """Announces a model call to all streams; returns whether any takes part."""
        self.ready = [s for s in self.streams if s.begin(at)]
        return bool(self.ready)

    def keep(self, i: int, context: Tensor) -> None:
        """See `Stream`."""
        for stream in self.ready:
            stream.keep(i, context)

    def mix(self, i: int, context: Tensor) -> Tensor:
        """See `Stream`."""
        for stream in self.ready:
            context = stream.mix(i, context)
        return context

    @property
    def effect(self) -> list[tuple[float, Any] | None]:
        """The effect of each stream that takes part."""
        return [stream.effect for stream in self.streams]


# ---- the network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT-X. `dual_layers` are the blocks whose image stream has a second attention."""

    latent_channels: int
    patch: int
    width: int
    depth: int
    context_width: int
    pooled_width: int
    mlp_width: int
    grid: int  # side of the position grid, in tokens
    qk_norm: bool
    dual_layers: frozenset[int] = frozenset()

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> MMDiTConfig:
        """Reads the sizes from tensor names and shapes (no prefix). Raises KeyError for a missing tensor."""
        width, latent_channels, patch, _ = shapes["x_embedder.proj.weight"]
        if width % HEAD_WIDTH:
            raise ValueError(f"width {width}, which is not a multiple of {HEAD_WIDTH}")
        depth = count_layers(shapes, "joint_blocks.")
        dual = (i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes)
        return cls(
            latent_channels=latent_channels,
            patch=patch,
            width=width,
            depth=depth,
            context_width=shapes["context_embedder.weight"][1],
            pooled_width=shapes["y_embedder.mlp.0.weight"][1],
            mlp_width=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
            grid=math.isqrt(shapes["pos_embed"][1]),
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            dual_layers=frozenset(dual),
        )

    @property
    def heads(self) -> int:
        """Attention heads: width / 64."""
        return self.width // HEAD_WIDTH


class PatchEmbed(nn.Module):
    """Latent (B, C, h, w) -> tokens (B, h/p * w/p, D), row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # views slow down every later operation


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear: pooled text (B, Y) -> (B, D)."""

    def __init__(self, inp: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inp, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoidal features [cos | sin] (B, 256), float32, of timesteps (B,) in [0, 1000]."""
    half = FREQUENCIES // 2
    f = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * f  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(VectorEmbedder):
    """Timesteps (B,) in [0, 1000] -> (B, D)."""

    def __init__(self, width: int):
        super().__init__(FREQUENCIES, width)

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(timestep_features(t).to(self.mlp[0].weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) times (1 + scale), plus shift, both (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update; in place if no gradient needs the old x."""
    return torch.addcmul(x, gate, update) if torch.is_grad_enabled() else x.addcmul_(gate, update)


class SelfAttention(nn.Module):
    """q, k, v of one stream, with optional RMS norm of q and k per head, and the output projection (`project`)."""

    def __init__(self, width: int, qk_norm: bool, project: bool = True):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        if qk_norm:
            self.ln_q = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS)
            self.ln_k = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS)
        if project:
            self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, L, 64), of x (B, L, D). Non-contiguous views."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_WIDTH)).unbind(2)
        if hasattr(self, "ln_q"):
            q, k = self.ln_q(q), self.ln_k(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.heads_of(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, L, 64) tensors; returns (B, L, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class StreamBlock(nn.Module):
    """One stream's half of a joint block; on its own, a plain transformer block, as used by ControlNets.

    `last` marks the context stream of the last block: it only supplies k and v.
    """

    def __init__(self, width: int, mlp_width: int, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.width = width
        self.chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))
        self.attn = SelfAttention(width, qk_norm, project=not last)
        if dual:
            self.attn2 = SelfAttention(width, qk_norm)
        if not last:
            self.mlp = Mlp(width, mlp_width)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=NORM_EPS)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale[, gate, and the same for the MLP[, and for the second attention]], each (B, 1, D)."""
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)

    def before(self, x: Tensor, m: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """(q, k, v) for the joint attention, and the output of the second attention or None."""
        n = self.norm(x)
        qkv = self.attn.heads_of(modulate(n, m[0], m[1]))
        return qkv, (self.attn2(modulate(n, m[6], m[7])) if self.chunks == 9 else None)

    def after(self, x: Tensor, m: tuple[Tensor, ...], attended: Tensor, second: Tensor | None) -> Tensor:
        """x (B, L, D) after attention and MLP. Does not modify x: a hook may keep a reference to it."""
        x = torch.addcmul(x, m[2], self.attn.proj(attended))
        if second is not None:
            x = gated(x, m[8], second)
        return gated(x, m[5], self.mlp(modulate(self.norm(x), m[3], m[4])))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Runs the block on x (B, L, D), conditioned on c (B, D)."""
        m = self.modulation(c)
        qkv, second = self.before(x, m)
        return self.after(x, m, attend(*qkv), second)


class JointBlock(nn.Module):
    """A joint block: two streams with one attention over [context, x]."""

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        sizes = (config.width, config.mlp_width, config.qk_norm)
        self.last = last
        self.context_block = StreamBlock(*sizes, last=last)
        self.x_block = StreamBlock(*sizes, dual=dual)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
        """context (B, T, D), x (B, L, D), c (B, D) -> both streams as new tensors; context is None after the last
        block.
        """
        m_context, m_x = self.context_block.modulation(c), self.x_block.modulation(c)
        qkv_context, _ = self.context_block.before(context, m_context)
        qkv_x, second = self.x_block.before(x, m_x)
        attended = attend(*(torch.cat(pair, dim=2) for pair in zip(qkv_context, qkv_x, strict=True)))
        text, image = attended.split([context.shape[1], x.shape[1]], dim=1)
        # image stream first: frees its (larger) activations before the text stream allocates
        x = self.x_block.after(x, m_x, image.contiguous(), second)
        return None if self.last else self.context_block.after(context, m_context, text.contiguous(), None), x


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.width = config.width
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, p * p * C), conditioned on c (B, D)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(F.layer_norm(x, (self.width,), eps=NORM_EPS), shift, scale))


class Offload(Protocol):
    """Keeps the blocks' weights in main memory."""

    def bring(self, skip: Collection[int]) -> Iterable[Block]:
        """Yields the blocks in order, each with its weights on the device until the next one; not those in `skip`."""


class MMDiT(nn.Module):
    """The whole network: noisy latent, timestep and text -> velocity."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        depth, width = config.depth, config.width
        self.x_embedder = PatchEmbed(config.latent_channels, width, config.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, width), requires_grad=False)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = VectorEmbedder(config.pooled_width, width)
        self.context_embedder = nn.Linear(config.context_width, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_layers, last=i == depth - 1) for i in range(depth)
        )
        self.final_layer = FinalLayer(config)
        self.offload: Offload | None = None  # set if the blocks stay in main memory

    def compile_blocks(self, **options: Any) -> None:
        """Compiles the blocks, once per kind, for any image and batch size; options: those of torch.compile."""
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        setattr(config, limit, max(getattr(config, limit), MOST_CODES))
        for block in self.joint_blocks:
            block.compile(dynamic=True, **options)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The middle (rows, columns) of the position grid: (1, rows * columns, D)."""
        side = self.config.grid
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.pos_embed.view(1, side, side, -1)
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)

    def embed_image(self, x: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> tokens (B, h/p * w/p, D) with position embeddings."""
        p = self.config.patch
        return self.x_embedder(x) + self.positions(x.shape[2] // p, x.shape[3] // p)

    def embed_text(self, y: Tensor, context: Tensor) -> Text:
        """Pooled text y (B, Y) and text tokens (B, T, X) -> `Text`, which depends on neither latent nor timestep."""
        return Text(self.context_embedder(context), self.y_embedder(y), y)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        context: Tensor,
        controls: Sequence[Tensor | None] | None = None,
        skip_layers: Collection[int] = (),
        stream: Stream | None = None,
    ) -> Tensor:
        """Velocity (B, C, h, w).

        x: noisy latent (B, C, h, w); t: timesteps (B,) in [0, 1000]; y: pooled text (B, Y); context: text tokens
        (B, T, X); others: see `velocity`.
        """
        return self.velocity(x, t, self.embed_text(y, context), controls, skip_layers, stream)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        controls: Sequence[Tensor | None] | None = None,
        skip_layers: Collection[int] = (),
        stream: Stream | None = None,
        run: Callable[..., tuple[Tensor | None, Tensor]] = run_blocks,
    ) -> Tensor:
        """Velocity (B, C, h, w) for a text that `embed_text` prepared.

        controls: ControlNet states (B, L, D) or None per block; skip_layers: blocks that do not run; stream: observes
        the text tokens that enter each block, and may change them; run: `run_blocks` or a wrapper (`Reuse.run`).
        """
        c = self.t_embedder(t) + text.pooled  # (B, D)
        blocks = self.joint_blocks if self.offload is None else self.offload.bring(skip_layers)
        _, tokens = run(blocks, text.context, self.embed_image(x), c, stream, controls, skip_layers)
        return self.unpatchify(self.final_layer(tokens, c), x.shape[2], x.shape[3])

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, L, p * p * C), each a patch in the order (row, column, channel) -> (B, C, height, width)."""
        p = self.config.patch
        patches = tokens.view(tokens.shape[0], height // p, width // p, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(tokens.shape[0], -1, height, width)


class Reuse:
    """First-block caching: if block 0 changes the image tokens almost as in the last full step, adds what the other
    blocks added in that step instead of running them. Needs one instance per kind of call and image: the criterion is a
    single number, so the images of a batch would affect each other.

    threshold: reuse when the relative L1 change of block 0's output is below this (the criterion of ParaAttention's
    first-block cache).
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.change: Tensor | None = None  # change of the image tokens by block 0 in the last full step
        self.rest: Tensor | None = None  # change by the other blocks
        self.effect: Any = None  # effect of the stream in the last full step
        self.reused = 0  # number of steps in which `rest` was reused

    def run(
        self,
        blocks: Iterable[Block],
        context: Tensor,
        x: Tensor,
        c: Tensor,
        stream: Stream | None = None,
        controls: Sequence[Tensor | None] | None = None,
        skip: Collection[int] = (),
    ) -> tuple[Tensor | None, Tensor]:
        """As `run_blocks`; context is None if the other blocks do not run."""
        blocks = iter(blocks)
        head = 1 + next(i for i in itertools.count() if i not in skip)
        options = stream, controls, skip
        context, first = run_blocks(itertools.islice(blocks, head), context, x, c, *options)
        if self.close_to_last(first - x, None if stream is None else stream.effect):
            return None, first + self.rest
        context, x = run_blocks(blocks, context, first, c, *options, first=head)
        self.rest = x - first
        return context, x

    def close_to_last(self, change: Tensor, effect: Any = None) -> bool:
        """Whether `rest` can be reused in a step in which block 0 changes the image tokens by `change` (B, L, D) and
        the stream mixes in `effect`. Both must be close: block 0 does not show what is mixed in at later blocks.
        """
        comparable = self.rest is not None and self.change.shape == change.shape
        if comparable and same_effect(effect, self.effect, self.threshold):
            difference = (change - self.change).abs().float().mean() / self.change.abs().float().mean()
            if difference.item() < self.threshold:
                self.reused += 1
                return True
        self.change, self.effect = change, effect
        return False


def same_effect(a: Any, b: Any, threshold: float) -> bool:
    """Whether two effects (of `ResidualStream` or `Streams`, or None) are equal but for factors that differ by less
    than `threshold` relative to the larger.
    """
    pairs = itertools.zip_longest(*(e if isinstance(e, list) else [e] for e in (a, b)))
    return all(p == q or _close(p, q, threshold) for p, q in pairs)


def _close(a: tuple[float, Any] | None, b: tuple[float, Any] | None, threshold: float) -> bool:
    if a is None or b is None or a[1] != b[1]:
        return False
    return abs(a[0] - b[0]) < threshold * max(abs(a[0]), abs(b[0]))
