from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rar.config import Corpus
from rar.corpus import tables
from rar.schema import UserError


def test_a_manifest_is_read_in_its_two_columns(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,label,note\na,007,x\n")
    pq.write_table(pa.table({"uri": ["a"], "label": [7], "note": ["x"]}), tmp_path / "m.parquet")
    for name, label in (("m.csv", "007"), ("m.parquet", 7)):
        table, columns = tables.read_manifest(Corpus(uri=name), str(tmp_path / name))
        assert columns == ["uri", "label", "note"]
        assert (table["uri"].to_pylist(), table["label"].to_pylist()) == (["a"], [label])


def test_a_label_column_asked_for_by_name_must_be_there() -> None:
    assert tables.label_column(Corpus(uri="m"), ["uri", "label"], "m") == "label"
    assert tables.label_column(Corpus(uri="m"), ["uri"], "m") is None
    with pytest.raises(UserError, match="m has no column 'kind'"):
        tables.label_column(Corpus(uri="m", label_column="kind"), ["uri"], "m")


def test_labels() -> None:
    assert [tables.label(value) for value in ("a", 3, "", None, float("nan"), 1.0)] == ["a", "3", None, None, None, "1.0"]


def test_which_parquet_columns_are_images(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": "x"}])
    pq.write_table(
        pa.table({"bytes": [b"x"], "image": image, "text": ["x"], "box": pa.array([{"x": 1}])}), tmp_path / "a.parquet"
    )
    found = {
        name: tables.has_bytes(Corpus(uri="a", bytes_column=name), str(tmp_path / "a.parquet"))
        for name in ("bytes", "image", "text", "box", "gone")
    }
    assert found == {"bytes": True, "image": True, "text": False, "box": False, "gone": False}
