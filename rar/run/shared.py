"""Work that several runs share, done once: embeddings and candidates by row, kept as parquet beside the runs.

A `Computed` is a folder of part-N.parquet, each a shard's rows with all columns but pictures. What is kept is told by the
number of the row (INDEX's `row`), so a folder that was begun, or is asked for more rows than before, is given only what it
lacks. What it is of is in its name, by `key`: other settings, weights, code or listings are another folder. Parts keep the
columns `seconds_*` of the stages that made them, so a folder tells how many rows each stage has seen.

Pictures are not kept: a run that asks the ranker reads them again. A worker that looks rows up holds all of a folder, 2 kB a
picture at 512 dimensions; above some hundred thousand pictures, plain `rar classify` is the better way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from rar import identity, storage
from rar.columns import digest, vectors_of, with_errors, with_vectors
from rar.config import Config, Detect, Ranker, Retriever
from rar.engine import pipeline, reading
from rar.engine.session import Session
from rar.engine.sinks import PartSink, stage_seconds
from rar.engine.stages import NOTES
from rar.run import build, steps
from rar.run.vocabulary import Vocabulary
from rar.run.work import Work
from rar.runfolder import read_table
from rar.schema import ERRORS


def key(settings: Config, *others: Any) -> str:
    """16 hex digits of what decides an embedding (encoder, templates, crops, weights, code) and of `others`, which are JSON."""
    decides = Config(encoder=settings.encoder, detect=Detect(crop=settings.detect.crop), ranker=Ranker(method="none"))
    return identity.fingerprint([identity.of_run(decides), *others])


def listed(index: pa.Table) -> str:
    """A digest of what an index names: pictures, labels and boxes."""
    return digest(index, "row", "uri", "label", "boxes_xyxy", "box_xyxy")


@dataclass(frozen=True)
class Computed:
    """A folder of rows that are computed once."""

    folder: Path

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def extend(self, work: Work, size: int, make: Callable[[Work, np.ndarray], Dataset]) -> tuple[int, int]:
        """Compute the rows of `work` that are not kept yet, in shards of `size`; returns how many (now, before).

        make: work and bounds -> its shards' rows.
        """
        counts, parts = work.rows_of_images, self.parts()
        wanted = work.index.filter(pa.array(counts > 0))
        held = pa.concat_arrays([pa.array([], pa.int64()), *(part["row"].combine_chunks() for part in map(read_table, parts))])
        lacking = wanted.filter(pc.invert(pc.is_in(wanted["row"], held)))
        if lacking.num_rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            first = 1 + max((int(part.stem.removeprefix("part-")) for part in parts), default=-1)
            new = Work(lacking, work.boxed, ERRORS.empty_table())
            make(new, new.bounds(size)).write_datasink(PartSink(self.folder, first))
        return lacking.num_rows, wanted.num_rows - lacking.num_rows

    def rows(self) -> pa.Table:
        """All rows, sorted by row and place."""
        return _rows(str(self.folder), tuple(part.name for part in self.parts()))

    def stages(self) -> dict[str, float]:
        """`stage.rows` and `stage.seconds` of all that was ever computed here."""
        return stage_seconds(self.rows()) if self.parts() else {}


@lru_cache(maxsize=4)
def _rows(folder: str, names: Sequence[str]) -> pa.Table:
    whole = pa.concat_tables([read_table(storage.place(folder) / name) for name in names], promote_options="default")
    order = [("row", "ascending")] + [("place", "ascending")] * ("place" in whole.column_names)
    return whole.sort_by(order).combine_chunks()


class Recalled:
    """Index rows -> what is kept of them, in their order, with their shard's number; a picture with boxes has several rows."""

    def __init__(self, kept: Computed) -> None:
        self.kept = kept

    def __call__(self, table: pa.Table) -> pa.Table:
        known = self.kept.rows()
        rows, asked = known["row"].to_numpy(), table["row"].to_numpy()
        first, last = (np.searchsorted(rows, asked, side) for side in ("left", "right"))
        places = np.concatenate([np.arange(*span) for span in zip(first, last, strict=True)] or [np.zeros(0, np.int64)])
        found = known.take(pa.array(places, pa.int64()))
        found = found.drop_columns([name for name in found.column_names if name == "shard" or name.startswith(NOTES)])
        numbers = np.repeat(table["shard"].to_numpy(), last - first)
        found = found.append_column("shard", pa.array(numbers, pa.int32()))
        return found.append_column("bytes", pa.nulls(found.num_rows, pa.large_binary()))


class Pictured:
    """Rows with their pictures -> what is kept of them, and the picture; a picture that is gone meanwhile is a fault."""

    def __init__(self, kept: Computed) -> None:
        self.kept = kept

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, starts = np.unique(table["row"].to_numpy(), return_index=True)
        asked = pa.table({"row": rows[np.argsort(starts)], "shard": table["shard"].take(pa.array(np.sort(starts)))})
        found = Recalled(self.kept)(asked).drop_columns(["bytes"])
        if found.num_rows != table.num_rows:
            raise RuntimeError(f"{self.kept.folder} keeps {found.num_rows} rows of {table.num_rows}; pictures or boxes changed")
        return with_errors(found.append_column("bytes", table["bytes"]), "read", table["error"].to_pylist())


class Named:
    """Texts -> the vectors that are kept of them."""

    def __init__(self, kept: Computed) -> None:
        self.kept = kept

    def __call__(self, table: pa.Table) -> pa.Table:
        known = self.kept.rows()
        places = pc.index_in(table["label"], value_set=known["label"].combine_chunks())
        found = with_vectors(table, vectors_of(known.take(places)))
        return with_errors(found, "embed", known["error"].take(places).to_pylist())


def embed_images(session: Session, settings: Config, work: Work, kept: Computed) -> tuple[int, int]:
    """Keep the vectors of pictures, or of boxes; returns how many pictures were embedded (now, before)."""
    plain = settings.model_copy(update={"retriever": Retriever()})  # whatever is looked up later
    facts = session.encoder(settings.encoder).facts
    return kept.extend(work, settings.run.shard_size, lambda new, bounds: steps.vectors(session, plain, new, facts))


def embed_names(session: Session, settings: Config, names: Sequence[str], kept: Computed) -> tuple[int, int]:
    """Keep the vectors of class names; returns how many were embedded (now, before)."""
    index = pa.table({"row": pa.array(range(len(names)), pa.int64()), "label": pa.array(names, pa.string())})

    def rows(new: Work, bounds: np.ndarray) -> Dataset:
        return pipeline.by_model(
            pipeline.plainly(pipeline.shards_of(new.index, bounds), as_texts), session.encoder(settings.encoder)
        )

    return kept.extend(Work(index, False, ERRORS.empty_table()), settings.run.shard_size, rows)


def as_texts(table: pa.Table) -> pa.Table:
    """Names with their place as rows of a memory's build."""
    rows = build.as_image_rows(table.select(["shard"]).append_column("text", table["label"]))
    return rows.append_column("row", table["row"])


def known(images: Computed, names: Computed) -> build.Lookup:
    return build.Lookup(Recalled(images), Named(names))


def retrieve(
    settings: Config, work: Work, vocabulary: Vocabulary, embedded: Computed | None, kept: Computed
) -> tuple[int, int]:
    """Keep the candidates of pictures, or of boxes; returns of how many (now, before). embedded: None for a user's vectors."""

    def rows(new: Work, bounds: np.ndarray) -> Dataset:
        shards = pipeline.shards_of(new.index, bounds)
        if embedded is None:
            assert settings.corpus is not None
            found = pipeline.through(shards, "read", reading.LoadVectors(settings.corpus))
        else:
            found = pipeline.plainly(shards, Recalled(embedded))
        return steps.retrieve(vocabulary, found)

    return kept.extend(work, settings.run.shard_size, rows)


def retrieved(settings: Config, work: Work, kept: Computed) -> Callable[[list[int]], Dataset]:
    """Shards of `work` by number with their kept candidates, and with pictures where the ranker wants some."""

    def rows(numbers: list[int]) -> Dataset:
        shards = pipeline.shards_of(work.index, work.bounds(settings.run.shard_size), numbers)
        if settings.ranker.method == "none":
            return pipeline.plainly(shards, Recalled(kept))
        pictures = pipeline.through(shards, "read", reading.load)
        if work.boxed:
            pictures = pipeline.through(pictures, "crop", reading.Crop(None, settings.detect.shown))
        return pipeline.plainly(pictures, Pictured(kept))

    return rows
