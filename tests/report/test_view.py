from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rar.corpus import coco
from rar.fusion import Calibration
from rar.report import view
from rar.schema import UserError
from tests.runs import NAMES, classify_run, detect_run, write_truth


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def given(root: Path) -> Path:
    return detect_run(root, write_truth(root), "given", {}, Calibration(threshold=0.9))


@pytest.fixture(scope="module")
def proposed(root: Path, given: Path) -> Path:
    return detect_run(root, root / "truth.json", "proposals", {"proposals": "boxes.json", "shown": {"size": 64}})


def test_given_boxes_have_their_own_labels(given: Path) -> None:
    run = view.read_run(given)
    assert run.boxes is not None and run.boxes.note == view.GIVEN
    assert run.truth[:4] == [NAMES[0], NAMES[5], NAMES[1], NAMES[6]] and run.found.labelled.all()
    assert run.boxes.xyxy[:2].tolist() == [[20, 30, 90, 100], [130, 60, 210, 140]]
    assert np.isnan(run.boxes.scores).all() and run.boxes.shown.size == 336
    assert run.calibration is not None and run.calibration.threshold == 0.9


def test_proposals_have_scores_and_the_label_of_the_object_they_overlap(proposed: Path) -> None:
    run = view.read_run(proposed)
    assert run.boxes is not None and run.boxes.note == view.JUDGED
    assert run.truth[:6] == [NAMES[0], NAMES[5], None, NAMES[1], NAMES[6], None]
    assert run.boxes.scores[:4] == pytest.approx([0.9, 0.8, 0.3, 0.9])
    assert run.boxes.shown.size == 64 and run.calibration is None


def test_proposals_whose_truth_is_gone_are_not_judged_and_say_so(proposed: Path, tmp_path: Path) -> None:
    folder = changed(proposed, tmp_path, corpus={"uri": "/gone/truth.json"})
    run = view.read_run(folder)
    assert run.boxes is not None and "file not found: /gone/truth.json" in run.boxes.note
    assert run.truth == [None] * len(run.predictions) and not run.found.labelled.any()


def changed(run: Path, tmp_path: Path, **sections: dict) -> Path:
    folder = Path(shutil.copytree(run, tmp_path / "changed"))
    info = json.loads((folder / "run.json").read_text())
    for name, values in sections.items():
        info["config"][name] |= values
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def test_overlap_is_by_picture_with_the_best_object_and_a_floor() -> None:
    types = [coco.BOXES.field(name).type for name in ("boxes_xyxy", "box_labels")]
    known = pa.table(
        {
            "coco_id": [1, 2, 3],
            "boxes_xyxy": pa.array([[[0, 0, 10, 10], [0, 0, 10, 8]], [[0, 0, 2, 2]], []], types[0]),
            "box_labels": pa.array([["cat", "dog"], ["eel"], []], types[1]),
        }
    )
    ids = pa.chunked_array([[2, 1, 1, 1, 3, 9]])
    asked = np.array([[0, 0, 2, 2], [0, 0, 10, 8.5], [0, 0, 10, 4.9], [20, 20, 30, 30], [0, 0, 2, 2], [0, 0, 2, 2]], np.float32)
    assert view.overlapped(ids, asked, known) == ["eel", "dog", "dog", None, None, None]
    assert view.overlapped(ids, asked * [1, 1, 1, 0.5], known)[2] is None  # 24.5 of 80
    assert view.overlapped(ids.slice(0, 0), np.zeros((0, 4)), known) == []


def test_won_lost_and_flipped(root: Path) -> None:
    run = view.read_run(classify_run(root, "rar", "classify", 0.9, seed=1, ranks=True))
    first = [row[0]["class_name"] for row in run.predictions["candidates"].to_pylist()]
    said = run.predictions["class_name"].to_pylist()
    rows = list(zip(said, first, run.truth, strict=True))
    assert run.won.tolist() == [now == true != before for now, before, true in rows]
    assert run.lost.tolist() == [before == true != now for now, before, true in rows]
    assert run.flipped.tolist() == [now != before for now, before, _ in rows]
    assert run.boxes is None and run.main == run.values["top1"]


def test_numbers_that_are_none() -> None:
    assert math.isnan(view.number(None)) and view.number(0.5) == 0.5


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda folder: (folder / "run.json").unlink(), r"holds no run\.json"),
        (lambda folder: edit(folder / "run.json", lambda info: info.pop("counts")), "has not ended; resume it"),
        (
            lambda folder: edit(folder / "run.json", lambda info: info["config"]["detect"]["crop"].update(zoom=3)),
            r"run\.json: detect is of another version of rar: crop\.zoom",
        ),
        (lambda folder: edit(folder / "calibration.json", lambda data: data.update(mood=1)), "calibration.json is of another"),
    ],
)
def test_a_folder_that_cannot_be_read_is_a_users_mistake(given: Path, tmp_path: Path, broken, said: str) -> None:
    folder = Path(shutil.copytree(given, tmp_path / "broken"))
    broken(folder)
    with pytest.raises(UserError, match=said):
        view.read_run(folder)


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
