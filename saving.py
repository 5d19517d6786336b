"""Pictures on disk: folder names, PNG metadata, atomic writes and the record of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import io
import json
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from foreign import Unreadable, check_file, parse_json, reading
from settings import Settings, base_name

A1111_SAMPLERS = {"euler": "Euler", "dpmpp_2m": "DPM++ 2M"}
SETTINGS_CHUNK = "sd3_residual"  # the PNG text chunk with the full settings as JSON
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow")
_umask_lock = threading.Lock()  # reading the umask sets it for a moment


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a picture."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that no half-written file is ever seen.

    Raises OSError naming the file; nothing is left behind.
    """
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".partial")
        with os.fdopen(handle, "wb") as f:
            write(f)
            f.flush()
            _sync(f.fileno())
        rename_finished(Path(name), path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise


def cannot_write(path: Path, error: OSError) -> OSError:
    """The error of a file that could not be written, with the file's name in it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else error.strerror or error
    return OSError(error.errno, f"{path}: cannot be written: {why}")


def _sync(handle: int) -> None:
    """Waits until a file is on its disk; where the file system has no such call, it is written as well as it can be."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def rename_finished(partial: Path, path: Path) -> None:
    """Gives a finished temporary file its name, and, where the file system has them, the rights of any new file."""
    with _umask_lock:
        umask = os.umask(0)
        os.umask(umask)
    with contextlib.suppress(OSError):
        os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)


def append_line(path: Path, value: Any) -> None:
    """Adds a value as a line of JSON to a file; a line that a kill tore stays apart from it.

    Raises OSError naming the file, which is then as it was.
    """
    try:
        with open(path, "ab") as f:
            size = f.tell()
            line = json_bytes(value) + b"\n"
            if size and not _ends_with_newline(path):
                line = b"\n" + line
            try:
                f.write(line)
                f.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(f.fileno(), size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from None


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def make_folder(parent: Path, name: str, postfix: str | None, now: datetime.datetime | None = None) -> Path:
    """Makes `parent/<name><postfix or _date-time>`, with a number behind it where that exists already.

    Raises ValueError for a place that cannot be written.
    """
    stamp = postfix if postfix else (now or datetime.datetime.now()).strftime("_%Y-%m-%dT%H-%M-%S")
    stamp = stamp.replace("/", "_").replace("\\", "_")
    number = 0
    while True:
        folder = parent / f"{name}{stamp}{f'_{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise ValueError(f"--out_dir: {parent} is not a folder") from None
            number += 1
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"--out_dir: cannot make {folder} ({why})") from None


def check_writable(out_dir: str, flag: str = "out_dir") -> None:
    """Raises ValueError where pictures could not be written below `out_dir`; makes nothing."""
    place = Path(out_dir)
    while not os.path.exists(place):  # also where one may not look
        if os.path.islink(place) or place == place.parent:
            break
        place = place.parent
    if not os.path.isdir(place):
        raise ValueError(f"--{flag} {out_dir}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag} {out_dir}: {place} cannot be written")


def _quoted(value: Any) -> str:
    """A value of an A1111 parameter line: quoted as JSON where it would break the line apart."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def parameters(settings: Settings, model_hash: str, software: Mapping[str, str]) -> str:
    """The `parameters` text of A1111-style readers: prompt, negative prompt, one line of `Name: value` pairs."""
    model = base_name(settings.model) or ""
    pairs: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": A1111_SAMPLERS[settings.sampler],
        "CFG scale": settings.cfg,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model hash": model_hash[:10],
        "Model": model.removesuffix(".safetensors"),
        "Shift": settings.shift,
    }
    if settings.vae:
        pairs["VAE"] = base_name(settings.vae)
    if settings.init_image:
        pairs["Denoising strength"] = settings.denoise
        pairs["Init image"] = base_name(settings.init_image)
    if settings.controlnet_ckpt:
        pairs["ControlNet"] = base_name(settings.controlnet_ckpt)
        pairs["ControlNet image"] = base_name(settings.controlnet_cond_image)
        pairs["ControlNet strength"] = settings.controlnet_strength
    if settings.skip_layer:
        slg = settings.skip_layer
        pairs["Skip layers"] = ", ".join(map(str, slg.layers))
        pairs["Skip layer guidance"] = f"scale {slg.scale:g} from {slg.start:g} to {slg.end:g}"
    if settings.residual_target_layers:
        pairs["Residual origin layer"] = settings.residual_origin_layer
        pairs["Residual target layers"] = ", ".join(map(str, settings.residual_target_layers))
        pairs["Residual weights"] = ", ".join(f"{w:.6g}" for w in settings.residual_weights)
        for name, usual in (("mode", "add"), ("schedule", "constant"), ("start", 0), ("end", 1), ("branch", "both")):
            if (value := getattr(settings, f"residual_{name}")) != usual:
                pairs[f"Residual {name}"] = value
        if settings.residual_rotations:
            pairs["Residual rotations"] = base_name(settings.residual_rotations)
    if settings.no_t5:
        pairs["T5"] = "off"
    pairs["Dtype"] = settings.dtype
    pairs["Version"] = f"sd3-residual, torch {software.get('torch', '?')}"
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())
    negative = f"\nNegative prompt: {settings.negative_prompt}" if settings.negative_prompt else ""
    return f"{settings.prompt}{negative}\n{line}"


def save_picture(
    path: Path, image: Image.Image, settings: Settings, made_with: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG atomically. With `made_with` (at least model_sha256), it carries its settings as text chunks."""
    data = encode_picture(image, settings, made_with)
    atomic_write(path, lambda f: f.write(data))


def encode_picture(image: Image.Image, settings: Settings, made_with: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG; `made_with` as for `save_picture`."""
    info = PngInfo()
    if made_with is not None:
        software = versions()
        record = {"settings": settings.public(), **made_with, "versions": software}
        info.add_text("parameters", parameters(settings, made_with.get("model_sha256", ""), software))
        info.add_text(SETTINGS_CHUNK, json.dumps(record, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


@contextlib.contextmanager
def open_picture(where: str, path: str | Path) -> Iterator[Image.Image]:
    """A picture file, opened by Pillow; raises FileNotFoundError or `Unreadable` for whatever goes wrong inside.

    where: how the file is named to the user.
    """
    check_file(where, path)
    with reading(where, "cannot be read"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow: what matters of them follows as an error
                # by its handle: of a path Pillow maps some TIFFs into memory, those turned with the wrong line length
                with open(path, "rb") as file, Image.open(file) as image:
                    yield image
        except UnidentifiedImageError:
            raise Unreadable(f"{where}: is not a picture") from None


def read_record(path: str | Path, flag: str = "replay") -> dict[str, Any]:
    """What a PNG of ours says of itself: settings, model_sha256, versions and what else was recorded.

    Raises FileNotFoundError, or ValueError for a file that is damaged or says nothing.
    """
    where = f"--{flag} {path}"
    with open_picture(where, path) as image:
        image.load()
        text = getattr(image, "text", {}).get(SETTINGS_CHUNK)
    if text is None:
        told = "holds no settings: made with --no_metadata, by another program, or saved again by one"
        raise Unreadable(f"{where}: {told}")
    with reading(where, "its settings cannot be read"):
        record = parse_json(text)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise Unreadable(f"{where}: its settings cannot be read")
    return record


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in one, row by row, without gaps."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def contact_sheet(
    rows: Sequence[Sequence[Path]], labels: Sequence[str], columns: Sequence[str], size: int = 256
) -> Image.Image:
    """Pictures from files under column names, rows labelled at their left; each at most `size` pixels on a side.

    Files that are not there, or damaged, stay empty.
    """
    shown = [[_thumbnail(path, size) for path in row] for row in rows]
    sizes = [picture.size for row in shown for picture in row if picture is not None] or [(size, size)]
    width, height = (max(side) for side in zip(*sizes, strict=True))
    font, line, gap = ImageFont.load_default(12), 15, 4
    left = max(width, 160)
    heads = [_wrap(name, font, width) for name in columns]
    top = line * max(map(len, heads), default=1) + gap
    full = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    sheet = Image.new("RGB", full, "white")
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        draw.multiline_text((left + i * (width + gap), 0), "\n".join(head), "black", font, spacing=2)
    for r, (row, label) in enumerate(zip(shown, labels, strict=True)):
        y = top + r * (height + gap)
        text = _wrap(label, font, left - gap)[: max(height // line, 1)]
        draw.multiline_text((0, y), "\n".join(text), "black", font, spacing=2)
        for i, picture in enumerate(row):
            if picture is not None:
                sheet.paste(picture, (left + i * (width + gap), y))
    return sheet


def _thumbnail(path: Path, size: int) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except Exception:  # not there, or damaged: its place stays empty
        return None
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of a text that fit a width in pixels, cut between words where that is possible."""
    lines, words = [""], text.replace("\n", " ").split(" ")
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
            cut = next(n for n in range(len(lines[-1]) - 1, 0, -1) if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines


def heat_map(amount: np.ndarray) -> Image.Image:
    """(H, W) from 0 to 1 as black, red, yellow and white; the square root is shown, so that small amounts are seen."""
    x = 3 * np.sqrt(np.clip(amount, 0, 1))[..., None]  # (H, W, 1)
    colours = np.clip(x - np.arange(3), 0, 1) * 255  # red, then green, then blue
    return Image.fromarray(colours.astype(np.uint8))


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically; dataclasses become objects, paths and what JSON does not know text."""
    data = json_bytes(value, indent=1) + b"\n"
    atomic_write(path, lambda f: f.write(data))


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8, whatever is in it: a part that cannot be written becomes its description."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(_writable(value), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # lone surrogates come out as JSON writes them


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return _described(value)


def _described(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a foreign object's own text
        return f"<{type(value).__name__}>"


def _writable(value: Any, depth: int = 0) -> Any:
    """A value with only what JSON can hold in it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        try:
            json.dumps(value)
        except ValueError:  # a whole number with more digits than Python prints
            return f"<{type(value).__name__}>"
        return value
    if depth > 20:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        keys = ((k if isinstance(k, str) else _described(k), v) for k, v in value.items())
        return {k: _writable(v, depth + 1) for k, v in keys}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_writable(v, depth + 1) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _writable(getattr(value, f.name, None), depth + 1) for f in dataclasses.fields(value)}
    return _writable(value.tolist(), depth + 1) if isinstance(value, (np.generic, np.ndarray)) else _described(value)
