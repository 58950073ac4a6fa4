"""Every stage on small tables of real pictures; no Ray. What Ray adds is in test_pipeline.py."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rar import config, fusion
from rar.columns import candidates_of, vectors_column, vectors_of, with_candidates
from rar.corpus import coco, looks
from rar.corpus.decode import decode, fit_square
from rar.crops import windows
from rar.engine import choosing, models, reading, sinks, stages
from rar.fusion import Calibration
from rar.memory.collection import Collection, Entries, ExactIndex
from rar.miniature.world import render, rng_of, vocabulary
from rar.retriever import modes
from rar.retriever.exact import best_of
from rar.schema import INDEX, Candidate, Ranking, RankStatus, content_id
from tests.conftest import ROOT

SIDE = 16
SPECS = vocabulary("train", 0)
NAMES = {position: spec.name for position, spec in enumerate(SPECS[:4])}
FAULTS = ("missing", "broken", "truncated")


def photo(number: int, side: int = 48) -> np.ndarray:
    """(side, side, 3) uint8: a photo of class `number` mod 4."""
    return render(SPECS[number % 4], side, rng_of("test_stages", number))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good-0.png .. good-7.png, broken.png (no picture) and truncated.png; `missing.png` is not there."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        (folder / f"good-{number}.png").write_bytes(png(photo(number)))
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "truncated.png").write_bytes(png(photo(0))[:-800])
    return folder


def index(photos: Path, *names: str) -> pa.Table:
    rows = [{"row": row, "uri": str(photos / f"{name}.png"), "label": name} for row, name in enumerate(names)]
    return pa.Table.from_pylist(rows, INDEX)


def test_load_adds_bytes_and_names_them_by_content(photos: Path) -> None:
    table = reading.load(index(photos, "good-0", "good-1", "good-0"))
    assert table["bytes"].to_pylist() == [(photos / f"good-{number}.png").read_bytes() for number in (0, 1, 0)]
    assert table["image_id"].to_pylist() == [content_id(data) for data in table["bytes"].to_pylist()]
    assert table["error"].null_count == table["stage"].null_count == 3
    assert table.select(INDEX.names).equals(index(photos, "good-0", "good-1", "good-0"))


def test_load_keeps_the_row_of_a_file_that_is_missing(photos: Path) -> None:
    table = reading.load(index(photos, "good-0", "missing", "good-1"))
    assert table["row"].to_pylist() == [0, 1, 2]
    assert table["stage"].to_pylist() == [None, "read", None]
    assert table["error"][1].as_py() and table["error"].null_count == 2
    assert table["bytes"][1].as_py() is table["image_id"][1].as_py() is None
    assert table["bytes"][2].as_py() == (photos / "good-1.png").read_bytes()


def test_load_reads_a_range_of_a_container(photos: Path, tmp_path: Path) -> None:
    data = (photos / "good-0.png").read_bytes()
    (tmp_path / "container").write_bytes(b"before" + data + b"after")
    rows = [{"row": 0, "uri": str(tmp_path / "container"), "offset": 6, "size": len(data)}]
    table = reading.load(pa.Table.from_pylist(rows, INDEX))
    assert table["bytes"].to_pylist() == [data]
    assert table["image_id"].to_pylist() == [content_id(data)]  # the same image as the loose file


def fit(image: np.ndarray) -> np.ndarray:
    return fit_square(image, SIDE, "shortest", "bicubic")


def test_decode_gives_the_encoders_square(photos: Path) -> None:
    table = reading.Decode(fit, None)(reading.load(index(photos, "good-0", "good-1")))
    expected = [fit(np.asarray(Image.open(photos / f"good-{number}.png"))) for number in (0, 1)]
    for data, pixels in zip(table["pixels"].to_pylist(), expected, strict=True):
        np.testing.assert_array_equal(np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3), pixels)
    assert table["error"].null_count == 2


def test_decode_tells_what_looks_like_a_known_picture(photos: Path) -> None:
    known = np.array([looks.look(fit(photo(0)))], np.uint64)
    table = reading.Decode(fit, None, known)(reading.load(index(photos, "good-0", "broken", "good-1")))
    assert table["near_duplicate"].to_pylist() == [True, False, False]


def test_decode_notes_what_is_no_picture_and_passes_other_errors_on(photos: Path) -> None:
    table = reading.Decode(fit, None)(reading.load(index(photos, "broken", "missing", "good-0", "truncated")))
    assert table["stage"].to_pylist() == ["decode", "read", None, "decode"]
    first, second, third, fourth = table["error"].to_pylist()
    assert first and first.startswith("not a readable picture (JPEG, PNG, WebP")
    assert second and second != first and third is None and fourth and fourth != first
    assert [data is not None for data in table["pixels"].to_pylist()] == [False, False, True, False]
    assert table["image_id"].null_count == 1  # a broken file still has a name


def boxes_table(photos: Path, pictures: dict[str, list[list[float]]]) -> pa.Table:
    """What read_boxes and the sharding give, loaded: one row a picture."""
    rows: list[dict[str, Any]] = [
        {
            "row": row,
            "uri": str(photos / f"{name}.png"),
            "coco_id": str(100 + row),
            "boxes_xyxy": boxes,
            "box_scores": [0.5 + position / 8 for position in range(len(boxes))],
            "box_labels": [f"{name} {position}" for position in range(len(boxes))],
            "box_ids": list(range(len(boxes))),
        }
        for row, (name, boxes) in enumerate(pictures.items())
    ]
    table = pa.Table.from_pylist(rows, coco.BOXES)
    return reading.load(table.append_column("shard", pa.array([3] * len(rows), pa.int32())))


CROP, SHOWN = config.Crop(size=24), config.Shown(size=40)


def test_crop_gives_one_row_a_box(photos: Path) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [10.0, 10.0, 40.0, 44.0]]
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": boxes, "good-1": boxes[:1]}))
    assert table.schema.equals(reading.CROPS)
    assert table["box_xyxy"].to_pylist() == [*boxes, boxes[0]]
    assert table["row"].to_pylist() == [0, 0, 1] and table["place"].to_pylist() == [0, 1, 0]  # what labels join by
    assert table["shard"].to_pylist() == [3, 3, 3]
    assert table["error"].null_count == 3


def test_a_crop_is_a_picture_of_the_box(photos: Path) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [10.0, 10.0, 40.0, 44.0]]
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": boxes}))
    image = decode((photos / "good-0.png").read_bytes())
    for data, expected in zip(table["bytes"].to_pylist(), windows.crops(image, np.array(boxes), SHOWN), strict=True):
        np.testing.assert_array_equal(decode(data), expected)


def test_every_box_of_a_picture_has_an_id_of_its_own(photos: Path) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [4.0, 6.0, 20.0, 31.0], [10.0, 10.0, 40.0, 44.0]]
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": boxes, "good-1": boxes}))
    ids = table["image_id"].to_pylist()
    assert len(set(ids)) == 6
    again = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-1": boxes, "good-0": boxes[1:]}))
    assert again["image_id"].to_pylist() == ids[3:] + ids[1:3]  # of content, whatever else is in the table


def test_a_box_that_shows_nothing_is_an_error_row_among_good_ones(photos: Path) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [5.0, 5.0, 5.0, 9.0], [90.0, 90.0, 99.0, 99.0], [10.0, 10.0, 40.0, 44.0]]
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": boxes}))
    assert table["stage"].to_pylist() == [None, "crop", "crop", None]
    assert "less than one pixel a side" in table["error"][1].as_py()
    assert "outside the 48 x 48 image" in table["error"][2].as_py()
    image = decode((photos / "good-0.png").read_bytes())
    np.testing.assert_array_equal(decode(table["bytes"][3].as_py()), windows.crops(image, np.array(boxes[3:]), SHOWN)[0])


def test_boxes_of_a_scaled_picture_are_scaled_and_those_of_another_picture_are_errors(photos: Path) -> None:
    boxes = [[8.0, 12.0, 40.0, 60.0], [20.0, 20.0, 80.0, 88.0]]
    table = boxes_table(photos, {"good-0": boxes, "good-1": boxes})
    for name, sizes in (("width", [96, 64]), ("height", [96, 48])):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, coco.BOXES.field(name), pa.array(sizes, pa.int64()))
    cut = reading.Crop(CROP, SHOWN)(table)
    assert cut["box_xyxy"].to_pylist() == [*boxes, None]  # as in the file; the other picture is one row, whatever its boxes
    assert cut["place"].to_pylist() == [0, 1, None] and cut["boxes"].to_pylist() == [1, 1, 2]
    image = decode((photos / "good-0.png").read_bytes())
    expected = windows.crops(image, np.array(boxes) / 2, SHOWN)
    for data, crop in zip(cut["bytes"].to_pylist()[:2], expected, strict=True):
        np.testing.assert_array_equal(decode(data), crop)
    assert cut["stage"].to_pylist() == [None, None, "crop"]
    assert all(said in cut["error"][2].as_py() for said in ("64 x 48", "48 x 48", "2 boxes"))


@pytest.mark.parametrize("views", [["adaptive"], ["tight", "context"], ["context", "adaptive", "tight"]])
def test_every_view_of_a_box_becomes_a_square_of_the_encoder(photos: Path, views: list[windows.View]) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [90.0, 90.0, 99.0, 99.0], [10.0, 10.0, 40.0, 44.0]]
    crop = CROP.model_copy(update={"views": views})
    cut = reading.Crop(crop, SHOWN)(boxes_table(photos, {"good-0": boxes, "broken": boxes[:1]}))
    assert cut.schema.equals(reading.CROPS)
    table = reading.Decode(fit, None)(cut)
    assert "views" not in table.column_names  # ends where it was used: it would be the largest column of all
    assert table["stage"].to_pylist() == [None, "crop", None, "decode"]
    assert [data is None for data in table["pixels"].to_pylist()] == [False, True, False, True]
    image = decode((photos / "good-0.png").read_bytes())
    seen = [windows.crops(image, np.array(boxes)[[0, 2]], crop, view) for view in views]
    shown = windows.crops(image, np.array(boxes)[[0, 2]], SHOWN)
    for row, number in ((0, 0), (2, 1)):
        squares = np.frombuffer(table["pixels"][row].as_py(), np.uint8).reshape(-1, SIDE, SIDE, 3)
        np.testing.assert_array_equal(squares, [fit(view[number]) for view in seen])
        np.testing.assert_array_equal(decode(table["bytes"][row].as_py()), shown[number])


def test_retriever_and_ranker_see_what_is_theirs_and_nothing_where_they_are_not_asked(photos: Path) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [10.0, 10.0, 40.0, 44.0]]
    image = decode((photos / "good-0.png").read_bytes())
    shown = SHOWN.model_copy(update={"view": "context", "outside": "none"})
    table = reading.Crop(None, shown)(boxes_table(photos, {"good-0": boxes}))
    assert "views" not in table.column_names
    for data, expected in zip(table["bytes"].to_pylist(), windows.crops(image, np.array(boxes), shown, "context"), strict=True):
        np.testing.assert_array_equal(decode(data), expected)
    table = reading.Crop(CROP, None)(boxes_table(photos, {"good-0": boxes}))
    assert table["bytes"].null_count == 2 and table["views"].null_count == 0


def test_support_boxes_are_cut_as_queries_are_and_keep_their_rows(photos: Path) -> None:
    """Out of order, twice, one that shows nothing, a picture that is gone, and one of another size than its boxes."""
    rows = [
        ("good-0", 4, 20),
        ("good-1", 10, 40),
        ("good-0", 10, 40),
        ("missing", 4, 20),
        ("good-0", 4, 20),
        ("good-1", 90, 99),
    ]
    table = pa.table(
        {
            "row": pa.array(range(10, 16), pa.int64()),
            "uri": [str(photos / f"{name}.png") for name, _, _ in rows],
            "offset": pa.nulls(6, pa.int64()),
            "size": pa.nulls(6, pa.int64()),
            "label": list("abcdef"),
            "box_xyxy": pa.array([[low, low, high, high] for _, low, high in rows], pa.list_(pa.float32())),
            "width": pa.nulls(6, pa.int64()),
            "height": pa.nulls(6, pa.int64()),
            "shard": pa.array([2] * 6, pa.int32()),
        }
    )
    found = reading.reader(table, CROP, SHOWN)(table)
    assert found["row"].to_pylist() == list(range(10, 16)) and found["label"].to_pylist() == list("abcdef")
    assert found["stage"].to_pylist() == [None, None, None, "read", None, "crop"]
    queries = boxes_table(
        photos, {"good-0": [[4.0, 4.0, 20.0, 20.0], [10.0, 10.0, 40.0, 40.0]], "good-1": [[10.0, 10.0, 40.0, 40.0]]}
    )
    cut = reading.Crop(CROP, SHOWN)(queries)
    for name in ("image_id", "views", "bytes"):
        assert found[name].take([0, 2, 1]).to_pylist() == cut[name].to_pylist() and found[name][4] == found[name][0]
    stated = table.set_column(6, "width", pa.array([96] * 6, pa.int64())).set_column(
        7, "height", pa.array([64] * 6, pa.int64())
    )
    assert reading.reader(stated, CROP, None)(stated)["stage"].to_pylist() == ["crop", "crop", "crop", "read", "crop", "crop"]


def test_mean_of_views() -> None:
    x, y = np.eye(2, dtype=np.float32)
    half = np.sqrt(np.float32(0.5))
    np.testing.assert_allclose(models.mean_of_views(np.stack([x, y, y, y]), [2, 2]), [[half, half], [0, 1]])
    np.testing.assert_array_equal(models.mean_of_views(np.stack([x, y]), [1, 1]), [x, y])
    np.testing.assert_allclose(models.mean_of_views(np.stack([x, x, y]), [1, 2]), [[1, 0], [half, half]])
    assert models.mean_of_views(np.zeros((0, 2), np.float32), []).shape == (0, 2)


@pytest.mark.parametrize(("name", "stage"), [("broken", "decode"), ("missing", "read")])
def test_a_picture_that_fails_fails_for_each_of_its_boxes(photos: Path, name: str, stage: str) -> None:
    boxes = [[4.0, 6.0, 20.0, 30.0], [10.0, 10.0, 40.0, 44.0]]
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {name: boxes, "good-0": boxes[:1]}))
    assert table["stage"].to_pylist() == [stage, stage, None]
    assert all(table["error"].to_pylist()[:2])
    assert table["box_xyxy"].to_pylist() == [*boxes, boxes[0]]
    assert [data is None for data in table["bytes"].to_pylist()] == [True, True, False]


def test_a_picture_without_boxes_gives_no_row(photos: Path) -> None:
    table = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": [], "broken": [], "missing": []}))
    assert table.num_rows == 0 and table.schema.equals(reading.CROPS)
    some = reading.Crop(CROP, SHOWN)(boxes_table(photos, {"good-0": [], "good-1": [[4.0, 6.0, 20.0, 30.0]]}))
    assert some["row"].to_pylist() == [1]


def test_ppm_is_read_back_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(decode(reading.ppm(pixels)), pixels)
    np.testing.assert_array_equal(decode(reading.ppm(pixels[:, ::-1])), pixels[:, ::-1])  # not contiguous


def test_embed_averages_the_views_of_a_box() -> None:
    embed = models.Embed(config.Encoder())
    side = embed.encoder.side
    first, second, third = (fit_square(photo(number), side, "shortest", "bicubic") for number in range(3))
    rows = [{"pixels": first.tobytes() + second.tobytes()}, {}, {"pixels": third.tobytes() + third.tobytes()}]
    forward, frames = embed.encoder.forward, set[str]()

    def watched(batch: Any) -> Any:
        frames.update(f"{one.filename}:{one.name}" for one in traceback.extract_stack() if f"rar{os.sep}" in one.filename)
        return forward(batch)

    embed.encoder.forward = watched
    vectors = vectors_of(embed(pa.Table.from_pylist(rows, pa.schema([("pixels", pa.large_binary())]))))
    ours = [one for one in frames if "test_stages" not in one]
    assert len(ours) + len(["classify.run", "recognise.run", "Pool.run", "Desk.run", "ModelActor.run"]) <= 10, ours
    one, other, alone = embed.encoder.embed_images(np.stack([first, second, third]))
    np.testing.assert_allclose(vectors[0], (one + other) / np.linalg.norm(one + other), atol=1e-5)
    np.testing.assert_allclose(vectors[2], alone, atol=1e-5)
    assert (vectors[1] == 0).all()


def test_embed_gives_pictures_and_names_unit_vectors_and_errors_none(photos: Path) -> None:
    embed = models.Embed(config.Encoder(templates=["a photo of a {}.", "a {}."]))
    side, dim = embed.encoder.side, embed.encoder.dim
    pixels = fit_square(photo(0), side, "shortest", "bicubic")
    rows = [{"pixels": pixels.tobytes()}, {}, {"text": NAMES[0]}, {"pixels": pixels[::-1].tobytes()}]
    table = embed(pa.Table.from_pylist(rows, pa.schema([("pixels", pa.large_binary()), ("text", pa.string())])))
    vectors = vectors_of(table)
    assert vectors.shape == (4, dim) and "pixels" not in table.column_names
    np.testing.assert_allclose(vectors[[0, 3]], embed.encoder.embed_images(np.stack([pixels, pixels[::-1]])), atol=1e-6)
    np.testing.assert_allclose(vectors[2], embed.encoder.prototypes([NAMES[0]])[0], atol=1e-6)
    assert (vectors[1] == 0).all()
    assert len(table["seconds_embed"]) == 4


def test_driver_and_tasks_load_no_model_library() -> None:
    """torch and transformers belong to the processes that hold a model: each other one would pay seconds and a gigabyte."""
    code = """
import sys
import jobs.classify, jobs.detect, jobs.memory, rar.engine.direct, rar.engine.session, rar.engine.sinks, rar.run.recognise
import tests.engine.fussy, tests.engine.test_failures, tests.run.test_recognise  # what the tests send to workers
print(*{"torch", "torchvision", "transformers", "open_clip", "matplotlib"} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []


def test_a_run_without_a_ranker_imports_no_server() -> None:
    """Serve, and the web frameworks that it brings, cost half a second of every process; only who asks a ranker needs them."""
    code = "import sys, jobs.classify, rar.engine.session, rar.engine.sinks, rar.run.nearest, rar.run.recognise"
    code += "; print(*{'ray.serve', 'fastapi', 'aiohttp', 'scipy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == []


FAULT_PATTERNS = st.lists(st.sampled_from((None, *FAULTS)), max_size=6)
DIM = 6


def with_vectors(table: pa.Table, vectors: np.ndarray) -> pa.Table:
    return table.append_column("vector", vectors_column(vectors))


def healthy(vectors: np.ndarray, errors: list[str | None] | None = None) -> pa.Table:
    """A table as Retrieve meets it, with the columns it looks at."""
    table = pa.table({"error": pa.array(errors or [None] * len(vectors), pa.string()), "row": list(range(len(vectors)))})
    return with_vectors(table, vectors)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def images() -> Entries:
    """Three image entries of each of four classes, near a direction of their own."""
    rng = np.random.default_rng(0)
    centres, class_ids = unit(rng, 4, DIM), np.repeat(np.arange(4), 3)
    vectors = centres[class_ids] + 0.3 * unit(rng, 12, DIM)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Entries(
        [f"e{row:02d}" for row in range(12)], class_ids, [NAMES[int(c)] for c in class_ids], vectors.astype(np.float32)
    )


def stored(entries: Entries) -> Collection:
    """The entries in an ExactIndex, which searches as a Collection does."""
    exact = ExactIndex(entries.vectors.shape[1])
    exact.upsert(entries.entry_ids, entries.class_ids, entries.class_names, entries.vectors)
    return cast(Collection, exact)


def retriever(images: Entries, exact_up_to: int = 100, **settings: Any) -> choosing.Retrieve:
    """A memory of these images and of names near their classes, behind the stage."""
    names = Entries(["a", "b", "c", "d"], np.arange(4), list(NAMES.values()), images.vectors[::3])
    asked = config.Retriever(**settings)
    assert asked.mode != "all"
    head = modes.fit_head(asked.mode, images, names)
    return choosing.Retrieve(asked, lambda: head, stored(head.to_entries()), stored(images), exact_up_to)


@pytest.mark.parametrize("exact_up_to", [100, 3], ids=["exact", "searched"])
@pytest.mark.parametrize("mode", ["text", "centroid", "lda", "fused"])
def test_retrieve_by_a_head_is_the_heads_own_scores(images: Entries, mode: Any, exact_up_to: int) -> None:
    work = retriever(images, exact_up_to, mode=mode, top_k=3)
    names = Entries(["a", "b", "c", "d"], np.arange(4), list(NAMES.values()), images.vectors[::3])
    queries, head = unit(np.random.default_rng(1), 5, DIM), modes.fit_head(mode, images, names)
    table = work(healthy(queries))
    scores = head.scores(queries)
    shares = scores - np.logaddexp.reduce(scores, axis=1)[:, None]
    expected = best_of(shares, 3).candidates(head.class_ids, head.class_names)
    for found, row in zip(candidates_of(table), expected, strict=True):
        assert [(c.class_id, c.class_name) for c in found] == [(c.class_id, c.class_name) for c in row]
        assert [c.score for c in found] == pytest.approx([c.score for c in row], abs=1e-4)
    assert "vector" not in table.column_names


def test_retrieve_by_one_neighbor_is_the_nearest_entrys_class(images: Entries) -> None:
    work = retriever(images, mode="knn", top_k=2, n_neighbors=1, sharpness=1000.0)
    queries = unit(np.random.default_rng(1), 20, DIM)
    for query, found in zip(queries, candidates_of(work(healthy(queries))), strict=True):
        cosines = images.vectors @ query
        nearest = images.class_ids[cosines.argmax()]
        second = max((c for c in range(4) if c != nearest), key=lambda c: cosines[images.class_ids == c].max())
        assert [c.class_id for c in found] == [nearest, second]  # all classes have as many entries
        assert 0 >= found[0].score > found[1].score


@pytest.mark.parametrize("mode", ["knn", "tip"])
def test_votes_propose_as_many_classes_as_asked_and_each_once(images: Entries, mode: Any) -> None:
    work = retriever(images, mode=mode, top_k=4, n_neighbors=1)
    for found in candidates_of(work(healthy(images.vectors))):
        assert sorted(c.class_id for c in found) == [0, 1, 2, 3]
        assert sum(np.exp(c.score) for c in found) == pytest.approx(1, abs=1e-5)


def test_a_given_sharpness_is_used(images: Entries) -> None:
    """Very blunt votes rank classes alike; very sharp ones follow the nearest entry."""
    queries = unit(np.random.default_rng(1), 5, DIM)
    tables = [retriever(images, mode="knn", top_k=4, sharpness=sharpness)(healthy(queries)) for sharpness in (0.01, 1000.0)]
    blunt, sharp = ([[c.score for c in row] for row in candidates_of(table)] for table in tables)
    assert not np.allclose(blunt, sharp)
    nearest = images.class_ids[(queries @ images.vectors.T).argmax(axis=1)]
    assert [row[0].class_id for row in candidates_of(tables[1])] == nearest.tolist()


def test_retrieve_all_proposes_the_vocabulary_in_its_order() -> None:
    nothing = cast(Collection, ExactIndex(DIM))  # is not asked
    names = {2: "owl", 5: "kite", 7: "wren"}
    head = modes.Head(np.array(list(names)), list(names.values()), np.zeros((3, DIM), np.float32), np.zeros(3, np.float32))
    table = choosing.Retrieve(config.Retriever(mode="all", top_k=1), lambda: head, nothing, nothing)(
        healthy(np.zeros((2, DIM), np.float32))
    )
    for row in candidates_of(table):
        assert [(c.class_id, c.class_name) for c in row] == list(names.items())
        assert [c.score for c in row] == pytest.approx([-np.log(3)] * 3)


def test_top_k_is_cut_at_the_vocabulary(images: Entries) -> None:
    work = retriever(images, top_k=50)
    assert [len(found) for found in candidates_of(work(healthy(images.vectors)))] == [4] * 12


def test_retrieve_passes_rows_with_errors_on(images: Entries) -> None:
    work = retriever(images, top_k=1)
    queries = images.vectors[[0, 3, 6]].copy()
    queries[1] = np.nan  # must not even be looked at
    table = work(healthy(queries, [None, "gone", None]))
    alone = candidates_of(work(healthy(queries[[0, 2]])))
    assert candidates_of(table) == [alone[0], [], alone[1]]
    assert table["error"].to_pylist() == [None, "gone", None]
    assert candidates_of(work(healthy(queries, ["gone"] * 3))) == [[], [], []]


def test_recall_gives_what_is_known() -> None:
    known = [Candidate(1, "owl", 2.0), Candidate(0, "wren", 0.5)]
    table = choosing.Recall({"a": known})(pa.table({"image_id": pa.array(["b", "a", None], pa.string())}))
    assert candidates_of(table) == [[], known, []]


def candidates(*scores: float) -> list[Candidate]:
    return [Candidate(10 + position, f"class {position}", score) for position, score in enumerate(scores)]


def rankable(proposed: list[list[Candidate]], errors: list[str | None] | None = None) -> pa.Table:
    """A table as Rank meets it; the image of row r is the byte r."""
    table = pa.table(
        {
            "bytes": pa.array([bytes([row]) for row in range(len(proposed))], pa.large_binary()),
            "error": pa.array(errors or [None] * len(proposed), pa.string()),
        }
    )
    return with_candidates(table, proposed)


class Reverser:
    """A ranker that turns every order round, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[bytes], list[list[str]]]] = []

    def __call__(self, images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        self.asked.append((images, names))
        return [self.reverse(row) for row in names]

    @staticmethod
    def reverse(names: list[str]) -> Ranking:
        order = tuple(reversed(range(len(names))))
        return Ranking(order, RankStatus.RANKED, response=" > ".join(names), calls=1, prompt_tokens=9, output_tokens=2)


def ranked(ask: Reverser | None, calibration: Calibration, batch: int) -> stages.Stage:
    """The two stages that follow retrieval, as a run has them."""
    rank, fuse = choosing.Rank(ask, calibration, batch), choosing.Fuse(calibration)
    return lambda table: fuse(rank(table))


def test_the_rankers_order_is_fused_with_the_retrievers() -> None:
    proposed = [candidates(0.2, 0.1, 0.0), candidates(9.0, 1.0)]
    table = ranked(Reverser(), Calibration(weight_ranker=2.0), 8)(rankable(proposed))
    rankings = [Reverser.reverse([c.class_name for c in row]) for row in proposed]
    for row, (found, ranking) in enumerate(zip(proposed, rankings, strict=True)):
        order, chances = fusion.fuse(found, ranking, Calibration(weight_ranker=2.0))
        assert table["ranking"][row].as_py() == list(order)
        assert table["class_id"][row].as_py() == found[order[0]].class_id
        assert table["class_name"][row].as_py() == found[order[0]].class_name
        assert table["score"][row].as_py() == pytest.approx(chances[order[0]])
        assert table["scores"][row].as_py() == pytest.approx(fusion.rank_scores(ranking).tolist())
    assert table["ranking"].to_pylist() == [[2, 1, 0], [0, 1]]  # the second retriever is too sure to be turned round
    assert table["rank_status"].to_pylist() == ["ranked", "ranked"]
    assert table["routed"].to_pylist() == [False, False]
    assert table["response"].to_pylist() == ["class 0 > class 1 > class 2", "class 0 > class 1"]
    assert [table[f"mllm_{key}"].to_pylist() for key in ("calls", "prompt_tokens", "output_tokens")] == [[1, 1], [9, 9], [2, 2]]
    assert "bytes" not in table.column_names


def test_without_a_ranker_the_retrievers_order_stays() -> None:
    table = ranked(None, Calibration(), 8)(rankable([candidates(0.1, 0.2), candidates(0.5)]))
    assert table["ranking"].to_pylist() == [[1, 0], [0]]
    assert table["class_id"].to_pylist() == [11, 10]
    assert table["rank_status"].to_pylist() == ["skipped", "skipped"]
    assert table["routed"].to_pylist() == [True, True]
    assert table["mllm_calls"].to_pylist() == [0, 0]


def test_a_sure_retriever_routes_past_the_ranker() -> None:
    ask = Reverser()
    proposed = [candidates(0.1, 0.0), candidates(9.0, 0.0), candidates(1.0), candidates(0.0, 0.05)]
    table = ranked(ask, Calibration(threshold=0.9), 8)(rankable(proposed))
    assert table["rank_status"].to_pylist() == ["ranked", "skipped", "skipped", "ranked"]
    assert table["routed"].to_pylist() == [False, True, True, False]
    assert table["class_id"].to_pylist() == [
        11,
        10,
        10,
        10 + fusion.fuse(proposed[3], Reverser.reverse(["", ""]), Calibration())[0][0],
    ]
    assert ask.asked == [([b"\x00", b"\x03"], [["class 0", "class 1"]] * 2)]


def test_the_ranker_is_asked_in_batches_of_one_size() -> None:
    ask = Reverser()
    ranked(ask, Calibration(), 2)(rankable([candidates(0.1, 0.0)] * 5))
    assert [images for images, _ in ask.asked] == [[b"\x00", b"\x01"], [b"\x02", b"\x03"], [b"\x04"]]


def test_rank_passes_rows_with_errors_on() -> None:
    ask = Reverser()
    table = ranked(ask, Calibration(), 8)(rankable([candidates(0.1, 0.0), [], candidates(0.3, 0.2)], [None, "gone", None]))
    assert table["error"].to_pylist() == [None, "gone", None]
    assert table["class_id"].to_pylist()[1] is None and table["ranking"].to_pylist()[1] == []
    assert [images for images, _ in ask.asked] == [[b"\x00", b"\x02"]]


@settings(max_examples=30)
@given(FAULT_PATTERNS, st.booleans(), st.sampled_from([0.0, 0.4, np.inf]))
def test_every_row_leaves_as_a_prediction_or_as_an_error(
    photos: Path, images: Entries, faults: list[str | None], is_ranked: bool, threshold: float
) -> None:
    """The whole chain, with the encoder replaced by six numbers of the picture."""
    names = [fault or f"good-{row}" for row, fault in enumerate(faults)]
    table = reading.Decode(fit, None)(reading.load(index(photos, *names)))
    vectors = [np.zeros(DIM) if data is None else tiny(data) for data in table["pixels"].to_pylist()]
    table = with_vectors(table, np.array(vectors, np.float32).reshape(-1, DIM))
    table = retriever(images, top_k=3)(table)
    ask = Reverser()
    table = ranked(ask if is_ranked else None, Calibration(threshold=threshold), 4)(table)
    assert table["row"].to_pylist() == list(range(len(faults)))
    for row, fault in zip(table.to_pylist(), faults, strict=True):
        assert (row["error"] is not None) == (row["stage"] is not None) == (fault is not None)
        assert row["stage"] == {"missing": "read", "broken": "decode", "truncated": "decode", None: None}[fault]
        assert sorted(row["ranking"]) == ([] if fault else [0, 1, 2])
        assert (row["class_id"] is None) == (fault is not None)
        assert row["routed"] == (row["rank_status"] == "skipped")
    asked = sum(len(batch) for batch, _ in ask.asked)
    assert asked == table["routed"].to_pylist().count(False) <= faults.count(None)


def tiny(data: bytes) -> np.ndarray:
    """(6,) unit norm: mean colour of the upper and the lower half."""
    pixels = np.frombuffer(data, np.uint8).reshape(2, -1, 3).mean(axis=1).ravel() - 128
    return pixels / np.linalg.norm(pixels)


def test_timed_shares_a_stages_seconds_over_the_rows_it_gives() -> None:
    def slow(table: pa.Table) -> pa.Table:
        time.sleep(0.05)
        return pa.concat_tables([table, table])

    started = time.perf_counter()
    table = stages.timed("slow", slow)(pa.table({"row": [0, 1]}))
    elapsed = time.perf_counter() - started
    assert table["row"].to_pylist() == [0, 1, 0, 1]
    seconds = table["seconds_slow"].to_pylist()
    assert len(set(seconds)) == 1
    assert 0.05 <= sum(seconds) <= elapsed


def test_waiting_for_a_models_process_is_noted_beside_its_work() -> None:
    before, started = pa.table({"row": [0, 1], "seconds_read": [9.0, 9.0]}), time.perf_counter() - 5
    after = before.append_column("seconds_embed", pa.array([1.0, 1.0]))
    table = stages.with_waited(after, before, started)
    assert sum(table["waited_embed"].to_pylist()) == pytest.approx(3, abs=1) and "waited_read" not in table.column_names
    assert stages.with_waited(before, before, started).equals(before)


def test_notes_of_another_pipeline_are_kept_apart() -> None:
    table = pa.table({"row": [1, 2], "seconds_embed": [0.5, 0.25], "waited_embed": [3.0, 3.0]})
    assert sinks.stage_seconds(stages.as_before(table)) == {"embed.rows": 2, "embed.before": 0.75}


def test_timed_of_no_rows() -> None:
    table = stages.timed("idle", lambda table: table)(pa.table({"row": pa.array([], pa.int64())}))
    assert table["seconds_idle"].to_pylist() == []


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_vectors_survive_arrow(n: int, dim: int, data: st.DataObject) -> None:
    vectors = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    cut = data.draw(st.integers(0, n))
    table = pa.table({"vector": vectors_column(vectors)})
    np.testing.assert_array_equal(vectors_of(table), vectors)
    parts = pa.concat_tables([table.slice(0, cut), table.slice(cut)])  # sliced and chunked, as Ray hands tables on
    np.testing.assert_array_equal(vectors_of(parts), vectors)
    if cut:
        np.testing.assert_array_equal(vectors_of(table.slice(n - cut)), vectors[n - cut :])


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.text(max_size=5), st.floats(-9, 9, width=32)), max_size=3), max_size=4)
)
def test_candidates_survive_arrow(rows: list[list[tuple[int, str, float]]]) -> None:
    proposed = [[Candidate(*one) for one in row] for row in rows]
    table = with_candidates(pa.table({"row": list(range(len(rows)))}), proposed)
    assert candidates_of(table) == proposed
