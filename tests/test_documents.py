"""README and docs: every command is run in a fresh copy, or left out for a reason that stands here; flags exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import READERS, ROOT

import sd3.probe.command
import sd3.sweep.command

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("*.py", "*.sh", "requirements*.txt", "pyproject.toml")

# Commands that are not run, by what they begin with or name, and why.
LEFT_OUT = {
    "make test": "runs these tests",
    "hf ": "needs the network and accepted licences",
    "./run_inference.sh sd3": "needs the released weights",
    "python sd3_infer.py --prompt prompts.txt": "needs the released weights",
    'python sd3_infer.py --prompt "the same, at night"': "needs the released weights",
    "python sd3_infer.py --model models/sd3.5": "needs the released weights",
    "python sd3_infer.py --replay outputs/demo/": "names a picture of somebody's own; tests/test_replay.py replays one",
    "--layout geneval": "needs the benchmark's prompts; tests/test_sweep_layouts.py has some like them",
    "python benchmarks/": "takes minutes, and measures",
}
SLOW = ("sd3_probe.py", "--prompt prompts.txt --seed 0-3")  # half a minute and more


def blocks(path: Path, *languages: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [m[2] for m in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if m[1] in languages]


def commands(block: str) -> list[str]:
    """The commands of a block; one that goes on in the next line is one."""
    joined = re.sub(r"(\\|\|)\n\s*", lambda m: "| " if m[1] == "|" else "", block)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def left_out(command: str) -> str:
    return next((why for sign, why in LEFT_OUT.items() if command.startswith(sign) or f" {sign}" in command), "")


SHELL = [(path, block) for path in DOCUMENTS for block in blocks(path, "sh", "bash")]
RUN = [(path, [c for c in commands(block) if not left_out(c)]) for path, block in SHELL]
RUN = [(path, wanted) for path, wanted in RUN if wanted]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A fresh copy of what the commands need, with the model that ships."""
    copy = tmp_path_factory.mktemp("clone") / "repo"
    copy.mkdir()
    for pattern in CODE:
        for path in ROOT.glob(pattern):
            shutil.copy2(path, copy / path.name)
    for name in ("demo", "sd3"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models").mkdir()
    (copy / "models" / "demo").symlink_to(ROOT / "models" / "demo")
    (copy / "bin").mkdir()
    (copy / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (copy / "bin" / "python").chmod(0o755)
    return copy


def run(clone: Path, command: str) -> str:
    env = os.environ | {
        "PATH": f"{clone / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    env.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=clone, env=env, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def is_slow(wanted: list[str]) -> bool:
    return any(sign in command for command in wanted for sign in SLOW)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        pytest.param(
            path, wanted, id=f"{path.name}: {wanted[0][:60]}", marks=[pytest.mark.slow] if is_slow(wanted) else []
        )
        for path, wanted in RUN
    ],
)
def test_the_commands_of_a_document_run(clone, path, wanted):
    for command in wanted:
        run(clone, command)


@pytest.mark.parametrize("block", [b for b in blocks(ROOT / "README.md", "python") if "SD3Inferencer()" in b])
def test_the_python_of_the_readme_runs(clone, block):
    (clone / "example.py").write_text(block)
    run(clone, "python example.py")
    assert len(list((clone / "out").glob("*.png"))) == 2


def test_what_is_left_out_is_there():
    every = [command for _, block in SHELL for command in commands(block)]
    for sign in LEFT_OUT:
        assert any(left_out(command) and sign in f" {command}" for command in every), sign
    assert len(every) > 20
    assert len(RUN) >= 5


FOREIGN = {"local-dir": "hf", "help": "every program's"}
OWN = ["benchmarks", "demo"]


def known_flags() -> set[str]:
    """Flags of the three programs, and the parameters of demo's and the benchmarks' functions."""
    names = set(READERS) | set(sd3.sweep.command.OWN) | set(FOREIGN)
    names |= {name for readers in sd3.probe.command.COMMANDS.values() for name in readers}
    for folder in OWN:
        for path in (ROOT / folder).glob("*.py"):
            source = path.read_text(encoding="utf-8")
            names |= set(re.findall(r"\b(\w+)=", source))
            for arguments in re.findall(r"^\s*def \w+\((.*?)\)(?: ->|:)", source, re.MULTILINE | re.DOTALL):
                names |= set(re.findall(r"\b(\w+): ", arguments))
    return names


@pytest.mark.parametrize("path", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_every_flag_that_a_document_names_exists(path):
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", path.read_text(encoding="utf-8")))
    families = {"residual_"}  # "--residual_..." stands for all of them
    assert not named - known_flags() - families
    if path.name == "flags.md":
        assert set(READERS) <= named


def test_files_that_a_document_names_exist():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([\w./-]+\.(?:md|png|py))\)|src=\"([\w./-]+)\"", text):
            target = path.parent / (name[0] or name[1])
            assert target.is_file(), f"{path.name}: {target}"
        for name in re.findall(r"`((?:tests|benchmarks|sweep|demo)/\w+\.py)\b", text):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


def test_a_fresh_clone_has_the_folders_of_weights_and_pictures():
    try:
        listed = subprocess.run(["git", "ls-files", "models", "outputs"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the repository")
    files = listed.stdout.decode().split()
    assert {"models/README.md", "outputs/.gitkeep"} <= set(files)
    assert {Path(name).parts[:2] for name in files} == {
        ("models", "README.md"),
        ("models", "demo"),
        ("outputs", ".gitkeep"),
    }
