"""How diffusers' layout stores our tensors: names, joined and transposed weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from other_impls import count_layers
from sd3.files import WeightFile


@dataclass(frozen=True)
class StoredAs:
    """How a file stores a tensor of ours: under another name, or in pieces to be concatenated along the first axis.

    change: `swap` exchanges the two halves of the first axis, `conv` turns a matrix into a 1 x 1 convolution.
    """

    names: tuple[str, ...]
    change: str = ""

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the joined tensor, from the shapes of the pieces."""
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        return (*joined, 1, 1) if self.change == "conv" else joined

    def build(self, pieces: list[Tensor]) -> Tensor:
        """The joined tensor."""
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self.change == "swap":
            return torch.cat(whole.chunk(2)[::-1])
        return whole[..., None, None] if self.change == "conv" else whole


# Our name -> diffusers' name, below a block.
_X_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "attn.proj": "attn.to_out.0",
    "attn2.proj": "attn2.to_out.0",
}
_CONTEXT_BLOCK = {
    "adaLN_modulation.1": "norm1_context.linear",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
    "attn.proj": "attn.to_add_out",
}
_EMBEDDERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_VAE_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _linear(out: dict[str, StoredAs], ours: str, *theirs: str, change: str = "") -> None:
    """Weight and bias of a layer; a bias is never reshaped."""
    out[f"{ours}.weight"] = StoredAs(tuple(f"{t}.weight" for t in theirs), change)
    out[f"{ours}.bias"] = StoredAs(tuple(f"{t}.bias" for t in theirs), "" if change == "conv" else change)


def diffusers_mmdit(depth: int) -> dict[str, StoredAs]:
    """How SD3Transformer2DModel stores our MMDiT of `depth` blocks: q, k and v apart, and scale before shift in the
    norms of the last block's text stream and of the output. Names layers that not every model has, too.
    """
    out = {"pos_embed": StoredAs(("pos_embed.pos_embed",))}
    for ours, theirs in _EMBEDDERS.items():
        _linear(out, ours, theirs)
    _linear(out, "final_layer.adaLN_modulation.1", "norm_out.linear", change="swap")
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        streams = (
            ("x_block", _X_BLOCK, "to_{}", "norm_{}"),
            ("context_block", _CONTEXT_BLOCK, "add_{}_proj", "norm_added_{}"),
        )
        for stream, layers, project, norm in streams:
            stem = f"joint_blocks.{i}.{stream}."
            for ours, theirs in layers.items():
                last_norm = i == depth - 1 and theirs == "norm1_context.linear"
                _linear(out, stem + ours, block + theirs, change="swap" if last_norm else "")
            for attn in ("attn", "attn2"):
                _linear(out, f"{stem}{attn}.qkv", *(f"{block}{attn}.{project.format(x)}" for x in "qkv"))
                for x in "qk":
                    out[f"{stem}{attn}.ln_{x}.weight"] = StoredAs((f"{block}{attn}.{norm.format(x)}.weight",))
    return out


def diffusers_vae(file: WeightFile, prefix: str) -> dict[str, StoredAs]:
    """How AutoencoderKL stores our VAE's tensors: decoder levels counted from the other end, attention as matrices."""
    out: dict[str, StoredAs] = {}
    for side, ours_level, theirs_level in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        for ours, theirs in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out")):
            _linear(out, f"{side}.{ours}", f"{side}.{theirs}")
        blocks = {f"mid.block_{j + 1}": f"mid_block.resnets.{j}" for j in (0, 1)}
        levels = count_layers(file.entries, f"{prefix}{side}.{theirs_level}.")
        for i in range(levels):
            level = f"{ours_level}.{i if side == 'encoder' else levels - 1 - i}"
            for j in range(count_layers(file.entries, f"{prefix}{side}.{theirs_level}.{i}.resnets.")):
                blocks[f"{level}.block.{j}"] = f"{theirs_level}.{i}.resnets.{j}"
            sample = "downsample" if side == "encoder" else "upsample"
            _linear(out, f"{side}.{level}.{sample}.conv", f"{side}.{theirs_level}.{i}.{sample}rs.0.conv")
        for ours, theirs in blocks.items():
            for a, b in _VAE_BLOCK.items():
                _linear(out, f"{side}.{ours}.{a}", f"{side}.{theirs}.{b}")
        attention = f"{side}.mid_block.attentions.0"
        _linear(out, f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for a, b in _VAE_ATTENTION.items():
            _linear(out, f"{side}.mid.attn_1.{a}", f"{attention}.{b}", change="conv")
    return out


# Our name -> the file's, for a ControlNet's timestep and pooled-text embedders.
RENAMES = {
    f"{ours}.mlp.{layer}.{leaf}": f"time_text_embed.{theirs}.linear_{number}.{leaf}"
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
    for layer, number in ((0, 1), (2, 2))
    for leaf in ("weight", "bias")
}
# Our name -> diffusers' names, below a block of a ControlNet.
BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
