"""Several raylets on this machine, joined as a job joins a cluster: what is wanted and not there, and a node that dies.

Not covered: nodes on several machines, real GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from rar import config
from rar.engine import placement
from rar.engine.session import Session
from rar.runfolder import RunFolder
from rar.schema import UserError
from tests.jobs.test_jobs import environment, one_line, write_config


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        (
            {"encoder": {"num_gpus": 0.5}, "ranker": {"num_gpus": 1}},
            "want 1.5 GPUs (encoder 0.5, ranker 1) and the cluster has 0",
        ),
        ({"encoder": {"workers": 90}}, r"want 92 CPUs (encoder 90, ranker 1, tasks 1) and the cluster has"),
    ],
)
def test_what_the_cluster_lacks_is_said_before_anything_starts(
    ray_session: Session, sections: dict[str, dict[str, float]], wanted: str
) -> None:
    joined = Session(None, threads=None)
    with pytest.raises(UserError) as caught:
        placement.check(joined, config.validated(config.Config, sections, []), ranks=True, detects=False)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    placement.check(joined, config.validated(config.Config, {"ranker": {"method": "none"}}, []), ranks=True, detects=False)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of three."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=3)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_the_rankers_node_dies_and_the_run_ends_whole(cluster: Cluster, world: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, world, memory={"shots": 1}, route={"mode": "always"})
    joined = {**environment(), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "jobs.cli"]
    built = subprocess.run(
        [*command, "memory", str(file), "--out", str(tmp_path / "m")], env=joined, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    refused = subprocess.run(
        [*command, "classify", str(file), "--out", str(tmp_path / "n"), "--set", "ranker.num_gpus=1"],
        env=joined,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert refused.returncode == 2 and "the cluster has 0" in one_line(refused)
    folder = RunFolder(tmp_path / "run")
    started = [*command, "classify", str(file), "--out", str(folder.path)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(started, env=joined, stderr=log, text=True) as running:
        until = time.monotonic() + 300
        while not list((folder.path / "done").glob("part-*")):
            assert running.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.05)
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        replica = next(
            actor for actor in ray._private.state.actors().values() if "ranker" in actor["Name"] and actor["State"] == "ALIVE"
        )
        home = next(node for node in cluster.list_all_nodes() if node.node_id == replica["Address"]["NodeID"])
        cluster.remove_node(home, allow_graceful=False)
        assert running.wait(300) == 0, (tmp_path / "log").read_text()
    assert folder.progress() == (120, 0)
    statuses = folder.predictions()["rank_status"].to_pylist()
    assert set(statuses) == {"ranked"}, "a row fell back while its replica was away"
    ray.shutdown()
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    left = [actor["Name"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    assert not [name for name in left if "ranker" in name], "the application outlived its job"
    assert os.getpid() != running.pid
