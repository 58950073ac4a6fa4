"""Tables: the best is bold only where it is better beyond chance, with all comparisons in view."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import config
from rar.evaluation import intervals
from rar.sweep import board, tables
from rar.sweep.board import Result
from rar.sweep.grid import Cell, Grid

GRID = config.validated(
    Grid,
    {
        "datasets": {"easy": {}, "hard": {}},
        "shots": [1, 2],
        "seeds": [0, 1],
        "arms": {"text": {"per_shots": False}, "retriever": {}, "rar": {}},
        "ours": "rar",
        "retriever": "retriever",
    },
)
LABELS = np.repeat([f"class {n:02d}" for n in range(30)], 4)


def results(accuracy: dict[str, float], noise: int = 0) -> list[Result]:
    """One result a cell of GRID: an arm is right on the first share of each class's pictures, plus noise by seed."""
    found = []
    for dataset, shots, seed, arm in itertools.product(GRID.datasets, (0, 1, 2), GRID.seeds, GRID.arms):
        if (shots == 0) == GRID.arms[arm].per_shots or (arm == "text" and seed):
            continue
        rng = np.random.default_rng([noise, shots, seed, *arm.encode(), *dataset.encode()])
        correct = rng.random(len(LABELS)) < accuracy[arm]
        values: dict[str, float | None] = {"images": float(len(LABELS)), "ranked_fraction": float(arm == "rar"), "top5": None}
        cell = Cell(dataset, shots, seed, "", arm, 5)
        value, low, high = intervals.accuracy(correct, LABELS, 0)
        found.append(Result(cell, "top1", value, low, high, values, correct, LABELS, LABELS))
    return found


def test_the_best_is_bold_where_it_is_far_ahead_and_nowhere_by_chance() -> None:
    clear = board.board(GRID, results({"text": 0.3, "retriever": 0.4, "rar": 0.9}))
    assert all(row.entries["rar"].bold for row in clear.rows)
    assert not any(row.entries[arm].bold for row in clear.rows for arm in ("text", "retriever"))
    even = [board.board(GRID, results({"text": 0.5, "retriever": 0.5, "rar": 0.5}, noise)) for noise in range(5)]
    assert not any(entry.bold for made in even for row in made.rows for entry in row.entries.values())


def test_an_arm_without_shots_stands_at_every_shot_count_and_averages_are_over_data_sets() -> None:
    made = board.board(GRID, results({"text": 0.3, "retriever": 0.4, "rar": 0.9}))
    assert [(row.dataset, row.shots) for row in made.rows] == [
        *itertools.product(("easy", "hard"), (1, 2)),
        ("average", 1),
        ("average", 2),
    ]
    for row in made.rows:
        assert set(row.entries) == {"text", "retriever", "rar"}
    by = {(row.dataset, row.shots): row for row in made.rows}
    for arm in GRID.arms:
        mean = np.mean([by[name, 1].entries[arm].value for name in ("easy", "hard")])
        assert by["average", 1].entries[arm].value == pytest.approx(mean)


def test_claims_say_where_ours_falls_short() -> None:
    good = board.board(GRID, results({"text": 0.3, "retriever": 0.4, "rar": 0.9})).claims
    assert any("is at or above all arms" in one for one in good) and "is nowhere below its retriever" in good[-1]
    bad = board.board(GRID, results({"text": 0.95, "retriever": 0.9, "rar": 0.4})).claims
    assert "is below `text`" in bad[0] and "is below its retriever on easy at 1 shots" in bad[-1]


def test_each_top_k_is_compared_with_its_own_retriever() -> None:
    grid = config.validated(Grid, {**GRID.model_dump(), "top_k": [3, 5]})
    good = results({"text": 0.3, "retriever": 0.4, "rar": 0.9})
    bad = results({"text": 0.3, "retriever": 0.9, "rar": 0.4})
    found = [one._replace(cell=replace(one.cell, top_k=k)) for k, some in ((3, bad), (5, good)) for one in some]
    said = board.board(grid, found).claims
    assert len(said) == 2 * (2 + 1)
    assert all("`rar/k3`" in line and "below" in line for line in said[:3]) and "`retriever/k3` (" in said[0]
    assert all("`rar/k5`" in line for line in said[3:]) and "is at or above all arms" in said[3]
    assert "is nowhere below its retriever" in said[5]


def test_the_csv_has_a_row_a_cell_and_the_tables_the_same_numbers() -> None:
    found = results({"text": 0.3, "retriever": 0.4, "rar": 0.9})
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(rows) == len(found)
    needed = {"dataset", "shots", "seed", "arm", "top1", "ci_low", "ci_high", "ranked_fraction", "mllm_calls"}
    assert needed <= set(rows[0])
    assert {row["mllm_calls"] for row in rows if row["arm"] == "rar"} == {"120"}
    made = board.board(GRID, found)
    first = made.rows[0].entries["rar"]
    assert tables.cell_text(first) in tables.as_markdown(GRID, made)
    assert rf"\textbf{{{100 * first.value:.1f}}}" in tables.as_latex(GRID, made)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_agree_with_all_signs_tried(gains: list[int]) -> None:
    """The drawn p value is near the exact one; 10,000 draws leave a standard error of at most .005."""
    real = [gain for gain in gains if gain]
    signs = list(itertools.product((-1, 1), repeat=len(real)))
    exact = np.mean([abs(np.dot(one, real)) >= abs(sum(real)) for one in signs]) if real else 1.0
    assert intervals.sign_flip(gains, seed=0) == pytest.approx(exact, abs=0.025)


def test_recorded_cells_without_shots_have_a_row_and_published_numbers_stand_beside_what_is_like_them() -> None:
    grid = config.validated(
        Grid,
        {
            "datasets": {"cars": {"published": "stanford_cars"}, "pets": {"published": "oxford_pets"}},
            "arms": {"rar": {}},
            "shots": [0, 4],
            "seeds": [0],
        },
    )
    found = []
    for dataset, shots in (("cars", 0), ("pets", 4), ("pets", 1)):
        correct = np.arange(len(LABELS)) % 2 == 0
        values: dict[str, float | None] = {"images": float(len(LABELS)), "ranked_fraction": 1.0}
        found.append(Result(Cell(dataset, shots, 0, "", "rar", 5), "top1", 0.5, 0.4, 0.6, values, correct, LABELS, LABELS))
    made = board.board(grid, found)
    rows = {(row.dataset, row.shots): row for row in made.rows}
    assert set(rows) == {("cars", 0), ("pets", 4), ("pets", 1)}
    assert rows["pets", 4].published["RAR (LLaVA1.5), table 2"] == pytest.approx(0.609)
    assert rows["pets", 1].published == {}  # the paper's 1-shot cells are not known, and a full training set is no like
    assert rows["cars", 0].published["GPT-4V, table 10"] == pytest.approx(0.583)
    text = tables.as_markdown(grid, made)
    assert "RAR (LLaVA1.5), table 2 (published)" in text and "not measured here" in text
