"""Loads stored tensors into modules: names, layouts, scales, dtypes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from other_impls import count_layers
from sd3.diffusers_names import BLOCK, RENAMES, StoredAs, diffusers_mmdit, diffusers_vae
from sd3.files import MMDIT_PREFIX, TRANSFORMER, VAE_PREFIX, WeightFile, open_tensors, readable_dtypes
from sd3.headers import Entry
from sd3.mistakes import Mistake, Where, verbatim
from sd3.reading import reading, warn

# Tensors in released files that no model needs.
HARMLESS = (
    "position_ids", "logit_scale", "control_type", "scaled_fp8", "scale_input", "input_scale", "scale_weight",
    "weight_scale", "comfy_quant",
)  # fmt: skip
HARMLESS_PREFIXES = ("loss.", "cond_stage_model.", "model_ema.")
SCALES = ("scale_weight", "weight_scale")  # names of scale factors stored beside a `weight`
OTHER_SCALES = ("weight_scale_2", "weight_scale_inv")  # scale factors of unsupported formats
CHUNK = 256 * 2**20  # bytes to read before mapping the file again, which frees its pages
SAMPLE = 4096  # bytes to check at each end of a tensor before weights load
MOST_SAMPLED = 64  # most tensors of a model to check
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Patch:
    """Changes to one model's weights, for example by a LoRA, applied while the weights load.

    changes: our tensor name -> a function that takes the contiguous float32 tensor and returns one of the same shape,
    either the argument after modifying it or a new one; identity: a text that distinguishes patches, such as a file's
    hash and a strength; notes: lines for the user, with names of fields between backquotes; where: the field and the
    file that an error names.
    """

    changes: Mapping[str, Callable[[Tensor], Tensor]]
    identity: str
    notes: tuple[str, ...] = ()
    where: Where = field(default=Where(""))


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of one model in a file, under our names.

    prefix: common start of this model's names in the file; layout: how the file stores each tensor that it names
    differently, splits, swaps or transposes; patches: applied in order.
    """

    file: WeightFile
    prefix: str = ""
    layout: dict[str, StoredAs] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()

    # -- names and headers --

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by our name."""
        entries = self.file.entries
        used = {name for stored in self.layout.values() for name in stored.names}
        out = {n[len(self.prefix) :]: e.shape for n, e in entries.items() if n.startswith(self.prefix)}
        out = {name: shape for name, shape in out.items() if name not in used}
        for name, stored in self.layout.items():
            if all(self.prefix + n in entries for n in stored.names):
                out[name] = stored.shape([entries[self.prefix + n].shape for n in stored.names])
        return out

    def storage(self, name: str) -> StoredAs:
        """How the file stores a tensor."""
        return self.layout.get(name) or StoredAs((name,))

    def entries(self, name: str) -> list[Entry]:
        """The file's entries for a tensor: several if it is stored in pieces."""
        return [self.file.entries[self.prefix + piece] for piece in self.storage(name).names]

    def paths(self) -> set[Path]:
        """The files that hold these tensors."""
        return {entry.path for name, entry in self.file.entries.items() if name.startswith(self.prefix)}

    def full_name(self, name: str) -> str:
        """The tensor's name in the file, for messages."""
        return " + ".join(self.prefix + n for n in self.storage(name).names)

    def dtype_name(self) -> str:
        """The most common dtype, counted in elements, in the file's spelling (F16, BF16, F32, F8_E4M3)."""
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            dtype = self.entries(name)[0].dtype
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return max(sizes, key=lambda k: sizes[k])

    def config(self, read: Callable[[dict[str, tuple[int, ...]]], Any], what: str) -> Any:
        """The sizes that `read` finds in the shapes. Raises `Mistake` if the tensors are not those of `what`."""
        try:
            return read(self.shapes)
        except Exception as error:  # names and shapes in a file may be anything
            like = self.file.looks_like()
            reason = "it is damaged, or another kind of file" if like == what else f"it looks like {like}"
            raise Mistake(*self.file.where, f"is not {what}: {reason} (no usable {verbatim(str(error))})") from None

    # -- checks before weights load --

    def check(self, model: nn.Module) -> None:
        """Compares the header with what `model` (on any device, including meta) needs.

        Raises one `Mistake` listing missing tensors, wrong shapes and unsupported dtypes and scales; warns about
        unknown tensors.
        """
        state = model.state_dict()
        problems = self._problems({name: tuple(t.shape) for name, t in state.items()})
        lines = [f"{len(items)} {what}: {_first_few(items)}" for what, items in problems.items() if items]
        if lines:
            raise Mistake(*self.file.where, f"tensors do not fit the model; {verbatim('; '.join(lines))}")
        other_models = self.file.owners()
        extra = [name for name in self.shapes if name not in state and not self._harmless(name, other_models)]
        if extra:
            warn(verbatim(f"{self.file.path}: not used, unknown: {_first_few(extra)}"))

    def _problems(self, wanted: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
        """Problems with the wanted tensors (shape by name), grouped by kind."""
        present = [name for name in wanted if name in self.shapes]
        pieces = [entry for name in present for entry in self.entries(name)]
        return {
            "missing": [self.full_name(name) for name in wanted if name not in self.shapes],
            "wrong shape": [
                f"{self.full_name(name)} has {_shape_text(self.shapes[name])}, needs {_shape_text(wanted[name])}"
                for name in present
                if self.shapes[name] != wanted[name]
            ],
            "empty": [self.full_name(name) for name in present if 0 in wanted[name]],
            f"unsupported dtype (supported: {', '.join(readable_dtypes())})": [
                f"{e.name} is {e.dtype}" for e in pieces if e.dtype not in readable_dtypes()
            ],
            "unsupported scales": [line for e in pieces for line in self._wrong_scales(e)],
        }

    def _scales(self, entry: Entry) -> list[Entry]:
        """The scale factors stored beside a weight."""
        stem = self._listed_name(entry).removesuffix("weight")
        names = [stem + leaf for leaf in SCALES] if stem != self._listed_name(entry) else []
        return [self.file.entries[name] for name in names if name in self.file.entries]

    def _listed_name(self, entry: Entry) -> str:
        """The key of an entry in `file.entries`; in a folder it starts with the component."""
        component, slash, _ = self.prefix.partition("/")
        return component + slash + entry.name if slash else entry.name

    def _wrong_scales(self, entry: Entry) -> Iterator[str]:
        rows = entry.shape[0] if entry.shape else 1
        for scale in self._scales(entry):
            if scale.dtype not in readable_dtypes():
                yield f"{scale.name} is {scale.dtype}"
            elif math.prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
                yield f"{scale.name} has {_shape_text(scale.shape)}, needs a single number or {rows}"
        stem = self._listed_name(entry).removesuffix("weight")
        yield from (stem + leaf for leaf in OTHER_SCALES if stem + leaf in self.file.entries)

    def _harmless(self, name: str, other_models: tuple[str, ...] = ()) -> bool:
        if (self.prefix + name).startswith(other_models) and not self.prefix.startswith(other_models):
            return True
        leaf = name.rsplit(".", 1)[-1]
        return leaf in HARMLESS or name.startswith(HARMLESS_PREFIXES) or name in _UNUSED

    def check_filled(self, some_may_be_empty: bool = False) -> None:
        """Reads both ends of some weights, to find downloads that reserved their space and stopped. Raises `Mistake` if
        all weights are zero, warns if some are.

        some_may_be_empty: do not warn, because the model was initialised with zeros (a ControlNet).
        """
        entries = [entry for name in self.shapes for entry in self.entries(name)]
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
            raise Mistake(
                *self.file.where, "contains only zeros, probably because its download did not finish; download it again"
            )
        if zero and not some_may_be_empty:
            some = f"{len(zero)} of {len(weights)} checked weights contain only zeros, such as {zero[0]}"
            warn(f"{verbatim(str(self.file.path))}: {verbatim(some)}; its download may have stopped early")

    def not_finite(self) -> str:
        """The name of the first tensor with NaN or infinity, or an empty string. Reads all tensors, without patches."""
        for name, tensor in replace(self, patches=()).read(list(self.shapes), "cpu", None):
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                return self.full_name(name)
        return ""

    # -- loading --

    def read(self, names: list[str], device: Any, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields the named tensors on `device` in `dtype` (None: as stored, or float32 if scaled or patched), in the
        file's order. Every tensor of every model is read here: stored, named, scaled, patched.

        On the CPU, a tensor that keeps its dtype is a view of the file if the file's format is mapped into memory. The
        file is reopened every `CHUNK` bytes, which frees the pages that are already converted. A patched tensor is
        rounded once, after all its patches. Raises Mistake if a patch makes a tensor NaN or infinite in `dtype`.
        """

        def place(name: str) -> tuple[str, int]:
            first = self.entries(name)[0]
            return str(first.path), first.place

        ordered, scratch = sorted(names, key=place), Scratch(dtype)
        while ordered:
            total = 0
            with contextlib.ExitStack() as stack:
                opened: dict[Path, Callable[[Entry], Tensor]] = {}

                def load(entry: Entry, opened=opened, stack=stack) -> Tensor:
                    where = Where(self.file.field, entry.path)
                    with reading(where, "cannot be read"):
                        if entry.path not in opened:
                            opened[entry.path] = stack.enter_context(open_tensors(where, entry.path))
                        return opened[entry.path](entry)

                while ordered and total < CHUNK:
                    name, pieces = ordered.pop(0), []
                    changes = [patch.changes[name] for patch in self.patches if name in patch.changes]
                    exact = None if changes else dtype
                    for entry in self.entries(name):
                        tensor = load(entry)
                        total += tensor.nbytes
                        pieces.append(_convert(tensor, [load(s) for s in self._scales(entry)], device, exact))
                        del tensor
                    whole = self.storage(name).build(pieces)
                    whole = scratch.exact(whole) if changes else whole
                    for change in changes:
                        whole = change(whole)
                    whole = whole.to(dtype) if changes and dtype else whole
                    if changes and not _is_finite(whole):
                        self._blame_patch(name, device, dtype)
                    yield name, whole
                    del pieces, whole

    def _blame_patch(self, name: str, device: Any, dtype: torch.dtype | None) -> None:
        """Raises Mistake for the first patch that makes a tensor NaN or infinite; returns if it is so in the file."""
        *before, last = self.patches
        ((_, tensor),) = replace(self, patches=tuple(before)).read([name], device, dtype)  # may blame an earlier one
        if _is_finite(tensor):
            kind = str(dtype or torch.float32).removeprefix("torch.")
            why = f"makes {self.full_name(name)} NaN or infinite in {kind}: its values or its strength are too large"
            raise Mistake(*last.where, verbatim(why))

    def load_into(
        self,
        model: nn.Module,
        device: Any,
        dtype: torch.dtype,
        progress: Callable[[int], None] | None = None,
        names: Iterable[str] | None = None,
    ) -> nn.Module:
        """Loads the weights into `model` (built on the meta device), one tensor at a time, and returns it.

        Parameters that already have storage are filled in place. Layers with a `store` method (packed, 8-bit) store
        the weight themselves. progress: called with the bytes of each tensor; names: the tensors to load, None for all.
        """
        for name, tensor in self.read(list(model.state_dict() if names is None else names), device, dtype):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if hasattr(module, "store"):
                module.store(leaf, tensor)
            elif module._parameters[leaf].is_meta:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._parameters[leaf].copy_(tensor)
            if progress is not None:
                progress(tensor.nbytes)
        return model.eval()


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. A finite sum shows it, and takes a thirtieth of the time of `isfinite`."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class Scratch:
    """Makes float32 copies of tensors for patches to modify. Copies that are converted afterwards share one buffer:
    getting new pages from the system for each would take longer than a LoRA's product.
    """

    def __init__(self, dtype: torch.dtype | None):
        """dtype: what the copies are converted to afterwards; None: they stay float32."""
        self.stays_float32 = dtype in (None, torch.float32)
        self.memory = torch.empty(0)

    def exact(self, tensor: Tensor) -> Tensor:
        """A contiguous float32 copy. If it is to be converted, it is valid until the next call only."""
        if self.stays_float32:
            return torch.empty(tensor.shape, device=tensor.device).copy_(tensor)
        if self.memory.numel() < tensor.numel() or self.memory.device != tensor.device:
            self.memory = torch.empty(tensor.numel(), device=tensor.device)
        return self.memory[: tensor.numel()].view(tensor.shape).copy_(tensor)


def on_meta(make: Callable[[], Model]) -> Model:
    """Builds a module on the meta device, without storage for its weights."""
    with torch.device("meta"):
        return make()


def differently_patched(one: ModelTensors, other: ModelTensors) -> set[str]:
    """Names of the tensors changed by either model's patches, or an empty set if both have the same patches."""
    if [p.identity for p in one.patches] == [p.identity for p in other.patches]:
        return set()
    return {name for patch in (*one.patches, *other.patches) for name in patch.changes}


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Frees parameters by moving them to the meta device, so that other weights can be loaded."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        if (old := parameters.get(leaf)) is not None and not old.is_meta:
            parameters[leaf] = nn.Parameter(old.to("meta"), requires_grad=False)


def check_part(part: ModelTensors, make: Callable[[], Model], some_may_be_empty: bool = False) -> Model:
    """Builds the module of a part without its weights. Raises Mistake if the file's tensors do not fit or are all zero.

    some_may_be_empty: see `ModelTensors.check_filled`.
    """
    with reading(part.file.where, "its tensor sizes fit no model"):
        model = on_meta(make)
    part.check(model)
    part.check_filled(some_may_be_empty)
    return model


# Tensors of some files that our models do not use.
_UNUSED = (
    "text_projection.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "pos_embed.proj.weight",
    "pos_embed.proj.bias",
)


def _convert(tensor: Tensor, scales: list[Tensor], device: Any, dtype: torch.dtype | None) -> Tensor:
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


HAVE_ALL_DTYPES = ("cpu", "cuda")  # devices that support float8 and float64; the CPU converts for all others


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _first_few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- finding each model in a file --


def find_mmdit(file: WeightFile) -> ModelTensors:
    """The MMDiT of a file or a diffusers folder, with any prefix."""
    usual = [p for p in (MMDIT_PREFIX, TRANSFORMER) if file.has(p)]
    prefix = [*usual, *file.prefixes("mmdit"), *file.prefixes("mmdit", "transformer_blocks."), ""][0]
    if not file.has(prefix + "transformer_blocks."):
        return ModelTensors(file, prefix)
    return ModelTensors(file, prefix, diffusers_mmdit(count_layers(file.entries, f"{prefix}transformer_blocks.")))


def find_vae(file: WeightFile) -> ModelTensors:
    """The VAE of a file or a diffusers folder, with any prefix."""
    prefix = [*[p for p in (VAE_PREFIX, "vae/") if file.has(p)], *file.prefixes("vae"), ""][0]
    in_diffusers_layout = file.has(prefix + "encoder.down_blocks.")
    return ModelTensors(file, prefix, diffusers_vae(file, prefix) if in_diffusers_layout else {})


def has_vae(file: WeightFile) -> bool:
    """Whether a file holds a VAE, alone or with other models."""
    return any(map(file.has, (VAE_PREFIX, "vae/"))) or bool(file.prefixes("vae"))


CONTROL_TYPES = {0: "blur", 1: "canny", 2: "depth"}
LAYOUTS = (
    "supported: those that stabilityai publishes as .safetensors (8B and 2B), and diffusers layout without text blocks "
    "(that of SD3.5 Large)"
)


def find_controlnet(file: WeightFile) -> ModelTensors:
    """The tensors of a ControlNet file, in the published layout or in diffusers'.

    Raises `Mistake` for a layout that is not supported.
    """
    prefix = (*file.prefixes("", "controlnet_blocks."), "")[0]
    layout = {ours: StoredAs((theirs,)) for ours, theirs in RENAMES.items()}
    names = {name[len(prefix) :] for name in file.entries if name.startswith(prefix)}
    if "controlnet_blocks.0.weight" in names and "transformer_blocks.0.attn.to_q.weight" in names:
        other = next((n for n in ("context_embedder.weight", "pos_embed.proj.weight") if n in names), None)
        if other is not None:
            kind = "text blocks" if other.startswith("context") else "its own position embedding"
            raise Mistake(*file.where, f"is a ControlNet in diffusers' layout with {kind} ({other}); {LAYOUTS}")
        for i in range(count_layers(names, "transformer_blocks.")):
            for ours, theirs in BLOCK.items():
                for leaf in ("weight", "bias"):
                    pieces = tuple(f"transformer_blocks.{i}.{their}.{leaf}" for their in theirs)
                    layout[f"transformer_blocks.{i}.{ours}.{leaf}"] = StoredAs(pieces)
    elif "input_hint_block.0.weight" in names or any(n.startswith(("input_blocks.", "down_blocks.")) for n in names):
        raise Mistake(*file.where, f"is a ControlNet for SD 1, SD 2 or SDXL; {LAYOUTS}")
    return ModelTensors(file, prefix, layout)


def read_control_kind(tensors: ModelTensors) -> str:
    """The kind that the file names: blur, canny or depth, or an empty string if it names none. (8B ControlNets take
    canny images in another range.)

    Raises `Mistake` if the file's control_type is not a number.
    """
    shape = tensors.shapes.get("control_type")
    if shape is None:
        return ""
    (entry,) = tensors.entries("control_type")
    if shape not in ((), (1,)) or (entry.dtype not in readable_dtypes() and entry.dtype[0] not in "IU"):
        raise Mistake(*tensors.file.where, f"its control_type is not a number: {entry.dtype} {list(shape)}")
    ((_, value),) = tensors.read(["control_type"], "cpu", None)
    return CONTROL_TYPES.get(value.item(), "")
