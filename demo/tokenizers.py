"""Small tokenizers in the real formats: CLIP's vocab.json + merges.txt and T5's tokenizer.json.

Every word of the captions is one token in both. Any other text has tokens too (bytes, or the unknown token).
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_alphabet() -> list[str]:
    """The 256 characters that represent bytes in CLIP's and GPT-2's vocabularies, printable bytes first."""
    return sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make every word one token. Each joins the most frequent pair, the alphabetically first of equals."""
    pieces = [(*w[:-1], w[-1] + WORD_END) for w in words]
    merges = []
    while counts := Counter(pair for p in pieces for pair in pairwise(p)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merged(p, best) for p in pieces]
    return merges


def _merged(piece: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in piece:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def clip_files(words: list[str], folder: Path, positions: int) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json. The vocabulary has bytes, bytes at the end of a word,
    merges, and the start and end token, in this order.
    """
    merges = byte_pair_merges(words)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(m) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": positions,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def t5_file(words: list[str], folder: Path) -> None:
    """Writes tokenizer.json: a unigram model with one piece per word and the ids pad 0, end 1, unknown 2. A comma or
    full stop needs no space before it.
    """
    space = "\u2581"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -5.0)]
    pieces += [(word if word in ".," else space + word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=space, prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
