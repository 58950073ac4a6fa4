"""The memory: entries (entry_id, class_id, class_name, vector) in Milvus collections, searched by inner product.

Hard choices, and what they cost:
- One owner serves an embedded store. Milvus Lite locks its folder to one process, so `open_store` opens the folder in this
  process and serves it on loopback; workers are ordinary clients, and a real server is the same code with another uri.
- Writes to an embedded store take turns. Milvus Lite allocates row numbers, swaps its write buffer and opens collections
  without a lock, while its server runs requests in ten threads: parallel writers can lose entries. Searches stay parallel.
- The index exists before the first entry, so `count` and `search` work at any time and a killed build resumes by repeating
  itself: entries have primary keys, so an upsert that is sent twice changes nothing.
- Searches read with bounded staleness, which on a server saves waiting for its clock to tick; `seal` in return waits until
  such a read sees every entry. A memory that is searched before it is sealed may miss what was written seconds ago.
- Equal scores are ordered by entry_id, also across the cut at k: what a search returns must not depend on the order in which
  parallel workers wrote. Scores are compared as they come: on real CLIP memories neighbors of different classes lie closer
  than the float32 noise of a score, so no tolerance is right, and a near tie may fall either way on another machine.
- pymilvus and milvus_lite take seconds to import, and the types here are used by code that has no need of them, so they are
  imported by the functions that do.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tenacity import (
    RetryError,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    retry_if_result,
    stop_after_delay,
    wait_fixed,
    wait_random_exponential,
)

from rar.config import Index
from rar.schema import Unavailable, UserError

if TYPE_CHECKING:
    import grpc
    from milvus_lite.db import MilvusLite
    from pymilvus import MilvusClient

T = TypeVar("T")
IntArray = np.ndarray | Sequence[int]
Neighbors = list[tuple[float, str, int]]  # (-score, entry_id, class_id), sorted

METRIC = "IP"
FIELDS = ["entry_id", "class_id", "class_name", "vector"]
NOT_FOUND = 100  # Milvus' code of a missing collection
IN_TURN = ["CreateCollection", "DropCollection", "Insert", "Upsert", "Delete", "Flush", "ShowCollections", "_get_collection"]
META_KEY = "rar.meta"  # the collection property that holds the JSON; descriptions are dropped by Milvus Lite
FLAT_UP_TO = 50_000
MAX_NEIGHBORS = 16_384  # Milvus' limit of neighbors per query, and of rows per page
MAX_ID_BYTES, MAX_NAME_BYTES = 256, 4096

UPSERT_BYTES = 8 << 20  # per request; Milvus accepts 64 MiB
FETCH_BYTES = 16 << 20  # per page
SEARCH_QUERIES = 512  # per request: Milvus Lite scores a request as one float32 matrix of queries x entries
SEARCH_HITS = 200_000  # per request: hits become Python objects on both sides

LOCK_SECONDS = 10.0  # a killed owner's lock is freed by the kernel at once; one that is shutting down is still writing
REACH_SECONDS = 10.0
CONNECT_SECONDS = 3.0
PATIENCE_SECONDS = 60.0  # covers the restart of a Milvus server


@dataclass(frozen=True, eq=False)
class Hits:
    """The neighbors of N queries, best first; a short row is padded with -inf / -1 / "".

    scores: (N, k) float32 inner products. class_ids: (N, k) int64. entry_ids: N lists of k.
    """

    scores: np.ndarray
    class_ids: np.ndarray
    entry_ids: list[list[str]]


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries in the order of entry_ids: class_ids (N,) int64, vectors (N, D) float32."""

    entry_ids: list[str]
    class_ids: np.ndarray
    class_names: list[str]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.entry_ids)


@contextmanager
def open_store(uri: str, token: str | None = None) -> Iterator[str]:
    """Yield the address that `Collection` connects to, here and in worker processes.

    A folder (created when missing) is opened with Milvus Lite and served on 127.0.0.1 by this process until the block ends;
    it is reachable from this machine only. http(s):// is a Milvus server: it is checked and its uri yielded unchanged.
    Raises UserError (not a memory folder, a folder in use by another process, a refused token) and Unavailable.
    """
    if uri.startswith(("http://", "https://")):
        _patiently(lambda: _connect(uri, token), uri, REACH_SECONDS).close()
        yield uri
    elif "://" in uri:
        raise UserError(f"memory.uri must be a folder or start with http:// or https://, got {uri!r}")
    else:
        database = _own(Path(uri))
        server, port = _serve(database)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stop(grace=5).wait()
            database.close()


def _own(folder: Path) -> MilvusLite:
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


def _serve(database: MilvusLite, port: int = 0) -> tuple[grpc.Server, int]:
    """Serve on a port of loopback, by default a free one.

    milvus_lite has this as `start_server_in_thread`; there, writes do not take turns.
    """
    import grpc
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from pymilvus.grpc_gen.milvus_pb2_grpc import add_MilvusServiceServicer_to_server

    servicer, turn = MilvusServicer(database), threading.RLock()
    for name in IN_TURN:
        setattr(servicer, name, partial(_in_turn, turn, getattr(servicer, name)))
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(max_workers=10, thread_name_prefix="milvus-lite"), options=unlimited)
    add_MilvusServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


def _in_turn(turn: AbstractContextManager[Any], handler: Callable[..., T], request: object, context: object) -> T:
    with turn:
        return handler(request, context)


class Collection:
    """One memory at an address from `open_store`. Picklable: every process connects when it first needs to.

    Every method rides out a server that is away for PATIENCE_SECONDS, then raises Unavailable. All but `create`, `exists`
    and `drop` raise UserError where there is no such memory.
    """

    def __init__(self, address: str, name: str, token: str | None = None) -> None:
        self.address = address
        self.name = name
        self.token = token or os.environ.get("MILVUS_TOKEN")
        self._client: MilvusClient | None = None
        self._meta: dict[str, Any] | None = None
        self._loaded = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_meta": None, "_loaded": False}

    def create(self, dim: int, index: Index, meta: Mapping[str, Any], size_hint: int) -> None:
        """Create the collection, indexed and loaded. `size_hint`, the expected number of entries, decides what `auto` means.

        `meta` (JSON) is kept with it, and dim, metric, index and ef are added to it. Drops nothing: a collection that exists
        is kept when its fingerprint and dim are the same. Raises UserError when they are not.
        """
        wanted = {**meta, "dim": dim, "metric": METRIC, "index": index_kind(index, size_hint), "ef": index.ef}
        self._call(partial(self._create, wanted))
        found = self.meta()
        for key in ("fingerprint", "dim"):
            was, now = found.get(key), wanted.get(key)
            if was != now:
                raise UserError(f"memory {self.name!r} exists with another {key} ({was}, not {now}); drop it or rename yours")
        params = {"M": index.m, "efConstruction": index.ef_construction} if found["index"] == "HNSW" else {}
        self._call(partial(self._create_index, found["index"], params))
        self._read(lambda client: None)

    def _create(self, meta: dict[str, Any], client: MilvusClient) -> None:
        from pymilvus import DataType

        if client.has_collection(self.name):
            return
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("entry_id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field("class_id", DataType.INT64)
        schema.add_field("class_name", DataType.VARCHAR, max_length=MAX_NAME_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=meta["dim"])
        properties = {META_KEY: json.dumps(meta)}
        client.create_collection(self.name, schema=schema, properties=properties, consistency_level="Bounded")

    def _create_index(self, kind: str, params: dict[str, int], client: MilvusClient) -> None:
        if client.list_indexes(self.name):
            return
        indexes = client.prepare_index_params()
        indexes.add_index("vector", index_type=kind, index_name="vector", metric_type=METRIC, params=params)
        client.create_index(self.name, indexes)

    def upsert(self, entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray) -> int:
        """Write N entries, vectors (N, D) float32; an entry_id that exists is replaced. Returns the number of distinct entries.

        Raises UserError for another D, vectors that are not finite, or ids and names that Milvus cannot hold.
        """
        dim = self.meta()["dim"]
        rows = _rows(entry_ids, class_ids, class_names, vectors, dim)
        step = max(1, UPSERT_BYTES // (4 * dim + MAX_ID_BYTES))
        for start in range(0, len(rows), step):
            self._call(partial(self._send, rows[start : start + step]))
        return len(rows)

    def _send(self, rows: list[dict[str, Any]], client: MilvusClient) -> None:
        client.upsert(self.name, rows)

    def seal(self, expected: int) -> None:
        """Finish a build: flush once, wait for the index, and check that exactly `expected` entries are there and visible.

        Milvus limits flushes to one in ten seconds, hence only here. An embedded store builds HNSW in the background: until it
        is done these entries are searched exactly, and leaving `open_store` waits for it. Raises UserError for another count.
        """
        self._call(lambda client: client.flush(self.name))
        while self._call(lambda client: client.describe_index(self.name, "vector").get("pending_index_rows", 0)):
            time.sleep(0.5)
        if (found := self.count()) != expected:
            raise UserError(
                f"memory {self.name!r} holds {found} entries, not the {expected} written; drop it and build it again"
            )
        unseen = retry_if_result(lambda count: count != expected)
        try:
            Retrying(retry=unseen, stop=stop_after_delay(PATIENCE_SECONDS), wait=wait_fixed(0.2))(self._count, "Bounded")
        except RetryError:
            raise Unavailable(f"Milvus at {self.address} does not show all entries of memory {self.name!r}") from None

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest entries of each query, (N, D) float32. Raises UserError for another D, and for an empty memory."""
        if not 1 <= k <= MAX_NEIGHBORS:
            raise UserError(f"a search returns between 1 and {MAX_NEIGHBORS} neighbors, not {k}")
        queries = _matrix(queries, self.meta()["dim"])
        step = max(1, min(SEARCH_QUERIES, SEARCH_HITS // k))
        rows = [row for start in range(0, len(queries), step) for row in self._nearest(queries[start : start + step], k)]
        if not any(rows) and self.count() == 0:
            raise UserError(f"memory {self.name!r} is empty; fill it with `rar memory CONFIG`")
        return _hits(rows, k)

    def _nearest(self, queries: np.ndarray, k: int) -> list[Neighbors]:
        """Looks past k until every entry that ties with the k-th has been seen, so that ties are cut by entry_id."""
        rows: list[Neighbors] = [[]] * len(queries)
        pending, depth = list(range(len(queries))), k + 1
        while pending:
            depth = min(depth, MAX_NEIGHBORS)
            for position, row in zip(pending, self._read(partial(self._neighbors, queries[pending], depth)), strict=True):
                rows[position] = row
            pending = [i for i in pending if len(rows[i]) == depth < MAX_NEIGHBORS and rows[i][-1][0] == rows[i][k - 1][0]]
            depth *= 4
        return [row[:k] for row in rows]

    def _neighbors(self, queries: np.ndarray, k: int, client: MilvusClient) -> list[Neighbors]:
        meta = self.meta()
        params = {"ef": max(meta["ef"], k)} if meta["index"] == "HNSW" else {}
        found = client.search(
            self.name,
            data=list(queries),
            limit=k,
            anns_field="vector",
            output_fields=["class_id"],
            search_params={"metric_type": METRIC, "params": params},
        )
        return [
            sorted(zip((-np.array(row.distances)).tolist(), row.ids, (hit["entity"]["class_id"] for hit in row), strict=True))
            for row in found
        ]

    def fetch(self) -> Entries:
        """Every entry, sorted by entry_id."""
        return self._read(self._pages)

    def _pages(self, client: MilvusClient) -> Entries:
        dim = self.meta()["dim"]
        size = max(1, min(MAX_NEIGHBORS, FETCH_BYTES // (4 * dim)))
        pages = client.query_iterator(self.name, batch_size=size, output_fields=FIELDS)
        rows: list[dict[str, Any]] = []
        while page := pages.next():
            rows += [{**row, "vector": np.array(row["vector"], np.float32)} for row in page]
        pages.close()
        return _entries(rows, dim)

    def meta(self) -> dict[str, Any]:
        """What `create` kept: the caller's keys, and dim, metric, index ("FLAT" or "HNSW") and ef."""
        if self._meta is None:
            properties = self._call(lambda client: client.describe_collection(self.name))["properties"]
            if META_KEY not in properties:
                raise UserError(f"the collection {self.name!r} was not made by `rar memory`; choose another memory.name")
            self._meta = json.loads(properties[META_KEY])
        return self._meta

    def count(self) -> int:
        return self._count("Strong")

    def _count(self, consistency: str) -> int:
        counted = self._read(lambda client: client.query(self.name, output_fields=["count(*)"], consistency_level=consistency))
        return int(counted[0]["count(*)"])

    def exists(self) -> bool:
        return bool(self._call(lambda client: client.has_collection(self.name)))

    def drop(self) -> None:
        """Remove the collection and its entries; nothing happens where there is none."""
        self._call(lambda client: client.drop_collection(self.name))
        self._disconnect()

    def _read(self, action: Callable[[MilvusClient], T]) -> T:
        """Run an action that needs the collection loaded; Milvus Lite reopens its collections unloaded."""

        def loaded(client: MilvusClient) -> T:
            if not self._loaded:
                client.load_collection(self.name)
                self._loaded = True
            return action(client)

        return self._call(loaded)

    def _call(self, action: Callable[[MilvusClient], T]) -> T:
        def attempt() -> T:
            if self._client is None:
                self._client = _connect(self.address, self.token)
            return action(self._client)

        try:
            return _patiently(attempt, self.address, PATIENCE_SECONDS, self._disconnect)
        except Exception as error:
            if getattr(error, "code", None) != NOT_FOUND:
                raise
            raise UserError(f"there is no memory {self.name!r} at this memory.uri; build it with `rar memory CONFIG`") from None

    def _disconnect(self) -> None:
        self._client, self._meta, self._loaded = None, None, False


def index_kind(index: Index, size_hint: int) -> str:
    """FLAT or HNSW. `auto` is exact up to FLAT_UP_TO entries and HNSW above.

    At 50,000 entries of 512 dimensions an exact search on Milvus Lite took 2.8 ms a query (one core, 512 queries a request),
    which is less than a CLIP encoder needs for an image on that core, and it loses nothing and has no build to wait for.
    """
    if index.kind != "auto":
        return index.kind
    return "FLAT" if size_hint <= FLAT_UP_TO else "HNSW"


def describe_all(address: str, token: str | None = None) -> list[dict[str, Any]]:
    """Every memory at an address: its `meta` with its name and count, sorted by name. Foreign collections are left out."""
    client = _patiently(lambda: _connect(address, token), address, REACH_SECONDS)
    names = [name for name in sorted(client.list_collections()) if META_KEY in client.describe_collection(name)["properties"]]
    client.close()
    collections = [Collection(address, name, token) for name in names]
    return [{"name": each.name, "count": each.count(), **each.meta()} for each in collections]


class ExactIndex:
    """The contract of `Collection` in numpy: what every search is measured against."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._kept: dict[str, dict[str, Any]] = {}

    def upsert(self, entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray) -> int:
        rows = _rows(entry_ids, class_ids, class_names, vectors, self.dim)
        self._kept.update((row["entry_id"], row) for row in rows)
        return len(rows)

    def search(self, queries: np.ndarray, k: int) -> Hits:
        if not self._kept:
            raise UserError("the memory is empty; fill it first")
        entries = self.fetch()
        negated = -(_matrix(queries, self.dim) @ entries.vectors.T)  # (N, entries)
        best = np.argsort(negated, axis=1, kind="stable")[:, :k]  # stable: entries are in the order of their ids
        rows = [
            [(row[j], entries.entry_ids[j], entries.class_ids[j]) for j in order]
            for row, order in zip(negated, best, strict=True)
        ]
        return _hits(rows, k)

    def fetch(self) -> Entries:
        return _entries(list(self._kept.values()), self.dim)


def _rows(
    entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray, dim: int
) -> list[dict[str, Any]]:
    """Checked rows, of equal ids the last one: a Milvus server keeps both when they come in one request."""
    for entry_id in entry_ids:
        # pymilvus pages through a collection with a filter that holds the id in quotes, unescaped
        if not entry_id or '"' in entry_id or "\\" in entry_id or len(entry_id.encode()) > MAX_ID_BYTES:
            raise UserError(f"an entry_id has 1 to {MAX_ID_BYTES} bytes, no quotes and no backslash, got {entry_id!r}")
    for name in class_names:
        if len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"a class name has at most {MAX_NAME_BYTES} bytes; shorten {name[:60]!r}...")
    columns = zip(entry_ids, np.asarray(class_ids, np.int64).tolist(), class_names, _matrix(vectors, dim), strict=True)
    return list({row[0]: dict(zip(FIELDS, row, strict=True)) for row in columns}.values())


def _matrix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """(N, dim) float32, finite."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(f"the memory holds vectors of {dim} dimensions, got {vectors.shape}; use the encoder it was built with")
    if not np.isfinite(vectors).all():
        raise UserError("vectors are not finite; check the encoder (its precision, its weights)")
    return vectors


def _entries(rows: list[dict[str, Any]], dim: int) -> Entries:
    rows = sorted(rows, key=itemgetter("entry_id"))
    entry_ids, class_ids, class_names, vectors = ([row[field] for row in rows] for field in FIELDS)
    return Entries(entry_ids, np.array(class_ids, np.int64), class_names, np.array(vectors, np.float32).reshape(-1, dim))


def _hits(rows: list[Neighbors], k: int) -> Hits:
    scores = np.full((len(rows), k), -np.inf, np.float32)
    class_ids = np.full((len(rows), k), -1, np.int64)
    for i, row in enumerate(rows):
        scores[i, : len(row)] = [-negated for negated, _, _ in row]
        class_ids[i, : len(row)] = [class_id for _, _, class_id in row]
    return Hits(scores, class_ids, [[entry_id for _, entry_id, _ in row] + [""] * (k - len(row)) for row in rows])


def _connect(address: str, token: str | None) -> MilvusClient:
    """A client with a connection of its own, so that a broken one can be thrown away."""
    _quiet()
    from pymilvus import MilvusClient

    token = token or os.environ.get("MILVUS_TOKEN", "")
    return MilvusClient(address, token=token, timeout=CONNECT_SECONDS, dedicated=True)


def _quiet() -> None:
    """Every error that matters is raised; the libraries also log it, with tracebacks, and gRPC reports every fork on stderr."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is first imported
    import pymilvus  # noqa: F401  sets the levels that are changed here

    for name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite", "grpc._server"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _patiently(action: Callable[[], T], address: str, seconds: float, before_retry: Callable[[], None] = lambda: None) -> T:
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
