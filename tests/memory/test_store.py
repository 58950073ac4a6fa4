"""Stores: who owns a folder, how a server is reached, and what happens while it is away.

Milvus Lite stands in for servers with a token, TLS or databases; the real server is in test_memory.
"""

from __future__ import annotations

import base64
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from rar.bench.server import free_port
from rar.memory import store
from rar.memory.collection import Collection, open_store
from rar.schema import Unavailable, UserError
from tests.conftest import ROOT
from tests.stores import FLAT, HNSW, META, REDUCED, assert_same, built, exact, fill, lying_low, unit


def test_a_store_is_reopened_with_its_memories(tmp_path: Path) -> None:
    vectors = lying_low(400)
    for kind in (FLAT, HNSW, REDUCED):
        with open_store(str(tmp_path)) as address:
            built(Collection(address, f"m{kind.kind}"), vectors, kind)
    with open_store(str(tmp_path)) as address:
        for kind in (FLAT, HNSW, REDUCED):
            collection = Collection(address, f"m{kind.kind}")
            assert collection.meta()["index"] == kind.kind
            assert collection.search(vectors[:5], 1).entry_ids == [[f"e{n:06d}"] for n in range(5)]
            assert_same(collection.fetch(), exact(vectors).fetch())


def test_a_killed_owner_leaves_what_it_wrote(tmp_path: Path) -> None:
    owner = own_in_another_process(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with open_store(str(tmp_path)) as address:
        collection = Collection(address, "m")
        collection.create(8, FLAT, META, size_hint=5)
        fill(collection, unit(5, 8))
        collection.seal(5)


def test_a_folder_in_use_is_waited_for_and_then_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.5)
    owner = own_in_another_process(tmp_path)
    try:
        with pytest.raises(UserError, match="another process uses the memory"), open_store(str(tmp_path)):
            pass
    finally:
        owner.kill()
        owner.wait()


def own_in_another_process(folder: Path) -> subprocess.Popen[str]:
    """A process that has written five unsealed entries and keeps the store open."""
    code = (
        "import sys, time; from tests.stores import *; from rar.memory.collection import open_store\n"
        "with open_store(sys.argv[1]) as address:\n"
        "    memory = Collection(address, 'm')\n"
        "    memory.create(8, FLAT, META, size_hint=5)\n"
        "    fill(memory, unit(5, 8))\n"
        "    print('written', flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = ROOT
    owner = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "written\n"
    return owner


def test_parallel_writers_lose_nothing_while_buffers_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads switch all the time and every other request flushes, which breaks Milvus Lite unless its writes take turns."""
    monkeypatch.setattr("milvus_lite.engine.collection.MEMTABLE_MEMORY_LIMIT", 4_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with open_store(str(tmp_path)) as address:
            collection = Collection(address, "m")
            collection.create(16, FLAT, META, size_hint=4000)
            with futures.ThreadPoolExecutor(4) as pool:
                list(pool.map(write_rows, [Collection(address, "m") for _ in range(4)], range(4)))
            collection.seal(1200)
    finally:
        sys.setswitchinterval(interval)


def write_rows(collection: Collection, part: int) -> None:
    for start in range(300 * part, 300 * part + 300, 20):
        ids = [f"e{n:06d}" for n in range(start, start + 20)]
        collection.upsert(ids, range(20), ids, unit(20, 16))


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for uri, reason in (
        (tmp_path, "folder of something else"),
        (tmp_path / "photo.jpg", "is a file"),
        ("s3://bucket/memory", "must be a folder or start with http"),
    ):
        with pytest.raises(UserError, match=reason), open_store(str(uri)):
            pass


@pytest.mark.long
def test_an_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(store, "REACH_SECONDS", 1.0)
    monkeypatch.setattr(store, "CONNECT_SECONDS", 0.5)
    uri = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(Unavailable, match=uri), open_store(uri):
        pass
    with pytest.raises(Unavailable, match=uri):
        Collection(uri, "m", patience_s=1.0).count()
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_a_server_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner stops and starts again on the same port while a worker keeps its collection."""
    vectors, port = unit(20, 8), free_port()
    database = store.own(tmp_path)
    server, port = store.listen(database)
    collection = built(Collection(f"http://127.0.0.1:{port}", "m"), vectors)
    server.stop(grace=0).wait()
    with futures.ThreadPoolExecutor(1) as pool:
        search = pool.submit(collection.search, vectors[:1], 1)
        time.sleep(1.0)
        assert not search.done()
        server, _ = store.listen(database, port)
        assert search.result(timeout=30).entry_ids == [["e000000"]]
    server.stop(grace=0).wait()
    database.close()


# Tokens, databases, TLS


class Gate(grpc.ServerInterceptor):
    """Lets those pass who send the token, as Milvus' proxy does."""

    def __init__(self, token: str) -> None:
        self.expected = base64.b64encode(token.encode()).decode()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        if dict(details.invocation_metadata).get("authorization") == self.expected:
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure")
        )


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server

    database = store.own(tmp_path / "store")
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[Gate("root:Milvus")])
    add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(grace=0).wait()
    database.close()


def test_the_token_opens_the_server(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, "root:wrong"):
        with pytest.raises(UserError, match="refused the token; set memory"), open_store(guarded, token):
            pass
        with pytest.raises(UserError, match="refused the token"):
            Collection(guarded, "m", token).exists()
    with open_store(guarded, "root:Milvus") as address:
        assert not Collection(address, "m", "root:Milvus").exists()
    monkeypatch.setenv("MILVUS_TOKEN", "root:Milvus")
    with open_store(guarded) as address:
        assert not Collection(address, "m").exists()


def test_databases_are_apart_and_never_made(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as served:
        with pytest.raises(UserError, match="has no database 'birds'; create it"), open_store(f"{served}/birds"):
            pass
        client = store.connect(served, None)
        client.create_database("birds")
        client.close()
        with open_store(f"{served}/birds") as address:
            built(Collection(address, "m"), unit(5, 8))
            assert Collection(address, "m").count() == 5
        assert not Collection(served, "m").exists()


@pytest.mark.parametrize(
    "uri",
    ["http://", "http://host:port", "http://host:1/a/b", "http://host:1/a?b=c", "https://host:1/#a", "http://host:1/mem.db"],
)
def test_uris_that_pymilvus_would_misread_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"http\(s\)://host:port/database"), open_store(uri):
        pass


@pytest.mark.long
def test_a_server_behind_tls(tmp_path: Path) -> None:
    """In a process of its own: gRPC reads its certificates once. A store is served in the clear to a proxy that speaks TLS."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    code = (
        "import sys; from tests.stores import *; from rar.memory import store; store.REACH_SECONDS = 3.0\n"
        "with store.open_store(sys.argv[1]) as address:\n"
        "    print(built(Collection(address, 'm'), unit(5, 8)).count())\n"
    )
    root = ROOT
    with open_store(str(tmp_path / "store")) as served, tls_proxy(certificate, key, served) as port:
        command, uri = [sys.executable, "-c", code], f"https://localhost:{port}"
        known = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}
        run = subprocess.run([*command, uri], cwd=root, env=known, capture_output=True, text=True, timeout=60)
        assert run.stdout == "5\n", run.stderr
        unknown = subprocess.run([*command, uri], cwd=root, env={}, capture_output=True, text=True, timeout=60)
        assert f"Unavailable: Milvus at {uri} stayed away" in unknown.stderr


@contextmanager
def tls_proxy(certificate: Path, key: Path, served: str) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    target = urlsplit(served)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                plain, _ = listener.accept()
                with suppress(ssl.SSLError):
                    outside = context.wrap_socket(plain, server_side=True)
                    inside = socket.create_connection((target.hostname or "", target.port or 0))
                    for ends in ((outside, inside), (inside, outside)):
                        threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
