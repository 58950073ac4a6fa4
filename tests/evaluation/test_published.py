"""The published numbers hold together: names that exist, averages that are averages, gains that the paper prints."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from rar.corpus.datasets.known import known
from rar.evaluation.published import published


def test_every_number_stands_beside_what_differs() -> None:
    assert len(published()) > 150
    for one in published():
        assert one.dataset in known() or one.dataset == "average"
        assert one.differs and all(one.differs) and 0 < one.value < 100 and one.title


def test_printed_averages_are_averages() -> None:
    """To the one decimal that was printed, of cells that are rounded, too."""
    rows: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for one in published():
        rows[one.table, one.title, one.method, one.metric][one.dataset] = one.value
    averages = {key: row.pop("average") for key, row in rows.items() if "average" in row}
    assert len(averages) == 20
    for key, average in averages.items():
        assert average == pytest.approx(float(np.mean(list(rows[key].values()))), abs=0.11), key


@pytest.mark.parametrize(
    ("table", "shots", "dataset", "metric", "gain"),
    [
        (2, 4, "average", "top1", 6.2),
        (2, 8, "average", "top1", 6.8),
        (2, 4, "oxford_flowers", "top1", -4.1),
        (9, 4, "average", "top5", 1.3),
    ],
)
def test_printed_gains(table: int, shots: int, dataset: str, metric: str, gain: float) -> None:
    found = {
        one.method: one.value
        for one in published()
        if (one.table, one.shots, one.dataset, one.metric) == (table, shots, dataset, metric)
    }
    assert found["RAR (LLaVA1.5)"] - found["CLIP+KNN"] == pytest.approx(gain, abs=0.051)
