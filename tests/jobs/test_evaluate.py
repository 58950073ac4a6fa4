"""`rar evaluate` as a user types it: real processes, recorded files, wrong inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import jobs.evaluate
from tests.conftest import ROOT, SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
TRUTH = {
    "images": [{"id": 1, "width": 50, "height": 50}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]}],
    "categories": [{"id": 3, "name": "cat"}],
}
FOUND = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "score": 1.0}


def evaluate(detections: Path, truth: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.evaluate", "--detections", str(detections), "--truth", str(truth), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def files(folder: Path, detections: Any, truth: Any = TRUTH) -> tuple[Path, Path]:
    for name, data in (("found", detections), ("truth", truth)):
        if data is not None:
            (folder / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "found.json", folder / "truth.json"


@pytest.mark.parametrize("style", ["coco", "v3det"])
def test_the_table_then_one_json_line(tmp_path: Path, style: str) -> None:
    result = evaluate(*files(tmp_path, [FOUND]), "--style", style)
    assert (result.returncode, result.stderr) == (0, "")
    *lines, last = result.stdout.splitlines()
    values = json.loads(last)
    assert values["ap"] == values["ap_small"] == 1 and values["ap_large"] == -1
    assert ("ar_300" in values) is (style == "v3det")
    assert [line.split()[0] for line in lines] == list(values)
    assert lines[0].split() == ["ap", "1.000"] and "ap_large          -" in lines


@pytest.mark.parametrize(
    ("detections", "truth", "wanted"),
    [
        ("[{", TRUTH, "found.json is not valid JSON"),
        ([FOUND], "", "truth.json is not valid JSON"),
        (TRUTH, TRUTH, "must be a list"),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1]}], TRUTH, "1 detections lack"),
        ([FOUND | {"image_id": 9}], TRUTH, "1 detections name an unknown image_id, the first is image_id 9"),
        ([FOUND | {"category_id": 4}], TRUTH, "unknown category_id"),
        (None, TRUTH, "file not found"),
        ([FOUND], {"images": []}, "no COCO object detection file: it has no list `annotations`"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], detections: Any, truth: Any, wanted: str
) -> None:
    found, known = files(tmp_path, detections, truth)
    with pytest.raises(typer.Exit) as ended:
        jobs.evaluate.evaluate(str(found), str(known), "coco")
    said = capsys.readouterr()
    assert (ended.value.exit_code, said.out) == (2, "")
    assert said.err.startswith("rar: ") and said.err.count("\n") == 1 and wanted in said.err


def test_a_style_that_does_not_fit_is_a_mistake(tmp_path: Path) -> None:
    result = evaluate(*files(tmp_path, [FOUND]), "--style", "lvis")
    assert result.returncode == 2 and "use style coco" in result.stderr


@needs_data
def test_the_official_table() -> None:
    folder = SHARED_DATA / "coco"
    result = evaluate(folder / "fakebbox100_results.json", folder / "instances_val2014_100.json")
    assert result.stdout.startswith("ap            0.505\nap50          0.697\n")
