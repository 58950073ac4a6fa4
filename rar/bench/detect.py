"""Boxes a second: `rar.crops` against the loop that one writes first with Pillow, and `rar detect` against the bare encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFilter

from rar import config
from rar.bench.timing import paired
from rar.boxes import clip_xyxy
from rar.config import Config, Corpus, Crop, Detect
from rar.corpus.coco import read_boxes
from rar.corpus.decode import decode
from rar.crops.windows import GREY, SIGMA, View, bands_of, crops, touched_xyxy, windows_xyxy
from rar.encoder.towers import load_encoder
from rar.engine import session
from rar.engine.models import EncoderFacts
from rar.engine.sinks import ShardSink
from rar.miniature.data import SCENE_HEIGHT, SCENE_WIDTH, write_world
from rar.miniature.world import background, rng_of
from rar.run import build, steps
from rar.run.calibrate import PAPER
from rar.run.vocabulary import open_memory
from rar.run.work import detect_work
from rar.runfolder import RunFolder

SIDE = 96  # pixels of the crops that are timed
Pictures = list[tuple[np.ndarray, np.ndarray]]  # (H, W, 3) uint8 and boxes (B, 4)


def crops_bench(repeats: int = 5, data: Path | None = None) -> dict[str, dict[str, float]]:
    """Boxes per second of `crops` and of `plain_crops`, one row a case. Decoding the photos is not part of it.

    `blur` and `none`: photos with their own boxes, one thread. `*_two_threads`: ours takes the photos on two threads, as the
    tasks of two shards do; the loop stays on one. `*_cold`: ours computes its weights anew. `*_crowded`: 1,000 boxes a photo.
    Each row has what `timing.paired` gives; `mean_difference` and `max_difference` are of the pixels, 0 to 255.

    data: folder with COCO's `photos128.json` and `images/`; without it, backgrounds of miniature scenes with boxes at random.
    """
    photos = read_photos(data) if data is not None else draw_photos(32)
    crowded = [(photos[0][0], random_boxes(photos[0][0], 1000, np.random.default_rng(0)))]
    rows = {}
    for outside in ("blur", "none"):
        crop = Crop(size=SIDE, outside=outside)
        for suffix, ours in {"": one_thread, "_two_threads": two_threads, "_cold": cold}.items():
            rows[outside + suffix] = compare(ours, photos, crop, repeats)
        rows[f"{outside}_crowded"] = compare(one_thread, crowded, crop, repeats)
    return rows


def pipeline_bench(
    repeats: int = 3, data: Path | None = None, model: str = "ViT-B-32/random", images: int = 32
) -> dict[str, Any]:
    """Boxes per second of the whole pipeline (read, crop, embed, retrieve, write) and of the bare encoder on the same crops.

    The encoder of the reference runs in this process on squares made beforehand, with as many threads as the pipeline's has.
    data: as for `crops_bench`; without it miniature scenes are drawn. model: any encoder; weights do not matter here.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(Path(folder), data, model, images)
        with session.opened(settings.memory, create=True) as opened:
            build.build_memory(opened, settings, fresh=False)
            vocabulary, work = open_memory(opened, settings), detect_work(settings)
            squares = _squares(settings, work.index, vocabulary.facts)
            encoder = load_encoder(settings.encoder)
            run = RunFolder.open(Path(folder) / "run", "detect", settings, fresh=True, name="bench", group="bench")
            expected = work.expected(settings.run.shard_size)

            def whole() -> None:
                rows = steps.vectors(opened, settings, work, vocabulary.facts)
                rows = steps.retrieve(vocabulary, rows)
                rows = steps.fuse(PAPER, steps.rank(opened, settings.ranker, None, PAPER, rows))
                rows.write_datasink(ShardSink(run.path, expected))

            row = paired(whole, lambda: encoder.embed_images(squares), len(squares), repeats)
            assert run.predictions().num_rows == len(squares)
    return {"whole": row | {"boxes": len(squares), "threads": torch.get_num_threads()}}


def _settings(folder: Path, data: Path | None, model: str, images: int) -> Config:
    if data is None:
        write_world(folder / "world", 0, shots=1, tests=1, scenes=images)
        truth, pictures = str(folder / "world" / "scenes.json"), None
    else:
        truth, pictures = str(data / "photos128.json"), str(data / "images")
    return config.validated(
        config.Config,
        {
            "corpus": {"uri": truth, "images": pictures, "limit": images},
            "memory": {"uri": str(folder / "memory"), "classes": truth},
            "encoder": {"model": model},
            "retriever": {"mode": "text"},
            "ranker": {"method": "none"},
            "route": {"mode": "always"},
            "run": {"shard_size": 64},
        },
    )


def _squares(settings: Config, index: pa.Table, facts: EncoderFacts) -> np.ndarray:
    """(boxes, side, side, 3) uint8: what the pipeline's encoder gets to see."""
    squares, crop = [], settings.detect.crop.sized(facts.side)
    for row in index.to_pylist():
        image = decode(Path(row["uri"]).read_bytes())
        squares += [facts.fit(one) for one in crops(image, np.array(row["boxes_xyxy"]).reshape(-1, 4), crop)]
    return np.stack(squares)


def compare(ours: Callable[[Pictures, Crop], list[np.ndarray]], photos: Pictures, crop: Crop, repeats: int) -> dict[str, float]:
    """Times of both, and how far their pixels differ."""

    def plain() -> list[np.ndarray]:
        return [plain_crops(image, boxes, crop) for image, boxes in photos]

    n_boxes = sum(len(boxes) for _, boxes in photos)
    gaps = [np.abs(np.subtract(a, b, dtype=np.int16)) for a, b in zip(ours(photos, crop), plain(), strict=True)]
    row = paired(lambda: ours(photos, crop), plain, n_boxes, repeats)
    mean = sum(float(gap.sum()) for gap in gaps) / max(sum(gap.size for gap in gaps), 1)
    return row | {"boxes": n_boxes, "mean_difference": mean, "max_difference": max(int(gap.max(initial=0)) for gap in gaps)}


def one_thread(photos: Pictures, crop: Crop) -> list[np.ndarray]:
    return [crops(image, boxes, crop) for image, boxes in photos]


def two_threads(photos: Pictures, crop: Crop) -> list[np.ndarray]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda photo: crops(photo[0], photo[1], crop), photos))


def cold(photos: Pictures, crop: Crop) -> list[np.ndarray]:
    bands_of.cache_clear()
    return one_thread(photos, crop)


def plain_crops(image: np.ndarray, boxes_xyxy: np.ndarray, crop: Crop, view: View = "adaptive") -> np.ndarray:
    """What `crops` gives, box by box with Pillow: cut out the window, resize, blur, paste the target back."""
    height, width = image.shape[:2]
    size = crop.size or SIDE
    boxes = clip_xyxy(boxes_xyxy, width, height)
    windows = windows_xyxy(boxes, view)
    result = np.empty((len(boxes), size, size, 3), np.uint8)
    if not len(boxes):
        return result
    left, top = np.maximum(0, -windows[:, :2].min(axis=0))
    right, bottom = np.maximum(0, windows[:, 2:].max(axis=0) - [width, height])
    padded = Image.fromarray(np.pad(image, [(top, bottom), (left, right), (0, 0)], mode="edge"))
    targets = touched_xyxy(boxes, windows, size)
    for i, (window, target) in enumerate(zip(windows + np.array([left, top] * 2), targets.tolist(), strict=True)):
        square = padded.crop(tuple(window.tolist())).resize((size, size), Image.Resampling.BICUBIC)
        if crop.outside == "blur":
            hidden = square.filter(ImageFilter.GaussianBlur(SIGMA * size))
        else:
            hidden = Image.new("RGB", square.size, (GREY,) * 3 if crop.outside == "grey" else 0)
        if crop.outside != "none":
            hidden.paste(square.crop(target), target[:2])
            square = hidden
        result[i] = np.asarray(square)
    return result


def read_photos(data: Path) -> Pictures:
    table, _ = read_boxes(Corpus(uri=str(data / "photos128.json"), images=str(data / "images")), Detect())
    photos = [row for row in table.to_pylist() if row["boxes_xyxy"]]
    return [(np.asarray(Image.open(row["uri"]).convert("RGB")), np.array(row["boxes_xyxy"])) for row in photos]


def draw_photos(count: int) -> Pictures:
    photos = []
    for number in range(count):
        rng = rng_of("bench crops", number)
        image = (np.clip(background(2 * SCENE_HEIGHT, 2 * SCENE_WIDTH, rng), 0, 1) * 255).astype(np.uint8)
        photos.append((image, random_boxes(image, 8, rng)))
    return photos


def random_boxes(image: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) boxes inside an image; their sides are log-uniform from 8 pixels to half the image's shorter side."""
    height, width = image.shape[:2]
    sides = np.exp(rng.uniform(np.log(8), np.log(min(height, width) / 2), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * ([width, height] - sides)
    return np.concatenate([corner, corner + sides], axis=1)
