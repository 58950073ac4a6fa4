"""The first steps of a picture's way, Dataset in, Dataset out: what every arm over the same corpus and encoder shares."""

from __future__ import annotations

import numpy as np
from ray.data import Dataset

from rar.config import Config
from rar.engine import models, pipeline, reading
from rar.engine.session import Session
from rar.run.work import Work


def embedded(
    session: Session,
    settings: Config,
    work: Work,
    facts: models.EncoderFacts,
    numbers: list[int] | None = None,
    known: np.ndarray | None = None,
) -> Dataset:
    """The shards (by default all of them) read, cropped and embedded: encoded bytes and vectors. known: of `reading.Decode`."""
    shards = pipeline.shards_of(work.index, work.bounds(settings.run.shard_size), numbers)
    if settings.encoder.model == "precomputed":
        assert settings.corpus is not None
        return pipeline.through(shards, "read", reading.LoadVectors(settings.corpus))
    shown = settings.detect.shown if settings.ranker.method != "none" else None
    crop = settings.detect.crop.sized(facts.side)
    rows = pipeline.through(shards, "read", reading.reader(work.index, crop, shown))
    if work.boxed:
        rows = pipeline.through(rows, "crop", reading.Crop(crop, shown))
    rows = pipeline.through(rows, "decode", reading.Decode(facts.fit, facts.min_side, known))
    return rows if settings.retriever.mode == "all" else pipeline.by_model(rows, session.encoder(settings.encoder))
