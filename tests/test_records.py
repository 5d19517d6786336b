"""Records and files: whatever is in them they are written, and what is only nice never costs a picture."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import DEMO
from hypothesis import given
from hypothesis import strategies as st

import sd3.png
import sd3.probe.command
import sd3.writing
import sd3_infer
from sd3.record import LINES, RUN, RunRecord, finish_killed, read_lines
from sd3.settings import Flags, Settings

SMALL = f"--model {DEMO} --device cpu --steps 1 --width 32 --height 32 --dtype float32".split()


def infer(out: Path, *more) -> int:
    return sd3_infer.main([*SMALL, "--out_dir", str(out), "--prompt", "red", *map(str, more)])


def error_of(text: str) -> str:
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    return line


def full_for(monkeypatch, *names: str, after: int = 0) -> None:
    """No room for files of these names, once `after` of them were written."""
    real, written = os.fsync, []

    def sync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if any(name in path for name in names):
            written.append(path)
            if len(written) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(sd3.writing.os, "fsync", sync)


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


# ---- values --------------------------------------------------------------------------------------


class Silent:
    def __str__(self):
        raise RuntimeError("no words")


@dataclasses.dataclass
class Inner:
    value: object


LOOP: list = []
LOOP.append(LOOP)
ODD = ["\udcff", Path("a/\udc80"), Silent(), object(), {1, 2}, {("a", 1): 2}, {b"x": 1}, {None: 1}, b"bytes", 10**5000,
       np.int64(3), np.float32(0.5), np.arange(3), Inner(5), Inner(Silent()), Inner, LOOP, 1 + 2j, ValueError("x"),
       {"\ud800": {"deep": Silent()}}]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_one_value_that_cannot_be_written_does_not_cost_the_record(tmp_path, odd):
    sd3.writing.write_json(tmp_path / "run.json", {"status": "finished", "odd": odd, "pictures": [{"seed": 5}]})
    got = json.loads((tmp_path / "run.json").read_bytes().decode("utf-8"))
    assert (got["status"], got["pictures"]) == ("finished", [{"seed": 5}])
    assert "odd" in got


def test_numbers_of_numpy_stay_numbers(tmp_path):
    sd3.writing.write_json(
        tmp_path / "x", {"a": np.int64(3), "b": np.float64(0.5), "c": np.arange(3), "d": np.bool_(True)}
    )
    assert json.loads((tmp_path / "x").read_text()) == {"a": 3, "b": 0.5, "c": [0, 1, 2], "d": True}


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.binary()
    | st.text(st.characters())
    | st.just(Silent()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner) | st.tuples(inner),
    max_leaves=10,
)


@given(anything)
def test_any_value_can_be_written(value):
    data = sd3.writing.json_bytes({"value": value, "after": 1})
    assert json.loads(data.decode("utf-8"))["after"] == 1


def test_a_run_whose_flags_cannot_be_encoded_has_its_record(small_engine, tmp_path):
    flags = dataclasses.replace(Flags(), postfix="\udcff")
    record = RunRecord(tmp_path, flags, ["--postfix=\udcff"], 1, small_engine.engine)
    with record.recording():
        record.add(tmp_path / "000000.png", Settings("a", "m"), {"files": {"vae": "\ud800"}})
    run = json.loads((tmp_path / "run.json").read_bytes().decode("utf-8"))
    assert (run["flags"]["postfix"], run["arguments"]) == ("\udcff", ["--postfix=\udcff"])
    assert run["files"] == {"vae": "\ud800"}


# ---- a kill --------------------------------------------------------------------------------------


def begun(folder: Path, engine, pictures: int = 5) -> RunRecord:
    """The record of a run that goes on."""
    folder.mkdir(parents=True)
    record = RunRecord(folder, Flags(), ["--seed=0"], 9, engine)
    for number in range(pictures):
        record.add(folder / f"{number:06d}.png", Settings("a", "m", seed=number), {"model_sha256": "x"})
    return record


def killed(folder: Path, engine, pictures: int = 5) -> Path:
    """The folder of a run that was killed: its record has no end, and the system took its lock away."""
    begun(folder, engine, pictures).lock.release()
    return folder


def read_run(folder: Path) -> dict:
    return json.loads((folder / RUN).read_text(encoding="utf-8"))


def test_a_kill_loses_nothing_of_the_record(small_engine, tmp_path):
    folder = killed(tmp_path / "run", small_engine.engine)
    first, *lines = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    assert (first["status"], first["planned"], first["model_sha256"]) == ("running", 9, "x")
    assert [line["settings"]["seed"] for line in lines] == list(range(5))
    assert not (folder / RUN).exists()


def test_the_next_start_writes_what_a_kill_kept(small_engine, tmp_path):
    folder = killed(tmp_path / "run", small_engine.engine)
    first, *lines = [json.loads(line) for line in (folder / LINES).read_text().splitlines()]
    finished = begun(tmp_path / "whole", small_engine.engine)
    finished.end("finished")
    (line,) = finish_killed(tmp_path)
    assert line == f"note: a run in {folder} was killed; its run.json is written now, with 5 images"
    run = read_run(folder)
    assert (run["status"], run["planned"], run["arguments"]) == ("killed", 9, ["--seed=0"])
    assert run["pictures"] == lines
    assert 0 <= run["seconds"] < 600
    assert list(run) == list(read_run(tmp_path / "whole")) == [*first, "pictures"]
    assert [p.name for p in folder.iterdir()] == [RUN]
    assert finish_killed(tmp_path) == []


def test_a_line_that_a_kill_cut_short_is_left_out(small_engine, tmp_path):
    folder = killed(tmp_path / "run", small_engine.engine)
    with open(folder / LINES, "ab") as file:
        file.write(b'{"file": "000005.png", "settings": {"prom')
    assert len(finish_killed(tmp_path)) == 1
    assert [p["file"] for p in read_run(folder)["pictures"]] == [f"{n:06d}.png" for n in range(5)]


def test_a_run_that_goes_on_is_left_alone(small_engine, tmp_path):
    record = begun(tmp_path / "run", small_engine.engine)
    before = {path.name: path.read_bytes() for path in record.folder.iterdir()}
    assert finish_killed(tmp_path) == []
    assert {path.name: path.read_bytes() for path in record.folder.iterdir()} == before
    record.add(record.folder / "000005.png", Settings("a", "m", seed=5), {"model_sha256": "x"})
    record.end("finished")
    assert (read_run(record.folder)["status"], len(read_run(record.folder)["pictures"])) == ("finished", 6)


def test_a_run_in_another_process_is_left_alone_until_it_is_killed(small_engine, tmp_path):
    code = "import sys, time; from pathlib import Path; from filelock import FileLock\n"
    code += "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(600)"
    folder = killed(tmp_path / "run", small_engine.engine)
    process = subprocess.Popen([sys.executable, "-c", code, folder / ".lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert finish_killed(tmp_path) == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(finish_killed(tmp_path)) == 1


DAMAGED = [b"", b"\xff\xfe", b"[1]\n", b'{"file": "000000.png"}\n', b'{"status": 5}\n', b"[" * 100_000,
           b'{"status": "running", "started": "once", "planned": 3}\n']  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_stops_no_start(small_engine, tmp_path, damage):
    (tmp_path / "demo" / "damaged").mkdir(parents=True)
    (tmp_path / "demo" / "damaged" / LINES).write_bytes(damage)
    killed(tmp_path / "demo" / "other", small_engine.engine)
    assert infer(tmp_path) == 0
    assert (tmp_path / "demo" / "damaged" / LINES).read_bytes() == damage
    assert read_run(tmp_path / "demo" / "other")["status"] == "killed"


@linux
def test_a_pipe_of_that_name_stops_no_start(tmp_path):
    (tmp_path / "demo" / "odd").mkdir(parents=True)
    os.mkfifo(tmp_path / "demo" / "odd" / LINES)
    assert infer(tmp_path) == 0


@pytest.mark.parametrize("serving", [False, True])
def test_each_command_finishes_the_killed_runs_of_its_model(small_engine, tmp_path, capsys, monkeypatch, serving):
    mine, other = (killed(tmp_path / name / "run", small_engine.engine, 2) for name in ("demo", "other"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    more = ["--serve_stdin"] if serving else ["--prompt", "red"]
    assert sd3_infer.main([*SMALL, "--out_dir", str(tmp_path), *more]) == 0
    assert f"note: a run in {mine} was killed; its run.json is written now, with 2 images" in capsys.readouterr().err
    assert (read_run(mine)["status"], (other / RUN).exists()) == ("killed", False)


def test_an_end_that_could_not_be_written_is_written_by_the_next_start(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        full_for(patch, RUN)
        assert infer(tmp_path, "--num_images", 2) == 2
    assert "run.json: cannot be written: the disk is full" in error_of(capsys.readouterr().err)
    ((lines),) = tmp_path.rglob(LINES)
    assert infer(tmp_path) == 0
    assert (read_run(lines.parent)["status"], len(read_run(lines.parent)["pictures"])) == ("finished", 2)


def test_lines_that_did_not_fit_are_written_with_the_next(small_engine, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sd3.writing, "append_line", full)
        record = begun(tmp_path / "run", small_engine.engine, 2)
    assert not (record.folder / LINES).exists()
    record.add(record.folder / "000002.png", Settings("a", "m", seed=2), {"model_sha256": "x"})
    first, *lines = [value for value, _ in read_lines(record.folder / LINES)]
    assert first["status"] == "running"
    assert [line["settings"]["seed"] for line in lines] == [0, 1, 2]


# ---- a full disk ---------------------------------------------------------------------------------


@linux
def test_a_full_disk_names_the_picture_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    full_for(monkeypatch, "")
    assert infer(tmp_path) == 2
    assert "000000.png: cannot be written: the disk is full" in error_of(capsys.readouterr().err)
    assert not list((tmp_path / "demo").iterdir())


@linux
@pytest.mark.parametrize("after", [1, 2])
def test_a_disk_that_fills_up_keeps_what_is_there(tmp_path, monkeypatch, capsys, after):
    full_for(monkeypatch, ".png", after=after)
    assert infer(tmp_path, "--num_images", 3) == 2
    assert f"{after:06d}.png: cannot be written: the disk is full" in error_of(capsys.readouterr().err)
    (record,) = tmp_path.rglob("run.json")
    assert len(json.loads(record.read_text())["pictures"]) == len(list(record.parent.glob("*.png"))) == after
    assert not [*tmp_path.rglob("*.partial")]


@linux
@pytest.mark.parametrize("name", ["run.json", "residual.json"])
def test_a_record_that_cannot_be_written_costs_no_picture(tmp_path, monkeypatch, capsys, name):
    full_for(monkeypatch, name)
    assert infer(tmp_path, "--num_images", 3) == 2  # it is said
    assert f"{name}: cannot be written: the disk is full" in error_of(capsys.readouterr().err)
    assert len(list(tmp_path.rglob("[0-9]*.png"))) == 3


@linux
@pytest.mark.parametrize("size", ["8k", "16k"])
def test_a_real_full_disk(tmp_path, size):
    """On a file system of its own, where this may be made."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        command = [
            sys.executable,
            sd3_infer.__file__,
            *SMALL,
            "--prompt",
            "red",
            "--num_images",
            "9",
            "--out_dir",
            place,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 2
        error_of(done.stderr)
        folders = [p for p in place.glob("*/*") if p.is_dir()]
        assert all(list(folder.glob("*.png")) for folder in folders)
        assert not [*place.rglob("*.partial")]
    finally:
        subprocess.run(["umount", str(place)], check=True)


# ---- what is only nice ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EROFS])
def test_rights_that_cannot_be_set_cost_no_picture(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sd3.writing.os, "chmod", refused)
    assert infer(tmp_path) == 0
    assert len(list(tmp_path.rglob("000000.png"))) == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_costs_no_picture(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sd3.writing.os, "fsync", refused)
    assert infer(tmp_path) == 0


def test_files_have_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        sd3.writing.atomic_write(tmp_path / "x", lambda f: f.write(b"x"))
        sd3.writing.append_line(tmp_path / "y", 1)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "xy"} == {0o640}


def test_a_folder_that_went_is_named(tmp_path):
    with pytest.raises(OSError, match=r"gone/x\.png: cannot be written: No such file"):
        sd3.writing.atomic_write(tmp_path / "gone" / "x.png", lambda f: f.write(b"x"))


def test_a_line_that_did_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    sd3.writing.append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"torn": ')
    sd3.writing.append_line(path, {"b": 2})
    assert path.read_bytes().split(b"\n") == [b'{"a": 1}', b'{"torn": ', b'{"b": 2}', b""]


def test_a_log_on_a_full_disk_is_named():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="/dev/full: cannot be written: the disk is full"):
        sd3.writing.append_line(Path("/dev/full"), {"a": 1})


# ---- measurements --------------------------------------------------------------------------------

ROWS = [{"sigma": 1.0, "block": block, "retrieval": 0.5} for block in range(4)]
MEASURED = {"depth": 4, "chance": {"retrieval": 0.1}, "rows": ROWS, "origin": 0, "model": "m"}


def spoiled(**changes) -> bytes:
    return json.dumps(MEASURED | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b'{"depth": ' * 50_000,
        b"\xff\xfe",
        b"null",
        spoiled(rows=[row | {"retrieval": float("nan")} for row in ROWS]),
        spoiled(rows=[row | {"retrieval": "x"} for row in ROWS]),
        spoiled(depth="many"),
        spoiled(depth=-1),
        spoiled(chance=5),
        spoiled(rows=5),
    ],
    ids=range(11),
)
def test_a_damaged_measurement_is_one_line(tmp_path, capsys, data):
    path = tmp_path / "m.json"
    path.write_bytes(data)
    assert sd3.probe.command.main(["suggest", "--measurement", str(path)]) == 2
    assert f"--measurement {path}: is not a measurement" in error_of(capsys.readouterr().err)


def test_a_measurement_that_is_no_file_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "no", "no such file"),
    ):
        assert sd3.probe.command.main(["suggest", "--measurement", str(path)]) == 2
        assert told in error_of(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["measure", "calibrate"])
def test_a_place_that_cannot_be_written_is_called_by_its_flag(tmp_path, capsys, command):
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "r.safetensors"
    more = ["--targets", "3"] if command == "calibrate" else []
    flags = ["--model", str(DEMO), "--prompts", str(tmp_path / "p.txt"), "--out", str(out), *more]
    assert sd3.probe.command.main([command, *flags]) == 2
    assert error_of(capsys.readouterr().err).startswith("error: --out ")
