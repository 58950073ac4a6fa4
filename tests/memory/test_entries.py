"""Entries, hits and the oracle itself, on literals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.memory.entries import MAX_NAME_BYTES, ExactIndex, Hits, distinct, hits, in_order, matrix
from rar.schema import UserError


def test_the_oracle_on_literals() -> None:
    oracle = ExactIndex(2)
    oracle.upsert(["b", "a", "c"], [1, 0, 2], ["B", "A", "C"], np.array([[1, 0], [1, 0], [0, 1]], np.float32))
    hits = oracle.search(np.array([[1, 0.5]], np.float32), 4)
    assert hits.entry_ids == [["a", "b", "c", ""]]
    assert hits.scores.tolist() == [[1.0, 1.0, 0.5, -np.inf]]
    assert hits.class_ids.tolist() == [[0, 1, 2, -1]]
    with pytest.raises(UserError, match="empty"):
        ExactIndex(2).search(np.ones((1, 2), np.float32), 1)


def test_of_equal_ids_the_last_is_kept() -> None:
    found = distinct(["a", "b", "a"], [1, 2, 3], ["one", "two", "three"], np.arange(6, dtype=np.float32).reshape(3, 2), 2)
    assert (found.entry_ids, found.class_ids.tolist(), found.class_names) == (["a", "b"], [3, 2], ["three", "two"])
    assert found.vectors.tolist() == [[4, 5], [2, 3]]


def test_what_milvus_cannot_hold_is_refused() -> None:
    vector = np.ones((1, 2), np.float32)
    for entry_id in ("", 'say "a"', "back\\slash", "x" * 257, "ü" * 129):
        with pytest.raises(UserError, match="1 to 256 bytes, no quotes"):
            distinct([entry_id], [0], ["a"], vector, 2)
    with pytest.raises(UserError, match="at most 4096 bytes; shorten"):
        distinct(["a"], [0], ["n" * (MAX_NAME_BYTES + 1)], vector, 2)
    with pytest.raises(ValueError, match="equally many, got 1, 2, 1 and 1"):
        distinct(["a"], [0, 1], ["a"], vector, 2)


def test_vectors_are_checked() -> None:
    for shape in ((2,), (1, 3), (1, 2, 1)):
        with pytest.raises(UserError, match=f"2 dimensions, got .*{shape[-1]}"):
            matrix(np.ones(shape), 2)
    for value in (np.nan, np.inf, 1e39):  # the last is beyond float32
        with pytest.raises(UserError, match="not finite"):
            matrix(np.array([[1.0, value]]), 2)
    assert matrix(np.zeros((0, 2)), 2).shape == (0, 2)


def test_hits_are_cut_and_padded() -> None:
    found = hits([[3.0, 2.0, 1.0], [1.0], []], [[1, 2, 3], [4], []], [["a", "b", "c"], ["d"], []], 2)
    assert found.scores.tolist() == [[3, 2], [1, -np.inf], [-np.inf, -np.inf]]
    assert found.class_ids.tolist() == [[1, 2], [4, -1], [-1, -1]]
    assert found.entry_ids == [["a", "b"], ["d", ""], ["", ""]]


@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.text("ab", min_size=1)), max_size=4), max_size=4))
def test_order_is_score_then_id_and_padding_stays_last(rows: list[list[tuple[float, str]]]) -> None:
    found = hits(
        [[s for s, _ in row] for row in rows], [[7] * len(row) for row in rows], [[i for _, i in row] for row in rows], 4
    )
    ordered = in_order(Hits(found.scores, found.class_ids, found.entry_ids))
    for row, scores, ids in zip(rows, ordered.scores.tolist(), ordered.entry_ids, strict=True):
        expected = sorted(row, key=lambda pair: (-pair[0], pair[1]))
        padding = [(-np.inf, "")] * (4 - len(row))
        assert list(zip(scores, ids, strict=True)) == expected + padding
