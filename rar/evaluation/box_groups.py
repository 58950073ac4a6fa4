"""What AP does not say: how many objects the proposals find, and how well boxes are named, by size and by frequency.

AP mixes localisation, naming and scores. These take it apart: `ProposalRecall` bounds what any naming can reach with these
boxes, `candidate_recall_*` bounds what the ranker can reach with these candidates, and `top1_*` on ground-truth boxes is naming
alone. The groups are the evaluators' own: COCO's areas, and LVIS' r/c/f, the number of training images of a class.

A group that nothing belongs to has no key, as a share of nothing is no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rar.boxes import MEDIUM_AREA, SMALL_AREA, xywh_to_xyxy
from rar.boxes import iou as box_iou
from rar.corpus.truth import Truth, take
from rar.evaluation.ap import FREQUENCIES
from rar.evaluation.intervals import wilson
from rar.evaluation.metrics import Outcomes


def frequencies(truth: Truth) -> dict[str, str]:
    """{class name: "rare" | "common" | "frequent"} of a truth's categories; empty where they carry no `frequency`."""
    names = {letter: name for name, letter in FREQUENCIES.items()}
    known = ((one.name, one.frequency) for one in truth.categories if isinstance(one.frequency, str) and one.name is not None)
    return {name: names[letter] for name, letter in known if letter in names}


def by_size(areas: np.ndarray) -> dict[str, np.ndarray]:
    """{"small" | "medium" | "large": (N,) bool} of areas (N,) in square pixels."""
    small, medium = areas <= SMALL_AREA, areas <= MEDIUM_AREA
    return {"small": small, "medium": medium & ~small, "large": ~medium}


def by_frequency(labels: Sequence[str | None], of: Mapping[str, str]) -> dict[str, np.ndarray]:
    """{"rare" | "common" | "frequent": (N,) bool} of N class names; `of`: what `frequencies` gives."""
    groups = np.array([of.get(label, "") if label is not None else "" for label in labels], dtype=object)
    return {name: groups == name for name in FREQUENCIES}


def group_accuracies(found: Outcomes, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    """top1_GROUP and candidate_recall_GROUP of the labelled rows of each group, with `.ci_low` and `.ci_high` (95 %, Wilson).

    found: `metrics.outcomes` of a run over ground-truth boxes. groups: {name: (N,) bool}, of `by_size` and `by_frequency`.
    """
    values: dict[str, float] = {}
    for group, members in groups.items():
        rows = members & found.labelled
        for name, hits in ("top1", found.correct), ("candidate_recall", found.recalled):
            values |= _share(f"{name}_{group}", hits[rows])
    return values


class ProposalRecall:
    """The share of objects that some box overlaps by at least `iou`, of boxes that come in any number of parts.

    Crowds are left out of the truth. All boxes count, so cut them to the number per image that is meant first. A box may serve
    several objects, which a matching one to one would not allow: it can be named several times, too. Kept is a flag an object,
    however many boxes there are.
    """

    def __init__(self, truth: Truth, iou: float = 0.5) -> None:
        self.objects = take(truth.boxes, np.flatnonzero(~truth.boxes.crowd))
        self.frequencies = [*(one.frequency for one in truth.categories), None]
        self.iou = iou
        self.hit = np.zeros(len(self.objects.image), bool)
        self._objects_of, self._xyxy = _rows_of(self.objects.image), xywh_to_xyxy(self.objects.xywh)

    def add(self, images: np.ndarray, boxes_xyxy: np.ndarray) -> None:
        """images (P,): place of each box's picture in the truth; boxes_xyxy (P, 4): class-agnostic."""
        boxes_xyxy = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
        boxes_of = _rows_of(np.asarray(images, np.int64))
        for image in self._objects_of.keys() & boxes_of.keys():
            rows = self._objects_of[image]
            self.hit[rows] |= (box_iou(self._xyxy[rows], boxes_xyxy[boxes_of[image]]) >= self.iou).any(axis=1)

    def values(self) -> dict[str, float]:
        """proposal_recall, and proposal_recall_GROUP of each group, with `.ci_low` and `.ci_high`.

        Sizes are the evaluator's (`area` of the file: the segmentation's where there is one).
        """
        of_object = np.array(self.frequencies, dtype=object)[self.objects.category]
        groups = by_size(self.objects.area)
        groups |= {name: of_object == letter for name, letter in FREQUENCIES.items()}
        values = _share("proposal_recall", self.hit)
        for name, members in groups.items():
            values |= _share(f"proposal_recall_{name}", self.hit[members])
        return values


def _rows_of(images: np.ndarray) -> dict[int, np.ndarray]:
    """{image id: its rows}"""
    ids, starts = np.unique(np.sort(images), return_index=True)
    return dict(zip(ids.tolist(), np.split(np.argsort(images, kind="stable"), starts[1:]), strict=False))


def _share(name: str, hits: np.ndarray) -> dict[str, float]:
    if not len(hits):
        return {}
    low, high = wilson(int(hits.sum()), len(hits))
    return {name: float(hits.mean()), f"{name}.ci_low": low, f"{name}.ci_high": high}
