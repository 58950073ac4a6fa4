"""What the models see of a box: a square window around it, resized, with the surroundings hidden.

The paper (3.2 and appendix C.3) crops each proposal, grows it by the object's size and blurs what is not the target, but gives
no values and no code. The choices here, and what they cost:

- The window is a square around the box's centre, so that shape survives the square resize. Where it leaves the image it is
  filled by repeating the image's edge: shifting it inside would move the object off centre, and a flat colour would draw an
  edge beside it. The cost is streaks at the border, which the default blur softens.
- Windows have whole pixels. The object is off centre by half a pixel at most; in return the resize depends on the window's side
  alone, so that its weights are computed once a side and not once a box.
- Outside the target is blurred, greyed, blacked out or left. The border is hard: a crop pixel that the box touches stays
  untouched, so up to one crop pixel of context stays sharp, and no part of the object is ever hidden.
- Resize and blur are matrix products, because BLAS multiplies faster than Pillow, which has no vector code, convolves: in
  bands, as most of a resize's weights are zero, and by factors of low rank, as a blur keeps no detail. The results are
  Pillow's (`Image.resize`, bicubic and antialiased; `GaussianBlur`) to within rounding. The repeated edges are never stored:
  their weights are added to the edge pixel's, so that a window costs no more memory than the part of it inside the image.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from rar.boxes import MEDIUM_AREA, SMALL_AREA, area, check_boxes, clip_xyxy
from rar.config import Window

View = Literal["adaptive", "tight", "context"]
Outside = Literal["blur", "grey", "black", "none"]

GREY = 128
GROWTH = (1.5, 1.25, 1.1)  # of boxes of at most 32 x 32 pixels, of at most 96 x 96, and of larger ones
SIGMA = 0.06  # of the Gaussian blur, as a fraction of the crop's side
CONTEXT_SCALE = 2.0  # growth of every box in the window `context`
WIDE, NARROW, FEW = 32, 16, 128  # crop pixels in a band, for windows of at most FEW pixels and for larger ones; measured
ROUNDING = 1e-6  # crop pixels: a corner on a pixel's border is no touch of the next
KEPT = 2e-3  # factors of the blur below this singular value change no pixel by more than rounding does


class Band(NamedTuple):
    """The pixels low to high of an image's axis make the pixels `out` of the crop's: weights (high - low, |out|) float32."""

    out: slice
    low: int
    high: int
    weights: np.ndarray


def windows_xyxy(boxes_xyxy: np.ndarray, view: View = "adaptive") -> np.ndarray:
    """The square windows shown for boxes: (B, 4) pixels -> (B, 4) int64 whole pixels; they may leave the image.

    Each is centred on its box to within half a pixel and holds every pixel that the box touches. Its side is max(w, h) times
    1 (`tight`), CONTEXT_SCALE (`context`), or a scale chosen by the box's area (`adaptive`), rounded up.
    """
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    touched = (np.ceil(high) - np.floor(low)).max(axis=1)
    side = np.ceil(np.maximum(_scale(boxes_xyxy, view) * (high - low).max(axis=1), touched))[:, None]
    corner = np.rint((low + high - side) / 2)
    return np.concatenate([corner, corner + side], axis=1).astype(np.int64)


def _scale(boxes_xyxy: np.ndarray, view: View) -> np.ndarray:
    if view != "adaptive":
        return np.full(len(boxes_xyxy), 1.0 if view == "tight" else CONTEXT_SCALE)
    group = np.searchsorted([SMALL_AREA, MEDIUM_AREA], area(boxes_xyxy))
    return np.array(GROWTH)[group]


def to_crop(points: np.ndarray, window_xyxy: np.ndarray, size: int) -> np.ndarray:
    """Image coordinates (..., 2) x, y -> coordinates in the size x size crop of a square window (..., 4)."""
    return (points - window_xyxy[..., :2]) * (size / (window_xyxy[..., 2:] - window_xyxy[..., :2]))


def crops(image: np.ndarray, boxes_xyxy: np.ndarray, crop: Window, view: View = "adaptive") -> np.ndarray:
    """What the models see of each box: image (H, W, 3) uint8, boxes (B, 4) -> (B, S, S, 3) uint8, S = crop.size, which is set.

    Boxes are clipped to the image first; the windows are `windows_xyxy` of the clipped boxes.
    Raises ValueError for a box that `check_boxes` refuses: those are rows of `errors/` before they come here.
    """
    height, width = image.shape[:2]
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    if fault := next(filter(None, check_boxes(boxes, width, height)), None):
        raise ValueError(fault)
    boxes, size = clip_xyxy(boxes, width, height), crop.size
    assert size is not None, "the encoder's side is not filled in (config.Crop.sized)"
    result = np.empty((len(boxes), size, size, 3), dtype=np.uint8)
    windows = windows_xyxy(boxes, view)
    targets = touched_xyxy(boxes, windows, size)
    for i, (window, target) in enumerate(zip(windows.tolist(), targets.tolist(), strict=True)):
        shown = _hide_outside(_resized(image, window, size), target, crop)
        result[i] = np.add(np.clip(shown, 0, 255, out=shown), 0.5, out=shown).astype(np.uint8).transpose(2, 0, 1)
    return result


def touched_xyxy(boxes_xyxy: np.ndarray, windows: np.ndarray, size: int) -> np.ndarray:
    """The crop pixels that boxes (B, 4) touch in the size x size crops of windows (B, 4): (B, 4) int64, which stay sharp."""
    low, high = to_crop(boxes_xyxy[:, :2], windows, size), to_crop(boxes_xyxy[:, 2:], windows, size)
    bounds = np.concatenate([np.floor(low + ROUNDING), np.ceil(high - ROUNDING)], axis=1)
    return bounds.astype(np.int64)


def _resized(image: np.ndarray, window_xyxy: list[int], size: int) -> np.ndarray:
    """The window's part of an image (H, W, 3) uint8 -> (size, 3, size) float32, x first: each pass is a plain product."""
    left, top, right, bottom = window_xyxy
    inside = image[max(top, 0) : bottom, max(left, 0) : right]
    height, width = inside.shape[:2]
    bands = bands_of(right - left, size)
    lines = np.empty((3 * width, size), np.float32)
    for out, low, high, weights in _repeat_edges(bands, min(top, 0), height):
        strip = inside[low:high].reshape(high - low, 3 * width).astype(np.float32)
        np.matmul(strip.T, weights, out=lines[:, out])
    lines = lines.reshape(width, 3 * size)
    square = np.empty((size, 3 * size), np.float32)
    for out, low, high, weights in _repeat_edges(bands, min(left, 0), width):
        np.matmul(weights.T, lines[low:high], out=square[out])
    return square.reshape(size, 3, size)


@lru_cache(maxsize=512)
def bands_of(length: int, size: int) -> list[Band]:
    """Weights that resize `length` pixels to `size`.

    The filter is Keys' cubic convolution (1981) with a = -1/2, widened by the factor that it shrinks by.
    """
    stretch = max(length / size, 1)
    wide = WIDE if length <= FEW else NARROW
    bands = []
    for start in range(0, size, wide):
        out = slice(start, min(start + wide, size))
        centers = (np.arange(size)[out] + 0.5) * (length / size)
        low = max(0, int(centers[0] - 2 * stretch))
        high = min(length, int(centers[-1] + 2 * stretch) + 1)
        t = np.minimum(np.abs(np.arange(low, high)[:, None] + 0.5 - centers) / stretch, 2)
        weights = np.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)
        bands.append(Band(out, low, high, (weights / weights.sum(axis=0)).astype(np.float32)))
    return bands


def _repeat_edges(bands: list[Band], start: int, length: int) -> list[Band]:
    """Bands of a window whose part inside the image is `length` pixels and begins at -start: moved there.

    The weights of the pixels outside are added to the edge pixel's.
    """
    if start == 0 and bands[-1].high == length:
        return bands
    placed = []
    for out, low, high, weights in bands:
        low, high = low + start, high + start
        first, last = min(max(low, 0), length - 1), max(min(high, length), 1)
        if (first, last) != (low, high):
            groups = np.arange(first, last) - low
            groups[0] = 0
            weights = np.add.reduceat(weights, groups)
        placed.append(Band(out, first, last, weights))
    return placed


def _hide_outside(square: np.ndarray, target_xyxy: list[int], crop: Window) -> np.ndarray:
    """A crop (S, 3, S), x first, with all but the target's crop pixels hidden."""
    if crop.outside == "none":
        return square
    x0, y0, x1, y1 = target_xyxy
    if crop.outside == "blur":
        hidden = _blurred(square, SIGMA * len(square))
    else:
        hidden = np.full_like(square, GREY if crop.outside == "grey" else 0)
    hidden[x0:x1, :, y0:y1] = square[x0:x1, :, y0:y1]
    return hidden


def _blurred(square: np.ndarray, sigma: float) -> np.ndarray:
    """(S, 3, S) float32, smoothed along both axes by a Gaussian of sigma pixels."""
    size = len(square)
    spread, gather = _blur_factors(size, sigma)
    rank = len(gather)
    small = (gather @ square.reshape(size, -1)).reshape(-1, size) @ gather.T
    return (spread @ (small @ spread.T).reshape(rank, -1)).reshape(size, 3, size)


@lru_cache(maxsize=8)
def _blur_factors(size: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Float32 matrices (size, R) and (R, size) whose product smooths `size` pixels, with the edge repeated beyond them.

    Three passes, each of a third of the variance, as Pillow's: near the edge they differ from one pass.
    """
    reach = int(np.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-1.5 * (offsets / sigma) ** 2)
    once = np.zeros((size, size))
    for pixel in range(size):
        np.add.at(once[pixel], np.clip(pixel + offsets, 0, size - 1), kernel / kernel.sum())
    left, values, right = np.linalg.svd(np.linalg.matrix_power(once, 3))
    rank = np.count_nonzero(values > KEPT)
    return (left[:, :rank] * values[:rank]).astype(np.float32), right[:rank].astype(np.float32)
