"""Trains the small model that ships, from nothing: `python -m demo.train all --work FOLDER`.

Stages: `vae` (autoencoder), `encode` (pictures to latents, once), `flow` (MMDiT and text encoders together) and
`export` (one safetensors file and the tokenizers). Each saves often and goes on from its last save.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import fire
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import ENCODER_PREFIX, MMDIT_PREFIX, VAE_PREFIX
from demo.optim import Average, Muon, rate
from demo.scenes import BACKGROUNDS, CELL, COLOURS, RELATIONS, SHAPES, SIZE, Scene, render, sample_scene, vocabulary
from demo.tokenizers import END, START, WORD_END, clip_files, t5_file
from mmditx import MMDiT, MMDiTConfig
from other_impls import CLIP, T5, CLIPConfig, T5Config, join_text
from sd3_impls import LATENT_SCALE, LATENT_SHIFT
from vae import VAE, ResnetBlock, VAEConfig

VAE_CONFIG = VAEConfig(
    image_channels=3,
    latent_channels=16,
    stem_width=32,
    widths=(32, 64, 64, 128),
    encoder_blocks=1,
    decoder_blocks=2,
)
SAVE_EVERY = 120.0  # seconds
VALIDATION_SEED = 10**6


def save(path: Path, state: dict) -> None:
    """Writes a training state under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


def load(path: Path) -> dict | None:
    """The training state at `path`, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None


def to_unit(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def crops(rng: random.Random, count: int, size: int) -> Tensor:
    """(count, 3, size, size) crops of new scenes, most of them around an object."""
    out = []
    while len(out) < count:
        scene = sample_scene(rng)
        picture = render(scene)
        for thing in rng.sample(scene.things, min(2, len(scene.things))):
            spread = CELL // 2
            x, y = (
                min(max(int(c) + rng.randint(-spread, spread) - size // 2, 0), SIZE - size) for c in (thing.x, thing.y)
            )
            out.append(picture[y : y + size, x : x + size])
    return to_unit(out[:count])


def init_vae(model: VAE) -> None:
    """Residual branches start at zero and the posterior narrow: without this a small VAE stays at the mean colour."""
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
    """Trains the autoencoder: MSE + mean absolute error + kl * KL, on crops, then on whole pictures."""
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
    """Prints how well whole pictures come back and how the latents are spread."""
    model = VAE(VAE_CONFIG)
    model.load_state_dict(weights)
    rng = random.Random(VALIDATION_SEED)
    images = to_unit([render(sample_scene(rng)) for _ in range(count)])
    mean, logvar = model.moments(images)
    error = F.mse_loss(model.decode(mean).clamp(-1, 1), images).item()
    spread = mean.std(dim=(0, 2, 3)).sort(descending=True).values
    print(f"whole pictures: mse {error:.5f}, {10 * np.log10(4 / error):.1f} dB; latent mean {mean.mean():.3f}")
    print("channel spread", [round(s, 2) for s in spread.tolist()], "posterior", logvar.exp().sqrt().mean().item())


# ---- pictures to latents, once -------------------------------------------------------------------

PATCH_PIXELS = 16  # pixels under one image token
TOKENS = SIZE // PATCH_PIXELS
CLASSES = (*SHAPES, *COLOURS, *BACKGROUNDS)


def what_is_where(scene: Scene) -> np.ndarray:
    """How much of every image token each class of `CLASSES` covers: uint8 (tokens, classes), 255 is all of it."""
    out = np.zeros((TOKENS * TOKENS, len(CLASSES)), dtype=np.float32)
    free = np.ones(TOKENS * TOKENS, dtype=np.float32)
    for thing in scene.things:
        alone = render(Scene("", "", (thing,), "black")).max(axis=2) > 60
        share = alone.reshape(TOKENS, PATCH_PIXELS, TOKENS, PATCH_PIXELS).mean(axis=(1, 3)).reshape(-1)
        out[:, CLASSES.index(thing.shape)] += share
        out[:, CLASSES.index(thing.colour)] += share
        free -= share
    out[:, CLASSES.index(scene.background)] = free
    return (out.clip(0, 1) * 255).astype(np.uint8)


@torch.no_grad()
def encode(work: str, count: int = 28160, batch: int = 64, seed: int = 1) -> None:
    """Renders and encodes the training set: latents (posterior means), captions, what is where."""
    path = Path(work) / "latents.pt"
    if path.exists():
        return
    model = VAE(VAE_CONFIG).eval().to(memory_format=torch.channels_last)
    model.load_state_dict(load(Path(work) / "vae.pt")["average"])
    rng = random.Random(seed)
    latents, captions, classes = [], [], []
    for _ in tqdm(range(count // batch), desc="encode", mininterval=10):
        scenes = [sample_scene(rng) for _ in range(batch)]
        images = to_unit([render(s) for s in scenes]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(model.moments(images)[0].float().contiguous())
        captions += [s.caption for s in scenes]
        classes += [what_is_where(s) for s in scenes]
    latents = torch.cat(latents)
    scale = latents.std().item()
    print(f"latents: mean {latents.mean().item():.3f}, standard deviation {scale:.3f}")
    state = {"latents": latents / scale, "scale": scale, "captions": captions}
    save(path, state | {"classes": torch.from_numpy(np.stack(classes))})


# ---- MMDiT and text encoders, together -----------------------------------------------------------

TEXT_LENGTH = 16  # tokens of a caption with start and end; the real models have 77
CONTEXT = 128
CLIP_L_WIDTH = CLIP_G_WIDTH = 64


class Captions:
    """Token ids of captions, whole words looked up in the shipped vocabularies (every word of a caption is there)."""

    def __init__(self, folder: Path):
        if not (folder / "tokenizer_3" / "tokenizer.json").exists():  # ties between merges fall anew each time
            clip_files(vocabulary(), folder / "tokenizer", TEXT_LENGTH)
            t5_file(vocabulary(), folder / "tokenizer_3")
        self.clip = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        self.t5 = Tokenizer.from_file(str(folder / "tokenizer_3" / "tokenizer.json"))

    def ids(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids (B, TEXT_LENGTH) for `l` (padded with the end token), `g` (padded with 0) and `t5` (padded with 0)."""
        out: dict[str, list[list[int]]] = {"l": [], "g": [], "t5": []}
        for caption in captions:
            clip = [self.clip[START], *(self.clip[w + WORD_END] for w in caption.split()), self.clip[END]]
            t5 = self.t5.encode(caption).ids
            pad = TEXT_LENGTH - len(clip)
            out["l"].append(clip + [self.clip[END]] * pad)
            out["g"].append(clip + [0] * pad)
            out["t5"].append(t5 + [0] * (TEXT_LENGTH - len(t5)))
        return {k: torch.tensor(v) for k, v in out.items()}


class Flow(nn.Module):
    """Everything that is trained together; `where` reads what is where off a middle block and is not shipped."""

    READ_AFTER = 4  # blocks

    def __init__(self, captions: Captions, width: int, depth: int):
        super().__init__()
        clip = {"depth": 2, "vocabulary": len(captions.clip), "positions": TEXT_LENGTH}
        self.clip_l = CLIP(
            CLIPConfig(width=CLIP_L_WIDTH, mlp_width=256, projection=False, activation="quick_gelu", **clip)
        )
        self.clip_g = CLIP(CLIPConfig(width=CLIP_G_WIDTH, mlp_width=256, projection=True, activation="gelu", **clip))
        pieces = captions.t5.get_vocab_size()
        self.t5 = T5(T5Config(CONTEXT, 2, heads=2, inner=CONTEXT, mlp_width=256, buckets=32, vocabulary=pieces))
        config = MMDiTConfig(
            latent_channels=16,
            patch=2,
            width=width,
            depth=depth,
            context_width=CONTEXT,
            pooled_width=CLIP_L_WIDTH + CLIP_G_WIDTH,
            mlp_width=4 * width,
            grid=16,
            qk_norm=True,
        )
        self.mmdit = MMDiT(config)
        self.where = nn.Linear(width, len(CLASSES))
        self.middle: Tensor | None = None
        self.mmdit.joint_blocks[self.READ_AFTER - 1].register_forward_hook(self._keep)
        self.init()

    def _keep(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.middle = output[1]

    def init(self) -> None:
        """Xavier for matrices, small embeddings, zero for modulations and the last layer."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            elif "embedding" in name or "embed_tokens" in name or "relative" in name:
                nn.init.normal_(p, std=0.02 if "position" in name else 0.5)
            else:
                nn.init.xavier_uniform_(p.flatten(1))
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
        self.mmdit.pos_embed.data = sine_grid(self.mmdit.config.grid, self.mmdit.config.width)

    def text(self, ids: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Text tokens (B, 2 * TEXT_LENGTH, CONTEXT) and pooled text (B, 128)."""
        hidden_l, pooled_l = self.clip_l(ids["l"])
        hidden_g, pooled_g = self.clip_g(ids["g"])
        return join_text(hidden_l, hidden_g, self.t5(ids["t5"])), torch.cat([pooled_l, pooled_g], dim=-1)


def sine_grid(side: int, width: int) -> Tensor:
    """Sine-cosine position grid (1, side * side, width): half the features say the column, half the row."""
    f = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * f  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def flow_optimisers(model: Flow) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, modulations, norms and the outer layers."""
    inside = ("joint_blocks.", "encoder.layers.", "encoder.block.")
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and any(i in n for i in inside) and "adaLN" not in n and "relative" not in n
    ]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=0.01), adamw]


def flow(
    work: str,
    minutes: float = 110.0,
    batch: int = 64,
    width: int = 128,
    depth: int = 8,
    noise_mean: float = 1.6,
    noise_spread: float = 1.2,
    where_weight: float = 0.4,
    relation_share: float = 0.5,
    constant: float = 0.5,
    compile: bool = True,
    seed: int = 2,
) -> None:
    """Trains MMDiT and text encoders on the stored latents with the flow loss |v - (noise - latent)|^2.

    `minutes` is training time summed over restarts: the rate follows it, so that a busy machine only means fewer
    steps. sigma = sigmoid(noise_mean + noise_spread * normal), mostly high: an object covers hundreds of numbers,
    so where it goes is decided above 0.9. A tenth of the captions is empty. `where_weight` weighs reading off
    block `Flow.READ_AFTER` what is where, which the scenes know exactly: it teaches placement early. Relations are
    learnt last, so `relation_share` of every batch shows them. The rate falls after `constant` of the time.
    """
    path = Path(work) / "flow.pt"
    torch.manual_seed(seed)
    data = load(Path(work) / "latents.pt")
    latents, classes = data["latents"], data["classes"]
    captions = Captions(Path(work) / "tokenizers")
    ids = captions.ids(data["captions"])
    empty = captions.ids([""])
    relations = torch.tensor([i for i, c in enumerate(data["captions"]) if any(f" {r} " in c for r in RELATIONS)])
    usual = len(relations) / len(latents)
    model = Flow(captions, width, depth)
    optimisers = flow_optimisers(model)
    base = [o.param_groups[0]["lr"] for o in optimisers]
    average = Average(model, 0.999)
    step, spent = 0, 0.0
    if state := load(path):
        model.load_state_dict(state["model"])
        for o, s in zip(optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
        average.values, average.steps = state["average"], state["average_steps"]
        step, spent = state["step"], state["spent"]
        torch.manual_seed(seed + step)
    if compile:
        for block in model.mmdit.joint_blocks:
            block.compile(dynamic=False)
        for encoder in (model.clip_l, model.clip_g, model.t5):
            encoder.compile(dynamic=False)
    saved = last = time.time()
    losses: list[float] = []
    bar = tqdm(total=round(minutes * 60), initial=round(spent), desc="flow", mininterval=10, unit="s")
    while spent < minutes * 60:
        factor = rate(spent / (minutes * 60), constant=constant)
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * factor
        rows = torch.randint(len(latents), (batch,))
        hard = relations[torch.randint(len(relations), (batch,))]
        rows = torch.where(torch.rand(batch) < (relation_share - usual) / (1 - usual), hard, rows)
        drop = torch.rand(batch) < 0.1
        text_ids = {k: torch.where(drop[:, None], empty[k], v[rows]) for k, v in ids.items()}
        latent = latents[rows]
        noise = torch.randn_like(latent)
        sigma = torch.sigmoid(noise_mean + noise_spread * torch.randn(batch))
        x = torch.lerp(latent, noise, sigma[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            context, pooled = model.text(text_ids)
            v = model.mmdit(x, 1000 * sigma, pooled, context)
            where = model.where(model.middle)
        loss = F.mse_loss(v.float(), noise - latent)
        target = classes[rows].float() / 255
        seen = F.binary_cross_entropy_with_logits(where.float(), target, reduction="none").sum(-1).mean()
        (loss + where_weight * seen).backward()
        for o in optimisers:
            o.step()
            o.zero_grad()
        average.update(model)
        step += 1
        losses.append(loss.item())
        now = time.time()
        spent, last = spent + now - last, now
        bar.update(round(spent) - bar.n)
        if step % 100 == 0:
            bar.write(f"{step} {spent / 60:.1f} min loss {np.mean(losses[-100:]):.4f} where {seen.item():.4f}")
        if now - saved > SAVE_EVERY or spent >= minutes * 60:
            state = {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "average": average.values,
                "average_steps": average.steps,
                "step": step,
                "spent": spent,
                "width": width,
                "depth": depth,
            }
            save(path, state)
            saved = time.time()


# ---- one file ------------------------------------------------------------------------------------

DEFAULTS = {"width": SIZE, "height": SIZE, "steps": 24, "shift": 2.0, "cfg": 2.5, "sampler": "euler"}


def export(work: str, out: str = "models/demo", raw: bool = False) -> None:
    """Writes `demo.safetensors` (bfloat16, layout `incl_clips`) and the tokenizers to `out`.

    The latents' spread is folded into the VAE's last encoder and first decoder convolution, so that the file follows
    the SD3 latent format. Averaged weights, or with `raw` the last ones.
    """
    state, folder = load(Path(work) / "flow.pt"), Path(out)
    captions = Captions(Path(work) / "tokenizers")
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(Path(work) / "tokenizers" / name, folder / name, dirs_exist_ok=True)
    flow_model = Flow(captions, state["width"], state["depth"])
    flow_model.load_state_dict(state["model"])
    if not raw:
        flow_model.load_state_dict(state["average"], strict=False)
    autoencoder = VAE(VAE_CONFIG)
    autoencoder.load_state_dict(load(Path(work) / "vae.pt")["average"])
    fold_latent_format(autoencoder, load(Path(work) / "latents.pt")["scale"])
    parts = {
        MMDIT_PREFIX: flow_model.mmdit,
        VAE_PREFIX: autoencoder,
        **{ENCODER_PREFIX.format(r): getattr(flow_model, r) for r in ("clip_l", "clip_g")},
        ENCODER_PREFIX.format("t5xxl"): flow_model.t5,
    }
    tensors = {
        prefix + name: value.detach().to(torch.bfloat16).contiguous()
        for prefix, module in parts.items()
        for name, value in module.state_dict().items()
    }
    metadata = {k: str(v) for k, v in DEFAULTS.items()} | {
        "words": " ".join(vocabulary()),
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
    """Makes raw latents z come out as z / (1.5305 scale) + 0.0609, and the decoder take them so."""
    spread, channels = LATENT_SCALE * scale, model.config.latent_channels
    encoder, decoder = model.encoder.conv_out, model.decoder.conv_in
    encoder.weight[:channels] /= spread
    encoder.bias[:channels] = encoder.bias[:channels] / spread + LATENT_SHIFT
    encoder.bias[channels:] -= 2 * np.log(spread)
    decoder.weight *= spread
    decoder.bias -= LATENT_SHIFT * decoder.weight.sum(dim=(1, 2, 3))


def all(work: str, out: str = "models/demo") -> None:
    """Everything, from nothing to the file that ships."""
    vae(work)
    encode(work)
    flow(work)
    export(work, out)


if __name__ == "__main__":
    fire.Fire({"vae": vae, "encode": encode, "flow": flow, "export": export, "all": all})
