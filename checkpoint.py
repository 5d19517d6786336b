"""Finding and reading safetensors files: headers without torch, prefixes, dtypes, one clear error per file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MMDIT_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
ENCODERS = ("clip_l", "clip_g", "t5xxl")
ENCODER_PREFIX = "text_encoders.{}.transformer."
TRANSFORMER = "transformer/"  # prefix of its tensors in a diffusers folder
ENCODER_FOLDERS = {"clip_l": "text_encoder/", "clip_g": "text_encoder_2/", "t5xxl": "text_encoder_3/"}
ENCODER_FILES = {
    "clip_l": ("clip_l.safetensors",),
    "clip_g": ("clip_g.safetensors",),
    "t5xxl": (
        "t5xxl.safetensors",
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
    ),
}
TOKENIZER_FOLDERS = {"clip": ("tokenizer", "tokenizer_2"), "t5": ("tokenizer_3",)}
TOKENIZER_FILES = {
    "clip": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    "t5": (("tokenizer.json",), ("spiece.model",)),
}
TOKENIZER_HUB = {"clip": "openai/clip-vit-large-patch14", "t5": "google/t5-v1_1-xxl"}
ENCODER_HUB = "stabilityai/stable-diffusion-3.5-large"

# Tensors that released files carry and no model needs.
HARMLESS = ("position_ids", "logit_scale", "control_type", "scaled_fp8", "scale_input", "scale_weight")
HARMLESS_PREFIXES = ("loss.", "cond_stage_model.", "model_ema.")
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
CHUNK = 256 * 2**20  # bytes read from one mapping before its pages are given back


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header names it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    path: Path
    name: str


def file_sha256(*paths: Path) -> str:
    """Hash of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as f:
            while block := f.read(2**22):
                digest.update(block)
    return digest.hexdigest()


class WeightFile:
    """A safetensors file, or a folder in diffusers layout: headers are read at once (no torch needed), tensors when
    asked for. The tensors of a folder are named `transformer/...`, `vae/...`, `text_encoder/...` and so on.
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError, or ValueError for a file that is truncated or not safetensors."""
        self.path = Path(path)
        self.folder = self.path.is_dir()
        self.entries, self.metadata = (_read_folder if self.folder else _read_header)(self.path)

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file, as A1111-style tools compute it; of a folder's transformer, file after file."""
        return file_sha256(*{e.path for n, e in self.entries.items() if not self.folder or n.startswith(TRANSFORMER)})

    def part(self, prefix: str = "") -> Part:
        """The tensors whose names start with `prefix`, without it."""
        return Part(self, prefix)

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.entries)

    def looks_like(self) -> str:
        """What kind of file this seems to be, for error messages."""
        for prefixes, what in _KINDS:
            if any(name.startswith(prefixes) or f".{p}" in name for name in self.entries for p in prefixes):
                return what
        return "an unknown kind of model"


_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_", "lora_A.", "lora_B."), "a LoRA"),
    (("controlnet_blocks.",), "a ControlNet"),
    (("joint_blocks.",), "an SD3-type MMDiT"),
    (("double_blocks.",), "a FLUX model"),
    (("transformer_blocks.",), "a diffusers transformer"),
    (("input_blocks.",), "an SD 1, SD 2 or SDXL model"),
    (("encoder.block.",), "a T5 encoder"),
    (("text_model.",), "a CLIP text encoder"),
    (("encoder.down.", "decoder.up."), "a VAE"),
    (("encoder.down_blocks.", "decoder.up_blocks."), "a diffusers VAE"),
)


def _read_folder(folder: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """All tensors of a diffusers folder by `<component>/<name>`, and the scheduler's shift as metadata."""
    if not (folder / "transformer").is_dir():
        raise ValueError(
            f"{folder}: is a folder without transformer/; a .safetensors file or a diffusers folder is needed"
        )
    entries = {}
    for component in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if (folder / component).is_dir():
            for path in _weight_files(folder / component):
                entries |= {f"{component}/{name}": entry for name, entry in _read_header(path)[0].items()}
    try:
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return entries, {"shift": str(scheduler["shift"])}
    except (OSError, ValueError, KeyError, TypeError):
        return entries, {}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: whole or in shards, of the plain variant if there is one, else of any.

    Raises FileNotFoundError where there is none, or a shard is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        plain, shards = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        variants = [*sorted(folder.glob(f"{stem}.*.safetensors")), *sorted(folder.glob(f"{plain}.index.*.json"))]
        for path in (folder / plain, folder / shards, *variants):
            if not path.is_file():
                continue
            if path.suffix == ".safetensors":
                return [path]
            try:
                names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}: is damaged: no weight_map in it") from None
            for name in names:
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder / name}: no such file, though {path.name} names it")
            return [folder / name for name in names]
    pickled = any(folder.glob("*.bin"))
    why = "only pickled .bin weights, which are not loaded" if pickled else "no .safetensors weights"
    raise FileNotFoundError(f"{folder}: holds {why}")


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a .safetensors file is needed")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    not_one = f"{path}: is not a safetensors file"
    with open(path, "rb") as f:
        start = f.read(8)
        if len(start) < 8:
            raise ValueError(f"{not_one} ({size} bytes)")
        (length,) = struct.unpack("<Q", start)
        opening = f.read(1)
        if opening != b"{" or length > 2**30:
            hint = "; pickled checkpoints are not loaded" if start[:2] in (b"PK", b"\x80\x02") else ""
            raise ValueError(f"{not_one}{hint}")
        if 8 + length > size:
            raise ValueError(f"{path}: is truncated: its header alone needs {8 + length} bytes, there are {size}")
        try:
            header: dict[str, Any] = json.loads(opening + f.read(length - 1))
            metadata = header.pop("__metadata__", {}) or {}
            entries = {
                name: Entry(t["dtype"], tuple(t["shape"]), t["data_offsets"][0], path, name)
                for name, t in header.items()
            }
            ends = [t["data_offsets"][1] for t in header.values()]
            consistent = all(
                t["data_offsets"][1] - t["data_offsets"][0] == math.prod(t["shape"]) * DTYPE_BYTES.get(t["dtype"], -1)
                for t in header.values()
                if t["dtype"] in DTYPE_BYTES
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{not_one}: its header is damaged") from None
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        raise ValueError(f"{path}: is truncated: {size} bytes of {needed}; download it again")
    if not entries or not consistent:
        raise ValueError(f"{path}: holds no usable tensors")
    return entries, metadata


@dataclass(frozen=True)
class Source:
    """How a file holds a tensor of ours: under another name, or as several that are joined along their first axis.

    change: `swap` exchanges the two halves of the first axis, `conv` makes a matrix a 1 x 1 convolution.
    """

    names: tuple[str, ...]
    change: str = ""

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Of the whole, from those of its pieces."""
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        return (*joined, 1, 1) if self.change == "conv" else joined

    def build(self, pieces: list[Tensor]) -> Tensor:
        """The whole from its pieces."""
        import torch

        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self.change == "swap":
            return torch.cat(whole.chunk(2)[::-1])
        return whole[..., None, None] if self.change == "conv" else whole


@dataclass(frozen=True)
class Part:
    """The tensors of one model in a file: a prefix, and those that the file holds otherwise (our name -> source)."""

    file: WeightFile
    prefix: str = ""
    sources: dict[str, Source] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, without the prefix and under our names."""
        entries = self.file.entries
        used = {name for source in self.sources.values() for name in source.names}
        out = {n[len(self.prefix) :]: e.shape for n, e in entries.items() if n.startswith(self.prefix)}
        out = {name: shape for name, shape in out.items() if name not in used}
        for name, source in self.sources.items():
            if all(self.prefix + n in entries for n in source.names):
                out[name] = source.shape([entries[self.prefix + n].shape for n in source.names])
        return out

    def source(self, name: str) -> Source:
        """Where a tensor of ours is in the file."""
        return self.sources.get(name) or Source((name,))

    def full_name(self, name: str) -> str:
        """The name in the file, for messages."""
        return " + ".join(self.prefix + n for n in self.source(name).names)

    def entry(self, name: str) -> Entry:
        """The file's entry of a tensor of ours, the first where it is in pieces."""
        return self.file.entries[self.prefix + self.source(name).names[0]]

    def dtype_name(self) -> str:
        """The dtype that most of the weights have, in the file's spelling (F16, BF16, F32, F8_E4M3)."""
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            dtype = self.entry(name).dtype
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return max(sizes, key=lambda k: sizes[k])

    def config(self, read: Callable[[dict[str, tuple[int, ...]]], Any], what: str) -> Any:
        """The sizes that `read` finds in the shapes; raises ValueError where this is no such model."""
        try:
            return read(self.shapes)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.file.path}: is not {what}: it looks like {self.file.looks_like()} (no usable {error})"
            ) from None

    def check(self, model: nn.Module, needed: Callable[[str], bool] = lambda name: True) -> None:
        """Compares with what `model` (on any device, meta too) needs, from the header alone.

        Raises one ValueError that lists what is missing and what has a wrong shape; warns of unknown extras.
        """
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if needed(k)}
        missing = [self.full_name(k) for k in wanted if k not in self.shapes]
        wrong = [
            f"{self.full_name(k)} has {_size(self.shapes[k])}, needs {_size(shape)}"
            for k, shape in wanted.items()
            if k in self.shapes and self.shapes[k] != shape
        ]
        problems = []
        if missing:
            problems.append(f"{len(missing)} missing: {_some(missing)}")
        if wrong:
            problems.append(f"{len(wrong)} of a wrong shape: {_some(wrong)}")
        if problems:
            raise ValueError(f"{self.file.path}: tensors do not fit the model; {'; '.join(problems)}")
        owned = model.state_dict()
        extra = [k for k in self.shapes if k not in owned and not self._harmless(k)]
        if extra:
            warnings.warn(f"{self.file.path}: not used, unknown: {_some(extra)}", stacklevel=2)

    def _harmless(self, name: str) -> bool:
        if self.prefix == "" and name.startswith((MMDIT_PREFIX, VAE_PREFIX, "text_encoders.")):
            return True  # another model of the same file
        leaf = name.rsplit(".", 1)[-1]
        return leaf in HARMLESS or name.startswith(HARMLESS_PREFIXES) or name in _UNUSED

    def read(self, names: list[str], device: Any, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, straight to device and dtype, in the file's order.

        Memory-mapped: a tensor that keeps its dtype on the CPU is the mapping itself. Where tensors are converted,
        the mapping is renewed every `CHUNK` bytes, so that pages already read do not add up.
        Float8 weights with a `scale_weight` beside them are multiplied by it.
        """
        from safetensors import safe_open

        ordered = sorted(names, key=lambda n: (str(self.entry(n).path), self.entry(n).offset))
        while ordered:
            read = 0
            with contextlib.ExitStack() as stack:
                opened: dict[Path, Any] = {}

                def take(entry: Entry, opened=opened, stack=stack) -> Tensor:
                    if entry.path not in opened:
                        opened[entry.path] = stack.enter_context(safe_open(entry.path, framework="pt", device="cpu"))
                    return opened[entry.path].get_tensor(entry.name)

                while ordered and read < CHUNK:
                    name = ordered.pop(0)
                    source, pieces = self.source(name), []
                    for piece in source.names:
                        full = self.prefix + piece
                        scale = self.file.entries.get(full.removesuffix("weight") + "scale_weight")
                        tensor = take(self.file.entries[full])
                        read += tensor.nbytes
                        pieces.append(_convert(tensor, scale and take(scale), device, dtype))
                        del tensor
                    yield name, source.build(pieces)
                    del pieces

    def load_into(
        self,
        model: nn.Module,
        device: Any,
        dtype: torch.dtype,
        progress: Callable[[int], None] | None = None,
        names: list[str] | None = None,
    ) -> nn.Module:
        """Gives `model` (built on the meta device) its weights, one tensor at a time; `progress` counts bytes.

        Parameters that have memory already are filled; a layer that has `take` holds what it gets in its own way.
        """
        names = list(model.state_dict()) if names is None else names
        for name, tensor in self.read(names, device, dtype):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "take"):
                module.take(leaf, tensor)
            elif module._parameters[leaf].is_meta:
                module._parameters[leaf] = _parameter(tensor)
            else:
                module._parameters[leaf].copy_(tensor)
            if progress is not None:
                progress(tensor.nbytes)
        return model.eval()


# Tensors of a model that some files carry and ours does not use.
_UNUSED = (
    "text_projection.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "pos_embed.proj.weight",
    "pos_embed.proj.bias",
)


def _parameter(tensor: Tensor) -> nn.Parameter:
    from torch import nn

    return nn.Parameter(tensor, requires_grad=False)


def _convert(tensor: Tensor, scale: Tensor | None, device: Any, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.to(device)
    if scale is not None:
        import torch

        tensor = tensor.to(torch.float32) * scale.to(device=device, dtype=torch.float32)
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count_layers(names: Iterable[str], stem: str) -> int:
    """One more than the highest number that follows `stem` in a name; gaps show as missing tensors later."""
    numbers = (name[len(stem) :].split(".", 1)[0] for name in names if name.startswith(stem))
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


# ---- models in diffusers layout ------------------------------------------------------------------

# our name -> theirs, below a block
_X_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "attn.proj": "attn.to_out.0",
    "attn2.proj": "attn2.to_out.0",
}
_CONTEXT_BLOCK = {
    "adaLN_modulation.1": "norm1_context.linear",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
    "attn.proj": "attn.to_add_out",
}
_EMBEDDERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_VAE_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def mmdit_part(file: WeightFile) -> Part:
    """The MMDiT of a file or a diffusers folder."""
    for prefix in (MMDIT_PREFIX, TRANSFORMER):
        if file.has(prefix):
            return Part(file, prefix, diffusers_mmdit(file, prefix) if prefix == TRANSFORMER else {})
    return Part(file, "", diffusers_mmdit(file, "") if file.has("transformer_blocks.") else {})


def vae_part(file: WeightFile) -> Part:
    """The VAE of a file or a diffusers folder; without its prefix where it has a file to itself."""
    for prefix in (VAE_PREFIX, "vae/", ""):
        if file.has(prefix + "encoder.down_blocks."):
            return Part(file, prefix, diffusers_vae(file, prefix))
        if prefix and file.has(prefix):
            return file.part(prefix)
    return file.part()


def _linear(out: dict[str, Source], ours: str, *theirs: str, change: str = "") -> None:
    """Weight and bias of a layer; a bias is never reshaped."""
    out[f"{ours}.weight"] = Source(tuple(f"{t}.weight" for t in theirs), change)
    out[f"{ours}.bias"] = Source(tuple(f"{t}.bias" for t in theirs), "" if change == "conv" else change)


def diffusers_mmdit(file: WeightFile, prefix: str) -> dict[str, Source]:
    """Where SD3Transformer2DModel keeps our MMDiT's tensors: q, k and v apart, and scale before shift in the norms of
    the last block's text and of the output.
    """
    out = {"pos_embed": Source(("pos_embed.pos_embed",))}
    for ours, theirs in _EMBEDDERS.items():
        _linear(out, ours, theirs)
    _linear(out, "final_layer.adaLN_modulation.1", "norm_out.linear", change="swap")
    depth = count_layers(file.entries, f"{prefix}transformer_blocks.")
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        streams = (
            ("x_block", _X_BLOCK, "to_{}", "norm_{}"),
            ("context_block", _CONTEXT_BLOCK, "add_{}_proj", "norm_added_{}"),
        )
        for stream, layers, project, norm in streams:
            stem = f"joint_blocks.{i}.{stream}."
            for ours, theirs in layers.items():
                last_norm = i == depth - 1 and theirs == "norm1_context.linear"
                _linear(out, stem + ours, block + theirs, change="swap" if last_norm else "")
            for attn in ("attn", "attn2"):
                _linear(out, f"{stem}{attn}.qkv", *(f"{block}{attn}.{project.format(x)}" for x in "qkv"))
                for x in "qk":
                    out[f"{stem}{attn}.ln_{x}.weight"] = Source((f"{block}{attn}.{norm.format(x)}.weight",))
    return out


def diffusers_vae(file: WeightFile, prefix: str) -> dict[str, Source]:
    """Where AutoencoderKL keeps our VAE's tensors: decoder levels counted from the other end, attention as matrices."""
    out: dict[str, Source] = {}
    for side, ours_level, theirs_level in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
        for ours, theirs in (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out")):
            _linear(out, f"{side}.{ours}", f"{side}.{theirs}")
        blocks = {f"mid.block_{j + 1}": f"mid_block.resnets.{j}" for j in (0, 1)}
        levels = count_layers(file.entries, f"{prefix}{side}.{theirs_level}.")
        for i in range(levels):
            level = f"{ours_level}.{i if side == 'encoder' else levels - 1 - i}"
            for j in range(count_layers(file.entries, f"{prefix}{side}.{theirs_level}.{i}.resnets.")):
                blocks[f"{level}.block.{j}"] = f"{theirs_level}.{i}.resnets.{j}"
            sample = "downsample" if side == "encoder" else "upsample"
            _linear(out, f"{side}.{level}.{sample}.conv", f"{side}.{theirs_level}.{i}.{sample}rs.0.conv")
        for ours, theirs in blocks.items():
            for a, b in _VAE_BLOCK.items():
                _linear(out, f"{side}.{ours}.{a}", f"{side}.{theirs}.{b}")
        attention = f"{side}.mid_block.attentions.0"
        _linear(out, f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for a, b in _VAE_ATTENTION.items():
            _linear(out, f"{side}.mid.attn_1.{a}", f"{attention}.{b}", change="conv")
    return out


# ---- finding -------------------------------------------------------------------------------------


def find_encoder(role: str, model_file: WeightFile, folders: list[Path]) -> Part:
    """The text encoder `role` (clip_l, clip_g, t5xxl): in the model's own file or folder, else in `folders` or their
    `text_encoders/`. Raises FileNotFoundError that says where it was looked for and how to get it.
    """
    for prefix in (ENCODER_PREFIX.format(role), ENCODER_FOLDERS[role]):
        if model_file.has(prefix):
            return encoder_part(role, model_file, prefix)
    for folder in folders:
        for place in (folder, folder / "text_encoders"):
            for name in ENCODER_FILES[role]:
                if (place / name).is_file():
                    return encoder_part(role, WeightFile(place / name), "")
    where = ", ".join(f"{f}/ and {f}/text_encoders/" for f in folders)
    skip = ", or give --no_t5" if role == "t5xxl" else ""
    raise FileNotFoundError(
        f"--model_folder: no {' or '.join(ENCODER_FILES[role][:3])} in {where}; {fetch_encoder(role, folders[0])}{skip}"
    )


def encoder_part(role: str, file: WeightFile, prefix: str) -> Part:
    """The encoder's tensors; T5's embedding is `encoder.embed_tokens.weight` or `shared.weight`, either or both."""
    if role == "t5xxl" and prefix + "encoder.embed_tokens.weight" not in file.entries:
        return Part(file, prefix, {"encoder.embed_tokens.weight": Source(("shared.weight",))})
    return Part(file, prefix)


def fetch_encoder(role: str, folder: Path) -> str:
    """The command that downloads a text encoder."""
    name = "t5xxl_fp16.safetensors" if role == "t5xxl" else ENCODER_FILES[role][0]
    return f"get it with: hf download {ENCODER_HUB} text_encoders/{name} --local-dir {folder}"


def find_tokenizer(kind: str, folders: list[Path]) -> Path:
    """The folder of the `clip` or `t5` tokenizer: in `folders`, beside the encoders, else in the hub's cache.

    Never uses the network. Raises FileNotFoundError that says where it was looked for and how to get it.
    """
    places = [p / name for f in folders for p in (f, f / "text_encoders") for name in TOKENIZER_FOLDERS[kind]]
    for place in places:
        if any(all((place / n).is_file() for n in names) for names in TOKENIZER_FILES[kind]):
            return place
    if cached := _cached_tokenizer(kind):
        return cached
    flag = TOKENIZER_FOLDERS[kind][0]
    names = " or ".join(" and ".join(n) for n in TOKENIZER_FILES[kind])
    get = " ".join(n for names in TOKENIZER_FILES[kind] for n in names if n != "tokenizer.json")
    raise FileNotFoundError(
        f"--model_folder: no tokenizer ({names}) in {', '.join(map(str, places))} or the hub's cache; get it with: "
        f"hf download {TOKENIZER_HUB[kind]} {get} --local-dir {folders[0] / flag}"
    )


def _cached_tokenizer(kind: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for names in TOKENIZER_FILES[kind]:
        found = [try_to_load_from_cache(TOKENIZER_HUB[kind], n) for n in names]
        if all(isinstance(p, str) for p in found):
            return Path(found[0]).parent
    return None
