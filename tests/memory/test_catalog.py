"""Memories as wholes: listing, digests, snapshots and dropping, on an embedded store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rar.memory.catalog import Stored, collection_name, digest, drop_memory, find, memories, snapshot
from rar.memory.collection import Collection, open_store
from rar.schema import UserError
from tests.stores import FLAT, META, REDUCED, assert_same, exact, fill, lying_low


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_store(str(tmp_path_factory.mktemp("memories") / "store")) as address:
        yield address


@pytest.fixture
def address(store: str) -> Iterator[str]:
    yield store
    for stored in memories(store):
        drop_memory(store, stored.name, stored.version)


VECTORS = lying_low(20)


def make(address: str, name: str) -> None:
    """20 images of 7 classes (REDUCED), and 7 texts (FLAT)."""
    for part, index, count in (("images", REDUCED, 20), ("texts", FLAT, 7), ("head_text", FLAT, 7)):
        one = Collection(address, collection_name(name, part))
        one.create(36, index, META, count, sample=VECTORS)
        fill(one, VECTORS[:count])
        one.seal(count)


def test_collections_are_grouped(address: str) -> None:
    make(address, "birds")
    make(address, "birds_head")
    other = Collection(address, "something")
    other.create(8, FLAT, META, size_hint=1)
    assert snapshot(address, "birds") == 1
    listed = memories(address)
    other.drop()
    assert [(one.name, one.version) for one in listed] == [("birds", None), ("birds", 1), ("birds_head", None)]
    assert listed[0].counts == {"head_text": 7, "images": 20, "texts": 7}
    assert (listed[0].classes, listed[0].dim, listed[0].index, listed[0].encoder) == (7, 36, "REDUCED", "open_clip é")
    assert listed[0].fingerprint == "f" and listed[0].created.endswith("+00:00")
    assert listed[0].digest == listed[1].digest == listed[2].digest != ""


def test_a_snapshot_is_not_reached_by_what_happens_later(address: str) -> None:
    make(address, "birds")
    before = digest(address, "birds")
    assert snapshot(address, "birds") == 1
    images = Collection(address, "birds_images")
    images.seal(20 - images.remove(["e000000", "e000007", "e000014"]))
    assert digest(address, "birds") != before == digest(address, "birds", 1)
    assert snapshot(address, "birds") == 2
    drop_memory(address, "birds", 1)
    drop_memory(address, "birds")
    assert [(one.name, one.version) for one in memories(address)] == [("birds", 2)]
    kept = Collection(address, "birds_v2_images")
    assert kept.count() == 17
    assert kept.search(VECTORS[1:3], 1).entry_ids == [["e000001"], ["e000002"]]
    assert_same(Collection(address, "birds_v2_texts").fetch(), exact(VECTORS[:7]).fetch())


def test_a_digest_is_of_contents_and_not_of_how_they_came(address: str) -> None:
    make(address, "birds")
    before = digest(address, "birds")
    images = Collection(address, "birds_images")
    images.remove(["e000004"])
    with pytest.raises(UserError, match="'birds' was left half written; build it again"):
        digest(address, "birds")
    images.upsert(["e000004"], [4], ["class 4"], VECTORS[4:5])
    images.seal(20)
    assert digest(address, "birds") == before


def test_a_snapshot_that_was_cut_short_is_told_and_thrown_away(address: str) -> None:
    make(address, "birds")
    Collection(address, "birds_images").copy("birds_v1_images", {"parts": ["head_text", "images", "texts"], "version": 1})
    assert find(address, "birds", 1).digest == ""
    with pytest.raises(UserError, match="drop it and take another snapshot"):
        digest(address, "birds", 1)
    assert snapshot(address, "birds") == 1
    assert find(address, "birds", 1).digest == digest(address, "birds")


def test_what_is_missing_is_said(address: str) -> None:
    with pytest.raises(UserError, match="there is no memory 'birds'"):
        snapshot(address, "birds")
    make(address, "birds")
    snapshot(address, "birds")
    with pytest.raises(UserError, match="'birds' has no version 7; there is the live one, version 1"):
        drop_memory(address, "birds", 7)
    drop_memory(address, "birds")
    with pytest.raises(UserError, match="'birds' has no live one; there is version 1"):
        find(address, "birds")


def test_names_mean_one_thing() -> None:
    assert collection_name("birds", "head_text", 12) == "birds_v12_head_text"
    with pytest.raises(UserError, match=r"'birds_v2' reads like a snapshot's; use 'birds', and memory.version"):
        collection_name("birds_v2", "images")
    with pytest.raises(ValueError, match="no part"):
        collection_name("birds", "photos")


def test_an_empty_store_holds_nothing(address: str) -> None:
    nothing: list[Stored] = []
    assert memories(address) == nothing
