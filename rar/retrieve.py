"""A retriever is a linear classifier over the query embedding, fitted in closed form on the memory: a `Head`.

Text prototypes, class centroids, LDA and any blend of them are linear in the query, so a fitted retriever is one weight vector
and one bias a class. `Head.to_entries` stores it like a memory (the bias is one more dimension, `augment` gives the query its
constant 1), and a search over it proposes unique classes by construction. `knn`, the paper's baseline, searches image entries
instead and merges them in `knn_candidates`.

The image part of `fused` is LDA's direction S^-1 (mu_c - m), divided by its length under S: the centred class mean compared by
cosine after whitening with the shrunk within-class covariance S. Plain LDA's bias trusts the length of mu_c - m, which at few
shots is mostly noise. One shot a class has no residuals, S becomes the identity and the part a centred centroid.

How sharp each part is (one scale a part) and how far S is shrunk are fitted by leave-one-shot-out on the memory itself, never
on test images. What it costs: the fold heads see fewer shots than the final one, so that its probabilities are too modest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rar.schema import Candidate, UserError
from rar.softmax import fit_weights

if TYPE_CHECKING:
    from rar.memory import Entries, Hits

Mode = Literal["text", "centroid", "fused"]

CLIP_LOGIT_SCALE = 100.0  # the temperature CLIP is trained to, inverted; used where no image can tell better
IMAGE_SCALE = 2.5  # of standardised image scores, where no class has a second image to fit it on
COVARIANCE_PRIORS = (0.5, 2.0, 16.0)  # the identity may count as this many residuals per dimension; the first is the default
SCALE_PRIOR = 1.0  # pull of the scales towards their defaults; worth a handful of held-out images
TINY, BLOCK = 1e-12, 8192  # the latter: images cast to float64 at a time
MAX_FOLDS = 5
MAX_HELD_OUT, MAX_HELD_OUT_CELLS = 2048, 1 << 23  # held-out images, and images x classes, that the scales are fitted on


@dataclass(frozen=True)
class Head:
    """A fitted retriever: score = queries @ weights.T + bias; its softmax over all classes is a calibrated probability.

    class_ids: (C,) int64, ascending. weights: (C, D) float32. bias: (C,) float32. meta: how it was fitted, JSON-able: mode,
    scales (one a part, of standardised scores), prior, held_out (images fitted on; 0 = defaults), held_out_nll, held_out_top1.
    """

    class_ids: np.ndarray
    class_names: list[str]
    weights: np.ndarray
    bias: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """(N, D) queries -> (N, C) float32 scores: logits over all classes."""
        return np.asarray(queries, np.float32) @ self.weights.T + self.bias

    def to_entries(self) -> Entries:
        """One entry a class; its vector is (weights, bias), to be searched by inner product with `augment(queries)`."""
        from rar.memory import Entries

        ids = [f"class-{class_id:08d}" for class_id in self.class_ids]
        return Entries(ids, self.class_ids, list(self.class_names), np.column_stack([self.weights, self.bias]))

    @classmethod
    def from_entries(cls, entries: Entries, meta: dict[str, Any]) -> Head:
        """The inverse of `to_entries`, in whatever order the entries come; exact in float32."""
        order = np.argsort(entries.class_ids, kind="stable")
        vectors = np.asarray(entries.vectors, np.float32)[order]
        names = [entries.class_names[position] for position in order]
        return cls(np.asarray(entries.class_ids)[order], names, vectors[:, :-1].copy(), vectors[:, -1].copy(), meta)


def augment(queries: np.ndarray) -> np.ndarray:
    """(N, D) queries -> (N, D + 1) float32 with a constant 1, which picks up the bias of a stored Head."""
    return np.column_stack([queries, np.ones(len(queries))]).astype(np.float32)


def fit_head(mode: Mode, images: Entries | None, texts: Entries | None, seed: int = 0) -> Head:
    """Fit a retriever on a memory. `images` and `texts` hold unit vectors of the same dimension D.

    text: class prototypes (entries of one class averaged, re-normalised), bias 0. centroid: class means of the images,
    re-normalised. fused: the image part (see the module) plus the text prototypes, whichever the memory has. A class that
    lacks images or text scores as an average other class there. `seed` draws the held-out images where there are too many.
    Raises UserError where the memory lacks what the mode needs.
    """
    problem, scales, neutrals, meta = _fit(_Problem.of(mode, images, texts), seed)
    weights, bias = _combine(problem.parts(), scales, neutrals)
    return Head(problem.class_ids, problem.class_names, weights.astype(np.float32), bias.astype(np.float32), meta)


def held_out_scores(
    mode: Mode, images: Entries, texts: Entries | None, seed: int = 0, rows: Sequence[int] | None = None
) -> np.ndarray:
    """(N, C) float32 scores of image entries by heads fitted without them, columns as in `fit_head(...).class_ids`.

    The folds and the scales are those of `fit_head`; the scales (one number a part) have seen the entry, its weights have not.
    The only image of a class is scored with that class as lacking images. `rows`: score only these entries, in this order.
    """
    problem, scales, neutrals, _ = _fit(_Problem.of(mode, images, texts), seed)
    chosen = np.arange(len(problem.labels)) if rows is None else np.asarray(rows, np.int64)
    scores = np.empty((len(chosen), len(problem.class_ids)), np.float32)
    for fold in np.unique(problem.folds[chosen]).tolist():
        weights, bias = _combine(problem.parts(without=fold), scales, neutrals)
        inside = problem.folds[chosen] == fold
        scores[inside] = problem.vectors[chosen[inside]] @ weights.astype(np.float32).T + bias
    return scores


@dataclass(frozen=True)
class _Moments:
    """All that the image parts need to know of a set of images, so that leaving out a fold is a subtraction."""

    gram: np.ndarray  # (D, D) sum of x x'
    sums: np.ndarray  # (C, D) sum of each class's x
    counts: np.ndarray  # (C,)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.gram + other.gram, self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True)
class _Part:
    """One linear classifier before scaling. Rows of absent classes hold nothing meaningful."""

    weights: np.ndarray  # (C, D) float64
    bias: np.ndarray  # (C,)
    present: np.ndarray  # (C,) bool


@dataclass(frozen=True)
class _Problem:
    """A memory made ready for fitting: classes as columns, images with their folds, and the moments of each fold."""

    mode: Mode
    class_ids: np.ndarray  # (C,) ascending
    class_names: list[str]
    text: _Part | None
    text_default: float  # the scale of `text` that is CLIP's own
    vectors: np.ndarray  # (N, D) float32; N = 0 without images
    labels: np.ndarray  # (N,) columns; -1: an image whose class is not proposed (mode text)
    folds: np.ndarray  # (N,)
    moments: list[_Moments]  # one a fold
    prior: float = COVARIANCE_PRIORS[0]

    @classmethod
    def of(cls, mode: Mode, images: Entries | None, texts: Entries | None) -> _Problem:
        images, texts = _usable(mode, images, texts)
        proposed = [entries for entries in (texts, images if mode != "text" else None) if entries is not None]
        names: dict[int, str] = {}
        for entries in proposed:
            for class_id, name in zip(entries.class_ids.tolist(), entries.class_names, strict=True):
                names.setdefault(class_id, name)
        class_ids = np.array(sorted(names), np.int64)
        dim = proposed[0].vectors.shape[1]
        vectors = np.zeros((0, dim), np.float32) if images is None else np.asarray(images.vectors, np.float32)
        labels = _columns(class_ids, np.zeros(0, np.int64) if images is None else images.class_ids)
        folds, n_folds = _folds(vectors, labels)
        moments = [_moments(vectors, np.where(folds == fold, labels, -1), len(class_ids)) for fold in range(n_folds)]
        text, spread = None, 1.0
        if texts is not None:  # entries of one class (synonyms) are averaged
            sums = _moments(np.asarray(texts.vectors, np.float32), _columns(class_ids, texts.class_ids), len(class_ids))
            text, spread = _standardised(_centroids(sums), sum(moments[1:], moments[0]))
        ordered = [names[class_id] for class_id in class_ids.tolist()]
        return cls(mode, class_ids, ordered, text, CLIP_LOGIT_SCALE * spread, vectors, labels, folds, moments)

    def parts(self, without: int | None = None) -> list[_Part]:
        """The parts of the head, image part first, fitted on all images but those of the fold `without`."""
        image = None
        if self.mode != "text" and len(self.vectors):
            kept = [moments for fold, moments in enumerate(self.moments) if fold != without]
            total = sum(kept[1:], kept[0])
            image, _ = _standardised(_centroids(total) if self.mode == "centroid" else _whitened(total, self.prior), total)
        return [part for part in (image, self.text) if part is not None]


def _usable(mode: Mode, images: Entries | None, texts: Entries | None) -> tuple[Entries | None, Entries | None]:
    """The entries that the mode looks at; None for an absent or empty kind. Raises UserError where too little is left."""
    images = images if images is not None and len(images.class_ids) else None
    texts = texts if texts is not None and len(texts.class_ids) and mode != "centroid" else None
    if mode == "text" and texts is None:
        raise UserError("retriever.mode text needs class names in the memory: set memory.classes and run `rar memory`")
    if mode == "centroid" and images is None:
        raise UserError("retriever.mode centroid needs support images in the memory: set memory.support and run `rar memory`")
    if images is None and texts is None:
        raise UserError("the memory is empty: set memory.support or memory.classes and run `rar memory`")
    if images is not None and texts is not None and images.vectors.shape[1] != texts.vectors.shape[1]:
        raise UserError("image and text entries differ in dimension: rebuild the memory with one encoder")
    return images, texts


def _columns(class_ids: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Class ids -> columns of the ascending `class_ids`; -1 where a class is not among them."""
    columns = np.minimum(np.searchsorted(class_ids, of), len(class_ids) - 1)
    return np.where(class_ids[columns] == of, columns, -1)


def _folds(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """(N,) folds and their number: the distinct images of a class take turns, copies of one image share a fold.

    Classes start at different folds, so that one fold does not take the only image of every single-shot class.
    """
    known: dict[int, dict[int, int]] = {}
    positions = np.zeros(len(labels), np.int64)
    for row, label in enumerate(labels.tolist()):
        images = known.setdefault(label, {})
        positions[row] = images.setdefault(hash(vectors[row].tobytes()), len(images))
    shots = max(map(len, known.values()), default=1)
    n_folds = MAX_FOLDS if shots == 1 else min(MAX_FOLDS, shots)
    return (positions + labels) % n_folds, n_folds


def _moments(vectors: np.ndarray, labels: np.ndarray, n_classes: int) -> _Moments:
    """Moments of the images whose label is not -1, in blocks, so that float64 copies stay small."""
    dim = vectors.shape[1]
    gram, sums = np.zeros((dim, dim)), np.zeros((n_classes, dim))
    rows = np.flatnonzero(labels >= 0)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        values = vectors[block].astype(np.float64)
        gram += values.T @ values
        np.add.at(sums, labels[block], values)
    return _Moments(gram, sums, np.bincount(labels[rows], minlength=n_classes))


def _centroids(moments: _Moments) -> _Part:
    """Class means, re-normalised."""
    weights = moments.sums / np.maximum(np.linalg.norm(moments.sums, axis=1, keepdims=True), TINY)
    return _Part(weights, np.zeros(len(weights)), moments.counts > 0)


def _whitened(moments: _Moments, prior: float) -> _Part:
    """w = S^-1 d / sqrt(d' S^-1 d) with d = class mean - mean of the class means; bias = -w . (mean of the class means).

    S is the within-class covariance scaled to mean variance 1 and shrunk towards the identity, which counts as prior * D
    residuals (the mean of an inverse-Wishart posterior): less shrinkage as the memory grows.
    """
    present = moments.counts > 0
    counts = moments.counts[present].astype(np.float64)
    dim, n_residuals = len(moments.gram), counts.sum() - len(counts)
    means = moments.sums[present] / counts[:, None]
    covariance, shrinkage = np.eye(dim), prior * dim / (prior * dim + n_residuals)
    within = moments.gram - (means * counts[:, None]).T @ means
    variance = np.trace(within) / dim
    if variance > TINY * np.trace(moments.gram):
        covariance = (1 - shrinkage) * within / variance + shrinkage * covariance
    centre = means.sum(axis=0) / max(len(means), 1)
    offsets = means - centre
    weights, solved = np.zeros_like(moments.sums), np.linalg.solve(covariance, offsets.T).T
    weights[present] = solved / np.sqrt(np.maximum((solved * offsets).sum(axis=1, keepdims=True), TINY))
    return _Part(weights, -weights @ centre, present)


def _standardised(part: _Part, images: _Moments) -> tuple[_Part, float]:
    """The part in units of the spread of its scores over `images`, and that spread; what all classes share does not count."""
    n_images = images.counts.sum()
    if n_images == 0 or not part.present.any():
        return part, 1.0
    mean = images.sums.sum(axis=0) / n_images
    covariance = images.gram / n_images - np.outer(mean, mean)
    centred = part.weights[part.present] - part.weights[part.present].mean(axis=0)
    variance = float(((centred @ covariance) * centred).sum(axis=1).mean())
    spread = variance**0.5 if variance > TINY else 1.0
    return _Part(part.weights / spread, part.bias / spread, part.present), spread


def _combine(parts: list[_Part], scales: np.ndarray, neutrals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, D) and bias (C,) of the scaled sum; one absent from a part takes the mean of the present, plus `neutral`."""
    weights, bias = np.zeros_like(parts[0].weights), np.zeros_like(parts[0].bias)
    for part, scale, neutral in zip(parts, scales, neutrals, strict=True):
        if not part.present.any():
            continue
        weights += scale * np.where(part.present[:, None], part.weights, part.weights[part.present].mean(axis=0))
        bias += np.where(part.present, scale * part.bias, scale * part.bias[part.present].mean() + neutral)
    return weights, bias


def _fit(problem: _Problem, seed: int) -> tuple[_Problem, np.ndarray, np.ndarray, dict[str, Any]]:
    """The problem with the covariance prior of the least held-out NLL, and what `_fit_scales` says of it."""
    shots = np.sum([moments.counts for moments in problem.moments], axis=0).max()  # at two, fold heads have no residuals
    priors = COVARIANCE_PRIORS if problem.mode == "fused" and shots > 2 else COVARIANCE_PRIORS[:1]
    problems = [replace(problem, prior=prior) for prior in priors]
    return min(((each, *_fit_scales(each, seed)) for each in problems), key=lambda fitted: fitted[-1]["held_out_nll"])


def _fit_scales(problem: _Problem, seed: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Scales (P,) and neutrals (P,) of the parts by the NLL of held-out images, and the head's meta.

    The fit is pulled to defaults, which stand where no class keeps an image when one is left out: CLIP's own scale for text,
    IMAGE_SCALE for images; and for text with images half of the scale that text alone has, for either (they are standardised).
    """
    labelled = np.flatnonzero(problem.labels >= 0)
    limit = max(1, min(MAX_HELD_OUT, MAX_HELD_OUT_CELLS // len(problem.class_ids)))
    rows = np.sort(np.random.default_rng(seed).permutation(labelled)[:limit])
    scores, present = _held_out_parts(problem, rows)
    truth = problem.labels[rows]
    scales, meta = _fit_known(scores[-1:], present[-1:], truth, [IMAGE_SCALE if problem.text is None else problem.text_default])
    if len(scores) == 2:
        scales, meta = _fit_known(scores, present, truth, [scales[0] / 2, scales[0] / 2])
    neutrals = [_neutral(scale * part, known, truth) for scale, part, known in zip(scales, scores, present, strict=True)]
    return scales, np.array(neutrals), {"mode": problem.mode, "scales": scales.tolist(), "prior": problem.prior, **meta}


def _held_out_parts(problem: _Problem, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (P, n, C) of the rows by parts fitted without their fold, 0 where a part lacks the class; and (P, n, C) bool."""
    n_parts = (problem.mode != "text" and len(problem.vectors) > 0) + (problem.text is not None)
    scores = np.zeros((n_parts, len(rows), len(problem.class_ids)))
    present = np.zeros(scores.shape, bool)
    for fold in np.unique(problem.folds[rows]).tolist():
        inside = problem.folds[rows] == fold
        for index, part in enumerate(problem.parts(without=fold)):
            scores[index, inside] = (problem.vectors[rows[inside]] @ part.weights.T + part.bias) * part.present
            present[index, inside] = part.present
    return scores, present


def _fit_known(scores: np.ndarray, present: np.ndarray, truth: np.ndarray, default: list[float]) -> tuple[np.ndarray, dict]:
    """Scales fitted on the images whose class every part knows, among the classes that every part knows; and how well."""
    shared = np.logical_and.reduce(present)
    usable = np.flatnonzero(shared[np.arange(len(truth)), truth])
    penalty = np.where(shared[usable], 0.0, -np.inf)
    scales = fit_weights(scores[:, usable], penalty, truth[usable], np.asarray(default, np.float64), SCALE_PRIOR)
    logits = np.tensordot(scales, scores[:, usable], 1) + penalty
    nll = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(usable)), truth[usable]]
    quality = np.mean([nll, logits.argmax(axis=1) == truth[usable]], axis=1).tolist() if len(usable) else [0.0, 0.0]
    return scales, {"held_out": len(usable), "held_out_nll": quality[0], "held_out_top1": quality[1]}


def _neutral(logits: np.ndarray, present: np.ndarray, truth: np.ndarray) -> float:
    """How far the log of the mean likelihood of an image's wrong classes lies above their mean logit, averaged over images.

    A class that a part does not know is taken for an average wrong class there: mean logit plus this. 0 without images.
    """
    wrong = present & (truth[:, None] != np.arange(present.shape[1]))
    logits, wrong = logits[wrong.any(axis=1)], wrong[wrong.any(axis=1)]
    counts = wrong.sum(axis=1)
    if not len(counts):
        return 0.0
    log_mean = np.logaddexp.reduce(np.where(wrong, logits, -np.inf), axis=1) - np.log(counts)
    return float((log_mean - np.where(wrong, logits, 0.0).sum(axis=1) / counts).mean())


def candidates_from_scores(
    scores: np.ndarray, class_ids: np.ndarray, class_names: Sequence[str], top_k: int
) -> list[list[Candidate]]:
    """The `top_k` best classes of each row of (N, C) scores, best first, ties by class id."""
    chosen = []
    for row in np.asarray(scores):
        columns = np.flatnonzero(row >= np.partition(row, -min(top_k, len(row)))[-min(top_k, len(row))])
        best = columns[np.lexsort((class_ids[columns], -row[columns]))][:top_k].tolist()
        chosen.append([Candidate(int(class_ids[column]), class_names[column], float(row[column])) for column in best])
    return chosen


def knn_candidates(hits: Hits, names: Mapping[int, str], top_k: int) -> list[list[Candidate]]:
    """Neighbors merged into unique classes: a class scores as its best neighbor, ties by class id.

    names: class id -> name. Fewer classes among the neighbors give a shorter list; padding (class id -1) is dropped.
    """
    chosen = []
    for scores, class_ids in zip(hits.scores, hits.class_ids, strict=True):
        best: dict[int, float] = {}
        for class_id, score in zip(class_ids.tolist(), scores.tolist(), strict=True):
            if class_id >= 0:
                best[class_id] = max(score, best.get(class_id, score))
        ranked = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k]
        chosen.append([Candidate(class_id, names[class_id], score) for class_id, score in ranked])
    return chosen
