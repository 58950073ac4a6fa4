"""What the memory holds near the predictions that a run's page shows: neighbors.parquet, with small pictures.

A page is made without a model, and maybe when the support set is gone; so the few pictures that it will show are looked up
while the run's models and memory are open. A memory keeps no pictures: those of the classes that were found are read from the
support set and told by their content. What is not there any more is left out.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rar import storage
from rar.columns import vectors_of
from rar.config import Config, Ranker, Retriever
from rar.corpus.decode import decode
from rar.engine import pipeline, reading
from rar.engine.session import Session
from rar.memory.entries import Hits
from rar.report import cards, view
from rar.run import build, steps
from rar.run.vocabulary import Vocabulary
from rar.run.work import Work
from rar.runfolder import RunFolder
from rar.schema import ERRORS, RowError, Unavailable, UserError

COUNT, SIDE = 4, 96  # neighbors of a prediction; longest side of a picture, pixels
NEIGHBORS = pa.schema(
    [("row", pa.int64()), ("place", pa.int32()), ("class_name", pa.string()), ("score", pa.float32()), ("picture", pa.binary())]
)


def keep(session: Session, settings: Config, vocabulary: Vocabulary, folder: RunFolder) -> None:
    """Look up what is near the cards of a finished run; nothing where the memory has no pictures that could be shown."""
    if settings.memory.support is None or settings.encoder.model == "precomputed" or not vocabulary.retrieve.images.exists():
        return
    run = view.read_run(folder.path)
    shown = np.concatenate([np.zeros(0, np.int64), *(gallery.rows for gallery in cards.galleries(run))])
    if not len(shown):
        return
    keys, vectors = _looked_up(session, settings, vocabulary, run, shown)
    hits = vocabulary.retrieve.images.search(vectors, COUNT)
    pictures = _pictures(settings, vocabulary, hits)
    rows = []
    for key, scores, class_ids, entries in zip(keys, hits.scores, hits.class_ids, hits.entry_ids, strict=True):
        for score, class_id, entry in zip(scores.tolist(), class_ids.tolist(), entries, strict=True):
            if (picture := pictures.get(_content(entry))) is not None:
                named = {"class_name": vocabulary.names[class_id], "score": score, "picture": picture}
                rows.append({"row": key[0], "place": key[1], **named})
    with storage.writing(folder.path / view.NEIGHBORS) as stream:
        pq.write_table(pa.Table.from_pylist(rows, NEIGHBORS), stream)


def _looked_up(
    session: Session, settings: Config, vocabulary: Vocabulary, run: view.RunView, shown: np.ndarray
) -> tuple[list[tuple[int, int | None]], np.ndarray]:
    """(row, place) of the predictions, and their vectors (n, D) float32, embedded as the run did; without those that fail."""
    wanted = set(_keys(run.predictions.take(pa.array(shown))))
    work = Work(run.index.take(pa.array(np.unique(run.places[shown]))), run.boxes is not None, ERRORS.empty_table())
    plain = settings.model_copy(update={"retriever": Retriever(), "ranker": Ranker(method="none")})
    rows = steps.vectors(session, plain, work, vocabulary.facts)
    columns = ["row", *["place"] * work.boxed, "vector", "error"]
    table = pipeline.collect(pipeline.plainly(rows, lambda found: found.select(columns)))
    table = table.filter(pc.is_null(table["error"]))
    table = table.filter(pa.array([key in wanted for key in _keys(table)], pa.bool_()))
    return _keys(table), vectors_of(table)


def _keys(table: pa.Table) -> list[tuple[int, int | None]]:
    places = table["place"].to_pylist() if "place" in table.column_names else [None] * table.num_rows
    return list(zip(table["row"].to_pylist(), places, strict=True))


def _pictures(settings: Config, vocabulary: Vocabulary, hits: Hits) -> dict[str, bytes]:
    """Content id -> small JPEG of the entries found, as far as the support set still has them."""
    contents = {_content(entry) for row in hits.entry_ids for entry in row}
    names = {vocabulary.names[one] for one in np.unique(hits.class_ids).tolist() if one in vocabulary.names}
    try:
        support = pipeline.in_a_worker(_support_of, settings, sorted(names))
    except (UserError, Unavailable):  # it served to build the memory, and may be gone since
        return {}
    if not support.num_rows:
        return {}
    shards = pipeline.shards_of(support, pipeline.evenly(support, settings.run.shard_size))
    read = pipeline.plainly(shards, reading.reader(support, None, settings.detect.shown))

    def small(table: pa.Table) -> pa.Table:
        found = {}
        for content, data in zip(table["image_id"].to_pylist(), table["bytes"], strict=True):
            if content in contents and content not in found:
                try:
                    found[content] = cards.jpeg(decode(data.as_py(), SIDE), SIDE)
                except RowError:
                    continue
        return pa.table({"content": pa.array(found, pa.string()), "picture": pa.array(found.values(), pa.binary())})

    table = pipeline.collect(pipeline.plainly(read, small))
    return dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True)) if table.num_rows else {}


def _support_of(settings: Config, names: list[str]) -> pa.Table:
    support = build.plan(settings).support
    return support.filter(pc.is_in(support["label"], pa.array(names, pa.string())))


def _content(entry: str) -> str:
    """Of an entry_id (see schema.entry_id)."""
    return entry.partition("-")[0]
