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
from rar.engine.stages import Stage
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


def reader(index: pa.Table, crop: config.Crop | None, shown: config.Shown | None) -> Stage:
    """What reads the rows of an index: encoded pictures; of a support set of boxes, these, cut out as queries are.

    crop, shown: of `Crop`.
    """
    return LoadObjects(Crop(crop, shown)) if "box_xyxy" in index.column_names else load


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

    crop: what the encoder is to see, sized; None: it is not asked. shown: what the ranker is to see; None: it is not asked.
    `bytes` is the latter as PPM (a header and raw pixels, which costs no time to write); `views` holds the raw pixels of all
    views of the former. An image is decoded once, however many boxes and views it has. A picture that cannot be decoded
    yields one error row a box. One whose size is not that of its boxes (see corpus.frame) has none of them: one error row, of
    the whole picture (no place, no box). `boxes` tells how many boxes a row stands for. `box_xyxy` stays as in the file.
    """

    def __init__(self, crop: config.Crop | None, shown: config.Shown | None) -> None:
        self.crop, self.shown = crop, shown

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [row for picture in table.to_pylist() for row in self._boxes(picture)]
        found = pa.Table.from_pylist(rows, CROPS)
        return found if self.crop is not None else found.drop_columns(["views"])

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
        if self.crop is not None:
            views = [windows.crops(image, on_image[good], self.crop, view) for view in self.crop.views]
            for position, seen in zip(good, zip(*views, strict=True), strict=True):
                rows[position]["views"] = [pixels.tobytes() for pixels in seen]
        if self.shown is not None:
            for position, pixels in zip(good, windows.crops(image, on_image[good], self.shown, self.shown.view), strict=True):
                rows[position]["bytes"] = ppm(pixels)
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


class LoadObjects:
    """The index of a support set of boxes (objects.OBJECTS, a row a box) -> image_id, and bytes and views as `cut` makes them.

    A picture is read and decoded once a shard; where it fails, each of its boxes does.
    """

    def __init__(self, cut: Crop) -> None:
        self.cut = cut

    def __call__(self, table: pa.Table) -> pa.Table:
        uris = table["uri"].to_pylist()
        number = {uri: place for place, uri in enumerate(dict.fromkeys(uris))}
        owner = np.array([number[uri] for uri in uris], np.int64)
        first = np.unique(owner, return_index=True)[1]
        boxes: list[list[list[float]]] = [[] for _ in first]
        places = []
        for picture, box in zip(owner.tolist(), table["box_xyxy"].to_pylist(), strict=True):
            places.append(len(boxes[picture]))
            boxes[picture].append(box)
        pictures = table.select(["shard", "uri", "offset", "size", "width", "height"]).take(pa.array(first))
        pictures = pictures.append_column("row", pa.array(range(len(first)), pa.int64()))
        pictures = pictures.append_column("boxes_xyxy", pa.array(boxes, pa.list_(pa.list_(pa.float32()))))
        cut = self.cut(load(pictures))
        at = {key: row for row, key in enumerate(zip(cut["row"].to_pylist(), cut["place"].to_pylist(), strict=True))}
        rows = [at.get(key, at.get((key[0], None))) for key in zip(owner.tolist(), places, strict=True)]
        found = cut.take(pa.array(rows, pa.int64())).drop_columns(["row", "place", "boxes", "seconds_read"])
        return found.append_column("row", table["row"]).append_column("label", table["label"])


def ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a binary PPM file."""
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


class Decode:
    """bytes -> pixels: the encoder's square inputs as raw bytes of (V, side, side, 3) uint8; V = 1 for a whole image.

    A box needs no decoding: its `views`, which end here, are V squares of raw pixels. min_side: of `decode.decode`. known:
    looks of pictures (see corpus.looks); the column `near_duplicate` then tells whether a picture looks like one of them.
    """

    def __init__(self, fit: Callable[[np.ndarray], np.ndarray], min_side: int | None, known: np.ndarray | None = None) -> None:
        self.fit, self.min_side, self.known = fit, min_side, known

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
        return [decode(data, self.min_side)]


def raw_squares(data: Sequence[bytes]) -> list[np.ndarray]:
    """The raw bytes of squares -> (S, S, 3) uint8 each."""
    return [np.frombuffer(one, np.uint8).reshape(math.isqrt(len(one) // 3), -1, 3) for one in data]
