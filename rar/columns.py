"""Records <-> Arrow columns: how vectors, candidates, rankings and faults travel, and the way from a prediction to its row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.schema import CANDIDATES, Candidate, Ranking, RankStatus


def vectors_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """(N, D) float32 as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])


def with_vectors(table: pa.Table, vectors: np.ndarray) -> pa.Table:
    """pixels -> vector: (N, D) float32 takes their place."""
    return table.drop_columns(["pixels"]).append_column("vector", vectors_column(vectors))


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column `vector` as (N, D) float32."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def with_candidates(table: pa.Table, found: Sequence[Sequence[Candidate]]) -> pa.Table:
    rows = [[{"class_id": c.class_id, "class_name": c.class_name, "score": c.score} for c in row] for row in found]
    return table.append_column("candidates", pa.array(rows, CANDIDATES))


def with_retrieved(
    table: pa.Table, rows: np.ndarray, class_ids: np.ndarray, names: pa.StringArray, columns: np.ndarray, scores: np.ndarray
) -> pa.Table:
    """The same from arrays: of the table's `rows` (n,) alone, the others have none.

    class_ids: (C,) int64 and their names. columns: (n, k) positions in them, -1 none, these last. scores: (n, k) float32.
    """
    there = columns >= 0
    counts = np.zeros(table.num_rows, np.int64)
    counts[rows] = there.sum(axis=1)
    chosen = columns[there]
    fields = [pa.array(class_ids[chosen]), names.take(pa.array(chosen)), pa.array(scores[there].astype(np.float32))]
    values = pa.StructArray.from_arrays(fields, fields=list(CANDIDATES.value_type))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return table.append_column("candidates", pa.ListArray.from_arrays(offsets, values, type=CANDIDATES))


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema, with nulls for those that the table lacks."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def codes(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct texts (C,), sorted, and which of them each of the N values is (N,) int64. No value is null."""
    encoded = values.combine_chunks().dictionary_encode()
    names, order = np.unique(np.array(encoded.dictionary.to_pylist(), dtype=str), return_inverse=True)
    return names, order[encoded.indices.to_numpy()].astype(np.int64)


def repeats(values: pa.ChunkedArray) -> pa.Array:
    """Of equal texts all but one. Sorted, where a table of the distinct ones takes ten times the memory. No value is null."""
    ordered = values.take(pc.sort_indices(values)).combine_chunks()
    return ordered[1:].filter(pc.equal(ordered[1:], ordered[:-1]))


def digest(index: pa.Table, *columns: str) -> str:
    """16 hex digits over those of the columns that an index has, read some rows at a time."""
    found = hashlib.sha256()
    for batch in index.select([name for name in columns if name in index.column_names]).combine_chunks().to_batches(4096):
        found.update(json.dumps(batch.to_pydict()).encode())
    return found.hexdigest()[:16]


def positions(rows: pa.ChunkedArray, index: pa.Table) -> np.ndarray:
    """(N,) int64: where in an index each of N `row`s stands. Raises ValueError for one that the index lacks.

    The only way back from a prediction to its label: names and boxes may stand twice, a row of the index does not.
    """
    own, wanted = index["row"].to_numpy(), rows.to_numpy()
    order = np.argsort(own, kind="stable")  # no time where they are in order, as in a frozen index
    found = np.append(order, len(own))[np.searchsorted(own, wanted, sorter=order)]
    strange = np.append(own, -1)[found] != wanted
    if strange.any():
        raise ValueError(f"{strange.sum()} predictions are of rows that the index lacks")
    return np.asarray(found, dtype=np.int64)


def box_positions(predictions: pa.Table, index: pa.Table) -> np.ndarray:
    """(N,) int64: which of all boxes of an index, picture after picture, each prediction is of; see `positions`."""
    counts = pc.list_value_length(index["boxes_xyxy"]).to_numpy()
    pictures, places = positions(predictions["row"], index), predictions["place"].to_numpy()
    if (places >= counts[pictures]).any():
        raise ValueError("predictions are of boxes that the index lacks")
    return (np.cumsum(counts) - counts)[pictures] + places


def candidates_of(table: pa.Table) -> list[list[Candidate]]:
    return [[Candidate(**candidate) for candidate in row] for row in table["candidates"].to_pylist()]


def rankings_of(table: pa.Table) -> list[Ranking]:
    """What the ranker said of each row, rebuilt from its columns; calls and tokens, which nothing decides by, are left out."""
    columns = (table[name].to_pylist() for name in ("ranking", "scores", "rank_status", "response"))
    return [
        Ranking(tuple(order), RankStatus(status), tuple(scores), response or "")
        for order, scores, status, response in zip(*columns, strict=True)
    ]


def with_errors(table: pa.Table, stage: str, faults: Sequence[str | None]) -> pa.Table:
    """Set `stage` and `error` where a row has a new fault; create the columns where they are missing."""
    old = table["error"].to_pylist() if "error" in table.column_names else [None] * table.num_rows
    stages = table["stage"].to_pylist() if "stage" in table.column_names else [None] * table.num_rows
    errors = [known or fault for known, fault in zip(old, faults, strict=True)]
    stages = [known or (stage if fault else None) for known, fault in zip(stages, faults, strict=True)]
    table = table.drop_columns([name for name in ("stage", "error") if name in table.column_names])
    return table.append_column("stage", pa.array(stages, pa.string())).append_column("error", pa.array(errors, pa.string()))
