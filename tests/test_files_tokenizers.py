"""Tokenizer files of any state, and prompts nested as deeply as anybody likes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from helpers import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sd3_infer
from other_impls import weighted_segments
from sd3.mistakes import Mistake
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer
from sd3_infer import SD3Inferencer


@pytest.fixture
def folder(tmp_path) -> Path:
    for kind in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TOKENIZERS / kind, tmp_path / kind)
    return tmp_path


def changed(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def failed(small_model, folder, capsys) -> str:
    words = ["--model", str(small_model), "--model_folder", str(folder), "--prompt", "x", "--device", "cpu"]
    assert sd3_infer.main([*words, "--out_dir", str(folder / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --model_folder ")
    assert not (folder / "o").exists()
    return line


# ---- damage --------------------------------------------------------------------------------------

DAMAGE = {
    "empty": b"",
    "cut off": None,
    "an empty object": b"{}",
    "a list": b"[]",
    "a number": b"5",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a web page": b"<!doctype html><html></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "words": b"a b c\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer_3/tokenizer.json"])
def test_a_damaged_tokenizer_is_one_line_with_its_file(small_model, folder, capsys, name, damage):
    path = folder / name
    path.write_bytes(path.read_bytes()[:200] if DAMAGE[damage] is None else DAMAGE[damage])
    assert str(path) in failed(small_model, folder, capsys)


@pytest.mark.parametrize("damage", ["not UTF-8", "words"])
def test_damaged_merges(small_model, folder, capsys, damage):
    (folder / "tokenizer" / "merges.txt").write_bytes(DAMAGE[damage])
    assert str(folder / "tokenizer" / "merges.txt") in failed(small_model, folder, capsys)


@pytest.mark.parametrize("vocabulary", [{"a": -1}, {"a": 1.5}, {"a": "1"}, {"a": 2**40}, {"a": None}, {"a": 1, "b": 2}])
def test_a_vocabulary_of_no_clip(small_model, folder, capsys, vocabulary):
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    assert str(folder / "tokenizer" / "vocab.json") in failed(small_model, folder, capsys)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x0a\xff\xff\xff\xff", bytes(1000), b"<html>"])
def test_a_damaged_spiece_model(small_model, folder, capsys, data):
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(data)
    assert str(folder / "tokenizer_3" / "spiece.model") in failed(small_model, folder, capsys)


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_3/tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file(small_model, folder, capsys, name, kind):
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
    assert str(folder / name) in failed(small_model, folder, capsys)


def test_a_tokenizer_that_meets_a_letter_it_cannot_split(small_model, folder, capsys):
    path = folder / "tokenizer_3" / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    changed(path, model=model | {"unk_id": None, "byte_fallback": False})
    assert str(path) in failed(small_model, folder, capsys)


# ---- ids beyond the table ------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [0, 1, 100_000])
def test_clip_ids_beyond_the_embedding_table(small_model, folder, capsys, beyond):
    path = folder / "tokenizer" / "vocab.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    changed(path, star=len(known) + beyond)
    line = failed(small_model, folder, capsys)
    assert f"has tokens up to {len(known) + beyond}" in line
    assert str(path) in line


@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_t5_ids_beyond_the_embedding_table(small_model, folder, capsys, place):
    path = folder / "tokenizer_3" / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    if place == "vocabulary":
        more = [[f"<piece {i}>", -9.0] for i in range(100)]
        changed(path, model=whole["model"] | {"vocab": whole["model"]["vocab"] + more})
    else:
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        rows = [token | {"id": len(whole["model"]["vocab"]) + i, "content": f"<x{i}>"} for i in range(100)]
        changed(path, added_tokens=[*whole["added_tokens"], *rows])
    assert "the text encoder has 64" in failed(small_model, folder, capsys)


def test_the_extra_ids_of_a_spiece_model_end_at_the_table(tmp_path):
    (tmp_path / "words.txt").write_text("a red circle left of a blue square\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=20, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(Mistake, match=r"spiece\.model: has tokens up to 19, the text encoder has 16"):
        open_t5_tokenizer(tmp_path, rows=16)
    for rows in (20, 60, 120, 200):
        ids = open_t5_tokenizer(tmp_path, rows=rows).tokenize("a <extra_id_0> red <extra_id_99> star", 16).ids
        assert max(ids) < rows
    assert open_t5_tokenizer(tmp_path, rows=120).tokenize("<extra_id_0>", 0).ids == [119, 1]


# ---- tokenizers that were used before they were saved --------------------------------------------


@pytest.mark.parametrize("length", [4, 16, 77])
@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_padding_and_truncation_that_a_program_left(small_model, folder, small_engine, length, direction):
    for path in (folder / "tokenizer_3" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json"):
        if not path.exists():  # CLIP's, as transformers writes it: from the vocabulary and the merges
            open_clip_tokenizer(TOKENIZERS / "tokenizer").tokenizer.save(str(path))
            (path.parent / "vocab.json").unlink()
        padding = {"strategy": {"Fixed": length}, "direction": direction, "pad_to_multiple_of": 8, "pad_id": 0}
        cut = {"direction": direction, "max_length": length, "strategy": "LongestFirst", "stride": 0}
        changed(path, padding=padding | {"pad_type_id": 0, "pad_token": "<pad>"}, truncation=cut)
    made = SD3Inferencer()
    made.tell.quiet = True
    made.load(str(small_model), device="cpu", dtype="float32", model_folder=str(folder))
    for prompt in ("a red circle", "a circle " * 9, "x"):
        assert made.engine.text.clip_tokenizer.tokenize(prompt, 16) == small_engine.engine.text.clip_tokenizer.tokenize(
            prompt, 16
        )
        assert made.engine.text.t5_tokenizer.tokenize(prompt, 16) == small_engine.engine.text.t5_tokenizer.tokenize(
            prompt, 16
        )


def test_with_other_weights_the_tokenizer_is_still_checked_against_them(small_model, folder, tmp_path):
    tensors = load_file(small_model)
    name = "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding.weight"
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, tmp_path / "m.safetensors")
    with pytest.raises(Mistake, match="they do not belong together"):
        SD3Inferencer().load(str(tmp_path / "m.safetensors"), device="cpu")


# ---- parentheses ---------------------------------------------------------------------------------


def by_recursion(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """What `weighted_segments` means, level by level (without escapes)."""
    pieces, start, depth = [], 0, 0
    for i, char in enumerate(text):
        if char == "(":
            if depth == 0:
                pieces.append(text[start:i])
                start = i
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : i + 1])
                start = i + 1
    pieces.append(text[start:])
    out = []
    for piece in filter(None, pieces):
        if len(piece) < 2 or (piece[0], piece[-1]) != ("(", ")"):
            out.append((piece, weight))
            continue
        inner, own = piece[1:-1], weight * 1.1
        colon = inner.rfind(":")
        if colon > 0:
            try:
                own = float(inner[colon + 1 :])
                inner = inner[:colon]
            except ValueError:
                pass
        out += by_recursion(inner, own)
    return out


@given(st.text("((())):ab.12 -e", max_size=24))
@settings(max_examples=500, deadline=None)
def test_parentheses_mean_what_they_did(text):
    assert repr(weighted_segments(text)) == repr(by_recursion(text))


DEEP = {
    "closed": ("(" * 50_000 + "x" + ")" * 50_000, 1),
    "open": ("(" * 100_000 + "x", 1),
    "too many closed": ("x" + ")" * 100_000, 1),
    "weighted": ("(" * 20_000 + "x" + ":1.5)" * 20_000, 1),
    "many": ("((a)" * 30_000, 2),
    "words in every level": ("(a " * 20_000 + ")" * 20_000, 20_000),
}


@pytest.mark.parametrize("case", DEEP)
def test_any_depth_is_split(case):
    text, count = DEEP[case]
    assert len(weighted_segments(text)) == count


def test_the_outermost_of_many_weights_is_not_the_one_that_counts():
    assert weighted_segments("(" * 20_000 + "x" + ":1.5)" * 20_000) == [("x", 1.5)]


@pytest.mark.parametrize("prompt", ["(" * 3000 + "star" + ")" * 3000, "(" * 3000 + "star", "(star" * 3000])
def test_a_deeply_nested_prompt_makes_a_picture(small_model, tmp_path, prompt):
    words = ["--model", str(small_model), "--steps", "1", "--device", "cpu", "--dtype", "float32"]
    assert sd3_infer.main([*words, "--out_dir", str(tmp_path), "--postfix", "x", f"--prompt={prompt}"]) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 1
