"""Average precision of detections against a COCO or LVIS ground truth, by the official definitions.

The matching and accumulation are faster-coco-eval's (C++). Around it, three things are done here:

- Everything is checked first, because the library skips what it does not know (a detection of an unknown category vanishes).
- LVIS keeps the 300 best detections of an image over all its classes before anything else (lvis-api, `LVISResults`). The
  library's own limit is per image and class, as in COCO, so the cut is made here.
- The numbers are read from the precision and recall arrays instead of the library's printed summary, so that the frequency
  groups r/c/f exist for every truth whose categories carry `frequency`, in COCO style too.

A group without any ground truth has the value -1, as in the official evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rar.detect import read_json
from rar.schema import UserError

LVIS_LIMIT = 300  # detections an image, over all classes
COCO_LIMITS = [1, 10, 100]  # detections an image and class
AREAS = {"small": 1, "medium": 2, "large": 3}  # positions on the area axis; 0 is "all"
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
LVIS_LISTS: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
IOU_50, IOU_75 = 0, 5  # positions among the thresholds .50, .55, ..., .95

Record = dict[str, Any]


def evaluate(
    detections: list[Record] | str | Path, truth: Record | str | Path, style: Literal["coco", "lvis"]
) -> dict[str, float]:
    """AP and AR in 0..1 of boxes in COCO-results format ({image_id, category_id, bbox xywh, score}) against a truth.

    detections: the list, or the path of its JSON. truth: a COCO/LVIS object, or the path of its JSON; never changed.
    Keys: ap, ap50, ap75, ap_small, ap_medium, ap_large; coco: ar_1, ar_10, ar_100; lvis: ar_300; ar_small, ar_medium, ar_large;
    and ap_rare, ap_common, ap_frequent where the categories have `frequency` (lvis always has). No detections give zeros.
    Raises UserError for files of another kind, detections that name an unknown image or category, and for style lvis on a truth
    without LVIS' fields.
    """
    known = _check_truth(_loaded(truth), style)
    found = _check_detections(_loaded(detections), known)
    if style == "lvis":
        found = best_of_each_image(found, LVIS_LIMIT)
    limits = [LVIS_LIMIT] if style == "lvis" else COCO_LIMITS
    precision, recall = _accumulate(found, known, style, limits)
    return _summary(precision, recall, [category.get("frequency") for category in known["categories"]], limits)


def _loaded(source: Any) -> Any:
    return read_json(str(source)) if isinstance(source, str | Path) else source


def _check_truth(truth: Any, style: str) -> Record:
    """A copy of the truth that the library may write into, annotations numbered from 1 (it takes 0 for "unmatched").

    `area` is the segmentation's where the file has it, as officially defined, and the box's where it does not.
    """
    try:
        annotations = [
            {
                "id": number,
                "image_id": one["image_id"],
                "category_id": one["category_id"],
                "bbox": [float(value) for value in one["bbox"]],
                "area": float(one.get("area", one["bbox"][2] * one["bbox"][3])),
                "iscrowd": int(one.get("iscrowd", 0)),
            }
            for number, one in enumerate(truth["annotations"], start=1)
        ]
        images = [{**LVIS_LISTS, **one, "id": one["id"]} for one in truth["images"]]
        categories = sorted(({**one, "id": one["id"]} for one in truth["categories"]), key=lambda one: one["id"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the truth is no COCO object detection file: {type(error).__name__} {error}") from None
    _refuse_strangers(annotations, images, categories, "annotations of the truth")
    if style == "lvis" and not all(LVIS_LISTS.keys() <= one.keys() for one in truth["images"]):
        raise UserError(f"style lvis needs {' and '.join(LVIS_LISTS)} on every image; use style coco")
    if style == "lvis" and not all(one.get("frequency") in FREQUENCIES.values() for one in categories):
        raise UserError("style lvis needs a frequency r, c or f on every category; use style coco")
    return {"images": images, "annotations": annotations, "categories": categories}


def _check_detections(detections: Any, truth: Record) -> list[Record]:
    """Copies of the detections (the library writes into them). Raises UserError with a count and the first fault of a kind."""
    if not isinstance(detections, list):
        raise UserError(f"detections must be a list of objects with {RESULT_KEYS}: COCO's results format")
    if malformed := [one for one in detections if not _well_formed(one)]:
        raise UserError(
            f"{len(malformed)} detections lack one of {RESULT_KEYS} or a number, the first is {malformed[0]!r:.200}"
        )
    _refuse_strangers(detections, truth["images"], truth["categories"], "detections")
    return [{key: one[key] for key in RESULT_KEYS} for one in detections]


def _refuse_strangers(records: list[Record], images: list[Record], categories: list[Record], what: str) -> None:
    for key, known in ("image_id", {one["id"] for one in images}), ("category_id", {one["id"] for one in categories}):
        if unknown := [one for one in records if one[key] not in known]:
            raise UserError(f"{len(unknown)} {what} name an unknown {key}, the first is {unknown[0]!r:.200}")


def _well_formed(one: Any) -> bool:
    if not isinstance(one, Mapping) or not one.keys() >= set(RESULT_KEYS):
        return False
    bbox = one["bbox"]
    numbers = [*bbox, one["score"]] if isinstance(bbox, list) and len(bbox) == 4 else [None]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)


def best_of_each_image(detections: list[Record], limit: int) -> list[Record]:
    """At most `limit` detections of each image, over all its classes, by score (ties: file order)."""
    groups = _by(detections, "image_id").values()
    return [one for group in groups for one in sorted(group, key=lambda one: -one["score"])[:limit]]


def _by(records: list[Record], key: str) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for one in records:
        groups.setdefault(one[key], []).append(one)
    return groups


def _accumulate(detections: list[Record], truth: Record, style: str, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T IoUs, R recalls, K categories by id, A areas, M limits) and recall (T, K, A, M); -1 without truth.

    Categories never meet in AP, so each is run alone on the images it occurs in: the library keeps an entry for every pair of
    image and category it is given.
    """
    wanted = _by(truth["annotations"], "category_id")
    found = _by(detections, "category_id")
    images = {one["id"]: one for one in truth["images"]}
    categories = truth["categories"]
    precision = np.full((10, 101, len(categories), 1 + len(AREAS), len(limits)), -1.0)
    recall = np.full((10, len(categories), 1 + len(AREAS), len(limits)), -1.0)
    for k, category in enumerate(categories):
        if mine := wanted.get(category["id"]):
            hits = found.get(category["id"], [])
            seen = [images[image_id] for image_id in sorted({one["image_id"] for one in mine + hits})]
            part = {"images": seen, "annotations": mine, "categories": [category]}
            precision[:, :, k : k + 1], recall[:, k : k + 1] = _run_category(hits, part, style, limits)
    return precision, recall


def _run_category(detections: list[Record], truth: Record, style: str, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    known = COCO(truth)
    run = COCOeval_faster(known, known.loadRes(detections), "bbox", print_function=_silent, lvis_style=style == "lvis")
    run.params.maxDets = limits
    run.evaluate()
    run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def _silent(*_: object) -> None:
    """The library reports its progress by printing; stdout belongs to the caller's results."""


def _summary(precision: np.ndarray, recall: np.ndarray, frequencies: list[str | None], limits: list[int]) -> dict[str, float]:
    """The official numbers, each a mean over what has ground truth. Shapes as in `_accumulate`; frequencies: (K,)."""
    ap = precision[:, :, :, 0, -1]
    groups = {name: [k for k, one in enumerate(frequencies) if one == letter] for name, letter in FREQUENCIES.items()}
    return {
        "ap": _mean(ap),
        "ap50": _mean(ap[IOU_50]),
        "ap75": _mean(ap[IOU_75]),
        **{f"ap_{name}": _mean(precision[:, :, :, a, -1]) for name, a in AREAS.items()},
        **{f"ap_{name}": _mean(ap[:, :, group]) for name, group in groups.items() if any(frequencies)},
        **{f"ar_{limit}": _mean(recall[:, :, 0, m]) for m, limit in enumerate(limits)},
        **{f"ar_{name}": _mean(recall[:, :, a, -1]) for name, a in AREAS.items()},
    }


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0
