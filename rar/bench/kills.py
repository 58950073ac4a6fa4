"""What a killed build costs: `rar memory` over drawn pictures, its driver killed again and again, against one left alone.

Each kill is SIGKILL to the driver once a drawn share of the entries is there; its workers end as orphans do. The next start is
the same command. What was written before a kill is not embedded again, so the rows that the last start embeds and those that
were there when it began are all there are; the rest were shards in flight.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from rar.bench.scale import command, write_config
from rar.bench.server import Server, lite_server, milvus_server
from rar.memory import catalog
from rar.schema import Unavailable

ORPHANS_SECONDS = 10.0  # in which the workers of a killed driver end
Row = dict[str, Any]


def run(rows: int = 20_000, kills: int = 3, seed: int = 0, server: bool = False, mode: str = "fused") -> Row:
    """left_alone, killed: digest, entries and seconds of each. kills: images that were there after each kill.

    again: images and names that the last start embedded, and `beyond`: how many more than were missing.
    """
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        with milvus_server(folder / "milvus") if server else lite_server(folder / "lite") as store:
            write_config(folder, store, rows, None, mode)
            alone = built(folder, store, rows, f"scale_{rows}")
            settings = yaml.safe_load((folder / "scale.yaml").read_text())
            settings["memory"]["name"] = "killed"
            (folder / "scale.yaml").write_text(yaml.safe_dump(settings))
            started = time.perf_counter()
            drawn = random.Random(seed)
            there = [killed(folder, store, int(rows * share)) for share in sorted(drawn.random() for _ in range(kills))]
            found = built(folder, store, rows, "killed")
            found["seconds"] = time.perf_counter() - started
    missing = alone["embedded"] - sum(there[-1]) if there else alone["embedded"]
    again = {"embedded": found["embedded"], "beyond": found["embedded"] - missing}
    result: Row = {"rows": rows, "left_alone": alone, "killed": found, "kills": [images for images, _ in there], "again": again}
    return result | {"same_digest": alone["digest"] == found["digest"]}


def built(folder: Path, store: Server, rows: int, name: str) -> Row:
    """Run the build to its end."""
    row = command("memory", folder, rows)
    found = catalog.find(store.address, name)
    embedded = json.loads((folder / "memory" / "metrics.json").read_text())["embedded"]
    return {"digest": found.digest, "entries": found.counts["images"], "embedded": embedded, "seconds": row["seconds"]}


def killed(folder: Path, store: Server, entries: int) -> tuple[int, int]:
    """Start the build and kill its driver once so many images are there; returns what is there when all is still."""
    arguments = [sys.executable, "-m", "jobs.memory", str(folder / "scale.yaml"), "--out", str(folder / "memory"), "--fresh"]
    with (folder / "killed.log").open("a") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT)
        while held(store)[0] < entries:
            if process.poll() is not None:
                raise Unavailable(f"rar memory ended by itself: {(folder / 'killed.log').read_text()[-800:]}")
            time.sleep(0.2)
        process.kill()
        process.wait()
    time.sleep(ORPHANS_SECONDS)
    return held(store)


def held(store: Server) -> tuple[int, int]:
    """Images and names that the memory `killed`, or its draft, holds."""
    found = [one.counts for one in catalog.generations(store.address, "killed")]
    images, texts = (max((counts.get(kind, 0) for counts in found), default=0) for kind in ("images", "texts"))
    return images, texts
