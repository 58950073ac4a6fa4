"""What fitting a head costs by the number of classes: seconds and memory of `modes.fit_head`, each in a process of its own.

Vectors are drawn around a centre a class, and so are the names'. Nothing is read from a store: that is in `rar bench scale`.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rar.bench.server import memory_mib
from rar.memory.entries import Entries
from rar.retriever.modes import Mode, fit_head
from rar.schema import UserError

CLASSES = (120, 1_203, 13_204)  # the miniature's, LVIS's, V3Det's
MODES: tuple[Mode, ...] = ("text", "centroid", "lda", "fused")
NOISE = 2.0  # standard deviation of a picture about its class's centre; centres have 1

Row = dict[str, Any]


def run(
    classes: Sequence[int] = CLASSES, shots: int = 4, dim: int = 512, repeats: int = 3, modes: Sequence[Mode] = MODES
) -> Row:
    """sizes.N.MODE: `seconds` (median) and `cpu_seconds` (of the processor, median: what others' work beside does not move as
    much), and what the process held before (`before_mib`, vectors and libraries) and at most. Raises UserError for less than
    two classes of a shot.
    """
    if min(classes) < 2 or shots < 1:
        raise UserError(f"a fit needs two classes of one shot at least, got --classes {min(classes)} --shots {shots}")
    result: Row = {"shots": shots, "dim": dim, "repeats": repeats, "sizes": {}}
    with (
        one_thread(),
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):  # a new process a fit: a peak is forgotten
        for count in classes:
            rows = {mode: pool.apply(fitted, (mode, count, shots, dim, repeats)) for mode in modes}
            result["sizes"][str(count)] = rows
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """What starts meanwhile has one BLAS thread, as Ray gives the worker that fits in a build. Two would wait for each other,
    spinning, where the cores have other work: on one such machine `fused` on 13,204 classes took 64 s with two, 18 s with one.
    """
    known = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if known is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = known


def fitted(mode: Mode, classes: int, shots: int, dim: int, repeats: int) -> Row:
    random = np.random.default_rng(0)
    centres = random.normal(size=(classes, dim)).astype(np.float32)
    names = entries(centres + random.normal(size=centres.shape).astype(np.float32), 1)
    images = entries(np.repeat(centres, shots, axis=0) + NOISE * random.normal(size=(classes * shots, dim)), shots)
    before, seconds, worked = memory_mib(os.getpid()), [], []
    for _ in range(repeats):
        started, began = time.perf_counter(), time.process_time()
        fit_head(mode, images, names)
        seconds.append(time.perf_counter() - started)
        worked.append(time.process_time() - began)
    taken = {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(worked)}
    return taken | {"before_mib": before, "peak_mib": memory_mib(os.getpid(), "VmHWM")}


def entries(vectors: np.ndarray, shots: int) -> Entries:
    """Unit vectors (classes * shots, D), the `shots` of a class one after the other."""
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = np.arange(len(unit)) // shots
    return Entries([f"e{row:08d}" for row in range(len(unit))], labels, [f"class {label}" for label in labels.tolist()], unit)
