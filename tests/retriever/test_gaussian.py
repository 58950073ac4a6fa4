from __future__ import annotations

import numpy as np
import pytest

from rar.retriever import gaussian
from rar.retriever.gaussian import Moments


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def clusters(n_classes: int, shots: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (N, D) float32 in clusters, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), shots)
    means = rng.normal(size=(n_classes, dim)) + 0.5
    return unit(means[labels] + 0.7 * rng.normal(size=(len(labels), dim))).astype(np.float32), labels


def moments(vectors: np.ndarray, labels: np.ndarray) -> Moments:
    return gaussian.moments_of(vectors, labels, int(labels.max()) + 1)


def residuals_of(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class means (C, D) and the within-class scatter (D, D), from the vectors themselves."""
    means = np.array([vectors[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    residuals = vectors - means[labels]
    return means, residuals.T @ residuals


def shrunk(scatter: np.ndarray, prior: float, residuals: int) -> np.ndarray:
    dim = len(scatter)
    share = prior * dim / (prior * dim + residuals)
    return (1 - share) * scatter / (np.trace(scatter) / dim) + share * np.eye(dim)


def test_moments_are_sums_and_leaving_out_is_a_subtraction() -> None:
    vectors, labels = clusters(4, 3, 5)
    labels[0] = -1  # an image that does not take part
    whole, kept = moments(vectors, labels), moments(vectors[4:], labels[4:])
    left_out = gaussian.moments_of(vectors[:4], labels[:4], 4)
    for name in ("gram", "sums", "counts"):
        np.testing.assert_allclose(getattr(whole - left_out, name), getattr(kept, name), atol=1e-12)
        np.testing.assert_allclose(getattr(kept + left_out, name), getattr(whole, name), atol=1e-12)
    np.testing.assert_allclose(whole.gram, vectors[1:].astype(np.float64).T @ vectors[1:], atol=1e-12)
    assert whole.counts.tolist() == [2, 3, 3, 3]


def test_centroids_are_unit_class_means() -> None:
    vectors = unit(np.array([[1, 0.1, 0], [1, -0.1, 0], [0, 1, 0.1], [0, 1, -0.1]]))
    part = gaussian.centroids(gaussian.moments_of(vectors, np.array([0, 0, 2, 2]), 3))
    np.testing.assert_allclose(part.weights, [[1, 0, 0], [0, 0, 0], [0, 1, 0]], atol=1e-12)
    assert part.present.tolist() == [True, False, True] and not part.bias.any()


def test_discriminant_is_the_log_density_up_to_what_all_classes_share() -> None:
    vectors, labels = clusters(5, 4, 6)
    means, scatter = residuals_of(vectors.astype(np.float64), labels)
    inverse = np.linalg.inv(shrunk(scatter, 0.5, 15))
    part = gaussian.discriminant(moments(vectors, labels), 0.5)
    queries = vectors[::3].astype(np.float64)
    density = np.array([[-(query - mean) @ inverse @ (query - mean) / 2 for mean in means] for query in queries])
    scores = queries @ part.weights.T + part.bias
    np.testing.assert_allclose(scores - scores[:, :1], density - density[:, :1], atol=1e-6)


def slow_posterior(vectors: np.ndarray, labels: np.ndarray, prior: float) -> np.ndarray:
    """(C, D) unit-length directions by full matrices: S, T, the posterior mean and the variance of a new image."""
    means, scatter = residuals_of(vectors, labels)
    (n_classes, dim), shots = means.shape, len(labels) // len(means)
    within = shrunk(scatter, prior, len(labels) - n_classes) * np.trace(scatter) / (dim * (len(labels) - n_classes))
    root = np.linalg.cholesky(within)
    gaps = np.linalg.solve(root, (means - means.mean(axis=0)).T * np.sqrt(n_classes / (n_classes - 1)))
    spread = gaps @ gaps.T / n_classes
    even = np.trace(spread) / dim
    share = gaussian.MEANS_PRIOR * dim / (gaussian.MEANS_PRIOR * dim + n_classes)
    values, axes = np.linalg.eigh((1 - share) * spread + share * even * np.eye(dim))
    between = root @ (axes * np.maximum(values - 1 / shots, 0.02 * even)) @ axes.T @ root.T
    gain = between @ np.linalg.inv(between + within / shots)
    offsets = (means - means.mean(axis=0)) @ gain.T
    predictive = within + between - gain @ between
    solved = np.linalg.solve(predictive, offsets.T).T
    return solved / np.sqrt((solved * offsets).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("n_classes", "dim"), [(5, 9), (20, 6)])
def test_posterior_is_bayes_rule_written_out(n_classes: int, dim: int) -> None:
    vectors, labels = clusters(n_classes, 4, dim)
    part = gaussian.posterior(moments(vectors, labels), 0.5)
    expected = slow_posterior(vectors.astype(np.float64), labels, 0.5)
    np.testing.assert_allclose(part.weights, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(part.bias, -expected @ moments(vectors, labels).means.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_class_of_few_images_is_pulled_closer_to_the_centre_than_one_of_many() -> None:
    """Two classes whose means point the same way in the noise: the one with a single image learns less of it."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 8)
    vectors = unit(np.eye(12)[labels] + 0.3 * rng.normal(size=(96, 12)))
    few = np.ones(96, bool)
    few[1:8] = False  # class 0 keeps one image
    one = gaussian.posterior(moments(vectors[few], labels[few]), 0.5)
    truth = np.eye(12)[0] - 1 / 12
    cosine_of_image = unit(vectors[0] - vectors.mean(axis=0)) @ unit(truth)
    assert unit(one.weights[0]) @ unit(truth) > cosine_of_image


def named_world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means that are a rotation of the names; the last ten classes have no image."""
    rng = np.random.default_rng(seed)
    names = unit(rng.normal(size=(40, 8)))
    means = names @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    labels = np.repeat(np.arange(30), 2)
    return unit(means[labels] + 0.1 * rng.normal(size=(60, 8))), labels, names


def test_names_place_classes_without_images() -> None:
    vectors, labels, names = named_world()
    rotation = np.linalg.lstsq(names[labels], vectors, rcond=None)[0]
    part = gaussian.posterior(gaussian.moments_of(vectors, labels, 40), 0.5, names)
    assert part.present.all()
    queries = unit(names[30:] @ rotation)
    assert ((queries @ part.weights.T + part.bias).argmax(axis=1) == np.arange(30, 40)).all()


def test_names_that_say_nothing_are_ignored() -> None:
    vectors, labels, names = named_world()
    images = gaussian.moments_of(vectors, labels, 40)
    noise = unit(np.random.default_rng(1).normal(size=names.shape))
    expected, gaps, named = gaussian._expected(images, noise)
    assert named.all()
    np.testing.assert_allclose(expected, np.tile(images.means.mean(axis=0), (40, 1)), atol=0.12)
    without = gaussian._expected(images, None)[1]
    assert (gaps**2).sum() == pytest.approx((without**2).sum(), rel=0.05)


def test_one_shot_has_no_residuals_and_copies_have_none_to_speak_of() -> None:
    vectors, labels = clusters(6, 1, 4)
    for repeated in (1, 3):
        images = moments(np.repeat(vectors, repeated, axis=0), np.repeat(labels, repeated))
        for part in (gaussian.posterior(images, 0.5), gaussian.discriminant(images, 0.5)):
            assert np.isfinite(part.weights).all() and np.isfinite(part.bias).all()
            assert ((vectors @ part.weights.T + part.bias).argmax(axis=1) == labels).all()


def test_one_class_is_finite() -> None:
    images = moments(unit(np.ones((2, 4))), np.zeros(2, np.int64))
    for part in (
        gaussian.posterior(images, 0.5),
        gaussian.discriminant(images, 0.5),
        gaussian.posterior(images, 0.5, np.eye(4)[:1]),
    ):
        assert np.isfinite(part.weights).all() and np.isfinite(part.bias).all()
