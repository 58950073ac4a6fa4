"""What limits a run that is larger than any that was made: a worked model, of rates measured here and of rates given.

Measured in this process, on one core: the CPU seconds of each stage, and what Ray Data costs the driver a shard (a line through
two runs of stages that do nothing). Given, as no GPU and no cluster is at hand: `Given`, each with its source; `rar bench scale
--model --assume NAME=VALUE` puts another in its place. Every resource is worked out as if all others were free: the slowest is
the limit, and `keeps_up` says how much of the others the GPUs can feed on. What it leaves out: start-up, stragglers, skew.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image
from pydantic import Field

from rar import config, fusion
from rar.columns import vectors_column
from rar.corpus.decode import fit_square
from rar.corpus.listing import list_images
from rar.engine import choosing, pipeline, reading, session
from rar.engine.sinks import ShardSink
from rar.memory.collection import Collection
from rar.retriever.heads import CLIP_LOGIT_SCALE, Head
from rar.runfolder import RunFolder

SIDE = 224
STAGES = 6  # of Ray Data, from reading to writing
SHARDS = (10, 60)  # of the two runs that tell the driver's share
URI_BYTES = 60

Row = dict[str, Any]


class Given(config.Strict):
    """What is not measured here. GB is 10^9 bytes."""

    pictures: float = Field(1e9, gt=0, description="of the corpus")
    gpus: int = Field(64, ge=1, description="shared out between encoder and ranker so that both end together")
    cores_a_gpu: float = Field(16, gt=0, description="for tasks, on all nodes together")
    encoder_a_gpu: float = Field(1100, gt=0, description="pictures/s: ViT-B/16, clip-retrieval's docs, 8 x A100")
    ranker_a_gpu: float = Field(
        13, gt=0, description="calls/s: derived, 7.6e9 x 2 x 700 tokens at 45 % of an A100's 312 TFLOP/s"
    )
    asked: float = Field(
        0.6, ge=0, le=1, description="share of pictures that the ranker is asked about: `rar bench replay`, cars"
    )
    picture_bytes: float = Field(110e3, gt=0, description="encoded: ImageNet's mean")
    gbit_a_node: float = Field(25, gt=0, description="network of a node with one GPU")
    prefixes: int = Field(16, ge=1, description="of the object store, over which the corpus is spread")
    gets_a_prefix: float = Field(5500, gt=0, description="requests/s: S3's documentation")
    puts_a_prefix: float = Field(3500, gt=0, description="requests/s: S3's documentation; a run folder is one prefix")
    listed_a_second: float = Field(10_000, gt=0, description="names/s of one listing: pages of 1,000, 100 ms each")
    shard_size: int = Field(4096, ge=1, description="run.shard_size")
    milvus_nodes: int = Field(16, ge=1, description="of 16 cores and 64 GB")
    upserts_a_node: float = Field(6900, gt=0, description="vectors/s: VectorDBBench, 10 M x 768, HNSW_SQ")
    searches_a_node: float = Field(3917, gt=0, description="queries/s: the same, ef 100, recall .92")
    driver_gb: float = Field(32, gt=0, description="memory of the driver's pod")


def run(overrides: Sequence[str] = (), pictures: int = 48) -> Row:
    """measured: seconds of a core and bytes; given: all of Given; resources: see `worked`; limit: the slowest.

    Raises UserError for an override that Given does not have.
    """
    given = config.validated(Given, {}, overrides)
    measured = {**stages(pictures), "driver_s_a_shard": driver()}
    rows = worked(given, measured)
    return {"measured": measured, "given": given.model_dump(), "resources": rows, **summary(rows)}


def summary(rows: dict[str, Row]) -> Row:
    """The slowest of what every run needs."""
    needed = {name: row["hours"] for name, row in rows.items() if not row["only_where"]}
    limit = max(needed, key=lambda name: needed[name])
    return {"limit": {"resource": limit, "hours": needed[limit]}}


def worked(given: Given, measured: Row) -> dict[str, Row]:
    """Resource -> hours, as if it alone were short; have: how much of it there is; keeps_up: how much ends with the GPUs.

    only_where: of which runs it holds; "" for all.
    """
    n, shards = given.pictures, given.pictures / given.shard_size
    asking = given.asked / given.ranker_a_gpu
    a_gpu = 1 / given.encoder_a_gpu + asking
    gpu_s = n * a_gpu / given.gpus
    cpu_s = sum(value for name, value in measured.items() if name.startswith("cpu_s_"))
    bytes_in, bytes_within = given.picture_bytes, 3 * given.picture_bytes + 3 * SIDE**2
    rows: dict[str, Row] = {}

    def row(name: str, seconds: float, have: float, only_where: str = "") -> None:
        keeps_up = have * seconds / gpu_s
        rows[name] = {"hours": seconds / 3600, "have": have, "keeps_up": keeps_up, "only_where": only_where}

    row("GPUs", gpu_s, given.gpus)
    rows["GPUs"] |= {"for_encoder": given.gpus / given.encoder_a_gpu / a_gpu, "for_ranker": given.gpus * asking / a_gpu}
    cores = given.cores_a_gpu * given.gpus
    row("cores", n * cpu_s / cores, cores)
    gbit = given.gbit_a_node * given.gpus
    row("network in, Gbit/s", n * bytes_in * 8 / (gbit * 1e9), gbit)
    row("network within, Gbit/s", n * bytes_within * 8 / (gbit * 1e9), gbit)
    row("object store reads, prefixes", n / (given.prefixes * given.gets_a_prefix), given.prefixes)
    row("object store writes, prefixes", 2 * shards / given.puts_a_prefix, 1)
    row("driver, processes", shards * measured["driver_s_a_shard"], 1)
    row("Milvus searches, nodes", n / (given.milvus_nodes * given.searches_a_node), given.milvus_nodes, "mode knn or tip")
    row("Milvus writes, nodes", n / (given.milvus_nodes * given.upserts_a_node), given.milvus_nodes, "rar memory of so many")
    index_gb = n * measured["index_bytes"] / 1e9
    rows["driver's index, GB"] = {"hours": 0.0, "have": given.driver_gb, "keeps_up": index_gb, "only_where": "memory, not time"}
    rows["progress line, s"] = {"hours": 0.0, "have": 5.0, "keeps_up": shards / given.listed_a_second, "only_where": "latency"}
    return rows


def stages(pictures: int) -> Row:
    """CPU seconds a picture of what runs as tasks, on drawn JPEGs of 500 x 375; bytes of a picture and of its index row."""
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        sizes = [draw(folder / "photos" / f"{number:05d}.jpg", number) for number in range(pictures)]
        index = list_images(config.Corpus(uri=str(folder / "photos")))
        shard = index.append_column("shard", pa.array([0] * pictures, pa.int32()))
        head = drawn_head()
        nowhere = Collection("http://127.0.0.1:1", "none")
        runs = RunFolder.open(folder / "run", "classify", config.Config(), fresh=False, name="bench", group="bench")
        vectors = np.random.default_rng(0).normal(size=(pictures, head.weights.shape[1])).astype(np.float32)
        chain: dict[str, Callable[[pa.Table], Any]] = {
            "read": reading.load,
            "decode": reading.Decode(lambda image: fit_square(image, SIDE, "shortest", "bicubic"), SIDE),
            "retrieve": choosing.Retrieve(config.Retriever(), lambda: head, nowhere, nowhere),
            "rank": choosing.Rank(None, fusion.Calibration(), 32),
            "fuse": choosing.Fuse(fusion.Calibration()),
            "write": ShardSink(runs.path, {0: pictures})._write,
        }
        found: Row = {}
        for name, work in chain.items():
            if name == "retrieve":
                shard = shard.append_column("vector", vectors_column(vectors))
            found[f"cpu_s_{name}"] = statistics.median(cpu_seconds(work, shard) for _ in range(5)) / pictures
            shard = work(shard) if name != "write" else shard
    row = index.drop_columns(["uri"]).nbytes / pictures + URI_BYTES
    return {**found, "picture_bytes": statistics.mean(sizes), "index_bytes": row}


def cpu_seconds(work: Callable[[pa.Table], Any], table: pa.Table) -> float:
    started = time.process_time()
    work(table)
    return time.process_time() - started


def draw(file: Path, number: int) -> int:
    """A JPEG whose size is that of a photo; returns its bytes."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, np.float32) + random.normal(scale=14, size=(375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    file.parent.mkdir(exist_ok=True)
    return file.write_bytes(buffer.getvalue())


def drawn_head(classes: int = 1_203, dim: int = 512) -> Head:
    weights = np.random.default_rng(0).normal(size=(classes, dim)).astype(np.float32)
    weights *= CLIP_LOGIT_SCALE / np.linalg.norm(weights, axis=1, keepdims=True)
    return Head(np.arange(classes), [f"class {number}" for number in range(classes)], weights, np.zeros(classes, np.float32))


def driver() -> float:
    """CPU seconds of the driver a shard, of a pipeline of STAGES stages that do nothing; Ray's own servers are not counted."""
    with session.opened():
        seconds = []
        for shards in (SHARDS[0], *SHARDS):  # the first warms up
            index = pa.table({"uri": [f"{row:060d}" for row in range(shards)]})
            rows = pipeline.shards_of(index, pipeline.evenly(index, 1))
            for number in range(STAGES):
                rows = pipeline.through(rows, f"stage{number}", unchanged)
            started = time.process_time()
            ray.get(rows.to_arrow_refs())
            seconds.append(time.process_time() - started)
    return max(0.0, (seconds[2] - seconds[1]) / (SHARDS[1] - SHARDS[0]))


def unchanged(table: pa.Table) -> pa.Table:
    return table
