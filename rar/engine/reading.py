"""Stages that fetch: an index of pictures -> bytes -> crops of boxes -> the encoder's square pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from rar import config
from rar.boxes import check_boxes
from rar.columns import vectors_column, with_errors
from rar.corpus import listing, looks, vectors
from rar.corpus.decode import decode
from rar.corpus.frame import frame_of
from rar.crops import windows
from rar.schema import RowError, content_id


def load(table: pa.Table) -> pa.Table:
    """uri, offset, size -> bytes (encoded) and image_id. Rows that cannot be read carry their reason."""
    found = listing.read_many(*(table[name].to_pylist() for name in ("uri", "offset", "size")))
    good = [None if isinstance(data, RowError) else data for data in found]
    table = table.append_column("bytes", pa.array(good, pa.large_binary()))
    ids = [None if data is None else content_id(data) for data in good]
    table = table.append_column("image_id", pa.array(ids, pa.string()))
    faults = [str(data) if isinstance(data, RowError) else None for data in found]
    return with_errors(table, "read", faults)


class LoadVectors:
    """The index of embeddings that the user brings -> vector and image_id; there are no bytes to look at."""

    def __init__(self, brought: config.Corpus) -> None:
        self.brought = brought

    def __call__(self, table: pa.Table) -> pa.Table:
        found, faults = vectors.read_vectors(self.brought, table["row"].to_pylist())
        ids = [None if fault else vectors.vector_id(vector) for vector, fault in zip(found, faults, strict=True)]
        table = table.append_column("bytes", pa.nulls(table.num_rows, pa.large_binary()))
        table = table.append_column("image_id", pa.array(ids, pa.string()))
        table = table.append_column("vector", vectors_column(found))
        return with_errors(table, "read", [str(fault) if fault else None for fault in faults])


class Crop:
    """One row an image -> one row a box, with its crops: nothing after this knows about boxes.

    `bytes` is the first view as PPM (a header and raw pixels, which costs no time to write), for the ranker; `views` holds the
    raw pixels of all views, for the encoder. An image is decoded once, however many boxes and views it has. A picture that
    cannot be decoded yields one error row a box. One whose size is not that of its boxes (see corpus.frame) has none of them:
    one error row, of the whole picture (no place, no box). `boxes` tells how many boxes a row stands for. `box_xyxy` stays as
    in the file.
    """

    def __init__(self, settings: config.Crop) -> None:
        self.settings = settings

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [row for picture in table.to_pylist() for row in self._boxes(picture)]
        return pa.Table.from_pylist(rows, CROPS)

    def _boxes(self, picture: dict) -> list[dict]:
        keep = {name: picture[name] for name in ("shard", "row", "uri", "image_id", "stage", "error")}
        boxes = np.array(picture["boxes_xyxy"], np.float64).reshape(-1, 4)
        keep["seconds_read"] = picture.get("seconds_read", 0.0) / max(len(boxes), 1)
        rows = [{**keep, "place": place, "box_xyxy": box, "boxes": 1} for place, box in enumerate(boxes.tolist())]
        if picture["error"] is not None or not rows:
            return rows
        try:
            image = decode(picture["bytes"])
        except RowError as error:
            return [{**row, "stage": "decode", "error": str(error)} for row in rows]
        try:
            frame = frame_of((picture["width"], picture["height"]), (image.shape[1], image.shape[0]), picture["bytes"])
        except RowError as error:
            return [{**keep, "boxes": len(rows), "stage": "crop", "error": f"{error}; {len(rows)} boxes"}]
        on_image = frame.to_pixels(boxes)
        faults = check_boxes(on_image, image.shape[1], image.shape[0])
        good = [position for position, fault in enumerate(faults) if fault is None]
        views = [windows.crops(image, on_image[good], self.settings, view) for view in self.settings.views]
        for position, seen in zip(good, zip(*views, strict=True), strict=True):
            rows[position] |= {"bytes": ppm(seen[0]), "views": [pixels.tobytes() for pixels in seen]}
        for row, box, fault in zip(rows, boxes.tolist(), faults, strict=True):
            row["image_id"] = content_id(picture["image_id"].encode(), box)  # not of the bytes: 1,000 boxes would hash them all
            if fault is not None:
                row |= {"stage": "crop", "error": fault}
        return rows


CROPS = pa.schema(
    [
        ("seconds_read", pa.float64()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("place", pa.int32()),
        ("uri", pa.string()),
        ("image_id", pa.string()),
        ("box_xyxy", pa.list_(pa.float32())),
        ("boxes", pa.int64()),
        ("bytes", pa.large_binary()),
        ("views", pa.list_(pa.large_binary())),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)


def ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a binary PPM file."""
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


class Decode:
    """bytes -> pixels: the encoder's square inputs as raw bytes of (V, side, side, 3) uint8; V = 1 for a whole image.

    A box needs no decoding: its `views`, which end here, are V squares of raw pixels. known: looks of pictures (see
    corpus.looks); the column `near_duplicate` then tells whether a picture looks like one of them.
    """

    def __init__(self, fit: Callable[[np.ndarray], np.ndarray], side: int, known: np.ndarray | None = None) -> None:
        self.fit, self.side, self.known = fit, side, known

    def __call__(self, table: pa.Table) -> pa.Table:
        source, images = ("views", raw_squares) if "views" in table.column_names else ("bytes", self._decoded)
        pixels: list[bytes | None] = []
        faults: list[str | None] = []
        for data, error in zip(table[source], table["error"].to_pylist(), strict=True):
            fault = None
            try:
                pixels.append(None if error else b"".join(self.fit(image).tobytes() for image in images(data.as_py())))
            except RowError as reason:
                pixels.append(None)
                fault = str(reason)
            faults.append(fault)
        table = table.drop_columns(["views"] if source == "views" else [])
        if self.known is not None:
            seen = np.array([looks.look(raw_squares([one])[0]) if one else 0 for one in pixels], np.uint64)
            table = table.append_column("near_duplicate", pa.array(looks.near(seen, self.known)))
        return with_errors(table.append_column("pixels", pa.array(pixels, pa.large_binary())), "decode", faults)

    def _decoded(self, data: bytes) -> list[np.ndarray]:
        return [decode(data, self.side)]


def raw_squares(data: Sequence[bytes]) -> list[np.ndarray]:
    """The raw bytes of squares -> (S, S, 3) uint8 each."""
    return [np.frombuffer(one, np.uint8).reshape(math.isqrt(len(one) // 3), -1, 3) for one in data]
