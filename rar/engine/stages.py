"""A stage: a function or callable class that does one thing to a shard. A table goes in, one with more columns comes out.

`reading` has those that fetch, crop and decode, `models` those that hold a model, `entering` those that lead into a memory, and
`choosing` those that make candidates, a ranking and a class of a vector. None imports ray, so each can be called on a table in
a test. Two columns travel with every row: `stage` and `error`, null while all is well. A stage works on the healthy rows and
passes the others on untouched, so that counts add up: a row that comes in leaves either as a prediction or as an error. Each
stage adds `seconds_<stage>` (its time, shared over its rows), which the writer sums up; of one that a model's process runs,
`waited_<stage>` is how much longer its rows were away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

NOTES = ("seconds_", "waited_", "before_")  # how the names of such columns begin

Stage = Callable[[pa.Table], pa.Table]


def timed(name: str, work: Stage) -> Stage:
    """Run a stage and note how long its rows took."""

    def run(table: pa.Table) -> pa.Table:
        started = time.perf_counter()
        return with_seconds(work(table), name, started)

    return run


def with_seconds(table: pa.Table, name: str, started: float) -> pa.Table:
    """Note how long a stage took since `started`, shared over the rows."""
    each = (time.perf_counter() - started) / max(table.num_rows, 1)
    return table.append_column(f"seconds_{name}", pa.array([each] * table.num_rows, pa.float64()))


def with_waited(table: pa.Table, before: pa.Table, started: float) -> pa.Table:
    """Note how long rows were away since `started`, beyond the seconds that a model's process has noted on them."""
    took = time.perf_counter() - started
    for name in set(table.column_names) - set(before.column_names):
        if name.startswith("seconds_"):
            waited = (took - (pc.sum(table[name]).as_py() or 0.0)) / max(table.num_rows, 1)
            noted = pa.array([waited] * table.num_rows, pa.float64())
            table = table.append_column(name.replace("seconds_", "waited_"), noted)
    return table


def as_before(table: pa.Table) -> pa.Table:
    """Rows that another pipeline made: their stages' seconds are told, and are none of this one's time."""
    kept = table.drop_columns([name for name in table.column_names if name.startswith("waited_")])
    return kept.rename_columns([name.replace("seconds_", "before_") for name in kept.column_names])


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table
