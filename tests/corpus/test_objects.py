"""Labelled boxes as a support set: from JSON and from tables, with each rule for what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rar.config import Corpus, Memory
from rar.corpus import objects, support
from rar.schema import UserError
from tests.conftest import SHARED_DATA, needs_shared_data

BOXES = [
    {"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20]},
    {"image_id": 2, "category_id": 2, "bbox": [0, 0, 40, 50]},
    {"image_id": 1, "category_id": 2, "bbox": [5, 5, 40, 7.5]},  # tiny
    {"image_id": 1, "category_id": 1, "bbox": [0, 0, 60, 60], "iscrowd": 1},
    {"image_id": 2, "category_id": 1, "bbox": [20, 20, 8, 8]},
    {"image_id": 2, "category_id": 1, "bbox": [20, 20, None, 8]},  # a fault
]


def write(folder: Path, boxes: list[dict[str, Any]] = BOXES) -> str:
    truth = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 60} for number in (1, 2)],
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes, start=1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "eel"}],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    return str(folder / "truth.json")


def test_every_box_of_a_json_is_taken_left_out_or_a_fault(tmp_path: Path) -> None:
    planned = support.plan(Memory(support=Corpus(uri=write(tmp_path))), 0)
    assert planned.boxed and planned.classes == ["cat", "dog"]  # eel has no box
    rows = planned.support.to_pylist()
    assert [(row["row"], Path(row["uri"]).name, row["label"]) for row in rows] == [
        (0, "1.jpg", "cat"),
        (1, "2.jpg", "dog"),
        (2, "2.jpg", "cat"),
    ]
    assert [row["box_xyxy"] for row in rows] == [[10, 10, 40, 30], [0, 0, 40, 50], [20, 20, 28, 28]]
    assert all((row["width"], row["height"]) == (64, 60) for row in rows)
    assert planned.faults.num_rows == 1 and "annotation 6" in planned.faults["error"][0].as_py()
    assert planned.remarks[0].startswith("1 crowd region") and planned.remarks[1].startswith("1 boxes have a side below")
    all_sides = support.plan(Memory(support=Corpus(uri=write(tmp_path)), min_side=0), 0)
    assert all_sides.support.num_rows == 4


def test_shots_are_drawn_of_boxes_by_class(tmp_path: Path) -> None:
    boxes = [{"image_id": 1 + n % 2, "category_id": 1 + n % 3, "bbox": [n, n, 20, 20]} for n in range(24)]
    memory = Memory(support=Corpus(uri=write(tmp_path, boxes)), shots=3)
    drawn = support.plan(memory, 1).support
    assert sorted(drawn["label"].to_pylist()) == ["cat"] * 3 + ["dog"] * 3 + ["eel"] * 3
    assert drawn.equals(support.plan(memory, 1).support) and not drawn.equals(support.plan(memory, 2).support)


@pytest.mark.parametrize("column", ["box_xyxy", "bbox"])
def test_a_table_of_boxes_gives_what_the_json_gives(column: str, tmp_path: Path) -> None:
    """Rows out of the pictures' order, and two whose box is none."""
    known = objects.read_objects(Corpus(uri=write(tmp_path)), 8).index
    order = [1, 0, 2]
    corners = np.array(known["box_xyxy"].to_pylist())[order]
    corners = corners - np.hstack([np.zeros((3, 2)), corners[:, :2]]) if column == "bbox" else corners
    table = {
        "uri": [Path(known["uri"][row].as_py()).name for row in order] + ["1.jpg", "2.jpg"],
        "label": [known["label"][row].as_py() for row in order] + ["cat", "dog"],
        column: [*corners.tolist(), None, [1.0, 2.0]],
        "width": [64] * 5,
        "height": [60, 60, None, 60, 60],
    }
    pq.write_table(pa.table(table), tmp_path / "boxes.parquet")
    found = objects.read_objects(Corpus(uri=str(tmp_path / "boxes.parquet")), 8)
    assert found.index["box_xyxy"].to_pylist() == [known["box_xyxy"][row].as_py() for row in (1, 2, 0)]  # by picture
    assert found.index["uri"].to_pylist() == [known["uri"][row].as_py() for row in (1, 2, 0)]
    assert found.index["label"].to_pylist() == ["dog", "cat", "cat"] and found.index["row"].to_pylist() == [0, 1, 2]
    assert found.index["height"].to_pylist() == [60, None, 60]
    assert [column in error for error in found.faults["error"].to_pylist()] == [True, True]


def test_a_table_of_boxes_without_names_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a.jpg"], "bbox": [[0.0, 0, 9, 9]]}), tmp_path / "boxes.parquet")
    with pytest.raises(UserError, match=r"holds boxes \(bbox\), but no column 'uri'"):
        support.plan(Memory(support=Corpus(uri=str(tmp_path / "boxes.parquet"))), 0)


@needs_shared_data
def test_boxes_of_real_photos() -> None:
    folder = SHARED_DATA / "coco"
    corpus = Corpus(uri=str(folder / "photos128.json"), images=str(folder / "images"))
    planned = support.plan(Memory(support=corpus, min_side=0), 0)
    truth = json.loads((folder / "photos128.json").read_text())
    names = {one["id"]: one["name"] for one in truth["categories"]}
    plain = [one for one in truth["annotations"] if not one.get("iscrowd")]
    expected = sorted((names[one["category_id"]], float(np.float32(one["bbox"][0]))) for one in plain)
    found = zip(planned.support["label"].to_pylist(), planned.support["box_xyxy"].to_pylist(), strict=True)
    assert sorted((label, box[0]) for label, box in found) == expected
