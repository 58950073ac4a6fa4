"""The bench of the memory on a few vectors: every row is there, and what it counts is right.

With -m server: the real server.
Not covered: speed, which `rar bench retrieve` measures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rar.bench import embeddings, raw, retrieve
from rar.bench.embeddings import Work, drawn, kth_scores, recorded
from rar.bench.server import Server, lite_server, memory_mib
from rar.config import Index
from rar.engine.session import Session
from rar.memory.collection import Collection, open_store
from tests.stores import SHARED_DATA, clustered, needs_data, unit


@contextmanager
def in_this_process(folder: Path) -> Iterator[Server]:
    """A store that starts at once; processes of their own are for what they need."""
    with open_store(str(folder)) as address:
        yield Server(address, os.getpid())


@pytest.fixture(scope="module")
def result(ray_session: Session) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve, "lite_server", in_this_process)
        patch.setattr(retrieve, "CLASSES", (120, 1203))
        patch.setattr(retrieve, "vit_b32_us", lambda: 12_000.0)  # its weights need seconds to be drawn
        return retrieve.run(rows=500, dim=36, queries=20, repeats=1, kinds=("FLAT", "HNSW", "REDUCED"))


def throughputs(value: Any) -> Iterator[dict[str, float]]:
    if isinstance(value, dict):
        if "ratio" in value:
            yield value
        for one in value.values():
            yield from throughputs(one)


@pytest.mark.long
def test_every_index_is_measured(result: dict[str, Any]) -> None:
    lite = result["stores"]["lite"]
    assert set(lite) == {"FLAT", "HNSW", "REDUCED", "pipeline"}
    for kind in ("FLAT", "HNSW", "REDUCED"):
        assert set(lite[kind]) == {"recall", "search", "build", "seconds", "bytes", "memory_mib"}
        assert set(lite[kind]["build"]) == {"pymilvus", "faiss"}
        assert set(lite[kind]["search"]) == {"pymilvus", "faiss"} | ({"hnsw"} if kind == "REDUCED" else set())
    assert set(lite["pipeline"]) == {"retrieve", "vit_b32_us", "datasink"}
    assert set(lite["pipeline"]["retrieve"]) == {"120", "1203"}
    assert all(row["us"] > 0 and row["of_vit_b32"] > 0 for row in lite["pipeline"]["retrieve"].values())
    rows = list(throughputs(result))
    assert len(rows) == 3 * 4 + 1 + 3
    assert all(min(row["ours"], row["reference"], row["ratio"]) > 0 for row in rows)


@pytest.mark.long
def test_recall_bytes_and_memory(result: dict[str, Any]) -> None:
    lite = result["stores"]["lite"]
    assert lite["FLAT"]["recall"] == {"ours": 1.0, "faiss": 1.0}
    assert lite["HNSW"]["recall"]["ours"] > 0.9
    assert [lite[kind]["bytes"]["vector_in_graph"] for kind in ("FLAT", "HNSW", "REDUCED")] == [144, 144, 16]
    for kind in ("FLAT", "HNSW", "REDUCED"):
        assert lite[kind]["bytes"]["on_disk"] > lite[kind]["bytes"]["index_on_disk"] > lite[kind]["bytes"]["vector_in_graph"]
        assert min(lite[kind]["memory_mib"].values()) > 10  # in no order: other tests' memory may go meanwhile


def test_recall_counts_what_reaches_the_kth_score() -> None:
    entries, queries = clustered(300, 16, clusters=10), unit(5, 16, seed=3)
    work = Work.of(entries, queries)
    best = np.argsort(-(queries @ entries.T), axis=1)[:, :10]
    assert work.recall(best) == 1.0
    best[0, :5] = -1
    assert work.recall(best) == pytest.approx(0.9)
    best[1] = np.argsort(queries[1] @ entries.T)[:10]
    assert work.recall(best) == pytest.approx(0.7)


def test_kth_scores_are_those_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, queries = unit(95, 8), unit(4, 8, seed=1)
    monkeypatch.setattr(embeddings, "BLOCK", 20)
    np.testing.assert_allclose(kth_scores(entries, queries), np.sort(queries @ entries.T, axis=1)[:, -10], rtol=1e-6)


def test_drawn_vectors_are_the_same_ones_and_all_unlike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 200)
    work = drawn(450, 32, 50)
    assert work.entries.shape == (450, 32) and work.queries.shape == (50, 32) and work.entries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(work.entries, axis=1), 1, atol=1e-6)
    assert (work.entries == drawn(450, 32, 50).entries).all()
    every = np.concatenate([work.entries, work.queries])
    assert len(np.unique(every, axis=0)) == 500


@needs_data
def test_recorded_embeddings_are_found_by_folder() -> None:
    works = recorded(SHARED_DATA)
    assert set(works) == {"clip_b16_memories", "grocery"}
    assert works["clip_b16_memories"].entries.shape == (1548 - 155, 512)
    assert works["grocery"].entries.shape == (2640 - 264, 1024)


@pytest.mark.long
@needs_data
def test_recall_on_recorded_embeddings(tmp_path: Path) -> None:
    work = recorded(SHARED_DATA)["clip_b16_memories"]
    found = retrieve.recalls(retrieve.Store(lambda name: in_this_process(tmp_path / name)), "clip", work)
    assert found["FLAT"] == 1.0 and found["HNSW"] >= 0.99 and found["REDUCED"] >= 0.98 and found["HNSW_SQ8"] > 0.9


@pytest.mark.long
def test_the_raw_side_writes_and_finds_the_same(tmp_path: Path) -> None:
    """What is compared does equal work: entries, hits and the rows of faiss agree."""
    work = drawn(300, 16, 10)
    with lite_server(tmp_path / "store") as server:
        assert memory_mib(server.pid) > 10
        ours, theirs = (retrieve.created(server, name, "FLAT", work) for name in ("ours", "theirs"))
        numbers = np.arange(300)
        ours.upsert(*raw.columns(numbers), work.entries)
        client = retrieve.connect(server.address, None)
        raw.upsert(client, "theirs", numbers, work.entries)
        both = [Collection(server.address, name).fetch() for name in ("ours", "theirs")]
        assert both[0].entry_ids == both[1].entry_ids and (both[0].vectors == both[1].vectors).all()
        assert (both[0].class_ids == both[1].class_ids).all() and both[0].class_names == both[1].class_names
        (hits,) = raw.search(client, "theirs", work.queries, None)
        rows = retrieve.rows_of(theirs, work.queries)
        assert [[int(hit["entry_id"][1:]) for hit in row] for row in hits] == rows.tolist()
    assert (raw.faiss_search(raw.faiss_index("FLAT", work.entries, Index()), work.queries) == rows).all()


def test_crossover_has_a_row_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieve, "lite_server", in_this_process)
    rows = retrieve.crossover(sizes=(300,), dim=16, queries=8, repeats=1)
    assert set(rows) == {"300"} and set(rows["300"]) == {"batched", "single", "build_seconds"}


@pytest.mark.server
def test_a_server_is_measured_too(ray_session: Session) -> None:
    result = retrieve.run(rows=500, dim=36, queries=20, repeats=1, server=True, kinds=("FLAT", "HNSW_SQ8"))
    there = result["stores"]["milvus_2_3_5"]
    assert set(there) == {"FLAT", "pipeline"} and there["FLAT"]["recall"]["ours"] == 1.0
    assert all(row["ratio"] > 0 for row in throughputs(there))
