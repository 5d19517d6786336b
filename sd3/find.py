"""Text encoders and tokenizers: in the model file, beside it, in a folder, in the hub's cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3.diffusers_names import StoredAs
from sd3.files import ENCODER_FOLDERS, ENCODER_PREFIX, ENCODERS, STEMS, WeightFile, weight_paths
from sd3.lora_file import LoraFile
from sd3.mistakes import Missing, Mistake, verbatim
from sd3.models import MODELS, SHIPPED, model_key, own_models_folder
from sd3.telling import size_in_words
from sd3.weights import ModelTensors


def models_folder(folder: str) -> Path:
    """The folder that `model_folder` names; raises `Missing`, or `Mistake` if it cannot be read."""
    if os.path.isdir(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise Mistake("model_folder", folder, "cannot be read")
        return Path(folder)
    if os.path.lexists(folder):
        raise Mistake("model_folder", folder, "is not a folder")
    raise Missing("model_folder", folder, "no such folder")


def model_folders(given: str | None) -> list[Path]:
    """The folders to look for models in, each once: `given` (`model_folder`), ./models, and the clone's own models.

    Raises Missing, or Mistake if `given` cannot be read.
    """
    folders = [models_folder(given)] if given else []
    folders += [folder for folder in (Path("models"), own_models_folder()) if os.path.isdir(folder)]
    once: dict[str, Path] = {}
    for folder in folders:
        once.setdefault(os.path.realpath(folder), folder)
    return list(once.values())


def list_models(*folders: str | Path) -> str:
    """Lists the models, encoders and tokenizers in folders, and the commands that download what is missing into the
    first of them.
    """
    places = [models_folder(str(folder)) for folder in folders]
    lines: list[str] = []
    names: set[str] = set()  # files found
    roles: set[str] = set()  # text encoders found, by their contents
    for place in places:
        lines.append(f"{place}:")
        for path in sorted(p.parent for p in place.glob("*/transformer") if os.path.isdir(p)):
            with _damage_listed(lines):
                file = WeightFile(path)
                size = size_in_words(sum(p.stat().st_size for p in {e.path for e in file.entries.values()}))
                lines.append(f"  found    {path.relative_to(place)}/  a model in diffusers layout, {size}")
                names.add(f"{model_key(path)}.safetensors")
        for path in weight_paths(place, "*", "*/*", "*/loras/*"):
            with _damage_listed(lines):
                file = WeightFile(path, folder=False)
                roles |= set() if model_key(path) == SHIPPED else list_roles(file)  # its encoders fit no other model
                size = size_in_words(path.stat().st_size)
                lines.append(f"  found    {path.relative_to(place)}  {_kind(file)}, {size}")
                names.add(path.name)
    return "\n".join([*lines, *_list_missing(places, names, roles)])


def _kind(file: WeightFile) -> str:
    """What a file is; of a LoRA also the model that it is for."""
    kind = file.looks_like()
    if kind == "a LoRA":
        with contextlib.suppress(Mistake):  # of an unsupported algorithm
            return LoraFile(file.path).summary()
    return kind


@contextlib.contextmanager
def _damage_listed(lines: list[str]) -> Iterator[None]:
    """Encloses reading a file: an error becomes a line."""
    try:
        yield
    except (Mistake, OSError) as error:
        lines.append(f"  damaged  {error}")


def _list_missing(places: list[Path], found: set[str], roles: set[str]) -> Iterator[str]:
    """Lines about the released models, text encoders and tokenizers: how to get those that are missing."""
    for name, row in MODELS.items():
        if not any(s.startswith((f"{name}.", f"{name}_incl")) for s in found):
            file = f"{name}.safetensors"
            yield f"  missing  {file}  hf download {row.hub} {file} --local-dir {places[0]}"
    for role, names in ENCODER_FILES.items():
        if role not in roles and not found & set(names):
            get = fetch_encoder(role, places[0]).removeprefix("get it with: ")
            yield f"  missing  {role}  {get}"
    for kind in TOKENIZER_FOLDERS:
        try:
            yield f"  found    {kind} tokenizer in {find_tokenizer(kind, places)}"
        except Missing as error:
            yield f"  missing  {kind} tokenizer  {str(error).split('get it with: ')[-1]}"


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


@dataclass(frozen=True)
class Fit:
    """Text widths that a model needs: pooled (CLIP-L and CLIP-G together), and tokens (T5's)."""

    pooled: int
    context: int

    def fits(self, role: str, encoder: ModelTensors, other: int | None) -> bool:
        """Whether an encoder's width fits `role`; other: the width of the other CLIP, if known."""
        width = encoder_width(role, encoder)
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


def encoder_width(role: str, encoder: ModelTensors) -> int | None:
    """Width of a text encoder; None if the tensors are not such an encoder's."""
    names = {"t5xxl": "encoder.embed_tokens.weight"}
    shape = encoder.shapes.get(names.get(role, "text_model.embeddings.token_embedding.weight"), ())
    return shape[1] if len(shape) == 2 else None


def find_encoders(
    roles: Iterable[str], model_file: WeightFile, folders: list[Path], given: dict[str, str | None], fit: Fit
) -> dict[str, ModelTensors]:
    """The text encoders by role (clip_l, clip_g, t5xxl).

    Search order: the given file; the model's own file or folder; in `folders` and their `text_encoders/` and `clip/`,
    a known file name, then a folder in diffusers layout, then any file by its contents. Raises `Mistake` for a damaged
    file or if several files fit; `Missing` says where it searched and how to get the encoder.
    """
    roles = list(roles)
    out: dict[str, ModelTensors] = {}
    for role in roles:
        if path := given.get(role):
            file = WeightFile(path, role, folder=False)
            out[role] = select_encoder(role, file, (*_prefix_inside(role, file, fit), *file.prefixes(role), "")[0])
        elif prefixes := _prefix_inside(role, model_file, fit):
            out[role] = select_encoder(role, model_file, prefixes[0])
        elif encoder := _find_by_name(role, folders) or _find_by_folder(role, folders, fit):
            out[role] = encoder
    for role in [role for role in roles if role not in out]:
        out[role] = _find_by_contents(role, model_file, folders, out, fit)
    return {role: out[role] for role in roles}


def _prefix_inside(role: str, file: WeightFile, fit: Fit) -> list[str]:
    """The prefix of an encoder in a file of several models, or []: a usual one, one that contains the role, or one
    under which an encoder of the right width is stored.
    """
    usual = [p for p in (ENCODER_PREFIX.format(role), ENCODER_FOLDERS[role]) if file.has(p)]
    if usual:
        return usual[:1]
    others = [p for p in file.prefixes(role) if p]
    with_role = [p for p in others if role in p]
    without_any = [p for p in others if not any(r in p for r in ENCODERS)]
    return (with_role or [p for p in without_any if fit.fits(role, select_encoder(role, file, p), None)])[:1]


def _encoder_folders(folders: list[Path]) -> list[Path]:
    return [place for f in folders for place in (f, f / "text_encoders", f / "clip")]


def _find_by_name(role: str, folders: list[Path]) -> ModelTensors | None:
    for place in _encoder_folders(folders):
        for name in ENCODER_FILES[role]:
            if os.path.exists(place / name):
                file = WeightFile(place / name, "model_folder", folder=False)
                return select_encoder(role, file, (*file.prefixes(role), "")[0])
    return None


def _find_by_folder(role: str, folders: list[Path], fit: Fit) -> ModelTensors | None:
    """The encoder in a folder named as in diffusers layout, single file or shards. Skips one that does not fit: FLUX
    keeps its T5 in `text_encoder_2`.
    """
    for place in (f / ENCODER_FOLDERS[role] for f in folders):
        if any(place.glob("*.safetensors")):
            encoder = _sole_encoder(role, WeightFile(place, "model_folder"))
            if encoder is not None and fit.fits(role, encoder, None):
                return encoder
    return None


def _find_by_contents(
    role: str, model_file: WeightFile, folders: list[Path], encoders: dict[str, ModelTensors], fit: Fit
) -> ModelTensors:
    """The only file that contains such an encoder and nothing else, in the first folder that has one.

    encoders: those already found, by role.
    """
    other = {"clip_l": "clip_g", "clip_g": "clip_l"}.get(role)
    width = encoder_width(other, encoders[other]) if other in encoders else None
    usual_names = {name for names in ENCODER_FILES.values() for name in names}
    used = {os.path.realpath(file.path) for file in [model_file, *(encoder.file for encoder in encoders.values())]}
    for folder in folders:
        found: dict[str, ModelTensors] = {}
        for path in (p for place in _encoder_folders([folder]) for p in weight_paths(place, "*")):
            hinted = [r for r in ("clip_l", "clip_g") if r in path.name.lower().replace("-", "_")]
            if path.name in usual_names or os.path.realpath(path) in used or (hinted and role not in hinted):
                continue
            with contextlib.suppress(Mistake):  # a file that cannot be read does not fit
                encoder = _sole_encoder(role, WeightFile(path, "model_folder", folder=False))
                if encoder is not None and fit.fits(role, encoder, width):
                    found.setdefault(os.path.realpath(path), encoder)
        if len(found) > 1:
            names = " and ".join(str(encoder.file.path) for encoder in found.values())
            raise Mistake(role, "", f"{verbatim(names)} both fit; name the right one with `{role}`")
        if found:
            return next(iter(found.values()))
    where = ", ".join(f"{f}/ and {f}/text_encoders/ and {f}/clip/" for f in folders)
    skip = ", or give `no_t5`" if role == "t5xxl" else ""
    why = (
        f"no {' or '.join(ENCODER_FILES[role][:3])} in {verbatim(where)}, and no other file contains one; name it "
        f"with `{role}`, or {fetch_encoder(role, folders[0])}{skip}"
    )
    raise Missing("model_folder", "", why)


def _sole_encoder(role: str, file: WeightFile) -> ModelTensors | None:
    """The encoder in a file that contains nothing else; None for other files."""
    prefixes = file.prefixes(role)
    if len(prefixes) != 1 or sum(n.startswith(prefixes[0]) for n in file.entries) < 0.9 * len(file.entries):
        return None
    others = [kind for kind in STEMS if STEMS[kind] != STEMS[role] and file.prefixes(kind)]
    return None if others else select_encoder(role, file, prefixes[0])


def list_roles(file: WeightFile) -> set[str]:
    """Roles of the text encoders in a file, by the widths of the released models."""
    fit, out = Fit(sum(CLIP_WIDTHS.values()), 4096), set()
    for role in ENCODERS:
        encoder = _sole_encoder(role, file)
        if _prefix_inside(role, file, fit) or (encoder is not None and fit.fits(role, encoder, None)):
            out.add(role)
    return out


def select_encoder(role: str, file: WeightFile, prefix: str) -> ModelTensors:
    """The encoder's tensors; T5's embedding is called `encoder.embed_tokens.weight`, `shared.weight` or both."""
    if role == "t5xxl" and prefix + "encoder.embed_tokens.weight" not in file.entries:
        return ModelTensors(file, prefix, {"encoder.embed_tokens.weight": StoredAs(("shared.weight",))})
    return ModelTensors(file, prefix)


def fetch_encoder(role: str, folder: Path) -> str:
    """The command that downloads a text encoder."""
    name = "t5xxl_fp16.safetensors" if role == "t5xxl" else ENCODER_FILES[role][0]
    return f"get it with: hf download {ENCODER_HUB} text_encoders/{name} --local-dir {folder}"


def find_tokenizer(kind: str, folders: list[Path]) -> Path:
    """The folder of the `clip` or `t5` tokenizer: in `folders`, their `text_encoders/`, else in the hub's cache.

    Never uses the network. Raises `Missing` that says where it searched and how to get the tokenizer.
    """
    places = [p / name for f in folders for p in (f, f / "text_encoders") for name in TOKENIZER_FOLDERS[kind]]
    for place in places:
        if any(all(os.path.exists(place / n) for n in names) for names in TOKENIZER_FILES[kind]):
            return place
    if cached := _cached_tokenizer(kind):
        return cached
    names = " or ".join(" and ".join(n) for n in TOKENIZER_FILES[kind])
    get = " ".join(n for names in TOKENIZER_FILES[kind] for n in names if n != "tokenizer.json")
    why = (
        f"no tokenizer ({names}) in {', '.join(map(str, places))} or the hub's cache; get it with: "
        f"hf download {TOKENIZER_HUB[kind]} {get} --local-dir {folders[0] / TOKENIZER_FOLDERS[kind][0]}"
    )
    raise Missing("model_folder", "", why)


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
