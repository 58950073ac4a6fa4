from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import schema
from rar.schema import Exit, Ranking, RankStatus, content_id

BOX = (1.0, 2.0, 3.0, 4.5)
finite = st.floats(-1e5, 1e5)


def test_exit_codes_are_the_contract() -> None:
    assert [(code.name, int(code)) for code in Exit] == [("DONE", 0), ("CRASH", 1), ("USER_ERROR", 2), ("TOO_MANY_FAILED", 3)]


def test_rank_statuses_are_the_contract() -> None:
    assert [status.value for status in RankStatus] == ["ranked", "repaired", "fallback", "skipped"]


@pytest.mark.parametrize("order", [(), (0,), (2, 0, 1)])
def test_a_ranking_is_a_permutation(order: tuple[int, ...]) -> None:
    assert Ranking(order, RankStatus.RANKED).order == order


@pytest.mark.parametrize("order", [(1,), (0, 0), (0, 2), (-1, 0), (1, 2, 3)])
def test_a_ranking_is_nothing_else(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        Ranking(order, RankStatus.RANKED)


@given(st.lists(st.integers(-1, 5), max_size=5))
def test_only_permutations_are_accepted(order: list[int]) -> None:
    if set(order) == set(range(len(order))):  # as many different numbers as places: each once
        assert Ranking(tuple(order), RankStatus.RANKED).order == tuple(order)
    else:
        with pytest.raises(ValueError):
            Ranking(tuple(order), RankStatus.RANKED)


def test_an_image_is_named_by_its_content() -> None:
    assert content_id(b"abc") == hashlib.blake2b(b"abc", digest_size=16).hexdigest()  # ids of runs already on disk
    assert len(content_id(b"")) == 32


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_equal_content_equal_id(first: bytes, second: bytes) -> None:
    assert (content_id(first) == content_id(second)) == (first == second)
    assert (content_id(first, BOX) == content_id(second, BOX)) == (first == second)
    assert content_id(first, BOX) != content_id(first)


@given(st.tuples(finite, finite, finite, finite), st.integers(0, 3))
def test_a_box_that_moves_a_pixel_is_another_id(box_xyxy: tuple[float, ...], side: int) -> None:
    moved = [value + (position == side) for position, value in enumerate(box_xyxy)]
    assert content_id(b"abc", box_xyxy) == content_id(b"abc", list(box_xyxy))
    assert content_id(b"abc", box_xyxy) != content_id(b"abc", moved)


def test_hundredths_of_a_pixel_count() -> None:
    assert content_id(b"abc", BOX) != content_id(b"abc", (1.0, 2.0, 3.0, 4.51))
    assert content_id(b"abc", BOX) == content_id(b"abc", (1.0, 2.0, 3.0, 4.5001))


def test_float32_and_float64_of_a_box_are_one_id() -> None:
    box = (10.1, 20.3, 30.7, 40.9)
    narrow = pa.array(box, pa.float32()).to_pylist()
    assert narrow != list(box)
    assert content_id(b"abc", box) == content_id(b"abc", narrow)


def test_the_files_columns_are_the_contract() -> None:
    assert " ".join(schema.PREDICTIONS.names) == (
        "row place image_id uri box_xyxy candidates ranking rank_status response scores routed class_id class_name score "
        "label_mass label_first"
    )
    assert schema.ERRORS.names == ["row", "place", "image_id", "uri", "stage", "error"]
    assert [field.name for field in schema.CANDIDATES.value_type] == ["class_id", "class_name", "score"]


def test_candidates_and_predictions_hold_one_type() -> None:
    assert schema.PREDICTIONS.field("candidates").type == schema.CANDIDATES
