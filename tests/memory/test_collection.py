"""The memory's contract on embedded Milvus and on a real server, against exact search in numpy.

With -m server: the real server.
Not covered: servers newer than 2.3.5, and collections on several nodes.
"""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import rar.memory.collection
from rar.bench.embeddings import drawn
from rar.bench.server import milvus_server
from rar.config import Index
from rar.memory import layout
from rar.memory.collection import Collection, open_store
from rar.memory.layout import FLAT_UP_TO, index_kind
from rar.schema import UserError
from tests.conftest import ROOT
from tests.stores import (
    FLAT,
    HNSW,
    HNSW_SQ8,
    META,
    REDUCED,
    assert_same,
    built,
    clustered,
    exact,
    fill,
    grocery,
    lying_low,
    names,
    needs_data,
    real,
    recall,
    unit,
)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PyPI's Milvus standalone in a folder of its own."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(milvus_server(tmp_path_factory.mktemp("milvus")))
        except UserError as missing:
            pytest.skip(str(missing))
        yield server.address


@pytest.fixture(scope="session", params=["lite", pytest.param("server", marks=pytest.mark.server)])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = str(tmp_path_factory.mktemp("lite") / "store") if request.param == "lite" else request.getfixturevalue("served")
    with open_store(uri) as address:
        yield address


@pytest.fixture
def collection(address: str, request: pytest.FixtureRequest) -> Iterator[Collection]:
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    fresh = Collection(address, name)
    yield fresh
    fresh.drop()


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
    assert list(collection.entry_ids()) == entries.entry_ids
    assert (entries.entry_ids, entries.class_ids.tolist(), entries.class_names) == (["a", "b"], [2, 4], ["two", "four"])
    assert entries.vectors.tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_fetch_reads_page_by_page(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PAGE_BYTES", 700 * (layout.ROW_BYTES + 4 * 8))
    vectors = unit(3000, 8)
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


@pytest.mark.long
@needs_data
def test_hnsw_recall_on_real_embeddings(collection: Collection) -> None:
    vectors = np.concatenate([real(name)[0] for name in ("cub200", "cars196", "dogs120")])
    built(collection, vectors, HNSW)
    hits, truth = collection.search(vectors, 10), exact(vectors).search(vectors, 10)
    assert recall(hits, truth) >= 0.99


@pytest.mark.server
def test_a_sealed_memory_is_searched_by_its_own_index(served: str) -> None:
    """A server has a coarse one for what is new, with a recall of 0.82 here."""
    work = drawn(20_000, 512, 100)
    collection = built(Collection(served, "sealed"), work.entries, HNSW)
    found = [[int(entry_id[1:]) for entry_id in ids] for ids in collection.search(work.queries, 10).entry_ids]
    recall_at_10 = work.recall(np.array(found))
    assert recall_at_10 >= 0.99


@pytest.mark.long
@needs_data
def test_reduced_recall_on_real_embeddings(collection: Collection) -> None:
    """Queries that the projection was not fitted on; the scores are those of the full vectors."""
    vectors = np.concatenate([real(name)[0] for name in ("cub200", "cars196", "dogs120")])
    assert_reduced_is_good(collection, vectors)


@pytest.mark.long
@needs_data
def test_reduced_recall_on_another_encoder(collection: Collection) -> None:
    assert_reduced_is_good(collection, grocery()[::2])


@pytest.mark.long
def test_reduced_recall_on_clusters(collection: Collection) -> None:
    assert_reduced_is_good(collection, clustered(3000, 256, clusters=100))


def assert_reduced_is_good(collection: Collection, vectors: np.ndarray) -> None:
    shuffled = vectors[np.random.default_rng(0).permutation(len(vectors))]
    queries, entries = shuffled[:200], shuffled[200:]
    built(collection, entries, REDUCED)
    found, truth = collection.search(queries, 10), exact(entries).search(queries, 10)
    assert recall(found, truth) >= 0.98
    assert collection.meta()["reduced_dim"] * 4 <= entries.shape[1]
    ours = Collection(collection.address, collection.name)
    vectors_of = dict(zip(names(len(entries)), entries, strict=True))
    for query, ids, scores in zip(queries[:20], found.entry_ids, found.scores, strict=False):
        np.testing.assert_allclose(scores, [query @ vectors_of[entry_id] for entry_id in ids], atol=1e-5)
    assert_same(ours.fetch(), exact(entries).fetch())


def test_a_reduced_memory_is_searched_by_other_processes(collection: Collection) -> None:
    vectors = lying_low(400)
    built(collection, vectors, REDUCED)
    with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(nearest, collection, vectors[:20]).result() == [[name] for name in names(20)]


def nearest(collection: Collection, queries: np.ndarray) -> list[list[str]]:
    return collection.search(queries, 1).entry_ids


def test_reduced_needs_vectors_to_be_fitted_on(collection: Collection) -> None:
    with pytest.raises(UserError, match="is fitted on vectors"):
        collection.create(36, REDUCED, META, size_hint=5)
    assert not collection.exists()


def test_a_reduced_memory_keeps_its_projection(collection: Collection) -> None:
    """Built further with other vectors, entries old and new must lie in the space of the first projection."""
    vectors, more = lying_low(100), lying_low(50, seed=1)
    before = built(collection, vectors, REDUCED).meta()["projection"]
    collection.create(36, REDUCED, META, size_hint=50, sample=more)
    collection.upsert([f"f{n:06d}" for n in range(50)], [1] * 50, ["b"] * 50, more)
    collection.seal(150)
    assert collection.meta()["projection"] == before
    assert nearest(collection, np.concatenate([vectors[:5], more[:5]])) == [[f"{x}{n:06d}"] for x in "ef" for n in range(5)]


def test_a_strange_projection_is_refused(collection: Collection) -> None:
    built(collection, unit(100, 36), REDUCED)
    other = Collection(collection.address, f"{collection.name}{rar.memory.collection.PROJECTION}")
    other.drop()
    other.create(36, FLAT, {}, size_hint=4)
    other.upsert(names(4), range(4), [""] * 4, unit(4, 36))
    other.seal(4)
    with pytest.raises(UserError, match="do not belong together"):
        Collection(collection.address, collection.name).search(unit(1, 36), 1)


def test_quantised_hnsw_or_a_clear_no(collection: Collection, request: pytest.FixtureRequest) -> None:
    vectors, queries = clustered(3000, 64, clusters=100), unit(50, 64, seed=3)
    if "server" in request.node.name:  # 2.3.5
        with pytest.raises(UserError, match="has no index HNSW_SQ8; set memory"):
            built(collection, vectors, HNSW_SQ8)
        assert not collection.exists()
    else:
        built(collection, vectors, HNSW_SQ8)
        assert recall(collection.search(queries, 10), exact(vectors).search(queries, 10)) >= 0.9


@pytest.mark.parametrize("index", [FLAT, HNSW, REDUCED], ids=lambda index: index.kind)
def test_removed_entries_are_gone_and_may_come_back(collection: Collection, index: Index) -> None:
    vectors = lying_low(100)
    built(collection, vectors, index)
    assert collection.remove([*names(10), "never there"]) == 10
    assert collection.count() == 90
    assert collection.remove(names(100)[3::7]) == 13  # of 14; one was among the ten
    collection.seal(77)
    assert collection.remove(names(100)[3::7]) == collection.remove([]) == 0
    kept = [n for n in range(10, 100) if n % 7 != 3]
    assert collection.fetch().entry_ids == [names(100)[n] for n in kept]
    assert not {*names(10), *names(100)[3::7]} & set(collection.search(vectors[3:4], 77).entry_ids[0])
    fill(collection, vectors)
    collection.seal(100)
    assert nearest(collection, vectors) == [[name] for name in names(100)]
    assert_same(collection.fetch(), exact(vectors).fetch())


@pytest.mark.parametrize("index", [FLAT, REDUCED], ids=lambda index: index.kind)
def test_a_memory_of_which_everything_was_removed_is_empty(collection: Collection, index: Index) -> None:
    built(collection, lying_low(5), index).remove(names(5))
    collection.seal(0)
    with pytest.raises(UserError, match="is empty"):
        collection.search(lying_low(1), 1)
    assert len(collection.fetch()) == 0


@pytest.mark.parametrize("index", [FLAT, REDUCED], ids=lambda index: index.kind)
def test_a_copy_stands_on_its_own(collection: Collection, index: Index) -> None:
    vectors = lying_low(300)
    built(collection, vectors, index)
    copy = collection.copy(f"{collection.name}_copy", {"version": 1})
    try:
        was = collection.state()
        collection.remove(names(300)[1::7])
        collection.seal(257)
        assert copy.state() == was != collection.state()
        assert copy.meta() | {"created": ""} == collection.meta() | {"created": "", "version": 1}
        collection.drop()
        assert_same(copy.fetch(), exact(vectors).fetch())
        assert nearest(copy, vectors[:9]) == [[name] for name in names(9)]
    finally:
        copy.drop()


def test_the_state_says_what_was_sealed(collection: Collection) -> None:
    vectors = unit(20, 8)
    collection.create(8, FLAT, META, size_hint=20)
    assert collection.state() == {}
    fill(collection, vectors)
    collection.seal(20)
    state = collection.state()
    assert (state["count"], state["classes"]) == (20, 7)
    fill(collection, vectors[::-1].copy())  # other vectors under the same ids
    collection.seal(20)
    assert collection.state() == state
    collection.remove(["e000000"])
    assert collection.state() == {}
    collection.upsert(["e000000"], [5], ["class 5"], vectors[:1])
    collection.seal(20)
    assert collection.state()["digest"] != state["digest"]


def test_collections_of_others_are_refused(collection: Collection) -> None:
    collection.create(8, FLAT, META, size_hint=5)  # connects
    client = collection._client
    assert client is not None
    other = f"{collection.name}_foreign"
    client.create_collection(other, dimension=8)
    try:
        foreign = Collection(collection.address, other)
        for use in (foreign.meta, foreign.count, lambda: foreign.search(unit(1, 8), 1)):
            with pytest.raises(UserError, match="was not made by `rar memory`"):
                use()
    finally:
        client.drop_collection(other)


def test_another_metric_is_refused(collection: Collection) -> None:
    collection.create(8, FLAT, META, size_hint=5)
    client = collection._client
    assert client is not None
    client.release_collection(collection.name)
    client.drop_index(collection.name, client.list_indexes(collection.name)[0])
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type="FLAT", index_name="vector", metric_type="L2")
    client.create_index(collection.name, indexes)
    with pytest.raises(UserError, match="indexed for the metric L2, not IP"):
        Collection(collection.address, collection.name).search(unit(1, 8), 1)


def test_another_index_is_refused_unless_it_is_auto(collection: Collection) -> None:
    built(collection, unit(5, 8))
    collection.create(8, Index(), META, size_hint=10**6)
    assert collection.meta()["index"] == "FLAT"
    with pytest.raises(UserError, match=r"another index \(FLAT, not HNSW\)"):
        collection.create(8, HNSW, META, size_hint=5)


# Without a store


def test_auto_is_exact_for_small_memories() -> None:
    assert index_kind(Index(), FLAT_UP_TO) == "FLAT"
    assert index_kind(Index(), FLAT_UP_TO + 1) == "HNSW"
    assert index_kind(FLAT, 10**9) == "FLAT"
    assert [index_kind(index, 1) for index in (HNSW, HNSW_SQ8, REDUCED)] == ["HNSW", "HNSW_SQ8", "REDUCED"]


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
    code = "import sys, rar.memory.collection; print([m for m in ('pymilvus', 'milvus_lite', 'grpc') if m in sys.modules])"
    root = ROOT
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("index", [FLAT, REDUCED], ids=["FLAT", "REDUCED"])
def test_entries_are_named_poured_into_another_index_and_relabelled(collection: Collection, index: Index) -> None:
    vectors = lying_low(20)
    built(collection, vectors, index)
    assert collection.labels_of(["e000003", "e000010", "none"]) == {"e000003": "class 3", "e000010": "class 3"}
    assert collection.classes() == {f"class {n}": n for n in range(7)}
    bare = collection.fetch(vectors=False)
    assert bare.entry_ids == names(20) and bare.vectors.shape == (20, 0)
    ((ids, page),) = collection.pages_of_vectors()
    assert ids == names(20)
    np.testing.assert_array_equal(page, vectors)
    np.testing.assert_array_equal(collection.vectors_of(["e000004", "not there"])["e000004"], vectors[4])
    target = Collection(collection.address, f"{collection.name}_poured")
    target.create(36, FLAT, META, size_hint=20)
    try:
        collection.pour(target, frozenset([3]))
        target.relabel({"e000004": (9, "nine"), "not there": (1, "one")})
        target.seal(20 - 3)
        poured = target.fetch()
        kept = [n for n in range(20) if n % 7 != 3]
        assert poured.entry_ids == [f"e{n:06d}" for n in kept]
        np.testing.assert_array_equal(poured.vectors, vectors[kept])
        assert [poured.class_ids[3], poured.class_names[3], poured.class_names[4]] == [9, "nine", "class 5"]
    finally:
        target.drop()
