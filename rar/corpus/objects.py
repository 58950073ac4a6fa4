"""Labelled boxes as a support set: one entry of a memory a ground-truth box, cut out as the queries' boxes are.

Taken are the boxes of a COCO, LVIS or V3Det JSON (or of a data set of such by name), and parquet tables of one row a box: the
columns of a manifest and `box_xyxy` (left, top, right, bottom) or COCO's `bbox` (left, top, width, height) in pixels, as
`rar detect` writes its predictions. Which boxes count, each rule told:

- Crowd regions show no single object, and are left out.
- A box whose shorter side is below memory.min_side pixels shows hardly anything, and is left out before shots are drawn.
- A box that cannot be used (no numbers, an unknown picture, a category without a name) is a row of errors.
- One rectangle under two labels is settled as one picture under two labels is (see support).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rar import storage
from rar.boxes import xywh_to_xyxy
from rar.config import Corpus, Detect
from rar.corpus import coco, listing, tables
from rar.schema import ERRORS, INDEX, UserError

OBJECTS = pa.schema(
    [
        *INDEX,
        ("box_xyxy", pa.list_(pa.float32())),
        ("width", pa.int64()),  # of the picture, as the file states it; null where it does not
        ("height", pa.int64()),
    ]
)


class Objects(NamedTuple):
    """index: OBJECTS, a row a box, those of a picture together. faults: ERRORS rows. told: lines on what was left out."""

    index: pa.Table
    faults: pa.Table
    told: list[str]


def holds_boxes(corpus: Corpus) -> bool:
    """Whether a support set is one of boxes. corpus: of `datasets.named.as_file`."""
    return corpus.dataset is None and (coco.is_json(corpus) or _box_column(corpus) is not None)


def read_objects(corpus: Corpus, min_side: float) -> Objects:
    """The labelled boxes of a support set. Raises UserError as `coco.read_boxes` and `listing.list_images` do."""
    index, faults, told = _of_json(corpus) if coco.is_json(corpus) else _of_table(corpus)
    corners = _corners(index["box_xyxy"])
    shorter = (corners[:, 2:] - corners[:, :2]).min(axis=1, initial=np.inf)
    small = shorter < min_side  # boxes that end before they begin are kept, to fail with their reason
    small &= shorter >= 0
    if small.any():
        told = [*told, f"{small.sum():,} boxes have a side below memory.min_side {min_side:g} and are left out"]
    index = index.filter(pa.array(~small))
    return Objects(index.set_column(0, "row", pa.array(range(index.num_rows), pa.int64())), faults, told)


def _of_json(corpus: Corpus) -> Objects:
    pictures, faults = coco.read_boxes(corpus, Detect())
    owner = pc.list_parent_indices(pictures["boxes_xyxy"])
    columns = {name: pictures[name].take(owner) for name in ("row", "uri", "offset", "size", "width", "height")}
    columns |= {"label": pc.list_flatten(pictures["box_labels"]), "box_xyxy": pc.list_flatten(pictures["boxes_xyxy"])}
    index = pa.table([columns[field.name] for field in OBJECTS], schema=OBJECTS)
    return Objects(index, pa.Table.from_pylist(faults, ERRORS), listing.remarks(pictures))


def _of_table(corpus: Corpus) -> Objects:
    """A row whose box is no list of four numbers is a fault."""
    column = _box_column(corpus)
    assert column is not None
    index = listing.list_images(corpus.model_copy(update={"format": "manifest"}))
    boxes, sizes = [], []
    for file in storage.files(corpus.uri, ".parquet"):
        with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
            names = [name for name in ("width", "height") if name in parquet.schema_arrow.names]
            table = parquet.read([column, *names])
        boxes += table[column].to_pylist()
        sizes.append(np.column_stack([_numbers(table, name) for name in ("width", "height")]))
    boxes, stated = boxes[: index.num_rows], np.concatenate(sizes)[: index.num_rows]
    good = np.array([isinstance(box, list) and len(box) == 4 and None not in box for box in boxes], bool)
    faults = [
        {"uri": uri, "stage": "boxes", "error": f"row {row} of {corpus.uri} has {column} {box!r:.60}, not 4 numbers"}
        for row, (uri, box, fine) in enumerate(zip(index["uri"].to_pylist(), boxes, good, strict=True))
        if not fine
    ]
    corners = np.array([box for box, fine in zip(boxes, good, strict=True) if fine], np.float64).reshape(-1, 4)
    corners = xywh_to_xyxy(corners) if column == "bbox" else corners
    index = index.filter(pa.array(good))
    index = index.append_column("box_xyxy", pa.array(corners.astype(np.float32).tolist(), OBJECTS.field("box_xyxy").type))
    for place, name in enumerate(("width", "height")):
        own = stated[good][:, place]
        index = index.append_column(name, pa.array(own, pa.int64(), mask=own < 1))
    order = pc.index_in(index["uri"], pc.unique(index["uri"]))  # those of a picture together, else in the table's order
    index = index.take(pa.array(np.argsort(order.to_numpy(), kind="stable")))
    return Objects(index.cast(OBJECTS), pa.Table.from_pylist(faults, ERRORS), [])


def _box_column(corpus: Corpus) -> str | None:
    """`box_xyxy` or `bbox`, where a corpus is a parquet table of boxes beside names of pictures."""
    if storage.suffix(corpus.uri) != ".parquet" or corpus.format not in ("auto", "manifest", "parquet"):
        return None
    names = tables.parquet_schema(storage.files(corpus.uri, ".parquet")[0]).names
    found = next((name for name in ("box_xyxy", "bbox") if name in names), None)
    if found is not None and corpus.uri_column not in names:
        raise UserError(f"{corpus.uri} holds boxes ({found}), but no column {corpus.uri_column!r}; set uri_column: {names}")
    return found


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of whole numbers (N,) int64; 0 where there is none."""
    if name not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return pc.fill_null(table[name].cast(pa.int64(), safe=False), 0).to_numpy()


def _corners(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(lists).to_numpy().astype(np.float64).reshape(-1, 4)
