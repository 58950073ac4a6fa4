"""The rows of a run: images of a corpus, or the boxes of its pictures; and what a run over them would cost."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.config import Config
from rar.corpus import coco
from rar.corpus.datasets import named
from rar.encoder.names import check_name, check_sentence_encoder
from rar.engine import pipeline
from rar.run import build
from rar.runfolder import RunFolder
from rar.schema import ERRORS, UserError
from rar.storage import is_model_folder


@dataclass(frozen=True)
class Work:
    """The rows of a run: an index of images and, for detection, their boxes; `faults` are rows that failed before the start."""

    index: pa.Table
    boxed: bool
    faults: pa.Table

    @property
    def rows_of_images(self) -> np.ndarray:
        """(N,) how many rows each image of the index becomes."""
        if not self.boxed:
            return np.ones(self.index.num_rows, np.int64)
        return pc.list_value_length(self.index["boxes_xyxy"]).to_numpy()

    @property
    def labels(self) -> pa.ChunkedArray:
        """Of the images, or of all their boxes; null where a row has none."""
        return pc.list_flatten(self.index["box_labels"]) if self.boxed else self.index["label"]

    @property
    def empty_images(self) -> int:
        return int((self.rows_of_images == 0).sum())

    def bounds(self, size: int) -> np.ndarray:
        """Where the index is cut into shards of at most `size` rows."""
        return pipeline.cut(self.rows_of_images, size)

    def expected(self, size: int) -> dict[int, int]:
        """shard -> its rows."""
        rows, bounds = self.rows_of_images, self.bounds(size)
        return {shard: int(rows[slice(*bounds[shard : shard + 2])].sum()) for shard in range(len(bounds) - 1)}


def classify_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the images to classify")
    _check_models(settings)
    build.check_kind(settings, settings.corpus)
    return Work(named.read(settings.corpus).index, False, ERRORS.empty_table())


def detect_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the COCO or LVIS JSON of the images to detect in")
    corpus = named.as_file(settings.corpus)
    check_name(settings.encoder.model)
    _check_models(settings)
    if settings.detect.detector is not None:  # its boxes are found in the run
        listed = coco.is_json(corpus)
        pictures = coco.list_pictures(corpus) if listed else coco.without_boxes(named.read(corpus).index)
        return Work(pictures, True, ERRORS.empty_table())
    if os.path.isdir(corpus.uri):
        raise UserError(f"{corpus.uri} is a folder, no JSON of boxes; name a COCO or LVIS JSON, or set detect.detector")
    index, faults = coco.read_boxes(corpus, settings.detect)
    return Work(index, True, pa.Table.from_pylist(faults, ERRORS))


def _check_models(settings: Config) -> None:
    """A mistyped folder is told at once, and not by a process that was started to load it. Raises UserError."""
    if settings.ranker.starts_models and settings.ranker.model != "miniature":
        is_model_folder(settings.ranker.model, "ranker.model")
    if settings.detect.detector is not None:
        is_model_folder(settings.detect.detector.model, "detect.detector.model")
    if settings.run.sentence_encoder is not None:
        check_sentence_encoder(settings.run.sentence_encoder)


def dry_run(settings: Config, work: Work, path: Path) -> str:
    """What a run would do, from the index alone: counts, sizes and MLLM requests; nothing is opened or written."""
    rows, images = int(work.rows_of_images.sum()), work.index.num_rows
    size = settings.run.shard_size
    shards = len(work.bounds(size)) - 1
    done = shards - len(RunFolder(path).pending(shards))
    local = [uri for uri in work.index["uri"][:1000].to_pylist() if os.path.exists(uri)]
    sampled = sum(os.path.getsize(uri) for uri in local) / max(len(local), 1)
    asked = 0 if settings.ranker.method == "none" else rows
    detector = settings.detect.detector if work.boxed else None
    what = f"the boxes that {detector.model} will find" if detector else f"{rows:,} {'boxes' if work.boxed else 'images'}"
    batches = -(-asked // settings.ranker.batch_size)
    lines = [
        f"would recognise {what} of {images:,} images in {shards:,} shards of {size}",
        f"  {done:,} shards are in {path} already; {work.faults.num_rows:,} boxes cannot be used",
        f"  about {sampled * images / 1e6:,.1f} MB to read" if local else "  size of the files unknown",
        f"  encoder {settings.encoder.model}, {settings.encoder.workers} worker(s), batches of {settings.encoder.batch_size}",
        f"  ranker {settings.ranker.model} ({settings.ranker.method}): at most {asked:,} images in {batches:,} requests",
    ]
    return "\n".join(lines)
