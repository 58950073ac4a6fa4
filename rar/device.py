"""Where a model of torch runs and in what precision; what every room that loads one shares. torch itself is imported late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from rar.schema import UserError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

LANES = 4  # batches at once on a CPU, at most: a shard of default settings has four
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_of(precision: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def pick_device(name: str, key: str) -> torch.device:
    """'auto' is the first of cuda, mps, cpu that is there. Raises UserError, naming the config key, for one that is not."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key} {name!r} cannot be used here: {first_line(error)}") from None


class Lanes:
    """Threads that each run a whole batch, on a CPU: a batch for every core is faster than every core for a batch.

    The matrices of a batch are too small for several threads to share them without waiting for each other; batches wait for
    nothing. What comes of a batch does not depend on what runs beside it. Cost: the activations of so many batches at once. On
    a GPU there is one lane. With more threads than LANES, each lane has a share of them.
    """

    def __init__(self, device: torch.device, most: int = LANES) -> None:
        """Splits the threads that torch has in the calling thread, and leaves them to it."""
        import torch

        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = min(threads, most)
        own = (torch.set_num_threads, (threads // self.count,)) if self.count > 1 else (None, ())
        self.pool = ThreadPoolExecutor(self.count, "lane", *own)

    def map(self, work: Callable[[T], R], batches: Iterable[T]) -> list[R]:
        """In order."""
        return list(self.pool.map(work, batches) if self.count > 1 else map(work, batches))


class SharedClock:
    """Seconds of a model that several threads may use: while n of them do, each is told an n-th of the time that passes."""

    def __init__(self) -> None:
        self.lock, self.at_work, self.told, self.looked = Lock(), 0, 0.0, time.perf_counter()

    @contextmanager
    def turn(self) -> Iterator[Callable[[], float]]:
        """Gives what tells the seconds since."""
        began = self._passed(1)
        try:
            yield lambda: self._passed(0) - began
        finally:
            self._passed(-1)

    def _passed(self, more: int) -> float:
        with self.lock:
            now = time.perf_counter()
            self.told += (now - self.looked) / max(self.at_work, 1)
            self.looked, self.at_work = now, self.at_work + more
            return self.told
