"""The chain in one process with real Ray, Milvus Lite and Serve: memory, classify, detect, resume.

Not covered: several nodes, GPUs, a killed driver (tests/test_jobs.py).
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rar import config, miniature
from rar.corpus.decode import decode, fit_square
from rar.engine import client, pipeline
from rar.engine.session import Session
from rar.report import cards
from rar.report.page import write_report
from rar.report.view import read_run
from rar.run import build, nearest, recognise
from rar.run.vocabulary import collection, open_memory
from rar.runfolder import RunFolder
from rar.schema import PREDICTIONS, UserError, content_id
from tests.chat_server import serving, token_model, tokenizer
from tests.conftest import ROOT
from tests.run.lab import Lab


@pytest.fixture(scope="module")
def classified(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, float]]:
    return lab.run(lab.settings(), tmp_path_factory.mktemp("runs") / "plain")


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return sorted(folder.predictions().to_pylist(), key=lambda row: row["uri"])


def test_every_image_is_predicted_and_rankings_are_permutations(classified: tuple[RunFolder, dict[str, float]]) -> None:
    folder, metrics = classified
    found = rows(folder)
    assert len(found) == 120 and folder.predictions().schema.equals(PREDICTIONS)
    assert len({row["image_id"] for row in found}) == 120
    for row in found:
        assert sorted(row["ranking"]) == list(range(5))
        assert len({candidate["class_id"] for candidate in row["candidates"]}) == 5
        assert row["class_name"] == row["candidates"][row["ranking"][0]]["class_name"]
    counts = folder.read("run.json")["counts"]
    assert counts == {"input": 120, "ok": 120, "failed": 0, "skipped": 0}
    right = np.mean([Path(row["uri"]).parent.name == row["class_name"] for row in found])
    assert metrics["top1"] == pytest.approx(right)
    assert metrics["top1"] > 0.3  # 120 classes: chance is 0.008
    assert (metrics["leaked"], metrics["near_leaked"]) == (0, 0)


def test_a_run_says_how_busy_each_stage_was(classified: tuple[RunFolder, dict[str, float]]) -> None:
    """What holds of any run: nobody is busier than there was time and room for, and the busiest is named."""
    folder = classified[0]
    known, predictions = folder.read("run.json"), folder.predictions()
    stages = known["stages"]
    assert list(stages) == ["read", "decode", "embed", "retrieve", "rank", "fuse", "write"]
    assert all(stage["rows"] == 120 and 0 <= stage["busy"] <= 1 for stage in stages.values())
    assert known["slowest"] == max(stages, key=lambda name: stages[name]["busy"])
    asked = predictions["rank_status"].to_pylist().count("ranked")
    assert stages["embed"]["at_once"] == stages["rank"]["at_once"] == 1 and known["mllm"]["calls"] == asked
    room = 0 < known["mllm"]["seconds"] < known["pipeline_seconds"] < known["seconds"]
    assert room and stages["rank"]["busy"] == pytest.approx(known["mllm"]["seconds"] / known["pipeline_seconds"], abs=0.01)
    assert stages["rank"]["waited"] == pytest.approx(stages["rank"]["seconds"] - known["mllm"]["seconds"], abs=0.01)
    assert stages["embed"]["waited"] > 0 and "waited" not in stages["decode"]
    held = {name: stage["seconds"] for name, stage in stages.items() if name not in ("embed", "rank")}
    tasks = stages["read"]["at_once"]
    assert 1 <= tasks <= 5 and {stages[name]["at_once"] for name in held} == {tasks}
    assert sum(held.values()) <= tasks * known["pipeline_seconds"]


def test_the_memory_s_nearest_pictures_are_kept_for_the_page(
    lab: Lab, classified: tuple[RunFolder, dict[str, float]], tmp_path: Path
) -> None:
    """Held against an exact search over the stored vectors, and against the support photos themselves."""
    folder = RunFolder(shutil.copytree(classified[0].path, tmp_path / "run"))
    nearest.keep(lab.session, lab.settings(), open_memory(lab.session, lab.settings()), folder)
    run = read_run(folder.path)
    shown = np.concatenate([gallery.rows for gallery in cards.galleries(run)])
    assert set(run.neighbors) == {(run.predictions["row"][row].as_py(), None) for row in shown.tolist()}
    entries = collection(lab.settings(), lab.session.memory_address, "images").fetch()
    photos = {content_id(file.read_bytes()): file for file in (lab.world / "novel" / "support").rglob("*.png")}
    for row in shown[:5].tolist():
        scores = entries.vectors @ vector_of(Path(run.predictions["uri"][row].as_py()))
        best = np.argsort(-scores, kind="stable")[: nearest.COUNT]
        near = run.neighbors[run.predictions["row"][row].as_py(), None]
        assert [one.score for one in near] == pytest.approx(scores[best].tolist(), abs=1e-4)
        assert [one.class_name for one in near] == [entries.class_names[place] for place in best]
        files = [photos[entries.entry_ids[place].partition("-")[0]] for place in best]
        assert [one.picture for one in near] == [cards.jpeg(decode(file.read_bytes()), nearest.SIDE) for file in files]
    gone = lab.settings(memory={"support": {"uri": str(tmp_path / "gone")}})
    nearest.keep(lab.session, gone, open_memory(lab.session, lab.settings()), folder)
    assert not read_run(folder.path).neighbors  # the run is as good without


def vector_of(file: Path) -> np.ndarray:
    """(D,) as the encoder alone makes it."""
    from rar.encoder.towers import ClipEncoder  # workers import this module: torch would cost each of them seconds

    encoder = ClipEncoder(config.Encoder())
    pixels = fit_square(decode(file.read_bytes()), encoder.side, encoder.resize_mode, encoder.interpolation)
    return encoder.embed_images(pixels[None])[0]


def test_candidates_are_the_exact_head_scores(lab: Lab, classified: tuple[RunFolder, dict[str, float]]) -> None:
    from rar.retriever.modes import Head

    one = collection(lab.settings(), lab.session.memory_address, "head_fused")
    head = Head.from_entries(one.fetch(), {})
    row = rows(classified[0])[7]
    scores = head.scores(vector_of(Path(row["uri"]))[None])[0]
    best = np.argsort(-scores, kind="stable")[:5]
    assert [candidate["class_id"] for candidate in row["candidates"]] == head.class_ids[best].tolist()
    shares = scores[best] - np.logaddexp.reduce(scores)
    assert [candidate["score"] for candidate in row["candidates"]] == pytest.approx(shares.tolist(), abs=1e-3)


def every_file(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


AGAIN = """
import sys
from pathlib import Path
from jobs.classify import run
code = run("classify", Path(sys.argv[1]), Path(sys.argv[2]), [], False, False)
heavy = {"ray", "torch", "transformers", "open_clip"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_a_second_run_changes_no_byte_loads_no_model_and_starts_no_ray(lab: Lab, tmp_path: Path) -> None:
    server = {"uri": lab.session.memory_address}  # the folder is this process' own
    settings = lab.settings(memory=server, corpus={"limit": 30}, route={"mode": "always"}, ranker={"method": "none"})
    folder, metrics = lab.run(settings, tmp_path / "run")
    write_report([folder.path], folder.path)
    before = every_file(folder.path)
    assert {"done/part-000000_25_0.json", "done/part-000001_5_0.json", "metrics.json", "report.html"} <= before.keys()
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "same.yaml"), str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "holds this run" in done.stderr and f"top1 {metrics['top1']:.4f}" in done.stderr
    assert every_file(folder.path) == before


@pytest.mark.long
def test_a_run_whose_weights_were_replaced_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(miniature.CLIP, tmp_path / "clip"))
    sections = {"encoder": {"model": str(weights)}, "ranker": {"method": "none"}, "route": {"mode": "always"}}
    settings = lab.settings(**sections, corpus={"limit": 5})
    folder, _ = lab.run(settings, tmp_path / "run")
    file = weights / "open_clip_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = every_file(folder.path)
    with pytest.raises(UserError, match="the weights of the encoder have changed; use --fresh"):
        lab.run(settings, folder.path)
    assert every_file(folder.path) == before


def test_a_resumed_run_gives_the_same_predictions(
    lab: Lab, classified: tuple[RunFolder, dict[str, float]], tmp_path: Path
) -> None:
    shutil.copytree(classified[0].path, tmp_path / "resumed")
    folder, _ = lab.run(lab.settings(), tmp_path / "resumed")
    kept = folder.part("predictions", 0)
    lost = [folder.part("predictions", shard) for shard in (1, 3, 4)]
    stamp = kept.stat().st_mtime_ns
    for shard in (1, 3, 4):
        folder._unmark(f"{shard:06d}")
    for file in lost:
        file.unlink()
    lab.run(lab.settings(), folder.path)
    assert kept.stat().st_mtime_ns == stamp and all(file.exists() for file in lost)
    assert rows(folder) == rows(classified[0])


def test_letters_that_are_too_few_for_all_classes_are_told_before_a_ranker_starts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(client, "deploy", lambda *given: started.append(given))
    with pytest.raises(UserError, match=r"too few for retriever\.mode all over 120 classes"):
        recognise.prepare(lab.session, lab.settings(retriever={"mode": "all"}))
    assert not started


def test_bad_files_become_errors_and_counts_add_up(lab: Lab, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (number * 80, 90, 20)).save(photos / f"good{number}.png")
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("not a picture")
    (photos / "cut.png").write_bytes((photos / "good0.png").read_bytes()[:60])
    folder, _ = lab.run(lab.settings(corpus={"uri": str(photos)}, ranker={"method": "none"}), tmp_path / "run")
    errors = folder.errors().to_pylist()
    assert {Path(row["uri"]).name for row in errors} == {"empty.jpg", "text.png", "cut.png"}
    assert all(row["stage"] == "decode" and row["error"] for row in errors)
    assert folder.read("run.json")["counts"] == {"input": 6, "ok": 3, "failed": 3, "skipped": 0}


def test_workers_ask_a_server_themselves_within_a_budget_of_calls(lab: Lab, tmp_path: Path) -> None:
    """120 images in shards of 40, 90 calls a start: two shards, then the third, and nothing is asked twice."""
    with serving() as server:
        server.answer, server.tokenize = token_model(), tokenizer
        ranker = {"method": "endpoint", "model": "colours", "base_url": server.url, "max_calls": 90}
        settings = lab.settings(ranker=ranker, route={"mode": "always"}, run={"shard_size": 40})
        with pytest.raises(UserError, match=r"max_calls 90 are spent: 2 of 3 shards"):
            lab.run(settings, tmp_path / "run")
        asked = [body for _, _, body in server.seen if "logprob_token_ids" in body]
        assert RunFolder(tmp_path / "run").progress() == (80, 0) and len(asked) == 80 + 1  # and the probe's one
        folder, metrics = lab.run(settings, tmp_path / "run")
        asked = [body for _, _, body in server.seen if "logprob_token_ids" in body]
        assert len(asked) == 120 + 1  # offers are asked once a process
    found = rows(folder)
    assert len(found) == 120 and {row["rank_status"] for row in found} == {"ranked"}
    assert [row["label_mass"] for row in found] == pytest.approx([0.95] * 120)
    assert (metrics["label_mass"], metrics["label_first"]) == (pytest.approx(0.95), 1.0)
    assert folder.read("run.json")["mllm"]["calls"] == 120


@pytest.mark.long
def test_a_budget_of_tokens_begins_no_shard_after_it_is_spent(lab: Lab, tmp_path: Path) -> None:
    """10 images of 43 tokens a shard: three shards spend it, those under way then are finished, and the rest is not begun."""
    with serving() as server:
        server.answer, server.tokenize = token_model(), tokenizer
        ranker = {"method": "endpoint", "model": "colours", "base_url": server.url, "token_budget": 1000}
        settings = lab.settings(ranker=ranker, route={"mode": "always"}, run={"shard_size": 10})
        with pytest.raises(UserError, match=r"token_budget 1,000 are spent: \d+ of 12 shards"):
            lab.run(settings, tmp_path / "run")
        done, _ = RunFolder(tmp_path / "run").progress()
        assert 30 <= done < 120
        settings = lab.settings(ranker={**ranker, "token_budget": None}, route={"mode": "always"}, run={"shard_size": 10})
        folder, _ = lab.run(settings, tmp_path / "run")
        asked = [body for _, _, body in server.seen if "logprob_token_ids" in body]
        assert len(rows(folder)) == 120 and len(asked) <= 120 + 2  # a probe's one each, and nothing is asked twice


def test_every_box_is_accounted_for(lab: Lab, tmp_path: Path) -> None:
    classes = str(lab.world / "scenes.json")
    settings = lab.settings(
        corpus={"uri": classes},
        memory={"name": "scenes", "support": None, "classes": classes},
        retriever={"mode": "text"},
        ranker={"method": "none"},
    )
    build.build_memory(lab.session, settings, fresh=False)
    folder, metrics = lab.run(settings, tmp_path / "detect", "detect")
    counts = folder.read("run.json")["counts"]
    assert counts["input"] == counts["ok"] > 10 and counts["failed"] == 0
    assert 0 < metrics["ap"] <= 1 and metrics["top1"] > 0.2
    detections = pa.array(folder.read("detections.json"))
    assert len(detections) == 5 * counts["ok"]


def test_shards_without_boxes_are_done_and_boxes_that_stand_twice_keep_their_labels(lab: Lab, tmp_path: Path) -> None:
    truth = json.loads((lab.world / "scenes.json").read_text())
    picture = next(one for one in truth["images"] if one["id"] == truth["annotations"][0]["image_id"])
    first = truth["annotations"][0]
    other = next(one["id"] for one in truth["categories"] if one["id"] != first["category_id"])
    images = [{**picture, "id": number} for number in (11, 12, 13, 14)]
    images.append({**picture, "id": 15, "width": 7 * picture["width"]})  # of no such size: one error, whatever its boxes
    boxes = [(12, first["category_id"]), (12, other), (14, first["category_id"]), (15, other), (15, other)]
    annotations = [{**first, "id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(boxes, start=1)]
    file = lab.world / "twice.json"
    file.write_text(json.dumps({**truth, "images": images, "annotations": annotations}))
    classes = str(lab.world / "scenes.json")
    memory = {"name": "scenes", "support": None, "classes": classes}
    sections = {"memory": memory, "retriever": {"mode": "text"}, "ranker": {"method": "none"}}
    settings = lab.settings(**sections, corpus={"uri": str(file)}, run={"shard_size": 1})
    build.build_memory(lab.session, settings, fresh=False)
    folder, metrics = lab.run(settings, tmp_path / "run", "detect")
    assert folder.read("run.json")["counts"] == {"input": 6, "ok": 3, "failed": 1, "skipped": 2}
    assert folder.pending(5) == [] and len(list((folder.path / "done").iterdir())) == 5
    (error,) = folder.errors().to_pylist()
    assert (error["row"], error["place"], error["stage"]) == (4, None, "crop")
    assert f"a picture of {7 * picture['width']} x" in error["error"] and "2 boxes" in error["error"]
    found = sorted(folder.predictions().to_pylist(), key=lambda row: (row["row"], row["place"]))
    assert [(row["row"], row["place"]) for row in found] == [(1, 0), (1, 1), (3, 0)]
    names = {one["id"]: one["name"] for one in truth["categories"]}
    right = [row["class_name"] == names[category] for row, (_, category) in zip(found, boxes[:3], strict=True)]
    run = read_run(folder.path)
    assert metrics["top1"] == pytest.approx(np.mean(right)) == pytest.approx(run.found.correct.mean())
    assert metrics["duplicates"] == 2 and {one["image_id"] for one in folder.read("detections.json")} == {12, 14}


@pytest.mark.long
def test_a_detector_proposes_and_a_killed_run_keeps_its_boxes(lab: Lab, tmp_path: Path) -> None:
    from tests.crops.test_detector import save_owlv2  # workers import this module: torch would cost each of them seconds

    """A folder of pictures, one of them broken, through a detector of random weights: no truth, so counts and boxes alone."""
    shutil.copytree(lab.world / "scenes", tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    detector = {"model": str(save_owlv2(tmp_path / "owlv2")), "threshold": 0.0}
    settings = lab.settings(
        corpus={"uri": str(tmp_path / "pictures")},
        detect={"detector": detector, "max_boxes": 3},
        route={"mode": "always"},
        ranker={"method": "none"},
        run={"shard_size": 2},
    )
    folder, metrics = lab.run(settings, tmp_path / "run", "detect")
    counts = folder.read("run.json")["counts"]
    assert counts == {"input": 13, "ok": 12, "failed": 1, "skipped": 0}
    assert folder.errors()["uri"].to_pylist() == [str(tmp_path / "pictures" / "broken.jpg")]
    assert metrics.keys() == {"mean_k", "duplicates"}
    first, kept = rows(folder), {path: path.stat().st_mtime_ns for path in (folder.path / "proposals").iterdir()}
    folder._unmark("000000")
    folder, _ = lab.run(settings, tmp_path / "run", "detect")
    assert rows(folder) == first
    assert {path: path.stat().st_mtime_ns for path in (folder.path / "proposals").iterdir()} == kept


def test_building_twice_changes_nothing(lab: Lab) -> None:
    entries = collection(lab.settings(), lab.session.memory_address, "images").fetch()
    build.build_memory(lab.session, lab.settings(), fresh=False)
    again = collection(lab.settings(), lab.session.memory_address, "images").fetch()
    assert again.entry_ids == entries.entry_ids
    np.testing.assert_array_equal(again.vectors, entries.vectors)


@pytest.mark.long
def test_coverage_shortens_the_lists(lab: Lab, tmp_path: Path) -> None:
    folder, _ = lab.run(lab.settings(corpus={"limit": 40}, route={"coverage": 0.6}), tmp_path / "run")
    asked = [row for row in rows(folder) if row["rank_status"] == "ranked"]
    assert asked and folder.read("calibration.json")["least_probability"] > 0
    assert folder.stats()["mllm.candidates"] < 5 * len(asked)


@pytest.mark.long
def test_exemplars_are_shown_beside_their_names(
    lab: Lab, tmp_path: Path, classified: tuple[RunFolder, dict[str, float]]
) -> None:
    settings = lab.settings(corpus={"limit": 8}, ranker={"exemplars": 1}, route={"mode": "always"})
    folder, _ = lab.run(settings, tmp_path / "run")
    assert [row["rank_status"] for row in rows(folder)] == ["ranked"] * 8
    plain, shown = classified[0].stats(), folder.stats()
    tokens = [stats["mllm.prompt_tokens"] / stats["mllm.calls"] for stats in (plain, shown)]
    assert tokens[1] > 2 * tokens[0], "five pictures more are read with each question"


@pytest.mark.long
def test_a_memory_of_other_templates_is_refused(lab: Lab) -> None:
    settings = lab.settings(encoder={"templates": ["{}"]})
    with pytest.raises(UserError, match="rebuild it"):
        open_memory(lab.session, settings)


def test_a_memory_that_was_never_built_is_refused(lab: Lab) -> None:
    with pytest.raises(UserError, match="rar memory"):
        open_memory(lab.session, lab.settings(memory={"name": "other"}))


@pytest.mark.long
def test_an_unknown_ranker_is_one_line(lab: Lab) -> None:
    with pytest.raises(UserError, match="nobody/nothing") as caught:
        recognise.prepare(lab.session, lab.settings(ranker={"model": "nobody/nothing"}))
    assert "\n" not in str(caught.value)


def test_shots_are_nested_and_seeded(lab: Lab) -> None:
    def drawn(shots: int, seed: int) -> set[str]:
        return set(build.plan(lab.settings(memory={"shots": shots}, run={"seed": seed})).support["uri"].to_pylist())

    assert len(drawn(1, 0)) == 120 and drawn(1, 0) < drawn(2, 0)
    assert drawn(1, 0) != drawn(1, 1)


def test_a_stage_failure_is_not_swallowed(ray_session: Session) -> None:
    def broken(table: pa.Table) -> pa.Table:
        raise ZeroDivisionError("stage")

    shards = pipeline.shards_of(pa.table({"row": [1, 2]}), np.array([0, 1, 2]))
    with pytest.raises(Exception, match="stage"):
        pipeline.collect(pipeline.through(shards, "broken", broken))


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 6))
def test_shards_hold_every_item_once_and_no_more_rows_than_they_may(weights: list[int], size: int) -> None:
    bounds = pipeline.cut(np.array(weights, np.int64), size).tolist()
    parts = [weights[a:b] for a, b in itertools.pairwise(bounds)]
    assert [weight for part in parts for weight in part] == weights and all(parts)
    for part in parts:
        assert len(part) == 1 or sum(max(weight, 1) for weight in part) <= size


def test_items_of_one_row_are_cut_evenly() -> None:
    assert pipeline.evenly(pa.table({"row": range(7)}), 3).tolist() == [0, 3, 6, 7]
    assert pipeline.evenly(pa.table({"row": []}), 3).tolist() == [0]
