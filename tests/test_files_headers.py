"""Headers of safetensors files: what the library refuses we refuse from the header alone, and the other way round."""

from __future__ import annotations

import json
import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import SafetensorError, safe_open

from sd3.files import WeightFile
from sd3.mistakes import Mistake
from sd3.weights import ModelTensors

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "empty": {"dtype": "F16", "shape": [0, 5], "data_offsets": [40, 40]},
}
HEADER = {"__metadata__": {"words": "a b"}, **TENSORS}
DATA = bytes(40)


def written(path, header: bytes, data: bytes = DATA):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def library(path) -> str:
    """What the library says to a file, or `` where it takes its header."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return "" if list(file.keys()) else "no tensors"
    except SafetensorError as error:
        return str(error) or "refused"


def ours(path) -> str:
    try:
        WeightFile(path)
        return ""
    except Mistake as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
        return str(error)


def agree(path) -> None:
    theirs, own = library(path), ours(path)
    assert bool(theirs) == bool(own), f"the library: {theirs!r}; we: {own!r}"


T = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HUGE, EMPTY = str(2**40).encode(), b'{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}'
EXACT = {
    "plain": b'{"a":' + T + b"}",
    "blanks around": b' \n {"a":' + T + b"} \t",
    "a tensor twice": b'{"a":' + T + b',"a":' + T + b"}",
    "a tensor twice, the first is none": b'{"a":5,"a":' + T + b"}",
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},"a":' + T + b"}",
    "a note twice": b'{"__metadata__":{"x":"1","x":"2"},"a":' + T + b"}",
    "a note twice, one is none": b'{"__metadata__":{"x":1,"x":"2"},"a":' + T + b"}",
    "a dtype twice": b'{"a":{"dtype":"F32",' + T[1:] + b"}",
    "another field": b'{"a":{"z":[1,{"y":null}],' + T[1:] + b"}",
    "another field is NaN": b'{"a":{"z":NaN,' + T[1:] + b"}",
    "another field is too large": b'{"a":{"z":1e999,' + T[1:] + b"}",
    "another field has 400 digits": b'{"a":{"z":' + b"9" * 400 + b"," + T[1:] + b"}",
    "another field has 30 digits": b'{"a":{"z":' + b"9" * 30 + b"," + T[1:] + b"}",
    "another field has half a letter": b'{"a":{"z":"\\ud800",' + T[1:] + b"}",
    "another field, 125 deep": b'{"a":{"z":' + b"[" * 125 + b"]" * 125 + b"," + T[1:] + b"}",
    "another field, 126 deep": b'{"a":{"z":' + b"[" * 126 + b"]" * 126 + b"," + T[1:] + b"}",
    "another field, 2000 deep": b'{"a":{"z":' + b"[" * 2000 + b"]" * 2000 + b"," + T[1:] + b"}",
    "a list for a tensor": b'{"a":["F32",[2],[0,8]]}',
    "a whole number with a point": b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
    "minus zero": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}',
    "true": b'{"a":{"dtype":"U8","shape":[8,true],"data_offsets":[0,8]}}',
    "negative": b'{"a":{"dtype":"U8","shape":[-8,-1],"data_offsets":[0,8]}}',
    "three offsets": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}',
    "no shape": b'{"a":{"dtype":"F32","data_offsets":[0,8]}}',
    "metadata null": b'{"__metadata__":null,"a":' + T + b"}",
    "metadata a list": b'{"__metadata__":[],"a":' + T + b"}",
    "a note null": b'{"__metadata__":{"x":null},"a":' + T + b"}",
    "too many to count": b'{"a":' + EMPTY % (HUGE + b"," + HUGE + b",0") + b',"b":' + T + b"}",
    "none of too many": b'{"a":' + EMPTY % (b"0," + HUGE + b"," + HUGE) + b',"b":' + T + b"}",
    "an empty one in the middle": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"b":' + T + b"}",
    "an empty one at the end": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},"b":' + T + b"}",
    "half a letter": b'{"\\ud800":' + T + b"}",
    "a letter in two halves": b'{"\\ud83d\\ude00":' + T + b"}",
    "a line in a name": b'{"a\n":' + T + b"}",
    "a mark before": b'\xef\xbb\xbf{"a":' + T + b"}",
    "words behind": b'{"a":' + T + b"}x",
    "a list": b'[{"a":' + T + b"}]",
    "half a byte": b'{"a":{"dtype":"F4","shape":[15],"data_offsets":[0,8]}}',
    "four bits": b'{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}',
    "small letters": b'{"a":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}',
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_the_library_and_we_agree(tmp_path, case):
    agree(written(tmp_path / "x.safetensors", EXACT[case], bytes(8)))


@pytest.mark.parametrize(
    "dtype",
    ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "C64", "I4", "F6_E2M3", "BOOL", "F128"],
)
@pytest.mark.parametrize("count", [0, 1, 8])
def test_every_dtype_of_the_library(tmp_path, dtype, count):
    for bits in (4, 6, 8, 16, 32, 64):
        size = count * bits // 8
        header = {"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]}}
        agree(written(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(size)))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.integers(2**31, 2**66),
    st.floats(allow_nan=False),
    st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "", "x", "0", "\u2028", "\U0001f7ca"]),
    st.lists(st.integers(0, 50), max_size=3),
    st.dictionaries(st.sampled_from(["dtype", "x"]), st.text(max_size=2), max_size=2),
)


@st.composite
def mutated(draw) -> tuple[bytes, bytes]:
    header, data = json.loads(json.dumps(HEADER)), DATA
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["field", "offset", "tensor", "note", "drop", "name", "bytes", "data"]))
        name = draw(st.sampled_from(sorted(TENSORS)))
        entry = header.get(name)
        if what == "field" and isinstance(entry, dict):
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(VALUES)
        elif what == "offset" and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [v + draw(st.integers(-8, 8)) for v in entry["data_offsets"] if isinstance(v, int)]
        elif what == "tensor":
            header[name] = draw(VALUES)
        elif what == "note":
            header["__metadata__"] = draw(st.one_of(VALUES, st.dictionaries(st.text(max_size=2), VALUES, max_size=2)))
        elif what == "drop":
            header.pop(name, None)
        elif what == "name" and name in header:
            header[draw(st.text(max_size=3))] = header.pop(name)
        elif what == "data":
            data = data[: draw(st.integers(0, 40))] + bytes(draw(st.integers(0, 3)))
        elif what == "bytes":
            text = bytearray(json.dumps(header).encode())
            for _ in range(draw(st.integers(1, 3))):
                place = draw(st.integers(0, len(text) - 1))
                text[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
            return bytes(text), data
    return json.dumps(header).encode(), data


@given(mutated())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_mutated_header_is_taken_where_the_library_takes_it(tmp_path, case):
    agree(written(tmp_path / "x.safetensors", *case))


@given(st.binary(max_size=300))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    agree(path)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=5))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_metadata_comes_back_as_it_was_written(tmp_path, notes):
    header = json.dumps({"__metadata__": notes, "a": TENSORS["a"]}).encode()
    path = written(tmp_path / "x.safetensors", header, bytes(24))
    agree(path)
    assert WeightFile(path).metadata == notes


def test_a_header_beyond_what_the_library_reads(tmp_path):
    """The file is sparse: only its length is looked at."""
    path = tmp_path / "x.safetensors"
    for length, wrong in ((100_000_001, "its header is damaged"), (90_000_000, "is truncated")):
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", length) + b'{"a":')
            file.truncate(100_000_100 if length > 10**8 else 1000)
        assert wrong in ours(path)
        assert library(path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data_offsets": [0, 12]}, "a has 12 bytes; its shape needs 24"),
        ({"data_offsets": [1, 25]}, "a lies at 1 to 25, expected to start at 0"),
        ({"dtype": "I4"}, "a has an unknown dtype 'I4'"),
        ({"shape": [2, 3.5]}, "a has an invalid shape [2, 3.5]"),
    ],
)
def test_the_line_names_the_tensor(tmp_path, changes, line):
    header = {"a": TENSORS["a"] | changes}
    assert line in ours(written(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(24)))


def test_what_is_read_is_what_the_library_reads(tmp_path):
    path = written(tmp_path / "x.safetensors", json.dumps(HEADER).encode(), bytes(range(40)))
    part = ModelTensors(WeightFile(path))
    with safe_open(path, framework="pt", device="cpu") as file:
        for name, tensor in part.read(list(TENSORS), "cpu", None):
            wanted = file.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
            (entry,) = part.entries(name)
            data = path.read_bytes()[entry.place : entry.place + entry.size]
            first, last = TENSORS[name]["data_offsets"]
            assert data == bytes(range(first, last))
