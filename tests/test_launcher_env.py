"""run_inference.sh and its Python: what is half-made is made again, two at once wait, what is wrong is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from test_launcher import VARIABLES, echo, launch, passed  # noqa: F401

ENV = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "PYTHON")}

# A python3 without packages. Its `-m venv` makes an environment whose python has them once pip ran; it notes its calls.
FAKE = """#!/bin/bash
echo "$$ $0 $*" >> "{log}"
case "$1 $2" in
  "-c "*) exec {real} "$@" ;;
  "-m venv") mkdir -p "$3/bin"; sleep {venv}; cp "$0" "$3/bin/python"; touch "$3/pip"; exit 0 ;;
  "-m pip") [ -e "${{0%/bin/python}}/pip" ] || exit 1; [ "$3" = --version ] && exit 0
            sleep {pip}; {fails}; touch "${{0%/bin/python}}/packages"; exit 0 ;;
esac
if [ "$1" = "-" ]; then [ -e "${{0%/bin/python}}/packages" ]; exit; fi
echo "ran $*"
"""


class Clone:
    """A fresh clone with a bare python3 on PATH."""

    def __init__(self, place: Path, **changes):
        self.root, self.log, tools = place / "repo", place / "log", place / "bin"
        self.root.mkdir()
        tools.mkdir()
        (self.root / "run_inference.sh").write_bytes((ROOT / "run_inference.sh").read_bytes())
        (self.root / "requirements.txt").write_text("torch>=2\n")
        values = {"venv": 0, "pip": 0, "fails": ":"} | changes
        for name in ("python3", "python"):
            (tools / name).write_text(FAKE.format(log=self.log, real=sys.executable, **values))
            (tools / name).chmod(0o755)
        self.env = ENV | {"PATH": f"{tools}:/usr/bin:/bin"}
        self.command = ["bash", str(self.root / "run_inference.sh"), "demo", "x"]

    def run(self) -> subprocess.CompletedProcess:
        return subprocess.run(self.command, capture_output=True, text=True, env=self.env, timeout=60)

    def start(self) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self.command, text=True, env=self.env, start_new_session=True, **pipes)

    def calls(self, what: str) -> int:
        return sum(what in line for line in self.log.read_text().splitlines()) if self.log.exists() else 0

    def wait_for(self, what: str) -> None:
        deadline = time.time() + 30
        while not self.calls(what) and time.time() < deadline:
            time.sleep(0.02)
        assert self.calls(what)


def test_an_environment_without_pip_is_made_again(tmp_path):
    clone = Clone(tmp_path)
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    (clone.root / ".venv" / "bin" / "python").write_bytes((tmp_path / "bin" / "python3").read_bytes())
    (clone.root / ".venv" / "bin" / "python").chmod(0o755)
    done = clone.run()
    assert done.returncode == 0, done.stderr
    assert clone.calls("-m venv") == 1
    assert "ran " in done.stdout


@pytest.mark.parametrize("during", ["-m venv", "-m pip install"])
def test_a_first_run_that_was_killed_is_done_again(tmp_path, during):
    clone = Clone(tmp_path, venv=1, pip=1)
    process = clone.start()
    clone.wait_for(during)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = clone.run()
    assert done.returncode == 0, done.stderr
    assert "ran " in done.stdout
    assert clone.calls("-m venv") == 2
    assert not (clone.root / ".venv" / ".half-made").exists()
    again = clone.run()
    assert (again.returncode, clone.calls("-m venv")) == (0, 2)  # and then it is there


def test_two_first_runs_at_once_wait_for_each_other(tmp_path):
    clone = Clone(tmp_path, venv=0.5, pip=0.5)
    both = [clone.start(), clone.start()]
    told = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    assert all("ran " in out for out, _ in told)
    assert clone.calls("-m venv") == clone.calls("-m pip install") == 1
    assert sum("waiting for it" in error for _, error in told) == 1


def test_whoever_waits_goes_on_where_the_first_was_killed(tmp_path):
    clone = Clone(tmp_path, pip=2)
    first = clone.start()
    clone.wait_for("-m pip install")
    second = clone.start()
    time.sleep(0.3)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    out, error = second.communicate(timeout=60)
    assert second.returncode == 0, error
    assert "ran " in out
    assert clone.calls("-m venv") == 2


def test_packages_that_cannot_be_installed_are_tried_again_the_next_time(tmp_path):
    clone = Clone(tmp_path, fails="exit 1")
    for _ in range(2):
        done = clone.run()
        assert done.returncode == 2
        assert "could not be installed; see the output above" in done.stderr
    assert clone.calls("-m pip install") == 2


def test_a_file_called_venv_is_left_alone(tmp_path):
    clone = Clone(tmp_path)
    (clone.root / ".venv").write_text("mine")
    done = clone.run()
    assert (done.returncode, (clone.root / ".venv").read_text()) == (2, "mine")
    assert ".venv: is not a folder" in done.stderr


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert not done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("/no/python", "PYTHON=/no/python: not found or not executable"),
        ("no-such-python", "PYTHON=no-such-python: not found or not executable"),
        ("/usr", "PYTHON=/usr: is a folder"),
        (str(ROOT / "README.md"), "not found or not executable"),
        ("/bin/false", "PYTHON=/bin/false: does not work as a Python"),
    ],
)
def test_a_python_that_is_none_is_one_line(tmp_path, python, told):
    assert told in one_line(launch("demo", "x", cwd=tmp_path, PYTHON=python))


@pytest.fixture
def bare(tmp_path) -> Path:
    """This Python, without any package but those that a test puts into `site`."""
    path = tmp_path / "bare python"
    path.write_text(f'#!/bin/bash\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


def package(tmp_path: Path, name: str, version: str, module: str = "") -> None:
    (tmp_path / "site" / (module or name)).mkdir(parents=True)
    (tmp_path / "site" / (module or name) / "__init__.py").write_text("")
    info = tmp_path / "site" / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_python_without_the_packages_is_one_line(tmp_path, bare):
    error = one_line(launch("demo", "x", cwd=tmp_path, PYTHON=str(bare)))
    assert "lacks torch, safetensors" in error
    assert f"-m pip install -r {ROOT}/requirements.txt" in error


GOOD = {"torch": "2.6", "safetensors": "0.4.3", "tokenizers": "0.20.1rc1", "huggingface_hub": "2.0", "fire": "0.6",
        "sentencepiece": "0.2.1", "numpy": "2.0.0", "filelock": "3.12", "pillow": "11.0", "tqdm": "4.66"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("torch", "2.14.0+cpu", "torch is 2.14.0+cpu, >=2.6,<2.14 is required"),
        ("torch", "2.5.9", "torch is 2.5.9, >=2.6,<2.14 is required"),
        ("pillow", "9.5.0", "pillow is 9.5.0"),
        ("sentencepiece", "0.3", "sentencepiece is 0.3"),
        ("numpy", "3.0.0", "numpy is 3.0.0"),
    ],
)
def test_packages_outside_their_bounds_are_named(tmp_path, bare, name, version, told):
    for each, good in (GOOD | {name: version}).items():
        package(tmp_path, each, good, "PIL" if each == "pillow" else "")
    assert told in one_line(launch("demo", "x", cwd=tmp_path, PYTHON=str(bare)))


def test_packages_within_their_bounds_are_not_complained_about(tmp_path, bare):
    for name, version in (GOOD | {"torch": "2.13.1+cu128"}).items():
        package(tmp_path, name, version, "PIL" if name == "pillow" else "")
    (tmp_path / "site" / "fire" / "__init__.py").write_text("raise SystemExit('fire was imported')")
    done = launch("demo", "x", "--steps", "1", cwd=tmp_path, PYTHON=str(bare))
    assert "is required" not in done.stderr
    assert "fire was imported" in done.stderr


@pytest.mark.parametrize("prompt", ["--odd prompt", "--", "--steps", "-x", "---", "--help"])
def test_a_prompt_may_begin_with_dashes(tmp_path, echo, prompt):  # noqa: F811
    got = passed(launch("demo", "--", prompt, "--steps", "3", cwd=tmp_path, PYTHON=str(echo)))
    assert got[2:] == [f"--prompt={prompt}", "--steps", "3"]


@pytest.mark.parametrize("arguments", [("demo", "--"), ("sd3", "--steps", "3"), ("demo", "--odd prompt")])
def test_a_prompt_that_was_forgotten_is_still_named(tmp_path, echo, arguments):  # noqa: F811
    assert "the prompt is missing" in one_line(launch(*arguments, cwd=tmp_path, PYTHON=str(echo)))


def test_dashes_reach_the_picture(tmp_path):
    env = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    flags = ["--steps", "1", "--device", "cpu", "--out_dir", str(tmp_path)]
    done = launch("demo", "--", "--odd prompt", *flags, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.rglob("run.json")
    assert json.loads(run.read_text())["pictures"][0]["settings"]["prompt"] == "--odd prompt"
