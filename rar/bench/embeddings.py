"""Vectors to measure a memory with: drawn ones of any size, recorded ones, and what the exact answer is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

K = 10
BLOCK = 10_000
SHOTS = 20  # entries drawn around a centre
SHARES = (0.65, 0.2, 0.15)  # of the squared norm: what all vectors share, the centres, the entries around them
DECAY = -0.6  # standard deviation of the i-th principal direction: i^DECAY
NEAR = 1e-6  # float32 noise of a score


@dataclass(frozen=True)
class Work:
    """Entries (N, D) and queries (Q, D), float32 of unit norm; kth (Q,): the exact score of each query's K-th neighbor."""

    entries: np.ndarray
    queries: np.ndarray
    kth: np.ndarray

    @classmethod
    def of(cls, entries: np.ndarray, queries: np.ndarray) -> Work:
        return cls(entries, queries, kth_scores(entries, queries))

    def recall(self, found: np.ndarray) -> float:
        """recall@K of rows found (Q, K), -1 for none: the part whose exact score reaches the exact K-th (ann-benchmarks)."""
        scores = np.stack([self.entries[rows] @ query for rows, query in zip(found, self.queries, strict=True)])
        return float(np.mean((scores >= self.kth[:, None] - NEAR) & (found >= 0)))


def drawn(rows: int, dim: int, queries: int) -> Work:
    """Vectors that lie as CLIP's do, made block by block, the same ones in every run.

    SHARES and DECAY follow the CLIP ViT-B/16 image memories of birds, cars and dogs: there 0.64 to 0.73 of the squared norm is
    the mean vector, 0.10 to 0.15 lies within the classes, and variances fall as i^-1.3 to i^-1.5 (i^-1.1 for MobileNet).
    """
    spread = np.arange(1, dim + 1) ** DECAY
    spread /= np.linalg.norm(spread)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
    total = rows + queries
    vectors = np.empty((total, dim), np.float32)
    for start in range(0, total, BLOCK):
        random, size = np.random.default_rng([1, start]), min(BLOCK, total - start)
        centres, around = (random.normal(size=(count, dim)) * spread for count in (BLOCK // SHOTS, size))
        shared, between, within = np.sqrt(SHARES)
        raw = between * centres[random.integers(len(centres), size=size)] + within * around
        raw[:, -1] += shared  # a direction with little else in it
        vectors[start : start + size] = _unit(raw @ rotation)
    asked = np.linspace(0, total - 1, queries).astype(int)
    return Work.of(np.delete(vectors, asked, axis=0), vectors[asked])


def recorded(data: Path) -> dict[str, Work]:
    """The arrays `embeddings` of all .npz files below a folder, those of one folder and dimension together.

    A tenth of the vectors, at most 512, are the queries.
    """
    parts = defaultdict(list)
    for file in sorted(data.rglob("*.npz")):
        with np.load(file) as arrays:
            if "embeddings" in arrays:
                part = _unit(arrays["embeddings"].astype(np.float32))
                parts[file.parent.name, part.shape[1]].append(part)
    works = {}
    for (name, _), found in parts.items():
        vectors = np.random.default_rng(0).permutation(np.concatenate(found))
        asked = min(512, -(-len(vectors) // 10))
        works[name] = Work.of(vectors[asked:], vectors[:asked])
    return works


def kth_scores(entries: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(Q,) the K-th greatest inner product of each query."""
    best = np.full((len(queries), K), -np.inf, np.float32)
    for start in range(0, len(entries), BLOCK):
        scores = np.concatenate([best, queries @ entries[start : start + BLOCK].T], axis=1)
        best = np.partition(scores, -K, axis=1)[:, -K:]
    return best[:, 0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
