"""Retrieval: from a memory to candidates, one contract for every mode.

`fit_head` fits a mode on the entries of a memory; `held_out_scores` says how its own images would have been scored by a fit
without them, for calibration. text, centroid, lda and fused are linear (see heads): their head is scored whole (see exact), or
searched itself where it is too large. knn and tip (see votes) search the image entries; what they add to the votes is a head
like the others, so that it is stored like them: for tip the text scores, for knn no weights and the balance of the classes as
bias.

A row's scores are logits: their softmax over all classes is a calibrated probability, on images like those of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from rar.memory.entries import Entries, Hits
from rar.retriever import heads, votes
from rar.retriever.exact import Retrieved, best_of
from rar.retriever.heads import MODES, Head, Mode, StoredHead, augment
from rar.retriever.votes import Rule

__all__ = ["MODES", "Head", "Mode", "StoredHead", "allows", "augment", "fit_head", "held_out_scores"]

N_NEIGHBORS = 20  # as config.Retriever
MAX_DEPTH = 16_384  # Milvus' limit of neighbors per query
CELLS = 1 << 23  # images x classes, or images x entries, at once
MIN_VOTED, DEEP, DEEP_ROWS = 256, 1024, 8  # of a large memory: images that votes are fitted on, their neighbors, images at once


def allows(mode: Mode, images: bool, texts: bool) -> bool:
    """Whether a memory that has image entries, and text entries, or not, has what a mode needs."""
    return {"text": texts, "tip": images and texts, "fused": images or texts}.get(mode, images)


def fit_head(mode: Mode, images: Entries | None, texts: Entries | None, seed: int = 0, n_neighbors: int = N_NEIGHBORS) -> Head:
    """Fit a retriever on a memory. `images` and `texts` hold unit vectors of the same dimension D.

    text: class prototypes (entries of one class averaged, re-normalised), bias 0. centroid: class means of the images,
    re-normalised. lda: Gaussian classes of one shrunk covariance, and the text prototypes where there are some. fused: the best
    that the memory allows (see heads). tip: text prototypes and votes of the image entries. knn: votes alone.
    tip and knn keep their rule in meta["votes"], fitted for this n_neighbors. A class that lacks what a part needs scores as an
    average other class there. `seed` draws the held-out images where there are too many.
    Raises UserError where the memory lacks what the mode needs.
    """
    problem = heads.Problem.of(mode, images, texts)
    if mode == "knn":
        rule, n_fitted = _fit_knn(problem, seed, n_neighbors)
        sizes = np.log(np.maximum(problem.whole.counts, 1))
        weights = np.zeros((len(sizes), problem.vectors.shape[1]), np.float32)
        meta = {"mode": mode, "votes": asdict(rule), "held_out": n_fitted, "groups": problem.n_groups}
        return Head(problem.class_ids, problem.class_names, weights, (-rule.scale * sizes).astype(np.float32), meta)
    head = heads.head_of(heads.fit(problem, seed))
    if mode == "tip":
        factor, rule = _fit_tip(problem, head, seed, n_neighbors)
        return replace(head, weights=head.weights * factor, bias=head.bias * factor, meta={**head.meta, "votes": asdict(rule)})
    return head


def held_out_scores(
    mode: Mode,
    images: Entries,
    texts: Entries | None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    n_neighbors: int = N_NEIGHBORS,
    sharpness: float | None = None,
) -> np.ndarray:
    """(N, C) float32 scores of image entries by fits without them, columns as in `fit_head(...).class_ids`.

    The i-th group of near duplicates (see bursts) of each class is left out at a time, and everything but a few numbers
    (scales, shrinkage, the rule of the votes) is fitted on the others. The only image of a class is scored with that class as
    lacking images; knn gives it -inf. `rows`: score only these entries, in this order. n_neighbors, sharpness: as in
    config.Retriever.
    """
    problem = heads.Problem.of(mode, images, texts)
    chosen = np.arange(len(problem.labels)) if rows is None else np.asarray(rows, np.int64)
    if mode not in ("knn", "tip"):
        return heads.held_out(heads.fit(problem, seed), chosen)
    head = fit_head(mode, images, texts, seed, n_neighbors)
    rule = Rule(**head.meta["votes"]).with_sharpness(sharpness)
    found = []
    step = max(1, CELLS // max(len(problem.labels), len(problem.class_ids)))
    for start in range(0, len(chosen), step):
        block = chosen[start : start + step]
        neighbors = _held_out_neighbors(problem, block)
        found.append(_voted(rule, head, problem.vectors[block], *neighbors, problem.whole.counts, n_neighbors))
    return np.concatenate(found or [np.zeros((0, len(problem.class_ids)))]).astype(np.float32)


def _fit_knn(problem: heads.Problem, seed: int, n_neighbors: int) -> tuple[Rule, int]:
    """The rule, and how many images it is fitted on."""
    rows, neighbors = _rows_to_fit_on(problem, seed)
    return votes.fit_knn(*neighbors, problem.whole.counts, problem.labels[rows], n_neighbors), len(rows)


def _fit_tip(problem: heads.Problem, head: Head, seed: int, n_neighbors: int) -> tuple[float, Rule]:
    """The default is the paper's: a vote of 1 beside text scores of 100 * cosine, or as much beside scores of another scale."""
    rows, neighbors = _rows_to_fit_on(problem, seed)
    per_vote = float(np.linalg.norm(head.weights, axis=1).mean()) / heads.CLIP_LOGIT_SCALE
    text = head.scores(problem.vectors[rows]).astype(np.float64)
    return votes.fit_tip(text, *neighbors, problem.labels[rows], n_neighbors, per_vote)


def _rows_to_fit_on(problem: heads.Problem, seed: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Images whose class keeps an image without them, and their held-out neighbors.

    Up to MAX_HELD_OUT_CELLS / MIN_VOTED entries these are all neighbors. Above, they are MIN_VOTED images' DEEP nearest, block
    by block, and images whose class is not among these are left out: a search would not find it either.
    """
    kept = np.stack([each.known for each in problem.kept])[problem.folds, problem.labels]
    n_images, n_classes = len(problem.labels), len(problem.class_ids)
    limit = min(heads.MAX_HELD_OUT, heads.MAX_HELD_OUT_CELLS // max(n_classes, n_images))
    order = np.random.default_rng(seed).permutation(np.flatnonzero(kept))
    if limit >= MIN_VOTED:
        rows = np.sort(order[:limit])
        return rows, _held_out_neighbors(problem, rows)
    rows = np.sort(order[:MIN_VOTED])
    found = [_held_out_neighbors(problem, rows[start : start + DEEP_ROWS], DEEP) for start in range(0, len(rows), DEEP_ROWS)]
    cosines, columns = (np.concatenate(part) for part in zip(*found, strict=True))
    there = (columns == problem.labels[rows][:, None]).any(axis=1)
    return rows[there], (cosines[there], columns[there])


def _held_out_neighbors(problem: heads.Problem, rows: np.ndarray, depth: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and columns (n, N) of each row's neighbors outside its fold, in order; of the `depth` nearest alone.

    Votes are still divided by the whole sizes of the classes: those outside the fold would give a left-out image's class away.
    """
    cosines = problem.vectors[rows] @ problem.vectors.T
    hidden = problem.folds[rows][:, None] == problem.folds[None]
    cosines[hidden] = -np.inf
    if depth is not None and depth < cosines.shape[1]:
        near = np.argpartition(cosines, cosines.shape[1] - depth, axis=1)[:, -depth:]
        hidden = np.take_along_axis(hidden, near, 1)
        return votes.nearest(np.take_along_axis(cosines, near, 1), np.where(hidden, -1, problem.labels[near]))
    return votes.nearest(cosines, np.where(hidden, -1, problem.labels[None]))


def retrieve_by_votes(
    head: Head,
    search: Callable[[np.ndarray, int], Hits],
    queries: np.ndarray,
    top_k: int,
    n_neighbors: int,
    sharpness: float | None = None,
) -> Retrieved:
    """Candidates of knn and tip: `search`(queries, k) finds the image entries that vote, `head` (see fit_head) does the rest.

    The search goes deeper than n_neighbors where entries tie there, and (knn) until top_k classes are found or all entries.
    """
    fitted = Rule(**head.meta["votes"])
    rule = fitted.with_sharpness(sharpness)
    sizes = np.rint(np.exp(-head.bias / fitted.scale)) if rule.kind == "knn" else np.zeros_like(head.bias)
    top_k = min(top_k, len(head.class_ids))
    found = Retrieved(np.full((len(queries), top_k), -1), np.full((len(queries), top_k), -np.inf, np.float32))
    pending, depth = np.arange(len(queries)), n_neighbors + 1
    while len(pending):
        depth = min(depth, MAX_DEPTH)
        hits = search(queries[pending], depth)
        columns = heads.columns_of(head.class_ids, hits.class_ids)
        cosines, columns = votes.nearest(hits.scores, columns)
        done = (columns[:, -1] < 0) | (cosines[:, -1] < cosines[:, min(n_neighbors, depth) - 1]) | (depth == MAX_DEPTH)
        if rule.kind == "knn":
            done &= (columns[:, -1] < 0) | (_n_distinct(columns) >= top_k) | (depth == MAX_DEPTH)
        step = max(1, CELLS // len(head.class_ids))
        ready = np.flatnonzero(done)
        for block in (ready[start : start + step] for start in range(0, len(ready), step)):
            scores = _voted(rule, head, queries[pending[block]], cosines[block], columns[block], sizes, n_neighbors)
            best = best_of(scores, top_k)
            found.columns[pending[block]], found.scores[pending[block]] = best.columns, best.scores
        pending, depth = pending[~done], depth * 4
    return found


def _voted(
    rule: Rule,
    head: Head,
    queries: np.ndarray,
    cosines: np.ndarray,
    columns: np.ndarray,
    sizes: np.ndarray,
    n_neighbors: int,
) -> np.ndarray:
    """(N, C) float32 scores of queries by their neighbors in order, and by the head of tip."""
    if rule.kind == "knn":
        return votes.knn(rule, cosines, columns, sizes, n_neighbors).astype(np.float32)
    return (head.scores(queries) + votes.tip(rule, cosines, columns, sizes.shape[-1], n_neighbors)).astype(np.float32)


def _n_distinct(columns: np.ndarray) -> np.ndarray:
    """(N,) how many classes each row of (N, k) columns names; -1 is none."""
    ordered = np.sort(columns, axis=1)
    return ((np.diff(ordered, axis=1, prepend=-1) != 0) & (ordered >= 0)).sum(axis=1)


def retrieve_from_hits(hits: Hits, class_ids: np.ndarray, top_k: int) -> Retrieved:
    """What a search of a stored head found, a class a hit: best first, ties by class id. class_ids: the head's.

    A score is the log of the class's share of the hits, which stand for the whole vocabulary.
    """
    columns = heads.columns_of(class_ids, hits.class_ids)
    total = np.logaddexp.reduce(hits.scores.astype(np.float64), axis=1, keepdims=True)
    order = np.lexsort((columns, -hits.scores), axis=1)[:, :top_k]
    scores = np.take_along_axis(hits.scores - total, order, 1).astype(np.float32)
    return Retrieved(np.take_along_axis(columns, order, 1), scores)
