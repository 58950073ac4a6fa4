"""The memory's contract on embedded Milvus and on a real server, against exact search in numpy.

Run: pytest tests/test_memory.py, and -m "not server" to leave the real server out.
Not covered: servers newer than 2.3.5, TLS, and collections on several nodes.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest

import rar.memory
from rar.config import Index
from rar.memory import Collection, Entries, ExactIndex, describe_all, index_kind, open_store
from rar.schema import Unavailable, UserError

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
FLAT = Index.model_validate({"kind": "FLAT"})
HNSW = Index.model_validate({"kind": "HNSW"})
META = {"fingerprint": "f", "encoder": "open_clip é", "names": ["a", "b"], "shots": 4}


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PyPI's Milvus standalone in a folder of its own. Its etcd has fixed ports, so one machine runs one."""
    milvus = pytest.importorskip("milvus", reason="needs PyPI's milvus==2.3.5 (Linux x86-64)")
    if any(taken(port) for port in (2379, 2380)):
        pytest.skip("another Milvus or etcd runs on this machine (ports 2379 and 2380)")
    base = tmp_path_factory.mktemp("milvus")
    server = milvus.MilvusServer(milvus.MilvusServerConfig(data_dir=str(base), proxy_port=free_port()))
    server.webservice_port = free_port()
    try:
        server.start()
        yield f"http://127.0.0.1:{server.listen_port}"
    finally:
        server.stop()


@pytest.fixture(scope="session", params=["lite", pytest.param("server", marks=pytest.mark.server)])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = (
        str(tmp_path_factory.mktemp("lite") / "store") if request.param == "lite" else request.getfixturevalue("milvus_server")
    )
    with open_store(uri) as address:
        yield address


@pytest.fixture
def collection(address: str, request: pytest.FixtureRequest) -> Iterator[Collection]:
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    fresh = Collection(address, name)
    yield fresh
    fresh.drop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def unit(count: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"e{n:06d}" for n in range(count)]


def fill(memory: Collection | ExactIndex, vectors: np.ndarray) -> None:
    count = len(vectors)
    assert memory.upsert(names(count), np.arange(count) % 7, [f"class {n % 7}" for n in range(count)], vectors) == count


def built(collection: Collection, vectors: np.ndarray, index: Index = FLAT) -> Collection:
    collection.create(vectors.shape[1], index, META, size_hint=len(vectors))
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


# Every test that takes `collection` runs on both stores.


def test_flat_is_exact(collection: Collection) -> None:
    vectors, queries = unit(600, 32), unit(50, 32, seed=1)
    hits, truth = built(collection, vectors).search(queries, 10), exact(vectors).search(queries, 10)
    assert hits.entry_ids == truth.entry_ids
    assert (hits.class_ids == truth.class_ids).all()
    assert hits.scores.dtype == np.float32 and hits.class_ids.dtype == np.int64
    np.testing.assert_allclose(hits.scores, truth.scores, atol=1e-5)


def test_equal_scores_are_ordered_by_entry_id_across_the_cut(collection: Collection) -> None:
    vectors = unit(300, 16)
    vectors[20:260] = vectors[150]
    built(collection, vectors[::-1].copy())  # the twins lie in another order than in the oracle below
    hits = collection.search(vectors[150:151], 5)
    assert hits.entry_ids == [[f"e{n:06d}" for n in range(40, 45)]]


def test_inner_product_keeps_the_length_of_vectors(collection: Collection) -> None:
    built(collection, np.array([[3.0, 0.0], [1.0, 0.0], [0.0, -2.0]], np.float32))
    hits = collection.search(np.array([[2.0, 1.0]], np.float32), 3)
    assert hits.entry_ids == [["e000000", "e000001", "e000002"]]
    assert hits.scores.tolist() == [[6.0, 2.0, -2.0]]


def test_short_rows_are_padded(collection: Collection) -> None:
    hits = built(collection, unit(3, 8)).search(unit(2, 8), 5)
    assert hits.scores.shape == hits.class_ids.shape == (2, 5)
    assert np.isneginf(hits.scores[:, 3:]).all() and (hits.class_ids[:, 3:] == -1).all()
    assert [row[3:] for row in hits.entry_ids] == [["", ""], ["", ""]]
    assert np.isfinite(hits.scores[:, :3]).all()


def test_upsert_twice_changes_nothing(collection: Collection) -> None:
    vectors = unit(100, 8)
    before = built(collection, vectors).fetch()
    fill(collection, vectors)
    collection.seal(100)
    assert_same(collection.fetch(), before)


def test_upsert_replaces_and_the_last_of_equal_ids_wins(collection: Collection) -> None:
    collection.create(2, FLAT, META, size_hint=2)
    assert collection.upsert(["a", "a", "b"], [1, 2, 3], ["one", "two", "three"], np.eye(3, 2, dtype=np.float32)) == 2
    assert collection.upsert(["b"], [4], ["four"], np.ones((1, 2), np.float32)) == 1
    collection.seal(2)
    entries = collection.fetch()
    assert (entries.entry_ids, entries.class_ids.tolist(), entries.class_names) == (["a", "b"], [2, 4], ["two", "four"])
    assert entries.vectors.tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_fetch_pages_past_the_limit_of_one_query(collection: Collection) -> None:
    vectors = unit(rar.memory.MAX_NEIGHBORS + 600, 8)
    entries = built(collection, vectors).fetch()
    assert entries.entry_ids == names(len(vectors)) and len(entries) == len(vectors)
    assert (entries.vectors == vectors).all() and entries.vectors.dtype == np.float32
    assert (entries.class_ids == np.arange(len(vectors)) % 7).all()
    assert entries.class_names[8] == "class 1"


def test_count_is_right_before_the_memory_is_sealed(collection: Collection) -> None:
    collection.create(8, FLAT, META, size_hint=5)
    assert collection.count() == 0
    fill(collection, unit(5, 8))
    assert collection.count() == 5


def test_seal_refuses_another_count(collection: Collection) -> None:
    collection.create(8, FLAT, META, size_hint=5)
    fill(collection, unit(5, 8))
    with pytest.raises(UserError, match="holds 5 entries, not the 6 written"):
        collection.seal(6)


def test_meta_is_kept(collection: Collection) -> None:
    collection.create(8, Index(), {**META, "names": ["name"] * 20_000}, size_hint=5)
    meta = Collection(collection.address, collection.name).meta()
    assert {key: meta[key] for key in META} == {**META, "names": ["name"] * 20_000}
    assert {key: meta[key] for key in ("dim", "metric", "index", "ef")} == {
        "dim": 8,
        "metric": "IP",
        "index": "FLAT",
        "ef": 128,
    }


def test_create_again_keeps_the_entries_of_the_same_settings_only(collection: Collection) -> None:
    built(collection, unit(5, 8))
    collection.create(8, FLAT, META, size_hint=5)
    assert collection.count() == 5
    with pytest.raises(UserError, match=r"another fingerprint \(f, not g\)"):
        collection.create(8, FLAT, {**META, "fingerprint": "g"}, size_hint=5)
    with pytest.raises(UserError, match=r"another dim \(8, not 9\)"):
        collection.create(9, FLAT, META, size_hint=5)


def test_user_mistakes_are_named(collection: Collection) -> None:
    collection.create(8, FLAT, META, size_hint=5)
    with pytest.raises(UserError, match="is empty"):
        collection.search(unit(1, 8), 1)
    with pytest.raises(UserError, match="8 dimensions"):
        collection.search(unit(1, 9), 1)
    with pytest.raises(UserError, match="8 dimensions"):
        collection.upsert(["a"], [0], ["a"], unit(1, 7))
    with pytest.raises(UserError, match="not finite"):
        collection.upsert(["a"], [0], ["a"], np.full((1, 8), np.nan, np.float32))
    with pytest.raises(UserError, match="no quotes"):
        collection.upsert(['say "a"'], [0], ["a"], unit(1, 8))
    with pytest.raises(UserError, match="between 1 and 16384"):
        collection.search(unit(1, 8), 16_385)


def test_a_missing_memory_is_named_and_never_made(collection: Collection) -> None:
    for use in (
        collection.count,
        collection.meta,
        collection.fetch,
        lambda: collection.search(unit(1, 8), 1),
        lambda: collection.seal(1),
    ):
        with pytest.raises(UserError, match="there is no memory"):
            use()
    assert not collection.exists()
    collection.drop()


def test_describe_all_lists_memories(collection: Collection) -> None:
    built(collection, unit(5, 8))
    listed = {each["name"]: each for each in describe_all(collection.address)}
    assert listed[collection.name]["count"] == 5
    assert listed[collection.name]["encoder"] == "open_clip é"


def test_worker_processes_share_one_owner(collection: Collection) -> None:
    collection.create(16, FLAT, META, size_hint=4000)
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        list(pool.map(write_part, [collection, collection], [0, 1]))
        collection.seal(4000)
        found = list(pool.map(read_part, [collection, collection], [0, 1]))
    truth = exact(unit(4000, 16)).search(unit(20, 16, seed=1), 5)
    assert found[0] == found[1] == truth.entry_ids


def write_part(collection: Collection, part: int) -> None:
    """Half of the entries, and a hundred of the other half as well, in batches small enough to interleave."""
    vectors = unit(4000, 16)
    mine = [*range(2000 * part, 2000 * part + 2000), *range(1950, 2050)]
    for start in range(0, len(mine), 50):
        rows = mine[start : start + 50]
        ids = [f"e{n:06d}" for n in rows]
        collection.upsert(ids, [n % 7 for n in rows], ids, vectors[rows])


def read_part(collection: Collection, part: int) -> list[list[str]]:
    return collection.search(unit(20, 16, seed=1), 5).entry_ids


@needs_data
@pytest.mark.parametrize(("name", "accuracy"), [("cub200", 0.407), ("cars196", 0.408), ("dogs120", 0.197)])
def test_leave_one_out_nearest_neighbor_accuracy_of_real_memories(collection: Collection, name: str, accuracy: float) -> None:
    vectors, class_ids = real(name)
    ids = names(len(vectors))
    collection.create(512, FLAT, META, size_hint=len(vectors))
    collection.upsert(ids, class_ids, [str(c) for c in class_ids], vectors)
    collection.seal(len(vectors))
    hits = collection.search(vectors, 2)
    predicted = [
        row_classes[1] if row_ids[0] == own else row_classes[0]
        for own, row_ids, row_classes in zip(ids, hits.entry_ids, hits.class_ids, strict=True)
    ]
    assert round(float(np.mean(predicted == class_ids)), 3) == accuracy


@needs_data
def test_hnsw_recall_on_real_embeddings(collection: Collection) -> None:
    vectors = np.concatenate([real(name)[0] for name in ("cub200", "cars196", "dogs120")])
    built(collection, vectors, HNSW)
    hits, truth = collection.search(vectors, 10), exact(vectors).search(vectors, 10)
    shared = [len(set(found) & set(true)) for found, true in zip(hits.entry_ids, truth.entry_ids, strict=True)]
    assert np.mean(shared) / 10 >= 0.99


# Only an embedded store


def test_a_store_is_reopened_with_its_memories(tmp_path: Path) -> None:
    vectors = unit(400, 16)
    for kind in (FLAT, HNSW):
        with open_store(str(tmp_path)) as address:
            built(Collection(address, f"m{kind.kind}"), vectors, kind)
    with open_store(str(tmp_path)) as address:
        for kind in (FLAT, HNSW):
            collection = Collection(address, f"m{kind.kind}")
            assert collection.meta()["index"] == kind.kind
            assert collection.search(vectors[:5], 1).entry_ids == [[f"e{n:06d}"] for n in range(5)]
            assert_same(collection.fetch(), exact(vectors).fetch())


def test_a_killed_owner_leaves_what_it_wrote(tmp_path: Path) -> None:
    owner = own_in_another_process(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with open_store(str(tmp_path)) as address:
        collection = Collection(address, "m")
        collection.create(8, FLAT, META, size_hint=5)
        fill(collection, unit(5, 8))
        collection.seal(5)


def test_a_folder_in_use_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rar.memory, "LOCK_SECONDS", 0.5)
    owner = own_in_another_process(tmp_path)
    try:
        with pytest.raises(UserError, match="another process uses the memory"), open_store(str(tmp_path)):
            pass
    finally:
        owner.kill()
        owner.wait()


def own_in_another_process(folder: Path) -> subprocess.Popen[str]:
    """A process that has written five unsealed entries and keeps the store open."""
    code = (
        "import sys, time; from tests.test_memory import *\n"
        "with open_store(sys.argv[1]) as address:\n"
        "    memory = Collection(address, 'm')\n"
        "    memory.create(8, FLAT, META, size_hint=5)\n"
        "    fill(memory, unit(5, 8))\n"
        "    print('written', flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).resolve().parents[1]
    owner = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "written\n"
    return owner


def test_parallel_writers_lose_nothing_while_buffers_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads switch all the time and every other request flushes, which breaks Milvus Lite unless its writes take turns."""
    monkeypatch.setattr("milvus_lite.engine.collection.MEMTABLE_MEMORY_LIMIT", 4_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with open_store(str(tmp_path)) as address:
            collection = Collection(address, "m")
            collection.create(16, FLAT, META, size_hint=4000)
            with futures.ThreadPoolExecutor(4) as pool:
                list(pool.map(write_rows, [Collection(address, "m") for _ in range(4)], range(4)))
            collection.seal(1200)
    finally:
        sys.setswitchinterval(interval)


def write_rows(collection: Collection, part: int) -> None:
    for start in range(300 * part, 300 * part + 300, 20):
        ids = [f"e{n:06d}" for n in range(start, start + 20)]
        collection.upsert(ids, range(20), ids, unit(20, 16))


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for uri, reason in (
        (tmp_path, "folder of something else"),
        (tmp_path / "photo.jpg", "is a file"),
        ("s3://bucket/memory", "must be a folder or start with http"),
    ):
        with pytest.raises(UserError, match=reason), open_store(str(uri)):
            pass


# Only a server


def test_an_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rar.memory, "REACH_SECONDS", 1.0)
    monkeypatch.setattr(rar.memory, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(rar.memory, "CONNECT_SECONDS", 0.5)
    uri = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(Unavailable, match=uri), open_store(uri):
        pass
    with pytest.raises(Unavailable, match=uri):
        Collection(uri, "m").count()
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == ""


def test_a_server_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner stops and starts again on the same port while a worker keeps its collection."""
    vectors, port = unit(20, 8), free_port()
    database = rar.memory._own(tmp_path)
    server, port = rar.memory._serve(database)
    collection = built(Collection(f"http://127.0.0.1:{port}", "m"), vectors)
    server.stop(grace=0).wait()
    with futures.ThreadPoolExecutor(1) as pool:
        search = pool.submit(collection.search, vectors[:1], 1)
        time.sleep(1.0)
        assert not search.done()
        server, _ = rar.memory._serve(database, port)
        assert search.result(timeout=30).entry_ids == [["e000000"]]
    server.stop(grace=0).wait()
    database.close()


# Without a store


def test_auto_is_exact_for_small_memories() -> None:
    assert index_kind(Index(), rar.memory.FLAT_UP_TO) == "FLAT"
    assert index_kind(Index(), rar.memory.FLAT_UP_TO + 1) == "HNSW"
    assert index_kind(FLAT, 10**9) == "FLAT"
    assert index_kind(HNSW, 1) == "HNSW"


def test_a_collection_travels_without_its_connection(tmp_path: Path) -> None:
    with open_store(str(tmp_path / "store")) as address:
        collection = built(Collection(address, "m", token="secret"), unit(5, 8))
        copy = pickle.loads(pickle.dumps(collection))
        assert (copy.address, copy.name, copy.token, copy._client) == (address, "m", "secret", None)
        assert copy.count() == 5


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "root:Milvus")
    assert Collection("http://h:1", "m").token == "root:Milvus"
    assert Collection("http://h:1", "m", token="mine").token == "mine"


def test_types_are_imported_without_milvus() -> None:
    code = "import sys, rar.memory; print([m for m in ('pymilvus', 'milvus_lite', 'grpc') if m in sys.modules])"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def test_the_oracle_on_literals() -> None:
    oracle = ExactIndex(2)
    oracle.upsert(["b", "a", "c"], [1, 0, 2], ["B", "A", "C"], np.array([[1, 0], [1, 0], [0, 1]], np.float32))
    hits = oracle.search(np.array([[1, 0.5]], np.float32), 4)
    assert hits.entry_ids == [["a", "b", "c", ""]]
    assert hits.scores.tolist() == [[1.0, 1.0, 0.5, -np.inf]]
    assert hits.class_ids.tolist() == [[0, 1, 2, -1]]
    with pytest.raises(UserError, match="empty"):
        ExactIndex(2).search(np.ones((1, 2), np.float32), 1)


def assert_same(left: Entries, right: Entries) -> None:
    assert left.entry_ids == right.entry_ids and left.class_names == right.class_names
    assert (left.class_ids == right.class_ids).all() and (left.vectors == right.vectors).all()
