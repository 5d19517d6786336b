"""What step caching (`--cache`) and 8-bit weights (`--weights`) save, and what error they cause.

    python benchmarks/shortcuts.py            the shipped model, with meaningful images
    python benchmarks/shortcuts.py weights    SD3 Medium at real size: memory of the MMDiT, error and time of a step

Images: 12 prompts, 24 Euler steps, cfg 2.5. The error is that of the final latents relative to full runs with the same
seeds (norm of the difference over the norm). For comparison there is the error of another seed, the largest meaningful
one. Full and shortened runs alternate; the A/A row is a full run over the full runs before and after it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import fire
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from step import DTYPE, compare, inputs, seconds, weights_file

from sd3.engine import Engine
from sd3.planning import plan_pictures
from sd3.settings import Setup

ROOT = Path(__file__).parent.parent
PROMPTS = [f"a {c} {s}" for c in ("red", "green", "blue", "yellow") for s in ("circle", "square", "star")]


def engine_for(weights: str = "full", model: str = "demo", text: bool = True) -> Engine:
    """An engine on the CPU, in bfloat16."""
    return Engine(Setup(model=model, device="cpu", dtype="bfloat16", weights=weights), load_tokenizers=text)


class Bench:
    """See the module."""

    def pictures(self, thresholds="0.05,0.1,0.2,0.3") -> None:
        """Prints a row per threshold, and one for each kind of 8-bit weights."""
        full = engine_for()
        ways = {"A/A: full, again": (full, 0.0)}
        for threshold in str(thresholds).strip("()").split(","):
            ways[f"`--cache {float(threshold):g}`"] = (full, float(threshold))
        for kind in ("int8", "fp8"):
            ways[f"`--weights {kind}`"] = (engine_for(kind), 0.0)

        def run(engine: Engine, cache: float, prompt: str, seed: int) -> torch.Tensor:
            plan = plan_pictures(engine, [prompt], [seed], **engine.defaults, cache=cache)
            return engine.sample(plan.pictures)

        for engine, _ in ways.values():
            run(engine, 0.0, PROMPTS[0], 0)
        errors: dict[str, list[float]] = {name: [] for name in [*ways, "another seed"]}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for seed, prompt in enumerate(PROMPTS):
            exact = run(full, 0.0, prompt, seed)
            relative = lambda got, exact=exact: ((got - exact).norm() / exact.norm()).item()  # noqa: E731
            errors["another seed"].append(relative(run(full, 0.0, prompt, 1000 + seed)))
            for name, (engine, cache) in ways.items():
                before = seconds(lambda prompt=prompt, seed=seed: run(full, 0.0, prompt, seed))
                got = []
                between = seconds(lambda: got.append(run(engine, cache, prompt, seed)))  # noqa: B023
                after = seconds(lambda prompt=prompt, seed=seed: run(full, 0.0, prompt, seed))
                times[name].append(between / ((before + after) / 2))
                errors[name].append(relative(got[0]))
        print("the shipped model, 12 images, 24 steps, bfloat16")
        print(
            "| flags | sampling time, ratio to a full run: median | middle half | relative error of the latent: "
            "median | largest |"
        )
        print("| --- | --- | --- | --- | --- |")
        for name, values in times.items():
            low, middle, high = statistics.quantiles(values, n=4)
            error = f"{statistics.median(errors[name]):.3f} | {max(errors[name]):.3f}"
            print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {error} |")
        other = errors["another seed"]
        print(f"| another seed | | | {statistics.median(other):.3f} | {max(other):.3f} |")

    @torch.no_grad()
    def weights(self, model: str = "sd3_medium", size: int = 256, rounds: int = 3, folder: str = "") -> None:
        """Prints a row per kind of weights."""
        with tempfile.TemporaryDirectory() as place:
            file = str(weights_file(model, folder or place))
            engines = {k: engine_for(k, file, False) for k in ("full", "int8", "fp8")}
            models = {kind: engine.network.mmdit for kind, engine in engines.items()}
        x, t, y, context = inputs(engines["full"].config, size)
        steps, results, size_of = {}, {}, {}
        for kind, model_ in models.items():
            text = model_.embed_text(y, context)
            steps[kind] = lambda m=model_, text=text: m.velocity(x, t, text)
            results[kind] = steps[kind]().float()
            joint = [*model_.joint_blocks.parameters(), *model_.joint_blocks.buffers()]
            packed = [m.packed for m in model_.modules() if hasattr(m, "packed")]
            size_of[kind] = sum(p.nbytes for p in joint) + sum(p.numel() * DTYPE.itemsize for p in packed)
        ratios = compare({kind: (step, steps["full"]) for kind, step in steps.items()}, rounds)
        print(f'{model}, {size} x {size}, batch of 2, bfloat16; the row "full" is the A/A')
        print(
            "| `--weights` | memory of the blocks | time of a step, ratio to full | relative error of the velocity |\n"
            "| --- | --- | --- | --- |"
        )
        for kind, values in ratios.items():
            error = ((results[kind] - results["full"]).norm() / results["full"].norm()).item()
            spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            print(f"| {kind} | {size_of[kind] / 1e9:.2f} GB | {spread} | {error:.3f} |")


if __name__ == "__main__":
    fire.Fire(Bench, command=sys.argv[1:] or ["pictures"])
