"""Ray Data: shards of the corpus flow through the stages, on one laptop or many machines. The home of ray.data.

A block is a shard. Blocks are kept whole (no size limit splits them, no batch regroups them), because a shard is what is
written, resumed and batched together (see runfolder). Cost: a worker holds a shard of encoded images (or of crops) in memory,
about `run.shard_size` x the mean file size; choose smaller shards for very large pictures. Images with many boxes are cut into
shards by their boxes, so that memory does not grow with them.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset
from ray.data.datasource import Datasink
from tenacity import retry, stop_after_attempt

from rar import config
from rar.engine import stages
from rar.runfolder import RunFolder
from rar.schema import UserError

OBJECT_STORE_BYTES = 1 << 30
LOCAL_SLOTS = 3  # logical CPUs of a laptop's Ray, for tasks: models hardly reserve any there (see stages.model_cpus)
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
        for kept in (encoders, encoder_facts, detectors):
            kept.cache_clear()
        ray.shutdown()


@retry(stop=stop_after_attempt(3), reraise=True, before_sleep=lambda _: ray.shutdown())
def _start() -> None:
    """ray.init, tried again: a new local node has 30 s to come up, which a busy laptop may miss."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
        return
    cores = os.cpu_count() or 1
    os.environ.setdefault("RAR_THREADS", os.environ.get("OMP_NUM_THREADS", str(cores)))  # see checkpoint.share_cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # models take turns on the cores: none may spin while it waits
    slots = max(LOCAL_SLOTS, cores)
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


def cut(weights: np.ndarray, size: int) -> np.ndarray:
    """Bounds (shards + 1,) of consecutive shards of at most `size` rows each; weights (N,): how many rows each item becomes.

    An item of no rows counts as one, and one of more than `size` rows is a shard of its own.
    """
    bounds, filled = [0], 0
    for item, rows in enumerate(np.maximum(weights, 1).tolist()):
        if filled and filled + rows > size:
            bounds.append(item)
            filled = 0
        filled += rows
    return np.array(bounds + [len(weights)] * bool(len(weights)))


def evenly(index: pa.Table, size: int) -> np.ndarray:
    """Bounds of shards of `size` items that become one row each."""
    return cut(np.ones(index.num_rows, np.int64), size)


def shards_of(index: pa.Table, bounds: np.ndarray, numbers: Sequence[int] | None = None) -> Dataset:
    """An index cut at `bounds` into blocks, each with its number in the column `shard`; only some of them by `numbers`."""
    chosen = range(len(bounds) - 1) if numbers is None else numbers
    return ray.data.from_arrow([_shard(index, bounds, number) for number in chosen])


def _shard(index: pa.Table, bounds: np.ndarray, number: int) -> pa.Table:
    table = index.slice(bounds[number], bounds[number + 1] - bounds[number])
    return table.append_column("shard", pa.array([number] * table.num_rows, pa.int32())).combine_chunks()


def through(dataset: Dataset, name: str, work: stages.Stage) -> Dataset:
    """Add a stage that runs as tasks, one whole shard a call."""
    return dataset.map_batches(stages.timed(name, work), batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def plainly(dataset: Dataset, work: stages.Stage) -> Dataset:
    """The same for a step that only renames and selects: it is not timed."""
    return dataset.map_batches(work, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def with_pixels(dataset: Dataset, encoder: stages.EncoderFacts, crop: config.Crop | None = None) -> Dataset:
    """bytes -> pixels; with `crop`, one row a box."""
    if crop is not None:
        dataset = through(dataset, "crop", stages.Crop(crop))
    return through(dataset, "decode", stages.Decode(encoder.fit, encoder.side))


def embedded(dataset: Dataset, settings: config.Encoder) -> Dataset:
    """pixels (and text) -> vector, by the session's encoders."""
    return _by_turns(dataset, encoders(settings.model_dump_json()))


def proposed(dataset: Dataset, settings: config.Detect) -> Dataset:
    """bytes -> boxes, by the session's detectors."""
    return _by_turns(dataset, detectors(settings.model_dump_json()))


def _by_turns(dataset: Dataset, actors: Sequence[Any]) -> Dataset:
    """Send whole shards to actors, each shard always to the same one."""

    def run(table: pa.Table) -> pa.Table:
        if table.num_rows == 0:  # a shard of pictures without boxes
            return stages.with_vectors(table, np.zeros((0, 1), np.float32))
        return ray.get(actors[table["shard"][0].as_py() % len(actors)].run.remote(table))

    return dataset.map_batches(run, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)


def together(datasets: Sequence[Dataset]) -> Dataset:
    """Datasets of equal columns as one, so that they share a pool of actors."""
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def collect(dataset: Dataset) -> pa.Table:
    """Run a pipeline and bring its rows here: for what is small, such as a memory's entries.

    Blocks without rows have lost their columns in Ray Data, so a pipeline without any row gives a table without columns.
    """
    blocks = ray.get(dataset.to_arrow_refs())
    return pa.concat_tables([block for block in blocks if block.num_rows] or [pa.table({})])


def write(table: pa.Table, sink: Datasink) -> None:
    """Write rows through a sink's parallel tasks."""
    ray.data.from_arrow(table).write_datasink(sink)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class ModelActor:
    """A stage with a loaded model. It outlives a pipeline: the memory, the calibration and every run of a session share it."""

    def __init__(self, load: Callable[[str], Any], settings: str) -> None:
        self.mistake: str | None = None  # kept and asked for: a constructor that raises would be tried again and again
        try:
            self.stage = load(settings)
        except UserError as error:
            self.mistake = str(error)

    def facts(self) -> Any:
        """What the driver must know of the model, or (a str) what the user must mend."""
        return self.mistake if self.mistake is not None else self.stage.facts()

    def run(self, table: pa.Table) -> pa.Table:
        return self.stage(table)


def _load_encoder(settings: str) -> stages.Embed:
    return stages.Embed(config.Encoder.model_validate_json(settings))


def _load_detector(settings: str) -> stages.Propose:
    return stages.Propose(config.Detect.model_validate_json(settings))


@lru_cache
def encoders(settings: str) -> tuple[Any, ...]:
    """The session's actors for a config.Encoder as JSON; `local_ray` forgets them."""
    parsed = config.Encoder.model_validate_json(settings)
    return _actors(_load_encoder, settings, parsed.device, parsed.workers)


@lru_cache
def detectors(settings: str) -> tuple[Any, ...]:
    """The session's actors for a config.Detect with a detector, as JSON. Raises UserError for a model that cannot be loaded."""
    parsed = config.Detect.model_validate_json(settings)
    assert parsed.detector is not None
    actors = _actors(_load_detector, settings, parsed.detector.device, parsed.detector.workers)
    if isinstance(mistake := ray.get(actors[0].facts.remote()), str):
        raise UserError(mistake)
    return actors


def _actors(load: Callable[[str], Any], settings: str, device: str, workers: int) -> tuple[Any, ...]:
    gpus = 0 if device == "cpu" or not ray.cluster_resources().get("GPU") else 1
    start = ModelActor.options(num_cpus=stages.model_cpus(), num_gpus=gpus)  # type: ignore[attr-defined]
    return tuple(start.remote(load, settings) for _ in range(workers))


@lru_cache
def encoder_facts(settings: str) -> stages.EncoderFacts:
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
