"""LoRAs: turns files into changes of weights, applied in float32 while each tensor loads.

Each module of a file is looked up among the names of the model's layers, in our spelling and in diffusers', with dots
and flattened to underscores. A flattened name is never split. diffusers' q, k and v are thirds of our fused layer, and
two of its norms store scale before shift, while ours store shift first. Formulas: `sd3/lora_kinds.py` and `Edit`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from other_impls import count_layers
from sd3.diffusers_names import diffusers_mmdit
from sd3.embed_cache import file_identity
from sd3.files import ENCODERS, contents, open_tensors
from sd3.headers import Entry
from sd3.lora_file import LoraFile, Module
from sd3.lora_kinds import BIASES, MAGNITUDES, Kind, Shape, kind_of, matrix, scale_of
from sd3.mistakes import Mistake, Where, display, verbatim
from sd3.readers import PatchFile
from sd3.reading import reading
from sd3.weights import ModelTensors, Patch

MOST_SCALE = 1e6  # limit of alpha / rank; a larger value means a damaged file and would overflow in float32
EPS = torch.finfo(torch.float32).eps  # added to DoRA's norms, as LyCORIS does
# Prefixes of module names, longest first, each with the model that it belongs to.
PREFIXES = tuple(
    sorted(
        [
            *((prefix, "mmdit") for prefix in (
                "", "transformer.", "base_model.model.", "transformer.base_model.model.", "diffusion_model.",
                "model.diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_",
            )),
            *(("lora_te_", "clip_l"), ("text_encoder.", "clip_l"), ("text_encoder_2.", "clip_g")),
            ("text_encoder_3.", "t5xxl"),
            *((f"lora_te{n}{mark}", role) for n, role in enumerate(ENCODERS, 1) for mark in "_."),
            *((f"{start}{role}.transformer.", role) for role in ENCODERS for start in ("text_encoders.", "")),
        ],
        key=lambda row: -len(row[0]),
    )
)  # fmt: skip
PART_NAMES = {"mmdit": "the MMDiT", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5xxl": "T5"}
_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of older diffusers
Load = Callable[[Entry], Tensor]


@dataclass(frozen=True)
class Target:
    """What a module changes: one of our layers, or one of `pieces` equal parts of its rows.

    swap: the file stores the two halves of the rows in the opposite order.
    """

    part: str
    layer: str
    piece: int = 0
    pieces: int = 1
    swap: bool = False
    dotted: str = ""  # the module's name in diffusers

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The target's rows of a tensor, as a view."""
        return tensor.chunk(self.pieces)[self.piece]


# ---- names ---------------------------------------------------------------------------------------


def layer_names(models: Mapping[str, ModelTensors]) -> dict[str, dict[str, Target]]:
    """The layers of each model, by every name that a LoRA may use for them after its prefix."""
    return {part: dict(_spelled(part, model.shapes)) for part, model in models.items() if part in PART_NAMES}


def _spelled(part: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Target]]:
    for name, target in _mmdit_names(shapes) if part == "mmdit" else _encoder_names(part, shapes):
        yield name, target
        yield name.replace(".", "_"), target


def _mmdit_names(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Target]]:
    for ours, stored in diffusers_mmdit(count_layers(shapes, "joint_blocks.")).items():
        if not ours.endswith(".weight"):
            continue
        layer, theirs = ours.removesuffix(".weight"), [name.removesuffix(".weight") for name in stored.names]
        yield layer, Target("mmdit", layer, dotted=theirs[0] if len(theirs) == 1 else layer)
        for i, name in enumerate(theirs):
            if name != layer:
                target = Target("mmdit", layer, i, len(theirs), stored.change == "swap", dotted=name)
                yield name, target
                if name.endswith("to_out.0"):  # older diffusers
                    yield name.removesuffix(".0"), target


def _encoder_names(part: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Target]]:
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    for layer in dict.fromkeys([*layers, "text_projection"]):
        target = Target(part, layer, dotted=layer)
        spelled = [layer, layer.removeprefix("text_model.")]  # newer versions of transformers have no such level
        start, dot, last = layer.rpartition(".")
        spelled += [start + dot + _OLD_ATTENTION[last]] if last in _OLD_ATTENTION else []
        yield from ((name, target) for name in dict.fromkeys(spelled))


@dataclass
class Found:
    """Result of looking up a file's modules.

    matched: module names by target; idle: known modules that change no tensor in use, with the reason; unknown: names
    that match no layer.
    """

    matched: dict[Target, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @classmethod
    def look_up(
        cls, lora: LoraFile, names: Mapping[str, Mapping[str, Target]], models: Mapping[str, ModelTensors]
    ) -> Found:
        """Looks up every module. Raises Mistake if two modules of the file change the same layer."""
        found = cls()
        for module in lora.modules:
            target, absent = _find(module, names)
            if target is None and absent:
                found.idle[module] = f"{PART_NAMES[absent]} is not loaded"
            elif target is None:
                found.unknown.append(module)
            elif not _is_used(target, models[target.part].shapes):
                found.idle[module] = "the model does not use these layers"
            elif target in found.matched:
                both = verbatim(f"{found.matched[target]} and {module}")
                raise Mistake(*lora.where, f"changes the same layer twice, in {both}")
            else:
                found.matched[target] = module
        return found

    def line(self, lora: LoraFile) -> str:
        """A line for the user: what matched and what did not."""
        counts = Counter(target.part for target in self.matched)
        line = f"`lora` {verbatim(display(str(lora.path)))}: {lora.algorithm()}, "
        line += ", ".join(
            f"{n} module{'s' * (n != 1)} of {PART_NAMES[part]}" for part in PART_NAMES if (n := counts[part])
        )
        for why, n in Counter(self.idle.values()).items():
            line += f"; {n} without effect: {why}"
        if n := len(self.unknown):
            verb = "match" if n > 1 else "matches"
            line += f"; {n} {verb} no layer of the model, such as {verbatim(display(self.unknown[0]))}"
        if n := lora.embeddings:
            line += f"; {n} textual inversion{'s' * (n != 1)}, not loaded"
        return line

    def why_none(self, lora: LoraFile) -> str:
        """Why no module matches, if so."""
        first = display(next(iter(lora.modules), ""))
        why = " and ".join(dict.fromkeys(self.idle.values()))
        if not self.unknown:
            return f"has no effect: {why} (such as {first})"
        made_for = f": it is for {made_for}" if (made_for := lora.made_for()) else ""
        others = f"; of its other modules: {why}" if why else ""
        return f"matches no layer of this model{made_for} (such as {display(self.unknown[0])}){others}"


def _find(module: str, names: Mapping[str, Mapping[str, Target]]) -> tuple[Target | None, str]:
    """The layer that a module changes, or None, and the model that its prefix names if that model is not loaded."""
    absent = ""
    for prefix, part in PREFIXES:
        if module.startswith(prefix):
            if part not in names:
                absent = absent or part
            elif target := names[part].get(module[len(prefix) :]):
                return target, ""
    return None, absent


def _is_used(target: Target, shapes: Mapping[str, Shape]) -> bool:
    """Whether the model has and uses the layer. SD3 does not use CLIP-L's projection, even if the file has it."""
    if (target.part, target.layer) == ("clip_l", "text_projection"):
        return False
    return f"{target.layer}.weight" in shapes


# ---- changes of tensors --------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """The change that a module makes to its layer's weight or bias, at a given strength."""

    lora: LoraFile
    target: Target
    module: Module
    kind: Kind | None  # of the weight
    scale: float
    strength: float

    def weight(self, weight: Tensor, load: Load) -> Tensor:
        """W + strength scale product. With a magnitude m (DoRA): W + strength (W' - W), where W' = V m / |V|,
        V = W + scale product, and |V| is the norm of each row, or of each column if m has one entry per column.

        `weight` must be contiguous and may be modified. Returns it or a new tensor.
        """
        t = {role: self._load(entry, weight, load) for role, entry in self.module.items() if role != "alpha"}
        if self.kind.name == "set weight":
            return weight.copy_(t["set_weight"].reshape(weight.shape))
        dora = next((role for role in MAGNITUDES if role in t), None)
        factor = self.scale * (1.0 if dora else self.strength)
        if self.kind.name == "LoRA" and "mid" not in t:
            down, up = matrix(t["down"]), matrix(t["up"])
            changed = weight.clone() if dora else weight
            matrix(changed).addmm_(up, down, alpha=factor)
        else:
            product = self.kind.product(t).reshape(weight.shape)
            changed = torch.add(weight, product, alpha=factor) if dora else weight.add_(product, alpha=factor)
        if dora is None:
            return changed
        magnitude, dims = _as_magnitude(t[dora], dora, weight)
        norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True) + EPS
        norm.masked_fill_(norm.isinf(), torch.nan)  # else W' is 0; `ModelTensors.read` reports NaN
        return torch.lerp(weight, changed * (magnitude / norm), self.strength)

    def bias(self, bias: Tensor, load: Load) -> Tensor:
        """b + strength scale `lora_B.bias` + strength `diff_b`, as far as the module has them."""
        out = bias
        for role, factor in (("up_bias", self.scale), ("diff_b", 1.0)):
            if role in self.module:
                out = torch.add(out, self._load(self.module[role], bias, load), alpha=factor * self.strength)
        return out

    def _load(self, entry: Entry, like: Tensor, load: Load) -> Tensor:
        return load(entry).float().to(like.device)


def _as_magnitude(magnitude: Tensor, role: str, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A DoRA magnitude in a shape that broadcasts over a weight (out, in, ...), and the axes of its norm."""
    every = range(weight.ndim)
    axis = 0 if _per_row(tuple(magnitude.shape), role) else 1
    shape = [-1 if i == axis else 1 for i in every]
    return magnitude.reshape(shape), tuple(i for i in every if i != axis)


def _per_row(shape: Shape, role: str) -> bool:
    """Whether a magnitude has one number per row: PEFT's always; LyCORIS' if it is (out, 1), not (1, in)."""
    return role == "magnitude" or len(shape) < 2 or shape[0] != 1


@dataclass(frozen=True)
class Change:
    """The change that a LoRA makes to one tensor of a model: a sequence of edits of its rows."""

    edits: tuple[Edit, ...]
    of_bias: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        """Returns the changed tensor. `tensor` is modified and may be the result itself."""
        with _open_tensors(self.edits[0].lora) as load:
            for edit in self.edits:
                target, apply = edit.target, edit.bias if self.of_bias else edit.weight
                if target.swap:
                    tensor = _swapped(apply(_swapped(tensor), load))
                elif target.pieces == 1:
                    tensor = apply(tensor, load)
                else:
                    rows = target.rows_of(tensor)
                    rows.copy_(apply(rows, load))
        return tensor


@contextlib.contextmanager
def _open_tensors(lora: LoraFile) -> Iterator[Load]:
    """A function that reads tensors of a LoRA. Raises Mistake if the file cannot be read."""
    with contextlib.ExitStack() as stack:
        with reading(lora.where, "cannot be read"):
            load = stack.enter_context(open_tensors(lora.where, lora.weights))

        def read(entry: Entry) -> Tensor:
            with reading(lora.where, "cannot be read"):
                return load(entry)

        yield read


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


# ---- checks --------------------------------------------------------------------------------------


def _check_model(lora: LoraFile, model: ModelTensors) -> None:
    """Raises Mistake if the LoRA is for an MMDiT of another size."""
    depth, width = count_layers(model.shapes, "joint_blocks."), model.shapes["x_embedder.proj.weight"][0]
    other = lora.width not in (None, width) or lora.blocks > depth
    if other and lora.made_for():
        made_for = lora.made_for()
        size = f"{depth} of {width}" if made_for.endswith(")") else f"{depth} blocks of width {width}"
        raise Mistake(*lora.where, verbatim(f"is for {made_for}; this model has {size}"))
    dual = [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in model.shapes]
    if missing := sorted(set(lora.dual) - set(dual)):
        has = f"one in {len(dual)} blocks" if dual else "none"
        why = f"is for {lora.made_for() or 'a model'} with a second attention in block {missing[0]}"
        raise Mistake(*lora.where, f"{verbatim(why)}; this model has {has}")


def _check_shapes(edit: Edit, name: str, shapes: Mapping[str, Shape]) -> None:
    """Raises Mistake if a module's tensors do not fit the layer that they change."""
    target, module = edit.target, edit.module

    def refuse(role: str, has: str, needs: str) -> None:
        entry = next((module[r] for r in (role, "up", "lokr_w1", "hada_w1_a") if r in module), None)
        what = entry.name if entry else name
        raise Mistake(*edit.lora.where, verbatim(f"{what} does not fit: {has}, the model has {needs}"))

    whole = shapes[f"{target.layer}.weight"]
    rows = whole[0] // target.pieces
    if edit.kind is not None:
        shape = edit.kind.shape(module)
        needs = (rows, *whole[1:])
        if not shape or shape[0] != rows or math.prod(shape) != math.prod(needs):
            refuse("down", f"the change is {_text(shape)}", _text(needs))
    for role in BIASES:
        if role in module:
            bias = shapes.get(f"{target.layer}.bias")
            if bias is None or module[role].shape != (rows,):
                refuse(role, f"it is {_text(module[role].shape)}", _text((rows,)) if bias else "no bias")
    for role in MAGNITUDES:
        if role in module:
            shape = module[role].shape
            needs = rows if _per_row(shape, role) else whole[1]
            if math.prod(shape) != needs:
                refuse(role, f"it is {_text(shape)}", f"{rows} rows and {math.prod(whole[1:])} columns")


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _check_numbers(lora: LoraFile, edits: Iterable[Edit]) -> bool:
    """Reads every tensor in use and raises Mistake for NaN or infinity. Returns whether a fused qkv is block-diagonal,
    as kohya's `split_qkv` writes it.
    """
    split = "split_qkv" in lora.metadata.get("ss_network_args", "")
    with _open_tensors(lora) as load:
        for edit in edits:
            for role, entry in edit.module.items():
                tensor = load(entry)
                if not torch.isfinite(tensor.float()).all():
                    raise Mistake(*lora.where, f"{verbatim(entry.name)} contains NaN or infinity")
                if role == "up" and edit.target.layer.endswith("attn.qkv") and edit.target.pieces == 1:
                    split = split or _is_split(tensor.float())
    return split


def _is_split(up: Tensor) -> bool:
    """Whether a matrix (3D, 3r) is zero outside its three diagonal blocks (D, r) and nonzero in each of them."""
    if up.ndim != 2 or up.shape[0] % 3 or up.shape[1] % 3:
        return False
    blocks = [rows.chunk(3, dim=1) for rows in up.chunk(3)]
    return all(bool(block.any()) == (i == j) for i, row in enumerate(blocks) for j, block in enumerate(row))


# ---- patches -------------------------------------------------------------------------------------


def _edits(lora: LoraFile, found: Found, models: Mapping[str, ModelTensors], strength: float) -> list[Edit]:
    """The edits of a file, checked by header against the model. Raises Mistake."""
    out = []
    for target, name in found.matched.items():
        module = lora.modules[name]
        try:
            kind = kind_of(module)
            settings = lora.settings_for(target.part)
            edit = Edit(lora, target, module, kind, scale_of(kind, module, target.dotted, settings), strength)
            _check_shapes(edit, name, models[target.part].shapes)
        except Mistake:
            raise
        except ValueError as error:
            raise Mistake(*lora.where, f"{verbatim(display(name))} {verbatim(str(error))}") from None
        if not abs(edit.scale) <= MOST_SCALE:  # NaN too
            why = f"has a scale (alpha / rank) of {edit.scale:g}; at most {MOST_SCALE:g} is supported"
            raise Mistake(*lora.where, f"{verbatim(display(name))} {why}")
        out.append(edit)
    return out


def _open(
    file: PatchFile, names: Mapping[str, Mapping[str, Target]], models: Mapping[str, ModelTensors]
) -> tuple[list[Edit], str]:
    """The edits of a file, and a line about them for the user. Raises Mistake if the file does not fit the models."""
    lora = LoraFile(file.path)
    _check_model(lora, models["mmdit"])
    found = Found.look_up(lora, names, models)
    if not found.matched:
        raise Mistake(*lora.where, verbatim(found.why_none(lora)))
    edits = _edits(lora, found, models, file.strength)
    line = found.line(lora)
    whole = not (found.idle or found.unknown or lora.embeddings)
    if _check_numbers(lora, edits):
        line += (
            "; q, k and v have separate LoRAs in one file: if they were trained with kohya's split_qkv, they act at a "
            "third of the strength"
        )
        whole = False
    return edits, line if whole else f"note: {line}"


def _patches(edits: Iterable[Edit], identity: str, note: str, where: Where) -> dict[str, Patch]:
    """The patch of each model that a file changes. The first one has the note."""
    changes: dict[str, dict[str, list[Edit]]] = {}
    for edit in edits:
        of_part = changes.setdefault(edit.target.part, {})
        if edit.kind is not None:
            of_part.setdefault(f"{edit.target.layer}.weight", []).append(edit)
        if edit.module.keys() & set(BIASES):
            of_part.setdefault(f"{edit.target.layer}.bias", []).append(edit)
    out: dict[str, Patch] = {}
    for part, by_name in changes.items():
        of_part = {name: Change(tuple(own), name.endswith(".bias")) for name, own in by_name.items()}
        out[part] = Patch(of_part, identity, () if out else (note,), where)
    return out


def read_lora(files: Sequence[PatchFile], models: Mapping[str, ModelTensors]) -> dict[str, list[Patch]]:
    """The patches of each model, one per file that changes it (see `sd3/patches.py`); none for strength 0. Raises
    Mistake before any weights load.
    """
    names = layer_names(models)
    out: dict[str, list[Patch]] = {}
    for file in files:
        edits, line = _open(file, names, models)
        if not file.strength:
            continue
        identity = json.dumps([[file_identity(path) for path in contents(Path(file.path))], file.strength])
        for part, patch in _patches(edits, identity, line, Where("lora", file.path)).items():
            out.setdefault(part, []).append(patch)
    return out
