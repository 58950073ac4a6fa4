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

from rar import columns
from rar.schema import UserError


@ray.remote(max_restarts=-1, max_task_retries=-1)
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
    """Actors that hold the same model. Picklable: tasks call them."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors, self.turn = tuple(actors), 0
        self._facts: Any = None

    @property
    def facts(self) -> Any:
        """What the stage tells of its model, asked for once. Raises UserError for a model that cannot be loaded."""
        if self._facts is None:
            found = ray.get(self.actors[0].facts.remote())
            if isinstance(found, str):
                raise UserError(found)
            self._facts = found
        return self._facts

    def run(self, table: pa.Table) -> pa.Table:
        """A shard through the stage; each shard always goes to the same actor."""
        if table.num_rows == 0:  # a shard of pictures without boxes
            return columns.with_vectors(table, np.zeros((0, 1), np.float32))
        return ray.get(self.actors[table["shard"][0].as_py() % len(self.actors)].run.remote(table))

    async def answer(self, table: pa.Table) -> pa.Table:
        """The same from an event loop, for tables that are no shards: the actors take turns."""
        self.turn += 1
        return await self.actors[self.turn % len(self.actors)].run.remote(table)
