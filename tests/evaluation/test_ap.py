"""AP against literals, the official evaluators' recorded numbers, and real COCO and LVIS ground truth."""

from __future__ import annotations

import copy
import json
import random
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rar.corpus.truth import read
from rar.evaluation.ap import IMAGE_LIMITS, Sight, Style, best_of_each_image, evaluate
from rar.evaluation.scoring import Detections, category_places, detections, together, write_coco_results
from rar.schema import UserError
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")

COCO_KEYS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
COCO_KEYS += ["ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"]
LVIS_KEYS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ap_rare", "ap_common", "ap_frequent"]
LVIS_KEYS += ["ar_300", "ar_small", "ar_medium", "ar_large"]

# Written by lvis-api 0.5.3 (PyPI `lvis`, LVISEval.run on iou_type bbox) for noisy_detections(lvis_v05_val_100.json).
LVIS_OFFICIAL = {
    "ap": 0.114876,
    "ap50": 0.21096,
    "ap75": 0.098383,
    "ap_small": 0.283658,
    "ap_medium": 0.142931,
    "ap_large": 0.206977,
    "ap_rare": 0.3,
    "ap_common": 0.147265,
    "ap_frequent": 0.107601,
    "ar_300": 0.44448,
    "ar_small": 0.406646,
    "ar_medium": 0.441032,
    "ar_large": 0.491943,
}


def detection(image_id: int, category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def small_truth() -> dict[str, Any]:
    """One image of three classes, rare, common and frequent; the frequent one has two objects."""
    boxes = [(1, [0, 0, 10, 10]), (2, [20, 0, 50, 50]), (3, [100, 0, 10, 10]), (3, [200, 0, 100, 100])]
    annotations = [{"id": i, "image_id": 5, "category_id": c, "bbox": box} for i, (c, box) in enumerate(boxes)]
    lists: dict[str, Any] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    images = [{"id": 5, "width": 400, "height": 300} | lists, {"id": 6, "width": 400, "height": 300} | lists]
    categories = [{"id": i, "name": f"class {i}", "frequency": letter} for i, letter in enumerate("rcf", start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def as_detections(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [detection(one["image_id"], one["category_id"], one["bbox"], 1.0) for one in truth["annotations"]]


def noisy_detections(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Jittered ground truth, and up to 700 false boxes an image: present, absent and not exhaustively labelled classes."""
    rng = random.Random(1)
    found = []
    for one in truth["annotations"]:
        x, y, w, h = one["bbox"]
        box = [x + w * (rng.random() - 0.5) / 5, y + h * (rng.random() - 0.5) / 5, w * (0.8 + rng.random() / 2), h]
        found.append(detection(one["image_id"], one["category_id"], box, rng.random()))
    present = [one["category_id"] for one in truth["annotations"]]
    for image in truth["images"]:
        here = [one["category_id"] for one in truth["annotations"] if one["image_id"] == image["id"]]
        pool = present + 60 * (here + image["neg_category_ids"] + image["not_exhaustive_category_ids"])
        for _ in range(int(700 * rng.random())):
            box = [400 * rng.random(), 300 * rng.random(), 5 + 200 * rng.random(), 5 + 200 * rng.random()]
            found.append(detection(image["id"], pool[int(len(pool) * rng.random())], box, rng.random()))
    return found


def test_half_of_the_objects_found_is_half_the_recall_axis() -> None:
    truth = small_truth()
    found = [detection(5, 3, [100, 0, 10, 10], 0.9)]
    result = evaluate(found, truth, "coco")
    assert result["ap_frequent"] == pytest.approx(51 / 101)  # precision 1 at the 51 recall levels 0, .01, ..., .50
    assert result["ap_rare"] == result["ap_common"] == 0
    assert result["ap"] == pytest.approx(51 / 101 / 3)
    assert result["ar_100"] == pytest.approx(0.5 / 3)
    assert result["ap_small"] == pytest.approx(0.5)  # two small objects of two classes, one found
    assert result["ap_medium"] == result["ap_large"] == 0


def test_a_better_scored_false_alarm_halves_precision() -> None:
    truth = small_truth()
    found = [detection(5, 1, [0, 0, 10, 10], 0.4), detection(6, 1, [0, 0, 10, 10], 0.8)]
    assert evaluate(found, truth, "coco")["ap_rare"] == pytest.approx(0.5)
    assert evaluate(found, truth, "lvis")["ap_rare"] == pytest.approx(1)  # image 6 was never searched for class 1
    truth["images"][1]["neg_category_ids"] = [1]
    assert evaluate(found, truth, "lvis")["ap_rare"] == pytest.approx(0.5)
    truth["images"][1]["neg_category_ids"] = []
    truth["images"][0]["not_exhaustive_category_ids"] = [1]
    found[1]["image_id"] = 5
    found[1]["bbox"] = [300, 200, 10, 10]
    assert evaluate(found, truth, "lvis")["ap_rare"] == pytest.approx(1)  # an unmatched box of it is no false alarm there


@pytest.mark.parametrize(("iou", "thresholds"), [(0.5, 1), (0.76, 6), (0.96, 10), (0.49, 0)])
def test_the_overlap_decides_at_ten_thresholds(iou: float, thresholds: int) -> None:
    found = [detection(5, 2, [20, 0, 50, 50 * iou], 1.0)]
    assert evaluate(found, small_truth(), "coco")["ap_common"] == pytest.approx(thresholds / 10)


def test_a_group_without_ground_truth_is_minus_one() -> None:
    truth = small_truth()
    truth["annotations"] = truth["annotations"][:1]
    result = evaluate(as_detections(truth), truth, "coco")
    assert result["ap"] == result["ap_rare"] == result["ap_small"] == 1
    assert result["ap_common"] == result["ap_large"] == result["ar_large"] == -1


def test_no_detections_are_zeros() -> None:
    truth = small_truth()
    assert evaluate([], truth, "lvis") == dict.fromkeys(LVIS_KEYS, 0.0)
    for category in truth["categories"]:
        del category["frequency"]
    assert evaluate([], truth, "coco") == dict.fromkeys(COCO_KEYS, 0.0)
    assert set(evaluate([], {"images": [], "annotations": [], "categories": []}, "coco").values()) == {-1.0}


def test_crowds_are_ignored() -> None:
    truth = small_truth()
    truth["annotations"].append({"id": 9, "image_id": 6, "category_id": 1, "bbox": [0, 0, 200, 200], "iscrowd": 1})
    found = [*as_detections(small_truth()), detection(6, 1, [10, 10, 20, 20], 1.0)]
    assert evaluate(found, truth, "coco")["ap"] == pytest.approx(1)


def test_lvis_keeps_300_of_an_image_over_all_classes() -> None:
    truth = small_truth()
    noise = [detection(5, 2, [300, 200, 5, 5], 0.9)] * 300
    found = [detection(5, 1, [0, 0, 10, 10], 0.5)]
    assert evaluate(found + noise, truth, "lvis")["ap_rare"] == 0
    assert evaluate(found + noise[1:], truth, "lvis")["ap_rare"] == pytest.approx(1)
    assert evaluate(found + noise, truth, "coco")["ap_rare"] == pytest.approx(1)  # COCO's 100 are counted per class


def test_best_of_each_image() -> None:
    scores = np.array([0.2, 0.9, 0.1, 0.2, 0.5])
    found = Detections(np.array([1, 1, 2, 1, 1]), np.arange(5), np.zeros((5, 4)), scores)
    assert best_of_each_image(found, 3).categories.tolist() == [1, 4, 0, 2]


def crowded(images: int, count: int) -> tuple[dict[str, Any], Detections]:
    """A truth of 39 classes, few of them looked for in each image, and detections of all, many of equal scores."""
    rng = np.random.default_rng(0)
    truth = small_truth()
    truth["categories"] = [{"id": 3 * k, "name": f"class {k}", "frequency": "rcf"[k % 3]} for k in range(1, 40)]
    lists = {"neg_category_ids": [9, 12, 999], "not_exhaustive_category_ids": [6]}
    truth["images"] = [small_truth()["images"][0] | {"id": i} | lists for i in range(images)]
    ids = np.sort(rng.integers(0, images, count, np.int32)), rng.integers(0, 39, count, np.int32)
    boxes = np.hstack([rng.integers(0, 40, (count, 2)), rng.integers(0, 60, (count, 2))]).astype(float)
    truth["annotations"] = [
        {
            "id": number + 1,
            "image_id": int(ids[0][number]),
            "category_id": 3 * int(ids[1][number]) + 3,
            "bbox": boxes[number].tolist(),
        }
        for number in range(0, count, 30)
    ]
    return truth, Detections(*ids, boxes + rng.integers(-1, 2, boxes.shape), rng.integers(1, 6, count) / 5)


@pytest.mark.parametrize("style", ["coco", "lvis", "v3det"])
def test_what_is_seen_of_the_parts_is_seen_of_the_whole(style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_LIMITS, style, IMAGE_LIMITS[style] and 200)
    truth, found = crowded(9, 6000)
    sight = Sight(read(truth), style)
    parts = [
        sight.seen(Detections(*(column[np.isin(found.images, images)] for column in found)))
        for images in ([0], [1, 2, 3, 4, 5], [6, 7], [8])
    ]
    whole, again = sight.seen(found), sight.seen(together(parts))
    assert {"coco": 6000, "v3det": 1800}.get(style, len(whole.scores)) == len(whole.scores) > 100
    for ours, theirs in zip(again, sight.seen(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert style == "coco" or sight.seen(whole) is whole  # no copy of what is cut and in order
    assert evaluate(whole, truth, style) == evaluate(found, truth, style)


def test_what_lvis_does_not_look_for_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own rule drops it, too, but later."""
    truth, found = crowded(12, 3000)
    sight = Sight(read(truth), "lvis")
    seen = evaluate(found, truth, "lvis")
    assert len(sight.seen(found).scores) < 1000 and 0 < seen["ap"] < 1
    monkeypatch.setattr(Sight, "seen", lambda self, given: best_of_each_image(given, 300))
    kept = best_of_each_image(found, 300)
    area = np.prod(kept.boxes_xywh[:, 2:], axis=1) > 0
    assert 0 < (~area).sum() < len(area) and seen == evaluate(Detections(*(column[area] for column in kept)), truth, "lvis")


def test_v3det_is_coco_with_300_of_an_image() -> None:
    truth = small_truth()
    found = [detection(5, 3, [300, 200, 5, 5], 0.9)] * 250 + [detection(5, 3, [200, 0, 100, 100], 0.5)]
    assert evaluate(found, truth, "coco")["ar_large"] == 0  # the 251st of an image and class; COCO counts 100
    assert evaluate(found, truth, "v3det")["ar_large"] == pytest.approx(1)
    assert evaluate(found[:1] * 50 + found, truth, "v3det")["ar_large"] == 0
    unsearched = [detection(6, 2, [0, 0, 5, 5], 2.0), *as_detections(truth)]  # LVIS does not count such false alarms
    assert (evaluate(unsearched, truth, "v3det")["ap_common"], evaluate(unsearched, truth, "lvis")["ap_common"]) == (
        pytest.approx(0.5),
        pytest.approx(1),
    )
    assert list(evaluate(found, truth, "v3det")) == LVIS_KEYS


@pytest.mark.parametrize("style", ["coco", "lvis", "v3det"])
def test_the_numbers_do_not_depend_on_how_many_categories_run_together(style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    truth = small_truth()
    truth["categories"] = [{"id": 3 * k, "name": f"class {k}", "frequency": "rcf"[k % 3]} for k in range(1, 40)]
    truth["images"] = [small_truth()["images"][0] | {"id": i, "neg_category_ids": [3 * i, 9, 12]} for i in range(1, 9)]

    def boxes(count: int) -> list[dict[str, Any]]:
        corners = rng.integers(0, 4, (count, 2)) * 20.0
        sizes = 20.0 + rng.integers(0, 60, (count, 2))
        ids = rng.integers(1, 9, count), 3 * rng.integers(1, 30, count)
        rows = zip(*(column.tolist() for column in (*ids, np.hstack([corners, sizes]), rng.random(count))), strict=True)
        return [detection(*row) for row in rows]

    truth["annotations"], found = boxes(150), boxes(2000)
    alone = []
    for count in (1, 8, 1000):
        monkeypatch.setattr("rar.evaluation.ap.TOGETHER", count)
        alone.append(evaluate(found, truth, style))
    assert alone[0]["ap"] > 0.005 and alone[1] == pytest.approx(alone[0]) and alone[2] == pytest.approx(alone[0])


def test_columns_a_list_and_the_written_file_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = small_truth()
    names = [one["name"] for one in truth["categories"]]
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in truth["annotations"])] * 9)
    boxes = boxes + rng.normal(0, 2, boxes.shape)
    found = detections(
        [0, 1] * 18, boxes, rng.random(36), [names] * 36, rng.dirichlet(np.ones(3), 36).tolist(), category_places(names),
        "product", 2,
    )  # fmt: skip
    write_coco_results(tmp_path / "found.json", [found], read(truth))
    listed = json.loads((tmp_path / "found.json").read_text())
    assert len(listed) == 72
    for style in ("coco", "lvis", "v3det"):
        result = evaluate(found, truth, style)
        assert 0 < result["ap"] < 1
        assert evaluate(listed, truth, style) == result == evaluate(tmp_path / "found.json", truth, style)


def test_a_vast_vocabulary_costs_what_is_in_the_truth() -> None:
    """13,204 categories as in V3Det, four of them present: the library's own precision array would be 1.3 GB."""
    truth = small_truth()
    truth["categories"] = [{"id": k, "name": f"class {k}"} for k in range(1, 13_205)]
    tracemalloc.start()
    assert evaluate(as_detections(truth), truth, "coco")["ap"] == pytest.approx(1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_inputs_are_left_alone_and_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    truth = small_truth()
    found = as_detections(truth)
    before = copy.deepcopy((truth, found))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the truth has an annotation id 0, which the library warns about and mistakes
        result = evaluate(found, truth, "lvis")
    assert (truth, found) == before
    (tmp_path / "found.json").write_text(json.dumps(found))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert evaluate(str(tmp_path / "found.json"), tmp_path / "truth.json", "lvis") == result
    assert result == pytest.approx(dict.fromkeys(LVIS_KEYS, 1.0))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([detection(1, 1, [0, 0, 1, 1], 1.0)] * 2, "2 detections name an unknown image_id, the first is image_id 1"),
        ([detection(5, 4, [0, 0, 1, 1], 1.0)], "1 detections name an unknown category_id, the first is category_id 4"),
        ([detection(5, 1, [0, 0, 1], 1.0)], "1 detections lack"),
        ([detection(5, 1, [0, 0, 1, float("nan")], 1.0)], "1 detections lack"),
        ([detection("five", 1, [0, 0, 1, 1], 1.0)], "1 detections name an unknown image_id, the first is image_id 'five'"),  # type: ignore[arg-type]
        ([detection(5, True, [0, 0, 1, 1], 1.0)], "1 detections name an unknown category_id"),
        ([detection(5, 1, [0, 0, 1, 1], None)], "1 detections lack"),  # type: ignore[arg-type]
        ([{"image_id": 5}, "text"], "2 detections lack"),
        ({"annotations": []}, "must be a list"),
    ],
)
def test_wrong_detections_are_user_errors(found: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(found, small_truth(), "coco")


def test_wrong_truths_are_user_errors(tmp_path: Path) -> None:
    truth = small_truth()
    with pytest.raises(UserError, match="not found"):
        evaluate([], str(tmp_path / "absent.json"), "coco")
    with pytest.raises(UserError, match="no list `annotations`"):
        evaluate([], {"images": []}, "coco")
    with pytest.raises(UserError, match="is a list, no COCO file"):
        evaluate([], [], "coco")  # type: ignore[arg-type]
    del truth["images"][1]["neg_category_ids"]
    with pytest.raises(UserError, match="neg_category_ids"):
        evaluate([], truth, "lvis")
    truth = small_truth()
    truth["categories"][0]["frequency"] = "often"
    with pytest.raises(UserError, match="frequency r, c or f"):
        evaluate([], truth, "lvis")
    truth = small_truth()
    truth["annotations"][0]["category_id"] = 8
    with pytest.raises(UserError, match=r"1 annotations of the truth cannot be used, .* annotation 0 .* unknown category_id 8"):
        evaluate([], truth, "coco")


@needs_data
def test_the_twelve_official_coco_numbers() -> None:
    folder = SHARED_DATA / "coco"
    section = (folder / "fakebbox100_expected.txt").read_text().split("type=bbox")[1].split("type=")[0]
    expected = [float(value) for value in re.findall(r"= (\d\.\d{3})$", section, re.MULTILINE)]
    result = evaluate(str(folder / "fakebbox100_results.json"), str(folder / "instances_val2014_100.json"), "coco")
    assert list(result) == COCO_KEYS
    assert [round(value, 3) for value in result.values()] == expected


@needs_data
def test_lvis_ground_truth_as_detections_is_perfect() -> None:
    truth = json.loads((SHARED_DATA / "lvis" / "lvis_v05_val_100.json").read_text())
    result = evaluate(as_detections(truth), truth, "lvis")
    assert result == pytest.approx(dict.fromkeys(LVIS_KEYS, 1.0))


@needs_data
def test_lvis_numbers_are_the_official_evaluators() -> None:
    truth = json.loads((SHARED_DATA / "lvis" / "lvis_v05_val_100.json").read_text())
    assert evaluate(noisy_detections(truth), truth, "lvis") == pytest.approx(LVIS_OFFICIAL, abs=1e-6)
