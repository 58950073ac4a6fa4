from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.retriever.softmax import fit_weights, log_sum_exp


def problem(n_scores: int, n_images: int, n_columns: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy scores (P, N, K) that point at the truth, a penalty that hides a fifth of the other columns, and the truth (N,)."""
    rng = np.random.default_rng(seed)
    scores, truth = rng.normal(size=(n_scores, n_images, n_columns)), rng.integers(n_columns, size=n_images)
    scores[:, np.arange(n_images), truth] += rng.uniform(0, 2, n_scores)[:, None]
    penalty = np.where(rng.random((n_images, n_columns)) < 0.2, -np.inf, 0.0)
    penalty[np.arange(n_images), truth] = 0
    return scores, penalty, truth


def slow_loss(
    weights: np.ndarray, scores: np.ndarray, penalty: np.ndarray, truth: np.ndarray, prior: np.ndarray, strength: float
) -> float:
    """The definition, one image at a time."""
    total = strength / 2 * sum((weight - before) ** 2 for weight, before in zip(weights, prior, strict=True))
    for image, true in enumerate(truth):
        logits = sum(weight * one[image] for weight, one in zip(weights, scores, strict=True)) + penalty[image]
        total -= np.log(np.exp(logits[true]) / np.exp(logits).sum())
    return float(total)


def test_log_sum_exp_is_that_of_numpy() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 7)) * 300
    rows[:10, :6] = -np.inf
    rows[0] = -np.inf
    np.testing.assert_allclose(log_sum_exp(rows), np.logaddexp.reduce(rows, axis=1), rtol=1e-12)


def test_one_weight_by_hand() -> None:
    """Of images with scores (1, 0) three in four have the first class: w = log 3, whose softmax is 3/4 and 1/4."""
    scores = np.tile([1.0, 0.0], (1, 400, 1))
    truth = np.repeat([0, 1], [300, 100])
    found = fit_weights(scores, np.zeros((400, 2)), truth, np.zeros(1), 1e-9)
    assert found == pytest.approx([np.log(3)], abs=1e-6)


def test_without_images_the_prior_comes_back() -> None:
    prior = np.array([0.7, 1.5])
    found = fit_weights(np.zeros((2, 0, 4)), np.zeros((0, 4)), np.zeros(0, np.int64), prior, 1.0)
    assert found == pytest.approx(prior)


def test_scores_against_the_truth_get_no_weight() -> None:
    scores, penalty, truth = problem(1, 50, 4, 0)
    both = np.concatenate([scores, -scores])
    found = fit_weights(both, penalty, truth, np.full(2, 0.5), 0.01)
    assert found[0] > 0.5 and found[1] == 0


def test_a_strong_prior_holds() -> None:
    scores, penalty, truth = problem(2, 50, 4, 0)
    prior = np.array([3.0, 0.25])
    assert fit_weights(scores, penalty, truth, prior, 1e9) == pytest.approx(prior, abs=1e-6)


def test_hidden_columns_do_not_take_part() -> None:
    scores, _, truth = problem(2, 40, 3, 1)
    wide = np.concatenate([scores, np.full((2, 40, 1), 50.0)], axis=2)  # a column that would win everywhere
    penalty = np.zeros((40, 4))
    penalty[:, 3] = -np.inf
    narrow = fit_weights(scores, np.zeros((40, 3)), truth, np.zeros(2), 1.0)
    assert fit_weights(wide, penalty, truth, np.zeros(2), 1.0) == pytest.approx(narrow)


def test_a_constant_added_to_an_images_scores_changes_nothing() -> None:
    scores, penalty, truth = problem(2, 40, 3, 2)
    shift = np.random.default_rng(3).normal(size=(2, 40, 1)) * 100
    expected = fit_weights(scores, penalty, truth, np.zeros(2), 1.0)
    assert fit_weights(scores + shift, penalty, truth, np.zeros(2), 1.0) == pytest.approx(expected, abs=1e-6)


def test_separable_images_end_at_finite_weights() -> None:
    scores = np.zeros((1, 30, 3))
    truth = np.arange(30) % 3
    scores[0, np.arange(30), truth] = 1000.0
    found = fit_weights(scores, np.zeros((30, 3)), truth, np.zeros(1), 1.0)
    assert np.isfinite(found).all() and found[0] > 0


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 10.0]))
def test_no_step_away_is_better(n_scores: int, n_images: int, n_columns: int, seed: int, strength: float) -> None:
    """The loss is convex, so a point that no small step along any axis improves is its minimum over weights >= 0."""
    scores, penalty, truth = problem(n_scores, n_images, n_columns, seed)
    prior = np.random.default_rng(seed).uniform(0, 2, n_scores)
    found = fit_weights(scores, penalty, truth, prior, strength)
    assert (found >= 0).all()
    least = slow_loss(found, scores, penalty, truth, prior, strength)
    for step in (1e-3, 0.1, 1.0):
        for axis in range(n_scores):
            for sign in (-step, step):
                near = found.copy()
                near[axis] = max(near[axis] + sign, 0.0)
                assert least <= slow_loss(near, scores, penalty, truth, prior, strength) + 1e-9
