"""Requests that come one by one -> batches as full as the work allows. Plain asyncio, so that a test needs no server.

Ray Serve's own `serve.batch` closes a batch when its wait is over even while the model is busy, so that under load small
batches pile up behind each other. Here a batch is closed when the model is free to take it: what arrives during one forward
pass is the next one, and an idle model waits only `wait_s` for company. First come, first served; no item is passed over for
a shorter one. Cost: while a batch is put together the model rests, a few tenths of a millisecond.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

WAIT_S = 0.005  # of an idle model, for company
Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Calls `work` with lists of items, `lanes` of them at a time, and hands each caller its own result.

    work(items) -> one result, or exception to be raised, an item. fits(items): whether so many are one batch; a first item is
    taken whatever it says. `work` itself must not raise; where it does, all callers of that batch get the error.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        fits: Callable[[list[Item]], bool],
        wait_s: float,
        lanes: int = 1,
    ) -> None:
        self.work, self.fits, self.wait_s, self.lanes = work, fits, wait_s, lanes
        self.waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self.workers: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.waiting.append((item, future))
        if len(self.workers) < self.lanes:
            self.workers.add(asyncio.create_task(self._run()))
        return await future

    async def _run(self) -> None:
        """Lives while somebody waits."""
        try:
            await asyncio.sleep(self.wait_s)
            while batch := self._take():
                await self._answer(*batch)
                await asyncio.sleep(0)  # callers that come back at once are part of the next batch
        finally:  # at once: a caller who sees a full house must not be left to one that is leaving
            self.workers = {worker for worker in self.workers if worker is not asyncio.current_task()}

    def _take(self) -> tuple[list[Item], list[asyncio.Future[Result]]] | None:
        """The longest run of waiting items that fits, those whose caller went away left out."""
        items: list[Item] = []
        futures: list[asyncio.Future[Result]] = []
        while self.waiting:
            item, future = self.waiting[0]
            if future.cancelled():
                self.waiting.popleft()
            elif items and not self.fits([*items, item]):
                break
            else:
                self.waiting.popleft()
                items.append(item)
                futures.append(future)
        return (items, futures) if items else None

    async def _answer(self, items: list[Item], futures: list[asyncio.Future[Result]]) -> None:
        try:
            results = await self.work(items)
        except Exception as error:
            results = [error] * len(items)
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
