"""Adds a weight patch, a row of `PATCHES`, and compares it with files that hold the sums. test_extending.py runs it in
a process of its own, where it adds the flag first: settings are made from the flag table when they are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from helpers import TOKENIZERS, controlnet_tensors, mmdit_config, modules, tensors_of
from PIL import Image
from safetensors.torch import load_file, save_file

import sd3.help
import sd3.png
import sd3.serve
import sd3_infer
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX, VAE_PREFIX, file_sha256
from sd3.patches import PATCHES
from sd3.sweep.command import main as sweep
from sd3.weights import ModelTensors, Patch


def read_nudge(path: str, models: Mapping[str, ModelTensors]) -> dict[str, list[Patch]]:
    """Adds the tensors of a file, PART/NAME, to the weights of these names."""
    stored, out = load_file(path), {}
    for part in models:
        names = [name for name in stored if name.startswith(f"{part}/")]
        changes = {n.removeprefix(f"{part}/"): lambda weight, n=n: weight + stored[n] for n in names}
        out[part] = [Patch(changes, file_sha256(Path(path)))]
    return out


PATCHES["nudge"] = read_nudge
FOLDER = Path(sys.argv[1])
PREFIXES = {"mmdit": MMDIT_PREFIX, "vae": VAE_PREFIX, "controlnet": ""}
PREFIXES |= {role: ENCODER_PREFIX.format(role) for role in ("clip_l", "clip_g", "t5xxl")}
CLIP_LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"
NAMES = {  # of which kind: a layer, one whose weight all blocks share, a convolution, a table, a layer read from disk
    "mmdit": ["joint_blocks.1.x_block.mlp.fc1.weight", "joint_blocks.1.x_block.adaLN_modulation.1.weight"],
    "vae": ["decoder.conv_in.weight"],
    "controlnet": ["transformer_blocks.1.attn.qkv.weight"],
    "clip_l": [CLIP_LAYER, "text_model.embeddings.token_embedding.weight"],
    "clip_g": [CLIP_LAYER, "text_model.final_layer_norm.weight"],
    "t5xxl": ["encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"],
}


def write_files() -> None:
    """The model in float16; for each part, and for all, what is added, and the sums in float32."""
    for name in ("tokenizer", "tokenizer_3"):
        (FOLDER / name).symlink_to(TOKENIZERS / name)
    base = tensors_of(modules(), torch.float16)
    control = {name: tensor.half() for name, tensor in controlnet_tensors(mmdit_config(), chained=True).items()}
    save_file(base, FOLDER / "base.safetensors")
    save_file(control, FOLDER / "base.control")
    draw = torch.Generator().manual_seed(3)
    for case, parts in {**{part: [part] for part in NAMES}, "all": list(NAMES)}.items():
        merged = [{n: t.float() for n, t in tensors.items()} for tensors in (base, control)]
        added = {}
        for part in parts:
            for name in NAMES[part]:
                sums = merged[part == "controlnet"]
                stored = PREFIXES[part] + name
                added[f"{part}/{name}"] = torch.randn(sums[stored].shape, generator=draw) * sums[stored].std()
                sums[stored] = sums[stored] + added[f"{part}/{name}"]
        save_file(added, FOLDER / f"{case}.nudge")
        save_file(merged[0], FOLDER / f"{case}.safetensors")
        save_file(merged[1], FOLDER / f"{case}.control")
    Image.effect_noise((64, 48), 90).convert("RGB").save(FOLDER / "photo.png")


def run(*words) -> Path:
    """The picture that a run of the command line makes, the first of its folder."""
    out = FOLDER / f"run{len(list(FOLDER.glob('run*')))}"
    assert sd3_infer.main([*map(str, words), "--out_dir", str(out)]) == 0
    return next(out.rglob("*.png"))


def picture(files: str, *words) -> Path:
    """A picture made with `files`' model and ControlNet."""
    size = ["--width", 64, "--height", 48, "--steps", 2, "--device", "cpu", "--seed", 1, "--prompt", "a red circle"]
    control = ["--controlnet_ckpt", FOLDER / f"{files}.control", "--controlnet_cond_image", FOLDER / "photo.png"]
    return run("--model", FOLDER / f"{files}.safetensors", *control, *size, *words)


def same(*paths: Path) -> bool:
    """Whether two pictures differ by one step of 255 at most: on some CPUs the last bits of a product depend on where
    in memory the weights lie.
    """
    first, second = (np.asarray(Image.open(path)).astype(int) for path in paths)
    return bool(np.abs(first - second).max() <= 1)


def main() -> dict:
    """What became of it, by what was tried."""
    write_files()
    every = ["--nudge", FOLDER / "all.nudge"]
    plain = picture("base", "--dtype", "float32")
    got: dict = {"parts": {}, "kinds": {}}
    for part in NAMES:
        nudged = picture("base", "--dtype", "float32", "--nudge", FOLDER / f"{part}.nudge")
        got["parts"][part] = [same(nudged, picture(part, "--dtype", "float32")), same(nudged, plain)]
    for words in ("--dtype float32 --weights int8", "--dtype float32 --offload", "--dtype bfloat16"):
        nudged, merged = (picture(files, *words.split(), *more) for files, more in (("base", every), ("all", [])))
        got["kinds"][words] = same(nudged, merged)
    record = sd3.png.read_record(nudged)
    got["record"] = [record["settings"]["nudge"], record["files"]["nudge"] == file_sha256(FOLDER / "all.nudge")]
    got["replayed"] = run("--replay", nudged).read_bytes() == nudged.read_bytes()
    for more in ([], every):  # what other weights encoded is not found
        picture("base", "--embed_cache", FOLDER / "cache", *more)
    got["cached"] = len(list((FOLDER / "cache").iterdir()))
    words = ["--model", FOLDER / "base.safetensors", "--prompt", "a star", "--steps", 1, "--device", "cpu"]
    words += [
        "--width",
        64,
        "--height",
        48,
        "--nudge",
        f"{FOLDER / 'vae.nudge'};{FOLDER / 'all.nudge'}",
        "--out",
        FOLDER / "sweep",
    ]
    got["swept"] = [sweep(list(map(str, words))), len(list((FOLDER / "sweep" / "pictures").iterdir()))]
    got["help"] = ["  --nudge FILE " in sd3.help.text(), "| `--nudge` |" in sd3.help.markdown()]
    server = sd3.serve.Server(None, sd3_infer.Flags(), {}, Path("out"))
    got["served"] = server.answer('{"nudge": "x", "prompt": "a"}')["error"]
    return got
