"""The steps of a picture's way, Dataset in, Dataset out: read, crop, embed, retrieve, rank, fuse (`recognise.run` writes them).

What does a step to a shard is a stage of `engine`; here stands which stage a run's settings ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ray.data import Dataset

from rar import config, fusion
from rar.engine import choosing, models, pipeline, reading
from rar.engine.session import Session
from rar.engine.stages import as_before
from rar.ranker.cache import Asks
from rar.run.vocabulary import Vocabulary
from rar.run.work import Work


def read(settings: config.Config, work: Work, facts: models.EncoderFacts, numbers: Sequence[int] | None = None) -> Dataset:
    """Shards by number (by default all): encoded pictures; embeddings that the user brings; boxes of a support set, cut out."""
    shards = pipeline.shards_of(work.index, work.bounds(settings.run.shard_size), numbers)
    if settings.encoder.model == "precomputed":
        assert settings.corpus is not None
        return pipeline.through(shards, "read", reading.LoadVectors(settings.corpus))
    return pipeline.through(shards, "read", reading.reader(work.index, *_views(settings, facts)))


def crop(settings: config.Config, work: Work, facts: models.EncoderFacts, rows: Dataset) -> Dataset:
    """A row a box, where there are boxes."""
    return pipeline.through(rows, "crop", reading.Crop(*_views(settings, facts))) if work.boxed else rows


def _views(settings: config.Config, facts: models.EncoderFacts) -> tuple[config.Crop, config.Shown | None]:
    """What the encoder and the ranker are to see of a box."""
    return settings.detect.crop.sized(facts.side), settings.detect.shown if settings.ranker.method != "none" else None


def embed(
    session: Session, settings: config.Config, facts: models.EncoderFacts, rows: Dataset, known: np.ndarray | None = None
) -> Dataset:
    """Vectors; with retriever.mode all nobody asks for them, and pictures are decoded alone. known: of `reading.Decode`."""
    if settings.encoder.model == "precomputed":
        return rows
    rows = pipeline.through(rows, "decode", reading.Decode(facts.fit, facts.min_side, known))
    return rows if settings.retriever.mode == "all" else pipeline.by_model(rows, session.encoder(settings.encoder))


def retrieve(vocabulary: Vocabulary, rows: Dataset) -> Dataset:
    return pipeline.through(rows, "retrieve", vocabulary.retrieve)


def rank(
    session: Session,
    settings: config.Ranker,
    ask: Asks | None,
    calibration: fusion.Calibration,
    rows: Dataset,
) -> Dataset:
    """ask: of `client.ask`. Servers are asked about a whole shard; a worker's own session keeps the pace there."""
    batches = (None, 1) if settings.method == "endpoint" else (settings.batch_size, settings.in_flight)
    work = choosing.Rank(ask, calibration, *batches)
    # on a cluster, tasks that keep all replicas at work while they hold no CPU (pipeline.through); on a laptop models reserve
    # none, so nothing that waits can keep one from starting
    replicas = session.joined and settings.method not in ("none", "endpoint")
    return pipeline.through(rows, "rank", work, 2 * settings.max_replicas if replicas else None)


def fuse(calibration: fusion.Calibration, rows: Dataset) -> Dataset:
    return pipeline.through(rows, "fuse", choosing.Fuse(calibration))


def vectors(
    session: Session,
    settings: config.Config,
    work: Work,
    facts: models.EncoderFacts,
    numbers: Sequence[int] | None = None,
) -> Dataset:
    """The first three steps: for who wants the vectors alone, or several arms that share them."""
    return embed(session, settings, facts, crop(settings, work, facts, read(settings, work, facts, numbers)))


def shared(vocabulary: Vocabulary, found: Dataset) -> Callable[[Sequence[int]], Dataset]:
    """`recognise.run`'s `retrieved` over the vectors of all shards, for arms that share them and run their course whole."""
    return lambda _: retrieve(vocabulary, pipeline.plainly(found, as_before))
