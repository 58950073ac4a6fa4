"""What a sweep came to: its results, arms side by side, and what may be claimed of them.

Everything is read from the run folders, so that a table is the same however often the sweep was killed. An accuracy's interval
is over classes (see evaluation.intervals), pooled over the seeds of a row. The best of a row is bold only where it beats every
other arm there with all comparisons of the table in view: sign flips over classes, corrected after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rar.columns import positions
from rar.evaluation import intervals, metrics
from rar.evaluation.published import published
from rar.runfolder import RunFolder, read_table
from rar.sweep.grid import Cell, Grid
from rar.sweep.state import Sweep

SIGNIFICANT = 0.05


class Result(NamedTuple):
    """One finished cell. value: its data set's metric. correct, labels, predicted: (N,) of its labelled rows; empty for AP."""

    cell: Cell
    metric: str
    value: float
    low: float
    high: float
    values: dict[str, float | None]
    correct: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray


def results(sweep: Sweep, every: Sequence[Cell]) -> list[Result]:
    """Of all finished cells, in the grid's order."""
    return [
        _read(sweep.folder(cell), cell, sweep.grid.datasets[cell.dataset].metric) for cell in every if cell.name in sweep.done
    ]


@lru_cache(maxsize=4096)  # a finished cell does not change while a sweep runs
def _read(folder: Path, cell: Cell, metric: str) -> Result:
    run = RunFolder(folder)
    values = run.read("metrics.json")
    if run.read("run.json")["verb"] == "detect" or metric != "top1":
        low, high = (values.get(f"{metric}.ci_{side}") for side in ("low", "high"))
        value, low, high = (np.nan if one is None else float(one) for one in (values.get(metric), low, high))
        return Result(cell, metric, value, low, high, values, np.zeros(0, bool), np.zeros(0, str), np.zeros(0, str))
    predictions, index = run.predictions().sort_by("row"), read_table(folder / "index.parquet")
    truth = index["label"].take(pa.array(positions(predictions["row"], index))).to_pylist()
    found = metrics.outcomes(predictions, truth)
    labels = np.asarray(truth, object)[found.labelled].astype(str)
    correct = found.correct[found.labelled]
    predicted = np.asarray(predictions["class_name"].to_pylist(), object)[found.labelled]
    return Result(cell, metric, *intervals.accuracy(correct, labels, seed=0), values, correct, labels, predicted)


@dataclass(frozen=True)
class Entry:
    """An arm in a row of a table. value: mean over the row's cells; bold: best, and significantly so.

    low, high: over classes. over_seeds: half of the 95 % interval over draws of the shots; NaN of one draw, and of an average.
    """

    value: float
    low: float
    high: float
    asked: float
    over_seeds: float = math.nan
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A data set (or "average") at a number of shots. entries: arm -> entry, of the arms that are done there.

    published: method -> what the paper says for this data set and number of shots, a fraction; not measured here.
    """

    dataset: str
    shots: int
    metric: str
    seeds: int
    entries: dict[str, Entry]
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """The table of arms. arms: in the grid's order, those with a result. claims: what holds and what does not, in sentences.

    references: the paper's methods that have a number in some row. differs: what is other in their protocols.
    """

    arms: list[str]
    rows: list[Row]
    claims: list[str]
    references: list[str]
    differs: list[str]


Pooled = dict[tuple[str, int], dict[str, list[Result]]]  # (data set, shots) -> arm -> its cells, one a seed


def board(grid: Grid, found: Sequence[Result]) -> Board:
    """Arms side by side. Cells of a second encoder or top_k are arms of their own, `arm/encoder/k10`."""
    pooled, arms = _pooled(grid, found), []
    for one in found:
        if (name := arm_of(grid, one.cell)) not in arms:
            arms.append(name)
    rows = [_row(key, by_arm) for key, by_arm in pooled.items()]
    rows = _bold(rows + _averages(pooled), pooled)
    claims = _claims(grid, rows, pooled)
    rows, differs = _with_references(grid, rows)
    return Board(arms, rows, claims, list(dict.fromkeys(name for row in rows for name in row.published)), differs)


def arm_of(grid: Grid, cell: Cell) -> str:
    """What an arm is called in the tables: with the encoder and top_k, where the grid has several."""
    parts = [cell.arm, *[cell.encoder] * bool(cell.encoder), *[f"k{cell.top_k}"] * (len(grid.top_k) > 1)]
    return "/".join(parts)


def _pooled(grid: Grid, found: Sequence[Result]) -> Pooled:
    """Arms without support pictures stand at every number of shots of their data set."""
    pooled: Pooled = {}
    shots: dict[str, set[int]] = {}
    for one in found:
        shots.setdefault(one.cell.dataset, set()).add(one.cell.shots)
    for dataset in grid.datasets:
        there = shots.get(dataset, set())
        for count in sorted(there - {0} or there):
            by_arm = pooled.setdefault((dataset, count), {})
            for one in found:
                if one.cell.dataset == dataset and one.cell.shots in (count, 0):
                    by_arm.setdefault(arm_of(grid, one.cell), []).append(one)
    return pooled


def _joined(cells: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([one.correct for one in cells]), np.concatenate([one.labels for one in cells])


def _row(key: tuple[str, int], by_arm: dict[str, list[Result]]) -> Row:
    entries = {}
    for arm, cells in by_arm.items():
        correct, labels = _joined(cells)
        value, low, high = (float(np.mean([getattr(one, name) for one in cells])) for name in ("value", "low", "high"))
        if len(correct):
            value, low, high = intervals.accuracy(correct, labels, seed=0)
        asked = float(np.mean([one.values.get("ranked_fraction") or 0.0 for one in cells]))
        mean, _, most = intervals.over_seeds([one.value for one in cells])
        entries[arm] = Entry(value, low, high, asked, most - mean)
    cells = next(iter(by_arm.values()))
    return Row(*key, cells[0].metric, max(len(one) for one in by_arm.values()), entries)


def _averages(pooled: Pooled) -> list[Row]:
    """The mean over the data sets that have all of a row's arms, where there are two or more."""
    found = []
    for shots in sorted({shots for _, shots in pooled}):
        sets = {dataset: by_arm for (dataset, count), by_arm in pooled.items() if count == shots}
        metrics_ = {one.metric for by_arm in sets.values() for cells in by_arm.values() for one in cells}
        arms = [arm for arm in next(iter(sets.values())) if all(arm in by_arm for by_arm in sets.values())]
        if len(sets) < 2 or len(metrics_) > 1 or not arms:
            continue
        entries = {}
        for arm in arms:
            parts = [_row((dataset, shots), {arm: by_arm[arm]}).entries[arm] for dataset, by_arm in sets.items()]
            half = np.sqrt(np.sum([((one.high - one.low) / 2) ** 2 for one in parts])) / len(parts)  # data sets are independent
            value = float(np.mean([one.value for one in parts]))
            asked = float(np.mean([one.asked for one in parts]))
            entries[arm] = Entry(value, value - float(half), value + float(half), asked)
        seeds = max(len(cells) for by_arm in sets.values() for cells in by_arm.values())
        found.append(Row("average", shots, metrics_.pop(), seeds, entries))
    return found


def _bold(rows: Sequence[Row], pooled: Pooled) -> list[Row]:
    """Mark the best of each row that beats every other arm of it, corrected for all comparisons of the table."""
    tests: list[tuple[int, float]] = []
    leaders: dict[int, str] = {}
    for number, row in enumerate(rows):
        best = max(row.entries, key=lambda arm: (not np.isnan(row.entries[arm].value), row.entries[arm].value))
        gains = [gain for arm in row.entries if arm != best for gain in [_gain(row, best, arm, pooled)]]
        if len(row.entries) > 1 and all(len(gain) for gain in gains):
            leaders[number] = best
            tests += [(number, intervals.sign_flip(gain, seed=0)) for gain in gains]
    adjusted = intervals.holm([p for _, p in tests])
    worst: dict[int, float] = {}
    for (number, _), p in zip(tests, adjusted, strict=True):
        worst[number] = max(worst.get(number, 0.0), p)
    marked = []
    for number, row in enumerate(rows):
        arm = leaders.get(number)
        bold = {arm: replace(row.entries[arm], bold=True)} if arm is not None and worst[number] < SIGNIFICANT else {}
        marked.append(replace(row, entries={**row.entries, **bold}))
    return marked


def _gain(row: Row, a: str, b: str, pooled: Pooled) -> np.ndarray:
    """(classes,) what arm a is better than b by, a class; of an average, those of all data sets. Empty: nothing pairs."""
    sets = [dataset for dataset, shots in pooled if shots == row.shots] if row.dataset == "average" else [row.dataset]
    parts = [_class_gains(pooled[dataset, row.shots][a], pooled[dataset, row.shots][b]) for dataset in sets]
    return np.concatenate([part / max(1, len(part)) for part in parts]) if row.dataset == "average" else parts[0]


def _class_gains(a: Sequence[Result], b: Sequence[Result]) -> np.ndarray:
    (right_a, labels), (right_b, others) = _joined(a), _joined(b)
    if not len(labels) or not len(others):
        return np.zeros(0)
    names, group = np.unique(labels, return_inverse=True)
    if not np.isin(others, names).all() or len(np.unique(others)) != len(names):
        return np.zeros(0)
    other = np.searchsorted(names, others)
    mean_a = np.bincount(group, right_a, len(names)) / np.bincount(group, minlength=len(names))
    mean_b = np.bincount(other, right_b, len(names)) / np.bincount(other, minlength=len(names))
    return mean_a - mean_b


def _claims(grid: Grid, rows: Sequence[Row], pooled: Pooled) -> list[str]:
    """Whether ours is at or above all arms on average, and nowhere below its retriever beyond the interval.

    With several encoders or top_k, each is told apart, and compared with arms of its own.
    """
    if grid.ours is None:
        return []
    every = dict.fromkeys(name for row in rows for name in row.entries)
    variants = [name.removeprefix(grid.ours) for name in every if name.partition("/")[0] == grid.ours]
    return [line for variant in variants for line in _claims_of(grid, variant, rows, pooled)]


def _claims_of(grid: Grid, variant: str, rows: Sequence[Row], pooled: Pooled) -> list[str]:
    ours, retriever, said = f"{grid.ours}{variant}", f"{grid.retriever}{variant}", []
    for row in rows:
        if row.dataset != "average" or ours not in row.entries:
            continue
        others = {arm: one for arm, one in row.entries.items() if arm.removeprefix(arm.partition("/")[0]) == variant}
        above = [arm for arm, one in others.items() if one.value > row.entries[ours].value]
        at = f"{row.shots} shots" if row.shots else "no shots"
        named = ", ".join(f"`{arm}` ({row.entries[arm].value:.4f})" for arm in above)
        value = f"{row.entries[ours].value:.4f}"
        said.append(f"On average at {at}: `{ours}` {value} " + (f"is below {named}." if above else "is at or above all arms."))
    below, judged = [], 0
    for (dataset, shots), by_arm in pooled.items():
        if ours not in by_arm or retriever not in by_arm:
            continue
        pairs = [_joined(by_arm[arm]) for arm in (ours, retriever)]
        seeds = [[one.cell.seed for one in by_arm[arm]] for arm in (ours, retriever)]
        if len(pairs[0][0]) and seeds[0] == seeds[1]:
            judged += 1
            mean, low, high = intervals.paired_difference(pairs[0][0], pairs[1][0], pairs[0][1], seed=0)
            if high < 0:
                below.append(f"{dataset} at {shots} shots ({mean:+.3f} [{low:+.3f}, {high:+.3f}])")
    if judged:
        where = (
            f"is below its retriever on {'; '.join(below)}" if below else "is nowhere below its retriever beyond the interval"
        )
        said.append(f"Of {judged} data sets and shot counts, `{ours}` {where}.")
    return said


PUBLISHED_AS = {"top1": "top1", "cluster_accuracy": "cacc", "semantic_similarity": "sacc", "ap": "ap"}


def _with_references(grid: Grid, rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows with the paper's numbers beside, and lines on what is other in its protocols.

    A number over a whole training set stands only where no shots are counted: it has no like among 1 to 16 shots.
    """
    names = {name: one.published for name, one in grid.datasets.items()}
    told: dict[str, None] = {}
    found = []
    for row in rows:
        numbers = {}
        for one in published():
            like = one.shots == row.shots or (one.shots is None and (row.shots == 0 or one.metric != "top1"))
            if one.dataset == names.get(row.dataset) and one.metric == PUBLISHED_AS.get(row.metric) and like:
                numbers[f"{one.method}, table {one.table}"] = one.value / 100
                told |= dict.fromkeys(one.differs)
        found.append(replace(row, published=numbers))
    return found, list(told)
