"""SD3Inferencer: what is loaded when, prompts of any length, batches, seeds, guidance and the public names."""

from __future__ import annotations

import inspect
import json
import threading

import numpy as np
import pytest
import torch
from helpers import relative
from PIL import Image

import sd3_impls
from sd3.engine import Busy
from sd3.models import SkipLayerConfig
from sd3.pixels import check_finite, to_image
from sd3.planning import batches, plan_pictures
from sd3.residual import ResidualConfig
from sd3.settings import Flags, picture_seeds
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, SkipLayerGuidance
from sd3_infer import SD3Inferencer

SIZE = {"width": 64, "height": 48}


def fresh(small_model, **options) -> SD3Inferencer:
    engine = SD3Inferencer()
    engine.tell.quiet = True
    return engine.load(str(small_model), device="cpu", **({"dtype": "float32"} | options))


def make(engine: SD3Inferencer, prompts: list[str], seeds: list[int], **values) -> list[bytes]:
    values = engine.engine.defaults | SIZE | {"steps": 3, "cfg": 3.0} | values
    return [
        image.tobytes()
        for _, _, image in engine.engine.make(plan_pictures(engine.engine, prompts, seeds, **values).pictures)
    ]


def test_encoders_are_opened_once_and_the_mmdit_stays(small_model, monkeypatch):
    engine = fresh(small_model)
    assert engine.engine.text.opened == 0
    assert not engine.engine.network.loaded
    asked = []
    assert set(engine.engine.text.encoders) == {"clip_l", "clip_g", "t5xxl"}
    original = engine.engine.text._run_clip
    monkeypatch.setattr(engine.engine.text, "_run_clip", lambda r, rows: asked.append(rows) or original(r, rows))
    make(engine, ["a star", "a circle", "a star"], [1, 2, 3, 4, 5, 6])
    assert engine.engine.text.opened == 3
    assert [len(set(rows)) for rows in asked] == [len(rows) for rows in asked] == [3, 3]  # each distinct prompt once
    first = engine.engine.network.mmdit
    make(engine, ["a circle"], [7])
    assert engine.engine.text.opened == 3  # a known prompt opens nothing
    make(engine, ["a square"], [7])
    assert engine.engine.text.opened == 6
    assert engine.engine.network.mmdit is first
    assert all(p.is_meta for e in engine.engine.text.encoders.values() for p in e.model.parameters())  # no layer stays


def test_a_prompt_of_many_t5_tokens_runs_and_keeps_its_own_tokens(small_engine):
    long = "a red circle and " * 8
    assert small_engine.engine.text.t5_length(long) > small_engine.engine.text.positions
    assert make(small_engine, [long], [1]) != make(small_engine, ["a red circle and"], [1])
    length = small_engine.engine.text.pair_length(long, "")
    halves = [small_engine.get_cond(p, length)[0] for p in (long, "")]
    assert halves[0].shape == halves[1].shape == (1, 16 + length, 160)


def test_pictures_of_two_lengths_do_not_share_a_batch(small_engine):
    long = "a red circle and " * 8
    settings = plan_pictures(
        small_engine.engine, ["a", "b", long, "c"], [1, 2, 3, 4], **SIZE, steps=2, batch_size=4
    ).pictures
    together = batches(settings, small_engine.engine.text.shape)
    assert [[i for i, _ in b] for b in together] == [[0, 1], [2], [3]]


def test_a_batch_gives_the_pictures_of_single_runs(small_engine):
    prompts, seeds = ["a star", "a red circle", "two squares"], [5, 6, 7]
    values = SIZE | {"steps": 3, "cfg": 3.0, "shift": 3.0, "sampler": "euler"}
    length = small_engine.engine.text.pair_length("a star", "")
    neg = small_engine.get_cond("", length)
    residual = ResidualConfig(0, (1,), (0.5,))
    singles = [
        small_engine.do_sampling(
            torch.zeros(1, 16, 6, 8),
            s,
            small_engine.get_cond(p, length),
            neg,
            3,
            3.0,
            "euler",
            residual_config=residual,
        )
        for p, s in zip(prompts, seeds, strict=True)
    ]
    conds = tuple(torch.cat(c) for c in zip(*(small_engine.get_cond(p, length) for p in prompts), strict=True))
    together = small_engine.do_sampling(
        torch.zeros(3, 16, 6, 8), seeds, conds, neg, 3, 3.0, "euler", residual_config=residual
    )
    assert relative(together, torch.cat(singles)) < 1e-5
    assert len(make(small_engine, prompts, seeds, **values, batch_size=2)) == 3


@pytest.mark.parametrize(("seed_type", "wanted"), [("fixed", [9, 10, 9, 10]), ("roll", [9, 10, 11, 12])])
def test_seed_types(seed_type, wanted):
    assert picture_seeds(9, seed_type, 2, 2) == wanted


def test_a_seed_alone_means_that_seed_and_none_means_random():
    assert Flags.read({"seed": "5"}).seeds(2) == [5, 5]
    assert Flags.read({"seed": "5", "seed_type": "roll"}).seeds(2) == [5, 6]
    assert Flags.read({"seed_type": "fixed", "num_images": 2}).seeds(1) == [23, 24]
    assert len(set(Flags.read({"num_images": 50}).seeds(1))) == 50


def test_random_seeds_differ():
    seeds = picture_seeds(9, "rand", 50, 2)
    assert len(set(seeds)) == 100
    assert all(0 <= s < 100_000 for s in seeds)


def test_streams_of_a_seed_are_apart():
    shape = (1, 16, 8, 8)
    start, image, control = (sd3_impls.seeded_noise(4, shape, s) for s in ("", "initial image", "control image"))
    for a, b in ((start, image), (start, control), (image, control)):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.15
    assert torch.equal(start, torch.randn(shape, generator=torch.Generator().manual_seed(4)))


def test_zero_denoise_gives_the_initial_image_back(small_engine, tmp_path):
    Image.effect_noise((64, 48), 60).convert("RGB").save(tmp_path / "in.png")
    values = {"init_image": str(tmp_path / "in.png"), "cfg": 3.0}
    (kept,) = make(small_engine, ["a star"], [1], **values, denoise=0.0)
    latent = small_engine.vae_encode(Image.open(tmp_path / "in.png"), 1)
    shown, wanted = (np.frombuffer(b, np.uint8).astype(int) for b in (kept, small_engine.vae_decode(latent).tobytes()))
    assert np.abs(shown - wanted).max() <= 1  # into the model's space and back: the last bit may turn a rounding
    assert make(small_engine, ["a star"], [1], **values, denoise=1.0) != [kept]


class Recorder(torch.nn.Module):
    """Stands in for an MMDiT: notes how it is called, returns a velocity that depends on the text."""

    def __init__(self):
        super().__init__()
        self.x_embedder = torch.nn.Module()
        self.x_embedder.proj = torch.nn.Conv2d(16, 8, 2)
        self.calls = []

    def embed_text(self, pooled, context):
        return context

    def velocity(self, x, t, context, controls, skip, hook, reuse):
        self.calls.append((x.shape[0], tuple(skip), t[0].item()))
        return x * 0 + context.mean() * (2.0 if skip else 1.0) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def test_guidance_runs_what_it_must_and_no_more():
    text = [Conditioning(torch.full((1, 4, 8), v), torch.zeros(1, 6)) for v in (1.0, 0.25)]
    slg = SkipLayerConfig(2.0, 0.1, 0.5, (3,), cfg=4.0)
    sigmas = sd3_impls.flow_schedule(10, 3.0)
    model = Recorder()
    guidance = [ClassifierFreeGuidance(4.0), SkipLayerGuidance(slg)]
    sd3_impls.sample_euler(Denoiser(model, *text, sigmas, guidance), torch.zeros(1, 16, 2, 2), sigmas)
    assert len(model.calls) == 13
    steps_with_skip = [i for i, c in enumerate(model.calls) if c[1]]
    assert [model.calls[i][2] for i in steps_with_skip] == pytest.approx([1000 * sigmas[i].item() for i in (2, 3, 4)])
    assert {c[0] for c in model.calls if c[1]} == {1}
    alone = Recorder()
    sd3_impls.sample_euler(Denoiser(alone, text[0], None, sigmas), torch.zeros(1, 16, 2, 2), sigmas)
    assert {c[0] for c in alone.calls} == {1}


def test_halves_of_different_length_are_refused():
    a, b = (Conditioning(torch.zeros(1, n, 8), torch.zeros(1, 6)) for n in (5, 6))
    with pytest.raises(ValueError, match="5 and 6 text tokens"):
        Denoiser(Recorder(), a, b, sd3_impls.flow_schedule(4, 3.0))


def test_cfg_one_equals_guidance_by_one(small_engine):
    length = small_engine.engine.text.pair_length("a star", "")
    cond, neg = small_engine.get_cond("a star", length), small_engine.get_cond("", length)
    latent = torch.zeros(1, 16, 6, 8)
    one = small_engine.do_sampling(latent, 3, cond, neg, 4, 1.0)
    near = small_engine.do_sampling(latent, 3, cond, neg, 4, 1.0 + 1e-6)
    assert relative(one, near) < 1e-4


def test_skip_layers_as_the_public_reference_writes_them(small_engine):
    length = small_engine.engine.text.pair_length("a star", "")
    text = small_engine.get_cond("a star", length), small_engine.get_cond("", length)
    values = {"scale": 2.5, "start": 0.0, "end": 0.9, "layers": [1, 2], "cfg": 4.0}
    latent = torch.zeros(1, 16, 6, 8)
    plain = small_engine.do_sampling(latent, 3, *text, 4, 4.0)
    as_dict = small_engine.do_sampling(latent, 3, *text, 4, 4.0, skip_layer_config=values)
    typed = SkipLayerConfig(2.5, 0.0, 0.9, (1, 2), cfg=4.0)
    assert torch.equal(as_dict, small_engine.do_sampling(latent, 3, *text, 4, 4.0, skip_layer_config=typed))
    assert not torch.allclose(plain, as_dict)


def test_gen_image_saves_pictures(small_engine, tmp_path):
    paths = small_engine.gen_image(
        ["a star", "a circle"], 64, 48, 2, 3.0, "euler", 5, "roll", str(tmp_path / "new"),
        residual_config=ResidualConfig(0, (1,), (0.5,)), negative_prompt="blue",
    )  # fmt: skip
    assert [p.name for p in paths] == ["000000.png", "000001.png"]
    record = json.loads(Image.open(paths[1]).text["sd3_residual"])["settings"]
    assert (record["seed"], record["residual_target_layers"], record["negative_prompt"]) == (6, [1], "blue")
    with pytest.raises(ValueError, match="no such layer"):
        small_engine.gen_image(["x"], 64, 48, out_dir=str(tmp_path), residual_config=ResidualConfig(0, (9,)))


def test_names_that_other_scripts_use():
    wanted = {
        "load": "model vae shift controlnet_ckpt model_folder text_encoder_device verbose load_tokenizers",
        "gen_image": "prompts width height steps cfg_scale sampler seed seed_type out_dir controlnet_cond_image "
        "init_image denoise skip_layer_config residual_config",
        "do_sampling": "latent seed conditioning neg_cond steps cfg_scale sampler controlnet_cond denoise "
        "skip_layer_config residual_config",
    }
    for name, parameters in wanted.items():
        positional = [
            p.name
            for p in inspect.signature(getattr(SD3Inferencer, name)).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert positional[1:] == parameters.split(), name


def test_pixels_are_truncated_and_nan_is_refused():
    got = to_image(torch.tensor([[[-1.0, 1.0, 0.0, 5.0, -5.0]]] * 3))
    assert [got.getpixel((i, 0))[0] for i in range(5)] == [0, 255, 127, 255, 0]
    with pytest.raises(ValueError, match="try dtype bfloat16 or float32"):
        check_finite(torch.tensor([1.0, float("inf")]), "the latent", torch.float16)


def test_t5_streams_as_it_runs_whole(small_model):
    from helpers import modules

    from sd3.files import ENCODER_PREFIX

    engine = fresh(small_model)
    whole = modules()[ENCODER_PREFIX.format("t5xxl")]
    for length in (16, 30):
        ids = torch.tensor([engine.engine.text.t5_tokenizer.tokenize("a red circle", length).ids])
        got = engine.engine.text.get_cond("a red circle", length)[0][:, engine.engine.text.positions :]
        with torch.no_grad():
            assert relative(got, whole(ids)) < 1e-6


def test_bfloat16_and_float16_stay_close_to_float32(small_model, small_engine):
    length = small_engine.engine.text.pair_length("a star", "")
    latent = torch.zeros(1, 16, 6, 8)

    def run(engine):
        return engine.do_sampling(latent, 3, engine.get_cond("a star", length), engine.get_cond("", length), 4, 3.0)

    exact = run(small_engine)
    for dtype, limit in (("bfloat16", 0.1), ("float16", 0.02)):
        assert relative(run(fresh(small_model, dtype=dtype)), exact) < limit


def test_a_second_thread_gets_an_error_and_the_first_its_picture(small_engine):
    engine = small_engine.engine
    plan = plan_pictures(engine, ["a star"], [1], **SIZE, steps=2, cfg=1.0)
    ((_, _, alone),) = engine.make(plan.pictures)
    told = []

    def other() -> None:
        for use in (
            lambda: small_engine.get_cond("a circle"),
            lambda: list(engine.make(plan.pictures)),
            lambda: small_engine.vae_decode(torch.zeros(1, 16, 4, 4)),
        ):
            try:
                use()
            except Busy as busy:
                told.append(str(busy))

    def meanwhile(step, *_) -> None:
        if step == 0:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    ((_, _, image),) = engine.make(plan.pictures, on_step=meanwhile)
    assert len(told) == 3
    assert "another thread" in told[0]
    assert image.tobytes() == alone.tobytes()
    assert len(list(engine.make(plan.pictures))) == 1  # it is free again


def test_between_two_images_of_a_run_a_second_thread_gets_an_error_too(small_engine):
    engine = small_engine.engine
    plan = plan_pictures(engine, ["a star"] * 3, [1, 2, 3], **SIZE, steps=1, cfg=1.0)
    alone = [image.tobytes() for _, _, image in engine.make(plan.pictures)]
    told, images = [], []

    def other() -> None:
        with pytest.raises(Busy, match="another thread"):
            list(engine.make(plan.pictures))
        told.append(True)

    for _, _, image in engine.make(plan.pictures):
        images.append(image.tobytes())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert images == alone
    assert told == [True] * 3
    half = engine.make(plan.pictures)
    next(half)
    half.close()  # an abandoned run leaves the engine free
    thread = threading.Thread(target=lambda: told.append(len(list(engine.make(plan.pictures)))))
    thread.start()
    thread.join()
    assert told[-1] == 3
