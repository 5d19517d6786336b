"""The flag table: what is made from it is current, and one row is all that a flag or a model needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sd3.help

ROOT = Path(__file__).parent.parent

ADDED = """
import json
from sd3 import flags, models
from sd3.effects import only_with
from sd3.readers import SWITCH, number

flags.FLAGS["glow"] = flags.picture(
    "glow", number(0.0, 2.0), 0.0, "how much it glows", matters=only_with("glow", "init_image"), group="sampling"
)
flags.FLAGS["slim"] = flags.load("slim", SWITCH, False, "loads less", group="model and text encoders")
models.MODELS["sd9"] = models.Model(steps=9, hub="somebody/sd9")

from pathlib import Path

from sd3 import help, serve, settings
from sd3.probe.command import COMMANDS
from sd3.replay import Replay
from sd3.command import read_infer_flags
from sd3.sweep.grid import SWEPT

base = {"prompt": "a", "model": "m"}
try:
    read_infer_flags(["--glow", "7", "--prompt", "x"])
    refused = ""
except ValueError as error:
    refused = str(error)
record = json.loads(json.dumps(settings.Settings(**base, glow="1.5").public()))
replay = Replay(Path("x.png"), {"settings": record}, {"model": "m"})
one, idle = settings.Settings(**base, glow="1.5", init_image="i"), settings.Settings(**base, glow=1)
print(json.dumps({
    "help": ["--glow" in help.text(), "--slim" in help.text()],
    "docs": ["| `--glow` |" in help.markdown(), "| `--slim` |" in help.markdown()],
    "refused": refused,
    "record": [one.public().get("glow"), settings.Settings(**base, slim=True).public().get("slim")],
    "same id": settings.Settings(**base).digest() == settings.Settings(**base, glow=0).digest(),
    "other id": one.digest() != settings.Settings(**base, init_image="i").digest(),
    "idle": [settings.effective(idle)[0].glow, settings.effective(idle)[1]],
    "axis": ["glow" in SWEPT, "slim" in SWEPT],
    "other engine": [settings.Setup.of(settings.Flags(**f)) != settings.Setup() for f in ({"glow": 1}, {"slim": True})],
    "replayed": replay.flags({})["glow"],
    "served": serve.Server(None, settings.Flags(), {}, Path("out")).answer('{"slim": true, "prompt": "a"}')["error"],
    "probe": ["glow" in COMMANDS["measure"], "cfg" in COMMANDS["measure"]],
    "model": settings.resolve(settings.Flags(model="sd9.safetensors"))[0]["steps"],
    "fetch": models.fetch_model("sd9.safetensors"),
}))
"""


def test_one_row_is_all_that_a_flag_or_a_model_needs():
    done = subprocess.run([sys.executable, "-c", ADDED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["help"] == got["docs"] == got["axis"] == [True, True]
    assert got["refused"] == "glow 7: must be from 0.0 to 2.0"
    assert got["record"] == [1.5, True]
    assert got["same id"]
    assert got["other id"]
    assert got["idle"] == [0.0, ["note: `glow` has no effect without `init_image`"]]
    assert got["other engine"] == [False, True]
    assert (got["replayed"], got["model"]) == (1.5, 9)
    assert got["served"].startswith("--slim: belongs to the whole process")
    assert got["probe"] == [False, True]
    assert "hf download somebody/sd9" in got["fetch"]


# What is added, by kind: its code, the flag and the value that ask for it, how the page of flags and a PNG name it.
KINDS = {
    "sampler": (
        """
methods.SAMPLERS["stride"] = methods.Sampler("stride", "Long stride", "Euler's steps, each a little longer")

def sample_stride(denoise, x, sigmas, noise):
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        x = x + (x - denoise(x, sigma)) * (following - sigma) / sigma * 1.01
    return x

sd3_impls.sample_stride = sample_stride
""",
        ("sampler", "stride"),
        ("| `stride` | Long stride |", "Sampler: Long stride"),
    ),
    "schedule": (
        """
methods.SCHEDULES["even"] = methods.Schedule("even", "Even", "evenly, whatever the shift")
sd3_impls.sigmas_even = lambda steps, shift: torch.linspace(1, 0, steps + 1)
""",
        ("scheduler", "even"),
        ("| `even` | Even |", "Schedule type: Even"),
    ),
    "guidance": (
        """
methods.GUIDANCE["Damping"] = methods.GuidanceMethod("Damping", ("damping",), "back to the conditional pass")
flags.FLAGS["damping"] = flags.picture(
    "damping", number(0.0, 1.0), 0.0, "how far back", matters=effects.only_guided("damping"), group="sampling"
)

class Damping:
    def __init__(self, share):
        self.share = share

    def passes(self, at):
        return ()

    def combine(self, at, x, denoised, guided):
        return guided + self.share * (denoised[sd3_impls.COND] - guided)

sd3_impls.Damping = Damping
""",
        ("damping", 0.5),
        ("| back to the conditional pass | `--damping` |", "Damping: 0.5"),
    ),
}
METHOD = """
import json, sys
import torch
import sd3_impls
from sd3 import methods
{first}
from sd3 import effects, flags
from sd3.readers import number
{then}
import contextlib, io
from pathlib import Path
import sd3.sweep.command
import sd3_infer
from sd3 import help, png
from sd3.command import read_infer_flags
from sd3.settings import Settings

flag, value, out = {flag!r}, {value!r}, Path(sys.argv[1])
common = ["--model", "demo", "--prompt", "a star", "--seed", "1", "--steps", "3", "--device", "cpu"]
assert sd3_infer.main([*common, "--out_dir", str(out / "plain")]) == 0
assert sd3_infer.main([*common, f"--{{flag}}", str(value), "--out_dir", str(out / "own")]) == 0
(plain,), (own,) = (sorted((out / name).rglob("0*.png")) for name in ("plain", "own"))
with contextlib.redirect_stderr(io.StringIO()) as told:
    assert sd3_infer.main(["--replay", str(own), "--out_dir", str(out / "again")]) == 0
axis = f"--{{flag}}={{value}};{{flags.FLAGS[flag].default}}"
assert sd3.sweep.command.main([*common, axis, "--out", str(out / "sweep")]) == 0
try:
    read_infer_flags([f"--{{flag}}", "strides", "--prompt", "a"])
    refused = ""
except ValueError as error:
    refused = str(error)
from PIL import Image
print(json.dumps({{
    "help": [str(value) in help.text(), f"--{{flag}}" in help.text()],
    "docs": help.markdown(),
    "refused": refused,
    "record": png.read_record(own)["settings"][flag],
    "text": Image.open(own).text["parameters"],
    "replayed": told.getvalue(),
    "acts": plain.read_bytes() != own.read_bytes(),
    "axis": len(list((out / "sweep" / "pictures").glob("*.png"))),
    "id": Settings(prompt="a", model="m", **{{flag: value}}).digest() != Settings(prompt="a", model="m").digest(),
}}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_all_that_a_method_needs(kind, tmp_path):
    """A function or class of its own, its row, and a flag for what it is told: everything else reads the rows."""
    code, (flag, value), (page, text) = KINDS[kind]
    places = {"first": "", "then": code} if kind == "guidance" else {"first": code, "then": ""}
    script = METHOD.format(flag=flag, value=value, **places)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["help"] == [kind != "guidance", True]
    assert page in got["docs"]
    assert got["refused"].startswith(f"{flag} strides: must be")
    assert kind == "guidance" or value in got["refused"]
    assert got["record"] == value
    assert text in got["text"]
    assert "bit for bit" in got["replayed"]
    assert got["acts"]
    assert got["id"]
    assert got["axis"] == 2


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == sd3.help.markdown()
