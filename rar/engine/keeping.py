"""Entries that a build writes, kept in one process of their own until the head is fitted on them, there.

Read back from the store their vectors would cost Milvus Lite half of what writing them does, a Python object a number. What the
store says is in the memory, and under which class, still decides (`as_stored`): the head is fitted on what is kept while the
store seals it, and once more where the two differ. A vector that is not here comes from the store, too: one of a build that was
killed before, or of a process that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
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
    """Entries that were written."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = self.free = most_bytes
        self.parts: list[Entries] = []

    def add(self, part: Entries) -> None:
        """Keep entries, of an id that comes twice the last one; or forget all, where their vectors are too many."""
        self.free -= part.vectors.nbytes
        if self.free >= 0:
            self.parts.append(replace(part, vectors=np.array(part.vectors)))  # a copy: else Ray's store would hold them, too
        else:
            self.parts.clear()

    def entries(self) -> Entries | None:
        """All that is kept, in the order of entry_ids, or None. It is kept no longer."""
        parts, self.parts, self.free = self.parts, [], self.most_bytes
        if not parts:
            return None
        last = {entry_id: at for at, entry_id in enumerate(chain.from_iterable(part.entry_ids for part in parts))}
        ids = sorted(last)
        at = np.array([last[entry_id] for entry_id in ids])
        names = list(chain.from_iterable(part.class_names for part in parts))
        class_ids = np.concatenate([part.class_ids for part in parts])
        place, start = np.full(len(names), -1), 0
        place[at] = np.arange(len(at))
        vectors = np.empty((len(ids), parts[0].vectors.shape[1]), np.float32)
        while parts:  # none is held twice for long
            some = parts.pop(0).vectors
            rows = place[start : start + len(some)]
            vectors[rows[rows >= 0]] = some[rows >= 0]
            start += len(some)
        return Entries(ids, class_ids[at], [names[row] for row in at.tolist()], vectors)

    def run(self, work: Callable[..., T], arguments: Sequence[Any]) -> T:
        return work(*arguments, self)


def as_stored(kept: Entries, one: Collection, bare: Entries) -> Entries:
    """`bare`, the entries of a collection without their vectors, with them: those that were kept, and others from the store."""
    if kept.entry_ids == bare.entry_ids and (kept.class_ids == bare.class_ids).all():
        return kept
    row_of = {entry_id: row for row, entry_id in enumerate(kept.entry_ids)}
    found = np.array([row_of.get(entry_id, -1) for entry_id in bare.entry_ids], np.int64)
    if 2 * np.count_nonzero(found >= 0) < len(bare):
        return one.fetch()
    vectors = kept.vectors[found]
    missing = np.flatnonzero(found < 0)
    others = one.vectors_of([bare.entry_ids[row] for row in missing])
    for row in missing.tolist():
        vectors[row] = others[bare.entry_ids[row]]
    return replace(bare, vectors=vectors)


class Keeper:
    """`Kept` in a process of its own, for as long as this is held. Picklable: write tasks add to it."""

    def __init__(self) -> None:
        self.actor: Any = ray.remote(num_cpus=0)(Kept).remote()

    def add(self, part: Entries) -> None:
        try:
            ray.get(self.actor.add.remote(part))
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
