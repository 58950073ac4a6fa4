"""The home of pymilvus and milvus_lite: opening a store, connecting to it, and patience with a server that is away.

Hard choices, and what they cost:
- One owner serves an embedded store. Milvus Lite locks its folder to one process, so `open_store` opens the folder in this
  process and serves it on loopback; workers are ordinary clients, and a real server is the same code with another uri.
- Writes to an embedded store take turns. Milvus Lite allocates row numbers, swaps its write buffer and opens collections
  without a lock, while its server runs requests in ten threads: parallel writers can lose entries. Searches stay parallel.
- pymilvus and milvus_lite take seconds to import, so they are imported by the functions that use them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import (
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_delay,
    wait_fixed,
    wait_random_exponential,
)

from rar.schema import Unavailable, UserError

if TYPE_CHECKING:
    import grpc
    from milvus_lite.db import MilvusLite
    from pymilvus import MilvusClient

T = TypeVar("T")

IN_TURN = ["CreateCollection", "DropCollection", "AlterCollection", "Insert", "Upsert", "Delete", "Flush"]
IN_TURN += ["ShowCollections", "_get_collection"]
DATABASE_NOT_FOUND = 800  # Milvus' code; Milvus Lite has no code of its own for it
LOCK_SECONDS = 10.0  # a killed owner's lock is freed by the kernel at once; one that is shutting down is still writing
REACH_SECONDS = 10.0
CONNECT_SECONDS = 3.0
PATIENCE_S = 300.0  # with a server that was reached, by default: a cluster that starts again takes minutes


@contextmanager
def open_store(uri: str, token: str | None = None) -> Iterator[str]:
    """Yield the address that `Collection` connects to, here and in worker processes.

    A folder (created when missing) is opened with Milvus Lite and served on 127.0.0.1 by this process until the block ends;
    it is reachable from this machine only. http://host:port is a Milvus server, https:// one behind TLS (a certificate of
    one's own is named in GRPC_DEFAULT_SSL_ROOTS_FILE_PATH), and a path after the port names its database; the server is asked
    for its collections and the uri yielded unchanged.
    Raises UserError (not a memory folder, a folder in use by another process, a refused token, no such database) and
    Unavailable.
    """
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        patiently(lambda: _reach(uri, token), uri, REACH_SECONDS)
        yield uri
    elif "://" in uri:
        raise UserError(f"memory.uri must be a folder or start with http:// or https://, got {uri!r}")
    else:
        database = own(Path(uri))
        server, port = listen(database)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stop(grace=5).wait()
            database.close()


def _check_server(uri: str) -> None:
    """pymilvus drops what it does not know of a uri; each of these would reach another store than the one meant."""
    try:
        parts = urlsplit(uri)
        named = parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        named = None
    if not named or len(parts.path.strip("/").split("/")) > 1 or parts.query or parts.fragment or uri.endswith(".db"):
        raise UserError(f"memory.uri of a server is http(s)://host:port or http(s)://host:port/database, got {uri!r}")


def _reach(uri: str, token: str | None) -> None:
    client = connect(uri, token)
    try:
        client.list_collections()
    except Exception as error:
        database = urlsplit(uri).path.strip("/")
        if database and (getattr(error, "code", None) == DATABASE_NOT_FOUND or "database" in str(error).lower()):
            raise UserError(f"Milvus at {uri} has no database {database!r}; create it, or correct memory.uri") from None
        raise
    finally:
        client.close()


def own(folder: Path) -> MilvusLite:
    """Open a folder with Milvus Lite, waiting a while for a previous owner to let go of it."""
    _quiet()
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    if folder.is_file():
        raise UserError(f"memory.uri {folder} is a file; give a folder (a file of Milvus Lite 2 must be built again)")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "collections").is_dir():
        raise UserError(f"memory.uri {folder} is a folder of something else; give a new or empty folder")
    free = Retrying(
        retry=retry_if_exception_type(DataDirLockedError),
        stop=stop_after_delay(LOCK_SECONDS),
        wait=wait_fixed(0.2),
        reraise=True,
    )
    try:
        return free(MilvusLite, str(folder))
    except DataDirLockedError:
        raise UserError(f"another process uses the memory {folder}; end it, or choose another memory.uri") from None
    except OSError as error:
        raise UserError(f"cannot open memory.uri {folder}: {error.strerror}") from None


def listen(database: MilvusLite, port: int = 0) -> tuple[grpc.Server, int]:
    """Serve on a port of loopback, by default a free one.

    milvus_lite has this as `start_server_in_thread`; there, writes do not take turns.
    """
    import grpc
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server

    servicer, turn = MilvusServicer(database), threading.RLock()
    for name in IN_TURN:
        setattr(servicer, name, partial(_in_turn, turn, getattr(servicer, name)))
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    options += [("grpc.http2.max_ping_strikes", 0)]  # pymilvus pings an idle connection oftener than gRPC would bear
    server = grpc.server(ThreadPoolExecutor(max_workers=10, thread_name_prefix="milvus-lite"), options=options)
    add_MilvusServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


def _in_turn(turn: AbstractContextManager[Any], handler: Callable[..., T], request: object, context: object) -> T:
    with turn:
        return handler(request, context)


def connect(address: str, token: str | None) -> MilvusClient:
    """A client with a connection of its own, so that a broken one can be thrown away."""
    _quiet()
    from pymilvus import MilvusClient

    token = token or os.environ.get("MILVUS_TOKEN", "")
    return MilvusClient(address, token=token, timeout=CONNECT_SECONDS, dedicated=True)


_own = threading.local()  # of a thread: its connections by address and token
OWN = 4


def connected(address: str, token: str | None) -> MilvusClient:
    """This thread's connection, made when it is first asked for: the next task of a worker takes up that of the last one."""
    kept: dict[tuple[str, str | None], MilvusClient] = _own.__dict__.setdefault("kept", {})
    if (address, token) not in kept:
        for oldest in list(kept)[: max(0, 1 + len(kept) - OWN)]:
            del kept[oldest]
        kept[address, token] = connect(address, token)
    return kept[address, token]


def forget(address: str, token: str | None) -> None:
    """Make this thread's next connection anew."""
    _own.__dict__.get("kept", {}).pop((address, token), None)


def _quiet() -> None:
    """Every error that matters is raised; the libraries also log it, with tracebacks, and gRPC reports every fork on stderr."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is first imported
    import pymilvus  # noqa: F401  sets the levels that are changed here

    for name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def patiently(action: Callable[[], T], address: str, seconds: float, before_retry: Callable[[], None] = lambda: None) -> T:
    """Repeat an action while the server is away. Raises Unavailable when it stays away, UserError when it refuses the token."""
    patience = Retrying(
        retry=retry_if_exception(_is_away),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(0.2, max=5),
        before_sleep=lambda _: before_retry(),
        reraise=True,
    )
    try:
        return patience(action)
    except Exception as error:
        if _has_code(error, "UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise UserError(f"Milvus at {address} refused the token; set memory.token or MILVUS_TOKEN") from None
        if _is_away(error):
            raise Unavailable(f"Milvus at {address} stayed away for {seconds:.0f} s; check memory.uri and the server") from None
        raise


def _is_away(error: BaseException) -> bool:
    from pymilvus.client.types import Status

    if _has_code(error, "UNAUTHENTICATED", "PERMISSION_DENIED"):
        return False
    lost = getattr(error, "code", None) == Status.CONNECT_FAILED or getattr(error, "retriable", False)
    return lost or _has_code(error, "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _has_code(error: BaseException | None, *names: str) -> bool:
    """Whether an error, or one that it came from, has a gRPC code; pymilvus hides them in causes or in its own errors."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        code = getattr(error, "code", None)
        if getattr(code() if callable(code) else code, "name", None) in names:
            return True
        seen.append(error)
        error = error.__cause__
    return False
