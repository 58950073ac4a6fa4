"""What a memory holds and finds, as arrays; the checks that every entry passes; and `ExactIndex`, the oracle of every search.

Equal scores are ordered by entry_id, also across the cut at k: what a search returns must not depend on the order in which
parallel workers wrote. Scores are compared as they come: on real CLIP memories neighbors of different classes lie closer than
the float32 noise of a score, so no tolerance is right, and a near tie may fall either way on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rar.schema import UserError

IntArray = np.ndarray | Sequence[int]

FIELDS = ["entry_id", "class_id", "class_name", "vector"]
MAX_ID_BYTES, MAX_NAME_BYTES = 256, 4096


@dataclass(frozen=True, eq=False)
class Hits:
    """The neighbors of N queries, best first; a short row is padded with -inf / -1 / "".

    scores: (N, k) float32 inner products. class_ids: (N, k) int64. entry_ids: N lists of k.
    """

    scores: np.ndarray
    class_ids: np.ndarray
    entry_ids: list[list[str]]


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries in the order of entry_ids: class_ids (N,) int64, vectors (N, D) float32."""

    entry_ids: list[str]
    class_ids: np.ndarray
    class_names: list[str]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.entry_ids)


class ExactIndex:
    """The contract of `Collection` in numpy: what every search is measured against."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._kept: dict[str, tuple[int, str, np.ndarray]] = {}

    def upsert(self, entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray) -> int:
        new = distinct(entry_ids, class_ids, class_names, vectors, self.dim)
        self._kept.update(
            zip(new.entry_ids, zip(new.class_ids.tolist(), new.class_names, new.vectors, strict=True), strict=True)
        )
        return len(new)

    def search(self, queries: np.ndarray, k: int) -> Hits:
        if not self._kept:
            raise UserError("the memory is empty; fill it first")
        entries = self.fetch()
        scores = matrix(queries, self.dim) @ entries.vectors.T  # (N, entries)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # stable: entries are in the order of their ids
        return hits(
            [row[order] for row, order in zip(scores, best, strict=True)],
            [entries.class_ids[order] for order in best],
            [[entries.entry_ids[j] for j in order] for order in best],
            k,
        )

    def fetch(self) -> Entries:
        ids = sorted(self._kept)
        kept = [self._kept[entry_id] for entry_id in ids]
        vectors = np.array([vector for _, _, vector in kept], np.float32).reshape(-1, self.dim)
        return Entries(ids, np.array([one[0] for one in kept], np.int64), [one[1] for one in kept], vectors)


def distinct(
    entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray, dim: int
) -> Entries:
    """Checked entries, of equal ids the last one: a Milvus server keeps both when they come in one request.

    Raises UserError for another D than `dim`, vectors that are not finite, and ids and names that Milvus cannot hold.
    """
    for entry_id in entry_ids:
        # pymilvus pages through a collection with a filter that holds the id in quotes, unescaped
        if not entry_id or '"' in entry_id or "\\" in entry_id or len(entry_id.encode()) > MAX_ID_BYTES:
            raise UserError(f"an entry_id has 1 to {MAX_ID_BYTES} bytes, no quotes and no backslash, got {entry_id!r}")
    for name in set(class_names):
        if len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"a class name has at most {MAX_NAME_BYTES} bytes; shorten {name[:60]!r}...")
    vectors, class_ids = matrix(vectors, dim), np.asarray(class_ids, np.int64)
    if not len(entry_ids) == len(class_ids) == len(class_names) == len(vectors):
        lengths = f"{len(entry_ids)}, {len(class_ids)}, {len(class_names)} and {len(vectors)}"
        raise ValueError(f"entry_ids, class_ids, class_names and vectors must be equally many, got {lengths}")
    last = list({entry_id: row for row, entry_id in enumerate(entry_ids)}.values())
    if len(last) == len(entry_ids):
        return Entries(list(entry_ids), class_ids, list(class_names), vectors)
    return Entries([entry_ids[i] for i in last], class_ids[last], [class_names[i] for i in last], vectors[last])


def matrix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """(N, dim) float32, finite. Raises UserError."""
    with np.errstate(over="ignore"):  # becomes infinite, and is refused below
        vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(f"the memory holds vectors of {dim} dimensions, got {vectors.shape}; use the encoder it was built with")
    if not np.isfinite(vectors).all():
        raise UserError("vectors are not finite; check the encoder (its precision, its weights)")
    return vectors


def hits(scores: Sequence[Any], class_ids: Sequence[Any], entry_ids: Sequence[list[str]], k: int) -> Hits:
    """Rows of any lengths, cut at k and padded to it."""
    if all(len(row) == k for row in entry_ids):
        shape = (len(entry_ids), k)
        found = np.array(scores, np.float32).reshape(shape), np.array(class_ids, np.int64).reshape(shape)
        return Hits(*found, list(entry_ids))
    padded = Hits(np.full((len(entry_ids), k), -np.inf, np.float32), np.full((len(entry_ids), k), -1, np.int64), [])
    for i, row in enumerate(entry_ids):
        padded.scores[i, : len(row)] = scores[i][:k]
        padded.class_ids[i, : len(row)] = class_ids[i][:k]
        padded.entry_ids.append(row[:k] + [""] * (k - len(row)))
    return padded


def in_order(found: Hits) -> Hits:
    """Each row sorted by (-score, entry_id). Only rows that are not so already cost time."""
    unsure = np.flatnonzero(((found.scores[:, :-1] <= found.scores[:, 1:]) & np.isfinite(found.scores[:, 1:])).any(axis=1))
    for row in unsure.tolist():
        scores, ids = found.scores[row], found.entry_ids[row]
        order = [j for _, _, j in sorted(zip((-scores).tolist(), ids, range(len(ids)), strict=True))]
        found.scores[row], found.class_ids[row] = scores[order], found.class_ids[row, order]
        found.entry_ids[row] = [ids[j] for j in order]
    return found
