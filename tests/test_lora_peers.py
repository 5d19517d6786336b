"""LoRAs that peft, diffusers and LyCORIS make of random weights act as they do there: velocities, outputs of layers."""

from __future__ import annotations

import copy
from dataclasses import replace

import lora_writing as writing
import pytest
import to_diffusers
import torch
from helpers import CLIP_G, CLIP_L, TOKENIZERS, mmdit_config, modules, relative, tensors_of
from safetensors.torch import save_file

from mmditx import MMDiT
from other_impls import CLIP
from sd3.engine import Engine
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX
from sd3.patches import patched
from sd3.settings import Setup
from sd3.weights import on_meta

LIMIT = 1e-5
CONFIG = mmdit_config(mlp_width=512)  # diffusers' feed-forward is four times as wide as the model
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LINEAR = [*ATTENTION, "linear", "proj_out", "context_embedder", "linear_1", "linear_2", "net.0.proj", "net.2"]
CASES = {
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION},
    "alpha": {"r": 3, "lora_alpha": 8, "target_modules": LINEAR},
    "patterns": {
        "r": 4, "lora_alpha": 2, "target_modules": LINEAR,
        "rank_pattern": {"to_q": 2, "transformer_blocks.1.attn.to_k": 5, r"transformer_blocks\.[02]\.norm1.linear": 6},
        "alpha_pattern": {"attn2.to_v": 9, "norm_out.linear": 7, "^proj_out": 3},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LINEAR},
    "bias": {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_bias": True, "target_modules": LINEAR},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": LINEAR},
    "convolution": {"r": 4, "lora_alpha": 6, "target_modules": ["pos_embed.proj", "to_q"]},
    "DoRA of a convolution": {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["pos_embed.proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Random modules, and the parts of a file with them."""
    folder = tmp_path_factory.mktemp("peers")
    for name in ("tokenizer", "tokenizer_3"):
        (folder / name).symlink_to(TOKENIZERS / name)
    parts = modules(CONFIG, 21)
    save_file(tensors_of(parts), folder / "base.safetensors")
    opened = Engine(Setup(model=str(folder / "base.safetensors"))).parts
    return parts, {role: replace(part, patches=()) for role, part in opened.items()}


def randomise_adapter(model, size=0.15, seed=5):
    """Random values for everything that an adapter adds; magnitudes near those of the weights."""
    generator = torch.Generator().manual_seed(seed)
    names = ("lora_", "hada_", "lokr_")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(0.7 + 0.6 * torch.rand(p.shape, generator=generator))
            elif any(n in name for n in names):
                p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model


def peer(base) -> torch.nn.Module:
    theirs = to_diffusers.peer_transformer(CONFIG)
    theirs.load_state_dict(to_diffusers.transformer(base[0][MMDIT_PREFIX]), strict=True)
    return theirs


@torch.no_grad()
def check_velocity(base, theirs, lora):
    parts = patched(base[1], Setup(model="x", lora=lora))
    ours = parts["mmdit"].load_into(on_meta(lambda: MMDiT(CONFIG)), "cpu", torch.float32)
    draw = torch.Generator().manual_seed(1)
    x, context, y = (torch.randn(*s, generator=draw) for s in ((2, 16, 12, 20), (2, 23, 160), (2, 128)))
    t = torch.tensor([1000.0, 37.5])
    expected = theirs(hidden_states=x, encoder_hidden_states=context, pooled_projections=y, timestep=t).sample
    assert relative(ours(x, t, y, context), expected) < LIMIT
    plain = base[0][MMDIT_PREFIX](x, t, y, context)
    assert relative(plain, expected) > 1e-3  # the LoRA does something


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_saves(base, tmp_path, case):
    theirs = peer(base)
    theirs.add_adapter(peft.LoraConfig(**CASES[case]))
    randomise_adapter(theirs).eval()
    theirs.save_lora_adapter(tmp_path)
    check_velocity(base, theirs, tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("case", ["patterns", "bias", "DoRA"])
def test_what_a_pipeline_saves(base, tmp_path, case):
    """With the component's name before every key, settings too."""
    theirs = peer(base)
    theirs.add_adapter(peft.LoraConfig(**CASES[case]))
    randomise_adapter(theirs).eval()
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.utils.get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    check_velocity(base, theirs, tmp_path / "pytorch_lora_weights.safetensors")


ADAPTERS = {
    **{f"LoRA, {name}": (lambda name=name: peft.LoraConfig(**CASES[name])) for name in ("patterns", "bias", "DoRA")},
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, rank_pattern={"to_q": 2}),
    "LoHa of a convolution": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=["pos_embed.proj"], use_effective_conv2d=True
    ),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=LINEAR, decompose_factor=4, alpha_pattern={"to_k": 3}),
    "LoKr, both in factors": lambda: peft.LoKrConfig(
        r=2, alpha=6, target_modules=LINEAR, decompose_both=True, decompose_factor=8
    ),
    "LoKr, both whole": lambda: peft.LoKrConfig(r=64, alpha=96, target_modules=LINEAR, rank_pattern={"to_q": 48}),
    "LoKr of a convolution": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=["pos_embed.proj"], use_effective_conv2d=True, decompose_factor=4
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_folder_of_an_adapter(base, tmp_path, case):
    theirs = peft.get_peft_model(peer(base), ADAPTERS[case]())
    randomise_adapter(theirs, 0.6 if case == "LoHa of a convolution" else 0.15).eval()  # its product is of four
    theirs.save_pretrained(tmp_path)
    check_velocity(base, theirs, tmp_path)


@pytest.mark.parametrize(("role", "config"), [("clip_l", CLIP_L), ("clip_g", CLIP_G)])
@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_text_encoders(base, tmp_path, role, config, use_dora):
    """Merged by peft and loaded by us: the same weights."""
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.width // 64,
            max_position_embeddings=config.positions,
            projection_dim=config.width,
        )
    )
    state = base[0][ENCODER_PREFIX.format(role)].state_dict()
    theirs.load_state_dict(state, strict=False)
    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    settings = peft.LoraConfig(r=4, lora_alpha=7, target_modules=layers, use_dora=use_dora)
    theirs = peft.inject_adapter_in_model(settings, theirs)
    randomise_adapter(theirs)
    key = "text_encoder" if role == "clip_l" else "text_encoder_2"
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        **{
            f"{key}_lora_layers": peft.utils.get_peft_model_state_dict(theirs),
            f"{key}_lora_adapter_metadata": settings.to_dict(),
        },
    )
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    part = patched(base[1], Setup(model="x", lora=lora))[role]
    ours = part.load_into(on_meta(lambda: CLIP(config)), "cpu", torch.float32).state_dict()
    changed = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            own = name if f"{name}.weight" in ours else f"text_model.{name}"
            assert relative(ours[f"{own}.weight"], module.base_layer.weight) < LIMIT
            assert relative(ours[f"{own}.weight"], state[f"{own}.weight"]) > 1e-3
            changed += 1
    assert changed == 6 * config.depth


# ---- LyCORIS: its forward, never its merge, which multiplies by the scale twice --------------------

LYCORIS = {
    "LoCon": ("LoConModule", {}),
    "LoCon, rslora": ("LoConModule", {"rs_lora": True}),
    "LoHa": ("LohaModule", {}),
    "LoKr, w1 whole": ("LokrModule", {"factor": 8}),
    "LoKr, both in factors": ("LokrModule", {"factor": 8, "decompose_both": True, "lora_dim": 2}),
    "LoKr, both whole": ("LokrModule", {"factor": 8, "full_matrix": True}),
    "LoKr, unbalanced": ("LokrModule", {"factor": 4, "unbalanced_factorization": True}),
    "DoRA by row": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA by column": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoHa, DoRA": ("LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoKr, DoRA": ("LokrModule", {"factor": 8, "weight_decompose": True, "wd_on_out": True}),
    "full": ("FullModule", {}),
}
CONVOLUTIONS = {
    "LoCon": ("LoConModule", {}),
    "LoCon with a core": ("LoConModule", {"use_tucker": True}),
    "LoHa": ("LohaModule", {}),
    "LoHa with cores": ("LohaModule", {"use_tucker": True}),
    "LoKr": ("LokrModule", {"factor": 4}),
    "LoKr with a core": ("LokrModule", {"factor": 4, "use_tucker": True, "lora_dim": 1}),
    "DoRA by row": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA by column": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "full": ("FullModule", {}),
}


@torch.no_grad()
def check_layer(base, tmp_path, kind, options, ours, key, x):
    """A layer of the MMDiT with a LyCORIS module on it, and the same layer as we load it."""
    lycoris = pytest.importorskip("lycoris.modules")
    layer = copy.deepcopy(base[0][MMDIT_PREFIX].get_submodule(ours))
    plain = layer(x)
    module = getattr(lycoris, kind)(key, layer, **({"lora_dim": 3, "alpha": 2.0} | options))
    generator = torch.Generator().manual_seed(7)
    for name, p in module.named_parameters():
        if name == "dora_scale":
            p.mul_(0.7 + 0.6 * torch.rand(p.shape, generator=generator))
        else:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    if kind == "FullModule":  # it takes the layer's weight over
        module.apply_to()
    module.eval()
    tensors = {f"{key}.{name}": t.detach().clone() for name, t in module.custom_state_dict().items()}
    path = writing.write(tensors, tmp_path / "a.safetensors")
    part = patched(base[1], Setup(model="x", lora=path))["mmdit"]
    loaded = part.load_into(on_meta(lambda: MMDiT(CONFIG)), "cpu", torch.float32).get_submodule(ours)
    expected = module(x)
    assert relative(loaded(x), expected) < LIMIT
    assert relative(plain, expected) > 1e-3


@pytest.mark.parametrize("case", LYCORIS)
@pytest.mark.parametrize("ours", ["joint_blocks.1.x_block.mlp.fc1", "joint_blocks.2.context_block.attn.proj"])
def test_linear_layers_of_lycoris(base, tmp_path, case, ours):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    theirs = "lycoris_" + ours.replace(".", "_")
    check_layer(base, tmp_path, *LYCORIS[case], ours, theirs, x)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_of_lycoris(base, tmp_path, case):
    x = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(3))
    check_layer(base, tmp_path, *CONVOLUTIONS[case], "x_embedder.proj", "lora_unet_x_embedder_proj", x)
