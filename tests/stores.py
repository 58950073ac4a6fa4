"""What the tests of the memory share: vectors, filled collections and the oracle beside them."""

from __future__ import annotations

import numpy as np
import pytest

from rar.config import Index
from rar.memory.collection import Collection, Entries, ExactIndex, Hits
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
FLAT, HNSW, HNSW_SQ8, REDUCED = (Index.model_validate({"kind": kind}) for kind in ("FLAT", "HNSW", "HNSW_SQ8", "REDUCED"))
META = {"fingerprint": "f", "encoder": "open_clip é", "names": ["a", "b"], "shots": 4}


def unit(count: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"e{n:06d}" for n in range(count)]


def fill(memory: Collection | ExactIndex, vectors: np.ndarray) -> None:
    count = len(vectors)
    assert memory.upsert(names(count), np.arange(count) % 7, [f"class {n % 7}" for n in range(count)], vectors) == count


def built(collection: Collection, vectors: np.ndarray, index: Index = FLAT) -> Collection:
    collection.create(vectors.shape[1], index, META, size_hint=len(vectors), sample=vectors)
    fill(collection, vectors)
    collection.seal(len(vectors))
    return collection


def exact(vectors: np.ndarray) -> ExactIndex:
    oracle = ExactIndex(vectors.shape[1])
    fill(oracle, vectors)
    return oracle


def real(name: str) -> tuple[np.ndarray, np.ndarray]:
    """CLIP embeddings (N, 512) float32 of unit norm, and class ids (N,)."""
    with np.load(SHARED_DATA / "clip_b16_memories" / f"{name}.npz") as data:
        vectors = data["embeddings"].astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), data["class_id"].astype(np.int64)


def grocery() -> np.ndarray:
    """MobileNet embeddings (2640, 1024) float32, made unit norm."""
    with np.load(SHARED_DATA / "grocery" / "mobilenet_v1_train.npz") as data:
        vectors = data["embeddings"].astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(count: int, dim: int, clusters: int) -> np.ndarray:
    """(count, dim) float32 of unit norm around `clusters` centres, as far from them as these from the origin."""
    random = np.random.default_rng(0)
    centres = unit(clusters, dim, seed=1)
    vectors = centres[random.integers(clusters, size=count)] + random.normal(size=(count, dim)) / np.sqrt(dim)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def lying_low(count: int, seed: int = 0) -> np.ndarray:
    """(count, 36) float32 of unit norm in 4 of the dimensions, which a reduction to 1/9 can keep exactly."""
    return unit(count, 4, seed) @ np.linalg.qr(unit(36, 4, seed=9))[0].T


def recall(found: Hits, truth: Hits) -> float:
    """The mean part of the true neighbors that was found."""
    pairs = zip(found.entry_ids, truth.entry_ids, strict=True)
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in pairs]))


def assert_same(left: Entries, right: Entries) -> None:
    assert left.entry_ids == right.entry_ids and left.class_names == right.class_names
    assert (left.class_ids == right.class_ids).all() and (left.vectors == right.vectors).all()
