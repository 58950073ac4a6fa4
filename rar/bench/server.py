"""Stores in processes of their own, to measure against and to test with: Milvus Lite, and PyPI's Milvus server.

The server is the standalone `milvus==2.3.5`, a development dependency. Its etcd has fixed ports, so one machine runs one.
"""

from __future__ import annotations

import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rar.memory.collection import open_store
from rar.schema import UserError

ETCD_PORTS = (2379, 2380)
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Server:
    """A running store: its address, and the one process that owns it.

    restart: kills it, and starts it again on the same data and address after so many seconds; of a Milvus server alone.
    """

    address: str
    pid: int
    restart: Callable[[float], None] | None = None


@contextmanager
def lite_server(folder: Path) -> Iterator[Server]:
    """A folder owned by a process that does nothing else. Leaving waits until its indexes are built."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_own, args=(str(folder), there), daemon=True)
    process.start()
    there.close()
    address = here.recv()
    assert process.pid is not None
    try:
        yield Server(address, process.pid)
    finally:
        here.send(None)
        process.join()


def _own(folder: str, pipe: Connection) -> None:
    with open_store(folder) as address:
        pipe.send(address)
        pipe.recv()


@contextmanager
def milvus_server(folder: Path) -> Iterator[Server]:
    """A Milvus server that keeps its data in `folder`. It needs some seconds to start.

    Raises UserError where the package is missing, or another server (or etcd) runs on this machine.
    """
    try:
        import milvus
    except ImportError:
        raise UserError("this needs a Milvus server: `pip install milvus==2.3.5` (Linux x86-64)") from None
    if any(is_taken(port) for port in ETCD_PORTS):
        raise UserError(f"another Milvus or etcd runs on this machine (ports {ETCD_PORTS[0]} and {ETCD_PORTS[1]}); end it")
    server = milvus.MilvusServer(milvus.MilvusServerConfig(data_dir=str(folder), proxy_port=free_port()))
    server.webservice_port = free_port()
    try:
        server.start()
        yield Server(f"http://127.0.0.1:{server.listen_port}", server.server_proc.pid, partial(_restart, server))
    finally:
        server.stop()


def _restart(server: Any, away_s: float) -> None:
    server.server_proc.kill()
    server.server_proc.wait()
    server.stop()
    time.sleep(away_s)
    server.config.resolve = lambda: None  # it tries whether its port is free, which connections that broke keep it from
    server.webservice_port = free_port()
    server.start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process in MiB, now (VmRSS) or at most since it was last forgotten (VmHWM). NaN where not Linux."""
    if not PROCESSES.is_dir():
        return math.nan
    for line in (PROCESSES / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} of process {pid}")


def forget_peak(pid: int) -> None:
    """Let VmHWM start again from what is resident now (proc(5), clear_refs)."""
    if PROCESSES.is_dir():
        (PROCESSES / str(pid) / "clear_refs").write_text("5")
