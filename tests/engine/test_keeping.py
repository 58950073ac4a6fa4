"""Vectors that a build keeps, against what the store gives back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import ray

from rar.config import Index
from rar.engine.keeping import Keeper, Kept
from rar.engine.session import Session
from rar.memory.collection import Collection, open_store
from rar.memory.entries import Entries

DIM = 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_store(str(tmp_path_factory.mktemp("store") / "memory")) as address:
        yield address


def filled(address: str, name: str, kept: Kept, held: int, count: int = 40) -> Collection:
    """Entries in shards of eight, in no order, some replaced; `kept` learns of the last `held` shards alone."""
    one, rng = Collection(address, name), np.random.default_rng(0)
    one.drop()
    one.create(DIM, Index(), {"fingerprint": "f"}, count)
    numbers = np.concatenate([rng.permutation(count), rng.integers(count, size=8)]).reshape(-1, 8)
    for place, shard in enumerate(numbers):
        ids, vectors = [f"e{number:03d}" for number in shard], rng.normal(size=(8, DIM)).astype(np.float32)
        one.upsert(ids, shard % 3, [f"class {number % 3}" for number in shard], vectors)
        if place >= len(numbers) - held:
            kept.add(ids, vectors)
    return one


def same(found: Entries, stored: Entries) -> None:
    assert (found.entry_ids, found.class_names) == (stored.entry_ids, stored.class_names)
    np.testing.assert_array_equal(found.class_ids, stored.class_ids)
    np.testing.assert_array_equal(found.vectors, stored.vectors)


@pytest.mark.parametrize("held", [0, 2, 5, 6])  # none; few, so that all are read; most; all
def test_what_is_kept_and_what_is_read_make_the_entries_of_the_store(address: str, held: int) -> None:
    kept = Kept()
    one = filled(address, f"kept_{held}", kept, held)
    bare = one.seal(40, keep=True)
    assert bare is not None and bare.vectors.shape == (40, 0)
    same(kept.entries(one, bare), one.fetch())
    assert not kept.parts


def test_an_entry_that_was_removed_is_not_missed(address: str) -> None:
    kept = Kept()
    one = filled(address, "removed", kept, 6)
    one.remove(["e007", "e011"])
    same(kept.entries(one, one.fetch(vectors=False)), one.fetch())


def test_too_many_are_forgotten_and_read(address: str) -> None:
    kept = Kept(most_bytes=4 * DIM * 20)
    one = filled(address, "many", kept, 6)
    assert not kept.parts
    same(kept.entries(one, one.fetch(vectors=False)), one.fetch())


def vectors_kept(factor: int, kept: Kept | None) -> float | None:
    return None if kept is None else factor * sum(float(vectors.sum()) for _, vectors in kept.parts)


def test_a_keeper_whose_process_is_gone_has_the_work_done_without(ray_session: Session) -> None:
    keeper = Keeper()
    keeper.add(["a"], np.ones((1, DIM), np.float32))
    assert keeper.run(vectors_kept, 2) == 2 * DIM
    ray.kill(keeper.actor)
    keeper.add(["b"], np.ones((1, DIM), np.float32))
    assert keeper.run(vectors_kept, 2) is None
