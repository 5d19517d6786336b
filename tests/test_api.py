"""`sd3.load` and what it returns: images, latents, callbacks, saving, and mistakes that speak of settings."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import DEMO, DEMO_DEPTH, ROOT
from PIL import Image

import sd3
import sd3.png
import sd3.weights
from sd3.api import OPTIONS
from sd3.flags import names
from sd3_infer import SD3Inferencer

FEW = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe() -> sd3.Pipeline:
    return sd3.load(DEMO, device="cpu", dtype="float32")


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of a pixel's channel, of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_the_example_of_the_readme():
    pipe = sd3.load(str(DEMO))
    image = pipe("a red circle", seed=5, residual_target_layers="3-7").images[0]
    assert image.size == (96, 96)


def test_images_are_those_of_the_reference_names_and_of_a_config(pipe, tmp_path):
    flags = {"residual_target_layers": "3-7", "residual_weights": "each:0.2"}
    out = pipe(["a red circle", "a star"], seed=5, num_images=2, **FEW, **flags)
    assert [s.seed for s in out.settings] == [5, 6, 5, 6]
    assert [s.prompt for s in out.settings] == ["a red circle"] * 2 + ["a star"] * 2
    assert out.paths == []
    config = sd3.ResidualConfig(targets="3-7", weights="each:0.2")
    again = pipe(["a red circle", "a star"], seed=5, num_images=2, **FEW, residual=config)
    assert all(map(same, out.images, again.images))
    engine = SD3Inferencer().load(DEMO, device="cpu", dtype="float32")
    paths = engine.gen_image(
        ["a red circle", "a star"], seed=5, num_images=2, **FEW, residual_config=config, out_dir=tmp_path
    )
    assert all(same(Image.open(path), image) for path, image in zip(paths, out.images, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"residual_target_layers": "3-7", "residual_weights": "each:0.5"},
        {"residual": sd3.ResidualConfig(targets="3-7", weights="each:0.5")},
        {"skip_layer": sd3.SkipLayerConfig(scale=3.0, start=0.0, end=1.0, layers=(3, 4), cfg=4.0)},
        {"shift": 1.0},
    ],
    ids=["residual settings", "residual config", "skip_layer", "shift"],
)
def test_a_setting_changes_the_image(pipe, settings):
    few = FEW | {"steps": 4, "seed": 5}
    (plain,), (changed,) = pipe("a red circle", **few).images, pipe("a red circle", **few, **settings).images
    assert difference(plain, changed) > 8
    assert same(plain, pipe("a red circle", **few).images[0])


def test_the_shift_of_load_is_that_of_images_that_name_none(pipe):
    few = FEW | {"steps": 4, "seed": 5}
    other = sd3.load(DEMO, device="cpu", dtype="float32", shift=1.0)
    out = other("a red circle", **few)
    assert out.settings[0].shift == 1.0
    assert same(out.images[0], pipe("a red circle", **few, shift=1.0).images[0])
    assert same(other("a red circle", **few, shift=pipe.engine.defaults["shift"]).images[0],
                pipe("a red circle", **few).images[0])  # fmt: skip


def test_images_are_saved_only_where_asked(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe("a star", seed=1, **FEW)
    assert list(tmp_path.iterdir()) == []
    out = pipe("a star", seed=1, **FEW, out_dir="here")
    assert [path.name for path in out.paths] == ["000000.png"]
    assert same(Image.open(out.paths[0]), out.images[0])
    assert sd3.png.read_record(out.paths[0])["settings"]["seed"] == 1
    bare = pipe("a star", seed=1, **FEW, out_dir="bare", metadata=False).paths[0]
    assert "sd3_residual" not in Image.open(bare).info


def test_latents_are_what_is_decoded(pipe):
    out = pipe(["a star", "two stars"], seed=1, **FEW, output="latent", batch_size=2)
    assert out.images == []
    assert out.latents.shape == (2, 16, 8, 8)
    images = pipe(["a star", "two stars"], seed=1, **FEW, batch_size=2).images
    assert all(same(pipe.engine.decode(row[None]), image) for row, image in zip(out.latents, images, strict=True))


@pytest.mark.parametrize("output", ["pil", "latent"])
def test_a_callback_hears_of_every_step_and_may_stop(pipe, output):
    steps = []

    def on_step(step, x, sigma, denoised):
        steps.append((step, tuple(x.shape), tuple(denoised.shape)))
        return len(steps) < 3

    out = pipe(["a star"] * 3, seed=1, **FEW, on_step=on_step, output=output)
    assert steps == [(s, (1, 16, 8, 8), (1, 16, 8, 8)) for s in (0, 1, 0)]
    assert len(out.settings) == 1


def test_images_come_one_at_a_time(pipe):
    steps = []
    made = pipe.stream(["a star", "two stars"], seed=1, **FEW, on_step=lambda step, *_: steps.append(step))
    assert steps == []
    assert next(made).settings.prompt == "a star"
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, "steps 0: must be"),
        ({"cfg": "much"}, "cfg much: must be a number"),
        ({"output": "jpeg"}, "output jpeg: must be pil or latent"),
        ({"residual_target_layers": "3-70"}, f"residual_target_layers {DEMO_DEPTH}: no such layer"),
        ({"residual_start": 0.8, "residual_end": 0.2}, "residual_start 0.8: must be below residual_end"),
        ({"guidance_start": 0.8, "guidance_end": 0.2}, "guidance_start 0.8: must be below guidance_end"),
        ({"init_image": "nothing.png"}, "init_image nothing.png: no such file"),
        ({"residual": sd3.ResidualConfig(), "residual_mode": "add"}, "cannot be combined with residual"),
        ({"residual": "3-7"}, "must be a ResidualConfig"),
        ({"width": 100}, "width 100: must be"),
    ],
)
def test_mistakes_speak_of_settings_and_come_before_weights_load(values, told, tmp_path, monkeypatch):
    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *_, **__: pytest.fail("weights were loaded"))
    pipe = sd3.load(DEMO, device="cpu")
    values = {"out_dir": tmp_path / "out"} | values
    with pytest.raises(sd3.Mistake) as error:
        pipe("a star", **FEW | values)
    assert told in str(error.value)
    assert "--" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_names_that_do_not_exist(pipe):
    with pytest.raises(TypeError, match="no parameter sede; did you mean seed"):
        pipe("a star", sede=3)
    with pytest.raises(TypeError, match="no parameter dtipe; did you mean dtype"):
        sd3.load(DEMO, dtipe="float32")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sd3.nothing  # noqa: B018


def test_notes_go_to_who_asks_for_them(capsys):
    class Heard(sd3.Reporter):
        def __init__(self):
            self.lines = []

        def note(self, text):
            self.lines.append(text)

    heard = Heard()
    pipe = sd3.load(DEMO, device="cpu", tell=heard)
    pipe("a star", seed=1, **FEW, denoise=0.3)
    assert heard.lines == ["note: `denoise` has no effect without `init_image`"]
    assert capsys.readouterr() == ("", "")


def test_importing_the_package_imports_no_torch():
    code = "import sys, sd3; sd3.Mistake, sd3.__version__; assert not {'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_signatures_name_every_setting():
    """What `help` and notebooks show comes from the flag table."""
    call, load = inspect.signature(sd3.Pipeline.__call__).parameters, inspect.signature(sd3.load).parameters
    assert {"prompt", "output", "out_dir", "on_step", "seed", "steps", "residual_target_layers"} <= set(call)
    assert set(call) - {"self"} == {"output", *OPTIONS} | set(names("picture"))
    assert set(load) == {"tell", "shift", *names("load")}
    assert call["steps"].annotation == int | None
    for function, name in ((sd3.Pipeline.__call__, "residual_mode"), (sd3.load, "device")):
        assert f"\n  {name}: " in function.__doc__
        assert "`" not in function.__doc__.split("Settings:")[1]


def test_a_pipeline_shows_what_it_is(pipe):
    shown = repr(pipe)
    assert str(DEMO) in shown
    depth, width = pipe.engine.config.depth, pipe.engine.config.width
    assert f"{depth} blocks of width {width}, float32 on cpu" in shown


def test_notes_are_warnings_at_the_line_of_the_call(pipe):
    with pytest.warns(sd3.Note, match="^t5_tokens and prompt_weights have no effect") as heard:
        pipe("a red circle", seed=1, t5_tokens=100, **FEW)
    assert heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd3.load(DEMO, device="cpu", tell=sd3.Reporter())("a red circle", seed=1, t5_tokens=100, **FEW)


def test_a_note_about_a_file_is_a_warning_at_the_line_of_the_call(pipe, tmp_path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 100)).save(tmp_path / "half.png")
    with pytest.warns(sd3.Note, match=r"half\.png: is partly transparent") as heard:
        pipe("a red circle", seed=1, init_image=tmp_path / "half.png", **FEW)
    assert heard[0].filename == __file__


def test_a_lora_that_fits_wholly_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd3.load(DEMO, device="cpu", lora=DEMO.parent / "loras" / "cross.safetensors")


def test_words_that_the_model_never_saw_are_a_note(pipe):
    with pytest.warns(sd3.Note, match='this small model never saw "dog"'):
        pipe("a dog", seed=1, **FEW)


def test_a_configuration_of_another_type(pipe):
    with pytest.raises(sd3.Mistake, match=r"^residual .*: must be a ResidualConfig, such as"):
        pipe("a red circle", residual={"targets": "3-7"}, **FEW)
