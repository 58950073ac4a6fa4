"""The weakest classes and the most confused pairs, counted again from the rows."""

from __future__ import annotations

from collections import Counter

import pytest

from rar.report import classes
from rar.report.view import RunView, read_run
from tests.runs import classify_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return read_run(classify_run(tmp_path_factory.mktemp("runs"), "rar", "classify", 0.7, seed=4, ranks=True))


def test_the_weakest_classes_come_first_with_the_name_they_are_called(run: RunView) -> None:
    said = list(zip(run.truth, run.predictions["class_name"].to_pylist(), strict=True))
    top1 = {name: sum(a == b for a, b in said if a == name) / sum(a == name for a, _ in said) for name, _ in said if name}
    told = classes.weakest(run)
    worst = sorted(value for value in top1.values() if value < 1)[: classes.WEAKEST]
    assert [row["top1"] for row in told] == pytest.approx(worst) and len(told) > 3
    for row in told:
        wrong = Counter(b for a, b in said if a == row["class_name"] and a != b)
        assert row["times"] == wrong[row["called"]] == max(wrong.values())


def test_confused_pairs_have_pictures_of_both_sides(run: RunView) -> None:
    told = classes.pairs(run)
    counts = Counter((a, b) for a, b in zip(run.truth, run.predictions["class_name"].to_pylist(), strict=True) if a != b)
    assert [pair["count"] for pair in told] == [count for _, count in counts.most_common(classes.PAIRS)]
    for pair in told:
        assert counts[pair["true"], pair["predicted"]] == pair["count"]
        assert 0 < len(pair["wrong"]) <= min(pair["count"], classes.EXAMPLES)
    assert any(pair["right"] for pair in told)
