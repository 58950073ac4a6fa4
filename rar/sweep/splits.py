"""Base and novel classes of a data set side by side, with their harmonic mean: the new recognised without losing the known.

Two data sets of a grid belong together where their corpora differ in `classes: base` and `classes: novel` alone. An arm's base
cells stand beside its novel ones of the same shots and seeds; beside names alone (0 shots) where the novel data set has no such
shots, which is CoOp's way: no picture of a novel class is shown. H is of the means over seeds, and in the average over data
sets of the means over these, as CoCoOp's tables have it. Its interval resamples the classes of both halves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rar.evaluation import intervals, metrics
from rar.sweep.board import Result, arm_of
from rar.sweep.grid import Cell, Grid, merged


@dataclass(frozen=True)
class Split:
    """An arm on both halves. base, novel: (1 + R,) accuracies: as measured, then R resampled (0: too few classes for that)."""

    dataset: str
    shots: int
    arm: str
    seeds: int
    base: np.ndarray
    novel: np.ndarray

    def harmonic(self) -> tuple[float, float, float]:
        """(H, ci_low, ci_high), fractions; the bounds are NaN where nothing is resampled."""
        every = metrics.harmonic_mean(self.base, self.novel)
        low, high = np.quantile(every[1:], [0.025, 0.975]) if len(every) > 1 else (np.nan, np.nan)
        return float(every[0]), float(low), float(high)


def splits(grid: Grid, found: Sequence[Result]) -> list[Split]:
    """A row for each pair of data sets, shot count and arm that has cells of both; then the averages over two pairs or more."""
    by_cell = {one.cell: one for one in found if len(one.correct)}
    kinds = dict.fromkeys(replace(cell, dataset="", shots=0, seed=0) for cell in by_cell)
    rows = []
    for number, (base, novel) in enumerate(_pairs(grid)):
        for shots in _shots(grid, base):
            for kind in kinds:
                halves = [_cells(grid, kind, dataset, shots) for dataset in (base, novel)]
                both = [pair for pair in zip(*halves, strict=True) if by_cell.keys() >= set(pair)]
                if not both:
                    continue
                # seeded by pair and half, so that arms meet the same resamples, and nothing else does
                values = [_accuracy([by_cell[pair[half]] for pair in both], [number, half]) for half in (0, 1)]
                rows.append(Split(f"{base} / {novel}", shots, arm_of(grid, kind), len(both), *values))
    return rows + _averages(rows)


def _pairs(grid: Grid) -> Iterator[tuple[str, str]]:
    halves: dict[str, dict[str, list[str]]] = {}
    for name, one in grid.datasets.items():
        corpus = merged(grid.base.get("corpus", {}), one.config.get("corpus", {}))
        which = str(corpus.pop("classes", "all"))
        halves.setdefault(json.dumps(corpus, sort_keys=True), {}).setdefault(which, []).append(name)
    for parts in halves.values():
        yield from ((base, novel) for base in parts.get("base", []) for novel in parts.get("novel", []))


def _shots(grid: Grid, dataset: str) -> list[int]:
    return grid.datasets[dataset].shots or grid.shots


def _cells(grid: Grid, kind: Cell, dataset: str, shots: int) -> list[Cell]:
    """One a seed, as `grid.cells` makes them."""
    drawn = grid.arms[kind.arm].per_shots
    count = shots if drawn and shots in _shots(grid, dataset) else 0
    return [replace(kind, dataset=dataset, shots=count, seed=seed) for seed in (grid.seeds if drawn else grid.seeds[:1])]


def _accuracy(cells: Sequence[Result], seed: Sequence[int]) -> np.ndarray:
    correct, labels = (np.concatenate([getattr(one, name) for one in cells]) for name in ("correct", "labels"))
    return np.concatenate([[correct.mean()], intervals.resampled(correct, labels, seed)])


def _averages(rows: Sequence[Split]) -> list[Split]:
    """Over the pairs, for each shot count and arm that all of two or more have."""
    pairs, found = {row.dataset for row in rows}, []
    for shots, arm in dict.fromkeys((row.shots, row.arm) for row in rows):
        own = [row for row in rows if (row.shots, row.arm) == (shots, arm)]
        if len(own) < 2 or len(own) < len(pairs):
            continue
        length = min(len(half) for row in own for half in (row.base, row.novel))
        means = [np.mean([getattr(row, half)[:length] for row in own], axis=0) for half in ("base", "novel")]
        found.append(Split("average", shots, arm, max(row.seeds for row in own), *means))
    return found
