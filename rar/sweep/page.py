"""The page of a sweep: the leaderboard, curves over shots and k, what ranking adds and costs, confusions. One file, no script.

It is written again while the sweep runs, from the cells that are done.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rar.report import figures
from rar.report.page import percent
from rar.sweep.board import arm_of
from rar.sweep.grid import Cell

if TYPE_CHECKING:
    from rar.sweep.board import Board, Result, Row
    from rar.sweep.splits import Split
    from rar.sweep.state import Sweep

CONFUSIONS = 20


def render(sweep: Sweep, every: Sequence[Cell], found: Sequence[Result], made: Board, halved: Sequence[Split] = ()) -> str:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader("rar.sweep", "."), PackageLoader("rar.report", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals["percent"] = percent
    shares = {one.cell.name: one.values.get("ranked_fraction") or 0.0 for one in found}
    gains = _gains(sweep, found)
    return environment.get_template("page.html.j2").render(
        title=sweep.grid.title,
        total=len(every),
        done=len(sweep.done),
        failed=sweep.failed,
        left=len(every) - len(sweep.done) - len(sweep.failed),
        datasets=len({one.cell.dataset for one in found}),
        arms=made.arms,
        rows=made.rows,
        claims=made.claims,
        references=made.references,
        differs=made.differs,
        described=sweep.grid.arms,
        ours=sweep.grid.ours,
        figures=_over_shots(made) + _over_k(made) + _frontier(made) + _gain_figure(gains),
        gains=gains,
        halved=halved,
        asking=any(shares.values()),
        confusions=_confusions(sweep, found),
        cells=[{"name": one.cell.name, "value": one.value, "asked": shares[one.cell.name]} for one in found],
    )


def _over_shots(made: Board) -> list[dict[str, str]]:
    """One figure a data set that has two shot counts or more."""
    drawn = []
    for dataset in dict.fromkeys(row.dataset for row in made.rows):
        rows = [row for row in made.rows if row.dataset == dataset and row.shots]
        if len(rows) < 2:
            continue
        series = {arm: points for arm in made.arms if (points := _points(rows, arm))}
        svg = figures.curves(series, "shots", rows[0].metric, f"shots {dataset}", doubling=True)
        drawn.append({"title": f"{dataset}: over shots", "caption": "Bands are 95 % over classes.", "svg": svg})
    return drawn


def _over_k(made: Board) -> list[dict[str, str]]:
    """Of each data set at its most shots, the arms over top_k, where the grid has several."""
    drawn = []
    for dataset in dict.fromkeys(row.dataset for row in made.rows):
        row = max((row for row in made.rows if row.dataset == dataset), key=lambda row: row.shots)
        series: dict[str, list[tuple[float, figures.Interval]]] = {}
        for name, one in row.entries.items():
            arm, _, k = name.rpartition("/k")
            if arm and not math.isnan(one.value):
                series.setdefault(arm, []).append((int(k), (one.value, one.low, one.high)))
        if series:
            ordered = {arm: sorted(points) for arm, points in series.items()}
            svg = figures.curves(ordered, "top_k", row.metric, f"k {dataset}", doubling=True)
            title = f"{dataset}, {row.shots} shots: over top_k"
            drawn.append(
                {"title": title, "caption": "Candidates kept for each picture. Bands are 95 % over classes.", "svg": svg}
            )
    return drawn


def _gain_figure(gains: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What ranking adds, by how good the retriever is: one line a data set."""
    series: dict[str, list[tuple[float, figures.Interval]]] = {}
    for one in gains:
        series.setdefault(one["dataset"], []).append((one["retriever"], (one["gain"], one["low"], one["high"])))
    if len(gains) < 2:
        return []
    svg = figures.curves(series, "accuracy of the retriever", "gain by ranking", "gains")
    return [{"title": "What ranking adds", "caption": "By the accuracy of the retriever alone. Bands are 95 %.", "svg": svg}]


def _points(rows: Sequence[Row], arm: str) -> list[tuple[float, figures.Interval]]:
    there = [(row.shots, row.entries[arm]) for row in rows if arm in row.entries]
    return [(shots, (one.value, one.low, one.high)) for shots, one in there if not math.isnan(one.value)]


def _frontier(made: Board) -> list[dict[str, str]]:
    """Accuracy against the share asked: of the averages, or of the first data set where there is only one."""
    rows = [row for row in made.rows if row.dataset == "average"] or made.rows[-1:]
    drawn = []
    for row in rows[-1:]:
        series = {arm: [(one.asked, (one.value, one.low, one.high))] for arm, one in row.entries.items()}
        svg = figures.curves(series, "share the MLLM is asked about", row.metric, f"frontier {row.shots}")
        title = f"{row.dataset}, {row.shots} shots: accuracy against cost"
        drawn.append({"title": title, "caption": "Up and to the left is better.", "svg": svg})
    return drawn


def _gains(sweep: Sweep, found: Sequence[Result]) -> list[dict[str, Any]]:
    """Ours against its retriever, by data set (with encoder and top_k, of several) and shots, the weakest retriever first."""
    from rar.evaluation import intervals

    ours, retriever = sweep.grid.ours, sweep.grid.retriever
    if ours is None or retriever is None:
        return []
    by_cell = {one.cell: one for one in found if len(one.correct)}
    rows = []
    mine = [cell for cell in by_cell if cell.arm == ours]
    for first in dict.fromkeys(replace(cell, seed=0) for cell in mine):
        cells = [cell for cell in mine if replace(cell, seed=0) == first]
        pairs = [(by_cell[cell], by_cell.get(replace(cell, arm=retriever))) for cell in cells]
        whole = [(a, b) for a, b in pairs if b is not None]
        if not whole:
            continue
        right, base = (np.concatenate([pair[place].correct for pair in whole]) for place in (0, 1))
        gain, low, high = intervals.paired_difference(right, base, np.concatenate([a.labels for a, _ in whole]), seed=0)
        asked = float(np.mean([a.values.get("ranked_fraction") or 0.0 for a, _ in whole]))
        counts = {"won": int((right & ~base).sum()), "lost": int((base & ~right).sum()), "retriever": float(base.mean())}
        place: dict[str, Any] = {"dataset": first.dataset + arm_of(sweep.grid, first).removeprefix(ours), "shots": first.shots}
        rows.append({**place, "gain": gain, "low": low, "high": high, "asked": asked, **counts})
    return sorted(rows, key=lambda row: row["retriever"])


def _confusions(sweep: Sweep, found: Sequence[Result]) -> list[dict[str, Any]]:
    """The most frequent (true, predicted) of our arm, over all its cells."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for one in found:
        if one.cell.arm == sweep.grid.ours and len(one.labels):
            for true, predicted in zip(one.labels.tolist(), one.predicted.tolist(), strict=True):
                if true != predicted:
                    counts[one.cell.dataset, true, predicted or "(nothing)"] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    return [{"dataset": d, "true": true, "predicted": predicted, "count": count} for (d, true, predicted), count in ordered]
