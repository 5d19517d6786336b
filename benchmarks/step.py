"""Time of a denoising step relative to diffusers' transformer, with the same random weights of real size and inputs.

    python benchmarks/step.py                               SD3 Medium, 512 x 512 and 256 x 256
    python benchmarks/step.py --model sd3.5_medium
    python benchmarks/step.py --compiled --sizes 256
    python benchmarks/step.py growth                        how the step grows with size and batch (ours alone)
    python benchmarks/step.py roofline                      how far a step is from the rate of matrix products

One process, conditional and unconditional pass in one batch, 154 text tokens, bfloat16. Runs are interleaved and each
ratio compares consecutive runs. The peer runs as its documentation says for inference: eval, no_grad, bfloat16, and
with fused qkv projections (`fuse_qkv_projections`) if the model supports them, which SD3.5 Medium does not. The A/A row
is the peer against itself.
"""

from __future__ import annotations

import os

os.environ["THP_MEM_ALLOC_ENABLE"] = (
    "1"  # set before torch is imported, as in sd3_infer.py; here it applies to the peer too
)

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from random_weights import write_random
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmditx import MMDiT
from sd3.engine import Engine
from sd3.settings import Setup
from sd3.weights import on_meta
from sd3_impls import seeded_noise

TOKENS = 154
DTYPE = torch.bfloat16


def weights_file(name: str, folder: str) -> Path:
    """Path of a random checkpoint of a manifest in `folder`. Writes it if it does not exist."""
    path = Path(folder) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_random(name, path)
    return path


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def inputs(config, size: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Random x, t, y and context of a step."""
    draw = lambda seed, *shape: seeded_noise(seed, shape).to(DTYPE)  # noqa: E731
    x = draw(1, batch, config.latent_channels, size // 8, size // 8)
    t = torch.full((batch,), 700.0)
    return x, t, draw(2, batch, config.pooled_width), draw(3, batch, TOKENS, config.context_width)


def peer_model(file: Path):
    """diffusers' transformer with the weights of a checkpoint in our layout."""
    import to_diffusers

    engine = Engine(Setup(model=str(file), device="cpu", dtype="bfloat16"), load_tokenizers=False)
    plain = on_meta(lambda: MMDiT(engine.config))
    engine.network.part.load_into(plain, "cpu", DTYPE)
    with torch.device("meta"):
        peer = to_diffusers.peer_transformer(engine.config)
    peer.load_state_dict(to_diffusers.transformer(plain), assign=True)
    peer = peer.to(DTYPE).eval()
    if not engine.config.dual_layers:  # diffusers' fused projections fail with dual attention
        peer.fuse_qkv_projections()
    return peer


def compare(pairs: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, list[float]]:
    """Time ratios of each pair's first run over its second. Each first run is between two second ones."""
    for one, other in pairs.values():
        one(), other()
    ratios: dict[str, list[float]] = {name: [] for name in pairs}
    with tqdm(total=rounds * len(pairs), desc="measuring", unit="pair", leave=False) as bar:
        for _ in range(rounds):
            for name, (one, other) in pairs.items():
                before, own, after = seconds(other), seconds(one), seconds(other)
                ratios[name].append(own / ((before + after) / 2))
                bar.update()
    return ratios


def table(ratios: dict[str, list[float]], head: str) -> None:
    """Prints the median, middle half and number of the ratios."""
    print(f"| {head} | median | middle half | pairs |\n| --- | --- | --- | --- |")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {len(values)} |")


class Bench:
    """See the module."""

    @torch.no_grad()
    def compare(
        self, model: str = "sd3_medium", sizes="512,256", rounds: int = 5, compiled: bool = False, folder: str = ""
    ) -> None:
        """Prints a row per size, and one for A/A."""
        with tempfile.TemporaryDirectory() as place:
            file = weights_file(model, folder or place)
            setup = Setup(model=str(file), device="cpu", dtype="bfloat16", compile=compiled)
            engine = Engine(setup, load_tokenizers=False)
            ours, peer = engine.network.mmdit, peer_model(file)
        if compiled:
            for block in peer.transformer_blocks:
                block.compile(dynamic=True)
        pairs, errors = {}, {}
        for size in [int(s) for s in str(sizes).strip("()").split(",")]:
            x, t, y, context = inputs(engine.config, size)
            text = ours.embed_text(y, context)  # once per image; the peer cannot do this
            mine = lambda x=x, t=t, text=text: ours.velocity(x, t, text)  # noqa: E731
            theirs = lambda x=x, t=t, y=y, c=context: peer(x, c, y, t, return_dict=False)[0]  # noqa: E731
            errors[size] = ((mine() - theirs()).float().norm() / theirs().float().norm()).item()
            pairs[f"{size} x {size}, ours / diffusers"] = (mine, theirs)
            pairs[f"{size} x {size}, A/A: diffusers / diffusers"] = (theirs, theirs)
        how = "compiled" if compiled else "eager"
        print(f"{model}, batch of 2, {TOKENS} text tokens, bfloat16, {how}, {torch.get_num_threads()} threads")
        table(compare(pairs, rounds), "time of a step, ratio")
        print("relative difference of the velocities: " + ", ".join(f"{n}: {e:.2g}" for n, e in errors.items()))

    @torch.no_grad()
    def growth(self, model: str = "sd3_medium", rounds: int = 3, folder: str = "") -> None:
        """Prints the time of steps of other sizes and batches, relative to one of 512 x 512 and batch 2."""
        with tempfile.TemporaryDirectory() as place:
            file = weights_file(model, folder or place)
            engine = Engine(Setup(model=str(file), device="cpu", dtype="bfloat16"), load_tokenizers=False)
            ours = engine.network.mmdit

        def step(size: int, batch: int) -> Callable[[], object]:
            x, t, y, context = inputs(engine.config, size, batch)
            text = ours.embed_text(y, context)
            return lambda: ours.velocity(x, t, text)

        base = step(512, 2)
        sizes = [(256, 2), (512, 2), (768, 2), (1024, 2), (512, 1), (512, 4)]
        runs = {f"{size} x {size}, batch {batch}": step(size, batch) for size, batch in sizes}
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        base()
        for _ in range(rounds):
            for name, run in tqdm(runs.items(), desc="measuring", leave=False):
                before = seconds(base)
                ratios[name].append(seconds(run) / before)
        print(
            f"{model}, bfloat16, eager; ratio to a step of 512 x 512, batch 2, measured right before (that row is A/A)"
        )
        table(ratios, "step")

    @torch.no_grad()
    def roofline(self, model: str = "sd3_medium", size: int = 512, rounds: int = 3, folder: str = "") -> None:
        """Prints rate, share of the time and bound of each part of a step, and the best rate of one large matrix
        product on this machine.
        """
        from torch.profiler import ProfilerActivity, profile

        with tempfile.TemporaryDirectory() as place:
            file = weights_file(model, folder or place)
            engine = Engine(Setup(model=str(file), device="cpu", dtype="bfloat16"), load_tokenizers=False)
            ours = engine.network.mmdit
        x, t, y, context = inputs(engine.config, size)
        text = ours.embed_text(y, context)
        a, b = (torch.randn(4096, 4096).to(DTYPE) for _ in range(2))
        peak = max(2 * 4096**3 / seconds(lambda: F.linear(a, b)) for _ in range(5))
        ours.velocity(x, t, text)
        steps = []
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as watched:
                whole = seconds(lambda: ours.velocity(x, t, text))
            spent: dict[str, float] = {}
            for event in watched.key_averages():
                part = next((p for p, names in PARTS.items() if event.key in names), "element-wise, copies, the rest")
                spent[part] = spent.get(part, 0.0) + event.self_cpu_time_total / 1e6
            steps.append((whole, spent))
        whole, spent = sorted(steps, key=lambda s: s[0])[len(steps) // 2]
        c, image = engine.config, (size // 16) ** 2
        tokens, text_tokens = image + TOKENS, TOKENS
        products = 0.0
        for i in range(c.depth):
            last = i == c.depth - 1
            streams = [(image, 4), (text_tokens, 2 if last else 4)] + ([(image, 4)] if i in c.dual_layers else [])
            products += sum(2 * 2 * rows * n * c.width**2 for rows, n in streams)
            products += 2 * 2 * 2 * (image + (0 if last else text_tokens)) * c.width * c.mlp_width
        attention = sum(
            4
            * 2
            * c.width
            * ((image if i == c.depth - 1 else tokens) * tokens + (image**2 if i in c.dual_layers else 0))
            for i in range(c.depth)
        )
        print(
            f"{model}, {size} x {size}, batch of 2, {TOKENS} text tokens, bfloat16, eager; one product of 4096 x 4096"
        )
        print(f"x 4096 runs at {peak / 1e9:.0f} GFLOP/s")
        print(
            "| part of a step | operations | rate | share of the step's time | "
            "share it would take at the large product's rate |\n| --- | --- | --- | --- | --- |"
        )
        operations = {"matrix products": products, "attention": attention}
        total = sum(spent.values())
        for part, took in spent.items():
            done = operations.get(part)
            rate = f"{done / 1e9:.0f} GFLOP | {done / took / 1e9:.0f} GFLOP/s" if done else " | "
            bound = f"{done / peak / total:.2f}" if done else "0"
            print(f"| {part} | {rate} | {took / total:.2f} | {bound} |")
        print(f"| all | | | 1 ({whole:.1f} s with the profiler) | {(products + attention) / peak / total:.2f} |")


PARTS = {
    "matrix products": ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


if __name__ == "__main__":
    arguments = sys.argv[1:]
    named = arguments and not arguments[0].startswith("-")
    fire.Fire(Bench, command=arguments if named else ["compare", *arguments])
