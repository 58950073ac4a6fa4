"""Paired timing: ours and the reference take turns in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def paired(
    ours: Callable[[], object], reference: Callable[[], object], amount: float, repeats: int = 5, less: float | None = None
) -> dict[str, float]:
    """Throughputs (amount / seconds, medians over `repeats`) of two ways to do `amount` of the same work, and their ratio.

    less: how much of it the reference does, where all would take too long. The ratio is the median of the ratios of
    neighbouring runs; `ratio_low` and `ratio_high` are the least and the greatest. Which goes first alternates. One run of each
    beforehand is not counted.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-1, repeats):
        order = (0, 1) if repeat % 2 else (1, 0)
        for which in order:
            taken = seconds_of((ours, reference)[which])
            if repeat >= 0:
                seconds[which].append(taken)
    return compared(*([done / taken for taken in runs] for done, runs in zip((amount, less or amount), seconds, strict=True)))


def compared(ours: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Throughputs of neighbouring runs: the medians, and the median, least and greatest of their ratios."""
    ratios = [mine / theirs for mine, theirs in zip(ours, reference, strict=True)]
    return {
        "ours": statistics.median(ours),
        "reference": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "repeats": len(ratios),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Of repeated runs: the median, the least and the greatest."""
    return {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
