"""The presets planned over small trees in the real layouts: every data set is listed, and what lacks is named."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from rar.config import Corpus
from rar.corpus.datasets import named
from rar.engine.session import Session
from rar.sweep import grid, state, tables
from rar.sweep import run as sweeping
from tests.conftest import ROOT, needs_shared_data
from tests.corpus.datasets import trees

ON_DISK = {"paper-fewshot": 11, "paper-fgvr": 5, "paper-lvis": 1, "paper-v3det": 1}  # their data sets


def planned(name: str, out: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["sweep", name, "--dry-run", "--out", str(out), *more])
    assert done.exit_code == 0, done.stderr
    assert not out.exists()
    return done.stdout


def laid_out(name: str, root: Path, only: str = "") -> dict[str, trees.Made]:
    """The trees of a preset's data sets, and for guessed names a manifest of three pictures a class."""
    made = {}
    for dataset, one in grid.load(name).datasets.items():
        if only not in ("", dataset):
            continue
        made[dataset] = trees.make(str(one.config["corpus"]["dataset"]), root)
        if "{root}" in str(one.config.get("memory", "")):
            rows = [f"{number}.jpg,guess {number % 7}" for number in range(21)]
            trees.put(root / "guesses" / f"{dataset}.csv", "\n".join(["uri,label", *rows]))
            for number in range(21):
                trees.put(root / "guesses" / f"{number}.jpg", trees.picture(number))
    return made


def counted(said: str, what: str) -> dict[str, int]:
    return {name: int(count.replace(",", "")) for name, count in re.findall(rf"^  (\w+): ([\d,]+) {what}$", said, re.MULTILINE)}


@pytest.mark.parametrize("name", ON_DISK)
def test_a_preset_of_data_sets_by_name_is_planned_and_names_what_is_missing(name: str, tmp_path: Path) -> None:
    made, root, out = grid.load(name), tmp_path / "data", tmp_path / "out"
    disk = laid_out(name, root)
    said = planned(name, out, "--set", f"root={root}")
    boxed = name in ("paper-lvis", "paper-v3det")
    splits = {dataset: str(one.config["corpus"]["split"]) for dataset, one in made.datasets.items()}
    expected = {dataset: 1 if boxed else len(disk[dataset][split]) for dataset, split in splits.items()}
    assert len(made.datasets) == ON_DISK[name]
    assert counted(said, "boxes" if boxed else "test pictures") == expected and "is not there" not in said
    cells = grid.cells(made)
    assert f"would run {len(cells):,} cells" in said
    assert f"  {len(asked(made, cells)):,} cells ask the MLLM, in {questions(made, cells, expected):,} calls at most" in said
    first, split = next(iter(splits.items()))
    place = named.place_of(Corpus(dataset=first, root=str(root), split=split))
    file = Path(place.folder) / next(iter(place.files()))
    file.rename(tmp_path / "away")
    rest = planned(name, out, "--set", f"root={root}")
    (line,) = [one for one in rest.splitlines() if "is not there" in one]
    assert line.startswith(f"  {first} is not there, and its cells would fail: {file} is missing; get it from ")
    assert len(counted(rest, "boxes" if boxed else "test pictures")) == ON_DISK[name] - 1


def asked(made: grid.Grid, cells: list[grid.Cell]) -> list[grid.Cell]:
    return [cell for cell in cells if made.arms[cell.arm].config.get("ranker", {}).get("method") != "none"]


def questions(made: grid.Grid, cells: list[grid.Cell], rows: dict[str, int]) -> int:
    """A question a test picture, and with a memory of pictures, where it is fitted when to ask, those of the calibration."""
    fitted = {name for name, arm in made.arms.items() if arm.config.get("route", {}).get("mode") != "always"}
    most = grid.settings_of(made, cells[0], {"memory": {"classes": ["any"]}}).route.max_calibration_images
    return sum(rows[cell.dataset] + most * (cell.arm in fitted and cell.shots > 0) for cell in asked(made, cells))


def test_the_templates_of_a_preset_are_those_of_its_data_sets() -> None:
    for name in ("paper-fewshot", "paper-fgvr"):
        for one in grid.load(name).datasets.values():
            config: Any = one.config
            assert config["encoder"]["templates"] == config["corpus"]["dataset"] == one.published


@pytest.mark.parametrize(("name", "pictures"), [("miniature", [144, 144, 180]), ("ablations", [144, 144])])
def test_a_preset_of_drawn_worlds_is_planned_without_drawing(name: str, pictures: list[int], tmp_path: Path) -> None:
    said = planned(name, tmp_path / "out")
    assert list(counted(said, "test pictures").values()) == pictures and "is not there" not in said
    assert f"would run {len(grid.cells(grid.load(name))):,} cells" in said


@needs_shared_data
def test_the_recorded_preset_is_planned_over_the_recorded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = planned("recorded", tmp_path / "out")
    assert len(counted(said, "test pictures")) == len(grid.load("recorded").datasets) and "is not there" not in said
    assert counted(said, "test pictures")["aircraft"] == 2666 and "  0 cells ask the MLLM" in said


SMALL = ["base.encoder.model=miniature", "base.encoder.precision=fp32", "base.encoder.batch_size=64"]
SMALL += ["base.ranker.model=miniature", "base.ranker.precision=fp32", "base.ranker.num_gpus=0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dataset", "shots", "metric"),
    [
        ("paper-fewshot", "eurosat", 1, "top1"),
        ("paper-fgvr", "stanford_dogs", 3, "cluster_accuracy"),
        ("paper-lvis", "lvis", 0, "ap"),
        ("paper-v3det", "v3det", 0, "ap"),
    ],
)
def test_a_preset_runs_to_its_end_on_a_small_tree_with_the_miniature_models(
    name: str, dataset: str, shots: int, metric: str, ray_session: Session, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    laid_out(name, root, dataset)
    pictures = [file for file in sorted(root.rglob("*")) if file.suffix in (".jpg", ".JPEG") and "guesses" not in file.parts]
    for number, file in enumerate(pictures):  # as wide as the boxes in them say, and no two alike
        file.write_bytes(trees.picture(number))
    made = grid.load(name, [f"root={root}", f"shots=[{shots}]", "seeds=[0]", *SMALL])
    made = made.model_copy(update={"datasets": {dataset: made.datasets[dataset]}})
    sweep, every = state.open_sweep(made, tmp_path / "out")
    sweeping.run(sweep, every, every, None, print, lambda: None)
    tables.write(sweep, every)
    assert sweep.failed == {} and set(sweep.done) == {cell.name for cell in every} and len(every) >= 3
    rows = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert [row["metric"] for row in rows] == [metric] * len(every) and all(row["top1"] for row in rows)
