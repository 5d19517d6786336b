"""A bug gives a traceback, status 1 and one line that asks for a report; and faults that a stranger's read found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT

import sd3_infer
from sd3 import command
from sd3.engine import Engine
from sd3.mistakes import Mistake
from sd3.models import model_path
from sd3.reading import Note
from sd3.settings import Settings, Setup
from sd3.versions import __version__
from sd3_infer import SD3Inferencer


def test_a_bug_prints_its_traceback_and_asks_for_a_report(capsys):
    def work():
        raise KeyError("lost")

    assert command.execute(work, "--width", ["--prompt", "a cat"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "KeyError: 'lost'" in error
    last = error.splitlines()[-1]
    assert last.startswith(f"error: this is a bug of sd3-residual {__version__}; please report it")
    assert last.endswith("--prompt 'a cat'")


def test_a_bug_while_words_are_read_is_reported_too(capsys):
    def read(words):
        raise ValueError("no mistake of yours")

    assert command.answer_early(["x"], read, str) == (1, None)
    assert "this is a bug of sd3-residual" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["sd3_infer.py", "sd3_sweep.py", "sd3_probe.py"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--cgf", "3"], ["measure", "--cgf", "3"]])
def test_no_torch_for_help_version_and_a_bad_flag(program, words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / program), *words], capture_output=True, text=True, timeout=60
    )
    assert not [line for line in done.stderr.splitlines() if line.rpartition("|")[2].strip() == "torch"]
    assert done.returncode == (0 if words[0] in ("--help", "--version") else 2)
    if words == ["--version"]:
        assert done.stdout == f"sd3-residual {__version__}\n"


@pytest.mark.parametrize("name", ["cfg", "prompt", "residual_target_layers", "residual_weights", "dtype", "glow"])
def test_gen_image_refuses_what_it_would_ignore(name, tmp_path):
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    with pytest.raises(TypeError, match=name):
        engine.gen_image("red", out_dir=tmp_path, **{name: "1"})


def test_a_setup_reads_its_fields():
    assert (Setup(dtype="bf16").dtype, Setup(no_t5="yes").no_t5) == ("bfloat16", True)
    assert Setup(device=torch.device("meta")).device == torch.device("meta")
    with pytest.raises(Mistake, match="weights foo: must be one of full, int8, fp8"):
        Engine(Setup(model=str(DEMO), weights="foo"))


@pytest.mark.parametrize("field", ["width", "residual_branch", "cfg", "vae_tile"])
def test_settings_without_a_value_are_refused(field):
    with pytest.raises(Mistake, match=f"^{field} "):
        Settings(prompt="a", model="m", **{field: None})


def test_a_note_reads_plainly_in_python():
    assert str(Note("`init_image` a.png: is transparent")) == "init_image a.png: is transparent"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is locked for root")
def test_a_locked_folder_is_a_mistake(tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    assert sd3_infer.main(["--prompt", "a", "--model", str(locked / "m.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_model_that_ships_has_a_name(tmp_path, capsys):
    assert Path(model_path("demo")).samefile(DEMO)
    words = ["--model", "demo", "--prompt", "red", "--steps", "1", "--device", "cpu", "--out_dir", str(tmp_path)]
    assert sd3_infer.main(words) == 0
    (picture,) = tmp_path.glob("demo/*/000000.png")
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(picture), "--out_dir", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().err
