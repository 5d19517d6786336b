"""Finding and reading safetensors files: prefixes, layouts, dtypes, one clear error per file. Headers need no torch."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreign import Note, Unreadable, check_file, parse_json, reading
from headers import Entry, read_header

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

# Names that models have in files of any prefix, and in diffusers' layout.
STEMS = {
    "mmdit": ("joint_blocks.",),
    "vae": ("encoder.down.", "encoder.down_blocks.", "decoder.up.", "decoder.up_blocks."),
    "clip_l": ("text_model.",),
    "clip_g": ("text_model.",),
    "t5xxl": ("encoder.block.",),
}
# Tensors that released files carry and no model needs.
HARMLESS = (
    "position_ids", "logit_scale", "control_type", "scaled_fp8", "scale_input", "input_scale", "scale_weight",
    "weight_scale", "comfy_quant",
)  # fmt: skip
HARMLESS_PREFIXES = ("loss.", "cond_stage_model.", "model_ema.")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("scale_weight", "weight_scale")  # beside a `weight`: what it is to be multiplied by
OTHER_SCALES = ("weight_scale_2", "weight_scale_inv")  # of formats that are not read
CHUNK = 256 * 2**20  # bytes read from one mapping before its pages are given back
SAMPLE = 4096  # bytes at each end of a tensor that are looked at before weights load
MOST_SAMPLED = 64  # tensors of a model


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

    def __init__(self, path: str | Path, flag: str = "", folder: bool = True):
        """flag: the one that names the file, for errors; folder: whether it may be one.

        Raises FileNotFoundError, or ValueError for a file that is damaged or not safetensors.
        """
        self.path = Path(path)
        self.where = _where(self.path, flag)
        self.flag = flag
        self.folder = folder and self.path.is_dir()
        if self.folder:
            self.entries, self.metadata = _read_folder(self.path, flag)
        else:
            self.entries, self.metadata = read_header(self.where, self.path)

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file, as A1111-style tools compute it; of a folder's transformer, file after file."""
        own = TRANSFORMER if self.has(TRANSFORMER) else ""
        return file_sha256(*{e.path for n, e in self.entries.items() if n.startswith(own)})

    def part(self, prefix: str = "") -> Part:
        """The tensors whose names start with `prefix`, without it."""
        return Part(self, prefix)

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.entries)

    def prefixes(self, kind: str, *stems: str) -> list[str]:
        """What stands before the names of a kind of model (see `STEMS`), the most frequent first; averaged copies
        (`ema`) are left out.
        """
        found: Counter[str] = Counter()
        for name in self.entries:
            for stem in stems or STEMS[kind]:
                place = name.find(stem)
                if place == 0 or (place > 0 and name[place - 1] in "./"):
                    found[name[:place]] += 1
        return [prefix for prefix, _ in found.most_common() if "ema" not in re.split(r"[./_]", prefix)]

    def owners(self) -> tuple[str, ...]:
        """The prefixes of all models that were recognised, for telling a model's own tensors from another's."""
        kinds = {prefix for kind in STEMS for prefix in self.prefixes(kind)}
        return (MMDIT_PREFIX, VAE_PREFIX, "text_encoders.", *(prefix for prefix in kinds if prefix))

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


def _where(path: Path, flag: str) -> str:
    return f"--{flag} {path}" if flag else str(path)


_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def _read_folder(folder: Path, flag: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """All tensors of a diffusers folder by `<component>/<name>`, and the scheduler's shift as metadata."""
    with reading(_where(folder, flag), "cannot be read"):
        os.listdir(folder / "")  # else one that may not be looked into seems to be empty
    if not os.path.isdir(folder / "transformer"):
        if any(folder.glob("diffusion_pytorch_model*")) or folder.name in _COMPONENTS:  # one component alone
            headers = [read_header(_where(path, flag), path)[0] for path in weight_files(folder, flag)]
            return {name: entry for header in headers for name, entry in header.items()}, {}
        raise Unreadable(
            f"{_where(folder, flag)}: is a folder without transformer/; a .safetensors file or a diffusers folder is "
            "needed"
        )
    entries: dict[str, Entry] = {}
    for component in _COMPONENTS:
        if (folder / component).is_dir():
            for path in weight_files(folder / component, flag):
                header, _ = read_header(_where(path, flag), path)
                entries |= {f"{component}/{name}": entry for name, entry in header.items()}
    return entries, _scheduler(folder / "scheduler" / "scheduler_config.json", flag)


def _scheduler(path: Path, flag: str) -> dict[str, str]:
    """The shift that a scheduler's configuration names, as a file's metadata has it; nothing where it names none."""
    where = _where(path, flag)
    if not path.exists():
        return {}
    check_file(where, path)
    with reading(where, "is damaged"):
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    shift = values.get("shift") if isinstance(values, dict) else None
    return {"shift": str(shift)} if type(shift) in (int, float) else {}


_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def weight_files(folder: Path, flag: str = "") -> list[Path]:
    """The safetensors files of one component: whole or in shards, of the plain variant if there is one, else of any.

    Raises FileNotFoundError where there is none, or a shard is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        plain, shards = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        whole = [p for p in sorted(folder.glob(f"{stem}.*.safetensors")) if not _SHARD.search(p.name)]
        variants = [*whole, *sorted(folder.glob(f"{plain}.index.*.json"))]
        for path in (folder / plain, folder / shards, *variants):
            if path.suffix == ".safetensors" and path.exists():
                return [path]
            if path.exists():
                return _shards(folder, path, flag)
        if rest := [p for p in sorted(folder.glob(f"{stem}*.safetensors")) if _SHARD.search(p.name)]:
            raise FileNotFoundError(f"{_where(folder, flag)}: holds {rest[0].name}, and no index that names all shards")
    pickled = any(folder.glob("*.bin"))
    why = "only pickled .bin weights, which are not loaded" if pickled else "no .safetensors weights"
    raise FileNotFoundError(f"{_where(folder, flag)}: holds {why}")


def _shards(folder: Path, index: Path, flag: str) -> list[Path]:
    """The files that an index of shards names, which lie beside it."""
    where = _where(index, flag)
    check_file(where, index)
    with reading(where, "is damaged"):
        values = parse_json(index.read_text(encoding="utf-8-sig"))
    named = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(named, dict) or not named:
        raise Unreadable(f"{where}: is damaged: no weight_map in it")
    for name, file in named.items():
        if not isinstance(file, str) or not file or re.search(r"[/\\\x00]", file) or file in (".", ".."):
            raise Unreadable(f"{where}: is damaged: {name} is said to lie in {file!r}, which is no file beside it")
    names = sorted(set(named.values()))
    for name in names:
        if not os.path.exists(folder / name):  # also where no file can have such a name
            raise FileNotFoundError(f"{_where(folder / name, flag)}: no such file, though {index.name} names it")
    return [folder / name for name in names]


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
        except Exception as error:  # shapes of any kind meet readers that expect theirs
            like = self.file.looks_like()
            it = "it is damaged, or of another kind" if like == what else f"it looks like {like}"
            raise Unreadable(f"{self.file.where}: is not {what}: {it} (no usable {error})") from None

    def check(self, model: nn.Module, needed: Callable[[str], bool] = lambda name: True) -> None:
        """Compares with what `model` (on any device, meta too) needs, from the header alone.

        Raises one ValueError that lists what is missing, what has a wrong shape and what holds no numbers with a
        point; warns of unknown extras.
        """
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if needed(k)}
        there = [k for k in wanted if k in self.shapes]
        missing = [self.full_name(k) for k in wanted if k not in self.shapes]
        wrong = [
            f"{self.full_name(k)} has {_size(self.shapes[k])}, needs {_size(wanted[k])}"
            for k in there
            if self.shapes[k] != wanted[k]
        ]
        empty = [self.full_name(k) for k in there if 0 in wanted[k]]
        pieces = [self.file.entries[self.prefix + n] for k in there for n in self.source(k).names]
        whole = [f"{e.name} is {e.dtype}" for e in pieces if e.dtype not in FLOATS]
        scales = [line for e in pieces for line in self._wrong_scales(e)]
        problems = []
        if missing:
            problems.append(f"{len(missing)} missing: {_some(missing)}")
        if wrong:
            problems.append(f"{len(wrong)} of a wrong shape: {_some(wrong)}")
        if empty:
            problems.append(f"{len(empty)} without a number in them: {_some(empty)}")
        if whole:
            problems.append(f"{len(whole)} of a dtype that is not read ({', '.join(FLOATS[:6])} are): {_some(whole)}")
        if scales:
            problems.append(f"{len(scales)} scales that are not read: {_some(scales)}")
        if problems:
            raise Unreadable(f"{self.file.where}: tensors do not fit the model; {'; '.join(problems)}")
        owned = model.state_dict()
        others = self.file.owners()
        extra = [k for k in self.shapes if k not in owned and not self._harmless(k, others)]
        if extra:
            warnings.warn(f"{self.file.path}: not used, unknown: {_some(extra)}", Note, stacklevel=2)

    def _scales(self, entry: Entry) -> list[Entry]:
        """What lies beside a weight for it to be multiplied by."""
        stem = self._listed(entry).removesuffix("weight")
        names = [stem + leaf for leaf in SCALES] if stem != self._listed(entry) else []
        return [self.file.entries[name] for name in names if name in self.file.entries]

    def _listed(self, entry: Entry) -> str:
        """The name under which the file lists an entry: in a folder, with its component."""
        component, slash, _ = self.prefix.partition("/")
        return component + slash + entry.name if slash else entry.name

    def _wrong_scales(self, entry: Entry) -> Iterator[str]:
        rows = entry.shape[0] if entry.shape else 1
        for scale in self._scales(entry):
            if scale.dtype not in FLOATS:
                yield f"{scale.name} is {scale.dtype}"
            elif math.prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
                yield f"{scale.name} has {_size(scale.shape)}, needs a single number or {rows}"
        stem = self._listed(entry).removesuffix("weight")
        yield from (stem + leaf for leaf in OTHER_SCALES if stem + leaf in self.file.entries)

    def _harmless(self, name: str, others: tuple[str, ...] = ()) -> bool:
        if (self.prefix + name).startswith(others) and not self.prefix.startswith(others):
            return True  # another model of the same file
        leaf = name.rsplit(".", 1)[-1]
        return leaf in HARMLESS or name.startswith(HARMLESS_PREFIXES) or name in _UNUSED

    def check_filled(self, some_may_be_empty: bool = False) -> None:
        """Looks at both ends of some of the weights. Raises ValueError where all are zero, warns where some are: what
        a download leaves that reserved its room and stopped. some_may_be_empty: training began with such weights.
        """
        entries = [self.file.entries[self.prefix + n] for k in self.shapes for n in self.source(k).names]
        weights = sorted({e for e in entries if len(e.shape) > 1 and e.size}, key=lambda e: (str(e.path), e.place))
        weights = weights[:: -(-len(weights) // MOST_SAMPLED) or 1] + weights[-1:]
        zero = []
        with reading(self.file.where, "cannot be read"), contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb")) for path in {e.path for e in weights}}
            for entry in weights:
                ends = b""
                for place in (entry.place, entry.place + max(entry.size - SAMPLE, 0)):
                    files[entry.path].seek(place)
                    ends += files[entry.path].read(min(SAMPLE, entry.size))
                if not ends.strip(b"\0"):
                    zero.append(entry.name)
        if weights and len(zero) == len(weights):
            raise Unreadable(f"{self.file.where}: holds nothing but zeros: its download never filled it; get it again")
        if zero and not some_may_be_empty:
            some = f"{len(zero)} of {len(weights)} weights looked at hold nothing but zeros, such as {zero[0]}"
            warnings.warn(f"{self.file.path}: {some}; its download may have stopped early", Note, stacklevel=2)

    def not_finite(self) -> str:
        """The name of the first tensor that holds NaN or infinity, or ``; reads all of them."""
        import torch

        for name, tensor in self.read(list(self.shapes), "cpu", None):
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                return self.full_name(name)
        return ""

    def read(self, names: list[str], device: Any, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, straight to device and dtype, in the file's order.

        Memory-mapped: a tensor that keeps its dtype on the CPU is the mapping itself. Where tensors are converted,
        the mapping is renewed every `CHUNK` bytes, so that pages already read do not add up.
        Weights with a `scale_weight` or a `weight_scale` beside them are multiplied by it.
        """
        from safetensors import safe_open

        ordered = sorted(names, key=lambda n: (str(self.entry(n).path), self.entry(n).offset))
        while ordered:
            read = 0
            with contextlib.ExitStack() as stack:
                opened: dict[Path, Any] = {}

                def take(entry: Entry, opened=opened, stack=stack) -> Tensor:
                    with reading(_where(entry.path, self.file.flag), "cannot be read"):
                        if entry.path not in opened:
                            opened[entry.path] = stack.enter_context(
                                safe_open(entry.path, framework="pt", device="cpu")
                            )
                        return opened[entry.path].get_tensor(entry.name)

                while ordered and read < CHUNK:
                    name = ordered.pop(0)
                    source, pieces = self.source(name), []
                    for piece in source.names:
                        entry = self.file.entries[self.prefix + piece]
                        tensor = take(entry)
                        read += tensor.nbytes
                        pieces.append(_convert(tensor, [take(s) for s in self._scales(entry)], device, dtype))
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


def _convert(tensor: Tensor, scales: list[Tensor], device: Any, dtype: torch.dtype | None) -> Tensor:
    import torch

    if torch.device(device).type in HAVE_ALL_DTYPES:
        tensor = tensor.to(device)
    elif tensor.dtype.itemsize not in (2, 4) and tensor.is_floating_point():  # float8 and float64
        tensor = tensor.to(dtype or torch.float32) if not scales else tensor
    for scale in scales:
        factor = scale.to(device=tensor.device, dtype=torch.float32)
        factor = factor.reshape(-1, *[1] * (tensor.ndim - 1)) if factor.numel() > 1 else factor.reshape(())
        tensor = tensor.to(torch.float32) * factor
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.to(device)


HAVE_ALL_DTYPES = ("cpu", "cuda")  # devices that take float8 and float64; for others they are converted before


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count_layers(names: Iterable[str], stem: str) -> int:
    """One more than the highest number that follows `stem` in a name; gaps show as missing tensors later.

    Raises ValueError where most are missing: a number out of all bounds would be that many layers.
    """
    numbers = {name[len(stem) :].split(".", 1)[0] for name in names if name.startswith(stem)}
    found = {int(n) if len(n) < 7 else 10**7 for n in numbers if re.fullmatch(r"[0-9]+", n)}
    count = max(found, default=-1) + 1
    if count > 4 * len(found) + 16:
        raise ValueError(f"{stem}{max(found)}, of which {len(found)} are there")
    return count


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
    """The MMDiT of a file or a diffusers folder, whatever stands before its names."""
    known = [p for p in (MMDIT_PREFIX, TRANSFORMER) if file.has(p)]
    prefix = [*known, *file.prefixes("mmdit"), *file.prefixes("mmdit", "transformer_blocks."), ""][0]
    return Part(file, prefix, diffusers_mmdit(file, prefix) if file.has(prefix + "transformer_blocks.") else {})


def vae_part(file: WeightFile) -> Part:
    """The VAE of a file or a diffusers folder, whatever stands before its names."""
    prefix = [*[p for p in (VAE_PREFIX, "vae/") if file.has(p)], *file.prefixes("vae"), ""][0]
    return Part(file, prefix, diffusers_vae(file, prefix) if file.has(prefix + "encoder.down_blocks.") else {})


def has_vae(file: WeightFile) -> bool:
    """Whether a file holds a VAE, beside other models or alone."""
    return any(map(file.has, (VAE_PREFIX, "vae/"))) or bool(file.prefixes("vae"))


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


@dataclass(frozen=True)
class Fit:
    """Widths of the text that a model takes: pooled (CLIP-L and CLIP-G together), and tokens (T5's)."""

    pooled: int
    context: int

    def fits(self, role: str, part: Part, other: int | None) -> bool:
        """Whether a part may be the encoder `role` by its width; other: the width of the other CLIP, where known."""
        width = encoder_width(role, part)
        if role == "t5xxl":
            return width == self.context
        if other is not None:
            return width is not None and width + other == self.pooled
        if self.pooled == sum(CLIP_WIDTHS.values()):
            return width == CLIP_WIDTHS[role]
        if width is None or width >= self.pooled:
            return False
        return 2 * width <= self.pooled if role == "clip_l" else 2 * width >= self.pooled


CLIP_WIDTHS = {"clip_l": 768, "clip_g": 1280}  # of the released models


def encoder_width(role: str, part: Part) -> int | None:
    """Width of a text encoder, or None where the part is none of that kind."""
    names = {"t5xxl": "encoder.embed_tokens.weight"}
    shape = part.shapes.get(names.get(role, "text_model.embeddings.token_embedding.weight"), ())
    return shape[1] if len(shape) == 2 else None


def find_encoders(
    roles: Iterable[str], model_file: WeightFile, folders: list[Path], given: dict[str, str | None], fit: Fit
) -> dict[str, Part]:
    """The text encoders by role (clip_l, clip_g, t5xxl): the given file, else in the model's own file or folder, else
    in `folders`, their `text_encoders/` or `clip/`: by a known name, else in a folder of diffusers' layout there, else
    by what the files hold.

    Raises ValueError for a file that is damaged and where several may be meant, FileNotFoundError that says where it
    was looked for and how to get it.
    """
    roles = list(roles)
    parts: dict[str, Part] = {}
    for role in roles:
        if path := given.get(role):
            file = WeightFile(path, role, folder=False)
            parts[role] = encoder_part(role, file, (*_inside(role, file, fit), *file.prefixes(role), "")[0])
        elif found := _inside(role, model_file, fit) or _by_name(role, folders) or _by_folder(role, folders, fit):
            parts[role] = found if isinstance(found, Part) else encoder_part(role, model_file, found[0])
    missing = [role for role in roles if role not in parts]
    for role in missing:
        parts[role] = _by_contents(role, model_file, folders, parts, fit)
    return {role: parts[role] for role in roles}


def _inside(role: str, file: WeightFile, fit: Fit) -> list[str]:
    """The prefix of an encoder in a file with other models: a known one, one with the role in it, or by its width."""
    known = [p for p in (ENCODER_PREFIX.format(role), ENCODER_FOLDERS[role]) if file.has(p)]
    if known:
        return known[:1]
    others = [p for p in file.prefixes(role) if p]
    named = [p for p in others if role in p]
    free = [p for p in others if not any(r in p for r in ENCODERS)]
    return (named or [p for p in free if fit.fits(role, encoder_part(role, file, p), None)])[:1]


def _places(folders: list[Path]) -> list[Path]:
    return [place for f in folders for place in (f, f / "text_encoders", f / "clip")]


def _by_name(role: str, folders: list[Path]) -> Part | None:
    for place in _places(folders):
        for name in ENCODER_FILES[role]:
            if os.path.exists(place / name):
                file = WeightFile(place / name, "model_folder", folder=False)
                return encoder_part(role, file, (*file.prefixes(role), "")[0])
    return None


def _by_folder(role: str, folders: list[Path], fit: Fit) -> Part | None:
    """The encoder in a folder that is called as in diffusers' layout, whole or in shards; another one there does not
    count: FLUX keeps its T5 in `text_encoder_2`.
    """
    for place in (f / ENCODER_FOLDERS[role] for f in folders):
        if any(place.glob("*.safetensors")):
            part = _alone(role, WeightFile(place, "model_folder"))
            if part is not None and fit.fits(role, part, None):
                return part
    return None


def _by_contents(role: str, model_file: WeightFile, folders: list[Path], parts: dict[str, Part], fit: Fit) -> Part:
    """The one file of a folder that holds such an encoder and nothing else; the first folder with any counts."""
    other = {"clip_l": "clip_g", "clip_g": "clip_l"}.get(role)
    width = encoder_width(other, parts[other]) if other in parts else None
    known = {name for names in ENCODER_FILES.values() for name in names}
    used = {part.file.path.resolve() for part in parts.values()} | {model_file.path.resolve()}
    for folder in folders:
        found: dict[Path, Part] = {}
        for path in (p for place in _places([folder]) for p in sorted(place.glob("*.safetensors"))):
            hinted = [r for r in ("clip_l", "clip_g") if r in path.name.lower().replace("-", "_")]
            if path.name in known or path.resolve() in used or (hinted and role not in hinted):
                continue
            with contextlib.suppress(ValueError, OSError):  # a file that cannot be read is none of those that fit
                part = _alone(role, WeightFile(path, "model_folder", folder=False))
                if part is not None and fit.fits(role, part, width):
                    found.setdefault(path.resolve(), part)
        if len(found) > 1:
            names = " and ".join(str(part.file.path) for part in found.values())
            raise Unreadable(f"--{role}: {names} may both be meant; name the right one with --{role}")
        if found:
            return next(iter(found.values()))
    where = ", ".join(f"{f}/ and {f}/text_encoders/ and {f}/clip/" for f in folders)
    skip = ", or give --no_t5" if role == "t5xxl" else ""
    raise FileNotFoundError(
        f"--model_folder: no {' or '.join(ENCODER_FILES[role][:3])} in {where}, nor another file that holds one; name "
        f"it with --{role}, or {fetch_encoder(role, folders[0])}{skip}"
    )


def _alone(role: str, file: WeightFile) -> Part | None:
    """The encoder that a file holds, where it holds nothing else."""
    prefixes = file.prefixes(role)
    if len(prefixes) != 1 or sum(n.startswith(prefixes[0]) for n in file.entries) < 0.9 * len(file.entries):
        return None
    others = [kind for kind in STEMS if STEMS[kind] != STEMS[role] and file.prefixes(kind)]
    return None if others else encoder_part(role, file, prefixes[0])


def roles_of(file: WeightFile) -> set[str]:
    """The text encoders that a file holds, beside other models or alone (by the released models' widths)."""
    fit, out = Fit(sum(CLIP_WIDTHS.values()), 4096), set()
    for role in ENCODERS:
        part = _alone(role, file)
        if _inside(role, file, fit) or (part is not None and fit.fits(role, part, None)):
            out.add(role)
    return out


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
        if any(all(os.path.exists(place / n) for n in names) for names in TOKENIZER_FILES[kind]):
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
