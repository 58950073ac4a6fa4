"""Labels join by row and place: a recogniser that is always right scores 1.0 however often a picture or a box stands there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rar import config
from rar.corpus import coco, listing
from rar.encoder.sentences import SentenceEncoder
from rar.engine.sinks import ShardSink
from rar.fusion import Calibration
from rar.report import view
from rar.run import measure
from rar.runfolder import RunFolder
from tests import tiny_bert
from tests.conftest import SHARED_CASES, needs_shared_cases
from tests.runs import NAMES, block, detect_run, draw, end, write_run, write_truth


def said(row: int, place: int | None, uri: str, box: list[float] | None, name: str, names: list[str]) -> dict[str, Any]:
    """A prediction of `name`, second of the candidates."""
    order = [name, *(other for other in names if other != name)]
    candidates = [{"class_id": names.index(one), "class_name": one, "score": -1.0 - at} for at, one in enumerate(order[::-1])]
    return {
        "row": row,
        "place": place,
        "image_id": f"{uri} {box}",
        "uri": uri,
        "box_xyxy": box,
        "candidates": candidates,
        "ranking": list(range(len(names)))[::-1],
        "rank_status": "ranked",
        "response": "",
        "scores": [-2.0, -0.1][-len(names) :],
        "routed": False,
        "class_id": names.index(name),
        "class_name": name,
        "score": 0.9,
    }


def folder_of(
    path: Path, verb: str, settings: config.Config, index: pa.Table, rows: list[dict[str, Any]], names: list[str]
) -> RunFolder:
    made = RunFolder.open(path, verb, settings, fresh=False, name="perfect", group=verb)
    made.write("classes.json", names)
    made.write("calibration.json", Calibration().to_dict())
    made.freeze_index(index)
    ShardSink(made.path, {0: len(rows)}).write([block(0, rows)], None)
    return made


@needs_shared_cases
def test_a_uri_in_two_rows_is_judged_by_the_label_of_each(tmp_path: Path) -> None:
    settings = config.validated(config.Config, {"corpus": {"uri": str(SHARED_CASES / "row-twice" / "test.csv")}})
    assert settings.corpus is not None
    index = listing.list_images(settings.corpus)
    assert index["label"].to_pylist() == ["cat", "dog", "cat"] and len(set(index["uri"].to_pylist())) == 2
    rows = [said(one["row"], None, one["uri"], None, one["label"], ["cat", "dog"]) for one in index.to_pylist()]
    made = folder_of(tmp_path / "run", "classify", settings, index, rows[::-1], ["cat", "dog"])  # shards end in any order
    values = measure.measured(settings, made, index, boxed=False)
    assert (values["top1"], values["retriever_top1"], values["duplicates"]) == (1.0, 0.0, 1.0)
    run = view.read_run(end(made, settings, values))
    assert run.truth == ["cat", "dog", "cat"] and run.found.correct.mean() == values["top1"]


@needs_shared_cases
def test_a_box_with_two_labels_and_a_file_under_two_ids_keep_their_own(tmp_path: Path) -> None:
    settings = config.validated(config.Config, {"corpus": {"uri": str(SHARED_CASES / "same-box-two-labels" / "truth.json")}})
    assert settings.corpus is not None
    index, faults = coco.read_boxes(settings.corpus, settings.detect)
    assert not faults
    rows = [
        said(picture["row"], place, picture["uri"], box, label, ["cup", "mug"])
        for picture in index.to_pylist()
        for place, (box, label) in enumerate(zip(picture["boxes_xyxy"], picture["box_labels"], strict=True))
    ]
    made = folder_of(tmp_path / "run", "detect", settings, index, rows, ["cup", "mug"])
    values = measure.measured(settings, made, index, boxed=True)
    assert (values["top1"], values["duplicates"]) == (1.0, 2.0)
    detections = sorted(made.read("detections.json"), key=lambda one: -one["score"])
    assert len(detections) == 6  # two classes a box
    assert {(one["image_id"], one["category_id"]) for one in detections[:3]} == {(1, 1), (1, 2), (2, 1)}
    run = view.read_run(end(made, settings, values))
    assert sorted(map(str, run.truth)) == ["cup", "cup", "mug"] and run.found.correct.all()
    assert [run.index["coco_id"][place].as_py() for place in run.places] == ["1", "1", "2"]


def test_only_what_measures_is_computed_again(tmp_path: Path) -> None:
    truth = write_truth(tmp_path)
    folder = RunFolder(detect_run(tmp_path, truth, "given", {}, Calibration()))
    settings = config.validated(config.Config, {"corpus": {"uri": str(truth)}})
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.path.rglob("*") if file.is_file()}
    values, new = measure.again(settings, folder, boxed=True)
    assert not new and values == folder.read("metrics.json")
    other = config.validated(config.Config, {"corpus": {"uri": str(truth)}, "detect": {"score": "class", "classes_per_box": 2}})
    RunFolder.check(folder.path, "detect", other, fresh=False)  # not refused
    values, new = measure.again(other, folder, boxed=True)
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.path.rglob("*") if file.is_file()}
    assert new and values == measure.measured(other, folder, folder.freeze_index(pa.table({})), boxed=True)
    changed = {file.name for file in after if after[file] != before.get(file)}
    assert changed == {"metrics.json", "detections.json", "run.json"}
    known, old = json.loads(after[folder.path / "run.json"][0]), json.loads(before[folder.path / "run.json"][0])
    assert known["config"]["detect"]["score"] == "class" and known["seconds"] == old["seconds"]
    assert len(folder.read("detections.json")) == 2 * folder.predictions().num_rows
    assert measure.again(other, folder, boxed=True)[1] is False


def test_guessed_names_are_judged_again_by_another_judge(tmp_path: Path) -> None:
    """A finished run is given a sentence encoder, another one, and none; predictions stay, and cluster accuracy, too."""
    names, truth = ["red star", "blue ring"], ["red star", "red star", "blue ring"]
    (tmp_path / "test.csv").write_text("\n".join(["uri,label", *(f"{row}.jpg,{name}" for row, name in enumerate(truth))]))

    def judged_by(judge: Path | None) -> config.Config:
        chosen = {"vocabulary_free": True, "sentence_encoder": None if judge is None else str(judge)}
        return config.validated(config.Config, {"corpus": {"uri": str(tmp_path / "test.csv")}, "run": chosen})

    plain = judged_by(None)
    assert plain.corpus is not None
    index = listing.list_images(plain.corpus)
    rows = [said(row, None, f"{row}.jpg", None, name, names) for row, name in enumerate(["red star", "blue ring", "red star"])]
    made = folder_of(tmp_path / "run", "classify", plain, index, rows, names)
    known = measure.measured(plain, made, index, boxed=False) | {"cluster_accuracy": 2 / 3, "semantic_similarity": 0.5}
    end(made, plain, known)
    judges = [tiny_bert.write(tmp_path / "bert"), tiny_bert.write(tmp_path / "other", seed=1)]
    said_by = []
    for judge in judges:
        RunFolder.check(made.path, "classify", judged_by(judge), fresh=False)  # not refused
        values, new = measure.again(judged_by(judge), made, boxed=False)
        vectors = dict(zip(names, SentenceEncoder(str(judge)).embed(names), strict=True))
        between = float(vectors["red star"] @ vectors["blue ring"])
        assert new and values["semantic_similarity"] == pytest.approx((1 + 2 * between) / 3)
        assert values["cluster_accuracy"] == 2 / 3 and not measure.again(judged_by(judge), made, boxed=False)[1]
        said_by.append(values["semantic_similarity"])
    assert said_by[0] != pytest.approx(said_by[1])
    assert "semantic_similarity" not in measure.again(plain, made, boxed=False)[0]


def test_a_row_that_the_index_lacks_is_a_fault_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(draw(NAMES[0]))
    settings = config.validated(config.Config, {"corpus": {"uri": str(tmp_path)}})
    assert settings.corpus is not None
    index = listing.list_images(settings.corpus)
    stray = said(7, None, "a.jpg", None, "cat", ["cat", "dog"])
    made = write_run(tmp_path / "run", "classify", "a", "b", settings, index, [stray, stray])
    with pytest.raises(ValueError, match="rows that the index lacks"):
        measure.measured(settings, made, index, boxed=False)
