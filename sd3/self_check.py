"""`--self_check`: the shipped model on the chosen device and dtype against results that a CPU gave in float32.

    python sd3_infer.py --self_check [--device cuda] [--dtype float16]

For devices that the developers cannot test: prints errors, time per step and peak memory, ready to paste into an issue.
`python -m sd3.self_check` rebuilds the stored results.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from dit_embedder import ControlNet, ControlNetConfig
from sd3 import writing
from sd3.device import device_record, memory_peak
from sd3.diffusers_names import RENAMES
from sd3.engine import Engine, load_for
from sd3.mistakes import Missing
from sd3.models import SHIPPED, SkipLayerConfig, shipped_folder
from sd3.planning import residual_settings
from sd3.residual import ResidualConfig
from sd3.settings import Flags, Settings
from sd3.versions import versions
from sd3_impls import latent_in, seeded_noise

MODEL = shipped_folder() / f"{SHIPPED}.safetensors"
STORED = MODEL.parent / "self_check" / "float32.safetensors"
CONTROLNET = MODEL.parent / "self_check" / "controlnet.safetensors"
PROMPT, SEED, STEPS, CFG, SIDE = "a red circle left of a blue square", 7, 6, 2.5, 12
# The largest relative error (norm of the difference over norm of the stored result) explained by rounding.
LIMITS = {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.01}


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: the relative error, and the seconds of a step (nan where there are no steps)."""

    name: str
    error: float
    step: float


def picture() -> Image.Image:
    """An image with edges and ramps, 96 x 96."""
    ramp = torch.linspace(0, 255, 8 * SIDE)
    across, down = torch.meshgrid(ramp, ramp, indexing="xy")
    pixels = torch.stack([across, down, across.flip(1) * down / 255])
    pixels[:, 24:64, 32:56] = torch.tensor([200.0, 30.0, 60.0])[:, None, None]
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def results(engine: Engine) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """The computations by name, each with its number of denoising steps."""
    length = engine.text.pair_length(PROMPT, "")
    start = torch.zeros(1, engine.config.latent_channels, SIDE, SIDE)
    plain = {"prompt": PROMPT, "steps": STEPS, "cfg": CFG, "sampler": "euler", "shift": engine.defaults["shift"]}
    plain |= engine.loaded_settings()
    settings = {
        "plain": {},
        "residual add": residual_settings(ResidualConfig(0, (3, 5, 7), "each:1")),
        "residual anchored": residual_settings(ResidualConfig(1, (3, 8, 12), "each:2", "anchored", "cosine")),
        "skip-layer guidance": {"skip_layer": SkipLayerConfig(3.0, 0.01, 0.6, (4, 5), cfg=CFG)},
    }

    def sample(control: Tensor | None = None, **values: Any) -> Tensor:
        texts = [engine.text.get_cond(text, length) for text in (PROMPT, "")]
        return engine.network.sample(Settings(**plain | values), start, [SEED], *texts, control)

    def control() -> Tensor:
        latent = latent_in(engine.pixels.encode(picture(), [SEED], control=engine.network.control))
        return sample(latent, controlnet_strength=0.3)

    runs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "text tokens": (lambda: engine.text.get_cond(PROMPT, length)[0], 0),
        "VAE encoding": (lambda: engine.pixels.encode(picture(), [SEED]), 0),
        "VAE decoding": (lambda: engine.pixels.decode(seeded_noise(SEED, start.shape)), 0),
    }
    runs |= {name: (lambda values=values: sample(**values), STEPS) for name, values in settings.items()}
    return runs | {"ControlNet": (control, STEPS)}


def check(flags: Flags) -> tuple[list[Row], Engine]:
    """Runs all checks; raises Missing if the shipped model is missing."""
    for path in (MODEL, STORED, CONTROLNET):
        if not path.is_file():
            raise Missing("self_check", "", f"{path} is missing; install the package again")
    engine = load_for(flags)
    stored, rows = load_file(STORED), []
    for name, (run, steps) in results(engine).items():
        with engine.owned():
            run()  # loads, compiles, warms up
            started = time.perf_counter()
            got = run().float().cpu()  # waits for the device
        spent = time.perf_counter() - started
        wanted = stored[name]
        error = ((got - wanted).norm() / wanted.norm()).item() if got.shape == wanted.shape else math.inf
        rows.append(Row(name, error, spent / steps if steps else math.nan))
    return rows, engine


def run(flags: Flags) -> bool:
    """Prints the table; returns whether rounding explains every error."""
    given = {"model": str(MODEL), "controlnet_ckpt": str(CONTROLNET), "controlnet_cond_image": "-"}
    rows, engine = check(dataclasses.replace(flags, **given))
    limit = LIMITS[engine.dtype]
    about = device_record(engine.device, engine.threads)
    name = str(engine.dtype).removeprefix("torch.")
    print(f"self check: {about['device']} ({engine.device}), {name}", end="")
    print(f", {about['threads']} threads" if "threads" in about else "")
    print(f"{platform.platform()}, " + ", ".join(f"{n} {v}" for n, v in versions().items()))
    print("| check | relative error to float32 on a CPU | a step |\n| --- | --- | --- |")
    for row in rows:
        step = "" if math.isnan(row.step) else f"{1000 * row.step:.1f} ms"
        mark = "" if row.error <= limit else f" (more than {limit:g})"
        print(f"| {row.name} | {row.error:.2g}{mark} | {step} |")
    print(f"peak memory: {memory_peak(engine.device) / 1e6:,.0f} MB")
    failed = [row.name for row in rows if not row.error <= limit]
    print(f"FAILED: {', '.join(failed)}; please paste this into an issue" if failed else f"all within {limit:g}")
    return not failed


def write() -> None:
    """Rebuilds the ControlNet and the stored results, in float32 on this CPU."""
    engine = load_for(Flags.read({"model": str(MODEL), "device": "cpu", "dtype": "float32"}))
    base = engine.config
    config = ControlNetConfig(
        latent_channels=base.latent_channels,
        patch=base.patch,
        width=base.width,
        depth=1,
        pooled_width=base.pooled_width,
        mlp_width=base.width // 2,
        patch_embedding=False,
    )
    tensors = {}
    for i, (name, p) in enumerate(ControlNet(config, chained=True).state_dict().items()):
        spread = math.prod(p.shape[1:]) ** -0.5 if p.ndim > 1 else 0.1
        tensors[RENAMES.get(name, name)] = (seeded_noise(i, p.shape) * spread).half()
    STORED.parent.mkdir(exist_ok=True)
    writing.atomic_write(CONTROLNET, lambda f: f.write(save(tensors)))
    flags = Flags.read({"model": str(MODEL), "device": "cpu", "dtype": "float32"})
    flags = dataclasses.replace(flags, controlnet_ckpt=str(CONTROLNET), controlnet_cond_image="-")
    out = {name: run().float().cpu().contiguous() for name, (run, _) in results(load_for(flags)).items()}
    writing.atomic_write(STORED, lambda f: f.write(save(out)))


if __name__ == "__main__":
    write()
