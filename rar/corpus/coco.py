"""Images and boxes in: COCO/LVIS files and detectors' proposals. Geometry is in boxes.py, scores in score.py.

- Proposals lose exact duplicates only, the same box under several classes being what class-aware detectors write. There is no
  further suppression: detectors have done theirs, and a second threshold would be a hidden parameter.
- Proposals come by the million, so a file is read in slices, and a slice whose every row is well formed becomes arrays at once.
  One malformed row sends its slice through the checks row by row, which say what is wrong with which box.
- Crowd regions (`iscrowd`) of a ground truth are left out: they show no single object, and evaluators ignore them.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.boxes import xywh_to_xyxy
from rar.config import Corpus, Detect
from rar.schema import INDEX, UserError

PROPOSAL_COLUMNS = ["image_id", "bbox", "score"]
SLICE = 65_536  # proposals turned into arrays at once

BOXES = pa.schema(
    [
        *INDEX,
        ("coco_id", pa.int64()),
        ("boxes_xyxy", pa.list_(pa.list_(pa.float32()))),
        ("box_scores", pa.list_(pa.float32())),
        ("box_labels", pa.list_(pa.string())),
        ("box_ids", pa.list_(pa.int64())),
    ]
)


def read_json(path: str) -> Any:
    """A JSON file from any place fsspec knows. Raises UserError when it is missing or no JSON."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"file not found: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a COCO or LVIS JSON file is needed here") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def category_names(path: str) -> dict[int, str]:
    """{category id: name} of a COCO/LVIS JSON, in its order. Raises UserError for a file without or with ambiguous names."""
    return _names(read_json(path), path)


def _names(truth: Any, path: str) -> dict[int, str]:
    try:
        names = {int(category["id"]): str(category["name"]) for category in truth["categories"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} has no COCO `categories` (a list of objects with id and name)") from None
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(
            f"{path}: {len(twice)} category names stand for several ids, the first is {twice[0]!r}; make them unique"
        )
    return names


class Boxes(NamedTuple):
    """P boxes of many images, in file order."""

    image_ids: np.ndarray  # (P,) int64, as in the file
    xyxy: np.ndarray  # (P, 4) float64
    scores: np.ndarray  # (P,) float64
    labels: np.ndarray  # (P,) object: category names; None for proposals
    ids: np.ndarray  # (P,) int64: the annotation's id, or the proposal's position in its file


class Columns(NamedTuple):
    """PROPOSAL_COLUMNS of some proposals, of whatever types and shapes numpy found."""

    image_ids: np.ndarray
    bboxes_xywh: np.ndarray
    scores: np.ndarray


def read_boxes(corpus: Corpus, detect: Detect) -> tuple[pa.Table, list[dict[str, str | None]]]:
    """The images of a COCO/LVIS JSON with their boxes to recognise, and the boxes that cannot be used.

    corpus.uri: the JSON; file names are relative to corpus.images, or to the JSON's folder. LVIS v1 has no file names: its
    images are `<split>/<file>` as in `coco_url`, so the folder must hold train2017/ and val2017/.
    Boxes: those of detect.proposals (COCO-results JSON, or parquet with columns image_id, bbox, score), at most
    detect.max_boxes an image, best first; without proposals, the annotations.

    Returns a table (schema BOXES, boxes as in the file: unclipped), one row per image sorted by file name, with empty lists
    where an image has no box; and one ERRORS row per unusable box, or per image id that the corpus lacks.
    Raises UserError for a file that is missing or not of this kind, and when not one box can be used.
    """
    truth = read_json(corpus.uri)
    images = _images(truth, corpus)
    source = detect.proposals or corpus.uri
    slices = _proposals(source) if detect.proposals else [list(_annotations(truth, source))]
    boxes, errors = _collect(slices, dict(images), source)
    if errors and not len(boxes.ids):
        raise UserError(f"none of the boxes of {source} can be used; the first fault: {errors[0]['error']}")
    if detect.proposals:
        boxes = best_boxes(boxes, detect.max_boxes)
    images = images[: corpus.limit]
    shown = {source, *(uri for _, uri in images)}
    return _table(images, boxes), [error for error in errors if error["uri"] in shown]


def is_json(corpus: Corpus) -> bool:
    """Whether a corpus is a COCO, LVIS or V3Det file and not a collection of pictures alone."""
    return corpus.format == "coco" or (corpus.format == "auto" and corpus.uri.endswith(".json"))


def truth_of(corpus: Corpus) -> Any | None:
    """The ground truth of a corpus: its JSON, where that has annotations and categories; else None."""
    if not is_json(corpus):
        return None
    truth = read_json(corpus.uri)
    return truth if truth.get("annotations") and truth.get("categories") else None


def list_pictures(corpus: Corpus) -> pa.Table:
    """The images of a COCO JSON as a table of schema BOXES without boxes."""
    return _table(_images(read_json(corpus.uri), corpus)[: corpus.limit], _boxes_of([]))


def without_boxes(index: pa.Table) -> pa.Table:
    """An index of any pictures (schema INDEX) as one of schema BOXES without boxes; a picture's id is its row."""
    index = index.append_column("coco_id", index["row"])
    for field in list(BOXES)[len(index.column_names) :]:
        index = index.append_column(field, pa.array([[]] * index.num_rows, field.type))
    return index.cast(BOXES)


def with_proposals(found: pa.Table) -> pa.Table:
    """Rows of schema BOXES with new boxes_xyxy and box_scores -> the same with fitting labels (none) and ids (by place)."""
    counts = [len(scores) for scores in found["box_scores"].to_pylist()]
    fitting = {"box_labels": [[None] * count for count in counts], "box_ids": [list(range(count)) for count in counts]}
    for name, values in fitting.items():
        found = found.drop_columns([name]).append_column(BOXES.field(name), pa.array(values, BOXES.field(name).type))
    return found.select(BOXES.names).cast(BOXES)


def _images(truth: Any, corpus: Corpus) -> list[tuple[int, str]]:
    """(id, uri) of every image, sorted by file name, then id."""
    folder = corpus.images if corpus.images is not None else posixpath.dirname(corpus.uri)
    try:
        named = sorted((_file_name(image), int(image["id"])) for image in truth["images"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{corpus.uri} has no COCO `images` (a list of objects with id and file_name or coco_url)") from None
    if len({coco_id for _, coco_id in named}) < len(named):
        raise UserError(f"{corpus.uri}: an image id is used twice; make them unique")
    return [(coco_id, name if "://" in name else posixpath.join(folder, name)) for name, coco_id in named]


def _file_name(image: Mapping[str, Any]) -> str:
    return image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:])


def _annotations(truth: Any, path: str) -> Iterator[dict[str, Any]]:
    """The ground truth's boxes as rows of {id, image_id, bbox, score, label, fault}."""
    names = _names(truth, path)
    for number, one in enumerate(_records(truth.get("annotations"), f"the `annotations` of {path}")):
        if not one.get("iscrowd", 0):
            category = one.get("category_id")
            label = names.get(category) if isinstance(category, int) else None
            fault = f"has unknown category_id {category!r}" if label is None else None
            yield {"id": number, **one, "score": 1.0, "label": label, "fault": fault}


def _proposals(path: str) -> Iterator[Boxes | list[dict[str, Any]]]:
    """A detector's boxes, whatever classes they carry, slice by slice: as columns, or as rows where one is malformed."""
    first = 0
    for rows in _parquet_batches(path) if path.endswith(".parquet") else _slices(_records(read_json(path), path)):
        columns = _arrow_columns(rows) if isinstance(rows, pa.RecordBatch) else _columns(rows)
        if columns is not None and (boxes := _as_boxes(columns, first)) is not None:
            yield boxes
        else:
            listed = rows.to_pylist() if isinstance(rows, pa.RecordBatch) else rows
            yield [{**one, "id": number, "label": None, "fault": None} for number, one in enumerate(listed, start=first)]
        first += len(rows)


def _slices(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), SLICE):
        yield rows[start : start + SLICE]


def _records(rows: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{what} must be a list of objects with image_id and bbox (and score for proposals)")
    return rows


def _parquet_batches(path: str) -> Iterator[pa.RecordBatch]:
    import fsspec
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as handle:
            file = pq.ParquetFile(handle)
            if missing := [column for column in PROPOSAL_COLUMNS if column not in file.schema_arrow.names]:
                raise UserError(f"{path} lacks the columns {missing}; proposals need {PROPOSAL_COLUMNS}")
            yield from file.iter_batches(SLICE, columns=PROPOSAL_COLUMNS)
    except FileNotFoundError:
        raise UserError(f"file not found: {path}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not valid parquet: {error}") from None


def _columns(rows: list[dict[str, Any]]) -> Columns | None:
    """None where a row lacks a column or a bbox has another length than the rest."""
    try:
        return Columns(*(np.array([row[column] for row in rows]) for column in PROPOSAL_COLUMNS))
    except (KeyError, ValueError, OverflowError):
        return None


def _arrow_columns(batch: pa.RecordBatch) -> Columns | None:
    """None where anything is null or a bbox is no list of four."""
    bbox = batch["bbox"]
    if any(column.null_count for column in batch.columns) or not pa.types.is_list(bbox.type):
        return None
    if pc.any(pc.not_equal(pc.list_value_length(bbox), 4)).as_py() or (flat := bbox.flatten()).null_count:
        return None
    columns = [batch["image_id"], flat, batch["score"]]
    ids, corners, scores = (column.to_numpy(zero_copy_only=False) for column in columns)
    return Columns(ids, corners.reshape(-1, 4), scores)


def _as_boxes(columns: Columns, first: int) -> Boxes | None:
    """Columns as boxes numbered from `first`; None where they are not whole ids and finite numbers all through."""
    image_ids, bboxes_xywh, scores = columns
    if image_ids.dtype.kind not in "iu" or bboxes_xywh.dtype.kind not in "iuf" or scores.dtype.kind not in "iuf":
        return None
    if bboxes_xywh.shape != (len(image_ids), 4) or not (np.isfinite(bboxes_xywh).all() and np.isfinite(scores).all()):
        return None
    return Boxes(
        image_ids.astype(np.int64),
        xywh_to_xyxy(bboxes_xywh.astype(np.float64)),
        scores.astype(np.float64),
        np.full(len(image_ids), None, object),
        np.arange(first, first + len(image_ids)),
    )


def _collect(
    slices: Iterable[Boxes | list[dict[str, Any]]], uris: Mapping[int, str], source: str
) -> tuple[Boxes, list[dict[str, str | None]]]:
    """The usable boxes, and ERRORS rows for the others. Unknown image ids make one error each, however many boxes."""
    known = np.array(list(uris), dtype=np.int64)
    parts = [_boxes_of([])]
    errors: list[tuple[str, str]] = []
    strangers: Counter[str] = Counter()
    for one in slices:
        if isinstance(one, Boxes):
            here = np.isin(one.image_ids, known)
            strangers.update(map(repr, one.image_ids[~here].tolist()))
            parts.append(_take(one, np.flatnonzero(here)))
        else:
            good, faults = _checked(one, uris, strangers)
            errors += [(uri, f"box {number} of {source} {fault}") for uri, number, fault in faults]
            parts.append(_boxes_of(good))
    errors += [(source, f"{count} boxes of image_id {name}, which the corpus lacks") for name, count in strangers.items()]
    boxes = Boxes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return boxes, [{"image_id": None, "uri": uri, "stage": "boxes", "error": error} for uri, error in errors]


def _checked(
    rows: list[dict[str, Any]], uris: Mapping[int, str], strangers: Counter[str]
) -> tuple[list[dict[str, Any]], list[tuple[str, Any, str]]]:
    """(rows that can be used, (uri, id, fault) of those that cannot). Unknown image ids are counted into `strangers`."""
    good, faults = [], []
    for row in rows:
        uri = uris.get(row["image_id"]) if isinstance(row.get("image_id"), int) else None
        if uri is None:
            strangers[repr(row.get("image_id"))] += 1
        elif fault := row["fault"] or _row_fault(row):
            faults.append((uri, row["id"], fault))
        else:
            good.append(row)
    return good, faults


def _boxes_of(rows: list[dict[str, Any]]) -> Boxes:
    return Boxes(
        np.array([row["image_id"] for row in rows], dtype=np.int64),
        xywh_to_xyxy(np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)),
        np.array([row["score"] for row in rows], dtype=np.float64),
        np.array([row["label"] for row in rows], dtype=object),
        np.array([row["id"] for row in rows], dtype=np.int64),
    )


def _row_fault(row: Mapping[str, Any]) -> str | None:
    bbox, score = row.get("bbox"), row.get("score")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        return f"has bbox {bbox!r}, not 4 finite numbers (left, top, width, height)"
    if not _is_number(score):
        return f"has score {score!r}, not a finite number"
    return None if isinstance(row["id"], int) else "has an id that is not a whole number"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def best_boxes(boxes: Boxes, max_boxes: int) -> Boxes:
    """At most max_boxes an image, best score first (ties: file order); of equal boxes of an image only the best stays."""
    x0, y0, x1, y1 = boxes.xyxy.T
    groups = np.lexsort((boxes.ids, -boxes.scores, y1, x1, y0, x0, boxes.image_ids))
    same = (np.diff(boxes.image_ids[groups]) == 0) & (np.diff(boxes.xyxy[groups], axis=0) == 0).all(axis=1)
    kept = groups[np.concatenate([[True], ~same])[: len(groups)]]
    kept = kept[np.lexsort((boxes.ids[kept], -boxes.scores[kept], boxes.image_ids[kept]))]
    images = boxes.image_ids[kept]
    return _take(boxes, kept[np.arange(len(kept)) - np.searchsorted(images, images) < max_boxes])


def _take(boxes: Boxes, index: np.ndarray) -> Boxes:
    return Boxes(*(column[index] for column in boxes))


def _table(images: Sequence[tuple[int, str]], boxes: Boxes) -> pa.Table:
    """One row (schema BOXES) per (id, uri); boxes of other images are left out, each image's boxes keep their order."""
    ids, groups = np.unique(boxes.image_ids, return_inverse=True)
    position = {coco_id: row for row, (coco_id, _) in enumerate(images)}
    rows = np.array([position.get(image_id, -1) for image_id in ids.tolist()], dtype=np.int64)[groups]
    index = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
    boxes, rows = _take(boxes, index), rows[index]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(images)))]).astype(np.int32)
    corners = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * 4, boxes.xyxy.astype(np.float32).ravel())
    return pa.table(
        {
            "row": pa.array(range(len(images)), pa.int64()),
            "uri": pa.array([uri for _, uri in images], pa.string()),
            "offset": pa.nulls(len(images), pa.int64()),
            "size": pa.nulls(len(images), pa.int64()),
            "label": pa.nulls(len(images), pa.string()),
            "coco_id": pa.array([coco_id for coco_id, _ in images], pa.int64()),
            "boxes_xyxy": pa.ListArray.from_arrays(offsets, corners),
            "box_scores": pa.ListArray.from_arrays(offsets, pa.array(boxes.scores, pa.float32())),
            "box_labels": pa.ListArray.from_arrays(offsets, pa.array(boxes.labels, pa.string())),
            "box_ids": pa.ListArray.from_arrays(offsets, pa.array(boxes.ids, pa.int64())),
        },
        schema=BOXES,
    )
