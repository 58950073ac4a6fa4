"""Ray Data: shards of the corpus flow through the stages, on one laptop or many machines. The home of ray.data.

A block is a shard. Blocks are kept whole (no size limit splits them, no batch regroups them), because a shard is what is
written, resumed and batched together (see runfolder). Cost: a worker holds a shard of encoded images in memory, about
`run.shard_size` x the mean file size; choose smaller shards for very large pictures.

A shard is one task from reading to writing. What is slow to load lives in actors that the task calls: encoders here, rankers
on Ray Serve. While one task waits for a model, others decode, so decoding overlaps the forward pass. The encoders belong to
the session and not to a Ray Data actor pool, because a pool starts anew with every pipeline: importing torch and open_clip
takes longer than embedding thousands of small pictures. Cost: their number is fixed (`encoder.workers`), not autoscaled.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset
from ray.data.datasource import Datasink
from tenacity import retry, stop_after_attempt

from rar import config, stages
from rar.decode import fit_square
from rar.runfolder import RunFolder
from rar.schema import UserError

OBJECT_STORE_BYTES = 1 << 30
LOCAL_SLOTS = 5  # logical CPUs of a laptop's Ray: encoder, rankers and tasks are placed at once and share the cores
TASK_CPUS = 0.5  # tasks wait for models about as much as they work


@contextmanager
def local_ray() -> Iterator[None]:
    """Join the cluster this process was submitted to (RAY_ADDRESS), or start Ray here, quietly, and stop it afterwards."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU: no warning about it
    if ray.is_initialized():
        yield
        return
    _start()
    _configure()
    try:
        yield
    finally:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # its metrics thread outlives Ray by a moment
        encoders.cache_clear()
        encoder_facts.cache_clear()
        ray.shutdown()


@retry(stop=stop_after_attempt(3), reraise=True, before_sleep=lambda _: ray.shutdown())
def _start() -> None:
    """ray.init, tried again: a new local node has 30 s to come up, which a busy laptop may miss."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
        return
    slots = max(LOCAL_SLOTS, os.cpu_count() or 1)
    with _silent_stderr():
        ray.init(address="local", num_cpus=slots, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ core writes a banner past Python's logging; what fails here is raised, not printed."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _configure() -> None:
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def n_shards(index: pa.Table, size: int) -> int:
    return -(-index.num_rows // size)


def shards_of(index: pa.Table, size: int, numbers: Sequence[int]) -> Dataset:
    """An index cut into blocks of `size` rows, each with its number in the column `shard`."""
    return ray.data.from_arrow([_shard(index, size, number) for number in numbers])


def _shard(index: pa.Table, size: int, number: int) -> pa.Table:
    table = index.slice(number * size, size)
    return table.append_column("shard", pa.array([number] * table.num_rows, pa.int32())).combine_chunks()


def through(dataset: Dataset, name: str, work: stages.Stage) -> Dataset:
    """Add a stage that runs as tasks, one whole shard a call."""
    return dataset.map_batches(stages.timed(name, work), batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def decoded(dataset: Dataset, encoder: EncoderFacts, crop: config.Crop | None = None) -> Dataset:
    """index -> bytes, image_id, pixels; with `crop`, one row a box."""
    dataset = through(dataset, "read", stages.load)
    if crop is not None:
        dataset = through(dataset, "crop", stages.Crop(crop))
    return through(dataset, "decode", stages.Decode(encoder.fit, encoder.side))


def embedded(dataset: Dataset, settings: config.Encoder) -> Dataset:
    """pixels (and text) -> vector, by the session's encoders; shards take turns among them."""
    actors = encoders(settings.model_dump_json())

    def embed(table: pa.Table) -> pa.Table:
        if table.num_rows == 0:
            return stages.with_vectors(table, np.zeros((0, 1), np.float32))
        return ray.get(actors[table["shard"][0].as_py() % len(actors)].embed.remote(table))

    return dataset.map_batches(embed, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def together(datasets: Sequence[Dataset]) -> Dataset:
    """Datasets of equal columns as one, so that they share a pool of actors."""
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def collect(dataset: Dataset) -> pa.Table:
    """Run a pipeline and bring its rows here: for what is small, such as a memory's entries."""
    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


def write(table: pa.Table, sink: Datasink) -> None:
    """Write rows through a sink's parallel tasks."""
    ray.data.from_arrow(table).write_datasink(sink)


@dataclass(frozen=True)
class EncoderFacts:
    """What the driver and the decode tasks must know of an encoder, found out by a worker: the driver need not load torch."""

    side: int
    dim: int
    fingerprint: str
    resize_mode: str
    interpolation: str

    def fit(self, image: np.ndarray) -> np.ndarray:
        return fit_square(image, self.side, self.resize_mode, self.interpolation)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class EncoderActor:
    """One loaded encoder. It outlives a pipeline: the memory, the calibration and every run of a session share it."""

    def __init__(self, settings: str) -> None:
        self.mistake: str | None = None  # kept and asked for: a constructor that raises would be tried again and again
        try:
            self.stage = stages.Embed(config.Encoder.model_validate_json(settings))
        except UserError as error:
            self.mistake = str(error)

    def facts(self) -> EncoderFacts | str:
        """What the driver must know, or what the user must mend."""
        if self.mistake is not None:
            return self.mistake
        encoder = self.stage.encoder
        return EncoderFacts(encoder.side, encoder.dim, encoder.fingerprint(), encoder.resize_mode, encoder.interpolation)

    def embed(self, table: pa.Table) -> pa.Table:
        return self.stage(table)


@lru_cache
def encoders(settings: str) -> tuple[Any, ...]:
    """The session's actors for a config.Encoder as JSON; `local_ray` forgets them."""
    parsed = config.Encoder.model_validate_json(settings)
    gpus = 0 if parsed.device == "cpu" or not ray.cluster_resources().get("GPU") else 1
    start = EncoderActor.options(num_cpus=1, num_gpus=gpus)  # type: ignore[attr-defined]
    return tuple(start.remote(settings) for _ in range(parsed.workers))


@lru_cache
def encoder_facts(settings: str) -> EncoderFacts:
    """Of a config.Encoder as JSON. Raises UserError for a model that cannot be loaded."""
    found = ray.get(encoders(settings)[0].facts.remote())
    if isinstance(found, str):
        raise UserError(found)
    return found


@contextmanager
def progress(folder: RunFolder, total: int, title: str) -> Iterator[None]:
    """Print a line every few seconds from what is on disk: rows done, rows/s, time left. Works for any number of workers."""
    done = threading.Event()
    start, began = sum(folder.progress()), time.monotonic()

    def report() -> None:
        while not done.wait(5):
            now = sum(folder.progress())
            rate = (now - start) / (time.monotonic() - began)
            left = f"{(total - now) / rate:.0f} s left" if rate else "starting"
            print(f"  {title}: {now:,} of {total:,} rows, {rate:,.0f} rows/s, {left}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
