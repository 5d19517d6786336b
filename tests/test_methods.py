"""Samplers, schedules and guidance: check numbers, the step that a call belongs to, what is reported, bad input."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEMO, relative
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import sd3.engine
import sd3_impls
import sd3_infer
from mmditx import Stream
from sd3 import png
from sd3.effects import executed_steps
from sd3.methods import GUIDANCE, SAMPLERS, SCHEDULES
from sd3.models import SkipLayerConfig
from sd3.planning import plan_pictures
from sd3.replay import Replay
from sd3.residual import ResidualConfig
from sd3.settings import Settings, effective
from sd3_impls import (
    ClassifierFreeGuidance,
    Conditioning,
    Denoiser,
    GuidanceRescale,
    SkipLayerGuidance,
    StopSampling,
    find_sampler,
    guided_sampling,
    place_in,
    schedule,
    seeded_noise,
    step_noise,
)
from sd3_infer import SD3Inferencer

CHECKED = torch.tensor([1, 0.8, 0.55, 0.3, 0.1, 0], dtype=torch.float64)
ones = lambda sigma, following: torch.ones(1, dtype=torch.float64)  # noqa: E731


def closed_form(x, sigma):
    """The denoised picture that the check numbers were computed with."""
    return (0.3 + 0.5 * torch.sin(2 * x)) * (1 - sigma) + 0.1 * sigma


# ---- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("euler", 0.64742455), ("heun", 0.71656892), ("euler_ancestral", 0.71534093), ("dpmpp_2m", 0.70528484)],
)
def test_a_sampler_gives_its_check_number(name, wanted):
    x = torch.tensor([0.7], dtype=torch.float64)
    assert find_sampler(name)(closed_form, x, CHECKED, ones).item() == pytest.approx(wanted, abs=1e-8)


def test_euler_ancestral_is_euler_at_eta_0():
    x = torch.tensor([0.7], dtype=torch.float64)
    got = sd3_impls.sample_euler_ancestral(closed_form, x, CHECKED, ones, eta=0.0)
    assert got.item() == pytest.approx(0.64742455, abs=1e-8)


def test_every_row_has_its_function_or_class_and_the_other_way_round():
    functions = {name for name, value in vars(sd3_impls).items() if inspect.isfunction(value)}
    assert {name for name in functions if name.startswith("sample_")} == {f"sample_{name}" for name in SAMPLERS}
    assert {name for name in functions if name.startswith("sigmas_")} == {f"sigmas_{name}" for name in SCHEDULES}
    classes = {name for name, value in vars(sd3_impls).items() if inspect.isclass(value) and hasattr(value, "combine")}
    assert classes - {"Guidance"} == set(GUIDANCE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_draws_noise_as_its_row_says(name):
    drawn = []
    x = torch.tensor([0.7], dtype=torch.float64)
    find_sampler(name)(closed_form, x, CHECKED, lambda *at: drawn.append(at) or torch.ones(1, dtype=torch.float64))
    assert bool(drawn) == SAMPLERS[name].noise
    assert all(sigma > following > 0 for sigma, following in drawn)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_scripts_call_a_sampler_as_the_reference_does(name):
    seen = []

    def model(x, sigma, **extra):
        seen.append((sigma.shape, sigma.dtype, extra))
        return 0.5 * x

    find_sampler(name)(model, torch.ones(2, 1, 1, 1), CHECKED.float(), extra_args={"scale": 3})
    assert seen == [((2,), torch.float32, {"scale": 3})] * 5


def test_step_noise_is_a_stream_of_its_own_per_seed_and_does_not_depend_on_the_batch():
    like = torch.zeros(3, 16, 4, 6)
    noise = step_noise([5, 6, 7], like)
    draws = [noise(1.0, 0.5), noise(0.5, 0.2)]
    for row, seed in enumerate([5, 6, 7]):
        alone = step_noise([seed], like[:1])
        assert all(torch.equal(draw[row : row + 1], alone(1.0, 0.5)) for draw in draws)
    start = seeded_noise(5, (1, 16, 4, 6))
    for one, other in itertools.combinations([start, draws[0][:1], draws[0][1:2], draws[1][:1]], 2):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.2


# ---- the step that a call belongs to -------------------------------------------------------------


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 60), st.floats(0.1, 20), st.floats(0, 1))
@hypothesis_settings(deadline=None)
def test_the_place_in_a_schedule(name, steps, shift, part):
    levels = schedule(name, steps, shift).tolist()
    assert [place_in(levels, sigma) for sigma in levels] == list(range(len(levels)))
    for i, (sigma, following) in enumerate(itertools.pairwise(levels)):
        assert place_in(levels, sigma + part * (following - sigma)) == pytest.approx(i + part, abs=1e-3 / steps + 1e-6)
    assert place_in(levels, levels[0] + part) == 0


class Toy(torch.nn.Module):
    """Stands in for an MMDiT: a velocity that depends on the latent, sigma and the text; `skip` makes another one."""

    def __init__(self):
        super().__init__()
        self.x_embedder = torch.nn.Module()
        self.x_embedder.proj = torch.nn.Conv2d(1, 1, 1)
        self.calls = []  # sigma, rows, skipped

    def embed_text(self, pooled, context):
        return context

    def velocity(self, x, t, context, controls=(), skip=(), hook=None, reuse=None):
        sigma = t[0].item() / 1000
        self.calls.append((sigma, x.shape[0], tuple(skip)))
        return torch.tanh(x + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)) * (1 + sigma) + (0.3 if skip else 0)


class Seen(Stream):
    """Notes the calls of the network."""

    def __init__(self):
        self.calls = []

    def begin(self, at):
        self.calls.append(at)
        return False


def text(value: float, rows: int = 1) -> Conditioning:
    return Conditioning(torch.full((rows, 2, 3), value), torch.zeros(rows, 4))


def denoiser(sigmas: torch.Tensor, guidance=None, **options) -> Denoiser:
    guidance = [ClassifierFreeGuidance(3.0)] if guidance is None else guidance
    return Denoiser(Toy(), text(0.5), text(-0.2), sigmas, guidance, **options)


def run(sampler: str, sigmas: torch.Tensor, guidance=None, seeds=(3,), **options):
    """The final latent, and the network's calls as a hook saw them."""
    seen = Seen()
    one = denoiser(sigmas, guidance, streams=[seen], **options)
    return guided_sampling(one, sampler, torch.zeros(len(seeds), 1, 2, 2), seeds), seen.calls


@pytest.mark.parametrize("scheduler", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_window_of_half_the_steps_ends_at_the_same_sigma(sampler, scheduler):
    sigmas = schedule(scheduler, 8, 3.0)
    window = ResidualConfig(0, (1,), end=0.5)
    _, calls = run(sampler, sigmas)
    inside = [at.sigma for at in calls if window.acts(at.step, at.steps)]
    assert min(inside) == sigmas[3].item()
    assert all(window.acts(at.step, at.steps) == (at.sigma > sigmas[4].item()) for at in calls)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_skip_layer_guidance_acts_by_sigma(sampler):
    """Its window is of the whole schedule, its steps are counted from the first that runs, as in the reference."""
    sigmas = schedule("normal", 10, 3.0)
    guidance = [ClassifierFreeGuidance(3.0), SkipLayerGuidance(SkipLayerConfig(2.0, 0.1, 0.5, (3,), 3.0))]
    _, calls = run(sampler, sigmas[2:], guidance, planned=10)
    assert {at.sigma for at in calls if at.skip_layers} == {s.item() for s in sigmas[4:7]}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_reported_once_with_its_state(sampler):
    sigmas, steps = schedule("normal", 6, 3.0), []
    one = denoiser(sigmas, on_step=lambda *state: steps.append((*state, len(one.model.calls))))
    end = guided_sampling(one, sampler, torch.zeros(1, 1, 2, 2), [3])
    assert [(step, sigma) for step, _, sigma, _, _ in steps] == list(enumerate(sigmas.tolist()[:-1]))
    assert torch.equal(steps[0][1], seeded_noise(3, (1, 1, 2, 2)))
    again = denoiser(sigmas)
    for _, x, sigma, denoised, calls in steps:
        assert torch.equal(again(x, sigma), denoised)
        assert all(called[0] == pytest.approx(sigma) or called[0] > sigma for called in one.model.calls[:calls])
    assert torch.allclose(steps[-1][3], end, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("last", [0, 2, 5])
def test_a_run_stops_where_on_step_says_so(sampler, last):
    """After the last step there is nothing left to stop: what was sampled is returned."""
    sigmas, steps = schedule("normal", 6, 3.0), []
    one = denoiser(sigmas, on_step=lambda step, *_: steps.append(step) or step < last)
    with pytest.raises(StopSampling) if last < 5 else contextlib.nullcontext():
        guided_sampling(one, sampler, torch.zeros(1, 1, 2, 2), [3])
    assert steps == list(range(last + 1))
    assert min(called[0] for called in one.model.calls) == pytest.approx(sigmas[last].item())


def test_no_more_pictures_where_on_step_says_so(small_engine):
    engine = small_engine.engine
    plan = plan_pictures(engine, ["a star"] * 3, [1, 2, 3], width=64, height=48, steps=3, cfg=1.0)
    steps = []
    made = engine.make(plan.pictures, on_step=lambda step, *_: steps.append(step) or len(steps) < 5)
    assert [number for number, *_ in made] == [0]
    assert steps == [0, 1, 2, 0, 1]


# ---- whole runs ----------------------------------------------------------------------------------


def test_heun_with_a_residual_window_skip_layer_guidance_and_a_controlnet(small_model):
    """Everything that goes by steps, in one run of a sampler with two calls a step."""
    net = small_model.parent / "control_8b.safetensors"
    engine = SD3Inferencer().load(str(small_model), controlnet_ckpt=str(net), device="cpu", dtype="float32")
    engine.tell.quiet = True
    length = engine.engine.text.pair_length("a star", "")
    texts = [engine.get_cond(prompt, length) for prompt in ("a star", "")]
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    control = sd3_impls.latent_in(engine.vae_encode(image, [3], control=True))
    parts = {
        "controlnet_cond": control,
        "skip_layer_config": SkipLayerConfig(2.5, 0.1, 0.5, (2,), cfg=4.0),
        "residual_config": ResidualConfig(0, (1, 3), "each:0.5", end=0.5),
    }

    def sample(**parts) -> tuple[torch.Tensor, list]:
        seen = Seen()
        return engine.do_sampling(
            torch.zeros(1, 16, 6, 8), 3, *texts, 6, 4.0, "heun", streams=[seen], **parts
        ), seen.calls

    whole, calls = sample(**parts)
    sigmas = [sigma.item() for sigma in schedule("normal", 6, engine.shift)]
    both = [at.sigma for at in calls if not at.skip_layers]
    assert both == [sigmas[0], *itertools.chain(*([s, s] for s in sigmas[1:6]))]
    assert [at.sigma for at in calls if at.skip_layers] == [s for s in sigmas[1:3] for _ in range(2)]
    assert {at.sigma for at in calls if parts["residual_config"].acts(at.step, at.steps)} == set(sigmas[:3])
    assert torch.isfinite(whole).all()
    for name in parts:
        without, _ = sample(**{n: part for n, part in parts.items() if n != name})
        assert relative(without, whole) > 1e-3, name


def test_euler_ancestral_in_a_batch_of_four_gives_the_single_pictures(small_engine):
    sigmas, seeds = schedule("normal", 6, 3.0), [5, 6, 7, 8]

    def toy(seeds: list[int]) -> torch.Tensor:
        texts = (Conditioning(torch.zeros(len(seeds), 2, 3), torch.zeros(len(seeds), 4)) for _ in range(2))
        one = Denoiser(Toy(), *texts, sigmas, [ClassifierFreeGuidance(3.0)])
        return guided_sampling(one, "euler_ancestral", torch.zeros(len(seeds), 16, 6, 8), seeds)

    assert torch.equal(toy(seeds), torch.cat([toy([seed]) for seed in seeds]))

    def pictures(size: int) -> list[np.ndarray]:
        values = {"width": 64, "height": 48, "steps": 4, "cfg": 3.0, "sampler": "euler_ancestral", "batch_size": size}
        plan = plan_pictures(small_engine.engine, ["a star"], seeds, **values)
        return [np.asarray(image, dtype=int) for *_, image in small_engine.engine.make(plan.pictures)]

    together, alone = pictures(4), pictures(1)
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 1  # the network's last bits depend on its batch
    assert np.abs(together[0] - together[1]).max() > 1


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scheduler", "karas"], "error: --scheduler karas: must be one of normal, simple, beta"),
        (["--sampler", "hein"], "error: --sampler hein: must be one of euler, euler_ancestral, heun, dpmpp_2m; did"),
        (["--guidance_start", "0.5", "--guidance_end", "0.5"],
         "error: --guidance_start 0.5: must be below --guidance_end 0.5; no step is left"),
        (["--guidance_start", "1"], "error: --guidance_start 1: must be below --guidance_end 1; no step is left"),
        (["--guidance_end", "1.5"], "error: --guidance_end 1.5: must be from 0.0 to 1.0"),
        (["--guidance_rescale", "-0.1"], "error: --guidance_rescale -0.1: must be from 0.0 to 1.0"),
        (["--guidance_rescale", "1.01"], "error: --guidance_rescale 1.01: must be from 0.0 to 1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_line_before_anything_loads(words, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sd3.engine.Engine, "__init__", lambda *_, **__: pytest.fail("a model was opened"))
    arguments = ["--prompt", "a star", "--model", str(DEMO), "--out_dir", str(tmp_path), *words]
    assert sd3_infer.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert error.startswith(told)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"scheduler": "karas"}, "scheduler karas: must be one of"),
        ({"guidance_start": 0.7, "guidance_end": 0.2}, "guidance_start 0.7: must be below guidance_end 0.2"),
        ({"guidance_rescale": 2}, "guidance_rescale 2: must be from 0.0 to 1.0"),
    ],
)
def test_bad_values_from_python(small_engine, values, told):
    text = small_engine.get_cond("a star")
    with pytest.raises(ValueError, match=told):
        small_engine.do_sampling(torch.zeros(1, 16, 6, 8), 3, text, text, 4, 3.0, **values)
    with pytest.raises(ValueError, match=told):
        plan_pictures(small_engine.engine, ["a star"], [1], **values)


def test_a_parameter_that_sampling_does_not_have(small_engine):
    text = small_engine.get_cond("a star")
    with pytest.raises(TypeError, match=r"no parameter schedular; did you mean scheduler\?"):
        small_engine.do_sampling(torch.zeros(1, 16, 6, 8), 3, text, text, 4, 3.0, schedular="simple")


# ---- schedules -----------------------------------------------------------------------------------

OF_SIX = {
    "normal": (1, 0.92334, 0.81892, 0.66833, 0.43223, 0.00893),
    "simple": (1, 0.93778, 0.85733, 0.75, 0.60072, 0.37556),
    "beta": (1, 0.96771, 0.88776, 0.75075, 0.53351, 0.23311),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_its_check_numbers(name):
    assert schedule(name, 6, 3.0).tolist() == pytest.approx((*OF_SIX[name], 0), abs=6e-6)


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 3000), st.floats(0.001, 1000))
@hypothesis_settings(deadline=None)
def test_a_schedule_falls_to_zero_and_has_no_equal_neighbours(name, steps, shift):
    sigmas = schedule(name, steps, shift)
    assert sigmas.dtype == torch.float32
    assert 1.001 > sigmas[0] > 0 == sigmas[-1]
    assert (sigmas.diff() < 0).all()
    assert 2 <= len(sigmas) <= steps + 1


@given(st.floats(1e-9, 1), st.sampled_from([(0.6, 0.6), (0.5, 0.7), (2.5, 0.6)]))
@hypothesis_settings(deadline=None)
def test_beta_quantiles_are_those_of_scipy(p, parameters):
    stats = pytest.importorskip("scipy.stats")
    assert sd3_impls.beta_quantile(p, *parameters) == pytest.approx(stats.beta.ppf(p, *parameters), abs=1e-12)
    assert sd3_impls.beta_probability(p, *parameters) == pytest.approx(stats.beta.cdf(p, *parameters), abs=1e-12)


@pytest.mark.parametrize("steps", [5, 28, 150, 1500])
def test_the_beta_schedule_is_that_of_scipy_without_repeats(steps):
    stats = pytest.importorskip("scipy.stats")
    places = np.rint(stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * 999).astype(int)
    levels = sd3_impls.flow_sigma(torch.arange(1, 1001) / 1000, 3.0)
    wanted = [levels[place].item() for place in dict.fromkeys(places.tolist())]
    assert schedule("beta", steps, 3.0).tolist() == [*wanted, 0.0]


def test_a_schedule_with_fewer_levels_than_steps_is_told_and_recorded():
    s = Settings(prompt="a", model="m", scheduler="beta", steps=200)
    ran = len(schedule("beta", 200, s.shift)) - 1
    assert ran == executed_steps(s) < 200
    assert effective(s) == (s, [f"note: {ran} steps run instead of 200: `scheduler` beta has no more noise levels"])
    image = Image.new("RGB", (8, 8))
    texts = [Image.open(io.BytesIO(png.encode_picture(image, one, {}))).text for one in (s, replace(s, steps=20))]
    records = [json.loads(text[png.SETTINGS_CHUNK]) for text in texts]
    assert [record.get("steps_run") for record in records] == [ran, None]
    assert "Steps: 200, Sampler: DPM++ 2M" in texts[0]["parameters"]
    assert "Schedule type: Beta" in texts[0]["parameters"]
    again = Replay(Path("x.png"), records[0], {"model": "m"})
    assert (again.settings(), again.flags({})["scheduler"]) == (s, "beta")


# ---- guidance ------------------------------------------------------------------------------------

C, U = torch.tensor([[1.0, 2, 3, 4]]).double(), torch.tensor([[0.5, 1.5, -1, 2]]).double()


def guide(guidance, step: float = 0, steps: int = 10) -> torch.Tensor:
    """The guided velocity of c and u at sigma 1 from x 0, where a denoised picture is -v."""
    at = sd3_impls.Place(step, steps, steps, 1.0)
    asked = {sd3_impls.COND, *(one for method in guidance for one in method.passes(at))}
    denoised = {one: -(C if one.text == "cond" else U) for one in asked}
    guided = denoised[sd3_impls.COND]
    for method in guidance:
        guided = method.combine(at, torch.zeros_like(C), denoised, guided)
    return -guided


def test_classifier_free_guidance_gives_its_check_number():
    assert guide([ClassifierFreeGuidance(4.0)]).tolist() == [[2.5, 3.5, 15, 10]]
    assert torch.equal(guide([ClassifierFreeGuidance(1.0)]), C)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_its_interval_guidance_is_the_conditional_pass_alone(sampler):
    sigmas = schedule("normal", 10, 3.0)
    latent, calls = run(sampler, sigmas, [ClassifierFreeGuidance(3.0, 0.29, 0.7)])
    both = {at.sigma for at in calls if at.uncond.start != at.uncond.stop}
    assert both == {sigma.item() for sigma in sigmas[2:7]}  # int(2.9) to int(7.0)
    assert all(at.cond == slice(0, 1) for at in calls)
    assert torch.equal(run(sampler, sigmas, [ClassifierFreeGuidance(3.0, 0.0, 1.0)])[0], run(sampler, sigmas)[0])
    assert torch.equal(run(sampler, sigmas, [ClassifierFreeGuidance(3.0, 0.0, 0.09)])[0], run(sampler, sigmas, [])[0])
    assert not torch.equal(latent, run(sampler, sigmas)[0])


def test_the_interval_gives_its_check_numbers():
    assert [guide([ClassifierFreeGuidance(4.0, 0.2, 0.5)], step)[0, 2].item() for step in (0, 1.9, 2, 4.9, 5)] == [
        3.0, 3.0, 15.0, 15.0, 3.0,
    ]  # fmt: skip


def test_the_rescale_gives_its_check_number():
    got = guide([ClassifierFreeGuidance(4.0), GuidanceRescale(0.7)])
    assert got[0].tolist() == pytest.approx([1.135104, 1.589146, 6.810624, 4.540416], abs=1e-6)
    assert guide([ClassifierFreeGuidance(4.0), GuidanceRescale(1.0)]).std().item() == pytest.approx(C.std().item())
    assert torch.equal(guide([ClassifierFreeGuidance(4.0), GuidanceRescale(0.0)]), guide([ClassifierFreeGuidance(4.0)]))
    assert torch.equal(guide([ClassifierFreeGuidance(1.0), GuidanceRescale(0.7)]), C)


def test_guidance_without_the_text_that_it_needs_is_refused():
    one = Denoiser(Toy(), text(0.5), None, schedule("normal", 4, 3.0), [ClassifierFreeGuidance(3.0)])
    with pytest.raises(ValueError, match="needs neg_cond"):
        one(torch.zeros(1, 1, 2, 2), 1.0)
