"""README and docs: every block of commands is run in a fresh copy, or skipped by name for a reason that stands here;
flags and files that a page names exist. `pytest tests/test_documents.py -m "" -rs` runs all and lists what is skipped.
"""

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

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("*.py", "*.sh", "requirements*.txt", "pyproject.toml")

# Commands that are not run, by what they begin with or name, and why.
LEFT_OUT = {
    "make test": "runs these tests",
    "hf ": "needs the network and accepted licences",
    "./run_inference.sh sd3": "needs the released weights",
    "python sd3_infer.py --prompt prompts.txt": "needs the released weights",
    'python sd3_infer.py --prompt "the same, at night"': "needs the released weights",
    "python sd3_infer.py --model models/sd3": "needs the released weights",
    "--layout geneval": "needs the benchmark's prompts; tests/test_sweep_layouts.py has some like them",
    "pip install peft": "needs the network",
    "python -m demo.lora": "takes minutes, and needs peft",
    "python benchmarks/": "takes minutes, and measures",
}
SLOW = ("sd3_probe.py", "--prompt prompts.txt --seed 0-3")  # half a minute and more
SLOW_PAGES = ("tutorial.md",)  # its blocks need what the ones before them made
# Python that is not run, by what it holds, and why.
PYTHON_LEFT_OUT = {"apply_residual(pipe": "needs a diffusers pipeline; tests/test_residual_diffusers.py runs the same"}


def blocks(path: Path, *languages: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [m[2] for m in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if m[1] in languages]


def commands(block: str) -> list[str]:
    """The commands of a block; one that goes on in the next line is one."""
    joined = re.sub(r"(\\|\|)\n\s*", lambda m: "| " if m[1] == "|" else "", block)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def left_out(command: str) -> str:
    return next((why for sign, why in LEFT_OUT.items() if command.startswith(sign) or f" {sign}" in command), "")


SHELL = [(path, commands(block)) for path in DOCUMENTS for block in blocks(path, "sh", "bash")]
RUN = [(path, wanted) for path, every in SHELL if (wanted := [c for c in every if not left_out(c)])]
SKIPPED = [(path, command) for path, every in SHELL for command in every if left_out(command)]
PYTHON = [(path, block) for path in DOCUMENTS for block in blocks(path, "python")]


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


def name(path: Path, text: str) -> str:
    return f"{path.name}: {text[:70]}"


def is_slow(path: Path, wanted: list[str]) -> bool:
    return path.name in SLOW_PAGES or any(sign in command for command in wanted for sign in SLOW)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        pytest.param(path, wanted, id=name(path, wanted[0]), marks=[pytest.mark.slow] if is_slow(path, wanted) else [])
        for path, wanted in RUN
    ],
)
def test_the_commands_of_a_document_run(clone, path, wanted):
    for command in wanted:
        run(clone, command)


@pytest.mark.parametrize(("path", "command"), SKIPPED, ids=[name(*item) for item in SKIPPED])
def test_a_command_that_cannot_run_here(path, command):
    pytest.skip(f"{command[:70]}: {left_out(command)}")


@pytest.mark.parametrize(("path", "block"), PYTHON, ids=[name(p, b.replace("\n", " ")) for p, b in PYTHON])
def test_the_python_of_a_document_runs(clone, path, block):
    if why := next((why for sign, why in PYTHON_LEFT_OUT.items() if sign in block), ""):
        pytest.skip(why)
    (clone / "example.py").write_text(block)
    run(clone, "python example.py")


def test_the_grid_of_the_sweeps_page_is_read(clone):
    (grid,) = blocks(ROOT / "docs" / "sweep.md", "yaml")
    (clone / "grid.yaml").write_text(grid)
    assert "= 72 " in run(clone, "python sd3_sweep.py --out gridded --grid grid.yaml --dry_run")


def test_what_is_left_out_is_there():
    every = [command for _, listed in SHELL for command in listed]
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
        for link, anchor, source in re.findall(
            r"\]\(([\w./-]+\.(?:md|png|py))(?:#([\w-]+))?\)|src=\"([\w./-]+)\"", text
        ):
            target = path.parent / (link or source)
            assert target.is_file(), f"{path.name}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in anchors, f"{path.name}: {link}#{anchor}"
        for file in re.findall(r"`((?:tests|benchmarks|sweep|demo|sd3)/\w+\.py)\b", text):
            assert (ROOT / file).is_file(), f"{path.name}: {file}"


def test_the_tree_names_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") : text.index("## How to add")]
    files = [path.name for folder in (ROOT, ROOT / "sd3") for path in folder.glob("*.py")]
    assert [file for file in files if file not in tree] == []
    assert [file for file in re.findall(r"\w+\.py\b", tree) if file not in (*files, "helpers.py")] == []


def test_the_front_page_is_short_and_the_images_are_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "tutorial").glob("*.png")) < 400_000


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
