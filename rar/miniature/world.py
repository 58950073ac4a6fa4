"""A fine-grained world drawn by formulas: shape x colour x pattern x small marking, e.g. "striped teal heart with chevron".

Why these four: shape, colour and pattern are coarse, so that a 32-pixel retriever reads them; the marking is a badge a fifth of
the object's width, five pixels there, so that the retriever confuses siblings and a model that looks closely need not.

A *family* is a (shape, colour) pair. Families are split, not classes: of 100, 70 may be trained on, 10 choose models
(validation) and 20 are novel, i.e. no weight sees such a pair in any image or text. Every shape and every colour occurs in
all three, so novelty is in the combination. `vocabulary` draws 120 classes of a split: 20 families (10 for validation) of
two or four patterns x three markings, so that every class has two siblings which differ in the marking alone. The novel
vocabularies of world seeds 0..8 are disjoint.

Everything is a function of (world seed, split, class, image number): equal arguments give equal pixels. Formulas, not a
drawing library, because pixels then do not depend on its version. Cost: about a millisecond an image of 96 pixels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "star", "cross", "heart", "flower", "drop")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey")
PATTERNS = ("plain", "striped", "dotted", "checked", "ringed", "zigzag")
MARKINGS = ("dot", "ring", "bar", "plus", "wedge", "block", "chevron", "spark", "moon")

RGB = {
    "red": (0.84, 0.13, 0.15),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.85, 0.20),
    "green": (0.18, 0.62, 0.22),
    "teal": (0.10, 0.66, 0.66),
    "blue": (0.15, 0.30, 0.84),
    "purple": (0.50, 0.20, 0.68),
    "pink": (0.97, 0.56, 0.74),
    "brown": (0.46, 0.28, 0.14),
    "grey": (0.55, 0.56, 0.58),
}


@dataclass(frozen=True)
class Spec:
    """One class of the world."""

    shape: str
    colour: str
    pattern: str
    marking: str

    @property
    def name(self) -> str:
        return f"{self.pattern} {self.colour} {self.shape} with {self.marking}"


def families(split: str) -> list[tuple[str, str]]:
    """The (shape, colour) pairs of a split: a Latin square, so that each split has every shape and every colour."""
    wanted = {"novel": (0, 5), "validation": (1,), "train": (2, 3, 4, 6, 7, 8, 9)}[split]
    pairs = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if (s + c) % 10 in wanted]
    return [(SHAPES[s], COLOURS[c]) for s, c in pairs]


def all_classes(split: str) -> list[Spec]:
    """Every class of a split: 54 a family."""
    return [Spec(s, c, p, m) for s, c in families(split) for p in PATTERNS for m in MARKINGS]


def vocabulary(split: str, seed: int) -> list[Spec]:
    """120 classes for world seed 0..8: 20 families x 2 patterns x 3 markings (validation: 10 families x 4 patterns x 3)."""
    if not 0 <= seed < 9:
        raise ValueError(f"world seeds are 0..8, got {seed}")
    chosen = families(split)
    if split == "train":
        picks = np.random.default_rng([7, seed]).permutation(len(chosen))[:20]
        chosen = [chosen[i] for i in sorted(picks)]
    per_family = 120 // len(chosen) // 3
    specs = []
    for number, (shape, colour) in enumerate(chosen):
        patterns = np.roll(PATTERNS, -(2 * (seed // 3) + number))[:per_family]
        markings = np.roll(MARKINGS, -(3 * (seed % 3) + number))[:3]
        specs += [Spec(shape, colour, str(p), str(m)) for p in patterns for m in markings]
    return specs


def rng_of(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key])


def render(spec: Spec, side: int, rng: np.random.Generator) -> np.ndarray:
    """One photo of a class: (side, side, 3) uint8. Pose, scale, background, light, sharpness and noise vary.

    One in five is taken from afar: drawn smaller and enlarged, as a detector's crop of a small object is.
    """
    afar = rng.random() < 0.2
    drawn = round(side * rng.uniform(0.45, 0.9)) if afar else side
    image = background(drawn, drawn, rng)
    scale = rng.uniform(0.68, 0.92)
    centre = 0.5 + rng.uniform(-0.06, 0.06, 2)
    paste(image, spec, (centre * drawn).tolist(), scale * drawn / 2, rng)
    pixels = finish(image, rng)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)) if afar else pixels


def background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) float32 in 0..1: a two-colour gradient under a low-frequency texture, with a few faint blobs."""
    y, x = _grid(height, width)
    first, second = rng.uniform(0.15, 0.9, (2, 3)).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = 0.5 + 0.5 * (math.cos(angle) * x + math.sin(angle) * y)
    waves = sum(
        rng.uniform(0, 0.05) * np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y + rng.uniform(0, 6)) for _ in range(2)
    )
    image = first + (second - first) * ramp[..., None] + np.asarray(waves)[..., None]
    for _ in range(rng.integers(0, 3)):
        blob = _coverage(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) - rng.uniform(0.1, 0.4), 0.1)
        image += blob[..., None] * rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    return image.astype(np.float32)


def paste(
    image: np.ndarray, spec: Spec, centre_xy: Sequence[float], radius: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw an object into a float image in place; radius in pixels. Returns the visible box_xyxy, clipped to the image."""
    height, width = image.shape[:2]
    cx, cy = map(float, centre_xy)
    left, top = max(int(cx - radius) - 2, 0), max(int(cy - radius) - 2, 0)
    right, bottom = min(int(cx + radius) + 3, width), min(int(cy + radius) + 3, height)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
    turn = math.radians(rng.uniform(-14, 14))
    x, y = (x - cx) / radius, (y - cy) / radius
    x, y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    colour, mask = _object(spec, x, y, 1 / radius, rng)
    patch = image[top:bottom, left:right]
    patch += (colour - patch) * mask[..., None]
    rows, columns = np.nonzero(mask.max(1) > 0.5)[0], np.nonzero(mask.max(0) > 0.5)[0]
    return (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)


def finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, softness and sensor noise; float 0..1 to uint8."""
    height, width = image.shape[:2]
    y, x = _grid(height, width)
    light = rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * y)
    image = image * light[..., None].astype(np.float32)
    if rng.random() < 0.3:
        image = _soften(image)
    image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(0.005, 0.035)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _object(spec: Spec, x: np.ndarray, y: np.ndarray, pixel: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colour (H, W, 3) and coverage (H, W) of an object of radius 1 about the origin; `pixel` is a pixel's width."""
    base = np.clip(np.array(RGB[spec.colour]) + rng.uniform(-0.07, 0.07, 3), 0, 1).astype(np.float32)
    distance = _shape(spec.shape, x, y)
    second = base * rng.uniform(0.45, 0.6) if base.mean() > 0.4 else base + (1 - base) * rng.uniform(0.35, 0.5)
    colour = base + (second - base) * _pattern(spec.pattern, x, y, pixel, rng)[..., None]
    colour *= (1 - 0.35 * _coverage(-distance - 0.06, pixel))[..., None]  # a darker rim
    dx, dy = x - rng.uniform(-0.13, 0.13), y - rng.uniform(-0.1, 0.16)
    colour += (0.95 - colour) * _coverage(np.hypot(dx, dy) - 0.26, pixel)[..., None]
    colour += (0.06 - colour) * _coverage(_marking(spec.marking, dx / 0.19, dy / 0.19) * 0.19, pixel)[..., None]
    return colour.astype(np.float32), _coverage(distance, pixel).astype(np.float32)


def _shape(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Roughly the signed distance to the outline of a shape of radius 1; negative inside. y points down."""
    rho, theta = np.hypot(x, y), np.arctan2(x, -y)  # theta 0 points up
    match shape:
        case "circle":
            return rho - 0.92
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.8
        case "triangle":
            return rho - _polygon(theta, 3)
        case "diamond":
            return (abs(x) * 1.35 + abs(y)) / 1.6 - 0.6
        case "pentagon":
            return rho - 0.97 * _polygon(theta, 5)
        case "star":
            return rho - _star(theta, 5, 0.5)
        case "cross":
            return np.minimum(np.maximum(abs(x) - 0.36, abs(y) - 0.92), np.maximum(abs(x) - 0.92, abs(y) - 0.36))
        case "heart":
            lobes = np.hypot(abs(x) - 0.42, y + 0.3) - 0.5
            point = np.maximum((abs(x) + y * 0.95) * 0.72 - 0.6, -y - 0.3)
            return np.minimum(lobes, point)
        case "flower":
            return rho - (0.76 + 0.18 * np.cos(6 * theta))
        case "drop":
            return np.minimum(np.hypot(x, y - 0.3) - 0.62, np.maximum((abs(x) * 1.55 - y) * 0.54 - 0.5, y - 0.05))
    raise ValueError(shape)


def _marking(marking: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Roughly the signed distance to a glyph of radius 1."""
    rho, theta = np.hypot(x, y), np.arctan2(x, -y)
    match marking:
        case "dot":
            return rho - 0.62
        case "ring":
            return abs(rho - 0.75) - 0.22
        case "bar":
            return np.maximum(abs(x) - 1.0, abs(y) - 0.3)
        case "plus":
            return np.minimum(np.maximum(abs(x) - 0.26, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.26))
        case "wedge":
            return rho - 1.05 * _polygon(theta, 3)
        case "block":
            return np.maximum(abs(x), abs(y)) - 0.78
        case "chevron":
            return np.maximum(abs(abs(x) - y - 0.35) * 0.7 - 0.26, abs(x) - 0.95)
        case "spark":
            return rho - _star(theta, 4, 0.36)
        case "moon":
            return np.maximum(rho - 0.95, 0.72 - np.hypot(x - 0.5, y))
    raise ValueError(marking)


def _pattern(pattern: str, x: np.ndarray, y: np.ndarray, pixel: float, rng: np.random.Generator) -> np.ndarray:
    """How much of the second colour lies at each point, 0..1."""
    phase = rng.uniform(0, 2 * np.pi)
    step = 6.5  # radians per unit: about two periods across the object
    match pattern:
        case "plain":
            return np.zeros_like(x)
        case "striped":
            wave = np.sin(step * 1.2 * (x * 0.8 + y * 0.6) + phase)
        case "dotted":
            wave = np.sin(step * 1.1 * x + phase) * np.sin(step * 1.1 * y + phase) - 0.35
        case "checked":
            wave = np.sin(step * 0.8 * x + phase) * np.sin(step * 0.8 * y + phase)
        case "ringed":
            wave = np.sin(step * 1.3 * np.hypot(x, y) + phase)
        case "zigzag":
            wave = np.sin(step * 1.1 * y + 2.2 * np.arcsin(np.sin(step * 1.1 * x)) + phase)
        case _:
            raise ValueError(pattern)
    return np.clip(0.5 + wave / (2.5 * step * pixel), 0, 1)


def _polygon(theta: np.ndarray, sides: int) -> np.ndarray:
    """Radius of a regular polygon at an angle, a corner at theta = 0."""
    half = np.pi / sides
    return np.cos(half) / np.cos((theta % (2 * half)) - half)


def _star(theta: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Radius of a star at an angle: tips at 1, notches at `inner`, straight edges between."""
    half = np.pi / points
    fold = abs((theta + half) % (2 * half) - half)  # 0 at a tip, `half` at a notch
    return inner * np.sin(half) / (np.sin(half - fold) * inner + np.sin(fold) * 1.0)


def _coverage(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Share of a pixel inside, from the signed distance of its middle."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _soften(image: np.ndarray) -> np.ndarray:
    """Binomial blur over five pixels: a slightly unsharp picture."""
    kernel = np.array([1, 4, 6, 4, 1], np.float32) / 16
    for axis in (0, 1):
        padded = np.pad(image, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        image = sum(k * np.take(padded, range(i, i + image.shape[axis]), axis) for i, k in enumerate(kernel))
    return image


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x in -1..1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return 2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1
