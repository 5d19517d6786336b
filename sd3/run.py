"""One run of the command line: images, their records and `run.json`."""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from sd3 import png, streams, writing
from sd3.device import device_record
from sd3.engine import Engine, load_for, plan_for
from sd3.files import file_sha256
from sd3.find import list_models
from sd3.flags import FLAGS
from sd3.mistakes import Where
from sd3.prompts import folder_name, read_prompts
from sd3.replay import Replay
from sd3.residual import ResidualConfig
from sd3.settings import FILE_SETTINGS, Flags, Settings
from sd3.unchanged import Unchanged
from sd3.versions import __version__, versions

RESIDUAL_FILE = "residual.json"  # in every run's folder, as --residual_config reads it


def _sha256(path: Path) -> str:
    return file_sha256(*path.rglob("*.safetensors")) if path.is_dir() else file_sha256(path)


# Files that loading does not open: images and rotations.
FILES_OF_IMAGES = tuple(name for name in FILE_SETTINGS if FLAGS[name].scope == "picture")


class MadeWith:
    """What pictures are made with beside their settings: hashes of the files, text encoders and the device. The
    hashes are computed while the first picture is made.

    Made before the files that the settings name are read: one that changes after that is noticed.
    """

    def __init__(self, engine: Engine, settings: Settings, hashed: bool = True):
        """hashed: whether there is to be a record at all; else files are only watched."""
        self.engine, self.settings = engine, settings
        self.value: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.files = Unchanged()
        for name in FILES_OF_IMAGES:
            if path := getattr(settings, name):
                self.files.add(Where(name, path), path)
        self.thread = threading.Thread(target=self._run, daemon=True) if hashed else None
        if self.thread:
            self.thread.start()

    def _run(self) -> None:
        try:
            engine, s = self.engine, self.settings
            paths = {name: getattr(s, name) for name in FILE_SETTINGS if name != "model"}
            hardware = device_record(engine.device, engine.threads)
            if engine.encoder_device.type != engine.device.type:
                beside = device_record(engine.encoder_device, engine.threads)
                hardware |= {f"text_encoder_{name}": value for name, value in beside.items()}
            more = {
                "files": {name: _sha256(Path(path)) for name, path in paths.items() if path},
                "encoders": engine.encoder_files(),
                "components": engine.component_files(),
                "hardware": hardware,
            }
            self.value = {"model_sha256": engine.model_file.sha256, **{n: v for n, v in more.items() if v}}
        except BaseException as error:  # handed to whoever waits
            self.error = error

    def check(self) -> None:
        """Raises `Changed` where a file is not what it was when it was opened."""
        self.engine.files.check()
        self.files.check()

    def hashes(self) -> dict[str, str]:
        """sha256 of the files by the names of their flags, once they are there."""
        if self.thread:
            self.thread.join()
        return {"model": self.value["model_sha256"], **self.value.get("files", {})} if self.value else {}

    def wait(self) -> dict[str, Any]:
        """The record of a picture that is to be kept, once it is there; raises `Changed` as `check` does, and OSError
        where a file could not be read.
        """
        if self.thread:
            self.thread.join()
        self.check()  # after the hashes: they are then of what was opened
        if self.error is not None:
            raise self.error
        return self.value


def run(flags: Flags, given: Sequence[str] = (), replay: Replay | None = None) -> Path | None:
    """Does what the flags say; returns the folder of the pictures. Raises Mistake for what is wrong
    with them before any weights load.

    replay: the picture that is made again; the flags then hold its settings.
    """
    if flags.list_models:
        print(list_models(flags.model_folder or "models"))
        return None
    started = time.monotonic()
    if replay and "prompt" not in replay.given:
        prompts, name = [flags.prompt], folder_name(flags.prompt)
    else:
        prompts, name = read_prompts(flags.prompt)
    writing.check_writable(flags.out_dir)
    engine = load_for(flags)
    residual = ResidualConfig.from_flags(flags.residual(), flags.residual_config)
    skip_layer = replay.skip_layer() if replay else None
    pictures = plan_for(engine, flags, prompts, flags.seeds(len(prompts)), skip_layer, recorded=replay is not None)
    if line := engine.unknown_words([*prompts, flags.negative_prompt]):
        engine.say(line)
    folder = writing.make_folder(Path(flags.out_dir) / models_folder_name(flags), name, flags.postfix)
    if flags.kind_of_seeds == "rand":
        engine.say(drawn_seeds([s.seed for s in pictures]))
    record = RunRecord(folder, flags, given, len(pictures), engine)
    record.beside[RESIDUAL_FILE] = residual.as_file(folder)
    made_with = MadeWith(engine, pictures[0], hashed=bool(replay) or not flags.no_metadata)
    try:
        with record.kept():
            for number, settings, image in engine.make(pictures, flags.pad_batch):
                path = folder / f"{number:06d}.png"
                known = made_with.wait()
                with streams.held():  # a picture that is there is in the record
                    png.save_picture(path, image, settings, None if flags.no_metadata else known)
                    record.add(path, settings, known)
                tqdm.write(str(path))
                if replay and number == 0:
                    for line in replay.report(image, settings, known):
                        engine.say(line)
    except (KeyboardInterrupt, streams.Stopped):
        engine.say(f"stopped: {record.count} of {len(pictures)} pictures are kept in {folder}")
        raise
    seconds = time.monotonic() - started
    if flags.verbose:
        engine.say(", ".join(f"{name} {spent:.1f} s" for name, spent in engine.stages.items()))
    engine.say(
        f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} in {seconds:.1f} s, "
        f"{seconds / len(pictures):.1f} s each, in {folder}"
    )
    return folder


def drawn_seeds(seeds: Sequence[int], most: int = 16) -> str:
    """A line with the seeds that were drawn, the first ones of many."""
    more = f" and {len(seeds) - most} more, in run.json" if len(seeds) > most else ""
    return f"seed{'s' if len(seeds) > 1 else ''} drawn: {', '.join(map(str, seeds[:most]))}{more}"


def models_folder_name(flags: Flags) -> str:
    """How the folder of a model's pictures is called."""
    names = [Path(path).name.removesuffix(".safetensors") for path in (flags.model, flags.controlnet_ckpt) if path]
    return "_".join(names)


class RunRecord:
    """`run.json`: the whole run. While it goes on, every picture is added to `pictures.jsonl` as soon as it is there,
    and run.json brought up to date now and then; in the end run.json has all, and the other one goes.
    """

    EVERY = 5.0  # seconds between writes, at least
    LINES = "pictures.jsonl"

    def __init__(self, folder: Path, flags: Flags, given: Sequence[str], total: int, engine: Engine):
        self.folder = folder
        self.engine = engine
        self.status = "running"
        self.count = 0
        self.made_with: dict[str, Any] = {}
        self.beside: dict[str, Any] = {}  # further files by name, written with the first picture
        self.waiting: list[dict[str, Any]] = []  # pictures that could not be noted yet
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.start = time.monotonic()
        self.written, self.cost = -math.inf, 0.0
        self.flags, self.given, self.total = flags, list(given), total

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around the making of the pictures: writes the record in the end, however that comes about. A folder that
        holds no picture goes.
        """
        try:
            yield
            self.status = "finished"
        except BaseException as error:
            self.status = "stopped" if isinstance(error, (KeyboardInterrupt, streams.Stopped)) else "failed"
            with streams.held(), contextlib.suppress(OSError):  # the first error is the one to be told
                self.end()
            raise
        with streams.held():
            self.end()

    def add(self, path: Path, settings: Settings, made_with: dict[str, Any]) -> None:
        """Notes a finished picture. A full disk is told when the next picture, or the last record, needs it."""
        self.made_with = made_with
        self.count += 1
        self.total = max(self.total, self.count)
        self.waiting.append({"file": path.name, "settings": settings.public()})
        with contextlib.suppress(OSError):
            self._note()
            if time.monotonic() - self.written > max(self.EVERY, 20 * self.cost):
                self.write()

    def _note(self) -> None:
        while self.waiting:
            writing.append_line(self.folder / self.LINES, self.waiting[0])
            self.waiting.pop(0)

    def write(self) -> None:
        """Writes run.json, and what belongs beside it; raises Unwritable."""
        start = time.monotonic()
        for name, value in self.beside.items():
            if not (self.folder / name).exists():
                writing.write_json(self.folder / name, value)
        record = {
            "status": self.status,
            "started": self.started,
            "seconds": round(time.monotonic() - self.start, 2),
            "stages": {name: round(spent, 2) for name, spent in self.engine.stages.items()},
            "device": str(self.engine.device),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "arguments": self.given,
            "flags": self.flags,
            **self.made_with,
            "version": __version__,
            "versions": versions(),
            "planned": self.total,
        }
        head = writing.json_bytes(record, indent=1).removesuffix(b"\n}")
        writing.atomic_write(self.folder / "run.json", lambda f: self._write(f, head))
        self.written = time.monotonic()
        self.cost = self.written - start

    def _write(self, file: IO[bytes], head: bytes) -> None:
        """The record with its pictures, which are never all in memory: a server makes any number."""
        file.write(head + b',\n "pictures": [')
        between = b"\n  "
        for line in self._lines():
            file.write(between + line)
            between = b",\n  "
        file.write(b"\n ]\n}\n")

    def _lines(self) -> Iterator[bytes]:
        if (self.folder / self.LINES).exists():
            with open(self.folder / self.LINES, "rb") as f:
                yield from (line.rstrip(b"\n") for line in f if line.strip())
        yield from map(writing.json_bytes, self.waiting)

    def end(self) -> None:
        """Writes the whole record, or takes the folder away if it holds no picture."""
        if not self.count:
            self.discard()
            return
        self.write()
        with contextlib.suppress(OSError):
            (self.folder / self.LINES).unlink(missing_ok=True)

    def discard(self) -> None:
        """Takes a folder away that holds no picture."""
        with contextlib.suppress(OSError):
            for name in ("run.json", self.LINES, *self.beside):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
