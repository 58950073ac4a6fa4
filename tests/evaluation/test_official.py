"""AP by this project equals the official packages' on random files: `lvis` for LVIS, `pycocotools` for COCO.

The files hold what makes the definitions differ: crowds, ignored truths, boxes without area, ties of scores, categories and
images without truth, lists of negatives and of categories not exhaustively labelled, hundreds of detections an image.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from typing import Any

import numpy as np
import pytest

from rar.evaluation.ap import evaluate
from tests.conftest import ROOT

CASES = ROOT.parent / "shared" / "cases"


def random_file(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    images = [7 * i for i in range(int(rng.integers(1, 9)))]
    categories = sorted(rng.choice(100, int(rng.integers(1, 7)), replace=False).tolist())
    sides = (8, 33, 60, 96, 97, 0) if seed % 2 else (8, 33, 60, 96, 97)

    def box() -> list[float]:
        return [float(value) for value in (*rng.integers(0, 90, 2), *rng.choice(sides, 2))]

    def some(p: float) -> list[int]:
        return [one for one in categories if rng.random() < p]

    annotations = []
    for number in range(int(rng.integers(0, 60))):
        x, y, w, h = box()
        area = w * h * rng.choice([1, 0.7])
        one: dict[str, Any] = {"id": number + 1, "image_id": int(rng.choice(images))}
        one |= {
            "category_id": int(rng.choice(categories)),
            "bbox": [x, y, w, h],
            "area": area,
            "iscrowd": int(rng.random() < 0.1),
        }
        one |= {"segmentation": [[0, 0, 1, 0, 1, 1]]}
        if rng.random() < 0.15:
            one["ignore"] = int(rng.integers(0, 2))
        annotations.append(one)
    found = []
    for one in annotations:
        for _ in range(int(rng.integers(0, 4))):
            jitter = rng.normal(0, rng.choice([0.5, 4]), 4) * (rng.random() < 0.8)
            bbox = (np.array(one["bbox"]) + jitter).round(2)
            bbox[2:] = np.maximum(bbox[2:], 0)
            found.append((one["image_id"], one["category_id"], bbox.tolist()))
    crowded = int(rng.integers(0, 400)) if seed % 10 == 0 else int(rng.integers(0, 20))
    found += [(int(rng.choice(images)), int(rng.choice(categories)), box()) for _ in range(1 + crowded)]
    digits = int(rng.choice([1, 9]))  # ties
    detections = [
        {"image_id": i, "category_id": c, "bbox": bbox, "score": round(float(rng.random()), digits)} for i, c, bbox in found
    ]
    records = [
        {"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200, "neg_category_ids": some(0.3)}
        | {"not_exhaustive_category_ids": some(0.2)}
        for i in images
    ]
    names = [{"id": c, "name": f"c{c}", "frequency": str(rng.choice(list("rcf")))} for c in categories]
    return {"images": records, "annotations": annotations, "categories": names}, detections


def official_lvis(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float]:
    if not hasattr(np, "float"):
        np.float = float  # type: ignore[attr-defined]  # lvis 0.5.3 was written for numpy 1
    from lvis import LVIS, LVISEval, LVISResults

    logging.getLogger("lvis").setLevel(logging.ERROR)
    known = LVIS.__new__(LVIS)
    known.logger, known.dataset = logging.getLogger("lvis"), copy.deepcopy(truth)
    known._create_index()
    run = LVISEval(known, LVISResults(known, copy.deepcopy(detections), max_dets=300), "bbox")
    run.run()
    names = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
    names |= {"APr": "ap_rare", "APc": "ap_common", "APf": "ap_frequent", "AR@300": "ar_300"}
    names |= {"ARs@300": "ar_small", "ARm@300": "ar_medium", "ARl@300": "ar_large"}
    return {name: float(run.results[key]) for key, name in names.items()}


def official_coco(truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = copy.deepcopy(truth)
        known.createIndex()
        run = COCOeval(known, known.loadRes(copy.deepcopy(detections)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
    return dict(zip((*names, "ar_small", "ar_medium", "ar_large"), run.stats.tolist(), strict=True))


def compare(seeds: range) -> None:
    told = 0
    for seed in seeds:
        truth, detections = random_file(seed)
        lvis, ours = official_lvis(truth, detections), evaluate(detections, truth, "lvis")
        assert ours == pytest.approx({name: lvis.get(name, -1) for name in ours}, abs=1e-9), f"lvis, seed {seed}"
        coco, ours = official_coco(truth, detections), evaluate(detections, truth, "coco")
        assert {name: ours[name] for name in coco} == pytest.approx(coco, abs=1e-9), f"coco, seed {seed}"
        told += 0 < lvis["ap"] < 1 and 0 < coco["ap"] < 1
    assert told > len(seeds) / 2


@pytest.mark.long
def test_forty_random_files() -> None:
    compare(range(40))


@pytest.mark.slow
def test_five_hundred_random_files() -> None:
    compare(range(40, 540))


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize(("name", "expected"), [("zero0", 0.126), ("ignore1", 0.142)])
def test_recorded_cases_of_zero_area_and_ignored_truths(name: str, expected: float) -> None:
    folder = CASES / "lvis-zero-area"
    assert evaluate(folder / f"{name}.d.json", folder / f"{name}.t.json", "lvis")["ap"] == pytest.approx(expected, abs=5e-4)
