"""--serve_stdin: whatever is in a line, it gets an answer, and so does the next."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sd3_infer
from sd3.engine import load_for
from sd3.serve import LONGEST_LINE, Server, lines_of, read_line, serve
from sd3.settings import Flags

RAW = {"model": str(DEMO), "device": "cpu", "dtype": "float32", "steps": "2", "width": "32", "height": "32"}
GOOD = '{"prompt": "a red circle", "seed": 3}'


def served(out: Path, lines: list, **more: str) -> list[dict]:
    """The answers to lines, served in this process; each is a line of ASCII and strict JSON."""
    raw = RAW | {"out_dir": str(out), "postfix": ""} | more
    said: list[str] = []
    serve(Flags.read(raw), raw, lines, said.append)
    assert all(line.isascii() and "\n" not in line for line in said)
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in said]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    """A server that is asked line by line."""
    flags = Flags.read(RAW)
    engine = load_for(flags)
    engine.tell.quiet = True
    return Server(engine, flags, RAW, tmp_path_factory.mktemp("served"))


def long_int(digits: int) -> str:
    return '{"prompt": "red", "seed": ' + "9" * digits + "}"


HOSTILE: list[str | bytes] = [
    '{"prompt": "a \\ud800"}',
    '{"id": "\\ud800", "prompt": 5.5}',
    '{"sampler": "\\ud800"}',
    b'{"prompt": "caf\xff"}',
    b"\xff\xfe\x00",
    b'\x00{"prompt": "red"}',
    "[" * 100_000,
    '{"a":' * 100_000,
    json.dumps({"prompt": "(" * 3000 + "x" + ")" * 3000}),
    '{"prompt": "red", "residual_target_layers": "3", "residual_weights": 1e39}',
    '{"prompt": "red", "shift": 1e-30}',
    '{"prompt": "red", "shift": 1e39}',
    '{"prompt": "red", "residual_target_layers": "3", "residual_schedule": "exp:-10000"}',
    '{"prompt": "red", "id": NaN}',
    '{"prompt": "red", "id": 1e999}',
    '{"prompt": "red", "id": ' + "[" * 900 + "]" * 900 + ', "steps": -1}',
    '{"prompt": "red", "cfg": NaN}',
    '{"prompt": "red", "cfg": -Infinity}',
    long_int(5000),
    long_int(300),
    '{"prompt": null}',
    '{"prompt": {"a": 1}}',
    '{"prompt": ["a"]}',
    '{"prompt": true}',
    '{"prompt": "red", "seed": {}}',
    '{"prompt": "red", "seed": [1, [2]]}',
    '{"prompt": "red", "width": 1e308}',
    '{"prompt": "red", "width": "9999999999999999999999"}',
    '{"prompt": "red", "init_image": "/"}',
    '{"prompt": "red", "init_image": "a\\u0000b"}',
    '{"prompt": "red", "init_image": "/dev/null"}',
    '{"prompt": "a.txt"}',
    '{"prompt": "' + "x" * 5000 + '.txt"}',
    '{"prompt": "\\u0000.txt"}',
    '{"prompt": "red", "residual_config": "/etc"}',
    '{"prompt": "red", "residual_target_layers": "0-9999"}',
    '{"prompt": "red", "": 1}',
    '{"prompt": "red", "__class__": 1}',
    '{"prompt": "red", "\\ud800": 1}',
    '{"prompt": "red", "model": "x"}',
    '{"prompt": "red", "num_images": 0}',
    '{"prompt": "red", "batch_size": -5}',
    "nonsense",
    "[]",
    "5",
    '"text"',
    "null",
    "{",
    "}" * 10,
    '{"prompt": "red"} {"prompt": "blue"}',
    "\x1b[2J\x07",
    "{'prompt': 'red'}",
    '{"prompt": "red", "skip_layer_cfg": "perhaps"}',
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_line_is_answered(server, line):
    answer = server.answer(line)
    text = json.dumps(answer)
    assert text.isascii()
    assert isinstance(answer["ok"], bool)
    if not answer["ok"]:
        assert answer["error"]
        assert "\n" not in answer["error"]
        assert len(answer["error"]) <= 2100


def test_and_the_line_after_it_too(tmp_path):
    lines = [piece for line in HOSTILE for piece in (line, GOOD)]
    answers = served(tmp_path, lines)
    assert len(answers) == len(lines)
    assert all(a["ok"] for a in answers[1::2])
    first, *others = [Path(a["files"][0]) for a in answers[1::2]]
    assert len({first, *others}) == len(HOSTILE)
    assert len({Image.open(path).tobytes() for path in (first, *others)}) == 1
    made = json.loads((first.parent / "run.json").read_text())
    assert made["status"] == "finished"
    assert len(made["pictures"]) == sum(len(a.get("files", [])) for a in answers)


@given(st.binary(max_size=200) | st.text(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(line):
    try:
        assert isinstance(read_line(line), dict)
    except ValueError as error:
        assert str(error)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["prompt", "seed", "cfg", "shift", "width", "sampler", "id", "x"]), values))
@settings(max_examples=60, deadline=None)
def test_any_object_is_answered(server, wanted):
    wanted["steps"] = "no number"  # so that none is made
    answer = server.answer(json.dumps(wanted))
    assert json.dumps(answer, allow_nan=False).isascii()
    assert answer["ok"] is False


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "out of memory"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("value cannot be converted"), "RuntimeError: value cannot be converted"),
        (KeyError("final_layer"), "KeyError"),
        (ZeroDivisionError("float division"), "ZeroDivisionError"),
        (RecursionError("too deep"), "RecursionError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "surrogates"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_the_engine_raises_is_an_answer(server, monkeypatch, error, told):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(server.engine.network, "sample", fails)
    answer = server.answer(GOOD)
    assert (answer["ok"], told in answer["error"]) == (False, True), answer
    monkeypatch.undo()
    assert server.answer(GOOD)["ok"]


def test_what_was_made_before_a_request_failed_is_named(server, monkeypatch):
    real, count = server.engine.network.sample, []

    def third_fails(*arguments, **options):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("the third")
        return real(*arguments, **options)

    monkeypatch.setattr(server.engine.network, "sample", third_fails)
    answer = server.answer('{"prompt": "red", "num_images": 4, "seed": 7, "id": "x"}')
    assert (answer["ok"], answer["seeds"], answer["id"]) == (False, [7, 8], "x")
    assert all(Path(f).exists() for f in answer["files"])


@pytest.mark.parametrize("size", [LONGEST_LINE + 5, 3 * LONGEST_LINE])
def test_a_very_long_line_is_answered_and_not_held(size):
    stream = io.BytesIO(b'{"prompt": "' + b"x" * size + b'"}\n' + GOOD.encode() + b"\n")
    first, second = lines_of(stream)
    assert len(first) <= LONGEST_LINE + 2
    with pytest.raises(ValueError, match="longer than"):
        read_line(first)
    assert second == GOOD.encode() + b"\n"


def test_a_line_without_an_end_is_a_line():
    assert list(lines_of(io.BytesIO(b"a\n\nb"))) == [b"a\n", b"\n", b"b"]


COMMAND = [sys.executable, str(ROOT / "sd3_infer.py"), "--serve_stdin", *(f"--{n}={v}" for n, v in RAW.items())]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii", "latin-1"])
def test_neither_the_locale_nor_bytes_end_it(tmp_path, encoding):
    lines = [
        b'\xef\xbb\xbf{"prompt": "red", "id": "\xc3\xa9\xe6\x9d\xb1"}',
        b"\377\n\r\n\n  ",
        '{"sampler": "é"}'.encode(),
        b'{"id": "\\ud800", "prompt": "red"}',
        b'{"prompt": "red", "id": "LAST"}',
    ]
    done = subprocess.run(
        [*COMMAND, "--out_dir", str(tmp_path / "ö")], input=b"\n".join(lines), capture_output=True,
        env=ENV | {"PYTHONIOENCODING": encoding}, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["ok"] for a in answers] == [True, False, False, True, True]
    assert [a.get("id") for a in answers] == ["é東", None, None, "\ud800", "LAST"]


def test_a_stdin_that_cannot_be_read_is_one_line(tmp_path):
    with open(tmp_path / "in", "wb") as nothing:  # opened for writing only
        done = subprocess.run(
            [*COMMAND, "--out_dir", str(tmp_path)], stdin=nothing, capture_output=True, env=ENV, text=True, timeout=120
        )
    assert done.returncode == 2
    assert "--serve_stdin: stdin cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_client_that_does_not_listen_costs_no_picture(tmp_path):
    script = f"printf '%s\\n' '{GOOD}' '{GOOD}' '{GOOD}' | \"$@\" | head -0"
    done = subprocess.run(
        ["bash", "-c", script, "bash", *COMMAND, "--out_dir", str(tmp_path)], capture_output=True, env=ENV, text=True
    )
    assert "Traceback" not in done.stderr
    assert len(list(tmp_path.rglob("[0-9]*.png"))) == 3


# ---- many lines ----------------------------------------------------------------------------------

PROMPTS = ["a red circle", "two green stars", "a blue square", "a yellow star left of a red circle"]


def many(tmp_path: Path, count: int) -> None:
    """A tenth of the lines hostile: as many answers as lines, and the good ones' pictures are those of a plain run."""
    luck = random.Random(count)
    wanted, lines = [], []
    for number in range(count):
        if number % 10 == 7:
            lines.append(luck.choice([h for h in HOSTILE if b"\n" not in (h if isinstance(h, bytes) else h.encode())]))
            wanted.append(None)
        else:
            prompt, seed = luck.choice(PROMPTS), luck.randrange(6)
            lines.append(json.dumps({"prompt": prompt, "seed": seed, "id": number}))
            wanted.append((prompt, seed))
    answers = served(tmp_path / "served", lines)
    assert len(answers) == count
    assert [a["id"] for a, w in zip(answers, wanted, strict=True) if w] == [n for n, w in enumerate(wanted) if w]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [f"--{n}={v}" for n, v in RAW.items()]
    plain = ["--prompt", str(tmp_path / "prompts.txt"), "--num_images", "6", "--seed", "0", "--out_dir"]
    assert sd3_infer.main([*flags, *plain, str(tmp_path / "plain")]) == 0
    files = sorted((tmp_path / "plain").rglob("[0-9]*.png"))
    made = {(p, s): Image.open(files[6 * i + s]).tobytes() for i, p in enumerate(PROMPTS) for s in range(6)}
    for answer, key in zip(answers, wanted, strict=True):
        if key:
            assert answer["ok"]
            assert Image.open(answer["files"][0]).tobytes() == made[key]
    run = json.loads(next((tmp_path / "served").rglob("run.json")).read_text())
    assert len(run["pictures"]) == len(list((tmp_path / "served").rglob("[0-9]*.png")))


def test_a_hundred_lines_a_tenth_hostile(tmp_path):
    many(tmp_path, 100)


@pytest.mark.slow
def test_a_thousand_lines_a_tenth_hostile(tmp_path):
    many(tmp_path, 1000)
