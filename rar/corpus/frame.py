"""Boxes belong to a picture of a size: from the frame that a file's boxes lie in to the pixels that are decoded, and back.

Pictures are decoded upright, and people resize them. A COCO file states the width and height that its boxes were drawn in, and
that tells which of three it was:
- the decoded size: nothing to do;
- the size as stored, where EXIF turns the picture by a quarter: the boxes are turned with it (some tools ignore EXIF);
- either of them scaled, to a pixel: the boxes are scaled with it.
Where none explains the stated size, the picture is another one, and its boxes would be cut from the wrong place: an error that
names both sizes. A half turn or a mirrored picture has the same size either way, and its boxes are taken as upright. A file
that states no size is believed.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from rar.corpus.decode import FORMATS
from rar.schema import RowError

Size = tuple[int, int]  # width, height
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Frame(NamedTuple):
    """Where the stated frame's points lie in the decoded picture: (x, y) -> matrix @ (x, y) + shift."""

    matrix: np.ndarray  # (2, 2); each row and column has one number that is not 0
    shift: np.ndarray  # (2,)

    def to_pixels(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """(B, 4) boxes as the file has them -> as they lie in the decoded picture."""
        return _moved(boxes_xyxy, self.matrix, self.shift)

    def to_file(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """The reverse."""
        back = np.linalg.inv(self.matrix)
        return _moved(boxes_xyxy, back, -back @ self.shift)


SAME = Frame(np.eye(2), np.zeros(2))


def frame_of(stated: tuple[int | None, int | None], decoded: Size, data: bytes) -> Frame:
    """stated: width and height in the file, or None. decoded: of the upright picture. data: its encoded bytes.

    Raises RowError where the sizes cannot be reconciled.
    """
    width, height = stated
    if width is None or height is None or (width, height) == decoded:
        return SAME
    stored, orientation = _stored(data, decoded)
    turned = orientation in QUARTER_TURNS
    if turned and (width, height) == stored:
        return _turn(stored, orientation)
    if _is_scaled((width, height), decoded):
        return Frame(np.diag([decoded[0] / width, decoded[1] / height]), np.zeros(2))
    if turned and _is_scaled((width, height), stored):
        scale = np.diag([stored[0] / width, stored[1] / height])
        turn = _turn(stored, orientation)
        return Frame(turn.matrix @ scale, turn.shift)
    as_stored = f" ({stored[0]} x {stored[1]} as stored)" if turned else ""
    raise RowError(
        f"the boxes are of a picture of {width} x {height}, this one has {decoded[0]} x {decoded[1]} pixels{as_stored}: "
        "neither turned nor scaled from it"
    )


def _moved(boxes_xyxy: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    ends = np.asarray(boxes_xyxy, np.float64).reshape(-1, 2, 2) @ matrix.T + shift
    # A turn swaps which end of an axis comes first. Boxes that end before they begin must stay so, to be refused.
    flipped = (matrix.sum(axis=1) < 0)[None, None, :]
    return np.where(flipped, ends[:, ::-1], ends).reshape(-1, 4)


def _turn(stored: Size, orientation: int) -> Frame:
    """EXIF 2.3, tag 0x0112: where a point of the stored picture lies in the upright one."""
    width, height = stored
    return {
        5: Frame(np.array([[0.0, 1], [1, 0]]), np.zeros(2)),
        6: Frame(np.array([[0.0, -1], [1, 0]]), np.array([height, 0.0])),
        7: Frame(np.array([[0.0, -1], [-1, 0]]), np.array([height, width], float)),
        8: Frame(np.array([[0.0, 1], [-1, 0]]), np.array([0.0, width])),
    }[orientation]


def _is_scaled(stated: Size, size: Size) -> bool:
    """Whether one factor, each side rounded either way, makes one size of the other."""
    low = max((length - 1) / known for known, length in zip(stated, size, strict=True))
    high = min((length + 1) / known for known, length in zip(stated, size, strict=True))
    return low <= high


def _stored(data: bytes, decoded: Size) -> tuple[Size, int]:
    """Size and EXIF orientation of the picture as stored; what cannot be read is as decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly everything; decode, too, takes such a picture as it is
        return decoded, 1
    return (decoded[::-1] if orientation in QUARTER_TURNS else decoded), orientation
