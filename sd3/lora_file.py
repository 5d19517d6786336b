"""Contents of a LoRA file: modules, algorithms, settings and trigger words, read from the header. Needs no torch.

A key is `<module><suffix>`. `ROLES` gives the meaning of each suffix; `sd3/lora.py` looks the modules up in the model.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3.files import ADAPTER, ADAPTER_CONFIG, LORA_FILES, WeightFile, lora_in, readable_dtypes, weight_paths
from sd3.headers import Entry
from sd3.mistakes import Missing, Mistake, Where, display, verbatim
from sd3.reading import check_file, parse_json, reading

# Suffix of a key -> role of its tensor, as public programs write them.
ROLES = {
    ".lora_A.weight": "down", ".lora_A": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    "_lora.down.weight": "down", ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up", ".lora_B": "up", ".lora_up.weight": "up", ".lora.up.weight": "up",
    "_lora.up.weight": "up", ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid", ".lora_B.bias": "up_bias", ".alpha": "alpha",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".dora_scale": "dora_scale", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".magnitude": "magnitude",
    ".diff": "diff", ".diff_b": "diff_b", ".set_weight": "set_weight", ".w_norm": "diff", ".b_norm": "diff_b",
}  # fmt: skip
_SUFFIXES = sorted(ROLES, key=len, reverse=True)
# Suffix -> name of the unsupported algorithm that it identifies.
REFUSED = {
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".oft_R.weight": "OFT", ".oft_r": "OFT", ".rescale": "OFT or BOFT",
    ".boft_R": "BOFT", ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA",
    ".on_input": "IA3", ".ia3_l": "IA3", ".reshape_weight": "reshape_weight (a control LoRA)",
    ".lora_E": "AdaLoRA", ".lora_ranknum": "AdaLoRA", ".vera_lambda_b": "VeRA", ".vera_lambda_d": "VeRA",
}  # fmt: skip
_PEFT_NAMES = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|lokr_\w+|hada_\w+))\.default(?=$|\.weight$|\.bias$)")
ALGORITHMS = {"down": "LoRA", "up": "LoRA", "mid": "LoCon", "hada_": "LoHa", "lokr_": "LoKr", "set_": "set weights"}
EMBEDDING = "bundle_emb."  # textual inversions that OneTrainer stores with a LoRA
# Patterns of module names that only other models have.
OTHER_MODELS = (
    (r"single_transformer_blocks|double_blocks|single_blocks", "FLUX"),
    (r"(down|up|input|output|middle|mid)_blocks?[._]|^unet\.", "SD 1, SD 2 or SDXL"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan"),
)
COMPONENTS = {"mmdit": "transformer", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
FAMILIES = (
    ("lora_unet_", "kohya"), ("lora_transformer_", "OneTrainer"), ("lycoris_", "LyCORIS"),
    ("transformer.", "diffusers"), ("base_model.model.", "PEFT"), ("diffusion_model.", "ComfyUI"),
    ("text_encoders.", "ComfyUI"), ("text_encoder", "diffusers"), ("lora_te", "kohya"),
)  # fmt: skip
MODELS_OF_WIDTH = {1536: "SD3 Medium or SD3.5 Medium", 2432: "SD3.5 Large"}
# Layers of an MMDiT whose inputs, and layers whose outputs, have the model's width.
_OF_WIDTH = re.compile(r"(attn2?[._](to_[qkv]|add_[qkv]_proj|qkv|proj|to_out|to_add_out)|norm1(_context)?[._]linear"
                       r"|adaLN_modulation[._]1|mlp[._]fc1|ff(_context)?[._]net[._]0[._]proj)([._]0)?$")  # fmt: skip
_TO_WIDTH = re.compile(r"(mlp[._]fc2|ff(_context)?[._]net[._]2)$")
# The adaLN layers of blocks that may have a second attention: 9 outputs of the model's width if so, else 6.
_ADALN = re.compile(r"(x_block[._]adaLN_modulation[._]1|norm1[._]linear)$")
_BLOCK = re.compile(r"(?:joint_blocks|transformer_blocks)[._](\d{1,6})[._]")
Module = Mapping[str, Entry]  # tensors by role


@dataclass(frozen=True)
class PeftSettings:
    """PEFT's configuration of one component, as far as the scale depends on it."""

    r: float | None = None
    alpha: float | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> PeftSettings:
        """Reads a LoraConfig, LoHaConfig or LoKrConfig. Raises ValueError for values that are not numbers."""
        alpha = values.get("lora_alpha", values.get("alpha"))
        rslora = values.get("use_rslora") or False
        if not isinstance(rslora, bool):
            raise ValueError(f"use_rslora must be true or false, not {rslora!r:.60}")
        patterns = [_read_pattern(name, values.get(name)) for name in ("rank_pattern", "alpha_pattern")]
        return cls(_read_number("r", values.get("r")), _read_number("alpha", alpha), rslora, *patterns)

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, given its name in diffusers."""
        return _of_pattern(self.alpha_pattern, module, self.alpha)

    def rank_of(self, module: str) -> float | None:
        """The configured rank of a module, given its name in diffusers."""
        return _of_pattern(self.rank_pattern, module, self.r)


def _read_number(name: str, value: Any) -> float | None:
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{name} must be a number, not {value!r:.60}")


MOST_REPEATS = 4  # in a regular expression; more may take longer than anybody waits


def _read_pattern(name: str, values: Any) -> dict[str, float]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object, not {values!r:.60}")
    for key, value in values.items():
        if _read_number(f"{name} {key}", value) is None:
            raise ValueError(f"{name} {key} must be a number, not null")
        if len(key) > 1000 or len(re.findall(r"[*+{]", key)) > MOST_REPEATS or re.search(r"\)[*+{]", key):
            raise ValueError(f"{name} has a key that could take very long to match: {key!r:.60}")
        try:
            re.compile(_whole(key))
        except re.error as error:
            raise ValueError(f"{name} {key!r:.60} is not a regular expression ({error})") from None
    return values


def _of_pattern(pattern: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
    """The value of the first key that matches, by PEFT's rule (`peft.utils.get_pattern_key`)."""
    return next((v for key, v in pattern.items() if re.match(_whole(key), module)), otherwise)


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"


class LoraFile:
    """The header of a LoRA, which is a file, or a folder that PEFT or diffusers saved. Reads no weights.

    modules: for each module name in the file, its tensors by role; embeddings: number of textual inversions.
    """

    def __init__(self, path: str | Path, field: str = "lora"):
        """Raises Missing, or Mistake if the file is damaged, is not a LoRA, or uses an unsupported algorithm."""
        self.path = Path(path)
        self.where = Where(field, self.path)
        self.weights = self._find_weights(field)
        file = WeightFile(self.weights, field, folder=False)
        self.entries, self.metadata = file.entries, file.metadata
        self._check_kind(file)
        self.modules: dict[str, dict[str, Entry]] = {}
        self.embeddings = len({key.split(".")[1] for key in self.entries if key.startswith(EMBEDDING)})
        for key, entry in self.entries.items():
            if not key.startswith(EMBEDDING):
                self._add(key, entry)

    def _find_weights(self, field: str) -> Path:
        if not os.path.isdir(self.path):
            return self.path
        if weights := lora_in(self.path):
            return weights
        why = f"contains neither {' nor '.join(LORA_FILES)}"
        if len(others := weight_paths(self.path, "*")) == 1:
            why += f"; if you mean the file in it, give {verbatim(display(others[0]))}"
        pickles = (Path(name).with_suffix(".bin") for name in LORA_FILES)
        if pickled := next((name for name in pickles if (self.path / name).exists()), None):
            why += f"; {pickled} is a pickle, which is not loaded"
        raise Missing(field, self.path, why)

    def _check_kind(self, file: WeightFile) -> None:
        """Raises Mistake if the file is not a LoRA or uses an unsupported algorithm."""
        if "lora_controlnet" in file.entries:
            raise Mistake(*self.where, "is a control LoRA, which this program does not support")
        for key in file.entries:
            if name := next((name for suffix, name in REFUSED.items() if key.endswith(suffix)), None):
                raise Mistake(*self.where, f"uses {name}, which this program does not support ({verbatim(key)})")
        if not any(split_key(key)[1] for key in file.entries):
            kind, first = file.looks_like(), _first(file.entries)
            if kind == "a LoRA":
                raise Mistake(*self.where, f"uses an unknown LoRA algorithm ({first})")
            turn = "; give it with `model`" if kind in ("an SD3-type MMDiT", "a diffusers transformer") else ""
            raise Mistake(*self.where, f"is not a LoRA: it looks like {kind} (such as {first}){turn}")

    def _add(self, key: str, entry: Entry) -> None:
        module, role = split_key(key)
        if not role:
            raise Mistake(*self.where, f"contains an unknown tensor: {verbatim(display(key))}")
        of_module = self.modules.setdefault(module, {})
        if role in of_module:
            both = verbatim(f"{of_module[role].name} and {key}")
            raise Mistake(*self.where, f"contains the same tensor twice, as {both}")
        whole = entry.dtype.lstrip("IU").isdigit() and role == "alpha"
        if entry.dtype not in readable_dtypes() and not whole:
            why = f"has the unsupported dtype {entry.dtype} (supported: {', '.join(readable_dtypes())})"
            raise Mistake(*self.where, f"{verbatim(key)} {why}")
        if role != "alpha" and 0 in entry.shape:
            raise Mistake(*self.where, f"{verbatim(key)} is empty: its shape is {list(entry.shape)}")
        if role == "alpha" and math.prod(entry.shape) != 1:
            raise Mistake(*self.where, f"{verbatim(key)} must be a single number, not {list(entry.shape)}")
        of_module[role] = entry

    # -- PEFT's configuration --

    @cached_property
    def config(self) -> dict[str, PeftSettings]:
        """PEFT's settings by component (a value of `COMPONENTS`, or an empty string for all), from the header's
        metadata or from the configuration file of an adapter. Raises Mistake if they cannot be read.
        """
        path = self.weights.with_name(ADAPTER_CONFIG)
        if self.weights.name == ADAPTER and path.exists():
            where = Where(self.where.field, path)
            check_file(where, path)
            with reading(where, "is damaged"):
                return {"": PeftSettings.read(_read_object(path.read_text(encoding="utf-8-sig")))}
        text = self.metadata.get("lora_adapter_metadata")
        if text is None:
            return {}
        with reading(self.where, "its lora_adapter_metadata is damaged"):
            values = _read_object(text)
            parts: dict[str, dict[str, Any]] = {}
            for key, value in values.items():
                component, dot, name = key.partition(".")
                known = bool(dot) and component in COMPONENTS.values()
                parts.setdefault(component if known else "", {})[name if known else key] = value
            return {component: PeftSettings.read(settings) for component, settings in parts.items()}

    def settings_for(self, part: str) -> PeftSettings | None:
        """PEFT's settings for the modules of one model (mmdit, clip_l, ...), or None if the file has none."""
        whole = self.config.get("") if part == "mmdit" or self.weights.name == ADAPTER else None
        return self.config.get(COMPONENTS.get(part, "")) or whole

    # -- description --

    def algorithm(self) -> str:
        """The algorithms that the modules use, such as `LoRA` or `LoKr, DoRA`."""
        roles = {role for module in self.modules.values() for role in module}
        names = [name for start, name in ALGORITHMS.items() if any(role.startswith(start) for role in roles)]
        names += ["full differences"] if roles & {"diff", "diff_b"} else []
        names += ["DoRA"] if roles & {"dora_scale", "magnitude"} else []
        return ", ".join(dict.fromkeys(names))

    def family(self) -> str:
        """The program that wrote the file, or the naming scheme if several programs share it."""
        if "ai-toolkit" in self.metadata.get("software", ""):
            return "ai-toolkit"
        counts = Counter(name for key in self.modules for start, name in FAMILIES if key.startswith(start))
        return counts.most_common(1)[0][0] if counts else "names without a prefix"

    def ranks(self) -> list[int]:
        """The distinct ranks of the modules, sorted."""
        return sorted({rank for module in self.modules.values() if (rank := rank_of(module))})

    def alphas(self) -> list[float]:
        """The distinct alphas stored with the modules, else those of PEFT's settings; empty if there are none."""
        stored = {read_number(module["alpha"]) for module in self.modules.values() if "alpha" in module}
        configured = {settings.alpha for settings in self.config.values() if settings.alpha is not None}
        return sorted(stored or configured)

    @property
    def blocks(self) -> int:
        """One more than the highest MMDiT block number in the module names."""
        numbers = (int(match[1]) for module in self.modules if (match := _BLOCK.search(module)))
        return max(numbers, default=-1) + 1

    @property
    def dual(self) -> list[int]:
        """The blocks whose second attention the LoRA changes."""
        return sorted({int(m[1]) for name in self.modules if (m := _BLOCK.search(name)) and self._is_dual(name)})

    def _is_dual(self, name: str) -> bool:
        """Whether a module belongs to a second attention, or is an adaLN layer with 9 outputs of the model's width."""
        if re.search(r"[._]attn2[._]", name):
            return True
        rows, columns = matrix_size(self.modules[name])
        return bool(_ADALN.search(name)) and bool(columns) and rows == 9 * columns

    @property
    def width(self) -> int | None:
        """Width of the MMDiT that the LoRA is for: the most common one, or None if no module shows it."""
        widths: Counter[int | None] = Counter()
        for name, module in self.modules.items():
            if _BLOCK.search(name):
                rows, columns = matrix_size(module)
                widths[columns if _OF_WIDTH.search(name) else rows if _TO_WIDTH.search(name) else None] += 1
        del widths[None]
        return widths.most_common(1)[0][0] if widths else None

    def made_for(self) -> str:
        """The model that the LoRA is for, in words; empty if the module names do not show it."""
        for pattern, name in OTHER_MODELS:
            if any(re.search(pattern, module) for module in self.modules):
                return name
        if self.width is None:
            return ""
        known = "SD3.5 Medium" if self.dual and self.width == 1536 else MODELS_OF_WIDTH.get(self.width, "a model")
        return f"{known} ({self.blocks} block{'s' * (self.blocks != 1)} of width {self.width})"

    def trigger_words(self) -> list[str]:
        """Trigger words from the metadata: trigger phrases, and the most frequent training tags."""
        out = [v for k, v in self.metadata.items() if "trigger" in k.lower() and v and len(v) < 500]
        tags: Counter[str] = Counter()
        try:
            for counts in _read_object(self.metadata.get("ss_tag_frequency", "{}")).values():
                tags.update({tag: int(count) for tag, count in counts.items()})
        except (ValueError, TypeError, AttributeError, OverflowError):
            tags.clear()
        return out + [tag for tag, _ in tags.most_common(10)]

    def summary(self) -> str:
        """Model, algorithm and rank in a few words, for a list of files."""
        made_for = f" for {self.made_for()}" if self.made_for() else ""
        ranks = f", rank {_range(self.ranks())}" if self.ranks() else ""
        algorithm = self.algorithm().removeprefix("LoRA").removeprefix(", ")  # the line begins with that word
        return f"a LoRA{made_for}{algorithm and f', {algorithm}'}{ranks}"


def split_key(key: str) -> tuple[str, str]:
    """The module and the role of a key. The role is empty if the suffix is unknown."""
    plain = _PEFT_NAMES.sub(r"\1", key)
    for suffix in _SUFFIXES:
        if plain.endswith(suffix):
            return plain.removesuffix(suffix).replace(".processor", ""), ROLES[suffix]
    return key, ""


def rank_of(module: Module) -> int | None:
    """The rank of a module, or None if it has none."""
    for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if role in module and module[role].shape:
            return module[role].shape[axis]
    return None


# The tensors whose rows, and those whose columns, are those of the changed matrix. LoKr has two factors of each.
_SIDES = (
    (("up", "down"),), (("hada_w1_a", "hada_w1_b"),), (("diff", "diff"),), (("set_weight", "set_weight"),),
    *(((f"lokr_w1{a}", f"lokr_w1{b}"), (f"lokr_w2{c}", f"lokr_w2{d}"))
      for a, b in (("", ""), ("_a", "_b")) for c, d in (("", ""), ("_a", "_b"))),
)  # fmt: skip


def matrix_size(module: Module) -> tuple[int, int] | tuple[None, None]:
    """Rows and columns of the matrix that a module changes; None twice for a convolution or an incomplete module."""
    for factors in _SIDES:
        shapes = [module[role].shape for pair in factors for role in pair if role in module]
        if len(shapes) == 2 * len(factors) and all(len(shape) == 2 for shape in shapes):
            return math.prod(shape[0] for shape in shapes[::2]), math.prod(shape[1] for shape in shapes[1::2])
    return None, None


_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


def read_number(entry: Entry) -> float:
    """Reads a tensor with a single number. NaN if its dtype is not supported."""
    with open(entry.path, "rb") as f:
        f.seek(entry.place)
        data = f.read(entry.size)
    if entry.dtype == "BF16":  # the upper half of a float32
        data, form = b"\0\0" + data, "<f"
    else:
        form = _NUMBERS.get(entry.dtype, "")
    return float(struct.unpack(form, data)[0]) if form and struct.calcsize(form) == len(data) else math.nan


def _read_object(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return values


def _first(names: Mapping[str, Any]) -> str:
    return verbatim(display(next(iter(names))))


def _range(numbers: Sequence[float]) -> str:
    ends = [f"{n:g}" for n in dict.fromkeys((numbers[0], numbers[-1]))]
    return " to ".join(ends)


def describe(path: str, field: str = "info") -> str:
    """The text of `--info` for a LoRA: family, algorithm, ranks, alphas, modules, trigger words. Raises Mistake."""
    file = LoraFile(path, field)
    return "\n".join([f"{path}: {file.summary()}", "", *_lines(file)])


def _lines(file: LoraFile) -> Iterator[str]:
    yield f"  {'family':<32}{file.family()}"
    yield f"  {'algorithm':<32}{file.algorithm()}"
    if ranks := file.ranks():
        yield f"  {'rank':<32}{_range(ranks)}"
    alphas = file.alphas()
    yield f"  {'alpha':<32}{_range(alphas) if alphas else 'none: equal to the rank'}"
    kinds = Counter(_place(name) for name in file.modules)
    yield f"  {'modules':<32}{len(file.modules)}"
    yield from (f"    {display(kind):<29} {count}" for kind, count in sorted(kinds.items()))
    if file.embeddings:
        yield f"  {'textual inversions':<32}{file.embeddings}, not loaded"
    for name in ("modelspec.title", "ss_output_name"):
        if value := file.metadata.get(name):
            yield f"  {name.split('.')[-1]:<32}{display(value)}"
    if words := file.trigger_words():
        yield f"  {'trigger words':<32}{display(', '.join(words))}"


def _place(module: str) -> str:
    """The text encoder that a module belongs to, or the kind of its layer in the MMDiT."""
    for start, name in (
        ("lora_te1", "CLIP-L"), ("lora_te_", "CLIP-L"), ("text_encoder.", "CLIP-L"), ("lora_te2", "CLIP-G"),
        ("text_encoder_2", "CLIP-G"), ("lora_te3", "T5"), ("text_encoder_3", "T5"),
        ("text_encoders.clip_l", "CLIP-L"), ("text_encoders.clip_g", "CLIP-G"), ("text_encoders.t5xxl", "T5"),
    ):  # fmt: skip
        if module.startswith(start):
            return name
    match = _BLOCK.search(module)
    return module[match.end() :] if match else module
