"""Lists of an epoch: a function of seed and epoch, classes in turns, the truth anywhere, rejections as many as asked for.

Slow obvious rules stand beside the draw. Not covered: whether such lists teach anything (see the README).
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.config import Tune
from rar.tune import draw
from rar.tune.data import DATA, divided, split
from rar.tune.draw import Lesson, Source

POOL = [f"class {number}" for number in range(12)]


def rows(per_class: dict[str, int], split_name: str = "train") -> pa.Table:
    """DATA of pictures whose candidates are POOL, the truth at a place that turns."""
    records: list[dict[str, Any]] = []
    for label, count in per_class.items():
        for number in range(count):
            others = [name for name in POOL if name != label]
            names = [*others[: number % 4], label, *others[number % 4 :]]
            candidates = [
                {"class_id": POOL.index(name), "class_name": name, "score": -float(at)} for at, name in enumerate(names)
            ]
            kind = "easy" if number % 4 == 0 else "hard"
            one = {"image_id": f"{label}{number}", "label": label, "candidates": candidates, "truth": number % 4}
            records.append(one | {"difficulty": kind, "split": split_name, "group": len(records), "uri": "x"})
    return pa.Table.from_pylist(records, DATA)


def of(table: pa.Table, **more: bool) -> Source:
    return draw.source(table, "train", 5, **{"always_none": False, "letters": True, **more})


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    found, tune = of(rows({"class 0": 20, "class 1": 20})), Tune()
    assert draw.epoch(found, tune, 3, 1) == draw.epoch(found, tune, 3, 1)
    first, second, other = (draw.epoch(found, tune, seed, number) for seed, number in ((3, 0), (3, 1), (4, 0)))
    assert first != second and first != other


def test_lists_hold_the_truth_once_anywhere_and_the_target_begins_with_it() -> None:
    table = rows({f"class {number}": 200 for number in range(4)})
    lessons = draw.epoch(of(table), Tune(rejections=0.2), 0, 0)
    labels = table["label"].to_pylist()
    places: Counter[tuple[int, int]] = Counter()
    for lesson in lessons:
        truth, refused = labels[lesson.row], lesson.answer == len(lesson.names)
        assert 2 <= len(lesson.names) <= 5 and len(set(lesson.names)) == len(lesson.names)
        assert sorted(lesson.order) == list(range(len(lesson.names)))
        assert lesson.names.count(truth) == (not refused) and lesson.none >= refused
        if not refused:
            assert lesson.names[lesson.answer] == truth and lesson.order[0] == lesson.answer
            places[len(lesson.names), lesson.answer] += 1
    for size in (2, 3, 4, 5):
        counts = np.array([places[size, place] for place in range(size)])
        expected = counts.sum() / size
        assert ((counts - expected) ** 2 / expected).sum() < 20, counts  # chi-square, p < .001 of 4 degrees
    share = sum(lesson.answer == len(lesson.names) for lesson in lessons) / len(lessons)
    assert abs(share - 0.2) < 0.06
    assert abs(sum(lesson.none for lesson in lessons) / len(lessons) - 0.5) < 0.06


def test_the_target_keeps_the_retrievers_order_behind_the_truth() -> None:
    table = rows({"class 3": 40})
    for lesson in draw.epoch(of(table), Tune(rejections=0.0), 0, 0):
        best = [lesson.names[place] for place in lesson.order]
        retrieved = [one["class_name"] for one in table["candidates"][lesson.row].as_py()]
        assert best[0] == "class 3" and best[1:] == sorted(best[1:], key=retrieved.index)


def test_a_list_that_is_written_keeps_what_was_shown_behind_the_truth() -> None:
    for lesson in draw.epoch(of(rows({"class 3": 40}), letters=False), Tune(), 0, 0):
        written = [lesson.names[place] for place in lesson.order]
        assert written[0] == "class 3" and not lesson.none
        assert written[1:] == [name for name in lesson.names if name != "class 3"]


def test_without_shuffling_lists_stand_in_the_retrievers_order() -> None:
    table = rows({"class 3": 40})
    for lesson in draw.epoch(of(table, letters=False), Tune(shuffle=False), 0, 0):
        retrieved = [one["class_name"] for one in table["candidates"][lesson.row].as_py()]
        assert lesson.names == sorted(lesson.names, key=retrieved.index)


def test_classes_come_in_turns_and_easy_pictures_as_often_as_asked() -> None:
    table = rows({"class 0": 300, "class 1": 30, "class 2": 30})
    lessons = draw.epoch(of(table), Tune(easy=0.1), 0, 0)
    labels, kinds = table["label"].to_pylist(), table["difficulty"].to_pylist()
    counts = Counter(labels[lesson.row] for lesson in lessons)
    assert max(counts.values()) - min(counts.values()) <= 1
    easy = Counter(kinds[lesson.row] for lesson in lessons)["easy"] / len(lessons)
    assert abs(easy - 0.1) < 0.05


def test_every_list_shows_none_of_these_where_ranking_always_does() -> None:
    lessons = draw.epoch(of(rows({"class 0": 200}), always_none=True), Tune(rejections=0.15), 0, 0)
    assert all(lesson.none for lesson in lessons)
    assert abs(sum(lesson.answer == len(lesson.names) for lesson in lessons) / len(lessons) - 0.15) < 0.08


@given(st.lists(st.integers(1, 9), min_size=1, max_size=80), st.integers(1, 7))
def test_buckets_lose_nothing_and_hold_lists_of_like_length(sizes: list[int], batch: int) -> None:
    lessons = [Lesson(row, ["x" * size, "y"], [0, 1], 0) for row, size in enumerate(sizes)]
    found = draw.bucketed(lessons, batch, 0, 0)
    assert len(found) % batch == 0 and {lesson.row for lesson in found} == set(range(len(sizes)))
    counts = Counter(lesson.row for lesson in found).values()
    assert sum(counts) - len(sizes) < batch or len(sizes) < batch
    if len(found) <= batch * draw.BUCKET:
        spans = [sorted(one.length for one in found[start : start + batch]) for start in range(0, len(found), batch)]
        assert all(one[-1] <= other[0] for one, other in pairwise(sorted(spans)))


def test_what_is_judged_is_the_same_every_time() -> None:
    table = rows({"class 0": 40, "class 5": 40}, "seen")
    lessons = draw.judged(table, "seen", 3, 0, 50)
    assert lessons == draw.judged(table, "seen", 3, 0, 50) and len(lessons) == 50
    truth, labels = table["truth"].to_pylist(), table["label"].to_pylist()
    assert all(truth[lesson.row] < 3 and lesson.names[lesson.answer] == labels[lesson.row] for lesson in lessons)
    assert len({lesson.answer for lesson in lessons}) == 3


def test_near_duplicates_and_novel_classes_are_kept_apart() -> None:
    labels = [f"class {number}" for number in range(10) for _ in range(8)]
    groups = [number // 2 for number in range(80)]
    splits = split(labels, groups, Tune(), 0)
    of_group: dict[int, set[str]] = {}
    for group, name in zip(groups, splits, strict=True):
        of_group.setdefault(group, set()).add(name)
    assert all(len(names) == 1 for names in of_group.values())
    novel = {label for label, name in zip(labels, splits, strict=True) if name == "novel"}
    assert len(novel) == 2 and {name for label, name in zip(labels, splits, strict=True) if label in novel} == {"novel"}
    assert set(splits) == {"train", "val", "seen", "novel"}
    assert splits == split(labels, groups, Tune(), 0) != split(labels, groups, Tune(), 1)


def test_a_novel_name_is_no_candidate_in_training() -> None:
    table = divided(rows({name: 8 for name in POOL}), Tune(novel_classes=0.25), 0)
    novel = {row["label"] for row in table.to_pylist() if row["split"] == "novel"}
    assert len(novel) == 3
    for row in table.to_pylist():
        names = {one["class_name"] for one in row["candidates"]}
        assert bool(names & novel) == (row["split"] not in ("train", "val"))
        assert row["truth"] == [one["class_name"] for one in row["candidates"]].index(row["label"])


def test_too_few_pictures_are_refused() -> None:
    from rar.schema import UserError

    with pytest.raises(UserError, match="needs more labelled pictures"):
        divided(rows({"class 0": 1, "class 1": 1}), Tune(), 0)
