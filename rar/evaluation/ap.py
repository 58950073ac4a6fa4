"""Average precision of detections against a COCO, LVIS or V3Det ground truth, by the official definitions.

The matching and accumulation are faster-coco-eval's (C++). Around it, four things are done here:

- Everything is checked first, because the library skips what it does not know (a detection of an unknown category vanishes).
- LVIS keeps the 300 best detections of an image over all its classes before anything else (lvis-api, `LVISResults`). The
  library's own limit is per image and class, as in COCO, so the cut is made here. The V3Det benchmark is COCO's definition with
  300 detections an image and class, from detectors that write at most 300 an image (mmdetection, configs/v3det), so style v3det
  makes the same cut.
- Categories are run a few at a time and only their means are kept: the library's precision array for V3Det's 13,204 categories
  would be 10 x 101 x 13204 x 4 areas x 3 limits x 8 bytes = 1.3 GB, and no two categories ever meet in it.
- The numbers are means of those, not the library's printed summary, so that the frequency groups r/c/f exist for every truth
  whose categories carry `frequency`, in COCO style too.

A group without any ground truth has the value -1, as in the official evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rar.corpus.coco import read_json
from rar.evaluation.scoring import Detections
from rar.schema import UserError

Style = Literal["coco", "lvis", "v3det"]
IMAGE_LIMITS: dict[Style, int | None] = {"coco": None, "lvis": 300, "v3det": 300}  # detections an image, over all classes
CLASS_LIMITS: dict[Style, list[int]] = {"coco": [1, 10, 100], "lvis": [300], "v3det": [300]}  # an image and class
AREAS = {"small": 1, "medium": 2, "large": 3}  # positions on the area axis; 0 is "all"
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
LVIS_LISTS: dict[str, list[int]] = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
OVERLAPS = {"ap": slice(0, 10), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of the thresholds .50, .55, ..., .95
TOGETHER = 8  # categories a call: fewer pay more calls, more pay for pairs of image and category that are empty

Record = dict[str, Any]


class Means(NamedTuple):
    """What is kept of each of K categories (by id); NaN where an area group has no ground truth of it."""

    ap: np.ndarray  # (K, 3 OVERLAPS, 4 areas), over the recall axis and the thresholds, at the last limit
    ar: np.ndarray  # (K, M limits, 4 areas), over the thresholds


def evaluate(detections: Detections | list[Record] | str | Path, truth: Record | str | Path, style: Style) -> dict[str, float]:
    """AP and AR in 0..1 of scored boxes against a truth.

    detections: columns, a list in COCO's results format ({image_id, category_id, bbox xywh, score}), or the path of its JSON.
    truth: a COCO/LVIS/V3Det object, or the path of its JSON; never changed. Keys: ap, ap50, ap75, ap_small, ap_medium,
    ap_large; coco: ar_1, ar_10, ar_100; lvis and v3det: ar_300; ar_small, ar_medium, ar_large; and ap_rare, ap_common,
    ap_frequent where the categories have `frequency` (lvis always has). No detections give zeros.
    Raises UserError for files of another kind, detections that name an unknown image or category, and for style lvis on a truth
    without LVIS' fields.
    """
    known = check_truth(loaded(truth), style)
    found = detections if isinstance(detections, Detections) else _columns(loaded(detections))
    _refuse_unknown(found, known)
    limit = IMAGE_LIMITS[style]
    if limit is not None:
        found = best_of_each_image(found, limit)
    means = _accumulate(found, known, style)
    return _summary(means, [category.get("frequency") for category in known["categories"]], CLASS_LIMITS[style])


def loaded(source: Any) -> Any:
    """An object, or the JSON file of it."""
    return read_json(str(source)) if isinstance(source, str | Path) else source


def check_truth(truth: Any, style: Style) -> Record:
    """A copy of the truth that the library may write into, annotations numbered from 1 (it takes 0 for "unmatched").

    `area` is the segmentation's where the file has it, as officially defined, and the box's where it does not. Categories are
    sorted by id. Raises UserError for a file of another kind.
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
        images = [{**LVIS_LISTS, **one, "id": int(one["id"])} for one in truth["images"]]
        categories = sorted(({**one, "id": int(one["id"])} for one in truth["categories"]), key=lambda one: one["id"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the truth is no COCO object detection file: {type(error).__name__} {error}") from None
    for key, ids in ("image_id", {one["id"] for one in images}), ("category_id", {one["id"] for one in categories}):
        if unknown := [one for one in annotations if one[key] not in ids]:
            raise UserError(f"{len(unknown)} annotations of the truth name an unknown {key}, the first is {unknown[0]!r:.200}")
    if style == "lvis" and not all(LVIS_LISTS.keys() <= one.keys() for one in truth["images"]):
        raise UserError(f"style lvis needs {' and '.join(LVIS_LISTS)} on every image; use style coco")
    if style == "lvis" and not all(one.get("frequency") in FREQUENCIES.values() for one in categories):
        raise UserError("style lvis needs a frequency r, c or f on every category; use style coco")
    return {"images": images, "annotations": annotations, "categories": categories}


def _columns(detections: Any) -> Detections:
    """A list in COCO's results format as columns. Raises UserError with a count and the first fault of a kind."""
    if not isinstance(detections, list):
        raise UserError(f"detections must be a list of objects with {RESULT_KEYS}: COCO's results format")
    if malformed := [one for one in detections if not _well_formed(one)]:
        raise UserError(
            f"{len(malformed)} detections lack one of {RESULT_KEYS} or a number, the first is {malformed[0]!r:.200}"
        )
    return Detections(
        np.array([one["image_id"] for one in detections], np.int64),
        np.array([one["category_id"] for one in detections], np.int64),
        np.array([one["bbox"] for one in detections], np.float64).reshape(-1, 4),
        np.array([one["score"] for one in detections], np.float64),
    )


def _well_formed(one: Any) -> bool:
    if not isinstance(one, Mapping) or not one.keys() >= set(RESULT_KEYS):
        return False
    bbox = one["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(one[key], int) for key in RESULT_KEYS[:2]):
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in [*bbox, one["score"]])


def _refuse_unknown(found: Detections, truth: Record) -> None:
    for column, key, records in (found.image_ids, "image_id", "images"), (found.category_ids, "category_id", "categories"):
        unknown = np.flatnonzero(~np.isin(column, [one["id"] for one in truth[records]]))
        if len(unknown):
            raise UserError(f"{len(unknown)} detections name an unknown {key}, the first is {key} {column[unknown[0]]}")


def best_of_each_image(found: Detections, limit: int) -> Detections:
    """At most `limit` detections of each image, over all its classes, by score (ties: as given); image by image, best first."""
    order = np.lexsort((-found.scores, found.image_ids))
    images = found.image_ids[order]
    kept = order[np.arange(len(order)) - np.searchsorted(images, images) < limit]
    return Detections(*(column[kept] for column in found))


def _accumulate(found: Detections, truth: Record, style: Style) -> Means:
    """The categories that have ground truth, TOGETHER at a time, on the images where they occur.

    The library keeps an entry for every pair of image and category that it is given, and nearly all pairs of a large vocabulary
    are empty.
    """
    categories = truth["categories"]
    wanted: dict[int, list[Record]] = {one["id"]: [] for one in categories}
    for one in truth["annotations"]:
        wanted[one["category_id"]].append(one)
    images = {one["id"]: one for one in truth["images"]}
    order = np.argsort(found.category_ids, kind="stable")
    sorted_ids = found.category_ids[order]
    count = len(categories)
    means = Means(np.full((count, len(OVERLAPS), 4), np.nan), np.full((count, len(CLASS_LIMITS[style]), 4), np.nan))
    present = [k for k, category in enumerate(categories) if wanted[category["id"]]]
    for start in range(0, len(present), TOGETHER):
        at = present[start : start + TOGETHER]
        ids = [categories[k]["id"] for k in at]
        hits = _records(found, np.concatenate([order[slice(*np.searchsorted(sorted_ids, [i, i + 1]))] for i in ids]))
        mine = [one for category_id in ids for one in wanted[category_id]]
        seen = sorted({one["image_id"] for one in mine + hits})
        part = {"images": [images[i] for i in seen], "annotations": mine, "categories": [categories[k] for k in at]}
        means.ap[at], means.ar[at] = _run(hits, part, style)
    return means


def _records(found: Detections, rows: np.ndarray) -> list[Record]:
    columns = zip(*(column[rows].tolist() for column in found), strict=True)
    return [dict(zip(RESULT_KEYS, one, strict=True)) for one in columns]


def _run(detections: list[Record], truth: Record, style: Style) -> tuple[np.ndarray, np.ndarray]:
    """Rows of Means. Where a category has no ground truth of an area group, the library writes -1 into all its cells."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    known = COCO(truth)
    run = COCOeval_faster(known, known.loadRes(detections), "bbox", print_function=_silent, lvis_style=style == "lvis")
    run.params.maxDets = CLASS_LIMITS[style]
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"][..., -1].mean(axis=1)  # (10 thresholds, K, 4 areas)
    recall = run.eval["recall"].mean(axis=0).swapaxes(1, 2)  # (K, M limits, 4 areas)
    ap = np.stack([precision[at].mean(axis=0) for at in OVERLAPS.values()], axis=1)
    return np.where(ap < 0, np.nan, ap), np.where(recall < 0, np.nan, recall)


def _silent(*_: object) -> None:
    """The library reports its progress by printing; stdout belongs to the caller's results."""


def _summary(means: Means, frequencies: list[str | None], limits: list[int]) -> dict[str, float]:
    """The official numbers, each a mean over the categories that have ground truth. frequencies: (K,)."""
    letters = np.array(frequencies, dtype=object)
    groups = {name: letters == letter for name, letter in FREQUENCIES.items() if any(frequencies)}
    return {
        **{name: _mean(means.ap[:, at, 0]) for at, name in enumerate(OVERLAPS)},
        **{f"ap_{name}": _mean(means.ap[:, 0, area]) for name, area in AREAS.items()},
        **{f"ap_{name}": _mean(means.ap[group, 0, 0]) for name, group in groups.items()},
        **{f"ar_{limit}": _mean(means.ar[:, at, 0]) for at, limit in enumerate(limits)},
        **{f"ar_{name}": _mean(means.ar[:, -1, area]) for name, area in AREAS.items()},
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else -1.0
