"""Records and files: whatever is in them they are written, and what is only nice never costs a picture."""

from __future__ import annotations

import dataclasses
import errno
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
from sd3.run import RunRecord
from sd3.settings import Flags, Settings

SMALL = f"--model {DEMO} --device cpu --steps 1 --width 32 --height 32 --dtype float32".split()


def infer(out: Path, *more) -> int:
    return sd3_infer.main([*SMALL, "--out_dir", str(out), "--prompt", "red", *map(str, more)])


def error_of(text: str) -> str:
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    return line


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
    record = RunRecord(tmp_path, flags, ["--postfix=\udcff"], 1, small_engine)
    with record.kept():
        record.add(tmp_path / "000000.png", Settings("a", "m"), {"files": {"vae": "\ud800"}})
    run = json.loads((tmp_path / "run.json").read_bytes().decode("utf-8"))
    assert (run["flags"]["postfix"], run["arguments"]) == ("\udcff", ["--postfix=\udcff"])
    assert run["files"] == {"vae": "\ud800"}


def test_after_a_kill_every_picture_is_in_the_record(small_engine, tmp_path):
    record = RunRecord(tmp_path, Flags(), [], 9, small_engine)
    for number in range(5):  # and no end: killed here
        record.add(tmp_path / f"{number:06d}.png", Settings("a", "m", seed=number), {"model_sha256": "x"})
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["planned"], run["model_sha256"]) == ("running", 9, "x")
    lines = [json.loads(line) for line in (tmp_path / record.LINES).read_text().splitlines()]
    assert [line["settings"]["seed"] for line in lines] == list(range(5))


# ---- a full disk ---------------------------------------------------------------------------------


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
