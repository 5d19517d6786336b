"""Peak memory of `sd3_infer.py`, and time of each stage, with SD3 Medium, CLIP-L, CLIP-G and T5-XXL at real size.

    python benchmarks/real_size.py

Random float16 weights from the manifests, in a temporary folder (16 GB, removed at the end); one step at 256 x 256.
The times depend on the machine and its load. They only show which stages take long.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from random_weights import write_random

ROOT = Path(__file__).parent.parent
FILES = {
    "sd3_medium": "sd3_medium.safetensors",
    "clip_l": "clip_l.safetensors",
    "clip_g": "clip_g.safetensors",
    "t5xxl": "t5xxl_fp16.safetensors",
}
GB = 1e9


def status(pid: int) -> dict[str, int]:
    """Memory figures of a process in bytes, read from /proc (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split(":") for line in lines if line.startswith(("VmHWM", "RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields}


def measure(command: list[str]) -> tuple[dict[str, int], float]:
    """Runs a command. Returns its peak memory figures in bytes (sampled every 20 ms; VmHWM is the kernel's own peak)
    and its time in seconds.
    """
    peaks: dict[str, int] = {}
    start = time.time()
    process = subprocess.Popen(command)
    while process.poll() is None:
        for name, value in status(process.pid).items():
            peaks[name] = max(peaks.get(name, 0), value)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    return peaks, time.time() - start


def main(
    folder: str = "", size: int = 256, steps: int = 1, keep: bool = False, residual: bool = True, dtype: str = "auto"
) -> None:
    """Writes the weights, makes one image and prints memory and times. folder: where to write the weights; keep: do not
    delete them.
    """
    place = Path(folder or tempfile.mkdtemp(prefix="sd3-real-size-"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        total = 0
        for seed, (manifest, name) in enumerate(FILES.items()):
            path = place / name
            total += path.stat().st_size if path.exists() else write_random(manifest, path, seed)
        tokenizers = os.environ.get("SD3_TOKENIZERS")
        for name, own in (("tokenizer", "clip"), ("tokenizer_3", "t5")):
            source = Path(tokenizers) / own if tokenizers else ROOT / "models" / "demo" / name
            shutil.copytree(source, place / name, dirs_exist_ok=True)
        command = [sys.executable, str(ROOT / "sd3_infer.py"), "--model", str(place / FILES["sd3_medium"])]
        command += ["--prompt", "a red circle left of a blue square", "--out_dir", str(place / "out")]
        command += ["--width", str(size), "--height", str(size), "--steps", str(steps), "--dtype", dtype]
        command += ["--postfix", f"_{time.time_ns()}", "--device", "cpu"]
        if residual:
            command += ["--residual_target_layers", "8,12,16,20", "--residual_weights", "1,1,1,1"]
        peaks, seconds = measure(command)
        run = json.loads(max((place / "out").rglob("run.json"), key=os.path.getmtime).read_text())
        print(f"{total / GB:.1f} GB of weights on disk, {size} x {size}, {steps} step(s), {run['dtype']}")
        print("| | |\n| --- | --- |")
        print(f"| peak resident memory, mapped pages included | {peaks['VmHWM'] / GB:.2f} GB |")
        print(f"| peak anonymous memory alone | {peaks['RssAnon'] / GB:.2f} GB |")
        for stage, spent in run["stages"].items():
            print(f"| {stage} | {spent:.1f} s |")
        print(f"| whole process | {seconds:.1f} s |")
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    fire.Fire(main)
