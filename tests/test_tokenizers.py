"""Prompts to tokens: weights, cutting, both T5 formats, and the published tokenizers as peers."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from helpers import DEMO, TOKENIZERS
from hypothesis import given
from hypothesis import strategies as st

import sd3.files
import sd3.find
from demo.text import POSITIONS, Captions
from demo.tokenizers import END, START, WORD_END
from other_impls import weighted_segments, weighted_words
from sd3.shapes.scenes import all_words
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer

REAL = os.environ.get("SD3_TOKENIZERS")
real = pytest.mark.skipif(not REAL, reason="SD3_TOKENIZERS is not set")


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("plain", [("plain", 1.0)]),
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        ("((b))", [("b", 1.1 * 1.1)]),
        ("(b:1.4)", [("b", 1.4)]),
        ("((b:1.4) c)", [("b", 1.4), (" c", 1.1)]),
        ("(a:b:0.5)", [("a:b", 0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
        (r"\(a\) (b)", [("(a) ", 1.0), ("b", 1.1)]),
        ("a (b (c:2) d", [("a ", 1.0), ("(b (c:2) d", 1.0)]),
        ("()", []),
    ],
)
def test_weights(text, segments):
    got = weighted_segments(text)
    assert [t for t, _ in got] == [t for t, _ in segments]
    assert [w for _, w in got] == pytest.approx([w for _, w in segments])


@given(st.text(alphabet="ab() :.1\\\n"))
def test_any_text_splits_without_losing_words(text):
    words = weighted_words(text)
    assert all(w and " " not in w and "\n" not in w for w, _ in words)
    if not set("()\\:") & set(text):
        assert [w for w, _ in words] == text.split()


@given(st.text(max_size=80), st.integers(8, 40))
def test_clip_always_fits_and_always_ends(text, length):
    clip = open_clip_tokenizer(TOKENIZERS / "tokenizer")
    for pad in (None, 0):
        tokens = clip.tokenize(text, length, pad)
        assert len(tokens.ids) == len(tokens.weights) == length
        assert tokens.ids[0] == clip.start
        assert clip.end in tokens.ids


def test_a_word_that_does_not_fit_moves_whole_unless_large():
    clip = open_clip_tokenizer(TOKENIZERS / "tokenizer")
    small, large = "zzzz", "zzzzzzzzz"  # four and nine tokens
    assert not clip.tokenize("red " * 6 + small, 12).cut
    tokens = clip.tokenize("red " * 8 + small, 12)
    assert tokens.cut
    assert tokens.ids[9] == clip.end
    tokens = clip.tokenize("red " * 8 + large, 12)
    assert tokens.cut
    assert tokens.ids[11] == clip.end
    assert tokens.ids[9] != clip.end


def test_every_word_of_the_demo_is_one_token_and_training_saw_the_same_ids():
    clip, t5 = open_clip_tokenizer(TOKENIZERS / "tokenizer"), open_t5_tokenizer(TOKENIZERS / "tokenizer_3")
    vocab = json.loads((TOKENIZERS / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert clip.end == vocab[END] == len(vocab) - 1
    assert clip.start == vocab[START]
    for word in all_words():
        assert clip.tokenize(word, 16).ids[1:3] == [vocab[word + WORD_END], clip.end]
        assert len(t5.tokenize(word, 1).ids) == (2 if word.isalpha() else 3)  # a comma or full stop follows a word
    caption = "an orange star left of a blue square on a gray background"
    ids = Captions(TOKENIZERS).ids([caption])
    assert ids["l"][0].tolist() == clip.tokenize(caption, POSITIONS).ids
    assert ids["g"][0].tolist() == clip.tokenize(caption, POSITIONS, 0).ids
    assert ids["t5"][0].tolist() == t5.tokenize(caption, POSITIONS).ids
    assert set(sd3.files.WeightFile(DEMO).metadata["words"].split()) == set(all_words())


@real
@pytest.mark.parametrize(
    "text", ["a photo of a cat", "it's 3 o'clock; DON'T panic...", "naïve  café\t東京 🐈", "<b>x</b>"]
)
def test_clip_as_transformers_tokenizes(text):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPTokenizer.from_pretrained(Path(REAL) / "clip")
    ours = open_clip_tokenizer(Path(REAL) / "clip")
    got = ours.tokenizer.encode(text, add_special_tokens=False).ids
    assert got == peer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def spiece(tmp_path_factory) -> Path:
    """A small sentencepiece model in T5's arrangement: pad 0, end 1, unknown 2."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("spiece")
    lines = [
        "a red circle left of a blue square",
        "two green stars on a white background",
        "naïve café, it's 4k!!",
    ] * 20
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=64, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def test_spiece_model_and_tokenizer_json_agree(spiece, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.T5TokenizerFast.from_pretrained(spiece, legacy=False)
    peer.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    one, two = open_t5_tokenizer(spiece), open_t5_tokenizer(tmp_path)
    for text in ("a red circle", "two GREEN stars!", "naïve café", "</s> x", "unseen 東京"):
        assert one.tokenize(text, 20).ids == two.tokenize(text, 20).ids, text


def test_t5_ends_pads_and_cuts(spiece):
    for t5 in (open_t5_tokenizer(spiece), open_t5_tokenizer(TOKENIZERS / "tokenizer_3")):
        tokens = t5.tokenize("a red circle", 20)
        assert len(tokens.ids) == 20
        end = tokens.ids.index(1)
        assert tokens.ids[end + 1 :] == [0] * (19 - end)
        assert not tokens.cut
        long = "red " * 56 + "(blue:2) star"  # the bracket begins within 226 characters, its end lies beyond
        assert t5.tokenize(long, 5).cut
        assert t5.tokenize(long, 5).ids == t5.tokenize(long[:226], 5).ids
        assert set(t5.tokenize(long, 5).weights) == {1.0}


def test_tokenizers_come_from_the_folder_then_from_the_hubs_cache(tmp_path, monkeypatch):
    found = sd3.find.find_tokenizer("clip", [TOKENIZERS])
    assert found == TOKENIZERS / "tokenizer"
    with pytest.raises(FileNotFoundError, match="hf download openai/clip-vit-large-patch14 vocab"):
        sd3.find.find_tokenizer("clip", [tmp_path])
    import huggingface_hub

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name: str(snapshot / name) if (snapshot / name).exists() else None,
    )
    assert sd3.find.find_tokenizer("t5", [tmp_path]) == snapshot
