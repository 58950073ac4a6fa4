"""The command as a user types it: wrong inputs (in this process), real processes, a killed driver. Slow parts start Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.demo import ARMS, settings_of, table
from rar import config
from rar.engine import session
from rar.engine.session import Session
from rar.memory import store
from rar.run import build, recognise
from rar.run.work import classify_work
from rar.runfolder import RunFolder
from tests.conftest import ROOT


def rar(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=300)


def typed(*arguments: object) -> Result:
    """The command in this process: what it says and its exit code, without five seconds of imports."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def environment() -> dict[str, str]:
    root = str(ROOT)
    return {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}


def write_config(folder: Path, world: Path, **sections: Any) -> Path:
    data: dict[str, Any] = {
        "corpus": {"uri": str(world / "novel" / "test")},
        "memory": {"uri": str(folder / "memory.milvus"), "support": {"uri": str(world / "novel" / "support")}},
        "ranker": {"batch_size": 4},
        "run": {"shard_size": 4},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def one_line(result: Result | subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("rar:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("verb", "sections", "wanted"),
    [
        ("classify", {"retriever": {"topk": 3}}, "did you mean 'retriever.top_k'"),
        ("classify", {"corpus": {"uri": "no/such/folder"}}, "no/such/folder"),
        ("classify", {"retriever": {"top_k": 30}}, "has 26 labels, too few for retriever.top_k 30"),
        ("classify", {"ranker": {"model": "./no_such_folder"}}, "ranker.model './no_such_folder' is no folder"),
        ("detect", {"detect": {"detector": {"model": "a/b/c"}}}, "detect.detector.model 'a/b/c' is no folder"),
        ("classify", {"ranker": {"model": "."}}, "ranker.model '.' is a folder without a model: it has no config.json"),
        ("classify", {"encoder": {"model": "."}}, "encoder.model: folder . has neither open_clip_config.json"),
        ("classify", {}, "rar memory"),  # no memory was built
        ("memory", {"memory": {"support": None}}, "memory needs"),
        ("detect", {}, "JSON"),
        ("tune", {}, "rar memory"),  # no memory was built
        ("tune", {"ranker": {"method": "yes_no"}}, "letters, first, likelihood or generate, not yes_no"),
        ("tune", {"memory": {"support": None, "classes": ["a"]}}, "rar memory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    verb: str, sections: dict[str, Any], wanted: str, world: Path, tmp_path: Path
) -> None:
    file = write_config(tmp_path, world, **sections)
    result = typed(verb, file, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert wanted in one_line(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_folder_without_images_is_a_mistake(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = write_config(tmp_path, world, corpus={"uri": str(tmp_path / "empty")})
    result = typed("classify", file, "--out", tmp_path / "run")
    assert result.exit_code == 2 and "no image" in one_line(result)


def test_a_missing_config_is_a_mistake(tmp_path: Path) -> None:
    result = rar("classify", "nowhere.yaml", cwd=tmp_path)
    assert result.returncode == 2 and "nowhere.yaml" in one_line(result)


@pytest.mark.slow
def test_an_unknown_encoder_leaves_no_memory(world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, world, encoder={"model": "ViT-B-16/nobody"})
    result = rar("memory", file, "--out", tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 2 and "nobody" in one_line(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_an_unreachable_milvus_exits_with_1(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REACH_SECONDS", 1.0)
    file = write_config(tmp_path, world, memory={"uri": "http://127.0.0.1:9"})
    result = typed("classify", file, "--out", tmp_path / "run")
    assert result.exit_code == 1 and "127.0.0.1:9" in one_line(result)


def test_a_dry_run_touches_nothing(world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, world)
    for verb in ("memory", "classify"):
        result = typed(verb, file, "--dry-run", "--out", tmp_path / "run")
        assert result.exit_code == 0, result.stderr
        assert "120" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_dry_run_refuses_an_index_that_nothing_would_search(world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, world, memory={"index": {"kind": "HNSW"}})
    assert typed("memory", file, "--dry-run", "--set", "retriever.mode=knn").exit_code == 0
    result = typed("memory", file, "--dry-run")
    assert result.exit_code == 2
    assert "HNSW is of no use to retriever.mode fused" in [*result.stderr.splitlines()][-1]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_predictions(world: Path, ray_session: Session, tmp_path: Path) -> None:
    file = write_config(tmp_path, world, corpus={"limit": 60}, memory={"shots": 1})
    settings = config.load(file)
    with session.opened(settings.memory, create=True) as opened:
        build.build_memory(opened, settings, fresh=False)
    killed = RunFolder(tmp_path / "killed")
    arguments = [sys.executable, "-m", "jobs.cli", "classify", str(file), "--out", str(killed.path)]
    for before, notice in enumerate((signal.SIGTERM, signal.SIGKILL)):  # a preempted node, and one that is gone
        with subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 300
            while len(list((killed.path / "predictions").glob("part-*.parquet"))) <= 3 * before:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(notice)
            told = process.communicate()[1]
        assert process.returncode == (1 if notice == signal.SIGTERM else -9), told
        assert ("rar: interrupted; the same command with --resume" in told) == (notice == signal.SIGTERM)
    time.sleep(2)  # its workers notice that they are orphans
    done = {file: file.stat().st_mtime_ns for file in (killed.path / "predictions").glob("part-*.parquet")}
    assert 0 < len(done) < 15, "the kill came too late to show anything"
    assert rar("classify", file, "--out", killed.path, cwd=tmp_path).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    with session.opened(settings.memory) as opened:  # never interrupted
        vocabulary = recognise.prepare(opened, settings)
        whole = RunFolder.open(tmp_path / "whole", "classify", settings, fresh=False, name="whole", group="classify")
        recognise.run(opened, settings, vocabulary, classify_work(settings), whole)
    by_uri = [sorted(run.predictions().to_pylist(), key=lambda row: row["uri"]) for run in (killed, whole)]
    assert by_uri[0] == by_uri[1] and len(by_uri[0]) == 60
    assert (killed.path / "report.html").is_file() and (killed.path / "metrics.json").is_file()
    page = tmp_path / "both.html"
    assert rar("report", killed.path, whole.path, "--out", page, cwd=tmp_path).returncode == 0 and page.is_file()


def test_arms_are_valid_configs(tmp_path: Path) -> None:
    for arm in ARMS:
        for task in ("novel", "seen", "scenes"):
            assert settings_of(tmp_path, 0, task, arm).retriever.top_k == 5


def test_the_table_has_a_row_an_arm() -> None:
    keys = ("top1", "top1.ci_low", "top1.ci_high", "ranked_fraction")
    metrics = {f"classify.{group}.{arm}.{key}": 0.5 for group in ("novel", "seen") for arm in ARMS for key in keys}
    metrics |= {f"detect.{arm}.{key}": 0.25 for arm in ARMS for key in ("ap", "ap_rare")}
    lines = table(metrics).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ARMS)
    assert all("0.500 [0.500, 0.500]" in line and "0.250" in line for line in lines[1:])


@pytest.mark.slow
def test_the_demo_writes_the_contract(tmp_path: Path) -> None:
    result = rar("demo", "--out", tmp_path / "demo", "--tests", 1, "--scenes", 6, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    for arm in ARMS:
        wanted = [f"classify.{arm}.top1", f"classify.novel.{arm}.top1", f"classify.seen.{arm}.top1"]
        wanted += [f"detect.{arm}.{key}" for key in ("ap", "ap_rare", "ap_common", "ap_frequent")]
        assert all(key in metrics for key in wanted)
    assert {"classify.rar.ranked_fraction", "classify.rar.parse_failures", "images", "seconds"} <= metrics.keys()
