"""Where Ray Data writes: `MilvusSink` puts blocks of entries into a memory, `ShardSink` puts shards into a run folder,
`EmbeddingSink` into a folder of embeddings, and `PartSink` into one of rows that several runs share.

Ray retries a failed write task and may run one twice; entries have primary keys and shards have names, so a second write
changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from rar import storage
from rar.columns import fitted, vectors_of
from rar.engine.keeping import Keeper
from rar.engine.stages import NOTES, with_seconds
from rar.memory.collection import FIELDS, Collection, Entries
from rar.runfolder import RunFolder, summed
from rar.schema import ERRORS, PREDICTIONS, UserError

Told = tuple[int, pa.Table, list[dict[str, float]]]  # entries written, columns of all rows, a mark a shard


class MilvusSink(Datasink[Told]):
    """Upserts the columns entry_id, class_id, class_name and vector of every block; rows with an `error` are passed over.

    The collection must exist (`Collection.create`) and is sealed by the caller, once, after the write. After a write, `written`
    is the number of entries that were sent, `told` the columns `tell` of all rows, written or not, and `stats` the marks of all
    shards, `summed`: what the driver learns of a build, which is never a vector. keeper: what is written is kept there, too.
    """

    def __init__(self, collection: Collection, tell: Sequence[str] = (), keeper: Keeper | None = None) -> None:
        self.collection, self.tell, self.keeper = collection, tuple(tell), keeper
        self.written, self.told = 0, pa.table({})
        self.stats: dict[str, float] = {}

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Raises UserError before the first task where there is no such memory, or a column is missing."""
        self.collection.meta()
        missing = [name for name in FIELDS if schema is not None and name not in schema.names]
        if missing:
            raise UserError(f"entries need the columns {', '.join(FIELDS)}; missing: {', '.join(missing)}")

    def write(self, blocks: Iterable[Block], ctx: object) -> Told:
        """What this task wrote."""
        written, told, marks = 0, [], []
        for block in map(BlockAccessor.for_block, blocks):
            if block.num_rows():
                table, started = block.to_arrow(), time.perf_counter()
                written += self._upsert(table)
                marks.append({**stage_seconds(with_seconds(table, "write", started)), "ended": time.time()})
                told.append(table.select([name for name in self.tell if name in table.column_names]))
        return written, pa.concat_tables(told) if told else pa.table({}), marks

    def _upsert(self, table: pa.Table) -> int:
        if "error" in table.column_names:
            table = table.filter(pc.is_null(table["error"]))
        if not table.num_rows:
            return 0
        ids, names = table["entry_id"].to_pylist(), table["class_name"].to_pylist()
        vectors = np.stack(list(BlockAccessor.for_block(table).to_numpy("vector")))  # from lists as well as from tensors
        part = Entries(ids, table["class_id"].to_numpy(), names, vectors)
        written = self.collection.upsert(part.entry_ids, part.class_ids, part.class_names, part.vectors)
        if self.keeper is not None:
            self.keeper.add(part)
        return written

    def on_write_complete(self, write_result: WriteResult[Told]) -> None:
        self.written = sum(count for count, _, _ in write_result.write_returns)
        tables = [table for _, table, _ in write_result.write_returns if table.num_rows]
        self.told = pa.concat_tables(tables) if tables else pa.table({})
        self.stats = summed(mark for _, _, marks in write_result.write_returns for mark in marks)


PICTURES = ("bytes", "pixels", "views")


def embedding_file(shard: int) -> str:
    return f"part-{shard:06d}.parquet"


class EmbeddingSink(Datasink[int]):
    """Writes each block, a whole shard, as one parquet file of id, uri, label and vector (float16), on any file system.

    Rows that failed are lines of errors/part-N.jsonl, written first.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def write(self, blocks: Iterable[Block], ctx: object) -> int:
        """Returns the number of vectors written by this task."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        return sum(self._write(table) for table in tables if table.num_rows)

    def _write(self, table: pa.Table) -> int:
        folder = storage.place(self.folder)
        shard, failed = table["shard"][0].as_py(), pc.is_valid(table["error"])
        good, bad = table.filter(pc.invert(failed)), fitted(table.filter(failed), ERRORS)
        lines = "".join(json.dumps(row) + "\n" for row in bad.to_pylist())
        if lines:
            storage.write(folder / "errors" / f"part-{shard:06d}.jsonl", lines.encode())
        halves = vectors_of(good).astype(np.float16) if good.num_rows else np.zeros((0, 1), np.float16)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), halves.shape[1])
        columns = {"id": good["image_id"], "uri": good["uri"], "label": good["label"], "vector": vectors}
        with storage.writing(folder / embedding_file(shard)) as stream:
            pq.write_table(pa.table(columns), stream)
        return good.num_rows


class PartSink(Datasink[int]):
    """Writes each block, a whole shard, as part-N.parquet with all columns but pictures. first: the number of shard 0."""

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.first = folder, first

    def write(self, blocks: Iterable[Block], ctx: object) -> int:
        """Returns the number of rows written by this task."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        return sum(self._write(table) for table in tables if table.num_rows)

    def _write(self, table: pa.Table) -> int:
        number = self.first + table["shard"][0].as_py()
        kept = table.drop_columns([name for name in PICTURES if name in table.column_names])
        with storage.writing(storage.place(self.folder) / f"part-{number:06d}.parquet") as stream:
            pq.write_table(kept, stream)
        return table.num_rows


class ShardSink(Datasink[int]):
    """Writes each block, a whole shard, as one file of predictions and, where rows failed, one of errors.

    expected: the number of rows each shard must have; where there is a column `boxes`, a row counts as so many. A shard that
    came apart on its way is refused: a run folder with too few rows would look complete. A shard without rows never comes: Ray
    Data forgets the columns, and so the number, of an empty block, so `write_empty` writes those beforehand. The columns
    `seconds_*`, `waited_*`, `mllm_*` and `near_duplicate` are summed into the shard's mark.
    """

    def __init__(self, folder: Path, expected: Mapping[int, int]) -> None:
        self.folder, self.expected = folder, dict(expected)

    def write(self, blocks: Iterable[Block], ctx: object) -> int:
        return sum(self._write(BlockAccessor.for_block(block).to_arrow()) for block in blocks)

    def _write(self, table: pa.Table) -> int:
        if table.num_rows == 0:
            return 0
        numbers = pc.unique(table["shard"]).to_pylist()
        rows = pc.sum(table["boxes"]).as_py() if "boxes" in table.column_names else table.num_rows
        if len(numbers) != 1 or rows != self.expected[numbers[0]]:
            raise RuntimeError(f"shards {numbers} arrived with {rows} rows together; a shard must stay whole")
        failed = pc.is_valid(table["error"])
        good, bad = table.filter(pc.invert(failed)), table.filter(failed)
        RunFolder(self.folder).write_shard(
            numbers[0], fitted(good, PREDICTIONS), fitted(bad, ERRORS), {**stage_seconds(table), **_tallies(good)}
        )
        return table.num_rows


def stage_seconds(table: pa.Table) -> dict[str, float]:
    """`stage.rows` and `stage.seconds` (`stage.before`: see as_before) of what has noted them, and `stage.waited` of models."""
    found: dict[str, float] = {}
    for name in table.column_names:
        note, _, stage = name.partition("_")
        if name.startswith(NOTES):
            found |= {f"{stage}.rows": table.num_rows, f"{stage}.{note}": pc.sum(table[name]).as_py()}
    return found


def _tallies(table: pa.Table) -> dict[str, float]:
    names = [name for name in table.column_names if name.startswith("mllm_")]
    found = {f"mllm.{name.removeprefix('mllm_')}": pc.sum(table[name], min_count=0).as_py() for name in names}
    if "near_duplicate" in table.column_names:
        found["near_duplicates"] = pc.sum(table["near_duplicate"], min_count=0).as_py()
    return found
