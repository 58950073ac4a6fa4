"""Recall and accuracies by group, against counts by hand and a slow oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rar.boxes import xywh_to_xyxy
from rar.corpus.truth import Truth, read
from rar.evaluation.box_groups import ProposalRecall, by_frequency, by_size, frequencies, group_accuracies
from rar.evaluation.metrics import Outcomes
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
SIZES = ("small", "medium", "large")
FREQUENCIES = ("rare", "common", "frequent")


def truth() -> dict[str, Any]:
    """Image 1: a small rare and a large frequent object, and a crowd. Image 2: a medium frequent one."""
    boxes = [(1, 10, [0, 0, 10, 10], 0), (1, 30, [100, 100, 100, 100], 0), (1, 30, [0, 0, 300, 300], 1)]
    boxes += [(2, 30, [0, 0, 50, 50], 0)]
    keys = ("image_id", "category_id", "bbox", "iscrowd")
    categories = [{"id": 10, "name": "axolotl", "frequency": "r"}, {"id": 20, "name": "bus", "frequency": "c"}]
    categories += [{"id": 30, "name": "cat", "frequency": "f"}]
    return {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "annotations": [dict(zip(keys, one, strict=True)) for one in boxes],
        "categories": categories,
    }


def values_of(result: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("proposal_recall_"): value for key, value in result.items() if ".ci_" not in key}


def proposal_recall(known: Truth, images: np.ndarray, boxes_xyxy: np.ndarray, iou: float = 0.5) -> dict[str, float]:
    """Of boxes that come in two parts, cut anywhere."""
    found = ProposalRecall(known, iou)
    for rows in (slice(0, len(images) // 3), slice(len(images) // 3, None)):
        found.add(images[rows], boxes_xyxy[rows])
    return found.values()


def test_recall_by_size_and_frequency() -> None:
    ids, boxes = np.array([0, 1, 2]), np.array([[0, 0, 10, 8], [0, 0, 50, 24], [100, 100, 200, 200]])
    found = values_of(proposal_recall(read(truth()), ids, boxes))
    assert found == {"proposal_recall": 1 / 3, "small": 1, "medium": 0, "large": 0, "rare": 1, "frequent": 0}
    assert values_of(proposal_recall(read(truth()), ids, boxes, iou=0.48))["proposal_recall"] == pytest.approx(2 / 3)
    assert values_of(proposal_recall(read(truth()), ids, boxes, iou=0.81))["proposal_recall"] == 0


def test_an_overlap_of_exactly_the_limit_counts_and_a_box_serves_several_objects() -> None:
    known = truth()
    known["annotations"] = [{"image_id": 1, "category_id": 10, "bbox": [x, 0, 10, 10]} for x in (0, 10)]
    assert proposal_recall(read(known), np.array([0]), np.array([[0, 0, 20, 10]]))["proposal_recall"] == 1


def test_no_boxes_no_objects_and_empty_boxes() -> None:
    assert proposal_recall(read(truth()), np.zeros(0), np.zeros((0, 4)))["proposal_recall"] == 0
    assert proposal_recall(read(truth() | {"annotations": []}), np.array([0]), np.zeros((1, 4))) == {}
    flat = truth() | {"annotations": [{"image_id": 1, "category_id": 10, "bbox": [0, 0, 0, 0]}]}
    assert proposal_recall(read(flat), np.array([0]), np.zeros((1, 4)))["proposal_recall"] == 0


def test_recall_equals_the_slow_definition() -> None:
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 60, (300, 2)), rng.uniform(5, 60, (300, 2))
    images = rng.integers(0, 9, 300)
    boxes = np.concatenate([corner, corner + size], axis=1)
    known: dict[str, Any] = {"images": [{"id": i} for i in range(9)], "categories": [{"id": 1, "name": "x"}]}
    known["annotations"] = [
        {"image_id": int(images[i]), "category_id": 1, "bbox": [*corner[i].tolist(), *size[i].tolist()]} for i in range(150)
    ]
    hits = [any(images[i] == images[j] and iou(boxes[i], boxes[j]) >= 0.5 for j in range(150, 300)) for i in range(150)]
    assert 20 < sum(hits) < 140
    assert proposal_recall(read(known), images[150:], boxes[150:])["proposal_recall"] == pytest.approx(np.mean(hits))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inside = max(width, 0) * max(height, 0)
    return inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside)


def test_groups() -> None:
    sizes = by_size(np.array([1, 32**2, 32**2 + 1, 96**2, 96**2 + 1]))
    assert {name: np.flatnonzero(rows).tolist() for name, rows in sizes.items()} == {
        "small": [0, 1],
        "medium": [2, 3],
        "large": [4],
    }
    of = frequencies(read(truth()))
    assert of == {"axolotl": "rare", "bus": "common", "cat": "frequent"}
    groups = by_frequency(["cat", None, "axolotl", "yak"], of)
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "rare": [False, False, True, False],
        "common": [False] * 4,
        "frequent": [True, False, False, False],
    }
    assert frequencies(read({"images": [], "categories": [{"id": 1, "name": "cat"}]})) == {}


def test_accuracies_by_group_leave_unlabelled_rows_out() -> None:
    def column(*values: int) -> np.ndarray:
        return np.array(values, bool)

    found = Outcomes(
        labelled=column(1, 1, 1, 0),
        correct=column(1, 0, 1, 0),
        correct_at_5=column(1, 0, 1, 0),
        retriever_correct=column(1, 0, 1, 0),
        recalled=column(1, 1, 1, 0),
        asked=column(1, 1, 1, 1),
    )
    groups = {"rare": column(1, 1, 0, 1), "common": column(0, 0, 0, 1), "large": column(0, 0, 1, 0)}
    values = group_accuracies(found, groups)
    assert values["top1_rare"] == 0.5 and values["candidate_recall_rare"] == 1 and values["top1_large"] == 1
    assert 0 < values["top1_rare.ci_low"] < 0.5 < values["top1_rare.ci_high"] < 1
    assert not any("common" in key for key in values)


@needs_data
def test_real_lvis_boxes_find_themselves() -> None:
    known = read(SHARED_DATA / "lvis" / "lvis_v05_val_100.json")
    ids, boxes = known.boxes.image, xywh_to_xyxy(known.boxes.xywh)
    assert values_of(proposal_recall(known, ids, boxes)) == dict.fromkeys(["proposal_recall", *SIZES, *FREQUENCIES], 1.0)
    half = values_of(proposal_recall(known, ids[::2], boxes[::2]))
    assert 0.5 < half["proposal_recall"] < 0.9
