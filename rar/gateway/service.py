"""The service as an application of Ray Serve that starts the others: what KubeRay's RayService keeps (cluster/rayservice.yaml).

A RayService starts what an import path names, and nobody runs `rar serve`. So a replica without a GPU does: it opens the
memory, learns, starts rankers and gateways, and is asked for its health, which is theirs. Where it dies, a new one starts them.
"""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from ray import serve
from ray.serve import Application

from rar import config
from rar.engine import client, session
from rar.gateway import app
from rar.runfolder import RunFolder

HEALTH_S = 10.0


class Service:
    """Not a Serve class by itself, so that it can be called in a test."""

    def __init__(self, config_file: str, out: str, sets: list[str] | None = None) -> None:
        """As for `rar serve`; out must be a place that every node reaches."""
        self.kept, self.thread = ExitStack(), ThreadPoolExecutor(1)
        self.url = self.thread.submit(self._start, config_file, out, sets or []).result()  # here runs an event loop

    def _start(self, config_file: str, out: str, sets: list[str]) -> str:
        settings = config.load(config_file, sets)
        memory = settings.memory if settings.serve.recognizes else None
        opened = self.kept.enter_context(session.opened(memory, joined=True))
        folder = RunFolder.open(out, "serve", settings, fresh=False, name=Path(config_file).stem, group="serve")
        return self.kept.enter_context(app.serving(opened, settings, folder, proxied=True))

    def check_health(self) -> None:
        with urllib.request.urlopen(f"{self.url}/health", timeout=HEALTH_S):
            pass

    def __del__(self) -> None:
        self.thread.submit(self.kept.close).result()


def application(arguments: dict[str, str]) -> Application:
    """What Serve calls with `args` of its config: config, out."""
    deployment = serve.deployment(
        name="service",
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=10.0,
        health_check_timeout_s=3 * HEALTH_S,
        graceful_shutdown_timeout_s=client.DRAIN_S,
        logging_config=client.QUIET,
    )(Service)
    return deployment.bind(arguments["config"], arguments["out"])
