"""Recorded answers as run folders, held against the bench that reads the same records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rar.bench import replay as bench
from rar.runfolder import RunFolder
from rar.schema import UserError
from rar.sweep import grid, replay, sources
from tests.conftest import SHARED_DATA, needs_shared_data


@pytest.mark.long
@needs_shared_data
def test_cells_of_recorded_answers_agree_with_the_bench(tmp_path: Path) -> None:
    made = grid.load("recorded")
    data = SHARED_DATA / "gpt4v_rankings" / "aircraft.json"
    dataset = made.datasets["aircraft"].model_copy(update={"recorded": str(data)})
    source = sources.prepare("aircraft", dataset, tmp_path / "data", made.seeds)
    expected = bench.run(SHARED_DATA, seeds=1)["sets"]["aircraft"]
    values = {}
    for arm in ("retriever", "rar"):
        cell = grid.Cell("aircraft", 0, 0, "", arm, 5)
        settings = grid.settings_of(made, cell, source(0))
        values[arm] = replay.run(tmp_path / arm, (arm, "test"), data, settings)
    assert values["retriever"]["top1"] == pytest.approx(expected["retriever"])
    assert values["rar"]["top1"] == pytest.approx(expected["routed"])
    assert values["rar"]["ranked_fraction"] == pytest.approx(expected["ranked_fraction"])
    run = RunFolder(tmp_path / "rar")
    assert run.finished and len(run.predictions()) == run.read("run.json")["counts"]["ok"] == 2666


@needs_shared_data
def test_a_set_without_candidates_has_the_mllm_alone(tmp_path: Path) -> None:
    made = grid.load("recorded")
    data = SHARED_DATA / "gpt4v_rankings" / "dtd.json"
    source = sources.prepare("dtd", made.datasets["dtd"].model_copy(update={"recorded": str(data)}), tmp_path, [0])
    alone = grid.settings_of(made, grid.Cell("dtd", 0, 0, "", "mllm_only", 5), source(0))
    assert replay.run(tmp_path / "alone", ("mllm_only", "test"), data, alone)["top1"] == pytest.approx(0.58, abs=0.02)
    with pytest.raises(UserError, match="no recorded candidates"):
        other = grid.settings_of(made, grid.Cell("dtd", 0, 0, "", "rar", 5), source(0))
        replay.run(tmp_path / "other", ("rar", "test"), data, other)


def test_recorded_embeddings_are_split_by_class_and_seed(tmp_path: Path) -> None:
    rng, class_ids = np.random.default_rng(0), np.repeat(np.arange(5), 6)
    np.savez(tmp_path / "set.npz", embeddings=rng.normal(size=(30, 8)).astype(np.float32), class_id=class_ids)
    (tmp_path / "classes.json").write_text('[{"class_id": 0, "class_name": "zero"}]')
    seen = []
    for seed in (0, 1):
        sources.split(tmp_path / "set.npz", tmp_path / f"out-{seed}", seed)
        parts = {part: np.load(tmp_path / f"out-{seed}" / f"{part}.npz") for part in ("support", "test")}
        assert {name: len(part["label"]) for name, part in parts.items()} == {"support": 20, "test": 10}
        ids = [set(part["ids"].tolist()) for part in parts.values()]
        assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 30
        assert sorted(set(parts["test"]["label"].tolist())) == ["class 1", "class 2", "class 3", "class 4", "zero"]
        seen.append(ids[1])
    assert seen[0] != seen[1]


def test_a_world_is_drawn_once_and_its_difficulty_changes_the_photos_alone(tmp_path: Path) -> None:
    plain = grid.World(classes=3, support=2, tests=2)
    piece = sources.draw(plain, tmp_path / "plain")
    files = sorted((tmp_path / "plain").rglob("*.png"))
    assert len(files) == 3 * (2 + 2)
    rows = (tmp_path / "plain" / "test.csv").read_text().splitlines()[1:]
    names = (tmp_path / "plain" / "classes.txt").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[:3]] == names  # once round the classes
    times = [file.stat().st_mtime_ns for file in files]
    assert sources.draw(plain, tmp_path / "plain") == piece
    assert [file.stat().st_mtime_ns for file in files] == times
    sources.draw(plain.model_copy(update={"noise": 0.2}), tmp_path / "noisy")
    assert (tmp_path / "noisy" / "classes.txt").read_text().splitlines() == names
    assert (tmp_path / "noisy" / "test" / "000-000.png").read_bytes() != (
        tmp_path / "plain" / "test" / "000-000.png"
    ).read_bytes()
