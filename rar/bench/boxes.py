"""How the metrics of a detection run grow with boxes: `measure.measured` alone, at several sizes, each in a process of its own.

Simulated are a truth and the run that is measured against it, with LVIS' numbers: 300 proposals a picture, 12 objects a picture
of 1,203 classes, most of them of a few, with frequencies r, c and f and lists of absent classes. A quarter of the proposals lie
beside an object, and of these the retriever has the class first in half of the cases; the others lie anywhere. Each has TOP_K
candidates, and three in five a ranking with scores. They are written a shard at a time by what writes a run's, into a temporary
folder; no picture and no model is behind them, so that the accuracies say nothing. What is measured, file by file, is what a
run does when it ends: reading, joining, judging, scoring, writing `detections.json`, and AP by LVIS' rules.

peak_mib is the process' greatest resident memory (VmHWM, Linux) and `idle_mib` what it held before, its modules loaded. The
index of the boxes, which a run brings along, is read and counted here. `growth`: lines through the sizes, MiB a box and
seconds a box.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import boxes, config, fusion
from rar.bench.scale import line
from rar.bench.server import memory_mib
from rar.columns import fitted
from rar.corpus import coco
from rar.run import measure
from rar.run.work import Work
from rar.runfolder import RunFolder, read_table
from rar.schema import CANDIDATES, ERRORS, PREDICTIONS, RankStatus, UserError, content_id

SIZES = (100_000, 300_000, 1_000_000)
A_PICTURE = 300  # proposals
OBJECTS = 12  # a picture: LVIS v1 val has 244,707 in 19,809
FREQUENCIES = {"r": 337, "c": 461, "f": 405}  # categories of LVIS v1
TOP_K = 5
WIDTH, HEIGHT = 640, 480
CALIBRATION = fusion.Calibration(weight_retriever=1.2, weight_ranker=0.8, retriever_scale=1.1)
STATUSES = {RankStatus.RANKED: 0.55, RankStatus.REPAIRED: 0.03, RankStatus.FALLBACK: 0.02, RankStatus.SKIPPED: 0.4}

Row = dict[str, Any]


def run(sizes: Sequence[int] = SIZES) -> Row:
    """Per size `at_size`; then the lines of growth. Raises UserError for fewer than two sizes, which tell no growth."""
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise UserError("growth is told by two sizes at least, e.g. --boxes 100000 --boxes 1000000")
    rows = {str(size): at_size(size) for size in sizes}
    growth = {key: line(sizes, [row[key] for row in rows.values()]) for key in ("seconds", "peak_mib")}
    return {"classes": sum(FREQUENCIES.values()), "a_picture": A_PICTURE, "sizes": rows, "growth": growth}


def at_size(size: int) -> Row:
    """pictures, seconds, boxes_per_second, idle_mib, peak_mib and ap of measuring a run of so many boxes."""
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        pictures = simulate(folder, size)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measured_alone, folder).result()
    return {"pictures": pictures, **found, "boxes_per_second": size / found["seconds"]}


def measured_alone(folder: Path) -> Row:
    """seconds, idle_mib, peak_mib and ap of this process, which has done nothing else."""
    idle, started = memory_mib(os.getpid()), time.perf_counter()
    made = RunFolder(folder / "run")
    values = measure.measured(settings_of(folder), made, read_table(made.path / "index.parquet"), boxed=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "idle_mib": idle, "peak_mib": memory_mib(os.getpid(), "VmHWM"), "ap": values["ap"]}


def settings_of(folder: Path) -> config.Config:
    return config.validated(config.Config, {"corpus": {"uri": str(folder / "truth.json")}, "detect": {"style": "lvis"}})


def simulate(folder: Path, size: int) -> int:
    """folder/truth.json and folder/run, all but its end, of `size` boxes; returns the number of pictures."""
    counts = np.full(-(-size // A_PICTURE), A_PICTURE)
    counts[-1] = size - A_PICTURE * (len(counts) - 1)
    truth, settings = write_truth(folder / "truth.json", len(counts)), settings_of(folder)
    made = RunFolder.open(folder / "run", "detect", settings, fresh=False, name="boxes", group="bench")
    names = [one["name"] for one in truth["categories"]]
    made.write("classes.json", names)
    made.write("calibration.json", CALIBRATION.to_dict())
    objects: list[list[Row]] = [[] for _ in counts]
    for one in truth["annotations"]:
        objects[one["image_id"] - 1].append(one)
    index = made.freeze_index(index_of(folder, counts, objects))
    work = Work(index, True, ERRORS.empty_table())
    bounds = work.bounds(settings.run.shard_size)
    for shard, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        pictures = [predicted(index, row, objects[row], pa.array(names)) for row in range(start, end)]
        asked = sum(TOP_K * pc.sum(part["routed"]).as_py() for part in pictures)
        made.write_shard(shard, pa.concat_tables(pictures), ERRORS.empty_table(), {"mllm.candidates": asked})
    return len(counts)


def write_truth(file: Path, pictures: int) -> Row:
    """An LVIS file, and what it holds. Ids are numbers from 1; a class is the rarer the higher its number."""
    rng, classes = np.random.default_rng(0), sum(FREQUENCIES.values())
    letters = [letter for letter in "fcr" for _ in range(FREQUENCIES[letter])]
    categories = [
        {"id": number, "name": f"class {number}", "frequency": letter} for number, letter in enumerate(letters, start=1)
    ]
    weights = 1 / np.arange(1, classes + 1)
    chosen = rng.choice(classes, (pictures, OBJECTS), p=weights / weights.sum()) + 1
    sides = np.exp(rng.uniform(np.log(8), np.log(240), (pictures, OBJECTS, 2)))
    corners = rng.random((pictures, OBJECTS, 2)) * ([WIDTH, HEIGHT] - sides)
    bboxes = np.concatenate([corners, sides], axis=2).round(2).tolist()
    absent = rng.integers(1, classes + 1, (pictures, 8)).tolist()
    images, annotations = [], []
    for row, (own, there) in enumerate(zip(absent, chosen.tolist(), strict=True)):
        lists = {"neg_category_ids": sorted(set(own) - set(there)), "not_exhaustive_category_ids": there[:1]}
        images.append({"id": row + 1, "file_name": f"{row + 1:012d}.jpg", "width": WIDTH, "height": HEIGHT, **lists})
        annotations += [
            {"id": OBJECTS * row + place + 1, "image_id": row + 1, "category_id": category, "bbox": bboxes[row][place]}
            for place, category in enumerate(there)
        ]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(truth))
    return truth


def index_of(folder: Path, counts: np.ndarray, objects: Sequence[Sequence[Row]]) -> pa.Table:
    """The pictures with their proposals, schema BOXES: the first quarter of each lies beside its objects in turn."""
    corners, scores = [], []
    for row, (count, there) in enumerate(zip(counts.tolist(), objects, strict=True)):
        rng = np.random.default_rng([1, row])
        near = np.arange(count) < count // 4
        sides = np.exp(rng.uniform(np.log(8), np.log(240), (count, 2)))
        free = np.concatenate([rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides), sides], axis=1)
        own = np.array([one["bbox"] for one in there])[np.arange(count) % len(there)]
        own += rng.normal(0, 0.06, own.shape) * np.tile(own[:, 2:], 2)
        corners.append(boxes.xywh_to_xyxy(np.where(near[:, None], own, free)).astype(np.float32))
        scores.append(np.where(near, rng.beta(4, 3, count), rng.beta(1, 6, count)).astype(np.float32))
    columns = {
        "row": pa.array(range(len(counts)), pa.int64()),
        "uri": [str(folder / f"{row + 1:012d}.jpg") for row in range(len(counts))],
        "coco_id": [str(row + 1) for row in range(len(counts))],
        "width": [WIDTH] * len(counts),
        "height": [HEIGHT] * len(counts),
        "boxes_xyxy": _lists(counts, _lists(np.full(counts.sum(), 4), pa.array(np.concatenate(corners).ravel()))),
        "box_scores": _lists(counts, pa.array(np.concatenate(scores))),
        "box_labels": _lists(counts, pa.nulls(counts.sum(), pa.string())),
        "box_ids": _lists(counts, pa.array(np.arange(counts.sum()))),
    }
    return fitted(pa.table(columns), coco.BOXES)


def _lists(counts: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)), values)


def predicted(index: pa.Table, row: int, objects: Sequence[Row], names: pa.StringArray) -> pa.Table:
    """What is said of the boxes of a picture, schema PREDICTIONS: the class of an object beside a box is often a candidate."""
    rng = np.random.default_rng([2, row])
    xyxy = index["boxes_xyxy"][row].values
    count, top = len(xyxy), np.arange(TOP_K)
    true = np.array([one["category_id"] - 1 for one in objects])[np.arange(count) % len(objects)]
    classes = (rng.integers(len(names), size=(count, 1)) + top * 211) % len(names)  # five different ones
    first = (np.arange(count) < count // 4) & (rng.random(count) < 0.5) & (classes != true[:, None]).all(axis=1)
    classes[first, 0] = true[first]
    scores = np.log(-np.sort(-rng.dirichlet(np.full(TOP_K, 0.5), count) * rng.beta(6, 2, (count, 1)), axis=1) + 1e-6)
    status = rng.choice(list(STATUSES), count, p=list(STATUSES.values()))
    asked = status != RankStatus.SKIPPED
    said = np.log(rng.dirichlet(np.ones(TOP_K), count) + 1e-6)
    order = np.where(asked[:, None], np.argsort(-said, axis=1), top)
    final = classes[np.arange(count), order[:, 0]]
    fields = [pa.array(classes.ravel()), names.take(pa.array(classes.ravel())), pa.array(scores.ravel().astype(np.float32))]
    values = pa.StructArray.from_arrays(fields, fields=list(CANDIDATES.value_type))
    own = str(row).encode()
    columns = {
        "row": np.full(count, row),
        "place": np.arange(count),
        "image_id": [content_id(own, box) for box in xyxy.to_pylist()],
        "uri": [index["uri"][row].as_py()] * count,
        "box_xyxy": xyxy,
        "candidates": _lists(np.full(count, TOP_K), values),
        "ranking": _lists(np.full(count, TOP_K), pa.array(order.ravel())),
        "rank_status": pa.array([str(one) for one in status], pa.string()),
        "response": [""] * count,
        "scores": _lists(TOP_K * asked, pa.array(said[asked].ravel().astype(np.float32))),
        "routed": asked,
        "class_id": final,
        "class_name": names.take(pa.array(final)),
        "score": rng.random(count).astype(np.float32),
        "label_mass": pa.array(rng.beta(9, 1, count).astype(np.float32), mask=~asked),
        "label_first": pa.array(rng.random(count) < 0.95, mask=~asked),
    }
    return fitted(pa.table(columns), PREDICTIONS)
