"""The MLLM ranker as a Ray Serve application: many pipeline workers call it in parallel. The home of ray.serve.

A request is a batch: up to `ranker.batch_size` images of one shard with their candidates, which the replica ranks in as few
forward passes as its method needs. The alternative, one image a request batched by arrival (serve.batch), would make what
shares a forward pass depend on timing, and with it the last digits of every score; a resumed run then could not be told to
give the same predictions. It also costs one message an image. A replica ranks one batch at a time on one thread (the event
loop stays free for health checks) and queues a few; when the queue is full the caller waits and asks again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rar import config, miniature
from rar.decode import decode
from rar.schema import Ranking, RankStatus, RowError, UserError

Batch = tuple[list[bytes], list[list[str]]]  # encoded images, candidates' names of each
ATTEMPTS = 30  # with waits of up to 20 s: rides out a replica's restart and a cold start elsewhere


class RankerReplica:
    """One loaded MLLM. Not a Serve class by itself, so that it can be called in a test."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from rar.rank import MllmRanker

        parsed = config.Ranker(**settings)
        self.worker = ThreadPoolExecutor(1)
        self.mistake: str | None = None  # kept and asked for: a constructor that raises would be tried again and again
        try:
            self.ranker = MllmRanker(parsed, str(miniature.MLLM) if parsed.model == "miniature" else parsed.model)
        except UserError as error:
            self.mistake = str(error)

    async def fault(self) -> str | None:
        """What the user must mend before this replica can rank, or None."""
        return self.mistake

    async def rank(self, images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        """One Ranking an image. A picture that cannot be decoded is a FALLBACK with its reason as the response."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, self._rank, images, names)

    def _rank(self, images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        pixels, rankings = {}, {}
        for row, data in enumerate(images):
            try:
                pixels[row] = decode(data)
            except RowError as error:
                rankings[row] = Ranking(tuple(range(len(names[row]))), RankStatus.FALLBACK, response=f"[{error}]")
        answers = self.ranker.rank(list(pixels.values()), [names[row] for row in pixels])
        rankings.update(zip(pixels, answers, strict=True))
        return [rankings[row] for row in range(len(images))]


def app_name(settings: config.Ranker) -> str:
    """Equal settings share an application."""
    return "ranker-" + hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]


def deploy(settings: config.Ranker) -> None:
    """Start the application for a ranker and return when it answers; does nothing where it runs already.

    It ends with this command's own Ray; on a cluster that was joined it stays, for the jobs that share it.
    Raises UserError where its model cannot be loaded.
    """
    name = app_name(settings)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})  # called by handle: no HTTP proxy
    if name in serve.status().applications:
        return
    deployment = serve.deployment(
        name="ranker",
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.num_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": 2,
        },
        max_ongoing_requests=4,
        max_queued_requests=64,
        graceful_shutdown_timeout_s=30,
    )(RankerReplica)
    handle = serve.run(deployment.bind(settings.model_dump(mode="json")), name=name, route_prefix=None)
    if mistake := handle.fault.remote().result():
        serve.delete(name)
        raise UserError(f"ranker.model: {mistake}")


@dataclass
class Ask:
    """Sends batches to a ranker application with a window of requests in flight, and waits for all. Picklable."""

    app: str
    in_flight: int

    def __call__(self, batches: Sequence[Batch]) -> list[list[Ranking]]:
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(self._one, batches))

    @retry(
        retry=retry_if_exception_type((BackPressureError, RayActorError, DeploymentUnavailableError)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=20),
        reraise=True,
    )
    def _one(self, batch: Batch) -> list[Ranking]:
        return serve.get_app_handle(self.app).rank.remote(*batch).result()


def ask(settings: config.Ranker) -> Ask | None:
    """How pipeline workers reach a ranker; None where no ranker is configured."""
    if settings.method == "none":
        return None
    return Ask(app_name(settings), settings.in_flight)
