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
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from jobs.demo import settings_of
from rar import config, storage
from rar.engine import placement, reach
from rar.engine.session import Session
from rar.miniature.data import write_scene_support, write_world
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


def test_a_folder_that_nodes_do_not_share_is_told_before_anything_starts(ray_session: Session, tmp_path: Path) -> None:
    joined = Session(None, threads=None)
    reach.check(joined, tmp_path)
    assert list(tmp_path.iterdir()) == []
    alone = storage.place("memory://run")  # each process has its own
    with pytest.raises(UserError, match=r"is not the same place on node .*: what the driver writes is not seen; name one"):
        reach.check(joined, alone)
    assert list(alone.iterdir()) == []


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


DRIVER = """
import time
import ray
from ray import serve
from rar.engine import ending
from tests.engine.fussy import Answers
ray.init(log_to_driver=False)
serve.start(proxy_location="Disabled")
serve.run(serve.deployment(name="ranker")(Answers).bind(), name="answers", route_prefix=None)
ending.with_this_job("answers")
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_an_application_ends_with_a_driver_that_is_killed(cluster: Cluster) -> None:
    joined = {**environment(), "RAY_ADDRESS": cluster.address}
    with subprocess.Popen([sys.executable, "-c", DRIVER], env=joined, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and "up\n" in iter(driver.stdout.readline, "")
        driver.kill()
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    until = time.monotonic() + 60
    while "answers" in serve.status().applications:
        assert time.monotonic() < until, "the application outlived its job"
        time.sleep(0.5)


class Seen:
    """What a cluster's actors did while a command ran: nodes by kind of actor, and how many there were at once."""

    def __init__(self) -> None:
        self.nodes: dict[str, set[str]] = {"ModelActor": set(), "ServeReplica": set()}
        self.counts: dict[str, list[int]] = {"ModelActor": [], "ServeReplica": []}

    def look(self) -> None:
        alive = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
        for kind, counts in self.counts.items():
            found = [one["Address"]["NodeID"] for one in alive if kind in one["ActorClassName"] or kind in one["Name"]]
            self.nodes[kind] |= set(found)
            if not counts or counts[-1] != len(found):
                counts.append(len(found))


def on_nodes(cpus: list[int], commands: list[list[str]]) -> Seen:
    """Run commands one after another on a head without CPUs and so many nodes."""
    made, seen = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}), Seen()
    try:
        for count in cpus:
            made.add_node(num_cpus=count)
        ray.init(address=made.address, log_to_driver=False)
        for command in commands:
            joined = {**environment(), "RAY_ADDRESS": made.address}
            with subprocess.Popen([sys.executable, "-m", "jobs.cli", *command], env=joined) as running:
                while running.poll() is None:
                    seen.look()
                    time.sleep(0.5)
            assert running.returncode == 0, command
    finally:
        ray.shutdown()
        made.shutdown()
    return seen


@pytest.mark.slow
def test_three_nodes_give_what_one_gives(tmp_path: Path) -> None:
    """The demo's novel photos and scenes, with encoders and replicas on several nodes: the same predictions, every byte."""
    write_world(tmp_path / "world", 0, shots=4, tests=9, scenes=100)
    write_scene_support(tmp_path / "world", 0)
    seen: dict[str, Seen] = {}
    for where, cpus in (("one", [6]), ("three", [2, 2, 2])):
        commands = []
        for verb, task in (("classify", "novel"), ("detect", "scenes")):
            settings = settings_of(tmp_path, 0, task, "rar").model_dump(mode="json", exclude_defaults=True)
            settings["encoder"] = {"workers": 2}
            settings["ranker"] = {**settings.get("ranker", {}), "max_replicas": 2}
            settings["run"] = {"shard_size": 32}
            file = tmp_path / f"{task}-{where}.yaml"
            file.write_text(yaml.safe_dump(settings))
            for step in ("memory", verb) if where == "one" else (verb,):  # both ask the memories of the first
                commands.append([step, str(file), "--out", str(tmp_path / f"{step}-{task}-{where}")])
        seen[where] = on_nodes(cpus, commands)
    for name, rows in (("classify-novel", 1080), ("detect-scenes", 478)):
        one, three = (RunFolder(tmp_path / f"{name}-{where}").predictions() for where in ("one", "three"))
        same = sum(left == right for left, right in zip(one.to_pylist(), three.to_pylist(), strict=True))
        print(f"{name}: {same} of {rows} rows identical")
        assert one.num_rows == rows and one.equals(three)
    for kind, nodes in seen["three"].nodes.items():
        print(f"{kind}: on {len(nodes)} nodes, {seen['three'].counts[kind]} at once")
    assert len(set.union(*seen["three"].nodes.values())) > 1 and len(seen["three"].nodes["ServeReplica"]) > 0
