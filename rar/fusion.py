"""Whether the MLLM is asked about an image, and how its ranking is fused with the retriever's scores.

Both are calibrated on images whose class is known, the memory's own entries scored by heads fitted without them. With s_j the
retriever's score of candidate j and r_j the ranker's log-probability (-log(1 + rank) where the ranker gave an order alone),

    p_j = softmax_j(a s_j + b r_j),  a, b >= 0 fitted by likelihood: two numbers, so that a few hundred images are enough.

Where cross-validated fused accuracy is not above the retriever's, b = 0 and the MLLM is never asked, so that ranking does not
make a dataset worse than its retriever; a gain too small to show on the calibration images is given up for that. Nor is it
asked where the retriever is so sure that asking does not pay. That cost is counted in the fused model's probabilities, not in
right and wrong images: the lowest threshold with few enough lost images is mostly a lucky one, and loses more on new images.

With `route.coverage` the ranker is shown fewer candidates where fewer will do: those of at least the probability that the true
class has in that share of the calibration images (split conformal prediction, least ambiguous sets; Sadinle et al. 1609.00451).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rar.ranker.debias import log_softmax
from rar.retriever.softmax import fit_weights
from rar.schema import Candidate, Ranking, RankStatus

N_FOLDS = 5
DIGITS = 4  # of a calibration that are kept; a last place moves a probability by less than one in a thousand
RIDGE = 1.0  # on weights of features scaled to spread 1; worth a handful of images
TOLERANCE = 0.003  # accuracy that routing past the ranker may cost, in expectation
MIN_IMAGES = 20  # with the truth among the candidates; below, nothing is fitted


@dataclass(frozen=True)
class Calibration:
    """How the ranker is used. The defaults stand where nothing can be fitted (a memory of names alone): always ask, and add the
    ranker's log-probabilities to the retriever's logits as they are.

    threshold: probability of the best candidate by the retriever alone at and above which the ranker is not asked; inf = always
    ask, 0 = never. retriever_scale: a of the retriever alone. least_probability: by the retriever alone, of candidates that the
    ranker is shown. images: calibration images with the truth among their candidates; the accuracies are over all calibration
    images, the fused one cross-validated; None where nothing was fitted.
    """

    weight_retriever: float = 1.0
    weight_ranker: float = 1.0
    retriever_scale: float = 1.0
    threshold: float = math.inf
    least_probability: float = 0.0
    images: int = 0
    retriever_top1: float | None = None
    fused_top1: float | None = None

    def rounded(self) -> Calibration:
        """To DIGITS digits: fits that differ in their last places, by threads or machines, then decide and fuse alike."""
        used = ("weight_retriever", "weight_ranker", "retriever_scale", "threshold", "least_probability")
        return type(self)(**asdict(self) | {name: float(f"{getattr(self, name):.{DIGITS}g}") for name in used})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: an infinite threshold, which JSON lacks, becomes the text "inf"."""
        return {**asdict(self), "threshold": self.threshold if math.isfinite(self.threshold) else "inf"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`. Raises TypeError for unknown keys."""
        return cls(**{**data, "threshold": float(data["threshold"])})


def skips(candidates: Sequence[Candidate], calibration: Calibration) -> bool:
    """True: the image is routed past the ranker, because the retriever is sure enough or there is nothing to order."""
    return n_shown(candidates, calibration) < 2


def n_shown(candidates: Sequence[Candidate], calibration: Calibration) -> int:
    """How many candidates, the first ones, the ranker is to order; 0 where it is not asked."""
    if len(candidates) < 2:
        return 0
    chances = np.exp(log_softmax(calibration.retriever_scale * np.array([candidate.score for candidate in candidates])))
    if chances.max() >= calibration.threshold:
        return 0
    shown = int((chances >= calibration.least_probability).sum())
    return shown if shown > 1 else 0


def fuse(
    candidates: Sequence[Candidate], ranking: Ranking, calibration: Calibration
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(order, probabilities): positions best first, ties in retrieval order; and one probability a candidate position.

    A ranking that says nothing of the image (`skipped`, `fallback`) leaves the retriever alone.
    """
    if not candidates:
        return (), ()
    scores = np.array([candidate.score for candidate in candidates])
    if _silent(ranking):
        logits = calibration.retriever_scale * scores
    else:
        logits = calibration.weight_retriever * scores + calibration.weight_ranker * rank_scores(ranking)
    order = np.argsort(-logits, kind="stable")
    return tuple(order.tolist()), tuple(np.exp(log_softmax(logits)).tolist())


def among(ranking: Ranking, count: int) -> Ranking:
    """A ranking of the first candidates as one of all `count`: the others follow in retrieval order and score as the last."""
    hidden = range(len(ranking.order), count)
    scores = ranking.scores and (*ranking.scores, *[min(ranking.scores)] * len(hidden))
    return replace(ranking, order=(*ranking.order, *hidden), scores=scores)


def fit(
    candidates: Sequence[Sequence[Candidate]],
    rankings: Sequence[Ranking],
    truth: Sequence[int],
    coverage: float | None = None,
    groups: Sequence[int] | None = None,
) -> Calibration:
    """Calibrate on images with known class ids (`truth`). Fewer than MIN_IMAGES usable images give the defaults.

    groups: numbers of near duplicates, which are cross-validated together; None: each image is its own.

    coverage: share of images, of those whose truth is among the candidates, in which it is to be among those shown; None: 1.
    """
    table = _Table.of(candidates, rankings, truth)
    n_usable = int((table.columns >= 0).sum())
    if n_usable < MIN_IMAGES:
        return Calibration(images=n_usable)
    every = np.ones(len(truth), bool)
    scale = float(table.weights(every, 1)[0])
    weight_retriever, weight_ranker = table.weights(every, 2).tolist()
    retriever_choice = table.logits(np.array([1.0, 0.0])).argmax(axis=1)
    chances = table.cross_validated_chances(groups)
    retriever_top1 = float((retriever_choice == table.columns).mean())
    fused_top1 = float((chances.argmax(axis=1) == table.columns).mean())
    least = table.least_probability(scale, coverage) if coverage is not None else 0.0
    measured = (least, n_usable, retriever_top1, fused_top1)
    if fused_top1 <= retriever_top1 or weight_ranker == 0:
        return Calibration(scale, 0.0, scale, 0.0, *measured)
    costs = chances.max(axis=1) - chances[np.arange(len(chances)), retriever_choice]
    threshold = _threshold(table.retriever_chances(scale).max(axis=1), costs)
    return Calibration(weight_retriever, weight_ranker, scale, threshold, *measured)


@dataclass(frozen=True)
class _Table:
    """Calibration images as arrays: N images, K candidates at most, two features a candidate (retriever, ranker)."""

    features: np.ndarray  # (2, N, K), 0 beyond an image's candidates
    penalty: np.ndarray  # (N, K), -inf beyond an image's candidates (an image without any keeps one empty column)
    columns: np.ndarray  # (N,) the truth's position; -1 where it is not among the candidates
    silent: np.ndarray  # (N,) bool: the ranking says nothing of the image

    @classmethod
    def of(cls, candidates: Sequence[Sequence[Candidate]], rankings: Sequence[Ranking], truth: Sequence[int]) -> _Table:
        shape = (len(candidates), max((len(row) for row in candidates), default=1))
        features, penalty = np.zeros((2, *shape)), np.full(shape, -np.inf)
        columns = np.full(len(candidates), -1)
        for image, (row, ranking, class_id) in enumerate(zip(candidates, rankings, truth, strict=True)):
            features[0, image, : len(row)] = [candidate.score for candidate in row]
            features[1, image, : len(row)] = rank_scores(ranking)
            penalty[image, : max(len(row), 1)] = 0.0
            ids = [candidate.class_id for candidate in row]
            columns[image] = ids.index(class_id) if class_id in ids else -1
        return cls(features, penalty, columns, np.array([_silent(ranking) for ranking in rankings], bool))

    def weights(self, images: np.ndarray, n_features: int) -> np.ndarray:
        """Weights (n_features,) of the first features by the `images` (N,) bool that have the truth among their candidates."""
        used = images & (self.columns >= 0) & ~(self.silent & (n_features > 1))
        features, penalty = self.features[:n_features, used], self.penalty[used]
        inside = np.isfinite(penalty)
        spreads = np.array([_spread(feature, inside) for feature in features])
        scaled = features / spreads[:, None, None]
        return fit_weights(scaled, penalty, self.columns[used], np.zeros(n_features), RIDGE) / spreads

    def logits(self, weights: np.ndarray) -> np.ndarray:
        """(N, K) fused logits, -inf beyond an image's candidates; a silent ranking leaves the retriever's scores."""
        used = np.where(self.silent[:, None], np.array([1.0, 0.0]), weights)
        return np.einsum("np,pnk->nk", used, self.features) + self.penalty

    def cross_validated_chances(self, groups: Sequence[int] | None = None) -> np.ndarray:
        """(N, K) fused probabilities by weights fitted without the image's fold; the i-th of the groups is in i mod N_FOLDS."""
        folds = np.unique(range(len(self.columns)) if groups is None else groups, return_inverse=True)[1] % N_FOLDS
        chances = np.zeros(self.penalty.shape)
        for fold in range(N_FOLDS):
            inside = folds == fold
            logits = self.logits(self.weights(~inside, 2))[inside]
            chances[inside] = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
        return chances

    def retriever_chances(self, scale: float) -> np.ndarray:
        """(N, K) probabilities by the retriever alone."""
        return np.array([np.exp(log_softmax(row)) for row in scale * self.features[0] + self.penalty])

    def least_probability(self, scale: float, coverage: float) -> float:
        """What the truth's probability by the retriever reaches in a share `coverage` of new images; 0 for too few images."""
        usable = np.flatnonzero(self.columns >= 0)
        chances = np.sort(self.retriever_chances(scale)[usable, self.columns[usable]])
        place = math.floor((1 - coverage) * (len(chances) + 1)) - 1
        return float(chances[place]) if place >= 0 else 0.0


def _threshold(confidence: np.ndarray, costs: np.ndarray) -> float:
    """The lowest threshold whose expected cost over all images is at most TOLERANCE; inf where each costs more."""
    for threshold in np.unique(confidence).tolist():
        if costs[confidence >= threshold].sum() <= TOLERANCE * len(costs):
            return threshold
    return math.inf


def _silent(ranking: Ranking) -> bool:
    return ranking.status in (RankStatus.SKIPPED, RankStatus.FALLBACK)


def rank_scores(ranking: Ranking) -> np.ndarray:
    """One log-probability a candidate position; -log(1 + rank), rank = 0, 1, ..., where the ranker gave an order alone."""
    if ranking.scores:
        return np.array(ranking.scores)
    scores = np.empty(len(ranking.order))
    scores[list(ranking.order)] = -np.log1p(np.arange(len(ranking.order)))
    return scores


def _spread(feature: np.ndarray, inside: np.ndarray) -> float:
    """Root mean variance of a feature (N, K) within its images; 1 where it does not vary."""
    counts = np.maximum(inside.sum(axis=1, keepdims=True), 1)
    mean = np.where(inside, feature, 0.0).sum(axis=1, keepdims=True) / counts
    variance = float((np.where(inside, feature - mean, 0.0) ** 2).sum() / max(inside.sum(), 1))
    return math.sqrt(variance) if variance > 0 else 1.0
