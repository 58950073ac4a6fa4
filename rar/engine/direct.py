"""Jobs ask servers directly: no replica stands between a pipeline worker and an endpoint.

A worker process keeps one ranker, with one event loop and one HTTP session, for all shards that it gets, so that connections
and what was learnt of a server's pace last. The driver probes once and passes on what is on offer, so all workers ask alike.

`ranker.max_calls` is given out by one actor, a shard at a time: a shard whose calls are not granted is not begun, goes through
without its rows and stays pending in the run folder, while those begun are finished. So nothing that was paid for is lost. It
costs reading and embedding what is then not ranked; calls of the calibration are not counted. What a call costs in tokens is
known afterwards, so `ranker.token_budget` is overspent by what the shards cost that were under way when it was reached.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ray

from rar import config
from rar.engine.choosing import Spent
from rar.engine.replica import fallback, try_decode
from rar.ranker.endpoint import EndpointRanker
from rar.ranker.requests import Offers
from rar.schema import Ranking, RowError


@ray.remote(num_cpus=0)
class Budget:
    """Calls and tokens that are left; None: as many as there are."""

    def __init__(self, calls: int | None, tokens: int | None) -> None:
        self.calls = math.inf if calls is None else calls
        self.tokens = math.inf if tokens is None else tokens

    def take(self, calls: int) -> bool:
        granted = calls <= self.calls and self.tokens > 0
        self.calls -= calls * granted
        return granted

    def spend(self, tokens: int) -> None:
        self.tokens -= tokens


@dataclass
class AskServers:
    """Ranks a whole shard by the process's own session with the servers; one call at a time, as it has one event loop.

    Picklable. budget: a Budget; where it does not reach, choosing.Spent is raised.
    """

    settings: config.Ranker
    offers: Offers
    budget: Any = None

    def __call__(self, images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        if self.budget is not None and not ray.get(self.budget.take.remote(self._calls(names))):
            raise Spent
        started = time.perf_counter()
        found = _worker(self.settings.model_dump_json(), self.offers).rank(images, names)
        each = (time.perf_counter() - started) / max(len(found), 1)
        if self.budget is not None:  # waited for, so that this worker's next shard is not granted before
            ray.get(self.budget.spend.remote(sum(one.prompt_tokens + one.output_tokens for one in found)))
        return [replace(one, seconds=each) for one in found]

    def _calls(self, names: Sequence[Sequence[str]]) -> int:
        """At most."""
        if self.offers.reranks:
            return sum(len(listed) for listed in names if len(listed) > 1)
        rotations = self.settings.permutations if self.offers.logprobs else 1
        return sum(min(len(listed), rotations) for listed in names if len(listed) > 1)


class Worker:
    """A process's ranker, loop and session. They end with the process."""

    def __init__(self, settings: str, offered: Offers) -> None:
        self.ranker = EndpointRanker(config.Ranker.model_validate_json(settings), offered)
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self.loop = asyncio.new_event_loop()
        self.session = self.loop.run_until_complete(self._session())
        atexit.register(lambda: self.loop.run_until_complete(self.session.close()))

    def rank(self, images: Sequence[bytes], names: Sequence[Sequence[str]]) -> list[Ranking]:
        """A picture that cannot be decoded is a FALLBACK with its reason as the response."""
        pixels = list(self.decoders.map(try_decode, images))
        good = [row for row, picture in enumerate(pixels) if not isinstance(picture, RowError)]
        shown: list[Any] = [pixels[row] for row in good]
        asking = self.ranker.ranked(self.session, shown, [names[row] for row in good])
        rankings = dict(zip(good, self.loop.run_until_complete(asking), strict=True))
        return [rankings.get(row) or fallback(len(names[row]), str(picture)) for row, picture in enumerate(pixels)]

    async def _session(self) -> Any:
        return self.ranker.servers.session()


@lru_cache(maxsize=4)  # of this process; settings as JSON, as their mappings have no hash
def _worker(settings: str, offered: Offers) -> Worker:
    return Worker(settings, offered)
