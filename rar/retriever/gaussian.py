"""Classifiers in closed form from the moments of a set of images: class means, LDA, and posterior class means.

All are linear in the query. Everything they need of the images is a sum: moments of shards are added up, and leaving some
images out is a subtraction. Sums are kept in float64, because a within-class covariance is a small difference of large ones;
what is made of them, matrices of classes x D, is float32, and goes through BLAS as a whole.

The within-class covariance S is shrunk towards the identity. Class means of a few images are noisy, so `posterior` shrinks them
too, direction by direction: by how much more the class means spread there than their noise explains, and not towards one common
mean but, where names are known, towards what the name predicts. Classes are then compared by cosine under S, as the length of a
mean of few images says more about the noise than about the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TINY, BLOCK = 1e-12, 8192  # the latter: images cast to float64 at a time
MEANS_PRIOR = 8.0  # equal spread in all directions counts as this many class means a dimension
NOISE_SHARE = 0.5  # of the variance of single images that lies within classes, where no class has two images to tell
RIDGES = (0.1, 1.0, 10.0, np.inf)  # of the map from names to class means, in mean variances of the names


@dataclass(frozen=True)
class Moments:
    """Of a set of images with labels: gram (D, D) sum of x x'; sums (C, D) of each class's x; counts (C,)."""

    gram: np.ndarray
    sums: np.ndarray
    counts: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.sums + other.sums, self.counts + other.counts)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.gram - other.gram, self.sums - other.sums, self.counts - other.counts)

    @cached_property
    def known(self) -> np.ndarray:
        """(C,) bool: the classes that have an image."""
        return self.counts > 0

    @cached_property
    def rows(self) -> np.ndarray | slice:
        """What picks them; where all are known a slice, which copies nothing."""
        return slice(None) if self.known.all() else self.known

    @cached_property
    def means(self) -> np.ndarray:
        """(known classes, D) float32."""
        return (self.sums[self.rows] / self.counts[self.rows, None]).astype(np.float32)

    def expected_by(self, names: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_expected` gives, for the differences their scatter (D, D) a class; kept, as it is the same for every prior."""
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] is not names:
            expected, gaps, named = _expected(self, names)
            kept = self.__dict__["_kept"] = names, (expected, (gaps.T @ gaps / len(gaps)).astype(np.float64), named)
        return kept[1]

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Eigenvalues (D,) and eigenvectors (D, D) of the within-class covariance at mean variance 1, and its residuals.

        0 eigenvalues where the images have no residuals to speak of: one image a class, or copies of it.
        """
        counts, sums = self.counts[self.rows].astype(np.float64), self.sums[self.rows]
        between = np.zeros_like(self.gram)
        for start in range(0, len(counts), BLOCK):  # exact sums: float64, a block at a time
            block = sums[start : start + BLOCK]
            between += (block / counts[start : start + BLOCK, None]).T @ block
        values, basis = np.linalg.eigh(self.gram - between)
        if values.sum() <= TINY * np.trace(self.gram):
            return np.zeros(len(basis)), np.eye(len(basis)), 0
        return np.maximum(values, 0) / values.mean(), basis, int(self.counts.sum() - self.known.sum())


@dataclass(frozen=True)
class Part:
    """A linear classifier of unspecified scale: weights (C, D), bias (C,); rows where `present` is false hold nothing."""

    weights: np.ndarray
    bias: np.ndarray
    present: np.ndarray


def moments_of(vectors: np.ndarray, labels: np.ndarray, n_classes: int) -> Moments:
    """Moments of the (N, D) images whose label is not -1, in blocks, so that float64 copies stay small. Add those of shards."""
    from scipy.sparse import csr_array  # late, as in bursts

    dim = vectors.shape[1]
    gram, sums = np.zeros((dim, dim)), np.zeros((n_classes, dim))
    rows = np.flatnonzero(labels >= 0)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        values = vectors[block].astype(np.float64)
        gram += values.T @ values
        found, place = np.unique(labels[block], return_inverse=True)
        sums[found] += csr_array((np.ones(len(block)), (place, np.arange(len(block)))), (len(found), len(block))) @ values
    return Moments(gram, sums, np.bincount(labels[rows], minlength=n_classes))


def centroids(images: Moments) -> Part:
    """Class means, re-normalised."""
    weights = images.sums / np.maximum(np.linalg.norm(images.sums, axis=1, keepdims=True), TINY)
    return Part(weights.astype(np.float32), np.zeros(len(weights), np.float32), images.known)


def discriminant(images: Moments, prior: float) -> Part:
    """Textbook LDA with equal class priors: w = S^-1 d, bias = -w . (centre + d / 2), d = class mean - centre."""
    variances, basis = _within(images, prior)
    centre = images.means.mean(axis=0)
    offsets = images.means - centre
    weights, bias = np.zeros(images.sums.shape, np.float32), np.zeros(len(images.sums), np.float32)
    weights[images.rows] = offsets @ ((basis / variances) @ basis.T).astype(np.float32)
    bias[images.rows] = -np.einsum("cd,cd->c", weights[images.rows], centre + offsets / 2)
    return Part(weights, bias, images.known)


def posterior(images: Moments, prior: float, names: np.ndarray | None = None) -> Part:
    """Posterior class means, centred, whitened with the variance of a new image, and compared by cosine (see the module).

    names: (C, D) a text vector a class, 0 where it has none; classes without images then have what their name predicts.
    With x | mean ~ N(mean, S) and mean ~ N(expected, T), T the spread of the class means about the expected ones (both in
    the basis where S is the identity and T diagonal), the mean of n images with average a is expected + nT / (nT + 1) (a -
    expected) and a new image of the class has variance 1 + T / (nT + 1).
    """
    variances, basis = _within(images, prior)
    whiten = basis / np.sqrt(variances * _noise(images))
    expected, scatter, named = images.expected_by(names)
    spread, axes = np.linalg.eigh(whiten.T @ scatter @ whiten)
    turn, spread = (whiten @ axes).astype(np.float32), np.maximum(spread, 0).astype(np.float32)
    counts = images.counts[images.rows, None].astype(np.float32)
    even, noise = spread.mean(), (1 / counts).mean()
    share = MEANS_PRIOR * len(basis) / (MEANS_PRIOR * len(basis) + len(counts))
    between = np.maximum((1 - share) * spread + share * even - noise, 0.02 * even)
    found = expected @ turn
    gain = counts * between / (counts * between + 1)
    found[images.rows] += (images.means @ turn - found[images.rows]) * gain
    present = images.known | named
    centre = (found if present.all() else found[present]).mean(axis=0)
    found -= centre
    solved = found / (1 + between / (between / noise + 1))
    solved /= np.sqrt(np.maximum(np.einsum("cd,cd->c", solved, found), TINY))[:, None]
    return Part(solved @ turn.T, -solved @ centre, present)


def _within(images: Moments, prior: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of S at mean variance 1: the identity counts as prior * D residuals.

    (The mean of an inverse-Wishart posterior: less shrinkage as the memory grows.) Without residuals it is the identity.
    """
    values, basis, residuals = images.spectrum
    share = prior * len(values) / (prior * len(values) + residuals)
    return (1 - share) * values + share, basis


def _noise(images: Moments) -> float:
    """Variance a dimension of an image about its class mean."""
    total = np.trace(images.gram)
    residuals = int(images.counts.sum() - images.known.sum())
    within = total - (np.einsum("cd,cd->c", images.sums, images.sums) / np.maximum(images.counts, 1)).sum()
    if residuals and within > TINY * total:
        return within / residuals / len(images.gram)
    spread = ((images.means - images.means.mean(axis=0)) ** 2).mean()
    return max(NOISE_SHARE * spread, TINY)


def _expected(images: Moments, names: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means (C, D) before any of the class's own images is seen, what the means of the known classes differ by, and
    which classes (C,) bool a name speaks for.

    Ridge regression of class means on names; the differences are leave-one-class-out, and the ridge is that of the least.
    """
    names = None if names is None else np.asarray(names, np.float32)
    centre, n_known = images.means.mean(axis=0), len(images.means)
    offsets = images.means - centre
    expected = np.tile(centre, (len(images.counts), 1))
    gaps = offsets * np.sqrt(n_known / max(n_known - 1, 1))
    nothing = np.zeros(len(expected), bool)
    if names is None:
        return expected, gaps, nothing
    named = (names != 0).any(axis=1)
    both = named & images.known
    inside = both[images.known]
    if both.sum() < 3:
        return expected, gaps, nothing
    middle = names[both].mean(axis=0)
    about = names[both] - middle
    variances, axes = (one.astype(np.float32) for one in _principal(about))  # where the ridge regression is diagonal
    along = about @ axes
    targets, best, chosen = offsets[inside] - offsets[inside].mean(axis=0), np.inf, np.zeros(0)
    squares, together = along**2, along.T @ targets
    for ridge in RIDGES:
        each = 1 / np.maximum(len(along) * (variances + ridge * variances.mean()), TINY).astype(np.float32)
        slopes = each[:, None] * together
        missed = (targets - along @ slopes) / np.maximum(1 - (squares @ each + 1 / len(along)), 0.05)[:, None]
        if (loss := float(np.einsum("nd,nd->", missed, missed))) < best:
            best, gaps[inside], chosen = loss, missed, slopes
    expected[named] = images.means[inside].mean(axis=0) + (names[named] - middle) @ (axes @ chosen)
    return expected, gaps, named


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances (r,) and axes (D, r) of (C, D) rows about 0, r = min(C, D), by the smaller of the two Gram matrices."""
    n_rows, dim = rows.shape
    if n_rows >= dim:
        variances, axes = np.linalg.eigh(rows.T @ rows / n_rows)
        return np.maximum(variances, 0), axes
    variances, left = np.linalg.eigh(rows @ rows.T / n_rows)
    kept = variances > TINY * max(variances.max(initial=0), TINY)
    return variances[kept], rows.T @ left[:, kept] / np.sqrt(variances[kept] * n_rows)
