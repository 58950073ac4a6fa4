"""The tolerant reader: kinds of odd files by hand, and any file at all, whose counts must add up."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.config import Corpus, Detect
from rar.corpus import coco, truth
from rar.corpus.listing import list_images
from rar.evaluation.ap import evaluate
from rar.schema import UserError

TRUTH: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 21, 21], "area": 441, "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cat"}],
}


def changed(**fields: Any) -> dict[str, Any]:
    """TRUTH with other fields in its one annotation."""
    return TRUTH | {"annotations": [TRUTH["annotations"][0] | fields]}


def test_ids_are_compared_as_written_and_then_as_numbers() -> None:
    ids = truth.Ids([1, "000002", 3.0, "c", "4", 4, "-7"])
    assert ids.twice is None
    assert [ids.place(one) for one in (1, 1.0, "1", "0001", " 1 ", "1.0")] == [0] * 6
    assert [ids.place(one) for one in ("000002", 2, "2", 3, "3", "c", " c", -7)] == [1, 1, 1, 2, 2, 3, 3, 6]
    assert [ids.place(one) for one in ("4", 4, "04", 4.0)] == [4, 5, -1, 5]  # "04" is neither as written, and both as a number
    assert [ids.place(one) for one in (True, None, [1], math.nan, math.inf, "1e0", "", 5, 10**400)] == [-1] * 9
    assert truth.Ids([1, 2, 2.0, 1]).twice == 2.0
    assert truth.Ids([None, None, "1", 1]).twice is None


@pytest.mark.parametrize("crowd", [0, None, "0", "", False, 0.0, "false", "No"])
def test_what_is_no_crowd(crowd: Any) -> None:
    assert not truth.read(changed(iscrowd=crowd)).boxes.crowd[0]


@pytest.mark.parametrize("crowd", [1, "1", True, 1.0, "TRUE"])
def test_what_is_a_crowd(crowd: Any) -> None:
    known = truth.read(changed(iscrowd=crowd, ignore=crowd))
    assert known.boxes.crowd[0] and known.boxes.ignore[0]


@pytest.mark.parametrize("area", [None, math.nan, "441", [], True])
def test_an_area_that_is_none_is_the_box_s(area: Any) -> None:
    assert truth.read(changed(area=area, bbox=[0, 0, 3, 4])).boxes.area.tolist() == [12]
    assert truth.read(changed(area=5)).boxes.area.tolist() == [5]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"bbox": [8, 8, math.nan, 21]}, r"annotation 1 \(annotations\[0\]\) has bbox \[8, 8, nan, 21\], not 4 finite numbers"),
        ({"bbox": None}, "has bbox None"),
        ({"bbox": [1, 2, 3]}, "has bbox"),
        ({"bbox": [1, 2, 3, "4"]}, "has bbox"),
        ({"bbox": [1, 2, 3, 10**400]}, "has bbox"),
        ({"iscrowd": "perhaps"}, "has iscrowd 'perhaps', neither 0 nor 1"),
        ({"ignore": []}, r"has ignore \[\], neither 0 nor 1"),
        ({"category_id": 9}, "has unknown category_id 9"),
        ({"category_id": [1]}, r"has unknown category_id \[1\]"),
        ({"image_id": "two"}, "1 boxes of image_id 'two', which the corpus lacks"),
        ({"image_id": None}, "1 boxes of image_id None"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_named(fields: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    data = changed(**fields)
    known = truth.read(data)
    assert len(known.boxes.id) == 0 and [fault.annotations for fault in known.faults] == [1]
    assert re.search(wanted, known.faults[0].text)
    with pytest.raises(UserError, match="1 annotations of the truth cannot be used"):
        evaluate([], data, "coco")
    data["annotations"] = [*data["annotations"], TRUTH["annotations"][0]]
    (tmp_path / "truth.json").write_text(json.dumps(data))
    table, errors = coco.read_boxes(Corpus(uri=str(tmp_path / "truth.json")), Detect())
    assert table["box_labels"].to_pylist() == [["cat"]]
    assert len(errors) == 1 and re.search(wanted, str(errors[0]["error"])) and "truth.json" in str(errors[0])


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ([], "is a list, no COCO file"),
        ({"annotations": []}, "has no COCO `images`"),
        ({"images": {"1": "a.jpg"}}, "`images` of the corpus is no list"),
        ({"images": ["a.jpg"]}, r"images\[0\] is no object but 'a.jpg'"),
        ({"images": [], "categories": ["cat"]}, r"categories\[0\] is no object"),
    ],
)
def test_other_files_are_user_errors(data: Any, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        truth.read(data)


def test_the_lists_may_come_in_any_order_and_names_are_stripped_and_composed() -> None:
    data = {
        "annotations": [{"image_id": "1", "category_id": "01", "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": " cafe\u0301 "}],
    }
    known = truth.read(data | {"images": [{"id": 1}]})
    assert known.names == [
        "caf\u00e9"
    ] and known.boxes.category.tolist() == known.boxes.image.tolist() == known.boxes.id.tolist() == [0]


def test_pictures_are_found_in_both_layouts_by_classify_and_detect(tmp_path: Path) -> None:
    for name in ("coco/val2017/9.jpg", "flat/9.jpg", "v3det/images/q/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    lvis = {
        "images": [
            {"id": 1, "coco_url": "http://images.example.org/val2017/9.jpg?x#y"},
            {"id": 2, "file_name": None, "coco_url": "train2017/8.jpg"},
        ]
    }
    v3det = {"images": [{"id": 1, "file_name": "images/q/5.jpg"}]}
    named = {"images": [{"id": 1, "file_name": "val2017/9.jpg"}]}
    for data, layouts, found in (
        (named, ("coco", "coco/val2017"), ["coco/val2017/9.jpg"]),
        (lvis, ("coco", "coco/val2017"), ["coco/val2017/9.jpg", None]),
        (v3det, ("v3det", "v3det/images"), ["v3det/images/q/5.jpg"]),
    ):
        (tmp_path / "truth.json").write_text(json.dumps(data))
        for layout in layouts:
            corpus = Corpus(uri=str(tmp_path / "truth.json"), images=str(tmp_path / layout))
            uris = list_images(corpus)["uri"].to_pylist()
            assert uris == coco.list_pictures(corpus)["uri"].to_pylist()
            assert [uri for uri, name in zip(uris, found, strict=True) if name] == [
                str(tmp_path / name) for name in found if name
            ]
    assert truth.uris(truth.read(named), str(tmp_path / "flat")) == [str(tmp_path / "flat/9.jpg")]
    assert truth.uris(truth.read({"images": [{"id": 1}]}), "/x") == ["the corpus#images[0]"]
    assert truth.uris(truth.read({"images": [{"file_name": "s3://b/a.jpg"}, {"file_name": "/a/b.jpg"}]}), "/a") == [
        "s3://b/a.jpg",
        "/a/b.jpg",
    ]
    with pytest.raises(UserError, match=r"is not a folder; check corpus\.images"):
        coco.list_pictures(Corpus(uri=str(tmp_path / "truth.json"), images=str(tmp_path / "none")))


odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, 1, 2, 1.0, "1", "01", "two", True, [], {}, math.nan, math.inf, -1, 10**30, "\ud800"]
)
numbers = st.sampled_from([0, 1, -3, 8.5, 1e308, 10**400, math.nan, None, "4"])
boxes: st.SearchStrategy[Any] = st.lists(numbers, min_size=3, max_size=5) | odd | st.just([1, 2, 3, 4])
pictures = st.fixed_dictionaries({}, optional={"id": odd, "file_name": odd, "coco_url": odd, "width": odd, "height": odd})
few = st.integers(0, 2)
good = st.fixed_dictionaries({"id": few, "image_id": few, "category_id": few, "bbox": st.just([1, 2, 3, 4])})
notes: st.SearchStrategy[Any] = good | st.fixed_dictionaries(
    {}, optional={"id": odd, "image_id": odd, "category_id": odd, "bbox": boxes, "area": odd, "iscrowd": odd, "ignore": odd}
)
categories = st.fixed_dictionaries({}, optional={"id": odd, "name": odd, "frequency": odd})
files = st.fixed_dictionaries(
    {
        "images": st.lists(pictures | st.builds(lambda i: {"id": i, "file_name": f"{i}.jpg"}, few), max_size=3),
        "annotations": st.lists(notes | odd, max_size=6),
        "categories": st.lists(categories | st.builds(lambda i: {"id": i, "name": f"c{i}"}, few), max_size=3),
    }
)


@settings(max_examples=100)
@given(files)
def test_any_file_is_read_or_refused_and_counts_add_up(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    before = copy.deepcopy(data)
    total = len(data["annotations"])
    try:
        known = truth.read(data)
        assert len(known.boxes.id) + sum(fault.annotations for fault in known.faults) == total
        assert len(known.pictures) == len(data["images"]) == len(truth.uris(known, "/x"))
        table, errors = coco.read_boxes(Corpus(uri=str(path)), Detect())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        counts = [int(found[0]) if (found := re.match(r"\d+(?= boxes of)", str(one["error"]))) else 1 for one in errors]
        named = [known.names[place] is not None for place in known.boxes.category]
        crowds = int((known.boxes.crowd & np.array(named, bool)).sum())
        assert sum(map(len, table["box_ids"].to_pylist())) + sum(counts) + crowds == total
    for style in ("coco", "lvis", "v3det"):
        try:
            assert all(-1 <= value <= 1 for value in evaluate([], path, style).values())  # type: ignore[arg-type]
        except UserError as error:
            assert "\n" not in str(error)
    assert repr(data) == repr(before)
