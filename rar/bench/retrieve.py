"""The memory in numbers: every index on every store against raw pymilvus and raw faiss, on the same vectors in the same run.

Each store is one process that does nothing else, so that its memory can be told; the bench is a client of it, as the workers
of a pipeline are. Milvus Lite builds HNSW in the background, and searches exactly until it is done: here its process is ended
after the build, which waits for the index, and started again for the searches.

REDUCED has no counterpart. It is held against the HNSW over full vectors that it saves memory in, raw and our own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from rar import config
from rar.bench import raw
from rar.bench.embeddings import K, Work, drawn, recorded
from rar.bench.server import Server, forget_peak, lite_server, memory_mib, milvus_server
from rar.bench.timing import paired
from rar.columns import vectors_column
from rar.config import Index
from rar.engine import choosing, pipeline, session
from rar.engine.sinks import MilvusSink
from rar.memory import reduced as projection
from rar.memory.collection import Collection
from rar.memory.store import connect
from rar.retriever import exact
from rar.retriever.heads import CLIP_LOGIT_SCALE, Head

KINDS = ("FLAT", "HNSW", "HNSW_SQ8", "REDUCED")
NOT_ON_SERVER = "HNSW_SQ8"  # Milvus 2.3.5
UPSERT_ROWS, SINK_ROWS = 10_000, 20_000  # at most, of a comparison of writes
BLOCK = 20_000  # entries a call
CLASSES = (120, 1_203, 13_204)  # of the pipeline's head: the miniature's, LVIS's, V3Det's
SIZES = (5_000, 20_000, 50_000, 100_000)

Row = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """`opened` gives one with the data of that name: Lite a folder of its own in a process of its own, a server itself."""

    opened: Callable[[str], AbstractContextManager[Server]]
    folder: Path | None = None


def run(
    rows: int = 20_000,
    dim: int = 512,
    queries: int = 256,
    repeats: int = 5,
    data: Path | None = None,
    server: bool = False,
    kinds: Sequence[str] = KINDS,
) -> Row:
    """`rows` entries of `dim` dimensions, drawn (see embeddings), on Milvus Lite and, with `server`, on PyPI's Milvus 2.3.5.

    Throughputs are rows of `timing.paired`, queries or entries a second, of `Collection` as `ours`:
    - stores.S.K.search: `pymilvus`, client.search on the same collection in the same batches (for REDUCED: on HNSW); `faiss`,
      the same index with the same settings in this process; `hnsw`, of REDUCED: our HNSW.
    - stores.S.K.build: `pymilvus`, upserts in equal requests; `faiss`, one build from first vector to last link of each.
    - stores.S.pipeline: `retrieve`, the stage by number of classes, against a search of the head (see `retrieval`); `datasink`,
      a write through Ray Data, against upserts.
    stores.S.K.recall is recall@10, also of the faiss index. .bytes, an entry: `vector_in_graph`, `on_disk` (Lite: the folder)
    and `index_on_disk`. .memory_mib, of the store's process (Linux): before, at most while building, at most while searching.
    recorded: recall@10 on the embeddings below the folder `data`, where one is given.
    """
    work = drawn(rows, dim, queries)
    known = {kind: faiss_row(kind, work) for kind in dict.fromkeys("HNSW" if k == "REDUCED" else k for k in kinds)}
    result: Row = {"rows": rows, "dim": dim, "queries": queries, "batch": raw.BATCH, "k": K, "stores": {}}
    result["faiss_threads"] = faiss.omp_get_max_threads()
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary, session.opened():
        folder = Path(temporary)
        lite = Store(lambda name: lite_server(folder / "lite" / name), folder / "lite")
        result["stores"]["lite"] = on_store(lite, work, kinds, known, repeats)
        if server:
            with milvus_server(folder / "milvus") as running:
                there = [kind for kind in kinds if kind != NOT_ON_SERVER]
                result["stores"]["milvus_2_3_5"] = on_store(
                    Store(lambda name: nullcontext(running)), work, there, known, repeats
                )
        if data is not None:
            found = recorded(data)
            result["recorded"] = {name: recalls(lite, name, one) for name, one in found.items()}
    return result


def faiss_row(kind: str, work: Work) -> Row:
    started = time.perf_counter()
    index = raw.faiss_index(kind, work.entries, Index())
    seconds = time.perf_counter() - started
    return {"index": index, "seconds": seconds, "recall": work.recall(raw.faiss_search(index, work.queries))}


def on_store(store: Store, work: Work, kinds: Sequence[str], known: dict[str, Row], repeats: int) -> Row:
    rows: Row = {}
    with store.opened("scratch") as server:
        written = {kind: upserts(server, kind, work, repeats) for kind in kinds}
        through = {"datasink": datasink(server, work, repeats), **retrieval(server, work, repeats)}
    for kind in kinds:
        theirs = known["HNSW" if kind == "REDUCED" else kind]
        rows[kind] = built(store, kind, work)
        ours = len(work.entries) / rows[kind]["seconds"]["all"]
        reference = len(work.entries) / theirs["seconds"]
        once = {"ours": ours, "reference": reference, "ratio": ours / reference, "repeats": 1}
        rows[kind]["build"] = {"pymilvus": written[kind], "faiss": once}
        searched(store, kind, work, theirs, rows, repeats)
    return rows | {"pipeline": through}


def built(store: Store, kind: str, work: Work) -> Row:
    """Build a memory; what it costs in time, memory and bytes."""
    started = time.perf_counter()
    with store.opened(kind) as server:
        before, opened = watch(server), time.perf_counter()
        collection = created(server, kind, kind, work)
        for start in range(0, len(work.entries), BLOCK):
            numbers = np.arange(start, min(start + BLOCK, len(work.entries)))
            collection.upsert(*raw.columns(numbers), work.entries[numbers])
        written = time.perf_counter()
        collection.seal(len(work.entries))
        sealed, peak = time.perf_counter(), memory_mib(server.pid, "VmHWM")
    ended = time.perf_counter()
    seconds = {"write": written - opened, "seal": sealed - written, "index": ended - sealed, "all": ended - opened}
    return {
        "seconds": seconds | {"start": opened - started},
        "memory_mib": {"before": before, "build_peak": peak},
        "bytes": sizes(kind, work, store.folder),
    }


def created(server: Server, name: str, kind: str, work: Work) -> Collection:
    collection, settings = Collection(server.address, name), Index.model_validate({"kind": kind})
    collection.create(work.entries.shape[1], settings, {"fingerprint": "bench"}, len(work.entries), work.entries)
    return collection


def sizes(kind: str, work: Work, folder: Path | None) -> Row:
    """Bytes an entry."""
    count, dim = work.entries.shape
    dims = projection.reduced_dim(dim, Index().reduction) if kind == "REDUCED" else dim
    found: Row = {"vector_in_graph": dims * (1 if kind == "HNSW_SQ8" else 4)}
    if folder is not None:
        files = [file for file in (folder / kind).rglob("*") if file.is_file()]
        found["on_disk"] = sum(file.stat().st_size for file in files) / count
        found["index_on_disk"] = sum(file.stat().st_size for file in files if file.suffix == ".idx") / count
    return found


def watch(server: Server) -> float:
    forget_peak(server.pid)
    return memory_mib(server.pid)


def searched(store: Store, kind: str, work: Work, theirs: Row, rows: Row, repeats: int) -> None:
    """Fill in what searching the built memory of a kind gives."""
    reduced = kind == "REDUCED"
    with ExitStack() as opened:
        server = opened.enter_context(store.opened(kind))
        ours = Collection(server.address, kind)
        watch(server)
        found = np.concatenate([rows_of(ours, batch) for batch in raw.batches(work.queries)])
        rows[kind]["recall"] = {"ours": work.recall(found), "faiss": theirs["recall"]}
        rows[kind]["memory_mib"]["search_peak"] = memory_mib(server.pid, "VmHWM")
        against: dict[str, Callable[[], object]] = {"faiss": lambda: raw.faiss_search(theirs["index"], work.queries)}
        if not reduced:
            against["pymilvus"] = raw_search(server, kind, work, None if kind == "FLAT" else Index().ef)
        elif "HNSW" in rows:
            full = opened.enter_context(store.opened("HNSW"))
            against["pymilvus"] = raw_search(full, "HNSW", work, Index().ef)
            against["hnsw"] = our_search(Collection(full.address, "HNSW"), work)
        mine, count = our_search(ours, work), len(work.queries)
        rows[kind]["search"] = {name: paired(mine, other, count, repeats) for name, other in against.items()}


def rows_of(collection: Collection, queries: np.ndarray) -> np.ndarray:
    """(Q, K) rows of entries, -1 for none."""
    return np.array([[int(one[1:]) if one else -1 for one in ids] for ids in collection.search(queries, K).entry_ids])


def our_search(collection: Collection, work: Work) -> Callable[[], object]:
    return lambda: [collection.search(batch, K) for batch in raw.batches(work.queries)]


def raw_search(server: Server, name: str, work: Work, ef: int | None) -> Callable[[], object]:
    client = connect(server.address, None)
    client.load_collection(name)
    return lambda: raw.search(client, name, work.queries, ef)


def upserts(server: Server, kind: str, work: Work, repeats: int) -> dict[str, float]:
    """Each side writes the same blocks of entries in turn, ours to a memory of that kind."""
    ours, client = created(server, f"{kind}_ours", kind, work), connect(server.address, None)
    theirs = created(server, f"{kind}_raw", "HNSW" if kind == "REDUCED" else kind, work)
    blocks = np.array_split(np.arange(min(UPSERT_ROWS, len(work.entries))), repeats + 1)
    mine, other = iter(blocks), iter(blocks)

    def write_ours() -> None:
        numbers = next(mine)
        ours.upsert(*raw.columns(numbers), work.entries[numbers])

    def write_theirs() -> None:
        numbers = next(other)
        raw.upsert(client, theirs.name, numbers, work.entries[numbers])

    row = paired(write_ours, write_theirs, len(blocks[0]), repeats)
    ours.drop()
    theirs.drop()
    return row


def datasink(server: Server, work: Work, repeats: int) -> dict[str, float]:
    """Each side writes all entries under new ids, again and again."""
    ours, theirs = (created(server, f"sink_{side}", "FLAT", work) for side in ("ours", "raw"))
    client, numbers = connect(server.address, None), np.arange(min(SINK_ROWS, len(work.entries)))
    mine, other = iter(range(repeats + 1)), iter(range(repeats + 1))

    def write_ours() -> None:
        ids, class_ids, names = raw.columns(numbers, f"-{next(mine)}")
        vectors = vectors_column(work.entries[numbers])
        table = pa.table({"entry_id": ids, "class_id": class_ids, "class_name": names, "vector": vectors})
        pipeline.write(table, MilvusSink(ours))

    def write_theirs() -> None:
        raw.upsert(client, theirs.name, numbers, work.entries[numbers], f"-{next(other)}")

    row = paired(write_ours, write_theirs, len(numbers), repeats)
    ours.drop()
    theirs.drop()
    return row


def retrieval(server: Server, work: Work, repeats: int) -> Row:
    """The stage of the pipeline, vectors in and candidates out, as `ours`; `reference`: the same by a search of the head.

    A row a number of classes, with `us` a picture, and that over the time of ViT-B/32's forward pass in this process (bfloat16
    where the processor has it, random weights, which cost the same).
    """
    rows: Row = {}
    per_picture = vit_b32_us()
    random = np.random.default_rng(0)
    tables = [
        pa.table({"error": pa.nulls(len(batch), pa.string()), "vector": vectors_column(batch)})
        for batch in raw.batches(work.queries)
    ]
    for count in CLASSES:
        weights = random.normal(size=(count, work.queries.shape[1])).astype(np.float32)
        weights *= CLIP_LOGIT_SCALE / np.linalg.norm(weights, axis=1, keepdims=True)
        head = Head(np.arange(count), [f"class {number}" for number in range(count)], weights, np.zeros(count, np.float32))
        entries, stored = head.to_entries(), Collection(server.address, f"head_{count}")
        stored.create(entries.vectors.shape[1], Index(kind="FLAT"), {"fingerprint": "bench"}, count)
        stored.upsert(entries.entry_ids, entries.class_ids, entries.class_names, entries.vectors)
        stored.seal(count)
        ours, theirs = (
            choosing.Retrieve(config.Retriever(top_k=5), lambda head=head: head, stored, stored, limit)  # type: ignore[misc]
            for limit in (exact.EXACT_CLASSES, 0)
        )
        row = paired(
            lambda ours=ours: [ours(table) for table in tables],  # type: ignore[misc]
            lambda theirs=theirs: [theirs(table) for table in tables],  # type: ignore[misc]
            len(work.queries),
            repeats,
        )
        rows[str(count)] = row | {"us": 1e6 / row["ours"], "of_vit_b32": 1e6 / row["ours"] / per_picture}
        stored.drop()
    return {"retrieve": rows, "vit_b32_us": per_picture}


def vit_b32_us(pictures: int = 16) -> float:
    """Microseconds a picture of ViT-B/32's forward pass."""
    import open_clip
    import torch

    model = open_clip.create_model("ViT-B-32", precision="bf16").eval()
    with torch.inference_mode():
        batch = torch.zeros(pictures, 3, 224, 224, dtype=torch.bfloat16)
        model.encode_image(batch)
        started = time.perf_counter()
        model.encode_image(batch)
        return 1e6 * (time.perf_counter() - started) / pictures


def recalls(store: Store, name: str, work: Work) -> dict[str, float]:
    """recall@K of every index."""
    with store.opened(name) as server:
        for kind in KINDS:
            collection, numbers = created(server, kind, kind, work), np.arange(len(work.entries))
            collection.upsert(*raw.columns(numbers), work.entries)
            collection.seal(len(numbers))
    with store.opened(name) as server:
        found = {kind: work.recall(rows_of(Collection(server.address, kind), work.queries)) for kind in KINDS}
    return {"entries": len(work.entries), "dim": work.entries.shape[1], **found}


def crossover(sizes: Sequence[int] = SIZES, dim: int = 512, queries: int = 256, repeats: int = 5) -> dict[str, Row]:
    """HNSW as `ours` against FLAT as `reference` on Milvus Lite: where `auto` should change from one to the other.

    In requests of raw.BATCH queries, and of one (`single`). Size is also what Lite does a request for, whatever the index.
    """
    rows: dict[str, Row] = {}
    for size in sizes:
        work = drawn(size, dim, queries)
        with tempfile.TemporaryDirectory(prefix="rar_bench_") as folder:
            store = Store(lambda name, folder=folder: lite_server(Path(folder) / name))  # type: ignore[misc]
            seconds = {kind: built(store, kind, work)["seconds"]["all"] for kind in ("FLAT", "HNSW")}
            with store.opened("FLAT") as flat, store.opened("HNSW") as hnsw:
                ours, theirs = Collection(hnsw.address, "HNSW"), Collection(flat.address, "FLAT")
                few = work.queries[:4]
                rows[str(size)] = {
                    "batched": paired(our_search(ours, work), our_search(theirs, work), queries, repeats),
                    "single": paired(singly(ours, few), singly(theirs, few), len(few), repeats),
                    "build_seconds": seconds,
                }
    return rows


def singly(collection: Collection, queries: np.ndarray) -> Callable[[], object]:
    return lambda: [collection.search(query[None], K) for query in queries]
