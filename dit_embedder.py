"""ControlNet: turns the latent of a control image into states that are added to the MMDiT's image tokens.

There are two kinds, which differ in the input of the pooled-text embedder. 8B (SD3.5 Large): takes the base model's
image tokens and the raw pooled text; each block's output is the next one's input. 2B (SD3 Medium): has its own patch
embedding without positions and takes the base model's embedded pooled text; all blocks get the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmditx import MMDiT, MMDiTConfig, PatchEmbed, StreamBlock, TimestepEmbedder, VectorEmbedder
from other_impls import Shapes, count_layers


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a ControlNet."""

    latent_channels: int
    patch: int
    width: int
    depth: int
    pooled_width: int
    mlp_width: int
    patch_embedding: bool  # whether it has its own (an 8B file may contain an unused one)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ControlNetConfig:
        """Reads the sizes from tensor names and shapes (under our names). Raises KeyError for a missing tensor."""
        width, latent_channels, patch, _ = shapes["pos_embed_input.proj.weight"]
        shapes["controlnet_blocks.0.weight"]
        if width % 64:
            raise ValueError(f"width {width}, which is not a multiple of 64")
        return cls(
            latent_channels=latent_channels,
            patch=patch,
            width=width,
            depth=count_layers(shapes, "transformer_blocks."),
            pooled_width=shapes["y_embedder.mlp.0.weight"][1],
            mlp_width=shapes["transformer_blocks.0.mlp.fc1.weight"][0],
            patch_embedding="pos_embed.proj.weight" in shapes,
        )

    def chained(self, base: MMDiTConfig) -> bool:
        """Whether this is the 8B kind for `base`: its input is the raw pooled text, not the embedded one.

        If both widths are equal, having its own patch embedding marks the 2B kind.
        """
        if base.pooled_width == base.width:
            return not self.patch_embedding
        return self.pooled_width == base.pooled_width

    def check_base(self, base: MMDiTConfig) -> None:
        """Raises ValueError if this ControlNet was made for another model."""
        if (self.width, self.latent_channels, self.patch) != (base.width, base.latent_channels, base.patch):
            raise ValueError(
                f"has width {self.width}, the model has {base.width}: this ControlNet belongs to another model"
            )
        if self.pooled_width not in (base.pooled_width, base.width):
            raise ValueError(
                f"takes pooled text of width {self.pooled_width}; the model has {base.pooled_width} (raw) and "
                f"{base.width} (embedded)"
            )


class ControlNet(nn.Module):
    """A ControlNet of either kind; chained: whether it is the 8B kind."""

    def __init__(self, config: ControlNetConfig, chained: bool):
        super().__init__()
        self.config = config
        self.chained = chained
        width = config.width
        if not chained:
            self.pos_embed = PatchEmbed(config.latent_channels, width, config.patch)
        self.pos_embed_input = PatchEmbed(config.latent_channels, width, config.patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = VectorEmbedder(config.pooled_width, width)
        self.transformer_blocks = nn.ModuleList(
            StreamBlock(width, config.mlp_width, qk_norm=False) for _ in range(config.depth)
        )
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))

    def forward(
        self, base: MMDiT, x: Tensor, t: Tensor, y: Tensor, control: Tensor, strength: float = 1.0
    ) -> list[Tensor]:
        """Returns one state (B, L, D) per block of the ControlNet, see `spread`.

        base: the MMDiT that the states are added to; x: noisy latent (B, C, h, w); t: timesteps (B,) in [0, 1000];
        y: raw pooled text (B, Y); control: latent of the control image in model space (1 or B, C, h, w); strength:
        factor on the states.
        """
        tokens = base.embed_image(x) if self.chained else self.pos_embed(x)
        tokens = tokens + self.pos_embed_input(control)
        c = self.t_embedder(t) + self.y_embedder(y if self.chained else base.y_embedder(y))
        states, out = [], tokens
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            out = block(out if self.chained else tokens, c)
            states.append(project(out) * strength)
        return states


def spread(states: Sequence[Tensor], depth: int) -> list[Tensor]:
    """Assigns a ControlNet's states to the `depth` blocks of a model: each is used for a run of consecutive blocks."""
    return [states[i * len(states) // depth] for i in range(depth)]


def control_pixels(image: Tensor, chained: bool, kind: str) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] -> input of the VAE: 2x - 1, or 127.5 x + 0.5 for canny of the 8B kind."""
    return image * 127.5 + 0.5 if chained and kind == "canny" else image * 2 - 1
