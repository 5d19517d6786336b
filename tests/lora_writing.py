"""Random LoRAs for the small model of `helpers`, written in the spellings of the programs that make them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

# Of the small model: our layer, which of how many equal parts of its rows, and whether halves are swapped, by the name
# in diffusers. Written by hand: what `sd3/lora.py` makes of the names is compared with it.
MMDIT: dict[str, tuple[str, int, int, bool]] = {
    "transformer_blocks.0.attn.to_q": ("joint_blocks.0.x_block.attn.qkv", 0, 3, False),
    "transformer_blocks.0.attn.to_k": ("joint_blocks.0.x_block.attn.qkv", 1, 3, False),
    "transformer_blocks.0.attn.to_v": ("joint_blocks.0.x_block.attn.qkv", 2, 3, False),
    "transformer_blocks.1.attn.add_q_proj": ("joint_blocks.1.context_block.attn.qkv", 0, 3, False),
    "transformer_blocks.1.attn.add_k_proj": ("joint_blocks.1.context_block.attn.qkv", 1, 3, False),
    "transformer_blocks.1.attn.add_v_proj": ("joint_blocks.1.context_block.attn.qkv", 2, 3, False),
    "transformer_blocks.1.attn2.to_q": ("joint_blocks.1.x_block.attn2.qkv", 0, 3, False),
    "transformer_blocks.1.attn2.to_k": ("joint_blocks.1.x_block.attn2.qkv", 1, 3, False),
    "transformer_blocks.1.attn2.to_v": ("joint_blocks.1.x_block.attn2.qkv", 2, 3, False),
    "transformer_blocks.2.attn.to_out.0": ("joint_blocks.2.x_block.attn.proj", 0, 1, False),
    "transformer_blocks.2.attn.to_add_out": ("joint_blocks.2.context_block.attn.proj", 0, 1, False),
    "transformer_blocks.0.attn2.to_out.0": ("joint_blocks.0.x_block.attn2.proj", 0, 1, False),
    "transformer_blocks.0.norm1.linear": ("joint_blocks.0.x_block.adaLN_modulation.1", 0, 1, False),
    "transformer_blocks.2.norm1_context.linear": ("joint_blocks.2.context_block.adaLN_modulation.1", 0, 1, False),
    "transformer_blocks.3.norm1_context.linear": ("joint_blocks.3.context_block.adaLN_modulation.1", 0, 1, True),
    "transformer_blocks.3.ff.net.0.proj": ("joint_blocks.3.x_block.mlp.fc1", 0, 1, False),
    "transformer_blocks.3.ff.net.2": ("joint_blocks.3.x_block.mlp.fc2", 0, 1, False),
    "transformer_blocks.1.ff_context.net.0.proj": ("joint_blocks.1.context_block.mlp.fc1", 0, 1, False),
    "transformer_blocks.1.ff_context.net.2": ("joint_blocks.1.context_block.mlp.fc2", 0, 1, False),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 1, True),
    "proj_out": ("final_layer.linear", 0, 1, False),
    "context_embedder": ("context_embedder", 0, 1, False),
    "pos_embed.proj": ("x_embedder.proj", 0, 1, False),
    "time_text_embed.timestep_embedder.linear_1": ("t_embedder.mlp.0", 0, 1, False),
    "time_text_embed.timestep_embedder.linear_2": ("t_embedder.mlp.2", 0, 1, False),
    "time_text_embed.text_embedder.linear_1": ("y_embedder.mlp.0", 0, 1, False),
    "time_text_embed.text_embedder.linear_2": ("y_embedder.mlp.2", 0, 1, False),
}
ENCODERS = {
    "clip_l": ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"],
    "clip_g": ["text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc2"],
    "t5xxl": ["encoder.block.0.layer.0.SelfAttention.k", "encoder.block.2.layer.1.DenseReluDense.wi_0"],
}


@dataclass(frozen=True)
class Pair:
    """One module: its name in diffusers (of a text encoder: transformers'), its matrices and alpha."""

    part: str
    name: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]


Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # by part and our name


def draw(shapes: Shapes, names: Iterable[tuple[str, str]], ranks: Callable[[], int], seed: int = 0) -> list[Pair]:
    """Random pairs for modules (part, name)."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for part, name in names:
        layer, _, pieces, _ = MMDIT[name] if part == "mmdit" else (name, 0, 1, False)
        rows, *columns = shapes[part][f"{layer}.weight"]
        rank = ranks()
        down = torch.randn(rank, *columns, generator=generator) / rank
        up = torch.randn(rows // pieces, rank, generator=generator) * 0.2
        out.append(Pair(part, name, down, up, rank * (0.5 + torch.rand((), generator=generator).item())))
    return out


def every_module(parts: Iterable[str] = ("mmdit", *ENCODERS)) -> list[tuple[str, str]]:
    return [(part, name) for part in parts for name in (MMDIT if part == "mmdit" else ENCODERS[part])]


def add(weights: Mapping[str, Tensors], pairs: Iterable[Pair], strength: float = 1.0) -> dict[str, Tensors]:
    """The weights by part with strength alpha / rank B A added in float64, module by module."""
    out = {part: {name: tensor.double() for name, tensor in tensors.items()} for part, tensors in weights.items()}
    for pair in pairs:
        layer, piece, pieces, swap = MMDIT[pair.name] if pair.part == "mmdit" else (pair.name, 0, 1, False)
        product = strength * pair.scale * (pair.up.double() @ pair.down.double().flatten(1))
        if swap:
            product = torch.cat([product[len(product) // 2 :], product[: len(product) // 2]])
        whole = out[pair.part][f"{layer}.weight"].clone()
        rows = len(whole) // pieces
        whole[piece * rows : (piece + 1) * rows] += product.reshape(rows, *whole.shape[1:])
        out[pair.part][f"{layer}.weight"] = whole
    return out


# ---- spellings -----------------------------------------------------------------------------------

FLAT = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
FOLDERS = {"clip_l": "text_encoder.", "clip_g": "text_encoder_2.", "t5xxl": "text_encoder_3."}
COMFY = {role: f"text_encoders.{role}.transformer." for role in FOLDERS}


def pieces(pairs: Iterable[Pair], prefixes: Mapping[str, str], down: str, up: str, alpha: str = "", flat: str = ""):
    """One module each, under diffusers' names. alpha: its suffix; empty: it is multiplied into `up`."""
    out: Tensors = {}
    for pair in pairs:
        name = pair.name.replace(".", "_") if flat else pair.name
        key = prefixes[pair.part] + name
        out[key + down] = pair.down
        out[key + up] = pair.up if alpha else pair.up * pair.scale
        if alpha:
            out[key + alpha] = torch.tensor(pair.alpha)
    return out


def fused(pairs: Iterable[Pair], prefixes: Mapping[str, str], flat: bool) -> Tensors:
    """Under our names: q, k and v as one module of the sum of their ranks, halves swapped back."""
    layers: dict[tuple[str, str], list[tuple[int, int, Pair]]] = {}
    for pair in pairs:
        layer, piece, count, swap = MMDIT[pair.name] if pair.part == "mmdit" else (pair.name, 0, 1, False)
        if swap:
            pair = Pair(pair.part, pair.name, pair.down, torch.cat(pair.up.chunk(2)[::-1]), pair.alpha)
        layers.setdefault((pair.part, layer), []).append((piece, count, pair))
    out: Tensors = {}
    for (part, layer), own in layers.items():
        rank = sum(pair.down.shape[0] for _, _, pair in own)
        rows = len(own[0][2].up)
        up, at = torch.zeros(rows * own[0][1], rank), 0
        for piece, _, pair in own:
            width = pair.down.shape[0]
            up[piece * rows : (piece + 1) * rows, at : at + width] = pair.up * pair.scale
            at += width
        key = prefixes[part] + (layer.replace(".", "_") if flat else layer)
        down = torch.cat([pair.down for _, _, pair in own])
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = down, up
        if down.ndim == 4:
            out[f"{key}.lora_up.weight"] = up[..., None, None]
        out[f"{key}.alpha"] = torch.tensor(float(rank))
    return out


def config(pairs: Iterable[Pair], part: str) -> dict:
    """What PEFT's LoraConfig says of pairs."""
    own = [pair for pair in pairs if pair.part == part]
    ranks = {pair.name: pair.down.shape[0] for pair in own}
    return {"r": 3, "lora_alpha": 5.0, "rank_pattern": ranks, "alpha_pattern": {p.name: p.alpha for p in own}}


def with_metadata(pairs: list[Pair], path: Path) -> Path:
    """diffusers' file: PEFT's settings in the header, no alpha beside the modules."""
    prefixes = {"mmdit": "transformer.", **FOLDERS}
    unscaled = [Pair(p.part, p.name, p.down, p.up, float(p.down.shape[0])) for p in pairs]
    parts = {"mmdit": "transformer", **{part: folder[:-1] for part, folder in FOLDERS.items()}}
    values = {f"{name}.{k}": v for part, name in parts.items() for k, v in config(pairs, part).items()}
    tensors = pieces(unscaled, prefixes, ".lora_A.weight", ".lora_B.weight")
    return write(tensors, path, {"lora_adapter_metadata": json.dumps(values)})


def adapter_folder(pairs: list[Pair], path: Path) -> Path:
    """A PEFT adapter of the MMDiT."""
    path.mkdir()
    unscaled = [Pair(p.part, p.name, p.down, p.up, float(p.down.shape[0])) for p in pairs]
    tensors = pieces(unscaled, {"mmdit": "base_model.model."}, ".lora_A.weight", ".lora_B.weight")
    write(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config(pairs, "mmdit")}))
    return path


def write(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def _old(pairs: list[Pair], path: Path) -> Path:
    """Attention layers as the oldest diffusers named them, behind a processor, others with `.lora_linear_layer`."""
    out: Tensors = {}
    for pair in pairs:
        name = {"mmdit": "transformer.", **FOLDERS}[pair.part] + pair.name
        start, _, last = name.rpartition(".")
        last = {"q_proj": "to_q", "out_proj": "to_out", "0": "to_out"}.get(last, last)
        if ".attn." in name or ".self_attn." in name:
            start = start.removesuffix(".to_out") + (".processor" if pair.part == "mmdit" else "")
            name, form = f"{start}.{last}", "_lora.{}.weight"
        else:
            form = ".lora_linear_layer.{}.weight"
        out[name + form.format("down")], out[name + form.format("up")] = pair.down, pair.up * pair.scale
    return write(out, path)


AB = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
# Each writes pairs to a path, and returns what `lora` is to name; of the MMDiT alone where the family has no encoders.
SPELLINGS: dict[str, tuple[Callable[[list[Pair], Path], Path], bool]] = {
    "diffusers": (lambda p, to: write(pieces(p, {"mmdit": "transformer.", **FOLDERS}, *AB), to), True),
    "diffusers with metadata": (with_metadata, True),
    "diffusers, one model": (lambda p, to: write(pieces(p, {"mmdit": ""}, *AB), to), False),
    "PEFT": (lambda p, to: write(pieces(p, {"mmdit": "base_model.model."}, *AB), to), False),
    "PEFT in memory": (
        lambda p, to: write(
            pieces(p, {"mmdit": "base_model.model."}, ".lora_A.default.weight", ".lora_B.default.weight"), to
        ),
        False,
    ),
    "PEFT folder": (adapter_folder, False),
    "SimpleTuner, double prefix": (
        lambda p, to: write(
            pieces(p, {"mmdit": "transformer.base_model.model."}, ".lora.down.weight", ".lora.up.weight"), to
        ),
        False,
    ),
    "old diffusers": (_old, True),
    "OneTrainer, legacy": (
        lambda p, to: write(pieces(p, {"mmdit": "lora_transformer_", **FLAT}, *KOHYA, flat="_"), to),
        True,
    ),
    "LyCORIS": (lambda p, to: write(pieces(p, {"mmdit": "lycoris_"}, *KOHYA, flat="_"), to), False),
    "ai-toolkit": (
        lambda p, to: write(
            pieces(p, {"mmdit": "transformer.", **{r: f[:-1] + "." for r, f in FLAT.items()}}, *AB), to
        ),
        True,
    ),
    "kohya": (lambda p, to: write(fused(p, {"mmdit": "lora_unet_", **FLAT}, flat=True), to), True),
    "OneTrainer, comfy": (lambda p, to: write(fused(p, {"mmdit": "diffusion_model.", **COMFY}, flat=False), to), True),
    "OneTrainer, original": (lambda p, to: write(fused(p, {"mmdit": ""}, flat=False), to), False),
    "merged with a checkpoint's prefix": (
        lambda p, to: write(fused(p, {"mmdit": "model.diffusion_model."}, flat=False), to),
        False,
    ),
}
