"""One run as its folder tells it: config, numbers, predictions, and what is known to be true of each.

Predictions and index join by row and place, as in the metrics. A picture's true class is in the index. A given box's is, too.
A proposal has none of its own: it takes the label of the object that it overlaps most, by an IoU of at least BOX_OVERLAP, as
the evaluators match at their lowest threshold. That is read from the corpus' JSON where that can still be read; where not,
the run is shown unjudged and says why. AP matches otherwise (one to one, class by class), so counts over proposals explain a
run's AP and do not add up to it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from rar import boxes, config, fusion
from rar.columns import box_positions, positions
from rar.corpus import coco
from rar.corpus.datasets import named
from rar.evaluation import metrics
from rar.runfolder import RunFolder, read_table
from rar.schema import INDEX, SCHEMA_VERSION, UserError

NEIGHBORS = "neighbors.parquet"  # of a run folder: what the memory holds near the predictions that are shown
SHOWN = 20_000  # predictions that plots and pictures are drawn from
BOX_OVERLAP = 0.5  # least IoU at which a proposal takes the label of an object
GIVEN = "Boxes are the given ones, with their labels."
JUDGED = (
    "Boxes are proposals. One that overlaps an object by an IoU of 0.5 or more is judged by the object's class, others are not."
)

Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class BoxView:
    """What a detection run has beyond others; arrays are aligned with the rows of its predictions."""

    xyxy: np.ndarray  # (N, 4) float32 pixels
    scores: np.ndarray  # (N,) float32: the proposal's score; NaN for a given box
    shown: config.Shown  # how the ranker saw a box
    note: str  # what the boxes are, and how they are judged


class Neighbor(NamedTuple):
    """A picture of the memory near to one that was looked up. score: their cosine. picture: a small JPEG."""

    class_name: str
    score: float
    picture: bytes


@dataclass(frozen=True)
class RunView:
    """One run. `truth`, `found`, `places` and the arrays of `boxes` are aligned with the rows of `predictions`.

    Of a large run, `predictions` are those of shards that lie evenly over it, about SHOWN rows.
    """

    name: str
    group: str
    info: dict[str, Any]  # run.json
    values: dict[str, float | None]  # metrics.json
    predictions: pa.Table
    errors: pa.Table
    index: pa.Table
    places: np.ndarray  # (N,) int64: where in `index` its picture stands
    truth: list[str | None]
    found: metrics.Outcomes
    boxes: BoxView | None  # of a detection run
    calibration: fusion.Calibration | None  # decides how many candidates the ranker saw; None in folders that lack it
    neighbors: dict[tuple[int, int | None], list[Neighbor]]  # row and place -> nearest pictures of the memory, of some rows

    @property
    def main(self) -> float:
        """The number that runs are compared by: top1, else AP, else nothing."""
        return number(self.values.get("top1", self.values.get("ap")))

    @cached_property
    def won(self) -> np.ndarray:
        """(N,) bool: right, and the retriever's first candidate was not."""
        return self.found.correct & ~self.found.retriever_correct

    @cached_property
    def lost(self) -> np.ndarray:
        """(N,) bool: wrong, and the retriever's first candidate was right."""
        return self.found.retriever_correct & ~self.found.correct

    @cached_property
    def flipped(self) -> np.ndarray:
        """(N,) bool: the prediction is not the retriever's first candidate."""
        return ~metrics.outcomes(self.predictions, self.predictions["class_name"]).retriever_correct


def read_run(path: Path) -> RunView:
    """Read a run folder (design 4.2) of `rar classify`, `rar detect`, or `rar memory`, which has no predictions and no index.

    Raises UserError for a folder that is no run, or whose run has not ended, or is of another verb or version.
    """
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run folder: it holds no run.json")
    info = json.loads((path / "run.json").read_text())
    if "counts" not in info:
        raise UserError(f"{path} holds a run that has not ended; resume it with the command that began it")
    if info["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"{path} was written by another version of rar; repeat the run with --fresh, or use that version")
    if info["verb"] not in ("classify", "detect", "memory"):
        raise UserError(f"{path} is a folder of `rar {info['verb']}`; reports are of classify, detect and memory")
    folder = RunFolder(path)
    predictions, index = folder.some_predictions(SHOWN), INDEX.empty_table()
    if info["verb"] != "memory":
        index = read_table(path / "index.parquet")
    places = positions(predictions["row"], index)
    seen: BoxView | None = None
    if info["verb"] == "detect":
        seen, truth = _boxes(path, info["config"], predictions, index, places)
    else:
        truth = index["label"].take(pa.array(places)).to_pylist()
    found = metrics.outcomes(predictions, truth)
    name, group = str(info.get("name", path.name)), str(info.get("group", info["verb"]))
    values = _metrics(path / "metrics.json")
    calibration = _calibration(path / "calibration.json")
    near = _neighbors(path / NEIGHBORS)
    return RunView(
        name, group, info, values, predictions, folder.errors(), index, places, truth, found, seen, calibration, near
    )


def _neighbors(file: Path) -> dict[tuple[int, int | None], list[Neighbor]]:
    found: dict[tuple[int, int | None], list[Neighbor]] = {}
    for one in read_table(file).to_pylist() if file.is_file() else []:
        near = Neighbor(one["class_name"], one["score"], one["picture"])
        found.setdefault((one["row"], one["place"]), []).append(near)
    return found


def number(value: float | None) -> float:
    """NaN for a number that is not there."""
    return math.nan if value is None else float(value)


def _metrics(file: Path) -> dict[str, float | None]:
    """The numbers of a run. The evaluators' -1, an AP or AR over no ground truth, is as undefined as null."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    return {key: None if key.startswith(("ap", "ar")) and value == -1 else value for key, value in values.items()}


def _calibration(file: Path) -> fusion.Calibration | None:
    if not file.is_file():
        return None
    try:
        return fusion.Calibration.from_dict(json.loads(file.read_text()))
    except TypeError as error:
        raise UserError(f"{file} is of another version of rar: {error}") from None


def _boxes(
    path: Path, settings: dict[str, Any], predictions: pa.Table, index: pa.Table, places: np.ndarray
) -> tuple[BoxView, list[str | None]]:
    """A detection run's boxes and their true names."""
    chosen = _section(config.Detect, settings["detect"], f"{path}/run.json: detect")
    corpus = _section(config.Corpus, settings["corpus"], f"{path}/run.json: corpus")
    xyxy = _corners(predictions["box_xyxy"])
    own = pa.array(box_positions(predictions, index))
    if chosen.proposals is None and chosen.detector is None:
        labels = pc.list_flatten(index["box_labels"]).take(own)
        return BoxView(xyxy, np.full(len(own), np.nan, np.float32), chosen.shown, GIVEN), labels.to_pylist()
    scores = pc.list_flatten(index["box_scores"]).take(own).to_numpy()
    try:
        known, _ = coco.read_boxes(named.as_file(corpus), config.Detect())
    except UserError as error:
        note = f"Boxes are proposals. There is nothing to judge them by: {error}"
        return BoxView(xyxy, scores, chosen.shown, note), [None] * len(xyxy)
    return BoxView(xyxy, scores, chosen.shown, JUDGED), overlapped(index["coco_id"].take(pa.array(places)), xyxy, known)


def _section(model: type[Section], data: dict[str, Any], what: str) -> Section:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{what} is of another version of rar: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _corners(lists: pa.ChunkedArray) -> np.ndarray:
    """N lists of four numbers as (N, 4) float32."""
    return pc.list_flatten(lists).to_numpy().astype(np.float32).reshape(-1, 4)


def overlapped(coco_ids: pa.ChunkedArray, xyxy: np.ndarray, known: pa.Table) -> list[str | None]:
    """The label of the object that each of N boxes (N, 4) overlaps most, or None below an IoU of BOX_OVERLAP.

    coco_ids: the picture of each box, by its id. known: the objects, one row a picture (schema coco.BOXES).
    """
    labels: list[str | None] = [None] * len(xyxy)
    found = pc.index_in(coco_ids, value_set=known["coco_id"].combine_chunks())
    places = np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)
    order = np.argsort(places, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
        if not len(rows) or places[rows[0]] < 0:
            continue
        objects, names = (known[column][places[rows[0]]].as_py() for column in ("boxes_xyxy", "box_labels"))
        if not objects:
            continue
        shared = boxes.iou(xyxy[rows], np.array(objects, np.float64))
        for row, best, overlap in zip(rows.tolist(), shared.argmax(axis=1).tolist(), shared.max(axis=1).tolist(), strict=True):
            labels[row] = names[best] if overlap >= BOX_OVERLAP else None
    return labels
