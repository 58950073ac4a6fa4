"""Box formats and checks, against literals and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.boxes import area, check_boxes, clip_xyxy, iou, xywh_to_xyxy, xyxy_to_xywh

numbers = st.floats(-2000, 2000, width=32)
sides = st.floats(1, 900, width=32)
boxes_xyxy = st.tuples(numbers, numbers, sides, sides).map(lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]]))


def test_formats_are_literal() -> None:
    assert xywh_to_xyxy(np.array([[10.0, 20, 3, 4]])).tolist() == [[10, 20, 13, 24]]
    assert xyxy_to_xywh(np.array([10.0, 20, 13, 24])).tolist() == [10, 20, 3, 4]
    assert area(np.array([[0.0, 0, 3, 4], [5, 5, 5, 9], [5, 5, 2, 2]])).tolist() == [12, 0, 0]


@given(boxes_xyxy)
def test_formats_round_trip(box: np.ndarray) -> None:
    np.testing.assert_allclose(xywh_to_xyxy(xyxy_to_xywh(box)), box, atol=1e-9)


@given(boxes_xyxy, st.integers(1, 1000), st.integers(1, 1000))
def test_clipped_boxes_lie_in_the_image_and_in_the_box(box: np.ndarray, width: int, height: int) -> None:
    x0, y0, x1, y1 = clip_xyxy(box, width, height)
    assert 0 <= x0 <= x1 <= width
    assert 0 <= y0 <= y1 <= height
    if check_boxes(box[None], width, height) == [None]:
        assert box[0] <= x0 and box[1] <= y0 and x1 <= box[2] and y1 <= box[3]


def test_check_boxes_says_why() -> None:
    boxes = np.array(
        [
            [0, 0, 100, 50],
            [np.nan, 0, 5, 5],
            [0, 0, np.inf, 5],
            [100, 0, 120, 20],
            [-9, -9, 0, 0],
            [10, 10, 10.5, 40],
            [99.5, 10, 130, 40],
            [5, 5, 4, 9],
            [-50, -50, 500, 500],
            [3, 4, 4, 5],
        ]
    )
    faults = check_boxes(boxes, 100, 50)
    said = [
        None,
        "finite",
        "finite",
        "outside",
        "outside",
        "less than one pixel",
        "less than one pixel",
        "ends before",
        None,
        None,
    ]
    assert [fault is None for fault in faults] == [word is None for word in said]
    assert all(word in fault for fault, word in zip(faults, said, strict=True) if fault is not None and word is not None)
    assert check_boxes(np.zeros((0, 4)), 10, 10) == []


def test_a_one_pixel_box_survives_float32() -> None:
    box = np.array([[511.04, 400.77, 512.04, 401.77]], dtype=np.float32)
    assert float(box[0, 2] - box[0, 0]) < 1
    assert check_boxes(box, 640, 480) == [None]


def slow_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def test_iou_equals_counted_pixels() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (40, 2, 2)), axis=1)
    some = corners.reshape(40, 4)
    masks = np.zeros((40, 12, 12), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, some, strict=True):
        mask[y0:y1, x0:x1] = True
    both = (masks[:, None] & masks).sum(axis=(2, 3))
    either = (masks[:, None] | masks).sum(axis=(2, 3))
    assert iou(some, some) == pytest.approx(np.where(either > 0, both / np.maximum(either, 1), 0))
    assert (area(some) == masks.sum(axis=(1, 2))).all()
