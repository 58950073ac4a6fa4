"""What a build keeps of its entries, against what the store gives back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import ray

from rar.config import Index
from rar.engine.keeping import Keeper, Kept, as_stored
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
        ids, names = [f"e{number:03d}" for number in shard], [f"class {number % 3}" for number in shard]
        part = Entries(ids, shard % 3, names, rng.normal(size=(8, DIM)).astype(np.float32))
        one.upsert(part.entry_ids, part.class_ids, part.class_names, part.vectors)
        if place >= len(numbers) - held:
            kept.add(part)
    return one


def same(found: Entries, stored: Entries) -> None:
    assert (found.entry_ids, found.class_names) == (stored.entry_ids, stored.class_names)
    np.testing.assert_array_equal(found.class_ids, stored.class_ids)
    np.testing.assert_array_equal(found.vectors, stored.vectors)


@pytest.mark.parametrize("held", [2, 5, 6])  # few, so that all are read; most; all
def test_what_is_kept_and_what_is_read_make_the_entries_of_the_store(address: str, held: int) -> None:
    kept = Kept()
    one = filled(address, f"kept_{held}", kept, held)
    bare = one.seal(40, keep=True)
    assert bare is not None and bare.vectors.shape == (40, 0)
    entries = kept.entries()
    assert entries is not None
    same(as_stored(entries, one, bare), one.fetch())
    assert kept.entries() is None


def test_all_that_is_kept_is_what_the_store_holds_without_reading_it(address: str) -> None:
    kept = Kept()
    one = filled(address, "whole", kept, 6)
    entries, bare = kept.entries(), one.fetch(vectors=False)
    assert entries is not None
    same(entries, one.fetch())
    assert as_stored(entries, one, bare) is entries


def test_an_entry_that_was_removed_or_given_another_class_is_as_the_store_says(address: str) -> None:
    kept = Kept()
    one = filled(address, "removed", kept, 6)
    entries = kept.entries()
    assert entries is not None
    one.relabel({"e003": (2, "class 2")})
    stored = one.fetch()
    assert stored.class_ids[3] == 2
    same(as_stored(entries, one, one.fetch(vectors=False)), stored)
    one.remove(["e007", "e011"])
    same(as_stored(entries, one, one.fetch(vectors=False)), one.fetch())


def test_too_many_are_forgotten(address: str) -> None:
    kept = Kept(most_bytes=4 * DIM * 20)
    filled(address, "many", kept, 6)
    assert kept.entries() is None


def vectors_kept(factor: int, kept: Kept | None) -> float | None:
    return None if kept is None else factor * sum(float(part.vectors.sum()) for part in kept.parts)


def test_a_keeper_whose_process_is_gone_has_the_work_done_without(ray_session: Session) -> None:
    keeper = Keeper()
    keeper.add(Entries(["a"], np.zeros(1, np.int64), ["a"], np.ones((1, DIM), np.float32)))
    assert keeper.run(vectors_kept, 2) == 2 * DIM
    ray.kill(keeper.actor)
    keeper.add(Entries(["b"], np.zeros(1, np.int64), ["b"], np.ones((1, DIM), np.float32)))
    assert keeper.run(vectors_kept, 2) is None
