"""Peak resident memory and time to the first step when making an image: `sd3_infer.py` against diffusers' pipeline.

    SD3_TOKENIZERS=... python benchmarks/memory.py

SD3 Medium, CLIP-L, CLIP-G and T5-XXL (random float16 weights of real size), 512 x 512, bfloat16, one step. Every run is
a separate process with a warm file cache. The peer is benchmarks/peer_lean.py: it encodes, deletes the encoders, then
loads the transformer. SD3_TOKENIZERS names a folder with the published tokenizers (clip/, t5/), which the peer needs.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import torch
from random_weights import write_random
from real_size import FILES, GB, ROOT, status

sys.path.insert(0, str(Path(__file__).parent.parent))

import to_diffusers

import sd3.weights
from mmditx import MMDiT, MMDiTConfig
from sd3.files import MMDIT_PREFIX, VAE_PREFIX, WeightFile
from sd3.vae import VAE, VAEConfig
from sd3.weights import on_meta

PROMPT = "a red circle left of a blue square"
CLIPS = {
    "clip_l": ("text_encoder", {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12,
               "intermediate_size": 3072, "projection_dim": 768, "hidden_act": "quick_gelu"}),
    "clip_g": ("text_encoder_2", {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 32,
               "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu"}),
}  # fmt: skip
T5_CONFIG = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240,
    "num_layers": 24, "num_heads": 64, "vocab_size": 32128, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def diffusers_folder(source: Path, place: Path) -> Path:
    """Makes a pipeline's folder with the same float16 weights: links to the encoders, converted transformer and VAE."""
    from safetensors.torch import save_file

    if (place / "model_index.json").exists():
        return place
    for role, (name, config) in CLIPS.items():
        fixed = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "vocab_size": 49408}
        eos = {"max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        write_json(place / name / "config.json", config | fixed | eos)
        (place / name / "model.safetensors").symlink_to((source / FILES[role]).resolve())
    write_json(place / "text_encoder_3" / "config.json", T5_CONFIG)
    (place / "text_encoder_3" / "model.safetensors").symlink_to((source / FILES["t5xxl"]).resolve())
    for name, own in (("tokenizer", "tokenizer"), ("tokenizer_2", "tokenizer"), ("tokenizer_3", "tokenizer_3")):
        (place / name).symlink_to((source / own).resolve())
    file = WeightFile(source / FILES["sd3_medium"])
    for name, part, read, make, convert in (
        ("transformer", sd3.weights.find_mmdit(file), MMDiTConfig.from_shapes, MMDiT, to_diffusers.transformer),
        ("vae", sd3.weights.find_vae(file), VAEConfig.from_shapes, VAE, to_diffusers.vae),
    ):
        assert part.prefix in (MMDIT_PREFIX, VAE_PREFIX)
        config = part.config(read, name)
        ours = part.load_into(on_meta(lambda make=make, config=config: make(config)), "cpu", torch.float16)
        with torch.device("meta"):
            peer = to_diffusers.peer_transformer(config) if name == "transformer" else to_diffusers.peer_vae(config)
        peer.save_config(place / name)
        tensors = {n: t.detach().contiguous().clone() for n, t in convert(ours).items()}
        save_file(tensors, place / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    write_json(place / "scheduler" / "scheduler_config.json", scheduler)
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.35.0"}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    for n, kind in (
        ("", "CLIPTextModelWithProjection"),
        ("_2", "CLIPTextModelWithProjection"),
        ("_3", "T5EncoderModel"),
    ):
        index[f"text_encoder{n}"] = ["transformers", kind]
        index[f"tokenizer{n}"] = ["transformers", "T5TokenizerFast" if n == "_3" else "CLIPTokenizer"]
    write_json(place / "model_index.json", index)
    return place


def run(command: list[str], environment: dict[str, str]) -> tuple[dict[str, int], str, float]:
    """Runs a command. Returns its peak memory figures (VmHWM is the kernel's own peak, including mapped pages), its
    output and its time in seconds.
    """
    peaks: dict[str, int] = {}
    started = time.time()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            for name, value in status(process.pid).items():
                peaks[name] = max(peaks.get(name, 0), value)
            time.sleep(0.02)
        spent = time.time() - started
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{text[-3000:]}")
    return peaks, text, spent


def main(folder: str = "", size: int = 512, steps: int = 1, rounds: int = 2) -> None:
    """Prints a row per program and run, and the ratios. Two runs of one program are the A/A comparison."""
    tokenizers = os.environ.get("SD3_TOKENIZERS")
    if not tokenizers:
        sys.exit("set SD3_TOKENIZERS to a folder with the published tokenizers in clip/ and t5/")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        place.mkdir(parents=True, exist_ok=True)
        for seed, (manifest, name) in enumerate(FILES.items()):
            if not (place / name).exists():
                write_random(manifest, place / name, seed)
        for name, published in (("tokenizer", "clip"), ("tokenizer_3", "t5")):
            if not (place / name).exists():
                (place / name).symlink_to((Path(tokenizers) / published).resolve())
        theirs = diffusers_folder(place, place / "diffusers")
        environment = dict(os.environ, HF_HUB_OFFLINE="1", THP_MEM_ALLOC_ENABLE="1")  # both use large pages
        here = Path(__file__).parent
        ours = [sys.executable, str(ROOT / "sd3_infer.py"), "--model", str(place / FILES["sd3_medium"]), "--verbose"]
        ours += ["--prompt", PROMPT, "--width", str(size), "--height", str(size), "--steps", str(steps), "--cfg", "5"]
        ours += ["--sampler", "euler", "--dtype", "bfloat16", "--device", "cpu", "--out_dir", str(place / "out")]
        peer = [sys.executable, str(here / "peer_lean.py"), str(theirs), "--size", str(size), "--steps", str(steps)]
        got: dict[str, list[tuple[int, float, float]]] = {"ours": [], "diffusers": []}
        for i in range(rounds):
            for name, command in (("ours", [*ours, "--postfix", f"_{time.time_ns()}"]), ("diffusers", peer)):
                peaks, text, spent = run(command, environment)
                got[name].append((peaks["VmHWM"], first_step(name, text, spent), spent))
                print(f"{name}, run {i + 1}: {peaks['VmHWM'] / GB:.2f} GB", file=sys.stderr)
    print(
        f"SD3 Medium with CLIP-L, CLIP-G, T5-XXL, {size} x {size}, bfloat16, {steps} step(s), both passes of guidance"
    )
    print(
        "| program, run | peak memory with mapped files (ratio to diffusers) | time to the first step, ratio to "
        "diffusers | total time, ratio to diffusers |"
    )
    print("| --- | --- | --- | --- |")
    base = [statistics.mean(values) for values in zip(*got["diffusers"], strict=True)]
    for name, runs in got.items():
        for i, (peak, first, spent) in enumerate(runs):
            row = f"{peak / GB:.2f} GB ({peak / base[0]:.2f}) | {first / base[1]:.2f} | {spent / base[2]:.2f}"
            print(f"| {name}, run {i + 1} | {row} |")


def first_step(name: str, text: str, spent: float) -> float:
    """Seconds from the start of the process until the first denoising step begins."""
    if name == "diffusers":
        first, inside = map(float, re.search(r"first step after ([\d.]+) s, all ([\d.]+) s", text).groups())
        return spent - inside + first
    stages = dict(re.findall(r"([a-zA-Z][\w ]+) ([\d.]+) s", text))
    inside = float(re.search(r"images? in ([\d.]+) s", text)[1])
    after = sum(float(stages[s]) for s in ("sampling", "loading VAE", "decoding"))
    return spent - inside + (inside - after)


if __name__ == "__main__":
    fire.Fire(main)
