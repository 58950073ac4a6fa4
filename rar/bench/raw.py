"""What a memory is measured against: pymilvus and faiss as one writes them by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from rar.bench.embeddings import K
from rar.config import Index
from rar.memory.collection import UPSERT_BYTES
from rar.memory.entries import FIELDS, MAX_ID_BYTES

if TYPE_CHECKING:
    from pymilvus import MilvusClient

BATCH = 256  # queries a request


def batches(queries: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(queries), BATCH):
        yield queries[start : start + BATCH]


def columns(rows: np.ndarray, suffix: str = "") -> tuple[list[str], np.ndarray, list[str]]:
    """The ids, class ids and class names of entries by number."""
    return [f"e{row:08d}{suffix}" for row in rows.tolist()], rows // 20, [f"class {row // 20}" for row in rows.tolist()]


def upsert(client: MilvusClient, name: str, rows: np.ndarray, vectors: np.ndarray, suffix: str = "") -> None:
    """In requests as large as those of `Collection.upsert`."""
    ids, class_ids, class_names = columns(rows, suffix)
    step = max(1, UPSERT_BYTES // (4 * vectors.shape[1] + MAX_ID_BYTES))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = zip(ids[part], class_ids[part].tolist(), class_names[part], vectors[part], strict=True)
        client.upsert(name, [dict(zip(FIELDS, row, strict=True)) for row in values])


def search(client: MilvusClient, name: str, queries: np.ndarray, ef: int | None, k: int = K) -> list[Any]:
    """A request a batch. ef: of HNSW; None: FLAT."""
    params = {"metric_type": "IP", "params": {} if ef is None else {"ef": ef}}
    options: dict[str, Any] = {"limit": k, "anns_field": "vector", "output_fields": ["class_id"], "search_params": params}
    return [client.search(name, data=list(batch), **options) for batch in batches(queries)]


def faiss_index(kind: str, entries: np.ndarray, settings: Index) -> Any:
    """The index of the same kind, and for REDUCED the HNSW that it stands in for."""
    dim, inner = entries.shape[1], faiss.METRIC_INNER_PRODUCT
    index: Any
    if kind == "FLAT":
        index = faiss.IndexFlatIP(dim)
    elif kind == "HNSW_SQ8":
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, settings.m, inner)  # type: ignore[arg-type]
    else:
        index = faiss.IndexHNSWFlat(dim, settings.m, inner)
    if kind != "FLAT":
        index.hnsw.efConstruction, index.hnsw.efSearch = settings.ef_construction, settings.ef
    index.train(entries)
    index.add(entries)
    return index


def faiss_search(index: Any, queries: np.ndarray) -> np.ndarray:
    """(Q, K) rows of entries."""
    return np.concatenate([index.search(batch, K)[1] for batch in batches(queries)])
