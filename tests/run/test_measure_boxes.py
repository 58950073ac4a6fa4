"""The metrics of boxes, read a part at a time, against the same computed from all predictions at once, row by row in Python.

Every number must be the same one, and every line of detections.json: there is no tolerance here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rar import boxes, config, fusion
from rar.columns import box_positions, candidates_of, rankings_of
from rar.corpus import coco
from rar.engine.sinks import ShardSink
from rar.evaluation import box_groups, metrics
from rar.evaluation.ap import evaluate
from rar.evaluation.intervals import wilson
from rar.evaluation.scoring import class_scores
from rar.run import measure
from rar.run.work import Work
from rar.runfolder import RunFolder
from rar.schema import ERRORS, RankStatus
from tests.runs import block

PICTURES, CLASSES, SHARD = 30, 25, 60
NAMES = [f"class {number}" for number in range(CLASSES)]
CALIBRATION = fusion.Calibration(weight_retriever=1.3, weight_ranker=0.7, retriever_scale=2.1)


def write_truth(path: Path, rng: np.random.Generator) -> Path:
    """Some pictures have 100 objects and some none; crowds, and ids that are text."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(PICTURES):
        lists = {"neg_category_ids": [3, 4], "not_exhaustive_category_ids": [5]}
        images.append({"id": f"p{number}", "file_name": f"{number}.jpg", "width": 640, "height": 480, **lists})
        for _ in range((0, 2, 7, 100)[number % 4]):
            corner, size = rng.integers(0, 300, 2), rng.integers(4, 150, 2)
            bbox = [*(corner + rng.random(2)).tolist(), *size.tolist()]
            one = {"image_id": f"p{number}", "category_id": int(rng.integers(CLASSES)) * 2, "bbox": bbox}
            annotations.append(one | {"id": len(annotations) + 1, "iscrowd": int(rng.random() < 0.03)})
    categories = [{"id": 2 * place, "name": name, "frequency": "rcf"[place % 3]} for place, name in enumerate(NAMES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_proposals(path: Path, truth: Path, rng: np.random.Generator) -> Path:
    """Two boxes an object, beside it, with few different scores, so that many are equal."""
    found = []
    for one in json.loads(truth.read_text())["annotations"] * 2:
        bbox = (np.array(one["bbox"]) + rng.normal(0, 8, 4)).round(1)
        bbox[2:] = np.maximum(bbox[2:], 3)
        found.append({"image_id": one["image_id"], "bbox": bbox.tolist(), "score": int(rng.integers(1, 5)) / 4})
    path.write_text(json.dumps(found))
    return path


def predicted(row: int, place: int, box: list[float], rng: np.random.Generator) -> dict[str, Any]:
    """0 to 12 candidates with scores that are often equal; some rows fail, some show what another one does."""
    count = int(rng.choice([0, 1, 2, 5, 5, 5, 8, 12]))
    chosen = rng.choice(CLASSES, count, replace=False).tolist()
    scores = np.log(np.sort(rng.integers(1, 5, count) / 8))[::-1]
    order, status = rng.permutation(count).tolist(), str(rng.choice(list(RankStatus)))
    said = np.log(rng.integers(1, 9, count) / 9).tolist() if rng.random() < 0.5 and status != "skipped" else []
    read = count > 0 and rng.random() < 0.7
    return {
        "row": row,
        "place": place,
        "image_id": f"content {rng.integers(400)}",
        "uri": f"{row}.jpg",
        "box_xyxy": box,
        "candidates": [
            {"class_id": one, "class_name": NAMES[one], "score": score} for one, score in zip(chosen, scores, strict=True)
        ],
        "ranking": order,
        "rank_status": status,
        "response": "",
        "scores": said,
        "routed": status != "skipped",
        "class_id": chosen[order[0]] if count else None,
        "class_name": NAMES[chosen[order[0]]] if count else None,
        "score": 0.5,
        "label_mass": float(rng.random()) if read else None,
        "label_first": bool(rng.random() < 0.9) if read else None,
        "error": "cannot be cut out" if rng.random() < 0.05 else None,
        "stage": "crop",
    }


def simulated(path: Path, chosen: dict[str, Any], proposals: bool) -> tuple[config.Config, RunFolder, pa.Table]:
    """A run of several shards, as the sink writes it."""
    rng = np.random.default_rng(5)
    truth = write_truth(path / "truth.json", rng)
    if proposals:
        chosen = chosen | {"proposals": str(write_proposals(path / "proposals.json", truth, rng))}
    settings = config.validated(config.Config, {"corpus": {"uri": str(truth)}, "detect": chosen})
    assert settings.corpus is not None
    index, _ = coco.read_boxes(settings.corpus, settings.detect)
    made = RunFolder.open(path / "run", "detect", settings, fresh=False, name="a", group="b")
    made.write("classes.json", NAMES)
    made.write("calibration.json", CALIBRATION.to_dict())
    index = made.freeze_index(index)
    work = Work(index, True, ERRORS.empty_table())
    expected, bounds = work.expected(SHARD), work.bounds(SHARD)
    made.write_empty(shard for shard, rows in expected.items() if not rows)
    for shard, rows in expected.items():
        pictures = index.slice(bounds[shard], bounds[shard + 1] - bounds[shard]).to_pylist()
        table = block(
            shard,
            [predicted(one["row"], place, box, rng) for one in pictures for place, box in enumerate(one["boxes_xyxy"])],
        )
        order = rng.permutation(rows)
        ShardSink(made.path, expected).write([table.take(pa.array(order))], None)
    return settings, made, index


def at_once(settings: config.Config, folder: RunFolder, index: pa.Table) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics, detections): the slow definition."""
    assert settings.corpus is not None
    truth, predictions = coco.truth_of(settings.corpus), folder.predictions()
    assert truth is not None
    own = box_positions(predictions, index).tolist()
    labels = [label for row in index["box_labels"].to_pylist() for label in row]
    proposal_scores = [score for row in index["box_scores"].to_pylist() for score in row]
    labels, proposal_scores = [labels[at] for at in own], [proposal_scores[at] for at in own]
    xyxy, pictures = np.array(predictions["box_xyxy"].to_pylist(), np.float64), predictions["row"].to_pylist()
    if any(labels):
        values = metrics.classification(predictions, labels, NAMES)
        groups = box_groups.by_size(boxes.area(xyxy))
        groups |= box_groups.by_frequency(labels, box_groups.frequencies(truth))
        values |= box_groups.group_accuracies(metrics.outcomes(predictions, labels), groups)
    else:
        values = recall(truth, pictures, xyxy)
    candidates, rankings = candidates_of(predictions), rankings_of(predictions)
    found = []
    for row, score, box, listed, ranking in zip(pictures, proposal_scores, xyxy, candidates, rankings, strict=True):
        _, fused = fusion.fuse(listed, ranking, CALIBRATION)
        shares = np.array(fused) * min(np.exp([one.score for one in listed]).sum(), 1.0)
        best = sorted(range(len(listed)), key=lambda at: -shares[at])[: settings.detect.classes_per_box]
        judged = class_scores(
            settings.detect.score, np.array([score], np.float64), shares[best][None] if best else np.zeros((1, 0))
        )
        bbox = np.round(boxes.xyxy_to_xywh(box), 2).tolist()
        for at, one in zip(best, judged[0].tolist(), strict=True):
            category = truth.categories[NAMES.index(listed[at].class_name)].id
            found.append({"image_id": truth.pictures[row].id, "category_id": category, "bbox": bbox, "score": rounded(one)})
    values |= evaluate(found, truth, settings.detect.style)
    asked = sum(status != "skipped" for status in predictions["rank_status"].to_pylist())
    values["mean_k"] = folder.stats()["mllm.candidates"] / asked
    values["duplicates"] = float(sum(count - 1 for count in Counter(predictions["image_id"].to_pylist()).values()))
    return values, found


def rounded(value: float) -> float:
    scale = 10.0 ** (5 - math.floor(math.log10(value))) if value > 0 else 1e5
    return float(np.round(value * scale) / scale)


def recall(truth: Any, pictures: list[int], xyxy: np.ndarray) -> dict[str, float]:
    frequency = {"r": "rare", "c": "common", "f": "frequent"}
    hits: dict[str, list[bool]] = {}
    for image, category, bbox, area, crowd, *_ in zip(*truth.boxes, strict=True):
        if crowd:
            continue
        near = xyxy[[picture == image for picture in pictures]]
        hit = bool((boxes.iou(boxes.xywh_to_xyxy(bbox)[None], near) >= 0.5).any())
        size = "small" if area <= 32**2 else "medium" if area <= 96**2 else "large"
        for group in ("", f"_{size}", f"_{frequency[truth.categories[category].frequency]}"):
            hits.setdefault(f"proposal_recall{group}", []).append(hit)
    values: dict[str, float] = {}
    for key, found in hits.items():
        low, high = wilson(sum(found), len(found))
        values |= {key: sum(found) / len(found), f"{key}.ci_low": low, f"{key}.ci_high": high}
    return values


@pytest.mark.parametrize("proposals", [False, True])
@pytest.mark.parametrize(
    "chosen", [{"style": "coco"}, {"style": "lvis", "score": "geometric"}, {"style": "v3det", "score": "proposal"}]
)
def test_parts_give_what_all_rows_at_once_do(
    tmp_path: Path, chosen: dict[str, Any], proposals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder, index = simulated(tmp_path, chosen, proposals)
    files = [part.num_rows for part in folder.parts_of_predictions(("row",))]
    assert len(files) > 8 and max(files) > SHARD and folder.errors().num_rows > 10
    expected, listed = at_once(settings, folder, index)
    assert expected["duplicates"] > 100 and expected["ap"] > 0 and ("top1_rare" in expected) != proposals
    for size in (1, 20_000, measure.AT_ONCE):
        monkeypatch.setattr(measure, "AT_ONCE", size)
        values = measure.measured(settings, folder, index, boxed=True)
        assert {key: repr(value) for key, value in values.items()} == {key: repr(value) for key, value in expected.items()}
        assert folder.read("detections.json") == listed


def test_chances_are_those_of_fusion_to_the_last_digit() -> None:
    """Lists of up to 40, where numpy adds in another order than of a few."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(600):
        count = int(rng.integers(0, 41))
        rows.append(predicted(number, 0, [0.0, 0.0, 1.0, 1.0], rng))
        scores = np.sort(rng.normal(-3, 2, count))[::-1].tolist()
        rows[-1]["candidates"] = [{"class_id": at, "class_name": "a", "score": one} for at, one in enumerate(scores)]
        rows[-1]["ranking"] = rng.permutation(count).tolist()
        rows[-1]["scores"] = rng.normal(-1, 1, count).tolist() if number % 2 else []
    table = block(0, rows)
    found = np.split(measure.chances(table, CALIBRATION), np.cumsum(metrics.lengths(table["candidates"]))[:-1])
    for ours, listed, ranking in zip(found, candidates_of(table), rankings_of(table), strict=True):
        _, fused = fusion.fuse(listed, ranking, CALIBRATION)
        share = min(np.exp([candidate.score for candidate in listed]).sum(), 1.0)
        assert ours.tolist() == (np.array(fused) * share).tolist()


@pytest.mark.parametrize("scores", [[-1.0], [-1.0, -2.0, -3.0]])
def test_scores_that_do_not_fit_their_candidates_are_a_fault_of_ours(scores: list[float]) -> None:
    row = predicted(0, 0, [0.0, 0.0, 1.0, 1.0], np.random.default_rng(0))
    row["candidates"], row["ranking"] = [{"class_id": at, "class_name": "a", "score": -1.0} for at in range(2)], [0, 1]
    with pytest.raises(ValueError, match="more or fewer scores"):
        measure.chances(block(0, [row | {"scores": scores}]), CALIBRATION)


def test_a_shard_holds_whole_pictures(tmp_path: Path) -> None:
    _, folder, _ = simulated(tmp_path, {}, proposals=True)
    held = [set(part["row"].to_pylist()) for part in folder.parts_of_predictions(("row",))]
    held = [pictures for pictures in held if pictures]
    assert len(held) > 8 and sum(map(len, held)) == len(set.union(*held))


def test_a_corpus_without_a_truth_and_another_vocabulary(tmp_path: Path) -> None:
    settings, folder, index = simulated(tmp_path, {}, proposals=False)
    whole = measure.measured(settings, folder, index, boxed=True)
    (folder.path / "detections.json").unlink()
    folder.write("classes.json", ["something else"])
    values = measure.measured(settings, folder, index, boxed=True)
    assert "ap" not in values and not (folder.path / "detections.json").exists()
    for key in ("top1", "top1_rare", "duplicates", "mean_k"):
        assert values[key] == whole[key]
    bare = {"images": json.loads((tmp_path / "truth.json").read_text())["images"]}
    (tmp_path / "truth.json").write_text(json.dumps(bare))
    values = measure.measured(settings, folder, index, boxed=True)
    assert values == {key: whole[key] for key in ("mean_k", "duplicates")}
