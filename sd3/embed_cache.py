"""A cache of encoded prompts on disk (`embed_cache`): a cached prompt opens no text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sd3.files import find_format
from sd3.headers import SAFETENSORS, read_header
from sd3.mistakes import Unwritable, Where
from sd3.reading import check_file, reading
from sd3.weights import SAMPLE
from sd3.writing import atomic_write

VERSION = 2  # of the computation and the format; entries of other versions are ignored
NAMES = ("context", "pooled")
WHOLE = 64 * 10**6  # bytes; larger files are hashed in part


def file_identity(path: Path) -> list[Any]:
    """A file's size and a hash of its contents. Of a large weight file, the header and both ends of every tensor are
    hashed; of another large file, both its ends. Names and dates are ignored: copies share or lose them.
    """
    digest = hashlib.sha256()
    with reading(Where("", path)), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size

        def add(place: int, length: int) -> None:
            f.seek(place)
            digest.update(f.read(length))

        if size < WHOLE:
            add(0, size)
            return [size, digest.hexdigest()]
        spans = [(0, size)]
        found = find_format(Where("", path), path)
        # a safetensors file with another suffix keeps the identity of earlier versions
        if found is not None and (found is not SAFETENSORS or path.suffix == SAFETENSORS.suffix):
            entries = list(found.read_header(Where("", path), path)[0].values())
            add(0, min(e.place for e in entries))
            spans = sorted((e.place, e.size) for e in entries)
        for place, length in spans:
            add(place, min(SAMPLE, length))
            add(place + max(length - SAMPLE, 0), min(SAMPLE, length))
    return [size, digest.hexdigest()]


def describe_files(files: Sequence[Path]) -> dict[str, Any]:
    """Name, total size and identity of files that belong together, for an image's record."""
    identity = hashlib.sha256(json.dumps([file_identity(path) for path in files]).encode()).hexdigest()
    name = files[0].name if len(files) == 1 else files[0].parent.name
    return {"name": name, "bytes": sum(p.stat().st_size for p in files), "identity": identity[:16]}


class EmbedCache:
    """A folder with one safetensors file per encoded prompt, each containing its key and a checksum."""

    def __init__(
        self,
        folder: str | Path,
        files: Mapping[str, Iterable[Path]],
        options: Mapping[str, Any],
        fits: Callable[[Any, Tensor, Tensor], bool] = lambda key, context, pooled: True,
    ):
        """files: those of each encoder and tokenizer, by role; options: whatever else decides the result (dtype,
        device); fits: whether tensors of a prompt have the shapes that the model needs.

        Raises `Unwritable` if the folder cannot be written.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unwritable("embed_cache", folder, f"cannot be created ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK):
            raise Unwritable("embed_cache", folder, "cannot be written to")
        identities = {role: [file_identity(p) for p in sorted(set(paths))] for role, paths in files.items()}
        self.made_by = json.dumps([VERSION, identities, dict(options)], sort_keys=True)
        self.fits = fits

    def key(self, prompt: Sequence[Any]) -> str:
        """The key of a prompt (a `text.Key`) encoded by these files."""
        values = list(prompt)
        if values[2:] == [1, None, ""]:  # read as the public reference reads it: the key of earlier versions
            del values[2:]
        return hashlib.sha256(json.dumps([self.made_by, *values]).encode()).hexdigest()

    def path(self, prompt: Sequence[Any]) -> Path:
        """The file of a prompt, whether it exists or not."""
        return self.folder / f"{self.key(prompt)}.safetensors"

    def read(self, prompt: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """Text tokens (1, L, X) and pooled text (1, Y) on the CPU; None for an entry that is missing, damaged, of
        another key, or does not fit the model.
        """
        path = self.path(prompt)
        with contextlib.suppress(OSError, ValueError), reading(Where("", path)):
            check_file(Where("", path), path)
            _, metadata = read_header(Where("", path), path)
            tensors = load(path.read_bytes())
            context, pooled = (tensors[name] for name in NAMES)
            valid = metadata.get("key") == self.key(prompt) and metadata.get("checksum") == _checksum(tensors)
            if valid and self._usable(prompt, context, pooled):
                return context, pooled
        return None

    def write(self, prompt: Sequence[Any], text: tuple[Tensor, Tensor]) -> None:
        """Writes an encoded prompt, unless it holds NaN or infinity; raises Unwritable."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in zip(NAMES, text, strict=True)}
        if not self._usable(prompt, *tensors.values()):
            return
        data = save(tensors, {"key": self.key(prompt), "checksum": _checksum(tensors)})
        atomic_write(self.path(prompt), lambda f: f.write(data))

    def _usable(self, prompt: Sequence[Any], context: Tensor, pooled: Tensor) -> bool:
        fits = context.ndim == 3 and pooled.ndim == 2 and self.fits(prompt, context, pooled)
        return fits and all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in (context, pooled))


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and every byte."""
    digest = hashlib.sha256()
    for name in NAMES:
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
