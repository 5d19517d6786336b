"""Two rebuildings of the house changed nothing: the same pictures and records as before, and old work goes on.

Both checkouts run as processes with one thread and read the same files. Settings that share a load are lines of one
`--serve_stdin` process on each side. The only difference allowed: a record of the new side names the tool's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, controlnet_tensors, mmdit_config, modules, tensors_of
from PIL import Image
from safetensors.torch import load_file, save_file

BEFORE = {  # commit: whether it spells weights for all targets `each:0.5`
    "bdb1d613770985c8cf168c5a55d1b0af0305506c": False,  # the last one before the package `sd3/`
    "df1c24e": True,  # the last one before the engine was taken apart
}
RECORD = "sd3_residual"  # the PNG chunk with the settings
OF_THE_TEST = ("PYTHONPATH", "THP_MEM_ALLOC_ENABLE")  # what pytest, or a module imported here, set for this process
ENV = {n: v for n, v in os.environ.items() if n not in OF_THE_TEST} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WIDTH = 128  # of the shipped model's text tokens
pytestmark = pytest.mark.slow


# ---- two checkouts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """One side: whose command line runs, and how it spells weights (`each:0.5` was `0.5` before)."""

    name: str
    root: Path
    files: Path
    spells_each: bool

    def spell(self, value: Any) -> Any:
        """A value of the tables below: `@name` is a file, this side's own spelling of it where there are two."""
        if not isinstance(value, str):
            return value
        if value.startswith("@"):
            own = self.files / self.name / value[1:]
            return str(own if own.exists() else self.files / value[1:])
        return value if self.spells_each else value.replace("each:", "")

    def start(self, script: str, flags: Mapping[str, Any], **options: Any) -> subprocess.Popen:
        """A process, in a folder that belongs to neither checkout. True is a switch, None a flag left out."""
        given = {name: value for name, value in flags.items() if value is not None}
        words = [f"--{n}" if value is True else f"--{n}={self.spell(value)}" for n, value in given.items()]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(
            [sys.executable, str(self.root / script), *words], env=ENV, cwd=self.files, text=True, **pipes
        )

    def serve(self, flags: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> subprocess.Popen:
        """A serving process that was sent its lines."""
        process = self.start("sd3_infer.py", flags | {"serve_stdin": True}, stdin=subprocess.PIPE)
        for line in lines:
            process.stdin.write(json.dumps({name: self.spell(value) for name, value in line.items()}) + "\n")
        process.stdin.close()
        process.stdin = None  # so that `communicate` leaves it alone
        return process


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What a process that succeeds prints, on stdout and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def served_files(process: subprocess.Popen) -> list[list[Path]]:
    """The pictures that a serving process names, line by line."""
    answers = [json.loads(line) for line in finish(process)[0].splitlines()]
    for answer in answers:
        assert answer["ok"], answer
    return [[Path(path) for path in answer["files"]] for answer in answers]


@dataclass(frozen=True)
class Checkouts:
    """The checkout of the commit before and this one, and a folder for what they write."""

    old: Checkout
    new: Checkout
    out: Path
    groups: dict[str, tuple[dict[str, list[Path]], ...]] = field(default_factory=dict)

    def pictures(self, group: str) -> tuple[dict[str, list[Path]], ...]:
        """The pictures of a group by the name of their settings, old and new; made when they are wanted first."""
        if group not in self.groups:
            load, lines = GROUPS[group]
            processes = [
                side.serve(PLAIN | load | {"out_dir": str(self.out / side.name / group)}, lines.values())
                for side in (self.old, self.new)
            ]
            self.groups[group] = tuple(dict(zip(lines, served_files(p), strict=True)) for p in processes)
        return self.groups[group]


@pytest.fixture(scope="module", params=BEFORE)
def checkouts(request, tmp_path_factory) -> Checkouts:
    folder = tmp_path_factory.mktemp("since")
    archive = folder / "before.zip"
    try:
        subprocess.run(["git", "archive", "-o", archive, request.param], cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"commit {request.param[:7]} is not here; it needs git and the history")
    shutil.unpack_archive(archive, folder / "before")
    write_files(folder / "files", folder / "before" / "models" / "demo", BEFORE[request.param])
    old = Checkout("old", folder / "before", folder / "files", spells_each=BEFORE[request.param])
    return Checkouts(old, Checkout("new", ROOT, folder / "files", spells_each=True), folder / "out")


# ---- what they read ------------------------------------------------------------------------------


EACH = {"origin_layer": 1, "target_layers": "2-5", "residual_weights": "each:0.4", "mode": "anchored"}
ALIGNED = {"target_layers": [3, 5], "weights": "each:0.2", "mode": "aligned", "rotations": "../turn.safetensors"}


def write_files(files: Path, demo: Path, spells_each: bool) -> None:
    """Everything that the settings name: models, ControlNets, pictures, prompts, rotations and configurations."""
    (files / "models").mkdir(parents=True)
    for part in demo.iterdir():  # the old commit's model file, with the tokenizers beside it
        (files / "models" / part.name).symlink_to(part)
    write_models(files, load_file(demo / "demo.safetensors"))
    save_file(controlnet_tensors(mmdit_config(), chained=True, kind=1), files / "control_8b.safetensors")
    save_file(controlnet_tensors(mmdit_config(), chained=False), files / "control_2b.safetensors")
    random = torch.Generator().manual_seed(1)
    for name, size in (("photo.png", (90, 120, 3)), ("guide.png", (96, 96, 3))):
        pixels = torch.randint(256, size, generator=random, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BOX).save(files / name)
    (files / "prompts.txt").write_text("a red circle\ntwo green stars\na pink star above a gray square\n")
    write_rotations(files, random)
    weights = {"residual_weights": torch.tensor([0.3, 0.1]), "origin_layer": 0, "target_layers": [4, 6]}
    torch.save(weights, files / "weights.pth")
    one = {"origin_layer": 1, "target_layers": [3, 5, 7], "residual_weights": [0.3], "mode": "add"}
    one |= {"schedule": "constant", "start": 0.0, "end": 1.0, "branch": "both", "rotations": None}
    (files / "one_number.json").write_text(json.dumps(one))  # every key and no version: earlier versions wrote it so
    for side in ("old", "new"):
        (files / side / "embeddings").mkdir(parents=True)  # neither side reads the other's
        for name, config in (("each.json", EACH), ("aligned.json", ALIGNED)):
            text = json.dumps(config)
            (files / side / name).write_text(
                re.sub(r'"each:([\d.]+)"', r"\1", text) if side == "old" and not spells_each else text
            )


def write_models(files: Path, demo: Mapping[str, torch.Tensor]) -> None:
    """Parts of the shipped model in files of their own, each a little different from what the model file holds, and a
    deeper random model, some layers of which are MMDiT-X's, under the names that bring settings with them.
    """
    encoders, bare = files / "encoders", files / "bare"
    for folder in (encoders, bare):
        folder.mkdir()
        for name in ("tokenizer", "tokenizer_3"):
            (folder / name).symlink_to((files / "models" / name).resolve())
    for role, scale in (("clip_l", 1.25), ("clip_g", 0.75), ("t5xxl", 1.5)):
        prefix = f"text_encoders.{role}.transformer."
        own = {k.removeprefix(prefix): v for k, v in demo.items() if k.startswith(prefix)}
        save_file({k: v * scale if "embed" in k else v for k, v in own.items()}, encoders / f"{role}.safetensors")
    vae = {k: v for k, v in demo.items() if k.startswith("first_stage_model.")}
    save_file({k: v * 0.9 if "conv_" in k else v for k, v in vae.items()}, files / "vae.safetensors")
    rest = {k: v for k, v in demo.items() if not k.startswith("text_encoders.")}
    save_file(rest, bare / "bare.safetensors", {"width": "80", "height": "64", "steps": "3", "cfg": "3"})
    deep = tensors_of(modules(mmdit_config(depth=11)))
    save_file(deep, files / "models" / "sd3.5_medium_small.safetensors", {"width": "64", "height": "48"})
    for name in ("sd3_medium", "sd3.5_large_turbo"):
        (files / "models" / f"{name}_small.safetensors").symlink_to("sd3.5_medium_small.safetensors")


def write_rotations(files: Path, random: torch.Generator) -> None:
    """For targets 3 and 5, the same at every sigma and in two buckets, and a published kind of file."""
    turn = torch.linalg.qr(torch.randn(4, WIDTH, WIDTH, generator=random))[0].contiguous()
    notes = {"origin_layer": "0", "target_layers": "[3, 5]"}
    save_file({"rotation_matrices": turn[:2].contiguous()}, files / "turn.safetensors", notes)
    edges = {"timestep_bucket_edges": torch.tensor([0.7])}
    buckets = turn.reshape(2, 2, WIDTH, WIDTH)
    save_file({"rotation_matrices": buckets} | edges, files / "buckets.safetensors", notes)
    torch.save({"rotation_matrices": turn[2:], "origin_layer": 0, "target_layers": [3, 5]}, files / "turn.pt")


# ---- settings ------------------------------------------------------------------------------------

PLAIN = {
    "model": "@models/demo.safetensors", "device": "cpu", "text_encoder_device": "cpu", "steps": 4, "seed": 7,
    "prompt": "a red circle left of a blue square",
}  # fmt: skip
TWO = {"residual_target_layers": "3,5", "residual_weights": "each:0.4"}
START = {"init_image": "@photo.png"}
TURNED = TWO | {"residual_mode": "aligned"}
BIG = {"width": 192, "height": 160}
GUIDED = {"controlnet_cond_image": "@guide.png"}
MANY = {"num_images": 3, "batch_size": 2}

PICTURE: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "another seed": {"seed": 2**40},
    "another prompt": {"prompt": "two green stars, naïve (above:1.3) a ;white #square\n"},
    "negative prompt": {"negative_prompt": "a blue square"},
    "cfg": {"cfg": 4.5},
    "cfg 1": {"cfg": 1, "negative_prompt": "without effect"},
    "steps": {"steps": 7},
    "shift": {"shift": 1.3},
    "dpmpp_2m": {"sampler": "dpmpp_2m"},
    "size": {"width": 80, "height": 64},
    "tiles": BIG | {"vae_tile": 128},
    "no tiles": BIG | {"vae_tile": "off"},
    "tiles, image to image": BIG | START | {"vae_tile": 128, "denoise": 0.5},
    "cache": {"cache": 0.3, "steps": 8},
    "cache and residual": {"cache": 0.3, "steps": 8} | TWO,
    "batch": {"num_images": 3, "batch_size": 2, "seed": 1},
    "padded batch": {"num_images": 3, "batch_size": 2, "seed": 11, "pad_batch": True},
    "prompts, fixed": {"prompt": "@prompts.txt", "seed_type": "fixed", "seed": 21},
    "prompts, roll": {"prompt": "@prompts.txt", "seed_type": "roll", "seed": 31, "batch_size": 4} | TWO,
    "no residual": {"residual_target_layers": "none", "residual_weights": "each:0.4"},
}
IMAGE_TO_IMAGE: dict[str, dict[str, Any]] = {
    "usual denoise": START,
    **{f"denoise {d}": START | {"denoise": d} for d in (0.0, 0.25, 0.5)},
    "all noise": START | {"denoise": 1.0},
    "other sampler": START | {"denoise": 0.7, "sampler": "dpmpp_2m", "shift": 3},
    "residual": START | TWO | {"denoise": 0.6, "residual_start": 0.4},
    "batch": START | MANY | {"denoise": 0.6, "seed": 41},
}
RESIDUAL: dict[str, dict[str, Any]] = {
    "each": TWO,
    "list": TWO | {"residual_weights": "0.5,-0.2"},
    "usual weights": {"residual_target_layers": "[3, 5]"},
    "one target": {"residual_target_layers": 4, "residual_weights": 0.3},
    "ramp": {"residual_target_layers": "2-6", "residual_weights": "linear:0.5:0.1"},
    "origin": {"residual_origin_layer": 2, "residual_target_layers": "3-7:2", "residual_weights": "each:0.25"},
    "anchored": TWO | {"residual_mode": "anchored"},
    "anchored, cosine": TWO | {"residual_mode": "anchored", "residual_schedule": "cosine"},
    "linear": TWO | {"residual_schedule": "linear"},
    "exp": TWO | {"residual_schedule": "exp:2"},
    "start": TWO | {"residual_start": 0.3},
    "end": TWO | {"residual_end": 0.6},
    "window": TWO | {"residual_start": 0.25, "residual_end": 0.75},
    "cond": TWO | {"residual_branch": "cond"},
    "uncond": TWO | {"residual_branch": "uncond"},
    "cond, anchored": TWO | {"residual_branch": "cond", "residual_mode": "anchored", "negative_prompt": "a star"},
    "cfg 1": TWO | {"cfg": 1},
    "aligned": TURNED | {"residual_rotations": "@turn.safetensors"},
    "aligned in buckets": TURNED | {"residual_rotations": "@buckets.safetensors", "steps": 6},
    "aligned, one branch": TURNED | {"residual_rotations": "@buckets.safetensors", "residual_branch": "uncond"},
    "aligned, published": TURNED | {"residual_rotations": "@turn.pt", "residual_schedule": "linear"},
    "a file": {"residual_config": "@each.json"},
    "a file and flags": {"residual_config": "@each.json", "residual_weights": "each:0.1", "residual_end": 0.5},
    "a file with rotations": {"residual_config": "@aligned.json"},
    "a published file": {"residual_config": "@weights.pth"},
    "an old file of one number": {"residual_config": "@one_number.json"},
    "batch": TWO | MANY | {"seed": 51, "prompt": "@prompts.txt"},
    "weights of 0": TWO | {"residual_weights": "each:0"},
    "off": {"residual_target_layers": "none"},
}
FEW = {"nothing more": {}, "residual": TWO | {"residual_mode": "anchored"}, "from a picture": START | {"denoise": 0.6}}
CONTROL = {
    "nothing more": {},
    "weak": {"controlnet_strength": 0.4},
    "another picture": {"controlnet_cond_image": "@photo.png", "negative_prompt": "a star"},
    "residual": TWO | {"controlnet_strength": 0.6},
    "batch": MANY | {"seed": 61},
    "cfg 1": {"cfg": 1},
}
SMALL = {"width": 64, "height": 48}
# Settings by the flags that a process is started with.
GROUPS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "picture": ({}, PICTURE),
    "image to image": ({"steps": 8}, IMAGE_TO_IMAGE),
    "residual": ({}, RESIDUAL),
    "float32": ({"dtype": "float32", "t5_resident": True, "embed_cache": "@embeddings"}, FEW),
    "float16": ({"dtype": "fp16"}, FEW),
    "int8": ({"weights": "int8", "dtype": "bf16"}, FEW),
    "fp8": ({"weights": "fp8", "dtype": "float32"}, FEW),
    "offload": ({"offload": True, "dtype": "float32"}, FEW),
    "no T5": ({"no_t5": True, "verbose": True}, FEW),
    "shipped ControlNet": (GUIDED | {"controlnet_ckpt": "@models/self_check/controlnet.safetensors"}, CONTROL),
    "ControlNet 8B, canny": (GUIDED | {"controlnet_ckpt": "@control_8b.safetensors", "dtype": "float32"}, CONTROL),
    "ControlNet 2B": (GUIDED | {"controlnet_ckpt": "@control_2b.safetensors"}, CONTROL),
    "text encoders": ({f: f"@encoders/{f}.safetensors" for f in ("clip_l", "clip_g", "t5xxl")}, FEW),
    "text encoders' folder": ({"model": "@bare/bare.safetensors", "model_folder": "@encoders"}, FEW),
    "VAE": ({"vae": "@vae.safetensors"}, FEW),
    "skip-layer guidance": (
        {"model": "@models/sd3.5_medium_small.safetensors", "skip_layer_cfg": True, "steps": 8},
        FEW | {"without": {"skip_layer_cfg": False}, "batch": MANY | {"seed": 71}, "cfg": {"cfg": 2.5}},
    ),
    "a released model": ({"model": "@models/sd3_medium_small.safetensors", "steps": None}, {"usual settings": {}}),
    "a turbo model": ({"model": "@models/sd3.5_large_turbo_small.safetensors", "steps": None}, FEW),
}
# Settings that come to the same as others of their group. All the rest differ from each other.
EQUAL = {("picture", "no residual"): "nothing more", ("residual", "off"): "weights of 0"}
# Flags that decide nothing of a picture, and those that the other tests here are about.
NO_SETTINGS = {
    "compile", "info", "list_models", "no_metadata", "out", "out_dir", "postfix", "replay", "self_check", "serve_stdin",
    "settings",
}  # fmt: skip


# ---- comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """What a PNG shows (a hash of its pixels) and says."""

    pixels: str
    texts: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Picture:
        with Image.open(path) as image:
            image.load()
            form = f"{image.mode} {image.width} x {image.height}"
            return cls(f"{form}: {hashlib.sha256(image.tobytes()).hexdigest()}", dict(image.text))

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.texts[RECORD])


def without_tool_version(record: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A record of the new side less the tool's version, which records did not name before."""
    record = {name: value for name, value in record.items() if name in before or "version" not in name}
    versions = {n: v for n, v in record["versions"].items() if n in before["versions"] or not n.startswith("sd3")}
    return record | {"versions": versions}


def check_same(old_path: Path, new_path: Path) -> None:
    """Both PNGs show the same and say the same of themselves."""
    old, new = Picture.read(old_path), Picture.read(new_path)
    assert old.pixels == new.pixels, f"{old_path} and {new_path} show different pictures"
    assert without_tool_version(new.record, old.record) == old.record
    assert old.texts.keys() == new.texts.keys()
    parameters = [picture.texts["parameters"].rpartition(", Version: ")[0] for picture in (old, new)]
    assert "Steps: " in parameters[0]
    assert parameters[0] == parameters[1]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures below a folder, as seen from there."""
    return sorted(p.relative_to(folder) for p in folder.rglob("[0-9]*.png"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_the_same_pixels_and_records(checkouts, group):
    old, new = checkouts.pictures(group)
    names: dict[str, str] = {}  # of settings, by the pixels that they came to first
    for name, paths in old.items():
        assert [p.name for p in paths] == [p.name for p in new[name]] != []
        for old_path, new_path in zip(paths, new[name], strict=True):
            check_same(old_path, new_path)
            first = names.setdefault(Picture.read(old_path).pixels, name)
            assert first == EQUAL.get((group, name), name), f"{name} shows what {first} does"


def test_every_flag_that_decides_a_picture_has_a_setting(checkouts):
    text, _ = finish(checkouts.old.start("sd3_infer.py", {"help": True}))
    flags = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    used = {flag for load, lines in GROUPS.values() for settings in (PLAIN, load, *lines.values()) for flag in settings}
    assert "residual_weights" in flags
    assert flags - used == NO_SETTINGS & flags  # of those that the old side has
    assert sum(len(lines) for _, lines in GROUPS.values()) >= 40


RUNS: dict[str, dict[str, Any]] = {
    "prompts": MANY | TWO | {"prompt": "@prompts.txt", "seed_type": "roll", "pad_batch": True},
    "one prompt": {"prompt": "a <star>; or: two", "residual_config": "@each.json", "residual_weights": "each:0.3"},
    "no metadata": MANY | TWO | {"no_metadata": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_folder(checkouts, name):
    flags = PLAIN | RUNS[name] | {"postfix": "_end"}
    sides = (checkouts.old, checkouts.new)
    old, new = folders = [checkouts.out / side.name / f"run, {name}" for side in sides]
    processes = [s.start("sd3_infer.py", flags | {"out_dir": str(out)}) for s, out in zip(sides, folders, strict=True)]
    for process in processes:
        finish(process)
    paths = pictures_in(old)
    assert paths == pictures_in(new) != []
    for path in paths:
        if "no_metadata" in flags:
            assert Picture.read(old / path) == Picture.read(new / path)
            assert not Picture.read(old / path).texts
        else:
            check_same(old / path, new / path)
    (place,) = {path.parent for path in paths}
    assert read_json(old / place / "run.json")["pictures"] == read_json(new / place / "run.json")["pictures"]
    config = read_json(new / place / "residual.json")
    assert config.pop("version")
    assert {n: v for n, v in read_json(old / place / "residual.json").items() if n != "version"} == config


# ---- old pictures --------------------------------------------------------------------------------


def check_replay(checkouts: Checkouts, path: Path, name: str) -> None:
    """The new side makes a picture of the old side again and says that it is the same."""
    out = checkouts.out / "replay" / name
    _, err = finish(checkouts.new.start("sd3_infer.py", {"replay": str(path), "out_dir": str(out)}))
    assert f"replay: the same image as {path}, bit for bit" in err
    assert "different from the record" not in err
    assert "replay: changed" not in err
    (again,) = pictures_in(out)
    check_same(path, out / again)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("picture", "padded batch"),
        ("image to image", "denoise 0.5"),
        ("residual", "each"),
        ("residual", "aligned in buckets"),
        ("residual", "an old file of one number"),
        ("ControlNet 2B", "residual"),
        ("skip-layer guidance", "residual"),
        ("text encoders' folder", "residual"),
        ("int8", "residual"),
    ],
)
def test_an_old_picture_replays(checkouts, group, name):
    old, _ = checkouts.pictures(group)
    check_replay(checkouts, old[name][-1], f"{group}, {name}")


def test_an_old_picture_of_a_drawn_seed_replays(checkouts):
    out = checkouts.out / "rand"
    flags = PLAIN | TWO | {"seed": None, "seed_type": "rand", "num_images": 2, "out_dir": str(out)}
    finish(checkouts.old.start("sd3_infer.py", flags))
    first, second = (out / path for path in pictures_in(out))
    assert Picture.read(first).record["settings"]["seed"] != Picture.read(second).record["settings"]["seed"]
    check_replay(checkouts, second, "rand")


# ---- old sweeps ----------------------------------------------------------------------------------

SWEEP = {
    "model": "@models/demo.safetensors", "device": "cpu", "steps": 3, "width": 64, "height": 64, "cfg": 2,
    "prompt": "@prompts.txt", "seed": "0-3", "residual_target_layers": "3,5;2-6", "batch_size": 2,
    "residual_weights": "each:0.3;each:0.6;linear:0.4:0.1", "residual_mode": "add;anchored",
}  # fmt: skip
SWEEP_PICTURES = 3 * 4 * (1 + 2 * 3 * 2)
GRID = """
model: models/demo.safetensors
device: cpu
steps: 3
width: 64
height: 64
prompt: [a red circle, two green stars]
cfg: [2, 3]
residual_target_layers: [3, 5, 7]
residual_weights: [[0.3, 0.2, 0.1], each:0.6, "each:0.05"]
variants:
  gentle: {residual_target_layers: 2-7, residual_weights: each:0.05, residual_mode: anchored}
  a file: {residual_config: SIDE/each.json}
"""
GRID_PICTURES = 2 * 2 * (1 + 3 + 2)  # of one seed


def sweep(side: Checkout, out: Path, flags: Mapping[str, Any]) -> subprocess.Popen:
    return side.start("sd3_sweep.py", flags | {"out": str(out)}, stdout=subprocess.DEVNULL)


def swept(out: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every picture of a sweep, by its id."""
    return {p.stem: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "pictures").glob("*.png")}


def log(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a sweep's log; a kill may have torn one."""
    lines = []
    for line in (out / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def finish_with_new_code(checkouts: Checkouts, out: Path, whole: Path, flags: Mapping[str, Any]) -> int:
    """The new side goes on with the old side's sweep in `out`: it makes what is missing, nothing twice, and all comes
    to what the old side makes of the same flags in `whole`. Returns the number of pictures.
    """
    before, lines = swept(out), len(log(out))
    for process in (sweep(checkouts.old, whole, flags), sweep(checkouts.new, out, flags)):
        finish(process)
    after, wanted = swept(out), swept(whole)
    assert before.items() <= after.items()
    new_ids = [line["picture"] for line in log(out)[lines:] if line["event"] == "made"]
    assert sorted(new_ids) == sorted(after.keys() - before.keys()) != []
    assert max(Counter(line["picture"] for line in log(out) if line["event"] == "made").values()) == 1
    assert after.keys() == wanted.keys()
    for id in after:
        check_same(whole / "pictures" / f"{id}.png", out / "pictures" / f"{id}.png")
    assert read_json(out / "sweep.json")["planned"] == read_json(whole / "sweep.json")["planned"]
    return len(after)


def test_a_killed_sweep_of_the_old_code_goes_on(checkouts):
    out = checkouts.out / "killed"
    process = sweep(checkouts.old, out, SWEEP)
    deadline = time.monotonic() + 200
    while len(list(out.glob("pictures/*.png"))) < SWEEP_PICTURES // 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert SWEEP_PICTURES // 4 <= len(swept(out)) < SWEEP_PICTURES
    assert finish_with_new_code(checkouts, out, checkouts.out / "whole", SWEEP) == SWEEP_PICTURES


def test_a_sweep_of_the_old_code_takes_more_seeds(checkouts):
    pytest.importorskip("yaml")
    for side in (checkouts.old, checkouts.new):
        own = checkouts.old.files / side.name
        (own / "grid.yaml").write_text(side.spell(GRID).replace("SIDE", str(own)))
    flags, out = {"grid": "@grid.yaml", "seed": "0-1"}, checkouts.out / "seeds"
    finish(sweep(checkouts.old, out, flags))
    assert len(swept(out)) == 2 * GRID_PICTURES
    whole = checkouts.out / "all seeds"
    assert finish_with_new_code(checkouts, out, whole, flags | {"seed": "0-2"}) == 3 * GRID_PICTURES
