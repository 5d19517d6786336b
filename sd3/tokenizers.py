"""Opens tokenizer files. A damaged one, or one of another text encoder, is a `Mistake` that names the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models

from other_impls import CLIP_BPE, CLIP_END, CLIP_START, CLIPTokenizer, T5Tokenizer, clip_pipeline, sentencepiece_places
from sd3.mistakes import Mistake, Where
from sd3.reading import check_file, parse_json, reading

SAMPLE_TEXT = "a star, \u00e9\u661f\U0001f7ca <|endoftext|>"  # a tokenizer must be able to split it when it is opened
MOST_UNMERGED = 0.001  # fraction of a vocabulary's tokens that no merge has to produce; at least two tokens


def open_clip_tokenizer(folder: str | Path, field: str = "model_folder", rows: int | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder with vocab.json and merges.txt, or tokenizer.json.

    field: the setting that leads to the folder; rows: of the encoder's embedding table, where known.
    Raises `Mistake` that names the file that is damaged, or that has ids beyond the table.
    """
    vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    if vocabulary.exists() and merges.exists():
        where = Where(field, vocabulary)
        tokenizer = clip_pipeline(_read_clip_bpe(where, Where(field, merges)))
    else:
        where = Where(field, Path(folder) / "tokenizer.json")
        tokenizer = _read_tokenizer_json(where)
    try:
        clip = CLIPTokenizer(tokenizer)
    except ValueError as error:
        raise Mistake(*where, str(error)) from None
    _check_ids(where, _largest_id(tokenizer), rows)
    return clip


def open_t5_tokenizer(folder: str | Path, field: str = "model_folder", rows: int | None = None) -> T5Tokenizer:
    """T5's tokenizer from a folder with tokenizer.json or spiece.model; arguments and mistakes as for CLIP's."""
    whole = Path(folder) / "tokenizer.json"
    if whole.exists():
        tokenizer = _read_tokenizer_json(Where(field, whole))
        _check_ids(Where(field, whole), _largest_id(tokenizer), rows)
        return T5Tokenizer(lambda text: _places(tokenizer, text))
    where = Where(field, Path(folder) / "spiece.model")
    check_file(where, where.value)
    with reading(where, "is not a usable tokenizer"):
        model = SentencePieceProcessor(model_file=str(where.value))
        model.encode(SAMPLE_TEXT)
        model.id_to_piece(2)
    _check_ids(where, model.get_piece_size() - 1, rows)
    return T5Tokenizer(sentencepiece_places(model, rows))


def _places(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    got = tokenizer.encode(text, add_special_tokens=False)
    return [(token, end) for token, (_, end) in zip(got.ids, got.offsets, strict=True)]


def _read_tokenizer_json(where: Where) -> Tokenizer:
    """A tokenizer.json, without the padding and the truncation that another program left in it."""
    check_file(where, where.value)
    with reading(where, "is not a usable tokenizer"):
        tokenizer = Tokenizer.from_file(str(where.value))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
    return tokenizer


def _read_clip_bpe(vocabulary: Where, merges: Where) -> models.BPE:
    for where in (vocabulary, merges):
        check_file(where, where.value)
    with reading(vocabulary, "is not a usable vocabulary"):
        ids = parse_json(vocabulary.value.read_bytes())
        if not isinstance(ids, dict) or not all(type(i) is int and 0 <= i < 2**32 for i in ids.values()):
            raise ValueError("it must hold a number for every token")
    if CLIP_START not in ids or CLIP_END not in ids:  # else the library would add them under unused numbers
        raise Mistake(*vocabulary, f"is not a CLIP vocabulary: {CLIP_START} or {CLIP_END} is missing")
    with reading(merges, f"does not fit {vocabulary.value.name}"):
        bpe = models.BPE.from_file(str(vocabulary.value), str(merges.value), **CLIP_BPE)
        _check_merges(ids, merges.value)
    return bpe


def _check_merges(ids: Mapping[str, int], merges: Path) -> None:
    """Raises ValueError where too few of the tokens are the product of a merge: the file was cut off."""
    lines = [line.split(" ") for line in merges.read_text(encoding="utf-8").split("\n")]
    products = {pair[0] + pair[1] for pair in lines if len(pair) == 2}
    long = [t for t in ids if len(t.removesuffix("</w>")) > 1 and not re.fullmatch(r"<.*>", t)]
    lost = [t for t in long if t not in products]
    if len(lost) > max(2, MOST_UNMERGED * len(long)):
        raise ValueError(f"they lead to {len(long) - len(lost)} of {len(long)} tokens; the file is cut off")


def _largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _check_ids(where: Where, largest: int, rows: int | None) -> None:
    """Raises `Mistake` where an encoder has no embedding for a token."""
    if rows is not None and largest >= rows:
        raise Mistake(
            *where,
            f"has tokens up to {largest}, the text encoder has {rows} (0 to {rows - 1}): they do not belong together",
        )
