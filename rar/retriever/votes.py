"""Votes of image entries: the retrievers `knn` and `tip`, whose scores are not linear in the query.

knn: score = scale * log(sum of exp(sharpness (cos - 1)) over the entries of a class / entries that the class has): neighbors
count by their similarity, and a class with many images does not win by number. From sharpness NEAREST the nearest entry alone
counts, whatever the sizes of the classes, which is the paper's rule. tip (Tip-Adapter, Zhang et al. 2022, equations 4 and 5):
scale * sum of exp(-sharpness (1 - cos)), on top of text scores. Either sums over the `n_neighbors` nearest entries only, so
that a search finds all that it needs.

Among entries equally near, those of the lower class id come first, also across the cut at n_neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rar.retriever.softmax import fit_weights, log_sum_exp

NEAREST = 1000.0  # sharpness from which the nearest entry alone counts, whatever the sizes of the classes
SHARPNESSES = (3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0)  # tried by the fit
MARGIN = 1e-3  # of scores, between a class among the neighbors and one that was looked up to fill the list
LEAST = 0.05  # of the default scale: votes that say nothing keep their order
FIT_PRIOR = 4.0  # pull of fitted scales towards their defaults, in held-out images


@dataclass(frozen=True)
class Rule:
    """How entries vote. sharpness: of exp(sharpness (cos - 1)). scale: of what the votes of a class come to."""

    kind: Literal["knn", "tip"]
    sharpness: float
    scale: float

    def with_sharpness(self, sharpness: float | None) -> Rule:
        """The rule at another sharpness; knn keeps how much a step in cosine is worth."""
        if sharpness is None:
            return self
        scale = self.scale * self.sharpness / sharpness if self.kind == "knn" else self.scale
        return Rule(self.kind, sharpness, scale)


KNN = Rule("knn", 25.0, 1.0)  # where no class has a second image to fit it on
TIP = Rule("tip", 5.5, 1.0)  # the paper's, beside text scores of 100 * cosine


def nearest(cosines: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row of (N, k) cosines and class columns by falling cosine, then class; -inf and -1 (no entry) go last."""
    order = np.lexsort((columns, -cosines), axis=-1)
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(columns, order, 1)


def tip(rule: Rule, cosines: np.ndarray, columns: np.ndarray, n_classes: int, n_neighbors: int) -> np.ndarray:
    """(N, C) float64: what the first of the neighbors in order (see `nearest`) add to the text scores; 0 without a vote."""
    first = slice(0, n_neighbors)
    return rule.scale * np.exp(_log_sums(rule.sharpness, cosines[:, first], columns[:, first], n_classes))


def knn(rule: Rule, cosines: np.ndarray, columns: np.ndarray, sizes: np.ndarray, n_neighbors: int) -> np.ndarray:
    """(N, C) float64 scores by the neighbors in order (see `nearest`); -inf for classes without any.

    sizes: (C,) entries of each class in the memory. Classes that only later neighbors have come after those of the first
    n_neighbors.
    """
    n_classes, balance = len(sizes), np.log(np.maximum(sizes, 1)) * (rule.sharpness < NEAREST)
    among = _log_sums(rule.sharpness, cosines[:, :n_neighbors], columns[:, :n_neighbors], n_classes) - balance
    if columns.shape[1] <= n_neighbors:
        return rule.scale * among
    found = np.isfinite(among)
    later = np.where(found, -np.inf, _log_sums(rule.sharpness, cosines, columns, n_classes) - balance)
    least = np.where(found, among, np.inf).min(axis=1) - MARGIN
    best = later.max(axis=1)
    down = np.where(np.isfinite(best), np.maximum(best - least, 0), 0)
    return rule.scale * np.where(found, among, later - down[:, None])


def _log_sums(sharpness: float, cosines: np.ndarray, columns: np.ndarray, n_classes: int) -> np.ndarray:
    """(N, C): log of the sum of exp(sharpness (cos - 1)) over the entries of each class; -inf without one.

    Relative to the nearest entry of the class, so that no sharpness underflows.
    """
    cells = (np.arange(len(columns))[:, None] * n_classes + columns)[columns >= 0]
    values = np.asarray(cosines, np.float64)[columns >= 0]
    best = np.full(len(columns) * n_classes, -np.inf)
    np.maximum.at(best, cells, values)
    sums = np.bincount(cells, np.exp(sharpness * (values - best[cells])), len(best))
    if sharpness >= NEAREST:
        sums = np.minimum(sums, 1)
    with np.errstate(divide="ignore"):
        return (np.log(sums) + sharpness * (best - 1)).reshape(len(columns), n_classes)


def fit_knn(cosines: np.ndarray, columns: np.ndarray, sizes: np.ndarray, truth: np.ndarray, n_neighbors: int) -> Rule:
    """Sharpness and scale of the least NLL of held-out images: their neighbors in order and classes (N,)."""
    if not len(truth):
        return KNN
    fitted = []
    for sharpness in SHARPNESSES if sizes.max() > 2 else (KNN.sharpness,):  # with a vote a class it is the scale over again
        default = KNN.scale * KNN.sharpness / sharpness  # a step in cosine is worth as much at any sharpness
        votes = knn(Rule("knn", sharpness, default), cosines, columns, sizes, n_neighbors)
        penalty = np.where(np.isfinite(votes), 0.0, -np.inf)
        known = np.where(np.isfinite(votes), votes, 0.0)
        factor = max(float(fit_weights(known[None], penalty, truth, np.ones(1), FIT_PRIOR)[0]), LEAST)
        fitted.append((_nll(factor * known + penalty, truth), Rule("knn", sharpness, factor * default)))
    return min(fitted, key=lambda each: each[0])[1]


def fit_tip(
    text: np.ndarray, cosines: np.ndarray, columns: np.ndarray, truth: np.ndarray, n_neighbors: int, per_vote: float
) -> tuple[float, Rule]:
    """A factor for the text scores (N, C), and the rule, of the least NLL of held-out images; per_vote: the default scale."""
    if not len(truth):
        return 1.0, Rule("tip", TIP.sharpness, per_vote)
    fitted = []
    for sharpness in SHARPNESSES:
        parts = np.stack([text, tip(Rule("tip", sharpness, per_vote), cosines, columns, text.shape[1], n_neighbors)])
        factors = fit_weights(parts, np.zeros_like(text), truth, np.ones(2), FIT_PRIOR)
        nll = _nll(np.tensordot(factors, parts, 1), truth)
        fitted.append((nll, float(factors[0]), Rule("tip", sharpness, float(factors[1] * per_vote))))
    return min(fitted, key=lambda each: each[0])[1:]


def _nll(logits: np.ndarray, truth: np.ndarray) -> float:
    return float((log_sum_exp(logits) - logits[np.arange(len(truth)), truth]).mean())
