"""Contents of a LoRA file: modules, algorithms, settings and words, read from the header. Needs no torch.

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

from sd3.files import ADAPTER, ADAPTER_CONFIG, WeightFile, readable_dtypes
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
    ".on_input": "IA3", ".ia3_l": "IA3", ".reshape_weight": "a control LoRA, which reshapes weights",
    ".lora_E": "AdaLoRA", ".lora_ranknum": "AdaLoRA", ".vera_lambda_b": "VeRA", ".vera_lambda_d": "VeRA",
}  # fmt: skip
_PEFT_NAMES = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|lokr_\w+|hada_\w+))\.default(?=$|\.weight$|\.bias$)")
ALGORITHMS = {"down": "LoRA", "up": "LoRA", "mid": "LoCon", "hada_": "LoHa", "lokr_": "LoKr", "set_": "set weights"}
EMBEDDING = "bundle_emb."  # words that OneTrainer stores beside a LoRA
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
# Layers of an MMDiT whose inputs have the model's width.
_OF_WIDTH = re.compile(r"(attn2?[._](to_[qkv]|add_[qkv]_proj|qkv|proj|to_out|to_add_out)|norm1(_context)?[._]linear"
                       r"|adaLN_modulation[._]1|mlp[._]fc1|ff(_context)?[._]net[._]0[._]proj)([._]0)?$")  # fmt: skip
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
            raise ValueError(f"use_rslora is {rslora!r:.60}")
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
    raise ValueError(f"{name} is {value!r:.60}")


MOST_REPEATS = 4  # in a regular expression; more may take longer than anybody waits


def _read_pattern(name: str, values: Any) -> dict[str, float]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r:.60}")
    for key, value in values.items():
        if _read_number(f"{name} {key}", value) is None:
            raise ValueError(f"{name} {key} is None")
        if len(key) > 1000 or len(re.findall(r"[*+{]", key)) > MOST_REPEATS or re.search(r"\)[*+{]", key):
            raise ValueError(f"{name} has a key that could take very long to match: {key!r:.60}")
        try:
            re.compile(_whole(key))
        except re.error as error:
            raise ValueError(f"{name} {key!r:.60} is no regular expression ({error})") from None
    return values


def _of_pattern(pattern: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
    """The value of the first key that matches, by PEFT's rule (`peft.utils.get_pattern_key`)."""
    return next((v for key, v in pattern.items() if re.match(_whole(key), module)), otherwise)


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"


class LoraFile:
    """The header of a LoRA, which is a file or the folder of a PEFT adapter. Reads no weights.

    modules: for each module name in the file, its tensors by role; embeddings: number of trained words in the file.
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
        if not (self.path / ADAPTER).exists():
            pickled = (self.path / "adapter_model.bin").exists()
            why = "holds only a pickled adapter_model.bin, which is not loaded" if pickled else f"holds no {ADAPTER}"
            raise Missing(field, self.path, why)
        return self.path / ADAPTER

    def _check_kind(self, file: WeightFile) -> None:
        """Raises Mistake if the file is not a LoRA or uses an unsupported algorithm."""
        if "lora_controlnet" in file.entries:
            raise Mistake(*self.where, "is a control LoRA, which is not read")
        for key in file.entries:
            if name := next((name for suffix, name in REFUSED.items() if key.endswith(suffix)), None):
                raise Mistake(*self.where, f"is of an algorithm that is not read: {name} ({verbatim(key)})")
        if not any(split_key(key)[1] for key in file.entries):
            kind = file.looks_like()
            what = "a LoRA of an unknown algorithm" if kind == "a LoRA" else kind
            turn = "; give it with `model`" if kind in ("an SD3-type MMDiT", "a diffusers transformer") else ""
            raise Mistake(*self.where, f"is not a LoRA: it looks like {what} (such as {_first(file.entries)}){turn}")

    def _add(self, key: str, entry: Entry) -> None:
        module, role = split_key(key)
        if not role:
            raise Mistake(*self.where, f"holds a tensor that is not read: {verbatim(display(key))}")
        of_module = self.modules.setdefault(module, {})
        if role in of_module:
            raise Mistake(
                *self.where, f"holds two tensors for one place: {verbatim(f'{of_module[role].name} and {key}')}"
            )
        whole = entry.dtype.lstrip("IU").isdigit() and role == "alpha"
        if entry.dtype not in readable_dtypes() and not whole:
            raise Mistake(*self.where, f"{verbatim(key)} is {entry.dtype}; {', '.join(readable_dtypes())} are read")
        if role != "alpha" and 0 in entry.shape:
            raise Mistake(*self.where, f"{verbatim(key)} has no numbers in it: {list(entry.shape)}")
        if role == "alpha" and math.prod(entry.shape) != 1:
            raise Mistake(*self.where, f"{verbatim(key)} must be a single number, it has {list(entry.shape)}")
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
        found = {int(m[1]) for name in self.modules if re.search(r"[._]attn2[._]", name) and (m := _BLOCK.search(name))}
        return sorted(found)

    @property
    def width(self) -> int | None:
        """Width of the MMDiT that the LoRA is for: the most common input width, or None if no module shows it."""
        widths = Counter(
            columns
            for name, module in self.modules.items()
            if _BLOCK.search(name) and _OF_WIDTH.search(name) and (columns := columns_of(module))
        )
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
        return f"a LoRA{made_for}, {self.algorithm()}{ranks}"


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


def columns_of(module: Module) -> int | None:
    """Number of inputs of the layer that a module changes, or None if its tensors do not show it directly."""
    for role in ("down", "hada_w1_b", "diff", "set_weight"):
        if role in module and len(module[role].shape) == 2:
            return module[role].shape[1]
    return None


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
        raise ValueError("it is no object")
    return values


def _first(names: Mapping[str, Any]) -> str:
    return verbatim(display(next(iter(names))))


def _range(numbers: Sequence[float]) -> str:
    ends = [f"{n:g}" for n in dict.fromkeys((numbers[0], numbers[-1]))]
    return " to ".join(ends)


def describe(path: str, field: str = "info") -> str:
    """The text of `--info` for a LoRA: family, algorithm, ranks, alphas, modules, words. Raises Mistake."""
    file = LoraFile(path, field)
    return "\n".join([f"{path}: {file.summary()}", "", *_lines(file)])


def _lines(file: LoraFile) -> Iterator[str]:
    yield f"  {'family':<32}{file.family()}"
    yield f"  {'algorithm':<32}{file.algorithm()}"
    if ranks := file.ranks():
        yield f"  {'rank':<32}{_range(ranks)}"
    alphas = file.alphas()
    yield f"  {'alpha':<32}{_range(alphas) if alphas else 'none: as rank'}"
    kinds = Counter(_place(name) for name in file.modules)
    yield f"  {'modules':<32}{len(file.modules)}"
    yield from (f"    {display(kind):<30}{count}" for kind, count in sorted(kinds.items()))
    if file.embeddings:
        yield f"  {'words of its own':<32}{file.embeddings}, not loaded"
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
