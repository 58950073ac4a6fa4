"""The weakest classes and the most confused pairs, counted again from the rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pyarrow as pa
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


def test_rows_without_a_prediction_are_told_as_nothing(run: RunView) -> None:
    rows = run.predictions.to_pylist()
    first = run.truth[0]
    for row, truth in zip(rows, run.truth, strict=True):
        row["class_name"] = None if truth == first else row["class_name"]
    silent = replace(run, predictions=pa.Table.from_pylist(rows, schema=run.predictions.schema))
    told = classes.pairs(silent)[0]
    assert (told["true"], told["predicted"]) == (first, "(nothing)") and told["wrong"] and not told["right"]
    assert next(row for row in classes.weakest(silent) if row["class_name"] == first)["called"] == "(nothing)"
