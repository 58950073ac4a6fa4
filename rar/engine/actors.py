"""Models of a session: Ray actors that each hold a loaded stage, and the desk that gives them whole shards.

They belong to the session and not to a Ray Data actor pool, because a pool starts anew with every pipeline: importing torch
and open_clip takes longer than embedding thousands of small pictures. Which actor a shard goes to decides no number: a batch
is made of one shard alone.

The desk is one small process beside the driver, so it is lost only with the driver. A shard is told to it by reference, and no
row passes through it. Cost: two messages a shard.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rar import columns
from rar.engine import waiting
from rar.engine.isolate import Broken, reason
from rar.engine.stages import with_waited
from rar.schema import Unavailable, UserError

DEATHS = 3  # of a model's process on one shard; then the shard is at fault
IN_FLIGHT = 2  # shards at an actor: one to work on, one to come
DELAYS_S = (5.0, 60.0)  # that a shard has waited, before actors are added; without a shard, before one is let go
LOOK_EVERY_S = 0.5
WAITING = 4096  # shards that may be told to a desk at once

Failed = Callable[[pa.Table, str], pa.Table]


@ray.remote
class ModelActor:
    """A stage with a loaded model. It outlives a pipeline: the memory, the calibration and every run of a session share it."""

    def __init__(self, load: Callable[[Any], Any], settings: Any, threads: int | None) -> None:
        self.mistake: str | None = None  # kept and asked for: a constructor that raises says nothing but that it is dead
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        try:
            self.stage = load(settings)
        except UserError as error:
            self.mistake = str(error)

    def facts(self) -> Any:
        """What the driver must know of the model, or (a str) what the user must mend."""
        return self.mistake if self.mistake is not None else self.stage.facts()

    def run(self, table: pa.Table) -> tuple[pa.Table, None]:
        """The stage's rows; and nothing, by which the desk learns that they are there.

        A process whose device answers nothing more ends: the desk gives the shard to another.
        """
        try:
            return self.stage(table), None
        except Broken as error:
            print(reason(error), file=sys.stderr, flush=True)
            os._exit(1)


@dataclass
class Seat:
    """An actor that has loaded its model, as the desk sees it: its shards, and since when it has had none."""

    actor: Any
    load: int = 0
    since: float = field(default_factory=time.monotonic)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Desk:
    """Gives each shard to the actor that has the fewest, adds actors while shards wait, and replaces those that die."""

    def __init__(
        self, start: Callable[[], Any], first: Sequence[Any], most: int, patience_s: float, delays_s: tuple[float, float]
    ) -> None:
        """start: gives a new actor. first: the least that there are, started by who starts the desk. most: of all."""
        self.grow_after_s, self.shrink_after_s = delays_s
        self.start, self.least, self.most, self.patience_s = start, len(first), most, patience_s
        self.seats: list[Seat] = []
        self.asking: list[float] = []  # since when each shard without an actor has been waiting
        self.apart = 0  # of these, how many want an actor to themselves
        self.news = asyncio.Event()
        self.lost = time.monotonic()  # since when there is no seat
        self.unborn = 0  # actors in a row that died before they had one
        self.coming = {asyncio.ensure_future(self._join(actor)) for actor in first}
        self.watching = asyncio.ensure_future(self._watch())

    async def run(self, shard: list[Any]) -> list[Any] | str:
        """[a reference to a table] -> [one to what the stage makes of it]; or why its process died DEATHS times over it."""
        died = ""
        for death in range(DEATHS):
            seat = await self._seat(apart=death > 0)
            rows, done = seat.actor.run.options(num_returns=2).remote(shard[0])
            try:
                await done
            except RayActorError as error:
                died = reason(error)
                self._leave(seat)
                continue
            except Exception:  # of the stage: whoever looks at the rows gets it
                return [rows]
            finally:
                seat.load -= IN_FLIGHT if death else 1
                seat.since = time.monotonic()
                self._tell()
            return [rows]
        return died

    async def size(self) -> int:
        """Actors that have loaded their model."""
        return len(self.seats)

    async def _seat(self, apart: bool) -> Seat:
        """apart: an actor with nothing else to do, as a shard that has killed one may have taken a neighbour along.

        Raises Unavailable where there has been no actor at all for patience_s.
        """
        began = time.monotonic()
        self.asking.append(began)
        self.apart += apart
        try:
            while True:
                room = 1 if apart else IN_FLIGHT if not self.apart else 0
                free = [seat for seat in self.seats if seat.load < room]
                if free:
                    seat = min(free, key=lambda one: one.load)
                    seat.load += IN_FLIGHT if apart else 1
                    return seat
                if not self.seats and time.monotonic() - max(began, self.lost) > self.patience_s:
                    raise Unavailable(f"no process with the model came within run.patience_s {self.patience_s:g}")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), LOOK_EVERY_S)
        finally:
            self.asking.remove(began)
            self.apart -= apart
            self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def _leave(self, seat: Seat) -> None:
        if seat in self.seats:  # its other shard may have told of its death
            self.seats.remove(seat)
            self.lost = time.monotonic()

    async def _join(self, actor: Any) -> None:
        """Give a new actor a seat when it has loaded; one that dies first is replaced by `_watch`."""
        try:
            await actor.facts.remote()
        except RayActorError:
            self.unborn += 1
            await asyncio.sleep(min(self.unborn, 30))
            return
        self.unborn = 0
        self.seats.append(Seat(actor))
        self._tell()

    async def _watch(self) -> None:
        """Keep as many actors as are wanted."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.coming = {one for one in self.coming if not one.done()}
            now, wanted = time.monotonic(), self.least
            if self.asking and now - self.asking[0] > self.grow_after_s and not self.coming:
                wanted = min(self.most, len(self.seats) + math.ceil(len(self.asking) / IN_FLIGHT))
            for _ in range(wanted - len(self.seats) - len(self.coming)):
                self.coming.add(asyncio.ensure_future(self._join(self.start())))
            idle = [seat for seat in self.seats if not seat.load and now - seat.since > self.shrink_after_s]
            for seat in idle[: max(0, len(self.seats) - self.least)]:
                self.seats.remove(seat)  # with its last handle the actor ends


class Pool:
    """A desk and what it is for (`what`). Picklable: tasks call it.

    failed: a shard and a reason -> what the stage returns for rows that all fail. patience_s: for the first actor to load.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        sizes: tuple[int, int],
        what: str,
        failed: Failed,
        patience_s: float,
        delays_s: tuple[float, float] = DELAYS_S,
    ) -> None:
        """start: gives a new actor. sizes: the least and the most actors."""
        self.first: Any = [start() for _ in range(sizes[0])]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        desk: Any = Desk.options(scheduling_strategy=here, max_concurrency=WAITING)  # type: ignore[attr-defined]
        self.desk = desk.remote(start, self.first, sizes[1], patience_s, delays_s)
        self.what, self.failed, self.patience_s = what, failed, patience_s
        self._facts: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "first": None}

    @property
    def facts(self) -> Any:
        """What the stage tells of its model, asked for once. Raises UserError for a model that cannot be loaded."""
        first = self.first  # which another thread may let go of
        if self._facts is None and first is not None:
            asked = [actor.facts.remote() for actor in first]
            waiting.until(
                lambda seconds: bool(ray.wait(asked, timeout=seconds)[0]), free_resources, f"the {self.what}", self.patience_s
            )
            found = ray.get(ray.wait(asked)[0][0])
            if isinstance(found, str):
                raise UserError(found)
            self._facts, self.first = found, None
        return self._facts

    def run(self, table: pa.Table) -> pa.Table:
        """A shard through the stage. Where its process dies DEATHS times, the shard's rows fail, and the run goes on."""
        if table.num_rows == 0:  # a shard of pictures without boxes
            return columns.with_vectors(table, np.zeros((0, 1), np.float32))
        started = time.perf_counter()
        for lost in range(DEATHS):
            try:
                found = ray.get(self.desk.run.remote([ray.put(table)]))
                rows = self._died(table, found) if isinstance(found, str) else ray.get(found[0])
                return with_waited(rows, table, started)
            except ObjectLostError:  # the actor's node was lost after the work was done
                if lost == DEATHS - 1:
                    raise
        raise AssertionError

    async def answer(self, table: pa.Table) -> pa.Table:
        """The same from an event loop, for tables that are no shards."""
        found = await self.desk.run.remote([ray.put(table)])
        return self._died(table, found) if isinstance(found, str) else await found[0]

    def _died(self, table: pa.Table, why: str) -> pa.Table:
        return self.failed(table, f"the {self.what}'s process died {DEATHS} times on this shard ({why})")


def free_resources() -> str:
    """What the cluster has free, for a wait to say."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} of {there.get(name, 0.0):g} {name}s are free" for name in ("CPU", "GPU"))
