"""What a second look at identity, replay and records found: each of these once failed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import to_diffusers
import torch
from helpers import DEMO, TOKENIZERS, mmdit_config, modules
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import sd3.flags
import sd3.png
import sd3.run
import sd3.serve
import sd3.settings
import sd3.streams
import sd3.sweep.command
import sd3.writing
import sd3_infer
from sd3.mistakes import Where
from sd3.planning import plan_pictures
from sd3.settings import earlier_digest
from sd3.sweep.plan import command
from sd3.unchanged import Changed, Unchanged
from sd3_infer import SD3Inferencer

ROOT = Path(__file__).parent.parent
SMALL = ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--width", "96", "--height", "96"]
BASE = ["--model", str(DEMO), *SMALL]
LONG = "a red circle left of a blue square and " * 20


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.png"))


def run(out: Path, *arguments) -> list[Path]:
    """The pictures of one run of the command line."""
    before = pictures(out)
    assert sd3_infer.main([*map(str, arguments), "--out_dir", str(out)]) == 0
    return [p for p in pictures(out) if p not in before]


def rewrite(path: Path, change) -> None:
    """Changes what a picture says of itself, as if another version had made it."""
    record = sd3.png.read_record(path)
    change(record)
    with Image.open(path) as image:
        image.load()
    info = PngInfo()
    info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record))
    image.save(path, pnginfo=info)


def replayed(path: Path, out: Path, capsys, *arguments) -> str:
    """What a replay tells of the picture."""
    capsys.readouterr()
    run(out, "--replay", path, *arguments)
    return capsys.readouterr().err


# ---- files are found where the system finds them -------------------------------------------------


@pytest.mark.parametrize("way", ["x/link/../demo/demo.safetensors", "x/link/./../demo/demo.safetensors", "y"])
def test_a_path_through_a_link_names_what_it_names(tmp_path, monkeypatch, way):
    for folder in ("a/b", "x"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(DEMO.parent, tmp_path / "a/demo", ignore=shutil.ignore_patterns("self_check"))
    (tmp_path / "x/link").symlink_to(tmp_path / "a/b")
    (tmp_path / "y").symlink_to(tmp_path / "a/demo/demo.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len(run(tmp_path / "o", "--model", way, "--model_folder", "a/demo", *SMALL, "--prompt", "red")) == 1


def test_a_watched_file_is_the_same_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("x")
    monkeypatch.chdir(tmp_path)
    files = Unchanged()
    files.add(Where("vae", "f"), "f")
    monkeypatch.chdir("/")
    files.check()
    (tmp_path / "f").write_text("other")
    with pytest.raises(Changed, match=r"^vae f: has changed"):
        files.check()


# ---- what else decides a picture is recorded -----------------------------------------------------


def test_instructions_and_the_environment_are_recorded(tmp_path, capsys, monkeypatch):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    hardware = sd3.png.read_record(path)["hardware"]
    assert hardware["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert "bit for bit" in replayed(path, tmp_path / "b", capsys)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    told = replayed(path, tmp_path / "c", capsys)
    assert "replay: different from the record: environment none -> MKL_CBWR=COMPATIBLE" in told
    (other,) = run(tmp_path / "d", *BASE, "--prompt", "red", "--seed", 1)
    monkeypatch.delenv("MKL_CBWR")
    assert "environment MKL_CBWR=COMPATIBLE -> none" in replayed(other, tmp_path / "e", capsys)


def test_other_instructions_are_told(tmp_path):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    replay = [sys.executable, str(ROOT / "sd3_infer.py"), "--replay", str(path), "--out_dir", str(tmp_path / "b")]
    told = subprocess.run(replay, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stderr
    assert "environment none -> ATEN_CPU_CAPABILITY=default" in told
    assert "nothing that was recorded differs" not in told


def test_a_record_without_them_misses_nothing(tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    rewrite(path, lambda r: r.update(hardware={n: r["hardware"][n] for n in ("device", "threads")}))
    assert "not as it was" not in replayed(path, tmp_path / "b", capsys)


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory) -> Path:
    """The model's own CLIP-L with other weights, as a file."""
    prefix = "text_encoders.clip_l."
    own = {n.removeprefix(prefix): t for n, t in load_file(DEMO).items() if n.startswith(prefix)}
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({n: (1.5 * t if n.endswith("fc1.weight") else t).contiguous() for n, t in own.items()}, path)
    return path


def test_a_text_encoder_in_place_of_the_models_own_is_told(tmp_path, capsys, other_clip):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    told = replayed(path, tmp_path / "b", capsys, "--clip_l", other_clip)
    assert "replay: different from the record: text encoder clip_l" in told
    assert "nothing that was recorded differs" not in told
    (back,) = run(tmp_path / "c", *BASE, "--prompt", "red", "--seed", 1, "--clip_l", other_clip)
    assert "bit for bit" in replayed(back, tmp_path / "d", capsys)


def test_without_t5_its_file_is_not_missed(tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1, "--no_t5")
    assert "not as it was" not in replayed(path, tmp_path / "b", capsys)


@pytest.fixture
def layout(tmp_path) -> Path:
    """A small model in diffusers layout."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return to_diffusers.folder(tmp_path / "layout", modules(mmdit_config(mlp_width=512), seed=40), TOKENIZERS)


@pytest.mark.parametrize(
    ("component", "named"), [("vae", "vae"), ("text_encoder", "clip_l"), ("transformer", "transformer")]
)
def test_every_component_of_a_folder_counts(layout, tmp_path, capsys, component, named):
    base = ["--model", str(layout), "--device", "cpu", "--dtype", "float32", "--steps", "2", "--prompt", "a red circle"]
    size = ["--width", "64", "--height", "48", "--cfg", "2"]
    (path,) = run(tmp_path / "o", *base, *size, "--seed", 3)
    out = ["--out", str(tmp_path / "swept")]
    assert sd3.sweep.command.main([*base, *size, "--seed", "0", *out]) == 0
    assert "bit for bit" in replayed(path, tmp_path / "same", capsys)
    assert sd3.sweep.command.main([*base, *size, "--seed", "0-1", *out]) == 0
    for file in (layout / component).glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: (t * 1.25 if t.is_floating_point() else t) for n, t in tensors.items()}, file, {"format": "pt"})
    told = replayed(path, tmp_path / "other", capsys)
    assert f"the {named} in the model's folder" in told
    assert "nothing that was recorded differs" not in told
    assert sd3.sweep.command.main([*base, *size, "--seed", "0-2", *out]) == 2
    assert f"the {named} in " in capsys.readouterr().err


# ---- records of earlier versions -----------------------------------------------------------------


def test_an_earlier_picture_whose_longer_negative_prompt_lengthened_its_text(tmp_path, capsys):
    engine = SD3Inferencer().load(str(DEMO), device="cpu", dtype="float32")
    engine.tell.quiet = True
    values = {"steps": 2, "width": 96, "height": 96, "cfg": 1.0, "sampler": "euler"}
    (settings,) = plan_pictures(engine.engine, ["red"], [1], recorded=True, negative_prompt=LONG, **values).pictures
    assert settings.negative_prompt == LONG  # as earlier versions made it: at the longer length
    assert settings.digest() == earlier_digest(settings)
    ((_, settings, image),) = engine.engine.make([settings])
    provenance = sd3.run.Provenance(engine.engine, settings).wait()
    sd3.png.save_picture(tmp_path / "then.png", image, settings, provenance)
    told = replayed(tmp_path / "then.png", tmp_path / "now", capsys)
    assert "bit for bit" in told
    assert "changed" not in told
    assert "no effect" not in told
    (short,) = plan_pictures(engine.engine, ["red"], [1], recorded=True, negative_prompt="blue", **values).pictures
    assert short.negative_prompt == ""
    (now,) = plan_pictures(engine.engine, ["red"], [1], negative_prompt=LONG, **values).pictures
    assert now == short


@pytest.mark.parametrize("there", [True, False])
def test_an_earlier_picture_with_an_initial_picture_without_a_say(tmp_path, capsys, there):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    if there:
        Image.effect_noise((96, 96), 90).convert("RGB").save(tmp_path / "photo.png")

    def earlier(record):
        record["settings"] |= {"init_image": "photo.png", "denoise": 1.0}
        record["files"] = {"init_image": "0" * 64}

    rewrite(path, earlier)
    folder = ["--model_folder", DEMO.parent] if there else []
    if there:
        shutil.copy(tmp_path / "photo.png", path.parent)
    told = replayed(path, tmp_path / "b", capsys, *folder)
    assert "bit for bit" in told
    assert "not as it was" not in told
    if not there:  # with a say it is missed
        assert sd3_infer.main(["--replay", str(path), "--denoise", "0.5", "--out_dir", str(tmp_path / "c")]) == 2
        assert "was made with init_image photo.png" in capsys.readouterr().err


def test_an_earlier_batch_with_a_cache_says_what_is_other_now(tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1, "--steps", 4, "--cache", 0.3)
    rewrite(path, lambda r: r["settings"].update(batch_size=4))
    assert "replay: changed batch_size 4 -> 1" in replayed(path, tmp_path / "b", capsys)


def test_an_earlier_cache_over_a_moving_stream_says_what_is_other_now(tmp_path, capsys):
    residual = ["--residual_target_layers", "3,5", "--residual_schedule", "linear"]
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1, "--cache", 0.3, *residual)
    assert "not as it was" not in replayed(path, tmp_path / "b", capsys)
    rewrite(path, lambda r: r.update(hardware={n: r["hardware"][n] for n in ("device", "threads")}))
    assert "which steps the cache reuses" in replayed(path, tmp_path / "c", capsys)


def test_a_control_net_that_was_given_no_picture(tmp_path, capsys):
    (path,) = run(tmp_path / "a", *BASE, "--prompt", "red", "--seed", 1)
    rewrite(path, lambda r: r["settings"].update(controlnet_ckpt="gone.safetensors"))
    assert "bit for bit" in replayed(path, tmp_path / "b", capsys)


# ---- a stop at any moment ------------------------------------------------------------------------


@pytest.fixture
def stop_behind(monkeypatch):
    """Stops the process, as a signal does, right behind the first call of a function of `png` or `writing`."""

    def arm(name: str, number: int, fits=lambda *a: True) -> None:
        module = sd3.png if hasattr(sd3.png, name) else sd3.writing
        real, left = getattr(module, name), [1]

        def then_stop(*args, **options):
            result = real(*args, **options)
            if left and fits(*args):
                left.pop()
                os.kill(os.getpid(), number)
            return result

        monkeypatch.setattr(module, name, then_stop)

    return arm


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["rename_finished", "save_picture", "append_line", "json_bytes", "write_json"])
def test_a_stop_between_a_picture_and_its_record_loses_neither(tmp_path, stop_behind, place, number, status):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop_behind(place, number)
        got = sd3_infer.main([*BASE, "--prompt", "red", "--num_images", "3", "--out_dir", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert got == status
    kept = pictures(tmp_path)
    (record,) = tmp_path.rglob("run.json")
    record = json.loads(record.read_text(encoding="utf-8"))
    assert record["status"] == "stopped"
    assert [p["file"] for p in record["pictures"]] == [p.name for p in kept] == ["000000.png"]
    assert [*tmp_path.rglob("residual.json")]
    assert not [*tmp_path.rglob("run.jsonl"), *tmp_path.rglob(".lock")]


def test_a_second_stop_does_not_wait():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("stop"))
    try:
        with sd3.streams.delayed_stops():
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ["stop"]
        assert heard == ["stop"]
        with pytest.raises(OSError, match="full"), sd3.streams.delayed_stops():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("full")
        assert heard == ["stop"] * 2  # what failed inside does not swallow it
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_hold_nothing():
    inside = []

    def work():
        with sd3.streams.delayed_stops():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [signal.getsignal(signal.SIGTERM)]


def test_a_clock_that_goes_back_stops_no_record(tmp_path, monkeypatch):
    now = [2e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(sd3.run.time, "time", back)
    run(tmp_path, *BASE, "--prompt", "red", "--num_images", 2)
    (record,) = tmp_path.rglob("run.json")
    assert 0 <= json.loads(record.read_text(encoding="utf-8"))["seconds"] < 600


# ---- a report's command --------------------------------------------------------------------------


def test_the_command_of_a_whole_picture_says_so():
    engine = SD3Inferencer().load(str(DEMO), device="cpu", dtype="float32")
    (whole,) = plan_pictures(engine.engine, ["red"], [1], steps=2, width=96, height=96).pictures
    assert "--vae_tile=off" in command(whole, sd3.settings.Flags.read({}))
    tiled = dataclasses.replace(whole, width=512, vae_tile=128)
    assert "--vae_tile=128" in command(tiled, sd3.settings.Flags.read({}))


# ---- served lines --------------------------------------------------------------------------------


def test_a_prompt_that_is_null_is_no_prompt(tmp_path):
    answers = served(tmp_path, [{"prompt": None, "seed": 1}, {"prompt": "red", "seed": 1}])
    assert not answers[0]["ok"]
    assert answers[0]["error"] == "--prompt: is missing"
    assert answers[1]["ok"]
    assert served(tmp_path, [{"prompt": None, "seed": 1}], prompt="red")[0]["ok"]  # the command line's


def test_every_flag_without_effect_is_told_with_the_answer(tmp_path):
    lines = [
        {"skip_layer_cfg": True},
        {"residual_weights": 0.5},
        {"residual_target_layers": "3", "residual_mode": "add", "residual_rotations": str(tmp_path / "r.safetensors")},
        {"negative_prompt": "blue", "cfg": 1},
    ]
    told = [
        "--skip_layer_cfg is off",
        "--residual_target_layers is empty",
        "--residual_rotations is not used",
        "guidance",
    ]
    answers = served(tmp_path, [{"prompt": "red", "seed": 1, **line} for line in lines])
    for answer, words in zip(answers, told, strict=True):
        assert len(answer["notes"]) == 1
        assert words in answer["notes"][0]


def served(folder: Path, lines, **flags) -> list[dict]:
    """The answers to lines."""
    raw = {"model": str(DEMO), "device": "cpu", "dtype": "float32", "steps": "2", "width": "96", "height": "96"}
    raw |= {"out_dir": str(folder / "served"), "serve_stdin": "True", **flags}
    answers: list[str] = []
    sd3.serve.serve(sd3.settings.Flags.read(raw), raw, [json.dumps(line) for line in lines], answers.append)
    return [json.loads(answer) for answer in answers]
