"""How deep a graph must be searched: the least `ef` with a stated recall, measured against exact search, kept with the memory.

The queries are entries of the memory itself, each without itself among its neighbors: what people ask lies a little further
from the entries than these lie from one another, so leave a margin. It costs two passes over the memory (one reads ids, one
vectors, a page at a time) and one search a step. A build that changes the memory starts again from `memory.index.ef`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from rar.memory.collection import Collection
from rar.schema import UserError

LADDER = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
QUERIES = 256


@dataclass(frozen=True)
class Step:
    """What searching with an `ef` gave: recall@k, queries a second."""

    ef: int
    recall: float
    per_second: float


def tune(images: Collection, k: int, recall: float) -> list[Step]:
    """Search with growing ef until the k nearest are found with this recall; the last step's ef is kept with the memory.

    Raises UserError, and keeps what was, where the index has no ef or no ef reaches the recall.
    """
    kind = images.meta()["index"]
    if kind == "FLAT":
        raise UserError(f"memory {images.name!r} is searched exactly (index FLAT); there is nothing to tune")
    queries, own = drawn(images)
    truth = nearest(images, queries, own, k)
    steps: list[Step] = []
    for ef in (ef for ef in LADDER if ef > k):
        one = images.at_ef(ef)
        one.search(queries[:1], k + 1)  # connects
        started = time.perf_counter()
        found = one.search(queries, k + 1).entry_ids
        seconds = time.perf_counter() - started
        hits = [len({*ids} & known) for ids, known in zip(found, truth, strict=True)]
        steps.append(Step(ef, sum(hits) / max(sum(map(len, truth)), 1), len(queries) / seconds))
        if steps[-1].recall >= recall:
            images.keep_ef(ef)
            return steps
    best = max(steps, key=lambda step: step.recall)
    more = "raise memory.index.shortlist" if kind == "REDUCED" else "raise memory.index.m or ef_construction"
    raise UserError(f"the best recall of {kind} is {best.recall:.4f} (ef {best.ef}), not {recall:g}; {more}, or use FLAT")


def drawn(images: Collection) -> tuple[np.ndarray, list[str]]:
    """(Q, D) entries that are taken as queries, evenly spread over the ids, and these."""
    count = images.count()
    wanted = set(np.unique(np.linspace(0, count - 1, QUERIES).astype(int)).tolist())
    ids = [one for place, one in enumerate(images.entry_ids()) if place in wanted]
    found = images.vectors_of(ids)
    return np.stack([found[one] for one in ids]), ids


def nearest(images: Collection, queries: np.ndarray, own: list[str], k: int) -> list[set[str]]:
    """The ids of the exact k nearest other entries of each query."""
    best = np.empty((len(queries), 0), np.float32)
    named = np.empty((len(queries), 0), object)
    for ids, vectors in images.pages_of_vectors():
        scores, names = queries @ vectors.T, np.array(ids, object)
        for row, one in enumerate(own):
            scores[row, names == one] = -np.inf
        near = np.argpartition(-scores, min(k, len(ids)) - 1, axis=1)[:, :k]
        best = np.hstack([best, np.take_along_axis(scores, near, 1)])
        named = np.hstack([named, names[near]])
        kept = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, named = np.take_along_axis(best, kept, 1), np.take_along_axis(named, kept, 1)
    return [
        {name for name, score in zip(names, scores, strict=True) if np.isfinite(score)}
        for scores, names in zip(best, named, strict=True)
    ]
