"""Weight files: formats, folders in diffusers layout, name prefixes, hashes. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sd3.headers import SAFETENSORS, Entry, Format
from sd3.mistakes import Missing, Mistake, Where, verbatim
from sd3.reading import check_file, parse_json, reading

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: list[Format] = [SAFETENSORS]
START = 72  # first bytes of a file, enough to recognise its format
MMDIT_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
ENCODERS = ("clip_l", "clip_g", "t5xxl")
ENCODER_PREFIX = "text_encoders.{}.transformer."
TRANSFORMER = "transformer/"  # prefix of its tensors in a diffusers folder
ENCODER_FOLDERS = {"clip_l": "text_encoder/", "clip_g": "text_encoder_2/", "t5xxl": "text_encoder_3/"}
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # in the folder of a PEFT adapter
LORA_FILES = (ADAPTER, "pytorch_lora_weights.safetensors")  # in folders that PEFT and diffusers save
# Starts of tensor names, after any prefix, by kind of model, in the published and in diffusers layout.
STEMS = {
    "mmdit": ("joint_blocks.",),
    "vae": ("encoder.down.", "encoder.down_blocks.", "decoder.up.", "decoder.up_blocks."),
    "clip_l": ("text_model.",),
    "clip_g": ("text_model.",),
    "t5xxl": ("encoder.block.",),
}


def file_sha256(*paths: Path) -> str:
    """sha256 of a file, or of several files concatenated; raises `Mistake` if one cannot be read."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with reading(Where("", path)), open(path, "rb") as f:
            while block := f.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def lora_in(folder: Path) -> Path | None:
    """The LoRA in a folder that PEFT or diffusers saved, or None for any other folder, such as a model's, or file."""
    if (folder / "model_index.json").is_file():
        return None
    return next((folder / name for name in LORA_FILES if (folder / name).is_file()), None)


def contents(path: Path) -> list[Path]:
    """The files that a path stands for in hashes: itself, the LoRA in a folder (see `lora_in`) or all weights in it;
    with the weights of a PEFT adapter also its configuration.
    """
    if path.is_dir():
        lora = lora_in(path)
        return contents(lora) if lora else list(path.rglob("*.safetensors"))
    config = path.with_name(ADAPTER_CONFIG)
    return [path, config] if path.name == ADAPTER and config.is_file() else [path]


# ---- what a file is ------------------------------------------------------------------------------


def find_format(where: Where, path: Path) -> Format | None:
    """The format of a file by its first bytes, or None; raises `Missing`, or `Mistake` if it is not a regular file."""
    check_file(where, path)
    with reading(where, "cannot be read"), open(path, "rb") as f:
        start = f.read(START)
    return next((row for row in FORMATS if row.recognise(start)), None)


def recognise(where: Where, path: Path) -> Format:
    """As `find_format`, but raises `Mistake` for an unknown format, saying what the file is."""
    if found := find_format(where, path):
        return found
    raise Mistake(*where, f"is not a {' or '.join(row.name for row in FORMATS)} file{_hint(path)}")


def read_entries(where: Where, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    where: the field that names the file, and its path. Raises `Missing`, or another `Mistake` for a file that is
    damaged, has no tensors or is not a weight file.
    """
    return recognise(where, path).read_header(where, path)


def open_tensors(where: Where, path: Path) -> AbstractContextManager[Callable[[Entry], Tensor]]:
    """A context manager that reads the tensors of a file, see `Format`; raises as `read_entries` does."""
    return recognise(where, path).open(path)


def readable_dtypes() -> tuple[str, ...]:
    """The dtypes that are read as floating-point numbers, as their formats spell them."""
    return tuple(dtype for row in FORMATS for dtype in row.floats)


def weight_paths(folder: Path, *patterns: str) -> list[Path]:
    """Files in a folder with a suffix of a weight format; patterns: of the path before the suffix, such as `*`."""
    suffixes = {row.suffix for row in FORMATS}
    return sorted(path for pattern in patterns for suffix in suffixes for path in folder.glob(pattern + suffix))


_PICKLED = "pickled checkpoints are not loaded"
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file, which is not supported; use the .safetensors file"),
    (b"GGML", "a GGML file, which is not supported; use the .safetensors file"),
    (b"PK\x03\x04", f"a zip archive, as torch.save writes them; {_PICKLED}"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"\xfd7zXZ", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"\x89HDF", "an HDF5 file, which is not supported"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; get it with: git lfs pull"),
)


def describe(start: bytes, size: int, end: bytes = b"") -> str:
    """What kind of file this is, from its first few hundred bytes and its last byte; empty if unknown."""
    if size == 0:
        return "empty; download it again"
    for magic, what in _STARTS:
        if start.startswith(magic):
            return what
    if is_pickle(start, end):
        return f"a pickle; {_PICKLED}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page, probably from a refused download; download it again"
    if text[:1] in (b"{", b"["):
        return "JSON"
    return "" if start.strip(b"\0") else "all zeros at the start, probably an unfinished download"


def is_pickle(start: bytes, end: bytes = b"") -> bool:
    """Whether a file is a pickle: protocol 2 or later, or an older one, which ends with a dot."""
    if re.match(rb"\x80[\x02-\x0f]", start):
        return True
    return end == b"." and bool(re.match(rb"[(\]}][\x00-\x7f]?(q|p\d|d|l|t|i|c)|c[\w.]+\n[\w.]+\n", start))


def _hint(path: Path) -> str:
    """`: it is a ...` for a known kind of file, the size of an unknown small file, else an empty text."""
    size, start, end = 0, b"", b""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        size, start = os.fstat(f.fileno()).st_size, f.read(512)
        f.seek(max(size - 1, 0))
        end = f.read(1)
    what = describe(start, size, end)
    return f": it is {what}" if what else f" ({size} bytes)" if size < 512 else ""


# ---- files and folders ---------------------------------------------------------------------------


class WeightFile:
    """The headers of a weight file, or of a folder in diffusers layout.

    entries: every tensor by name; in a folder their names start with the component: `transformer/...`, `vae/...`,
    `text_encoder/...`; metadata: texts by name.
    """

    def __init__(self, path: str | Path, field: str = "", folder: bool = True):
        """field: the setting that names the file, for messages; folder: whether a folder is allowed.

        Raises as `read_entries` does.
        """
        self.path = Path(path)
        self.where = Where(field, self.path)
        self.field = field
        self.folder = folder and os.path.isdir(self.path)
        if self.folder:
            with reading(self.where):  # a folder inside it may be unreadable
                self.entries, self.metadata = _read_folder(self.path, field)
        else:
            self.entries, self.metadata = read_entries(self.where, self.path)

    @cached_property
    def sha256(self) -> str:
        """sha256 of the whole file, as A1111 computes it; for a folder, of its transformer's files."""
        prefix = TRANSFORMER if self.has(TRANSFORMER) else ""
        return file_sha256(*{e.path for n, e in self.entries.items() if n.startswith(prefix)})

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.entries)

    def prefixes(self, kind: str, *stems: str) -> list[str]:
        """Prefixes of the names of a kind of model (see `STEMS`), the most frequent first, without averaged copies
        (`ema`).
        """
        found: Counter[str] = Counter()
        for name in self.entries:
            for stem in stems or STEMS[kind]:
                place = name.find(stem)
                if place == 0 or (place > 0 and name[place - 1] in "./"):
                    found[name[:place]] += 1
        return [prefix for prefix, _ in found.most_common() if "ema" not in re.split(r"[./_]", prefix)]

    def owners(self) -> tuple[str, ...]:
        """The prefixes of all models that were recognised, to tell one model's tensors from another's."""
        kinds = {prefix for kind in STEMS for prefix in self.prefixes(kind)}
        return (MMDIT_PREFIX, VAE_PREFIX, "text_encoders.", *(prefix for prefix in kinds if prefix))

    def looks_like(self) -> str:
        """What kind of file this seems to be, for error messages."""
        for prefixes, what in _KINDS:
            if any(name.startswith(prefixes) or f".{p}" in name for name in self.entries for p in prefixes):
                return what
        return "an unknown kind of model"


_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_", "lora_A.", "lora_B.", "lora.down.", "lokr_", "hada_", "lycoris_"), "a LoRA"),
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


_COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def _read_folder(folder: Path, field: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """All tensors of a diffusers folder as `<component>/<name>`, and the scheduler's shift as metadata."""
    os.listdir(folder / "")  # raises for a folder without read permission, which would otherwise look empty
    if not os.path.isdir(folder / "transformer"):
        if any(folder.glob("diffusion_pytorch_model*")) or folder.name in _COMPONENTS:  # a single component
            headers = [read_entries(Where(field, path), path)[0] for path in weight_files(folder, field)]
            return {name: entry for header in headers for name, entry in header.items()}, {}
        why = "is a folder without transformer/; give a .safetensors file or a diffusers folder"
        raise Mistake(field, folder, why)
    entries: dict[str, Entry] = {}
    for component in _COMPONENTS:
        if (folder / component).is_dir():
            for path in weight_files(folder / component, field):
                header, _ = read_entries(Where(field, path), path)
                entries |= {f"{component}/{name}": entry for name, entry in header.items()}
    return entries, _scheduler(folder / "scheduler" / "scheduler_config.json", field)


def _scheduler(path: Path, field: str) -> dict[str, str]:
    """The shift in a scheduler's configuration, as metadata; empty if there is none."""
    where = Where(field, path)
    if not path.exists():
        return {}
    check_file(where, path)
    with reading(where, "is damaged"):
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    shift = values.get("shift") if isinstance(values, dict) else None
    return {"shift": str(shift)} if type(shift) in (int, float) else {}


_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def weight_files(folder: Path, field: str = "") -> list[Path]:
    """The safetensors files of a component, single or in shards; the plain variant if there is one, else any other.

    Raises `Missing` where there is none, or a shard is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        plain, shards = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        whole = [p for p in sorted(folder.glob(f"{stem}.*.safetensors")) if not _SHARD.search(p.name)]
        variants = [*whole, *sorted(folder.glob(f"{plain}.index.*.json"))]
        for path in (folder / plain, folder / shards, *variants):
            if path.suffix == ".safetensors" and path.exists():
                return [path]
            if path.exists():
                return _shards(folder, path, field)
        if rest := [p for p in sorted(folder.glob(f"{stem}*.safetensors")) if _SHARD.search(p.name)]:
            raise Missing(field, folder, f"holds {verbatim(rest[0].name)}, and no index that names all shards")
    pickled = any(folder.glob("*.bin"))
    why = "only pickled .bin weights, which are not loaded" if pickled else "no .safetensors weights"
    raise Missing(field, folder, f"holds {why}")


def _shards(folder: Path, index: Path, field: str) -> list[Path]:
    """The files listed in a shard index; they must be in its folder."""
    where = Where(field, index)
    check_file(where, index)
    with reading(where, "is damaged"):
        values = parse_json(index.read_text(encoding="utf-8-sig"))
    named = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(named, dict) or not named:
        raise Mistake(*where, "is damaged: no weight_map in it")
    for name, file in named.items():
        if not isinstance(file, str) or not file or re.search(r"[/\\\x00]", file) or file in (".", ".."):
            claim = verbatim(f"{name} is said to be in {file!r}")
            raise Mistake(*where, f"is damaged: {claim}, which is not a file in that folder")
    names = sorted(set(named.values()))
    for name in names:
        if not os.path.exists(folder / name):  # also for impossible file names
            raise Missing(field, folder / name, f"no such file, though {verbatim(index.name)} names it")
    return [folder / name for name in names]
