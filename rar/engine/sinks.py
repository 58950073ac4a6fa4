"""Where Ray Data writes: `MilvusSink` puts blocks of entries into a memory, `ShardSink` puts shards into a run folder.

Ray retries a failed write task and may run one twice; entries have primary keys and shards have names, so a second write
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from rar.columns import fitted
from rar.memory.collection import FIELDS, Collection
from rar.runfolder import RunFolder
from rar.schema import ERRORS, PREDICTIONS, UserError


class MilvusSink(Datasink[int]):
    """Upserts the columns entry_id, class_id, class_name and vector of every block; other columns are left out.

    The collection must exist (`Collection.create`) and is sealed by the caller, once, after the write.
    `written` holds the number of entries after a write; it is what `seal` expects when the entry_ids are unique.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.written = 0

    @property
    def supports_distributed_writes(self) -> bool:
        """An embedded store is served on loopback, so its write tasks stay on the driver's node."""
        return urlsplit(self.collection.address).hostname not in ("127.0.0.1", "localhost", "::1")

    def on_write_start(self, schema: pa.Schema | None = None) -> None:
        """Raises UserError before the first task where there is no such memory, or a column is missing."""
        self.collection.meta()
        missing = [name for name in FIELDS if schema is not None and name not in schema.names]
        if missing:
            raise UserError(f"entries need the columns {', '.join(FIELDS)}; missing: {', '.join(missing)}")

    def write(self, blocks: Iterable[Block], ctx: object) -> int:
        """Returns the number of entries written by this task."""
        return sum(self._upsert(BlockAccessor.for_block(block)) for block in blocks)

    def _upsert(self, block: BlockAccessor) -> int:
        if block.num_rows() == 0:
            return 0
        table = block.to_arrow()
        return self.collection.upsert(
            table["entry_id"].to_pylist(),
            table["class_id"].to_numpy(),
            table["class_name"].to_pylist(),
            np.stack(list(block.to_numpy("vector"))),  # (N, D), from lists as well as from tensors
        )

    def on_write_complete(self, write_result: WriteResult[int]) -> None:
        self.written = sum(write_result.write_returns)


class ShardSink(Datasink[int]):
    """Writes each block, a whole shard, as one file of predictions and, where rows failed, one of errors.

    expected: the number of rows each shard must have. A shard that came apart on its way is refused: a run folder with too
    few rows would look complete. A shard without rows never comes: Ray Data forgets the columns, and so the number, of an empty
    block, so `mark_empty` writes those beforehand. The columns `seconds_*` and `mllm_*` are summed into the shard's mark.
    """

    def __init__(self, folder: Path, expected: Mapping[int, int]) -> None:
        self.folder, self.expected = folder, dict(expected)

    def write(self, blocks: Iterable[Block], ctx: object) -> int:
        return sum(self._write(BlockAccessor.for_block(block).to_arrow()) for block in blocks)

    def _write(self, table: pa.Table) -> int:
        if table.num_rows == 0:
            return 0
        numbers = pc.unique(table["shard"]).to_pylist()
        if len(numbers) != 1 or table.num_rows != self.expected[numbers[0]]:
            raise RuntimeError(f"shards {numbers} arrived with {table.num_rows} rows together; a shard must stay whole")
        failed = pc.is_valid(table["error"])
        good, bad = table.filter(pc.invert(failed)), table.filter(failed)
        RunFolder(self.folder).write_shard(
            numbers[0], fitted(good, PREDICTIONS), fitted(bad, ERRORS), {**_seconds(table), **_mllm(good)}
        )
        return table.num_rows


def _seconds(table: pa.Table) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in table.column_names:
        if name.startswith("seconds_"):
            stage = name.removeprefix("seconds_")
            found |= {f"{stage}.rows": table.num_rows, f"{stage}.seconds": pc.sum(table[name]).as_py()}
    return found


def _mllm(table: pa.Table) -> dict[str, float]:
    names = [name for name in table.column_names if name.startswith("mllm_")]
    return {f"mllm.{name.removeprefix('mllm_')}": pc.sum(table[name], min_count=0).as_py() for name in names}
