"""The miniature world on disk, and in bulk for training.

`write_world` lays out what a user would bring: folders of photos a class (support and test, disjoint), and scenes with boxes in
a COCO/LVIS JSON. Scenes hold three frequency groups: `frequent` classes are trained on, `common` ones are novel, `rare` ones
are novel and appear a quarter as often. `noisy_proposals` stands in for a detector: boxes of the scenes, shifted and misjudged.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rar.miniature.world import Spec, background, finish, paste, render, rng_of, vocabulary

DRAWN, KEPT = 96, 64  # photos are drawn at 96 pixels everywhere; the MLLM sees 64 of them
SCENE_HEIGHT, SCENE_WIDTH = 256, 320
DETECTED = {"frequent": 60, "common": 60, "rare": 60}  # classes of the scenes
GROUPS = ("novel", "seen")
MISSED, TWICE, JITTER, STRAY = 0.05, 1 / 3, 0.08, 3  # of `noisy_proposals`


def two_processes() -> ProcessPoolExecutor:
    """They begin anew: the fork of a process with threads (Ray's, gRPC's) may inherit a lock that nobody ever frees."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def write_world(folder: Path, seed: int, *, shots: int, tests: int, scenes: int) -> None:
    """Draw a world: folder/{novel,seen}/{support,test}/<class>/*.png, folder/scenes/*.jpg and their boxes folder/scenes.json.

    Does nothing where the same world (arguments) stands already; a half-drawn one is drawn afresh.
    """
    stamp = {"seed": seed, "shots": shots, "tests": tests, "scenes": scenes}
    if (folder / "world.json").exists() and json.loads((folder / "world.json").read_text()) == stamp:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with two_processes() as pool:
        tasks = []
        for group in GROUPS:
            specs = vocabulary("novel" if group == "novel" else "train", seed)
            for part, count in _parts(group, shots, tests):
                tasks += [(spec, group, part, count) for spec in specs]
        list(pool.map(partial(_write_class, folder, seed), tasks, chunksize=8))
        specs, frequencies = scene_classes(seed)
        pictures = list(pool.map(partial(_write_scene, folder, seed, specs, frequencies), range(scenes), chunksize=8))
    (folder / "scenes.json").write_text(json.dumps(_instances(specs, frequencies, pictures)))
    for group in GROUPS:
        for part, count in _parts(group, shots, tests):
            _check(folder / group / part, 120 * count)
    (folder / "world.json").write_text(json.dumps(stamp))


def scene_classes(seed: int) -> tuple[list[Spec], list[str]]:
    """The classes of the scenes and the frequency group of each."""
    novel, seen = vocabulary("novel", seed), vocabulary("train", seed)
    picks = rng_of(seed, "scene classes").permutation(len(novel))
    groups = {"frequent": seen[: DETECTED["frequent"]]}
    groups["common"] = [novel[i] for i in picks[: DETECTED["common"]]]
    groups["rare"] = [novel[i] for i in picks[DETECTED["common"] :][: DETECTED["rare"]]]
    specs = [spec for members in groups.values() for spec in members]
    return specs, [group for group, members in groups.items() for _ in members]


def write_scene_support(world: Path, seed: int) -> None:
    """The support photos of the scenes' classes, as a manifest: they lie in the novel and seen folders."""
    lines = ["uri,label"]
    for spec, frequency in zip(*scene_classes(seed), strict=True):
        group = "seen" if frequency == "frequent" else "novel"
        photos = sorted((world / group / "support" / spec.name).glob("*.png"))
        lines += [f"{photo.relative_to(world)},{spec.name}" for photo in photos]
    (world / "scenes_support.csv").write_text("\n".join(lines) + "\n")


def draw_scene(
    specs: Sequence[Spec], frequencies: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A picture (256, 320, 3) uint8 of up to ten objects, 16 to 120 pixels wide, and [{"spec": position, "box_xyxy": ...}]."""
    weights = np.array([{"frequent": 1.0, "common": 1.0, "rare": 0.25}[frequency] for frequency in frequencies])
    image = background(SCENE_HEIGHT, SCENE_WIDTH, rng)
    placed: list[dict] = []
    for _ in range(rng.integers(4, 11)):
        radius = 8 * 7.5 ** rng.random()
        x, y = rng.uniform(radius + 2, SCENE_WIDTH - radius - 2), rng.uniform(radius + 2, SCENE_HEIGHT - radius - 2)
        if any(_overlap((x - radius, y - radius, x + radius, y + radius), other["box_xyxy"]) > 0 for other in placed):
            continue
        number = int(rng.choice(len(specs), p=weights / weights.sum()))
        box = paste(image, specs[number], (x, y), radius, rng)
        placed.append({"spec": number, "box_xyxy": [float(v) for v in box]})
    return finish(image, rng), placed


def render_all(specs: list[Spec], split: str, per_class: int, seed: int, cache: Path | None = None) -> np.ndarray:
    """(len(specs) * per_class, 64, 64, 3) uint8, ordered by class, drawn by two processes; memory-mapped when cached."""
    if cache is not None and cache.exists():
        return np.load(cache, mmap_mode="r")
    with two_processes() as pool:
        parts = pool.map(partial(_pixels, split, per_class, seed), specs, chunksize=32)
        pixels = np.concatenate(list(parts))
    if cache is None:
        return pixels
    np.save(cache, pixels)
    return np.load(cache, mmap_mode="r")


def _pixels(split: str, per_class: int, seed: int, spec: Spec) -> np.ndarray:
    """(n, 64, 64, 3) uint8: photos of a class, reduced as the models' preprocessing does."""
    photos = [render(spec, DRAWN, rng_of(seed, split, spec.name, number)) for number in range(per_class)]
    return np.stack([reduced(photo) for photo in photos])


def reduced(photo: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8: a photo as the MLLM's preprocessing reduces it."""
    return np.asarray(Image.fromarray(photo).resize((KEPT, KEPT), Image.Resampling.BICUBIC))


def _parts(group: str, shots: int, tests: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Photos a class of a group's parts: novel classes are what matters, so the seen ones have half as many tests."""
    return ("support", shots), ("test", tests if group == "novel" else max(1, tests // 2))


def _write_class(folder: Path, seed: int, task: tuple[Spec, str, str, int]) -> None:
    spec, group, part, count = task
    place = folder / group / part / spec.name
    place.mkdir(parents=True)
    for number in range(count):
        photo = render(spec, DRAWN, rng_of(seed, f"{group} {part}", spec.name, number))
        Image.fromarray(photo).save(place / f"{number:03d}.png")


def _write_scene(folder: Path, seed: int, specs: list[Spec], frequencies: list[str], number: int) -> list[dict]:
    image, placed = draw_scene(specs, frequencies, rng_of(seed, "scene", number))
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "scenes" / f"{number:05d}.jpg", quality=95, subsampling=0)
    return placed


def _instances(specs: list[Spec], frequencies: list[str], pictures: list[list[dict]]) -> dict[str, Any]:
    """COCO's JSON, with LVIS' `frequency` (r, c, f) in the categories."""
    annotations: list[dict[str, Any]] = []
    for number, placed in enumerate(pictures):
        for one in placed:
            left, top, right, bottom = one["box_xyxy"]
            box_xywh = [left, top, right - left, bottom - top]
            common = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": one["spec"] + 1, "iscrowd": 0}
            annotations.append({**common, "bbox": box_xywh, "area": box_xywh[2] * box_xywh[3]})
    size = {"height": SCENE_HEIGHT, "width": SCENE_WIDTH}
    return {
        "images": [{"id": n + 1, "file_name": f"scenes/{n:05d}.jpg", **size} for n in range(len(pictures))],
        "categories": [
            {"id": n + 1, "name": spec.name, "frequency": frequency[0]}
            for n, (spec, frequency) in enumerate(zip(specs, frequencies, strict=True))
        ],
        "annotations": annotations,
    }


def noisy_proposals(scenes: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """What a class-agnostic detector might make of scenes (a COCO JSON as `write_world` writes it), in COCO's results format.

    Of each object 5 % are missed; the others are found once, a third of them twice. Centre and sides are off by a normal error
    of 8 % of the side, and the score falls with that error, so that it is informative but noisy. Each picture has three more
    boxes of nothing in particular, most of them with low scores.
    """
    rng = rng_of(seed, "proposals")
    proposals = []
    for one in scenes["annotations"]:
        for _ in range(0 if rng.random() < MISSED else 1 + (rng.random() < TWICE)):
            left, top, width, height = one["bbox"]
            error = rng.normal(0, JITTER, 4)
            wide, high = width * np.exp(error[2]), height * np.exp(error[3])
            x, y = left + width / 2 + error[0] * width, top + height / 2 + error[1] * height
            score = 1 / (1 + np.exp(rng.normal(0, 1) - 3 + 8 * np.abs(error).mean()))
            proposals.append(_proposal(one["image_id"], x - wide / 2, y - high / 2, wide, high, score))
    for picture in scenes["images"]:
        for _ in range(STRAY):
            side = float(rng.uniform(16, 120))
            left, top = rng.uniform(0, picture["width"] - side), rng.uniform(0, picture["height"] - side)
            proposals.append(_proposal(picture["id"], left, top, side, side, 1 / (1 + np.exp(rng.normal(2, 1)))))
    return proposals


def _proposal(image_id: int, left: float, top: float, width: float, height: float, score: float) -> dict[str, Any]:
    bbox_xywh = [float(value) for value in (left, top, width, height)]
    return {"image_id": image_id, "category_id": 1, "bbox": bbox_xywh, "score": float(score)}


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _check(folder: Path, expected: int) -> None:
    found = sum(1 for _ in folder.glob("*/*.png"))
    if found != expected:
        raise RuntimeError(f"{folder} holds {found} photos, not {expected}; remove it and run again")
