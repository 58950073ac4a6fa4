"""Pictures of classes that are shown beside their names: read, made small, and kept by a process up to so many bytes.

Small: the short side is EXEMPLAR_SIDE pixels, about what models see of a picture; a photo of 12 megapixels would be 36 MB as
pixels, its thumbnail is 0.5 MB. Called from several threads, as reading and decoding let others run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rar import config
from rar.boxes import check_boxes
from rar.corpus import listing
from rar.corpus.decode import decode
from rar.corpus.frame import frame_of
from rar.crops import windows
from rar.schema import RowError

EXEMPLAR_SIDE = 336  # pixels, that a larger picture keeps of its short side
KEPT_BYTES = 256 << 20
ENTRY_BYTES = 256  # of a picture that cannot be read: to know it costs something, too
Cut = tuple[tuple[float, ...], tuple[int | None, int | None], str]  # box_xyxy, stated width and height, config.Shown as JSON
Place = tuple[str, int | None, int | None] | tuple[str, int | None, int | None, Cut]  # uri, offset, size, and of a box its cut
Exemplars = dict[str, list[Place]]  # class name -> pictures of it


class Pictures:
    """The least lately used goes first."""

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.kept: OrderedDict[Place, np.ndarray | None] = OrderedDict()
        self.lock = threading.Lock()

    def at(self, places: Sequence[Place]) -> list[np.ndarray]:
        """(H, W, 3) uint8 each; one that cannot be read is left out."""
        return [picture for place in places if (picture := self(place)) is not None]

    def __call__(self, place: Place) -> np.ndarray | None:
        with self.lock:
            if place in self.kept:
                self.kept.move_to_end(place)
                return self.kept[place]
        picture = read_small(place)
        with self.lock:
            if place not in self.kept:
                self.kept[place] = picture
                self.bytes += _cost(picture)
            while self.bytes > self.most_bytes:
                self.bytes -= _cost(self.kept.popitem(last=False)[1])
        return picture


def read_small(place: Place) -> np.ndarray | None:
    """A picture with a short side of at most EXEMPLAR_SIDE pixels, or the crop of a box; None where it cannot be read."""
    data = listing.read_many([place[0]], [place[1]], [place[2]])[0]
    try:
        if isinstance(data, RowError):
            return None
        pixels = decode(data, EXEMPLAR_SIDE) if len(place) == 3 else _cut_out(data, place[3])
    except RowError:
        return None
    if pixels is None or len(place) == 4 or min(pixels.shape[:2]) <= EXEMPLAR_SIDE:
        return pixels
    scale = EXEMPLAR_SIDE / min(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _cut_out(data: bytes, cut: Cut) -> np.ndarray | None:
    box, stated, settings = cut
    shown = config.Shown.model_validate_json(settings)
    image = decode(data)
    height, width = image.shape[:2]
    on_image = frame_of(stated, (width, height), data).to_pixels(np.array([box]))
    return None if check_boxes(on_image, width, height)[0] else windows.crops(image, on_image, shown, shown.view)[0]


def _cost(picture: np.ndarray | None) -> int:
    return ENTRY_BYTES + (0 if picture is None else picture.nbytes)
