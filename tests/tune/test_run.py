"""The whole command as a user types it: two workers, a killed driver, a second start, what it leaves. Most of it is slow."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rar import config
from rar.engine import session
from rar.run import build
from rar.tune.train import STATE
from tests.jobs.test_jobs import environment, rar

TUNE = {"max_steps": 12, "batch_size": 8, "check_every": 4, "judged": 30, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def birds(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose memory is built."""
    root = tmp_path_factory.mktemp("birds")
    data: dict[str, Any] = {
        "corpus": {"uri": str(world / "novel" / "test")},
        "memory": {"uri": str(root / "memory.milvus"), "support": {"uri": str(world / "novel" / "support")}},
        "tune": TUNE,
    }
    (root / "birds.yaml").write_text(yaml.safe_dump(data))
    assert rar("memory", root / "birds.yaml", "--out", root / "memory", cwd=root).returncode == 0
    return root / "birds.yaml"


def curve(folder: Path) -> list[float]:
    with (folder / "curves.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(birds: Path) -> Path:
    """A run that nobody disturbed."""
    out = birds.parent / "whole"
    done = rar(
        "tune", birds, "--out", out, "--set", "tune.lengths=[8]", "--export", "llava", "--export", "swift", cwd=birds.parent
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_what_a_tuning_leaves(birds: Path, whole: Path) -> None:
    values, card = (json.loads((whole / name).read_text()) for name in ("metrics.json", "data_card.json"))
    for when in ("before", "after"):
        for name in ("seen", "novel"):
            for metric in ("conditional_rank_accuracy", "consistency", "label_mass", "rejection_auroc", "parse_failures"):
                assert f"{when}.{name}.{metric}" in values
            assert f"{when}.{name}.conditional_rank_accuracy.ci_low" in values
            assert f"{when}.{name}.conditional_rank_accuracy_at_8" in values
    assert card["counts"]["ok"] == sum(part["rows"] for part in card["splits"].values()) == 240
    info = json.loads((whole / "run.json").read_text())
    assert info["counts"]["input"] == 240 and info["verb"] == "tune" and "tune" in info["identity"]["code"]
    assert (whole / "adapter" / "adapter_config.json").exists() and {*(whole / "export").iterdir()} == {
        *(whole / "export" / name for name in ("llava.json", "swift.jsonl"))
    }
    page = (whole / "report.html").read_text()
    assert "Before and after" in page and page.count("<svg") == 2 and "<script" not in page
    assert len(curve(whole)) == 12
    again = rar("tune", birds, "--out", whole, "--set", "tune.lengths=[8]", cwd=birds.parent)
    assert again.returncode == 0 and "finished before" in again.stderr
    other = rar("tune", birds, "--out", whole, "--set", "tune.lora_rank=3", cwd=birds.parent)
    assert other.returncode == 2 and re.search("tune.lora_rank was 32, is 3", other.stderr)
    asked = ("--set", f"ranker.adapter={whole / 'adapter'}", "--set", "route.mode=always", "--out", birds.parent / "served")
    served = rar("classify", birds, *asked, cwd=birds.parent)
    assert served.returncode == 0, served.stderr
    assert json.loads((birds.parent / "served" / "run.json").read_text())["identity"]["weights"]["adapter"]


@pytest.mark.slow
def test_a_killed_tuning_goes_on_as_if_nothing_had_been(birds: Path, whole: Path) -> None:
    out = birds.parent / "killed"
    command = [sys.executable, "-m", "jobs.cli", "tune", str(birds), "--out", str(out), "--set", "tune.lengths=[8]"]
    process = subprocess.Popen(command, cwd=birds.parent, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if (out / "train" / "checkpoint-4" / STATE).exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "curves.csv").exists()
    done = rar("tune", birds, "--out", out, "--set", "tune.lengths=[8]", cwd=birds.parent)
    assert done.returncode == 0, done.stderr
    assert curve(out) == pytest.approx(curve(whole), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["ranker.method=first", "tune.anchor=1"]])
def test_two_workers_are_one_of_twice_the_batch(birds: Path, whole: Path, tmp_path: Path, more: list[str]) -> None:
    from rar.tune import fit

    with session.opened() as opened:
        for workers in (1, 2):
            settings, out = config.load(birds, [f"tune.workers={workers}", *more]), tmp_path / str(workers)
            out.mkdir()
            fit.fit(opened, settings, whole / "data" / "rows.parquet", out / "train", out / "adapter")
    assert curve(tmp_path / "2") == pytest.approx(curve(tmp_path / "1"), abs=1e-4)
    assert more or curve(tmp_path / "1") == pytest.approx(curve(whole), abs=1e-4)


def test_a_dry_run_touches_nothing(world: Path, tmp_path: Path) -> None:
    from rar.tune import run

    support = {"uri": str(world / "novel" / "support")}
    settings = config.validated(config.Config, {"memory": {"support": support}, "tune": TUNE})
    assert build.plan(settings).support.num_rows == 240
    said = run.dry_run(settings, tmp_path / "out")
    assert "240 labelled pictures" in said and "12 steps of 8 lists" in said and not (tmp_path / "out").exists()
