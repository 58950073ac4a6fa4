"""Fitting softmax weights: the one small convex problem behind the retriever's blend and the ranker's fusion."""

from __future__ import annotations

import numpy as np


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(N, K) -> (N,); a row of -inf alone gives -inf. np.logaddexp.reduce is the same, and several times slower."""
    most = np.maximum(logits.max(axis=1, keepdims=True), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        return (np.log(np.exp(logits - most).sum(axis=1, keepdims=True)) + most)[:, 0]


def fit_weights(scores: np.ndarray, penalty: np.ndarray, truth: np.ndarray, prior: np.ndarray, strength: float) -> np.ndarray:
    """Weights w >= 0 (P,) minimising the NLL of softmax(sum_p w_p scores_p + penalty) plus strength / 2 * |w - prior|^2.

    scores: (P, N, K) finite. penalty: (N, K), -inf where a column does not take part. truth: (N,) columns. Convex: projected
    Newton steps, halved until they pay; deterministic. Without images the prior comes back.
    """
    margins = scores - np.take_along_axis(scores, truth[None, :, None], axis=2)

    def evaluate(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and the chances (N, K), by one exponential."""
        logits = np.tensordot(weights, margins, 1) + penalty
        most = logits.max(axis=1, keepdims=True)
        np.exp(np.subtract(logits, most, out=logits), out=logits)
        sums = logits.sum(axis=1, keepdims=True)
        nll = float((np.log(sums) + most).sum())
        return nll + strength / 2 * float(((weights - prior) ** 2).sum()), np.divide(logits, sums, out=logits)

    weights = np.maximum(prior, 0.0)
    if not len(truth):
        return weights
    loss, chances = evaluate(weights)
    for _ in range(50):
        weighted = margins * chances
        means = weighted.sum(axis=2)
        gradient = means.sum(axis=1) + strength * (weights - prior)
        second = weighted.reshape(len(weights), -1) @ margins.reshape(len(weights), -1).T  # sums over images and columns
        hessian = second - means @ means.T + strength * np.eye(len(weights))
        free = (weights > 0) | (gradient < 0)
        step, size = np.zeros_like(weights), 1.0
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        before, known = weights, loss
        while size > 1e-9:
            weights = np.maximum(before - size * step, 0.0)
            loss, chances = evaluate(weights)
            if loss <= known:
                break
            size /= 2
        if np.abs(weights - before).max() < 1e-9:
            break
    return weights
