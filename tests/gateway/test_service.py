"""The application that KubeRay's RayService starts, on a cluster of two raylets: it starts the others, and ends with them.

Not covered: KubeRay, upgrades, a memory (tests/gateway/test_app.py has one).
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from rar.bench.server import free_port
from rar.gateway import service
from tests.jobs.test_jobs import environment


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=4)
    ray.init(address=made.address, namespace="serve", log_to_driver=False)
    yield made
    serve.shutdown()
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_one_application_starts_and_ends_the_others(cluster: Cluster, tmp_path: Path) -> None:
    online = {"endpoints": ["rank"], "port": free_port()}
    (tmp_path / "birds.yaml").write_text(yaml.safe_dump({"serve": online}))
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": online["port"]})
    arguments = {"config": str(tmp_path / "birds.yaml"), "out": str(tmp_path / "serve")}
    serve.run(service.application(arguments), name="service", route_prefix="/service")
    with urllib.request.urlopen(f"http://127.0.0.1:{online['port']}/health", timeout=30) as answer:
        assert json.load(answer)["ranker"] == "miniature"
    assert len(serve.status().applications) == 3
    serve.delete("service")
    until = time.monotonic() + 120
    while left := list(serve.status().applications):
        assert time.monotonic() < until, f"{left} outlived the service"
        time.sleep(0.5)
