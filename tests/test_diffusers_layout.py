"""A checkpoint in diffusers layout loads, and makes the very pictures of the same weights in one file."""

from __future__ import annotations

import json
import shutil

import pytest
import to_diffusers
import torch
from helpers import TOKENIZERS, mmdit_config, modules, tensors_of
from safetensors.torch import load_file, save_file

from sd3.files import MMDIT_PREFIX, TRANSFORMER, VAE_PREFIX, WeightFile
from sd3.models import model_key
from sd3.planning import plan_pictures
from sd3.weights import find_mmdit, find_vae
from sd3_infer import SD3Inferencer, main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PARTS = modules(mmdit_config(mlp_width=512), seed=40)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    return to_diffusers.folder(tmp_path_factory.mktemp("layout") / "stable-diffusion-3-small", PARTS, TOKENIZERS)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_file")
    for name in ("tokenizer", "tokenizer_3"):
        (folder / name).symlink_to(TOKENIZERS / name)
    save_file(tensors_of(PARTS), folder / "one.safetensors")
    return folder / "one.safetensors"


def test_every_tensor_comes_out_as_ours(layout):
    file = WeightFile(layout)
    assert len({e.path for n, e in file.entries.items() if n.startswith(TRANSFORMER)}) > 1  # in shards
    for part, prefix in ((find_mmdit(file), MMDIT_PREFIX), (find_vae(file), VAE_PREFIX)):
        wanted = PARTS[prefix].state_dict()
        part.check(PARTS[prefix])
        got = dict(part.read(list(wanted), "cpu", None))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert not [name for name in part.shapes if name not in wanted]


def test_the_same_picture_as_from_one_file(layout, one_file):
    latents = []
    for path in (layout, one_file):
        engine = SD3Inferencer().load(str(path), device="cpu", dtype="float32")
        engine.tell.quiet = True
        (settings,) = plan_pictures(
            engine.engine, ["a red circle"], [3], shift=2.5, width=64, height=48, steps=3, cfg=4.0, sampler="euler"
        ).pictures
        ((_, _, image),) = engine.engine.make([settings])
        latents.append(engine.engine.sample([settings]))
        assert image.size == (64, 48)
    assert torch.allclose(*latents, atol=1e-5)


def test_the_command_line_and_the_schedulers_shift(layout, tmp_path, capsys):
    flags = ["--model", str(layout) + "/", "--width", "64", "--height", "48", "--steps", "2", "--dtype", "float32"]
    assert main([*flags, "--prompt", "a star", "--out_dir", str(tmp_path), "--postfix", "_x"]) == 0
    folder = tmp_path / "stable-diffusion-3-small" / "a_star_x"
    (picture,) = json.loads((folder / "run.json").read_text())["pictures"]
    assert picture["settings"]["shift"] == 2.5
    assert picture["settings"]["model"] == "stable-diffusion-3-small"


def test_a_vae_in_diffusers_layout_serves_another_model(layout, one_file):
    vae = str(layout / "vae" / "diffusion_pytorch_model.safetensors")
    engines = [SD3Inferencer().load(str(one_file), v, device="cpu", dtype="float32") for v in (None, vae)]
    latent = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(*(engine.engine.pixels.decode(latent) for engine in engines), atol=1e-5)


def test_folders_are_listed(layout, capsys):
    assert main(["--list_models", "--model_folder", str(layout.parent)]) == 0
    shown = capsys.readouterr().out
    assert "found    stable-diffusion-3-small/  a model in diffusers layout" in shown
    assert "missing  sd3_medium.safetensors" in shown


NAMES = {
    "stable-diffusion-3-medium-diffusers": "sd3_medium",
    "/hub/models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0a1b2c": "sd3.5_large_turbo",
    "models/stable-diffusion-3.5-medium": "sd3.5_medium",
    "models/sd3.5_large": "sd3.5_large",
    "stable-diffusion-3.5-medium/mine.safetensors": "",
    "mine": "",
}


@pytest.mark.parametrize("path", NAMES)
def test_released_models_are_known_by_their_folder(path):
    assert model_key(path) == NAMES[path]


def broken(layout, tmp_path, case):
    copy = tmp_path / "copy"
    shutil.copytree(layout, copy, symlinks=True)
    shards = sorted((copy / "transformer").glob("*.safetensors"))
    if case == "no transformer":
        shutil.rmtree(copy / "transformer")
        return copy, "is a folder without transformer/"
    if case == "a missing shard":
        shards[1].unlink()
        return copy, f"{shards[1].name}: no such file, though diffusion_pytorch_model.safetensors.index.json names it"
    if case == "only pickled weights":
        for path in (copy / "transformer").iterdir():
            path.unlink()
        (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
        return copy, "holds only pickled .bin weights, which are not loaded"
    if case == "no VAE":
        shutil.rmtree(copy / "vae")
        return copy, "holds no VAE; give one with --vae"
    if case == "no T5":
        shutil.rmtree(copy / "text_encoder_3")
        return copy, "no t5xxl.safetensors"
    if case == "a damaged index":
        (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
        return copy, "is damaged: no weight_map in it"
    path = next(s for s in shards if "transformer_blocks.1.attn.to_k.weight" in load_file(s))
    tensors, name = load_file(path), "transformer_blocks.1.attn.to_k.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    return copy, "1 missing: transformer/transformer_blocks."


CASES = ("no transformer", "a missing shard", "only pickled weights", "no VAE", "no T5", "a damaged index", "no to_k")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(layout, tmp_path, capsys, case, monkeypatch):
    folder, message = broken(layout, tmp_path, case)
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(folder), "--prompt", "a star", "--out_dir", "out", "--width", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
