"""Which images of a memory are as good as one: people take several photos of a thing, and each vouches for the next.

Images of a class that are more alike than a threshold, or linked by such, are one group, left out as a whole wherever images of
the memory stand for new ones. The threshold comes from the data: nine in ten images are less like anything of another class
(PERCENTILE), so what is more alike within a class shows more than the same kind of scene. On the recorded grocery embeddings
1-NN without the image's group is right in .50 / .55 / .59 / .58 of the images at 4 / 8 / 16 / all shots, where the official
test photos give .487 / .528 / .574 / .60, and images left out one by one .70 / .84 / .94 / .98.

A likeness alone does not tell a burst from a class that the encoder knows well. So copies alone are grouped where fewer images
than BURSTY have a near duplicate (on CUB, cars and dogs, whose photos come one by one, 7 % or fewer have), and where most
classes would be one group; and a class that would be one group keeps its images apart, since nothing else could judge it. Cost:
well-known classes of single photos that lie between those are judged too low.
"""

from __future__ import annotations

import numpy as np

PERCENTILE = 90.0  # of images' cosines with the nearest image of another class
SAMPLE, BLOCK = 1024, 1024  # images that the threshold is taken from, and images compared with others at once
EDGES = 1 << 22  # pairs of like images in one graph, beyond those of one block
BURSTY = 0.2  # share of the images with a near duplicate from which a memory counts as one of bursts
MOST = 0.5  # share of the classes of several images that may be one group
COPY = 1 - 1e-6  # cosine of an image and its copy, to rounding


def groups_of(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, D) vectors and (N,) labels -> (N,) int64 numbers of groups, from 0; an image unlike all others is its own.

    Costs SAMPLE x N cosines, and those within each class.
    """
    if not len(vectors):
        return np.zeros(0, np.int64)
    unit = np.asarray(vectors, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[0]] - 1))
    rows, number = unit[order], np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
    threshold = _threshold(unit, labels)
    copies, bursts = (_linked(rows, starts, least) for least in (COPY, min(threshold, COPY)))
    several, one = (np.bincount(number[np.unique(found)]) for found in (copies, bursts))
    whole = (several > 1) & (one == 1)
    paired = np.count_nonzero(np.bincount(bursts)[bursts] > 1)
    told = paired >= BURSTY * len(labels) and whole.sum() <= MOST * (several > 1).sum()
    numbers = np.empty(len(labels), np.int64)
    numbers[order] = np.unique(np.where(told & ~whole[number], bursts, copies), return_inverse=True)[1]
    return numbers


def _threshold(unit: np.ndarray, labels: np.ndarray) -> float:
    """The PERCENTILE of cosines with the nearest image of another class; 1 where there is one class alone."""
    rows = np.random.default_rng(0).permutation(len(unit))[:SAMPLE]
    nearest = np.full(len(rows), -np.inf)
    for start in range(0, len(unit), BLOCK):
        block = slice(start, start + BLOCK)
        cosines = np.where(labels[rows][:, None] == labels[block][None], -np.inf, unit[rows] @ unit[block].T)
        nearest = np.maximum(nearest, cosines.max(axis=1))
    return float(np.percentile(nearest, PERCENTILE)) if np.isfinite(nearest).all() else 1.0


def _linked(unit: np.ndarray, starts: np.ndarray, least: float) -> np.ndarray:
    """(N,) the first row of the component that cosines above `least` make of each image (N, D) and others of its class.

    starts: (classes,) the first row of each class. One graph holds many classes, and is made anew with what is known so far
    where it grows beyond EDGES.
    """
    found, edges, count = np.arange(len(unit)), [], 0
    for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(unit)], strict=True):
        for start in range(first, last, BLOCK):
            near, others = np.nonzero(unit[start : min(start + BLOCK, last)] @ unit[first:last].T > least)
            if len(near) == min(BLOCK, last - start):  # each is like itself alone, as in most classes
                continue
            edges.append((near + start, others + first))
            count += len(near)
            if count > EDGES:
                found, edges, count = _joined(found, edges), [], 0
    return _joined(found, edges) if edges else found


def _joined(found: np.ndarray, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Components, as their first rows (N,), and more edges -> those of both."""
    ends = [np.concatenate(part) for part in zip(*edges, (np.arange(len(found)), found), strict=True)]
    from scipy.sparse import coo_array  # late: every process of a run imports this module, and few fit a head
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(ends[0]), np.int8), (ends[0], ends[1])), shape=(len(found), len(found)))
    _, first, inverse = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    return first[inverse]
