"""README and docs: every block of commands is run in a fresh clone, or skipped by name for a reason given here; the
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
from helpers import ROOT

import sd3.probe.command
import sd3.sweep.command
from sd3.flags import FLAGS

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands that are not run, by what they begin with or name, and why.
LEFT_OUT = {
    "make test": "runs these tests",
    "source .venv/bin/activate": "changes the shell",
    "python -m pip install": "needs the network",
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
PYTHON_LEFT_OUT = {
    "StableDiffusion3Pipeline.from_pretrained": "needs the released weights; see test_residual_diffusers.py"
}


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
    """What `git clone` would give: the tracked files, as they are in the working tree."""
    copy = tmp_path_factory.mktemp("clone") / "repo"
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the repository")
    for file in listed.stdout.decode().split("\0"):
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, copy / file)
    programs = copy.parent / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    return copy


def run(clone: Path, command: str) -> str:
    env = os.environ | {
        "PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}",
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


PROGRAM = re.compile(
    r"(?<![\w.-])(?:sd3_infer\.py|sd3_sweep\.py|run_inference\.sh|sd3_probe\.py(?: \w+)?|python -m demo\.\w+"
    r"|benchmarks/\w+\.py|hf(?= )|pip(?= ))"
)
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*)")
FAMILIES = {"residual_"}  # "--residual_..." stands for all of them


def parameters(file: Path) -> set[str]:
    """Flags of a script of demo/ or benchmarks/: the parameters of its functions."""
    source = file.read_text(encoding="utf-8")
    lists = re.findall(r"^\s*def \w+\((.*?)\)(?: ->|:)", source, re.MULTILINE | re.DOTALL)
    names = {name for arguments in lists for name in re.findall(r"\b(\w+)(?:: |=)", arguments)}
    return names | set(re.findall(r'"--(\w+)"', source))


def flags_of(program: str) -> set[str]:
    """The flags of a program as a command names it, such as `sd3_probe.py measure`."""
    name, _, command = program.partition(" ")
    probe = sd3.probe.command.COMMANDS
    if name in ("sd3_infer.py", "run_inference.sh"):
        return {*FLAGS, "help", "help_all"}
    if name == "sd3_sweep.py":
        return {*sd3.sweep.command.OWN, *(flag for flag, row in FLAGS.items() if not row.sweep), "help"}
    if name == "sd3_probe.py":
        return {*probe.get(command, [flag for rows in probe.values() for flag in rows]), "help"}
    if name in ("hf", "pip"):
        return {"local-dir"} if name == "hf" else set()
    return parameters(ROOT / (command.removeprefix("-m ").replace(".", "/") + ".py" if name == "python" else name))


def misplaced(command: str) -> list[str]:
    """The flags of a command line that its program does not have."""
    command = re.sub(r'"[^"]*"|\'[^\']*\'', "QUOTED", command)
    found = list(PROGRAM.finditer(command))
    out = []
    for match, after in zip(found, [*found[1:], None], strict=False):
        arguments = re.split("[|;&#]", command[match.end() : after.start() if after else None])[0]
        known = flags_of(match[0]) | FAMILIES
        out += [f"{match[0]} --{flag}" for flag in FLAG.findall(arguments) if flag not in known]
    return out


def command_lines(text: str) -> list[str]:
    """All of a page that may be a command line: the lines of blocks, indented lines, and code inside sentences."""
    block = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = [line for code in block.findall(text) for line in re.sub(r"\\\n\s*", "", code).splitlines()]
    prose = block.sub("", text)
    lines += re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_every_flag_in_a_command_is_one_of_its_program(path):
    assert [flag for line in command_lines(path.read_text(encoding="utf-8")) for flag in misplaced(line)] == []


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python sd3_infer.py --per_kind 3 --seed 1", ["sd3_infer.py --per_kind"]),
        ('python sd3_sweep.py --out a --seed "0;1" --num_images 2', ["sd3_sweep.py --num_images"]),
        ("python sd3_probe.py suggest --measurement m --batch_size 2", ["sd3_probe.py suggest --batch_size"]),
        ("printf x | python sd3_infer.py --serve_stdin", []),
        ("python -m demo.captions --count 3 --steps 4", ["python -m demo.captions --steps"]),
        ("python benchmarks/step.py --rounds 3 --round 4", ["benchmarks/step.py --round"]),
    ],
)
def test_a_flag_of_another_program_is_found(command, wrong):
    assert misplaced(command) == wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=[p.name for p in DOCUMENTS])
def test_every_flag_in_a_sentence_exists(path):
    """In a sentence the program is not always named: a flag of any of them will do."""
    programs = ["sd3_infer.py", "sd3_sweep.py", "sd3_probe.py", "hf"]
    scripts = [file for folder in ("demo", "benchmarks") for file in (ROOT / folder).glob("*.py")]
    known = set.union(*map(flags_of, programs), *map(parameters, scripts))
    named = set(FLAG.findall(path.read_text(encoding="utf-8")))
    assert named - known - FAMILIES == set()
    if path.name == "flags.md":
        assert set(FLAGS) <= named


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
    files = [
        p.name for folder in (ROOT, ROOT / "sd3", ROOT / "demo") for p in folder.glob("*.py") if p.stem != "__init__"
    ]
    assert [file for file in files if file not in tree] == []
    assert [
        file
        for file in re.findall(r"\w+\.py\b", tree)
        if file not in (*files, "helpers.py", "test_scorer.py", "__init__.py")
    ] == []


def test_the_table_of_tests_names_every_test_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Which tests") : text.index("## How we write")]
    rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    patterns = re.findall(r"test_[\w*]+\.py", "".join(rows))
    folder = ROOT / "tests"
    named = {pattern: {path.name for path in folder.glob(pattern)} for pattern in patterns}
    assert {path.name for path in folder.glob("test_*.py")} - set().union(*named.values()) == set()
    assert [pattern for pattern, files in named.items() if not files] == []


def test_the_front_page_is_short_and_the_images_are_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "tutorial").glob("*.png")) < 400_000


def test_a_fresh_clone_has_the_folders_of_weights_and_images():
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
