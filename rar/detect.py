"""Boxes in, detections out: what detection puts around the same chain that recognises whole images.

Geometry and pixels first (box formats, crops), then COCO/LVIS files (images and boxes in, scored detections out). The paper
(3.2 and appendix C.3) crops each proposal, grows it by the object's size and blurs what is not the target, but gives no values
and no code. The choices here, and what they cost:

- The window is a square around the box's centre, so that shape survives the square resize. Where it leaves the image it is
  filled by repeating the image's edge: shifting it inside would move the object off centre, and a flat colour would draw an
  edge beside it. The cost is streaks at the border, which the default blur softens.
- Outside the target is blurred, greyed, blacked out or left. The border is hard: a crop pixel that the box touches stays
  untouched, so up to one crop pixel of context stays sharp, and no part of the object is ever hidden.
- Pillow does the resizing and the blur one box at a time: its Gaussian (three box filters) measured faster than an exact
  one written as two matrix products over the whole batch, and is less code.
- Proposals lose exact duplicates only, the same box under several classes being what class-aware detectors write. There is no
  further suppression: detectors have done theirs, and a second threshold would be a hidden parameter.
- Crowd regions (`iscrowd`) of a ground truth are left out: they show no single object, and evaluators ignore them.

Coordinates are continuous pixels: pixel i covers [i, i + 1), so a box of a whole (H, W) image is (0, 0, W, H).
"""

from __future__ import annotations

import itertools
import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from rar.config import Corpus, Crop, Detect
from rar.schema import INDEX, UserError

SMALL_AREA = 32**2  # COCO's groups: small objects have at most this many pixels, medium ones at most MEDIUM_AREA
MEDIUM_AREA = 96**2
MIN_SIDE = 0.99  # one pixel, less what float32 and files of two decimals round away
GREY = (128, 128, 128)
BLACK = (0, 0, 0)

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


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, width, height (COCO files) -> (..., 4) left, top, right, bottom."""
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, right, bottom -> (..., 4) left, top, width, height."""
    return np.concatenate([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], axis=-1)


def clip_xyxy(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of each box (..., 4) inside a width x height image; a box outside becomes an empty one on the border."""
    return np.clip(boxes_xyxy, 0, [width, height, width, height])


def area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Square pixels of each box: (..., 4) -> (...). Empty and inverted boxes have none."""
    return np.prod(np.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0), axis=-1)


def check_boxes(boxes_xyxy: np.ndarray, width: int, height: int) -> list[str | None]:
    """Why each of (B, 4) boxes shows nothing of a width x height image, or None for a box that can be cropped."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    return [_box_fault(box, width, height) for box in boxes]


def _box_fault(box_xyxy: np.ndarray, width: int, height: int) -> str | None:
    if not np.isfinite(box_xyxy).all():
        return f"box {box_xyxy.tolist()} has a coordinate that is not a finite number"
    x0, y0, x1, y1 = box_xyxy.tolist()
    if x1 < x0 or y1 < y0:
        return f"box {box_xyxy.tolist()} ends before it begins"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"box {box_xyxy.tolist()} lies outside the {width} x {height} image"
    w, h = xyxy_to_xywh(clip_xyxy(box_xyxy, width, height))[2:]
    if min(w, h) < MIN_SIDE:
        return f"box {box_xyxy.tolist()} covers {w:.2f} x {h:.2f} pixels of the image, less than one pixel a side"
    return None


def grow_xyxy(boxes_xyxy: np.ndarray, crop: Crop) -> np.ndarray:
    """The square windows (..., 4) xyxy shown for boxes (..., 4) xyxy; they may leave the image.

    Each is centred on its box, with side = scale * max(w, h); the scale is chosen by the box's area.
    """
    size = area(boxes_xyxy)
    scale = np.select([size <= SMALL_AREA, size <= MEDIUM_AREA], [crop.scale_small, crop.scale_medium], crop.scale_large)
    center = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    half = (scale * np.max(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], axis=-1) / 2)[..., None]
    return np.concatenate([center - half, center + half], axis=-1)


def to_crop(points: np.ndarray, window_xyxy: np.ndarray, size: int) -> np.ndarray:
    """Image coordinates (..., 2) x, y -> coordinates in the size x size crop of a square window (4,)."""
    return (points - window_xyxy[:2]) * (size / (window_xyxy[2] - window_xyxy[0]))


def to_image(points: np.ndarray, window_xyxy: np.ndarray, size: int) -> np.ndarray:
    """Crop coordinates (..., 2) x, y -> image coordinates: the inverse of `to_crop`."""
    return points * ((window_xyxy[2] - window_xyxy[0]) / size) + window_xyxy[:2]


def crops(image: np.ndarray, boxes_xyxy: np.ndarray, crop: Crop) -> np.ndarray:
    """What the models see of each box: image (H, W, 3) uint8, boxes (B, 4) -> (B, S, S, 3) uint8, S = crop.size.

    Boxes are clipped to the image first. Resizing is Pillow's bicubic, which widens its filter when it shrinks (no aliasing).
    Raises ValueError for a box that `check_boxes` refuses: those are rows of `errors/` before they come here.
    """
    height, width = image.shape[:2]
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    if fault := next(filter(None, check_boxes(boxes, width, height)), None):
        raise ValueError(fault)
    result = np.empty((len(boxes), crop.size, crop.size, 3), dtype=np.uint8)
    if not len(boxes):
        return result
    boxes = clip_xyxy(boxes, width, height)
    windows = grow_xyxy(boxes, crop)
    padded, offset = _pad(image, windows)
    for i, (box, window) in enumerate(zip(boxes, windows, strict=True)):
        square = padded.resize((crop.size,) * 2, Image.Resampling.BICUBIC, box=tuple((window + offset).tolist()))
        result[i] = np.asarray(_hide_outside(square, to_crop(box.reshape(2, 2), window, crop.size), crop))
    return result


def _pad(image: np.ndarray, windows_xyxy: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The image with its edges repeated as far as the windows (B, 4) reach, and what that adds to their coordinates (4,)."""
    height, width = image.shape[:2]
    left, top = np.maximum(0, np.ceil(-windows_xyxy[:, :2].min(axis=0))).astype(int)
    right, bottom = np.maximum(0, np.ceil(windows_xyxy[:, 2:].max(axis=0) - [width, height])).astype(int)
    padded = np.pad(image, [(top, bottom), (left, right), (0, 0)], mode="edge")
    return Image.fromarray(padded), np.array([left, top, left, top])


def _hide_outside(square: Image.Image, corners: np.ndarray, crop: Crop) -> Image.Image:
    """The crop with all but the target hidden. corners: the target's left-top and right-bottom, (2, 2) in crop coordinates."""
    if crop.outside == "none":
        return square
    x0, y0 = np.floor(corners[0] + 1e-6).astype(int).tolist()  # 1e-6: a corner on a pixel's border is no touch of the next
    x1, y1 = np.ceil(corners[1] - 1e-6).astype(int).tolist()
    if crop.outside == "blur":
        hidden = square.filter(ImageFilter.GaussianBlur(crop.sigma * crop.size))
    else:
        hidden = Image.new("RGB", square.size, GREY if crop.outside == "grey" else BLACK)
    hidden.paste(square.crop((x0, y0, x1, y1)), (x0, y0))
    return hidden


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
    labels: list[str | None]  # category names; None for proposals
    ids: np.ndarray  # (P,) int64: the annotation's id, or the proposal's position in its file


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
    rows = _proposals(source) if detect.proposals else _annotations(truth, source)
    boxes, errors = _collect(rows, dict(images), source)
    if errors and not len(boxes.ids):
        raise UserError(f"none of the boxes of {source} can be used; the first fault: {errors[0]['error']}")
    if detect.proposals:
        boxes = best_boxes(boxes, detect.max_boxes)
    images = images[: corpus.limit]
    shown = {source, *(uri for _, uri in images)}
    return _table(images, boxes), [error for error in errors if error["uri"] in shown]


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


def _proposals(path: str) -> Iterator[dict[str, Any]]:
    """A detector's boxes as rows of {id, image_id, bbox, score, label, fault}, whatever classes they carry."""
    for number, one in enumerate(_parquet_rows(path) if path.endswith(".parquet") else _records(read_json(path), path)):
        yield {**one, "id": number, "label": None, "fault": None}


def _records(rows: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{what} must be a list of objects with image_id and bbox (and score for proposals)")
    return rows


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    import fsspec
    import pyarrow.parquet as pq

    columns = ["image_id", "bbox", "score"]
    try:
        with fsspec.open(path, "rb") as handle:
            file = pq.ParquetFile(handle)
            if missing := [column for column in columns if column not in file.schema_arrow.names]:
                raise UserError(f"{path} lacks the columns {missing}; proposals need {columns}")
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise UserError(f"file not found: {path}") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not valid parquet: {error}") from None


def _collect(rows: Iterable[dict[str, Any]], uris: Mapping[int, str], source: str) -> tuple[Boxes, list[dict[str, str | None]]]:
    """Rows -> the usable boxes, and ERRORS rows for the others. Unknown image ids make one error each, however many boxes."""
    good: list[dict[str, Any]] = []
    errors: list[tuple[str, str]] = []
    strangers: Counter[Any] = Counter()
    for row in rows:
        uri = uris.get(row["image_id"]) if isinstance(row.get("image_id"), int) else None
        if uri is None:
            strangers[repr(row.get("image_id"))] += 1
        elif fault := row["fault"] or _row_fault(row):
            errors.append((uri, f"box {row['id']} of {source} {fault}"))
        else:
            good.append(row)
    errors += [(source, f"{count} boxes of image_id {name}, which the corpus lacks") for name, count in strangers.items()]
    boxes = Boxes(
        np.array([row["image_id"] for row in good], dtype=np.int64),
        xywh_to_xyxy(np.array([row["bbox"] for row in good], dtype=np.float64).reshape(-1, 4)),
        np.array([row["score"] for row in good], dtype=np.float64),
        [row["label"] for row in good],
        np.array([row["id"] for row in good], dtype=np.int64),
    )
    return boxes, [{"image_id": None, "uri": uri, "stage": "boxes", "error": error} for uri, error in errors]


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
    labels = [boxes.labels[i] for i in index]
    return Boxes(boxes.image_ids[index], boxes.xyxy[index], boxes.scores[index], labels, boxes.ids[index])


def _table(images: Sequence[tuple[int, str]], boxes: Boxes) -> pa.Table:
    """One row (schema BOXES) per (id, uri); boxes of other images are left out, each image's boxes keep their order."""
    position = {coco_id: row for row, (coco_id, _) in enumerate(images)}
    rows = np.array([position.get(image_id, -1) for image_id in boxes.image_ids.tolist()], dtype=np.int64)
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


def coco_results(
    coco_ids: Sequence[int],
    boxes_xyxy: np.ndarray,
    box_scores: Sequence[float],
    class_names: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]],
    categories: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Detections in COCO's results format from N recognised boxes: one per box and candidate class.

    The rule: score(box, class) = box_score * P(class | box), the box's proposal score times the class probability of the
    final ranking; with ground-truth boxes (score 1) it is the probability. Every candidate is written, not the best alone,
    because AP ranks detections within a class: a second guess costs little and may be the recall of a rare class.

    coco_ids (N,): the JSON's image ids. boxes_xyxy: (N, 4) pixels. class_names and probabilities: for each box, its
    candidates' names and probabilities, in the same order. categories: `category_names` of the JSON to be evaluated against.
    Raises UserError for a class name that is no category.
    """
    ids = {name: category_id for category_id, name in categories.items()}
    if unknown := sorted(set(itertools.chain.from_iterable(class_names)) - ids.keys()):
        raise UserError(
            f"{len(unknown)} classes are no category of the truth, the first is {unknown[0]!r}; use its class names"
        )
    bboxes = xyxy_to_xywh(np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)).tolist()
    rows = zip(coco_ids, bboxes, box_scores, class_names, probabilities, strict=True)
    return [
        {"image_id": int(coco_id), "category_id": ids[name], "bbox": bbox, "score": float(box_score) * float(probability)}
        for coco_id, bbox, box_score, names, shares in rows
        for name, probability in zip(names, shares, strict=True)
    ]
