from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import schema
from rar.evaluation import metrics
from rar.evaluation.intervals import wilson

Row = tuple[list[str], list[int], str, str]  # candidate names, ranking, rank_status, predicted name


def table(rows: Sequence[Row]) -> pa.Table:
    records = [
        {
            "image_id": f"{i:032x}",
            "uri": f"{i}.jpg",
            "box_xyxy": None,
            "candidates": [{"class_id": len(name), "class_name": name, "score": -float(k)} for k, name in enumerate(names)],
            "ranking": ranking,
            "rank_status": status,
            "response": "",
            "scores": [],
            "routed": status != "skipped",
            "class_id": 0,
            "class_name": predicted,
            "score": 0.5,
            "label_mass": 1.0 - i / 10 if status == "ranked" else None,
            "label_first": i == 0 if status == "ranked" else None,
        }
        for i, (names, ranking, status, predicted) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=schema.PREDICTIONS)


FIVE = [
    (["cat", "dog"], [1, 0], "ranked", "dog"),  # dog: won
    (["cat", "dog"], [1, 0], "repaired", "dog"),  # cat: lost
    (["cat", "dog"], [0, 1], "fallback", "cat"),  # fox: not a candidate
    (["dog", "cat"], [0, 1], "skipped", "dog"),  # dog: right, not asked
    (["dog", "cat"], [0, 1], "ranked", "dog"),  # unlabelled
]
FIVE_TRUTH = ["dog", "cat", "fox", "dog", None]


def test_numbers_that_can_be_counted_by_hand() -> None:
    got = metrics.classification(table(FIVE), FIVE_TRUTH, vocabulary=["cat", "dog"])
    expected = {
        "top1": 2 / 4,
        "top5": 3 / 4,
        "retriever_top1": 2 / 4,
        "candidate_recall": 3 / 4,
        "conditional_rank_accuracy": 1 / 2,
        "rank_gain": 0.0,
        "flips_won": 1,
        "flips_lost": 1,
        "ranked_fraction": 4 / 5,
        "parse_failures": 1,
        "repaired": 1,
        "mean_candidates": 2,
        "label_mass": pytest.approx((1.0 + 0.6) / 2),  # of the rows where labels were read
        "label_first": 1 / 2,
        "images": 5,
        "labelled": 4,
        "out_of_vocabulary": 1,
    }
    assert {key: got[key] for key in expected} == expected
    assert set(got) - set(expected) == {
        f"{name}.ci_{side}"
        for name in (
            "top1",
            "mean_per_class",
            "top5",
            "retriever_top1",
            "candidate_recall",
            "conditional_rank_accuracy",
            "rank_gain",
        )
        for side in ("low", "high")
    } | {"top1.class_ci_low", "top1.class_ci_high", "mean_per_class"}
    assert (got["top1.ci_low"], got["top1.ci_high"]) == wilson(2, 4)


def test_top5_follows_the_final_order_not_the_retrievers() -> None:
    names = list("abcdefg")
    reversed_order = [6, 5, 4, 3, 2, 1, 0]
    got = metrics.classification(table([(names, reversed_order, "ranked", "g")] * 3), ["c", "b", "g"])
    assert got["top5"] == pytest.approx(2 / 3)


def test_a_prediction_pulled_to_the_front_moves_the_others_back() -> None:
    rows = table([(list("abcdef"), [0, 1, 2, 3, 4, 5], "ranked", "f")] * 3)
    found = metrics.outcomes(rows, ["f", "d", "e"])
    assert found.correct_at_5.tolist() == [True, True, False]
    assert found.correct.tolist() == [True, False, False]


def test_a_name_that_occurs_twice_counts_at_its_best_place() -> None:
    found = metrics.outcomes(table([(["x", "a", "x"], [2, 1, 0], "ranked", "x")]), ["x"])
    assert (found.retriever_correct.tolist(), found.correct.tolist()) == ([True], [True])


def test_no_labels_give_nan_and_null_never_zero() -> None:
    got = metrics.classification(table(FIVE), [None] * 5)
    assert math.isnan(got["top1"]) and math.isnan(got["top1.ci_low"]) and math.isnan(got["conditional_rank_accuracy"])
    assert (got["images"], got["labelled"], got["ranked_fraction"]) == (5, 0, 0.8)


def test_an_empty_run_is_not_an_error() -> None:
    got = metrics.classification(schema.PREDICTIONS.empty_table(), [])
    assert got["images"] == 0 and math.isnan(got["top1"])
    assert metrics.per_class(schema.PREDICTIONS.empty_table(), []).num_rows == 0


def test_nothing_ranked_leaves_the_conditional_accuracy_undefined() -> None:
    got = metrics.classification(table([(["a", "b"], [0, 1], "skipped", "a")]), ["a"])
    assert got["ranked_fraction"] == 0 and math.isnan(got["conditional_rank_accuracy"])


@pytest.mark.parametrize("ranking", [[0], [0, 0], [0, 2], [-1, 0]])
def test_a_ranking_that_is_no_permutation_is_refused(ranking: list[int]) -> None:
    rows = table(
        [(["a", "b"], [1, 0], "ranked", "b"), (["a", "b"], ranking, "ranked", "a"), (["a", "b"], [1, 0], "ranked", "b")]
    )
    with pytest.raises(ValueError, match="ranking"):
        metrics.outcomes(rows, ["a", "b", "a"])


def test_as_many_labels_as_rows() -> None:
    with pytest.raises(ValueError, match="5 predictions but 1 labels"):
        metrics.classification(table(FIVE), ["dog"])


def test_per_class_and_confusions() -> None:
    rows = metrics.per_class(table(FIVE), FIVE_TRUTH).to_pylist()
    assert [(row["class_name"], row["images"], row["top1"], row["candidate_recall"]) for row in rows] == [
        ("cat", 1, 0, 1),
        ("dog", 2, 1, 1),
        ("fox", 1, 0, 0),
    ]
    assert (rows[1]["ci_low"], rows[1]["ci_high"]) == wilson(2, 2)
    assert metrics.confusions(table(FIVE), FIVE_TRUTH) == [("cat", "dog", 1), ("fox", "cat", 1)]
    assert metrics.confusions(table(FIVE), FIVE_TRUTH, limit=1) == [("cat", "dog", 1)]


def test_what_was_called_nothing_at_all_is_a_confusion_too() -> None:
    """A model asked over a whole vocabulary may name none of it."""
    rows = [{"class_name": name} for name in ("cat", None, None, "dog", None)]
    told = metrics.confusions(pa.Table.from_pylist(rows, schema=schema.PREDICTIONS), ["dog", "dog", "fox", "fox", None])
    assert told == [("dog", None, 1), ("dog", "cat", 1), ("fox", None, 1), ("fox", "dog", 1)]


def test_asked_curve_asks_the_least_certain_first() -> None:
    def row(second: float, predicted: str, status: str) -> dict[str, object]:
        scores = [("a", 1.0), ("b", second)]
        candidates = [{"class_id": 0, "class_name": name, "score": score} for name, score in scores]
        order = [0, 1] if predicted == "a" else [1, 0]
        return {"candidates": candidates, "ranking": order, "rank_status": status, "class_name": predicted}

    rows = [row(0.5, "b", "ranked"), row(0.9, "b", "ranked"), row(0.2, "a", "ranked"), row(0.1, "a", "skipped")]
    predictions = pa.Table.from_pylist(rows, schema=schema.PREDICTIONS)
    fractions, top1 = metrics.asked_curve(predictions, ["a", "b", "b", "a"])
    assert fractions.tolist() == [0, 0.25, 0.5, 0.75]
    assert top1.tolist() == [0.5, 0.75, 0.5, 0.5]  # the smallest margin is won, the next lost, the last unchanged
    assert top1[-1] == metrics.classification(predictions, ["a", "b", "b", "a"])["top1"]


rows_and_truth = st.lists(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=8, unique=True).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.permutations(range(len(names))),
            st.sampled_from([status.value for status in schema.RankStatus]),
            st.sampled_from(names),
            st.one_of(st.none(), st.sampled_from("abcdefghijk")),
        )
    ),
    max_size=12,
)


@given(rows_and_truth)
def test_outcomes_agree_with_plain_python(rows: list[tuple[list[str], list[int], str, str, str | None]]) -> None:
    found = metrics.outcomes(table([row[:4] for row in rows]), [row[4] for row in rows])
    for i, (names, ranking, status, predicted, true) in enumerate(rows):
        order = [predicted] + [names[k] for k in ranking if names[k] != predicted]
        assert found.labelled[i] == (true is not None)
        assert found.correct[i] == (predicted == true)
        assert found.correct_at_5[i] == (true in order[:5])
        assert found.retriever_correct[i] == (names[0] == true)
        assert found.recalled[i] == (true in names)
        assert found.asked[i] == (status != "skipped")


def test_chunked_tables_give_the_same_numbers() -> None:
    whole = table(FIVE)
    pieces = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 3)])
    assert pieces["candidates"].num_chunks == 2
    assert metrics.classification(pieces, FIVE_TRUTH) == metrics.classification(whole, FIVE_TRUTH)
