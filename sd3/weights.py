"""From stored tensors to modules: names, layouts, scales, dtypes."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from other_impls import count_layers
from sd3.diffusers_names import BLOCK, RENAMES, Source, diffusers_mmdit, diffusers_vae
from sd3.files import FLOATS, MMDIT_PREFIX, TRANSFORMER, VAE_PREFIX, WeightFile
from sd3.headers import Entry
from sd3.mistakes import Mistake, Where, verbatim
from sd3.reading import Note, reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


# Tensors that released files carry and no model needs.
HARMLESS = (
    "position_ids", "logit_scale", "control_type", "scaled_fp8", "scale_input", "input_scale", "scale_weight",
    "weight_scale", "comfy_quant",
)  # fmt: skip
HARMLESS_PREFIXES = ("loss.", "cond_stage_model.", "model_ema.")
SCALES = ("scale_weight", "weight_scale")  # beside a `weight`: what it is to be multiplied by
OTHER_SCALES = ("weight_scale_2", "weight_scale_inv")  # of formats that are not read
CHUNK = 256 * 2**20  # bytes read from one mapping before its pages are given back
SAMPLE = 4096  # bytes at each end of a tensor that are looked at before weights load
MOST_SAMPLED = 64  # tensors of a model


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
        """The sizes that `read` finds in the shapes; raises `Mistake` where this is no such model."""
        try:
            return read(self.shapes)
        except Exception as error:  # shapes of any kind meet readers that expect theirs
            like = self.file.looks_like()
            it = "it is damaged, or of another kind" if like == what else f"it looks like {like}"
            raise Mistake(*self.file.where, f"is not {what}: {it} (no usable {verbatim(str(error))})") from None

    def check(self, model: nn.Module, needed: Callable[[str], bool] = lambda name: True) -> None:
        """Compares with what `model` (on any device, meta too) needs, from the header alone.

        Raises one `Mistake` that lists what is missing, what has a wrong shape and what holds no numbers with a
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
            raise Mistake(*self.file.where, f"tensors do not fit the model; {verbatim('; '.join(problems))}")
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
        """Looks at both ends of some of the weights. Raises `Mistake` where all are zero, warns where some are: what
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
            raise Mistake(*self.file.where, "holds nothing but zeros: its download never filled it; get it again")
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
                    with reading(Where(self.file.field, entry.path), "cannot be read"):
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


CONTROL_TYPES = {0: "blur", 1: "canny", 2: "depth"}
LAYOUTS = (
    "those load that stabilityai publishes as .safetensors (8B and 2B), and diffusers' layout without text blocks "
    "(that of SD3.5 Large)"
)


def controlnet_part(file: WeightFile) -> Part:
    """The tensors of a ControlNet file under our names, in diffusers' layout too.

    Raises `Mistake` for a ControlNet of a layout that does not load.
    """
    prefix = (*file.prefixes("", "controlnet_blocks."), "")[0]
    sources = {ours: Source((theirs,)) for ours, theirs in RENAMES.items()}
    names = {name[len(prefix) :] for name in file.entries if name.startswith(prefix)}
    if "controlnet_blocks.0.weight" in names and "transformer_blocks.0.attn.to_q.weight" in names:
        other = next((n for n in ("context_embedder.weight", "pos_embed.proj.weight") if n in names), None)
        if other is not None:
            kind = "text blocks" if other.startswith("context") else "positions of its own"
            raise Mistake(*file.where, f"is a ControlNet in diffusers' layout with {kind} ({other}); {LAYOUTS}")
        for i in range(count_layers(names, "transformer_blocks.")):
            for ours, theirs in BLOCK.items():
                for leaf in ("weight", "bias"):
                    pieces = tuple(f"transformer_blocks.{i}.{their}.{leaf}" for their in theirs)
                    sources[f"transformer_blocks.{i}.{ours}.{leaf}"] = Source(pieces)
    elif "input_hint_block.0.weight" in names or any(n.startswith(("input_blocks.", "down_blocks.")) for n in names):
        raise Mistake(*file.where, f"is a ControlNet for SD 1, SD 2 or SDXL; {LAYOUTS}")
    return Part(file, prefix, sources)


def control_kind(part: Part) -> str:
    """blur, canny or depth, as the file says (canny images get another range in the 8B kind); `` where it does not.

    Raises `Mistake` for a kind that is no number.
    """
    shape = part.shapes.get("control_type")
    if shape is None:
        return ""
    entry = part.entry("control_type")
    if shape not in ((), (1,)) or (entry.dtype not in FLOATS and entry.dtype[0] not in "IU"):
        raise Mistake(*part.file.where, f"its control_type is no number: {entry.dtype} {list(shape)}")
    ((_, value),) = part.read(["control_type"], "cpu", None)
    return CONTROL_TYPES.get(value.item(), "")
