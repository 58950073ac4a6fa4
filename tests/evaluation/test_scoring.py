"""The score rules against obvious answers, and the results file against the json module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rar.corpus import truth
from rar.evaluation.scoring import Detections, Rule, category_places, class_scores, detections, together, write_coco_results
from rar.schema import UserError

CATEGORIES = {"cat": 0, "dog": 1, "cow": 2}
TRUTH = truth.read(
    {
        "images": [{"id": f"{i:03}"} for i in range(9)],
        "categories": [{"id": i, "name": name} for i, name in ((1, "cat"), (2, "dog"), (7.5, "cow"))],
    }
)


def test_the_rules_by_hand() -> None:
    s, p = np.array([0.5, 1.0]), np.array([[0.8, 0.2], [0.4, 0.1]])
    np.testing.assert_allclose(class_scores("product", s, p), [[0.4, 0.1], [0.4, 0.1]])
    np.testing.assert_allclose(class_scores("class", s, p), p)
    np.testing.assert_allclose(class_scores("proposal", s, p), [[0.5, 0.125], [1.0, 0.25]])
    np.testing.assert_allclose(class_scores("geometric", np.array([0.125]), np.array([[1.0, 0.001]])), [[0.5, 0.005]])


def test_no_boxes_no_classes_and_no_probability() -> None:
    for rule in get_args(Rule):
        assert class_scores(rule, np.zeros(0), np.zeros((0, 5))).shape == (0, 5)
        assert class_scores(rule, np.ones(2), np.zeros((2, 0))).shape == (2, 0)
        assert (class_scores(rule, np.ones(2), np.zeros((2, 3))) == 0).all()


shares = arrays(np.float64, (4, 3), elements=st.floats(0, 1))
proposals = arrays(np.float64, 4, elements=st.floats(0.0625, 1))


@pytest.mark.parametrize("rule", get_args(Rule))
@given(proposals, shares)
def test_every_rule_keeps_the_order_of_a_box_s_classes(rule: Rule, s: np.ndarray, p: np.ndarray) -> None:
    scores = class_scores(rule, s, p)
    assert ((scores >= 0) & (scores <= 1)).all()
    by_probability = np.take_along_axis(scores, np.argsort(p, axis=1), axis=1)
    assert (np.diff(by_probability, axis=1) >= 0).all()


@pytest.mark.parametrize("rule", get_args(Rule))
@given(proposals, shares)
def test_a_better_proposal_never_scores_less(rule: Rule, s: np.ndarray, p: np.ndarray) -> None:
    assert (class_scores(rule, s, p) >= class_scores(rule, s / 2, p)).all()


@given(shares)
def test_with_given_boxes_product_is_class(p: np.ndarray) -> None:
    np.testing.assert_array_equal(class_scores("product", np.ones(4), p), class_scores("class", np.ones(4), p))


def test_product_is_the_best_order_when_both_factors_are_calibrated() -> None:
    """20,000 boxes that hold an object with chance s, of class 0 with chance p: AP of class 0 by each rule."""
    rng = np.random.default_rng(0)
    s, first = rng.random(20_000), rng.random(20_000) ** 2
    p = np.stack([first, 1 - first], axis=1)
    right = (rng.random(20_000) < s) & (rng.random(20_000) < first)
    ap = {rule: average_precision(class_scores(rule, s, p)[:, 0], right) for rule in get_args(Rule)}
    assert max(ap, key=ap.__getitem__) == "product"
    assert ap["product"] > ap["class"] + 0.1 and ap["product"] > ap["proposal"] + 0.03


def average_precision(scores: np.ndarray, right: np.ndarray) -> float:
    hits = right[np.argsort(-scores)]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def two_boxes(rule: Rule = "product", classes_per_box: int = 5) -> Detections:
    boxes = np.array([[10.0, 20, 13, 24], [0, 0, 5.004, 5]])
    names, probabilities = [["dog", "cat", "cow"], ["cat"]], [[0.25, 0.5, 0.25], [0.9]]
    return detections([7, 3], boxes, [0.5, 1.0], names, probabilities, CATEGORIES, rule, classes_per_box)


def test_detections_are_a_box_and_a_class_each() -> None:
    found = two_boxes()
    assert found.images.tolist() == [7, 7, 7, 3]
    assert found.categories.tolist() == [0, 1, 2, 0]  # likeliest first; dog before cow as given
    assert found.boxes_xywh.tolist() == [[10, 20, 3, 4]] * 3 + [[0, 0, 5, 5]]
    assert found.scores.tolist() == [0.25, 0.125, 0.125, 0.9]


def test_classes_per_box_keeps_the_likeliest() -> None:
    assert two_boxes(classes_per_box=2).categories.tolist() == [0, 1, 0]
    assert two_boxes("proposal", 1).scores.tolist() == [0.5, 1.0]


def test_boxes_without_candidates_and_no_boxes() -> None:
    one = detections([7, 8], np.zeros((2, 4)), [1, 1], [[], ["cow"]], [[], [0.0]], CATEGORIES, "class", 3)
    assert (one.images.tolist(), one.categories.tolist(), one.scores.tolist()) == ([8], [2], [0.0])
    none = detections([], np.zeros((0, 4)), [], [], [], CATEGORIES, "product", 3)
    assert [len(column) for column in none] == [0, 0, 0, 0] and none.boxes_xywh.shape == (0, 4)


def test_faults_of_the_caller() -> None:
    with pytest.raises(UserError, match=r"1 classes .* 'horse'"):
        detections([7], np.zeros((1, 4)), [1.0], [["horse"]], [[1.0]], CATEGORIES, "product", 1)
    with pytest.raises(UserError, match="1 category names stand for several ids, the first is 'cat'"):
        category_places(["cat", None, "dog", "cat", None])
    with pytest.raises(ValueError, match="differ in number"):
        detections([7], np.zeros((1, 4)), [1.0], [["cat"]], [[1.0, 0.5]], CATEGORIES, "product", 1)


def test_parts_together_are_the_whole() -> None:
    parts = [two_boxes(), two_boxes(classes_per_box=1)]
    for ours, theirs in zip(together(list(parts)), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(ours, np.concatenate(theirs))
    assert [(column.shape, column.dtype) for column in together([])] == [(one[:0].shape, one.dtype) for one in two_boxes()]


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=20))
def test_scores_have_six_digits(values: list[float]) -> None:
    box = np.zeros((len(values), 4))
    names, probabilities = [["cat"]] * len(values), [[value] for value in values]
    found = detections([1] * len(values), box, np.ones(len(values)), names, probabilities, CATEGORIES, "class", 1)
    np.testing.assert_allclose(found.scores, values, rtol=6e-6)
    assert all(len(repr(score).split("e")[0].replace(".", "").strip("0")) <= 6 for score in found.scores.tolist())


def test_the_file_is_coco_s_results_format(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    assert write_coco_results(path, [two_boxes(), two_boxes(classes_per_box=1)], TRUTH) == 6
    rows = json.loads(path.read_text())
    assert len(rows) == 6 and rows[3] == {"image_id": "003", "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.9}
    whole = two_boxes()
    assert [row["category_id"] for row in rows] == [1, 2, 7.5, 1, 1, 1]  # as the truth writes them
    assert [row["score"] for row in rows[:4]] == whole.scores.tolist()
    assert [row["bbox"] for row in rows[:4]] == whole.boxes_xywh.tolist()


def test_no_detections_are_an_empty_list(tmp_path: Path) -> None:
    for parts in ([], [detections([], np.zeros((0, 4)), [], [], [], CATEGORIES, "product", 3)]):
        assert write_coco_results(tmp_path / "none.json", parts, TRUTH) == 0
        assert json.loads((tmp_path / "none.json").read_text()) == []


def test_a_broken_write_leaves_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[Detections]:
        yield two_boxes()
        raise RuntimeError("the disk is full")

    write_coco_results(tmp_path / "found.json", [two_boxes()], TRUTH)
    before = (tmp_path / "found.json").read_text()
    with pytest.raises(RuntimeError):
        write_coco_results(tmp_path / "found.json", broken(), TRUTH)
    assert (tmp_path / "found.json").read_text() == before and len(list(tmp_path.iterdir())) == 1
