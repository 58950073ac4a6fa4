"""MilvusSink against a real embedded Milvus, ShardSink against a run folder, by blocks as the stages make them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.data.datasource import WriteResult

from rar import config
from rar.columns import with_candidates, with_vectors
from rar.config import Index
from rar.engine import choosing, entering, pipeline, reading, session, stages
from rar.engine.session import Session
from rar.engine.sinks import MilvusSink, ShardSink
from rar.fusion import Calibration
from rar.memory.collection import Collection, open_store
from rar.memory.entries import Entries
from rar.runfolder import RunFolder
from rar.schema import Candidate, UserError, content_id, entry_id

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


CLASSES = {f"class {number}": number for number in range(200)}


def block(first: int, count: int) -> pa.Table:
    """Entries as a build sends them: rows of the encoder, through the stage before the sink."""
    numbers = range(first, first + count)
    columns = {
        "row": pa.array(numbers, pa.int64()),
        "uri": [f"{number}.png" for number in numbers],
        "image_id": pa.array([content_id(b"%d" % number) for number in numbers], pa.string()),
        "label": pa.array([f"class {number}" for number in numbers], pa.string()),
        "pixels": pa.array([b"pixels"] * count, pa.large_binary()),
    }
    vectors = np.array(vectors_of(first + count)[first:], np.float32).reshape(-1, DIM)
    return entering.AsEntries(CLASSES, "f")(with_vectors(pa.table(columns), vectors))


def ids_of(count: int) -> list[str]:
    return [entry_id(content_id(b"%d" % number), "f") for number in range(count)]


def vectors_of(count: int) -> list[list[float]]:
    return [[float(n), 1.0, 0.0, -1.0] for n in range(count)]


def as_rows(entries: Entries) -> list[tuple[str, int, str, list[float]]]:
    columns = entries.entry_ids, entries.class_ids.tolist(), entries.class_names, entries.vectors.tolist()
    return list(zip(*columns, strict=True))


def test_blocks_become_entries(address: str) -> None:
    collection = Collection(address, "blocks")
    collection.drop()
    collection.create(DIM, Index(), {"fingerprint": "f"}, size_hint=10)
    sink = MilvusSink(collection)
    written, _, _ = sink.write([block(0, 3), block(0, 0), block(3, 2)], ctx=None)
    collection.seal(5)
    entries = collection.fetch()
    assert written == 5
    assert as_rows(entries) == sorted(zip(ids_of(5), range(5), list(CLASSES)[:5], vectors_of(5), strict=True))


def test_a_retried_task_changes_nothing(collection: Collection) -> None:
    sink = MilvusSink(collection)
    for _ in range(2):
        assert sink.write([block(0, 3)], ctx=None)[0] == 3
    collection.seal(3)


def test_faulty_rows_are_told_and_not_written(collection: Collection) -> None:
    sink = MilvusSink(collection, tell=["entry_id", "error"])
    parts = [block(0, 3), block(3, 2)]
    errors = [[None, "gone", None], [None, None]]
    blocks = [part.append_column("error", pa.array(one, pa.string())) for part, one in zip(parts, errors, strict=True)]
    returns = [sink.write([one], ctx=None) for one in blocks]
    sink.on_write_complete(WriteResult(num_rows=5, size_bytes=1, write_returns=returns))
    collection.seal(4)
    assert sink.written == 4 and collection.fetch().entry_ids == sorted(set(ids_of(5)) - {ids_of(2)[1]})
    assert sink.stats["write.rows"] == 5 and sink.stats["write.seconds"] > 0
    assert sink.told.to_pydict() == {"entry_id": ids_of(5), "error": [None, "gone", None, None, None]}


def test_mistakes_are_found_before_the_first_task(collection: Collection) -> None:
    with pytest.raises(UserError, match=r"missing: class_name, vector"):
        MilvusSink(collection).on_write_start(pa.schema([("entry_id", pa.string()), ("class_id", pa.int64())]))
    with pytest.raises(UserError, match="no memory 'never_made'"):
        MilvusSink(Collection(collection.address, "never_made")).on_write_start(None)


def test_an_embedded_store_is_for_one_machine_and_any_node_of_it_writes(
    ray_session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without CPUs writes nothing itself: which nodes may write is settled when the session opens."""
    sink = pickle.loads(pickle.dumps(MilvusSink(Collection("http://127.0.0.1:4000", "m"))))
    assert sink.collection.name == "m" and sink.supports_distributed_writes
    store = config.Memory(uri=str(tmp_path / "m.milvus"))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": f"10.0.0.{n}", "Alive": n < 3} for n in (1, 2, 3)])
    one_line = "is of this machine alone, and the cluster has 2: name a server"
    with pytest.raises(UserError, match=one_line), session.opened(store, create=True):
        pass
    assert not (tmp_path / "m.milvus").exists()


def test_ray_workers_write_through_one_owner(collection: Collection, ray_session: Session, tmp_path: Path) -> None:
    sink = MilvusSink(collection)
    pipeline.write(block(0, 200), sink)
    assert sink.written == 200
    collection.seal(200)
    entries = collection.fetch()
    assert as_rows(entries) == sorted(zip(ids_of(200), range(200), CLASSES, vectors_of(200), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", "classify", config.Config(), fresh=False, name="a", group="b")


def shard(number: int, uris: list[str]) -> pa.Table:
    """What reaches the sink of pictures at `uris`: read, ranked by nobody and fused by the real stages; missing ones fail."""
    rows = [{"row": 10 * number + place, "uri": uri, "label": None} for place, uri in enumerate(uris)]
    columns = [("row", pa.int64()), ("uri", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.string())]
    table = pa.Table.from_pylist(rows, pa.schema(columns))
    table = table.append_column("shard", pa.array([number] * len(rows), pa.int32()))
    table = stages.timed("read", reading.load)(table)
    table = with_candidates(table, [[Candidate(3, "wren", -0.1), Candidate(1, "robin", -2.0)]] * len(rows))
    return choosing.Fuse(Calibration())(stages.timed("rank", choosing.Rank(None, Calibration(), 4))(table))


def test_a_shard_of_the_stages_becomes_predictions_errors_and_a_mark(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    block = shard(1, [str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg"), str(tmp_path / "a.jpg")])
    assert ShardSink(folder.path, {1: 3}).write([block.slice(0, 0), block], None) == 3
    found, lost = folder.predictions().to_pylist(), folder.errors().to_pylist()
    assert [(row["row"], row["place"], row["class_name"]) for row in found] == [(10, None, "wren"), (12, None, "wren")]
    assert [(row["row"], row["stage"], row["error"]) for row in lost] == [(11, "read", "file not found")]
    assert folder.pending(2) == [0] and folder.progress() == (2, 1)
    stats = folder.stats()
    assert stats["read.rows"] == 3 and stats["mllm.calls"] == 0 and stats["mllm.seconds"] == 0.0
    timed = sum(stats[f"{stage}.seconds"] for stage in ("read", "rank", "write"))
    assert stats["pipeline.seconds"] == pytest.approx(timed, abs=1e-3) and stats["pipeline.tasks"] == 1


def test_a_shard_that_came_apart_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"picture")
    block = shard(0, [str(tmp_path / "a.jpg")] * 2)
    with pytest.raises(RuntimeError, match="a shard must stay whole"):
        ShardSink(folder.path, {0: 3}).write([block], None)
    with pytest.raises(RuntimeError, match="a shard must stay whole"):
        ShardSink(folder.path, {0: 2, 1: 2}).write([pa.concat_tables([block, shard(1, [str(tmp_path / "a.jpg")])])], None)
    assert folder.pending(2) == [0, 1] and folder.progress() == (0, 0)
