"""Stages that hold a model, and live in actors: boxes by a detector, vectors by an encoder."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rar import config
from rar.columns import with_errors, with_vectors
from rar.corpus.decode import decode, fit_square
from rar.corpus.frame import frame_of
from rar.engine.isolate import Isolate, parted, reason
from rar.engine.stages import with_seconds
from rar.schema import RowError


class Model(Protocol):
    """A stage with a loaded model, as an actor holds it."""

    def __init__(self, settings: Any) -> None: ...
    def __call__(self, table: pa.Table) -> pa.Table: ...
    def facts(self) -> Any: ...

    @staticmethod
    def failed(table: pa.Table, why: str) -> pa.Table:
        """What the stage returns where nothing can be asked of it: all rows that were healthy fail."""


class Propose:
    """bytes -> boxes_xyxy and box_scores of each image, by an open detector; a picture without objects has empty lists.

    Images are decoded at full size in the actor that holds the model: shipped as pixels they would be many times larger.
    """

    def __init__(self, settings: config.Detect) -> None:
        from rar.crops.detector import Proposer  # torch belongs to the detector's actors

        assert settings.detector is not None
        self.batch = settings.detector.batch_size
        proposer = Proposer(settings.detector)
        self.propose: Isolate[tuple[np.ndarray, np.ndarray]] = Isolate(
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


@dataclass(frozen=True)
class EncoderFacts:
    """What the driver and the decode tasks must know of an encoder, found out by a worker: the driver need not load torch."""

    side: int
    dim: int
    fingerprint: str
    resize_mode: str
    interpolation: str
    embeds_texts: bool = True
    min_side: int | None = None  # that a JPEG must keep where it is decoded at a fraction of its size; None: it is not

    def fit(self, image: np.ndarray) -> np.ndarray:
        return fit_square(image, self.side, self.resize_mode, self.interpolation)


class Embed:
    """pixels (images) or text (class names, through the templates) -> vector, unit norm. Loads the encoder once an actor."""

    def __init__(self, settings: config.Encoder) -> None:
        from rar.encoder.towers import load_encoder  # torch belongs to the encoder's actors; other workers stay small

        self.encoder = load_encoder(settings)
        self.images = Isolate(self._squares, free_gpu_memory)
        self.texts: Isolate[np.ndarray] = Isolate(lambda names: list(self.encoder.prototypes(names)), free_gpu_memory)

    def facts(self) -> EncoderFacts:
        encoder = self.encoder
        min_side = encoder.side if encoder.settings.scaled_decode else None
        fitting = (encoder.resize_mode, encoder.interpolation)
        return EncoderFacts(encoder.side, encoder.dim, encoder.fingerprint(), *fitting, encoder.embeds_texts, min_side)

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


def mean_of_views(vectors: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(sum of counts, D) unit vectors, of which a row owns the next counts[row] -> their means (N, D), of unit norm again."""
    if len(vectors) == len(counts):
        return vectors
    total = np.add.reduceat(vectors, np.cumsum([0, *counts[:-1]]))
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def free_gpu_memory() -> None:
    """What torch holds back for later goes to who asks now; nothing where no GPU is in use."""
    import torch

    gc.collect()  # tensors of the failed try may hang in cycles
    torch.cuda.empty_cache()


def _present(column: pa.ChunkedArray) -> tuple[list[int], list]:
    """Positions and values of the non-null entries."""
    pairs = [(i, value.as_py()) for i, value in enumerate(column) if value.is_valid]
    return [i for i, _ in pairs], [value for _, value in pairs]
