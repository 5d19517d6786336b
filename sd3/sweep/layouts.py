"""Reads the prompts of public benchmarks and writes the folders that their evaluators read.

GenEval (github.com/djghosh13/geneval): evaluation_metadata.jsonl, one object with `prompt` and `tag` per line; the
evaluator walks 00000/, 00001/ ... for metadata.jsonl (one object) and samples/0000.png, 0001.png ...
DPG-Bench (github.com/TencentQQGYLab/ELLA): dpg_bench/prompts/ID.txt, or dpg_bench.csv with item_id and text; the
evaluator reads ID.png, which it cuts into 2 x 2 square images.
T2I-CompBench (github.com/Karine-Huang/T2I-CompBench): one prompt per line; the evaluators read
samples/PROMPT_INDEX.png: the prompt ends at the first `_`, and the number after the last `_` gives the order.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sd3 import sheet, writing
from sd3.mistakes import Missing, Mistake, Unwritable, Where, display, verbatim
from sd3.prompts import read_jsonl, read_lines, read_prompts
from sd3.readers import LONGEST_NAME
from sd3.reading import check_file, reading
from sd3.sweep.grid import Grid

if TYPE_CHECKING:
    from sd3.sweep.folder import SweepFolder
    from sd3.sweep.plan import Plan


DPG_PICTURES = 4


@dataclass(frozen=True)
class Entry:
    """A prompt of a benchmark, the id that its evaluator uses, and the metadata of its line."""

    prompt: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_entries(layout: str, path: str) -> list[Entry]:
    """The prompts of a benchmark's file or folder; raises Mistake."""
    entries = READERS[layout](path)
    if not entries:
        raise Mistake("prompt", path, "holds no prompt")
    return entries


def _read_geneval(path: str) -> list[Entry]:
    form = '{"tag": "...", "include": [...], "prompt": "..."}'
    lines = read_jsonl("prompt", path, lambda r: _is_text(r["prompt"]) and isinstance(r["tag"], str), form)
    return [Entry(line["prompt"], f"{i:05d}", line) for i, line in enumerate(lines)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_dpg(path: str) -> list[Entry]:
    place = Path(path)
    if os.path.isdir(place):
        files = sorted(place.glob("*.txt"))
        for file in files:
            check_file(Where("prompt", file), file)
        texts = {p.stem: " ".join(read_lines("prompt", p)).strip() for p in files}
        return [Entry(text, name) for name, text in texts.items() if text]
    if not os.path.exists(place):
        raise Missing("prompt", path, "no such file or folder")
    where = Where("prompt", path)
    check_file(where, place)
    with reading(where, "cannot be read as CSV"), open(place, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {"item_id", "text"} <= set(lines[0]):
        raise Mistake(*where, "must be the folder of .txt files of DPG-Bench, or its .csv with item_id and text")
    for number, line in enumerate(lines, 2):
        if not _is_text(line["item_id"]) or not _is_text(line["text"]):
            raise Mistake(*where, f"line {number} lacks an item_id or a text")
    return list({line["item_id"]: Entry(line["text"].strip(), line["item_id"]) for line in lines}.values())


def _read_compbench(path: str) -> list[Entry]:
    if not path.lower().endswith(".txt"):
        raise Mistake("prompt", path, "must be a .txt file of T2I-CompBench, with one prompt per line")
    return [Entry(prompt, str(i)) for i, prompt in enumerate(read_prompts(path)[0])]


READERS = {"geneval": _read_geneval, "dpg": _read_dpg, "t2i_compbench": _read_compbench}


def check_entries(layout: str, entries: Sequence[Entry], grid: Grid) -> None:
    """Raises Mistake if the evaluator could not read the images of this grid."""
    if layout == "dpg" and len(grid.seeds) != DPG_PICTURES:
        raise Mistake("layout", layout, f"needs {DPG_PICTURES} seeds for its 2 x 2 images, such as `seed` 0-3")
    for entry in entries:
        name = f"{entry.id}.png".encode(errors="replace")
        if layout == "dpg" and (re.search(rb"[/\\\x00]", name) or len(name) > LONGEST_NAME):
            raise Mistake("prompt", "", f"the id {verbatim(display(entry.id))} cannot be a file name")
        if layout == "t2i_compbench":
            if re.search(r"[/_\x00]", entry.prompt):
                raise Mistake(
                    "layout",
                    layout,
                    f'"{verbatim(display(entry.prompt))}" contains / or _, which its evaluators cannot read',
                )
            if len(compbench_name(entry.prompt, 0).encode()) > LONGEST_NAME:
                raise Mistake("layout", layout, f'"{verbatim(entry.prompt[:60])}..." is too long for a file name')


def check_sizes(layout: str, plan: Plan) -> None:
    """Raises Mistake if the evaluator could not cut the images apart."""
    for s in (plan.of(i)[0].settings for i in range(len(plan.variants))):
        if layout == "dpg" and s.width != s.height:
            raise Mistake("layout", layout, f"needs square images; these are {s.width} x {s.height}")


def compbench_name(prompt: str, index: int) -> str:
    """`<prompt>_<index>.png`."""
    return f"{prompt}_{index:06d}.png"


def folder_of(name: str) -> str:
    """The name of a variant as a folder name."""
    return re.sub(r"[^\w\-.,=]+", "_", name).strip("._") or "variant"


def write_layout(layout: str, entries: Sequence[Entry], plan: Plan, folder: SweepFolder) -> list[Path]:
    """Writes FOLDER/<layout>/<variant> for every variant that has images; returns those folders.

    Builds a new folder and replaces the old one, so that no image of an earlier grid is scored. Raises Unwritable.
    """
    target, new = folder.path / layout, folder.path / f".{layout}.new"
    shutil.rmtree(new, ignore_errors=True)
    names: set[str] = set()
    try:
        for number, variant in enumerate(plan.variants):
            name = folder_of(variant.name)
            while name in names:
                name += "_"
            pictures = {(plan.grid.prompts[p.prompt], p.seed): folder.picture(p.id) for p in plan.of(number)}
            rows = [(e, [q for s in plan.grid.seeds if (q := pictures[e.prompt, s]).exists()]) for e in entries]
            if any(made for _, made in rows):
                names.add(name)
                WRITERS[layout](new / name, rows)
        shutil.rmtree(target, ignore_errors=True)
        if not new.exists():
            return []
        new.rename(target)
        return sorted(target.iterdir())
    except Mistake:
        raise
    except OSError as error:
        raise Unwritable("", target, f"cannot be written: {error.strerror or error}") from None


def _write_geneval(target: Path, rows: Sequence[tuple[Entry, list[Path]]]) -> None:
    for entry, pictures in rows:
        if not pictures:
            continue
        folder = target / entry.id
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps(entry.metadata, ensure_ascii=False) + "\n"
        writing.atomic_write(folder / "metadata.jsonl", lambda f, line=line: f.write(line.encode()))
        for i, picture in enumerate(pictures):
            _place(picture, folder / "samples" / f"{i:04d}.png")
        _save(sheet.tile([read_picture(p) for p in pictures], min(len(pictures), 4)), folder / "grid.png")


def _write_dpg(target: Path, rows: Sequence[tuple[Entry, list[Path]]]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for entry, pictures in rows:
        if len(pictures) == DPG_PICTURES:  # a missing one would shift the others
            _save(sheet.tile([read_picture(p) for p in pictures], 2), target / f"{entry.id}.png")


def _write_compbench(target: Path, rows: Sequence[tuple[Entry, list[Path]]]) -> None:
    (target / "samples").mkdir(parents=True, exist_ok=True)
    index = 0
    for entry, pictures in rows:
        for picture in pictures:
            _place(picture, target / "samples" / compbench_name(entry.prompt, index))
            index += 1


WRITERS = {"geneval": _write_geneval, "dpg": _write_dpg, "t2i_compbench": _write_compbench}


def read_picture(path: Path) -> Image.Image:
    """An image of the sweep; raises Mistake if it is damaged or was removed."""
    with reading(Where("", path)), Image.open(path) as image:
        return image.convert("RGB")


def _save(image: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    image.save(data, format="PNG")
    writing.atomic_write(path, lambda f: f.write(data.getvalue()))


def _place(picture: Path, target: Path) -> None:
    """Hard-links an image to `target`, or copies it if the file system cannot link."""
    try:
        os.link(picture, target)
    except OSError:
        shutil.copyfile(picture, target)
