"""Windows, pixels and views of boxes, against literals and a slow per-box oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from rar.bench.detect import compare, draw_photos, one_thread, plain_crops, read_photos
from rar.config import Crop
from rar.crops import windows
from tests.conftest import SHARED_DATA

numbers = st.floats(-2000, 2000, width=32)
sides = st.floats(1, 900, width=32)
boxes_xyxy = st.tuples(numbers, numbers, sides, sides).map(lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]]))
OUTSIDES = ["blur", "grey", "black", "none"]
VIEWS = ["adaptive", "tight", "context"]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


@given(boxes_xyxy, st.sampled_from(VIEWS))
def test_the_window_is_a_square_of_whole_pixels_around_the_box(box: np.ndarray, view: windows.View) -> None:
    x0, y0, x1, y1 = windows.windows_xyxy(box[None], view)[0].tolist()
    assert x1 - x0 == y1 - y0
    assert abs((x0 + x1) / 2 - (box[0] + box[2]) / 2) <= 0.5 and abs((y0 + y1) / 2 - (box[1] + box[3]) / 2) <= 0.5
    assert x0 <= box[0] + 1e-6 and y0 <= box[1] + 1e-6 and x1 >= box[2] - 1e-6 and y1 >= box[3] - 1e-6


def test_the_window_grows_by_object_size() -> None:
    boxes = np.array([[0.0, 0, 32, 32], [0, 0, 33, 32], [0, 0, 96, 96], [0, 0, 96, 97], [0, 0, 100, 4]])
    squares = windows.windows_xyxy(boxes)
    assert (squares[:, 2] - squares[:, 0]).tolist() == [48, 42, 120, 107, 150]
    assert squares[0].tolist() == [-8, -8, 40, 40]
    assert windows.windows_xyxy(boxes, "tight")[[0, 4]].tolist() == [[0, 0, 32, 32], [0, -48, 100, 52]]
    assert windows.windows_xyxy(boxes, "context")[[0, 4]].tolist() == [[-16, -16, 48, 48], [-50, -98, 150, 102]]


def test_a_tight_window_holds_every_pixel_that_the_box_touches() -> None:
    boxes = np.array([[10.5, 3, 20.5, 4], [7.9, 7.9, 8.1, 8.1]])
    squares = windows.windows_xyxy(boxes, "tight").tolist()
    assert squares[0] in ([10, -2, 21, 9], [10, -1, 21, 10])
    assert squares[1] == [7, 7, 9, 9]
    assert windows.windows_xyxy(np.zeros((0, 4))).shape == (0, 4)


@given(boxes_xyxy, st.integers(16, 512), st.sampled_from(VIEWS))
def test_a_windows_corners_are_the_crops(box: np.ndarray, size: int, view: windows.View) -> None:
    window = windows.windows_xyxy(box[None], view)[0]
    np.testing.assert_allclose(windows.to_crop(window.reshape(2, 2), window, size), [[0, 0], [size, size]], atol=1e-6)


def test_many_points_map_with_their_own_windows() -> None:
    squares = np.array([[0, 0, 10, 10], [100, 200, 140, 240]])
    assert windows.to_crop(np.array([[5, 5], [120, 210]]), squares, 20).tolist() == [[10, 10], [10, 5]]


def slow_crop(image: np.ndarray, box_xyxy: np.ndarray, crop: Crop, view: str = "adaptive") -> np.ndarray:
    """The definition: pad hugely, cut the window out, resize, then decide pixel by pixel whether the box touches it."""
    height, width = image.shape[:2]
    pixels = crop.size
    assert pixels is not None
    x0, y0, x1, y1 = max(0, box_xyxy[0]), max(0, box_xyxy[1]), min(width, box_xyxy[2]), min(height, box_xyxy[3])
    size = (x1 - x0) * (y1 - y0)
    scale = 1.5 if size <= 1024 else 1.25 if size <= 9216 else 1.1
    scale = {"adaptive": scale, "tight": 1.0, "context": windows.CONTEXT_SCALE}[view]
    touched = max(math.ceil(x1) - math.floor(x0), math.ceil(y1) - math.floor(y0))
    side = max(math.ceil(scale * max(x1 - x0, y1 - y0)), touched)
    left = min(max(round((x0 + x1 - side) / 2), math.ceil(x1) - side), math.floor(x0))
    top = min(max(round((y0 + y1 - side) / 2), math.ceil(y1) - side), math.floor(y0))
    pad = 3 * max(height, width)
    padded = Image.fromarray(np.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode="edge"))
    square = padded.crop((left + pad, top + pad, left + pad + side, top + pad + side))
    square = square.resize((pixels, pixels), Image.Resampling.BICUBIC)
    if crop.outside == "none":
        return np.asarray(square).astype(int)
    hidden = {
        "blur": np.asarray(square.filter(ImageFilter.GaussianBlur(windows.SIGMA * pixels))),
        "grey": np.full((pixels, pixels, 3), 128, np.uint8),
        "black": np.zeros((pixels, pixels, 3), np.uint8),
    }[crop.outside].astype(int)
    pixel = side / pixels
    for row in range(pixels):
        for column in range(pixels):
            w = min(x1, left + (column + 1) * pixel) - max(x0, left + column * pixel)
            h = min(y1, top + (row + 1) * pixel) - max(y0, top + row * pixel)
            if w > 1e-5 * pixel and h > 1e-5 * pixel:
                hidden[row, column] = np.asarray(square)[row, column]
    return hidden


def assert_alike(got: np.ndarray, expected: np.ndarray) -> None:
    """The tolerance: 1.5 grey levels on average. Pillow rounds and clips to 8 bits between its passes, and blurs with boxes."""
    gap = np.abs(got.astype(int) - expected)
    assert gap.mean() <= 1.5
    assert gap.max() <= 24


BOXES = np.array(
    [
        [30.3, 20.7, 61.9, 55.2],
        [0, 0, 120, 90],
        [100.5, 70.25, 180, 95],  # leaves the image
        [-30, -40, 5, 3],
        [50, 0, 51, 90],  # one pixel wide: less than a pixel of the crop
        [7, 9, 8, 10],  # one pixel
        [0, 80, 120, 85.5],
    ]
)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("outside", OUTSIDES)
def test_crops_equal_the_slow_definition(outside: windows.Outside, view: windows.View) -> None:
    image, crop = photo(90, 120), Crop(size=32, outside=outside)
    result = windows.crops(image, BOXES, crop, view)
    assert result.shape == (7, 32, 32, 3)
    assert result.dtype == np.uint8
    for got, box in zip(result, BOXES, strict=True):
        assert_alike(got, slow_crop(image, box, crop, view))
    assert_alike(plain_crops(image, BOXES, crop, view), result.astype(int))  # what the benchmark compares with


@settings(max_examples=40)
@given(
    st.tuples(st.floats(0, 99), st.floats(0, 69), st.floats(1, 200), st.floats(1, 200)),
    st.sampled_from(OUTSIDES),
    st.sampled_from(VIEWS),
    st.sampled_from([16, 23, 40]),  # 23: the last band is a narrow one
)
def test_any_box_equals_the_slow_definition(
    box: tuple[float, ...], outside: windows.Outside, view: windows.View, size: int
) -> None:
    x, y, w, h = box
    image, crop = photo(71, 101, seed=1), Crop(size=size, outside=outside)
    got = windows.crops(image, np.array([[x, y, x + w, y + h]]), crop, view)[0]
    assert_alike(got, slow_crop(image, np.array([x, y, x + w, y + h]), crop, view))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(OUTSIDES), st.sampled_from(VIEWS))
def test_a_plain_image_gives_plain_crops(height: int, width: int, outside: windows.Outside, view: windows.View) -> None:
    image = np.full((height, width, 3), (200, 100, 50), np.uint8)
    result = windows.crops(image, np.array([[0, 0, width, height]]), Crop(size=16, outside=outside), view)[0]
    if outside in ("blur", "none"):
        assert np.abs(result.astype(int) - (200, 100, 50)).max() <= 1
    assert (result == (200, 100, 50)).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (1, 300), (2, 5000)])
def test_thin_images(shape: tuple[int, int]) -> None:
    """A window as wide as the image is long, of which only the image's part is ever held."""
    image = photo(*shape)
    crop = Crop(size=16, outside="none")
    height, width = shape
    for view in VIEWS:
        got = windows.crops(image, np.array([[0, 0, width, height]]), crop, view)[0]  # type: ignore[arg-type]
        if max(shape) <= 300:
            assert_alike(got, slow_crop(image, np.array([0, 0, width, height]), crop, view))
        assert np.abs(got.astype(int).mean() - image.mean()) < 12


def test_a_window_far_larger_than_memory_would_hold() -> None:
    image = np.zeros((1, 65_535, 3), np.uint8)  # the longest JPEG; its square window has 4 billion pixels
    image[:, 40_000:] = 255
    result = windows.crops(image, np.array([[0, 0, 65_535, 1]]), Crop(size=64, outside="none"))[0]
    edge = windows.to_crop(np.array([40_000, 0]), windows.windows_xyxy(np.array([[0, 0, 65_535, 1]]))[0], 64)[0]
    assert (result[:, : int(edge) - 2] < 8).all() and (result[:, int(edge) + 3 :] > 247).all()


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    result = windows.crops(stripes, np.array([[50, 50, 450, 450]]), Crop(size=24, outside="none"))
    assert result.min() > 115 and result.max() < 140  # the mean grey; a filter without antialiasing gives moire from 0 to 255


def test_a_crop_shows_the_box_sharp_and_hides_the_rest() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[40:60, 30:70] = (255, 0, 0)
    box = np.array([[30, 40, 70, 60]])
    crop = Crop(size=80, outside="grey")
    result = windows.crops(image, box, crop, "context")[0]
    assert (result[31:49, 21:59] == (255, 0, 0)).all()  # 1 crop pixel = 1 image pixel; the window is (10, 10, 90, 90)
    assert (result[:30] == 128).all() and (result[50:] == 128).all() and (result[:, :20] == 128).all()
    assert (result[:, 60:] == 128).all() and not (result[30:50, 20:60] == 128).any()


def test_blur_smooths_only_outside() -> None:
    image = photo(200, 200)
    box = np.array([[60, 80, 140, 120]])
    sharp = windows.crops(image, box, Crop(size=64, outside="none"))[0].astype(int)
    blurred = windows.crops(image, box, Crop(size=64, outside="blur"))[0].astype(int)
    same = (sharp == blurred).all(axis=-1)
    assert same[20:44, 7:57].all()  # the box is rows 19.2 to 44.8 and columns 6.4 to 57.6 of the crop
    assert np.abs(np.diff(blurred[:14], axis=1)).mean() < 0.5 * np.abs(np.diff(sharp[:14], axis=1)).mean()


def test_no_box_and_a_thousand_boxes() -> None:
    image = photo(120, 160)
    assert windows.crops(image, np.zeros((0, 4)), Crop(size=96)).shape == (0, 96, 96, 3)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (1000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 60, (1000, 2))], axis=1)
    result = windows.crops(image, boxes, Crop(size=16))
    assert result.shape == (1000, 16, 16, 3)
    for i in (0, 499, 999):
        np.testing.assert_array_equal(result[i], windows.crops(image, boxes[i : i + 1], Crop(size=16))[0])


def test_an_image_that_is_a_view_of_another_gives_the_same() -> None:
    image = photo(60, 80)
    flipped = np.ascontiguousarray(image[:, ::-1])
    box = np.array([[5.0, 6, 40, 50]])
    np.testing.assert_array_equal(windows.crops(image[:, ::-1], box, Crop(size=16)), windows.crops(flipped, box, Crop(size=16)))


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.06, 0.2, 0.5])
def test_the_blur_is_pillows_up_to_half_the_crop(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "SIGMA", sigma)
    image, crop, box = photo(64, 64, seed=3), Crop(size=64, outside="blur"), np.array([[20.0, 20, 50, 44]])
    assert_alike(windows.crops(image, box, crop, "context")[0], slow_crop(image, box[0], crop, "context"))


def test_crops_refuse_what_check_boxes_refuses() -> None:
    with pytest.raises(ValueError, match="outside"):
        windows.crops(photo(20, 20), np.array([[0, 0, 5, 5], [30, 30, 40, 40]]), Crop())


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
def test_real_photos_crop_as_pillow_crops_them() -> None:
    for image, boxes in read_photos(SHARED_DATA / "coco")[:6]:
        for outside in OUTSIDES:
            crop = Crop(size=48, outside=outside)  # type: ignore[arg-type]
            result = windows.crops(image, boxes, crop)
            assert result.std(axis=(1, 2, 3)).min() > 2
            assert_alike(result, plain_crops(image, boxes, crop).astype(int))


def test_the_bench_counts_and_compares() -> None:
    photos = draw_photos(2)
    row = compare(one_thread, photos, Crop(size=16), repeats=1)
    assert row["boxes"] == 16 and row["ours"] > 0 and row["reference"] > 0
    assert row["mean_difference"] <= 1.5
