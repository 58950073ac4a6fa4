"""Intervals and tests of accuracies against slow versions of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.evaluation.intervals import (
    accuracy,
    holm,
    mcnemar,
    mean_per_class,
    over_seeds,
    paired_difference,
    wilson,
)


def test_wilson_matches_the_published_example() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_the_fraction_inside_0_and_1(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def slow_paired_difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The bootstrap as its definition reads: draw classes, take all images of each, look at the spread."""
    rng = np.random.default_rng(1)
    members = {name: np.flatnonzero(groups == name) for name in np.unique(groups)}
    differences = []
    for _ in range(2000):
        rows = np.concatenate([members[name] for name in rng.choice(list(members), len(members))])
        differences.append(a[rows].mean() - b[rows].mean())
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def test_paired_difference_agrees_with_the_obvious_loop() -> None:
    rng = np.random.default_rng(0)
    common = rng.random(400) < 0.5  # one class holds half of the images and gains the most
    groups = np.where(common, "class 0", rng.choice([f"class {i}" for i in range(30)], size=400))
    a, b = rng.random(400) < np.where(common, 0.9, 0.6), rng.random(400) < 0.6
    difference, low, high = paired_difference(a, b, groups, seed=3)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(slow_paired_difference(a, b, groups), abs=0.02)
    assert paired_difference(a, b, groups, seed=3) == (difference, low, high)


def test_errors_that_cluster_by_class_widen_the_interval() -> None:
    groups = np.repeat([f"class {i}" for i in range(20)], 20)
    by_class = np.repeat(np.arange(20) < 10, 20)  # a is right on ten whole classes, b on none
    scattered = np.tile(np.arange(20) < 10, 20)
    nothing = np.zeros(400, bool)
    _, low, high = paired_difference(by_class, nothing, groups, seed=0)
    _, narrow_low, narrow_high = paired_difference(scattered, nothing, groups, seed=0)
    assert high - low > 0.3 and narrow_high - narrow_low < 1e-9


def test_paired_difference_at_the_edges() -> None:
    assert paired_difference([True, False], [True, False], ["a", "b"], seed=0) == (0, 0, 0)
    difference, low, high = paired_difference([True], [False], ["a"], seed=0)
    assert difference == 1 and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="2 outcomes but 1 groups"):
        paired_difference([True, True], [False, False], ["a"], seed=0)


def test_accuracy_over_classes_is_a_difference_to_nothing() -> None:
    rng = np.random.default_rng(4)
    groups, correct = rng.choice(list("abcdefgh"), 200), rng.random(200) < 0.7
    value, low, high = accuracy(correct, groups, seed=1)
    assert value == pytest.approx(correct.mean())
    assert (low, high) == pytest.approx(slow_paired_difference(correct, np.zeros(200), groups), abs=0.02)


def test_mean_per_class_gives_small_classes_the_same_say() -> None:
    """One big class all right, two of one image each wrong; the interval by drawing classes one resample after the other."""
    groups = np.array(["big"] * 98 + ["small", "tiny"])
    correct = groups == "big"
    value, low, high = mean_per_class(correct, groups, seed=0)
    assert value == pytest.approx(1 / 3) and (low, high) == (0, 1)
    assert accuracy(correct, groups, seed=0)[0] == 0.98
    rng = np.random.default_rng(0)
    groups, correct = rng.choice([f"class {number}" for number in range(40)], 500), rng.random(500) < 0.6
    each = {name: correct[groups == name].mean() for name in np.unique(groups)}
    drawn = [np.mean(rng.choice(list(each.values()), len(each))) for _ in range(2000)]
    value, low, high = mean_per_class(correct, groups, seed=0)
    assert value == pytest.approx(np.mean(list(each.values())))
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_over_seeds_is_students_t() -> None:
    """Of 1, 2, 3: mean 2, sd 1, t(.975, 2) = 4.3027 (any table), half-width 4.3027 / sqrt(3)."""
    mean, low, high = over_seeds([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert over_seeds([0.7])[0] == 0.7 and math.isnan(over_seeds([0.7])[1]) and math.isnan(over_seeds([])[0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_against_counting_coin_tosses(pairs: list[tuple[bool, bool]]) -> None:
    """The chance that fair coins, one for each image that the arms disagree on, fall at least as unevenly as seen."""
    won, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    tosses = won + lost
    uneven = [heads for heads in range(tosses + 1) if abs(2 * heads - tosses) >= abs(won - lost)]
    expected = sum(math.comb(tosses, heads) for heads in uneven) / 2**tosses
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    assert mcnemar(a, b) == pytest.approx(expected) == mcnemar(b, a)


def test_mcnemar_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="2 outcomes but 1"):
        mcnemar([True, False], [True])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_against_its_stepwise_rule(p_values: list[float]) -> None:
    """Reject the smallest while p <= level / (tests left): an adjusted p is the smallest level that rejects it."""
    adjusted = holm(p_values)
    for level in (0.001, 0.01, 0.05, 0.2, 0.7):
        rejected: set[int] = set()
        for place, number in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
            if p_values[number] * (len(p_values) - place) > level:
                break
            rejected.add(number)
        assert {number for number, p in enumerate(adjusted) if p <= level} == rejected


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
