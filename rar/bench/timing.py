"""Paired timing: ours and the reference take turns in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def paired(ours: Callable[[], object], reference: Callable[[], object], amount: float, repeats: int = 5) -> dict[str, float]:
    """Throughputs (amount / seconds, medians over `repeats`) of two ways to do `amount` of the same work, and their ratio.

    The ratio is the median of the ratios of neighbouring runs; `ratio_low` and `ratio_high` are the least and the greatest.
    Which goes first alternates. One run of each beforehand is not counted.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-1, repeats):
        order = (0, 1) if repeat % 2 else (1, 0)
        for which in order:
            taken = _seconds((ours, reference)[which])
            if repeat >= 0:
                seconds[which].append(taken)
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]
    mine, theirs = (amount / statistics.median(runs) for runs in seconds)
    return {
        "ours": mine,
        "reference": theirs,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "repeats": repeats,
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
