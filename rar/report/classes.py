"""Where a run errs: its weakest classes, and the classes that it confuses most, each with pictures of both.

Drawn from the rows of a RunView: of a large run these are some shards (view.SHOWN), as for all pictures.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from rar.evaluation import metrics
from rar.report import cards
from rar.report.view import RunView
from rar.schema import RowError

WEAKEST, PAIRS, EXAMPLES = 12, 6, 3


def weakest(run: RunView) -> list[dict[str, Any]]:
    """The classes with the lowest top-1 that have a mistake, of equal ones those with most pictures first.

    Each with its pictures, top-1, interval (Wilson), candidate recall, and the name it is most often given instead.
    """
    mistaken: dict[str, Counter[str]] = {}
    for true, predicted, count in metrics.confusions(run.predictions, run.truth, limit=len(run.truth)):
        mistaken.setdefault(true, Counter())[predicted or "(nothing)"] += count
    rows = [row for row in metrics.per_class(run.predictions, run.truth).to_pylist() if row["class_name"] in mistaken]
    rows.sort(key=lambda row: (row["top1"], -row["images"], row["class_name"]))
    return [row | dict(zip(("called", "times"), _first(mistaken[row["class_name"]]), strict=True)) for row in rows[:WEAKEST]]


def _first(counts: Counter[str]) -> tuple[str, int]:
    return min(counts.items(), key=lambda item: (-item[1], item[0]))


def pairs(run: RunView) -> list[dict[str, Any]]:
    """The most frequent (true, predicted): how often, some of the pictures, and pictures that are rightly called so."""
    predicted = np.array(run.predictions["class_name"].to_pylist(), object)
    truth = np.array(run.truth, object)
    found = []
    for true, name, count in metrics.confusions(run.predictions, run.truth, PAIRS):
        wrong = np.flatnonzero((truth == true) & (predicted == name))
        right = np.flatnonzero((truth == name) & (predicted == name) & (name is not None))
        shown = {"wrong": _pictures(run, wrong), "right": _pictures(run, right)}
        found.append({"true": true, "predicted": name or "(nothing)", "count": count, **shown})
    return found


def _pictures(run: RunView, rows: np.ndarray) -> list[dict[str, str]]:
    """Those of some rows that can still be read."""
    found = []
    for row in cards.spread(rows, EXAMPLES).tolist() if len(rows) else []:
        try:
            small = cards.thumbnail(run, row, cards.picture(run, int(run.places[row])))
        except RowError:
            continue
        found.append(small | {"uri": run.predictions["uri"][row].as_py()})
    return found
