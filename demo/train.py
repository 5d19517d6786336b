"""Trains the small model that ships, from scratch: `python -m demo.train all --work FOLDER`.

Stages: `vae` (autoencoder), `encode` (images to latents, in sets of scenes), `text` (the text encoders alone, which
shows what they learn), `flow` (MMDiT and text encoders together) and `export` (one safetensors file and the
tokenizers). Each stage saves often and continues from its last save.

`watch` scores unfinished weights, `grow` adds blocks, `resume` writes the weights that a fresh checkout continues from.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from demo import flow as flow_stage
from demo.command_line import run
from demo.data import count_sets, encode_set, load, save, set_path, text_set, to_unit
from demo.flow import (
    ENCODERS,
    HISTORY,
    RESUME,
    SAVE_EVERY,
    Flow,
    grown,
    newest,
    pruned,
    read_text,
    train_text,
    write_history,
    write_resume,
)
from demo.optim import Average, Muon, rate
from demo.text import Captions
from demo.watch import look
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX, VAE_PREFIX
from sd3.mistakes import Mistake
from sd3.shapes.scenes import CELL, HELD_OUT, SIZE, all_words, render, training_scene
from sd3.vae import VAE, ResnetBlock, VAEConfig
from sd3_impls import LATENT_SCALE, LATENT_SHIFT

__all__ = ["Captions", "load"]
SHIPPED = Path(__file__).parent.parent / "models" / "demo" / "demo.safetensors"
VAE_CONFIG = VAEConfig(
    image_channels=3,
    latent_channels=16,
    stem_width=32,
    widths=(32, 64, 64, 128),
    encoder_blocks=1,
    decoder_blocks=2,
)
VALIDATION_SEED = 10**6


def crops(rng: random.Random, count: int, size: int) -> Tensor:
    """Crops (count, 3, size, size) of new scenes, each near an object."""
    out = []
    while len(out) < count:
        scene = training_scene(rng)
        picture = render(scene)
        for thing in rng.sample(scene.things, min(2, len(scene.things))):
            spread = CELL // 2
            x, y = (
                min(max(int(c) + rng.randint(-spread, spread) - size // 2, 0), SIZE - size) for c in (thing.x, thing.y)
            )
            out.append(picture[y : y + size, x : x + size])
    return to_unit(out[:count])


def init_vae(model: VAE) -> None:
    """Initialises residual branches with zero and the posterior narrow. Otherwise a small VAE only learns the mean
    colour.
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for half in (model.encoder, model.decoder):
        nn.init.zeros_(half.mid.attn_1.proj_out.weight)
        nn.init.zeros_(half.mid.attn_1.proj_out.bias)
    latent = model.config.latent_channels
    nn.init.constant_(model.encoder.conv_out.bias[latent:], -4.0)


def vae(work: str, steps: int = 2000, batch: int = 32, kl: float = 1e-3, seed: int = 0) -> None:
    """Trains the autoencoder on crops, then on whole images. Loss: MSE + mean absolute error + kl * KL."""
    path = Path(work) / "vae.pt"
    torch.manual_seed(seed)
    model = VAE(VAE_CONFIG)
    init_vae(model)
    model = model.to(memory_format=torch.channels_last)
    edges = {id(model.encoder.conv_in.weight), id(model.decoder.conv_out.weight)}
    matrices = [p for p in model.parameters() if p.ndim == 4 and id(p) not in edges]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimisers = [
        Muon(matrices, lr=0.03),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [o.param_groups[0]["lr"] for o in optimisers]
    average = Average(model, 0.995)
    start = 0
    if state := load(path):
        model.load_state_dict(state["model"])
        for o, s in zip(optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
        average.values, average.steps, start = state["average"], state["average_steps"], state["step"]
    rng = random.Random(seed + start)
    saved = time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=10)
    for step in bar:
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * rate(step / steps)
        whole = step > 0.7 * steps
        images = crops(rng, batch // 8, SIZE) if whole else crops(rng, batch, 32)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.moments(images)
            logvar = logvar.float().clamp(-30, 20)
            mean = mean.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            out = model.decode(z).float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = F.mse_loss(out, images) + F.l1_loss(out, images) + kl * divergence
        loss.backward()
        for o in optimisers:
            o.step()
            o.zero_grad()
        average.update(model)
        if step % 50 == 0:
            bar.write(f"{step} loss {loss.item():.4f} mse {F.mse_loss(out, images).item():.5f} kl {divergence:.2f}")
        if time.time() - saved > SAVE_EVERY or step == steps - 1:
            state = {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "average": average.values,
                "average_steps": average.steps,
                "step": step + 1,
            }
            save(path, state)
            saved = time.time()
    validate_vae(average.values)


@torch.no_grad()
def validate_vae(weights: dict[str, Tensor], count: int = 32) -> None:
    """Prints the reconstruction error of whole images and the spread of the latents."""
    model = VAE(VAE_CONFIG)
    model.load_state_dict(weights)
    rng = random.Random(VALIDATION_SEED)
    images = to_unit([render(training_scene(rng)) for _ in range(count)])
    mean, logvar = model.moments(images)
    error = F.mse_loss(model.decode(mean).clamp(-1, 1), images).item()
    spread = mean.std(dim=(0, 2, 3)).sort(descending=True).values
    print(f"whole images: mse {error:.5f}, {10 * np.log10(4 / error):.1f} dB; latent mean {mean.mean():.3f}")
    print("channel spread", [round(s, 2) for s in spread.tolist()], "posterior", logvar.exp().sqrt().mean().item())


# ---- images to latents -------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(work: Path) -> VAE:
    """The autoencoder in the SD3 latent format: that of the work folder, or the shipped one if it has none."""
    model = VAE(VAE_CONFIG)
    if (state := load(work / "vae.pt")) is None:
        weights = load_file(SHIPPED)
        model.load_state_dict({k.removeprefix(VAE_PREFIX): v for k, v in weights.items() if k.startswith(VAE_PREFIX)})
        return model.eval()
    model.load_state_dict(state["average"])
    rng = random.Random(VALIDATION_SEED)
    images = to_unit([render(training_scene(rng)) for _ in range(256)])
    scale = torch.cat([model.moments(part)[0] for part in images.split(32)]).std().item()
    fold_latent_format(model, scale)
    return model.eval()


def encode(work: str, scenes: int = 61440, sets: int = 3, more: int = 0, seed: int = 1000) -> None:
    """Renders and encodes scenes until the folder has `sets` sets, with `scenes` scenes in total.

    more: add this many sets of the same size to the existing ones. This may be done while `flow` runs, which reads new
    sets at its next save.
    """
    folder = Path(work)
    wanted = count_sets(folder) + more if more else sets
    model = None
    while (number := count_sets(folder)) < wanted:
        model = model or autoencoder(folder)
        encode_set(model, set_path(folder, number), scenes // sets, seed + number)


# ---- text encoders alone -------------------------------------------------------------------------


def text(work: str, steps: int = 250, batch: int = 128, scenes: int = 20000, seed: int = 5) -> None:
    """Trains the text encoders through the text heads alone. Prints how often the heads read side and number of a
    word's object correctly: on training captions, and at the end on short captions with held-out combinations.

    Checks the initialisation early: with a worse one T5 ignores word order, and no image will show which object comes
    first.
    """
    folder = Path(work)
    if (folder / "text.pt").exists():
        return
    captions = Captions(folder / "tokenizers")
    rng = random.Random(seed)
    seen = text_set([training_scene(rng) for _ in range(scenes)])
    held_out = tuple(sorted(HELD_OUT))
    unseen = text_set([training_scene(rng, kind, held_out, short=True) for kind in ("relation", "count") * 300])
    torch.manual_seed(seed)
    model = Flow(captions)
    for step, means in train_text(model, captions, seen, steps, batch):
        print(step, json.dumps(means), flush=True)
    print("unseen", json.dumps(read_text(model, captions, unseen)), flush=True)
    kept = (*(f"{name}." for name in ENCODERS), "clip_says.", "t5_says.")
    save(folder / "text.pt", {k: v for k, v in model.state_dict().items() if k.startswith(kept)})


# ---- MMDiT and text encoders, together -----------------------------------------------------------


def flow(
    work: str,
    minutes: float = 600.0,
    steps: int = 10**9,
    batch: int = 64,
    width: int = 128,
    depth: int = 8,
    noise_mean: float = 2.0,
    noise_spread: float = 1.4,
    where_weight: float = 0.4,
    text_weight: float = 0.05,
    decay_from: int | None = None,
    decay_to: int | None = None,
    score_every: int = 1500,
    more: dict[str, float] | None = None,
    compile: bool = True,
    bfloat16: bool = False,
    fresh: bool = False,
    save_every: float = SAVE_EVERY,
    threads: int | None = None,
    seed: int = 2,
) -> None:
    """Trains MMDiT and text encoders on the stored latents with the flow loss |v - (noise - latent)|^2.

    sigma = sigmoid(noise_mean + noise_spread * normal) is mostly high: an object covers hundreds of latent numbers, so
    its place is decided above 0.9. A tenth of the captions is empty. The learning rate is constant and falls between
    the steps decay_from and decay_to.

    minutes, steps: when to stop, summed over restarts; where_weight: weight of the head that reads the classes of image
    tokens from a middle block, which teaches placement early; text_weight: weight of the heads that read the caption's
    facts from text tokens; score_every: steps between scores of the averaged weights; more: weights of kinds,
    `{relation: 2}`; bfloat16: use it for the matrix products (at this size it can be slower than float32, so time it
    first); threads: torch's number of threads, 0: two if the machine is mostly idle, otherwise one, because two threads
    that share a core with other processes wait for each other (a resumed run is then not bit-identical); fresh: start
    from scratch even if the repository has unfinished weights (depth and width matter only then).
    """
    folder = Path(work)
    captions = Captions(folder / "tokenizers")
    state = newest(folder, None if fresh else RESUME)
    log = RESUME.parent / HISTORY
    if state is not None and log.exists() and not (folder / "log.jsonl").exists():
        shutil.copyfile(log, folder / "log.jsonl")
    if state is None:
        if not (folder / "text.pt").exists():
            text(work)
        torch.manual_seed(seed)
        state = {"width": width, "depth": depth, "model": Flow(captions, width, depth).state_dict()}
        state["model"] |= load(folder / "text.pt")
    flow_stage.train(
        folder,
        captions,
        state,
        minutes=minutes,
        steps=steps,
        batch=batch,
        width=width,
        depth=depth,
        noise_mean=noise_mean,
        noise_spread=noise_spread,
        where_weight=where_weight,
        text_weight=text_weight,
        decay_from=decay_from,
        decay_to=decay_to,
        score_every=score_every,
        more=more,
        compile=compile,
        bfloat16=bfloat16,
        seed=seed,
        save_every=save_every,
        threads=threads,
    )


def grow(work: str, depth: int = 16, fresh: bool = False, copy: bool = False) -> None:
    """Adds blocks to the state, up to `depth`. Keeps the old state as flow-DEPTH.pt.

    The new blocks have zero gates, and the output stays the same. copy: they are copies that share the gates of the
    trained ones instead; images are mostly wrong until `flow` has trained them again. fresh: ignores unfinished weights
    in the repository.
    """
    folder = Path(work)
    state = newest(folder, None if fresh else RESUME)
    if state is None:
        raise Mistake("work", work, "has no state to grow")
    save(folder / f"flow-{state['depth']}.pt", state)
    save(folder / "flow.pt", grown(state, depth, Captions(folder / "tokenizers"), copy))


def prune(work: str, keep: Sequence[int]) -> None:
    """Keeps only some blocks of the state, such as `0,2,4,6,9,11,13,15`. Keeps the old state as flow-DEPTH.pt."""
    folder = Path(work)
    state = newest(folder, None)
    if state is None:
        raise Mistake("work", work, "has no state to prune")
    save(folder / f"flow-{state['depth']}.pt", state)
    save(folder / "flow.pt", pruned(state, list(keep)))


def resume(work: str, out: str = str(RESUME), average: str = "average") -> None:
    """Writes the averaged weights from which a fresh checkout continues, and a thinned log; average: average or
    long_average.
    """
    state = load(Path(work) / "flow.pt")
    if state is None:
        raise Mistake("work", work, "has no state")
    write_resume(state | {"average": state[average]}, Path(out))
    write_history(Path(work) / "log.jsonl", Path(out).parent / HISTORY)
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB after {state['step']} steps")


def watch(work: str, steps: int = 20, average: str = "average", **values) -> None:
    """Scores the averaged weights on fixed prompts. Writes the images to WORK/watch and prints the scores as JSON in
    the last line.
    """
    folder = Path(work)
    export(work, str(folder / "preview"), average)
    print(json.dumps(look(folder / "preview" / "demo.safetensors", folder, steps=steps, **values)))


# ---- one file ------------------------------------------------------------------------------------

DEFAULTS = {"width": SIZE, "height": SIZE, "steps": 24, "shift": 2.0, "cfg": 2.5, "sampler": "euler"}


def export(work: str, out: str = "models/demo", average: str = "average", fresh: bool = False) -> None:
    """Writes `demo.safetensors` (bfloat16, layout `incl_clips`) and the tokenizers to `out`.

    average: the weights to write: average, long_average, or model (the latest ones, not averaged); fresh: ignores
    unfinished weights in the repository.
    """
    folder = Path(out)
    captions = Captions(Path(work) / "tokenizers")
    state = newest(Path(work), None if fresh else RESUME)
    if state is None:
        raise Mistake("work", work, "has no state")
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(Path(work) / "tokenizers" / name, folder / name, dirs_exist_ok=True)
    flow_model = Flow(captions, state["width"], state["depth"], state["read_after"])
    flow_model.load_state_dict(state["model"] | state.get(average, {}))
    parts = {
        MMDIT_PREFIX: flow_model.mmdit,
        VAE_PREFIX: autoencoder(Path(work)),
        **{ENCODER_PREFIX.format(r): getattr(flow_model, r) for r in ("clip_l", "clip_g")},
        ENCODER_PREFIX.format("t5xxl"): flow_model.t5,
    }
    tensors = {
        prefix + name: value.detach().to(torch.bfloat16).contiguous()
        for prefix, module in parts.items()
        for name, value in module.state_dict().items()
    }
    metadata = {k: str(v) for k, v in DEFAULTS.items()} | {
        "words": " ".join(all_words()),
        "training_steps": str(state["step"]),
        "format": "pt",
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".demo.partial"
    save_file(tensors, partial, metadata)
    file = folder / "demo.safetensors"
    partial.rename(file)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB after {state['step']} steps")


@torch.no_grad()
def fold_latent_format(model: VAE, scale: float) -> None:
    """Changes the VAE's weights so that the encoder returns z / (1.5305 scale) + 0.0609 instead of z, and the decoder
    expects that.
    """
    spread, channels = LATENT_SCALE * scale, model.config.latent_channels
    encoder, decoder = model.encoder.conv_out, model.decoder.conv_in
    encoder.weight[:channels] /= spread
    encoder.bias[:channels] = encoder.bias[:channels] / spread + LATENT_SHIFT
    encoder.bias[channels:] -= 2 * np.log(spread)
    decoder.weight *= spread
    decoder.bias -= LATENT_SHIFT * decoder.weight.sum(dim=(1, 2, 3))


# Arguments of `flow` for the weights that ship; the learning rate falls up to each last step. The second stage begins
# with copies of the first one's blocks.
FLOW_STAGES = (
    {"depth": 8, "decay_from": 16200, "steps": 19600},
    {"depth": 16, "decay_from": 20300, "steps": 23300, "more": {"three": 2.0, "relations": 1.5, "count": 1.5}},
)


def all(work: str, out: str = "models/demo", fresh: bool = False, **values) -> None:
    """Runs all stages, up to the file that ships, with the blocks and steps that its weights had.

    Starts from scratch, or from the unfinished weights in the repository, which need the autoencoder that ships.
    `values`: other arguments of `flow`.
    """
    if own := values.keys() & {"decay_to", *(name for stage in FLOW_STAGES for name in stage)}:
        raise Mistake(
            min(own), values[min(own)], "is set by all for each stage; to choose it, run the stages one by one"
        )

    def state() -> dict | None:
        return newest(Path(work), None if fresh else RESUME)

    if fresh or not RESUME.exists():
        vae(work)
    encode(work)
    values = {"minutes": math.inf, "fresh": fresh} | values
    for stage in FLOW_STAGES:
        begun = state()
        if begun and begun["step"] >= stage["steps"]:
            continue
        if begun and begun["depth"] < stage["depth"]:
            grow(work, stage["depth"], fresh=fresh, copy=True)
        flow(work, decay_to=stage["steps"], **stage, **values)
        done = state()["step"]
        if done < stage["steps"]:  # because of --minutes
            last = FLOW_STAGES[-1]["steps"]
            raise SystemExit(f"stopped after {done} of {last} steps; run the command again to go on")
    export(work, out, fresh=fresh)


COMMANDS = (vae, encode, text, flow, grow, prune, resume, watch, export, all)

if __name__ == "__main__":
    run({command.__name__: command for command in COMMANDS}, "demo.train")
