"""A Milvus server to measure against and to test with: PyPI's standalone `milvus==2.3.5` (a development dependency).

Its etcd has fixed ports, so one machine runs one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rar.schema import UserError

ETCD_PORTS = (2379, 2380)


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the process that is all of it."""

    address: str
    pid: int


@contextmanager
def milvus_server(folder: Path) -> Iterator[Server]:
    """Start a server that keeps its data in `folder`, and stop it at the end. Takes some seconds, and more the first time.

    Raises UserError where the package is missing or another server (or etcd) runs on this machine.
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
        yield Server(f"http://127.0.0.1:{server.listen_port}", server.server_proc.pid)
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
