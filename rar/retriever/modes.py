"""Retrieval: from a memory to candidates, one contract for every mode.

`fit_head` fits a mode on the entries of a memory; `held_out_scores` says how its own images would have been scored by a fit
without them, for calibration; a search proposes candidates. text, centroid, lda and fused are linear (see heads): their head
is searched itself. knn and tip (see votes) search the image entries; what they add to the votes is a head like the others, so
that it is stored like them: for tip the text scores, for knn no weights and the balance of the classes as bias.

A row's scores are logits: their softmax over all classes is a calibrated probability, on images like those of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from rar.memory.entries import Entries, Hits
from rar.retriever import heads, votes
from rar.retriever.heads import MODES, Head, Mode, augment
from rar.retriever.votes import Rule
from rar.schema import Candidate

__all__ = ["MODES", "Head", "Mode", "allows", "augment", "candidates_from_scores", "fit_head", "held_out_scores"]

N_NEIGHBORS = 20  # as config.Retriever
MAX_DEPTH = 16_384  # Milvus' limit of neighbors per query
CELLS = 1 << 23  # images x classes, or images x entries, at once


def allows(mode: Mode, images: Entries | None, texts: Entries | None) -> bool:
    """Whether a memory of these entries has what a mode needs."""
    has_images, has_texts = images is not None and len(images) > 0, texts is not None and len(texts) > 0
    needs = {"text": has_texts, "tip": has_images and has_texts, "fused": has_images or has_texts}
    return needs.get(mode, has_images)


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
        rule = _fit_knn(problem, seed, n_neighbors)
        sizes = np.log(np.maximum(problem.whole.counts, 1))
        weights = np.zeros((len(sizes), problem.vectors.shape[1]), np.float32)
        meta = {"mode": mode, "votes": asdict(rule)}
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

    The i-th image of each class is left out at a time (its copies with it), and everything but a few numbers (scales,
    shrinkage, the rule of the votes) is fitted on the others. The only image of a class is scored with that class as lacking
    images; knn gives it -inf. `rows`: score only these entries, in this order. n_neighbors, sharpness: as config.Retriever.
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


def _fit_knn(problem: heads.Problem, seed: int, n_neighbors: int) -> Rule:
    rows, neighbors = _rows_to_fit_on(problem, seed)
    return votes.fit_knn(*neighbors, problem.whole.counts, problem.labels[rows], n_neighbors)


def _fit_tip(problem: heads.Problem, head: Head, seed: int, n_neighbors: int) -> tuple[float, Rule]:
    """The default is the paper's: a vote of 1 beside text scores of 100 * cosine, or as much beside scores of another scale."""
    rows, neighbors = _rows_to_fit_on(problem, seed)
    per_vote = float(np.linalg.norm(head.weights, axis=1).mean()) / heads.CLIP_LOGIT_SCALE
    text = head.scores(problem.vectors[rows]).astype(np.float64)
    return votes.fit_tip(text, *neighbors, problem.labels[rows], n_neighbors, per_vote)


def _rows_to_fit_on(problem: heads.Problem, seed: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Images whose class keeps an image without them, as many as time allows, and their held-out neighbors."""
    kept = np.stack([each.known for each in problem.kept])[problem.folds, problem.labels]
    limit = max(1, min(heads.MAX_HELD_OUT, heads.MAX_HELD_OUT_CELLS // max(len(problem.class_ids), len(problem.labels))))
    rows = np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(kept))[:limit])
    return rows, _held_out_neighbors(problem, rows)


def _held_out_neighbors(problem: heads.Problem, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and columns (n, N) of each row's neighbors outside its fold, in order.

    Votes are still divided by the whole sizes of the classes: those outside the fold would give a left-out image's class away.
    """
    cosines = problem.vectors[rows] @ problem.vectors.T
    hidden = problem.folds[rows][:, None] == problem.folds[None]
    cosines[hidden] = -np.inf
    return votes.nearest(cosines, np.where(hidden, -1, problem.labels[None]))


def candidates_by_votes(
    head: Head,
    search: Callable[[np.ndarray, int], Hits],
    queries: np.ndarray,
    top_k: int,
    n_neighbors: int,
    sharpness: float | None = None,
) -> list[list[Candidate]]:
    """Candidates of knn and tip: `search`(queries, k) finds the image entries that vote, `head` (see fit_head) does the rest.

    The search goes deeper than n_neighbors where entries tie there, and (knn) until top_k classes are found or all entries.
    """
    fitted = Rule(**head.meta["votes"])
    rule = fitted.with_sharpness(sharpness)
    sizes = np.rint(np.exp(-head.bias / fitted.scale)) if rule.kind == "knn" else np.zeros_like(head.bias)
    top_k = min(top_k, len(head.class_ids))
    found: list[list[Candidate]] = [[]] * len(queries)
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
            for row, candidates in zip(
                pending[block].tolist(), candidates_from_scores(scores, head.class_ids, head.class_names, top_k), strict=True
            ):
                found[row] = candidates
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


def candidates_from_scores(
    scores: np.ndarray, class_ids: np.ndarray, class_names: Sequence[str], top_k: int
) -> list[list[Candidate]]:
    """The `top_k` best classes of each row of (N, C) scores, best first, ties by class id; -inf is no candidate."""
    chosen = []
    for row in np.asarray(scores):
        columns = np.flatnonzero((row >= np.partition(row, -min(top_k, len(row)))[-min(top_k, len(row))]) & (row > -np.inf))
        best = columns[np.lexsort((class_ids[columns], -row[columns]))][:top_k].tolist()
        chosen.append([Candidate(int(class_ids[column]), class_names[column], float(row[column])) for column in best])
    return chosen


def candidates_from_hits(hits: Hits, names: Mapping[int, str]) -> list[list[Candidate]]:
    """What a search of a stored head found, a class a hit: best first, ties by class id; padding (class id -1) is dropped.

    names: class id -> name.
    """
    chosen = []
    for scores, class_ids in zip(hits.scores, hits.class_ids, strict=True):
        ranked = sorted(
            (-score, class_id) for class_id, score in zip(class_ids.tolist(), scores.tolist(), strict=True) if class_id >= 0
        )
        chosen.append([Candidate(class_id, names[class_id], -negated) for negated, class_id in ranked])
    return chosen
