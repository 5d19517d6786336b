"""Time of many prompts in one process over one process per prompt, and time of a prompt with `--embed_cache` over the
same prompt without it.

    SD3_TOKENIZERS=... python benchmarks/whole.py

SD3 Medium with CLIP-L, CLIP-G and T5-XXL (random float16 weights of real size), 256 x 256, one step, bfloat16, with a
warm file cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
from random_weights import write_random
from real_size import FILES, ROOT

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "grey", "pink", "orange", "brown")


def main(folder: str = "", prompts: int = 10, size: int = 256, steps: int = 1, rounds: int = 2) -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        for seed, (manifest, name) in enumerate(FILES.items()):
            if not (place / name).exists():
                write_random(manifest, place / name, seed)
        tokenizers = os.environ.get("SD3_TOKENIZERS")
        for name, published in (("tokenizer", "clip"), ("tokenizer_3", "t5")):
            source = Path(tokenizers) / published if tokenizers else ROOT / "models" / "demo" / name
            if not (place / name).exists():
                shutil.copytree(source, place / name)
        texts = [f"a {colour} fox in the snow" for colour in COLOURS[:prompts]]
        command = [sys.executable, str(ROOT / "sd3_infer.py"), "--model", str(place / FILES["sd3_medium"])]
        command += ["--width", str(size), "--height", str(size), "--steps", str(steps), "--device", "cpu"]
        command += ["--dtype", "bfloat16", "--out_dir", str(Path(temporary) / "out"), "--seed", "1"]

        def seconds(prompt: str, *more: str) -> float:
            started = time.perf_counter()
            done = subprocess.run([*command, "--prompt", prompt, *more], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            return time.perf_counter() - started

        known, cache = [], str(Path(temporary) / "cache")
        for text in texts[:rounds]:
            plain, again = seconds(text), seconds(text)
            unknown, found = seconds(text, "--embed_cache", cache), seconds(text, "--embed_cache", cache)
            known.append((again / plain, unknown / plain, found / plain))
        print("one prompt in one process with `--embed_cache`; ratio to the same without it")
        print(
            "| the prompt | "
            + " | ".join(f"time, ratio: prompt {i + 1}" for i in range(rounds))
            + " |\n| --- |"
            + " --- |" * rounds
        )
        for i, name in enumerate(("A/A: without the cache again", "not in the cache yet", "in the cache")):
            print(f"| {name} | " + " | ".join(f"{row[i]:.2f}" for row in known) + " |")
        apart = [seconds(text) for text in texts]
        file = Path(temporary) / "prompts.txt"
        file.write_text("\n".join(texts), encoding="utf-8")
        together = [seconds(str(file)) for _ in range(rounds)]
        served = serve(command, texts)
        spread = statistics.pstdev(apart) / statistics.mean(apart)
        print(
            f"\n{prompts} prompts in one process; ratio to {prompts} processes (spread between processes: {spread:.0%})"
        )
        print("| | time, ratio |\n| --- | --- |")
        for i, spent in enumerate(together):
            print(f"| one process, run {i + 1} | {spent / sum(apart):.2f} |")
        print(f"| `--serve_stdin --t5_resident`, one line per prompt | {served / sum(apart):.2f} |")


def serve(command: list[str], texts: list[str]) -> float:
    """Seconds for the same prompts as lines of one serving process, including its start."""
    lines = "".join(f'{{"prompt": "{text}"}}\n' for text in texts)
    started = time.perf_counter()
    done = subprocess.run([*command, "--serve_stdin", "--t5_resident"], input=lines, capture_output=True, text=True)
    assert done.stdout.count('"ok": true') == len(texts), done.stdout + done.stderr
    return time.perf_counter() - started


if __name__ == "__main__":
    fire.Fire(main)
