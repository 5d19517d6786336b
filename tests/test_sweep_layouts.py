"""Benchmark layouts, read back the way the public evaluators read them (written here from what they expect)."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from helpers import DEMO
from PIL import Image
from test_sweep import results

import sd3.sweep.command

QUICK = ["--model", str(DEMO), "--device", "cpu", "--steps", "2"]
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
    {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "two green stars"},
    {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
]


def sweep(out, *arguments) -> int:
    return sd3.sweep.command.main(["--out", str(out), *QUICK, *map(str, arguments)])


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def made(out, variant: str, prompt: str) -> list[np.ndarray]:
    """The sweep's own pictures, seed by seed."""
    own = [line for line in results(out) if (line["variant"], line["prompt"]) == (variant, prompt)]
    return [pixels(out / line["file"]) for line in sorted(own, key=lambda line: int(line["seed"]))]


def read_geneval(folder):
    """As GenEval's evaluate_images: numbered folders, one JSON object, pictures named by digits."""
    for name in sorted(os.listdir(folder)):
        place = folder / name
        if not place.is_dir() or not name.isdigit():
            continue
        with open(place / "metadata.jsonl") as f:
            metadata = json.load(f)
        samples = [n for n in sorted(os.listdir(place / "samples")) if re.match(r"\d+\.png", n)]
        yield metadata, [pixels(place / "samples" / n) for n in samples], pixels(place / "grid.png")


def test_geneval(tmp_path):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    out = tmp_path / "out"
    arguments = ["--layout", "geneval", "--prompt", prompts, "--seed", "0-3", "--residual_target_layers", "3,5"]
    assert sweep(out, *arguments) == 0
    assert sorted(os.listdir(out / "geneval")) == ["0_3,5_each_1.0", "off"]
    for variant, name in {"off": "off", "0_3,5_each_1.0": "0:3,5:each:1.0"}.items():
        read = list(read_geneval(out / "geneval" / variant))
        assert [m for m, _, _ in read] == GENEVAL  # one prompt twice, made once
        for metadata, samples, grid in read:
            own = made(out, name, metadata["prompt"])
            assert len(samples) == 4
            assert all((a == b).all() for a, b in zip(samples, own, strict=True))
            assert (grid == np.concatenate(own, axis=1)).all()
    assert sweep(out, *arguments) == 0  # again, with nothing to make
    assert len(list(read_geneval(out / "geneval" / "off"))) == 3


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_dpg_bench(tmp_path, kind):
    texts = {"12": "a red circle", "COCOval2014_0007": "two green stars"}
    if kind == "folder":
        prompts = tmp_path / "prompts"
        prompts.mkdir()
        for name, text in texts.items():
            (prompts / f"{name}.txt").write_text(text + "\n")
    else:
        prompts = tmp_path / "dpg_bench.csv"
        lines = [f'{name},"{text}",words,{i},0,entity,whole\n' for name, text in texts.items() for i in (1, 2)]
        head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed\n"
        prompts.write_text(head + "".join(lines))
    out = tmp_path / "out"
    assert sweep(out, "--layout", "dpg", "--prompt", prompts, "--seed", "5-8", "--batch_size", 2) == 0
    folder = out / "dpg" / "off"
    assert sorted(os.listdir(folder)) == sorted(f"{name}.png" for name in texts)
    for name, text in texts.items():  # as compute_dpg_bench: four crops of --resolution 96
        whole = pixels(folder / f"{name}.png")
        assert whole.shape == (192, 192, 3)
        crops = [whole[y : y + 96, x : x + 96] for y in (0, 96) for x in (0, 96)]
        assert all((a == b).all() for a, b in zip(crops, made(out, "off", text), strict=True))


def test_t2i_compbench(tmp_path):
    prompts = tmp_path / "color_val.txt"
    texts = ["a red circle left of a blue square", "two green stars"]
    prompts.write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    assert sweep(out, "--layout", "t2i_compbench", "--prompt", prompts, "--seed", "0-1") == 0
    folder = out / "t2i_compbench" / "off" / "samples"
    names = os.listdir(folder)
    names.sort(key=lambda n: int(n.split("_")[-1].split(".")[0]))  # as the BLIP-VQA evaluator sorts
    assert [n.split("_")[0] for n in names] == [t for t in texts for _ in range(2)]  # and finds the prompt
    assert sweep(out, "--layout", "t2i_compbench", "--prompt", prompts, "--seed", "0-2") == 0  # nothing stale stays
    names = sorted(os.listdir(folder), key=lambda n: int(n.split("_")[-1].split(".")[0]))
    assert [n.split("_")[0] for n in names] == [t for t in texts for _ in range(3)]
    for text in texts:
        own = [pixels(folder / n) for n in names if n.startswith(text)]
        assert all((a == b).all() for a, b in zip(own, made(out, "off", text), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "geneval", "--prompt", "plain.txt"], "line 1 is not of the form"),
        (["--layout", "geneval", "--prompt", "no_tag.jsonl"], 'line 2 is not of the form {"tag"'),
        (["--layout", "geneval", "--prompt", "none.jsonl"], "--prompt none.jsonl: no such file"),
        (["--layout", "dpg", "--prompt", "none"], "--prompt none: no such file or folder"),
        (
            ["--layout", "dpg", "--prompt", "plain.txt", "--seed", "0-3"],
            "must be the folder of .txt files",
        ),
        (["--layout", "dpg", "--prompt", "texts", "--seed", "0-2"], "needs 4 seeds"),
        (["--layout", "dpg", "--prompt", "texts", "--seed", "0-3", "--width", "80"], "these are 80 x 96"),
        (["--layout", "dpg", "--prompt", "short.csv", "--seed", "0-3"], "line 3 lacks an item_id or a text"),
        (["--layout", "dpg", "--prompt", "empty", "--seed", "0-3"], "--prompt empty: holds no prompt"),
        (["--layout", "t2i_compbench", "--prompt", "a red circle"], "must be a .txt file of T2I-CompBench"),
        (["--layout", "t2i_compbench", "--prompt", "odd.txt"], "contains / or _, which its evaluators cannot read"),
        (["--layout", "t2i_compbench", "--prompt", "long.txt"], "is too long for a file name"),
        (["--layout", "gen", "--prompt", "plain.txt"], "--layout gen: must be one of geneval, dpg"),
    ],
)
def test_bad_layouts(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("a red circle\n")
    (tmp_path / "odd.txt").write_text("a red_circle\n")
    (tmp_path / "long.txt").write_text("a red circle " * 20)
    (tmp_path / "no_tag.jsonl").write_text('{"prompt": "a", "tag": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text("a red circle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.csv").write_text("item_id,text\n1,a red circle\n2\n")
    assert sweep("out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
