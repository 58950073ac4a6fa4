"""How sure an accuracy is, and whether two arms differ: 95 % intervals and exact tests, nothing that knows of runs.

- `wilson` treats images as independent draws: how would *these classes* fare on more images? A formula, no seed.
- `accuracy`, `mean_per_class` and `paired_difference` bootstrap whole classes, because errors cluster by class: how would other
  classes of this kind fare? It costs a seed and some time, and is too narrow with few classes.
- `resampled` gives the draws themselves, of which the interval of a number that is made of several accuracies is taken.
- `over_seeds` is about the draw of the shots: Student's t over the runs' means. It says nothing about other test images, so a
  page shows it beside a bootstrap, not in its place. With two seeds it is very wide, as it should be.
- `mcnemar` tests two arms on the same images, `sign_flip` on the same classes; `holm` corrects a family of such tests.
  McNemar's test takes images as independent; where classes are few, a claim rests on `paired_difference` instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 2000
FLIPS = 10_000
RESAMPLE_BLOCK = 2_000_000  # cluster draws held in memory at once

Flags = Sequence[bool] | np.ndarray
Groups = Sequence[str] | np.ndarray


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction (Wilson 1927); (nan, nan) for total = 0."""
    if total == 0:
        return math.nan, math.nan
    fraction = correct / total
    shrink = 1 + Z_95**2 / total
    centre = (fraction + Z_95**2 / (2 * total)) / shrink
    half = Z_95 / shrink * math.sqrt(fraction * (1 - fraction) / total + Z_95**2 / (4 * total**2))
    return min(fraction, max(0.0, centre - half)), max(fraction, min(1.0, centre + half))


def accuracy(correct: Flags, groups: Groups, seed: int) -> tuple[float, float, float]:
    """(accuracy, ci_low, ci_high) of N images, by the bootstrap over their classes that `paired_difference` describes."""
    return paired_difference(correct, np.zeros(len(correct), bool), groups, seed)


def paired_difference(correct_a: Flags, correct_b: Flags, groups: Groups, seed: int) -> tuple[float, float, float]:
    """(accuracy of a minus accuracy of b, ci_low, ci_high) on the same N images; 95 % percentile interval.

    groups: (N,) class of each image. A resample draws as many classes as there are, with replacement, and takes all images of
    each (the cluster bootstrap, Davison and Hinkley 1997, section 3.8); every image keeps both its outcomes. Methods that agree
    on every image give (0, 0, 0). Fewer than two classes say nothing about other classes: the bounds are NaN.
    """
    gain = np.asarray(correct_a, dtype=np.float64) - np.asarray(correct_b, dtype=np.float64)
    gains, sizes = _per_class(gain, groups)
    mean = float(gain.mean()) if len(gain) else math.nan
    return mean, *_percentiles([gains[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) for drawn in _draws(len(sizes), seed)])


def mean_per_class(correct: Flags, groups: Groups, seed: int) -> tuple[float, float, float]:
    """(mean over classes of each class's accuracy, ci_low, ci_high), by the same bootstrap over classes."""
    sums, sizes = _per_class(np.asarray(correct, dtype=np.float64), groups)
    accuracies = sums / sizes
    mean = float(accuracies.mean()) if len(accuracies) else math.nan
    return mean, *_percentiles([accuracies[drawn].mean(axis=1) for drawn in _draws(len(sizes), seed)])


def resampled(correct: Flags, groups: Groups, seed: int | Sequence[int]) -> np.ndarray:
    """(RESAMPLES,) accuracies by the same bootstrap, for what is made of several; empty for fewer than two classes."""
    sums, sizes = _per_class(np.asarray(correct, dtype=np.float64), groups)
    drawn = [sums[draw].sum(axis=1) / sizes[draw].sum(axis=1) for draw in _draws(len(sizes), seed)]
    return np.concatenate([np.zeros(0), *drawn])


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, ci_low, ci_high) of one accuracy a seed: Student's t. One seed says nothing of others: the bounds are NaN."""
    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def mcnemar(correct_a: Flags, correct_b: Flags) -> float:
    """Two-sided exact p value of McNemar's test (1947): do a and b err equally often on the same N images? 1 where they agree.

    Of the images that one gets right and the other wrong, either has the same chance to be the right one: a binomial test.
    """
    from scipy.stats import binomtest

    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} outcomes but {len(b)}")
    won, lost = int(np.sum(a & ~b)), int(np.sum(~a & b))
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def sign_flip(gains: Sequence[float] | np.ndarray, seed: int) -> float:
    """Two-sided p value of a mean of (C,) gains, one a class: were either arm as likely the better one in each class?

    A permutation test (Fisher 1935): the gains keep their sizes and FLIPS random signs are drawn, so that p is at least
    1 / (FLIPS + 1). Classes without a gain decide nothing. 1 where all are.
    """
    values = np.asarray(gains, np.float64)
    values = values[values != 0]
    if not len(values):
        return 1.0
    signs = np.random.default_rng(seed).integers(0, 2, size=(FLIPS, len(values)), dtype=np.int8) * 2 - 1
    extreme = np.abs(signs @ values) >= np.abs(values.sum()) - 1e-12
    return float((extreme.sum() + 1) / (FLIPS + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of a family of tests, in the given order (Holm 1979): below .05 is significant with all in view."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    stepped = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(order) else stepped
    return adjusted.tolist()


def _per_class(values: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values and counts, one a class."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(values) != len(group):
        raise ValueError(f"{len(values)} outcomes but {len(group)} groups")
    return np.bincount(group, weights=values, minlength=len(names)), np.bincount(group, minlength=len(names))


def _draws(classes: int, seed: int | Sequence[int]) -> Iterator[np.ndarray]:
    """RESAMPLES rows of class numbers with replacement, in blocks; none where there are fewer than two classes."""
    if classes < 2:
        return
    rng = np.random.default_rng(seed)
    block = max(1, RESAMPLE_BLOCK // classes)
    for start in range(0, RESAMPLES, block):
        yield rng.integers(classes, size=(min(block, RESAMPLES - start), classes))


def _percentiles(resampled: list[np.ndarray]) -> tuple[float, float]:
    if not resampled:
        return math.nan, math.nan
    low, high = np.quantile(np.concatenate(resampled), [0.025, 0.975])
    return float(low), float(high)
