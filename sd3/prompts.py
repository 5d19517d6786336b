"""Prompts from texts and files. Needs no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sd3.mistakes import Missing, Mistake, Where
from sd3.readers import read_path, read_text
from sd3.reading import check_file, parse_json, reading

PROMPT_FILES = (".txt", ".jsonl")  # a prompt with such an ending names a file of prompts


def read_prompts(prompt: Any, flag: str = "prompt") -> tuple[list[str], str]:
    """The prompts and the name of their folder, from a text or a `.txt` file with one prompt a line.

    Blank lines, CRLF and a byte-order mark are fine. Raises Missing or Mistake.
    """
    text = read_text(flag, os.fspath(prompt) if isinstance(prompt, os.PathLike) else prompt)
    if not text.lower().endswith(".txt"):
        if not text.strip():
            raise Mistake(flag, "", "is empty; say what the image should show, or name a .txt file")
        return [text], folder_name(text)
    path = read_path(flag, text)
    if not os.path.lexists(path):
        raise Missing(flag, text, "no such file (a prompt that ends in .txt is a file of prompts)")
    prompts = [line.strip() for line in read_lines(flag, path) if line.strip()]
    if not prompts:
        raise Mistake(flag, text, "the file holds no prompt")
    return prompts, folder_name(text)


def read_texts(prompts: Any) -> list[str]:
    """Prompts from one text or several; raises Mistake for none, and for anything that is not text."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise Mistake("prompt", prompts, "must be a text, or a list of texts")
    texts = [read_text("prompt", prompt) for prompt in prompts]
    if not texts:
        raise Mistake("prompt", "", "no prompt is given")
    return texts


def shortened(prompt: str) -> str:
    """The beginning of a prompt, for messages."""
    return prompt if len(prompt) <= 40 else prompt[:37] + "..."


def read_lines(flag: str, path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file; raises Missing, or Mistake if it is not text.

    Lines end with \\n or \\r\\n only; other Unicode line separators may occur in a line.
    """
    where = Where(flag, path)
    check_file(where, path)
    with reading(where, "cannot be read as UTF-8 text"):
        text = Path(path).read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it contains null characters, like UTF-16 text or a binary file")
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_jsonl(flag: str, path: str, fits: Callable[[dict[str, Any]], bool], form: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line. fits: whether an object has the form described by `form`.

    Raises Missing, or Mistake naming the line.
    """
    path = read_path(flag, path)
    out = []
    for number, line in enumerate(read_lines(flag, path), 1):
        if not line.strip():
            continue
        try:
            out.append(parse_json(line))
            good = fits(out[-1])
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise Mistake(flag, path, f"line {number} is not of the form {form}")
        try:
            json.dumps(out[-1], ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise Mistake(flag, path, f"line {number} cannot be written as UTF-8 (a lone surrogate)") from None
    if not out:
        raise Mistake(flag, path, "the file holds no prompt")
    return out


def folder_name(text: str) -> str:
    """A folder name from a prompt, or from a prompt file's base name without extension: characters other than
    letters, digits, `_`, `-` and `.` become `_`; at most 50 characters and 150 bytes.
    """
    stem = text
    if text.lower().endswith(PROMPT_FILES):
        stem = os.path.splitext(os.path.basename(text))[0] or text
    name = re.sub(r"[^\w\-.]", "_", stem[:50])
    while len(name.encode()) > 150:
        name = name[:-1]
    return name if name.strip(".") else name.replace(".", "_")  # `..` would name the parent folder
