"""What a command owns while it runs: its place in Ray, the models that it has loaded, and the address of its memory.

On a laptop Ray is started here and ends with the command; where RAY_ADDRESS is set (a submitted job) that cluster is joined. A
laptop's models share its cores by turns, so each gets all threads and reserves next to none of Ray's CPUs: one model more must
not wait for a CPU that never gets free. On a cluster a model reserves a CPU and Ray gives it as many threads.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray._private import worker
from tenacity import retry, stop_after_attempt

from rar import config
from rar.engine import faults, models
from rar.engine.actors import ModelActor, Pool
from rar.hardware import multiplies
from rar.memory.store import open_store
from rar.ranker.requests import Offers
from rar.schema import Unavailable, UserError

OBJECT_STORE_BYTES = 1 << 30
STALLED = 6  # patiences without any shard done, by whatever stage, end a run: a model may hang, but large shards take long
WARM = 2  # processes of tasks that begin while models load
LOCAL_SLOTS = 3  # logical CPUs of a laptop's Ray, for tasks: models hardly reserve any there


@dataclass(frozen=True)
class Session:
    """memory: the address that workers reach it at; None where the command needs none.

    threads: of a model on a laptop whose cores all models share; None on a cluster, where Ray decides. patience_s: for what
    stays away. endings: called when the session closes. engines: addresses of those that run (see hosted), one at a time
    starting.
    """

    memory: str | None
    threads: int | None
    patience_s: float = 300.0
    pools: dict[tuple[str, str], Pool] = field(default_factory=dict, repr=False)
    endings: ExitStack = field(default_factory=ExitStack, repr=False)
    lock: RLock = field(default_factory=RLock, repr=False)  # of threads that start what all share
    engines: dict[str, list[str]] = field(default_factory=dict, repr=False)
    offers: dict[str, Offers] = field(default_factory=dict, repr=False)
    starting: Lock = field(default_factory=Lock, repr=False)

    @property
    def memory_address(self) -> str:
        assert self.memory is not None, "this session was opened without a memory"
        return self.memory

    @property
    def joined(self) -> bool:
        """Whether this is a cluster that others may use, too."""
        return self.threads is None

    @property
    def task_cpus(self) -> float:
        """CPUs that must stay free of models, on a cluster, for tasks to run at all."""
        return 1.0 if self.joined else 0.0

    def reserves(self, model: config.Placed) -> tuple[float, float]:
        """(GPUs, CPUs) that a process with a model reserves: by default one GPU, where there are any and it may be."""
        gpus, cpus = model.num_gpus, model.num_cpus
        if gpus is None:
            gpus = float(model.device != "cpu" and ray.cluster_resources().get("GPU", 0.0) >= 1)
        if not self.joined:
            cpus = 0.01
        elif cpus is None:
            cpus = 0.0 if gpus else 1.0  # a process beside a GPU waits for no CPU
        return gpus, cpus

    def options(self, model: config.Encoder | config.Detector | config.Ranker) -> dict[str, Any]:
        """Ray's options of a process with a model; says where its numbers are slow on processors like this one."""
        gpus, cpus = self.reserves(model)
        if not gpus and not multiplies(model.precision):
            key = {config.Encoder: "encoder", config.Detector: "detect.detector", config.Ranker: "ranker"}[type(model)]
            told = f"{key}.precision {model.precision}: this machine's processor does not multiply it; fp32 is far faster"
            print(f"  {told}", file=sys.stderr, flush=True)
        return {"num_cpus": cpus, "num_gpus": gpus, "resources": model.resources}

    def threads_of(self, models: int) -> int | None:
        """Threads of each of `models` that run at once; None: as many as Ray gives."""
        return None if self.threads is None else max(1, self.threads // models)

    def encoder(self, settings: config.Encoder) -> Pool:
        """The actors of an encoder, started when first asked for."""
        return self._pool("encoder", models.Embed, settings, settings)

    def detector(self, settings: config.Detect) -> Pool:
        """The actors of `detect.detector`. Raises UserError for a model that cannot be loaded."""
        assert settings.detector is not None
        pool = self._pool("detector", models.Propose, settings, settings.detector)
        _ = pool.facts
        return pool

    def _pool(self, kind: str, load: type[models.Model], settings: Any, model: config.Encoder | config.Detector) -> Pool:
        key = (kind, settings.model_dump_json())
        with self.lock:
            if key not in self.pools:
                most = max(model.workers, model.max_workers or 0)
                start = partial(_start_actor, self.options(model), load, settings, self.threads_of(most))
                self.pools[key] = Pool(start, (model.workers, most), kind, load.failed, self.patience_s)
            return self.pools[key]


def _start_actor(options: dict[str, Any], *arguments: Any) -> Any:
    return ModelActor.options(**options).remote(*arguments)  # type: ignore[attr-defined]


@contextmanager
def opened(
    memory: config.Memory | None = None, *, create: bool = False, patience_s: float = 300.0, joined: bool = False
) -> Iterator[Session]:
    """Milvus (with `memory`) and Ray for the length of a command; what fails in it leaves as the contract's errors (faults).

    With `create` an embedded store may be new; one that a user's mistake leaves empty is removed again. joined: this process
    is one of a cluster's, though no RAY_ADDRESS says so. Raises UserError where there is no store, and what
    `memory.store.open_store` raises.
    """
    missing = memory is not None and "://" not in memory.uri and not Path(memory.uri).exists()
    if memory is not None and missing and not create:
        raise UserError(f"there is no memory at {memory.uri}; build it with `rar memory CONFIG`")
    try:
        with ExitStack() as stack:
            pa.default_memory_pool().release_unused()  # what listing a corpus took, before the workers come
            stack.enter_context(faults.crossing())
            address = stack.enter_context(open_store(memory.uri, memory.token)) if memory is not None else None
            threads = stack.enter_context(_in_ray(patience_s, joined or "RAY_ADDRESS" in os.environ))
            session = Session(address, threads, patience_s)
            if memory is not None:
                check_reached(memory.uri)
            with session.endings:
                yield session
    except UserError:
        if memory is not None and missing:
            shutil.rmtree(memory.uri, ignore_errors=True)
        raise


def _imported() -> None:
    """What the tasks of a pipeline import: a process that has done it, while the models load, works at once."""
    from rar.engine import choosing, sinks  # noqa: F401


def check_reached(uri: str) -> None:
    """Raises UserError for an embedded store where Ray has workers on other machines."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if "://" not in uri and len(hosts) > 1:
        raise UserError(f"memory.uri {uri} is of this machine alone, and the cluster has {len(hosts)}: name a server")


@contextmanager
def _in_ray(patience_s: float, joined: bool) -> Iterator[int | None]:
    """Join the cluster this process was submitted to, or start Ray here, quietly, and stop it afterwards."""
    threads = None if joined else int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    if ray.is_initialized():
        yield threads
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU: no warning about it
    try:
        with _own_sigterm():
            _start(not joined)
    except Exception as error:  # Ray's own class for it is Exception
        if "timed out during startup" not in str(error):
            raise
        raise Unavailable("Ray did not start within 30 s, three times in a row: this machine is too busy") from None
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = STALLED * patience_s
    context.raise_original_map_exception = True  # else Ray Data hides a UserError in an error of its own
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log as errors is raised as well
    if not joined:
        for _ in range(WARM):
            ray.remote(num_cpus=1, max_retries=0)(_imported).remote()
    try:
        yield threads
    finally:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # its metrics thread outlives Ray by a moment
        ray.shutdown()


@retry(stop=stop_after_attempt(3), reraise=True, before_sleep=lambda _: ray.shutdown())
def _start(local: bool) -> None:
    """ray.init, tried again: a new local node has 30 s to come up, which a busy laptop may miss."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    worker.listen_error_messages = _unheard  # type: ignore[assignment]  # it prints to stdout, whatever log_to_driver says
    if not local:
        with _silent_stderr():
            ray.init(**quiet)
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # models take turns on the cores: none may spin while it waits
    slots = max(LOCAL_SLOTS, os.cpu_count() or 1)
    with _silent_stderr():
        ray.init(address="local", num_cpus=slots, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM over when it starts: a stack dump and exit code 15, where `jobs.common.guarded` ends a run in order."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _unheard(*_: Any) -> None:
    """Raylets tell every driver of each process that dies, in paragraphs. What a run cannot mend by itself is raised, too."""


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
