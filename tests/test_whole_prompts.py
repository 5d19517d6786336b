"""Whole prompts: every token, its weight, and which tokens the stream carries; against diffusers and by definition."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DEMO, DEMO_DEPTH, TOKENIZERS, mmdit_config, modules, randomise, relative, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import sd3_infer
from mmditx import MMDiT, ModelCall, ResidualStream, TokenKinds
from other_impls import CLIP, T5, CLIPConfig, Span, T5Config
from sd3 import png
from sd3.embed_cache import EmbedCache
from sd3.files import ENCODER_PREFIX, MMDIT_PREFIX
from sd3.mistakes import Mistake
from sd3.planning import plan_pictures
from sd3.presets import PRESETS, read_preset, with_rotations
from sd3.prompt_tokens import EMPTY, MOST_CHUNKS, Key
from sd3.residual import ResidualConfig
from sd3.settings import Settings
from sd3.spans import plain_text, read_spans
from sd3_infer import SD3Inferencer

WHOLE = {"prompt_mode": "whole"}
SIZE = {"width": 64, "height": 48}


def image_settings(prompt: str = "a star", **values) -> Settings:
    return Settings(prompt=prompt, model="m", seed=1, **(WHOLE | values))


# ---- brackets: a table from formats.md, section 8 ------------------------------------------------

COMFY = {
    "a red circle": [("a red circle", 1)],
    "": [],
    "(x)": [("x", 1.1)],
    "((x))": [("x", 1.1 * 1.1)],
    "(((x)))": [("x", 1.1 * 1.1 * 1.1)],
    "(x:1.3)": [("x", 1.3)],
    "(x: 1.3 )": [("x", 1.3)],
    "(x:0)": [("x", 0)],
    "(x:-1)": [("x", -1)],
    "(x:1e-1)": [("x", 0.1)],
    "a (b:1.5) c": [("a ", 1), ("b", 1.5), (" c", 1)],
    "((x:1.3))": [("x", 1.3)],
    "((x):1.3)": [("x", 1.3 * 1.1)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 2), (" c", 0.5)],
    "(a (b) c:0.5)": [("a ", 0.5), ("b", 0.5 * 1.1), (" c", 0.5)],
    "(a:b:1.3)": [("a:b", 1.3)],
    "(a:b)": [("a:b", 1.1)],
    "(:1.3)": [(":1.3", 1.1)],
    "()": [],
    "(())": [],
    "\\(x\\)": [("(x)", 1)],
    "(a \\(b\\):1.2)": [("a (b)", 1.2)],
    "[x]": [("[x]", 1)],
    "[x:1.3]": [("[x:1.3]", 1)],
    "(x": [("(x", 1)],
    "x)": [("x)", 1)],
    "((a)": [("(a", 1.1)],
    "a) (b) c": [("a) (b) c", 1)],
    "(x:1.0)": [("x", 1)],
    "a (red:1.0) circle": [("a red circle", 1)],
}
A1111 = {
    "a red circle": [("a red circle", 1)],
    "(x)": [("x", 1.1)],
    "((x))": [("x", 1.1 * 1.1)],
    "[x]": [("x", 1 / 1.1)],
    "[[x]]": [("x", 1 / 1.1 / 1.1)],
    "(x:1.3)": [("x", 1.3)],
    "(x : 1.3)": [("x ", 1.3)],
    "((x:1.3))": [("x", 1.3 * 1.1)],
    "((x):1.3)": [("x", 1.1 * 1.3)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1.0), (" c", 0.5)],
    "([x])": [("x", 1 / 1.1 * 1.1)],
    "(x": [("x", 1.1)],
    "a (b": [("a ", 1), ("b", 1.1)],
    "[x": [("x", 1 / 1.1)],
    "x)": [("x)", 1)],
    "x]": [("x]", 1)],
    "\\(x\\)": [("(x)", 1)],
    "\\[x\\]": [("[x]", 1)],
    "\\\\(x)": [("\\", 1), ("x", 1.1)],
    "[x:1.3]": [("x:1.3", 1 / 1.1)],
    "(x:+1.2)": [("x", 1.2)],
    "(x:-1.2)": [("x", -1.2)],
    "(x:1.2.3)": [("x:1.2.3", 1.1)],
    "(x:)": [("x:", 1.1)],
    "a:1.3)": [("a:1.3)", 1)],
    "(a:b:1.3)": [("a:b", 1.3)],
}
OFF = {
    "(x:1.3)": [("(x:1.3)", 1)],
    "((x))": [("((x))", 1)],
    "[x]": [("[x]", 1)],
    "\\(x\\)": [("\\(x\\)", 1)],
    "(a": [("(a", 1)],
}


@pytest.mark.parametrize(
    ("dialect", "prompt", "wanted"),
    [(d, p, w) for d, table in (("comfy", COMFY), ("a1111", A1111), ("off", OFF)) for p, w in table.items()],
)
def test_brackets_are_read_as_the_dialect_reads_them(dialect, prompt, wanted):
    got = [(s.text, s.weight) for s in read_spans(prompt, dialect) if s.text]
    assert [text for text, _ in got] == [text for text, _ in wanted]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize(
    ("dialect", "prompt", "wanted"),
    [
        ("comfy", "a (red circle){stream=0.6} b", [("a ", 1, 1), ("red circle", 1, 0.6), (" b", 1, 1)]),
        ("comfy", "(red:1.3){stream=0}", [("red", 1.3, 0)]),
        ("comfy", "(a (b){stream=2} c){stream=0.5}", [("a ", 1, 0.5), ("b", 1, 2), (" c", 1, 0.5)]),
        ("comfy", "((a){stream=-1})", [("a", 1.1, -1)]),
        ("a1111", "a (red circle){stream=0.6} b", [("a ", 1, 1), ("red circle", 1, 0.6), (" b", 1, 1)]),
        ("a1111", "(red:1.1){stream=0}", [("red", 1.1, 0)]),
        ("a1111", "(a (b){stream=2} c){stream=0.5}", [("a ", 1, 0.5), ("b", 1, 2), (" c", 1, 0.5)]),
        ("off", "a (red){stream=0.6} (b:2)", [("a ", 1, 1), ("red", 1, 0.6), (" (b:2)", 1, 1)]),
        ("comfy", "{a|b} {x}", [("{a|b} {x}", 1, 1)]),
    ],
)
def test_a_phrase_has_a_weight_in_the_stream_of_its_own(dialect, prompt, wanted):
    got = [(s.text, s.weight, s.stream) for s in read_spans(prompt, dialect)]
    assert [g[0] for g in got if g[0]] == [w[0] for w in wanted]
    assert [g[1:] for g in got if g[0]] == [pytest.approx(w[1:]) for w in wanted]


@pytest.mark.parametrize("dialect", ["comfy", "a1111", "off"])
@pytest.mark.parametrize(
    "prompt",
    [
        "a (b){stream=0.6", "a (b){stream=}", "a (b){stream=x}", "a (b){stream=nan}", "a (b){stream=inf}",
        "a (b){stream=1001}", "a b{stream=1}", "{stream=1}", "a) b){stream=1}",
        "(a){stream=1}{stream=2}", "(a) {stream=1}",
    ],
)  # fmt: skip
def test_a_wrong_weight_in_the_stream_is_one_line(dialect, prompt):
    with pytest.raises(Mistake) as mistake:
        read_spans(prompt, dialect)
    assert mistake.value.field == "prompt"
    assert len(str(mistake.value).splitlines()) == 1


@pytest.mark.parametrize("prompt", ["(a:nan)", "(a:inf)", "(a:1e9)"])
def test_a_weight_that_is_no_number_is_one_line(prompt):
    with pytest.raises(Mistake, match=r"the weight of \"a\" must be a number"):
        read_spans(prompt)


@pytest.mark.parametrize("dialect", ["comfy", "a1111", "off"])
@pytest.mark.parametrize(
    "prompt",
    ["(" * 10_000, "(" * 10_000 + "x" + ")" * 10_000, ")(" * 10_000, "[" * 10_000 + "x" + "]" * 10_000, " " * 100_000,
     "(a:1)" * 5_000, "((" * 5_000 + "a" + ":1)" * 10_000, "\\" * 10_000, ":" * 50_000, "BREAK " * 10_000],
    ids=lambda prompt: prompt[:4],
)  # fmt: skip
def test_hostile_nesting_is_fast(dialect, prompt):
    start = time.process_time()
    try:
        read_spans(prompt, dialect)
    except Mistake as mistake:
        assert len(str(mistake).splitlines()) == 1
    assert time.process_time() - start < 5  # quadratic code took minutes


@pytest.mark.parametrize("dialect", ["comfy", "a1111", "off"])
def test_break_counts_outside_brackets(dialect):
    spans = read_spans("a  BREAK b BREAK\nc (d BREAK e:1.5)", dialect)
    assert next(s.text for s in spans if s.starts) == "b"
    assert sum(s.starts for s in spans) == (3 if dialect == "off" else 2)
    assert plain_text(read_spans("a BREAK b BREAKS", dialect)) == "a b BREAKS"


# ---- the real vocabularies, small random encoders ------------------------------------------------

CLIP_SIZES = {"width": 64, "depth": 2, "mlp_width": 128, "vocabulary": 49408, "positions": 77}
REAL = {
    "clip_l": lambda: CLIP(CLIPConfig(**CLIP_SIZES, projection=False, activation="quick_gelu")),
    "clip_g": lambda: CLIP(CLIPConfig(**CLIP_SIZES, projection=True, activation="gelu")),
    "t5xxl": lambda: T5(T5Config(width=160, depth=2, heads=2, inner=96, mlp_width=128, buckets=32, vocabulary=32128)),
}
PROMPTS = [
    "a red circle left of a blue square",
    "",
    "Two   green stars,\nA photo of an astronaut riding a horse -- 8k, (very:1.3) detailed [sharp]",
    "Ein Café in Zürich, ﬁne art; 日本語 and émigré's tests don't fail <extra_id_3> </s>",
    "  leading and trailing  ",
]
LONG = "a wide photograph of a quiet harbour at dawn, with " + ", ".join(f"boat number {i} in red" for i in range(60))


@pytest.fixture(scope="module")
def real(tmp_path_factory, request):
    """A model with the real vocabularies: (engine, its encoders by role)."""
    import os

    if not (place := os.environ.get("SD3_TOKENIZERS")):
        pytest.skip("SD3_TOKENIZERS names no folder with the real vocabularies")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer").symlink_to(f"{place}/clip")
    (folder / "tokenizer_3").symlink_to(f"{place}/t5")
    parts = modules(mmdit_config(mlp_width=512))
    for i, (role, make) in enumerate(REAL.items()):
        parts[ENCODER_PREFIX.format(role)] = randomise(make(), 20 + i)
    save_file(tensors_of(parts), folder / "real.safetensors")
    engine = SD3Inferencer().load(str(folder / "real.safetensors"), device="cpu", dtype="float32")
    engine.tell.quiet = True
    return engine, parts


@pytest.fixture(scope="module")
def pipe(real):
    """diffusers' pipeline with the same weights and vocabularies; CLIP-L's projection is the identity."""
    import os

    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    to_diffusers = pytest.importorskip("to_diffusers")
    _, parts = real
    place = os.environ["SD3_TOKENIZERS"]
    clips = []
    for role, act in (("clip_l", "quick_gelu"), ("clip_g", "gelu")):
        config = transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
            hidden_act=act, projection_dim=64, eos_token_id=2,
        )  # fmt: skip
        model = transformers.CLIPTextModelWithProjection(config).eval()
        state = {"text_projection.weight": torch.eye(64)} | parts[ENCODER_PREFIX.format(role)].state_dict()
        model.load_state_dict(state)
        clips.append(model)
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(f"{place}/clip", pad_token=p) for p in ("<|endoftext|>", "!")
    ]
    transformer = to_diffusers.peer_transformer(parts[MMDIT_PREFIX].config)
    transformer.load_state_dict(to_diffusers.transformer(parts[MMDIT_PREFIX]))
    made = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=to_diffusers.peer_t5(parts[ENCODER_PREFIX.format("t5xxl")]),
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(f"{place}/t5"),
    )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 256, 512])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:12])
def test_whole_prompts_are_those_of_diffusers(real, pipe, prompt, length):
    engine = real[0].engine
    key, _ = engine.text.keys(image_settings(prompt, t5_tokens=length, prompt_weights="off"))
    assert key.chunks == 1
    context, pooled = engine.text.get(key)
    theirs, _, their_pooled, _ = pipe.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    assert relative(context, theirs) < 1e-5
    assert relative(pooled, their_pooled) < 1e-5


@torch.no_grad()
def test_512_t5_tokens_are_read_and_what_is_cut_is_said(real, pipe):
    engine = real[0].engine
    heard = []
    engine.text.tell.note, note = heard.append, engine.text.tell.note
    try:
        for length in (77, 256, 512):
            key = engine.text.keys(image_settings(LONG, t5_tokens=length, prompt_weights="off"))[0]
            got = engine.text.get(key)[0][:, engine.text.positions * key.chunks :]
            ids = pipe.tokenizer_3(LONG, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            assert relative(got, pipe.text_encoder_3(ids.input_ids)[0]) < 1e-5
    finally:
        engine.text.tell.note = note
    tokens = len(pipe.tokenizer_3(LONG).input_ids)
    assert 256 < tokens < 512
    assert len([line for line in heard if "T5 takes" in line]) == 2


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "residual", "words", "t5"])
def test_the_final_latent_is_that_of_diffusers(real, pipe, case):
    from sd3.diffusers_hooks import apply_residual, token_kinds
    from sd3_impls import latent_in, start_noise

    config = ResidualConfig(1, (2, 3), "each:0.5", mode="anchored", tokens=case if case in ("words", "t5") else "all")
    config = ResidualConfig() if case == "plain" else config
    prompt, negative = PROMPTS[0], "blurry"
    fields = {f"residual_{name}": getattr(config, name) for name in ("mode", "tokens")}
    fields |= {"residual_origin_layer": config.origin, "residual_target_layers": config.targets}
    fields |= {"residual_weights": config.weights}
    values = {"negative_prompt": negative, "steps": 4, "cfg": 4.0, "sampler": "euler", "shift": 3.0, "t5_tokens": 128}
    engine = real[0].engine
    plan = plan_pictures(engine, [prompt], [5], **WHOLE, **SIZE, **values, **fields, prompt_weights="off")
    ours = latent_in(engine.sample(plan.pictures))
    kinds = token_kinds(pipe, prompt, negative, max_sequence_length=128)
    with apply_residual(pipe, config, kinds=kinds):
        theirs = pipe(
            prompt, negative_prompt=negative, width=64, height=48, num_inference_steps=4, guidance_scale=4.0,
            max_sequence_length=128, latents=start_noise([5], (1, 16, 6, 8)), output_type="latent",
        ).images  # fmt: skip
    assert relative(ours, theirs) < 1e-3
    if case != "plain":
        without = replace(config, targets=(), weights=())
        assert without.active is False
        plain = plan_pictures(engine, [prompt], [5], **WHOLE, **SIZE, **values, prompt_weights="off").pictures
        assert relative(latent_in(engine.sample(plain)), theirs) > 0.01


def test_hooks_need_to_know_what_the_tokens_are(pipe):
    from sd3.diffusers_hooks import apply_residual

    with pytest.raises(Mistake, match="tokens words: needs kinds"):
        apply_residual(pipe, ResidualConfig(0, (1,), tokens="words"))


# ---- chunks --------------------------------------------------------------------------------------

WORDS = ["red", "circle", "a", "extraordinarily", "pneumonoultramicroscopicsilicovolcanoconiosis", ",", "8k", "日本語"]


def by_words(words: list[str], tokens_of, room: int = 75) -> list[list[int]]:
    """ComfyUI's rule as comfy/sd1_clip.py states it, word by word."""
    batches: list[list[int]] = [[]]
    for word in words:
        group = tokens_of(word)
        large = len(group) >= 8
        while group:
            if len(group) + len(batches[-1]) > room:
                left = room - len(batches[-1])
                if large:
                    batches[-1] += group[:left]
                    group = group[left:]
                batches.append([])
            else:
                batches[-1] += group
                group = []
    return batches if batches[-1] or len(batches) == 1 else batches[:-1]


def by_commas(tokens: list[int], comma: int, room: int = 75) -> list[list[int]]:
    """A1111's rule: a full chunk ends at its last comma, if that is among its last 20 tokens."""
    chunks, own, last = [], [], -1
    for token in tokens:
        if token == comma:
            last = len(own)
        elif len(own) == room and last != -1 and len(own) - last <= 20:
            chunks.append(own[: last + 1])
            own, last = own[last + 1 :], -1
        if len(own) == room:
            chunks.append(own)
            own, last = [], -1
        own.append(token)
    return [*chunks, own] if own or not chunks else chunks


def tokens_in(chunks) -> list[list[int]]:
    return [chunk.ids[1 : chunk.words - 1] for chunk in chunks]


@settings(max_examples=60)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=300),
    cut=st.integers(0, 300),
    dialect=st.sampled_from(["comfy", "a1111", "off"]),
)
def test_chunks_are_what_the_rules_say(real, words, cut, dialect):
    text = real[0].engine.text
    tokenizer = text.clip_tokenizer
    tokens_of = lambda word: list(tokenizer.tokenizer.encode(word, add_special_tokens=False).ids)  # noqa: E731
    parts = [words[:cut], words[cut:]] if cut < len(words) else [words]
    prompt = " BREAK ".join(" ".join(part) for part in parts)
    comma = tokenizer.tokenizer.token_to_id(",</w>")
    wanted = []
    for part in parts:
        if dialect == "a1111":
            wanted += by_commas(tokens_of(" ".join(part)), comma)
        elif part:
            wanted += by_words(part, tokens_of)
    wanted = wanted or [[]]
    chunks = tokenizer.chunks(read_spans(prompt, dialect), 77, commas=dialect == "a1111")
    assert tokens_in(chunks) == wanted
    assert all(len(chunk.ids) == 77 and chunk.ids[0] == tokenizer.start for chunk in chunks)
    assert all(set(chunk.ids[chunk.words - 1 :]) == {tokenizer.end} for chunk in chunks)
    if len(chunks) <= MOST_CHUNKS:
        cond, negative = text.keys(image_settings(prompt, negative_prompt="red", prompt_weights=dialect))
        assert cond.chunks == negative.chunks == len(chunks)
        assert tokens_in(text.clip_tokens(negative))[1:] == [[]] * (len(chunks) - 1)


@torch.no_grad()
def test_two_halves_of_different_length_have_the_same_tokens(real):
    engine, parts = real
    text = engine.engine.text
    for prompt, negative in ((LONG, "blurry"), ("a star", LONG), ("", LONG)):
        keys = text.keys(image_settings(prompt, negative_prompt=negative, t5_tokens=77))
        encoded = [text.get(key) for key in keys]
        assert encoded[0][0].shape == encoded[1][0].shape == (1, 77 * keys[0].chunks + 77, 160)
        for key, (context, pooled) in zip(keys, encoded, strict=True):
            states = []
            for role in ("clip_l", "clip_g"):
                model = parts[ENCODER_PREFIX.format(role)]
                runs = [model(torch.tensor([chunk.ids])) for chunk in text.clip_tokens(key, role)]
                states.append((torch.cat([run[0] for run in runs], 1), runs[0][1]))
            clip = torch.cat([state for state, _ in states], -1)
            assert relative(context[:, : clip.shape[1], :128], clip) < 1e-5
            assert not context[:, : clip.shape[1], 128:].any()
            assert relative(pooled, torch.cat([own for _, own in states], -1)) < 1e-5


def test_a_long_prompt_makes_an_image_and_the_reference_mode_a_note(real):
    engine = real[0].engine
    values = SIZE | {"steps": 2, "cfg": 3.0}
    whole = plan_pictures(engine, [LONG, LONG + " and a cat"], [1, 1], **WHOLE, **values)
    cut = plan_pictures(engine, [LONG, LONG + " and a cat"], [1, 1], **values)
    images = [[image.tobytes() for _, _, image in engine.make(plan.pictures)] for plan in (whole, cut)]
    assert images[0][0] != images[0][1]
    assert images[1][0] == images[1][1]  # the reference does not read the end


def test_too_many_chunks_are_one_line_before_weights_load(real, monkeypatch):
    engine = real[0].engine
    monkeypatch.setattr(type(engine.text), "encode", lambda *_: pytest.fail("a text was encoded"))
    for field in ("prompt", "negative_prompt"):
        prompts = {"prompt": "a star", "negative_prompt": ""} | {field: "red " * 76 * MOST_CHUNKS}
        with pytest.raises(Mistake, match=f"^{field} red .*has 17 chunks of 75 CLIP tokens; at most 16"):
            plan_pictures(engine, [prompts.pop("prompt")], [1], **WHOLE, **prompts, **SIZE)


# ---- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_weight_of_one_changes_no_bit_and_zero_is_the_empty_prompt(real):
    text = real[0].engine.text
    for dialect in ("comfy", "a1111"):
        plain, same, none = (
            text.get(text.keys(image_settings(prompt, prompt_weights=dialect, t5_tokens=77))[0])
            for prompt in ("a red circle", "a (red:1.0) circle", "(a red circle:0)")
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
        empty = text.get(text.keys(image_settings("", t5_tokens=77))[0])
        assert torch.equal(none[0][:, 1:4], empty[0][:, 1:4])  # CLIP's three words
        pieces = text.t5_tokens(text.keys(image_settings("a red circle", t5_tokens=77))[0]).words - 1
        assert torch.equal(none[0][:, 77 : 77 + pieces], empty[0][:, 77 : 77 + pieces])
        assert torch.equal(none[1], plain[1])  # the pooled text has no weights


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["red", "a blue square", "stars, ", "日本"]), st.sampled_from([0, 0.5, 1, 1.3, -1, 2.25])
        ),
        max_size=8,
    ),
    length=st.sampled_from([77, 100]),
)
@torch.no_grad()
def test_weights_are_those_of_the_definition(real, parts, length):
    engine, encoders = real
    text = engine.engine.text
    prompt = " ".join(f"({words}:{weight})" for words, weight in parts)
    key = text.keys(image_settings(prompt, t5_tokens=length))[0]
    context = text.get(key)[0]
    wanted = []
    for role in ("clip_l", "clip_g"):
        model, states = encoders[ENCODER_PREFIX.format(role)], []
        for chunk in text.clip_tokens(key, role):
            empty = model(torch.tensor([text.clip_tokens(EMPTY, role)[0].ids]))[0]
            z, w = model(torch.tensor([chunk.ids]))[0], torch.tensor(chunk.weights)[None, :, None]
            states.append(empty + w * (z - empty))
        wanted.append(torch.cat(states, 1))
    clip = torch.nn.functional.pad(torch.cat(wanted, -1), (0, 32))
    t5 = encoders[ENCODER_PREFIX.format("t5xxl")]
    tokens = text.t5_tokens(key)
    empty = t5(torch.tensor([[1] + [0] * (length - 1)]))
    z, w = t5(torch.tensor([tokens.ids])), torch.tensor(tokens.weights)[None, :, None]
    assert relative(context, torch.cat([clip, empty + w * (z - empty)], 1)) < 1e-5
    joined = {weight for _, weight in parts}
    assert {w for w in tokens.weights if w != 1} == {w for w in joined if w != 1}


def test_each_encoder_reads_its_own_prompt(small_engine):
    text = small_engine.engine.text
    for mode in ("reference", "whole"):
        values = {"prompt_mode": mode, "t5_tokens": 77} if mode == "whole" else {"prompt_mode": mode}
        one, other, both = (
            text.get(text.keys(image_settings("a red circle", **values, **more))[0])
            for more in ({}, {"clip_prompt": "a blue star"}, {"clip_prompt": "a blue star", "t5_prompt": "two squares"})
        )
        places = text.positions
        assert torch.equal(one[0][:, places:], other[0][:, places:])
        assert not torch.allclose(one[0][:, :places], other[0][:, :places])
        assert torch.equal(both[0][:, :places], other[0][:, :places])
        assert not torch.allclose(both[0][:, places:], other[0][:, places:])


# ---- which tokens the stream carries -------------------------------------------------------------


def call(kinds: TokenKinds | None, rows: int = 2) -> ModelCall:
    return ModelCall.of_rows(0, 4, 0.5, rows, "cond", True, kinds=kinds)


def mixed(context: torch.Tensor, kept: torch.Tensor, kinds: TokenKinds | None, **options) -> torch.Tensor:
    """What enters block 1 where `kept` arrived at block 0."""
    stream = ResidualStream(0, {1: options.pop("weight", 0.7)}, **options)
    stream.begin(call(kinds))
    stream.keep(0, kept)
    return stream.mix(1, context)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), clip=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_parts_add_up_to_all(data, clip, seed):
    draw = torch.Generator().manual_seed(seed)
    context, kept = (torch.randn(2, 10, 8, generator=draw) for _ in range(2))
    words = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=2, max_size=2)))
    weights = data.draw(st.sampled_from([None, torch.rand(2, 10, generator=draw) * 2 - 1]))
    branch = data.draw(st.sampled_from(["both", "cond", "uncond"]))
    kinds = TokenKinds(clip, words, weights)
    added = {
        t: mixed(context, kept, kinds, tokens=t, branch=branch) - context
        for t in ("all", "words", "padding", "clip", "t5")
    }
    assert torch.allclose(added["words"] + added["padding"], added["all"], atol=1e-5)
    assert torch.allclose(added["clip"] + added["t5"], added["all"], atol=1e-5)
    rows = {"both": slice(0, 2), "cond": slice(0, 1), "uncond": slice(1, 2)}[branch]
    factor = 1 if weights is None else weights[rows][..., None]
    assert torch.allclose(added["all"][rows], 0.7 * factor * kept[rows], atol=1e-5)


@pytest.mark.parametrize("mode", ["add", "anchored", "aligned"])
@pytest.mark.parametrize("tokens", ["all", "words", "clip"])
def test_a_token_of_weight_zero_is_untouched_bit_for_bit(mode, tokens):
    class Turn:
        def bucket(self, sigma):
            return 0

        def matrix(self, target, sigma):
            return torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]

    draw = torch.Generator().manual_seed(5)
    context, kept = (torch.randn(2, 10, 8, generator=draw) for _ in range(2))
    words = torch.arange(10).expand(2, 10) % 3 > 0
    weights = torch.ones(2, 10)
    weights[:, 4] = 0
    got = mixed(context, kept, TokenKinds(6, words, weights), mode=mode, tokens=tokens, rotations=Turn())
    untouched = weights == 0
    if tokens == "words":
        untouched |= ~words
    if tokens == "clip":
        untouched[:, 6:] = True
    assert torch.equal(got[untouched], context[untouched])
    assert not (got == context).all(-1)[~untouched].any()
    plain = mixed(context, kept, None, mode=mode, rotations=Turn())
    assert torch.allclose(got[~untouched], plain[~untouched], atol=1e-6)


def test_tokens_reach_the_image_and_unknown_ones_are_a_mistake(small_engine):
    engine = small_engine.engine
    residual = {"residual_origin_layer": 0, "residual_target_layers": (1, 2), "residual_weights": "each:0.8"}
    latents = {}
    for tokens in ("all", "words", "padding", "clip", "t5"):
        values = SIZE | {"steps": 2, "cfg": 3.0, "residual_tokens": tokens}
        plan = plan_pictures(engine, ["a red circle", "a star"], [1, 1], **values, **residual, batch_size=2)
        latents[tokens] = engine.sample(plan.pictures)
    names = list(latents)
    assert all(relative(latents[a], latents[b]) > 1e-3 for a in names for b in names if a < b)
    alone = plan_pictures(engine, ["a star"], [1], **SIZE, steps=2, cfg=3.0, residual_tokens="words", **residual)
    assert relative(engine.sample(alone.pictures), latents["words"][1:]) < 1e-4
    cond = small_engine.get_cond("a star", 16)
    config = ResidualConfig(0, (1,), tokens="words")
    with pytest.raises(Mistake, match="residual_tokens words: needs a prompt"):
        small_engine.do_sampling(torch.zeros(1, 16, 6, 8), 1, cond, cond, 1, 2.0, residual_config=config)


def test_a_weight_in_the_stream_acts_and_only_there(small_engine):
    engine = small_engine.engine
    residual = {"residual_target_layers": (1, 2), "residual_weights": "each:0.8"}
    values = WHOLE | SIZE | {"steps": 2, "cfg": 1.0, "t5_tokens": 77}
    prompts = ["a red circle", "a (red){stream=0} circle", "a (red){stream=1} circle"]
    with_it, without = (
        engine.sample(plan_pictures(engine, prompts, [1] * 3, **values, **more, batch_size=3).pictures)
        for more in (residual, {})
    )
    assert relative(with_it[0], with_it[1]) > 1e-3
    assert torch.equal(with_it[0], with_it[2])
    assert torch.equal(without[0], without[1])
    text = engine.text
    assert text.kinds(text.keys(image_settings(prompts[0]))[0]).weights is None
    weights = text.kinds(text.keys(image_settings(prompts[1]))[0]).weights[0]
    assert weights[:5].tolist() == [1, 1, 0, 1, 1]  # CLIP: start, a, red, circle, end


# ---- cache, sweep, replay, serving, probe --------------------------------------------------------

HARD = "a (red:1.4) circle BREAK (left of){stream=0.5} a [blue] square"
QUICK = ["--model", str(DEMO), "--width", "32", "--height", "32", "--steps", "2", "--device", "cpu", "--seed", "1"]
WORDS_OF = ["--prompt", HARD, "--prompt_mode", "whole", "--t5_tokens", "77", "--prompt_weights", "a1111"]
STREAM = ["--residual_target_layers", "3-5", "--residual_weights", "each:0.2", "--residual_tokens", "words"]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_image_of_a_whole_prompt_is_replayed_and_cached(tmp_path, capsys):
    command = [*QUICK, *WORDS_OF, *STREAM]
    cached = ["--embed_cache", str(tmp_path / "cache")]
    for name, more in (("plain", []), ("first", cached), ("again", cached)):
        assert sd3_infer.main([*command, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the prompt and the negative one
    assert np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "again.png"))
    record = png.read_record(tmp_path / "plain.png")["settings"]
    assert (record["prompt_mode"], record["t5_tokens"], record["prompt_weights"]) == ("whole", 77, "a1111")
    assert record["residual_tokens"] == "words"
    assert sd3_infer.main(["--replay", str(tmp_path / "plain.png"), "--out", str(tmp_path / "r.png")]) == 0
    assert "bit for bit" in capsys.readouterr().err
    assert sd3_infer.main([*command[:-2], "--out", str(tmp_path / "all.png")]) == 0
    assert not np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "all.png"))


def test_entries_of_the_cache_differ_by_everything_that_decides_them(tmp_path):
    cache = EmbedCache(tmp_path / "c", {}, {})
    keys = [
        Key("a", 77), Key("a", 78), Key("b", 77), Key("a", 77, 1, None, "comfy"), Key("a", 77, 2, None, "comfy"),
        Key("a", 77, 1, None, "off"), Key("a", 77, 1, "b", "comfy"), Key("a", 77, 1, "b"), Key("a", 77, 1, ""),
    ]  # fmt: skip
    assert len({cache.key(key) for key in keys}) == len(keys)
    import hashlib

    earlier = hashlib.sha256(json.dumps([cache.made_by, "a", 77]).encode()).hexdigest()
    assert cache.key(Key("a", 77)) == earlier


def test_a_sweep_varies_modes_and_tokens(tmp_path):
    from sd3.sweep.command import main as sweep

    out = tmp_path / "s"
    command = [*QUICK, "--prompt", HARD, "--t5_tokens", "77", "--prompt_mode", "reference;whole", *STREAM[:4]]
    command += ["--residual_tokens", "all;words;padding", "--out", str(out)]
    assert sweep(command) == 0
    made = {p.name: pixels(p).tobytes() for p in (out / "pictures").iterdir()}
    assert len(made) == len(set(made.values())) == 8  # two without the stream
    assert sweep(command) == 0


def test_served_lines_read_whole_prompts():
    import io

    from sd3.serve import serve
    from sd3.settings import Flags

    flags = {"model": str(DEMO), "device": "cpu", "steps": 1, "width": 32, "height": 32, "out_dir": "unused"}
    del io
    answers = []
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        flags["out_dir"] = folder
        lines = [
            json.dumps({"prompt": HARD, "prompt_mode": "whole", "t5_tokens": 77, "seed": 1}),
            json.dumps({"prompt": "a (b){stream=x}", "prompt_mode": "whole"}),
            json.dumps({"prompt": "a star", "t5_tokens": 513}),
        ]
        serve(Flags.read(flags), flags, lines, answers.append)
    answers = [json.loads(a) if isinstance(a, str) else a for a in answers]
    good, unclosed, many = answers[-3:]
    assert good.get("pictures") or good.get("images") or good.get("path") or "error" not in good
    assert "stream" in unclosed["error"]
    assert "t5_tokens 513: must be from 77 to 512" in many["error"]


def test_the_probe_sees_the_words_of_whole_prompts(small_engine):
    from sd3.probe.running import Collector, run_prompts

    seen = []
    values = WHOLE | SIZE | {"steps": 1, "cfg": 1.0, "t5_tokens": 77, "shift": 3.0}
    collect = lambda numbers, masks: Collector(masks, lambda at: True, [1], lambda at, s: seen.append(s[1]))  # noqa: E731
    long = "a red circle and " * 8
    run_prompts(small_engine.engine, [(0, long, 1)], values, collect, "probing")
    text = small_engine.engine.text
    key = text.keys(image_settings(long, t5_tokens=77))[0]
    assert key.chunks > 1
    assert len(seen[0][0]) == int(text.kinds(key).words.sum()) > 2 * text.positions


# ---- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_a_model_of_its_depth(name, tmp_path):
    preset = read_preset(name)
    config = ResidualConfig.from_flags({}, str(preset.path))
    config.check(preset.depth)
    small = mmdit_config(depth=preset.depth, dual_layers=frozenset())
    rotations = None
    if config.aligned:
        from sd3.rotations import Rotations

        turn = torch.eye(small.width).expand(1, len(config.targets), -1, -1)
        rotations = Rotations(config.origin, config.targets, turn)
    from sd3.residual import residual_stream

    stream = residual_stream(config, rotations)
    model = randomise(MMDiT(small), 3)
    x, t = torch.randn(1, 16, 4, 4), torch.tensor([500.0])
    y, context = torch.randn(1, 128), torch.randn(1, 6, 160)
    with torch.no_grad():
        plain = model(x, t, y, context)
        stream.begin(ModelCall.of_rows(0, 1, 0.5, 1, "cond", False))
        assert relative(model(x, t, y, context, stream=stream), plain) > 1e-5
    with pytest.raises(Mistake, match=rf"residual_preset {name}: is for .*this model has 8 blocks"):
        preset.check(8, preset.width)


def test_presets_on_the_command_line(tmp_path, capsys):
    assert sd3_infer.main(["--list_presets"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: for" in listed for name in PRESETS)
    assert "not the authors'" in listed
    for words, told in (
        (["--residual_preset", "sd3_medium"], "must be one of"),
        (["--residual_preset", PRESETS[0]], f"this model has {DEMO_DEPTH} blocks of width 128"),
        (["--residual_preset", PRESETS[0], "--residual_config", "x.json"], "does not go with --residual_config"),
    ):
        assert sd3_infer.main([*QUICK, "--prompt", "a star", *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert told in line


def test_published_rotations_are_found_by_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ResidualConfig.from_flags({}, str(read_preset("sd3_medium_aligned_0.1").path))
    with pytest.raises(FileNotFoundError, match=r"sd3_coco5k_o1\.pt.*hf download LewisYao/PromptReinjection"):
        with_rotations(config, [])
    for folder in ("models", "prompt_reinjection/rotations", "elsewhere"):
        place = tmp_path / folder
        place.mkdir(parents=True)
        (place / "sd3_coco5k_o1.pt").write_bytes(b"x")
        found = with_rotations(config, [tmp_path / "elsewhere"] if folder == "elsewhere" else [])
        assert found.rotations.endswith(f"{folder}/sd3_coco5k_o1.pt")
        (place / "sd3_coco5k_o1.pt").unlink()


def test_a_negative_weight_in_anchored_mode_moves_away_from_the_origin():
    """The authors' code for SD3 leaves the origin out for a negative weight; ours mixes it in with its sign."""
    from mmditx import anchored_mix, standardise

    draw = torch.Generator().manual_seed(2)
    context, origin = torch.randn(1, 4, 64, generator=draw), standardise(torch.randn(1, 4, 64, generator=draw))
    along = lambda x: (standardise(x) * origin).mean().item()  # noqa: E731
    less, same, more = (along(anchored_mix(context, origin, w)) for w in (-0.5, 0.0, 0.5))
    assert less < same < more
    assert math.isclose(more - same, same - less, rel_tol=0.2)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--t5_tokens", "76"], "error: --t5_tokens 76: must be from 77 to 512"),
        (["--t5_tokens", "513"], "error: --t5_tokens 513: must be from 77 to 512"),
        (["--prompt_mode", "full"], "error: --prompt_mode full: must be one of reference, whole"),
        (["--prompt_weights", "on"], "error: --prompt_weights on: must be one of comfy, a1111, off"),
        (["--residual_tokens", "word"], "error: --residual_tokens word: must be one of all, words"),
        (["--prompt_mode", "whole", "--prompt", "(a){stream=nan}"], "{stream=nan} must hold a number"),
        (["--prompt_mode", "whole", "--prompt", "(a){stream=1"], "{stream= is not closed"),
        (["--prompt_mode", "whole", "--clip_prompt", "(a){stream=1"], "error: --clip_prompt"),
        (["--prompt_mode", "whole", "--t5_prompt", "(a:nan)"], "error: --t5_prompt"),
        (["--prompt_mode", "whole", "--negative_prompt", "(a:inf)"], "error: --negative_prompt"),
        (["--prompt_mode", "whole", "--prompt", "red " * 2000], "chunks of 18 CLIP tokens; at most 16"),
    ],
)
def test_wrong_settings_are_one_line_before_weights_load(words, told, capsys, monkeypatch, tmp_path):
    import sd3.weights

    monkeypatch.setattr(sd3.weights.ModelTensors, "load_into", lambda *a, **k: pytest.fail("weights were loaded"))
    prompt = [] if "--prompt" in words else ["--prompt", "a star"]
    assert sd3_infer.main([*QUICK, *prompt, *words, "--out_dir", str(tmp_path / "o")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert told in line
    assert not (tmp_path / "o").exists()


def test_a_file_may_name_its_mode_and_a_record_keeps_the_other(small_model, tmp_path, capsys):
    from safetensors.torch import load_file

    for name in ("tokenizer", "tokenizer_3"):
        (tmp_path / name).symlink_to(TOKENIZERS / name)
    path = tmp_path / "w.safetensors"
    save_file(load_file(small_model), path, {"width": "64", "height": "48", "steps": "1", "prompt_mode": "whole"})
    command = ["--model", str(path), "--prompt", "a (red:1.5) circle", "--seed", "1", "--t5_tokens", "77", "--cfg", "1"]
    made = {}
    for name, more in (
        ("own", []),
        ("whole", ["--prompt_mode", "whole"]),
        ("reference", ["--prompt_mode", "reference"]),
    ):
        assert sd3_infer.main([*command, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
        made[name] = pixels(tmp_path / f"{name}.png")
    assert np.array_equal(made["own"], made["whole"])
    assert not np.array_equal(made["own"], made["reference"])
    again = ["--replay", str(tmp_path / "reference.png"), "--out", str(tmp_path / "again.png")]
    assert sd3_infer.main(again) == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), made["reference"])
    capsys.readouterr()
    assert sd3_infer.main(["--info", str(tmp_path / "reference.png")]) == 0
    assert "--prompt_mode=reference" in capsys.readouterr().out


def test_spans_join_neighbours_of_equal_weights():
    assert read_spans("a (b:1.0) c (d)(e)") == [Span("a b c "), Span("de", 1.1)]
