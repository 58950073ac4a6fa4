"""From a box's proposal score and its class probabilities to scored detections, and those to a file.

AP of a class sorts all its detections over all images by score and walks down. It sees nothing of a score but this order, and
most of the order is between images, so a score must mean the same everywhere. The best order is by the chance that a detection
is right: P(the box holds an object) * P(class | it does), the rule `product`. It is the best only as far as both factors are
calibrated. Class probabilities should be shares of the whole vocabulary's mass: a softmax over the candidates alone says 1.0
where nothing else was proposed. Proposal scores of open detectors are similarities to a prompt, not chances; so the rule can be
changed:

- `product`: s * p, the default. With ground-truth boxes (s = 1) it is `class`.
- `geometric`: s^(1/3) * p^(2/3), which trusts the class more than the detector, whose score often says little about a class
  it was not trained on (a weighted geometric mean as in F-VLM, Kuo et al. 2209.15639). Equal weights, sqrt(s * p), would sort
  exactly as the product does, and so give the same AP. The weight is a constant, not fitted to anything.
- `class`: p. Boxes without an object, which get some class too, are no longer pushed down.
- `proposal`: s for the best class and s * p / p_best for the others. The order between images is the detector's; that of the
  classes of a box stays. It forgets how sure the class is, as a detector's hard labels do.

Several classes of a box become detections (`classes_per_box`), because a second guess is sorted below the first guesses of its
class and costs little there, while it may be all that a rare class gets. All rules keep the order of a box's classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import storage
from rar.boxes import xyxy_to_xywh
from rar.corpus.truth import Truth, as_written
from rar.schema import UserError

Rule = Literal["product", "geometric", "class", "proposal"]
CLASS_WEIGHT = 2 / 3  # of `geometric`
DIGITS = 6  # significant ones of a score; boxes have two decimals
CHUNK = 50_000  # detections formatted at once


Names: TypeAlias = Sequence[Sequence[str]] | pa.ListArray  # a list a box
Numbers: TypeAlias = Sequence[Sequence[float]] | pa.ListArray


class Detections(NamedTuple):
    """D detections in columns: 48 bytes each, where the objects of a JSON list measured 456."""

    images: np.ndarray  # (D,) int32, place among the truth's pictures: ids of any type become numbers
    categories: np.ndarray  # (D,) int32, place among its categories
    boxes_xywh: np.ndarray  # (D, 4) float64 pixels
    scores: np.ndarray  # (D,) float64


def class_scores(rule: Rule, proposal_scores: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The rule: (N,) proposal scores in 0..1 and (N, K) class probabilities -> (N, K) float64 detection scores in 0..1."""
    s, p = np.asarray(proposal_scores, np.float64)[:, None], np.asarray(probabilities, np.float64)
    if rule == "product":
        return s * p
    if rule == "geometric":
        return s ** (1 - CLASS_WEIGHT) * p**CLASS_WEIGHT
    if rule == "class":
        return np.broadcast_to(p, np.broadcast_shapes(s.shape, p.shape)).copy()
    best = p.max(axis=1, keepdims=True, initial=0)
    return s * np.divide(p, best, out=np.zeros_like(p), where=best > 0)


def detections(
    images: Sequence[int] | np.ndarray,
    boxes_xyxy: np.ndarray,
    proposal_scores: Sequence[float] | np.ndarray,
    class_names: Names,
    probabilities: Numbers,
    categories: Mapping[str, int],
    rule: Rule,
    classes_per_box: int,
) -> Detections:
    """The `classes_per_box` likeliest classes of each of N boxes as detections: box by box, likeliest first (ties: as given).

    images (N,): places in the truth's. boxes_xyxy (N, 4) pixels. proposal_scores (N,). class_names and probabilities: for each
    box, its candidates in any one order, 0 or more. categories: of `category_places`. Numbers are rounded as they are written,
    so that the file and these give the same AP. Raises UserError for a class that is no category.
    """
    ids, shares = _padded(class_names, probabilities, categories)
    order = np.argsort(-shares, axis=1, kind="stable")[:, :classes_per_box]
    ids, shares = np.take_along_axis(ids, order, axis=1), np.take_along_axis(shares, order, axis=1)
    scores = class_scores(rule, np.asarray(proposal_scores, np.float64), np.maximum(shares, 0))
    box, column = np.nonzero(ids >= 0)
    boxes = xyxy_to_xywh(np.asarray(boxes_xyxy, np.float64).reshape(-1, 4))
    places = np.asarray(images, np.int32)
    return Detections(places[box], ids[box, column], np.round(boxes, 2)[box], _rounded(scores[box, column]))


def category_places(names: Sequence[str | None]) -> dict[str, int]:
    """Where each name stands among a truth's categories. Raises UserError for one that several have."""
    if twice := [name for name, count in Counter(names).items() if count > 1 and name is not None]:
        raise UserError(f"{len(twice)} category names stand for several ids, the first is {twice[0]!r}; make them unique")
    return {name: place for place, name in enumerate(names) if name is not None}


def _padded(names: Names, probabilities: Numbers, categories: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows -> (N, K) int32 categories' places, -1 where a row has ended, and (N, K) probabilities, -1 there.

    A name is looked up once, however many boxes it is proposed for.
    """
    listed, numbers = _lists(names, pa.string()), _lists(probabilities, pa.float64())
    counts = pc.list_value_length(listed).to_numpy(zero_copy_only=False).astype(np.int64)
    if not pc.list_value_length(listed).equals(pc.list_value_length(numbers)):
        raise ValueError("class names and probabilities differ in number")
    encoded = listed.flatten().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    if unknown := sorted(set(distinct) - categories.keys()):
        raise UserError(
            f"{len(unknown)} classes are no category of the truth, the first is {unknown[0]!r}; use its class names"
        )
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    ids, shares = np.full(filled.shape, -1, np.int32), np.full(filled.shape, -1.0)
    ids[filled] = np.array([categories[name] for name in distinct], np.int32)[encoded.indices.to_numpy()]
    shares[filled] = numbers.flatten().to_numpy()
    return ids, shares


def _lists(rows: Names | Numbers, of: pa.DataType) -> pa.ListArray:
    return rows if isinstance(rows, pa.ListArray) else pa.array(rows, pa.list_(of))


def together(parts: list[Detections]) -> Detections:
    """All detections of some parts, in their order. The list is emptied, and a column at a time is there twice."""
    nothing = Detections(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0))
    columns = [list(column) for column in zip(nothing, *parts, strict=True)]
    parts.clear()
    return Detections(*(np.concatenate(columns.pop(0)) for _ in nothing))


def _rounded(values: np.ndarray) -> np.ndarray:
    """(D,) in 0..1 to DIGITS significant digits."""
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(values > 0, values, 1))))
    return np.round(values * scale) / scale


def write_coco_results(path: Path, parts: Iterable[Detections], truth: Truth) -> int:
    """Write COCO's results format, one detection a line, and return how many.

    Ids are written as they are in the truth. parts: as they come; one of them and a few megabytes of text are in memory at a
    time. The file appears when it is whole.
    """
    ids = [[as_written(one.id) for one in ones] for ones in (truth.pictures, truth.categories)]
    written = 0
    with storage.writing(path) as file:
        file.write(b"[")
        for lines in chain.from_iterable(_lines(part, *ids) for part in parts):
            file.write((("\n" if written == 0 else ",\n") + ",\n".join(lines)).encode())
            written += len(lines)
        file.write(b"\n]\n")
    return written


def _lines(part: Detections, images: list[str], categories: list[str]) -> Iterable[list[str]]:
    """A box is written out once for all its classes, which stand together."""
    for start in range(0, len(part.scores), CHUNK):
        rows = slice(start, start + CHUNK)
        bits = np.ascontiguousarray(part.boxes_xywh[rows]).view(np.int64)  # of equal boxes: -0.0 is no 0.0
        new = np.concatenate([[True], (bits[1:] != bits[:-1]).any(axis=1)])
        texts = list(map(str, part.boxes_xywh[rows][new].tolist()))
        columns = (part.images[rows], part.categories[rows], np.cumsum(new) - 1, part.scores[rows])
        yield [
            f'{{"image_id":{images[i]},"category_id":{categories[c]},"bbox":{texts[b]},"score":{s!r}}}'
            for i, c, b, s in zip(*(column.tolist() for column in columns), strict=True)
        ]
