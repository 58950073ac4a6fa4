"""Ray Data: shards of the corpus flow through the stages, on one laptop or many machines. The home of ray.data.

A block is a shard. Blocks are kept whole (no size limit splits them, no batch regroups them), because a shard is what is
written, resumed and batched together (see runfolder). Cost: a worker holds a shard of encoded images (or of crops) in memory,
about `run.shard_size` x the mean file size; choose smaller shards for very large pictures. Images with many boxes are cut into
shards by their boxes, so that memory does not grow with them.

A shard is one task from reading to writing. What is slow to load lives in processes that the task calls: the session's actors,
rankers on Ray Serve. While one task waits for a model, others decode, so decoding overlaps the forward pass.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset
from ray.data.datasource import Datasink

from rar.engine import stages
from rar.engine.actors import Pool
from rar.engine.isolate import reason
from rar.schema import Unavailable, UserError

T = TypeVar("T")

SAID_EVERY_S = 5.0
ASKED_SHARE = 0.05  # of the time, at most, goes into asking: Milvus Lite copies what it has not flushed to count it
STILL_S = 10.0  # without a new row, before it is asked why
TASK_CPUS = 0.5  # tasks wait for models about as much as they work


def cut(weights: np.ndarray, size: int) -> np.ndarray:
    """Bounds (shards + 1,) of consecutive shards of at most `size` rows each; weights (N,): how many rows each item becomes.

    An item of no rows counts as one, and one of more than `size` rows is a shard of its own.
    """
    bounds, filled = [0], 0
    for item, rows in enumerate(np.maximum(weights, 1).tolist()):
        if filled and filled + rows > size:
            bounds.append(item)
            filled = 0
        filled += rows
    return np.array(bounds + [len(weights)] * bool(len(weights)))


def evenly(index: pa.Table, size: int) -> np.ndarray:
    """Bounds of shards of `size` items that become one row each."""
    return cut(np.ones(index.num_rows, np.int64), size)


def shards_of(index: pa.Table, bounds: np.ndarray, numbers: Sequence[int] | None = None) -> Dataset:
    """An index cut at `bounds` into blocks, each with its number in the column `shard`; only some of them by `numbers`."""
    chosen = range(len(bounds) - 1) if numbers is None else numbers
    return ray.data.from_arrow([_shard(index, bounds, number) for number in chosen])


def _shard(index: pa.Table, bounds: np.ndarray, number: int) -> pa.Table:
    table = index.slice(bounds[number], bounds[number + 1] - bounds[number])
    return table.append_column("shard", pa.array([number] * table.num_rows, pa.int32())).combine_chunks()


def through(dataset: Dataset, name: str, work: stages.Stage, waiters: int | None = None) -> Dataset:
    """Add a stage that runs as tasks, one whole shard a call.

    waiters: of a stage that only waits for replicas, which may themselves wait for a CPU: so many tasks, that hold none.
    """
    more: dict[str, Any] = {"num_cpus": TASK_CPUS} if waiters is None else {"num_cpus": 0, "concurrency": waiters}
    return dataset.map_batches(stages.timed(name, work), batch_size=None, batch_format="pyarrow", **more)


def plainly(dataset: Dataset, work: stages.Stage) -> Dataset:
    """The same for a step that only renames and selects: it is not timed."""
    return dataset.map_batches(work, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def by_model(dataset: Dataset, pool: Pool) -> Dataset:
    """Send whole shards through the stage that a session's actors hold."""
    return plainly(dataset, pool.run)


def collect(dataset: Dataset) -> pa.Table:
    """Run a pipeline and bring its rows here: for what is small, such as a memory's entries.

    Blocks without rows have lost their columns in Ray Data, so a pipeline without any row gives a table without columns.
    """
    blocks = ray.get(dataset.to_arrow_refs())
    return pa.concat_tables([block for block in blocks if block.num_rows] or [pa.table({})])


def in_a_worker(work: Callable[..., T], *arguments: Any) -> T:
    """What the driver has neither the memory nor the files for, as one task; here, where no Ray runs.

    Raises the work's own UserError and Unavailable.
    """
    if not ray.is_initialized():
        return work(*arguments)
    return result_of(ray.remote(num_cpus=TASK_CPUS, max_retries=1)(work).remote(*arguments))


def result_of(reference: ray.ObjectRef) -> Any:
    """What a task gives. Raises its own UserError and Unavailable."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, Unavailable)):  # a line, not a traceback
            raise error.cause from None
        raise


def write(table: pa.Table, sink: Datasink) -> None:
    """Write rows through a sink's parallel tasks."""
    ray.data.from_arrow(table).write_datasink(sink)


class Counted(Protocol):
    """What rows are written to: a run folder, a memory."""

    def progress(self) -> Sequence[int]: ...


@contextmanager
def progress(target: Counted, total: int, title: str, why: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Print a line every few seconds from what is written: rows done, rows/s, time left. Works for any number of workers.

    why: what may keep rows from coming, asked where none has come for STILL_S.
    """
    done = threading.Event()
    start, began = sum(target.progress()), time.monotonic()

    def report() -> None:
        last, since, asked = start, began, 0.0
        while not done.wait(max(SAID_EVERY_S, asked / ASKED_SHARE)):
            try:
                asking = time.monotonic()
                now = sum(target.progress())
                asked = time.monotonic() - asking
                last, since = (now, time.monotonic()) if now > last else (last, since)
                still = time.monotonic() - since
                told = why() if still > STILL_S else ""
            except Exception as error:  # what is away for good ends the run, which says so
                print(f"  {title}: how far it is cannot be told now ({reason(error)})", file=sys.stderr, flush=True)
                continue
            rate = (now - start) / (time.monotonic() - began)
            left = f"{(total - now) / rate:.0f} s left" if rate else "starting"
            told = f"; nothing for {still:.0f} s: {told}" if told else ""
            print(f"  {title}: {now:,} of {total:,} rows, {rate:,.0f} rows/s, {left}{told}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
