"""The MMDiT-X: text and image tokens pass through the same joint blocks and meet in one attention.

Covers SD3 Medium, SD3.5 Medium (dual attention), SD3.5 Large (qk-norm) and anything built alike: every size is read
off the tensors. Architecture: Esser et al. 2024, arXiv 2403.03206.

Residual text streaming: C_i are the text tokens about to enter block i. C_o of the origin o is kept as it arrives;
right before every target block i runs, C_i is mixed with it under the weight w = w_i f(sigma), f the schedule:

add       C_i + w C_o
anchored  LN(standardise(C_i) + w standardise(C_o)), back on C_i's own mean and deviation (token by token)
aligned   the same with standardise(C_o) R_i, R_i an orthogonal matrix that turns the origin's features to block i's

anchored and aligned after "Prompt Reinjection", arXiv 2602.06886.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from other_impls import Mlp, Shapes, count_layers

HEAD_WIDTH = 64  # features per attention head in every MMDiT of the family
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
NORM_EPS = 1e-6
MOST_CODES = 64  # kinds of block (plain, dual, last) times ways to mix, and batches of one, each compiled once
# Called right before block i with (i, context); returns the text tokens that enter the block.
ContextHook = Callable[[int, Tensor], Tensor]


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
        """Reads the sizes off tensor names and shapes (no prefix). Raises KeyError for a missing tensor."""
        width, latent_channels, patch, _ = shapes["x_embedder.proj.weight"]
        if width % HEAD_WIDTH:
            raise ValueError(f"width {width}, which is no multiple of {HEAD_WIDTH}")
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
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # every later operation is slower on a view


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
    """x (B, L, D) times `scale` plus `shift`, both (B, 1, D); the 1 of 1 + scale is in `scale` already."""
    return torch.addcmul(shift, x, scale)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate update, in place where no gradient needs the old x."""
    return torch.addcmul(x, gate, update) if torch.is_grad_enabled() else x.addcmul_(gate, update)


class SelfAttention(nn.Module):
    """q, k, v of one stream, with optional RMS norm of q and k per head, and the output projection.

    Without the projection (`project`), nothing reads this stream's attention output, so there is no q.
    """

    def __init__(self, width: int, qk_norm: bool, project: bool = True):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        if qk_norm:
            self.ln_q = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS)
            self.ln_k = nn.RMSNorm(HEAD_WIDTH, eps=NORM_EPS)
        if project:
            self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """q, k, v, each (B, heads, L, 64), of x (B, L, D). Non-contiguous views."""
        if hasattr(self, "proj"):
            q, k, v = self._split(self.qkv(x))
        else:
            q, (k, v) = None, self._split(self._without_q(x))
        if hasattr(self, "ln_q"):
            q, k = q if q is None else self.ln_q(q), self.ln_k(k)
        return tuple(t if t is None else t.transpose(1, 2) for t in (q, k, v))

    def _without_q(self, x: Tensor) -> Tensor:
        layer, width = self.qkv, self.qkv.in_features
        if layer.out_features == 2 * width:
            return layer(x)  # a packed or 8-bit layer, which stores no query rows
        return F.linear(x, layer.weight[width:], layer.bias[width:])

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.unflatten(-1, (-1, self.heads, HEAD_WIDTH)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.heads_of(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, L, 64) tensors; returns (B, L, D)."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def joined(first: Tensor | None, second: Tensor) -> Tensor:
    """(B, heads, T, 64) and (B, heads, L, 64) -> (B, heads, T + L, 64), contiguous, which SDPA prefers."""
    return second.contiguous() if first is None else torch.cat([first, second], dim=2)


class StreamBlock(nn.Module):
    """One stream's half of a joint block; alone it is a plain transformer block (a ControlNet is made of these).

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

    def modulation(self, active: Tensor) -> Tensor:
        """(B, chunks * D) of SiLU(c) (B, D), see `parts`."""
        m = self.adaLN_modulation[1](active).unflatten(-1, (self.chunks, self.width))
        m[:, SCALES] += 1
        return m.flatten(1)

    def parts(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """shift, 1 + scale[, gate, and the same for the MLP[, and for the second attention]], each (B, 1, D)."""
        return modulation[:, None].chunk(self.chunks, dim=-1)

    def before(self, x: Tensor, m: tuple[Tensor, ...]) -> tuple[tuple[Tensor | None, Tensor, Tensor], Tensor | None]:
        """(q, k, v) for the attention, and the output of the second attention where there is one."""
        n = self.norm(x)
        qkv = self.attn.heads_of(modulate(n, m[0], m[1]))
        return qkv, (self.attn2(modulate(n, m[6], m[7])) if self.chunks == 9 else None)

    def after(self, x: Tensor, m: tuple[Tensor, ...], attended: Tensor, second: Tensor | None) -> Tensor:
        """x (B, L, D) after attention and MLP. Does not modify x: a hook may keep a reference to it."""
        x = torch.addcmul(x, m[2], self.attn.proj(attended))
        if second is not None:
            x = gated(x, m[8], second)
        return gated(x, m[5], self.mlp(modulate(self.norm(x), m[3], m[4])))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """x (B, L, D) through the block, modulated by SiLU(c) (B, D)."""
        m = self.parts(self.modulation(active))
        qkv, second = self.before(x, m)
        return self.after(x, m, attend(*qkv), second)


SCALES = slice(1, None, 3)  # which parts of a modulation are scales


class JointBlock(nn.Module):
    """Both streams, one attention over [context, x]."""

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        sizes = (config.width, config.mlp_width, config.qk_norm)
        self.last = last
        self.context_block = StreamBlock(*sizes, last=last)
        self.x_block = StreamBlock(*sizes, dual=dual)

    def modulation(self, active: Tensor) -> Tensor:
        """(B, all chunks of context and x) of SiLU(c) (B, D), as `forward` takes it."""
        return torch.cat([b.modulation(active) for b in (self.context_block, self.x_block)], dim=-1)

    def forward(self, context: Tensor, x: Tensor, modulation: Tensor) -> tuple[Tensor | None, Tensor]:
        """context (B, T, D), x (B, L, D) -> both streams, new tensors; no context after the last block."""
        widths = [b.chunks * b.width for b in (self.context_block, self.x_block)]
        m_context, m_x = modulation.split(widths, dim=-1)
        m_context, m_x = self.context_block.parts(m_context), self.x_block.parts(m_x)
        qkv_context, _ = self.context_block.before(context, m_context)
        qkv_x, second = self.x_block.before(x, m_x)
        attended = attend(*(joined(*pair) for pair in zip(qkv_context, qkv_x, strict=True)))
        if self.last:
            return None, self.x_block.after(x, m_x, attended, second)  # (B, L, D): there are image queries only
        text, image = attended.split([context.shape[1], x.shape[1]], dim=1)
        # image stream first: frees its (larger) activations before the text stream allocates
        x = self.x_block.after(x, m_x, image.contiguous(), second)
        return self.context_block.after(context, m_context, text.contiguous(), None), x


class Modulators:
    """The modulations of all blocks in one matrix product."""

    def __init__(self, blocks: Iterable[JointBlock], device: torch.device, dtype: torch.dtype):
        self.widths: list[int] = []
        halves = [half for block in blocks for half in (block.context_block, block.x_block)]
        for block in blocks:
            self.widths.append(sum(half.chunks * half.width for half in (block.context_block, block.x_block)))
        width = halves[0].width
        self.weight = torch.empty(sum(self.widths), width, device=device, dtype=dtype)
        self.bias = torch.empty(sum(self.widths), device=device, dtype=dtype)
        self.ones = torch.zeros_like(self.bias)
        row = 0
        for half in halves:
            rows = slice(row, row + half.chunks * width)
            self.ones[rows].view(half.chunks, width)[SCALES] = 1
            layer, row = half.adaLN_modulation[1], rows.stop
            layer.weight = nn.Parameter(self.weight[rows], requires_grad=False)
            layer.bias = nn.Parameter(self.bias[rows], requires_grad=False)

    def __call__(self, active: Tensor) -> Sequence[Tensor]:
        """Each block's modulation, from SiLU(c) (B, D)."""
        return (F.linear(active, self.weight, self.bias) + self.ones).split(self.widths, dim=-1)


def _mixed_block(
    block: JointBlock,
    context: Tensor,
    x: Tensor,
    modulation: Tensor,
    origin: Tensor | None,
    weight: Tensor | None,
    anchored: bool,
) -> tuple[Tensor | None, Tensor]:
    """A block, with residual text streaming mixed into its text tokens first."""
    return block(context if origin is None else mixed(context, origin, weight, anchored), x, modulation)


class Reuse:
    """First-block caching: where block 0 changes the image tokens almost as it did in the last full step, what the
    other blocks added then is added again. One per kind of call and per picture: the criterion is a single number, so
    the pictures of a batch would decide for each other.

    threshold: reuse when the relative L1 change of block 0's output is below this (the criterion of ParaAttention's
    first-block cache).
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.change: Tensor | None = None  # by block 0, in the last full step
        self.rest: Tensor | None = None  # by the other blocks
        self.effect: Sequence[Effect | None] = ()  # of the hooks, in the last full step
        self.expected: Sequence[Effect | None] = ()  # and in this step
        self.reused = 0  # number of steps

    def expect(self, effect: Sequence[Effect | None]) -> None:
        """Announces what hooks mix into the text in the next step. Block 0 cannot show what is mixed in behind it, so a
        step whose mixing differs from the last full one's is computed in full, too.
        """
        self.expected = effect
        if not all(a == b or _close(a, b, self.threshold) for a, b in itertools.zip_longest(effect, self.effect)):
            self.rest = None

    def close_to_last(self, change: Tensor) -> bool:
        """Whether `rest` can be used in a step in which block 0 changes the tokens by `change` (B, L, D)."""
        if self.rest is not None and self.change.shape == change.shape:
            difference = (change - self.change).abs().float().mean() / self.change.abs().float().mean()
            if difference.item() < self.threshold:
                self.reused += 1
                return True
        self.change, self.effect = change, self.expected
        return False


# What a hook mixes in during a call: the factor on its weights, and anything else that must be equal for its effect to
# be equal. None: nothing.
Effect = tuple[float, Any]


def _close(a: Effect | None, b: Effect | None, threshold: float) -> bool:
    """Whether two effects of one kind have factors that differ by less than `threshold`, as a part of the larger."""
    if a is None or b is None or a[1] != b[1]:
        return False
    return abs(a[0] - b[0]) < threshold * max(abs(a[0]), abs(b[0]))


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.width = config.width
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """active: SiLU(c) (B, D)."""
        shift, scale = self.adaLN_modulation[1](active)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(F.layer_norm(x, (self.width,), eps=NORM_EPS), shift, 1 + scale))


@dataclass(frozen=True)
class Text:
    """A text, embedded once for all steps: tokens (B, T, D) and its part of the conditioning (B, D)."""

    context: Tensor
    pooled: Tensor


class Offload(Protocol):
    """Blocks whose weights stay in main memory."""

    def run(self, order: Sequence[int]) -> Iterator[int]:
        """Yields the numbers of the blocks in `order`, each with its weights on the device until the next."""


class MMDiT(nn.Module):
    """The whole network: a noisy latent, its timestep and the text -> a velocity."""

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
        self.modulators: Modulators | None = None  # see `join_modulations`
        self.offload: Offload | None = None  # where blocks stay in main memory
        self.compiled: Callable[..., tuple[Tensor | None, Tensor]] | None = None  # see `compile_blocks`
        self._crop: tuple[tuple, Tensor] | None = None  # the last piece of the position grid

    def join_modulations(self, device: torch.device, dtype: torch.dtype) -> None:
        """Stores all adaLN weights in one matrix; each block holds a row slice. Call before loading, with the blocks on
        the meta device. All modulations of a step are then one product.
        """
        self.modulators = Modulators(self.joint_blocks, device, dtype)

    def compile_blocks(self, **options) -> None:
        """Compiles the blocks, once per kind, for any size and batch; options: torch.compile's."""
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        setattr(config, limit, max(getattr(config, limit), MOST_CODES))
        self.compiled = torch.compile(_mixed_block, dynamic=True, **options)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The middle (rows, columns) of the position grid: (1, rows * columns, D)."""
        table = self.pos_embed
        version = 0 if table.is_inference() else table._version  # in-place changes count
        key = (rows, columns, table.device, table.dtype, table.data_ptr(), version)
        crop = self._crop  # read once: another thread may replace it
        if crop is None or crop[0] != key:
            side = self.config.grid
            top, left = (side - rows) // 2, (side - columns) // 2
            grid = table.detach().view(1, side, side, -1)
            self._crop = crop = key, grid[:, top : top + rows, left : left + columns].flatten(1, 2)
        return crop[1]

    def embed_image(self, x: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> tokens with their positions (B, h/p * w/p, D)."""
        p = self.config.patch
        return self.x_embedder(x) + self.positions(x.shape[2] // p, x.shape[3] // p)

    def embed_text(self, y: Tensor, context: Tensor) -> Text:
        """The part that depends on the text alone: pooled text (B, Y) and text tokens (B, T, X) -> `Text`."""
        return Text(self.context_embedder(context), self.y_embedder(y))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        context: Tensor,
        controls: Sequence[Tensor] = (),
        skip_layers: Collection[int] = (),
        hook: ContextHook | None = None,
    ) -> Tensor:
        """Velocity (B, C, h, w).

        x: noisy latent (B, C, h, w); t: timesteps (B,) in [0, 1000]; y: pooled text (B, Y); context: text tokens
        (B, T, X); for the others see `velocity`.
        """
        return self.velocity(x, t, self.embed_text(y, context), controls, skip_layers, hook)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        controls: Sequence[Tensor] = (),
        skip_layers: Collection[int] = (),
        hook: ContextHook | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Velocity (B, C, h, w) for a text that `embed_text` prepared.

        controls: ControlNet states (B, L, D), spread evenly over the blocks; skip_layers: blocks not run at all;
        hook: sees, and may change, the text tokens entering every block; reuse: the step cache, or None.
        """
        tokens = self.embed_image(x)  # (B, L, D)
        active = F.silu(self.t_embedder(t) + text.pooled)  # (B, D)
        tokens = self._run_blocks(tokens, text.context, active, controls, skip_layers, hook, reuse)
        return self.unpatchify(self.final_layer(tokens, active), x.shape[2], x.shape[3])

    def _run_blocks(
        self,
        tokens: Tensor,
        context: Tensor,
        active: Tensor,
        controls: Sequence[Tensor],
        skip_layers: Collection[int],
        hook: ContextHook | None,
        reuse: Reuse | None,
    ) -> Tensor:
        """The image tokens (B, L, D) after all blocks; arguments as `velocity`."""
        depth = len(self.joint_blocks)
        order = [i for i in range(depth) if i not in skip_layers]
        modulations = None if self.modulators is None else self.modulators(active)
        turns = iter(order) if self.offload is None else self.offload.run(order)
        start, first = tokens, None
        for i, block in enumerate(self.joint_blocks):
            mix = None
            if self.compiled is not None and hasattr(hook, "mix"):
                mix = hook.mix(i, context)  # compiled together with the block
            elif hook is not None:
                context = hook(i, context)  # residual text streaming, or a probe
            if i in skip_layers:
                context = context if mix is None else mix(context)
                continue
            next(turns)  # its weights are on the device now
            m = block.modulation(active) if modulations is None else modulations[i]
            if self.compiled is not None:
                origin = weight = None
                if mix is not None and mix.rows is None:
                    origin, weight = mix.origin, torch.tensor(mix.weight)
                elif mix is not None:
                    context = mix(context)
                anchored = origin is not None and mix.anchored
                context, tokens = self.compiled(block, context, tokens, m, origin, weight, anchored)
            else:
                context, tokens = block(context, tokens, m)
            if controls:
                tokens = tokens + controls[i * len(controls) // depth]
            if reuse is not None and first is None:
                first = tokens
                if reuse.close_to_last(first - start):
                    return first + reuse.rest
        if first is not None:
            reuse.rest = tokens - first
        return tokens

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, L, p * p * C), each token (row, column, channel) of its patch -> (B, C, height, width)."""
        p = self.config.patch
        patches = tokens.view(tokens.shape[0], height // p, width // p, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(tokens.shape[0], -1, height, width)


# ---- residual text streaming: mixing -------------------------------------------------------------

EPS = 1e-6  # least standard deviation, what is added to it in the division, and the layer norm's
TIMESTEPS = 1000  # timesteps are 1000 sigma
MOST_TEXTS = 4  # texts whose prepared origin is kept at once: both halves, the skip-layer pass, and one to spare


def schedule_factor(schedule: str, sigma: float) -> float:
    """f(s) for s = sigma in [0, 1]: constant 1, linear s, cosine (1 + cos(pi (1 - s))) / 2, exp:A e^(-A s)."""
    if schedule == "linear":
        return sigma
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - sigma))) / 2
    if schedule.startswith("exp:"):
        return math.exp(-float(schedule.removeprefix("exp:")) * sigma)
    return 1.0


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (at least 1e-6) of every token of x (..., D): both (..., 1)."""

    variance, mean = torch.var_mean(x, dim=-1, correction=1, keepdim=True)
    return mean, variance.sqrt().clamp(min=EPS)


def standardise(x: Tensor) -> Tensor:
    """Every token of x (..., D) with mean 0 and standard deviation 1, float32."""
    x = x.float()
    mean, deviation = moments(x)
    return (x - mean) / (deviation + EPS)


def mixed(context: Tensor, origin: Tensor, weight: float | Tensor, anchored: bool) -> Tensor:
    """context (B, T, D) with `weight` times origin (B, T, D) mixed in: added, or by `anchored_mix`."""
    return anchored_mix(context, origin, weight) if anchored else _add(context, origin, weight)


def _add(x: Tensor, origin: Tensor, weight: float | Tensor) -> Tensor:
    """x + weight origin; compiled code takes the weight as a tensor (no dimensions), so that it serves for any."""
    return x.add(origin, alpha=weight) if isinstance(weight, (int, float)) else x + weight * origin


def anchored_mix(context: Tensor, origin: Tensor, weight: float | Tensor) -> Tensor:
    """context (B, T, D) mixed with a standardised (for `aligned`: and rotated) origin (B, T, D) float32.

    m = standardise(context) + weight origin; layer norm of m; back on the context's own mean and deviation.
    """

    x = context.float()
    mean, deviation = moments(x)
    m = _add((x - mean) / (deviation + EPS), origin, weight)
    return torch.addcmul(mean, F.layer_norm(m, m.shape[-1:], eps=EPS), deviation).to(context.dtype)


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of the network, as a hook sees it beforehand.

    step: which of `steps`, from 0 (a fraction: between two); sigma in [0, 1]; cond and uncond: the batch rows of either
    half of guidance, as slices with both ends, possibly empty; text: an object that is the same as long as the text is,
    None where that is unknown; skip_layers: blocks that do not run.
    """

    step: float
    steps: int
    sigma: float
    cond: slice
    uncond: slice
    text: Any = None
    skip_layers: Collection[int] = ()

    @classmethod
    def of_rows(
        cls, step: float, steps: int, sigma: float, rows: int, first: str, halves: bool, **others: Any
    ) -> ModelCall:
        """A call with `rows` rows: all of branch `first` (cond or uncond), or with `halves` both, that one first."""
        middle = rows // 2 if halves else rows
        places = (slice(0, middle), slice(middle, rows))
        cond, uncond = places if first == "cond" else places[::-1]
        return cls(step, steps, sigma, cond, uncond, **others)


@dataclass(frozen=True, eq=False)
class Mix:
    """What is mixed into the text tokens before one block: called with them, it returns those that enter the block.

    origin: what is added, `weight` times; anchored: by `anchored_mix`; rows: of the batch, None for all.
    """

    origin: Tensor
    weight: float
    anchored: bool
    rows: slice | None = None

    def __call__(self, context: Tensor) -> Tensor:
        """context (B, T, D); a new tensor."""
        if self.rows is None:
            return self._mixed(context)

        before, after = context[: self.rows.start], context[self.rows.stop :]
        return torch.cat([before, self._mixed(context[self.rows]), after])

    def _mixed(self, context: Tensor) -> Tensor:
        return mixed(context, self.origin, self.weight, self.anchored)


class Rotations(Protocol):
    """Orthogonal matrices that turn the origin's standardised features to a target's, for the mode `aligned`."""

    def bucket(self, sigma: float) -> int:
        """Which of the matrices of a target holds for sigma."""

    def matrix(self, target: int, sigma: float) -> Tensor:
        """(D, D), applied from the right."""


class ResidualStream:
    """The hook of one picture (or batch): called with (i, context) right before block i, returns what enters it.

    `begin` tells it about the network's next call; without that, sigma is 1 and all rows are mixed.
    """

    def __init__(
        self,
        origin: int,
        weights: Mapping[int, float],
        mode: str = "add",
        schedule: str = "constant",
        branch: str = "both",
        acts: Callable[[float, int], bool] = lambda step, steps: True,
        rotations: Rotations | None = None,
    ):
        """origin: the block whose text tokens are kept; weights: by target; mode: add, anchored or aligned, which needs
        rotations; schedule: see `schedule_factor`; branch: both halves of guidance, cond or uncond; acts(step, steps):
        whether a step, of as many as run, is mixed in.
        """
        self.origin, self.weights = origin, dict(weights)
        self.mode, self.schedule, self.branch, self.acts = mode, schedule, branch, acts
        if mode == "aligned" and rotations is None:
            raise ValueError("mode aligned needs rotations")
        self.rotations = rotations
        self.kept: Tensor | None = None  # the origin's tokens, of the rows that are mixed
        self.prepared: dict[int | None, Tensor] = {}  # normalised (None) or rotated (by target) origin
        self._of_text: dict[int, tuple[Any, dict]] = {}  # the same by text, where the origin is the text alone
        self._turned: dict[Any, Tensor] = {}  # rotations on the model's device, in its dtype
        self.sigma, self.factor = 1.0, schedule_factor(schedule, 1.0)
        self.rows, self.whole, self.text = slice(None), True, None
        self.mixes = True  # in the call begun last

    def begin(self, at: ModelCall) -> ResidualStream | None:
        """Gets ready for a call; returns the hook for it, None where nothing is mixed in it."""
        self.mixes = False
        if not self.acts(at.step, at.steps):
            return None
        self.sigma = at.sigma
        self.factor = schedule_factor(self.schedule, at.sigma)
        self.whole, self.text = self.branch == "both", at.text
        if not self.whole:
            self.rows, others = (at.cond, at.uncond) if self.branch == "cond" else (at.uncond, at.cond)
            if self.rows.start == self.rows.stop:
                return None
            self.whole = others.start == others.stop
        self.mixes = True
        return self

    @property
    def effect(self) -> Effect | None:
        """What is mixed in the call begun last, see `mmditx.Effect`; None where nothing is."""
        if not self.mixes or self.factor == 0:
            return None
        return self.factor, self.rotations.bucket(self.sigma) if self.mode == "aligned" else None

    def forget(self) -> None:
        """Drops what was prepared of texts: another picture begins."""
        self._of_text.clear()

    def __call__(self, i: int, context: Tensor) -> Tensor:
        """context (B, T, D) about to enter block i; a new tensor where i is a target."""
        mix = self.mix(i, context)
        return context if mix is None else mix(context)

    def mix(self, i: int, context: Tensor) -> Mix | None:
        """The mix for context (B, T, D) about to enter block i; None where i is no target."""
        if i == self.origin:
            self.kept = context if self.whole else context[self.rows]  # before any mixing here
            text_alone = i == 0 and self.text is not None and not context.requires_grad
            self.prepared = self._prepared_of_text() if text_alone else {}
        if i not in self.weights:
            return None
        anchored = self.mode != "add"
        origin = self._origin(i) if anchored else self.kept
        return Mix(origin, self.weights[i] * self.factor, anchored, None if self.whole else self.rows)

    def _origin(self, i: int) -> Tensor:
        """The standardised origin, rotated for target i where the mode is aligned: once per call, or per text."""
        if None not in self.prepared:
            self.prepared[None] = standardise(self.kept)
        if self.mode != "aligned":
            return self.prepared[None]
        key = (i, self.rotations.bucket(self.sigma))
        if key not in self.prepared:
            turn = self._turned.get(key)
            if turn is None:
                turn = self._turned[key] = self.rotations.matrix(i, self.sigma).to(self.kept.device, self.kept.dtype)
            self.prepared[key] = (self.prepared[None].to(turn.dtype) @ turn).float()
        return self.prepared[key]

    def _prepared_of_text(self) -> dict:
        """What was prepared of this text earlier. Keeps the text itself, so that no other object gets its id."""
        entry = self._of_text.get(id(self.text))
        if entry is None:
            while len(self._of_text) >= MOST_TEXTS:
                del self._of_text[next(iter(self._of_text))]
            entry = self._of_text[id(self.text)] = (self.text, {})
        return entry[1]


def effects(hooks: Sequence[Any]) -> list[Effect | None]:
    """What each hook mixes into the text in the call begun last; None for hooks that only look."""
    return [getattr(hook, "effect", None) for hook in hooks]


def hook_for(hooks: Sequence[Any], at: ModelCall) -> ContextHook | None:
    """The hooks of one call as one, in their order, or None where none is left. A hook with a `begin` gets the call
    first and may sit out.
    """
    ready = [h for h in (hook.begin(at) if hasattr(hook, "begin") else hook for hook in hooks) if h is not None]
    if len(ready) < 2:
        return ready[0] if ready else None

    def chain(i: int, context: Tensor) -> Tensor:
        for hook in ready:
            context = hook(i, context)
        return context

    return chain
