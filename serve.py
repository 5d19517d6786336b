"""`--serve_stdin`: one load, then a picture for every line of JSON; every line is answered with one.

{"prompt": "a red circle", "seed": 3}  ->  {"ok": true, "files": ["outputs/.../000000.png"], "seeds": [3], ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import saving
from sd3_infer import MadeWith, RunRecord, SD3Inferencer, load_for, models_folder_name, plan_for
from settings import FILE_SETTINGS, Flags, Settings, check_flag, read_prompts

# Flags that belong to the process: they decide what is loaded and where pictures go.
FIXED = (
    "model", "vae", "controlnet_ckpt", "model_folder", "clip_l", "clip_g", "t5xxl", "text_encoder_device", "device",
    "dtype", "no_t5", "t5_resident", "embed_cache", "compile", "weights", "offload", "out_dir", "postfix",
    "no_metadata", "verbose", "serve_stdin", "self_check", "list_models", "replay",
)  # fmt: skip
EXAMPLE = json.dumps({"prompt": "a red circle", "seed": 3})
MOST_TEXTS = 256  # encoded prompts that are held in memory


class Server:
    """An engine, the flags as typed, which a line's own replace, and the folder of the pictures."""

    def __init__(self, engine: SD3Inferencer, flags: Flags, raw: Mapping[str, Any], folder: Path):
        self.engine, self.raw, self.folder = engine, dict(raw), folder
        self.record = RunRecord(folder, flags, [f"--{n}={v}" for n, v in raw.items()], 0, engine)
        self.made_with: dict[tuple, MadeWith] = {}  # by the files that pictures name and when they changed

    def answer(self, line: str) -> dict[str, Any]:
        """What a line is answered with: files, seeds and seconds, or the error; `id` comes back as it was given."""
        answer: dict[str, Any] = {"ok": False}
        started = time.perf_counter()
        try:
            wanted = self._read(line)
            if "id" in wanted:
                answer["id"] = wanted.pop("id")
            made = list(self._make(wanted))
            answer |= {"ok": True, "files": [str(path) for path, _ in made], "seeds": [seed for _, seed in made]}
        except (ValueError, OSError) as error:  # FileNotFoundError among them
            answer["error"] = " ".join(str(error).split())
        except (torch.OutOfMemoryError, MemoryError) as error:
            answer["error"] = f"out of memory; try a smaller width, height or batch_size ({error})"
        return answer | {"seconds": round(time.perf_counter() - started, 3)}

    @staticmethod
    def _read(line: str) -> dict[str, Any]:
        try:
            wanted = json.loads(line)
        except ValueError as error:
            raise ValueError(f"not a line of JSON: {error}") from None
        if not isinstance(wanted, dict):
            raise ValueError('not an object such as {"prompt": "a red circle", "seed": 3}')
        return wanted

    def _make(self, wanted: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
        for name in wanted:
            check_flag(name)
            if name in FIXED:
                raise ValueError(f"--{name}: belongs to the whole process; give it on the command line")
        flags = Flags.read({**self.raw, **{n: v for n, v in wanted.items() if v is not None}})
        if "prompt" not in wanted and "prompt" not in self.raw:
            raise ValueError("--prompt: is missing")
        prompts, _ = read_prompts(flags.prompt)
        pictures = plan_for(self.engine, flags, prompts, flags.seeds(len(prompts)))
        if self.engine.known_texts > MOST_TEXTS:
            self.engine.forget_text()
        first = len(self.record.pictures)
        made_with = self._files(pictures[0])
        for number, settings, image in self.engine.make(pictures, flags.pad_batch):
            path = self.folder / f"{first + number:06d}.png"
            known = made_with.wait()
            saving.save_picture(path, image, settings, None if flags.no_metadata else known)
            self.record.total = len(self.record.pictures) + 1
            self.record.add(path, settings, known)
            yield path, settings.seed

    def _files(self, settings: Settings) -> MadeWith:
        paths = [path for name in FILE_SETTINGS if (path := getattr(settings, name))]
        key = tuple((path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in paths)
        if key not in self.made_with:
            self.made_with = {key: MadeWith(self.engine, settings)}  # the last one only: they are seldom others
        return self.made_with[key]


def serve(
    flags: Flags, raw: Mapping[str, Any], lines: Iterable[str] | None = None, say: Callable[[str], Any] | None = None
) -> Path | None:
    """Answers every line (of stdin) on stdout until there is none; returns the folder of the pictures, if any.

    raw: the flags as typed, which the lines' own replace. Raises what `load_for` raises, before anything is read.
    """
    lines = sys.stdin if lines is None else lines
    say = say or (lambda text: print(text, flush=True))
    saving.check_writable(flags.out_dir)
    raw = {n: v for n, v in raw.items() if n != "serve_stdin"}
    engine = load_for(flags)
    engine.get_mmdit()
    engine.get_controlnet()
    engine.get_vae()
    folder = saving.make_folder(Path(flags.out_dir) / models_folder_name(flags), "served", flags.postfix)
    server = Server(engine, flags, raw, folder)
    engine.say(f"ready: one JSON object a line, such as {EXAMPLE}; pictures go to {folder}")
    try:
        for line in lines:
            if line.strip():
                say(json.dumps(server.answer(line), ensure_ascii=False))
        server.record.status = "finished"
    except BaseException:
        server.record.status = "stopped"
        raise
    finally:
        server.record.write()
        if not server.record.pictures:
            server.record.discard()
    return folder if server.record.pictures else None
