"""Boxes: formats, areas, overlaps, and what of a box lies in the image.

Coordinates are continuous pixels: pixel i covers [i, i + 1), so a box of a whole (H, W) image is (0, 0, W, H).
"""

from __future__ import annotations

import numpy as np

SMALL_AREA = 32**2  # COCO's groups: small objects have at most this many pixels, medium ones at most MEDIUM_AREA
MEDIUM_AREA = 96**2
MIN_SIDE = 0.99  # one pixel, less what float32 and files of two decimals round away


def xywh_to_xyxy(boxes_xywh: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, width, height (COCO files) -> (..., 4) left, top, right, bottom."""
    return np.concatenate([boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, right, bottom -> (..., 4) left, top, width, height."""
    return np.concatenate([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]], axis=-1)


def clip_xyxy(boxes_xyxy: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of each box (..., 4) inside a width x height image; a box outside becomes an empty one on the border."""
    return np.clip(boxes_xyxy, 0, [width, height, width, height])


def area(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Square pixels of each box: (..., 4) -> (...). Empty and inverted boxes have none."""
    return np.prod(np.maximum(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2], 0), axis=-1)


def check_boxes(boxes_xyxy: np.ndarray, width: int, height: int) -> list[str | None]:
    """Why each of (B, 4) boxes shows nothing of a width x height image, or None for a box that can be cropped."""
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    faults: list[str | None] = [None] * len(boxes)
    shown = clip_xyxy(boxes, width, height)
    good = np.isfinite(boxes).all(axis=1) & (shown[:, 2:] - shown[:, :2] >= MIN_SIDE).all(axis=1)
    for position in np.flatnonzero(~good).tolist():
        faults[position] = _box_fault(boxes[position], width, height)
    return faults


def _box_fault(box_xyxy: np.ndarray, width: int, height: int) -> str:
    x0, y0, x1, y1 = box = box_xyxy.tolist()
    if not np.isfinite(box_xyxy).all():
        return f"box {box} has a coordinate that is not a finite number"
    if x1 < x0 or y1 < y0:
        return f"box {box} ends before it begins"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"box {box} lies outside the {width} x {height} image"
    w, h = xyxy_to_xywh(clip_xyxy(box_xyxy, width, height))[2:]
    return f"box {box} covers {w:.2f} x {h:.2f} pixels of the image, less than one pixel a side"


def iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """(A, 4) and (B, 4) -> (A, B) intersection over union; 0 for two empty boxes."""
    low, high = np.maximum(a_xyxy[:, None, :2], b_xyxy[:, :2]), np.minimum(a_xyxy[:, None, 2:], b_xyxy[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    union = area(a_xyxy)[:, None] + area(b_xyxy) - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)
