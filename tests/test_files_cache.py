"""Entries of --embed_cache are taken only where they are what they should be."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sd3.embed_cache
from sd3.embed_cache import EmbedCache, file_identity
from sd3_infer import SD3Inferencer

PROMPT = "a red circle"


def engine(model, cache, **options) -> SD3Inferencer:
    made = SD3Inferencer()
    made.tell.quiet = True
    return made.load(str(model), device="cpu", embed_cache=str(cache), **({"dtype": "float32"} | options))


@pytest.fixture
def filled(small_model, tmp_path) -> tuple[Path, dict[str, tuple]]:
    """A cache with two entries, and what they should hold."""
    made = engine(small_model, tmp_path / "c")
    texts = {prompt: made.get_cond(prompt) for prompt in (PROMPT, "a blue square")}
    assert len(list((tmp_path / "c").iterdir())) == 2
    return tmp_path / "c", texts


def same(model, cache, texts, **options) -> bool:
    """Whether a fresh engine gives the right texts; says nothing of where it has them from."""
    made = engine(model, cache, **options)
    return all(torch.equal(a, b) for p, text in texts.items() for a, b in zip(made.get_cond(p), text, strict=True))


def test_entries_that_were_swapped_are_not_taken(small_model, filled):
    cache, texts = filled
    a, b = sorted(cache.iterdir())
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert same(small_model, cache, texts)


def rewritten(path: Path, change) -> None:
    """An entry with other tensors, under the same notes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    notes = json.loads(raw[8 : 8 + length])["__metadata__"]
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, notes)


CHANGES = {
    "another number": lambda t: t | {"context": t["context"] + 1e-6},
    "one column less": lambda t: t | {"context": t["context"][..., :-1]},
    "one token less": lambda t: t | {"context": t["context"][:, :-1]},
    "two texts": lambda t: {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in t.items()},
    "another width": lambda t: t | {"pooled": t["pooled"][:, :-1]},
    "another dtype": lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()},
    "whole numbers": lambda t: {k: v.to(torch.int32) for k, v in t.items()},
    "NaN": lambda t: {k: v * float("nan") for k, v in t.items()},
    "no pooled": lambda t: {"context": t["context"]},
    "no dimensions": lambda t: {k: torch.ones(()) for k in t},
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("checksum", ["old", "right"])
def test_an_entry_that_was_changed_is_not_taken(small_model, filled, case, checksum):
    """Even one whose checksum was computed again must have the shapes that the model takes."""
    cache, texts = filled
    for path in cache.iterdir():
        rewritten(path, CHANGES[case])
        tensors = load_file(path)
        if checksum == "right" and set(tensors) == {"context", "pooled"} and case != "another number":
            notes = {"key": path.stem, "checksum": sd3.embed_cache._checksum(tensors)}
            save_file(tensors, path, notes)
    assert same(small_model, cache, texts)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 1000, struct.pack("<Q", 10**7) + b"{", bytes(5000)])
def test_an_entry_that_is_none(small_model, filled, data):
    cache, texts = filled
    for path in cache.iterdir():
        path.write_bytes(data)
    assert same(small_model, cache, texts)
    assert same(small_model, cache, texts)  # they were written anew


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere"])
def test_an_entry_that_is_no_file(small_model, filled, kind):
    cache, texts = filled
    for path in cache.iterdir():
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(cache / "nowhere")
    assert same(small_model, cache, texts)


@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_changed_byte_is_noticed(tmp_path, place, byte):
    cache = EmbedCache(tmp_path / "c", {}, {})
    text = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2)
    cache.write(("a", 3), text)
    path = cache.path(("a", 3))
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= byte
    path.write_bytes(bytes(data))
    read = cache.read(("a", 3))
    assert read is None or all(torch.equal(a, b) for a, b in zip(read, text, strict=True))
    assert read is not None or byte


# ---- whose entries they are ----------------------------------------------------------------------


def copies(folder: Path, small_model, change=None) -> Path:
    folder.mkdir()
    for kind in ("tokenizer", "tokenizer_3"):
        (folder / kind).symlink_to(TOKENIZERS / kind)
    tensors = load_file(small_model)
    for name, value in (change or {}).items():
        tensors[name] = tensors[name] * value
    save_file(tensors, folder / "m.safetensors", {"width": "64", "height": "48"})
    os.utime(folder / "m.safetensors", (10**9, 10**9))
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "text_encoders.t5xxl.transformer.encoder.block.2.layer.1.DenseReluDense.wo.weight",
    ],
)
@pytest.mark.parametrize("whole", [sd3.embed_cache.WHOLE, 1000])
def test_another_model_of_the_same_size_and_date_has_its_own(tmp_path, small_model, monkeypatch, name, whole):
    monkeypatch.setattr(sd3.embed_cache, "WHOLE", whole)
    a, b = copies(tmp_path / "a", small_model), copies(tmp_path / "b", small_model, {name: 0.5})
    assert (a.stat().st_size, a.stat().st_mtime_ns) == (b.stat().st_size, b.stat().st_mtime_ns)
    engine(a, tmp_path / "c").get_cond(PROMPT)
    made = engine(b, tmp_path / "c")
    got = made.get_cond(PROMPT)
    assert made.engine.text.opened == 3
    own = SD3Inferencer()
    own.tell.quiet = True
    assert torch.equal(got[0], own.load(str(b), device="cpu", dtype="float32").get_cond(PROMPT)[0])


def test_a_copy_elsewhere_with_another_date_shares_them(tmp_path, small_model):
    a, b = copies(tmp_path / "a", small_model), copies(tmp_path / "b", small_model)
    b.write_bytes(a.read_bytes())  # bit for bit; the date is another
    engine(a, tmp_path / "c").get_cond(PROMPT)
    made = engine(b, tmp_path / "c")
    made.get_cond(PROMPT)
    assert made.engine.text.opened == 0


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"no_t5": True}])
def test_another_setting_has_its_own(tmp_path, small_model, options):
    engine(small_model, tmp_path / "c").get_cond(PROMPT)
    made = engine(small_model, tmp_path / "c", **options)
    made.get_cond(PROMPT)
    assert made.engine.text.opened == (2 if "no_t5" in options else 3)


def test_another_tokenizer_has_its_own(tmp_path, small_model):
    import shutil

    engine(small_model, tmp_path / "c").get_cond(PROMPT)
    for kind in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / kind, tmp_path / "t" / kind)
    path = tmp_path / "t" / "tokenizer_3" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    made = engine(small_model, tmp_path / "c", model_folder=str(tmp_path / "t"))
    made.get_cond(PROMPT)
    assert made.engine.text.opened == 3


@pytest.mark.parametrize("size", [100, 5000, 20_000])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_large_file_is_known_by_both_ends_of_every_tensor(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(sd3.embed_cache, "WHOLE", 10)
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name in "abc"}
    save_file(tensors, tmp_path / "x.safetensors")
    known = {json.dumps(file_identity(tmp_path / "x.safetensors"))}
    for name in "abc":
        changed = {k: v.clone() for k, v in tensors.items()}
        changed[name][0 if end == "first" else -1] = 1
        save_file(changed, tmp_path / "x.safetensors")
        known.add(json.dumps(file_identity(tmp_path / "x.safetensors")))
    assert len(known) == 4


def test_another_large_file_is_known_by_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sd3.embed_cache, "WHOLE", 10)
    known = set()
    for data in (bytes(9000), b"x" + bytes(8999), bytes(8999) + b"x", bytes(9001)):
        (tmp_path / "x.bin").write_bytes(data)
        known.add(json.dumps(file_identity(tmp_path / "x.bin")))
    assert len(known) == 4


# ---- what is never kept --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_text_that_is_no_number_is_never_kept_and_never_taken(tmp_path, value, place):
    cache = EmbedCache(tmp_path / "c", {}, {})
    text = [torch.ones(1, 2, 3), torch.ones(1, 4)]
    text[place].view(-1)[1] = value
    cache.write(("a", 2), tuple(text))
    assert list((tmp_path / "c").iterdir()) == []
    tensors = dict(zip(sd3.embed_cache.NAMES, text, strict=True))
    notes = {"key": cache.key(("a", 2)), "checksum": sd3.embed_cache._checksum(tensors)}
    save_file(tensors, cache.path(("a", 2)), notes)
    assert cache.read(("a", 2)) is None


def test_a_run_that_failed_with_nan_leaves_no_poison(tmp_path, small_model):
    name = "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"
    model = copies(tmp_path / "m", small_model, {name: float("nan")})
    engine(model, tmp_path / "c").get_cond(PROMPT)
    assert list((tmp_path / "c").iterdir()) == []


def test_entries_of_earlier_versions_are_unknown_and_are_no_error(tmp_path, small_model):
    (tmp_path / "c").mkdir()
    text = {"context": torch.ones(1, 32, 160), "pooled": torch.ones(1, 128)}
    save_file(text, tmp_path / "c" / f"{'0' * 64}.safetensors")
    made = engine(small_model, tmp_path / "c")
    made.get_cond(PROMPT)
    assert made.engine.text.opened == 3
