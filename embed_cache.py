"""`--embed_cache DIR`: encoded prompts on disk, so that a known prompt opens no text encoder."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from saving import atomic_write

VERSION = 1  # of what is computed; older entries are then unknown
NAMES = ("context", "pooled")


def file_identity(path: Path) -> list[Any]:
    """What tells a file from another without reading it: size, change time, and for safetensors the header's hash."""
    stat = os.stat(path)
    identity: list[Any] = [stat.st_size, stat.st_mtime_ns]
    if path.suffix == ".safetensors":
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            identity.append(hashlib.sha256(f.read(length)).hexdigest())
    return identity


class EmbedCache:
    """A folder with a safetensors file for every encoded prompt."""

    def __init__(self, folder: str | Path, files: Mapping[str, Iterable[Path]], how: Mapping[str, Any]):
        """files: those of each encoder and tokenizer, by role; how: what else decides the result (dtype, device).

        Raises ValueError where the folder cannot be written to.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--embed_cache {folder}: cannot be made ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"--embed_cache {folder}: cannot be written to")
        identities = {role: [file_identity(p) for p in sorted(set(paths))] for role, paths in files.items()}
        self.made_by = json.dumps([VERSION, identities, dict(how)], sort_keys=True)

    def path(self, prompt: str, length: int) -> Path:
        """Where a prompt encoded at a T5 length is, if it is known."""
        key = json.dumps([self.made_by, prompt, length])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, prompt: str, length: int) -> tuple[Tensor, Tensor] | None:
        """Text tokens (1, L, X) and pooled text (1, Y) on the CPU; None where unknown, or damaged."""
        try:
            with safe_open(self.path(prompt, length), framework="pt", device="cpu") as f:
                context, pooled = (f.get_tensor(name) for name in NAMES)
        except (OSError, SafetensorError):
            return None
        return (context, pooled) if context.ndim == 3 and pooled.ndim == 2 else None

    def write(self, prompt: str, length: int, text: tuple[Tensor, Tensor]) -> None:
        """Keeps an encoded prompt; raises OSError where that cannot be written."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in zip(NAMES, text, strict=True)}
        data = save(tensors)
        atomic_write(self.path(prompt, length), lambda f: f.write(data))
