"""Every flag crossed with every kind of wrong value through each door: command line, Python, served line, the record of
a picture, YAML.

Whatever comes in: either its flag's reader takes it and what it read is what is used, or one line names the flag and
the value, the status is 2 (a ValueError or FileNotFoundError in Python, {"ok": false} in a served answer), and no
folder is made. Nothing is sampled here: `make` is cut short once it has been told which pictures to make.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEMO, READERS
from PIL import Image

import sd3.engine
import sd3.planning
import sd3.png
import sd3.probe.command
import sd3.residual
import sd3.run
import sd3.serve
import sd3.sweep.command
import sd3.sweep.plan
import sd3_infer
from sd3.engine import Engine
from sd3.flags import FLAGS
from sd3.mistakes import Mistake, display, flag_name, renaming
from sd3.models import SkipLayerConfig
from sd3.planning import PicturePlan
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig
from sd3.settings import Flags, Settings, Setup
from sd3_infer import SD3Inferencer

LONG = "x" * 5000
TEXTS = [
    "nan", "inf", "-inf", "1e39", "-1", "-7.5", "0", "1e300", "9" * 5000, str(10**30), "", " ", "\t \n", "\udcff",
    "a \ud800 b", "a\0b", LONG, LONG + ".txt", "None", "none", "null", "zzz", "[[1], [2]]", "{'a': 1}", "True", "3-1",
    "0-9999999", "1,,2", "linear:1e9:0", "exp:-900", "exp:", "cuda:999", "[" * 2000, "=1+1", "\u2028",
]  # fmt: skip
OBJECTS = [
    math.nan, math.inf, -math.inf, 1e39, -1, -7.5, 0, 10**30, True, False, [], [[1, [2]]], {}, {"a": 1},
    [None], ["a", 1], [math.nan], [1e39], [True], [{}],
]  # fmt: skip
ODD = [  # what only Python can hand over
    (), b"3", {1, 2}, object(), 1j, np.nan, np.array([1, 2]), np.array([[1, 2]]), np.bool_(True), torch.ones(2, 2),
    torch.device("cuda:7"), torch.float64, Path(LONG), Path("a\0b"), range(2), lambda: 1, 10**5000,
]  # fmt: skip
# Flags that do something else than make images, or that name a file of flags.
STARTS = ("serve_stdin", "self_check", "list_models", "replay", "info", "settings")
LISTS = ("residual_target_layers", "residual_weights")
BASE = {"prompt": "a red circle", "model": str(DEMO), "device": "cpu", "steps": "1", "residual_target_layers": "3,5"}
# Flags whose mistakes are found by what they lead to: tokenizers that are missing from a folder, two flags that do not
# go together.
ELSEWHERE = {"model_folder": "tokenizer"}


class Told(Exception):
    """A door refused, with this line."""


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict[str, Any]:
    """What a picture of the shipped model says of itself."""
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.tell.quiet = True
    (path,) = engine.gen_image(
        "a star", steps=2, seed=3, out_dir=str(tmp_path_factory.mktemp("record")),
        residual_config=ResidualConfig(0, (3, 5), (0.1, 0.2)),
        skip_layer_config=SkipLayerConfig(2.0, 0.0, 0.9, (2, 3), cfg=3.0),
    )  # fmt: skip
    return sd3.png.read_record(path)


@pytest.fixture(scope="module")
def planned(record) -> Iterator[list[Settings]]:
    """The pictures that were to be made last; engines of the same flags are loaded once."""
    pictures: list[Settings] = []
    plan, load = sd3.planning.plan_pictures, sd3.engine.load_for

    def noted(engine: Engine, *args: Any, **values: Any) -> PicturePlan:
        made = plan(engine, *args, **values)
        pictures[:] = [dataclasses.replace(s, **made.as_given) for s in made.pictures]  # those without effect too
        return made

    loaded: dict[str, Engine] = {}

    def load_once(flags: Flags, tell: sd3.Reporter | None = None) -> Engine:
        key = repr((Setup.of(flags), flags.shift))
        if key not in loaded:
            loaded[key] = load(flags)
            loaded[key].quiet = True
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd3.planning, "plan_pictures", noted)
        patch.setattr(Engine, "make", lambda engine, pictures, *_: iter(()))
        patch.setattr(sd3.engine, "load_for", load_once)
        patch.setattr(sd3.run, "load_for", load_once)
        patch.setattr(sd3.serve, "load_for", load_once)
        patch.setattr(sd3.sweep.plan, "load_for", load_once)
        yield pictures


def line_of(command: Callable[[list[str]], int], words: list[str]) -> None:
    """Runs a command line; raises Told with its line where it refuses."""
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        status = command(words)
    if status == 0:
        return
    assert status == 2, (status, err.getvalue()[-500:])
    assert err.getvalue().startswith("error: "), err.getvalue()[-500:]
    assert err.getvalue().count("\n") == 1, err.getvalue()[-500:]
    raise Told(err.getvalue())


def in_python(call: Callable[[], Any]) -> Any:
    """Calls; raises Told with the line that a command would print of a user's mistake."""
    try:
        return call()
    except (ValueError, FileNotFoundError) as error:
        raise Told(error.spelled(flag_name) if isinstance(error, Mistake) else str(error)) from None


def wanted_of(flag: str, value: Any, readers: dict[str, Any] = READERS) -> tuple[bool, Any]:
    """Whether the flag's reader takes a value, and what it reads."""
    try:
        return True, readers[flag](flag, value)
    except ValueError as error:
        assert "\n" not in str(error)
        return False, None


class Anything(list):
    """What is used and not looked at."""


def right(used: list[Any], read: Any) -> bool:
    return isinstance(used, Anything) or any(type(one) is type(read) and one == read for one in used)


def crossed(
    door: Callable[[str, Any], None],
    flags: list[str],
    values: list[Any],
    used: Callable[[str], Any] | None = None,
    none_is_left_out: bool = True,
) -> list[str]:
    """What went wrong at a door. used: what is used of a flag after the door took its value; there may be more than one
    right answer, so a list.
    """
    wrong = []
    for flag in flags:
        for value in values:
            what = f"{flag}={display(value)[:60]} ({type(value).__name__})"
            taken, read = wanted_of(flag, value)
            try:
                door(flag, value)
            except Told as told:
                line = str(told)
                shown = display(value).strip()[:20] if isinstance(value, (str, int, float)) else ""
                blank = not shown.replace("\\t", "").replace("\\n", "").replace("\\u2028", "").strip()
                if flag in LISTS or blank:  # of a list the item is named, and blanks are said to be empty
                    shown = ""
                if "\n" in line.strip() or len(line) > 1500:
                    wrong.append(f"{what}: not one line: {line[:200]!r}")
                if f"--{flag}" not in line and ELSEWHERE.get(flag, "\0") not in line:
                    wrong.append(f"{what}: does not name the flag: {line[:200]!r}")
                if not taken and shown and " ".join(shown.split()) not in " ".join(line.split()):
                    wrong.append(f"{what}: does not show the value: {line[:200]!r}")
            except Exception as error:  # what is no line, a traceback for the user
                wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            else:
                if not taken and not (value is None and none_is_left_out):
                    wrong.append(f"{what}: taken, though its reader refuses it")
                elif taken and used is not None and not right(used(flag), read):
                    wrong.append(f"{what}: read as {read!r}, used as {used(flag)!r}")
    return wrong


def check(wrong: list[str]) -> None:
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:20])


def settings_used(planned: list[Settings]) -> Callable[[str], Any]:
    """What the planned pictures use of a flag, and its default, at which flags without effect are recorded."""
    usual = Settings(prompt="", model="m")

    def used(flag: str) -> list[Any]:
        if flag in ("vae", "controlnet_ckpt", "model", "vae_tile", "device", "text_encoder_device", "dtype"):
            return Anything()  # resolved further: a path, the device that `auto` is
        if flag == "residual_rotations":  # for one mode only
            return Anything()
        if flag == "residual_weights":  # spread over the targets
            return [planned[0].residual_weights[:1], *([()] if planned[0].residual_weights == (1.0, 1.0) else [])]
        if flag == "num_images":
            return [len(planned)]
        if not hasattr(usual, flag):
            return Anything()
        return [getattr(planned[0], flag), getattr(usual, flag)]

    return used


# ---- the doors -----------------------------------------------------------------------------------


def test_the_command_line(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def door(flag: str, value: str) -> None:
        out = tmp_path / "out"
        words = [f"--{n}={v}" for n, v in (BASE | {"out_dir": "out", flag: value}).items()]
        try:
            line_of(sd3_infer.main, words)
        except Told:
            assert not out.exists(), f"{flag}={value!r}: a folder was made"
            raise
        shutil.rmtree(out, ignore_errors=True)

    flags = [n for n in READERS if n not in STARTS]
    check(crossed(door, flags, TEXTS, settings_used(planned)))
    not_true = [t for t in TEXTS if t != "True"]
    check(crossed(door, list(STARTS), not_true))


def test_flags_of_the_sweep_and_the_probe(tmp_path, monkeypatch):

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\n")

    def sweep_door(flag: str, value: str) -> None:
        line_of(sd3.sweep.command.main, ["--out=o", "--prompt=a", "--dry_run", f"--model={DEMO}", f"--{flag}={value}"])

    own = {name: row.read for name, row in sd3.sweep.command.OWN.items()}
    for name in own:
        for text in TEXTS:
            if name == "dry_run" and wanted_of(name, text, own)[0]:
                continue
            try:
                sd3.sweep.command.read_flags(["--out=o", "--score=clip", "--ray=auto", f"--{name}={text}"])
            except (ValueError, FileNotFoundError) as error:
                assert str(error).startswith(name)
                assert "\n" not in str(error)
            else:
                assert wanted_of(name, text, own)[0]
    for command, rows in sd3.probe.command.COMMANDS.items():
        readers = {name: row.read for name, row in rows.items()}
        needed = {"prompts": "p.txt", "targets": "3", "out": "r.safetensors", "measurement": "m.json"}
        for name in readers:
            for text in TEXTS:
                words = {n: v for n, v in needed.items() if n in readers} | {name: text}
                try:
                    _, flags = sd3.probe.command.read_flags([command, *(f"--{n}={v}" for n, v in words.items())])
                except (ValueError, FileNotFoundError) as error:
                    assert str(error).startswith(name), (command, name, text, error)
                    assert "\n" not in str(error)
                else:
                    assert flags[name] == readers[name](name, text)


def test_a_served_line(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd3.serve, "load_for", sd3.engine.load_for, raising=False)
    raw = BASE | {"out_dir": "served"}
    lines: list[str] = []
    cases = []
    flags = [n for n in READERS if n not in [n for n, row in FLAGS.items() if row.scope != "picture"]]
    for flag in flags:
        for value in [*TEXTS, *OBJECTS]:
            cases.append((flag, value))
            lines.append(json.dumps({"prompt": "a red circle", flag: value}))
    answers: list[dict] = []
    seen: list[Settings | None] = []

    def say(text: str) -> None:
        answers.append(json.loads(text))
        seen.append(planned[0] if planned else None)
        planned.clear()

    with redirect_stderr(io.StringIO()):
        sd3.serve.serve(Flags.read(raw), raw, lines, say)
    assert len(answers) == len(lines)
    at = iter(zip(answers, seen, strict=True))
    current: list[Settings] = []

    def door(flag: str, value: Any) -> None:
        answer, settings = next(at)
        if not answer["ok"]:
            raise Told(answer["error"])
        current[:] = [settings]

    used = settings_used(current)
    check(crossed(door, flags, [*TEXTS, *OBJECTS], lambda flag: Anything() if flag == "num_images" else used(flag)))
    assert not list((tmp_path / "served").rglob("*.png"))


def write_record(path: Path, record: dict[str, Any], **settings: Any) -> None:
    info = sd3.png.PngInfo()
    info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record | {"settings": record["settings"] | settings}))
    Image.new("RGB", (16, 16)).save(path, pnginfo=info)


def test_a_record(record, planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f.name for f in dataclasses.fields(Settings) if f.name in READERS]

    def door(flag: str, value: Any) -> None:
        more = {"denoise": 0.5} if flag == "init_image" else {}  # so that it has a say
        write_record(tmp_path / "r.png", record, **{flag: value}, **more)
        if flag in LISTS and not isinstance(value, list):
            value = [value, [[]]]  # refused as such: a list is needed
            write_record(tmp_path / "r.png", record, **{flag: value})
        line_of(
            sd3_infer.main,
            ["--replay", "r.png", "--out_dir", "out", *([] if flag == "model" else ["--model", str(DEMO)])],
        )

    values = [*TEXTS, *OBJECTS]
    alone = [f for f in flags if f not in LISTS]
    used = settings_used(planned)

    def used_or_idle(flag: str) -> list[Any]:
        """A LoRA of strength 0 has no effect, so the settings leave it out."""
        idle = [READERS["lora"]("lora", value) for value in TEXTS if str(value).endswith(":0")]
        got = used(flag)
        return [*got, *idle] if flag == "lora" and got == [None, None] else got

    check(crossed(door, alone, values, used_or_idle))
    check(crossed(door, list(LISTS), [v for v in OBJECTS if isinstance(v, list)]))
    for flag in LISTS:
        for value in (5, "3,5", {"a": 1}, True):
            write_record(tmp_path / "r.png", record, **{flag: value})
            with pytest.raises(Told, match=f"its settings cannot be read: --{flag} .*must be a list"):
                line_of(sd3_infer.main, ["--replay", "r.png", "--model", str(DEMO)])


def test_skip_layer_guidance_in_a_record(record, planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = record["settings"]["skip_layer"]

    def replay(value: Any) -> None:
        write_record(tmp_path / "r.png", record, skip_layer=value)
        line_of(sd3_infer.main, ["--replay", "r.png", "--out_dir", "out", "--model", str(DEMO)])

    replay(good)
    assert planned[0].skip_layer == SkipLayerConfig(2.0, 0.0, 0.9, (2, 3), 3.0)
    for name in good:
        for value in [*TEXTS, *OBJECTS]:
            planned.clear()
            try:
                replay(good | {name: value})
            except Told as told:
                assert "skip" in str(told)
            else:
                assert planned[0].skip_layer == SkipLayerConfig(**good | {name: value})
    for value in (5, "x", [], [1], {}, {"scale": 2.0}, good | {"hat": 1}, good | {"layers": [40]}):
        with pytest.raises(Told, match="skip"):
            replay(value)


def test_yaml(planned, tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)

    def grid_of(flag: str, value: Any) -> dict[str, Any]:
        return BASE | {flag: value}

    def door(flag: str, value: Any) -> None:
        text = yaml.safe_dump(grid_of(flag, value), allow_unicode=False)
        (tmp_path / "g.yaml").write_text(text)
        line_of(sd3.sweep.command.main, ["--grid", "g.yaml", "--out", "o", "--dry_run"])
        assert not (tmp_path / "o").exists()

    # A list is a list of alternatives there and every number a text; what YAML cannot hold is left out.
    texts = [t for t in TEXTS if "\0" not in t and not any("\ud800" <= c <= "\udfff" for c in t) and ";" not in t]
    nested = [[[1, [2]]], [[["a"]]], {"a": 1}, [{"a": 1}], [[{}]]]
    flags = [n for n, row in FLAGS.items() if not row.sweep and n != "seed"]
    check(crossed(door, flags, [t for t in texts if t.strip() == t], settings_used(planned)))
    for flag in flags:
        for value in nested:
            with pytest.raises(Told, match=f"--{flag}"):
                door(flag, value)
    for value in [*(t for t in texts if t not in ("0",)), *nested]:
        if value in (str(10**30), "9" * 5000, "1,,2", "3-1", "", "nan", "zzz") or not isinstance(value, str):
            with pytest.raises(Told, match="--seed"):
                door("seed", value)
    for name in [n for n, row in FLAGS.items() if row.sweep]:
        with pytest.raises(Told, match=f"--{name}: is not allowed in a sweep"):
            door(name, "1")


ENGINE_ARGUMENTS = [
    "model", "vae", "shift", "controlnet_ckpt", "model_folder", "text_encoder_device", "verbose", "device", "dtype",
    "no_t5", "t5_resident", "embed_cache", "weights", "compile", "offload",
]  # fmt: skip


def test_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = SD3Inferencer()
    engine.tell.quiet = True

    def door(flag: str, value: Any) -> None:
        in_python(
            lambda: engine.load(**{"model": str(DEMO), "device": "cpu", "load_tokenizers": False} | {flag: value})
        )

    values = [*TEXTS, *OBJECTS, *ODD]
    looked_at = ("no_t5", "t5_resident", "weights", "compile", "offload", "shift")
    used = lambda flag: (  # noqa: E731
        [getattr(engine if flag == "shift" else engine.engine.setup, flag)] if flag in looked_at else Anything()
    )
    check(crossed(door, [a for a in ENGINE_ARGUMENTS if a != "embed_cache"], values, used))


PICTURE_ARGUMENTS = {
    "prompts": "prompt", "width": "width", "height": "height", "steps": "steps", "cfg_scale": "cfg",
    "sampler": "sampler", "seed": "seed", "seed_type": "seed_type", "out_dir": "out_dir",
    "controlnet_cond_image": "controlnet_cond_image", "init_image": "init_image", "denoise": "denoise",
    "negative_prompt": "negative_prompt", "num_images": "num_images", "batch_size": "batch_size",
    "pad_batch": "pad_batch", "controlnet_strength": "controlnet_strength", "cache": "cache", "vae_tile": "vae_tile",
}  # fmt: skip


def test_gen_image(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    engine.tell.quiet = True
    names = {flag: argument for argument, flag in PICTURE_ARGUMENTS.items()}

    def door(flag: str, value: Any) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            in_python(lambda: engine.gen_image(**{"prompts": ["a"], "out_dir": "out"} | {names[flag]: value}))
        except Told:
            assert not (tmp_path / "out").exists()
            raise

    values = [*TEXTS, *OBJECTS, *ODD]
    check(crossed(door, [f for f in names if f not in ("prompt", "out_dir")], values, settings_used(planned)))
    check(crossed(door, ["out_dir"], [v for v in values if not isinstance(v, Path)]))
    for value in [*OBJECTS, *ODD, ["\ud800"], [None], [["a"]]]:
        with pytest.raises(Told, match="prompt"):
            door("prompt", value)
    for name in ("skip_layer_config", "residual_config"):
        for value in ["x", 5, [1], object(), True, 1.5, {"scale": 2}, {"hat": 1}, np.int64(3)]:
            with pytest.raises(ValueError, match=r"skip_layer|residual_config"):
                engine.gen_image("a", out_dir="out", **{name: value})


def test_settings():
    made: list[Settings] = []
    flags = [f.name for f in dataclasses.fields(Settings) if f.name in READERS]
    good = {"prompt": "a", "model": "m", "residual_target_layers": (3, 5)}

    def door(flag: str, value: Any) -> None:
        made[:] = [in_python(lambda: Settings(**good | {flag: value}))]

    def used(flag: str) -> list[Any]:
        return [getattr(made[0], flag), getattr(Settings("", "m"), flag)]

    values = [v for v in [*TEXTS, *OBJECTS, *ODD] if not isinstance(v, str) or v.strip().lower() != "auto"]
    spread = ("residual_weights",)
    check(crossed(door, [f for f in flags if f not in spread], values, used))
    check(crossed(door, list(spread), values))


def test_residual_config(tmp_path):
    good = {"origin": 0, "targets": (3, 5), "weights": "each:0.1"}

    made: list[ResidualConfig] = []
    fields = {flag: name for name, flag in RESIDUAL_FLAGS.items()}

    def named(call: Callable[[], Any]) -> Any:
        with renaming(RESIDUAL_FLAGS):  # the line then names the flag, as `check` wants it
            return call()

    def door(flag: str, value: Any) -> None:
        made[:] = [in_python(lambda: named(lambda: ResidualConfig(**good | {fields[flag]: value})))]

    values = [*TEXTS, *OBJECTS, *ODD]
    alone = [f for f in fields if f not in ("residual_weights", "residual_target_layers", "residual_rotations")]
    check(crossed(door, alone, values, lambda flag: [getattr(made[0], fields[flag])]))
    lists = ["residual_weights", "residual_target_layers", "residual_rotations"]  # spread, or refused where empty
    check(crossed(door, lists, values))
    for value in ("", " "):
        with pytest.raises(Told, match="must name a file"):
            door("residual_rotations", value)


def test_skip_layer_config():
    good = {"scale": 2.0, "start": 0.0, "end": 0.5, "layers": (2, 3), "cfg": 3.0}
    types = {"scale": float, "start": float, "end": float, "layers": tuple, "cfg": float}
    for name in good:
        for value in [*TEXTS, *OBJECTS, *ODD]:
            try:
                config = SkipLayerConfig(**good | {name: value})
            except ValueError as error:
                assert f"skip_layer_cfg {name}" in str(error), (name, value, error)
                assert "\n" not in str(error)
            else:
                assert type(getattr(config, name)) is types[name]
                json.dumps(dataclasses.asdict(config), allow_nan=False)


def test_flags_read():
    """`Flags.read`, through which the command line, served lines and records go, takes nothing its readers refuse."""

    def door(flag: str, value: Any) -> None:
        made[:] = [in_python(lambda: Flags.read({flag: value}))]

    made: list[Flags] = []
    used = lambda flag: [getattr(made[0], flag)]  # noqa: E731
    check(crossed(door, list(READERS), [*TEXTS, *OBJECTS, *ODD], used))


# ---- the wrong case is taken, and read -----------------------------------------------------------

SPELT = {
    "seed_type": ("ROLL", "roll"), "sampler": (" Euler", "euler"), "residual_mode": ("Anchored", "anchored"),
    "residual_schedule": ("EXP:2", "exp:2.0"), "residual_branch": ("COND", "cond"), "cfg": ("2", 2.0),
    "residual_target_layers": ("3-5", (3, 4, 5)), "residual_weights": ("Linear:0.4:0.2", "linear:0.4:0.2"),
}  # fmt: skip


@pytest.mark.parametrize("flag", SPELT)
def test_the_wrong_case_is_taken_through_each_door(flag, planned, record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd3.serve, "load_for", sd3.engine.load_for, raising=False)
    text, read = SPELT[flag]
    assert right([READERS[flag](flag, text)], read)
    targets = {"residual_target_layers": "3,4,5"}
    found = []

    def look(door: str) -> None:
        if flag == "seed_type":
            found.append((door, planned[1].seed - planned[0].seed, 1))
        elif flag == "residual_weights":
            found.append((door, planned[0].residual_weights, (0.4, 0.3, 0.2)))
        else:
            found.append((door, getattr(planned[0], flag), read))
        planned.clear()

    two = {"num_images": "2", "seed": "3"} if flag == "seed_type" else {}
    raw = BASE | targets | two | {flag: text}
    line_of(sd3_infer.main, [f"--{n}={v}" for n, v in (raw | {"out_dir": "out"}).items()])
    look("command line")
    first = {n: v for n, v in raw.items() if FLAGS[n].scope == "picture"}
    given = {"model": str(DEMO), "device": "cpu", "out_dir": "served"}
    with redirect_stderr(io.StringIO()):
        sd3.serve.serve(Flags.read(given), given, [json.dumps(first)], lambda answer: None)
    look("served line")
    if flag != "seed_type":
        (tmp_path / "g.yaml").write_text("\n".join(f"{n}: '{v}'" for n, v in raw.items()))
        line_of(sd3.sweep.command.main, ["--grid", "g.yaml", "--out", "o", "--dry_run"])
        look("YAML")
        if not flag.startswith(("residual_target", "residual_weights")):
            write_record(tmp_path / "r.png", record, **{flag: text})
            line_of(sd3_infer.main, ["--replay", "r.png", "--out_dir", "out", "--model", str(DEMO)])
            look("record")
    engine = SD3Inferencer().load(str(DEMO), device="cpu")
    residual = {n.removeprefix("residual_"): v for n, v in raw.items() if n.startswith("residual_")}
    rest = {"cfg_scale" if n == "cfg" else n: v for n, v in raw.items() if n in (flag, "num_images", "seed")}
    rest = {n: v for n, v in rest.items() if not n.startswith("residual_")}
    engine.gen_image("a", residual_config=sd3.residual.build_residual_config(**residual), out_dir="out", **rest)
    look("gen_image")
    assert [(door, got) for door, got, _ in found if not right([got], found[0][2])] == []
    assert len(found) >= 3
