"""Small real models that fail; Ray and Serve start them as they start the real ones. Workers import this: it stays light."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rar.engine import client, models
from rar.engine.isolate import Isolate
from rar.engine.replica import RankerReplica
from rar.schema import Ranking, RankStatus

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
GONE = "CUDA error: device-side assert triggered"


def shows(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour, np.uint8)).all())


class FussyEmbed(models.Embed):
    """An encoder that cannot stand red pictures."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        embed = self.encoder.embed_images

        def fussy(squares: np.ndarray) -> np.ndarray:
            if any(shows(square, RED) for square in squares):
                raise ValueError("red is no colour")
            return embed(squares)

        self.encoder.embed_images = fussy  # type: ignore[method-assign, assignment]


class FussyPropose(models.Propose):
    """A detector whose memory green pictures exhaust."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        propose = self.propose.work

        def fussy(images: list[np.ndarray]) -> Sequence[Any]:
            if any(shows(image, GREEN) for image in images):
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return propose(images)

        self.propose.work = fussy


class FussyReplica(RankerReplica):
    """A ranker that cannot stand blue pictures."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        rank = self.whole.work

        def fussy(images: Sequence[np.ndarray], names: Sequence[Sequence[str]], **more: Any) -> Sequence[Ranking]:
            if any(shows(image, BLUE) for image in images):
                raise ValueError("blue is no colour")
            return rank(images, names, **more)

        self.whole.work = fussy


class BreakingReplica(RankerReplica):
    """A ranker whose device is gone with a blue picture, and answers nothing from then on."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        rank, seen = self.whole.work, list[bool]()

        def fussy(images: Sequence[np.ndarray], names: Sequence[Sequence[str]], **more: Any) -> Sequence[Ranking]:
            seen.append(any(shows(image, BLUE) for image in images))
            if any(seen):
                raise RuntimeError(GONE)
            return rank(images, names, **more)

        self.whole.work = fussy


class Answers:
    """A ranker's application in so far as it answers."""

    def rank(self, images: list[bytes], names: list[list[str]], prior: object, shown: object) -> list[Ranking]:
        return [Ranking(tuple(range(len(listed))), RankStatus.RANKED) for listed in names]


@ray.remote(num_cpus=0)
class Worker:
    def ask(self, ask: client.Ask) -> list[Ranking]:
        return ask([b""], [["a", "b"]])


class Deadly(models.Embed):
    """A model whose process ends with any picture it is given."""

    def __init__(self, settings: object) -> None: ...

    def facts(self) -> Any: ...

    def __call__(self, table: pa.Table) -> pa.Table:
        os._exit(1)


class Faulty(RankerReplica):
    def __init__(self, *arguments: Any) -> None:
        raise ImportError("flash attention is not there")


class Slow(models.Embed):
    """A model that takes its time, and tells in which process."""

    def __init__(self, settings: object) -> None: ...

    def facts(self) -> Any:
        return os.getpid()

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.5)
        return table.append_column("process", pa.array([os.getpid()] * table.num_rows))


class Breaking(Slow):
    """A model whose device is gone after two shards."""

    def __init__(self, settings: object) -> None:
        self.shards, self.works = 0, Isolate(self._work)

    def _work(self, tables: list[pa.Table]) -> list[pa.Table]:
        self.shards += 1
        if self.shards > 2:
            raise RuntimeError(GONE)
        return tables

    def __call__(self, table: pa.Table) -> pa.Table:
        self.works([table])
        return super().__call__(table)


class Mortal(Slow):
    """A model whose process ends with a shard 0."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if table["shard"][0].as_py() == 0:
            os._exit(1)
        return super().__call__(table)


class Venomous(models.Embed):
    """The real encoder, whose process ends with the pictures of shards 3, 30 and 57."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if "pixels" in table.column_names and table["shard"][0].as_py() in (3, 30, 57):
            os._exit(1)
        return super().__call__(table)
