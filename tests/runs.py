"""Run folders with plausible contents for the tests of the report, written by the sink and the folder that runs write with."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from rar import config, schema
from rar.corpus import coco
from rar.engine.sinks import ShardSink
from rar.fusion import Calibration
from rar.run import measure
from rar.runfolder import RunFolder

HOSTILE = "<script>alert('x')</script> & \"quoted\" $x$"
SHAPES = ("circle", "square", "bar")
COLOURS = {"red": "#c8322f", "green": "#2f9e57", "blue": "#3b62c9", "amber": "#d9962b"}
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] + [HOSTILE]


def draw(name: str, size: tuple[int, int] = (160, 120), box_xyxy: Sequence[float] = (40, 20, 120, 100)) -> bytes:
    image = Image.new("RGB", size, "#e8e4da")
    canvas = ImageDraw.Draw(image)
    colour, _, shape = name.partition(" ")
    paint = {"circle": canvas.ellipse, "square": canvas.rectangle}.get(shape, canvas.rounded_rectangle)
    paint(list(box_xyxy), fill=COLOURS.get(colour, "#777777"), outline="#222222", width=3)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def prediction(data: bytes, uri: str, truth: str, skill: float, rng: np.random.Generator, ranks: bool) -> dict[str, Any]:
    """A plausible row: the retriever is right with 55 %, a ranker of this skill moves the true class to the front."""
    others = [name for name in NAMES if name != truth]
    names = [str(name) for name in rng.choice(others, 4, replace=False)]
    names.insert(0 if rng.random() < 0.55 else int(rng.integers(1, 4)), truth)
    names = names if rng.random() < 0.93 else [name for name in names if name != truth]
    scores = np.sort(rng.normal(0.27, 0.02, len(names)))[::-1]
    asked = ranks and rng.random() < (0.4 if names[0] == truth else 0.9)  # routing knows a little
    order = list(range(len(names)))
    logits = rng.normal(0, 1, len(names))
    if asked and truth in names:
        first = names.index(truth) if rng.random() < skill else int(rng.integers(len(names)))
        order = [first, *(position for position in order if position != first)]
        logits[first] = logits.max() + rng.exponential(1.5)
    status = ("fallback" if rng.random() < 0.04 else "repaired" if rng.random() < 0.05 else "ranked") if asked else "skipped"
    order = order if status != "fallback" else list(range(len(names)))
    right = names[order[0]] == truth
    return {
        "image_id": schema.content_id(data),
        "uri": uri,
        "box_xyxy": None,
        "candidates": [
            {"class_id": NAMES.index(name), "class_name": name, "score": float(score)}
            for name, score in zip(names, scores, strict=True)
        ],
        "ranking": order,
        "rank_status": status,
        "response": f"[{', '.join(names[position] for position in order)}]" if asked else "",
        "scores": np.log(np.exp(logits) / np.exp(logits).sum()).tolist() if asked else [],
        "routed": asked,
        "class_id": NAMES.index(names[order[0]]),
        "class_name": names[order[0]],
        "score": float(np.clip(rng.beta(7, 2) if right else rng.beta(3, 3), 0, 1)),
    }


STAGES = {"read": 0.02, "embed": 0.11, "retrieve": 0.01, "rank": 0.09}  # seconds a row
BLOCK = pa.schema(
    [
        *schema.PREDICTIONS,
        *((name, pa.string()) for name in ("stage", "error")),
        *((f"seconds_{stage}", pa.float64()) for stage in STAGES),
        *((f"mllm_{key}", pa.int64()) for key in ("calls", "candidates", "prompt_tokens", "output_tokens")),
        ("shard", pa.int32()),
    ]
)


def block(shard: int, rows: list[dict[str, Any]]) -> pa.Table:
    """A shard as it reaches the sink: predictions and failed rows in one table, with what the stages noted."""
    asked = [row.get("rank_status", "skipped") != "skipped" for row in rows]
    noted = [
        {"shard": shard, **{f"seconds_{stage}": each for stage, each in STAGES.items()}}
        | {"mllm_calls": int(one), "mllm_candidates": 4 * one, "mllm_prompt_tokens": 91 * one, "mllm_output_tokens": int(one)}
        for one in asked
    ]
    return pa.Table.from_pylist([row | more for row, more in zip(rows, noted, strict=True)], BLOCK)


def write_run(
    folder: Path, verb: str, name: str, group: str, settings: config.Config, index: pa.Table, rows: list[dict[str, Any]]
) -> RunFolder:
    """A run folder up to its end, in two shards; `end` finishes it."""
    made = RunFolder.open(folder, verb, settings, fresh=False, name=name, group=group)
    made.pin_memory("0123456789abcdef")
    made.write("classes.json", NAMES)
    made.freeze_index(index)
    half = len(rows) // 2
    ShardSink(folder, {0: half, 1: len(rows) - half}).write([block(0, rows[:half]), block(1, rows[half:])], None)
    return made


def end(made: RunFolder, settings: config.Config, values: dict[str, float]) -> Path:
    ok, failed = made.progress()
    made.finish({"input": ok + failed, "ok": ok, "failed": failed, "skipped": 0}, values, 12.3, settings)
    return made.path


def failed(row: int, uri: str, stage: str, error: str) -> dict[str, Any]:
    return {"row": row, "image_id": None, "uri": uri, "stage": stage, "error": error}


def classify_run(root: Path, name: str, group: str, skill: float, seed: int, ranks: bool, images: int = 80) -> Path:
    rng = np.random.default_rng(seed)
    pictures = root / "pictures"
    pictures.mkdir(exist_ok=True)
    labels, uris, rows = [], [], []
    for number in range(images):
        truth = NAMES[number % len(NAMES)]
        data = draw(truth, box_xyxy=(30 + number % 7, 15, 110 + number % 7, 95))
        path = pictures / f"{number:04d}.jpg"
        if number != 5:  # one picture is gone by the time the report is written
            path.write_bytes(data)
        labels.append(truth)
        uris.append(str(path))
        rows.append({"row": number, **prediction(data, str(path), truth, skill, rng, ranks)})
    if ranks:
        rows[5] |= {"class_name": NAMES[0], "rank_status": "ranked"}
        rows[5]["candidates"][0]["class_name"] = NAMES[5]
    rows += [
        failed(images, f"/data/{HOSTILE}.jpg", "decode", f"/data/{HOSTILE}.jpg: truncated file"),
        failed(images + 1, "/data/b.jpg", "decode", "/data/b.jpg: truncated file"),
        failed(images + 2, "/data/c.jpg", "read", "file not found"),
    ]
    index = pa.Table.from_pylist(
        [{"row": row["row"], "uri": row["uri"]} | {"label": label} for row, label in zip(rows, [*labels, *"abc"], strict=True)],
        schema.INDEX,
    )
    settings = config.validated(config.Config, {"corpus": {"uri": str(pictures)}, "memory": {"token": "s3cr3t-token"}})
    made = write_run(root / f"{group.replace('/', '-')}-{name}", "classify", name, group, settings, index, rows)
    return end(made, settings, measure.measured(settings, made, index, boxed=False))


BOXES_XYXY = ([20.0, 30.0, 90.0, 100.0], [130.0, 60.0, 210.0, 140.0])
FAR_XYXY = [100.0, 150.0, 126.0, 176.0]  # shows no object
SCENE_VALUES = {
    "ap": 0.412,
    "ap_small": -1.0,
    "ap_medium": 0.4,
    "ap_large": 0.42,
    "ap_rare": -1.0,
    "ap_common": 0.405,
    "ap_frequent": 0.4305,
    "ar_100": 0.6,
    "ar_medium": 0.61,
    "proposal_recall": 0.9,
    "proposal_recall.ci_low": 0.8,
    "proposal_recall.ci_high": 0.95,
    "proposal_recall_medium": 0.9,
    "mean_k": 3.4,
}


def write_truth(root: Path, scenes: int = 8) -> Path:
    """A COCO JSON and its pictures, two objects each. It is called once a root."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(scenes):
        image = Image.new("RGB", (240, 180), "#dfe6ea")
        for shift, (left, top, right, bottom) in zip((0, 5), BOXES_XYXY, strict=True):
            name = NAMES[(number + shift) % 12]
            tile = Image.open(io.BytesIO(draw(name, (int(right - left), int(bottom - top)), (8, 8, 60, 60))))
            image.paste(tile, (int(left), int(top)))
            bbox = [left, top, right - left, bottom - top]
            category = NAMES.index(name) + 1
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, "category_id": category, "bbox": bbox})
        image.save(root / f"scene_{number}.jpg")
        images.append({"id": number + 1, "file_name": f"scene_{number}.jpg"})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)]
    (root / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root / "truth.json"


def detect_run(root: Path, truth: Path, name: str, chosen: dict[str, Any], calibration: Calibration | None = None) -> Path:
    """A run over the given boxes, or (`chosen` has `proposals`) over boxes 2 pixels off and one of nothing a picture."""
    rng = np.random.default_rng(7)
    settings = config.validated(config.Config, {"corpus": {"uri": str(truth)}, "detect": chosen})
    index, _ = coco.read_boxes(config.Corpus(uri=str(truth)), config.Detect())
    names = index["box_labels"].to_pylist()
    if settings.detect.proposals is not None:
        moved = [[*([value + 2 for value in box] for box in boxes), FAR_XYXY] for boxes in index["boxes_xyxy"].to_pylist()]
        index = index.drop_columns(["boxes_xyxy", "box_scores"])
        index = index.append_column(coco.BOXES.field("boxes_xyxy"), pa.array(moved, coco.BOXES.field("boxes_xyxy").type))
        scores = pa.array([[0.9, 0.8, 0.3]] * len(moved), coco.BOXES.field("box_scores").type)
        index = coco.with_proposals(index.append_column(coco.BOXES.field("box_scores"), scores))
    rows = []
    for picture, known in zip(index.to_pylist(), names, strict=True):
        data = Path(picture["uri"]).read_bytes()
        for place, (box, true) in enumerate(zip(picture["boxes_xyxy"], [*known, NAMES[0]], strict=False)):
            own = {"row": picture["row"], "place": place, "box_xyxy": box}
            rows.append(prediction(data, picture["uri"], true, 0.8, rng, True) | own)
    made = write_run(root / f"detect-{name}", "detect", name, f"detect / {name}", settings, index, rows)
    if calibration is not None:
        made.write("calibration.json", calibration.to_dict())
    return end(made, settings, SCENE_VALUES)
