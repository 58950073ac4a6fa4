from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.config import Corpus
from rar.corpus import tables
from rar.schema import UserError


def test_a_table_is_read_in_its_two_columns(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,label,note\na,007,x\n")
    pq.write_table(pa.table({"uri": ["a"], "label": [7], "note": ["x"]}), tmp_path / "m.parquet")
    for name, label in (("m.csv", "007"), ("m.parquet", "7")):
        names = tables.read_names(Corpus(uri=name), str(tmp_path / name))
        assert names.columns == ["uri", "label", "note"]
        assert names.uris is not None and names.labels is not None
        assert (names.uris.to_pylist(), names.labels.to_pylist()) == (["a"], [label])


def test_a_label_column_asked_for_by_name_must_be_there() -> None:
    assert tables.label_column(Corpus(uri="m"), ["uri", "label"], "m") == "label"
    assert tables.label_column(Corpus(uri="m"), ["uri"], "m") is None
    with pytest.raises(UserError, match="m has no column 'kind'"):
        tables.label_column(Corpus(uri="m", label_column="kind"), ["uri"], "m")


def test_labels() -> None:
    assert [tables.label(value) for value in ("a", 3, "", None, float("nan"), 1.0)] == ["a", "3", None, None, None, "1.0"]
    assert [tables.label(value) for value in ("\u00a0cat\u200b", "\ufeff cat\n", "\u200b", "\U0001f468\u200d\U0001f692")] == [
        *("cat", "cat", None),
        "\U0001f468\u200d\U0001f692",
    ]


def test_which_parquet_columns_are_images(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": "x"}])
    file = str(tmp_path / "a.parquet")
    columns = {"bytes": [b"x"], "image": image, "text": ["x"], "box": pa.array([{"x": 1}])}
    pq.write_table(pa.table(columns), file)
    found = {name: tables.bytes_column(Corpus(uri="a", bytes_column=name), file) for name in (*columns, "gone")}
    assert found == {"bytes": "bytes", "image": "image", "text": None, "box": None, "gone": None}
    pq.write_table(pa.table({"x": ["x"], "img": image}), file)
    assert tables.bytes_column(Corpus(uri="a"), file) == "img"
    pq.write_table(pa.table({"picture": [b"x"], "label": ["x"]}), file)  # names no files
    assert tables.bytes_column(Corpus(uri="a"), file) == "picture"
    pq.write_table(pa.table({"thumbnail": [b"x"], "uri": ["x"]}), file)
    assert tables.bytes_column(Corpus(uri="a"), file) is None
    pq.write_table(pa.table({"one": image, "two": image}), file)
    with pytest.raises(UserError, match=r"set corpus.bytes_column to one of \['one', 'two'\]"):
        tables.bytes_column(Corpus(uri="a"), file)


# CSV as it comes


def names_in(tmp_path: Path, data: bytes, name: str = "m.csv", **settings: str) -> tuple[list, list | None]:
    (tmp_path / name).write_bytes(data)
    names = tables.read_names(Corpus.model_validate({"uri": name, **settings}), str(tmp_path / name))
    assert names.uris is not None
    return names.uris.to_pylist(), None if names.labels is None else names.labels.to_pylist()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("said", [False, True])
def test_csv_of_any_encoding_and_delimiter(tmp_path: Path, encoding: str, delimiter: str, said: bool) -> None:
    lines = [f"uri{delimiter}label", f"caf\u00e9.jpg{delimiter}th\u00e9", f'"a{delimiter}b.jpg"{delimiter}"two\r\nlines"', ""]
    text = "\r\n".join([f"sep={delimiter}"] * said + lines)
    assert names_in(tmp_path, text.encode(encoding)) == (
        ["caf\u00e9.jpg", f"a{delimiter}b.jpg"],
        ["th\u00e9", "two\r\nlines"],
    )


def test_padded_headers_and_cells(tmp_path: Path) -> None:
    assert names_in(tmp_path, b'label, uri \ncat, a.jpg\n"dog", "b, c.jpg"\n') == (["a.jpg", "b, c.jpg"], ["cat", "dog"])
    assert names_in(tmp_path, b"uri, label\na.jpg,cat\n") == (["a.jpg"], ["cat"])
    assert names_in(tmp_path, b"uri,label\n a.jpg, cat \n") == ([" a.jpg"], ["cat"])  # a file's name may begin with a space


def test_a_column_twice_must_say_the_same(tmp_path: Path) -> None:
    assert names_in(tmp_path, b"uri,label,label,x,x\na,cat,cat,1,2\n") == (["a"], ["cat"])
    with pytest.raises(UserError, match="'label' twice, with different cells"):
        names_in(tmp_path, b"uri,label,label\na,cat,dog\n")


def test_large_cells_blank_lines_and_trailing_delimiters(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    data = f'uri,label,note\na,cat,"{long}\n{long}"\n\n  \nb,dog,,,\n'.encode()
    assert names_in(tmp_path, data) == (["a", "b"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"uri,label\na,cat\nb\n", "line 3: 1 cells under 2 columns"),
        (b"uri,label\na,cat,sat\n", "line 2: 3 cells under 2 columns"),
        (b"uri,label,note\na,cat,x\ry\n", "line 3: 1 cells under 3 columns; quote what holds a delimiter or a line end"),
        (b'uri,label\na,"cat\nb,dog\n', "line 3: unexpected end of data; check the quotes"),
        (b'uri,label\na,"cat"s\n', "line 2: .*; check the quotes"),
        (b"uri\ncaf\xe9\n", "neither UTF-8 nor UTF-16; save it as UTF-8"),
        (b"\n\n", "is empty"),
    ],
)
def test_csv_with_two_readings_is_refused_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        names_in(tmp_path, data)
    assert "\n" not in str(caught.value)


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def written(row: Sequence[str], delimiter: str, quoting: int) -> str:
    r"""One row without its line end. Python before 3.13 quotes a cell for those line ends alone that it writes itself, and
    leaves a lone \r bare between \n: a file of two readings, which is refused."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\r\n", quoting=quoting).writerow(row)  # type: ignore[arg-type]
    return text.getvalue().removesuffix("\r\n")


@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6),
    order=st.permutations(["uri", "label", "note"]),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
)
def test_what_python_writes_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    order: list[str],
    delimiter: str,
    encoding: str,
    end: str,
    quoting: int,
) -> None:
    data = "".join(written(row, delimiter, quoting) + end for row in [order, *rows]).encode(encoding)
    uris, labels = names_in(tmp_path_factory.mktemp("csv"), data)
    assert uris == [row[order.index("uri")] or None for row in rows]
    assert labels == [tables.label(row[order.index("label")]) for row in rows]


# Hugging Face


def features(**columns: list[str]) -> dict[bytes, bytes]:
    kinds = {name: {"names": names, "_type": "ClassLabel"} for name, names in columns.items()}
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


def test_class_labels_get_their_names_from_the_schema(tmp_path: Path) -> None:
    table = pa.table({"uri": list("abcd"), "kind": pa.array([1, 0, -1, None])})
    file = str(tmp_path / "a.parquet")
    pq.write_table(table.replace_schema_metadata(features(kind=["cat", "caf\u0065\u0301"])), file)
    names = tables.read_names(Corpus(uri=file), file)
    assert names.labels is not None and names.labels.to_pylist() == ["caf\u00e9", "cat", None, None]
    pq.write_table(table.replace_schema_metadata(features(kind=["cat"], uri=["x"])), file)  # two: the user must say which
    assert tables.read_names(Corpus(uri=file), file).labels is None
    chosen = tables.read_names(Corpus(uri=file, label_column="kind"), file)
    assert chosen.labels is not None and chosen.labels.to_pylist() == [None, "cat", None, None]


@pytest.mark.parametrize("noted", [b"", b"{", b"[]", b"null", b'{"info": 3}', b'{"info": {"features": {"label": 1}}}'])
def test_odd_schema_notes_are_no_class_labels(noted: bytes) -> None:
    assert tables.class_labels(pa.schema([("label", pa.int64())], {b"huggingface": noted})) == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (pa.array(["a ", None, "", "\u0065\u0301"]), ["a", None, None, "\u00e9"]),
        (pa.array([1.0, float("nan")]), ["1.0", None]),
        (pa.array([b"cat", b"\xff"]), ["cat", "\ufffd"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.nulls(2), [None, None]),
        (pa.array([True]), ["True"]),
        (pa.array([], pa.int64()), []),
    ],
)
def test_columns_as_labels(values: pa.Array, found: list) -> None:
    assert tables.labels(pa.chunked_array([values])).to_pylist() == found
    with pytest.raises(UserError, match="not names"):
        tables.labels(pa.chunked_array([pa.array([["a"]])]))
