"""run_inference.sh: what reaches sd3_infer.py, from any folder, with any quoting, and which Python runs it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPT = ROOT / "run_inference.sh"
ECHO = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
VARIABLES = ("MODEL_DIR", "MODEL_FOLDER", "SD3_SHIFT", "SD35_SHIFT", "SD3_MODEL_PATH", "SD35_MODEL_PATH", "VAE_PATH")


@pytest.fixture
def echo(tmp_path) -> Path:
    path = tmp_path / "echo python"
    path.write_text(ECHO)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def launch(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES} | environment
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=120
    )


def passed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    script, *arguments = json.loads(done.stdout)
    assert script == str(ROOT / "sd3_infer.py")
    return arguments


@pytest.mark.parametrize(("which", "name", "shift"), [("sd3", "sd3_medium", "1.0"), ("sd3.5", "sd3.5_large", "3.0")])
def test_defaults(tmp_path, echo, which, name, shift):
    got = passed(launch(which, "a cat", cwd=tmp_path, PYTHON=str(echo)))
    models = str(ROOT / "models")
    wanted = ["--model", f"{models}/{name}.safetensors", "--shift", shift, "--model_folder", models]
    assert got == [*wanted, "--prompt=a cat"]


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("sd3", "sd3_medium_incl_clips_t5xxlfp8"), ("sd3", "sd3_medium_incl_clips"), ("sd3.5", "sd3.5_medium"),
        ("sd3.5", "sd3.5_large_turbo"),
    ],
)  # fmt: skip
def test_another_file_of_the_model_is_found_and_named(tmp_path, echo, which, name):
    """The file that the README downloads holds everything, and has another name."""
    models = tmp_path / "my models"
    models.mkdir()
    (models / f"{name}.safetensors").touch()
    done = launch(which, "a cat", cwd=tmp_path, PYTHON=str(echo), MODEL_DIR=str(models))
    assert passed(done)[:2] == ["--model", f"{models}/{name}.safetensors"]
    assert done.stderr == f"model: {models}/{name}.safetensors\n"
    usual = models / ("sd3_medium.safetensors" if which == "sd3" else "sd3.5_large.safetensors")
    usual.touch()
    done = launch(which, "a cat", cwd=tmp_path, PYTHON=str(echo), MODEL_DIR=str(models))
    assert passed(done)[:2] == ["--model", str(usual)]
    assert done.stderr == ""


def test_demo(tmp_path, echo):
    got = passed(launch("demo", "a cat", "--steps", "3", cwd=tmp_path, PYTHON=str(echo)))
    assert got == ["--model", f"{ROOT}/models/demo/demo.safetensors", "--prompt=a cat", "--steps", "3"]


def test_arguments_reach_the_script_untouched(tmp_path, echo):
    odd = ["--residual_target_layers", "3, 5 7", "--postfix", "", "--negative_prompt", 'a "b" $HOME `c` \\ *\n#']
    prompt = 'it\'s "quoted", $PATH; # not * a comment'
    assert passed(launch("demo", prompt, *odd, cwd=tmp_path, PYTHON=str(echo)))[2:] == [f"--prompt={prompt}", *odd]


def test_environment(tmp_path, echo):
    env = {
        "MODEL_DIR": "/m d", "MODEL_FOLDER": "/enc", "SD3_SHIFT": "2", "SD35_SHIFT": "4",
        "SD3_MODEL_PATH": "/a b.safetensors",
        "SD35_MODEL_PATH": "/c.safetensors", "VAE_PATH": "/v.safetensors", "PYTHON": str(echo),
    }  # fmt: skip
    rest = ["--model_folder", "/enc", "--vae", "/v.safetensors", "--prompt=x"]
    assert passed(launch("sd3", "x", cwd=tmp_path, **env)) == ["--model", "/a b.safetensors", "--shift", "2", *rest]
    assert passed(launch("sd3.5", "x", cwd=tmp_path, **env)) == ["--model", "/c.safetensors", "--shift", "4", *rest]


def test_the_usual_vae_is_used_only_where_it_exists(tmp_path, echo):
    env = {"MODEL_DIR": str(tmp_path), "PYTHON": str(echo)}
    assert "--vae" not in passed(launch("sd3", "x", cwd=tmp_path, **env))
    (tmp_path / "sd3_vae.safetensors").write_bytes(b"")
    got = passed(launch("sd3", "x", cwd=tmp_path, **env))
    assert got[got.index("--vae") + 1] == str(tmp_path / "sd3_vae.safetensors")


def test_a_vae_that_was_asked_for_must_be_there(tmp_path, small_model):
    env = {"SD3_MODEL_PATH": str(small_model), "MODEL_FOLDER": str(small_model.parent), "PYTHON": sys.executable}
    done = launch("sd3", "x", cwd=tmp_path, VAE_PATH="/nowhere/vae.safetensors", **env)
    assert done.returncode == 2
    assert "--vae /nowhere/vae.safetensors: no such file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sdxl", "x"), "sdxl: unknown model; must be sd3, sd3.5 or demo"),
        (("a red circle",), "a red circle: unknown model; must be sd3, sd3.5 or demo"),
        (("demo",), "the prompt is missing"),
        (("demo", "--steps", "3"), "the prompt is missing"),
        ((), "usage: run_inference.sh"),
    ],
)
def test_mistakes(tmp_path, echo, arguments, message):
    done = launch(*arguments, cwd=tmp_path, PYTHON=str(echo))
    assert done.returncode == 2
    assert message in done.stderr


def test_help(tmp_path):
    done = launch("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "SD35_MODEL_PATH" in done.stderr


def test_it_runs_for_real_from_another_folder_through_a_link(tmp_path):
    link = tmp_path / "launch"
    link.symlink_to(SCRIPT)
    flags = ["--steps", "1", "--residual_origin_layer", "0", "--residual_target_layers", "3,5,7", "--device", "cpu"]
    command = ["bash", str(link), "demo", "a red circle left of a blue square", *flags]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs" / "demo").rglob("000000.png")
    assert path.parent.name.startswith("a_red_circle_left_of_a_blue_square_")


def test_without_packages_it_makes_an_environment_and_says_so(tmp_path):
    """A bare python3 on PATH whose venv module and pip only note that they were asked."""
    copy, tools, log = tmp_path / "repo", tmp_path / "bin", tmp_path / "log"
    copy.mkdir()
    tools.mkdir()
    (copy / "run_inference.sh").write_bytes(SCRIPT.read_bytes())
    (copy / "requirements.txt").write_text("")
    fake = f"""#!/bin/bash
echo "$0 $*" >> "{log}"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
if [ "$1 $2" = "-m pip" ]; then exit 0; fi
if [ "$1" = "-" ]; then exit 1; fi
"""
    for name in ("python3", "python"):
        (tools / name).write_text(fake)
        (tools / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "PYTHON")}
    env["PATH"] = f"{tools}:/usr/bin:/bin"
    command = ["bash", str(copy / "run_inference.sh"), "demo", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "first run: installing the required packages" in done.stderr
    calls = log.read_text()
    assert f"-m venv {copy}/.venv" in calls
    assert f"{copy}/.venv/bin/python -m pip install" in calls
    assert f"{copy}/.venv/bin/python {copy}/sd3_infer.py" in calls
