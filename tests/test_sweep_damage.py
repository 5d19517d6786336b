"""A sweep goes on over what is damaged of its own files, names it, and makes damaged things again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import DEMO, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sd3.sweep.command
from sd3.files import file_sha256
from sd3.sweep.journal import MOST_NOTES, Journal, is_event, is_score
from sd3.sweep.record import is_record

OLD = ROOT / "tests" / "data" / "swept_by_27f9f54"
SMALL = ["--device", "cpu", "--dtype", "float32", "--width", "32", "--height", "32", "--steps", "2"]
FLAGS = [*SMALL, "--model", str(DEMO), "--prompt", "a red circle", "--seed", "0-1", "--residual_target_layers", "3;5"]


def sweep(out: Path, *more: str) -> int:
    return sd3.sweep.command.main(["--out", str(out), *FLAGS, *more])


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """A finished sweep of six pictures; copied before it is spoiled."""
    out = tmp_path_factory.mktemp("swept") / "s"
    assert sweep(out, "--score", "demo") == 0
    return out


@pytest.fixture
def out(swept, tmp_path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "s"))


def notes(error: str) -> list[str]:
    assert "Traceback" not in error
    return [line for line in error.splitlines() if line.startswith("note: ") and "line" in line]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


TORN = [
    b'{"why":"\303',
    b'{"event": "encode", "prompts": ["a", "b',
    b"5\n",
    b'{"event":"batch"}\n',
    b"[" * 100_000 + b"\n",
    b'{"a": ' * 50_000 + b"\n",
    b"\0\0\0\0\n",
    b"null\n",
    b"[]\n",
    b'{"event": 5}\n',
    b'{"event": "batch", "pictures": [], "seconds": 1}\n',
    b'{"event": "batch", "pictures": ["a"], "seconds": "x"}\n',
    b'{"event": "batch", "pictures": [["a"]], "seconds": 1}\n',
    b'{"event": "batch", "pictures": ["a"], "seconds": NaN}\n',
    b'{"event": "batch", "pictures": "abc", "seconds": 1}\n',
    b"<html>\n",
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_a_damaged_line_of_the_log_is_named_once(out, capsys, torn):
    number = lines(out / "log.jsonl") + 1
    with open(out / "log.jsonl", "ab") as f:
        f.write(torn)
    (out / "pictures" / sorted((out / "pictures").iterdir())[0].name).unlink()
    assert sweep(out) == 0
    error = capsys.readouterr().err
    (note,) = notes(error)
    assert f"{out / 'log.jsonl'}, line {number}: cannot be read" in note
    assert "1 made, 5 were already finished, 0 failed" in error
    after = (out / "log.jsonl").read_bytes().split(b"\n")
    assert json.loads(after[number])["event"] == "start"  # the torn line stays a line of its own
    assert len([b for b in after if b'"event": "made"' in b]) == 7


def test_many_damaged_lines_are_not_all_named(out, capsys):
    with open(out / "log.jsonl", "ab") as f:
        f.write(b"x\n" * 1000)
    assert sweep(out) == 0
    told = notes(capsys.readouterr().err)
    assert len(told) == MOST_NOTES + 1
    assert "further lines" in told[-1]


SCORES = [b'{"id": 5, "scorer": "demo", "scores": {}}\n', b'{"id":"a","scorer":"demo","scores":{"x":"y"}}\n', b"7\n",
          b'{"id": "a"', b'{"id": "a", "scorer": ["demo"], "scores": {"x": 1}}\n', b"\xff\n"]  # fmt: skip


@pytest.mark.parametrize("torn", SCORES, ids=range(len(SCORES)))
def test_a_damaged_line_of_the_scores_is_named_and_scored_again(out, capsys, torn):
    kept = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (out / "scores.jsonl").write_bytes(kept[0] + torn)
    assert sweep(out, "--score", "demo") == 0
    (note,) = notes(capsys.readouterr().err)
    assert f"{out / 'scores.jsonl'}, line 2" in note
    kept = (line for line in (out / "scores.jsonl").read_bytes().splitlines(keepends=True) if line not in torn)
    scored = [json.loads(line)["id"] for line in kept if line != torn + b"\n"]
    assert set(scored) == {p.stem for p in (out / "pictures").iterdir()}
    assert max(Counter(scored).values()) == 1


RECORDS = [b"", b"{", b"notes", b"[" * 100_000, b'{"format": 1, "planned": [[1]]}', b'{"format": 1, "planned": [1]}',
           b'{"format": 1}', b"\xff\xfe", b"5", b'{"format": 1, "planned": ["a"], "files": [1]}', b"\0" * 512,
           b'{"format": 1, "planned": [], "files": {"m": {"bytes": 1, "mtime_ns": 2, "sha256": 3}}}']  # fmt: skip


@pytest.mark.parametrize("damaged", RECORDS, ids=range(len(RECORDS)))
def test_a_damaged_sweep_json_is_named_and_written_anew(out, capsys, damaged):
    before = json.loads((out / "sweep.json").read_bytes())
    (out / "sweep.json").write_bytes(damaged)
    assert sweep(out) == 0
    error = capsys.readouterr().err
    (note,) = notes(error)
    assert f"{out / 'sweep.json'}, line 1: is damaged" in note
    assert "0 made, 6 were already finished" in error
    after = json.loads((out / "sweep.json").read_bytes())
    assert after["planned"] == before["planned"]


def test_a_lost_sweep_json_is_written_anew(out, capsys):
    (out / "sweep.json").unlink()
    assert sweep(out) == 0
    assert "0 made, 6 were already finished" in capsys.readouterr().err


def test_a_folder_of_another_sweep_is_refused_even_without_its_record(out, capsys):
    (out / "sweep.json").write_text("{")
    assert sweep(out, "--cfg", "7") == 2
    assert "holds another sweep (6 images, none of this grid)" in capsys.readouterr().err


def test_another_model_is_refused_even_without_the_record(out, capsys, tmp_path):
    (out / "sweep.json").write_text("{")
    for name in ("tokenizer", "tokenizer_3"):
        (tmp_path / name).symlink_to(DEMO.parent / name)
    raw = bytearray(DEMO.read_bytes())
    raw[-8:] = bytes(8)
    (tmp_path / DEMO.name).write_bytes(raw)
    flags = [str(tmp_path / DEMO.name) if flag == str(DEMO) else flag for flag in FLAGS]
    assert sd3.sweep.command.main(["--out", str(out), *flags]) == 2
    assert "is not the file that this sweep began with" in capsys.readouterr().err


@pytest.mark.parametrize("left", [["pictures"], ["pictures", "difference", ".lock"], [".sweep.json.x.partial"]])
def test_a_sweep_that_was_killed_before_its_record_was_there_begins(tmp_path, left):
    out = tmp_path / "s"
    for name in left:
        (out / name).mkdir(parents=True) if "." not in name else (out.mkdir(exist_ok=True), (out / name).touch())
    assert sweep(out, "--dry_run") == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without_number(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


def nan(path: Path) -> None:
    info = PngInfo()
    info.add_text("mean_difference", "nan")
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def no_picture(path: Path) -> None:
    path.write_bytes(b"<html>")


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [truncate, empty, without_number, nan, no_picture, flipped])
def test_a_damaged_difference_is_made_again(out, damage):
    path = sorted((out / "difference").iterdir())[1]
    before, results = path.read_bytes(), (out / "results.csv").read_bytes()
    damage(path)
    assert sweep(out, "--score", "demo") == 0
    assert path.read_bytes() == before
    assert (out / "results.csv").read_bytes() == results


@pytest.mark.parametrize("damage", [truncate, empty, no_picture, flipped])
def test_a_damaged_picture_is_made_again(out, capsys, damage):
    path = sorted((out / "pictures").iterdir())[2]
    before = path.read_bytes()
    damage(path)
    assert sweep(out) == 0
    error = capsys.readouterr().err
    assert f"{path} is damaged and is made again" in error
    assert "1 made, 5 were already finished" in error
    assert path.read_bytes() == before


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path, capsys):
    """The weights that it was made with no longer ship, so its record gets the hash of those that do."""
    out = Path(shutil.copytree(OLD, tmp_path / "s"))
    record = json.loads((out / "sweep.json").read_text())
    (file,) = record["files"].values()
    file["sha256"] = file_sha256(DEMO)
    (out / "sweep.json").write_text(json.dumps(record))
    before = {p.name: p.read_bytes() for p in (out / "pictures").iterdir()}
    assert len(before) == 6
    assert sweep(out) == 0
    assert "0 made, 6 were already finished" in capsys.readouterr().err
    assert sweep(out, "--seed", "0-2") == 0  # and may grow
    assert "3 made, 6 were already finished" in capsys.readouterr().err
    after = {p.name: p.read_bytes() for p in (out / "pictures").iterdir()}
    assert {name: after[name] for name in before} == before


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = dict.fromkeys(("id", "scorer", "scores", "seconds"), json_values)
keys |= {"event": st.just("batch") | json_values, "pictures": st.lists(st.text()) | json_values}
lines_of_ours = st.fixed_dictionaries({}, optional=keys)


@given(st.lists(json_values | lines_of_ours, max_size=6), st.binary(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_lines_can_be_read(tmp_path, values, more):
    journal = Journal(tmp_path)
    text = "".join(json.dumps(value) + "\n" for value in values).encode() + more
    for name in ("log.jsonl", "scores.jsonl"):
        (tmp_path / name).write_bytes(text)
    assert all(isinstance(seconds, float | int) for seconds in journal.seconds().values())
    assert all(isinstance(scores, dict) for scores in journal.scores().values())


@given(json_values | lines_of_ours)
@settings(max_examples=60, deadline=None)
def test_forms_are_checked_without_an_error(value):
    assert {is_event(value), is_score(value), is_record(value)} <= {True, False}
