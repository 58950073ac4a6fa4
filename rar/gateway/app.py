"""The gateway on Ray Serve: the HTTP API in front of a memory, a retriever and the ranker; and starting all of it.

A request goes through Serve's proxy to a gateway, where images that wait together are embedded and looked up together, and
then, those that wait together in one message, to a ranker replica, where they are batched again. The memory is opened, the
encoders are loaded and the calibration is fitted by the process that starts the server (`rar serve`), with the functions of
the batch jobs; gateways get the result. Ranking is pure, so a request whose ranker replica dies is asked again; a gateway
that dies takes its own requests with it (500), so clients of a cluster should try again once.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import ipaddress
import os
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError

from rar import fusion
from rar.columns import candidates_of
from rar.config import Config, Placed
from rar.engine import client, reading
from rar.engine.actors import Pool
from rar.engine.batching import WAIT_S, Batcher
from rar.engine.exemplars import Exemplars, Pictures
from rar.engine.session import Session
from rar.gateway import api
from rar.ranker.debias import Prior
from rar.run import build, recognise
from rar.run.calibrate import PRIOR_IMAGES, calibrate, exemplars, label_prior, support_places
from rar.run.vocabulary import Vocabulary, open_memory
from rar.run.work import Work
from rar.runfolder import RunFolder
from rar.schema import ERRORS, Candidate, Ranking, RankStatus, RowError, Unavailable, UserError

APP = "gateway"
TOKEN = "RAR_API_TOKEN"
READY_S = 60.0
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # requests change no thread; models and pixels have their own
SUPPORT_BYTES = 64 << 20  # of the memory's pictures, that a gateway keeps
SUPPORT_SIDE = 192  # pixels, of a memory's picture on the page
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Learned:
    """What a memory gives, found out once at the start. support: where pictures of each class lie, for people to see; prior and
    exemplars: for the ranker."""

    vocabulary: Vocabulary
    calibration: fusion.Calibration
    encoders: Pool
    support: Exemplars
    prior: Prior | None
    exemplars: Exemplars | None


class Cluster:
    """api.Backend over the applications of a cluster."""

    def __init__(self, settings: Config, known: Learned | None, ranker: str | None) -> None:
        """ranker: its application; None where there is none."""
        self.settings, self.known, self.app = settings, known, ranker
        self.ask = client.AskOne(ranker, settings.ranker, settings.serve) if ranker else None
        self.worker = ThreadPoolExecutor(1)
        self.pictures = Pictures(SUPPORT_BYTES)
        self.retrieve = Batcher(self._retrieve, self._fits, WAIT_S)

    async def rank(self, image: bytes, names: list[str], adapter: str) -> Ranking:
        async with self._patience():
            return await self._rank(image, names, adapter)

    async def recognize(self, image: bytes, adapter: str) -> api.Recognised:
        async with self._patience():
            return await self._decided(image, await self.retrieve(image), adapter)

    async def detect(self, image: bytes, boxes_xyxy: list[Box], adapter: str) -> list[api.Recognised]:
        async with self._patience():
            rows = await asyncio.get_running_loop().run_in_executor(None, self._cropped, image, boxes_xyxy)
            asking = []
            for picture, found in zip(rows["bytes"].to_pylist(), await self._candidates(rows), strict=True):
                if isinstance(found, Exception):
                    raise found
                asking.append((picture, found, adapter))
            return list(await asyncio.gather(*(self._decided(*one) for one in asking)))

    async def support(self, class_id: int, place: int) -> bytes | None:
        if self.known is None:
            return None
        places = self.known.support.get(self.known.vocabulary.names.get(class_id, ""), [])
        if place >= len(places):
            return None
        return await asyncio.get_running_loop().run_in_executor(None, lambda: thumbnail(self.pictures(places[place])))

    async def health(self) -> dict[str, Any]:
        """The ranker's name, classes and pictures of each. Raises Unavailable where the ranker's application is not running."""
        facts: dict[str, Any] = {"ranker": self.settings.ranker.model, "method": self.settings.ranker.method}
        if self.app is not None:
            status = await asyncio.get_running_loop().run_in_executor(None, serve.status)
            found = status.applications.get(self.app)
            if found is None or found.status != "RUNNING":
                raise Unavailable(f"the ranker is {found.status.lower() if found else 'not deployed'}")
        if self.known is not None:
            pictures = max(map(len, self.known.support.values()), default=0)
            facts |= {"classes": len(self.known.vocabulary.names), "support_pictures": pictures}
        return facts

    async def _decided(self, image: bytes, candidates: list[Candidate], adapter: str) -> api.Recognised:
        """Ask the ranker where that pays, and fuse."""
        assert self.known is not None
        calibration = self.known.calibration
        shown = fusion.n_shown(candidates, calibration)
        ranking = Ranking(tuple(range(len(candidates))), RankStatus.SKIPPED)
        if shown:
            answer = await self._rank(image, [candidate.class_name for candidate in candidates[:shown]], adapter)
            ranking = fusion.among(answer, len(candidates))
        order, chances = fusion.fuse(candidates, ranking, calibration)
        return api.Recognised(candidates, ranking, order, chances)

    async def _rank(self, image: bytes, names: list[str], adapter: str) -> Ranking:
        if self.ask is None:
            return Ranking(tuple(range(len(names))), RankStatus.SKIPPED)
        return await self.ask(image, names, adapter)

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Time limit, and Serve's errors in the API's words."""
        try:
            async with asyncio.timeout(self.settings.serve.timeout_s):
                yield
        except TimeoutError:
            raise Unavailable(f"no answer within {self.settings.serve.timeout_s:g} s") from None
        except client.Full:
            raise api.Busy from None
        except client.GONE:
            raise Unavailable("the ranker is not there") from None

    def _fits(self, images: list[bytes]) -> bool:
        return len(images) <= self.settings.encoder.batch_size

    async def _retrieve(self, images: list[bytes]) -> list[list[Candidate] | Exception]:
        return await self._candidates(arrived(images))

    def _cropped(self, image: bytes, boxes_xyxy: list[Box]) -> pa.Table:
        """One row a box, as the pipeline's crop stage makes it. Raises RowError for the first box that shows nothing."""
        known = {"shard": 0, "row": 0, "uri": "", "image_id": "", "stage": None, "error": None, "width": None, "height": None}
        picture = pa.Table.from_pylist([{**known, "bytes": image, "boxes_xyxy": boxes_xyxy}])
        assert self.known is not None
        crop = self.settings.detect.crop.sized(self.known.vocabulary.facts.side)
        rows = reading.Crop(crop, self.settings.detect.shown)(picture)
        fault = next((error for error in rows["error"].to_pylist() if error), None)
        if fault is not None:
            raise RowError(fault)
        return rows

    async def _candidates(self, table: pa.Table) -> list[list[Candidate] | Exception]:
        """The pipeline's own stages on a table of pictures."""
        assert self.known is not None
        loop, known = asyncio.get_running_loop(), self.known
        mode = self.settings.retriever.mode
        facts = known.vocabulary.facts
        table = await loop.run_in_executor(self.worker, reading.Decode(facts.fit, facts.min_side), table)
        if mode != "all":
            table = await known.encoders.answer(table)
        table = await loop.run_in_executor(self.worker, known.vocabulary.retrieve, table)
        faults = table["error"].to_pylist()
        return [RowError(fault) if fault else found for fault, found in zip(faults, candidates_of(table), strict=True)]


class Gateway:
    """The Serve class: an app in every replica. What it holds is kept apart, as Serve adds attributes of its own."""

    def __init__(self, settings: dict[str, Any], known: Learned | None, ranker: str | None, token_digest: bytes | None) -> None:
        parsed = Config(**settings)
        self.arguments = (Cluster(parsed, known, ranker), parsed.serve, token_digest)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return api.create_app(*self.arguments)


def arrived(images: list[bytes]) -> pa.Table:
    """Images as the pipeline's decode stage takes them."""
    none = pa.nulls(len(images), pa.string())
    return pa.table({"bytes": pa.array(images, pa.large_binary()), "stage": none, "error": none})


def thumbnail(pixels: np.ndarray | None) -> bytes | None:
    """A picture of the memory as a small JPEG; None where it could not be read any more."""
    if pixels is None:
        return None
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SUPPORT_SIDE, SUPPORT_SIDE))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@contextmanager
def serving(session: Session, settings: Config, folder: RunFolder, proxied: bool = False) -> Iterator[str]:
    """The whole service in an open session, without a memory /rank alone; yields its URL.

    On leaving, the gateways finish what they have, then the rankers. folder keeps the calibration. proxied: Serve runs already,
    with proxies at serve.host and serve.port. Raises UserError for what the user must mend.
    """
    online = settings.serve
    digest = check(settings, proxied)
    if not proxied:
        start_proxy(settings)
    known = learn(session, settings, folder) if session.memory is not None else None
    beside = (known.prior, known.exemplars) if known is not None else (None, None)
    ranker = client.app_name(settings.ranker, online, beside) if settings.ranker.method != "none" else None
    try:
        if ranker is not None:
            client.deploy_online(session, settings.ranker, online, beside)
        run_gateway(session, settings, known, ranker, digest)
        yield f"http://{online.host}:{online.port}"
    finally:
        for name in (APP, ranker):
            if name is not None:
                serve.delete(name)


def check(settings: Config, proxied: bool = False) -> bytes | None:
    """The token's digest, None where none is set. Raises UserError for what cannot be served, or not so, or not there.

    proxied: the port is taken, by Serve itself.
    """
    online, ranker = settings.serve, settings.ranker
    if (ranker.debias == "prior" or ranker.exemplars) and not (online.recognizes and settings.memory.support):
        raise UserError(
            "ranker.debias prior and ranker.exemplars need the memory's pictures: set memory.support, and serve.endpoints with "
            "recognize or detect"
        )
    if settings.encoder.model == "precomputed" and online.recognizes:
        raise UserError("encoder.model precomputed cannot embed a new picture; set serve.endpoints: [rank]")
    for name, folder in online.adapters.items():
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(f"serve.adapters.{name}: {folder} holds no LoRA adapter (adapter_config.json)")
    token = os.environ.get(TOKEN, "").strip()
    if not token and not _loopback(online.host):
        raise UserError(f"serve.host {online.host} can be reached by others: set {TOKEN}, or use 127.0.0.1")
    try:
        if not proxied:
            socket.create_server((online.host, online.port)).close()
    except OSError as error:
        raise UserError(
            f"serve.host {online.host}, serve.port {online.port}: {error.strerror or error}; choose others"
        ) from None
    return hashlib.sha256(token.encode()).digest() if token else None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def start_proxy(settings: Config) -> None:
    """Serve with an HTTP proxy on every node. It must come before any application: Serve reads these options once.

    Serve replaces a proxy that is slow to start, and tells of the first one's end; `run_gateway` waits for one that answers.
    """
    with suppress(RayActorError):
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": settings.serve.host, "port": settings.serve.port},
            logging_config=client.QUIET,
        )


def learn(session: Session, settings: Config, folder: RunFolder) -> Learned:
    """Open the memory and calibrate on it, with a batch ranker that goes again; not where the folder has it already."""
    fitting = settings.route.mode == "calibrated" and not (folder.path / "calibration.json").exists()
    fitting = fitting and settings.ranker.method != "none" and settings.memory.support is not None
    fitting = fitting or (settings.ranker.debias == "prior" and not (folder.path / "prior.json").exists())
    vocabulary = recognise.prepare(session, settings) if fitting else open_memory(session, settings)
    prior = label_prior(session, settings, drawn(settings), vocabulary, folder) if settings.ranker.debias == "prior" else None
    calibration = calibrate(session, settings, vocabulary, folder, prior)
    if fitting:
        client.undeploy(settings.ranker)
    seen: Exemplars = {}
    if settings.serve.support_pictures and settings.memory.support is not None:
        with suppress(UserError, Unavailable):  # it served to build the memory, and may be gone since
            seen = support_places(settings, settings.serve.support_pictures)
    return Learned(vocabulary, calibration, session.encoder(settings.encoder), seen, prior, exemplars(settings))


def drawn(settings: Config) -> Work:
    """Some pictures of the memory, for the label prior: what will be asked is not known yet."""
    support = build.plan(settings).support
    rows = np.random.default_rng([settings.run.seed, 6]).permutation(support.num_rows)[:PRIOR_IMAGES]
    return Work(support.take(np.sort(rows)), False, ERRORS.empty_table())


def run_gateway(session: Session, settings: Config, known: Learned | None, app: str | None, digest: bytes | None) -> None:
    """Deploy the gateways and wait until one answers over HTTP."""
    online, ranker = settings.serve, settings.ranker
    room = 2 * ranker.batch_size * ranker.max_replicas + online.max_queued
    deployment = serve.deployment(
        name=APP,
        ray_actor_options={"num_cpus": session.reserves(Placed(device="cpu"))[1], "runtime_env": {"env_vars": ONE_LOOP}},
        autoscaling_config={
            "min_replicas": online.min_gateways,
            "max_replicas": online.max_gateways,
            "target_ongoing_requests": room / 2,
            "upscale_delay_s": online.upscale_delay_s,
            "downscale_delay_s": online.downscale_delay_s,
        },
        max_ongoing_requests=2 * room,  # more than the ranker takes: it is the gateway that says 429, in JSON
        max_queued_requests=8 * room,  # in the proxy, which says 429 in plain text: a last resort
        backpressure_config={"status_code": 429, "retry_after_s": api.RETRY_AFTER_S},
        graceful_shutdown_timeout_s=client.DRAIN_S,
        logging_config=client.QUIET,
    )(serve.ingress()(Gateway))
    serve.run(deployment.bind(settings.model_dump(mode="json"), known, app, digest), name=APP, route_prefix="/")
    url = f"http://{online.host}:{online.port}/health"
    for _ in range(int(READY_S / 0.2)):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise UserError(
        f"nothing answers at {url}: Serve runs on this cluster already, with other HTTP options; use its host and port"
    )


def dry_run(settings: Config) -> str:
    """What would be started, from the config alone."""
    online, ranker = settings.serve, settings.ranker
    token = "asked for" if os.environ.get(TOKEN, "").strip() else f"none ({TOKEN} is not set)"
    memory = f"memory {settings.memory.name!r} at {settings.memory.uri}" if online.recognizes else "no memory"
    paths, adapters = ", ".join("/" + name for name in online.endpoints), ", ".join(sorted(online.adapters))
    return "\n".join(
        [
            f"would serve {paths} at http://{online.host}:{online.port}; token: {token}",
            f"  {memory}; retriever {settings.retriever.mode}, encoder {settings.encoder.model}",
            f"  ranker {ranker.model} ({ranker.method}): {ranker.min_replicas} to {ranker.max_replicas} replica(s), batches of "
            f"at most {ranker.batch_size} images a forward pass; {online.max_queued} requests may wait",
            f"  {online.min_gateways} to {online.max_gateways} gateway(s); adapters: {adapters or 'none'}",
        ]
    )


def metrics_address() -> str:
    """Where Ray's agent of this node tells its numbers."""
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
