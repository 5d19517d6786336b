"""The flag table: what is made from it is current, and one row is all that a flag or a model needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TOKENIZERS, modules, tensors_of
from PIL import Image
from safetensors.torch import save_file

import sd3.embed_cache
import sd3.files
import sd3.help
import sd3.png
import sd3_infer
from sd3.files import ENCODER_PREFIX, VAE_PREFIX
from sd3.find import list_models
from sd3.headers import Entry, Format
from sd3.mistakes import Mistake, Where
from sd3_infer import SD3Inferencer

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

from sd3 import find, help, planning, serve, settings
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
    "help": ["  --glow X " in help.text(), "  --slim " in help.text()],
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
    "listed": "missing  sd9.safetensors  hf download somebody/sd9" in find.list_models("models"),
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
    assert got["listed"]


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
import numpy as np
from PIL import Image
pixels = [np.asarray(Image.open(path), dtype=int) for path in (plain, own)]
rows = list(help.table([flags.FLAGS[flag]]))
print(json.dumps({{
    "help": [set(rows) <= set(help.text().splitlines()), " ".join(rows)],
    "docs": help.markdown(),
    "refused": refused,
    "record": png.read_record(own)["settings"][flag],
    "text": Image.open(own).text["parameters"],
    "replayed": told.getvalue(),
    "acts": int(abs(pixels[0] - pixels[1]).max()),
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
    assert got["help"][0]
    assert got["help"][1].startswith(f"  --{flag} ")
    assert kind == "guidance" or value in got["help"][1].replace(",", " ").split()
    assert page in got["docs"]
    assert got["refused"].startswith(f"{flag} strides: must be")
    assert kind == "guidance" or value in got["refused"]
    assert got["record"] == value
    assert text in got["text"]
    assert "bit for bit" in got["replayed"]
    assert got["acts"] > 2  # of 255
    assert got["id"]
    assert got["axis"] == 2


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == sd3.help.markdown()


NUDGED = """
import json
from sd3 import flags
from sd3.readers import OPTIONAL_FILE

flags.FLAGS["nudge"] = flags.load("nudge", OPTIONAL_FILE, None, "what is added to weights", group="sampling")

import adding_a_patch

print(json.dumps(adding_a_patch.main()))
"""


def test_one_row_of_patches_reaches_every_model_and_every_record(tmp_path):
    """A picture with patched weights is that of files which hold the sums: the sum is made in float32 and rounded once,
    before weights are quantised, packed or joined.
    """
    folders = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", NUDGED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | folders)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["parts"] == {p: [True, False] for p in ("mmdit", "vae", "controlnet", "clip_l", "clip_g", "t5xxl")}
    assert list(got["kinds"].values()) == [True] * 3
    assert got["record"] == ["all.nudge", True]
    assert got["replayed"]
    assert got["cached"] == 4  # two prompts by two sets of weights
    assert got["swept"] == [0, 2]
    assert got["help"] == [True, True]
    assert got["served"].startswith("--nudge: belongs to the whole process")


# ---- a file format -------------------------------------------------------------------------------

MAGIC = b"TOYFORMAT"


def write_toy(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A container of our own: matrices in blocks of 8 bits with a scale a row, all else in float32."""
    entries, data = {}, b""
    for name, tensor in tensors.items():
        blocks, kind = tensor.float().numpy().tobytes(), "F32"
        if tensor.ndim == 2:
            scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
            stored = (tensor.float() / scale).round().to(torch.int8)
            blocks, kind = scale.numpy().tobytes() + stored.numpy().tobytes(), "TOY_8"
        entries[name] = [kind, list(tensor.shape), len(data), len(blocks)]
        data += blocks
    header = json.dumps({"tensors": entries, "metadata": metadata or {}}).encode()
    path.write_bytes(MAGIC + struct.pack("<Q", len(header)) + header + data)


def read_toy_header(where: Where, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    data = path.read_bytes()
    first = len(MAGIC) + 8
    (length,) = struct.unpack("<Q", data[len(MAGIC) : first])
    header = json.loads(data[first : first + length])
    start = first + length
    out = {
        name: Entry(kind, tuple(shape), path, name, size, start + place)
        for name, (kind, shape, place, size) in header["tensors"].items()
    }
    if any(e.place + e.size > len(data) for e in out.values()):
        raise Mistake(*where, "is truncated")
    return out, header["metadata"]


@contextlib.contextmanager
def open_toy(path: Path) -> Iterator[Callable[[Entry], torch.Tensor]]:
    with open(path, "rb") as f:

        def read(entry: Entry) -> torch.Tensor:
            f.seek(entry.place)
            data = bytearray(f.read(entry.size))
            if entry.dtype == "F32":
                return torch.frombuffer(data, dtype=torch.float32).reshape(entry.shape)
            rows = entry.shape[0]
            scale = torch.frombuffer(data, dtype=torch.float32, count=rows)
            return torch.frombuffer(data, dtype=torch.int8, offset=4 * rows).reshape(entry.shape) * scale[:, None]

        yield read


TOY = Format("toy", ".toy", lambda start: start.startswith(MAGIC), read_toy_header, open_toy, ("F32", "TOY_8"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with the small model in the toy format, its T5 in a file of its own, and the same numbers as
    safetensors.
    """
    folder = tmp_path_factory.mktemp("toy")
    for name in ("tokenizer", "tokenizer_3"):
        (folder / name).symlink_to(TOKENIZERS / name)
    t5 = ENCODER_PREFIX.format("t5xxl")
    tensors = tensors_of(modules())
    model = {name: tensor for name, tensor in tensors.items() if not name.startswith(t5)}
    encoder = {name.removeprefix(t5): tensor for name, tensor in tensors.items() if name.startswith(t5)}
    write_toy(folder / "small.toy", model, {"width": "64", "height": "48", "steps": "2"})
    write_toy(folder / "anything.toy", encoder)
    (folder / "plain").mkdir()
    for name in ("tokenizer", "tokenizer_3"):
        (folder / "plain" / name).symlink_to(TOKENIZERS / name)
    for name in ("small", "anything"):
        with open_toy(folder / f"{name}.toy") as read:
            part = {e.name: read(e) for e in read_toy_header(Where(""), folder / f"{name}.toy")[0].values()}
        save_file(part, folder / "plain" / f"{name}.safetensors", {"width": "64", "height": "48", "steps": "2"})
    return folder


def test_one_row_of_formats_is_all_that_a_format_needs(toy, tmp_path, monkeypatch, capsys):
    words = ["--prompt", "a red circle", "--seed", "1", "--device", "cpu", "--dtype", "bfloat16", "--out_dir", tmp_path]
    assert sd3_infer.main([*map(str, words), "--model", str(toy / "small.toy")]) == 2
    assert "is not a safetensors file" in capsys.readouterr().err
    monkeypatch.setattr(sd3.files, "FORMATS", [*sd3.files.FORMATS, TOY])
    listed = list_models(str(toy))
    assert "found    small.toy  an SD3-type MMDiT" in listed
    assert "found    anything.toy  a T5 encoder" in listed
    made = []
    for model in (toy / "small.toy", toy / "plain" / "small.safetensors"):
        assert sd3_infer.main([*map(str, words), "--model", str(model), "--postfix", model.suffix]) == 0
        (path,) = (p for p in tmp_path.rglob("*.png") if p not in made)
        made.append(path)
    pixels = [np.asarray(Image.open(path)) for path in made]
    assert pixels[0].shape == (48, 64, 3)  # metadata
    assert np.array_equal(*pixels)
    record = sd3.png.read_record(made[0])
    assert record["model_sha256"] == hashlib.sha256((toy / "small.toy").read_bytes()).hexdigest()
    assert record["encoders"]["t5xxl"]["name"] == "anything.toy"
    assert (
        sd3_infer.main(["--replay", str(made[0]), "--out_dir", str(tmp_path / "again"), "--model_folder", str(toy)])
        == 0
    )
    assert "bit for bit" in capsys.readouterr().err


def test_a_format_is_recognised_by_contents_and_checked_as_any(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sd3.files, "FORMATS", [*sd3.files.FORMATS, TOY])
    (tmp_path / "small.safetensors").write_bytes((toy / "small.toy").read_bytes())  # both under the other's suffix
    (tmp_path / "t5.toy").write_bytes((toy / "plain" / "anything.safetensors").read_bytes())
    engine = SD3Inferencer().load(
        str(tmp_path / "small.safetensors"), t5xxl=str(tmp_path / "t5.toy"), device="cpu", model_folder=str(toy)
    )
    assert engine.engine.network.part.dtype_name() == "TOY_8"
    tensors = tensors_of(modules())
    short = {n: t for n, t in tensors.items() if not n.endswith("joint_blocks.1.x_block.mlp.fc1.weight")}
    zeros = {n: torch.zeros_like(t) if n.startswith(VAE_PREFIX) else t for n, t in tensors.items()}
    for name, part, why in (("short", short, "1 missing"), ("zeros", zeros, "contains only zeros")):
        write_toy(tmp_path / f"{name}.toy", part)
        with pytest.raises(Mistake, match=why):
            SD3Inferencer().load(str(tmp_path / f"{name}.toy"), device="cpu", model_folder=str(toy))
    (tmp_path / "cut.toy").write_bytes((toy / "small.toy").read_bytes()[:-5])
    with pytest.raises(Mistake, match="is truncated"):
        SD3Inferencer().load(str(tmp_path / "cut.toy"), device="cpu", model_folder=str(toy))
    assert f"damaged  {tmp_path / 'cut.toy'}: is truncated" in list_models(str(tmp_path))


def test_a_large_file_of_any_format_is_known_by_every_tensor(toy, tmp_path, monkeypatch):
    """Its ends alone do not tell two encoders apart, by which cached prompts and a sweep's files are known."""
    monkeypatch.setattr(sd3.embed_cache, "WHOLE", 1000)
    monkeypatch.setattr(sd3.files, "FORMATS", [*sd3.files.FORMATS, TOY])
    path = tmp_path / "other.toy"
    path.write_bytes((toy / "anything.toy").read_bytes())
    before = sd3.embed_cache.file_identity(path)
    entries = sorted(read_toy_header(Where(""), path)[0].values(), key=lambda e: e.place)
    data = bytearray(path.read_bytes())
    data[entries[len(entries) // 2].place] ^= 1
    path.write_bytes(data)
    assert sd3.embed_cache.file_identity(path) != before
