"""Anchored and aligned mixing, schedules, windows, branches, settings as files and rotation files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import mmdit_config, randomise, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mmditx
from mmditx import MMDiT, ModelCall, ResidualStream, Stream, schedule_factor
from sd3.mistakes import Mistake, flag_name
from sd3.models import SkipLayerConfig
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations, orthogonality, read_rotations
from sd3.versions import __version__
from sd3_impls import ClassifierFreeGuidance, Conditioning, Denoiser, SkipLayerGuidance, flow_schedule, sample_euler

DEPTH, WIDTH = 6, 64
MODEL = randomise(MMDiT(mmdit_config(depth=DEPTH, width=WIDTH, mlp_width=64, dual_layers=frozenset({0}))), 5)


def tensor(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(tensor(*shape, seed=seed))[0]


def rotations_for(config: ResidualConfig, edges: tuple[float, ...] = ()) -> Rotations:
    return Rotations(
        config.origin, config.targets, orthogonal(len(edges) + 1, len(config.targets), WIDTH, WIDTH), edges
    )


def enter(stream: Stream, i: int, context: torch.Tensor) -> torch.Tensor:
    """What enters block i, as `run_blocks` asks for it."""
    stream.keep(i, context)
    return stream.mix(i, context)


def mixed_by_definition(context, origin, weight, turn=None):
    """Token by token, feature by feature, in float64."""
    out = torch.empty_like(context, dtype=torch.float64)
    for b in range(context.shape[0]):
        for t in range(context.shape[1]):
            x, o = context[b, t].double(), origin[b, t].double()
            deviation_x, deviation_o = max(x.std().item(), 1e-6), max(o.std().item(), 1e-6)
            o = (o - o.mean()) / (deviation_o + 1e-6)
            m = (x - x.mean()) / (deviation_x + 1e-6) + weight * (o if turn is None else o @ turn.double())
            m = (m - m.mean()) / math.sqrt(m.var(correction=0).item() + 1e-6)
            out[b, t] = m * deviation_x + x.mean()
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["anchored", "aligned"]),
    st.integers(0, 3),
    st.floats(-2, 2, allow_nan=False, width=32),
    st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
    st.integers(0, 99),
)
def test_mixing_equals_the_definition(mode, origin, weight, scale, seed):
    target = origin + 1
    config = ResidualConfig(origin, (target,), (weight,), mode=mode)
    rotations = rotations_for(config)
    stream = residual_stream(config, rotations)
    kept, context = 3 * tensor(2, 3, WIDTH, seed=seed) + 1, scale * tensor(2, 3, WIDTH, seed=seed + 1)
    assert enter(stream, origin, kept) is kept
    got = enter(stream, target, context)
    turn = rotations.matrices[0, 0] if mode == "aligned" else None
    assert relative(got, mixed_by_definition(context, kept, weight, turn)) < 1e-5


def test_a_constant_token_does_not_turn_nan():
    config = ResidualConfig(0, (1,), (0.5,), mode="anchored")
    stream = residual_stream(config)
    enter(stream, 0, torch.full((1, 2, WIDTH), 3.0))
    assert torch.isfinite(enter(stream, 1, torch.zeros(1, 2, WIDTH))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["add", "anchored", "aligned"])
def test_half_precision_stays_near(mode, dtype):
    config = ResidualConfig(0, (1,), (0.5,), mode=mode)
    rotations = rotations_for(config)
    kept, context = tensor(2, 5, WIDTH, seed=1), 300 * tensor(2, 5, WIDTH, seed=2)
    exact, half = (residual_stream(config, rotations) for _ in range(2))
    enter(exact, 0, kept)
    enter(half, 0, kept.to(dtype))
    got = enter(half, 1, context.to(dtype))
    assert got.dtype == dtype
    assert relative(got, enter(exact, 1, context)) < 0.01


# ---- when and where ------------------------------------------------------------------------------


def test_schedules():
    for sigma in (0.0, 0.3, 1.0):
        assert schedule_factor("constant", sigma) == 1
        assert schedule_factor("linear", sigma) == sigma
        assert schedule_factor("cosine", sigma) == pytest.approx((1 + math.cos(math.pi * (1 - sigma))) / 2)
        assert schedule_factor("exp:1.5", sigma) == pytest.approx(math.exp(-1.5 * sigma))
    assert schedule_factor("cosine", 0.0) == pytest.approx(0)
    assert schedule_factor("cosine", 1.0) == 1


def two_rows(seed: int) -> tuple[Conditioning, Conditioning]:
    return tuple(Conditioning(tensor(1, 9, 160, seed=seed + i), tensor(1, 128, seed=seed + 9 + i)) for i in (0, 1))


class Seen(Stream):
    """A probe that notes the text tokens entering every block of every pass."""

    def __init__(self):
        self.passes = []

    def begin(self, at: ModelCall):
        self.passes.append((at, {}))
        return True

    def mix(self, i, context):
        self.passes[-1][1][i] = context.clone()
        return context


@torch.no_grad()
def run(config: ResidualConfig, cfg: float = 4.0, steps: int = 5, slg: SkipLayerConfig | None = None, rotations=None):
    """(pass, {block: tokens}) of every pass of a run."""
    cond, neg_cond = two_rows(20)
    seen = Seen()
    hooks = [residual_stream(config, rotations), seen]
    guidance = [ClassifierFreeGuidance(cfg), SkipLayerGuidance(slg)]
    sigmas = flow_schedule(steps, 3.0)
    denoiser = Denoiser(MODEL, cond, None if cfg == 1 else neg_cond, sigmas, guidance, streams=hooks)
    final = sample_euler(denoiser, tensor(1, 16, 8, 6, seed=3), sigmas)
    return seen.passes, final


def ratios(passes, block: int, origin: int = 0) -> list[list[float]]:
    """What was added of the origin at a block of a model whose block `block - 1` was skipped, row by row."""
    out = []
    for _, states in passes:
        added = states[block] - states[origin]
        out.append([((a * o).sum() / (o * o).sum()).item() for a, o in zip(added, states[origin], strict=True)])
    return out


SKIP_FIRST = SkipLayerConfig(2.0, 0.0, 1.0, (0,), cfg=4.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exp:2.0"])
def test_the_schedule_is_in_sigma(schedule):
    """Where a pass skips block 0, what enters block 1 is the origin times 1 + w f(sigma)."""
    passes, _ = run(ResidualConfig(0, (1,), (0.8,), schedule=schedule), slg=SKIP_FIRST)
    skipped = [p for p in passes if p[0].skip_layers]
    assert len(skipped) == 4  # guidance leaves out step 0
    for (at, _), (ratio,) in zip(skipped, ratios(skipped, 1), strict=True):
        assert ratio == pytest.approx(0.8 * schedule_factor(schedule, at.sigma), abs=1e-5)


@pytest.mark.parametrize(
    ("start", "end", "active"), [(0, 1, 5), (0.2, 0.6, 2), (0.4, 1, 3), (0, 0.01, 1), (0.99, 1, 0), (0.3, 0.41, 1)]
)
def test_the_window_counts_steps_that_run(start, end, active):
    passes, final = run(ResidualConfig(0, (1,), (0.8,), start=start, end=end), cfg=1)
    plain, plain_final = run(ResidualConfig(), cfg=1)
    on = []
    for (at, states), (_, before) in zip(passes, plain, strict=True):
        assert at.steps == 5
        on.append(start <= at.step / at.steps < end)
        if not any(on):
            assert all(torch.equal(states[i], before[i]) for i in states)
    assert sum(on) == active
    assert torch.equal(final, plain_final) == (active == 0)


@pytest.mark.parametrize("steps", [7, 10, 28, 50])
def test_windows_that_meet_leave_no_step_out_and_none_twice(steps):
    edges = [i / steps for i in range(steps + 1)]
    for start, middle in itertools.pairwise(edges):
        streams = [residual_stream(ResidualConfig(0, (1,), start=start, end=middle))]
        streams += [residual_stream(ResidualConfig(0, (1,), start=middle))] if middle < 1 else []
        passes = [ModelCall.of_rows(i, steps, 0.5, 1, "cond", False) for i in range(steps)]
        on = [[stream.begin(at) for at in passes] for stream in streams]
        first = round(start * steps)
        assert on[0] == [i == first for i in range(steps)]
        assert len(on) == 1 or on[1] == [i > first for i in range(steps)]


@pytest.mark.parametrize("mode", ["add", "anchored", "aligned"])
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
def test_the_branch(branch, mode):
    config = ResidualConfig(0, (1, 2), "each:0.8", mode=mode, branch=branch)
    passes, _ = run(config, steps=1, rotations=rotations_for(config))
    plain, _ = run(ResidualConfig(), steps=1)
    ((at, states), (_, before)) = passes[0], plain[0]
    assert (at.cond, at.uncond) == (slice(0, 1), slice(1, 2))
    changed = [not torch.equal(states[1][row], before[1][row]) for row in (0, 1)]
    assert changed == {"both": [True, True], "cond": [True, False], "uncond": [False, True]}[branch]


@pytest.mark.parametrize(("branch", "changes"), [("cond", True), ("uncond", False)])
def test_the_branch_without_guidance_and_in_skip_layer_passes(branch, changes):
    config = ResidualConfig(0, (1,), (0.8,), branch=branch)
    assert torch.equal(run(config, cfg=1)[1], run(ResidualConfig(), cfg=1)[1]) != changes
    passes, _ = run(config, slg=SKIP_FIRST)
    (ratio, *_) = ratios([p for p in passes if p[0].skip_layers], 1)
    assert ratio == [pytest.approx(0.8 if changes else 0.0, abs=1e-5)]


@pytest.mark.parametrize(("origin", "times"), [(0, 2), (1, 9)])
@pytest.mark.parametrize("mode", ["anchored", "aligned"])
def test_an_origin_that_is_text_alone_is_prepared_once_per_text(monkeypatch, origin, times, mode):
    """Twice for origin 0 (both halves; the skip-layer pass), else in each of 5 + 4 passes; the numbers are the same."""
    config = ResidualConfig(origin, (2, 4), (0.5, 0.3), mode=mode)
    rotations = rotations_for(config)
    calls = []
    monkeypatch.setattr(mmditx, "standardise", lambda x, real=mmditx.standardise: calls.append(1) or real(x))
    _, final = run(config, slg=SKIP_FIRST, rotations=rotations)
    assert len(calls) == times
    begin = ResidualStream.begin
    monkeypatch.setattr(ResidualStream, "begin", lambda self, at: begin(self, dataclasses.replace(at, text=None)))
    assert torch.equal(run(config, slg=SKIP_FIRST, rotations=rotations)[1], final)


def test_buckets_follow_sigma():
    config = ResidualConfig(0, (1,), (0.8,), mode="aligned")
    rotations = rotations_for(config, (0.3, 0.9))
    assert [rotations.bucket(s) for s in (0.0, 0.29, 0.3, 0.5, 0.9, 1.0)] == [0, 0, 1, 1, 2, 2]
    passes, _ = run(config, slg=SKIP_FIRST, rotations=rotations)
    for at, states in passes:
        if at.skip_layers:
            turn = rotations.matrices[rotations.bucket(at.sigma), 0]
            assert relative(states[1], mixed_by_definition(states[0], states[0], 0.8, turn)) < 1e-5


# ---- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2-5", (2, 3, 4, 5)),
        ("2-8:2", (2, 4, 6, 8)),
        ("2-7:2", (2, 4, 6)),
        ("1,3-5,9", (1, 3, 4, 5, 9)),
        ("[1 3-4]", (1, 3, 4)),
        ("7-7", (7,)),
        (["2-3", 5], (2, 3, 5)),
    ],
)
def test_ranges(text, layers):
    assert ResidualConfig.parse(0, text).targets == layers


def test_one_weight_for_all_and_ramps():
    assert ResidualConfig.parse(0, "1-3", "each:0.3").weights == (0.3, 0.3, 0.3)
    assert ResidualConfig.parse(0, "1-3", ["Each:-1"]).weights == (-1, -1, -1)
    assert ResidualConfig.parse(0, "1", -1).weights == (-1,)
    assert ResidualConfig.parse(0, (), "each:0.3").weights == ()
    assert ResidualConfig.parse(0, "1-4", "linear:0.8:0.2").weights == (0.8, 0.6, 0.4, 0.2)
    assert ResidualConfig.parse(0, "3-7", "linear:0.2:0.05").weights[-1] == 0.05
    assert ResidualConfig.parse(0, "1", "linear:0.8:0.2").weights == (0.8,)
    assert ResidualConfig.parse(0, "1-2", "linear:-1:1").weights == (-1, 1)


MISTAKES = [
    ({"targets": "5-2"}, "targets 5-2: a range counts up"),
    ({"targets": "2-5:0"}, "targets 2-5:0: a range counts up"),
    ({"targets": "1-99999999999"}, "a range counts up"),
    ({"targets": "2-"}, "targets 2-: must be a whole number"),
    ({"targets": "1-3,2"}, "targets: layer 2 is listed twice"),
    ({"targets": "1-3", "weights": "0.5,0.4"}, "weights: 2 given for 3 target layers; give one each, each:0.5 for all"),
    (
        {"targets": "3,5", "weights": "1"},
        "weights: 1 given for 2 target layers; give one each, each:1 for all, or none for 1.0",
    ),
    ({"targets": "3,5", "weights": 0.1}, "weights: 1 given for 2 target layers; give one each, each:0.1 for all"),
    ({"targets": "1", "weights": "linear:1"}, "weights linear:1: must be numbers, each:0.5, or a ramp"),
    ({"targets": "1", "weights": "cubic:1:0"}, "must be numbers, each:0.5, or a ramp such as linear:0.8:0.2"),
    ({"targets": "1", "weights": "linear:a:b"}, "must be numbers, each:0.5, or a ramp"),
    ({"targets": "1", "weights": "linear:nan:1"}, "must be numbers, each:0.5, or a ramp"),
    ({"targets": "1", "weights": "each:1:2"}, "must be numbers, each:0.5, or a ramp"),
    ({"targets": "1-2", "weights": "each:0.1,0.2"}, "must be numbers, each:0.5, or a ramp"),
    ({"mode": "anchor"}, "mode anchor: must be one of add, anchored, aligned; did you mean anchored?"),
    ({"schedule": "linaer"}, "schedule linaer: must be constant, linear, cosine or exp:ALPHA"),
    ({"schedule": "exp"}, "schedule exp: must be constant"),
    ({"schedule": "exp:x"}, "schedule x: must be a number"),
    ({"start": 0.5, "end": 0.5}, "start 0.5: must be below end 0.5"),
    ({"start": -1}, "start -1: must be from 0.0 to 1.0"),
    ({"end": 2}, "end 2: must be from 0.0 to 1.0"),
    ({"branch": "text"}, "branch text: must be one of both, cond, uncond"),
    ({"rotations": " "}, "rotations: must name a file"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_each_mistake_is_named(fields, message):
    with pytest.raises(Mistake) as error:
        ResidualConfig.parse(**fields)
    assert message in str(error.value)
    assert "-residual" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"target_layers": "3,5", "weights": "1"}, "--residual_weights: 1 given for 2 target layers; give one each, "),
        ({"start": 0.5, "end": 0.5}, "--residual_start 0.5: must be below --residual_end 0.5; no step is left"),
        ({"target_layers": "1", "mode": "align"}, "--residual_mode align: must be one of add, anchored, aligned"),
        ({"origin_layer": 3, "target_layers": "2"}, "--residual_target_layers 2: lies below the origin layer 3"),
        ({"target_layers": 1, "schedule": "exp:-800"}, "--residual_schedule exp:-800.0: makes the weight 1 larger"),
    ],
)
def test_from_flags_each_mistake_names_the_flag(flags, line):
    with pytest.raises(Mistake) as error:
        ResidualConfig.from_flags(flags)
    assert error.value.spelled(flag_name).startswith(line)


def test_weights_given_in_python_are_checked_too():
    with pytest.raises(ValueError, match="weights linear: must be a number"):
        ResidualConfig(0, (1,), "linear")
    with pytest.raises(ValueError, match=r"must be numbers, each:0\.5, or a ramp"):
        ResidualConfig(0, (1,), "linear:1:x")


def test_aligned_needs_rotations():
    with pytest.raises(ValueError, match="mode aligned: needs rotations FILE"):
        residual_stream(ResidualConfig(0, (1,), mode="aligned"))
    assert residual_stream(ResidualConfig(0, (), mode="aligned")) is None


# ---- settings as files ---------------------------------------------------------------------------

FULL = ResidualConfig(1, (2, 4), (0.5, -0.25), "anchored", "exp:2.0", 0.1, 0.9, "cond")


def test_a_file_holds_everything(tmp_path):
    path = tmp_path / "residual.json"
    path.write_text(json.dumps(FULL.as_file(tmp_path)))
    assert ResidualConfig.read(path) == FULL
    kept = json.loads(path.read_text())
    assert set(kept) >= {"origin_layer", "target_layers", "residual_weights", "mode"}
    assert kept["version"] == __version__


EARLIER = {
    "origin_layer": 1, "target_layers": "2-4", "residual_weights": 0.1, "mode": "add", "schedule": "constant",
    "start": 0.0, "end": 1.0, "branch": "both", "rotations": None,
}  # fmt: skip  # every key and no version, as version 0.1.0 wrote and documented it


@pytest.mark.parametrize("weights", [0.1, [0.1], "0.1", "each:0.1", [0.1, 0.1, 0.1]], ids=repr)
def test_one_weight_holds_for_all_in_a_file_of_an_earlier_version_only(tmp_path, weights):
    path = tmp_path / "residual.json"
    path.write_text(json.dumps(EARLIER | {"residual_weights": weights}))
    assert ResidualConfig.read(path) == ResidualConfig(1, (2, 3, 4), (0.1, 0.1, 0.1))
    without = {name: value for name, value in EARLIER.items() if name != "rotations"}
    for values in (EARLIER | {"version": __version__}, without):
        path.write_text(json.dumps(values | {"residual_weights": weights}))
        if weights in ("each:0.1", [0.1, 0.1, 0.1]):
            assert ResidualConfig.read(path) == ResidualConfig(1, (2, 3, 4), "each:0.1")
        else:
            with pytest.raises(Mistake, match=r"residual_weights: 1 given for 3 target layers; .*each:0\.1 for all"):
                ResidualConfig.read(path)


def test_a_file_of_an_earlier_version_holds_for_other_targets_too(tmp_path):
    path = tmp_path / "residual.json"
    path.write_text(json.dumps(EARLIER))
    assert ResidualConfig.from_flags({"target_layers": (2, 3)}, str(path)) == ResidualConfig(1, (2, 3), (0.1, 0.1))
    path.write_text(json.dumps(EARLIER | {"residual_weights": None}))
    assert ResidualConfig.read(path).weights == (1, 1, 1)
    path.write_text(json.dumps(EARLIER | {"residual_weights": "much"}))
    with pytest.raises(Mistake, match="residual_weights much: must be a number"):
        ResidualConfig.read(path)


def test_flags_replace_single_fields(tmp_path):
    path = tmp_path / "residual.json"
    path.write_text(json.dumps({"origin_layer": 1, "target_layers": "2-4", "weights": "each:0.5", "mode": "anchored"}))
    got = ResidualConfig.from_flags({"target_layers": (2, 3, 4, 5), "branch": "cond"}, str(path))
    assert got == ResidualConfig(1, (2, 3, 4, 5), (0.5,) * 4, "anchored", branch="cond")
    assert ResidualConfig.from_flags({"target_layers": ()}, str(path)).active is False
    assert ResidualConfig.from_flags({"weights": "linear:1:0"}, str(path)).weights == (1, 0.5, 0)


def test_a_rotation_file_is_named_as_seen_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "r.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "a")
    config = ResidualConfig(0, (1,), mode="aligned", rotations="../r.safetensors")
    (tmp_path / "b" / "residual.json").write_text(json.dumps(config.as_file(tmp_path / "b")))
    monkeypatch.chdir(tmp_path / "b")
    read = ResidualConfig.read(tmp_path / "b" / "residual.json")
    assert (tmp_path / "r.safetensors").samefile(read.rotations)


@pytest.mark.parametrize("kind", ["json", "pth", "pth of tensors"])
def test_published_weight_files(tmp_path, kind):
    held = {"residual_weights": [0.5, 0.25], "origin_layer": 1, "target_layers": [2, 3]}
    path = tmp_path / f"weights.{kind[:4].strip()}"
    if kind == "json":
        path.write_text(json.dumps(held))
    else:
        if kind == "pth of tensors":
            held = {k: torch.tensor(v) for k, v in held.items()}
            held["residual_weights"] = torch.nn.Parameter(held["residual_weights"])
        torch.save(held, path)
    assert ResidualConfig.read(path) == ResidualConfig(1, (2, 3), (0.5, 0.25))


class Harmful:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def bad_configs(tmp_path) -> dict[str, tuple[object, str]]:
    return {
        "missing": (None, "no such file"),
        "a folder": (..., "is a folder, not a file"),
        "no JSON": ("{origin: 1}", "is neither JSON nor a .pth file"),
        "a list": ("[1, 2]", "must hold an object"),
        "a typo": ('{"mod": "add"}', "unknown key mod; did you mean mode? (known: origin_layer, target_layers"),
        "a bad value": ('{"mode": "anchor"}', "residual_mode anchor: must be one of add"),
        "a bad pair": (
            '{"target_layers": [1, 2, 3], "residual_weights": [1, 2]}',
            "residual_weights: 2 given for 3 target layers",
        ),
        "a bad layer": ('{"target_layers": [1.5]}', "residual_target_layers 1.5: must be a whole number"),
        "code": ({"residual_weights": Harmful()}, "contains more than tensors and numbers; it is not loaded"),
        "a cut pickle": (b"PK\x03\x04and no more", "is damaged"),
    }


CONFIGS = (
    "missing", "a folder", "no JSON", "a list", "a typo", "a bad value", "a bad pair", "a bad layer", "code",
    "a cut pickle",
)  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_files(tmp_path, case, capsys):
    content, message = bad_configs(tmp_path)[case]
    path = tmp_path / "config"
    if content is ...:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        ResidualConfig.read(path)
    assert str(error.value).startswith(f"residual_config {path}: ")
    assert message in str(error.value)
    assert "never be printed" not in capsys.readouterr().out


# ---- rotation files ------------------------------------------------------------------------------

CONFIG = ResidualConfig(1, (2, 4), mode="aligned")


def write(path, matrices, edges=None, targets=(2, 3, 4), origin=1, **changes):
    """A rotation file: published (.pt) or ours (.safetensors)."""
    held = {"rotation_matrices": matrices, "target_layers": list(targets), "origin_layer": origin}
    if edges is not None:
        held["timestep_bucket_edges"] = edges
    held = {k: v for k, v in (held | changes).items() if v is not None}
    if path.suffix == ".pt":
        torch.save(held, path)
    else:
        notes = {k: json.dumps(held[k]) for k in ("target_layers", "origin_layer") if k in held}
        tensors = {k: torch.as_tensor(v).contiguous() for k, v in held.items() if k not in notes}
        save_file(tensors, path, notes)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "edges",
    [None, [0, 250, 1000], [250], [0.0, 0.25, 1.0], [1000, 250, 0]],
    ids=["one", "ends", "in", "sigmas", "fall"],
)
def test_rotation_files(tmp_path, suffix, edges):
    matrices = orthogonal(3, 16, 16) if edges is None else orthogonal(2, 3, 16, 16)
    got = read_rotations(write(tmp_path / f"r{suffix}", matrices, edges), CONFIG, 16)
    assert (got.origin, got.targets) == (1, (2, 4))
    whole = matrices if edges is not None else matrices[None]
    whole = whole.flip(0) if edges == [1000, 250, 0] else whole
    assert got.edges == (() if edges is None else (0.25,))
    for sigma, b in ((0.1, 0), (0.9, -1)):
        assert torch.equal(got.matrix(2, sigma), whole[b, 0])
        assert torch.equal(got.matrix(4, sigma), whole[b, 2])
    everything = read_rotations(tmp_path / f"r{suffix}")
    assert everything.targets == (2, 3, 4)
    assert torch.equal(everything.matrices, whole)


@pytest.mark.parametrize("length", [0x0280, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle(tmp_path, length):
    path = write(tmp_path / "r.safetensors", orthogonal(3, 16, 16))
    data = path.read_bytes()
    old = int.from_bytes(data[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + old] + b" " * (length - old) + data[8 + old :])
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert torch.equal(read_rotations(path).matrices[0], orthogonal(3, 16, 16))


def test_rotations_stored_in_bfloat16_are_taken(tmp_path):
    path = write(tmp_path / "r.pt", orthogonal(3, 64, 64).bfloat16())
    assert orthogonality(read_rotations(path, CONFIG, 64).matrices[0, 0]) < 1e-2


def bad_rotations(path):
    good = orthogonal(3, 16, 16)
    bent = good.clone()
    bent[2, 0] += 0.1
    return {
        "missing": (lambda: None, "no such file"),
        "not a rotation file": (lambda: write(path, None), "has no rotation_matrices: not a rotation file"),
        "another width": (
            lambda: write(path, orthogonal(3, 8, 8)),
            "is for a model of width 8, this one has 16",
        ),
        "missing layers": (
            lambda: write(path, good, targets=(2, 3, 5)),
            "has no rotation for target layers 4; it has 2, 3, 5",
        ),
        "another origin": (lambda: write(path, good, origin=0), "was made for origin layer 0, not 1"),
        "not orthogonal": (lambda: write(path, bent), "the matrix for target layer 4 is not orthogonal"),
        "NaN": (lambda: write(path, good * float("nan")), "the matrix for target layer 2 is not orthogonal"),
        "not square": (lambda: write(path, torch.zeros(3, 16, 8)), "is 3x16x8; 3 square matrices are required"),
        "too few matrices": (lambda: write(path, good[:2]), "is 2x16x16; 3 square matrices are required"),
        "no layers": (lambda: write(path, good, target_layers=None), "does not say its target_layers"),
        "no origin": (lambda: write(path, good, origin_layer=None), "does not say its origin_layer"),
        "no edges": (
            lambda: write(path, orthogonal(2, 3, 16, 16)),
            "2 timestep buckets need 1 or 3 timestep_bucket_edges, the file has 0",
        ),
        "edges that turn": (
            lambda: write(path, orthogonal(2, 3, 16, 16), [0.0, 500.0, 400.0]),
            "must be increasing",
        ),
        "code": (
            lambda: (
                torch.save({"rotation_matrices": Harmful()}, path) if path.suffix == ".pt" else path.write_text("x")
            ),
            "contains more than tensors" if path.suffix == ".pt" else "is not a safetensors file",
        ),
    }


ROTATIONS = (
    "missing", "not a rotation file", "another width", "missing layers", "another origin", "not orthogonal", "NaN",
    "not square", "too few matrices", "no layers", "no origin", "no edges", "edges that turn", "code",
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", ROTATIONS)
def test_bad_rotation_files(tmp_path, case, suffix):
    path = tmp_path / f"r{suffix}"
    make, message = bad_rotations(path)[case]
    if case == "not a rotation file" and suffix == ".safetensors":
        save_file({"x": torch.zeros(2)}, path)
    else:
        make()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_rotations(path, CONFIG, 16)
    assert str(error.value).startswith(f"rotations {path}: ")
    assert message in str(error.value)
