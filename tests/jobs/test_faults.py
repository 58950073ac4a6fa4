"""Whole commands with models that fail, and on a GPU that two models share: exit codes, rows, and nothing that waits for ever.

The models are real ones with a fault (tests.engine.fussy), put in the place of the command's own. Not covered: real GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rar.runfolder import RunFolder
from tests.conftest import ROOT
from tests.engine.fussy import BLUE, GREEN, RED
from tests.jobs.test_jobs import environment, one_line, rar, write_config

FUSSY = """
from rar.engine import client, models
from tests.engine import fussy
models.Embed, models.Propose, client.RankerReplica = fussy.FussyEmbed, fussy.FussyPropose, fussy.FussyReplica
from jobs.cli import main
main()
"""
ONE_GPU = """
import threading
import time
import ray
ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
least = [1.0]
def watch():
    while ray.is_initialized():
        least[0] = min(least[0], ray.available_resources().get("GPU", 0.0))
        time.sleep(0.2)
threading.Thread(target=watch, daemon=True).start()
from jobs.cli import main
try:
    main()
finally:
    print("least free:", least[0])
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    there = {name: value for name, value in environment().items() if name != "CUDA_VISIBLE_DEVICES"}  # Ray believes it
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=there, timeout=300)


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a memory of three classes, `config.yaml` over nine flat pictures, and that picture set."""
    folder = tmp_path_factory.mktemp("faults")
    for name in sorted(os.listdir(world / "novel" / "support"))[:3]:
        shutil.copytree(world / "novel" / "support" / name, folder / "support" / name)
    photos = folder / "photos"
    photos.mkdir()
    for number in range(6):
        Image.new("RGB", (40, 30), (number * 40, 90, 20)).save(photos / f"good{number}.png")
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        Image.new("RGB", (40, 30), colour).save(photos / f"{name}.png")
    memory = {"support": {"uri": str(folder / "support")}}
    sections = {"corpus": {"uri": str(photos)}, "memory": memory, "route": {"mode": "always"}, "retriever": {"top_k": 3}}
    file = write_config(folder, world, **sections)
    assert rar("memory", file, "--out", folder / "memory", cwd=folder).returncode == 0
    return folder


@pytest.mark.long
def test_a_command_whose_models_raise_on_a_picture_ends_with_exactly_that_row_failed(small: Path) -> None:
    """Encoder (red) and ranker (blue): exit 3 where one row of nine is too many, 0 where it is not."""
    ended = run(FUSSY, "classify", small / "config.yaml", "--out", small / "run")
    assert ended.returncode == 3 and "11.1% of the rows failed" in one_line(ended)
    folder = RunFolder(small / "run")
    (failed,) = folder.errors().to_pylist()
    assert (Path(failed["uri"]).name, failed["stage"], failed["error"]) == ("red.png", "embed", "ValueError: red is no colour")
    found = {Path(row["uri"]).name: (row["rank_status"], row["response"]) for row in folder.predictions().to_pylist()}
    assert found.pop("blue.png") == ("fallback", "[ValueError: blue is no colour]")
    assert len(found) == 7 and {status for status, _ in found.values()} == {"ranked"}
    assert json.loads((small / "run" / "run.json").read_text())["counts"] == {"input": 9, "ok": 8, "failed": 1, "skipped": 0}
    allowed = ("--set", "run.max_failed_fraction=0.2")
    again = rar("classify", small / "config.yaml", "--out", small / "run", *allowed, cwd=small)
    assert (again.returncode, "holds this run" in again.stderr) == (0, True)


@pytest.mark.long
def test_a_command_whose_detector_raises_on_a_picture_ends_with_exactly_that_row_failed(small: Path) -> None:
    from tests.crops.test_detector import save_owlv2

    detector = {"model": str(save_owlv2(small / "owl")), "threshold": 0.0}
    sets = [f"detect.detector={json.dumps(detector)}", "ranker.method=none", "detect.max_boxes=2", "run.max_failed_fraction=1"]
    options = [part for one in sets for part in ("--set", one)]
    ended = run(FUSSY, "detect", small / "config.yaml", "--out", small / "boxes", *options)
    assert ended.returncode == 0, ended.stderr
    folder = RunFolder(small / "boxes")
    failed = {(Path(row["uri"]).name, row["stage"]) for row in folder.errors().to_pylist()}
    assert ("green.png", "detect") in failed and failed <= {("green.png", "detect"), ("red.png", "embed")}
    assert {Path(row["uri"]).name for row in folder.predictions().to_pylist()} >= {f"good{number}.png" for number in range(6)}
    counts = folder.read("run.json")["counts"]
    assert counts["ok"] + counts["failed"] + counts["skipped"] == counts["input"]


@pytest.mark.long
def test_encoder_and_ranker_share_one_gpu_or_are_refused(small: Path) -> None:
    """A GPU that Ray counts and nobody has; both models are told to compute on the CPU."""
    half = ("--set", "encoder.num_gpus=0.5", "--set", "encoder.device=cpu", "--set", "ranker.device=cpu")
    shared = run(ONE_GPU, "classify", small / "config.yaml", "--out", small / "shared", *half, "--set", "ranker.num_gpus=0.5")
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.splitlines()[-1] == "least free: 0.0"
    assert RunFolder(small / "shared").read("run.json")["counts"]["ok"] == 9
    refused = run(ONE_GPU, "classify", small / "config.yaml", "--out", small / "refused", *half, "--set", "ranker.num_gpus=1")
    assert refused.returncode == 2
    assert "want 1.5 GPUs (encoder 0.5, ranker 1) and the cluster has 1" in one_line(refused)
