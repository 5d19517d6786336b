"""Variants in words, and which row of the scores is marked as the best."""

from __future__ import annotations

import pytest

from sd3.settings import IMAGE_ROWS, Flags
from sd3.sweep.grid import Grid
from sd3.sweep.journal import Journal
from sd3.sweep.plan import Plan
from sd3.sweep.scores import Row, best
from sd3.sweep.words import layers, setting_words, variant_code, variant_words

STREAMING = {"residual_target_layers": "2-7", "residual_weights": "each:0.1"}


def words(**raw) -> list[str]:
    """The variants of a grid in words."""
    grid = Grid.read({"prompt": "x", **raw})
    return variant_words(grid.variants, [values(v.raw) for v in grid.variants])


def values(raw) -> dict:
    """Settings as `Settings.named` gives them, weights resolved."""
    out = {n: row.default for n, row in IMAGE_ROWS.items()} | Flags.read(raw).for_image()
    out |= {n: IMAGE_ROWS[n].read(n, v) for n, v in raw.items() if n in IMAGE_ROWS}
    targets, weights = out["residual_target_layers"], out["residual_weights"]
    if isinstance(weights, str):
        weights = [float(weights.removeprefix("each:"))] * len(targets)
    return out | {"residual_weights": weights or [1.0] * len(targets)}


@pytest.mark.parametrize(
    ("numbers", "said"),
    [((4,), "4"), ((3, 4), "3 and 4"), ((3, 5, 7), "3, 5 and 7"), (range(2, 8), "2 to 7"),
     ((1, 4, 5, 6, 9), "1, 4 to 6 and 9")],
)  # fmt: skip
def test_layers(numbers, said):
    assert layers(list(numbers)) == said


def test_variants_in_words():
    assert words(**STREAMING, residual_mode="anchored") == ["off", "anchored, block 0 into 2 to 7, weight 0.1"]
    assert words(**STREAMING, cfg="3;5") == [
        "off, cfg 3", "off, cfg 5", "block 0 into 2 to 7, weight 0.1, cfg 3", "block 0 into 2 to 7, weight 0.1, cfg 5"
    ]  # fmt: skip
    assert words(**STREAMING, residual_start="0;0.5", residual_end="0.75")[1:] == [
        "block 0 into 2 to 7, weight 0.1, steps 0 % to 75 %",
        "block 0 into 2 to 7, weight 0.1, steps 50 % to 75 %",
    ]
    several = words(residual_target_layers="3,5,7", residual_weights="0.1,0.2,0.1")
    assert several == ["off", "block 0 into 3, 5 and 7, weights 0.1, 0.2 and 0.1"]
    assert words(**STREAMING, residual_branch="cond")[1] == "block 0 into 2 to 7, weight 0.1, cond pass only"


def test_a_named_variant_keeps_its_name(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "grid.yaml").write_text(
        "prompt: [x]\nvariants:\n  gentle: {residual_target_layers: 2-7, residual_weights: 'each:0.05'}\n"
    )
    grid = Grid.read({}, str(tmp_path / "grid.yaml"))
    assert variant_words(grid.variants, [values(v.raw) for v in grid.variants]) == ["off", "gentle"]
    assert [variant_code(v) for v in grid.variants] == ["off", "0:2-7:each:0.05"]


def test_the_choices_of_a_filter():
    assert setting_words(values({}))["residual_mode"] == "off"
    streaming = setting_words(values(STREAMING))
    assert (streaming["residual_mode"], streaming["residual_target_layers"]) == ("add", "2 to 7")


def row(variant: int, mean: float, low: float, high: float, pairs: int = 10) -> Row:
    return Row(variant, "clip", 10, mean, low, high, pairs=pairs)


@pytest.mark.parametrize(
    ("low", "pairs", "marked"),
    [(0.6, 10, [(1, "clip")]), (0.5, 10, []), (0.3, 10, []), (0.6, 9, [])],
    ids=["above", "at its end", "overlapping", "too few pairs"],
)
def test_the_best_row_clears_the_baselines_interval_over_enough_pairs(low, pairs, marked):
    rows = [row(0, 0.4, 0.2, 0.5), row(1, 0.7, low, 0.8, pairs), row(2, 0.55, 0.51, 0.6)]
    assert best(Plan(None, (), (0, 0, 0), (), (), ()), rows) == marked


def test_a_baseline_is_never_marked():
    rows = [row(0, 0.9, 0.8, 1.0), row(1, 0.5, 0.4, 0.6)]
    assert best(Plan(None, (), (0, 0), (), (), ()), rows) == []


def test_dates_of_a_sweep(tmp_path):
    journal = Journal(tmp_path)
    assert journal.dates() is None
    journal.log("start")
    for name in ("a", "b"):
        journal.log("batch", pictures=[name], seconds=1.0)
    (tmp_path / "log.jsonl").open("a").write(
        '{"time": "tomorrow", "event": "batch", "pictures": ["c"], "seconds": 1}\n'
    )
    first, last = journal.dates()
    assert first[:4] == last[:4]
    assert first <= last
