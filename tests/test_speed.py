"""What saves memory and time must not change pictures: caches, tiles, offloading, compiled blocks, serving."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEMO, ROOT, mmdit_config, randomise, relative
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sd3.device
import sd3.pixels
import sd3.self_check
from mmditx import MMDiT, ModelCall, Reuse
from sd3.embed_cache import EmbedCache
from sd3.files import WeightFile
from sd3.offload import Offload
from sd3.planning import plan_pictures
from sd3.residual import ResidualConfig, residual_stream
from sd3.settings import Flags, Settings
from sd3.vae import pieces
from sd3_infer import SD3Inferencer, main

SIZE = {"width": 64, "height": 48, "steps": 4, "cfg": 3.0}


def fresh(model: Path, **options) -> SD3Inferencer:
    engine = SD3Inferencer()
    engine.tell.quiet = True
    return engine.load(str(model), device="cpu", **({"dtype": "float32"} | options))


def picture(engine: SD3Inferencer, prompt: str = "a star", **values) -> tuple[Settings, bytes]:
    ((_, settings, image),) = engine.engine.make(
        plan_pictures(engine.engine, [prompt], [3], **(engine.engine.defaults | SIZE | values)).pictures
    )
    return settings, image.tobytes()


# ---- text ----------------------------------------------------------------------------------------


def test_resident_encoders_are_opened_once_and_give_the_same(small_model):
    engine, plain = fresh(small_model, t5_resident=True), fresh(small_model)
    for prompt in ("a star", "two circles", "three"):
        for got, wanted in zip(engine.get_cond(prompt), plain.get_cond(prompt), strict=True):
            assert torch.equal(got, wanted)
    assert (engine.engine.text.opened, plain.engine.text.opened) == (3, 9)


def test_a_cached_prompt_opens_no_encoder_and_makes_the_same_picture(small_model, tmp_path):
    first = fresh(small_model, embed_cache=str(tmp_path / "cache"))
    made = picture(first)[1]
    again = fresh(small_model, embed_cache=str(tmp_path / "cache"))
    assert picture(again)[1] == made
    assert (first.engine.text.opened, again.engine.text.opened) == (3, 0)
    picture(again, "a circle")
    assert again.engine.text.opened == 3
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-7])  # cut short
    damaged = fresh(small_model, embed_cache=str(tmp_path / "cache"))
    assert picture(damaged)[1] == made
    assert damaged.engine.text.opened == 3


def test_the_cache_tells_files_and_ways_apart(tmp_path):
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text("1")
    other.write_text("12")
    text = torch.zeros(1, 2, 3), torch.zeros(1, 4)
    cache = EmbedCache(tmp_path / "c", {"clip": [one]}, {"dtype": "float32"})
    cache.write(("a", 77), text)
    assert torch.equal(cache.read(("a", 77))[0], text[0])
    assert cache.read(("a", 78)) is None
    assert cache.read(("b", 77)) is None
    assert EmbedCache(tmp_path / "c", {"clip": [other]}, {"dtype": "float32"}).read(("a", 77)) is None
    assert EmbedCache(tmp_path / "c", {"clip": [one]}, {"dtype": "bfloat16"}).read(("a", 77)) is None
    with pytest.raises(ValueError, match=r"^embed_cache"):
        EmbedCache(one / "c", {}, {})


# ---- the MMDiT -----------------------------------------------------------------------------------

CONFIG = mmdit_config(depth=4)
MODEL = randomise(MMDiT(CONFIG), 5)
DRAW = torch.Generator().manual_seed(2)
INPUTS = (
    torch.randn(2, 16, 8, 6, generator=DRAW),
    torch.tensor([700.0, 700.0]),
    torch.randn(2, CONFIG.pooled_width, generator=DRAW),
    torch.randn(2, 11, CONFIG.context_width, generator=DRAW),
)


@torch.no_grad()
@pytest.mark.parametrize("skip", [(), (0,), (1, 3)])
def test_offloaded_blocks_come_and_go(skip):
    model = randomise(MMDiT(CONFIG), 5)
    model.offload = Offload(model.joint_blocks, torch.device("cpu"))
    seen = []
    copy = model.offload._start_copy
    model.offload._start_copy = lambda i: seen.append(i) or ([t.clone() for t in copy(i)[0]], None)
    homes = [p.data_ptr() for p in model.joint_blocks.parameters()]
    assert torch.equal(model(*INPUTS, skip_layers=skip), MODEL(*INPUTS, skip_layers=skip))
    assert seen == [i for i in range(4) if i not in skip]
    assert [p.data_ptr() for p in model.joint_blocks.parameters()] == homes


def test_offload_makes_the_same_picture(small_model):
    plain, offloaded = fresh(small_model), fresh(small_model, offload=True)
    assert picture(plain)[1] == picture(offloaded)[1]
    assert offloaded.engine.network.mmdit.offload is not None


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "add", "anchored"])
@pytest.mark.parametrize("branch", ["both", "cond"])
def test_compiled_blocks_do_what_the_others_do(mode, branch):
    """Without code generation, which takes a minute: that is torch's own business (and the slow test's)."""
    compiled = randomise(MMDiT(CONFIG), 5)
    compiled.compile_blocks(backend="eager")
    config = ResidualConfig(0, (1, 3), (0.4, 0.7), mode, branch=branch) if mode else None
    streams = [residual_stream(config) for _ in range(2)]
    for stream in filter(None, streams):
        stream.begin(ModelCall.of_rows(0, 4, 0.7, 2, "cond", True))
    assert relative(compiled(*INPUTS, stream=streams[0]), MODEL(*INPUTS, stream=streams[1])) < 1e-5


@torch.no_grad()
def test_blocks_are_compiled_once_per_kind():
    torch.compiler.reset()
    graphs = []
    compiled = randomise(MMDiT(mmdit_config(depth=7, dual_layers=frozenset({0, 1}))), 5)
    compiled.compile_blocks(backend=lambda graph, example: graphs.append(graph) or graph.forward, fullgraph=True)
    compiled(*INPUTS)
    compiled(*INPUTS, stream=residual_stream(ResidualConfig(0, (1, 3))))
    assert len(graphs) == 4  # dual, plain, last; block 0 has one of its own: its text is a view


@pytest.mark.slow
def test_compiled_pictures_are_near(small_model):
    settings, made = picture(fresh(small_model, compile=True))
    plain = picture(fresh(small_model))[1]
    assert settings.compile
    assert max(abs(a - b) for a, b in zip(made, plain, strict=True)) <= 3


@torch.no_grad()
def test_reuse_of_what_the_blocks_added():
    x, t, y, context = INPUTS
    text = MODEL.embed_text(y, context)
    reuse = Reuse(0.05)
    first = MODEL.velocity(x, t, text, run=reuse.run)
    assert torch.equal(first, MODEL(*INPUTS))
    assert relative(MODEL.velocity(x, t, text, run=reuse.run), first) < 1e-5  # the same step again
    assert reuse.reused == 1
    other = MODEL.velocity(x + 3 * torch.randn(x.shape, generator=DRAW), t, text, run=reuse.run)
    assert reuse.reused == 1  # too far: computed
    assert relative(other, first) > 0.1
    wider = MODEL.velocity(x[..., :4], t, text, run=reuse.run)  # another size is never near
    assert torch.equal(wider, MODEL(x[..., :4], t, y, context))


def test_cache_zero_changes_nothing_and_a_small_one_little():
    engine = fresh(DEMO)
    values = {"width": 96, "height": 96, "steps": 24, "cfg": 2.5, "sampler": "euler"}
    exact = picture(engine, "a red circle", **values)[1]
    assert picture(engine, "a red circle", **values, cache=0.0)[1] == exact
    settings, cached = picture(engine, "a red circle", **values, cache=0.1)
    assert settings.public()["cache"] == 0.1
    difference = sum(abs(a - b) for a, b in zip(cached, exact, strict=True)) / len(exact)
    assert 0 < difference < 12


# ---- the VAE -------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(8, 128), st.sampled_from([1, 8]))
def test_pieces_cover_everything_and_overlap(size, tile, align):
    size, tile = size * align, tile * align
    got = pieces(size, tile, tile // 4, align)
    assert (got[0][0], got[-1][1]) == (0, size)
    assert all(end - start == min(tile, size) and start % align == 0 for start, end in got)
    for (_, end), (start, _) in itertools.pairwise(got):
        assert end - start >= tile // 4 - 2 * align


@torch.no_grad()
def test_tiles_blend_to_what_the_whole_gives():
    engine = fresh(DEMO)
    whole, tiled = (engine.vae_encode(gradient(320, 256), 1, tile=tile) for tile in (0, 128))
    assert relative(tiled, whole) < 0.03
    pixels = [engine.engine.pixels.decode(whole, tile) for tile in (0, 128)]
    difference = (pixels[0] - pixels[1]).abs()
    assert 0 < difference.max() < 0.03  # of 2: four 255ths; no seam can be seen
    assert engine.engine.pixels.decode(whole, 512).equal(pixels[0])  # no larger than a tile
    assert engine.engine.pixels.decode(whole).equal(pixels[0])  # nothing is left behind in the norms


def gradient(width: int, height: int) -> Image.Image:
    across, down = torch.meshgrid(torch.linspace(0, 255, width), torch.linspace(0, 255, height), indexing="xy")
    pixels = torch.stack([across, down, 255 - across]).to(torch.uint8)
    pixels[:, 60:200, 100:240] = torch.tensor([250, 20, 40], dtype=torch.uint8)[:, None, None]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def test_tiles_are_chosen_by_size_and_recorded(small_model, monkeypatch):

    engine = fresh(small_model)
    assert engine.engine.pixels.tile_for(64, 48) == 0
    monkeypatch.setattr(sd3.pixels, "device_memory", lambda device: 10**9)
    assert engine.engine.pixels.tile_for(2048, 2048) == sd3.pixels.VAE_TILE
    assert "vae_tile" not in Settings("a", "m").public()
    assert Settings("a", "m", vae_tile=512).public()["vae_tile"] == 512


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("weights", "int4", "must be one of full, int8, fp8; did you mean int8?"),
        ("cache", "-0.1", "must be from 0.0 to 1.0"),
        ("vae_tile", "64", "must be auto, off, or at least 128"),
        ("vae_tile", "200", "must be a multiple of 16"),
        ("vae_tile", "big", "must be a whole number"),
        ("offload", "perhaps", "must be True or False"),
    ],
)
def test_bad_values_are_said(flag, value, told):
    with pytest.raises(ValueError, match=f"^{flag} {value}: {told.split('?')[0]}"):
        Flags.read({flag: value})


def test_pictures_made_before_these_settings_keep_their_digests():
    assert not {"compile", "weights", "cache", "vae_tile"} & set(Settings("a", "m").public())
    assert Settings("a", "m", weights="int8").digest() != Settings("a", "m").digest()


# ---- serving -------------------------------------------------------------------------------------

LINES = """{"prompt": "a red circle", "seed": 3, "id": 1}

nonsense
["a", "list"]
{"prompt": "a blue square", "dtype": "float32"}
{"prompt": "a blue square", "stepz": 3}
{"prompt": "a blue square", "residual_target_layers": [99]}
{"prompt": "two stars", "seed": 5, "num_images": 2, "residual_target_layers": [3, 5], "residual_weights": [0.1, 0.2]}
"""


def test_a_line_of_json_is_a_picture_and_an_answer(tmp_path):
    command = [sys.executable, str(ROOT / "sd3_infer.py"), "--serve_stdin", "--model", str(DEMO), "--device", "cpu"]
    command += ["--out_dir", str(tmp_path), "--postfix", "", "--steps", "3", "--dtype", "float32"]
    done = subprocess.run(command, input=LINES, capture_output=True, text=True, cwd=tmp_path, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["ok"] for a in answers] == [True, False, False, False, False, False, True]
    assert answers[0]["id"] == 1
    assert [a["error"].partition(":")[0] for a in answers[1:6]] == [
        "not a line of JSON", 'not an object such as {"prompt"', "--dtype", "--stepz", "--residual_target_layers 99"
    ]  # fmt: skip
    assert [a["seeds"] for a in (answers[0], answers[6])] == [[3], [5, 6]]
    files = [Path(f) for a in answers if a["ok"] for f in a["files"]]
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    assert json.loads((files[0].parent / "run.json").read_text())["status"] == "finished"
    alone = ["--prompt", "two stars", "--seed", "6", "--residual_target_layers", "3,5", "--residual_weights", "0.1,0.2"]
    assert main([*command[3:], *alone, "--out_dir", str(tmp_path / "alone")]) == 0
    (same,) = (tmp_path / "alone").rglob("*.png")
    assert Image.open(same).tobytes() == Image.open(files[2]).tobytes()


# ---- the self-check ------------------------------------------------------------------------------


def test_the_self_check_passes_here_and_would_not_elsewhere(capsys, monkeypatch):
    assert main(["--self_check", "--device", "cpu", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "all within" in shown
    assert all(f"| {name} |" in shown for name in sd3.self_check.load_file(sd3.self_check.STORED))
    stored = sd3.self_check.load_file(sd3.self_check.STORED)
    changed = stored | {"residual add": stored["plain"]}  # as a device would that leaves the residual out
    monkeypatch.setattr(sd3.self_check, "load_file", lambda path: changed)
    assert main(["--self_check", "--device", "cpu", "--dtype", "bfloat16"]) == 1
    assert "FAILED: residual add;" in capsys.readouterr().out


def test_what_the_self_check_tells_apart_is_further_than_its_limits():
    stored = sd3.self_check.load_file(sd3.self_check.STORED)
    runs = [name for name in stored if name not in ("text tokens", "VAE encoding", "VAE decoding")]
    limit = max(sd3.self_check.LIMITS.values())
    for i, name in enumerate(runs):
        assert all(relative(stored[name], stored[other]) > 1.2 * limit for other in runs[i + 1 :])
    assert not WeightFile(sd3.self_check.CONTROLNET).looks_like().startswith("an unknown")
