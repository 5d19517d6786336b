"""Converts our tensor names and layouts to diffusers', to compare with its models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmditx import MMDiT, MMDiTConfig
from other_impls import T5
from sd3.files import ENCODER_FOLDERS, ENCODER_PREFIX, MMDIT_PREFIX, VAE_PREFIX
from sd3.vae import VAE, VAEConfig


def _swap(tensor: Tensor) -> Tensor:
    """(shift, scale) -> (scale, shift), the order of diffusers' continuous adaptive norms."""
    shift, scale = tensor.chunk(2)
    return torch.cat([scale, shift])


def _linear(out: dict[str, Tensor], name: str, module: nn.Module) -> None:
    out[f"{name}.weight"], out[f"{name}.bias"] = module.weight, module.bias


def _attention(out: dict[str, Tensor], name: str, attn: nn.Module, to: tuple[str, str, str], norms, final) -> None:
    for leaf in ("weight", "bias"):
        for part, tensor in zip(to, getattr(attn.qkv, leaf).chunk(3), strict=True):
            out[f"{name}.{part}.{leaf}"] = tensor
    if hasattr(attn, "ln_q"):
        out[f"{name}.{norms[0]}.weight"], out[f"{name}.{norms[1]}.weight"] = attn.ln_q.weight, attn.ln_k.weight
    if hasattr(attn, "proj"):
        _linear(out, f"{name}.{final}", attn.proj)


def _x_block(out: dict[str, Tensor], name: str, block: nn.Module) -> None:
    _linear(out, f"{name}.norm1.linear", block.adaLN_modulation[1])
    own = (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0")
    _attention(out, f"{name}.attn", block.attn, *own)
    if hasattr(block, "attn2"):
        _attention(out, f"{name}.attn2", block.attn2, *own)
    _linear(out, f"{name}.ff.net.0.proj", block.mlp.fc1)
    _linear(out, f"{name}.ff.net.2", block.mlp.fc2)


def _embedders(out: dict[str, Tensor], model: nn.Module) -> None:
    for theirs, ours in (("timestep_embedder", model.t_embedder), ("text_embedder", model.y_embedder)):
        _linear(out, f"time_text_embed.{theirs}.linear_1", ours.mlp[0])
        _linear(out, f"time_text_embed.{theirs}.linear_2", ours.mlp[2])


def transformer(model: MMDiT) -> dict[str, Tensor]:
    """The weights of `model` as a state dict of SD3Transformer2DModel."""
    out: dict[str, Tensor] = {"pos_embed.pos_embed": model.pos_embed}
    _linear(out, "pos_embed.proj", model.x_embedder.proj)
    _embedders(out, model)
    _linear(out, "context_embedder", model.context_embedder)
    for i, block in enumerate(model.joint_blocks):
        name = f"transformer_blocks.{i}"
        _x_block(out, name, block.x_block)
        text = block.context_block
        _linear(out, f"{name}.norm1_context.linear", text.adaLN_modulation[1])
        added = ("add_q_proj", "add_k_proj", "add_v_proj")
        _attention(out, f"{name}.attn", text.attn, added, ("norm_added_q", "norm_added_k"), "to_add_out")
        if block.last:
            for leaf in ("weight", "bias"):
                key = f"{name}.norm1_context.linear.{leaf}"
                out[key] = _swap(out[key])
        else:
            _linear(out, f"{name}.ff_context.net.0.proj", text.mlp.fc1)
            _linear(out, f"{name}.ff_context.net.2", text.mlp.fc2)
    final = model.final_layer
    for leaf in ("weight", "bias"):
        out[f"norm_out.linear.{leaf}"] = _swap(getattr(final.adaLN_modulation[1], leaf))
    _linear(out, "proj_out", final.linear)
    return out


def controlnet(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model` as a state dict of SD3ControlNetModel without positions and text (the 8B kind)."""
    out: dict[str, Tensor] = {}
    _embedders(out, model)
    _linear(out, "pos_embed_input.proj", model.pos_embed_input.proj)
    for i, (block, project) in enumerate(zip(model.transformer_blocks, model.controlnet_blocks, strict=True)):
        _x_block(out, f"transformer_blocks.{i}", block)
        _linear(out, f"controlnet_blocks.{i}", project)
    return out


def _resnet(out: dict[str, Tensor], name: str, block: nn.Module) -> None:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        _linear(out, f"{name}.{part}", getattr(block, part))
    if hasattr(block, "nin_shortcut"):
        _linear(out, f"{name}.conv_shortcut", block.nin_shortcut)


def vae(model: VAE) -> dict[str, Tensor]:
    """The weights of `model` as a state dict of AutoencoderKL."""
    out: dict[str, Tensor] = {}
    for side, half in (("encoder", model.encoder), ("decoder", model.decoder)):
        _linear(out, f"{side}.conv_in", half.conv_in)
        _linear(out, f"{side}.conv_out", half.conv_out)
        _linear(out, f"{side}.conv_norm_out", half.norm_out)
        _resnet(out, f"{side}.mid_block.resnets.0", half.mid.block_1)
        _resnet(out, f"{side}.mid_block.resnets.1", half.mid.block_2)
        attn, name = half.mid.attn_1, f"{side}.mid_block.attentions.0"
        _linear(out, f"{name}.group_norm", attn.norm)
        for theirs, ours in (("to_q", attn.q), ("to_k", attn.k), ("to_v", attn.v), ("to_out.0", attn.proj_out)):
            out[f"{name}.{theirs}.weight"], out[f"{name}.{theirs}.bias"] = ours.weight[:, :, 0, 0], ours.bias
        down = side == "encoder"
        levels = list(half.down) if down else list(reversed(half.up))
        for i, level in enumerate(levels):
            name = f"{side}.{'down' if down else 'up'}_blocks.{i}"
            for j, block in enumerate(level.block):
                _resnet(out, f"{name}.resnets.{j}", block)
            which = "downsample" if down else "upsample"
            if hasattr(level, which):
                _linear(out, f"{name}.{which}rs.0.conv", getattr(level, which).conv)
    return out


def peer_transformer(config: MMDiTConfig):
    """diffusers' SD3 transformer with the same sizes and freshly initialised weights."""
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=2 * config.grid,
        patch_size=config.patch,
        in_channels=config.latent_channels,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=config.latent_channels,
        pos_embed_max_size=config.grid,
        dual_attention_layers=tuple(config.dual_layers),
        qk_norm="rms_norm" if config.qk_norm else None,
    ).eval()


def peer_vae(config: VAEConfig):
    """diffusers' autoencoder with the same sizes and freshly initialised weights."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(config.widths),
        up_block_types=("UpDecoderBlock2D",) * len(config.widths),
        block_out_channels=config.widths,
        layers_per_block=config.encoder_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


def peer_t5(ours: T5):
    """transformers' T5 encoder with our weights."""
    import transformers

    c, state = ours.config, ours.state_dict()
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=c.vocabulary,
            d_model=c.width,
            d_kv=c.inner // c.heads,
            d_ff=c.mlp_width,
            num_layers=c.depth,
            num_heads=c.heads,
            relative_attention_num_buckets=c.buckets,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
        )
    )
    theirs.load_state_dict(state | {"shared.weight": state["encoder.embed_tokens.weight"]}, strict=True)
    return theirs.eval()


def folder(path: Path, parts: dict[str, nn.Module], tokenizers: Path) -> Path:
    """Writes modules (by their prefix in a single file) as a diffusers folder, with transformer and T5 in shards."""
    ours: MMDiT = parts[MMDIT_PREFIX]
    theirs = peer_transformer(ours.config)
    theirs.load_state_dict(transformer(ours))
    theirs.save_pretrained(path / "transformer", max_shard_size="1MB")
    (path / "vae").mkdir()
    tensors = {k: v.detach().contiguous() for k, v in vae(parts[VAE_PREFIX]).items()}
    save_file(tensors, path / "vae" / "diffusion_pytorch_model.safetensors")
    for role, name in ENCODER_FOLDERS.items():
        (path / name).mkdir()
        state = {k: v.detach().contiguous() for k, v in parts[ENCODER_PREFIX.format(role)].state_dict().items()}
        if role != "t5xxl":
            save_file(state, path / name / "model.safetensors")
            continue
        t5 = peer_t5(parts[ENCODER_PREFIX.format(role)])
        t5.save_pretrained(path / name, max_shard_size="300KB")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (path / name).symlink_to(tokenizers / name.replace("_2", ""))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 2.5}))
    return path
