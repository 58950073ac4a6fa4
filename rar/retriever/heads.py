"""A linear retriever, fitted in closed form on the memory: a `Head`, one weight vector and one bias a class.

Text prototypes, class centroids, LDA and any blend of them are linear in the query. `Head.to_entries` stores a head like a
memory (the bias is one more dimension, `augment` gives the query its constant 1), and a search over it proposes unique classes
by construction.

`fused` is up to three things: posterior class means (see gaussian), text prototypes, and a bias a class. The last is for
names that claim too many images or too few: an image encoder that has learned its names well leaves little more to mend.

What has to be fitted (one scale a part, how far covariances are shrunk, how far the biases) is fitted on images of the memory
that are left out in turn with their near duplicates (see bursts), never on test images. What it costs: the fold heads see fewer
shots than the final one, so that its probabilities are a little too modest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from rar.memory.collection import Collection
from rar.memory.entries import Entries
from rar.memory.store import PATIENCE_S
from rar.retriever import gaussian
from rar.retriever.bursts import groups_of
from rar.retriever.gaussian import TINY, Moments, Part
from rar.retriever.softmax import fit_weights, log_sum_exp
from rar.schema import UserError

Mode = Literal["text", "knn", "centroid", "tip", "lda", "fused"]
MODES: tuple[Mode, ...] = ("text", "knn", "centroid", "tip", "lda", "fused")

CLIP_LOGIT_SCALE = 100.0  # the temperature CLIP is trained to, inverted; used where no image can tell better
IMAGE_SCALE = 2.5  # of standardised image scores, where no class has a second image to fit it on
COVARIANCE_PRIORS = (
    0.5,
    0.1,
    2.0,
    8.0,
)  # the identity may count as this many residuals per dimension; the first is the default
BIAS_PRIOR = 4.0  # a class's bias is shrunk as if it had been right this often, exactly as expected
SCALE_PRIOR = 4.0  # pull of the scales towards their defaults; worth a handful of held-out images
MAX_FOLDS = 5
MAX_HELD_OUT, MAX_HELD_OUT_CELLS = 2048, 1 << 21  # held-out images, and images x classes, that the scales are fitted on
MIN_HELD_OUT = 128  # images, however many classes


@dataclass(frozen=True)
class Head:
    """A fitted retriever: score = queries @ weights.T + bias; its softmax over all classes is a calibrated probability.

    class_ids: (C,) int64, ascending. weights: (C, D) float32. bias: (C,) float32. meta: how it was fitted, JSON-able: mode,
    scales (one a part, of standardised scores), prior, held_out (images fitted on; 0 = defaults), held_out_nll, held_out_top1,
    groups (of near duplicates among the images).
    The modes knn and tip add votes of image entries to these scores; meta["votes"] says how (see `votes`).
    """

    class_ids: np.ndarray
    class_names: list[str]
    weights: np.ndarray
    bias: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def length(self) -> float:
        """The greatest norm of a class's weights."""
        return float(np.linalg.norm(self.weights, axis=1).max(initial=0))

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """(N, D) queries -> (N, C) float32 scores: logits over all classes."""
        return np.asarray(queries, np.float32) @ self.weights.T + self.bias

    def to_entries(self) -> Entries:
        """One entry a class; its vector is (weights, bias), to be searched by inner product with `augment(queries)`."""
        ids = [f"class-{class_id:08d}" for class_id in self.class_ids]
        return Entries(ids, self.class_ids, list(self.class_names), np.column_stack([self.weights, self.bias]))

    @classmethod
    def from_entries(cls, entries: Entries, meta: dict[str, Any]) -> Head:
        """The inverse of `to_entries`, in whatever order the entries come; exact in float32."""
        order = np.argsort(entries.class_ids, kind="stable")
        vectors = np.asarray(entries.vectors, np.float32)[order]
        names, class_ids = [entries.class_names[position] for position in order], np.asarray(entries.class_ids)[order]
        if not vectors.shape[1]:  # read without its weights
            return cls(class_ids, names, vectors, np.zeros(len(names), np.float32), meta)
        return cls(class_ids, names, vectors[:, :-1].copy(), vectors[:, -1].copy(), meta)


@dataclass(frozen=True)
class StoredHead:
    """Where a head lies. Calling it reads the head once a process; `digest`, of the memory, tells one state from another.

    weights: without them (too many classes to hold) the head has its classes alone.
    """

    address: str
    name: str
    digest: str
    weights: bool = True
    token: str | None = field(default=None, repr=False)
    patience_s: float = PATIENCE_S

    def __call__(self) -> Head:
        return _read(self)


@lru_cache(maxsize=4)
def _read(stored: StoredHead) -> Head:
    one = Collection(stored.address, stored.name, stored.token, stored.patience_s)
    return Head.from_entries(one.fetch(vectors=stored.weights), one.meta()["head"])


def augment(queries: np.ndarray) -> np.ndarray:
    """(N, D) queries -> (N, D + 1) float32 with a constant 1, which picks up the bias of a stored Head."""
    return np.column_stack([queries, np.ones(len(queries))]).astype(np.float32)


def head_of(fitted: Fitted) -> Head:
    """The head on all images of the memory."""
    problem = fitted.problem
    weights, bias = combine(problem.parts(problem.whole), fitted)
    bias = bias + fitted.biases
    return Head(problem.class_ids, problem.class_names, weights.astype(np.float32), bias.astype(np.float32), fitted.meta)


def held_out(fitted: Fitted, rows: np.ndarray) -> np.ndarray:
    """(len(rows), C) float32 scores of images of the memory by heads on the images outside their fold."""
    problem = fitted.problem
    scores = np.empty((len(rows), len(problem.class_ids)), np.float32)
    for fold in np.unique(problem.folds[rows]).tolist():
        weights, bias = combine(problem.parts(problem.kept[fold]), fitted)
        inside = problem.folds[rows] == fold
        scores[inside] = problem.vectors[rows[inside]] @ weights.astype(np.float32).T + (bias + fitted.fold_biases[fold])
    return scores


@dataclass(frozen=True)
class Problem:
    """A memory made ready for fitting: classes as columns, images with their folds, and the moments of each fold."""

    mode: Mode
    class_ids: np.ndarray  # (C,) ascending
    class_names: list[str]
    names: np.ndarray | None  # (C, D) unit text vectors, 0 where a class has none
    text: Part | None  # the same as a classifier, standardised
    text_default: float  # the scale of `text` that is CLIP's own
    vectors: np.ndarray  # (N, D) float32; N = 0 without images
    labels: np.ndarray  # (N,) columns; -1: an image whose class is not proposed (mode text)
    groups: np.ndarray  # (N,) near duplicates, see bursts
    folds: np.ndarray  # (N,)
    kept: list[Moments]  # one a fold: of all images but its own
    whole: Moments  # of all images
    prior: float = COVARIANCE_PRIORS[0]

    @classmethod
    def of(cls, mode: Mode, images: Entries | None, texts: Entries | None) -> Problem:
        """Raises UserError where the memory lacks what the mode needs."""
        images, texts = _usable(mode, images, texts)
        proposed = [entries for entries in (texts, images if mode != "text" else None) if entries is not None]
        known: dict[int, str] = {}
        for entries in proposed:
            for class_id, name in zip(entries.class_ids.tolist(), entries.class_names, strict=True):
                known.setdefault(class_id, name)
        class_ids = np.array(sorted(known), np.int64)
        dim = proposed[0].vectors.shape[1]
        vectors = np.zeros((0, dim), np.float32) if images is None else np.asarray(images.vectors, np.float32)
        labels = columns_of(class_ids, np.zeros(0, np.int64) if images is None else images.class_ids)
        groups = groups_of(vectors, labels)
        folds, n_folds = _folds(groups, labels)
        each = [gaussian.moments_of(vectors, np.where(folds == fold, labels, -1), len(class_ids)) for fold in range(n_folds)]
        whole = sum(each[1:], each[0])
        kept = [whole - one for one in each]
        names, text, spread = None, None, 1.0
        if texts is not None:  # entries of one class (synonyms) are averaged
            sums = gaussian.moments_of(
                np.asarray(texts.vectors, np.float32), columns_of(class_ids, texts.class_ids), len(class_ids)
            )
            prototypes = gaussian.centroids(sums)
            names, (text, spread) = prototypes.weights, _standardised(prototypes, whole)
        ordered = [known[class_id] for class_id in class_ids.tolist()]
        scale = CLIP_LOGIT_SCALE * spread
        return cls(mode, class_ids, ordered, names, text, scale, vectors, labels, groups, folds, kept, whole)

    def parts(self, images: Moments) -> list[Part]:
        """The parts of the head, image part first, fitted on the given images of this memory."""
        text = [] if self.text is None else [self.text]
        if not self.has_image_part:
            return text
        return [_standardised(self._image_part(images), images)[0], *text]

    @property
    def n_groups(self) -> int:
        return len(np.unique(self.groups))

    @property
    def has_image_part(self) -> bool:
        return self.mode in ("centroid", "lda", "fused") and len(self.vectors) > 0

    def _image_part(self, images: Moments) -> Part:
        if not images.known.any():
            return Part(np.zeros(images.sums.shape, np.float32), np.zeros(len(images.sums), np.float32), images.known)
        if self.mode == "lda":
            return gaussian.discriminant(images, self.prior)
        if self.mode == "centroid":
            return gaussian.centroids(images)
        part = gaussian.posterior(images, self.prior, self.names)
        return replace(part, present=part.present & self.whole.known)  # a prediction competes badly with classes that were seen


def _usable(mode: Mode, images: Entries | None, texts: Entries | None) -> tuple[Entries | None, Entries | None]:
    """The entries that the mode looks at; None for an absent or empty kind. Raises UserError where too little is left."""
    images = images if images is not None and len(images) else None
    texts = texts if texts is not None and len(texts) and mode not in ("centroid", "knn") else None
    if images is None and texts is None and mode not in ("centroid", "knn"):
        raise UserError("the memory is empty: set memory.support or memory.classes and run `rar memory`")
    if mode in ("text", "tip") and texts is None:
        raise UserError(f"retriever.mode {mode} needs class names in the memory: set memory.classes and run `rar memory`")
    if mode in ("knn", "centroid", "tip", "lda") and images is None:
        raise UserError(f"retriever.mode {mode} needs support images in the memory: set memory.support and run `rar memory`")
    if images is not None and texts is not None and images.vectors.shape[1] != texts.vectors.shape[1]:
        raise UserError("image and text entries differ in dimension: rebuild the memory with one encoder")
    return images, texts


def columns_of(class_ids: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Class ids -> columns of the ascending `class_ids`; -1 where a class is not among them."""
    columns = np.minimum(np.searchsorted(class_ids, of), len(class_ids) - 1)
    return np.where(class_ids[columns] == of, columns, -1)


def _folds(groups: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """(N,) folds and their number: the groups of a class take turns, near duplicates share a fold.

    Classes start at different folds, so that one fold does not take the only image of every single-shot class.
    """
    known: dict[int, dict[int, int]] = {}
    positions = np.zeros(len(labels), np.int64)
    for row, (label, group) in enumerate(zip(labels.tolist(), groups.tolist(), strict=True)):
        own = known.setdefault(label, {})
        positions[row] = own.setdefault(group, len(own))
    shots = max(map(len, known.values()), default=1)
    n_folds = MAX_FOLDS if shots == 1 else min(MAX_FOLDS, shots)
    return (positions + labels) % n_folds, n_folds


def _standardised(part: Part, images: Moments) -> tuple[Part, float]:
    """The part in units of the spread of its scores over `images`, and that spread; what all classes share does not count."""
    n_images = images.counts.sum()
    if n_images == 0 or not part.present.any():
        return part, 1.0
    mean = images.sums.sum(axis=0) / n_images
    covariance = (images.gram / n_images - np.outer(mean, mean)).astype(np.float32)
    centred = _known(part) - _mean(part)
    variance = float(np.vdot(centred.T @ centred, covariance)) / len(centred)
    spread = variance**0.5 if variance > TINY else 1.0
    return Part(part.weights / np.float32(spread), part.bias / np.float32(spread), part.present), spread


@dataclass(frozen=True)
class Fitted:
    """What turns the parts of a problem into a head."""

    problem: Problem
    scales: np.ndarray  # (P,) of the parts
    neutrals: np.ndarray  # (P,) see _neutral
    biases: np.ndarray  # (C,)
    fold_biases: np.ndarray  # (folds, C) the same without what each fold says
    meta: dict[str, Any]


def combine(parts: list[Part], fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, D) and bias (C,) of the scaled sum; one absent from a part takes the mean of the present, plus `neutral`."""
    weights, bias = np.zeros(parts[0].weights.shape, np.float32), np.zeros(parts[0].bias.shape, np.float32)
    for part, scale, neutral in zip(parts, fitted.scales, fitted.neutrals, strict=True):
        if not part.present.any():
            continue
        known = part.weights if part.present.all() else np.where(part.present[:, None], part.weights, _mean(part))
        weights += np.float32(scale) * known
        bias += np.where(part.present, scale * part.bias, scale * part.bias[part.present].mean() + neutral)
    return weights, bias


def _known(part: Part) -> np.ndarray:
    """The weights of the classes that are present."""
    return part.weights if part.present.all() else part.weights[part.present]


def _mean(part: Part) -> np.ndarray:
    return _known(part).mean(axis=0)


def fit(problem: Problem, seed: int) -> Fitted:
    """Everything fitted, with the covariance prior of the least held-out NLL."""
    shots = problem.whole.counts.max(initial=0)  # at two, fold heads have no residuals
    priors = COVARIANCE_PRIORS if problem.mode in ("fused", "lda") and shots > 2 else COVARIANCE_PRIORS[:1]
    fitted = [_fit_scales(replace(problem, prior=prior), seed) for prior in priors]
    return min(fitted, key=lambda each: each.meta["held_out_nll"])


def _fit_scales(problem: Problem, seed: int) -> Fitted:
    """Scales, neutrals and biases of the parts by the NLL of held-out images, and the head's meta.

    The fit is pulled to defaults, which stand where no image can tell: CLIP's own scale for text, IMAGE_SCALE for images; of
    both together, what text has alone, and for images a quarter of what either has alone (they are standardised).
    """
    labelled = np.flatnonzero(problem.labels >= 0)
    limit = max(MIN_HELD_OUT, min(MAX_HELD_OUT, MAX_HELD_OUT_CELLS // len(problem.class_ids)))
    rows = np.sort(np.random.default_rng(seed).permutation(labelled)[:limit])
    scores, present, usable = _held_out_parts(problem, rows)
    truth = problem.labels[rows]
    defaults = [IMAGE_SCALE] * problem.has_image_part + [problem.text_default] * (problem.text is not None)
    alone = [_fit_known(scores[[i]], present[[i]], truth, usable, [one], [1.0]) for i, one in enumerate(defaults)]
    scales, meta = alone[0]
    if len(alone) == 2:
        image, text = (max(float(each[0]), TINY) for each, _ in alone)
        scales, meta = _fit_known(scores, present, truth, usable, [max(image, text), text], [0.25, 1.0])
    neutrals = np.array([_neutral(s * part, known, truth) for s, part, known in zip(scales, scores, present, strict=True)])
    meta = {"mode": problem.mode, "scales": scales.tolist(), "prior": problem.prior, **meta, "groups": problem.n_groups}
    nothing = np.zeros(len(problem.class_ids))
    fitted = Fitted(problem, scales, neutrals, nothing, np.tile(nothing, (len(problem.kept), 1)), meta)
    return _with_biases(fitted, scores, present, rows[usable], usable) if problem.mode == "fused" else fitted


def _held_out_parts(problem: Problem, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (P, n, C) of the rows by parts fitted without their fold, 0 where a part lacks the class; (P, n, C) bool, where
    it does not; and (n,) bool, which rows to fit on: those whose class keeps an image, or all where none does.
    """
    n_parts = problem.has_image_part + (problem.text is not None)
    scores = np.zeros((n_parts, len(rows), len(problem.class_ids)))
    present = np.zeros(scores.shape, bool)
    usable = np.zeros(len(rows), bool)
    for fold in np.unique(problem.folds[rows]).tolist():
        inside = problem.folds[rows] == fold
        usable[inside] = problem.kept[fold].known[problem.labels[rows[inside]]]
        for index, part in enumerate(problem.parts(problem.kept[fold])):
            scores[index, inside] = (problem.vectors[rows[inside]] @ part.weights.T + part.bias) * part.present
            present[index, inside] = part.present
    if not problem.has_image_part or not usable.any():
        usable[:] = True
    return scores, present, usable


def _fit_known(
    scores: np.ndarray, present: np.ndarray, truth: np.ndarray, usable: np.ndarray, units: list[float], default: list[float]
) -> tuple[np.ndarray, dict]:
    """Scales fitted on usable images whose class every part knows, among the classes that every part knows; and how well.

    The fit is pulled to the default, in `units`: scales that are worth one another, so that the pull is the same for any.
    """
    shared = np.logical_and.reduce(present)
    rows = np.flatnonzero(usable & shared[np.arange(len(truth)), truth])
    penalty, truth = np.where(shared[rows], 0.0, -np.inf), truth[rows]
    scores = scores[:, rows] * np.array(units)[:, None, None]
    multiples = fit_weights(scores, penalty, truth, np.array(default), SCALE_PRIOR)
    logits = np.tensordot(multiples, scores, 1) + penalty
    nll = log_sum_exp(logits) - logits[np.arange(len(rows)), truth]
    quality = np.mean([nll, logits.argmax(axis=1) == truth], axis=1).tolist() if len(rows) else [0.0, 0.0]
    return multiples * units, {"held_out": len(rows), "held_out_nll": quality[0], "held_out_top1": quality[1]}


def _neutral(logits: np.ndarray, present: np.ndarray, truth: np.ndarray) -> float:
    """How far the log of the mean likelihood of an image's wrong classes lies above their mean logit, averaged over images.

    A class that a part does not know is taken for an average wrong class there: mean logit plus this. 0 without images.
    """
    wrong = present & (truth[:, None] != np.arange(present.shape[1]))
    logits, wrong = logits[wrong.any(axis=1)], wrong[wrong.any(axis=1)]
    counts = wrong.sum(axis=1)
    if not len(counts):
        return 0.0
    log_mean = log_sum_exp(np.where(wrong, logits, -np.inf)) - np.log(counts)
    return float((log_mean - np.where(wrong, logits, 0.0).sum(axis=1) / counts).mean())


def _with_biases(fitted: Fitted, scores: np.ndarray, present: np.ndarray, rows: np.ndarray, usable: np.ndarray) -> Fitted:
    """Adds log((seen + prior) / (expected + prior)) a class: how often it is right, over the sum of its probabilities.

    Those of a fold come from the images of the others.
    """
    folds, truth = fitted.problem.folds[rows], fitted.problem.labels[rows]
    logits = np.zeros((len(rows), len(fitted.biases)))
    for part, known, scale, neutral in zip(scores, present, fitted.scales, fitted.neutrals, strict=True):
        part, known = scale * part[usable], known[usable]
        mean = part.sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
        logits += np.where(known, part, mean + neutral)
    chances = np.exp(logits - log_sum_exp(logits)[:, None])
    member = folds[None] == np.arange(len(fitted.fold_biases))[:, None]  # (folds, n)
    seen = np.stack([np.bincount(truth[inside], minlength=logits.shape[1]) for inside in member])
    expected = member @ chances
    total = _bias(seen.sum(axis=0), expected.sum(axis=0))
    return replace(fitted, biases=total, fold_biases=_bias(seen.sum(axis=0) - seen, expected.sum(axis=0) - expected))


def _bias(seen: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """0 for a class without a held-out image: it is not by its fault that none was seen."""
    return np.where(seen > 0, np.log((seen + BIAS_PRIOR) / (np.maximum(expected, 0) + BIAS_PRIOR)), 0.0)
