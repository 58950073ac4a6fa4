"""The handed-out inputs that go wrong as files, tables and support sets; right is what their page says."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rar.config import Corpus, Memory
from rar.corpus import listing, support, vectors
from rar.corpus.decode import decode
from rar.schema import UserError, content_id
from tests.conftest import SHARED_CASES as CASES
from tests.conftest import needs_shared_cases

pytestmark = needs_shared_cases


def index(place: str, **settings: Any) -> pa.Table:
    return listing.list_images(Corpus.model_validate({"uri": f"{CASES}/{place}", **settings}))


def read(table: pa.Table) -> list[bytes]:
    found = listing.read_many(*(table[column].to_pylist() for column in ("uri", "offset", "size")))
    assert all(isinstance(one, bytes) for one in found)
    return [one for one in found if isinstance(one, bytes)]


@pytest.mark.parametrize("folder", ["suffixes/photos", "suffixes/only_jfif"])
def test_every_picture_is_listed_and_decoded_whatever_its_suffix(folder: str) -> None:
    table = index(folder)
    files = sorted(str(file) for file in (CASES / folder).rglob("*") if file.is_file())
    assert table["uri"].to_pylist() == files
    assert set(table["label"].to_pylist()) == {"cat"} and listing.remarks(table) == []
    assert all(decode(data).shape[2] == 3 for data in read(table))


def test_hugging_face_parquet_is_read_as_it_is() -> None:
    table = index("huggingface-parquet/hf.parquet")
    assert table["label"].to_pylist() == ["dog", "cat"]
    assert read(table)[1] == (CASES / "huggingface-parquet/2.jpg").read_bytes()  # its row names a file beside the table
    assert all(decode(data).size for data in read(table))


@pytest.mark.parametrize(
    ("name", "labels", "remark"),
    [
        ("dots", ["cat"], "labels: 1 from .cls"),
        ("key_twice", ["cat", "dog"], "labels: 2 from .cls"),
        ("img2dataset", [None], "look like captions and are not taken"),
    ],
)
def test_webdataset_labels(name: str, labels: list[str | None], remark: str) -> None:
    table = index(f"webdataset-labels/{name}.tar")
    assert table["label"].to_pylist() == labels
    assert any(remark in line for line in listing.remarks(table))
    assert len({content_id(data) for data in read(table)}) == len(labels)


def test_a_caption_is_a_label_where_it_is_asked_for() -> None:
    for key, label in (("txt", "two cats on a mat"), ("caption", "two cats on a mat"), ("cls", None)):
        assert index("webdataset-labels/img2dataset.tar", label_key=key)["label"].to_pylist() == [label]


def test_a_uri_in_two_rows_keeps_two_labels_and_is_counted() -> None:
    table = index("row-twice/test.csv")
    assert table["label"].to_pylist() == ["cat", "dog", "cat"]
    assert [line.partition(";")[0] for line in listing.remarks(table)] == [
        "1 rows name a picture that an earlier row names too"
    ]


@pytest.mark.parametrize("ids", ["metadata", "metadata/metadata_{0..11}.parquet", "metadata/*.parquet"])
def test_numbered_parts_pair_in_natural_order(ids: str) -> None:
    parts = CASES / "clip-retrieval-parts"
    corpus = Corpus(uri=f"{parts}/img_emb", ids=f"{parts}/{ids}", uri_column="image_path")
    table = listing.list_images(corpus)
    assert table["uri"].to_pylist() == [f"/x/{number}.jpg" for number in range(12)]
    found, faults = vectors.read_vectors(corpus, table["row"].to_pylist())
    assert faults == [None] * 12
    for number, vector in enumerate(found):
        raw = np.load(parts / f"img_emb/img_emb_{number}.npy")[0].astype(np.float64)
        np.testing.assert_allclose(vector, raw / np.linalg.norm(raw), atol=1e-6)
    whole = listing.list_images(corpus.model_copy(update={"ids": f"{parts}/all.parquet"}))
    assert whole.equals(table)


def test_parts_that_do_not_pair_are_refused() -> None:
    parts = CASES / "clip-retrieval-parts"
    corpus = Corpus(uri=f"{parts}/img_emb", ids=f"{parts}/metadata/metadata_{{0..10}}.parquet", uri_column="image_path")
    with pytest.raises(UserError, match="11 tables for 12 files of vectors"):
        listing.list_images(corpus)


def test_labels_and_headers_with_spaces() -> None:
    folder = CASES / "label-spaces"
    memory = Memory.model_validate({"support": {"uri": f"{folder}/support.csv"}, "classes": ["cat", "dog"]})
    planned = support.plan(memory, 0)
    assert planned.support["label"].to_pylist() == ["cat", "dog", "dog"] and (planned.ignored, planned.strangers) == (0, "")
    assert index("label-spaces/header_space.csv")["label"].to_pylist() == ["cat"]


def test_folders_in_decomposed_unicode_meet_their_classes() -> None:
    folder = CASES / "label-spaces"
    memory = Memory.model_validate({"support": {"uri": f"{folder}/nfd"}, "classes": f"{folder}/classes.txt"})
    planned = support.plan(memory, 0)
    assert planned.support["label"].to_pylist() == planned.classes == [unicodedata.normalize("NFC", "café"), "tea"]
    assert all(Path(uri).exists() for uri in planned.support["uri"].to_pylist())  # files keep the names that they have


def test_one_picture_under_two_classes_is_settled_by_the_rule() -> None:
    table = index("one-picture-two-classes/support")
    ids, labels = [content_id(data) for data in read(table)], table["label"].to_pylist()
    settled, back = (support.settle(pa.array(i), pa.array(n)) for i, n in ((ids, labels), (ids[::-1], labels[::-1])))
    entries = set(settled.entry.tolist())
    assert (settled.conflicts, settled.overruled, settled.copies, len(entries)) == (2, 2, 0, 6)
    kept = {(ids[row], labels[row]) for row in entries}
    assert kept == {(ids[::-1][row], labels[::-1][row]) for row in back.entry.tolist()}
    assert {label for _, label in kept} == {"ash", "oak"}
