"""Label priors of models whose liking is known, and position-consistency of rankers whose answer is obvious.

Not covered: whether a real model gets better (`rar bench rank` measures the miniature).
"""

from __future__ import annotations

import numpy as np
import pytest

from rar.ranker.debias import label_prior, log_softmax, position_consistency, prior_of
from rar.schema import Ranking, RankStatus, UserError

PICTURES = [np.zeros((1, 1, 3), np.uint8)] * 40
NAMES = [[f"{row}-{place}" for place in range(4)] for row in range(40)]


def test_prior_of_a_model_that_adds_a_constant_a_label():
    """Logits of candidate c under label j: its worth and the label's liking. The worth averages out, the liking stays."""
    liking = np.array([2.0, 0.0, -1.0])
    worth = np.random.default_rng(0).normal(0, 3, (5, 3))
    observed = [np.stack([log_softmax(np.roll(row, -shift) + liking) for shift in range(3)]) for row in worth]
    np.testing.assert_allclose(label_prior(observed), liking - liking.mean(), atol=1e-12)


def test_prior_of_shorter_lists_is_the_start_of_longer_ones():
    prior = {"2": [0.5, -0.5], "4": [3.0, 1.0, -1.0, -3.0]}
    np.testing.assert_allclose(prior_of(prior, 2), [0.5, -0.5])
    np.testing.assert_allclose(prior_of(prior, 3), [2.0, 0.0, -2.0])
    with pytest.raises(UserError, match="no lists of 5"):
        prior_of(prior, 5)


def by_name(images: list[np.ndarray], names: list[list[str]]) -> list[Ranking]:
    return [Ranking(tuple(np.argsort(listed)[::-1].tolist()), RankStatus.RANKED) for listed in names]


def by_place(images: list[np.ndarray], names: list[list[str]]) -> list[Ranking]:
    return [Ranking(tuple(range(len(listed))), RankStatus.RANKED) for listed in names]


def test_position_consistency():
    assert position_consistency(by_name, PICTURES, NAMES, seed=0) == 1
    assert position_consistency(by_place, PICTURES, NAMES, seed=0) == pytest.approx(1 / 4, abs=0.2)  # left in place by chance
    assert position_consistency(by_place, PICTURES, [listed[:1] for listed in NAMES], seed=0) == 1
    assert position_consistency(by_place, [], [], seed=0) == 1


def test_log_softmax():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([1000.0, 1000.0]))), [0.5, 0.5])
