"""A small grid end to end: stopped, resumed and extended, it computes only what is missing, and the tables are the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rar import config
from rar.engine.session import Session
from rar.run.shared import Computed
from rar.runfolder import RunFolder
from rar.sweep import grid, state, tables
from rar.sweep import run as sweeping
from tests.conftest import ROOT

DATA: dict[str, Any] = {
    "base": {"run": {"shard_size": 8}, "ranker": {"batch_size": 16}, "route": {"max_calibration_images": 24}},
    "datasets": {
        "drawn": {"miniature": {"classes": 6, "support": 4, "tests": 2}},
        "gone": {
            "config": {"corpus": {"uri": "no/such/folder"}, "memory": {"support": {"uri": "no/such/folder"}}},
            "shots": [2],
        },
    },
    "shots": [1, 2],
    "seeds": [0],
    "arms": {
        "text": {"per_shots": False, "config": {"retriever": {"mode": "text"}, "ranker": {"method": "none"}}},
        "retriever": {"config": {"ranker": {"method": "none"}}},
        "rar": {"config": {"route": {"mode": "always"}}},
    },
    "ours": "rar",
    "retriever": "retriever",
}


def swept(
    out: Path, limit: int | None, tell: Callable[[str], None] = lambda line: None, budget: int | None = None, **changes: Any
) -> state.Sweep:
    """What `rar sweep` does, in the tests' Ray."""
    made = config.validated(grid.Grid, {**DATA, **changes})
    sweep, every = state.open_sweep(made, out)
    done = set(state.finished(sweep, every))
    pending = [cell for cell in every if cell not in done and cell.name not in sweep.failed]
    sweeping.run(sweep, every, pending[:limit], budget, tell, lambda: tables.write(sweep, every))
    tables.write(sweep, every)
    return sweep


def written(out: Path) -> list[str]:
    return [(out / f"leaderboard.{suffix}").read_text() for suffix in ("csv", "md", "tex")]


@pytest.mark.slow
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(ray_session: Session, tmp_path: Path) -> None:
    whole = swept(tmp_path / "whole", None)
    assert len(whole.done) == 5 and len(whole.failed) == 3
    assert all(name.startswith("gone-") and "no/such/folder" in reason for name, reason in whole.failed.items())
    first = swept(tmp_path / "parts", 2)
    assert len(first.done) == 2
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("part-*.parquet")}
    said: list[str] = []
    second = swept(tmp_path / "parts", None, said.append)
    assert len(second.done) == 5 and len([line for line in said if "FAILED" not in line]) == 3
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was computed again
    assert written(tmp_path / "whole") == written(tmp_path / "parts")
    runs = list((tmp_path / "parts" / "shared" / "embeddings").glob("*/run.json"))
    embedded = {run.parent.name.split("-")[1]: json.loads(run.read_text())["stages"]["embed.rows"] for run in runs}
    assert embedded == {"test": 12, "support": 12, "names": 6}  # each picture and each name once, over all cells
    told = json.loads((tmp_path / "parts" / "sweep.json").read_text())
    assert (len(told["done"]), len(told["failed"]), told["left"]) == (5, 3, {})
    assert "drawn" in (tmp_path / "parts" / "report.html").read_text()
    again = swept(tmp_path / "parts", None, said.append, shots=[1, 2, 4], seeds=[0, 1])
    assert len(again.done) == 1 + 3 * 2 * 2
    support = next((tmp_path / "parts" / "shared" / "embeddings").glob("drawn-support-*"))
    assert Computed(support).stages()["embed.rows"] == len(set(Computed(support).rows()["row"].to_pylist())) == 24


@pytest.mark.slow
def test_a_cell_is_what_an_ordinary_run_gives(ray_session: Session, tmp_path: Path) -> None:
    """The oracle: memory and corpus embedded afresh by `rar memory` and `rar classify`, without anything shared."""
    from dataclasses import replace

    from rar.memory.store import open_store
    from rar.run import build, recognise
    from rar.run.work import classify_work

    sweep = swept(tmp_path / "sweep", None, datasets={"drawn": DATA["datasets"]["drawn"]}, shots=[2])
    for cell in grid.cells(sweep.grid):
        uri = str(tmp_path / f"{cell.name}.milvus")
        settings = grid.settings_of(sweep.grid, cell, sweep.sources[cell.dataset](cell.seed), uri)
        with open_store(settings.memory.uri) as address:
            opened = replace(ray_session, memory=address)
            build.build_memory(opened, settings, fresh=False)
            vocabulary = recognise.prepare(opened, settings)
            folder = RunFolder.open(tmp_path / cell.name, "classify", settings, fresh=False, name="oracle", group="test")
            recognise.run(opened, settings, vocabulary, classify_work(settings), folder)
        mine, plain = (one.predictions().sort_by("row") for one in (RunFolder(sweep.folder(cell)), folder))
        for column in ("row", "image_id", "uri", "ranking", "rank_status", "class_name"):
            assert mine[column].to_pylist() == plain[column].to_pylist(), (cell.name, column)
        names = [[[one["class_name"] for one in row] for row in table["candidates"].to_pylist()] for table in (mine, plain)]
        assert names[0] == names[1]


ARMS: dict[str, Any] = {
    **DATA["arms"],
    "routed": {"config": {}},
    "each": {"config": {"ranker": {"permutations": 5}, "route": {"mode": "always"}}},
    "broken": {"config": {"retriever": {"mode": "all"}}},  # it has no candidates to fit the routing on
}


@pytest.mark.slow
def test_a_budget_holds_while_memories_are_worked_on_beside_each_other_and_a_broken_arm_stops_nobody(
    ray_session: Session, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"datasets": {"drawn": DATA["datasets"]["drawn"]}, "arms": ARMS, "parallel": 2}
    said: list[str] = []
    budget = 12 * 2 + 12 + 24  # the two cells of `rar`, and one of `routed` that calibrates; one of `each` alone may need 60
    first = swept(tmp_path, None, said.append, budget, **changes)
    made = {name: RunFolder(tmp_path / "cells" / name).read("run.json")["mllm"]["calls"] for name in first.done}
    assert 0 < sum(made.values()) <= first.calls <= budget
    assert set(first.left) >= {f"drawn-{shots}shot-seed0-each-k5" for shots in (1, 2)}
    assert all(reason.startswith("budget: it may make ") for reason in first.left.values())
    assert set(first.failed) <= {f"drawn-{shots}shot-seed0-broken-k5" for shots in (1, 2)}
    second = swept(tmp_path, None, said.append, **changes)
    assert len(second.done) == 1 + 2 * 4 and not second.left and len(second.failed) == 2
    assert all("needs a retriever that prefers some classes" in reason for reason in second.failed.values())
    assert all("Traceback" in (tmp_path / "failed" / f"{name}.txt").read_text() for name in second.failed)
    whole = {name: RunFolder(tmp_path / "cells" / name).read("run.json")["mllm"]["calls"] for name in second.done}
    assert {name: whole[name] for name in made} == made  # nothing was asked again
    each = [calls for name, calls in whole.items() if "-each-" in name]
    assert each == [12 * 5] * 2  # a call a rotation, as it was reckoned


@pytest.mark.slow
def test_a_sweep_that_was_killed_twice_ends_with_the_same_tables(ray_session: Session, tmp_path: Path) -> None:
    """SIGKILL to the command once so many shards are done, drawn at random; then the same command to its end."""
    data = {**DATA, "datasets": {"drawn": DATA["datasets"]["drawn"]}, "parallel": 2, "shots": [1, 2, 4]}
    file, out = tmp_path / "grid.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    swept(tmp_path / "whole", None, **{key: data[key] for key in ("datasets", "parallel", "shots")})
    shards = len(list((tmp_path / "whole" / "cells").glob("*/done/*.json")))
    seed = int(time.time())
    moments = sorted(random.Random(seed).sample(range(1, shards - 1), 2))
    command = [sys.executable, "-m", "jobs.cli", "sweep", str(file), "--out", str(out)]
    for moment in moments:
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while len(list((out / "cells").glob("*/done/*.json"))) < moment:
                assert process.poll() is None, f"ended by itself; seed {seed}"
                time.sleep(0.01)
            process.kill()
        time.sleep(5)  # its workers notice that they are orphans
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "whole") == written(out), f"seed {seed}"
    for kept in (out / "shared" / "embeddings").glob("*"):
        rows = Computed(kept).rows()["row"].to_pylist()
        assert len(rows) == len(set(rows)) == Computed(kept).stages()["embed.rows"], kept
