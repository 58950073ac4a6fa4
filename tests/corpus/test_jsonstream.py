"""The item reader against the json module: any document, cut into pieces of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.corpus import jsonstream
from rar.corpus.jsonstream import Item, items
from rar.schema import UserError

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
keys = st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
documents = st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=4), values, max_size=5)


@settings(max_examples=200)
@given(
    documents, st.integers(1, 9), st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
)
def test_items_are_those_of_json_loads(
    tmp_path_factory: pytest.TempPathFactory, data: Any, piece: int, indent: int | None, ascii_only: bool, encoding: str
) -> None:
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.getbasetemp() / "document.json"
    path.write_bytes(text.encode(encoding, "replace"))
    expected = list(items(json.loads(text.encode(encoding, "replace").decode(encoding)), "a test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonstream, "PIECE", piece)
        assert repr(list(items(path, "a test"))) == repr(expected)  # NaN is not equal to itself


@given(documents, st.data())
def test_a_damaged_document_is_refused_as_json_loads_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, data: Any, draw: st.DataObject
) -> None:
    text = json.dumps(data)
    at = draw.draw(st.integers(0, len(text) - 1))
    put = draw.draw(st.sampled_from(["", ",", "]", "}", '"', "x", " ", "1"]))
    broken = text[:at] + put + text[at + draw.draw(st.integers(0, 2)) :]
    path = tmp_path_factory.getbasetemp() / "broken.json"
    path.write_text(broken)
    try:
        known = json.loads(broken, object_pairs_hook=lambda pairs: pairs)
    except ValueError:
        known = None
    try:
        found = list(items(path, "a test"))
    except UserError as error:
        assert "not valid JSON" in str(error) and "\n" not in str(error)
        assert known is None or not isinstance(known, list) or "twice" in str(error)
    else:
        assert isinstance(known, list) and isinstance(found, list)


def test_the_lists_of_an_object_come_item_by_item(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"n": 1, "a": [2, [3]], "b": [], "c": {"d": [4]}}')
    assert list(items(tmp_path / "a.json", "a test")) == [
        Item("n", None, 1),
        Item("a", None, []),
        Item("a", 0, 2),
        Item("a", 1, [3]),
        Item("b", None, []),
        Item("c", None, {"d": [4]}),
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "neither an object nor a list"),
        ("12", "neither an object nor a list"),
        ("[1] 2", "something follows"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("[" * 200_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "not valid JSON"),
        ("[1,]", "not valid JSON"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=wanted) as raised:
        list(items(tmp_path / "a.json", "a test"))
    assert "a.json" in str(raised.value) and "\n" not in str(raised.value)


def test_missing_files_folders_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file not found"):
        list(items(tmp_path / "none.json", "a test"))
    with pytest.raises(UserError, match="cannot read"):
        list(items(tmp_path, "a test"))
    (tmp_path / "a.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(UserError, match="not valid JSON"):
        list(items(tmp_path / "a.json", "a test"))
