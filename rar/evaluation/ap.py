"""Average precision of detections against a COCO, LVIS or V3Det ground truth, by the official definitions.

The matching and accumulation are faster-coco-eval's (C++). Around it, five things are done here:

- Everything is checked first, because the library skips what it does not know (a detection of an unknown category vanishes).
- LVIS keeps the 300 best detections of an image over all its classes before anything else (lvis-api, `LVISResults`). The
  library's own limit is per image and class, as in COCO, so the cut is made here. The V3Det benchmark is COCO's definition with
  300 detections an image and class, from detectors that write at most 300 an image (mmdetection, configs/v3det), so style v3det
  makes the same cut.
- LVIS knows neither crowds nor boxes without area, of truths or detections, and has an `ignore` flag of its own, which COCO's
  definition overwrites with `iscrowd` (lvis-api, `LVISEval._prepare`, `LVIS.get_ann_ids`). The library knows COCO's alone; an
  ignored truth is given an area beyond every area group, which means the same.
- Categories are run a few at a time and only their means are kept: the library's precision array for V3Det's 13,204 categories
  would be 10 x 101 x 13204 x 4 areas x 3 limits x 8 bytes = 1.3 GB, and no two categories ever meet in it.
- The numbers are means of those, not the library's printed summary, so that the frequency groups r/c/f exist for every truth
  whose categories carry `frequency`, in COCO style too.

A group without any ground truth has the value -1, as in the official evaluators.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rar.corpus import truth as truths
from rar.corpus.coco import records
from rar.corpus.truth import Truth
from rar.evaluation.scoring import Detections
from rar.schema import UserError

Style = Literal["coco", "lvis", "v3det"]
IMAGE_LIMITS: dict[Style, int | None] = {"coco": None, "lvis": 300, "v3det": 300}  # detections an image, over all classes
CLASS_LIMITS: dict[Style, list[int]] = {"coco": [1, 10, 100], "lvis": [300], "v3det": [300]}  # an image and class
AREAS = {"small": 1, "medium": 2, "large": 3}  # positions on the area axis; 0 is "all"
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
BEYOND = 1e11  # square pixels: above every area group's bound, 1e5 ** 2
OVERLAPS = {"ap": slice(0, 10), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of the thresholds .50, .55, ..., .95
TOGETHER = 8  # categories a call: fewer pay more calls, more pay for pairs of image and category that are empty

Record = dict[str, Any]


class Means(NamedTuple):
    """What is kept of each of K categories (by id); NaN where an area group has no ground truth of it."""

    ap: np.ndarray  # (K, 3 OVERLAPS, 4 areas), over the recall axis and the thresholds, at the last limit
    ar: np.ndarray  # (K, M limits, 4 areas), over the thresholds


def evaluate(
    detections: Detections | list[Record] | str | Path, truth: Truth | Record | str | Path, style: Style
) -> dict[str, float]:
    """AP and AR in 0..1 of scored boxes against a truth.

    detections: columns, a list in COCO's results format ({image_id, category_id, bbox xywh, score}), or the path of its JSON.
    truth: a COCO/LVIS/V3Det object, never changed, or the path of its JSON, all of whose annotations must be usable; whoever
    read a Truth was told of those that are not. Ids are compared as in corpus.truth. Keys: ap, ap50, ap75, ap_small, ap_medium,
    ap_large; coco: ar_1, ar_10, ar_100; lvis and v3det: ar_300; ar_small, ar_medium, ar_large; and ap_rare, ap_common,
    ap_frequent where the categories have `frequency` (lvis always has). No detections give zeros.
    Raises UserError for files of another kind, annotations or detections that cannot be used (how many, and the first), and for
    style lvis on a truth without LVIS' fields.
    """
    known = truth if isinstance(truth, Truth) else whole(truth)
    known.refuse_ids_twice()
    if style == "lvis":
        _check_lvis(known)
    found = detections if isinstance(detections, Detections) else read_detections(detections, known)
    sight = Sight(known, style)
    means = _accumulate(sight.seen(found), known, sight.boxes, style)
    return _summary(means, [category.frequency for category in known.categories], CLASS_LIMITS[style])


def whole(source: Record | str | Path) -> Truth:
    """A truth all of whose annotations can be used; else UserError: an AP without some of the truth is of another data set."""
    truth = truths.read(source, "truth")
    if missing := [key for key in ("annotations", "categories") if key not in truth.keys]:
        raise UserError(f"{truth.source} is no COCO object detection file: it has no list `{missing[0]}`")
    if truth.faults:
        count = sum(fault.annotations for fault in truth.faults)
        raise UserError(
            f"{count} annotations of {truth.source} cannot be used, the first: {truth.faults[0].text}; mend or remove them"
        )
    return truth


def _check_lvis(truth: Truth) -> None:
    if any(picture.negative is None or picture.not_exhaustive is None for picture in truth.pictures):
        raise UserError("style lvis needs neg_category_ids and not_exhaustive_category_ids on every image; use style coco")
    if any(category.frequency not in FREQUENCIES.values() for category in truth.categories):
        raise UserError("style lvis needs a frequency r, c or f on every category; use style coco")


def read_detections(source: list[Record] | str | Path, truth: Truth) -> Detections:
    """COCO's results format as columns. Raises UserError with a count and the first fault of a kind."""
    columns: dict[str, array] = {"image_id": array("q"), "category_id": array("q"), "numbers": array("d")}
    ids = {"image_id": truth.picture_ids, "category_id": truth.category_ids}
    malformed, unknown = (0, ""), dict.fromkeys(ids, (0, ""))
    for one in records(source, "detections"):
        if (
            not isinstance(one, dict)
            or not one.keys() >= set(RESULT_KEYS)
            or truths.bbox_fault(one["bbox"])
            or not truths.is_number(one["score"])
        ):
            malformed = (malformed[0] + 1, malformed[1] or f"{one!r:.200}")
            continue
        for key, known in ids.items():
            place = known.place(one[key])
            columns[key].append(place)
            if place < 0:
                unknown[key] = (unknown[key][0] + 1, unknown[key][1] or f"{key} {one[key]!r:.60}")
        columns["numbers"].extend((*one["bbox"], one["score"]))
    if malformed[0]:
        raise UserError(f"{malformed[0]} detections lack one of {RESULT_KEYS} or a number, the first is {malformed[1]}")
    for key, (count, first) in unknown.items():
        if count:
            raise UserError(f"{count} detections name an unknown {key}, the first is {first}")
    numbers = np.array(columns["numbers"], np.float64).reshape(-1, 5)
    images, categories = (np.array(columns[key], np.int32) for key in ids)
    return Detections(images, categories, numbers[:, :4], numbers[:, 4])


class Sight:
    """What of all detections a style looks at, given a truth; the others change none of its numbers, and need not be kept.

    Those are the best IMAGE_LIMITS of an image over all classes. Of LVIS they must have an area, too, and be of a class that is
    in the image or known not to be (lvis-api, `LVISEval._prepare`): its images are searched for few of its 1,203 classes, so
    nearly all detections of a low score go. `boxes`: the truth's that are looked at.
    """

    def __init__(self, truth: Truth, style: Style) -> None:
        self.limit, self.classes, self.boxes = IMAGE_LIMITS[style], len(truth.categories), truth.boxes
        self.pairs: np.ndarray | None = None  # sorted numbers of image and class
        if style == "lvis":
            self.boxes = truths.take(truth.boxes, _with_area(truth.boxes.area))
            absent = [
                (image, place)
                for image, picture in enumerate(truth.pictures)
                for place in map(truth.category_ids.place, picture.negative or ())
                if place >= 0
            ]
            present = self._pair(self.boxes.image, self.boxes.category)
            self.pairs = np.unique(np.concatenate([present, self._pair(*np.array(absent, np.int64).reshape(-1, 2).T)]))

    def _pair(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return images.astype(np.int64) * self.classes + classes

    def seen(self, found: Detections) -> Detections:
        """Of all detections of some images, those that are looked at; of these again, all.

        An image's must come together: those that the limit cuts away make room for none.
        """
        found = found if self.limit is None else best_of_each_image(found, self.limit)
        if self.pairs is None:
            return found
        found = _take(found, _with_area(np.prod(found.boxes_xywh[:, 2:], axis=1)))
        own = self._pair(found.images, found.categories)
        at = np.searchsorted(self.pairs, own)
        return _take(found, np.flatnonzero(np.append(self.pairs, -1)[at] == own))


def _with_area(area: np.ndarray) -> np.ndarray:
    return np.flatnonzero((area > 0) & (area < np.inf))


def best_of_each_image(found: Detections, limit: int) -> Detections:
    """At most `limit` detections of each image, over all its classes, by score (ties: as given); image by image, best first."""
    order = np.lexsort((-found.scores, found.images))
    images = found.images[order]
    return _take(found, order[np.arange(len(order)) - np.searchsorted(images, images) < limit])


def _take(found: Detections, rows: np.ndarray) -> Detections:
    """Some rows; all of them in their order are no copy, as millions were cut and ordered before."""
    if len(rows) == len(found.scores) and (rows[:1] == 0).all() and (np.diff(rows) == 1).all():
        return found
    return Detections(*(column[rows] for column in found))


def _accumulate(found: Detections, truth: Truth, boxes: truths.Columns, style: Style) -> Means:
    """The categories that have ground truth, TOGETHER at a time, on the images where they occur.

    The library keeps an entry for every pair of image and category that it is given, and nearly all pairs of a large vocabulary
    are empty.
    """
    images, count = _images(truth, style), len(truth.categories)
    means = Means(np.full((count, len(OVERLAPS), 4), np.nan), np.full((count, len(CLASS_LIMITS[style]), 4), np.nan))
    rows_of, hits_of = _by_category(boxes.category), _by_category(found.categories)
    present = np.unique(boxes.category)
    for at in (present[start : start + TOGETHER] for start in range(0, len(present), TOGETHER)):
        rows, hits = (np.concatenate([of(category) for category in at.tolist()]) for of in (rows_of, hits_of))
        seen = np.unique(np.concatenate([boxes.image[rows], found.images[hits]]))
        part = {
            "images": [images[place] for place in seen.tolist()],
            "annotations": _annotations(truths.take(boxes, rows), images, style),
            "categories": [{"id": place, "frequency": truth.categories[place].frequency} for place in at.tolist()],
        }
        means.ap[at], means.ar[at] = _run(_records(_take(found, hits), images), part, style)
    return means


def _by_category(categories: np.ndarray) -> Callable[[int], np.ndarray]:
    """Rows of a category, in order."""
    order = np.argsort(categories, kind="stable")
    ordered = categories[order]
    bounds = np.searchsorted(ordered, np.arange(ordered[-1] + 2 if len(ordered) else 1, dtype=ordered.dtype))
    return lambda category: order[slice(*bounds[category : category + 2])] if category + 1 < len(bounds) else order[:0]


def _images(truth: Truth, style: Style) -> list[Record]:
    """The images as the library knows them. Its ids follow the order of the file's, in which ties of scores are broken."""
    ids = [picture.id for picture in truth.pictures]
    sortable = all(isinstance(one, int | float) for one in ids) or all(isinstance(one, str) for one in ids)
    rank = sorted(range(len(ids)), key=ids.__getitem__) if sortable else range(len(ids))
    images: list[Record] = [{} for _ in ids]
    for number, place in enumerate(rank):
        images[place] = {"id": number}
        if style == "lvis":
            for key, listed in zip(truths.LVIS_LISTS, truth.pictures[place][-2:], strict=True):
                images[place][key] = [truth.category_ids.place(one) for one in listed or ()]
    return images


def _annotations(boxes: truths.Columns, images: list[Record], style: Style) -> list[Record]:
    """Numbered from 1: the library takes 0 for "unmatched"."""
    lvis = style == "lvis"
    area = np.where(boxes.ignore & lvis, BEYOND, boxes.area)
    crowd = boxes.crowd & (not lvis)
    columns = (boxes.image, boxes.category, boxes.xywh, area, crowd.astype(int))
    return [
        {"id": number, "image_id": images[image]["id"], "category_id": category, "bbox": bbox, "area": one, "iscrowd": many}
        for number, (image, category, bbox, one, many) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]


def _records(found: Detections, images: list[Record]) -> list[Record]:
    columns = zip(*(column.tolist() for column in found), strict=True)
    return [dict(zip(RESULT_KEYS, (images[image]["id"], *rest), strict=True)) for image, *rest in columns]


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
