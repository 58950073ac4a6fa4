"""The digest of an index, and equal texts; the rest of rar.columns is held by the stages that use it."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from rar.columns import codes, digest, repeats

TEXTS = st.lists(st.text(alphabet="abé", max_size=2), max_size=12)


def test_boxes_of_a_picture_are_part_of_what_an_index_names() -> None:
    boxes = [[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 5.0, 5.0]]
    first, second = (
        pa.table({"uri": ["a.jpg"] * 2, "label": ["wren"] * 2, "box_xyxy": listed}) for listed in (boxes, boxes[::-1])
    )
    assert digest(first, "uri", "label", "box_xyxy") != digest(second, "uri", "label", "box_xyxy")
    assert digest(first, "uri", "label", "nothing") == digest(second, "uri", "label")


@given(TEXTS, TEXTS)
def test_a_digest_does_not_depend_on_chunks(first: list[str], second: list[str]) -> None:
    whole = pa.table({"uri": pa.array(first + second, pa.string())})
    parts = pa.table({"uri": pa.chunked_array([first, second], pa.string())})
    assert digest(whole, "uri") == digest(parts, "uri")


@given(TEXTS)
def test_repeats_and_codes(texts: list[str]) -> None:
    column = pa.chunked_array([texts[:3], texts[3:]], pa.string())
    seen: set[str] = set()
    again = [text for text in texts if text in seen or seen.add(text)]  # type: ignore[func-returns-value]
    assert sorted(repeats(column).to_pylist()) == sorted(again)
    names, numbers = codes(column)
    assert names.tolist() == sorted(set(texts)) and [names[number] for number in numbers] == texts
