"""A picture's identity is what decides its pixels: flags without effect, offloading, step caching, earlier records."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import DEMO, TOKENIZERS, controlnet_tensors, modules, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import sd3.device
import sd3.pixels
import sd3.png
import sd3.serve
import sd3.sweep.command
import sd3_infer
from sd3.effects import executed_levels, executed_steps
from sd3.methods import SCHEDULES
from sd3.mistakes import flag_name, spell
from sd3.models import SkipLayerConfig
from sd3.planning import plan_pictures
from sd3.residual import ResidualConfig
from sd3.settings import Flags, Settings, earlier_digest, effective
from sd3_impls import flow_schedule
from sd3_infer import SD3Inferencer

EARLIER = json.loads((Path(__file__).parent / "earlier_records.json").read_text(encoding="utf-8"))
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def engine() -> SD3Inferencer:
    engine = SD3Inferencer().load(str(DEMO), device="cpu", dtype="float32")
    engine.tell.quiet = True
    return engine


@pytest.fixture(scope="module")
def files(tmp_path_factory, engine) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((96, 96), 90).convert("RGB").save(folder / "photo.png")
    save_file(controlnet_tensors(engine.engine.config, chained=True), folder / "control.safetensors")
    return folder


def base(**values) -> Settings:
    return Settings(**{"prompt": PROMPT, "model": "m", "steps": 4, "width": 96, "height": 96, "cfg": 2.5} | values)


TARGETS = {"residual_target_layers": (3, 5), "residual_weights": (0.5, 0.5)}
WITHOUT_EFFECT = {
    "denoise without a picture": ({"denoise": 0.3}, "--denoise has no effect"),
    "strength without a picture": ({"controlnet_strength": 0.3}, "--controlnet_strength has no effect"),
    "negative prompt without guidance": ({"cfg": 1, "negative_prompt": "a star"}, "--negative_prompt has no effect"),
    "window between two steps": (
        TARGETS | {"residual_start": 0.3, "residual_end": 0.45},
        "--residual_start 0.3 to --residual_end 0.45 contains none of the 4 steps",
    ),
    "window past the last step": (TARGETS | {"residual_start": 0.8, "residual_end": 0.95}, "contains none"),
    "weights of zero": ({"residual_target_layers": (3,), "residual_weights": (0.0,)}, "all weights are 0"),
    "the half that does not run": (TARGETS | {"cfg": 1, "residual_branch": "uncond"}, "no unconditional pass"),
    "skip layers between two steps": (
        {"skip_layer": SkipLayerConfig(2.0, 0.01, 0.2, (3,), cfg=4.0)},
        "acts between 0.01 and 0.2 of 4 steps, which contains no step",
    ),
    "skip layers at scale 0": ({"skip_layer": SkipLayerConfig(0.0, 0.0, 1.0, (3,), cfg=4.0)}, "at scale 0"),
    "all of a picture made anew": ({"init_image": "photo.png", "denoise": 0.9}, "--init_image has no effect"),
    "an interval of guidance without guidance": (
        {"cfg": 1, "guidance_start": 0.5},
        "--guidance_start and --guidance_end have no effect at --cfg 1",
    ),
    "an interval between two steps": (
        {"guidance_start": 0.3, "guidance_end": 0.45, "negative_prompt": "a star"},
        "--cfg has no effect: --guidance_start 0.3 to --guidance_end 0.45 contains none of the 4 steps",
    ),
    "an interval that holds all steps": ({"guidance_start": 0.2}, ""),
    "a rescale without guidance": ({"cfg": 1, "guidance_rescale": 0.5}, "--guidance_rescale has no effect"),
    "the half that does not run any more": (
        TARGETS | {"guidance_end": 0.5, "residual_start": 0.5, "residual_branch": "uncond"},
        "--guidance_start to --guidance_end runs no unconditional pass in its steps",
    ),
    "the only half that runs any more": (
        TARGETS | {"guidance_end": 0.5, "residual_start": 0.5, "residual_branch": "cond"},
        "",
    ),
    "a cache of one step": ({"cache": 0.2, "steps": 1}, "--cache has no effect"),
    # without a note: these say the same in two ways
    "a tile as large as the picture": ({"vae_tile": 128}, ""),
    "a window that holds all steps": (TARGETS | {"residual_end": 0.9}, ""),
    "the only half there is": (TARGETS | {"cfg": 1, "residual_branch": "cond"}, ""),
    "modes of nothing": ({"residual_mode": "anchored", "residual_origin_layer": 2, "residual_schedule": "cosine"}, ""),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_at_its_default_is_told_and_changes_nothing(engine, files, monkeypatch, case):
    values, told = WITHOUT_EFFECT[case]
    monkeypatch.chdir(files)
    s = base(model=str(DEMO), dtype="float32", device="cpu", text_encoder_device="cpu", **values)
    shown, notes = effective(s)
    assert shown != s
    assert shown.digest() != s.digest()
    assert len(notes) == bool(told)
    assert all(told in spell(note, flag_name) and note.startswith("note: ") for note in notes)
    assert effective(shown) == (shown, [])
    images = sd3.pixels.open_images([s])
    pictures = [engine.vae_decode(engine.engine.sample([one], images), one.vae_tile) for one in (s, shown)]
    assert pictures[0].tobytes() == pictures[1].tobytes()


@pytest.mark.parametrize(
    "values",
    [
        {"init_image": "photo.png", "denoise": 0.7},
        {"init_image": "photo.png", "denoise": 1.0, "shift": 0.0036276985056610577},  # sigma is not 1 at its start
        {"cfg": 1.1, "negative_prompt": "a star"},
        TARGETS | {"residual_start": 0.2, "residual_end": 0.3},
        TARGETS | {"residual_start": 0.5},
        TARGETS | {"residual_branch": "cond"},
        {"residual_target_layers": (3,), "residual_weights": (0.0,), "residual_mode": "anchored"},
        {"skip_layer": SkipLayerConfig(2.0, 0.01, 0.3, (3,), cfg=4.0)},
        {"cache": 0.2},
        {"offload": True},
        {"guidance_start": 0.25},
        {"guidance_end": 0.9},
        {"guidance_rescale": 0.1},
        {"scheduler": "simple"},
        TARGETS | {"guidance_end": 0.75, "residual_start": 0.5, "residual_branch": "cond"},
        TARGETS | {"guidance_end": 0.75, "residual_start": 0.5, "residual_branch": "uncond"},
    ],
)
def test_what_has_an_effect_counts(values):
    s = base(**values)
    assert effective(s) == (s, [])
    assert s.digest() != base().digest()


def test_the_last_step_is_the_initial_picture_alone(engine, files):
    s, notes = effective(base(init_image="photo.png", denoise=0.1, **TARGETS))
    assert executed_steps(s) == 1
    assert not notes
    s, notes = effective(base(init_image="photo.png", denoise=0.0, **TARGETS))
    assert executed_steps(s) == 0
    assert not s.residual_target_layers
    assert "leaves no step to run" in notes[0]


def test_a_control_picture_that_is_not_there_is_no_control():
    s, notes = effective(base(controlnet_ckpt="c.safetensors", controlnet_strength=0.3))
    assert s == base()
    assert notes == ["note: the ControlNet has no effect without `controlnet_cond_image`"]


SHIFTS = st.floats(0.001, 1000) | st.integers(1, 100_000).map(lambda n: n / 100)


@given(SHIFTS, st.integers(1, 200), st.floats(0, 1))
def test_where_noise_is_all_there_is(shift, steps, denoise):
    skipped = int(steps * (1 - denoise))
    wanted = skipped == 0 and flow_schedule(steps, shift)[0].item() == 1.0
    s = Settings(prompt="a", model="m", init_image="i", steps=steps, denoise=denoise, shift=shift)
    assert (executed_levels(s)[0] == 1) == wanted


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "cfg": st.sampled_from([1, 1.0, 2.5]),
            "steps": st.integers(1, 12),
            "negative_prompt": st.sampled_from(["", "a star"]),
            "denoise": st.floats(0, 1),
            "init_image": st.just("photo.png"),
            "controlnet_strength": st.floats(-2, 2),
            "controlnet_ckpt": st.just("c"),
            "controlnet_cond_image": st.just("photo.png"),
            "residual_target_layers": st.sampled_from([(), (3,), (3, 5)]),
            "residual_mode": st.sampled_from(["add", "anchored"]),
            "residual_start": st.floats(0, 0.5),
            "residual_end": st.floats(0.51, 1),
            "residual_branch": st.sampled_from(["both", "cond", "uncond"]),
            "skip_layer": st.builds(
                SkipLayerConfig, st.just(1.0), st.floats(0, 0.4), st.floats(0.41, 1), st.just((3,)), st.just(4.0)
            ),
            "cache": st.sampled_from([0.0, 0.2]),
            "scheduler": st.sampled_from(list(SCHEDULES)),
            "guidance_start": st.floats(0, 0.5),
            "guidance_end": st.floats(0.51, 1),
            "guidance_rescale": st.sampled_from([0.0, 0.5]),
            "batch_size": st.integers(1, 4),
            "vae_tile": st.sampled_from([0, 128, 256]),
            "offload": st.booleans(),
        },
    )
)
def test_settings_come_to_rest_and_what_is_left_acts(values):
    shown, _ = effective(base(**values))
    assert effective(shown) == (shown, [n for n in effective(shown)[1] if "leaves no step" in n])
    assert Settings(**shown.asdict() | {"skip_layer": shown.skip_layer}) == shown
    steps = executed_steps(shown)
    if shown.residual_target_layers:
        assert any(shown.residual.acts(i, steps) for i in range(steps))
    if shown.skip_layer:
        assert any(shown.skip_layer.acts(i, shown.steps) for i in range(steps))
    if shown.cache:
        assert shown.batch_size == 1


def test_values_are_kept_as_they_were_read():
    numbers = Settings(prompt="a", model=Path("m"), steps="7", cfg=5, seed=3.0, residual_weights=[1], sampler="EULER")
    assert numbers == Settings(
        prompt="a", model="m", steps=7, cfg=5.0, seed=3, residual_weights=(1.0,), sampler="euler"
    )
    assert json.dumps(numbers.asdict())
    assert Settings(prompt="a", model="m", cfg=5, steps=50.0).digest() == Settings(prompt="a", model="m").digest()
    spread = Settings(prompt="a", model="m", residual_target_layers="2-4", residual_weights="linear:1:0")
    assert spread.residual_weights == (1.0, 0.5, 0.0)


# ---- whole pictures ------------------------------------------------------------------------------

BASE = ["--model", str(DEMO), "--device", "cpu", "--steps", "6"]
TILED = ["--width", "160", "--height", "128", "--vae_tile", "128"]
EXACT = {
    "offload": ["--offload"],
    "cache": ["--cache", "0.2", "--batch_size", "4"],
    "int8": ["--weights", "int8", "--batch_size", "4"],
    "tiles": [*TILED, "--batch_size", "4"],
    "dpmpp_2m": ["--sampler", "dpmpp_2m", "--batch_size", "4"],
    "methods": [
        *("--sampler", "euler_ancestral", "--scheduler", "beta", "--batch_size", "4"),
        *("--guidance_start", "0.2", "--guidance_end", "0.7", "--guidance_rescale", "0.5"),
    ],
    "heun": ["--sampler", "heun", "--scheduler", "simple", "--batch_size", "4"],
    "all": ["--offload", "--cache", "0.2", "--weights", "int8", *TILED, "--sampler", "dpmpp_2m", "--batch_size", "4"],
}


@pytest.mark.parametrize("case", EXACT)
def test_replay_is_bit_for_bit_with(tmp_path, capsys, case):
    command = [*BASE, "--prompt", PROMPT, "--seed", "3", "--num_images", "4", "--residual_target_layers", "3,5"]
    more = ["--residual_weights", "each:0.2", "--residual_end", "0.5"]
    assert sd3_infer.main([*command, *more, *EXACT[case], "--out_dir", str(tmp_path)]) == 0
    made = sorted(tmp_path.rglob("0*.png"))
    assert len(made) == 4
    for path in (made[0], made[2]):
        capsys.readouterr()
        assert sd3_infer.main(["--replay", str(path), "--out_dir", str(tmp_path / "again")]) == 0
        assert "bit for bit" in capsys.readouterr().err


@pytest.mark.parametrize("case", EXACT)
def test_a_third_of_a_sweep_made_again_is_the_same_byte_for_byte(tmp_path, case):
    command = [*BASE, "--prompt", PROMPT, "--seed", "0-5", "--residual_target_layers", "3,5", "--residual_end", "0.5"]
    command += [*EXACT[case], "--out", str(tmp_path / "out")]
    command = [f"{word}=True" if word == "--offload" else word for word in command]
    assert sd3.sweep.command.main(command) == 0
    made = {p: p.read_bytes() for p in sorted((tmp_path / "out" / "pictures").glob("*.png"))}
    assert len(made) == 12
    for path in list(made)[::3]:
        path.unlink()
    assert sd3.sweep.command.main(command) == 0
    assert made == {p: p.read_bytes() for p in sorted((tmp_path / "out" / "pictures").glob("*.png"))}


def test_offloading_makes_another_picture_of_a_sweep_and_is_recorded(tmp_path, capsys):
    command = [*BASE, "--prompt", PROMPT, "--steps", "2", "--out", str(tmp_path / "out"), "--offload=False;True"]
    assert sd3.sweep.command.main(command) == 0
    records = [sd3.png.read_record(p)["settings"] for p in (tmp_path / "out" / "pictures").glob("*.png")]
    assert sorted(r.get("offload", False) for r in records) == [False, True]


def test_pictures_with_a_cache_are_made_one_by_one_and_that_is_told(tmp_path, capsys):
    command = [*BASE, "--prompt", PROMPT, "--seed", "1", "--num_images", "3", "--cache", "0.2"]
    assert sd3_infer.main([*command, "--batch_size", "3", "--out_dir", str(tmp_path / "three")]) == 0
    assert "made one by one" in capsys.readouterr().err
    assert sd3_infer.main([*command, "--out_dir", str(tmp_path / "one")]) == 0
    assert "made one by one" not in capsys.readouterr().err
    three, one = (sorted((tmp_path / name).rglob("0*.png")) for name in ("three", "one"))
    assert [p.read_bytes() for p in three] == [p.read_bytes() for p in one]


def test_rows_with_a_cache_do_not_decide_for_each_other(engine):
    cond, neg = engine.get_cond(PROMPT), engine.get_cond("")
    run = lambda seeds: engine.do_sampling(  # noqa: E731
        torch.zeros(len(seeds), 16, 12, 12), seeds, cond, neg, 12, 2.5, "euler", shift=2.0, cache=0.15
    )
    together = run([1, 2, 3])
    assert torch.equal(together, torch.cat([run([seed]) for seed in (1, 2, 3)]))


@pytest.mark.parametrize(("window", "cache"), [((0.8, 1.0), 0.2), ((0.5, 0.55), 0.3), ((0.0, 0.1), 0.3)])
def test_a_cache_does_not_swallow_a_window(engine, window, cache):
    cond, neg = engine.get_cond(PROMPT), engine.get_cond("")
    config = ResidualConfig(0, (3, 5, 7), "each:0.1", start=window[0], end=window[1])  # more can move an object

    def effect(cache: float) -> float:
        start = torch.zeros(1, 16, 12, 12)
        runs = [
            engine.do_sampling(start, 1, cond, neg, 24, 2.5, "euler", residual_config=c, shift=2.0, cache=cache)
            for c in (None, config)
        ]
        return ((runs[1] - runs[0]).norm() / runs[0].norm()).item()

    assert effect(cache) > 0.2 * effect(0.0) > 0


def test_a_schedule_that_moves_is_not_reused_across_its_steps(engine):
    """exp:50 is nothing until the last steps, where it jumps to its full size: no step may stand for another then."""
    cond, neg = engine.get_cond(PROMPT), engine.get_cond("")
    config = ResidualConfig(0, (3, 5, 7), "each:1", schedule="exp:50")
    start = torch.zeros(1, 16, 12, 12)
    whole, cached = (
        engine.do_sampling(start, 1, cond, neg, 24, 2.5, "euler", residual_config=config, shift=2.0, cache=cache)
        for cache in (0.0, 0.3)
    )
    assert torch.equal(whole, cached)


# ---- what earlier versions wrote -----------------------------------------------------------------


def put_record(path: Path, record: dict) -> None:
    """Gives a picture another record."""
    with Image.open(path) as image:
        image.load()
        info = PngInfo()
        info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps(record))
        image.save(path, pnginfo=info)


def stored() -> list[dict]:
    return [*EARLIER["runs"].values(), *EARLIER["sweep"]["pictures"].values()]


@pytest.mark.parametrize("record", stored()[::4])
def test_an_earlier_record_is_still_known_by_its_digest(record):
    s = Settings(**record)
    assert json.loads(json.dumps(s.public())) == record
    assert earlier_digest(s) == s.digest()


def test_a_sweep_of_an_earlier_version_goes_on_without_making_a_picture_twice(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    for name, record in EARLIER["sweep"]["pictures"].items():
        info = PngInfo()
        info.add_text(sd3.png.SETTINGS_CHUNK, json.dumps({"settings": record}))
        Image.new("RGB", (96, 96)).save(out / "pictures" / f"{name}.png", pnginfo=info)
    record = {"format": 1, "planned": EARLIER["sweep"]["planned"], "files": {}}
    (out / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    before = sorted((out / "pictures").iterdir())
    arguments = [str(DEMO) if word == "MODEL" else word for word in EARLIER["sweep"]["arguments"]]
    assert sd3.sweep.command.main([*arguments, "--out", str(out)]) == 0
    assert "0 made" in capsys.readouterr().err
    assert sorted((out / "pictures").iterdir()) == before
    more = ["2.5;1;3" if word == "1;2.5" else word for word in arguments]
    assert sd3.sweep.command.main([*more, "--out", str(out)]) == 0
    made = {p.stem for p in (out / "pictures").iterdir()} - {p.stem for p in before}
    assert len(made) == 2 * 5  # both seeds at cfg 3: off, and two windows with two branches each


def test_an_earlier_picture_made_with_offload_is_replayed_with_it(tmp_path, capsys):
    """Pictures did not say so then; the record of their run did."""
    command = [*BASE, "--prompt", PROMPT, "--seed", "1", "--offload", "--dtype", "bfloat16"]
    assert sd3_infer.main([*command, "--out_dir", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("0*.png")
    record = sd3.png.read_record(path)
    del record["settings"]["offload"]
    put_record(path, record)
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(path), "--out_dir", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().err
    assert "bit for bit" in told
    assert "changed" not in told


# ---- two threads ---------------------------------------------------------------------------------


def test_a_tiled_and_a_whole_picture_at_once_are_those_made_alone(engine):
    vae = engine.engine.pixels.vae
    latents = [torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        wanted = [vae.decode(latents[0], 128), vae.decode(latents[1])]
    wrong = []

    def run(i: int) -> None:
        for _ in range(6):
            with torch.no_grad():
                if not torch.equal(vae.decode(latents[i], 128 if i == 0 else 0), wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_replacing_what_was_left_out_gives_what_was_asked_for(engine):
    values = engine.engine.defaults | {"denoise": 0.3, "cfg": 1, "negative_prompt": "a star"}
    plan = plan_pictures(engine.engine, [PROMPT], [1], **values)
    shown = plan.pictures[0]
    assert (shown.denoise, shown.negative_prompt) == (0.8, "")
    asked = dataclasses.replace(shown, **plan.as_given)
    assert (asked.denoise, asked.negative_prompt) == (0.3, "a star")
    assert len(plan.notes) == 2


# ---- what encodes text ---------------------------------------------------------------------------


@pytest.fixture
def apart(tmp_path) -> Path:
    """A small model whose text encoders are files of their own; returns the MMDiT's file."""
    tensors = tensors_of(modules())
    for role in ("clip_l", "clip_g", "t5xxl"):
        prefix = f"text_encoders.{role}.transformer."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        save_file(own, tmp_path / f"{role}.safetensors")
    rest = {k: v for k, v in tensors.items() if not k.startswith("text_encoders.")}
    save_file(rest, tmp_path / "m.safetensors", {"width": "64", "height": "48", "steps": "2"})
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / name, tmp_path / name)
    return tmp_path / "m.safetensors"


def other_t5(model: Path) -> None:
    """Other weights in T5's file: the same size, header and date."""
    path = model.parent / "t5xxl.safetensors"
    tensors, before = load_file(path), path.stat()
    save_file({k: v.flip(0).contiguous() for k, v in tensors.items()}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def other_tokenizer(model: Path) -> None:
    path = model.parent / "tokenizer_3" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")


@pytest.mark.parametrize(("change", "named"), [(other_t5, "t5xxl"), (other_tokenizer, "t5 tokenizer")])
def test_other_text_encoders_are_noticed_by_a_sweep_and_by_replay(apart, tmp_path, capsys, change, named):
    command = ["--model", str(apart), "--device", "cpu", "--prompt", "a red circle", "--dtype", "float32"]
    assert sd3.sweep.command.main([*command, "--seed", "0", "--out", str(tmp_path / "out")]) == 0
    assert sd3.sweep.command.main([*command, "--seed", "0-1", "--out", str(tmp_path / "out")]) == 0
    path = next((tmp_path / "out" / "pictures").glob("*.png"))
    capsys.readouterr()
    change(apart)
    assert sd3.sweep.command.main([*command, "--seed", "0-2", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert named in told
    assert "not the one that this sweep began with" in told
    assert sd3_infer.main(["--replay", str(path), "--out_dir", str(tmp_path / "again")]) == 0
    assert f"text encoder {named}" in capsys.readouterr().err


def test_a_record_that_knows_less_of_the_text_encoders_is_no_difference(apart, tmp_path, capsys):
    command = ["--model", str(apart), "--device", "cpu", "--prompt", "a red circle", "--dtype", "float32"]
    assert sd3_infer.main([*command, "--out_dir", str(tmp_path / "o")]) == 0
    (path,) = (tmp_path / "o").rglob("0*.png")
    record = sd3.png.read_record(path)
    record["encoders"] = {"t5xxl": {n: v for n, v in record["encoders"]["t5xxl"].items() if n != "identity"}}
    put_record(path, record)
    capsys.readouterr()
    assert sd3_infer.main(["--replay", str(path), "--out_dir", str(tmp_path / "again")]) == 0
    assert "not as it was" not in capsys.readouterr().err


# ---- what is told --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a (red:1.9) circle", "a ((red)) circle", "(a red circle)"])
def test_weights_of_words_are_told_to_have_no_effect(engine, prompt):
    plan = plan_pictures(engine.engine, ["a red circle", prompt], [1, 1], **engine.engine.defaults)
    why = "word weights have no effect, and the brackets are removed; `prompt_mode` whole reads them"
    assert plan.notes == [f'note: "{prompt}": {why}']
    plan = plan_pictures(engine.engine, [r"a \(red\) circle", "a red circle)"], [1, 1], **engine.engine.defaults)
    assert plan.notes == []


def test_a_served_line_is_answered_with_what_had_no_effect(tmp_path):
    raw = {"model": str(DEMO), "device": "cpu", "steps": "1", "out_dir": str(tmp_path)}
    lines = ['{"prompt": "a star", "denoise": 0.3}', '{"prompt": "a star"}', '{"prompt": "a star", "denoise": 0.3}']
    answers: list[str] = []
    sd3.serve.serve(Flags.read(raw), raw, lines, answers.append)
    notes = [json.loads(answer).get("notes") for answer in answers]
    assert notes == [["note: --denoise has no effect without --init_image"], None] * 1 + [notes[0]]


# ---- tiles by memory -----------------------------------------------------------------------------


def test_the_limit_of_a_container_counts(tmp_path):
    for text, wanted in (("max\n", math.inf), ("4000000000\n", 4e9), ("", math.inf)):
        (tmp_path / "memory.max").write_text(text)
        assert sd3.device.container_memory([tmp_path / "none", tmp_path / "memory.max"]) == wanted
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sd3.device.device_memory(torch.device("cpu")) == min(whole, sd3.device.container_memory())
