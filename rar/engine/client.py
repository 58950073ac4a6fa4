"""The ranker's applications on Ray Serve: starting them, and asking them from pipeline tasks and from an event loop.

Jobs that rank by an endpoint need none: their workers ask it themselves (see direct).

Two applications of one replica class: `ranker-...` takes batches of a shard from jobs, `online-...` takes single requests from
the gateway. Equal settings share an application.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _check_cached_client_alive
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rar import config, identity
from rar.engine import direct
from rar.engine.replica import FAULTS, Batch, Exemplars, Prior, RankerReplica
from rar.engine.session import Session
from rar.ranker.cache import AnswerCache
from rar.schema import Ranking, Unavailable, UserError

ATTEMPTS = 30  # with waits of up to 20 s: rides out a replica's restart and a cold start elsewhere
DRAIN_S = 30.0
QUIET = {"log_level": "WARNING", "enable_access_log": False}
GONE = (RayActorError, DeploymentUnavailableError)  # a replica died with the request, or is not there yet


def app_name(settings: config.Ranker, online: config.Serve | None = None) -> str:
    """Equal answers, served equally, share an application: weights that are trained anew in their folder get one of their own.

    Called where the command runs, and handed on: another machine may know the weights of a hub name by another commit.
    """
    kind = "ranker" if online is None else "online"
    served = settings.model_dump(mode="json", include={"min_replicas", "max_replicas", "num_gpus", "timeout_s", "attempts"})
    parts = [identity.of_answers(settings), served, online and online.model_dump(mode="json")]
    return f"{kind}-{identity.fingerprint(parts)[:8]}"


def deploy(session: Session, settings: config.Ranker) -> None:
    """Start the application for a ranker in batch jobs and return when it answers; does nothing where it runs already.

    It ends with this command's own Ray; on a cluster that was joined it stays, for the jobs that share it.
    Raises UserError where its model cannot be loaded, and for an endpoint what asking it for its offers raises.
    """
    if settings.method == "endpoint":
        direct.offers(settings.model_dump_json())
        return
    serve.start(proxy_location="Disabled", logging_config=QUIET)  # called by handle: no HTTP proxy
    limits = {"max_ongoing_requests": 4, "max_queued_requests": 64}
    scale = {"target_ongoing_requests": 2}
    _deploy(session, app_name(settings), settings, None, {**limits, "autoscaling_config": scale})


def deploy_online(session: Session, settings: config.Ranker, online: config.Serve) -> None:
    """The same for single requests; Serve must run already. A replica is sent two batches: one to work on, one to come."""
    batch = settings.batch_size
    limits = {"max_ongoing_requests": 2 * batch, "max_queued_requests": online.max_queued}
    scale = {
        "target_ongoing_requests": batch,
        "upscale_delay_s": online.upscale_delay_s,
        "downscale_delay_s": online.downscale_delay_s,
        "metrics_interval_s": 1.0,
        "look_back_period_s": online.upscale_delay_s + 2.0,
    }
    _deploy(session, app_name(settings, online), settings, online, {**limits, "autoscaling_config": scale})


def _deploy(session: Session, name: str, settings: config.Ranker, online: config.Serve | None, options: dict[str, Any]) -> None:
    if name in serve.status().applications:
        return
    options["autoscaling_config"] |= {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
    deployment = serve.deployment(
        name="ranker",
        ray_actor_options={"num_cpus": session.model_cpus, "num_gpus": settings.num_gpus},
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=QUIET,
        **options,
    )(RankerReplica)
    parts = [part and part.model_dump(mode="json") for part in (settings, online)]
    bound = deployment.bind(*parts, session.threads_of(settings.max_replicas))
    handle = serve.run(bound, name=name, route_prefix=None)
    if mistake := handle.fault.remote().result():
        serve.delete(name)
        raise mistake if isinstance(mistake, Unavailable) else UserError(f"ranker.model: {mistake}")


@dataclass
class Ask:
    """Sends batches to a ranker application with a window of requests in flight, and waits for all. Picklable.

    cache: folder and fingerprint of the answers that are looked up before anything is sent. prior: of the labels.
    exemplars: class name -> where its pictures lie.
    """

    app: str
    in_flight: int
    cache: tuple[str, str] | None = None
    prior: Prior | None = None
    exemplars: Exemplars | None = None

    def __call__(self, batches: Sequence[Batch]) -> list[list[Ranking]]:
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(self._one, batches))

    def _one(self, batch: Batch) -> list[Ranking]:
        if self.cache is None:
            return self._send(batch)
        images, names = batch
        answers = AnswerCache(*self.cache)
        kept = answers.get(images, names)
        rows = [row for row, ranking in enumerate(kept) if ranking is None]
        lacking = ([images[row] for row in rows], [names[row] for row in rows])
        found = self._send(lacking) if rows else []
        answers.put(*lacking, found)
        new = iter(found)
        return [next(new) if ranking is None else ranking for ranking in kept]

    @retry(
        retry=retry_if_exception_type((BackPressureError, *GONE)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=20),
        before_sleep=lambda _: _check_cached_client_alive(),  # a worker may know a Serve that has ended
        reraise=True,
    )
    def _send(self, batch: Batch) -> list[Ranking]:
        shown = None
        if self.exemplars is not None:
            shown = [[self.exemplars.get(name, []) for name in listed] for listed in batch[1]]
        return serve.get_app_handle(self.app).rank.remote(*batch, self.prior, shown).result()


def undeploy(settings: config.Ranker) -> None:
    """End what `deploy` started."""
    if settings.method != "endpoint":
        serve.delete(app_name(settings))


def ask(
    settings: config.Ranker, prior: Prior | None = None, exemplars: Exemplars | None = None, max_calls: int | None = None
) -> Ask | direct.AskServers | None:
    """How pipeline workers reach a ranker; None where no ranker is configured. Raises UserError for a cache that cannot be.

    max_calls: of an endpoint, over all workers.
    """
    if settings.method == "none":
        return None
    kept = None
    if settings.cache is not None:
        decisive = identity.of_answers(settings, json.dumps([prior, exemplars]))
        kept = (os.path.abspath(settings.cache), identity.fingerprint(decisive))
        AnswerCache(*kept)
    if settings.method == "endpoint":
        budget = direct.Budget.remote(max_calls) if max_calls is not None else None  # type: ignore[attr-defined]
        return direct.AskServers(settings, direct.offers(settings.model_dump_json()), kept, budget)
    return Ask(app_name(settings), settings.in_flight, kept, prior, exemplars)


def estimate_prior(settings: config.Ranker, images: list[bytes], names: list[list[str]]) -> Prior:
    """The label prior by a ranker application that runs, for lists of every length up to the longest."""
    counts = list(range(2, max(map(len, names), default=1) + 1))
    return serve.get_app_handle(app_name(settings)).prior.remote(images, names, counts).result()


@dataclass
class AskOne:
    """Sends single requests from an event loop. Raises the request's own faults, and BackPressureError for a full queue.

    A replica that dies with a request costs it another try: ranking changes nothing and may be repeated.
    """

    app: str

    @retry(
        retry=retry_if_exception_type(GONE),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        reraise=True,
    )
    async def __call__(self, image: bytes, names: list[str], adapter: str = "") -> Ranking:
        handle = serve.get_app_handle(self.app).options(multiplexed_model_id=adapter)
        answer = await handle.rank_one.remote(image, names, adapter)
        if isinstance(answer, FAULTS):
            raise answer
        return answer
