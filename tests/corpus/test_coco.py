"""COCO files in and detections out, against literals, slow oracles, and real COCO and LVIS annotations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rar.boxes import check_boxes
from rar.config import Corpus, Crop, Detect
from rar.corpus import coco, listing
from rar.crops import windows
from rar.schema import INDEX, UserError
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")

TRUTH = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "width": 50, "height": 40},
        {"id": 3, "file_name": "sub/a.jpg", "width": 50, "height": 40},
        {"id": 9, "coco_url": "http://images.cocodataset.org/val2017/c.jpg", "width": 50, "height": 40},
    ],
    "annotations": [
        {"id": 11, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 10, "image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"id": 12, "image_id": 7, "category_id": 1, "bbox": [5.5, 6, 7, 8]},
        {"id": 13, "image_id": 7, "category_id": 1, "bbox": [0, 0, 50, 40], "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def written(path: Path, data: object) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def proposal(image_id: object, bbox: object, score: object, **more: object) -> dict[str, object]:
    return {"image_id": image_id, "bbox": bbox, "score": score, **more}


def test_ground_truth_boxes(tmp_path: Path) -> None:
    photos = str(tmp_path)
    table, errors = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH), images=photos), Detect())
    assert errors == []
    assert table.schema == coco.BOXES
    assert table.schema.names[:5] == INDEX.names
    none = {"offset": None, "size": None, "label": None, "width": 50, "height": 40}
    assert table.to_pylist() == [  # in the file's order
        {"row": 0, "uri": f"{photos}/b.jpg", "coco_id": "7", "box_scores": [1, 1], "box_labels": ["dog", "cat"]}
        | {"boxes_xyxy": [[1, 2, 4, 6], [5.5, 6, 12.5, 14]], "box_ids": [11, 12]} | none,
        {"row": 1, "uri": f"{photos}/sub/a.jpg", "coco_id": "3", "box_scores": [1], "box_labels": ["cat"]}
        | {"boxes_xyxy": [[0, 0, 5, 5]], "box_ids": [10]} | none,
        {"row": 2, "uri": f"{photos}/c.jpg", "coco_id": "9"}
        | {"boxes_xyxy": [], "box_scores": [], "box_labels": [], "box_ids": []} | none,
    ]  # fmt: skip


def test_the_same_box_under_two_labels_is_two_boxes_and_a_picture_twice_two_rows(tmp_path: Path) -> None:
    box = {"image_id": 1, "bbox": [8, 8, 21, 21]}
    truth = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}],
        "annotations": [box | {"category_id": 1}, box | {"category_id": 2}, box | {"category_id": 1, "image_id": 2}],
        "categories": TRUTH["categories"],
    }
    table, errors = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", truth)), Detect())
    assert errors == [] and table["box_labels"].to_pylist() == [["cat", "dog"], ["cat"]]
    assert listing.remarks(table) == ["1 rows name a picture that an earlier row names too; each keeps its own label"]
    assert table["uri"].to_pylist() == [f"{tmp_path}/a.jpg"] * 2 and table["box_ids"].to_pylist() == [[0, 1], [2]]


def test_images_lie_beside_the_json_by_default(tmp_path: Path) -> None:
    table, _ = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH), limit=1), Detect())
    assert table["uri"].to_pylist() == [f"{tmp_path}/b.jpg"]
    assert table["box_ids"].to_pylist() == [[11, 12]]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_proposals(tmp_path: Path, kind: str) -> None:
    rows = [
        proposal(3, [1, 1, 2, 2], 0.1),
        proposal(7, [1, 1, 2, 2], 0.5),
        proposal(3, [0, 0, 9, 9], 0.9),
        proposal(3, [0, 0, 9, 9], 0.8),  # the same box again, under another class in a class-aware detector
        proposal(3, [4, 4, 2, 2], 0.3),
        proposal(77, [0, 0, 1, 1], 1.0),
        proposal(77, [0, 0, 1, 1], 1.0),
        proposal(7, None, 0.2),
    ]
    path = str(tmp_path / f"proposals.{kind}")
    if kind == "json":
        written(Path(path), rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH), images=str(tmp_path))
    table, errors = coco.read_boxes(corpus, Detect(proposals=path, max_boxes=2))
    assert table["coco_id"].to_pylist() == ["7", "3", "9"]
    assert table["box_ids"].to_pylist() == [[1], [2, 4], []]
    assert table["box_scores"].to_pylist() == [[0.5], pytest.approx([0.9, 0.3]), []]
    assert table["box_labels"].to_pylist() == [[None], [None, None], []]
    assert [(error["uri"], error["stage"]) for error in errors] == [(f"{tmp_path}/b.jpg", "boxes"), (path, "boxes")]
    assert "box 7" in str(errors[0]["error"]) and "bbox None" in str(errors[0]["error"])
    assert "2 boxes of image_id 77" in str(errors[1]["error"])


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_broken_row_is_found_whatever_slice_it_is_in(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of four: rows come through as columns, one slice as rows, and the ids are positions in the file all along."""
    monkeypatch.setattr(coco, "SLICE", 4)
    rows = [proposal(7 if i % 2 else 99, [i, i, 2, 2], i / 16) for i in range(11)]
    rows[5]["bbox"] = [1.0, 2.0, 3.0]
    path = tmp_path / f"proposals.{kind}"
    if kind == "json":
        written(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH))
    table, errors = coco.read_boxes(corpus, Detect(proposals=str(path)))
    assert table["box_ids"].to_pylist() == [[9, 7, 3, 1], [], []]
    assert table["boxes_xyxy"].to_pylist()[0][0] == [9, 9, 11, 11]
    assert [str(error["error"]).split(" of ")[0] for error in errors] == ["box 5", "6 boxes"]


def test_columns_refuse_what_only_looks_like_numbers() -> None:
    def well_formed(rows: list[dict[str, Any]]) -> bool:
        columns = coco._columns(rows)
        return columns is not None and coco._well_formed(columns)

    good = proposal(7, [1, 2, 3, 4.5], 1)
    assert well_formed([good, good])
    for bad in (
        proposal(7, [1, 2, 3, "4"], 1),
        proposal(7, "1234", 1),
        proposal(7, [1, 2, 3], 1),
        proposal(7, [1, 2, 3, None], 1),
        proposal(7, [1, 2, 3, float("inf")], 1),
        proposal(7, [1, 2, 3, 4], None),
        proposal(7, [1, 2, 3, 4], [1.0]),
        proposal(7, [1, 2, 3, 4], float("nan")),
        {"image_id": 7, "bbox": [1, 2, 3, 4]},
    ):
        assert not well_formed([good, bad]) and not well_formed([bad])


@pytest.mark.parametrize("broken", [[], [proposal(7, None, 0.5)]])
def test_ids_of_proposals_are_compared_as_written_and_as_numbers(tmp_path: Path, broken: list[Any]) -> None:
    """By columns, and (a malformed row among them) row by row."""
    written_ids = [7, 7.0, "7", " 007 ", "7.0"]
    strangers = [True, None, "seven", 7.5, [7]]
    rows = [proposal(one, [i, 0, 5, 5], 0.5) for i, one in enumerate(written_ids + strangers)] + broken
    path = written(tmp_path / "proposals.json", rows)
    table, errors = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH)), Detect(proposals=path))
    assert table["box_ids"].to_pylist() == [[0, 1, 2, 3, 4], [], []]
    assert len(errors) == len(strangers) + len(broken)


def test_scores_must_be_probabilities_or_be_made_so(tmp_path: Path) -> None:
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH))
    path = written(tmp_path / "logits.json", [proposal(7, [0, 0, 5, 5], -1.5), proposal(7, [1, 1, 5, 5], 800.0)])
    with pytest.raises(UserError, match=r"lie in -1.5 .. 800, .* set detect.proposal_scores: logit"):
        coco.read_boxes(corpus, Detect(proposals=path))
    table, _ = coco.read_boxes(corpus, Detect(proposals=path, proposal_scores="logit"))
    assert table["box_scores"].to_pylist()[0] == pytest.approx([1, 1 / (1 + np.exp(1.5))])  # best first
    path = written(tmp_path / "rounded.json", [proposal(7, [0, 0, 5, 5], 1.00001), proposal(7, [1, 1, 5, 5], -0.00001)])
    assert coco.read_boxes(corpus, Detect(proposals=path))[0]["box_scores"].to_pylist()[0] == [1, 0]


def test_broken_proposals_are_rows_of_errors(tmp_path: Path) -> None:
    bad = [
        proposal(7, [1, 2, 3], 0.5),
        proposal(7, [1, 2, 3, "4"], 0.5),
        proposal(7, [1, 2, 3, float("nan")], 0.5),
        proposal(7, [1, 2, 3, 4], None),
        proposal(7, "1234", 0.5),
        {},
    ]
    path = written(tmp_path / "proposals.json", [*bad, proposal(7, [1, 2, 3, 4], 0.5)])
    table, errors = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH)), Detect(proposals=path))
    assert len(errors) == len(bad)
    assert table["box_ids"].to_pylist() == [[6], [], []]


def test_a_broken_annotation_is_a_row_of_errors(tmp_path: Path) -> None:
    truth = TRUTH | {"annotations": [*TRUTH["annotations"], {"id": 20, "image_id": 3, "category_id": 5, "bbox": [0, 0, 1, 1]}]}
    _, errors = coco.read_boxes(Corpus(uri=written(tmp_path / "truth.json", truth)), Detect())
    assert ["unknown category_id 5" in str(error["error"]) for error in errors] == [True]


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH))
    other = written(tmp_path / "other.json", [proposal(1000, [0, 0, 1, 1], 1.0)])
    with pytest.raises(UserError, match="none of the boxes"):
        coco.read_boxes(corpus, Detect(proposals=other))
    with pytest.raises(UserError, match="not found"):
        coco.read_boxes(corpus, Detect(proposals=str(tmp_path / "absent.json")))
    with pytest.raises(UserError, match="must be a list"):
        coco.read_boxes(corpus, Detect(proposals=corpus.uri))
    with pytest.raises(UserError, match="is a list, no COCO file"):
        coco.read_boxes(Corpus(uri=other), Detect())
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not valid JSON"):
        coco.read_boxes(Corpus(uri=str(tmp_path / "half.json")), Detect())
    pq.write_table(pa.table({"image_id": [7]}), tmp_path / "thin.parquet")
    with pytest.raises(UserError, match="lacks the columns"):
        coco.read_boxes(corpus, Detect(proposals=str(tmp_path / "thin.parquet")))
    with pytest.raises(UserError, match=r"image id 7 is used twice \('b.jpg', 'b.jpg'\)"):
        twice = TRUTH | {"images": [TRUTH["images"][0]] * 2}
        coco.read_boxes(Corpus(uri=written(tmp_path / "twice.json", twice)), Detect())
    with pytest.raises(UserError, match=r"category id 1.0 is used twice \('cat', 'dog'\)"):
        twice = TRUTH | {"categories": [{"id": 1, "name": "cat"}, {"id": 1.0, "name": "dog"}]}
        coco.read_boxes(Corpus(uri=written(tmp_path / "twice.json", twice)), Detect())


def slow_best(rows: list[tuple[int, tuple[int, ...], float]], max_boxes: int) -> list[int]:
    """Positions kept, image by image: walk down the scores, skip boxes already seen."""
    kept = []
    for image in sorted({row[0] for row in rows}):
        seen: list[tuple[int, ...]] = []
        for i in sorted((i for i, row in enumerate(rows) if row[0] == image), key=lambda i: (-rows[i][2], i)):
            if rows[i][1] not in seen and len(seen) < max_boxes:
                seen.append(rows[i][1])
                kept.append(i)
    return kept


few = st.integers(0, 2)


@given(
    st.lists(st.tuples(few, st.tuples(few, few, few, few), st.sampled_from([0.1, 0.2, 0.3])), max_size=40), st.integers(1, 5)
)
def test_best_boxes_equals_the_slow_definition(rows: list[tuple[int, tuple[int, ...], float]], max_boxes: int) -> None:
    boxes = coco.Boxes(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows]),
        np.full(len(rows), None, object),
        np.arange(len(rows)),
    )
    assert coco.best_boxes(boxes, max_boxes).ids.tolist() == slow_best(rows, max_boxes)


@needs_data
def test_real_photos_crop() -> None:
    folder = SHARED_DATA / "coco"
    table, errors = coco.read_boxes(Corpus(uri=str(folder / "photos128.json"), images=str(folder / "images")), Detect())
    assert errors == []
    counts = [len(boxes) for boxes in table["boxes_xyxy"].to_pylist()]
    assert (len(counts), sum(counts), Counter(counts)[0]) == (
        128,
        929,
        2,
    )  # photos, boxes and photos without any (data/README.md)
    for row in table.slice(0, 5).to_pylist():
        image = np.asarray(Image.open(row["uri"]).convert("RGB"))
        boxes = np.array(row["boxes_xyxy"])
        assert check_boxes(boxes, image.shape[1], image.shape[0]) == [None] * len(boxes)
        result = windows.crops(image, boxes, Crop(size=48))
        assert result.std(axis=(1, 2, 3)).min() > 2


@needs_data
def test_real_lvis_reads() -> None:
    path = str(SHARED_DATA / "lvis" / "lvis_v05_val_100.json")
    table, errors = coco.read_boxes(Corpus(uri=path), Detect(style="lvis"))
    assert errors == []
    assert (table.num_rows, sum(map(len, table["box_ids"].to_pylist()))) == (100, 977)


def test_pictures_without_boxes_keep_what_their_listing_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "notes.doc").write_bytes(b"x")
    index = coco.without_boxes(listing.list_images(Corpus(uri=str(tmp_path))))
    assert index.schema.equals(coco.BOXES) and index["boxes_xyxy"].to_pylist() == [[]]
    assert listing.remarks(index) == ["1 files are no pictures by their name or first bytes, and left out: 1 .doc"]
