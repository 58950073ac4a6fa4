"""Boxes, crops and COCO files, against literals, a slow per-box oracle, and real COCO and LVIS annotations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from rar import detect
from rar.config import Corpus, Crop, Detect
from rar.schema import INDEX, UserError

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")

numbers = st.floats(-2000, 2000, width=32)
sides = st.floats(1, 900, width=32)
boxes_xyxy = st.tuples(numbers, numbers, sides, sides).map(lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]]))
OUTSIDES = ["blur", "grey", "black", "none"]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


# --- geometry


def test_formats_are_literal() -> None:
    assert detect.xywh_to_xyxy(np.array([[10.0, 20, 3, 4]])).tolist() == [[10, 20, 13, 24]]
    assert detect.xyxy_to_xywh(np.array([10.0, 20, 13, 24])).tolist() == [10, 20, 3, 4]
    assert detect.area(np.array([[0.0, 0, 3, 4], [5, 5, 5, 9], [5, 5, 2, 2]])).tolist() == [12, 0, 0]


@given(boxes_xyxy)
def test_formats_round_trip(box: np.ndarray) -> None:
    np.testing.assert_allclose(detect.xywh_to_xyxy(detect.xyxy_to_xywh(box)), box, atol=1e-9)


@given(boxes_xyxy, st.integers(1, 1000), st.integers(1, 1000))
def test_clipped_boxes_lie_in_the_image_and_in_the_box(box: np.ndarray, width: int, height: int) -> None:
    x0, y0, x1, y1 = detect.clip_xyxy(box, width, height)
    assert 0 <= x0 <= x1 <= width
    assert 0 <= y0 <= y1 <= height
    if detect.check_boxes(box[None], width, height) == [None]:
        assert box[0] <= x0 and box[1] <= y0 and x1 <= box[2] and y1 <= box[3]


@given(boxes_xyxy)
def test_the_window_is_a_square_around_the_box(box: np.ndarray) -> None:
    x0, y0, x1, y1 = detect.grow_xyxy(box, Crop())
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert (x0 + x1) / 2 == pytest.approx((box[0] + box[2]) / 2, abs=1e-6)
    assert x0 <= box[0] and y0 <= box[1] and x1 >= box[2] and y1 >= box[3]


def test_the_window_grows_by_object_size() -> None:
    crop = Crop(scale_small=2.0, scale_medium=1.5, scale_large=1.25)
    boxes = np.array([[0.0, 0, 32, 32], [0, 0, 33, 32], [0, 0, 96, 96], [0, 0, 96, 97], [0, 0, 100, 4]])
    windows = detect.grow_xyxy(boxes, crop)
    assert (windows[:, 2] - windows[:, 0]).tolist() == [64, 49.5, 144, 121.25, 200]
    assert windows[0].tolist() == [-16, -16, 48, 48]


@given(boxes_xyxy, st.integers(16, 512), st.floats(-50, 600), st.floats(-50, 600))
def test_crop_and_image_coordinates_are_inverse(box: np.ndarray, size: int, x: float, y: float) -> None:
    window = detect.grow_xyxy(box, Crop())
    point = np.array([x, y])
    np.testing.assert_allclose(detect.to_crop(detect.to_image(point, window, size), window, size), point, atol=1e-6)
    np.testing.assert_allclose(detect.to_image(np.array([[0, 0], [size, size]]), window, size).ravel(), window, atol=1e-6)


def test_check_boxes_says_why() -> None:
    boxes = np.array(
        [
            [0, 0, 100, 50],
            [np.nan, 0, 5, 5],
            [0, 0, np.inf, 5],
            [100, 0, 120, 20],
            [-9, -9, 0, 0],
            [10, 10, 10.5, 40],
            [99.5, 10, 130, 40],
            [5, 5, 4, 9],
            [-50, -50, 500, 500],
            [3, 4, 4, 5],
        ]
    )
    faults = detect.check_boxes(boxes, 100, 50)
    said = [
        None,
        "finite",
        "finite",
        "outside",
        "outside",
        "less than one pixel",
        "less than one pixel",
        "ends before",
        None,
        None,
    ]
    assert [fault is None for fault in faults] == [word is None for word in said]
    assert all(word in fault for fault, word in zip(faults, said, strict=True) if fault is not None and word is not None)
    assert detect.check_boxes(np.zeros((0, 4)), 10, 10) == []


def test_a_one_pixel_box_survives_float32() -> None:
    box = np.array([[511.04, 400.77, 512.04, 401.77]], dtype=np.float32)
    assert float(box[0, 2] - box[0, 0]) < 1
    assert detect.check_boxes(box, 640, 480) == [None]


# --- crops


def slow_crop(image: np.ndarray, box_xyxy: np.ndarray, crop: Crop) -> np.ndarray:
    """The definition: pad hugely, resize the window, then decide pixel by pixel whether the box touches it."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = max(0, box_xyxy[0]), max(0, box_xyxy[1]), min(width, box_xyxy[2]), min(height, box_xyxy[3])
    size = (x1 - x0) * (y1 - y0)
    scale = crop.scale_small if size <= 1024 else crop.scale_medium if size <= 9216 else crop.scale_large
    side = scale * max(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
    pad = 2 * max(height, width)
    padded = Image.fromarray(np.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode="edge"))
    window = (left + pad, top + pad, left + side + pad, top + side + pad)
    square = padded.resize((crop.size, crop.size), Image.Resampling.BICUBIC, box=window)
    if crop.outside == "none":
        return np.asarray(square)
    hidden = {
        "blur": np.asarray(square.filter(ImageFilter.GaussianBlur(crop.sigma * crop.size))),
        "grey": np.full((crop.size, crop.size, 3), 128, np.uint8),
        "black": np.zeros((crop.size, crop.size, 3), np.uint8),
    }[crop.outside].copy()
    pixel = side / crop.size
    for row in range(crop.size):
        for column in range(crop.size):
            w = min(x1, left + (column + 1) * pixel) - max(x0, left + column * pixel)
            h = min(y1, top + (row + 1) * pixel) - max(y0, top + row * pixel)
            if w > 1e-5 * pixel and h > 1e-5 * pixel:
                hidden[row, column] = np.asarray(square)[row, column]
    return hidden


@pytest.mark.parametrize("outside", OUTSIDES)
def test_crops_equal_the_slow_definition(outside: str) -> None:
    image = photo(90, 120)
    boxes = np.array(
        [
            [30.3, 20.7, 61.9, 55.2],
            [0, 0, 120, 90],
            [100.5, 70.25, 180, 95],  # leaves the image
            [-30, -40, 5, 3],
            [50, 0, 51, 90],  # one pixel wide: less than a pixel of the crop
            [7, 9, 8, 10],
            [0, 80, 120, 85.5],
        ]
    )
    crop = Crop(size=32, outside=outside)  # type: ignore[arg-type]
    result = detect.crops(image, boxes, crop)
    assert result.shape == (7, 32, 32, 3)
    assert result.dtype == np.uint8
    for got, box in zip(result, boxes, strict=True):
        np.testing.assert_allclose(got.astype(int), slow_crop(image, box, crop).astype(int), atol=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(0, 69), st.integers(1, 200), st.integers(1, 200), st.sampled_from(OUTSIDES))
def test_any_box_equals_the_slow_definition(x: int, y: int, w: int, h: int, outside: str) -> None:
    image, box = photo(70, 100, seed=1), np.array([x, y, x + w, y + h])
    crop = Crop(size=16, outside=outside)  # type: ignore[arg-type]
    got = detect.crops(image, box[None], crop)[0].astype(int)
    np.testing.assert_allclose(
        got, slow_crop(image, box, crop).astype(int), atol=3
    )  # three 8-bit roundings: two passes of the resize, and the blur


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    result = detect.crops(stripes, np.array([[50, 50, 450, 450]]), Crop(size=24, outside="none"))
    assert result.min() > 115 and result.max() < 140  # the mean grey; a filter without antialiasing gives moire from 0 to 255


def test_a_crop_shows_the_box_sharp_and_hides_the_rest() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[40:60, 30:70] = (255, 0, 0)
    box = np.array([[30, 40, 70, 60]])
    crop = Crop(size=80, scale_small=2, outside="grey")
    result = detect.crops(image, box, crop)[0]
    assert (result[31:49, 21:59] == (255, 0, 0)).all()  # 1 crop pixel = 1 image pixel; the window is (10, 10, 90, 90)
    assert (result[:30] == 128).all() and (result[50:] == 128).all() and (result[:, :20] == 128).all()
    assert (result[:, 60:] == 128).all() and not (result[30:50, 20:60] == 128).any()


def test_blur_smooths_only_outside() -> None:
    image = photo(200, 200)
    box = np.array([[60, 80, 140, 120]])
    sharp = detect.crops(image, box, Crop(size=64, outside="none"))[0].astype(int)
    blurred = detect.crops(image, box, Crop(size=64, outside="blur"))[0].astype(int)
    same = (sharp == blurred).all(axis=-1)
    assert same[20:44, 7:57].all()  # the box is rows 19.2 to 44.8 and columns 6.4 to 57.6 of the crop
    assert np.abs(np.diff(blurred[:14], axis=1)).mean() < 0.5 * np.abs(np.diff(sharp[:14], axis=1)).mean()


def test_no_box_and_a_thousand_boxes() -> None:
    image = photo(120, 160)
    assert detect.crops(image, np.zeros((0, 4)), Crop()).shape == (0, 96, 96, 3)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (1000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 60, (1000, 2))], axis=1)
    result = detect.crops(image, boxes, Crop(size=16))
    assert result.shape == (1000, 16, 16, 3)
    for i in (0, 499, 999):
        assert np.abs(result[i].astype(int) - detect.crops(image, boxes[i : i + 1], Crop(size=16))[0]).max() <= 1


def test_crops_refuse_what_check_boxes_refuses() -> None:
    with pytest.raises(ValueError, match="outside"):
        detect.crops(photo(20, 20), np.array([[0, 0, 5, 5], [30, 30, 40, 40]]), Crop())


# --- files


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
    table, errors = detect.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH), images="/photos"), Detect())
    assert errors == []
    assert table.schema == detect.BOXES
    assert table.schema.names[:5] == INDEX.names
    assert table.to_pylist() == [
        {"row": 0, "uri": "/photos/b.jpg", "offset": None, "size": None, "label": None, "coco_id": 7}
        | {
            "boxes_xyxy": [[1, 2, 4, 6], [5.5, 6, 12.5, 14]],
            "box_scores": [1, 1],
            "box_labels": ["dog", "cat"],
            "box_ids": [11, 12],
        },
        {"row": 1, "uri": "/photos/sub/a.jpg", "offset": None, "size": None, "label": None, "coco_id": 3}
        | {"boxes_xyxy": [[0, 0, 5, 5]], "box_scores": [1], "box_labels": ["cat"], "box_ids": [10]},
        {"row": 2, "uri": "/photos/val2017/c.jpg", "offset": None, "size": None, "label": None, "coco_id": 9}
        | {"boxes_xyxy": [], "box_scores": [], "box_labels": [], "box_ids": []},
    ]


def test_images_lie_beside_the_json_by_default(tmp_path: Path) -> None:
    table, _ = detect.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH), limit=1), Detect())
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
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH), images="/photos")
    table, errors = detect.read_boxes(corpus, Detect(proposals=path, max_boxes=2))
    assert table["coco_id"].to_pylist() == [7, 3, 9]
    assert table["box_ids"].to_pylist() == [[1], [2, 4], []]
    assert table["box_scores"].to_pylist() == [[0.5], pytest.approx([0.9, 0.3]), []]
    assert table["box_labels"].to_pylist() == [[None], [None, None], []]
    assert [(error["uri"], error["stage"]) for error in errors] == [("/photos/b.jpg", "boxes"), (path, "boxes")]
    assert "box 7" in str(errors[0]["error"]) and "bbox None" in str(errors[0]["error"])
    assert "2 boxes of image_id 77" in str(errors[1]["error"])


def test_broken_proposals_are_rows_of_errors(tmp_path: Path) -> None:
    bad = [
        proposal(7, [1, 2, 3], 0.5),
        proposal(7, [1, 2, 3, "4"], 0.5),
        proposal(7, [1, 2, 3, float("nan")], 0.5),
        proposal(7, [1, 2, 3, 4], None),
        proposal(7, "1234", 0.5),
        proposal("7", [1, 2, 3, 4], 0.5),
        {},
    ]
    path = written(tmp_path / "proposals.json", [*bad, proposal(7, [1, 2, 3, 4], 0.5)])
    table, errors = detect.read_boxes(Corpus(uri=written(tmp_path / "truth.json", TRUTH)), Detect(proposals=path))
    assert len(errors) == len(bad)
    assert table["box_ids"].to_pylist() == [[7], [], []]


def test_a_broken_annotation_is_a_row_of_errors(tmp_path: Path) -> None:
    truth = TRUTH | {"annotations": [*TRUTH["annotations"], {"id": 20, "image_id": 3, "category_id": 5, "bbox": [0, 0, 1, 1]}]}
    _, errors = detect.read_boxes(Corpus(uri=written(tmp_path / "truth.json", truth)), Detect())
    assert ["unknown category_id 5" in str(error["error"]) for error in errors] == [True]


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    corpus = Corpus(uri=written(tmp_path / "truth.json", TRUTH))
    other = written(tmp_path / "other.json", [proposal(1000, [0, 0, 1, 1], 1.0)])
    with pytest.raises(UserError, match="none of the boxes"):
        detect.read_boxes(corpus, Detect(proposals=other))
    with pytest.raises(UserError, match="not found"):
        detect.read_boxes(corpus, Detect(proposals=str(tmp_path / "absent.json")))
    with pytest.raises(UserError, match="list of objects"):
        detect.read_boxes(corpus, Detect(proposals=corpus.uri))
    with pytest.raises(UserError, match="no COCO `images`"):
        detect.read_boxes(Corpus(uri=other), Detect())
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not valid JSON"):
        detect.read_boxes(Corpus(uri=str(tmp_path / "half.json")), Detect())
    pq.write_table(pa.table({"image_id": [7]}), tmp_path / "thin.parquet")
    with pytest.raises(UserError, match="lacks the columns"):
        detect.read_boxes(corpus, Detect(proposals=str(tmp_path / "thin.parquet")))
    twice = TRUTH | {"images": [TRUTH["images"][0]] * 2}
    with pytest.raises(UserError, match="used twice"):
        detect.read_boxes(Corpus(uri=written(tmp_path / "twice.json", twice)), Detect())


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
    boxes = detect.Boxes(
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows]),
        [None] * len(rows),
        np.arange(len(rows)),
    )
    assert detect.best_boxes(boxes, max_boxes).ids.tolist() == slow_best(rows, max_boxes)


def test_category_names(tmp_path: Path) -> None:
    assert detect.category_names(written(tmp_path / "truth.json", TRUTH)) == {1: "cat", 2: "dog"}
    twice = {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]}
    with pytest.raises(UserError, match="'cat'"):
        detect.category_names(written(tmp_path / "twice.json", twice))
    with pytest.raises(UserError, match="categories"):
        detect.category_names(written(tmp_path / "none.json", [1]))


def test_coco_results_is_box_score_times_probability() -> None:
    boxes = np.array([[10.0, 20, 13, 24], [0, 0, 5, 5]])
    results = detect.coco_results(
        [7, 3], boxes, [0.5, 1.0], [["dog", "cat"], ["cat"]], [[0.75, 0.25], [0.9]], {1: "cat", 2: "dog"}
    )
    assert results == [
        {"image_id": 7, "category_id": 2, "bbox": [10, 20, 3, 4], "score": 0.375},
        {"image_id": 7, "category_id": 1, "bbox": [10, 20, 3, 4], "score": 0.125},
        {"image_id": 3, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.9},
    ]
    assert json.loads(json.dumps(results)) == results
    assert detect.coco_results([], np.zeros((0, 4)), [], [], [], {}) == []
    with pytest.raises(UserError, match=r"1 classes .* 'cow'"):
        detect.coco_results([7], boxes[:1], [1.0], [["cow"]], [[1.0]], {1: "cat"})


@needs_data
def test_real_photos_crop() -> None:
    folder = SHARED_DATA / "coco"
    table, errors = detect.read_boxes(Corpus(uri=str(folder / "photos128.json"), images=str(folder / "images")), Detect())
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
        assert detect.check_boxes(boxes, image.shape[1], image.shape[0]) == [None] * len(boxes)
        result = detect.crops(image, boxes, Crop(size=48))
        assert result.std(axis=(1, 2, 3)).min() > 2


@needs_data
def test_real_lvis_reads() -> None:
    path = str(SHARED_DATA / "lvis" / "lvis_v05_val_100.json")
    table, errors = detect.read_boxes(Corpus(uri=path), Detect(style="lvis"))
    assert errors == []
    assert (table.num_rows, sum(map(len, table["box_ids"].to_pylist()))) == (100, 977)
    assert len(detect.category_names(path)) == 1230
