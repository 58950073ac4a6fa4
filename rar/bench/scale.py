"""How cost grows with rows: the commands themselves on brought embeddings, at several sizes, each in processes of its own.

What grows is told by a line through the sizes: `slope` (seconds a row), `intercept` (what a command costs before its first
row) and `r2`. Memory is that of the driver and, as proportional set size, of all processes of the command, each at its greatest
(Linux). The store is a process of its own here: a folder of Milvus Lite would be owned by the driver and counted with it.

The reference of a build is pymilvus as one writes it by hand, upserting the same vectors from one process into the same store
and flushing them, without ids by content, resuming, heads or a digest; it is held against rows a second past the intercept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from rar.bench import raw
from rar.bench.embeddings import BLOCK
from rar.bench.server import PROCESSES, Server, lite_server, memory_mib, milvus_server
from rar.columns import vectors_column
from rar.config import Index
from rar.memory.collection import Collection
from rar.memory.store import connect
from rar.miniature.data import two_processes
from rar.miniature.world import render, rng_of, vocabulary
from rar.schema import Unavailable, UserError

SIZES = (10_000, 30_000, 100_000)
CLASSES = 1_203
WATCH_SECONDS = 0.5
ROLES = ("driver", "models", "ranker", "tasks", "others")  # others: Ray, Serve and the store

Row = dict[str, Any]


def run(sizes: Sequence[int] = SIZES, dim: int = 512, server: bool = False, mode: str = "fused", pictures: bool = False) -> Row:
    """Per size `memory` and `classify` (see `command`) and `pymilvus`, seconds of the plain upserts; then the lines of growth.

    mode: retriever.mode. pictures: small drawn pictures of the miniature's 120 classes, read, decoded and embedded, in place of
    brought embeddings; without the plain upserts, as there are no vectors to write. build: rows a second as `ours`, the plain
    upserts' as `reference`. driver: the driver's memory at the largest size over that at the smallest.
    """
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise UserError("growth is told by two sizes at least, e.g. --rows 10000 --rows 30000")
    result: Row = {"pictures": True} if pictures else {"dim": dim, "classes": CLASSES}
    result |= {"mode": mode, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        with milvus_server(folder / "milvus") if server else lite_server(folder / "lite") as store:
            for size in sizes:
                result["sizes"][str(size)] = at_size(folder / str(size), store, size, None if pictures else dim, mode)
    rows = list(result["sizes"].values())
    seconds = {key: [one[key]["seconds"] for one in rows] for key in rows[0]}
    result["growth"] = {key: line(sizes, taken) for key, taken in seconds.items()}
    result["driver"] = {key: rows[-1][key]["driver_mib"] / rows[0][key]["driver_mib"] for key in ("memory", "classify")}
    if not pictures:
        ours, reference = (1 / result["growth"][key]["slope"] for key in ("memory", "pymilvus"))
        result["build"] = {"ours": ours, "reference": reference, "ratio": ours / reference, "repeats": 1}
    return result


def write_config(folder: Path, store: Server, size: int, dim: int | None, mode: str) -> None:
    """folder/support and folder/scale.yaml. dim: of brought embeddings; None: pictures."""
    if dim is None:
        write_pictures(folder / "support", size)
    else:
        write_vectors(folder / "support", size, dim)
    settings = {
        "corpus": {"uri": str(folder / "support")},
        "memory": {"uri": store.address, "name": f"scale_{size}", "support": {"uri": str(folder / "support")}},
        "retriever": {"mode": mode},
        "ranker": {"method": "none"},
        "route": {"mode": "always"},
    } | ({} if dim is None else {"encoder": {"model": "precomputed"}})
    (folder / "scale.yaml").write_text(yaml.safe_dump(settings))


def at_size(folder: Path, store: Server, size: int, dim: int | None, mode: str) -> Row:
    write_config(folder, store, size, dim, mode)
    rows = {verb: command(verb, folder, size) for verb in ("memory", "classify")}
    if dim is None:
        return rows
    collection = Collection(store.address, f"raw_{size}")
    collection.create(dim, Index(kind="auto" if mode in ("knn", "tip") else "FLAT"), {"fingerprint": "bench"}, size)  # as ours
    client, started = connect(store.address, None), time.perf_counter()
    for file in sorted((folder / "support").iterdir()):
        table = pq.read_table(file, columns=["row", "vector"])
        vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
        raw.upsert(client, collection.name, table["row"].to_numpy(), vectors)
    client.flush(collection.name)
    rows["pymilvus"] = {"seconds": time.perf_counter() - started}
    collection.drop()
    return rows


def write_vectors(folder: Path, size: int, dim: int) -> None:
    """Parquet as `rar embed` leaves it, and `row`: vectors around the centres of CLASSES classes, a file a BLOCK."""
    folder.mkdir(parents=True)
    centres = np.random.default_rng(0).normal(size=(CLASSES, dim))
    for start in range(0, size, BLOCK):
        rows = np.arange(start, min(start + BLOCK, size))
        vectors = centres[rows % CLASSES] + np.random.default_rng([2, start]).normal(size=(len(rows), dim))
        columns = {"row": rows, "uri": [f"v{row:08d}" for row in rows.tolist()]}
        labels = [f"class {row % CLASSES}" for row in rows.tolist()]
        table = pa.table({**columns, "label": labels, "vector": vectors_column(vectors.astype(np.float32))})
        pq.write_table(table, folder / f"part-{start // BLOCK:05d}.parquet")


def write_pictures(folder: Path, size: int) -> None:
    """A folder a class of the miniature's, with `size` JPEGs of 64 pixels in all."""
    specs = vocabulary("novel", 0)
    for spec in specs:
        (folder / spec.name).mkdir(parents=True)
    with two_processes() as pool:
        list(pool.map(partial(_write_pictures, folder, len(specs), size), range(len(specs))))


def _write_pictures(folder: Path, classes: int, size: int, number: int) -> None:
    spec = vocabulary("novel", 0)[number]
    for picture in range(number, size, classes):
        pixels = render(spec, 64, rng_of(0, "scale", spec.name, picture))
        Image.fromarray(pixels).save(folder / spec.name / f"{picture:07d}.jpg", quality=90)


def command(verb: str, folder: Path, size: int) -> Row:
    """seconds of `rar VERB`, rows_per_second, driver_mib and all_mib, and `processor`, of `processor_seconds` by `role`.

    Raises Unavailable where it fails or rows are missing.
    """
    out, log = folder / verb, folder / f"{verb}.log"
    arguments = [sys.executable, "-m", f"jobs.{verb}", str(folder / "scale.yaml"), "--out", str(out)]
    started = time.perf_counter()
    with log.open("w") as told:
        process = subprocess.Popen(arguments, stdout=told, stderr=subprocess.STDOUT)
        driver = everything = 0.0
        members: list[int] = []
        spent: dict[int, tuple[str, float]] = {}
        while process.poll() is None:
            time.sleep(WATCH_SECONDS)
            with vanished_is_well():
                driver = max(driver, memory_mib(process.pid, "VmHWM"))
                members = list(family(process.pid))
                everything = max(everything, sum(proportional_mib(pid) for pid in members))
            for pid in members:
                with vanished_is_well():
                    known, _ = spent.get(pid, ("", 0.0))
                    spent[pid] = (role(pid) or known or "others", processor_seconds(pid))
    seconds = time.perf_counter() - started
    counts = json.loads((out / "run.json").read_text())["counts"] if process.returncode == 0 else {}
    if not counts or counts["failed"] or counts["ok"] < size:
        raise Unavailable(f"rar {verb} of {size} rows ended with {process.returncode}, {counts}: {log.read_text()[-800:]}")
    processor: dict[str, float] = dict.fromkeys(ROLES, 0.0)
    for pid, (name, took) in spent.items():
        processor["driver" if pid == process.pid else name] += took
    found: Row = {"seconds": seconds, "rows_per_second": size / seconds, "driver_mib": driver, "all_mib": everything}
    return found | {"processor": processor}


def role(pid: int) -> str:
    """What a process of a command is for, by the name that Ray has given it; "" where it has none yet, or ends."""
    name = (PROCESSES / str(pid) / "cmdline").read_text()
    of = {"ray::ModelActor": "models", "ray::ServeReplica": "ranker", "ray::IDLE": "tasks", "ray::MapBatches": "tasks"}
    known = next((known for begun, known in of.items() if name.startswith(begun)), "others")
    return known if name.startswith("ray::") else ""


def processor_seconds(pid: int) -> float:
    """What a process and all its threads have used of the processors so far."""
    fields = (PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> Iterator[int]:
    """A process and all that came of it (Linux)."""
    parents = {}
    for one in PROCESSES.glob("[0-9]*"):
        with vanished_is_well():
            parents[int(one.name)] = int((one / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return iter(found)


def proportional_mib(pid: int) -> float:
    """What a process holds, memory that it shares with n processes counted as an n-th."""
    with vanished_is_well():
        for line_ in (PROCESSES / str(pid) / "smaps_rollup").read_text().splitlines():
            if line_.startswith("Pss:"):
                return int(line_.split()[1]) / 1024
    return 0.0


@contextmanager
def vanished_is_well() -> Iterator[None]:
    """A process may end while it is looked at."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return


def line(sizes: Sequence[int], seconds: Sequence[float]) -> Row:
    """The least squares line through (rows, seconds): slope, intercept and r2 (1 for two sizes)."""
    slope, intercept = np.polyfit(sizes, seconds, 1)
    missed = np.asarray(seconds) - (slope * np.asarray(sizes) + intercept)
    spread = np.asarray(seconds) - np.mean(seconds)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - (missed**2).sum() / (spread**2).sum())}
