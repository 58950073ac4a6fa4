"""The least ef with a recall, on graphs that are built, against brute force.

Not covered: HNSW_SQ8 and the real server, whose searches take the same setting.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rar.memory import catalog, tuning
from rar.memory.collection import Collection, open_store
from rar.schema import UserError
from tests.stores import FLAT, HNSW, built, clustered, names

ROWS, DIM, K = 3_000, 24, 5


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A graph, opened a second time: Milvus Lite searches exactly until it has built it, and closing waits for that."""
    folder, vectors = str(tmp_path_factory.mktemp("tuning") / "store"), clustered(ROWS, DIM, 60)
    with open_store(folder) as address:
        for name, index in (("graph_images", HNSW), ("flat_images", FLAT)):
            one = Collection(address, name)
            built(one, vectors, index)
    with open_store(folder) as address:
        yield address


def brute_force(vectors: np.ndarray, row: int) -> set[str]:
    others = [(-float(vectors[row] @ vector), names(ROWS)[n]) for n, vector in enumerate(vectors) if n != row]
    return {name for _, name in sorted(others)[:K]}


@pytest.mark.long
def test_neighbors_are_those_of_brute_force(address: str) -> None:
    vectors = clustered(ROWS, DIM, 60)
    queries, own = tuning.drawn(Collection(address, "graph_images"))
    assert len(own) == tuning.QUERIES == len(set(own)) and own[0] == names(1)[0] and own[-1] == names(ROWS)[-1]
    truth = tuning.nearest(Collection(address, "graph_images"), queries, own, K)
    for place in (0, 100, 255):
        row = names(ROWS).index(own[place])
        np.testing.assert_array_equal(queries[place], vectors[row])
        assert truth[place] == brute_force(vectors, row)


def test_the_least_ef_is_kept_with_the_memory(address: str) -> None:
    one = Collection(address, "graph_images")
    before, stated = catalog.find(address, "graph"), one.meta()["ef"]
    steps = tuning.tune(one, K, 0.95)
    assert all(step.recall < 0.95 for step in steps[:-1]) and steps[-1].recall >= 0.95
    assert Collection(address, "graph_images").meta()["ef"] == steps[-1].ef != stated
    after = catalog.find(address, "graph")
    assert (after.digest, after.state) == (
        before.digest,
        f"{before.digest} ef {steps[-1].ef}",
    ) and before.state == before.digest


def test_what_cannot_be_tuned_is_said(address: str) -> None:
    with pytest.raises(UserError, match="nothing to tune"):
        tuning.tune(Collection(address, "flat_images"), K, 0.9)
    one = Collection(address, "graph_images")
    with pytest.raises(UserError, match=r"best recall of HNSW is .*raise memory\.index\.m"):
        tuning.tune(one, K, 1.01)
