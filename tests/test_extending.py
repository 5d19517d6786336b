"""The flag table: what is made from it is current, and one row is all that a flag or a model needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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

from sd3 import help, planning, serve, settings
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
    "model": planning.resolve(settings.Flags(model="sd9.safetensors"))[0]["steps"],
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


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == sd3.help.markdown()
