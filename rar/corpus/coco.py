"""Pictures with the boxes to recognise: a ground truth's own (see truth), or a detector's proposals, as rows of an index.

- Rows keep the file's order: row i of the index is image i of the JSON, so that whatever is joined by row is joined by image.
- A proposals file loses exact duplicates only, the same box under several classes being what class-aware detectors write. There
  is no further suppression: detectors have done theirs, and a second threshold would be a hidden parameter. A ground truth
  loses none: the same box under two labels is two objects.
- Proposals come by the million, so a file is read in slices, and a slice whose every row is well formed becomes arrays at once.
  One malformed row sends its slice through the checks row by row, which say what is wrong with which box.
- A proposal's score is a probability, or is made one: everything after multiplies it (see scoring), and a negative
  factor would turn the order of a box's classes around. Which it is is not guessed but said, by `detect.proposal_scores`.
- Crowd regions (`iscrowd`) of a ground truth are left out: they show no single object, and evaluators ignore them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rar import storage
from rar.boxes import xywh_to_xyxy
from rar.config import Corpus, Detect
from rar.corpus import listing
from rar.corpus import truth as truths
from rar.corpus.jsonstream import items
from rar.corpus.truth import Truth
from rar.schema import INDEX, UserError

PROPOSAL_COLUMNS = ["image_id", "bbox", "score"]
SLICE = 65_536  # proposals turned into arrays at once
ROUNDING = 1e-4  # how far beyond 0..1 a probability in half precision, or of few decimals, may lie

BOXES = pa.schema(
    [
        *INDEX,
        ("coco_id", pa.string()),  # the picture's id as JSON, as it is written in the file: 9, 9.0 or "000009"
        ("width", pa.int64()),  # of the picture, as the file states it: the frame that the boxes lie in
        ("height", pa.int64()),
        ("boxes_xyxy", pa.list_(pa.list_(pa.float32()))),
        ("box_scores", pa.list_(pa.float32())),
        ("box_labels", pa.list_(pa.string())),
        ("box_ids", pa.list_(pa.int64())),
    ]
)

Error = dict[str, str | None]


class Boxes(NamedTuple):
    """P boxes of many images, in file order."""

    images: np.ndarray  # (P,) int64, place among the file's images
    xyxy: np.ndarray  # (P, 4) float64
    scores: np.ndarray  # (P,) float64
    labels: np.ndarray  # (P,) object: category names; None for proposals
    ids: np.ndarray  # (P,) int64: the annotation's id (see truth), or the proposal's position in its file


class Columns(NamedTuple):
    """PROPOSAL_COLUMNS of some proposals, of whatever types and shapes numpy found."""

    image_ids: list[Any]
    bboxes_xywh: np.ndarray
    scores: np.ndarray


def read_boxes(corpus: Corpus, detect: Detect) -> tuple[pa.Table, list[Error]]:
    """The images of a COCO/LVIS/V3Det JSON with their boxes to recognise, and the boxes that cannot be used.

    corpus.uri: the JSON; for the names of files see `truth.uris`. Boxes: those of detect.proposals (COCO-results JSON, or
    parquet with columns image_id, bbox, score), at most detect.max_boxes an image, best first; else the annotations.

    Returns a table (schema BOXES, boxes as in the file: unclipped), one row per image in the file's order, with empty lists
    where an image has no box; and one ERRORS row per unusable box, or per image id that the corpus lacks.
    Raises UserError for a file that is missing or not of this kind, for ids used twice, for scores that are no probabilities,
    and when not one box can be used.
    """
    truth, uris = _read(corpus, annotations=detect.proposals is None)
    source = detect.proposals or truth.source
    if detect.proposals is None:
        boxes, errors = _annotations(truth, uris)
    else:
        boxes, errors = _collect(_proposals(source), truth, uris, source)
        boxes = boxes._replace(scores=_probabilities(boxes.scores, detect, source))
    if errors and not len(boxes.ids):
        raise UserError(f"none of the boxes of {source} can be used; the first fault: {errors[0]['error']}")
    if detect.proposals is not None:
        boxes = best_boxes(boxes, detect.max_boxes)
    shown = {source, *uris[: corpus.limit]}
    crowds = int(truth.boxes.crowd.sum()) if detect.proposals is None else 0
    told = [f"{crowds:,} crowd regions show no single object, and are left out"] if crowds else []
    return _table(truth, uris[: corpus.limit], boxes, told), [error for error in errors if error["uri"] in shown]


def is_json(corpus: Corpus) -> bool:
    """Whether a corpus is a COCO, LVIS or V3Det file and not a collection of pictures alone."""
    return corpus.format == "coco" or (corpus.format == "auto" and corpus.uri.endswith(".json"))


def truth_of(corpus: Corpus) -> Truth | None:
    """The ground truth of a corpus: its JSON, where that has annotations and categories; else None.

    Annotations that cannot be used are rows of errors already, and are not part of it.
    """
    if not is_json(corpus):
        return None
    truth = truths.read(corpus.uri)
    return truth if truth.categories and (len(truth.boxes.id) or truth.faults) else None


def list_pictures(corpus: Corpus) -> pa.Table:
    """The images of a COCO JSON as a table of schema BOXES without boxes."""
    truth, uris = _read(corpus, annotations=False)
    return _table(truth, uris[: corpus.limit], _boxes_of([]))


def without_boxes(index: pa.Table) -> pa.Table:
    """An index of any pictures (schema INDEX) as one of schema BOXES without boxes; a picture's id is its row."""
    size = pa.nulls(index.num_rows, pa.int64())
    index = index.append_column("coco_id", index["row"].cast(pa.string()))
    index = index.append_column("width", size).append_column("height", size)
    for field in list(BOXES)[len(index.column_names) :]:
        index = index.append_column(field, pa.array([[]] * index.num_rows, field.type))
    return index.cast(BOXES.with_metadata(index.schema.metadata))


def with_proposals(found: pa.Table) -> pa.Table:
    """Rows of schema BOXES with new boxes_xyxy and box_scores -> the same with fitting labels (none) and ids (by place)."""
    counts = [len(scores) for scores in found["box_scores"].to_pylist()]
    fitting = {"box_labels": [[None] * count for count in counts], "box_ids": [list(range(count)) for count in counts]}
    for name, values in fitting.items():
        found = found.drop_columns([name]).append_column(BOXES.field(name), pa.array(values, BOXES.field(name).type))
    return found.select(BOXES.names).cast(BOXES)


def _read(corpus: Corpus, *, annotations: bool) -> tuple[Truth, list[str]]:
    """A corpus' ground truth, and the uri of each of its images."""
    truth = truths.read(corpus.uri, boxes=annotations)
    truth.refuse_ids_twice()
    return truth, truths.uris(truth, truths.folder_of(corpus, corpus.uri))


def _annotations(truth: Truth, uris: list[str]) -> tuple[Boxes, list[Error]]:
    """The ground truth's boxes but for crowds, and ERRORS rows for what cannot be used."""
    boxes, names = truth.boxes, np.array([*truth.names, None], dtype=object)
    unnamed = np.array([name is None for name in names])[boxes.category]
    faults = list(truth.faults)
    for row in np.flatnonzero(unnamed).tolist():
        text = f"annotation {boxes.id[row]} has category_id {truth.categories[boxes.category[row]].id!r}, which has no name"
        faults.append(truths.Fault(int(boxes.image[row]), text))
    errors = [_error(uris[fault.image] if fault.image >= 0 else truth.source, fault.text, truth.source) for fault in faults]
    found = truths.take(boxes, np.flatnonzero(~boxes.crowd & ~unnamed))
    return Boxes(found.image, xywh_to_xyxy(found.xywh), np.ones(len(found.id)), names[found.category], found.id), errors


def _error(uri: str, text: str, source: str) -> Error:
    return {"image_id": None, "uri": uri, "stage": "boxes", "error": text if uri == source else f"{text}, in {source}"}


def _proposals(path: str) -> Iterator[Columns | list[dict[str, Any]]]:
    """A detector's boxes, whatever classes they carry, slice by slice: as columns, or as rows where one is malformed."""
    for rows in _parquet_batches(path) if path.endswith(".parquet") else _slices(path):
        columns = _arrow_columns(rows) if isinstance(rows, pa.RecordBatch) else _columns(rows)
        if columns is not None and _well_formed(columns):
            yield columns
        else:
            yield rows.to_pylist() if isinstance(rows, pa.RecordBatch) else rows


def _slices(path: str) -> Iterator[list[dict[str, Any]]]:
    rows = records(path, "detect.proposals")
    while part := list(islice(rows, SLICE)):
        yield [one if isinstance(one, dict) else {} for one in part]


def records(source: Any, what: str) -> Iterator[Any]:
    """The items of a file in COCO's results format (or of a list that was one). Raises UserError for another kind of file."""
    for key, number, value in items(source, what):
        if key != "":
            raise UserError(
                f"{what} must be a list of objects with image_id, category_id, bbox and score: COCO's results format"
            )
        if number is not None:
            yield value


def _parquet_batches(path: str) -> Iterator[pa.RecordBatch]:
    with storage.explained("detect.proposals", path), storage.open_file(path) as handle:
        file = pq.ParquetFile(handle)
        if missing := [column for column in PROPOSAL_COLUMNS if column not in file.schema_arrow.names]:
            raise UserError(f"{path} lacks the columns {missing}; proposals need {PROPOSAL_COLUMNS}")
        yield from file.iter_batches(SLICE, columns=PROPOSAL_COLUMNS)


def _columns(rows: list[dict[str, Any]]) -> Columns | None:
    """None where a row lacks a column or a bbox has another length than the rest."""
    try:
        bboxes, scores = (np.array([row[column] for row in rows]) for column in PROPOSAL_COLUMNS[1:])
        return Columns([row["image_id"] for row in rows], bboxes, scores)
    except (KeyError, ValueError, OverflowError):
        return None


def _arrow_columns(batch: pa.RecordBatch) -> Columns | None:
    """None where anything is null or a bbox is no list of four."""
    bbox = batch["bbox"]
    if any(column.null_count for column in batch.columns) or not pa.types.is_list(bbox.type):
        return None
    if pc.any(pc.not_equal(pc.list_value_length(bbox), 4)).as_py() or (flat := bbox.flatten()).null_count:
        return None
    corners, scores = (column.to_numpy(zero_copy_only=False) for column in (flat, batch["score"]))
    return Columns(batch["image_id"].to_pylist(), corners.reshape(-1, 4), scores)


def _well_formed(columns: Columns) -> bool:
    """Whether boxes and scores are finite numbers all through."""
    ids, bboxes_xywh, scores = columns
    if bboxes_xywh.dtype.kind not in "iuf" or scores.dtype.kind not in "iuf" or bboxes_xywh.shape != (len(ids), 4):
        return False
    return bool(scores.shape == (len(ids),) and np.isfinite(bboxes_xywh).all() and np.isfinite(scores).all())


def _collect(
    slices: Iterable[Columns | list[dict[str, Any]]], truth: Truth, uris: list[str], source: str
) -> tuple[Boxes, list[Error]]:
    """The usable boxes, and ERRORS rows for the others. Unknown image ids make one error each, however many boxes."""
    parts = [_boxes_of([])]
    errors: list[tuple[str, str]] = []
    strangers: Counter[str] = Counter()
    first = 0
    for one in slices:
        ids = one.image_ids if isinstance(one, Columns) else [row.get("image_id") for row in one]
        images = truth.picture_ids.places(ids)
        strangers.update(f"{ids[row]!r:.60}" for row in np.flatnonzero(images < 0).tolist())
        numbers = np.arange(first, first + len(ids))
        if isinstance(one, Columns):
            corners = xywh_to_xyxy(one.bboxes_xywh.astype(np.float64))
            boxes = Boxes(images, corners, one.scores.astype(np.float64), np.full(len(ids), None, object), numbers)
            parts.append(_take(boxes, np.flatnonzero(images >= 0)))
        else:
            good = []
            for row, image, number in zip(one, images.tolist(), numbers.tolist(), strict=True):
                if image >= 0 and (fault := _row_fault(row)):
                    errors.append((uris[image], f"box {number} of {source} {fault}"))
                elif image >= 0:
                    good.append((image, row["bbox"], row["score"], number))
            parts.append(_boxes_of(good))
        first += len(ids)
    errors += [(source, f"{count} boxes of image_id {name}, which the corpus lacks") for name, count in strangers.items()]
    boxes = Boxes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return boxes, [{"image_id": None, "uri": uri, "stage": "boxes", "error": error} for uri, error in errors]


def _boxes_of(rows: list[tuple[int, list[float], float, int]]) -> Boxes:
    return Boxes(
        np.array([row[0] for row in rows], dtype=np.int64),
        xywh_to_xyxy(np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4)),
        np.array([row[2] for row in rows], dtype=np.float64),
        np.full(len(rows), None, object),
        np.array([row[3] for row in rows], dtype=np.int64),
    )


def _row_fault(row: dict[str, Any]) -> str | None:
    if not truths.is_number(row.get("score")):
        return truths.bbox_fault(row.get("bbox")) or f"has score {row.get('score')!r:.40}, not a finite number"
    return truths.bbox_fault(row.get("bbox"))


def _probabilities(scores: np.ndarray, detect: Detect, source: str) -> np.ndarray:
    """(P,) scores as the file has them -> in 0..1. Raises UserError where they are not what `detect.proposal_scores` says."""
    if detect.proposal_scores == "logit":
        return 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    if len(scores) and (scores.min() < -ROUNDING or scores.max() > 1 + ROUNDING):
        raise UserError(
            f"scores of {source} lie in {scores.min():.4g} .. {scores.max():.4g}, and must be probabilities in 0..1; for "
            "logits set detect.proposal_scores: logit (a sigmoid is applied), percentages divide by 100"
        )
    return np.clip(scores, 0, 1)


def best_boxes(boxes: Boxes, max_boxes: int) -> Boxes:
    """At most max_boxes an image, best score first (ties: file order); of equal boxes of an image only the best stays."""
    x0, y0, x1, y1 = boxes.xyxy.T
    groups = np.lexsort((boxes.ids, -boxes.scores, y1, x1, y0, x0, boxes.images))
    same = (np.diff(boxes.images[groups]) == 0) & (np.diff(boxes.xyxy[groups], axis=0) == 0).all(axis=1)
    kept = groups[np.concatenate([[True], ~same])[: len(groups)]]
    kept = kept[np.lexsort((boxes.ids[kept], -boxes.scores[kept], boxes.images[kept]))]
    images = boxes.images[kept]
    return _take(boxes, kept[np.arange(len(kept)) - np.searchsorted(images, images) < max_boxes])


def _take(boxes: Boxes, index: np.ndarray) -> Boxes:
    return Boxes(*(column[index] for column in boxes))


def _table(truth: Truth, uris: list[str], boxes: Boxes, told: Sequence[str] = ()) -> pa.Table:
    """One row (schema BOXES) for each of the first images; boxes of other images are left out, the others keep their order.

    told: what there is to tell of it.
    """
    count = len(uris)
    order = np.argsort(boxes.images, kind="stable")
    boxes = _take(boxes, order[: np.count_nonzero(boxes.images < count)])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(boxes.images, minlength=count))]).astype(np.int32)
    ends = np.arange(len(boxes.ids) + 1, dtype=np.int32) * 4
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused where it is cut out
        corners = pa.ListArray.from_arrays(ends, boxes.xyxy.astype(np.float32).ravel())
    pictures = truth.pictures[:count]
    table = pa.table(
        {
            "row": pa.array(range(count), pa.int64()),
            "uri": pa.array(uris, pa.string()),
            "offset": pa.nulls(count, pa.int64()),
            "size": pa.nulls(count, pa.int64()),
            "label": pa.nulls(count, pa.string()),
            "coco_id": pa.array([truths.as_written(picture.id) for picture in pictures], pa.string()),
            "width": pa.array([picture.size and picture.size[0] for picture in pictures], pa.int64()),
            "height": pa.array([picture.size and picture.size[1] for picture in pictures], pa.int64()),
            "boxes_xyxy": pa.ListArray.from_arrays(offsets, corners),
            "box_scores": pa.ListArray.from_arrays(offsets, pa.array(boxes.scores, pa.float32())),
            "box_labels": pa.ListArray.from_arrays(offsets, pa.array(boxes.labels, pa.string())),
            "box_ids": pa.ListArray.from_arrays(offsets, pa.array(boxes.ids, pa.int64())),
        },
        schema=BOXES,
    )
    return listing.with_remarks(table, list(told))
