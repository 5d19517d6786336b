"""The loop that makes and saves images, their provenance, and a run of the command line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from sd3 import streams, writing
from sd3.device import device_record
from sd3.embed_cache import describe_files
from sd3.engine import Engine, load_for
from sd3.files import contents, file_sha256
from sd3.find import list_models, model_folders
from sd3.flags import FLAGS
from sd3.mistakes import Mistake, Where, flag_name, spell
from sd3.planning import plan_for, residual_of, unknown_words, words_read
from sd3.presets import list_presets
from sd3.prompts import folder_name, read_prompts
from sd3.record import Picture, RunRecord, SingleFile, finish_killed
from sd3.replay import Replay
from sd3.settings import FILE_SETTINGS, Flags, Settings, paths_of
from sd3.unchanged import Unchanged

Saved = TypeVar("Saved")
RESIDUAL_FILE = "residual.json"  # in every run's folder, readable by `residual_config`


# Files of a single image that loading does not open: images and rotations.
FILES_OF_IMAGES = tuple(name for name in FILE_SETTINGS if FLAGS[name].scope == "picture")


class Provenance:
    """What images are made with besides their settings: file hashes, text encoders and the device. A thread computes
    the hashes while the first image is made.

    Create it before reading the files that the settings name, so that later changes are noticed.
    """

    def __init__(self, engine: Engine, settings: Settings, hashed: bool = True):
        """hashed: whether a record needs the hashes; otherwise files are only watched for changes."""
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
            files = {name: getattr(s, name) for name in FILE_SETTINGS if name != "model"}
            hardware = device_record(engine.device, engine.threads)
            if engine.encoder_device.type != engine.device.type:
                beside = device_record(engine.encoder_device, engine.threads)
                hardware |= {f"text_encoder_{name}": value for name, value in beside.items()}
            more = {
                "files": {name: self._hashes(value) for name, value in files.items() if value},
                "encoders": engine.text.record(),
                "components": component_files(engine),
                "hardware": hardware,
            }
            self.value = {"model_sha256": engine.model_file.sha256, **{n: v for n, v in more.items() if v}}
        except BaseException as error:  # raised by `wait`
            self.error = error

    def _hashes(self, value: Any) -> str | list[str]:
        """Of the file, or of each file, that a flag's value names."""
        hashes = [self._sha256(path) for path in paths_of(value)]
        return hashes[0] if isinstance(value, str) else hashes

    def _sha256(self, path: str) -> str:
        """The hash of a file that the engine opened once for all images."""
        opened = {str(part.file.path): part.file for part in self.engine.parts.values() if not part.file.folder}
        return opened[path].sha256 if path in opened else file_sha256(*contents(Path(path)))

    def check(self) -> None:
        """Raises `Changed` if a file changed after it was opened."""
        self.engine.files.check()
        self.files.check()

    def hashes(self) -> dict[str, str]:
        """sha256 of the files by path; waits until they are computed."""
        if self.thread:
            self.thread.join()
        if not self.value:
            return {}
        return hashes_by_path(self.settings.asdict(), self.value)

    def wait(self) -> dict[str, Any]:
        """The record for a saved image; waits until it is complete. Raises `Changed`, see `check`, and OSError if a
        file could not be read.
        """
        if self.thread:
            self.thread.join()
        self.check()  # after the hashes, so that they are of the opened files
        if self.error is not None:
            raise self.error
        return self.value


def hashes_by_path(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files that settings name, by path as named there; record: of an image, which has them by flag."""
    files = record.get("files") if isinstance(record.get("files"), dict) else {}
    out: dict[str, str] = {}
    for flag, hashes in {"model": record.get("model_sha256"), **files}.items():
        paths = paths_of(settings.get(flag))
        out |= zip(paths, hashes if isinstance(hashes, list) else [hashes], strict=False)
    return {path: sha256 for path, sha256 in out.items() if isinstance(sha256, str)}


def component_files(engine: Engine) -> dict[str, dict[str, Any]]:
    """For a model folder: name, size and identity of each component in use, see `describe_files`. The model's own
    sha256 covers only the transformer.
    """
    folder = engine.model_file
    components = {role: part for role, part in engine.parts.items() if folder.folder and part.file is folder}
    names = {"mmdit": "transformer"}
    return {names.get(role, role): describe_files(sorted(part.paths())) for role, part in components.items()}


def make_pictures(
    pictures: Iterable[tuple[int, Settings, Image.Image | Mistake]],
    provenance: Provenance,
    save: Callable[[Picture], Saved],
) -> Iterator[tuple[Picture, Saved]]:
    """Makes images and saves each as soon as it is finished: the only loop that does both. Yields each with the result
    of `save`.

    pictures: an iterator that makes one image at a time, see `Engine.make`; save: writes an image and its record, or
    passes it on; Ctrl-C and SIGTERM wait for it. Raises what these raise, and `Changed` if a file changed after it was
    opened.
    """
    for number, settings, image in pictures:
        picture = Picture(number, settings, image, provenance.wait())
        with streams.delayed_stops():
            saved = save(picture)
        yield picture, saved


def run(flags: Flags, given: Sequence[str] = (), replay: Replay | None = None) -> Path | None:
    """Makes the images that flags ask for; returns their folder, or the file that `out` names. Raises Mistake before
    any weights load.

    given: the flags as typed, for the record; replay: the image that is made again; `flags` has its settings.
    """
    if flags.list_models:
        print(list_models(*model_folders(flags.model_folder)))
        return None
    if flags.list_presets:
        print(spell(list_presets(), flag_name))
        return None
    started = time.monotonic()
    if replay and "prompt" not in replay.given:
        prompts, name = [flags.prompt], folder_name(flags.prompt)
    else:
        prompts, name = read_prompts(flags.prompt)
    seeds = flags.seeds(len(prompts))
    check_out(flags, len(seeds))
    engine = load_for(flags)
    residual = residual_of(flags, engine)
    skip_layer = replay.skip_layer() if replay else None
    plan = plan_for(engine, flags, prompts, seeds, skip_layer, residual, recorded=replay is not None)
    pictures = plan.pictures
    texts = [] if flags.lora else words_read(pictures[0], prompts)  # a LoRA may teach words
    for note in (*plan.notes, *unknown_words(engine.model_file.metadata, texts)):
        engine.tell.note(note)
    record = new_record(flags, name, given, len(pictures), engine)
    folder = record.path if isinstance(record, SingleFile) else record.folder
    if flags.kind_of_seeds == "rand":
        engine.tell.say(drawn_seeds([s.seed for s in pictures]))
    if isinstance(record, RunRecord):
        record.beside[RESIDUAL_FILE] = residual.as_file(folder)
    provenance = Provenance(engine, pictures[0], hashed=bool(replay) or not flags.no_metadata)
    try:
        with record.recording():
            for picture, path in make_pictures(engine.make(pictures, flags.pad_batch), provenance, record.save):
                tqdm.write(str(path))
                if replay and picture.number == 0:
                    for line in replay.report(picture.image, picture.settings, picture.record):
                        engine.tell.say(line)
    except (KeyboardInterrupt, streams.Stopped):
        kept = f"images are kept in {folder}" if isinstance(record, RunRecord) else "images are made"
        engine.tell.say(f"stopped: {record.count} of {len(pictures)} {kept}")
        raise
    seconds = time.monotonic() - started
    if flags.verbose:
        engine.tell.say(", ".join(f"{name} {spent:.1f} s" for name, spent in engine.stages.items()))
    engine.tell.say(
        f"{len(pictures)} image{'s' if len(pictures) > 1 else ''} in {seconds:.1f} s, "
        f"{seconds / len(pictures):.1f} s each: {folder}"
    )
    return folder


def check_out(flags: Flags, count: int) -> None:
    """Raises Mistake if the run's `count` images cannot be written to the place that flags name."""
    if not flags.out:
        writing.check_writable(flags.out_dir)
        return
    if count != 1:
        raise Mistake("out", flags.out, f"is for one image, but the flags ask for {count:,}; give `out_dir` instead")
    if Path(flags.out).is_dir():
        raise Mistake("out", flags.out, "is a folder")
    writing.check_writable(str(Path(flags.out).parent), "out")


def new_record(flags: Flags, name: str, given: Sequence[str], total: int, engine: Engine) -> RunRecord | SingleFile:
    """Saves the images of a run: to a new folder with a record, or to the file that `out` names."""
    if flags.out:
        return SingleFile(Path(flags.out), flags.no_metadata)
    return RunRecord(new_folder(flags, name, engine), flags, given, total, engine)


def drawn_seeds(seeds: Sequence[int], most: int = 16) -> str:
    """A line with the drawn seeds, at most `most` of them."""
    more = f" and {len(seeds) - most} more, in run.json" if len(seeds) > most else ""
    return f"seed{'s' if len(seeds) > 1 else ''} drawn: {', '.join(map(str, seeds[:most]))}{more}"


def new_folder(flags: Flags, name: str, engine: Engine) -> Path:
    """Creates the folder of a run, in the folder of its model, and finishes the records of killed runs there. Raises
    Unwritable.
    """
    names = [Path(path).name.removesuffix(".safetensors") for path in (flags.model, flags.controlnet_ckpt) if path]
    parent = Path(flags.out_dir) / "_".join(names)
    for line in finish_killed(parent):
        engine.tell.say(line)
    return writing.make_folder(parent, name, flags.postfix)
