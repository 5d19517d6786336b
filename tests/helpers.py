"""What several tests share: small random checkpoints of real layout, and the shipped model's place."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from dit_embedder import ControlNet, ControlNetConfig
from mmditx import MMDiT, MMDiTConfig
from other_impls import CLIP, T5, CLIPConfig, T5Config, count_layers
from sd3.diffusers_names import RENAMES
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX, VAE_PREFIX
from sd3.flags import FLAGS
from sd3.vae import VAE, VAEConfig

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo" / "demo.safetensors"
with safe_open(DEMO, "pt") as _file:
    DEMO_DEPTH = count_layers(_file.keys(), MMDIT_PREFIX + "joint_blocks.")
TOKENIZERS = DEMO.parent
CLIP_VOCABULARY = len(json.loads((TOKENIZERS / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got.shape == wanted.shape
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights that keep activations of about one: nothing vanishes, nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
            if p.ndim == 1:
                p.add_(0.5)
    return module.eval()


def mmdit_config(**changes) -> MMDiTConfig:
    """A small MMDiT that the shipped model's tokenizers and these tests' encoders fit."""
    values = {
        "latent_channels": 16,
        "patch": 2,
        "width": 128,
        "depth": 4,
        "context_width": 160,
        "pooled_width": 128,
        "mlp_width": 256,
        "grid": 12,
        "qk_norm": True,
        "dual_layers": frozenset({0, 1}),
    }
    return MMDiTConfig(**(values | changes))


VAE_SMALL = VAEConfig(
    image_channels=3, latent_channels=16, stem_width=16, widths=(16, 16, 32, 32), encoder_blocks=1, decoder_blocks=2
)
CLIP_SIZES = {"width": 64, "depth": 2, "mlp_width": 128, "vocabulary": CLIP_VOCABULARY, "positions": 16}
CLIP_L = CLIPConfig(**CLIP_SIZES, projection=True, activation="quick_gelu")
CLIP_G = CLIPConfig(**CLIP_SIZES, projection=True, activation="gelu")
T5_SMALL = T5Config(width=160, depth=3, heads=2, inner=96, mlp_width=128, buckets=32, vocabulary=64)


def modules(config: MMDiTConfig | None = None, seed: int = 0) -> dict[str, torch.nn.Module]:
    """Random modules by the prefix they have in a file of the `incl_clips_t5xxl` layout."""
    return {
        MMDIT_PREFIX: randomise(MMDiT(config or mmdit_config()), seed),
        VAE_PREFIX: randomise(VAE(VAE_SMALL), seed + 1),
        ENCODER_PREFIX.format("clip_l"): randomise(CLIP(CLIP_L), seed + 2),
        ENCODER_PREFIX.format("clip_g"): randomise(CLIP(CLIP_G), seed + 3),
        ENCODER_PREFIX.format("t5xxl"): randomise(T5(T5_SMALL), seed + 4),
    }


def tensors_of(parts: dict[str, torch.nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Everything as a file holds it."""
    return {p + k: v.detach().to(dtype).contiguous() for p, m in parts.items() for k, v in m.state_dict().items()}


def controlnet_tensors(base: MMDiTConfig, chained: bool, seed: int = 9, kind: int = 1) -> dict[str, torch.Tensor]:
    """A random ControlNet file for `base`, of the 8B kind (`chained`) or the 2B kind."""
    config = ControlNetConfig(
        latent_channels=base.latent_channels,
        patch=base.patch,
        width=base.width,
        depth=2,
        pooled_width=base.pooled_width if chained else base.width,
        mlp_width=256,
        patch_embedding=not chained,
    )
    net = randomise(ControlNet(config, chained), seed)
    out = {RENAMES.get(k, k): v.detach().contiguous() for k, v in net.state_dict().items()}
    return out | {"control_type": torch.tensor([float(kind)])}


READERS = {name: row.read for name, row in FLAGS.items()}
