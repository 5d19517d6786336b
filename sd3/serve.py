"""`--serve_stdin`: loads once, then makes images for every line of JSON and answers it with a line of JSON.

{"prompt": "a red circle", "seed": 3}  ->  {"ok": true, "files": ["outputs/.../000000.png"], "seeds": [3], ...}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3 import writing
from sd3.engine import Engine, load_for
from sd3.flags import FLAGS, check_flag
from sd3.memory import OutOfMemory, one_line, out_of_memory
from sd3.mistakes import Mistake, flag_name, spell
from sd3.planning import plan_for
from sd3.prompts import read_prompts
from sd3.record import RunRecord
from sd3.run import Provenance, make_pictures, new_folder
from sd3.settings import FILE_SETTINGS, Flags, Settings, paths_of
from sd3.unchanged import stamp

EXAMPLE = json.dumps({"prompt": "a red circle", "seed": 3})
LONGEST_LINE = 2**24  # bytes; longer lines are refused and not kept in memory


class Server:
    """An engine, the flags of its command line, which those of a line override, and the folder of the images."""

    def __init__(
        self, engine: Engine, flags: Flags, values: Mapping[str, Any], folder: Path, words: Sequence[str] = ()
    ):
        self.engine, self.values, self.folder = engine, dict(values), folder
        self.record = RunRecord(folder, flags, words, 0, engine)
        self.notes: list[str] = []  # about the current line
        self.provenance: dict[tuple, Provenance] = {}  # one entry, by the files of an image and their time stamps

    def answer(self, line: str | bytes) -> dict[str, Any]:
        """The answer to a line: files, seeds and seconds, or the error; `id` is returned as given.

        Raises nothing for any line, only what stops the process (Ctrl-C, SIGTERM).
        """
        answer: dict[str, Any] = {"ok": False}
        made: list[tuple[Path, int]] = []
        self.notes = []
        started = time.perf_counter()
        try:
            wanted = read_line(line)
            if "id" in wanted:
                answer["id"] = wanted.pop("id")
            for one in self._make(wanted):
                made.append(one)
            answer["ok"] = True
        except OutOfMemory as error:
            answer["error"] = one_line(error)
        except Mistake as error:
            answer["error"] = one_line(error, 2000)
        except Exception as error:  # one line must not stop the service
            what = "out of memory; try a smaller width, height or batch_size" if out_of_memory(error) else "failed"
            answer["error"] = f"{what} ({type(error).__name__}: {one_line(error)})"
        if made or answer["ok"]:  # a failed request also lists the images it made
            answer |= {"files": [str(path) for path, _ in made], "seeds": [seed for _, seed in made]}
            if self.notes:
                answer["notes"] = self.notes
        return answer | {"seconds": round(time.perf_counter() - started, 3)}

    def _make(self, wanted: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
        for name in wanted:
            check_flag(name)
            if FLAGS[name].scope != "picture":  # decides what is loaded, or where images go
                raise Mistake(name, "", "belongs to the whole process; give it on the command line")
        flags = Flags.read({**self.values, **{n: v for n, v in wanted.items() if v is not None}})
        if wanted.get("prompt") is None and "prompt" not in self.values:
            raise Mistake("prompt", "", "is missing")
        prompts, _ = read_prompts(flags.prompt)
        plan = plan_for(self.engine, flags, prompts, flags.seeds(len(prompts)))
        pictures, self.notes = plan.pictures, [spell(note, flag_name) for note in plan.notes]
        for note in plan.notes:
            self.engine.tell.note(note)
        provenance = self._files(pictures[0])
        making = self.engine.make(pictures, flags.pad_batch)
        for picture, path in make_pictures(making, provenance, self.record.save):
            yield path, picture.settings.seed

    def _files(self, settings: Settings) -> Provenance:
        paths = [path for name in FILE_SETTINGS for path in paths_of(getattr(settings, name))]
        key = tuple((path, stamp(path)) for path in paths)
        if key not in self.provenance or self.provenance[key].error is not None:
            self.provenance = {key: Provenance(self.engine, settings)}  # one entry: files rarely change
        return self.provenance[key]


def read_line(line: str | bytes) -> dict[str, Any]:
    """The flags of a request; raises Mistake for a line that is not a JSON object."""
    if len(line) > LONGEST_LINE:
        raise Mistake("", "", f"not a line of JSON: longer than {LONGEST_LINE} bytes")
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line
        wanted = json.loads(text)  # accepts NaN, which the flag's reader then refuses
    except UnicodeDecodeError as error:
        raise Mistake("", "", f"not a line of JSON: byte {error.start + 1} is not UTF-8") from None
    except RecursionError:
        raise Mistake("", "", "not a line of JSON: it is nested too deeply") from None
    except ValueError as error:
        raise Mistake("", "", f"not a line of JSON: {error}") from None
    if not isinstance(wanted, dict):
        raise Mistake("", "", 'not an object such as {"prompt": "a red circle", "seed": 3}')
    try:
        json.dumps(wanted.get("id"), allow_nan=False)
    except (ValueError, RecursionError):
        why = "cannot be returned: a number that is not finite, or nested too deeply"
        raise Mistake("", "id", why) from None
    return wanted


def lines_of(stream: Any) -> Iterator[bytes]:
    """The lines of a binary stream; only the beginning of a line that is too long. Raises Mistake if stdin fails."""
    try:
        while line := stream.readline(LONGEST_LINE + 2):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(LONGEST_LINE)
            yield line
    except OSError as error:
        raise Mistake("serve_stdin", "", f"stdin cannot be read any further ({error.strerror})") from None


def serve(
    flags: Flags,
    values: Mapping[str, Any],
    lines: Iterable[str | bytes] | None = None,
    say: Callable[[str], Any] | None = None,
    words: Sequence[str] = (),
) -> Path | None:
    """Answers every line of stdin on stdout, in ASCII, until the input ends; skips empty lines. Returns the folder of
    the images, or None if none was made.

    values: of the given flags, which those of a line override; words: as typed, for the record. Raises what `load_for`
    raises, before reading a line.
    """
    lines = lines_of(sys.stdin.buffer) if lines is None else lines
    say = say or (lambda text: print(text, flush=True))
    writing.check_writable(flags.out_dir)
    values = {n: v for n, v in values.items() if n != "serve_stdin"}
    engine = load_for(flags)
    engine.load()
    folder = new_folder(flags, "served", engine)
    server = Server(engine, flags, values, folder, words)
    engine.tell.say(f"ready: one JSON object a line, such as {EXAMPLE}; images go to {folder}")
    with server.record.recording():
        for line in lines:
            if line.strip():
                say(json.dumps(server.answer(line)))
    return folder if server.record.count else None
