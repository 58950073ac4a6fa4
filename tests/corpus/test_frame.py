"""Boxes in a file's frame against pictures turned and scaled by Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from rar.corpus.decode import decode
from rar.corpus.frame import SAME, frame_of
from rar.schema import RowError


def png(width: int, height: int, orientation: int, box: tuple[int, int, int, int] | None = None) -> bytes:
    """A black picture, white within box (as stored); EXIF says how it must be turned."""
    image = Image.new("RGB", (width, height))
    if box is not None:
        image.paste("white", box)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@given(st.integers(5, 8), st.data())
def test_a_box_of_the_stored_picture_is_found_in_the_upright_one(orientation: int, draw: st.DataObject) -> None:
    width, height = draw.draw(st.sampled_from([(20, 31), (31, 20), (8, 40)]))
    left, top = draw.draw(st.integers(0, width - 2)), draw.draw(st.integers(0, height - 2))
    right, bottom = draw.draw(st.integers(left + 1, width)), draw.draw(st.integers(top + 1, height))
    data = png(width, height, orientation, (left, top, right, bottom))
    image = decode(data)
    frame = frame_of((width, height), (image.shape[1], image.shape[0]), data)
    box = np.array([[left, top, right, bottom]], float)
    x0, y0, x1, y1 = frame.to_pixels(box)[0].astype(int)
    rows, columns = np.nonzero(image[..., 0])
    assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    np.testing.assert_allclose(frame.to_file(frame.to_pixels(box)), box, atol=1e-9)
    doubled = frame_of((2 * width, 2 * height), (image.shape[1], image.shape[0]), data)
    np.testing.assert_allclose(doubled.to_pixels(2 * box), frame.to_pixels(box), atol=1e-9)
    np.testing.assert_allclose(doubled.to_file(frame.to_pixels(box)), 2 * box, atol=1e-9)


def test_scaled_boxes_and_boxes_that_end_before_they_begin() -> None:
    data = png(160, 128, 1)
    frame = frame_of((320, 256), (160, 128), data)
    assert frame.to_pixels(np.array([[8, 8, 29, 29], [20, 20, 10, 10]])).tolist() == [[4, 4, 14.5, 14.5], [10, 10, 5, 5]]
    rounded = frame_of((333, 500), (166, 250), data).to_pixels(np.array([[0, 0, 333, 500]]))
    np.testing.assert_allclose(rounded, [[0, 0, 166, 250]])
    turned = frame_of((128, 160), (160, 128), png(128, 160, 6))
    assert (turned.to_pixels(np.array([[20.0, 5, 10, 9]]))[0, [0, 2]] != 0).all()
    x0, y0, x1, y1 = turned.to_pixels(np.array([[20.0, 5, 10, 9]]))[0]
    assert y1 < y0 and x1 > x0


def test_no_size_the_same_size_and_broken_exif_change_nothing() -> None:
    for stated in ((None, None), (None, 8), (10, 8)):
        assert frame_of(stated, (10, 8), b"no picture") is SAME
    with pytest.raises(RowError, match="of a picture of 8 x 10, this one has 10 x 8 pixels: neither"):
        frame_of((8, 10), (10, 8), b"no picture")


def test_sizes_that_nothing_explains_are_named() -> None:
    with pytest.raises(RowError, match=r"320 x 256, this one has 200 x 100 pixels \(100 x 200 as stored\)"):
        frame_of((320, 256), (200, 100), png(100, 200, 6))
    with pytest.raises(RowError, match="640 x 480, this one has 640 x 478"):
        frame_of((640, 480), (640, 478), png(640, 478, 1))
    assert frame_of((500, 333), (500, 334), png(500, 334, 1)) is not SAME  # rounded the other way: a scale of one side
