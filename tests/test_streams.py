"""Closed streams, readers that leave, and stops at any moment: none costs a picture or shows a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import DEMO, ROOT

import sd3.streams

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
QUICK = f"--model {DEMO} --device cpu --steps 1 --width 32 --height 32 --prompt red --num_images 3 --dtype float32"
RUN = f"{sys.executable} {ROOT / 'sd3_infer.py'} {QUICK}"
SWEEP = f"{sys.executable} {ROOT / 'sd3_sweep.py'} {QUICK} --seed 0-2".replace("--num_images 3", "")


def bash(script: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = ["bash", "-c", f"set -o pipefail; {script}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENV, timeout=120, **options)


def pictures(folder: Path) -> int:
    return len(list(folder.rglob("[0-9a-f]*.png")))


CLOSED = ["2>&-", ">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "| true", "| head -1", "2>&1 >/dev/null | true",
          "2>&1 | head -1", "0>&- 1<&- | cat"]  # fmt: skip


@pytest.mark.parametrize("closed", CLOSED)
def test_a_run_whose_streams_are_closed_makes_all_pictures(tmp_path, closed):
    if "/dev/full" in closed and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = bash(f"{RUN} --out_dir o {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "o") == 3
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    (record,) = tmp_path.rglob("run.json")
    assert '"finished"' in record.read_text()


@pytest.mark.parametrize("closed", ["2>&-", "| true", "2>&1 | head -1"])
def test_and_so_does_a_sweep(tmp_path, closed):
    done = bash(f"{SWEEP} --out o {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "o" / "pictures") == 3
    assert "Traceback" not in done.stderr


def test_a_mistake_with_closed_streams_keeps_its_status(tmp_path):
    assert bash(f"{RUN} --out_dir o --stepz 3 2>&-", tmp_path).returncode == 2
    done = bash(f"{RUN} --out_dir o --stepz 3 2>&1 | true", tmp_path)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("program", ["sd3_infer.py", "sd3_sweep.py", "sd3_probe.py"])
def test_help_may_be_cut_off(tmp_path, program):
    done = bash(f"{sys.executable} {ROOT / program} --help | head -1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage")


class Broken(io.StringIO):
    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), OSError(5, "I/O"), ValueError("closed file")]
)
def test_printing_bears_what_a_stream_raises(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with sd3.streams.safe_output():
        print("a picture")
        print("a note", file=sys.stderr, flush=True)
    assert isinstance(sys.stdout, Broken)


def test_what_an_encoding_lacks_is_spelled_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with sd3.streams.safe_output():
        print("caf\xe9 \u6771 \udcff")
        assert raw.getvalue() == b"caf\\xe9 \\u6771 \\udcff\n"


# ---- stops ---------------------------------------------------------------------------------------


def restored() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored


@pytest.mark.parametrize("program", ["sd3_infer.py", "sd3_sweep.py", "sd3_probe.py"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_imports_is_quiet(tmp_path, program, number, status):
    flags = {"sd3_infer.py": QUICK, "sd3_sweep.py": f"--out o --model {DEMO} --prompt x",
             "sd3_probe.py": "measure --prompts p.txt"}[program]  # fmt: skip
    (tmp_path / "torch.py").write_text("import time\nopen('here', 'w').close()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / program), *flags.split()], stderr=subprocess.PIPE, cwd=tmp_path, text=True,
        env=ENV | {"PYTHONPATH": str(tmp_path)}, preexec_fn=restored,
    )  # fmt: skip
    deadline = time.time() + 60
    while not (tmp_path / "here").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, "")


def test_an_ignored_interrupt_stays_ignored():
    code = "import signal, sd3.streams; sd3.streams.begin(); print(signal.getsignal(2) == signal.SIG_IGN)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


# ---- what a machine lacks ------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["/no/g++", "/bin/false"])
def test_a_missing_compiler_is_one_line(tmp_path, compiler):
    env = ENV | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = f"{RUN} --out_dir {tmp_path / 'o'} --compile True"
    done = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "--compile: the blocks cannot be compiled here" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("o/*/*"))
