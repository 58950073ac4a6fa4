"""What a run loses where a process that it stands on is killed in the middle: nothing. In the session that tests share.

Not covered here: whole commands, drivers, nodes, stores, disks (`rar bench faults`, and tests marked slow).
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from rar.bench import faults
from rar.config import Config
from rar.runfolder import RunFolder
from tests.run.lab import Lab


def settings(lab: Lab) -> Config:
    return lab.settings(corpus={"limit": 48}, run={"shard_size": 4}, ranker={"batch_size": 4}, route={"mode": "always"})


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return lab.run(settings(lab), tmp_path_factory.mktemp("runs") / "whole")[0].predictions()


LONG = [pytest.param(named, marks=pytest.mark.long) for named in (faults.DESK, faults.REPLICA)]


@pytest.mark.parametrize("named", [faults.WORKER, faults.ENCODER, *LONG])
def test_a_run_goes_on_where_a_process_is_killed(named: str, lab: Lab, whole: pa.Table, tmp_path: Path) -> None:
    folder, until = RunFolder(tmp_path / "run"), time.monotonic() + 120
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lab.run, settings(lab), folder.path)
        while not list((folder.path / "done").glob("part-*")):
            assert not running.done() and time.monotonic() < until
            time.sleep(0.01)
        faults.kill_one(named, random.Random(0))
        assert not running.done(), "the kill came too late to show anything"
        running.result(timeout=240)
    assert folder.progress() == (48, 0) and folder.predictions().equals(whole)
