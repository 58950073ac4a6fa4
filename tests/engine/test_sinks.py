"""MilvusSink against a real embedded Milvus: in this process block by block, and under Ray Data.

Run: pytest tests/test_sinks.py
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data.datasource import WriteResult

from rar.config import Index
from rar.engine.session import Session
from rar.engine.sinks import MilvusSink
from rar.memory.collection import Collection, open_store
from rar.schema import UserError

DIM = 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_store(str(tmp_path_factory.mktemp("store") / "memory")) as address:
        yield address


@pytest.fixture
def collection(address: str, request: pytest.FixtureRequest) -> Collection:
    made = Collection(address, f"sink_{request.node.name}")
    made.create(DIM, Index(), {"fingerprint": "f"}, size_hint=10)
    return made


def block(first: int, count: int, vector_type: pa.DataType) -> pa.Table:
    numbers = range(first, first + count)
    columns = {
        "entry_id": [f"e{n:03d}" for n in numbers],
        "class_id": list(numbers),
        "class_name": [f"class {n}" for n in numbers],
        "vector": pa.array([[float(n), 1.0, 0.0, -1.0] for n in numbers], vector_type),
        "uri": ["left out"] * count,
    }
    return pa.table(columns)


def vectors_of(count: int) -> list[list[float]]:
    return [[float(n), 1.0, 0.0, -1.0] for n in range(count)]


@pytest.mark.parametrize("vector_type", [pa.list_(pa.float32(), DIM), pa.list_(pa.float32()), pa.list_(pa.float64())], ids=str)
def test_blocks_become_entries(address: str, vector_type: pa.DataType) -> None:
    collection = Collection(address, "blocks")
    collection.drop()
    collection.create(DIM, Index(), {"fingerprint": "f"}, size_hint=10)
    sink = MilvusSink(collection)
    written = sink.write([block(0, 3, vector_type), block(0, 0, vector_type), block(3, 2, vector_type).to_pandas()], ctx=None)
    collection.seal(5)
    entries = collection.fetch()
    assert written == 5
    assert entries.entry_ids == ["e000", "e001", "e002", "e003", "e004"]
    assert entries.class_ids.tolist() == [0, 1, 2, 3, 4]
    assert entries.class_names[4] == "class 4"
    assert entries.vectors.tolist() == vectors_of(5)


def test_a_retried_task_changes_nothing(collection: Collection) -> None:
    sink = MilvusSink(collection)
    for _ in range(2):
        assert sink.write([block(0, 3, pa.list_(pa.float32()))], ctx=None) == 3
    collection.seal(3)


def test_the_counts_of_the_tasks_are_summed(collection: Collection) -> None:
    sink = MilvusSink(collection)
    sink.on_write_complete(WriteResult(num_rows=7, size_bytes=1, write_returns=[3, 4]))
    assert sink.written == 7


def test_mistakes_are_found_before_the_first_task(collection: Collection) -> None:
    with pytest.raises(UserError, match=r"missing: class_name, vector"):
        MilvusSink(collection).on_write_start(pa.schema([("entry_id", pa.string()), ("class_id", pa.int64())]))
    with pytest.raises(UserError, match="no memory 'never_made'"):
        MilvusSink(Collection(collection.address, "never_made")).on_write_start(None)


def test_only_a_server_is_written_from_other_nodes() -> None:
    assert not MilvusSink(Collection("http://127.0.0.1:4000", "m")).supports_distributed_writes
    assert MilvusSink(Collection("http://milvus.example:19530", "m")).supports_distributed_writes
    assert pickle.loads(pickle.dumps(MilvusSink(Collection("http://127.0.0.1:4000", "m")))).collection.name == "m"


def test_ray_workers_write_through_one_owner(collection: Collection, ray_session: Session, tmp_path: Path) -> None:
    def embed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = batch["id"]
        vectors = np.stack([number, number * 0 + 1, number * 0, number * 0 - 1], axis=1).astype(np.float32)
        ids = np.array([f"e{n:03d}" for n in number])
        return {"entry_id": ids, "class_id": number, "class_name": ids, "vector": vectors}

    sink = MilvusSink(collection)
    dataset = ray.data.range(200, override_num_blocks=8).map_batches(embed)
    dataset.write_datasink(sink)
    assert sink.written == 200
    collection.seal(200)
    entries = collection.fetch()
    assert entries.entry_ids == [f"e{n:03d}" for n in range(200)]
    assert entries.vectors.tolist() == vectors_of(200)
