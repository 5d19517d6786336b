"""Residual configurations, rotations and measurements of any state are one line; good ones are read as before."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sd3.probe.command
import sd3.probe.suggesting
import sd3.sweep.command
import sd3_infer
from sd3.mistakes import Mistake
from sd3.residual import ResidualConfig, read_fields
from sd3.rotations import read_rotations
from sd3.sweep.layouts import read_entries

EYE = torch.eye(4)


def rotations(path, metadata=None, **tensors):
    notes = {"origin_layer": "0", "target_layers": "[3, 5]"} | (metadata or {})
    save_file({"rotation_matrices": torch.stack([EYE, EYE])} | tensors, path, notes)
    return path


def pickled(path, **values):
    two = torch.stack([EYE, EYE])
    torch.save({"rotation_matrices": two, "origin_layer": 0, "target_layers": [3, 5]} | values, path)
    return path


def one_line(error: BaseException, field: str, path) -> str:
    text = str(error)
    assert text.startswith(f"{field} {path}")
    assert "\n" not in text
    return text


# ---- configurations ------------------------------------------------------------------------------

VALUES = {
    "nested": "[" * 100_000,
    "nested objects": '{"weights":' * 100_000,
    "nested value": '{"target_layers": ' + "[" * 900 + "]" * 900 + "}",
    "an object for layers": '{"target_layers": {"a": 1}}',
    "an object for weights": '{"target_layers": [3], "weights": {"a": [1]}}',
    "null in a list": '{"target_layers": [3, null]}',
    "a list in a list": '{"target_layers": [[3]]}',
    "text for a number": '{"origin_layer": "x"}',
    "a list for a number": '{"origin_layer": [1]}',
    "an object for a mode": '{"target_layers": [3], "mode": {}}',
    "a list for a file": '{"target_layers": [3], "rotations": [1]}',
    "infinite": '{"target_layers": [3], "weights": [Infinity]}',
    "beyond all numbers": '{"target_layers": [3], "weights": [1' + "0" * 400 + "]}",
    "a list": "[1]",
    "a number": "5",
    "empty": "",
    "half": '{"target_layers": ',
}


@pytest.mark.parametrize("case", VALUES)
def test_a_configuration_of_any_values(tmp_path, case):
    path = tmp_path / "c.json"
    path.write_text(VALUES[case])
    with pytest.raises(ValueError) as error:
        ResidualConfig.read(path)
    one_line(error.value, "residual_config", path)


TENSORS = {
    "sparse": torch.ones(2).to_sparse(),
    "sparse rows": torch.eye(2).to_sparse_csr(),
    "without memory": torch.ones(2, device="meta"),
    "complex": torch.ones(2, dtype=torch.complex64),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "huge": torch.ones(1).expand(10**9),
    "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "square": torch.ones(2, 2),
    "bool": torch.tensor([True, False]),
    "NaN": torch.tensor([float("nan"), 1]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_in_tensors_of_any_kind(tmp_path, case):
    path = tmp_path / "w.pth"
    torch.save({"residual_weights": TENSORS[case], "target_layers": [3, 4], "origin_layer": 0}, path)
    with pytest.raises(ValueError) as error:
        ResidualConfig.read(path)
    one_line(error.value, "residual_config", path)


def test_plain_tensors_are_read(tmp_path):
    weights, layers = torch.tensor([0.5, 0.25]), torch.tensor([3, 4])
    torch.save({"residual_weights": weights, "target_layers": layers}, tmp_path / "w.pth")
    assert ResidualConfig.read(tmp_path / "w.pth") == ResidualConfig(0, (3, 4), (0.5, 0.25))


GOOD = pickle.dumps({"residual_weights": [0.5], "target_layers": [3]}, 2)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_mutated_pickle_is_read_or_is_one_line(tmp_path, kind, data):
    path = tmp_path / "w.pth"
    if kind == "zip":
        torch.save({"residual_weights": torch.tensor([0.5]), "target_layers": [3]}, path)
        good = bytearray(path.read_bytes())
    else:
        good = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(2, len(good) - 1))
        good[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(bytes(good))
    for read, field in ((read_fields, "residual_config"), (read_rotations, "rotations")):
        try:
            read(path)
        except ValueError as error:
            one_line(error, field, path)


# ---- rotations -----------------------------------------------------------------------------------

METADATA = {
    "a number, as text": {"origin_layer": "x"},
    "nested": {"target_layers": "[" * 100_000},
    "nested list": {"target_layers": "[[3], [5]]"},
    "an object": {"target_layers": '{"a": 3}'},
    "null": {"origin_layer": "null"},
    "none": {"target_layers": "[]"},
    "half": {"target_layers": "[3,"},
    "too large": {"origin_layer": "1" + "0" * 5000},
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_any_values(tmp_path, case):
    path = rotations(tmp_path / "r.safetensors", METADATA[case])
    with pytest.raises(ValueError) as error:
        read_rotations(path)
    one_line(error.value, "rotations", path)


def test_metadata_that_is_no_text(tmp_path):
    path = rotations(tmp_path / "r.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["origin_layer"] = 0
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(Mistake, match=r"its header is damaged \(__metadata__ origin_layer is not text\)"):
        read_rotations(path)


def test_bytes_behind_a_rotation_file(tmp_path):
    path = rotations(tmp_path / "r.safetensors")
    path.write_bytes(path.read_bytes() + b"xx")
    with pytest.raises(Mistake, match=r"^rotations .*its header is damaged"):
        read_rotations(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_matrices_without_a_point(tmp_path, dtype, kind):
    matrices = torch.stack([EYE, EYE]).to(dtype)
    path = tmp_path / f"r.{kind}"
    (rotations if kind == "safetensors" else pickled)(path, rotation_matrices=matrices)
    with pytest.raises(Mistake, match="rotation_matrices") as error:
        read_rotations(path)
    one_line(error.value, "rotations", path)


EDGES = {
    "None": [None],
    "text": ["a"],
    "lists": [[0.5]],
    "objects": [{}],
    "NaN": [float("nan")],
    "infinite": [float("inf")],
    "beyond all numbers": [10**400],
    "complex": [1j],
    "true": [True],
    "text alone": "abc",
    "too many": [0.1, 0.2, 0.3, 0.4, 0.5],
}


@pytest.mark.parametrize("case", EDGES)
def test_edges_of_any_kind_in_a_pickle(tmp_path, case):
    four = torch.eye(4).expand(2, 2, 4, 4).clone()
    path = pickled(tmp_path / "r.pt", rotation_matrices=four, timestep_bucket_edges=EDGES[case])
    with pytest.raises(ValueError) as error:
        read_rotations(path)
    one_line(error.value, "rotations", path)


@pytest.mark.parametrize(
    "edges", [torch.ones(1, 1), torch.ones(()), torch.tensor([True]), torch.ones(1, dtype=torch.complex64)]
)
def test_edges_of_any_shape_in_a_safetensors_file(tmp_path, edges):
    four = torch.eye(4).expand(2, 2, 4, 4).contiguous()
    path = rotations(tmp_path / "r.safetensors", rotation_matrices=four, timestep_bucket_edges=edges)
    with pytest.raises(Mistake, match="timestep_bucket_edges must be a list of real numbers"):
        read_rotations(path)


@pytest.mark.parametrize("edges", [[500.0], [0.5], [500], [0, 500, 1000]])
def test_good_edges_are_read(tmp_path, edges):
    given = {
        "rotation_matrices": torch.eye(4).expand(2, 2, 4, 4).contiguous(),
        "timestep_bucket_edges": torch.tensor(edges),
    }
    for path in (rotations(tmp_path / "r.safetensors", **given), pickled(tmp_path / "r.pt", **given)):
        assert read_rotations(path).edges == (0.5,)


# ---- pipes ---------------------------------------------------------------------------------------


def test_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "p")
    for read in (
        read_fields,
        read_rotations,
        sd3.probe.suggesting.read_measurement,
        lambda path: read_entries("dpg", str(path)),
    ):
        with pytest.raises(Mistake, match="is not a file"):
            read(tmp_path / "p")
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(Mistake, match=r"prompt .*p\.txt: is not a file"):
        read_entries("dpg", str(tmp_path))


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "a: " * 3 + "b", "{", "\udcff", "- ? " * 5000, "&a [*a", "a: !!python/object:os.x 1"]
)
def test_a_grid_of_any_damage_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "g.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert sd3.sweep.command.main(["--grid", str(path), "--out", str(tmp_path / "s")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --grid {path}: ") or "!!python" in text
    assert not (tmp_path / "s").exists()


def test_a_grid_that_is_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "g.yaml")
    assert sd3.sweep.command.main(["--grid", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "s")]) == 2
    assert "is not a file" in capsys.readouterr().err


# ---- measurements and benchmarks -----------------------------------------------------------------


def measurement(**changes) -> str:
    rows = [{"step": 0, "sigma": 1.0, "block": b, "retrieval": 1 - b / 10} for b in range(4)]
    return json.dumps({"depth": 4, "origin": 0, "chance": {"retrieval": 0.1}, "rows": rows} | changes)


def row(**changes) -> list[dict]:
    return [{"block": b, "retrieval": 0.5} | changes for b in range(4)]


MEASUREMENTS = {
    "depth beyond all bounds": measurement(depth=10**9),
    "depth as text": measurement(depth="4"),
    "one block": measurement(depth=1),
    "more blocks than rows": measurement(depth=6),
    "NaN": measurement(rows=row(retrieval=float("nan"))),
    "infinite": measurement(rows=row(retrieval=float("inf"))),
    "text": measurement(rows=row(retrieval="x")),
    "no rows": measurement(rows=[]),
    "rows of numbers": measurement(rows=[1, 2, 3, 4]),
    "nothing that knows": measurement(rows=[{"block": b, "norm": 1.0} for b in range(4)]),
    "no chance": measurement(chance={}),
    "chance null": measurement(chance={"retrieval": None}),
    "chance a list": measurement(chance=[]),
    "nested": "[" * 100_000,
    "half": measurement()[:-9],
    "a list": "[]",
    "empty": "",
}


@pytest.mark.parametrize("case", MEASUREMENTS)
def test_a_measurement_of_any_values_is_one_line(tmp_path, capsys, case):
    path = tmp_path / "measure.json"
    path.write_text(MEASUREMENTS[case])
    assert sd3.probe.command.main(["suggest", "--measurement", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --measurement {path}: is not a measurement of sd3_probe.py")


def test_a_good_measurement_is_read(tmp_path, capsys):
    (tmp_path / "measure.json").write_text(measurement())
    assert sd3.probe.command.main(["suggest", "--measurement", str(tmp_path / "measure.json")]) == 0
    assert "--residual_origin_layer 0" in capsys.readouterr().out


CSV = b"item_id,text\n"


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"a,b\n1,2\n", CSV + b'"' + b"x" * 200_000, b"", CSV + b",x\n", CSV + b"1,\0\n\0"]
)
def test_a_benchmark_that_is_no_csv(tmp_path, data):
    (tmp_path / "b.csv").write_bytes(data)
    try:
        entries = read_entries("dpg", str(tmp_path / "b.csv"))
    except ValueError as error:
        one_line(error, "prompt", tmp_path / "b.csv")
    else:
        assert all(entry.prompt and entry.id for entry in entries)


def test_the_command_line_ends_in_one_line_too(small_model, tmp_path, capsys):
    rotations(tmp_path / "r.safetensors", {"origin_layer": "x"})
    words = ["--model", str(small_model), "--prompt", "x", "--device", "cpu", "--out_dir", str(tmp_path / "o")]
    words += ["--residual_mode", "aligned", "--residual_target_layers", "3"]
    assert sd3_infer.main([*words, "--residual_rotations", str(tmp_path / "r.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --residual_rotations {tmp_path}/r.safetensors: its metadata is damaged")
    assert not (tmp_path / "o").exists()
