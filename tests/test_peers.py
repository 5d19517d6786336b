"""The same fresh random weights in our modules and in transformers' and diffusers' give the same numbers."""

from __future__ import annotations

import pytest
import to_diffusers
import torch
from helpers import CLIP_G, CLIP_L, T5_SMALL, mmdit_config, randomise, relative

from dit_embedder import ControlNet, ControlNetConfig
from mmditx import MMDiT
from other_impls import CLIP, T5
from sd3.vae import VAE, VAEConfig

LIMIT = 1e-5
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@torch.no_grad()
@pytest.mark.parametrize(("config", "act"), [(CLIP_L, "quick_gelu"), (CLIP_G, "gelu")], ids=["L", "G"])
def test_clip(config, act):
    ours = randomise(CLIP(config), 11)
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.width // 64,
            max_position_embeddings=config.positions,
            projection_dim=config.width,
            hidden_act=act,
            eos_token_id=config.vocabulary - 1,
            bos_token_id=config.vocabulary - 2,
        )
    ).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys
    assert not [m for m in missing if "position_ids" not in m]
    ids = torch.randint(0, config.vocabulary - 1, (3, config.positions))
    for row, end in enumerate((4, 9, config.positions - 1)):
        ids[row, end:] = config.vocabulary - 1
    out = theirs(ids, output_hidden_states=True)
    hidden, pooled = ours(ids)
    assert relative(hidden, out.hidden_states[-2]) < LIMIT
    assert relative(pooled, out.text_embeds) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("length", [16, 77, 300])
def test_t5(length):
    ours = randomise(T5(T5_SMALL), 12)
    theirs = to_diffusers.peer_t5(ours)
    ids = torch.randint(0, T5_SMALL.vocabulary, (2, length))
    assert relative(ours(ids), theirs(ids).last_hidden_state) < LIMIT


CASES = {
    "sd3": {"qk_norm": False, "dual_layers": frozenset()},
    "sd3.5 large": {"qk_norm": True, "dual_layers": frozenset()},
    "sd3.5 medium": {"qk_norm": True, "dual_layers": frozenset({0, 1})},
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformer(case):
    # diffusers' feed-forward is four times as wide as the model
    config = mmdit_config(**CASES[case], mlp_width=512)
    ours = randomise(MMDiT(config), 13)
    theirs = to_diffusers.peer_transformer(config)
    theirs.load_state_dict(to_diffusers.transformer(ours), strict=True)
    x, context, y = torch.randn(2, 16, 12, 20), torch.randn(2, 23, 160), torch.randn(2, 128)
    t = torch.tensor([1000.0, 37.5])
    expected = theirs(hidden_states=x, encoder_hidden_states=context, pooled_projections=y, timestep=t).sample
    assert relative(ours(x, t, y, context), expected) < LIMIT


@torch.no_grad()
def test_vae():
    config = VAEConfig(3, 16, 128, (128, 128, 256, 256), 2, 3)
    ours = randomise(VAE(config), 14)
    theirs = to_diffusers.peer_vae(config)
    theirs.load_state_dict(to_diffusers.vae(ours), strict=True)
    image, latent = torch.rand(1, 3, 48, 32) * 2 - 1, torch.randn(1, 16, 6, 4)
    mean, logvar = ours.moments(image)
    posterior = theirs.encode(image).latent_dist
    assert relative(mean, posterior.mean) < LIMIT
    assert relative(logvar.clamp(-30, 20), posterior.logvar) < LIMIT
    assert relative(ours.decode(latent), theirs.decode(latent).sample) < LIMIT


@torch.no_grad()
def test_controlnet_8b():
    """The 8B kind coincides with diffusers' SD3ControlNetModel without text and positions; the 2B kind has no peer."""
    base_config = mmdit_config(pooled_width=96, mlp_width=512)
    config = ControlNetConfig(16, 2, base_config.width, 2, base_config.pooled_width, 512, patch_embedding=False)
    base, ours = randomise(MMDiT(base_config), 15), randomise(ControlNet(config, chained=True), 16)
    theirs = diffusers.SD3ControlNetModel(
        sample_size=2 * base_config.grid,
        patch_size=2,
        in_channels=16,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=base_config.heads,
        joint_attention_dim=None,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        use_pos_embed=False,
        pos_embed_max_size=base_config.grid,
        qk_norm=None,
        force_zeros_for_pooled_projection=False,
    ).eval()
    theirs.load_state_dict(to_diffusers.controlnet(ours), strict=True)
    x, control, y = torch.randn(2, 16, 8, 12), torch.randn(2, 16, 8, 12), torch.randn(2, 96)
    t = torch.tensor([900.0, 12.0])
    (expected,) = theirs(
        hidden_states=base.embed_image(x),
        controlnet_cond=control,
        conditioning_scale=0.7,
        pooled_projections=y,
        timestep=t,
        return_dict=False,
    )
    for got, wanted in zip(ours(base, x, t, y, control, 0.7), expected, strict=True):
        assert relative(got, wanted) < LIMIT
