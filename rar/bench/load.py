"""The HTTP API under more load than it takes: what is lost, what is refused, what happens as replicas die, come and go.

Clients ask POST /rank without a pause, and every answer is held against the bare ranker's to the same question. Halfway one
ranker replica is killed. The queue is shorter than the clients are many, so that some are refused; those come back when
Retry-After says. Afterwards the server is left alone until the second replica has gone. Everything shares this machine, the
clients too: `images_per_s` (before the kill) is what is left for the server, `bare_images_per_s` the same model alone, one
thread, full batches.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import socket
import statistics
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import ray
import torch
from PIL import Image

from rar import config, miniature
from rar.corpus.decode import decode
from rar.engine import client, session
from rar.gateway import app
from rar.miniature.data import DRAWN
from rar.miniature.world import render, rng_of, vocabulary
from rar.ranker.rank import MllmRanker
from rar.runfolder import RunFolder
from rar.schema import Ranking, Unavailable

QUESTIONS = 96
CANDIDATES = 5
NEAR = 1e-3  # scores of one question differ by rounding, with what shares its batch
SCALE = {"upscale_delay_s": 2, "downscale_delay_s": 5}
DOWN_S = 90.0  # how long to wait for the second replica to go


@dataclass(frozen=True)
class Question:
    image: bytes
    names: list[str]

    @property
    def body(self) -> bytes:
        return json.dumps({"image": base64.b64encode(self.image).decode(), "candidates": self.names}).encode()


@dataclass
class Tally:
    """What the clients and the watcher saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)  # when each answer came, of time.monotonic
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    without_retry_after: int = 0
    replicas: list[int] = field(default_factory=list)
    killed_at: float = 0.0
    rss: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # process -> bytes, over time


def run(seconds: float = 60.0, clients: int = 200, max_queued: int = 64) -> dict[str, Any]:
    """Start a server of the miniature MLLM with one to two replicas, load it, and tell what happened."""
    settings = config.validated(
        config.Config,
        {
            "ranker": {"min_replicas": 1, "max_replicas": 2},
            "serve": {"endpoints": ["rank"], "port": free_port(), "max_queued": max_queued, **SCALE},
        },
    )
    questions = draw()
    truth, bare = bare_ranker(settings.ranker, questions)
    tally = Tally()
    with session.opened() as there, tempfile.TemporaryDirectory() as folder:
        opened = RunFolder.open(Path(folder), "serve", settings, fresh=False, name="load", group="bench")
        with app.serving(there, settings, opened) as url:
            name = client.app_name(settings.ranker, settings.serve)
            asyncio.run(_load(url, name, questions, truth, seconds, clients, tally))
            batch = _mean_batch()
            down = _seconds_until_one(name, tally)
    return _summary(tally, clients) | {
        "bare_images_per_s": bare,
        "mean_batch": batch,
        "seconds_until_one_replica": down,
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def draw() -> list[Question]:
    """Photos of novel classes, each with its own class among the candidates."""
    specs = vocabulary("novel", 0)
    questions = []
    for number in range(QUESTIONS):
        rng = rng_of("load", number)
        chosen = [specs[place] for place in rng.permutation(len(specs))[:CANDIDATES]]
        encoded = io.BytesIO()
        Image.fromarray(render(chosen[0], DRAWN, rng)).save(encoded, "JPEG")
        questions.append(Question(encoded.getvalue(), [chosen[place].name for place in rng.permutation(CANDIDATES)]))
    return questions


def bare_ranker(settings: config.Ranker, questions: Sequence[Question]) -> tuple[list[Ranking], float]:
    """The right answers, and images/s of the ranker alone, decoding included: one thread, as a replica has; best of three."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ranker = MllmRanker(settings, str(miniature.MLLM))
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        answers = ranker.rank([decode(one.image) for one in questions], [one.names for one in questions])
        rates.append(len(questions) / (time.perf_counter() - started))
    torch.set_num_threads(threads)
    return answers, max(rates)


async def _load(
    url: str, name: str, questions: list[Question], truth: list[Ranking], seconds: float, clients: int, tally: Tally
) -> None:
    bodies = [one.body for one in questions]
    connector = aiohttp.TCPConnector(limit=0)
    token = os.environ.get(app.TOKEN, "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    endless = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=endless) as session:
        until = time.monotonic() + seconds
        asking = [_client(session, f"{url}/rank", bodies, truth, number, until, tally) for number in range(clients)]
        await asyncio.gather(_watch(name, until, seconds, tally), *asking)


async def _client(
    session: aiohttp.ClientSession, url: str, bodies: list[bytes], truth: list[Ranking], number: int, until: float, tally: Tally
) -> None:
    """Asks question after question; a request that has begun is waited for, however late it is."""
    while time.monotonic() < until:
        number = (number + 1) % len(bodies)
        started = time.monotonic()
        try:
            async with session.post(url, data=bodies[number], headers={"Content-Type": "application/json"}) as reply:
                found = json.loads(await reply.read() if reply.status == 200 else b"{}")
        except (aiohttp.ClientError, ValueError) as error:
            tally.lost.append(repr(error))
            continue
        tally.statuses[reply.status] += 1
        if reply.status == 200:
            tally.ended.append(time.monotonic())
            tally.seconds.append(tally.ended[-1] - started)
            tally.wrong += not agrees(found, truth[number])
        elif reply.status == 429:
            tally.without_retry_after += "Retry-After" not in reply.headers
            await asyncio.sleep(float(reply.headers.get("Retry-After", 1)))
        else:
            tally.lost.append(f"status {reply.status}")


def agrees(found: dict[str, Any], right: Ranking) -> bool:
    """Equal scores but for rounding, and an order that sorts them."""
    if not np.allclose(found["scores"], right.scores, atol=NEAR) or sorted(found["ranking"]) != sorted(right.order):
        return False
    ordered = [right.scores[place] for place in found["ranking"]]
    return all(better >= worse - NEAR for better, worse in pairwise(ordered))


async def _watch(app: str, until: float, seconds: float, tally: Tally) -> None:
    """Once a second: running replicas and memory; halfway, a replica is killed."""
    loop = asyncio.get_running_loop()
    while (left := until - time.monotonic()) > 0:
        tally.replicas.append(await loop.run_in_executor(None, client.running, app))
        for process, size in await loop.run_in_executor(None, resident):
            tally.rss[process].append(size)
        if left < seconds / 2 and not tally.killed_at:
            tally.killed_at = time.monotonic()
            await loop.run_in_executor(None, kill_one, app)
        await asyncio.sleep(1)


def kill_one(app: str) -> None:
    """Kill a replica as a crash would: at once, with what it has in hand."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if f"{app}#ranker#" in one["name"]]
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=True)


def resident() -> list[tuple[str, int]]:
    """("name pid", resident bytes) of this Ray's Serve processes. Linux."""
    parents, names, sizes = {}, {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[pid] = (entry / "cmdline").read_text().partition("\0")[0]
                sizes[pid] = int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it ended meanwhile
            continue
    found = []
    for pid, size in sizes.items():
        kind = re.search(r"ServeReplica:[^:]*:(\w+)|(ProxyActor)", names[pid])
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if kind and above == os.getpid():
            found.append((f"{(kind[1] or kind[2]).lower()} {pid}", size))
    return found


def _mean_batch() -> float:
    """Images per batch, from the numbers for Prometheus."""
    time.sleep(6)  # replicas report every few seconds
    with urllib.request.urlopen(app.metrics_address(), timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    images, batches = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ray_{name}_total{{"))
        for name in ("rar_ranked_images", "rar_batches")
    )
    return images / batches if batches else float("nan")


def _seconds_until_one(app: str, tally: Tally) -> float | None:
    """How long after the load the second replica went; None where it never came, or stays."""
    if max(tally.replicas) < 2:
        return None
    started = time.monotonic()
    while time.monotonic() - started < DOWN_S:
        if client.running(app) == 1:
            return time.monotonic() - started
        time.sleep(1)
    return None


def _summary(tally: Tally, clients: int) -> dict[str, Any]:
    if not tally.ended:
        raise Unavailable(f"the server answered nothing: {dict(tally.statuses)} {tally.lost[:3]}")
    until, begun = tally.killed_at, tally.ended[0]
    calm = sum((begun + until) / 2 <= ended < until for ended in tally.ended)  # the second half of the time before the kill
    growth = {
        process: (sizes[-1] - sizes[2 * len(sizes) // 3]) / (1 << 20) for process, sizes in tally.rss.items() if len(sizes) > 15
    }
    return {
        "clients": clients,
        "answered": tally.statuses[200],
        "refused": tally.statuses[429],
        "refused_without_retry_after": tally.without_retry_after,
        "lost": len(tally.lost),
        "first_lost": tally.lost[:3],
        "wrong": tally.wrong,
        "killed": int(tally.killed_at > 0),
        "images_per_s": calm / ((until - begun) / 2),
        "p50_s": statistics.median(tally.seconds),
        "p99_s": float(np.quantile(tally.seconds, 0.99)),
        "replicas": tally.replicas,
        "growth_mb": growth,  # over the last third of a process' life; loading comes before
        "rss_mb": {process: sizes[-1] / (1 << 20) for process, sizes in tally.rss.items()},
    }
