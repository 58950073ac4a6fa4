"""Base and novel halves: which cells stand beside each other, and what their harmonic mean is."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import config
from rar.engine.session import Session
from rar.evaluation.metrics import harmonic_mean
from rar.sweep import grid, page, state, tables
from rar.sweep import run as sweeping
from rar.sweep.board import Result, board
from rar.sweep.grid import Cell, Grid
from rar.sweep.splits import splits
from tests.corpus.datasets import trees

NAMES = np.repeat([f"class {n:02d}" for n in range(10)], 4)


def half(name: str, which: str, **more: Any) -> dict[str, Any]:
    return {"config": {"corpus": {"dataset": name, "root": "/data", "split": "test", "classes": which}}, **more}


def grid_of(datasets: dict[str, Any], **more: Any) -> Grid:
    arms = {"text": {"per_shots": False}, "rar": {}}
    return config.validated(Grid, {"datasets": datasets, "shots": [1, 4], "seeds": [0, 1], "arms": arms, **more})


def result(made: Grid, cell: Cell, right: int) -> Result:
    """Right on the first so many of 40 pictures."""
    correct = np.arange(len(NAMES)) < right
    return Result(cell, "top1", float(correct.mean()), 0.0, 1.0, {"images": 40.0}, correct, NAMES, NAMES)


def rights(cell: Cell) -> int:
    return {"base": 30, "novel": 20}.get(cell.dataset.rpartition("_")[2], 36) + cell.shots + cell.seed


@given(st.floats(0, 1), st.floats(0, 1))
def test_harmonic_mean_is_the_inverse_of_the_mean_inverse(b: float, n: float) -> None:
    found = float(harmonic_mean(np.array(b), np.array(n)))
    expected = 2 / (1 / b + 1 / n) if b > 1e-9 and n > 1e-9 else 0.0
    assert found == pytest.approx(expected, abs=2e-9)


def test_the_published_average_follows_from_its_base_and_novel() -> None:
    """CoCoOp's averages over 11 data sets: 80.47 and 71.69 make 75.83."""
    assert float(harmonic_mean(np.array(80.47), np.array(71.69))) == pytest.approx(75.83, abs=0.005)


def test_halves_of_one_data_set_stand_beside_each_other_and_nothing_else_does() -> None:
    made = grid_of(
        {
            "pets_base": half("oxford_pets", "base"),
            "pets_novel": half("oxford_pets", "novel"),
            "cars_base": half("stanford_cars", "base"),
            "dtd": half("dtd", "all"),
        }
    )
    rows = splits(made, [result(made, cell, rights(cell)) for cell in grid.cells(made)])
    assert [(row.dataset, row.shots, row.arm, row.seeds) for row in rows] == [
        ("pets_base / pets_novel", shots, arm, seeds) for shots in (1, 4) for arm, seeds in (("text", 1), ("rar", 2))
    ]
    for row in rows:
        extra = row.shots + 0.5 if row.arm == "rar" else 0  # of the two seeds, one more
        base, novel = (30 + extra) / 40, (20 + extra) / 40
        assert (row.base[0], row.novel[0]) == pytest.approx((base, novel))
        value, low, high = row.harmonic()
        assert value == pytest.approx(2 * base * novel / (base + novel)) and low < value < high


def test_novel_classes_without_shots_are_known_by_name_alone_and_averages_are_of_averages() -> None:
    made = grid_of(
        {
            f"{name}_{which}": half(name, which, **({"shots": [0]} if which == "novel" else {}))
            for name in ("oxford_pets", "dtd")
            for which in ("base", "novel")
        }
    )
    found = [result(made, cell, rights(cell) + 4 * cell.dataset.startswith("dtd")) for cell in grid.cells(made)]
    rows = splits(made, found)
    own = {(row.dataset, row.shots): row for row in rows if row.arm == "rar"}
    assert own["oxford_pets_base / oxford_pets_novel", 4].novel[0] == pytest.approx(20.5 / 40)
    mean = own["average", 4]
    assert (mean.base[0], mean.novel[0]) == pytest.approx(((34.5 + 38.5) / 80, (20.5 + 24.5) / 80))
    assert mean.harmonic()[0] == pytest.approx(float(harmonic_mean(mean.base[:1], mean.novel[:1])[0]))
    part = own["dtd_base / dtd_novel", 4].harmonic()
    assert mean.harmonic()[2] - mean.harmonic()[1] < part[2] - part[1]  # two data sets are surer than one


def test_a_seed_or_a_half_that_is_not_done_is_left_out() -> None:
    made = grid_of({"b": half("dtd", "base"), "n": half("dtd", "novel")})
    found = [result(made, cell, 20) for cell in grid.cells(made)]
    some = [one for one in found if one.cell.dataset == "b" or (one.cell.shots, one.cell.seed) == (1, 1)]
    assert [(row.shots, row.arm, row.seeds) for row in splits(made, some)] == [(1, "rar", 1)]
    assert splits(made, [one for one in found if one.cell.dataset == "b"]) == []


def test_tables_and_page_have_them_where_there_are_some(tmp_path: Path) -> None:
    made = grid_of({"pets_base": half("oxford_pets", "base"), "pets_novel": half("oxford_pets", "novel")})
    found = [result(made, cell, rights(cell)) for cell in grid.cells(made)]
    rows, plain = splits(made, found), board(made, found)
    told = tables.as_markdown(made, plain, rows)
    assert "| pets_base / pets_novel | 1 | `text` | .750 | .500 | .600 [" in told
    assert r"pets\_base / pets\_novel & 1 & text & 75.0 & 50.0 & 60.0 \\" in tables.as_latex(made, plain, rows)
    assert "harmonic" not in tables.as_markdown(made, plain) and tables.as_latex(made, plain).count("tabular") == 2
    sweep = state.Sweep(made, tmp_path, {}, done={one.cell.name: 1.0 for one in found})
    shown = page.render(sweep, grid.cells(made), found, plain, rows)
    assert "<h2>Base and novel classes</h2>" in shown and shown.count("<td>75.0</td><td>50.0</td>") == 2
    assert "Base and novel" not in page.render(sweep, grid.cells(made), found, plain)


@pytest.mark.slow
def test_a_sweep_over_halves_of_a_data_set_by_name_tells_its_harmonic_mean(ray_session: Session, tmp_path: Path) -> None:
    """The whole way: a tree on disk, memories of each half, the table in leaderboard.md from the cells' own accuracies."""
    trees.make("eurosat", tmp_path / "data")
    for number, file in enumerate(sorted((tmp_path / "data").rglob("*.jpg"))):
        file.write_bytes(trees.picture(number))

    def one(which: str) -> dict[str, Any]:
        support = {"dataset": "eurosat", "split": "train", "classes": which, "root": str(tmp_path / "data")}
        return {"config": {"corpus": {**support, "split": "test"}, "memory": {"support": support}}}

    data = {
        "base": {"ranker": {"method": "none"}},
        "datasets": {"base": one("base"), "novel": one("novel")},
        "shots": [1],
        "seeds": [0],
        "arms": {"knn": {"config": {"retriever": {"mode": "knn"}}}, "fused": {}},
    }
    sweep, every = state.open_sweep(config.validated(Grid, data), tmp_path / "out")
    sweeping.run(sweep, every, every, None, print, lambda: None)
    tables.write(sweep, every)
    assert sweep.failed == {}
    cells = list(csv.DictReader(io.StringIO((tmp_path / "out/leaderboard.csv").read_text())))
    told = (tmp_path / "out/leaderboard.md").read_text()
    for arm in ("knn", "fused"):
        base, novel = (
            float(next(row["top1"] for row in cells if (row["dataset"], row["arm"]) == (half, arm)))
            for half in data["datasets"]
        )
        shown = [
            f"{value:.3f}".replace("0.", ".", 1)
            for value in (base, novel, float(harmonic_mean(np.array(base), np.array(novel))))
        ]
        assert f"| base / novel | 1 | `{arm}` | {shown[0]} | {shown[1]} | {shown[2]}" in told
    for cell in every:
        assert (sweep.folder(cell) / "report.html").is_file()
