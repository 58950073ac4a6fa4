"""The best classes of every row, as arrays: by exact scores of a linear head, or of given scores. No object a candidate.

Hard choices, and what they cost:
- A head of up to EXACT_CLASSES classes is not searched but multiplied with: a block of queries by all classes is one float32
  product of BLAS, so the share of the whole vocabulary is exact too. It costs a copy of the head in every process, 205 MB at
  100,000 classes of 512 dimensions, and one pass over it a block of queries.
- A product's last bits depend on where in the block a class lies. Where classes among the best lie closer than the error of
  a product they are scored again in float64, pair by pair: equal weights score alike wherever they lie, and ties go by class
  id on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rar.retriever.heads import Head
from rar.schema import Candidate

EXACT_CLASSES = 100_000  # beyond, a head is searched in Milvus
CELLS = 1 << 22  # scores, or numbers of gathered weights, at once
SPARE = 4  # classes looked at beyond the asked ones, before it is known how many tie


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Candidates of N rows, best first. columns: (N, k) int64 positions among a head's classes, -1 where a row has fewer.

    scores: (N, k) float32, -inf there.
    """

    columns: np.ndarray
    scores: np.ndarray

    def candidates(self, class_ids: np.ndarray, names: Sequence[str]) -> list[list[Candidate]]:
        """The same as records, for the few rows that are looked at one by one. class_ids, names: of the head's classes."""
        return [
            [
                Candidate(int(class_ids[column]), names[column], score)
                for column, score in zip(columns, scores, strict=True)
                if column >= 0
            ]
            for columns, scores in zip(self.columns.tolist(), self.scores.tolist(), strict=True)
        ]

    def shares(self) -> Retrieved:
        """Logits as scores -> logs of their softmax over the row's own candidates as scores; the order stays."""
        with np.errstate(invalid="ignore"):  # a row without any
            total = np.logaddexp.reduce(self.scores.astype(np.float64), axis=1, keepdims=True)
            return Retrieved(self.columns, np.where(self.columns >= 0, self.scores - total, -np.inf).astype(np.float32))


def retrieve(head: Head, queries: np.ndarray, top_k: int) -> Retrieved:
    """The `top_k` best classes of (N, D) float32 queries; a score is the log of the class's share of the whole vocabulary."""
    n_classes, dim = head.weights.shape
    top_k = min(top_k, n_classes)
    columns, scores = np.empty((len(queries), top_k), np.int64), np.empty((len(queries), top_k), np.float32)
    step = max(1, min(CELLS // n_classes, CELLS // ((top_k + SPARE) * dim)))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        columns[block], scores[block] = _best(head, np.asarray(queries[block], np.float32), top_k)
    return Retrieved(columns, scores)


def _best(head: Head, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and log shares of a block."""
    products = head.scores(queries)
    columns, logits = np.empty((len(queries), top_k), np.int64), np.empty((len(queries), top_k))
    pending, count = np.arange(len(queries)), min(top_k + SPARE, products.shape[1])
    most = products.max(axis=1, keepdims=True)
    size = queries.shape[1] ** 0.5 * head.length * np.linalg.norm(queries, axis=1) + np.abs(most[:, 0])
    error = 8 * np.finfo(np.float32).eps * size  # of a product, at most
    while len(pending):
        chosen, sure = _shortlist(products[pending], top_k, count, error[pending])
        rows, chosen = pending[sure], chosen[sure]
        scores = np.take_along_axis(products[rows], chosen, 1).astype(np.float64)
        gaps = np.diff(np.sort(-scores, axis=1)[:, : top_k + 1], axis=1)
        close = np.flatnonzero((gaps < 2 * error[rows, None]).any(axis=1))
        step = max(1, CELLS // (count * queries.shape[1]))
        for part in (close[start : start + step] for start in range(0, len(close), step)):
            near, weights = queries[rows[part]].astype(np.float64), head.weights[chosen[part]].astype(np.float64)
            scores[part] = np.einsum("nd,nkd->nk", near, weights) + head.bias[chosen[part]]
        order = np.lexsort((chosen, -scores), axis=1)[:, :top_k]
        columns[rows], logits[rows] = np.take_along_axis(chosen, order, 1), np.take_along_axis(scores, order, 1)
        pending, count = pending[~sure], min(4 * count, products.shape[1])
    np.exp(np.subtract(products, most, out=products), out=products)
    return columns, logits - np.log(products.sum(axis=1, dtype=np.float64, keepdims=True)) - most


def best_of(scores: np.ndarray, top_k: int) -> Retrieved:
    """The `top_k` best columns of (N, C) float32 scores, ties by column; -inf is no candidate."""
    scores = np.asarray(scores, np.float32)
    n_rows, n_classes = scores.shape
    top_k = min(top_k, n_classes)
    columns, found = np.empty((n_rows, top_k), np.int64), np.empty((n_rows, top_k), np.float32)
    pending, count = np.arange(n_rows), min(top_k + SPARE, n_classes)
    while len(pending):
        chosen, sure = _shortlist(scores[pending], top_k, count, np.zeros(len(pending)))
        rows, chosen = pending[sure], chosen[sure]
        values = np.take_along_axis(scores[rows], chosen, 1)
        order = np.lexsort((chosen, -values), axis=1)[:, :top_k]
        columns[rows], found[rows] = np.take_along_axis(chosen, order, 1), np.take_along_axis(values, order, 1)
        pending, count = pending[~sure], min(4 * count, n_classes)
    return Retrieved(np.where(found > -np.inf, columns, -1), found)


def _shortlist(scores: np.ndarray, top_k: int, count: int, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best columns of each row in any order, and (N,) bool: whether none left out comes within twice `error` (N,)
    of the top_k-th."""
    n_classes = scores.shape[1]
    if count == n_classes:
        return np.tile(np.arange(n_classes), (len(scores), 1)), np.ones(len(scores), bool)
    chosen = np.argpartition(scores, n_classes - count, axis=1)[:, n_classes - count :]
    values = np.sort(np.take_along_axis(scores, chosen, 1), axis=1)
    last, kth = values[:, 0], values[:, -top_k]
    return chosen, (last + 2 * error < kth) | (kth == -np.inf)
