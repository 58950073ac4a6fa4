"""Whole `rar classify` commands on drawn pictures, against what their slowest stage does alone on the same pictures.

Each command runs at two sizes, so that a picture's cost is told apart from the start's: of `by_size`, `ours` is 1 / slope.
Where a start varies by seconds, that takes many pictures; of `by_pipeline` it is the larger run's pictures over its
pipeline_seconds (runfolder.stages_of), with the first and the last shards that have fewer beside them. `plain` has no ranker,
`ranked` asks the miniature MLLM about every picture. What the stages do alone is measured in this process after each command,
with nothing else at work: `decode` from encoded bytes to the encoder's squares, a thread a core; `embed` and `rank` the bare
forward passes of the commands' models, from inputs that are prepared already, at the commands' batch sizes and with all
threads. `reference` is the least of them. On a machine where all stages share the cores they cannot run beside each other for
nothing: `one_after_another` is what the cores would reach if the three did all the work, one after another.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rar import config, miniature
from rar.bench import embed, rank, scale
from rar.bench.timing import compared, seconds_of
from rar.corpus.decode import decode, fit_square
from rar.encoder.towers import load_encoder
from rar.ranker.rank import MllmRanker
from rar.schema import Unavailable

FEWER = 5  # times fewer pictures at the smaller size
SAMPLE = 1024  # pictures that the stages alone are given, at most
STAGES = {"plain": ("decode", "embed"), "ranked": ("decode", "embed", "rank")}
MOVES = {"plain": {"ranker": {"method": "none"}}, "ranked": {}}

Row = dict[str, Any]


def run(rows: int = 20_000, repeats: int = 3) -> Row:
    """plain, ranked: pictures/s, `by_size` and `by_pipeline`, as of `timing.compared`; `stages` (alone), `one_after_another`,
    the start's seconds (`start`), what a picture past the start costs the processors in each kind of process (`processor_ms`,
    milliseconds of one core), and of the last large run `busy` shares and `slowest`.

    mllm: pictures that the MLLM answers a second of its own time, in `ranked` against the paper's loop (rank.paper_loop), and
    seconds_per_1000 of both.
    """
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        scale.write_pictures(folder / "pictures", rows)
        scale.write_pictures(folder / "support", 4 * 120)
        _command("memory", folder, "plain", rows, 0)
        alone = Alone(folder / "pictures")
        rounds: dict[str, list[Row]] = {name: [] for name in STAGES}
        asked: list[tuple[float, float]] = []
        for _ in range(repeats):
            for name, taking in rounds.items():
                ended = [_command("classify", folder, name, rows, size) for size in (rows // FEWER, rows)]
                line = scale.line([rows // FEWER, rows], [one["seconds"] for one in ended])
                few, many = (one["processor"] for one in ended)
                each = {role: 1000 * (many[role] - few[role]) / (rows - rows // FEWER) for role in many}
                taking.append({**line, "processor": each, "run": ended[-1]["run"], "alone": alone.rates(STAGES[name])})
            mllm = rounds["ranked"][-1]["run"]["mllm"]
            asked.append((mllm["calls"] / mllm["seconds"], alone.paper()))
    found = {name: told(taken) for name, taken in rounds.items()}
    ours, reference = ([pair[side] for pair in asked] for side in (0, 1))
    each = {"ours": 1000 / statistics.median(ours), "reference": 1000 / statistics.median(reference)}
    mllm = {**compared(ours, reference), "seconds_per_1000": each}
    return {"rows": rows, "threads": torch.get_num_threads(), **found, "mllm": mllm}


def told(rounds: list[Row]) -> Row:
    """A command's rounds (slope, intercept, run, alone) as one row."""
    stages = {name: statistics.median(one["alone"][name] for one in rounds) for name in rounds[0]["alone"]}
    ended = rounds[-1]["run"]
    reference = [min(one["alone"].values()) for one in rounds]
    flowing = [one["run"]["counts"]["ok"] / one["run"]["pipeline_seconds"] for one in rounds]
    return {
        "by_size": compared([1 / one["slope"] for one in rounds], reference),
        "by_pipeline": compared(flowing, reference),
        "start": statistics.median(one["intercept"] for one in rounds),
        "processor_ms": {role: statistics.median(one["processor"][role] for one in rounds) for role in rounds[0]["processor"]},
        "stages": stages,
        "one_after_another": 1 / sum(1 / rate for rate in stages.values()),
        "busy": {name: stage["busy"] for name, stage in ended["stages"].items()},
        "slowest": ended["slowest"],
    }


def _command(verb: str, folder: Path, name: str, rows: int, size: int) -> Row:
    """`scale.command` in a folder of its own, and what its run.json says. size: of the corpus; 0: all."""
    place = folder / f"{name}-{size}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    memory = {"uri": str(folder / "memory.milvus"), "support": {"uri": str(folder / "support")}}
    corpus = {"uri": str(folder / "pictures")} | ({"limit": size} if size else {})
    settings = {"corpus": corpus, "memory": memory, "route": {"mode": "always"}, **MOVES[name]}
    (place / "scale.yaml").write_text(yaml.safe_dump(settings))
    taken = scale.command(verb, place, size)
    ended = json.loads((place / verb / "run.json").read_text())
    if verb == "classify" and name == "ranked" and ended["mllm"]["calls"] < size:
        raise Unavailable(f"of {size} pictures {ended['mllm']['calls']} were ranked")
    return {**taken, "run": ended}


class Alone:
    """Stages by themselves, on pictures that lie over the whole corpus, with the models that the commands load."""

    def __init__(self, pictures: Path) -> None:
        files = sorted(pictures.rglob("*.jpg"))
        files = [files[place] for place in np.unique(np.linspace(0, len(files) - 1, SAMPLE).astype(int))]
        self.bytes = [file.read_bytes() for file in files]
        self.encoder = load_encoder(config.Encoder())
        self.squares = embed.squares_of(self.encoder, files)
        settings = config.Ranker()
        self.ranker = MllmRanker(settings, str(miniature.MLLM))
        self.work = rank.Work([decode(data) for data in self.bytes], named([file.parent.name for file in files]))
        self.prepared = rank.prepare(self.ranker, self.work)

    def rates(self, stages: tuple[str, ...]) -> dict[str, float]:
        """Pictures a second of each; once beforehand, which is not counted."""
        ways = {"decode": self.decode, "embed": self.embed, "rank": lambda: rank.bare_forward(self.ranker, self.prepared)}
        for stage in stages:
            ways[stage]()
        return {stage: len(self.bytes) / seconds_of(ways[stage]) for stage in stages}

    def paper(self) -> float:
        """Pictures a second of the paper's loop."""
        few = rank.Work(self.work.images[: rank.ASKED], self.work.names[: rank.ASKED])
        return len(few.images) / seconds_of(lambda: rank.paper_loop(self.ranker, few))

    def decode(self) -> None:
        side, mode, interpolation = self.encoder.side, self.encoder.resize_mode, self.encoder.interpolation
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda data: fit_square(decode(data), side, mode, interpolation), self.bytes))

    def embed(self) -> None:
        embed.forward(self.encoder, self.squares, config.Encoder().batch_size)


def named(classes: list[str]) -> list[list[str]]:
    """Candidates of each picture: its class and four others, in an order drawn at random."""
    every, random = np.array(sorted(set(classes))), np.random.default_rng(0)
    found = []
    for name in classes:
        others = random.choice(every[every != name], rank.CANDIDATES - 1, replace=False)
        found.append(random.permutation([name, *others]).tolist())
    return found
