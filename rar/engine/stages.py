"""What happens to a shard, one function or callable class a stage: a table goes in, a table with more columns comes out.

Nothing here imports ray, so every stage can be called on a table in a test. Two columns travel with every row: `stage` and
`error`, null while all is well. A stage works on the healthy rows and passes the others on untouched, so that counts add up:
a row that comes in leaves either as a prediction or as an error. Each stage adds `seconds_<stage>` (its time, shared over its
rows), which the writer sums up.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rar import config, fusion
from rar.boxes import check_boxes
from rar.columns import (
    candidates_of,
    rankings_of,
    vectors_column,
    vectors_of,
    with_candidates,
    with_errors,
    with_proposed,
    with_vectors,
)
from rar.corpus import listing, looks, vectors
from rar.corpus.decode import decode, fit_square
from rar.corpus.frame import frame_of
from rar.crops import windows
from rar.engine.isolate import Isolate, parted, reason
from rar.memory.collection import Collection
from rar.retriever import exact, modes
from rar.schema import Candidate, Ranking, RankStatus, RowError, content_id, entry_id

Stage = Callable[[pa.Table], pa.Table]


class Model(Protocol):
    """A stage with a loaded model, as an actor holds it."""

    def __init__(self, settings: Any) -> None: ...
    def __call__(self, table: pa.Table) -> pa.Table: ...
    def facts(self) -> Any: ...

    @staticmethod
    def failed(table: pa.Table, why: str) -> pa.Table:
        """What the stage returns where nothing can be asked of it: all rows that were healthy fail."""


def timed(name: str, work: Stage) -> Stage:
    """Run a stage and note how long its rows took."""

    def run(table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        return with_seconds(work(table), name, started)

    return run


def with_seconds(table: pa.Table, name: str, started: float) -> pa.Table:
    """Note how long a stage took since `started`, shared over the rows."""
    each = (time.perf_counter() - started) / max(table.num_rows, 1)
    return table.append_column(f"seconds_{name}", pa.array([each] * table.num_rows, pa.float64()))


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


HELD, RESUMED = "held", "resumed"  # `stage` of a row whose entry is in the memory, or in what a killed build has written


class Lacking:
    """Asks a memory which rows it holds: these go no further, as if they were faulty; `error` says under which class.

    places: stage -> the collection that is asked. A shard asks for its own ids, so that no worker carries those of the memory.
    """

    def __init__(self, places: Mapping[str, Collection], fingerprint: str) -> None:
        self.places, self.fingerprint = dict(places), fingerprint

    def __call__(self, table: pa.Table) -> pa.Table:
        image_ids = [
            None if error else one for one, error in zip(*(table[c].to_pylist() for c in ("image_id", "error")), strict=True)
        ]
        for stage, place in self.places.items():
            ids = [None if one is None else entry_id(one, self.fingerprint) for one in image_ids]
            known = place.labels_of(sorted({one for one in ids if one is not None}))
            table = with_errors(table, stage, [known.get(one) if one else None for one in ids])
            image_ids = [one if label not in known else None for one, label in zip(image_ids, ids, strict=True)]
        return table


class AsEntries:
    """image_id (or text) and label -> entry_id, class_id and class_name. class_of: class name -> id."""

    def __init__(self, class_of: Mapping[str, int], fingerprint: str) -> None:
        self.class_of, self.fingerprint = dict(class_of), fingerprint

    def __call__(self, table: pa.Table) -> pa.Table:
        labels = table["label"].to_pylist()
        ids = [None if one is None else entry_id(one, self.fingerprint) for one in table["image_id"].to_pylist()]
        columns = {
            "entry_id": pa.array(ids, pa.string()),
            "class_id": pa.array([self.class_of[label] for label in labels], pa.int64()),
            "class_name": pa.array(labels, pa.string()),
        }
        return _with_columns(table.drop_columns([name for name in ("bytes", "pixels") if name in table.column_names]), columns)


class Propose:
    """bytes -> boxes_xyxy and box_scores of each image, by an open detector; a picture without objects has empty lists.

    Images are decoded at full size in the actor that holds the model: shipped as pixels they would be many times larger.
    """

    def __init__(self, settings: config.Detect) -> None:
        from rar.crops.detector import Proposer  # torch belongs to the detector's actors

        assert settings.detector is not None
        self.batch = settings.detector.batch_size
        proposer = Proposer(settings.detector)
        self.propose: Isolate[np.ndarray, tuple[np.ndarray, np.ndarray]] = Isolate(
            lambda images: proposer.propose(images, settings.max_boxes), free_gpu_memory
        )

    def facts(self) -> None:
        """Nothing that the driver must know."""

    @staticmethod
    def failed(table: pa.Table, why: str) -> pa.Table:
        none: list[list] = [[] for _ in range(table.num_rows)]
        return with_errors(_proposed(table, none, none), "detect", [why] * table.num_rows)

    def __call__(self, table: pa.Table) -> pa.Table:
        boxes: list[list[list[float]]] = [[] for _ in range(table.num_rows)]
        scores: list[list[float]] = [[] for _ in range(table.num_rows)]
        faults: dict[str, list[str | None]] = {stage: [None] * table.num_rows for stage in ("decode", "detect")}
        healthy = [row for row, error in enumerate(table["error"].to_pylist()) if error is None]
        for start in range(0, len(healthy), self.batch):
            images, frames = {}, {}
            for row in healthy[start : start + self.batch]:
                try:
                    data, *stated = (table[key][row].as_py() for key in ("bytes", "width", "height"))
                    image = decode(data)
                    frames[row] = frame_of((stated[0], stated[1]), (image.shape[1], image.shape[0]), data)
                    images[row] = image
                except RowError as error:
                    faults["decode"][row] = str(error)
            for row, found in zip(images, self.propose(list(images.values())), strict=True):
                if isinstance(found, Exception):
                    faults["detect"][row] = reason(found)
                else:
                    boxes[row], scores[row] = frames[row].to_file(found[0]).tolist(), found[1].tolist()
        table = _proposed(table, boxes, scores)
        for stage, reasons in faults.items():
            table = with_errors(table, stage, reasons)
        return table


PROPOSED = pa.schema([("boxes_xyxy", pa.list_(pa.list_(pa.float32()))), ("box_scores", pa.list_(pa.float32()))])


def _proposed(table: pa.Table, boxes: list[list[list[float]]], scores: list[list[float]]) -> pa.Table:
    table = table.drop_columns(["bytes", *(name for name in PROPOSED.names if name in table.column_names)])
    for field, values in zip(PROPOSED, (boxes, scores), strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


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


@dataclass(frozen=True)
class EncoderFacts:
    """What the driver and the decode tasks must know of an encoder, found out by a worker: the driver need not load torch."""

    side: int
    dim: int
    fingerprint: str
    resize_mode: str
    interpolation: str
    embeds_texts: bool = True

    def fit(self, image: np.ndarray) -> np.ndarray:
        return fit_square(image, self.side, self.resize_mode, self.interpolation)


class Embed:
    """pixels (images) or text (class names, through the templates) -> vector, unit norm. Loads the encoder once an actor."""

    def __init__(self, settings: config.Encoder) -> None:
        from rar.encoder.towers import load_encoder  # torch belongs to the encoder's actors; other workers stay small

        self.encoder = load_encoder(settings)
        self.images = Isolate(self._squares, free_gpu_memory)
        self.texts: Isolate[str, np.ndarray] = Isolate(lambda names: list(self.encoder.prototypes(names)), free_gpu_memory)

    def facts(self) -> EncoderFacts:
        encoder = self.encoder
        return EncoderFacts(
            encoder.side, encoder.dim, encoder.fingerprint(), encoder.resize_mode, encoder.interpolation, encoder.embeds_texts
        )

    @staticmethod
    def failed(table: pa.Table, why: str) -> pa.Table:
        started, nothing = time.perf_counter(), with_vectors(table, np.zeros((table.num_rows, 1), np.float32))
        return with_seconds(with_errors(nothing, "embed", [why] * table.num_rows), "embed", started)

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        vectors = np.zeros((table.num_rows, self.encoder.dim), np.float32)
        faults: list[str | None] = [None] * table.num_rows
        for name, embed in (("pixels", self.images), ("text", self.texts)):
            rows, values = _present(table[name]) if name in table.column_names else ([], [])
            good, found, failed = parted(embed(values))
            if good:
                vectors[[rows[place] for place in good]] = np.stack(found)
            for place, why in failed.items():
                faults[rows[place]] = why
        return with_seconds(with_errors(with_vectors(table, vectors), "embed", faults), "embed", started)

    def _squares(self, data: list[bytes]) -> list[np.ndarray]:
        """Raw squares of each row, one a view -> a vector a row."""
        side = self.encoder.side
        squares = np.frombuffer(bytearray().join(data), np.uint8).reshape(-1, side, side, 3)
        return list(mean_of_views(self.encoder.embed_images(squares), [len(one) // (3 * side**2) for one in data]))


def free_gpu_memory() -> None:
    """What torch holds back for later goes to who asks now; nothing where no GPU is in use."""
    import torch

    gc.collect()  # tensors of the failed try may hang in cycles
    torch.cuda.empty_cache()


class Retrieve:
    """vector -> candidates by a fitted head: scored whole, or (knn, tip) beside image entries; all: the whole vocabulary.

    A candidate's score is the log of its probability. A linear head's is exact, normalised over the whole vocabulary, for up to
    `exact_up_to` classes; a larger one is searched in Milvus and normalised over the SHARE_DEPTH best. By votes it is
    normalised over the candidates alone, as more of them would be a deeper search.
    """

    def __init__(
        self,
        settings: config.Retriever,
        head: Callable[[], modes.Head],
        classes: Collection,
        images: Collection,
        exact_up_to: int = exact.EXACT_CLASSES,
    ) -> None:
        """head: gives the fitted head. classes: the collection that holds it. images: the entries that knn and tip search."""
        self.settings, self.head, self.classes, self.images, self.exact_up_to = settings, head, classes, images, exact_up_to

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = np.flatnonzero(table["error"].is_null().to_numpy())
        if not len(rows):
            return with_candidates(self._without_inputs(table), [[]] * table.num_rows)
        head = self.head()
        found = self._propose(head, table if len(rows) == table.num_rows else table.take(rows))
        names = pa.array(head.class_names, pa.string())
        return with_proposed(self._without_inputs(table), rows, head.class_ids, names, found.columns, found.scores)

    @staticmethod
    def _without_inputs(table: pa.Table) -> pa.Table:
        return table.drop_columns([name for name in ("vector", "pixels") if name in table.column_names])

    def _propose(self, head: modes.Head, table: pa.Table) -> exact.Proposed:
        settings, n_classes = self.settings, len(head.class_ids)
        if settings.mode == "all":
            shape = (table.num_rows, n_classes)
            return exact.Proposed(
                np.tile(np.arange(n_classes), (shape[0], 1)), np.full(shape, -math.log(n_classes), np.float32)
            )
        queries, top_k = vectors_of(table), min(settings.top_k, n_classes)
        if settings.mode in ("knn", "tip"):
            asked = (queries, top_k, settings.n_neighbors, settings.sharpness)
            return modes.propose_by_votes(head, self.images.search, *asked).shares()
        if n_classes <= self.exact_up_to:
            return exact.propose(head, queries, top_k)
        hits = self.classes.search(modes.augment(queries), min(max(top_k, SHARE_DEPTH), n_classes))
        return modes.propose_from_hits(hits, head.class_ids, top_k)


SHARE_DEPTH = 64


class Recall:
    """image_id -> candidates known beforehand: calibration ranks memory entries by heads fitted without them."""

    def __init__(self, known: Mapping[str, list[Candidate]]) -> None:
        self.known = known

    def __call__(self, table: pa.Table) -> pa.Table:
        return with_candidates(table, [self.known.get(image_id, []) for image_id in table["image_id"].to_pylist()])


class Rank:
    """candidates -> the columns of a Ranking, by `ask` for the images that need the MLLM.

    The others keep the retriever's order as `skipped`. The ranking is the ranker's own; what is made of it is up to `Fuse`.
    ask(batches) -> one list of Rankings a batch of (encoded images, candidates' names). It is called once a shard with batches
    of `batch` images: what a batch holds depends on the shard alone, never on timing. Where it answers None, the calls that a
    run may make are spent, and the shard loses its rows: it stays to be done.
    """

    def __init__(
        self,
        ask: Callable[[list[tuple[list[bytes], list[list[str]]]]], list[list[Ranking]] | None] | None,
        calibration: fusion.Calibration,
        batch: int,
    ) -> None:
        self.ask, self.calibration, self.batch = ask, calibration, batch

    def __call__(self, table: pa.Table) -> pa.Table:
        proposed = candidates_of(table)
        rankings = [Ranking(tuple(range(len(candidates))), RankStatus.SKIPPED) for candidates in proposed]
        shown = [fusion.n_shown(candidates, self.calibration) for candidates in proposed]
        rows = [row for row, count in enumerate(shown) if count]
        if self.ask is not None and rows:
            images = table["bytes"].take(rows).to_pylist()
            names = [[candidate.class_name for candidate in proposed[row][: shown[row]]] for row in rows]
            starts = range(0, len(rows), self.batch)
            batches = [(images[s : s + self.batch], names[s : s + self.batch]) for s in starts]
            answers = self.ask(batches)
            if answers is None:
                return self(table.slice(0, 0))
            for row, ranking in zip(rows, (ranking for answered in answers for ranking in answered), strict=True):
                rankings[row] = fusion.among(ranking, len(proposed[row]))
        else:
            shown = [0] * len(proposed)
        columns = {
            "ranking": pa.array([ranking.order for ranking in rankings], pa.list_(pa.int64())),
            "rank_status": pa.array([ranking.status.value for ranking in rankings], pa.string()),
            "label_mass": pa.array([ranking.label_mass for ranking in rankings], pa.float32()),
            "label_first": pa.array([ranking.label_first for ranking in rankings], pa.bool_()),
            "response": pa.array([ranking.response for ranking in rankings], pa.string()),
            "scores": pa.array([fusion.rank_scores(ranking) for ranking in rankings], pa.list_(pa.float64())),
            "mllm_candidates": pa.array(shown, pa.int64()),
        }
        for key in ("calls", "prompt_tokens", "output_tokens"):
            columns[f"mllm_{key}"] = pa.array([getattr(ranking, key) for ranking in rankings], pa.int64())
        return _with_columns(table.drop_columns(["bytes"]), columns)


class Fuse:
    """candidates and the ranker's answer -> the final `ranking`, and the class that it predicts with its probability."""

    def __init__(self, calibration: fusion.Calibration) -> None:
        self.calibration = calibration

    def __call__(self, table: pa.Table) -> pa.Table:
        orders: list[Sequence[int]] = []
        best: list[tuple[Candidate | None, float]] = []
        rankings = rankings_of(table)
        for candidates, ranking in zip(candidates_of(table), rankings, strict=True):
            order, chances = fusion.fuse(candidates, ranking, self.calibration)
            orders.append(order)
            best.append((candidates[order[0]], chances[order[0]]) if order else (None, float("nan")))
        columns = {
            "ranking": pa.array(orders, pa.list_(pa.int64())),
            "routed": pa.array([ranking.status == RankStatus.SKIPPED for ranking in rankings], pa.bool_()),
            "class_id": pa.array([one.class_id if one else None for one, _ in best], pa.int64()),
            "class_name": pa.array([one.class_name if one else None for one, _ in best], pa.string()),
            "score": pa.array([chance for _, chance in best], pa.float32()),
        }
        return _with_columns(table.drop_columns(["ranking"]), columns)


def _with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def mean_of_views(vectors: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(sum of counts, D) unit vectors, of which a row owns the next counts[row] -> their means (N, D), of unit norm again."""
    if len(vectors) == len(counts):
        return vectors
    total = np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]]))
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def _present(column: pa.ChunkedArray) -> tuple[list[int], list]:
    """Positions and values of the non-null entries."""
    pairs = [(i, value.as_py()) for i, value in enumerate(column) if value.is_valid]
    return [i for i, _ in pairs], [value for _, value in pairs]
