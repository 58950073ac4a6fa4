"""The rules of the support set against their plain statements, and on the drawn case."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.config import Memory
from rar.corpus import support
from rar.schema import UserError

LABELS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["cat", "dog", "eel"])), max_size=12)


def rows(labels: list[str]) -> pa.Table:
    return pa.table({"row": range(len(labels)), "label": pa.array(labels, pa.string())})


def settle(image_ids: list[str], labels: list[str]) -> support.Settled:
    return support.settle(*(pa.chunked_array([pa.array(one, pa.string())]) for one in (image_ids, labels)))


@given(LABELS, st.randoms())
def test_a_picture_is_one_entry_whatever_the_order(pictures: list[tuple[str, str]], random: object) -> None:
    shuffled = list(pictures)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    kept = []
    for some in (pictures, shuffled):
        ids, labels = [one for one, _ in some], [label for _, label in some]
        settled = settle(ids, labels)
        assert all(ids[row] == ids[own] for row, own in enumerate(settled.entry.tolist()))
        entries = sorted(set(settled.entry.tolist()))
        kept.append(sorted(some[row] for row in entries))
        assert len(entries) + settled.copies + settled.overruled == len(some)
    assert kept[0] == kept[1]
    for image_id, label in kept[0]:  # the rule, said plainly
        votes = Counter(other for one, other in pictures if one == image_id)
        assert votes[label] == max(votes.values())
        assert label == min(name for name in votes if votes[name] == votes[label])
    assert len(kept[0]) == len({image_id for image_id, _ in pictures})
    assert settled.conflicts == len({one for one, _ in pictures if len({name for x, name in pictures if x == one}) > 1})


def test_settled_sets_say_what_they_left_out() -> None:
    assert settle([], []).remarks() == [] == settle(["a", "b"], ["x", "x"]).remarks()
    copies, conflict = settle(["a", "a", "b", "b", "b"], ["x", "x", "y", "x", "x"]).remarks()
    assert copies.startswith("2 copies") and conflict.startswith("1 pictures stand under several labels, e.g. 'x' and 'y';")


def slow_draw(labels: list[str], shots: int, seed: int) -> list[int]:
    chosen: list[int] = []
    for number, label in enumerate(sorted(set(labels))):
        own = np.flatnonzero(np.array(labels) == label)
        chosen += np.random.default_rng([seed, number]).permutation(own)[:shots].tolist()
    return sorted(chosen)


@given(st.lists(st.sampled_from(["ü", "a", "b c", "zz"]), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 9))
def test_shots_are_drawn_class_by_class_and_nested(labels: list[str], shots: int, seed: int) -> None:
    drawn = support.draw(rows(labels), shots, seed)["row"].to_pylist()
    assert drawn == slow_draw(labels, shots, seed)
    assert set(drawn) <= set(support.draw(rows(labels), shots + 1, seed)["row"].to_pylist())


def test_labels_that_are_no_class_are_told_with_an_example() -> None:
    labels = pa.chunked_array([["cat", "dgo", None, "dgo", "Cat", "zebra"]])
    assert support.strangers(labels, ["cat", "dog"]) == "3 labels are no class (4 rows), e.g. 'dgo' (2)"
    assert support.strangers(labels, ["cat", "dgo", "Cat"]) == "1 label is no class (1 rows), e.g. 'zebra' (1)"
    assert support.strangers(labels, ["cat", "dgo", "Cat", "zebra"]) == ""
    assert support.strangers(pa.chunked_array([], pa.string()), []) == ""


def test_thin_classes_are_told() -> None:
    lines = support.thin_classes(pa.chunked_array([["a", "a", "b"]]), ["a", "b", "c", "d"])
    assert lines[0] == "2 classes have no support image, e.g. 'c'" and lines[1].startswith("1 class has one support image")
    assert support.thin_classes(pa.chunked_array([["a", "a"]]), ["a"]) == []


def test_labels_and_classes_are_compared_stripped_and_composed(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("uri,label\n1.jpg,cafe\u0301\n2.jpg,dog \n3.jpg, tea\n4.jpg,\n5.jpg,ox\n", encoding="utf-8")
    memory = Memory.model_validate(
        {"support": {"uri": str(tmp_path / "s.csv")}, "classes": ["caf\u00e9", "dog", "tea ", "fly"]}
    )
    planned = support.plan(memory, 0)
    assert planned.classes == ["caf\u00e9", "dog", "tea", "fly"]
    assert planned.support["label"].to_pylist() == ["caf\u00e9", "dog", "tea"] and planned.ignored == 2
    assert planned.strangers == "1 label is no class (1 rows), e.g. 'ox' (1)"
    assert [line.split(",")[0] for line in planned.remarks] == [
        "1 class has no support image",
        "3 classes have one support image",
    ]


@pytest.mark.parametrize(
    ("csv", "classes", "message"),
    [
        (None, None, "memory needs `classes`"),
        ("uri,label\n1.jpg,\n", None, "has no labels"),
        ("uri,label\n1.jpg,cat\n", ["dog"], "no label of memory.support is among the 1 classes; first label: cat"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, csv: str | None, classes: list[str] | None, message: str) -> None:
    (tmp_path / "s.csv").write_text(csv or "")
    with pytest.raises(UserError, match=message):
        support.plan(Memory.model_validate({"support": csv and {"uri": str(tmp_path / "s.csv")}, "classes": classes}), 0)
