from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.retriever import votes
from rar.retriever.votes import Rule


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def ordered(cosines: list[float], columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return votes.nearest(np.array([cosines]), np.array([columns]))


def test_neighbors_are_ordered_by_cosine_then_class_and_padding_is_last() -> None:
    cosines, columns = ordered([0.5, -np.inf, 0.9, 0.5], [7, -1, 3, 2])
    assert cosines.tolist() == [[0.9, 0.5, 0.5, -np.inf]] and columns.tolist() == [[3, 2, 7, -1]]


def test_knn_weighs_votes_by_similarity_and_classes_by_their_size() -> None:
    """Class 0 has two near entries of four, class 1 one of one."""
    rule = Rule("knn", 10.0, 2.0)
    found = votes.knn(rule, *ordered([0.9, 0.8, 0.85], [0, 0, 1]), np.array([4, 1]), 3)
    assert found[0, 0] == pytest.approx(2 * math.log((math.exp(-1) + math.exp(-2)) / 4))
    assert found[0, 1] == pytest.approx(2 * math.log(math.exp(-1.5)))


def test_classes_of_later_neighbors_come_after_those_of_the_first() -> None:
    """Class 1 is a single entry behind the neighbors: its vote would outweigh class 0's, divided by ten."""
    rule = Rule("knn", 10.0, 1.0)
    found = votes.knn(rule, *ordered([0.9, 0.8, 0.7], [0, 1, 2]), np.array([10, 1, 1]), 1)
    assert found[0, 0] > found[0, 1] > found[0, 2] > -np.inf
    assert votes.knn(rule, *ordered([0.9, 0.8, 0.7], [0, 1, 2]), np.array([10, 1, 1]), 3)[0].argmax() == 1


def test_classes_without_an_entry_have_no_score_in_knn_and_no_vote_in_tip() -> None:
    neighbors = ordered([0.9, -np.inf], [1, -1])
    assert votes.knn(Rule("knn", 10.0, 1.0), *neighbors, np.array([3, 1, 2]), 2).tolist()[0][::2] == [-np.inf, -np.inf]
    found = votes.tip(Rule("tip", 10.0, 3.0), *neighbors, 3, 2)
    np.testing.assert_allclose(found, [[0, 3 * math.exp(-1), 0]])


def test_a_high_sharpness_does_not_underflow() -> None:
    found = votes.knn(Rule("knn", 1000.0, 1.0), *ordered([0.3, 0.2, -0.9], [0, 1, 2]), np.ones(3), 3)
    np.testing.assert_allclose(found, [[-700, -800, -1900]], rtol=1e-6)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10_000), st.booleans())
def test_one_neighbor_is_plain_nearest_neighbor(n: int, n_classes: int, seed: int, coarse: bool) -> None:
    """Against a loop: the nearest entry, of equals the one of the lowest class, whatever the classes' sizes."""
    rng = np.random.default_rng(seed)
    columns, cosines = rng.integers(n_classes, size=n), rng.uniform(-1, 1, n)
    if coarse:  # ties
        cosines = np.round(cosines * 2) / 2
    best = min(range(n), key=lambda i: (-cosines[i], columns[i]))
    sizes = np.bincount(columns, minlength=n_classes)
    for sharpness in (5.0, 1000.0):
        found = votes.knn(Rule("knn", sharpness, 1.0), *votes.nearest(cosines[None], columns[None]), sizes, 1)
        assert found[0].argmax() == columns[best]


@settings(max_examples=40)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10_000))
def test_votes_are_sums_over_the_neighbors(n: int, n_neighbors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, cosines = rng.integers(4, size=n), rng.uniform(-1, 1, n)
    near = sorted(range(n), key=lambda i: (-cosines[i], columns[i]))[:n_neighbors]
    expected = np.zeros(4)
    for i in near:
        expected[columns[i]] += math.exp(7 * (cosines[i] - 1))
    neighbors = votes.nearest(cosines[None], columns[None])
    np.testing.assert_allclose(votes.tip(Rule("tip", 7.0, 1.0), *neighbors, 4, n_neighbors)[0], expected, rtol=1e-9)


def test_another_sharpness_keeps_what_a_step_in_cosine_is_worth() -> None:
    rule = Rule("knn", 20.0, 1.5)
    assert rule.with_sharpness(None) == rule
    sharper = rule.with_sharpness(1000.0)
    near, far = (votes.knn(sharper, *ordered([cosine], [0]), np.ones(1), 1)[0, 0] for cosine in (0.9, 0.8))
    assert near - far == pytest.approx(20 * 1.5 * 0.1)


def images(n_classes: int, shots: int, dim: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n_classes), shots)
    return unit(unit(rng.normal(size=(n_classes, dim)))[labels] + noise * rng.normal(size=(len(labels), dim))), labels


def left_out(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosines = (vectors @ vectors.T).astype(np.float64)
    np.fill_diagonal(cosines, -np.inf)
    return votes.nearest(cosines, np.where(np.isfinite(cosines), labels[None], -1))


def test_fitted_knn_is_calibrated() -> None:
    vectors, labels = images(10, 12, 16, 0.25)
    sizes, neighbors = np.bincount(labels), left_out(vectors, labels)
    rule = votes.fit_knn(*neighbors, sizes, labels, 20)
    logits = votes.knn(rule, *neighbors, sizes, 20)
    chances = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    assert chances.max(axis=1).mean() == pytest.approx((logits.argmax(axis=1) == labels).mean(), abs=0.06)


def test_votes_that_say_nothing_keep_their_order() -> None:
    vectors, labels = images(10, 6, 16, 0.25)
    wrong = np.random.default_rng(1).permutation(labels)
    assert votes.fit_knn(*left_out(vectors, wrong), np.bincount(labels), wrong, 20).scale > 0


def test_tip_gives_weight_to_what_tells_the_classes_apart() -> None:
    vectors, labels = images(10, 6, 16, 0.25)
    rng, neighbors = np.random.default_rng(1), left_out(vectors, labels)
    good = 5.0 * np.eye(10)[labels] + rng.normal(size=(60, 10))
    nothing = rng.normal(size=(60, 10))
    kept, _ = votes.fit_tip(good, *neighbors, labels, 20, 1.0)
    dropped, rule = votes.fit_tip(nothing, *neighbors, labels, 20, 1.0)
    assert kept > 0.5 > dropped and rule.scale > 0.5


def test_nothing_to_fit_on_gives_the_defaults() -> None:
    nothing, rows = np.zeros((0, 4)), np.zeros((0, 4), np.int64)
    assert votes.fit_knn(nothing, rows, np.ones(3, np.int64), np.zeros(0, np.int64), 20) == votes.KNN
    factor, rule = votes.fit_tip(np.zeros((0, 3)), nothing, rows, np.zeros(0, np.int64), 20, 0.4)
    assert (factor, rule) == (1.0, Rule("tip", votes.TIP.sharpness, 0.4))


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_at_the_papers_sharpness_the_nearest_entry_decides_whatever_the_sizes(seed: int, n_classes: int) -> None:
    """Against a plain argmax over cosines that lie closely together, with a class of 500 images beside classes of one."""
    rng = np.random.default_rng(seed)
    columns = rng.integers(0, n_classes, (5, 30))
    cosines = 0.9 + 1e-3 * rng.random((5, 30))
    sizes = rng.choice([1, 500], n_classes)
    rule = votes.KNN.with_sharpness(1000)
    scores = votes.knn(rule, *votes.nearest(cosines, columns), sizes, 30)
    assert scores.argmax(axis=1).tolist() == columns[np.arange(5), cosines.argmax(axis=1)].tolist()
