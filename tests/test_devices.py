"""The whole sampling path on the meta device, under a mode that refuses any operation mixing devices."""

from __future__ import annotations

import pytest
import torch
from helpers import DEMO
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sd3_impls
from sd3.device import choose_device, choose_dtype
from sd3.methods import SAMPLERS, SCHEDULES
from sd3.models import SkipLayerConfig
from sd3.pixels import unit_pixels
from sd3.residual import ResidualConfig
from sd3_infer import SD3Inferencer


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of more than one device; 0-dimensional CPU numbers and copies are fine."""

    COPIES = ("_to_copy", "copy_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        devices = {t.device for t in tensors if not (t.device.type == "cpu" and t.ndim == 0)}
        if len(devices) > 1 and func.overloadpacket.__name__ not in self.COPIES:
            raise RuntimeError(f"{func}: mixes {sorted(map(str, devices))}")
        return func(*args, **(kwargs or {}))


def engine_on_meta(model, controlnet=None, dtype="bfloat16", **options) -> SD3Inferencer:
    control = controlnet and str(controlnet)
    engine = SD3Inferencer().load(
        str(model), controlnet_ckpt=control, device=torch.device("meta"), dtype=dtype, **options
    )
    engine.tell.quiet = True
    return engine


ADD = ResidualConfig(0, (1, 2), (0.5, 0.5))


def whole_path(
    engine: SD3Inferencer,
    controlled: bool,
    sampler: str,
    skip: tuple[int, ...] = (1,),
    residual: ResidualConfig = ADD,
    **others: object,
) -> torch.Tensor:
    """Encode text and images, sample with every kind of guidance, decode: (1, 3, H, W) on the engine's device."""
    image = Image.new("RGB", (64, 48))
    length = engine.engine.text.pair_length("a red circle", "a star")
    latent = sd3_impls.latent_in(engine.vae_encode(image, [3]))
    control = sd3_impls.latent_in(engine.vae_encode(image, [3], control=True)) if controlled else None
    out = engine.do_sampling(
        latent,
        [3],
        engine.get_cond("a red circle", length),
        engine.get_cond("a star", length),
        4,
        4.5,
        sampler,
        control,
        denoise=0.8,
        skip_layer_config=SkipLayerConfig(2.5, 0.0, 0.9, skip, cfg=4.0),
        residual_config=residual,
        **others,
    )
    return engine.engine.pixels.decode(out)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("control", ["", "control_8b", "control_2b"])
def test_nothing_is_misplaced(small_model, control, sampler, monkeypatch):
    # the kind of a control image is a number in the file, read on the CPU; encoders and VAE run for real
    net = small_model.parent / f"{control}.safetensors" if control else None
    engine = engine_on_meta(small_model, net)
    with OneDevice():
        pixels = whole_path(engine, bool(control), sampler)
    assert pixels.device.type == "meta"
    assert pixels.shape == (1, 3, 48, 64)


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_schedules_and_guidance_are_where_the_model_is(small_model, scheduler):
    engine = engine_on_meta(small_model)
    with OneDevice():
        assert (
            whole_path(engine, False, "euler", scheduler=scheduler, guidance_rescale=0.5, guidance_end=0.6).device.type
            == "meta"
        )


@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
@pytest.mark.parametrize("origin", [0, 1])
@pytest.mark.parametrize("mode", ["anchored", "aligned"])
def test_residual_modes_are_where_the_model_is(small_model, mode, origin, branch, tmp_path):
    """Rotations are read on the CPU and moved to the model."""
    path = tmp_path / "r.safetensors"
    notes = {"origin_layer": str(origin), "target_layers": "[2, 3]"}
    edges = torch.tensor([0.0, 500.0, 1000.0])
    save_file({"rotation_matrices": torch.eye(128).repeat(2, 2, 1, 1), "timestep_bucket_edges": edges}, path, notes)
    config = ResidualConfig(origin, (2, 3), "each:0.5", mode, "cosine", branch=branch, rotations=str(path))
    engine = engine_on_meta(small_model)
    with OneDevice():
        assert whole_path(engine, False, "euler", residual=config).device.type == "meta"


@pytest.mark.parametrize(
    "options",
    [
        {"offload": True},
        {"weights": "int8"},
        {"weights": "fp8", "offload": True},
        {"compile": True},
        {"t5_resident": True},
    ],
    ids=str,
)
def test_what_saves_memory_and_time_misplaces_nothing(small_model, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what runs, not the code made of it
    engine = engine_on_meta(small_model, **options)
    with OneDevice():
        assert whole_path(engine, False, "euler").device.type == "meta"
    if "offload" in options:
        assert {p.device.type for p in engine.engine.network.mmdit.joint_blocks.parameters()} == {"cpu"}


def test_tiles_are_where_the_picture_is(small_model):
    engine = engine_on_meta(small_model)
    with OneDevice():
        latent = engine.vae_encode(Image.new("RGB", (320, 256)), [3], tile=128)
        assert engine.engine.pixels.decode(latent, 128).shape == (1, 3, 256, 320)


def test_the_shipped_model_too():
    with OneDevice():
        assert whole_path(engine_on_meta(DEMO), False, "euler").device.type == "meta"


@pytest.mark.parametrize("where", ["joint_blocks.2.x_block.mlp.fc1.weight", "pos_embed", "t_embedder.mlp.2.bias"])
def test_a_planted_misplaced_weight_is_caught(small_model, where):
    engine = engine_on_meta(small_model)
    module, _, leaf = where.rpartition(".")
    owner = engine.engine.network.mmdit.get_submodule(module)
    moved = torch.zeros_like(getattr(owner, leaf), device="cpu")
    setattr(owner, leaf, torch.nn.Parameter(moved, requires_grad=False))
    with pytest.raises(RuntimeError, match="mixes"), OneDevice():
        whole_path(engine, False, "euler")


def test_devices_and_dtypes_are_chosen_in_one_place(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:99: not available; available devices: cpu"):
        choose_device("cuda:99")
    cuda = torch.device("cuda")
    for stored, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32"), ("F8_E4M3", "bfloat16")):
        assert choose_dtype("auto", cuda, stored) == getattr(torch, dtype)
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype("auto", torch.device("cpu"), "F16") in (torch.bfloat16, torch.float32)


def test_pixels_in_and_out_keep_their_values():
    image = Image.effect_noise((32, 16), 80).convert("RGB")
    pixels = unit_pixels(image)
    assert pixels.shape == (1, 3, 16, 32)
    assert (pixels * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy().tobytes() == image.tobytes()
