"""The memory: entries (entry_id, class_id, class_name, vector) in Milvus collections, searched by inner product.

Hard choices, and what they cost:
- The index exists before the first entry, so `count` and `search` work at any time and a killed build resumes by repeating
  itself: entries have primary keys, so an upsert that is sent twice changes nothing. Plain inserts would be faster, but a
  server keeps both copies of an id that is inserted twice, and a write task may run twice. A server's import of files was not
  faster than upserts, and needs a disk or bucket that the server itself can read.
- Searches read with bounded staleness, which on a server saves waiting for its clock to tick; `seal` in return waits until
  such a read sees every entry. A memory that is searched before it is sealed may miss what was written seconds ago.
- REDUCED keeps HNSW over projected vectors, and the full vector beside them as text (see reduce). A search finds a shortlist,
  reads the full vectors of many queries' shortlists once, and rescores here, so its scores are exact. It saves memory in the
  graph, not time: reading the shortlists makes it slower than HNSW. The projection is the entries of a collection of its own,
  NAME_projection: a worker that knows address and name can search, and there is no limit to its size.
- `seal` reads every id once, for a digest that says which state of the memory a run has used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from rar.config import Index
from rar.memory import layout, reduced
from rar.memory.entries import FIELDS, MAX_ID_BYTES, Entries, ExactIndex, Hits, IntArray, distinct, hits, in_order, matrix
from rar.memory.store import PATIENCE_S, connected, forget, open_store, patiently
from rar.schema import Unavailable, UserError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["FIELDS", "Collection", "Entries", "ExactIndex", "Hits", "open_store"]

T = TypeVar("T")

PROJECTION = "_projection"  # ends the name of the collection that holds one
NOT_FOUND = 100  # Milvus' code of a missing collection
MAX_NEIGHBORS = 16_384  # Milvus' limit of neighbors per query

UPSERT_BYTES = 8 << 20  # per request; Milvus accepts 64 MiB
RESCORE_BYTES = 128 << 20  # of full vectors at once
SEARCH_QUERIES = 512  # per request: Milvus Lite scores a request as one float32 matrix of queries x entries
SEARCH_HITS = 200_000  # per request: hits become Python objects on both sides
IDS = 4096  # per request that names them

STANDSTILL_SECONDS = 600.0  # of an index that is being built: it moves on by whole segments
HANDOVER_SECONDS = 600.0  # of new segments to their index, which takes a server ten seconds and more


class Collection:
    """One collection of entries at an address from `open_store`. Picklable: every process connects when it first needs to, the
    collections of a thread together; one that is known to be loaded is not asked for it again.

    Every method rides out a server that is away for patience_s, then raises Unavailable. All but `create`, `exists`
    and `drop` raise UserError where there is no such memory, or one that was not made here.
    """

    def __init__(self, address: str, name: str, token: str | None = None, patience_s: float = PATIENCE_S) -> None:
        self.address = address
        self.name = name
        self.patience_s = patience_s
        self.token = token or os.environ.get("MILVUS_TOKEN")
        self._client: MilvusClient | None = None
        self._meta: dict[str, Any] | None = None
        self._projection: np.ndarray | None = None
        self._loaded = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_meta": None, "_projection": None}

    def create(self, dim: int, index: Index, meta: Mapping[str, Any], size_hint: int, sample: np.ndarray | None = None) -> None:
        """Create the collection, indexed and loaded. `size_hint`, the expected number of entries, decides what `auto` means.

        `meta` (JSON) is kept with it; dim, metric, index and its settings, and created (UTC) are added to it. `sample`
        (N, dim) float32 is what the projection of REDUCED is fitted on: all vectors that will be written, or many of them.
        Drops nothing: a collection that exists is kept, with its projection, when its fingerprint, its dim and, unless it
        is `auto`, its index are the same. Raises UserError when they are not, and where the server lacks the index.
        """
        kind = layout.index_kind(index, size_hint)
        if not self.exists():
            made = {"dim": dim, "metric": layout.METRIC, "index": kind, "created": _now()}
            made |= index.model_dump(include={"m", "ef_construction", "ef"})
            if kind == "REDUCED":
                made |= self._keep_projection(dim, index, sample) | {"shortlist": index.shortlist}
            self._call(lambda client: layout.create_collection(client, self.name, {**meta, **made}))
        found = self.meta()
        wanted = {"fingerprint": meta.get("fingerprint"), "dim": dim, "index": found["index"] if index.kind == "auto" else kind}
        for key, now in wanted.items():
            if (was := found.get(key)) != now:
                raise UserError(f"memory {self.name!r} exists with another {key} ({was}, not {now}); drop it or rename yours")
        self._call(lambda client: layout.create_index(client, self.name, found))
        self._read(lambda client: None)

    def _keep_projection(self, dim: int, index: Index, sample: np.ndarray | None) -> dict[str, Any]:
        """Fit the projection and write it, before the collection that needs it exists."""
        if sample is None or not len(sample):
            raise UserError("memory.index.kind REDUCED is fitted on vectors, and there are none; set it to auto, FLAT or HNSW")
        projection = reduced.fit(matrix(sample, dim), reduced.reduced_dim(dim, index.reduction))
        meta = {"reduced_dim": projection.shape[1], "projection": reduced.fingerprint(projection)}
        count, kept = projection.shape[1], self._companion()
        kept.drop()
        kept.create(dim, Index(kind="FLAT"), {"fingerprint": meta["projection"]}, count)
        kept.upsert([f"{n:06d}" for n in range(count)], range(count), [""] * count, projection.T)
        kept.seal(count)
        return meta

    def _companion(self) -> Collection:
        return Collection(self.address, f"{self.name}{PROJECTION}", self.token, self.patience_s)

    def _project(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, reduced_dim)."""
        if self._projection is None:
            found = self._companion().fetch().vectors.T
            if reduced.fingerprint(found) != self.meta()["projection"]:
                raise UserError(f"memory {self.name!r} and its projection do not belong together; drop it and build it again")
            self._projection = found
        return vectors @ self._projection

    def upsert(self, entry_ids: Sequence[str], class_ids: IntArray, class_names: Sequence[str], vectors: np.ndarray) -> int:
        """Write N entries, vectors (N, D) float32; an entry_id that exists is replaced. Returns the number of distinct entries.

        Raises UserError for another D, vectors that are not finite, or ids and names that Milvus cannot hold.
        """
        dim, columns = self.meta()["dim"], layout.fields(self.meta())
        new = distinct(entry_ids, class_ids, class_names, vectors, dim)
        values: list[Iterable[Any]] = [new.entry_ids, new.class_ids.tolist(), new.class_names, new.vectors]
        if self._reduced():
            values = [*values[:3], self._project(new.vectors), reduced.to_text(new.vectors)]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))
        while batch := list(islice(rows, max(1, UPSERT_BYTES // (4 * dim + MAX_ID_BYTES)))):
            self._send(batch)
        return len(new)

    def _send(self, rows: list[dict[str, Any]]) -> None:
        self._call(lambda client: client.upsert(self.name, rows))

    def _reduced(self) -> bool:
        return self.meta()["index"] == "REDUCED"

    def remove(self, entry_ids: Sequence[str]) -> int:
        """Delete entries; ids that are not there are passed over. Returns the number deleted. `seal` afterwards."""
        before = self.count()
        for start in range(0, len(entry_ids), IDS):
            ids = list(entry_ids[start : start + IDS])
            self._call(lambda client, ids=ids: client.delete(self.name, ids=ids))  # type: ignore[misc]
        return before - self.count()

    def seal(self, expected: int, *, keep: bool = False) -> Entries | None:
        """Finish writing: flush once, wait until the index is built and in use, check that exactly `expected` entries are
        there and visible, and keep the digest of this state (see `state`).

        Milvus limits flushes to one in ten seconds, hence only here. An embedded store builds HNSW in the background: until it
        is done these entries are searched exactly, and leaving `open_store` waits for it. Raises UserError for another count.
        keep: return the entries that it reads for that, without vectors as `fetch` gives them.
        """
        self._call(lambda client: client.flush(self.name))
        self._wait_for_index()
        if self.meta()["index"] != "FLAT":
            self._wait_for_handover()
        self._expect(self.count(), expected)
        unseen = retry_if_result(lambda count: count != expected)
        try:
            Retrying(retry=unseen, stop=stop_after_delay(self.patience_s), wait=wait_fixed(0.2))(self._count, "Bounded")
        except RetryError:
            raise Unavailable(f"Milvus at {self.address} does not show all entries of memory {self.name!r}") from None
        kept: list[dict[str, Any]] = []
        stock = self._take_stock(kept if keep else None)
        self._expect(stock["count"], expected)
        self._call(lambda client: client.alter_collection_properties(self.name, {layout.STATE_KEY: json.dumps(stock)}))
        return _bare(kept) if keep else None

    def _wait_for_index(self) -> None:
        """Until no row waits for the index. Raises Unavailable where it has not come on for STANDSTILL_SECONDS."""
        least, since = math.inf, time.monotonic()
        while pending := self._call(lambda client: client.describe_index(self.name, "vector").get("pending_index_rows", 0)):
            if pending < least:
                least, since = pending, time.monotonic()
            elif time.monotonic() - since > STANDSTILL_SECONDS:
                reason = f"stopped building the index of memory {self.name!r} with {pending} rows to go; check its index nodes"
                raise Unavailable(f"Milvus at {self.address} {reason}")
            time.sleep(0.5)

    def _wait_for_handover(self) -> None:
        waiting = retry_if_result(lambda handed_over: not handed_over)
        patience = Retrying(retry=waiting, stop=stop_after_delay(HANDOVER_SECONDS), wait=wait_fixed(0.5))
        try:
            patience(self._call, partial(layout.is_handed_over, name=self.name))
        except RetryError:
            reason = f"does not load the index of memory {self.name!r}; check the memory of its query nodes"
            raise Unavailable(f"Milvus at {self.address} {reason}") from None

    def _expect(self, found: int, expected: int) -> None:
        if found != expected:
            raise UserError(
                f"memory {self.name!r} holds {found} entries, not the {expected} written: wait for another `rar memory` that "
                "is at work on it, or else drop it and build it again"
            )

    def _take_stock(self, kept: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The state; what is read for it is added to `kept`."""
        meta, columns = self.meta(), FIELDS[:3]
        digest = hashlib.sha256(json.dumps([meta.get("fingerprint"), meta["dim"]]).encode())
        count, classes = 0, set()
        for page in self._pages(columns):  # in the order of entry_ids
            digest.update("".join(json.dumps([row[column] for column in columns]) for row in page).encode())
            classes |= {row["class_id"] for row in page}
            count += len(page)
            if kept is not None:
                kept += page
        return {"count": count, "classes": len(classes), "digest": digest.hexdigest()[:16]}

    def copy(self, name: str, meta: Mapping[str, Any]) -> Collection:
        """A sealed copy, entries and index, as another collection; `meta` is added to its own. What had the name is dropped."""
        target = Collection(self.address, name, self.token, self.patience_s)
        target.drop()
        if self._reduced():
            self._companion().copy(target._companion().name, {})
        made = {**self.meta(), "created": _now(), **meta}
        target._call(lambda client: layout.create_collection(client, name, made))
        target._call(lambda client: layout.create_index(client, name, made))
        for page in self._pages(layout.fields(made)):
            target._send(page)
        target.seal(self.count())
        return target

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest entries of each query, (N, D) float32. Raises UserError for another D, and for an empty memory.

        Scores are exact inner products, but for HNSW_SQ8, whose are those of the quantised vectors.
        """
        if not 1 <= k <= MAX_NEIGHBORS:
            raise UserError(f"a search returns between 1 and {MAX_NEIGHBORS} neighbors, not {k}")
        queries = matrix(queries, self.meta()["dim"])
        found = self._rescored(queries, k) if self._reduced() else self._nearest(queries, k, k + 1)
        if not any(row[0] for row in found.entry_ids) and self.count() == 0:
            raise UserError(f"memory {self.name!r} is empty; fill it with `rar memory CONFIG`")
        return found

    def _nearest(self, queries: np.ndarray, k: int, depth: int) -> Hits:
        """Looks past k until every entry that ties with the k-th has been seen, so that ties are cut by entry_id."""
        depth = min(depth, MAX_NEIGHBORS)
        found = in_order(self._neighbors(queries, depth))
        scores, class_ids, entry_ids = found.scores[:, :k], found.class_ids[:, :k], [row[:k] for row in found.entry_ids]
        last = found.scores[:, -1]
        tied = np.flatnonzero((last == scores[:, -1]) & np.isfinite(last)) if depth < MAX_NEIGHBORS else np.empty(0, int)
        if len(tied):
            deeper = self._nearest(queries[tied], k, depth * 4)
            scores[tied], class_ids[tied] = deeper.scores, deeper.class_ids
            for row, ids in zip(tied.tolist(), deeper.entry_ids, strict=True):
                entry_ids[row] = ids
        return Hits(scores, class_ids, entry_ids)

    def _neighbors(self, queries: np.ndarray, depth: int) -> Hits:
        scores, class_ids, entry_ids = [], [], []
        for row in self._rows(queries, depth):
            scores.append(row.distances)
            class_ids.append([dict.__getitem__(hit, "entity")["class_id"] for hit in row])  # the hit's own look-up is slow
            entry_ids.append(row.ids)
        return hits(scores, class_ids, entry_ids, depth)

    def _rescored(self, queries: np.ndarray, k: int) -> Hits:
        """The k best of the shortlist that the reduced vectors give, by the full vectors, each read once for many queries."""
        depth = min(k * self.meta()["shortlist"], MAX_NEIGHBORS)
        step = max(1, min(SEARCH_QUERIES, RESCORE_BYTES // (4 * depth * queries.shape[1])))
        scores, class_ids, entry_ids = [], [], []
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            near = self._neighbors(self._project(part), depth)
            known, full = self._full({entry_id for row in near.entry_ids for entry_id in row})
            for query, classes, row in zip(part, near.class_ids.tolist(), near.entry_ids, strict=True):
                there = [j for j, entry_id in enumerate(row) if entry_id in known]
                exact = np.einsum("nd,d->n", full[[known[row[j]] for j in there]], query)  # twins score alike wherever they lie
                best = sorted(zip((-exact).tolist(), (row[j] for j in there), (classes[j] for j in there), strict=True))[:k]
                scores.append([-negated for negated, _, _ in best])
                entry_ids.append([entry_id for _, entry_id, _ in best])
                class_ids.append([class_id for _, _, class_id in best])
        return hits(scores, class_ids, entry_ids, k)

    def _full(self, wanted: set[str]) -> tuple[dict[str, int], np.ndarray]:
        """entry_id -> row of the full vectors (N, D). One that was removed meanwhile is missing."""
        dim, rows = self.meta()["dim"], list(self._named(sorted(wanted - {""}), ["entry_id", "full"]))
        return {row["entry_id"]: n for n, row in enumerate(rows)}, reduced.from_text([row["full"] for row in rows], dim)

    def _named(self, entry_ids: Sequence[str], columns: list[str]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(entry_ids), IDS):
            some = list(entry_ids[start : start + IDS])
            yield from self._read(partial(layout.named, name=self.name, entry_ids=some, columns=columns))

    def labels_of(self, entry_ids: Sequence[str]) -> dict[str, str]:
        """entry_id -> class name of those entries that are there."""
        return {row["entry_id"]: row["class_name"] for row in self._named(entry_ids, ["entry_id", "class_name"])}

    def classes(self) -> dict[str, int]:
        """class name -> class id of all entries, a page at a time."""
        pages = self._pages(FIELDS[:3])
        return {row["class_name"]: row["class_id"] for page in pages for row in page}

    def pour(self, target: Collection, without: frozenset[int] = frozenset()) -> None:
        """Upsert all entries into another collection, whatever its index, a page at a time; not the classes `without`."""
        column = "full" if self._reduced() else "vector"
        columns, dim = [*FIELDS[:3], column], self.meta()["dim"]
        for page in self._pages(columns):
            rows = [row for row in page if row["class_id"] not in without]
            found = [row[column] for row in rows]
            vectors = reduced.from_text(found, dim) if self._reduced() else np.array(found, np.float32).reshape(-1, dim)
            ids, class_ids, names = ([row[name] for row in rows] for name in FIELDS[:3])
            target.upsert(ids, class_ids, names, vectors)

    def pages_of_vectors(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and vectors (N, D) of one page of entries after the other."""
        column, dim = "full" if self._reduced() else "vector", self.meta()["dim"]
        for page in self._pages(["entry_id", column]):
            found = [row[column] for row in page]
            vectors = reduced.from_text(found, dim) if self._reduced() else np.array(found, np.float32)
            yield [row["entry_id"] for row in page], vectors

    def vectors_of(self, entry_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """entry_id -> vector (D,) of those entries that are there."""
        column, dim = "full" if self._reduced() else "vector", self.meta()["dim"]
        rows = list(self._named(entry_ids, ["entry_id", column]))
        found = [row[column] for row in rows]
        vectors = reduced.from_text(found, dim) if self._reduced() else np.array(found, np.float32).reshape(-1, dim)
        return dict(zip((row["entry_id"] for row in rows), vectors, strict=True))

    def at_ef(self, ef: int) -> Collection:
        """The same collection, whose graph is searched with another ef; nothing is kept."""
        other = Collection(self.address, self.name, self.token, self.patience_s)
        other._meta = {**self.meta(), "ef": ef}
        return other

    def keep_ef(self, ef: int) -> None:
        """Search with this ef from now on, whoever opens the memory; `ef_tuned` says so in its meta."""
        meta = {**self.meta(), "ef": ef, "ef_tuned": True}
        self._call(lambda client: client.alter_collection_properties(self.name, {layout.META_KEY: json.dumps(meta)}))
        self._meta = None

    def relabel(self, labels: Mapping[str, tuple[int, str]]) -> None:
        """Give entries that are here another class (id, name), by entry_id."""
        found = self.vectors_of(sorted(labels))
        classes = [labels[one] for one in found]
        vectors = np.array(list(found.values()), np.float32).reshape(-1, self.meta()["dim"])
        self.upsert(list(found), [one for one, _ in classes], [name for _, name in classes], vectors)

    def _rows(self, queries: np.ndarray, depth: int) -> Iterator[Any]:
        """pymilvus' rows of hits, one a query, as they come."""
        meta = self.meta()
        params = {} if meta["index"] == "FLAT" else {"ef": max(meta["ef"], depth)}
        ask = {"limit": depth, "anns_field": "vector", "output_fields": ["class_id"]}
        ask["search_params"] = {"metric_type": layout.METRIC, "params": params}
        step = max(1, min(SEARCH_QUERIES, SEARCH_HITS // depth))
        for start in range(0, len(queries), step):
            data = [query.tobytes() for query in np.asarray(queries[start : start + step], "<f4")]
            yield from self._read(lambda client, data=data: client.search(self.name, data=data, **ask))  # type: ignore[misc]

    def fetch(self, *, vectors: bool = True) -> Entries:
        """Every entry, sorted by entry_id; without `vectors` these are (N, 0)."""
        if not vectors:
            return _bare([row for page in self._pages(FIELDS[:3]) for row in page])
        dim, column = self.meta()["dim"], "full" if self._reduced() else "vector"
        rows: list[dict[str, Any]] = []
        parts = [np.empty((0, dim), np.float32)]
        for page in self._pages([*FIELDS[:3], column]):
            read = [row.pop(column) for row in page]
            parts.append(reduced.from_text(read, dim) if self._reduced() else np.array(read, np.float32))
            rows += page
        entry_ids, class_ids, class_names = ([row[name] for row in rows] for name in FIELDS[:3])
        return Entries(entry_ids, np.array(class_ids, np.int64), class_names, np.concatenate(parts))

    def entry_ids(self) -> Iterator[str]:
        """Of every entry, in their order."""
        for page in self._pages(["entry_id"]):
            yield from (row["entry_id"] for row in page)

    def _pages(self, columns: list[str], condition: str = "") -> Iterator[list[dict[str, Any]]]:
        """Columns of all entries, or of those that a condition holds for, in the order of entry_ids."""
        dim, after = self.meta()["dim"], ""
        size = self._call(lambda client: layout.page_size(client, columns, dim))
        read = partial(layout.page, name=self.name, columns=columns, condition=condition, size=size)
        while page := self._read(partial(read, after=after)):
            yield page
            after = page[-1]["entry_id"]

    def meta(self) -> dict[str, Any]:
        """What `create` kept: the caller's keys, and dim, metric, index (its kind), its settings, and created."""
        if self._meta is None:
            self._meta = self._call(lambda client: layout.read_meta(client, self.name))
        return self._meta

    def state(self) -> dict[str, Any]:
        """What `seal` kept: count, classes and digest, 16 hex digits over fingerprint, ids, class ids and names of all entries.

        Empty where entries were added or removed after the last `seal`; an entry that was replaced since is not noticed.
        """
        state = self._call(lambda client: layout.read_state(client, self.name))
        return state if state and state["count"] == self.count() else {}

    def count(self) -> int:
        return self._count("Strong")

    def progress(self) -> tuple[int]:
        """Entries so far, asked over a connection of its own: another thread writes."""
        return (copy(self).count(),)

    def _count(self, consistency: str) -> int:
        counted = self._read(lambda client: client.query(self.name, output_fields=["count(*)"], consistency_level=consistency))
        return int(counted[0]["count(*)"])

    def exists(self) -> bool:
        return bool(self._call(lambda client: client.has_collection(self.name)))

    def drop(self) -> None:
        """Remove the collection and its entries; nothing happens where there is none."""
        self._call(lambda client: client.drop_collection(self.name))
        if not self.name.endswith(PROJECTION):
            self._companion().drop()
        self._disconnect()

    def _read(self, action: Callable[[MilvusClient], T]) -> T:
        """Run an action that needs the collection loaded; Milvus Lite reopens its collections unloaded."""

        def loaded(client: MilvusClient) -> T:
            if not self._loaded:
                layout.load(client, self.name)
                self._loaded = True
            return action(client)

        return self._call(loaded)

    def _call(self, action: Callable[[MilvusClient], T]) -> T:
        def attempt() -> T:
            if self._client is None:
                self._client = connected(self.address, self.token)
            return action(self._client)

        try:
            return patiently(attempt, self.address, self.patience_s, self._reconnect)
        except Exception as error:
            if getattr(error, "code", None) != NOT_FOUND:
                raise
            raise UserError(f"there is no memory {self.name!r} at this memory.uri; build it with `rar memory CONFIG`") from None

    def _reconnect(self) -> None:
        forget(self.address, self.token)
        self._disconnect()

    def _disconnect(self) -> None:
        self._client, self._meta, self._projection, self._loaded = None, None, None, False


def _bare(rows: Sequence[Mapping[str, Any]]) -> Entries:
    """Entries without vectors."""
    entry_ids, class_ids, class_names = ([row[name] for row in rows] for name in FIELDS[:3])
    return Entries(entry_ids, np.array(class_ids, np.int64), class_names, np.empty((len(rows), 0), np.float32))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
