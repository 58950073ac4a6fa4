"""Models of a session: Ray actors that each hold a loaded stage, and the pool that sends them whole shards.

They belong to the session and not to a Ray Data actor pool, because a pool starts anew with every pipeline: importing torch
and open_clip takes longer than embedding thousands of small pictures. Cost: their number is fixed, not autoscaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError

from rar import columns
from rar.engine import waiting
from rar.engine.isolate import reason
from rar.schema import UserError

DEATHS = 3  # of a model's process on one shard; then the shard is at fault


@ray.remote(max_restarts=-1)
class ModelActor:
    """A stage with a loaded model. It outlives a pipeline: the memory, the calibration and every run of a session share it."""

    def __init__(self, load: Callable[[Any], Any], settings: Any, threads: int | None) -> None:
        self.mistake: str | None = None  # kept and asked for: a constructor that raises would be tried again and again
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

    def run(self, table: pa.Table) -> pa.Table:
        return self.stage(table)


class Pool:
    """Actors that hold the same model (`what`). Picklable: tasks call them.

    failed: a shard and a reason -> what the stage returns for rows that all fail. patience_s: for the first actor to load.
    """

    def __init__(
        self, actors: Sequence[Any], what: str, failed: Callable[[pa.Table, str], pa.Table], patience_s: float = 300.0
    ) -> None:
        self.actors, self.turn = tuple(actors), 0
        self.what, self.failed, self.patience_s = what, failed, patience_s
        self._facts: Any = None

    @property
    def facts(self) -> Any:
        """What the stage tells of its model, asked for once. Raises UserError for a model that cannot be loaded."""
        if self._facts is None:
            asked = self.actors[0].facts.remote()
            waiting.until(
                lambda seconds: bool(ray.wait([asked], timeout=seconds)[0]), free_resources, f"the {self.what}", self.patience_s
            )
            found = ray.get(asked)
            if isinstance(found, str):
                raise UserError(found)
            self._facts = found
        return self._facts

    def run(self, table: pa.Table) -> pa.Table:
        """A shard through the stage; each shard always goes to the same actor.

        Where its process dies DEATHS times, the shard's rows fail, and the run goes on.
        """
        if table.num_rows == 0:  # a shard of pictures without boxes
            return columns.with_vectors(table, np.zeros((0, 1), np.float32))
        try:
            return ray.get(self.actors[table["shard"][0].as_py() % len(self.actors)].run.remote(table))
        except RayActorError as error:
            return self.failed(table, f"the {self.what}'s process died {DEATHS} times on this shard ({reason(error)})")

    async def answer(self, table: pa.Table) -> pa.Table:
        """The same from an event loop, for tables that are no shards: the actors take turns."""
        self.turn += 1
        return await self.actors[self.turn % len(self.actors)].run.remote(table)


def free_resources() -> str:
    """What the cluster has free, for a wait to say."""
    there, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} of {there.get(name, 0.0):g} {name}s are free" for name in ("CPU", "GPU"))
