"""Ray Data: shards of the corpus flow through the stages, on one laptop or many machines. The home of ray.data.

A block is a shard. Blocks are kept whole (no size limit splits them, no batch regroups them), because a shard is what is
written, resumed and batched together (see runfolder). Cost: a worker holds a shard of encoded images in memory, about
`run.shard_size` x the mean file size; choose smaller shards for very large pictures.

Actors hold what is slow to load (the encoder); everything else is a task. The encoder's actors and the decode tasks run at
the same time, so decoding overlaps the forward pass; ranking is a remote call, so its tasks wait more than they work.
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
from ray.data import ActorPoolStrategy, Dataset
from ray.data.datasource import Datasink
from tenacity import retry, stop_after_attempt

from rar import config, stages
from rar.decode import fit_square
from rar.runfolder import RunFolder
from rar.schema import UserError

OBJECT_STORE_BYTES = 1 << 30
LOCAL_SLOTS = 6  # logical CPUs of a laptop's Ray: encoder, ranker and decode tasks are placed at once and share the cores


@contextmanager
def local_ray() -> Iterator[None]:
    """Join the cluster this process was submitted to (RAY_ADDRESS), or start Ray here, quietly, and stop it afterwards."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # workers need no second `uv run`: this environment is complete
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin at barriers starve their neighbours on few cores
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    _start()
    _configure()
    try:
        yield
    finally:
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
    return dataset.map_batches(stages.timed(name, work), batch_size=None, batch_format="pyarrow", num_cpus=0.5)


def decoded(dataset: Dataset, encoder: EncoderFacts, crop: config.Crop | None = None) -> Dataset:
    """index -> bytes, image_id, pixels; with `crop`, one row a box."""
    dataset = through(dataset, "read", stages.load)
    if crop is not None:
        dataset = through(dataset, "crop", stages.Crop(crop))
    return through(dataset, "decode", stages.Decode(encoder.fit, encoder.side))


def embedded(dataset: Dataset, settings: config.Encoder) -> Dataset:
    """pixels (and text) -> vector, by actors that hold the encoder."""
    return dataset.map_batches(
        stages.Embed,
        fn_constructor_args=(settings,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=settings.workers),
        num_cpus=1,
        num_gpus=1 if settings.device.startswith("cuda") else 0,
    )


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


@lru_cache
def encoder_facts(settings: str) -> EncoderFacts:
    """settings: a config.Encoder as JSON. Raises UserError for a model that cannot be loaded."""
    try:
        return EncoderFacts(**ray.get(_probe.remote(settings)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


@ray.remote(num_cpus=1)
def _probe(settings: str) -> dict[str, Any]:
    from rar.embed import ClipEncoder

    encoder = ClipEncoder(config.Encoder.model_validate_json(settings))
    return {
        "side": encoder.side,
        "dim": encoder.dim,
        "fingerprint": encoder.fingerprint(),
        "resize_mode": encoder.resize_mode,
        "interpolation": encoder.interpolation,
    }


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
