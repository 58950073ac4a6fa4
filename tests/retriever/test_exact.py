"""Exact candidates against the slow way: float64 scores of every class, sorted one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.retriever import exact
from rar.retriever.heads import Head


def head_of(weights: np.ndarray, bias: np.ndarray | None = None) -> Head:
    count = len(weights)
    bias = np.zeros(count) if bias is None else bias
    return Head(np.arange(count) * 3, [f"class {n}" for n in range(count)], weights.astype(np.float32), bias.astype(np.float32))


def oracle(head: Head, queries: np.ndarray, top_k: int) -> tuple[list[list[int]], np.ndarray]:
    """Columns of the best classes, ties by class id, and the logs of their shares of the whole vocabulary."""
    columns, shares = [], []
    for query in queries.astype(np.float64):
        scores = np.array([float(weights.astype(np.float64) @ query) for weights in head.weights]) + head.bias
        best = sorted(range(len(scores)), key=lambda column: (-scores[column], column))[:top_k]
        columns.append(best)
        shares.append(scores[best] - np.logaddexp.reduce(scores))
    return columns, np.array(shares)


@pytest.mark.parametrize(("n_classes", "dim", "top_k"), [(1, 4, 5), (7, 3, 7), (120, 32, 5), (1203, 64, 10)])
def test_candidates_are_the_oracles_with_twins_in_the_order_of_class_ids(n_classes: int, dim: int, top_k: int) -> None:
    random = np.random.default_rng(n_classes)
    weights = 100 * random.normal(size=(n_classes, dim)) / dim**0.5
    weights[n_classes // 2 :] = weights[random.integers(0, max(n_classes // 2, 1), n_classes - n_classes // 2)]  # many twins
    head, queries = head_of(weights), random.normal(size=(33, dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found, (columns, shares) = exact.retrieve(head, queries, top_k), oracle(head, queries, top_k)
    assert found.columns.tolist() == columns
    np.testing.assert_allclose(found.scores, shares, atol=1e-4, rtol=1e-5)


def test_a_tie_of_more_classes_than_are_looked_at_first() -> None:
    weights = np.tile(np.eye(1, 8), (500, 1))
    weights[3] = -1
    found = exact.retrieve(head_of(weights), np.eye(2, 8, dtype=np.float32), 5)
    assert found.columns.tolist() == [[0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]  # 3 is last in either row


def test_blocks_change_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    head = head_of(50 * random.normal(size=(300, 48)), random.normal(size=300))
    queries = random.normal(size=(40, 48)).astype(np.float32)
    whole = exact.retrieve(head, queries, 6)
    monkeypatch.setattr(exact, "CELLS", 3000)
    parts = exact.retrieve(head, queries, 6)
    assert (whole.columns == parts.columns).all()
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-3)
    assert (exact.retrieve(head, queries[7:8], 6).columns == whole.columns[7]).all()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 14))
def test_the_best_of_scores_are_the_sorted_columns(rows: list[list[int]], top_k: int) -> None:
    scores = np.where(np.array(rows) == -3, -np.inf, np.array(rows, float))
    found = exact.best_of(scores, top_k).candidates(np.arange(12) * 2, [f"class {n}" for n in range(12)])
    for row, candidates in zip(scores.tolist(), found, strict=True):
        best = sorted((-score, column) for column, score in enumerate(row) if score > -np.inf)[:top_k]
        assert [(-c.score, c.class_id) for c in candidates] == [(score, 2 * column) for score, column in best]
        assert all(c.class_name == f"class {c.class_id // 2}" for c in candidates)


def test_shares_of_the_candidates_alone() -> None:
    none = -np.inf
    scores = np.array([[1.0, 0.0], [7.0, none], [none, none]])
    found = exact.Retrieved(np.array([[2, 0], [1, -1], [-1, -1]]), scores).shares()
    expected = np.array([[0.731059, 0.268941], [1, 0], [0, 0]])
    np.testing.assert_allclose(np.exp(found.scores), expected, atol=1e-6)
