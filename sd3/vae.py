"""The autoencoder: pixels (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H/8, W/8).

The usual KL autoencoder of latent diffusion models. Its width, levels and block counts are read from the tensors, so
released files and the small demo model load through the same path.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from other_impls import Shapes, attention

OVERLAP = 64  # pixels shared by neighbouring tiles; about 26 pixels at a tile's edge lack context
_ONE_AT_A_TIME = threading.Lock()  # a tiled run stores its statistics in the norms, so other threads must wait
LARGE_LEVELS = 2  # levels of full and half size: only these are tiled
PEAK_TENSORS = 3.5  # peak memory of decoding, in widest full-size tensors


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder. `widths[i]` is the channel count of resolution level i (0 is full size)."""

    image_channels: int
    latent_channels: int
    stem_width: int
    widths: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> VAEConfig:
        """Reads the sizes off tensor names and shapes (no prefix). Raises KeyError for a missing tensor."""
        levels = 0
        while f"encoder.down.{levels}.block.0.conv1.weight" in shapes:
            levels += 1

        def count(stem: str) -> int:
            n = 0
            while f"{stem}.{n}.conv1.weight" in shapes:
                n += 1
            return n

        return cls(
            image_channels=shapes["encoder.conv_in.weight"][1],
            latent_channels=shapes["decoder.conv_in.weight"][1],
            stem_width=shapes["encoder.conv_in.weight"][0],
            widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
            encoder_blocks=count("encoder.down.0.block"),
            decoder_blocks=count("decoder.up.0.block"),
        )

    def decoding_bytes(self, width: int, height: int, dtype: torch.dtype) -> int:
        """Estimated peak memory in bytes of decoding an image of this size (in pixels) without tiles, not counting the
        weights. docs/performance.md has measurements.
        """
        # The full-size blocks get their input from level 1 and have its width.
        widest = self.widths[1] if len(self.widths) > 1 else self.widths[0]
        return int(PEAK_TENSORS * width * height * widest * torch.empty((), dtype=dtype).element_size())

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 8 in every released model."""
        return 2 ** (len(self.widths) - 1)


class Norm(nn.GroupNorm):
    """Group norm that can take its mean and standard deviation from another input. Tiles must be normalised with the
    statistics of the whole image, otherwise neighbouring tiles differ in tone.
    """

    fixed: tuple[Tensor, Tensor] | None = None  # factor and offset per channel, (B, C, 1, 1)
    fixes_next = False  # True: the next input sets `fixed`

    def forward(self, x: Tensor) -> Tensor:
        if self.fixes_next:
            self.fixed, self.fixes_next = self._line(x), False
        return super().forward(x) if self.fixed is None else torch.addcmul(self.fixed[1], x, self.fixed[0])

    def _line(self, x: Tensor) -> tuple[Tensor, Tensor]:
        groups = x.float().reshape(x.shape[0], self.num_groups, -1)
        variance, mean = torch.var_mean(groups, dim=-1, correction=0)  # (B, groups)
        each = self.num_channels // self.num_groups
        inverse, mean = (t.repeat_interleave(each, dim=1) for t in ((variance + self.eps).rsqrt(), mean))  # (B, C)
        factor = inverse * self.weight
        return tuple(t[..., None, None].to(x.dtype) for t in (factor, self.bias - mean * factor))


def _norm(channels: int) -> Norm:
    # 32 groups at the released widths (128 and up); fewer if a group would have under 4 channels.
    return Norm(min(32, channels // 4), channels, eps=1e-6)


def _conv3(inp: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inp, out, 3, padding=1)


class ResnetBlock(nn.Module):
    """(norm, SiLU, conv) twice, added to the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, inp: int, out: int):
        super().__init__()
        self.norm1 = _norm(inp)
        self.conv1 = _conv3(inp, out)
        self.norm2 = _norm(out)
        self.conv2 = _conv3(out, out)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.norm(x)
        q, k, v = (p(n).flatten(2).transpose(1, 2) for p in (self.q, self.k, self.v))  # (B, H*W, C)
        out = attention(q, k, v, heads=1)
        return x + self.proj_out(out.transpose(1, 2).reshape(b, c, h, w))


class Resample(nn.Module):
    """Halves the size (pad right and bottom by one, stride 2) or doubles it (nearest, then convolve)."""

    def __init__(self, width: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Group(nn.Module):
    """A container of named children, nested as the names in the file are (`mid.block_1`, `down.0.block.1`)."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _middle(width: int) -> _Group:
    return _Group(block_1=ResnetBlock(width, width), attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> mean and log-variance (B, 2 * 16, H/8, W/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.conv_in = _conv3(config.image_channels, config.stem_width)
        self.down = nn.ModuleList()
        width = config.stem_width
        for level, out in enumerate(config.widths):
            blocks = nn.ModuleList()
            for _ in range(config.encoder_blocks):
                blocks.append(ResnetBlock(width, out))
                width = out
            children = {"block": blocks}
            if level < len(config.widths) - 1:
                children["downsample"] = Resample(width, up=False)
            self.down.append(_Group(**children))
        self.mid = _middle(width)
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.large(x))

    def large(self, x: Tensor) -> Tensor:
        """The levels of full and half size: pixels -> (B, C, H/4, W/4)."""
        return self._levels(self.conv_in(x), self.down[:LARGE_LEVELS])

    @staticmethod
    def _levels(x: Tensor, levels: Iterable[nn.Module]) -> Tensor:
        for level in levels:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return x

    def small(self, x: Tensor) -> Tensor:
        """The levels after `large`: (B, C, H/4, W/4) -> mean and log-variance (B, 2 * 16, H/8, W/8)."""
        x = self._levels(x, self.down[LARGE_LEVELS:])
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, 16, h, w) -> pixels (B, 3, 8h, 8w). Levels run from the highest index down."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.widths[-1]
        self.conv_in = _conv3(config.latent_channels, width)
        self.mid = _middle(width)
        levels = []
        for level, out in reversed(list(enumerate(config.widths))):
            blocks = nn.ModuleList()
            for _ in range(config.decoder_blocks):
                blocks.append(ResnetBlock(width, out))
                width = out
            children = {"block": blocks}
            if level > 0:
                children["upsample"] = Resample(width, up=True)
            levels.insert(0, _Group(**children))
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        return self.large(self.small(z))

    @staticmethod
    def _levels(x: Tensor, levels: Iterable[nn.Module]) -> Tensor:
        for level in levels:
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return x

    def small(self, z: Tensor) -> Tensor:
        """Attention and the levels of an eighth and a quarter of the size: latents -> (B, C, H/2, W/2)."""
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self._levels(x, reversed(self.up[LARGE_LEVELS:]))

    def large(self, x: Tensor) -> Tensor:
        """The levels of half and full size: the result of `small` -> pixels."""
        x = self._levels(x, reversed(self.up[:LARGE_LEVELS]))
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Encoder and decoder. Latents here are raw: the SD3 latent format is applied in `sd3_impls`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and unclamped log-variance, each (B, 16, H/8, W/8), of `image` (B, 3, H, W) in [-1, 1].

        tile: side of a tile in pixels; tiles are encoded one at a time and blended. 0: no tiles.
        """
        with _ONE_AT_A_TIME:
            return self._moments(image, tile)

    def _moments(self, image: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        image = image.contiguous(memory_format=torch.channels_last)
        ratio = 2 ** min(LARGE_LEVELS, len(self.config.widths) - 1)
        overlap = min(OVERLAP, tile // 4)
        states = tiled(self.encoder.large, image, tile, overlap, lambda n: n // ratio, ratio)
        return self.encoder.small(states).contiguous().chunk(2, dim=1)

    @staticmethod
    def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """mean + std * noise, with the log-variance clamped to [-30, 20]."""
        return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise.to(mean)

    def decode(self, latent: Tensor, tile: int = 0) -> Tensor:
        """Decodes a raw latent (B, 16, h, w) to pixels (B, 3, 8h, 8w), about [-1, 1], not clamped.

        tile: see `moments`.
        """
        with _ONE_AT_A_TIME:
            return self._decode(latent, tile)

    def _decode(self, latent: Tensor, tile: int) -> Tensor:
        states = self.decoder.small(latent.contiguous(memory_format=torch.channels_last))
        ratio = self.config.downscale * latent.shape[2] // states.shape[2]
        overlap = min(OVERLAP, tile // 4) // ratio
        return tiled(self.decoder.large, states, tile // ratio, overlap, lambda n: n * ratio).contiguous()


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    scale: Callable[[int], int],
    align: int = 1,
) -> Tensor:
    """Computes run(x) tile by tile, from overlapping tiles of x (B, C, H, W) of at most `tile` by `tile`. Computes it
    at once if tile is 0 or x is no larger than a tile.

    run: a method of a module; scale: maps a position in x, a multiple of `align`, to a position in the result.
    Neighbouring tiles share at least `overlap` positions and are blended there with a linear ramp. All norms take mean
    and standard deviation from a small copy of x, so that all tiles are normalised in the same way.
    """
    if not tile or max(x.shape[2:]) <= tile:
        return run(x)
    norms = [m for m in run.__self__.modules() if isinstance(m, Norm)]
    try:
        for norm in norms:
            norm.fixes_next = True
        step = math.ceil(max(x.shape[2:]) / tile)
        copy = x[:, :, step // 2 :: step, step // 2 :: step]  # subsampled: averaging would smooth the image
        copy = copy[:, :, : copy.shape[2] // align * align, : copy.shape[3] // align * align]
        run(copy.contiguous(memory_format=torch.channels_last))
        for norm in norms:
            norm.fixes_next = False  # some norms are not used by `run`
        return _blended(run, x, tile, overlap, scale, align)
    finally:
        for norm in norms:
            norm.fixed, norm.fixes_next = None, False


def _blended(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: Callable[[int], int], align: int
) -> Tensor:
    out = weight = None
    rows, columns = (pieces(size, tile, overlap, align) for size in x.shape[2:])
    for top, bottom in rows:
        for left, right in columns:
            part = run(x[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last))
            if out is None:
                out = part.new_zeros(*part.shape[:2], scale(x.shape[2]), scale(x.shape[3]))
                weight = part.new_zeros(out.shape[2:])
            vertical = ramp(top, bottom, x.shape[2], overlap, scale).to(part)
            horizontal = ramp(left, right, x.shape[3], overlap, scale).to(part)
            mask = vertical[:, None] * horizontal[None]
            place = (slice(scale(top), scale(bottom)), slice(scale(left), scale(right)))
            out[:, :, place[0], place[1]] += part * mask
            weight[place] += mask
    return out / weight


def pieces(size: int, tile: int, overlap: int, align: int = 1) -> list[tuple[int, int]]:
    """(start, end) of each tile: the fewest tiles of length `tile` that cover `size`, evenly spread, with overlaps of
    about `overlap` or more. One tile of length `size` if that is shorter. All are multiples of `align` if `size` and
    `tile` are.
    """
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1) / align) * align for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramp(start: int, end: int, size: int, overlap: int, scale: Callable[[int], int]) -> Tensor:
    """Weights (length,) of a tile's result along one axis: a ramp over `overlap` at inner edges, 1 elsewhere."""
    length, rise = scale(end - start), scale(overlap)
    places = torch.arange(length) + 0.5
    weight = torch.ones(length)
    if start > 0:
        weight = torch.minimum(weight, places / rise)
    if end < size:
        weight = torch.minimum(weight, (length - places) / rise)
    return weight
