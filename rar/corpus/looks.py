"""Whether pictures look the same, whatever their size, format and quality: near duplicates, which share no content id.

A look is 64 bits: of a square shrunk to 9 x 8 grey cells, whether each cell is brighter than its left neighbour (a difference
hash). Halving a photo and saving it at JPEG quality 60 changes a bit or two; different photos, of one shelf or one species too,
differ in ten or more (tests/corpus/test_looks.py holds it on the photos that are there). So NEAR_BITS finds most copies and
hardly anything else; crops and turned copies it does not find. A picture of one colour looks like any other, and is never
compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from PIL import Image

from rar.corpus.decode import decode
from rar.corpus.listing import read_many
from rar.schema import RowError

NEAR_BITS = 3  # looks that differ in so many of 64 are those of one picture
COMPARED = 2_000  # pictures of a support set that are looked at, evenly spread: a few seconds
TOGETHER = 32  # read at a time

Fit = Callable[[np.ndarray], np.ndarray]


def look(square: np.ndarray) -> int:
    """(S, S, 3) uint8 -> 64 bits."""
    cells = np.asarray(Image.fromarray(square).convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes())


def near(looks: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) and (M,) uint64 -> (N,) bool: whether a look is that of one of the known pictures."""
    differing = np.bitwise_count(looks[:, None] ^ known[None, known != 0])
    return (differing <= NEAR_BITS).any(axis=1) & (looks != 0)


def looks_of(index: pa.Table, fit: Fit) -> np.ndarray:
    """(M,) uint64: of at most COMPARED pictures of an index; those that cannot be read are left out. fit: pixels -> square."""
    rows = np.unique(np.linspace(0, index.num_rows - 1, min(COMPARED, index.num_rows)).round().astype(np.int64))
    some = index.take(pa.array(rows))
    batches = [some.slice(start, TOGETHER) for start in range(0, some.num_rows, TOGETHER)]

    def looked(batch: pa.Table) -> list[int]:
        found = []
        for data in read_many(*(batch[name].to_pylist() for name in ("uri", "offset", "size"))):
            with contextlib.suppress(RowError):
                found += [look(fit(decode(data)))] if isinstance(data, bytes) else []
        return found

    with ThreadPoolExecutor() as pool:
        return np.array([one for some in pool.map(looked, batches) for one in some], np.uint64)
