"""The MMDiT-X: text and image tokens pass through the same joint blocks and meet in one attention.

Covers SD3 Medium, SD3.5 Medium (dual attention), SD3.5 Large (qk-norm) and anything built alike: every size is read
off the tensors. Architecture: Esser et al. 2024, arXiv 2403.03206.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import count_layers
from other_impls import Mlp, Shapes, attention

HEAD_WIDTH = 64  # features per attention head in every MMDiT of the family
FREQUENCIES = 256  # width of the sinusoidal timestep embedding
NORM_EPS = 1e-6

# Called right before block i with (i, context); what it returns enters the block.
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
        return self.proj(x).flatten(2).transpose(1, 2)


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
    """x (B, L, D) scaled and shifted by (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class SelfAttention(nn.Module):
    """q, k, v of one stream, with optional RMS norm of q and k per head, and the output projection."""

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
        """q, k, v, each (B, L, D), of x (B, L, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if hasattr(self, "ln_q"):
            q = self.ln_q(q.unflatten(-1, (self.heads, -1))).flatten(2)
            k = self.ln_k(k.unflatten(-1, (self.heads, -1))).flatten(2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*self.heads_of(x), self.heads))


class StreamBlock(nn.Module):
    """One stream's half of a joint block; alone it is a plain transformer block (a ControlNet is made of these).

    `last` marks the context stream of the last block: it only supplies q, k and v.
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
        """shift, scale[, gate, shift_mlp, scale_mlp, gate_mlp[, shift2, scale2, gate2]], each (B, 1, D)."""
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)

    def before(self, x: Tensor, m: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """(q, k, v) for the attention, and the gated output of the second attention where there is one."""
        n = self.norm(x)
        qkv = self.attn.heads_of(modulate(n, m[0], m[1]))
        return qkv, (m[8] * self.attn2(modulate(n, m[6], m[7])) if self.chunks == 9 else None)

    def after(self, x: Tensor, m: tuple[Tensor, ...], attended: Tensor, second: Tensor | None) -> Tensor:
        """x (B, L, D) after attention and MLP."""
        x = torch.addcmul(x, m[2], self.attn.proj(attended))
        if second is not None:
            x = x + second
        return torch.addcmul(x, m[5], self.mlp(modulate(self.norm(x), m[3], m[4])))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        m = self.modulation(c)
        qkv, second = self.before(x, m)
        return self.after(x, m, attention(*qkv, self.attn.heads), second)


class JointBlock(nn.Module):
    """Both streams, one attention over [context, x]."""

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        sizes = (config.width, config.mlp_width, config.qk_norm)
        self.last = last
        self.context_block = StreamBlock(*sizes, last=last)
        self.x_block = StreamBlock(*sizes, dual=dual)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
        """context (B, T, D), x (B, L, D), c (B, D) -> both streams; no context after the last block."""
        m_context, m_x = self.context_block.modulation(c), self.x_block.modulation(c)
        qkv_context, _ = self.context_block.before(context, m_context)
        qkv_x, second = self.x_block.before(x, m_x)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(qkv_context, qkv_x, strict=True))
        attended = attention(q, k, v, self.x_block.attn.heads)  # (B, T + L, D)
        text, image = attended.split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after(x, m_x, image, second)
        return (None if self.last else self.context_block.after(context, m_context, text, None)), x


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch: (B, L, D) -> (B, L, p * p * C)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.width = config.width
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(F.layer_norm(x, (self.width,), eps=NORM_EPS), shift, scale))


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

    def positions(self, rows: int, columns: int) -> Tensor:
        """The middle (rows, columns) of the position grid: (1, rows * columns, D)."""
        side = self.config.grid
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.pos_embed.view(1, side, side, -1)
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)

    def embed_image(self, x: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> tokens with their positions (B, h/p * w/p, D)."""
        p = self.config.patch
        return self.x_embedder(x) + self.positions(x.shape[2] // p, x.shape[3] // p)

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
        (B, T, X); controls: ControlNet states (B, L, D), spread evenly over the blocks; skip_layers: blocks not
        run at all; hook: sees, and may change, the text tokens entering every block.
        """
        tokens = self.embed_image(x)  # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        context = self.context_embedder(context)  # (B, T, D)
        depth = len(self.joint_blocks)
        for i, block in enumerate(self.joint_blocks):
            if hook is not None:
                context = hook(i, context)  # residual text streaming, or a probe
            if i in skip_layers:
                continue
            context, tokens = block(context, tokens, c)
            if controls:
                tokens = tokens + controls[i * len(controls) // depth]
        return self.unpatchify(self.final_layer(tokens, c), x.shape[2], x.shape[3])

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, L, p * p * C), each token (row, column, channel) of its patch -> (B, C, height, width)."""
        p = self.config.patch
        patches = tokens.view(tokens.shape[0], height // p, width // p, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(tokens.shape[0], -1, height, width)
