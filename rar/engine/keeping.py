"""Vectors that a build writes, kept in one process of their own until the head is fitted on them, there.

Read back from the store they would cost Milvus Lite half of what writing them does, a Python object a number. What the store
says is in the memory, and under which class, still comes from the store; a vector that is not here does, too: one of a build
that was killed before, or of a process that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayActorError

from rar.engine import pipeline
from rar.memory.collection import Collection
from rar.memory.entries import Entries

T = TypeVar("T")

MOST_BYTES = 4 << 30  # of vectors; a build of more keeps none, and reads them back


class Kept:
    """Vectors by entry_id."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = self.free = most_bytes
        self.parts: list[tuple[Sequence[str], np.ndarray]] = []

    def add(self, entry_ids: Sequence[str], vectors: np.ndarray) -> None:
        """Keep vectors (N, D) float32, of an id that comes twice the last one; or forget all, where they are too many."""
        self.free -= vectors.nbytes
        if self.free >= 0:
            self.parts.append((entry_ids, np.array(vectors, np.float32)))  # a copy: else Ray's store would hold them, too
        else:
            self.parts.clear()

    def entries(self, one: Collection, bare: Entries) -> Entries:
        """`bare`, entries of a collection without their vectors, with them. They are kept no longer."""
        parts, self.parts, self.free = self.parts, [], self.most_bytes
        if 2 * sum(len(ids) for ids, _ in parts) < len(bare):
            return one.fetch()
        row_of = {entry_id: row for row, entry_id in enumerate(bare.entry_ids)}
        vectors, missing = np.empty((len(bare), parts[0][1].shape[1]), np.float32), np.ones(len(bare), bool)
        while parts:  # none is held twice for long
            ids, some = parts.pop(0)
            there = [(row_of[entry_id], place) for place, entry_id in enumerate(ids) if entry_id in row_of]
            rows, places = np.array(there, np.int64).reshape(-1, 2).T
            vectors[rows], missing[rows] = some[places], False
        for entry_id, vector in one.vectors_of([bare.entry_ids[row] for row in np.flatnonzero(missing)]).items():
            vectors[row_of[entry_id]] = vector
        return Entries(bare.entry_ids, bare.class_ids, bare.class_names, vectors)

    def run(self, work: Callable[..., T], arguments: Sequence[Any]) -> T:
        return work(*arguments, self)


class Keeper:
    """`Kept` in a process of its own, for as long as this is held. Picklable: write tasks add to it."""

    def __init__(self) -> None:
        self.actor: Any = ray.remote(num_cpus=0)(Kept).remote()

    def add(self, entry_ids: Sequence[str], vectors: np.ndarray) -> None:
        try:
            ray.get(self.actor.add.remote(entry_ids, vectors))
        except RayActorError:  # they are in the store
            return

    def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """work(*arguments, kept), where the vectors are; or as a task, with None, where that process is gone.

        Raises the work's own UserError and Unavailable.
        """
        try:
            return pipeline.result_of(self.actor.run.remote(work, arguments))
        except RayActorError:
            return pipeline.in_a_worker(work, *arguments, None)
