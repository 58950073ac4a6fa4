"""Folders written by the `datasets` package itself come back whole: pictures, labels, class names, order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rar.config import Corpus
from rar.corpus.datasets import named
from rar.corpus.datasets.known import Listed
from rar.corpus.listing import read_many
from rar.schema import INDEX, UserError
from tests.corpus.datasets.trees import picture, put

datasets.disable_progress_bars()
NAMES = ["zebra", "ant", "Füchse", "a, b", "7"]  # in no order, one of them a number
ROWS = st.lists(st.tuples(st.integers(0, 255), st.integers(0, len(NAMES) - 1)), min_size=1, max_size=9)


def dataset(rows: list[tuple[int, int]], label: str = "label") -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    columns = {"image": [{"bytes": picture(shade), "path": None} for shade, _ in rows], label: [number for _, number in rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def hub(rows: list[tuple[int, int]], root: Path, parts: int) -> None:
    """Shards named as the hub names them."""
    whole = dataset(rows)
    for number in range(parts):
        file = root / f"data/test-{number:05d}-of-{parts:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.shard(parts, number, contiguous=True).to_parquet(str(file))


def saved(rows: list[tuple[int, int]], root: Path, parts: int) -> None:
    dataset(rows).save_to_disk(str(root / "test"), num_shards=parts)


def saved_dictionary(rows: list[tuple[int, int]], root: Path, parts: int) -> None:
    both = datasets.DatasetDict({"train": dataset([(1, 0)]), "test": dataset(rows)})
    both.save_to_disk(str(root), num_shards={"train": 1, "test": parts})


def read(root: Path, **more: Any) -> Listed:
    return named.read(Corpus.model_validate({"dataset": "huggingface", "root": str(root), "split": "test", **more}))


def pictures(index: pa.Table) -> list[Any]:
    return read_many(*(index[column].to_pylist() for column in ("uri", "offset", "size")))


@pytest.mark.parametrize("write", [hub, saved, saved_dictionary])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, parts=st.integers(1, 3))
def test_a_round_trip(write: Any, rows: list[tuple[int, int]], parts: int, tmp_path: Path) -> None:
    root = tmp_path / "set #1"
    shutil.rmtree(root, ignore_errors=True)
    write(rows, root, min(parts, len(rows)))
    found = read(root)
    assert found.classes == NAMES and found.index.schema == INDEX
    assert found.index["label"].to_pylist() == [NAMES[number] for _, number in rows]
    assert pictures(found.index) == [picture(shade) for shade, _ in rows]
    assert read(root, limit=2).index.num_rows == min(2, len(rows))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_imagefolder_with_metadata(kind: str, tmp_path: Path) -> None:
    """The metadata lies in the split's folder; `datasets` itself reads the same rows."""
    rows = [("b.png", "wren"), ("sub/a.png", "owl"), ("c.png", "wren")]
    for place, (file, _) in enumerate(rows):
        put(tmp_path / "test" / file, picture(place))
    lines = [json.dumps({"label": label, "file_name": file}) for file, label in rows]
    if kind == "csv":
        lines = ["label,file_name", *(f"{label},{file}" for file, label in rows)]
    put(tmp_path / f"test/metadata.{kind}", "\n".join(lines) + "\n")
    found = read(tmp_path)
    assert found.classes == ["owl", "wren"] and found.index["label"].to_pylist() == ["wren", "owl", "wren"]
    assert pictures(found.index) == [picture(place) for place in range(3)]
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="test", cache_dir=str(tmp_path / "cache"))
    assert sorted(theirs["label"]) == sorted(found.index["label"].to_pylist())


def test_class_folders(tmp_path: Path) -> None:
    for name in ("wren", "owl"):
        put(tmp_path / "test" / name / "1.png")
    found = read(tmp_path)
    assert found.classes == ["owl", "wren"] and found.index["label"].to_pylist() == ["owl", "wren"]


def test_another_label_column(tmp_path: Path) -> None:
    dataset([(1, 2)], "fine").save_to_disk(str(tmp_path / "test"))
    assert read(tmp_path, label_column="fine").index["label"].to_pylist() == read(tmp_path).index["label"].to_pylist()
    with pytest.raises(UserError, match="has no column 'coarse'"):
        read(tmp_path, label_column="coarse")


def without(folder: Path, file: str) -> None:
    (folder / file).unlink()


def other_names(root: Path) -> None:
    file = root / "data/test-00001-of-00002.parquet"
    table = pq.read_table(file)
    changed = table.schema.metadata[b"huggingface"].replace(b"zebra", b"horse")
    pq.write_table(table.replace_schema_metadata({b"huggingface": changed}), file)


@pytest.mark.parametrize(
    ("write", "spoil", "message"),
    [
        (hub, lambda root: without(root, "data/test-00001-of-00002.parquet"), "test-00001-of-00002.parquet is missing"),
        (hub, other_names, "test-00001-of-00002.parquet and .* name other classes"),
        (saved, lambda root: without(root, "test/data-00001-of-00002.arrow"), "data-00001-of-00002.arrow is missing"),
        (saved, lambda root: put(root / "test/state.json", "{"), "state.json"),
        (
            saved,
            lambda root: put(root / "test/data-00000-of-00002.arrow", "no arrow"),
            "cannot read .*data-00000-of-00002.arrow",
        ),
        (hub, lambda root: shutil.rmtree(root / "data"), "has no split 'test'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(write: Any, spoil: Any, message: str, tmp_path: Path) -> None:
    write([(1, 1), (2, 2)], tmp_path, 2)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_split_is_refused(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"image": [{"bytes": picture(), "path": None}]}, split="train")
    one.save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match="holds the split 'train', not 'test'"):
        read(tmp_path)


def test_check_counts_what_is_there(tmp_path: Path) -> None:
    saved_dictionary([(1, 1), (2, 2)], tmp_path, 1)
    found = named.check("huggingface", str(tmp_path))
    assert [(one.split, one.pictures, one.published, one.classes, one.fault) for one in found] == [
        ("train", 1, None, len(NAMES), None),
        ("test", 2, None, len(NAMES), None),
    ]
