"""What happens to a shard, one function or callable class a stage: a table goes in, a table with more columns comes out.

Nothing here imports ray, so every stage can be called on a table in a test. Two columns travel with every row: `stage` and
`error`, null while all is well. A stage works on the healthy rows and passes the others on untouched, so that counts add up:
a row that comes in leaves either as a prediction or as an error. Each stage adds `seconds_<stage>` (its time, shared over its
rows), which the writer sums up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from rar import config, corpus, detect, retrieve, route
from rar.decode import decode
from rar.memory import Collection
from rar.schema import CANDIDATES, Candidate, Ranking, RankStatus, RowError, content_id

Stage = Callable[[pa.Table], pa.Table]


def timed(name: str, work: Stage) -> Stage:
    """Run a stage and note how long its rows took."""

    def run(table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        table = work(table)
        each = (time.perf_counter() - started) / max(table.num_rows, 1)
        return table.append_column(f"seconds_{name}", pa.array([each] * table.num_rows, pa.float64()))

    return run


def load(table: pa.Table) -> pa.Table:
    """uri, offset, size -> bytes (encoded) and image_id. Rows that cannot be read carry their reason."""
    found = corpus.read_many(*(table[name].to_pylist() for name in ("uri", "offset", "size")))
    good = [None if isinstance(data, RowError) else data for data in found]
    table = table.append_column("bytes", pa.array(good, pa.large_binary()))
    ids = [None if data is None else content_id(data) for data in good]
    table = table.append_column("image_id", pa.array(ids, pa.string()))
    faults = [str(data) if isinstance(data, RowError) else None for data in found]
    return _with_errors(table, "read", faults)


class Crop:
    """One row an image -> one row a box, with the crop's pixels as PPM bytes: nothing after this knows about boxes.

    PPM (a header and raw pixels) costs no time to write or read. A picture that cannot be decoded yields one error row a box.
    """

    def __init__(self, settings: config.Crop) -> None:
        self.settings = settings

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [row for picture in table.to_pylist() for row in self._boxes(picture)]
        return pa.Table.from_pylist(rows, CROPS)

    def _boxes(self, picture: dict) -> list[dict]:
        keep = {name: picture[name] for name in ("shard", "row", "uri", "image_id", "coco_id", "stage", "error")}
        boxes = np.array(picture["boxes_xyxy"], np.float64).reshape(-1, 4)
        keep["seconds_read"] = picture.get("seconds_read", 0.0) / max(len(boxes), 1)
        own = zip(boxes.tolist(), picture["box_scores"], picture["box_labels"], strict=True)
        rows = [{**keep, "box_xyxy": box, "box_score": score, "label": label} for box, score, label in own]
        if picture["error"] is not None or not rows:
            return rows
        try:
            image = decode(picture["bytes"])
        except RowError as error:
            return [{**row, "stage": "decode", "error": str(error)} for row in rows]
        height, width = image.shape[:2]
        faults = detect.check_boxes(boxes, width, height)
        good = [position for position, fault in enumerate(faults) if fault is None]
        cut = iter(detect.crops(image, boxes[good], self.settings))
        for row, box, fault in zip(rows, boxes, faults, strict=True):
            row["image_id"] = content_id(picture["bytes"], box.tolist())
            if fault is None:
                row["bytes"] = ppm(next(cut))
            else:
                row["stage"], row["error"] = "crop", fault
        return rows


CROPS = pa.schema(
    [
        ("seconds_read", pa.float64()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("uri", pa.string()),
        ("image_id", pa.string()),
        ("coco_id", pa.int64()),
        ("label", pa.string()),
        ("box_xyxy", pa.list_(pa.float32())),
        ("box_score", pa.float32()),
        ("bytes", pa.large_binary()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)


def ppm(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a binary PPM file."""
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


class Decode:
    """bytes -> pixels: the encoder's square input as raw bytes of (side, side, 3) uint8."""

    def __init__(self, fit: Callable[[np.ndarray], np.ndarray], side: int) -> None:
        self.fit, self.side = fit, side

    def __call__(self, table: pa.Table) -> pa.Table:
        pixels: list[bytes | None] = []
        faults: list[str | None] = []
        for data, error in zip(table["bytes"], table["error"].to_pylist(), strict=True):
            fault = None
            try:
                pixels.append(None if error else self.fit(decode(data.as_py(), self.side)).tobytes())
            except RowError as reason:
                pixels.append(None)
                fault = str(reason)
            faults.append(fault)
        return _with_errors(table.append_column("pixels", pa.array(pixels, pa.large_binary())), "decode", faults)


class Embed:
    """pixels (images) or text (class names, through the templates) -> vector, unit norm. Loads the encoder once an actor."""

    def __init__(self, settings: config.Encoder) -> None:
        from rar.embed import ClipEncoder  # torch belongs to the encoder's actors; other workers stay small

        self.encoder = ClipEncoder(settings)
        self.work = timed("embed", self._embed)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self.work(table)

    def _embed(self, table: pa.Table) -> pa.Table:
        vectors = np.zeros((table.num_rows, self.encoder.dim), np.float32)
        rows, data = _present(table["pixels"])
        side = self.encoder.side
        vectors[rows] = self.encoder.embed_images(np.frombuffer(bytearray().join(data), np.uint8).reshape(-1, side, side, 3))
        if "text" in table.column_names:
            rows, names = _present(table["text"])
            vectors[rows] = self.encoder.prototypes(names) if rows else 0
        return with_vectors(table, vectors)


class Retrieve:
    """vector -> candidates, from a head (fused, text, centroid), from image entries (knn), or the whole vocabulary (all)."""

    def __init__(self, settings: config.Retriever, collection: Collection, names: Mapping[int, str]) -> None:
        self.settings, self.collection, self.names = settings, collection, names

    def __call__(self, table: pa.Table) -> pa.Table:
        found: list[list[Candidate]] = [[]] * table.num_rows
        rows = [i for i, error in enumerate(table["error"].to_pylist()) if error is None]
        if rows:
            for row, candidates in zip(rows, self._candidates(table.take(rows)), strict=True):
                found[row] = candidates
        used = [name for name in ("vector", "pixels") if name in table.column_names]
        return with_candidates(table.drop_columns(used), found)

    def _candidates(self, table: pa.Table) -> list[list[Candidate]]:
        if self.settings.mode == "all":
            return [[Candidate(class_id, name, 0.0) for class_id, name in sorted(self.names.items())]] * table.num_rows
        queries = vectors_of(table)
        top_k = min(self.settings.top_k, len(self.names))
        if self.settings.mode == "knn":
            hits = self.collection.search(queries, self.settings.n_neighbors)
            return retrieve.knn_candidates(hits, self.names, top_k)
        hits = self.collection.search(retrieve.augment(queries), top_k)
        return retrieve.knn_candidates(hits, self.names, top_k)


class Recall:
    """image_id -> candidates known beforehand: calibration ranks memory entries by heads fitted without them."""

    def __init__(self, known: Mapping[str, list[Candidate]]) -> None:
        self.known = known

    def __call__(self, table: pa.Table) -> pa.Table:
        return with_candidates(table, [self.known.get(image_id, []) for image_id in table["image_id"].to_pylist()])


class Rank:
    """candidates -> ranking, by `ask` for the images that need the MLLM; the others keep the retriever's order.

    ask(images, names) -> one Ranking an image; images are encoded bytes. It is called with batches of `batch` images
    of one shard, several in flight at once: what a batch holds depends on the shard alone, never on timing.
    """

    def __init__(
        self,
        ask: Callable[[list[tuple[list[bytes], list[list[str]]]]], list[list[Ranking]]] | None,
        calibration: route.Calibration,
        batch: int,
    ) -> None:
        self.ask, self.calibration, self.batch = ask, calibration, batch

    def __call__(self, table: pa.Table) -> pa.Table:
        proposed = candidates_of(table)
        rankings = [Ranking(tuple(range(len(candidates))), RankStatus.SKIPPED) for candidates in proposed]
        rows = [row for row, candidates in enumerate(proposed) if not route.routed(candidates, self.calibration)]
        if self.ask is not None and rows:
            images = table["bytes"].take(rows).to_pylist()
            names = [[candidate.class_name for candidate in proposed[row]] for row in rows]
            starts = range(0, len(rows), self.batch)
            batches = [(images[s : s + self.batch], names[s : s + self.batch]) for s in starts]
            answers = [ranking for answered in self.ask(batches) for ranking in answered]
            for row, ranking in zip(rows, answers, strict=True):
                rankings[row] = ranking
        return self._write(table.drop_columns(["bytes"]), proposed, rankings)

    def _write(self, table: pa.Table, proposed: list[list[Candidate]], rankings: list[Ranking]) -> pa.Table:
        """The ranker's own answer, the final order and the class it predicts."""
        orders: list[Sequence[int]] = []
        best: list[tuple[Candidate | None, float]] = []
        for candidates, ranking in zip(proposed, rankings, strict=True):
            order, chances = route.fuse(candidates, ranking, self.calibration)
            orders.append(order)
            best.append((candidates[order[0]], chances[order[0]]) if order else (None, float("nan")))
        columns = {
            "ranking": pa.array(orders, pa.list_(pa.int64())),
            "rank_status": pa.array([ranking.status.value for ranking in rankings], pa.string()),
            "response": pa.array([ranking.response for ranking in rankings], pa.string()),
            "scores": pa.array([route.rank_scores(ranking) for ranking in rankings], pa.list_(pa.float32())),
            "routed": pa.array([ranking.status == RankStatus.SKIPPED for ranking in rankings], pa.bool_()),
            "class_id": pa.array([one.class_id if one else None for one, _ in best], pa.int64()),
            "class_name": pa.array([one.class_name if one else None for one, _ in best], pa.string()),
            "score": pa.array([chance for _, chance in best], pa.float32()),
        }
        for key in ("calls", "prompt_tokens", "output_tokens"):
            columns[f"mllm_{key}"] = pa.array([getattr(ranking, key) for ranking in rankings], pa.int64())
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table


def vectors_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """(N, D) float32 as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])


def with_vectors(table: pa.Table, vectors: np.ndarray) -> pa.Table:
    """pixels -> vector: (N, D) float32 takes their place."""
    return table.drop_columns(["pixels"]).append_column("vector", vectors_column(vectors))


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column `vector` as (N, D) float32."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def with_candidates(table: pa.Table, found: Sequence[Sequence[Candidate]]) -> pa.Table:
    rows = [[{"class_id": c.class_id, "class_name": c.class_name, "score": c.score} for c in row] for row in found]
    return table.append_column("candidates", pa.array(rows, CANDIDATES))


def candidates_of(table: pa.Table) -> list[list[Candidate]]:
    return [[Candidate(**candidate) for candidate in row] for row in table["candidates"].to_pylist()]


def _present(column: pa.ChunkedArray) -> tuple[list[int], list]:
    """Positions and values of the non-null entries."""
    pairs = [(i, value.as_py()) for i, value in enumerate(column) if value.is_valid]
    return [i for i, _ in pairs], [value for _, value in pairs]


def _with_errors(table: pa.Table, stage: str, faults: Sequence[str | None]) -> pa.Table:
    """Set `stage` and `error` where a row has a new fault; create the columns where they are missing."""
    old = table["error"].to_pylist() if "error" in table.column_names else [None] * table.num_rows
    stages = table["stage"].to_pylist() if "stage" in table.column_names else [None] * table.num_rows
    errors = [known or fault for known, fault in zip(old, faults, strict=True)]
    stages = [known or (stage if fault else None) for known, fault in zip(stages, faults, strict=True)]
    table = table.drop_columns([name for name in ("stage", "error") if name in table.column_names])
    return table.append_column("stage", pa.array(stages, pa.string())).append_column("error", pa.array(errors, pa.string()))
