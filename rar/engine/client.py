"""The ranker's applications on Ray Serve: starting them, and asking them from pipeline tasks and from an event loop.

Jobs that rank by an endpoint need none: their workers ask it themselves (see direct).

Two applications of one replica class: `ranker-...` takes batches of a shard from jobs, `online-...` takes single requests from
the gateway. Equal settings share an application.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _check_cached_client_alive
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus
from tenacity import AsyncRetrying, RetryCallState, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from rar import config, identity
from rar.engine import direct, ending, hosted, waiting
from rar.engine.actors import free_resources
from rar.engine.batching import WAIT_S, Batcher
from rar.engine.exemplars import Exemplars
from rar.engine.isolate import Broken, reason
from rar.engine.replica import One, RankerReplica, fallback
from rar.engine.session import Session
from rar.ranker.cache import AnswerCache, Asks
from rar.ranker.debias import Prior
from rar.ranker.endpoint import EndpointRanker
from rar.ranker.requests import Offers
from rar.schema import Ranking, Unavailable, UserError

DRAIN_S = 30.0
MESSAGE_BYTES = 64 << 20  # of pictures in one message to a replica
SERVED = {"min_replicas", "max_replicas", "num_gpus", "num_cpus", "resources", "timeout_s", "attempts"}
QUIET = {"log_level": "WARNING", "enable_access_log": False}
FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY, ApplicationStatus.DELETING)
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")  # the last one of a traceback
Beside = tuple[Prior | None, Exemplars | None]  # the label prior and the classes' pictures of single requests
GONE = (RayActorError, DeploymentUnavailableError)  # a replica died with the request, or is not there yet


def app_name(settings: config.Ranker, online: config.Serve | None = None, beside: Beside = (None, None)) -> str:
    """Equal answers, served equally, share an application: weights that are trained anew in their folder get one of their own.

    Jobs share one where `ranker.keep` leaves it to them. Called where the command runs, and handed on: another machine may know
    the weights of a hub name by another commit.
    """
    kind = "ranker" if online is None else "online"
    served = settings.model_dump(mode="json", include=SERVED)
    named = not settings.keep and ray.is_initialized()  # asking for the job would join any Ray that is about
    job = ray.get_runtime_context().get_job_id() if named else None
    parts = [identity.of_answers(settings, json.dumps(beside)), served, online and online.model_dump(mode="json"), job]
    return f"{kind}-{identity.fingerprint(parts)[:8]}"


def deploy(session: Session, settings: config.Ranker) -> None:
    """Start the application for a ranker in batch jobs and return when it answers, or when the one that is there does.

    It ends with this session; with `ranker.keep`, on a cluster, it stays for other jobs, without a replica while nobody asks.
    Raises UserError where its model cannot be loaded, Unavailable where it does not come, and for an endpoint what starting its
    engine (`hosted.located`) and asking for its offers raise.
    """
    if settings.method == "endpoint":
        _offered(session, hosted.located(session, settings))
        return
    with session.lock:
        serve.start(proxy_location="Disabled", logging_config=QUIET)  # called by handle: no HTTP proxy
    limits = {"max_ongoing_requests": 4, "max_queued_requests": 64}
    scale = {"target_ongoing_requests": 2, "upscale_delay_s": 10.0, "downscale_delay_s": 60.0}
    name = app_name(settings)
    if session.joined and settings.keep:
        scale |= {"min_replicas": 0, "initial_replicas": settings.min_replicas}
    elif session.joined:
        session.endings.callback(serve.delete, name)
        ending.with_this_job(name)
    _deploy(session, name, [settings, None], {**limits, "autoscaling_config": scale})


def _offered(session: Session, settings: config.Ranker) -> Offers:
    """What the servers of an endpoint offer, asked once a session. Raises UserError and Unavailable."""
    key = settings.model_dump_json()
    if key not in session.offers:
        session.offers[key] = EndpointRanker(settings).probe()
    return session.offers[key]


def deploy_online(session: Session, settings: config.Ranker, online: config.Serve, beside: Beside = (None, None)) -> None:
    """The same for single requests; Serve must run already. A replica is sent two messages: one to work on, one to come."""
    messages = 2 * online.max_gateways
    limits = {"max_ongoing_requests": messages, "max_queued_requests": -1}  # it is the gateways that refuse
    scale = {
        "target_ongoing_requests": 2,  # of however many gateways run
        "upscale_delay_s": online.upscale_delay_s,
        "downscale_delay_s": online.downscale_delay_s,
        "metrics_interval_s": 1.0,
        "look_back_period_s": online.upscale_delay_s + 2.0,
    }
    name = app_name(settings, online, beside)
    _deploy(session, name, [hosted.located(session, settings), online], {**limits, "autoscaling_config": scale}, beside)


def _deploy(session: Session, name: str, sections: list[Any], options: dict[str, Any], beside: Beside = (None, None)) -> None:
    """sections: config.Ranker, and config.Serve or None."""
    settings: config.Ranker = sections[0]
    with session.lock:
        if name not in serve.status().applications:
            replicas = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
            options["autoscaling_config"] = replicas | options["autoscaling_config"]
            deployment = serve.deployment(
                name="ranker",
                ray_actor_options=session.options(settings),
                graceful_shutdown_timeout_s=DRAIN_S,
                logging_config=QUIET,
                **options,
            )(RankerReplica)
            parts = [part and part.model_dump(mode="json") for part in sections]
            bound = deployment.bind(*parts, session.threads_of(settings.max_replicas), *beside)
            serve.run_many([serve.RunTarget(bound, name, None)], wait_for_applications_running=False)
    try:
        waiting.until(
            lambda seconds: _runs(name, seconds), lambda: _state(name)[1], "the ranker's application", session.patience_s
        )
        mistake = serve.get_app_handle(name).fault.remote().result(timeout_s=session.patience_s)
    except (Unavailable, TimeoutError) as error:
        serve.delete(name)
        raise error if isinstance(error, Unavailable) else Unavailable("the ranker's application does not answer") from None
    if mistake:
        serve.delete(name)
        if isinstance(mistake, Unavailable):
            raise mistake
        raise UserError(mistake if mistake.startswith("ranker.") else f"ranker.model: {mistake}")


def _runs(name: str, seconds: float) -> bool:
    """Whether an application runs; waits a moment where it does not yet. Raises Unavailable where it has failed."""
    status, said = _state(name)
    if status in FAILED:
        raise Unavailable(f"the ranker's application cannot start: {said}")
    if status != ApplicationStatus.RUNNING:
        time.sleep(min(0.1, seconds))
    return status == ApplicationStatus.RUNNING


def _state(name: str) -> tuple[ApplicationStatus, str]:
    """An application's status and, in Serve's words, why it is so: of a replica that raised, the error's own line."""
    app = serve.status().applications.get(name)
    if app is None:
        return ApplicationStatus.DELETING, "it was deleted"
    said = "\n".join(one.message for one in app.deployments.values() if one.message) or app.message
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [app.status.value.lower()]
    return app.status, next((line for line in reversed(lines) if ERROR_LINE.match(line)), lines[-1])


def standing(settings: config.Ranker) -> str:
    """How the application of `deploy` is, in Serve's words, and what the cluster has free: what rows may be waiting for."""
    if settings.method in ("none", "endpoint"):
        return free_resources()
    status, said = _state(app_name(settings))
    return f"{free_resources()}; the ranker's application is {status.value.lower()}" + (f": {said}" if said else "")


def running(app: str) -> int:
    """How many replicas of an application run now; 0 where there is no such application."""
    found = serve.status().applications.get(app)
    states = {} if found is None else found.deployments["ranker"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def _out_of_patience(state: RetryCallState) -> bool:
    """A ranker that is gone is waited for so long; one that is busy works on, and is waited for as long as it takes."""
    gone = state.outcome is not None and isinstance(state.outcome.exception(), GONE)
    return gone and state.args[0].patience_s < (state.seconds_since_start or 0)


def _stayed_away(state: RetryCallState) -> NoReturn:
    fault = state.outcome.exception() if state.outcome is not None else None
    assert fault is not None
    raise Unavailable(f"the ranker stayed away for run.patience_s {state.args[0].patience_s:g}: {reason(fault)}") from None


def _forget(state: RetryCallState) -> None:
    """A worker that outlives a Serve keeps asking its controller: have it look for the one that runs now."""
    _check_cached_client_alive()


@dataclass
class Ask:
    """Sends a batch to a ranker application, again where the application is busy or a replica died with it. Picklable.

    A batch that a device is gone with is halved, for other replicas, until the picture is found that alone does that: its row
    is a FALLBACK with the reason. prior: of the labels. exemplars: class name -> where its pictures lie. patience_s: for a
    replica to come back, and for one answer. Raises Unavailable where that was not enough.
    """

    app: str
    patience_s: float = 300.0
    prior: Prior | None = None
    exemplars: Exemplars | None = None

    @retry(
        retry=retry_if_exception_type((BackPressureError, *GONE)),
        stop=_out_of_patience,
        wait=wait_random_exponential(multiplier=0.2, max=10),
        before_sleep=_forget,
        retry_error_callback=_stayed_away,
    )
    def __call__(self, images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        shown = None
        if self.exemplars is not None:
            shown = [[self.exemplars.get(name, []) for name in listed] for listed in names]
        asked = serve.get_app_handle(self.app).rank.remote(images, names, self.prior, shown)
        try:
            return asked.result(timeout_s=self.patience_s)
        except TimeoutError:
            raise Unavailable(f"the ranker gave no answer within run.patience_s {self.patience_s:g}") from None
        except Broken as error:
            if len(images) == 1:
                return [fallback(len(names[0]), reason(getattr(error, "cause", error)))]  # Ray's own words are a traceback
            middle = (len(images) + 1) // 2
            return self(images[:middle], names[:middle]) + self(images[middle:], names[middle:])


def undeploy(settings: config.Ranker) -> None:
    """End what `deploy` started."""
    if settings.method != "endpoint":
        serve.delete(app_name(settings))


def ask(
    session: Session,
    settings: config.Ranker,
    prior: Prior | None = None,
    exemplars: Exemplars | None = None,
    limited: bool = False,
) -> Asks | None:
    """How pipeline workers reach a ranker; None where no ranker is configured. Raises UserError for a cache that cannot be.

    With ranker.cache, answers are looked up before anything is sent. limited: whether ranker.max_calls and ranker.token_budget
    hold, over all workers.
    """
    if settings.method == "none":
        return None
    send: Asks
    if settings.method == "endpoint":
        limits = (settings.max_calls, settings.token_budget)
        budget = direct.Budget.remote(*limits) if limited and limits != (None, None) else None  # type: ignore[attr-defined]
        there = hosted.located(session, settings)
        send = direct.AskServers(there, _offered(session, there), budget)
    else:
        send = Ask(app_name(settings), session.patience_s, prior, exemplars)
    if settings.cache is None:
        return send
    decisive = identity.of_answers(settings, json.dumps([prior, exemplars]))
    return partial(AnswerCache(os.path.abspath(settings.cache), identity.fingerprint(decisive)).filled, send)


def estimate_prior(session: Session, settings: config.Ranker, images: list[bytes], names: list[list[str]]) -> Prior:
    """The label prior by a ranker application that runs, for lists of every length up to the longest."""
    counts = list(range(2, max(map(len, names), default=1) + 1))
    asked = serve.get_app_handle(app_name(settings)).prior.remote(images, names, counts)
    try:
        return asked.result(timeout_s=session.patience_s)
    except TimeoutError:
        raise Unavailable(f"the ranker gave no label prior within run.patience_s {session.patience_s:g}") from None


class Full(Exception):
    """More single requests wait than may."""


class AskOne:
    """Sends single requests from an event loop, those that wait together in one message. Raises the request's own faults.

    A replica that dies with a message costs it another try: ranking changes nothing and may be repeated. A message is answered
    when its last request is.
    """

    def __init__(self, app: str, settings: config.Ranker, online: config.Serve) -> None:
        """app: its name. A gateway has as many messages under way as keep all replicas at work while as many are on the way."""
        self.app, self.batch, self.lanes = app, settings.batch_size, 2 * settings.max_replicas
        self.most, self.waiting = self.lanes * self.batch + online.max_queued, 0
        self.handles: dict[str, Any] = {}
        self.batchers: dict[str, Batcher[One, Ranking]] = {}

    async def __call__(self, image: bytes, names: list[str], adapter: str = "") -> Ranking:
        """Raises Full where `serve.max_queued` wait beyond those under way."""
        if self.waiting >= self.most:
            raise Full
        if adapter not in self.batchers:
            self.batchers[adapter] = Batcher(partial(self._send, adapter), self._fits, WAIT_S, self.lanes)
        self.waiting += 1
        try:
            return await self.batchers[adapter]((image, names))
        finally:
            self.waiting -= 1

    def _fits(self, requests: list[One]) -> bool:
        return len(requests) <= self.batch and sum(len(image) for image, _ in requests) <= MESSAGE_BYTES

    async def _send(self, adapter: str, requests: list[One]) -> list[Ranking | Exception]:
        patiently = AsyncRetrying(
            retry=retry_if_exception_type(GONE),
            stop=stop_after_delay(60),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            before_sleep=lambda _: self.handles.clear(),
            reraise=True,
        )
        return await patiently(self._sent, adapter, requests)

    async def _sent(self, adapter: str, requests: list[One]) -> list[Ranking | Exception]:
        if adapter not in self.handles:  # asking for a handle asks Serve's controller
            self.handles[adapter] = serve.get_app_handle(self.app).options(multiplexed_model_id=adapter)
        return await self.handles[adapter].rank_several.remote(requests, adapter)
