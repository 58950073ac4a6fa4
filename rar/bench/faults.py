"""What faults cost: commands over the miniature world, struck at a drawn moment and held, row by row, against one left alone.

A fault is a function that starts its command, strikes when a drawn share of the rows is there, and returns the exit codes of
all the starts that it took; a command that ends by the fault is started again at once, as a user would. Where it runs is a
place: a laptop with Milvus Lite, a cluster of raylets on this machine, a real Milvus server, an S3 server (moto). Processes are
found below this one by the name that Ray gives them, so nobody else's are touched. Linux.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from rar import storage
from rar.bench.s3 import s3_server
from rar.bench.scale import family
from rar.bench.server import PROCESSES, milvus_server
from rar.engine import models
from rar.memory import catalog
from rar.memory.collection import Collection
from rar.miniature.data import write_world
from rar.runfolder import RunFolder
from rar.schema import Unavailable, UserError

SHOTS, TESTS = 8, 2  # of each of 120 classes: what `rar memory` builds of, and what `rar classify` looks at
SHARD = 4
EARLY, LATE = 0.1, 0.8  # share of the rows that are there when a fault strikes
LATEST_S = 600.0  # for a moment to come, and for a command to end
GONE_S = 20.0  # in which what a command started is gone after it
NEAR = 1e-5  # of scores
TOUCHED = 3  # pictures that vanish, and as many that change
POISON = "RAR_BENCH_POISON"  # the shard that kills its process
POISONED = """
from rar.bench import faults
from rar.engine import models
models.Embed = faults.Venomous
from jobs.cli import main
main()
"""
ROOM = """
mount -t tmpfs -o size="$1" none "$2" || exit 99
place=$2 kept=$3; shift 3
"$@"; echo $? > "$kept/first"
mount -o remount,size=1g "$place"
"$@"; second=$?
cp -a "$place/." "$kept/run"; exit $second
"""  # the disk of a run folder is full, then room is made: a disk of its own needs a mount namespace
WORKER, ENCODER, DESK = r"ray::(MapBatches|Write)", r"ray::ModelActor", r"ray::Desk"  # as Ray calls processes
REPLICA, CONTROLLER = r"ray::ServeReplica:.*ranker", r"ray::ServeController"
SAID = r"^rar: |waiting for|nothing for|cannot be told"
NOISE = r"Traceback|\(raylet\)|^\[\d{4}-\d\d-\d\d|^\*\*\* SIG"  # of Ray, which a user should not see
Row = dict[str, Any]
Rows = dict[Any, Any]  # of a run: place in the index -> prediction; of a memory: entry -> class


class Venomous(models.Embed):
    """The encoder, whose process ends with the pictures of one shard."""

    def __call__(self, table: pa.Table) -> pa.Table:
        if "pixels" in table.column_names and str(table["shard"][0].as_py()) == os.environ.get(POISON):
            os._exit(1)
        return super().__call__(table)


@dataclass(frozen=True)
class Place:
    """Where commands run. folder: has config.yaml and logs. root: of run folders. within: what can be struck beside processes.

    environment: of a command, beside this one's. store: address of a Milvus that is no part of the command.
    """

    folder: Path
    root: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    store: str = ""
    within: Any = None


@dataclass
class Trial:
    """A command that is to meet a fault. touched: uris of which rows may fail."""

    place: Place
    verb: str
    name: str
    draw: random.Random
    options: tuple[str, ...] = ()
    touched: set[str] = field(default_factory=set)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    before: int = 0  # bytes that the log had when its moment came

    def __post_init__(self) -> None:
        self.moment = self.draw.uniform(EARLY, LATE)
        self.out = f"{self.place.root}/{self.name}"

    @property
    def log(self) -> Path:
        return self.place.folder / f"{self.name}.log"

    def arguments(self, out: str | None = None) -> list[str]:
        options = [part for one in (*self.place.options, *self.options) for part in ("--set", one)]
        if self.verb == "memory":
            options += ["--set", f"memory.name={self.name}", "--set", f"memory.shots={SHOTS}"]
        return [self.verb, str(self.place.folder / "config.yaml"), "--out", out or self.out, *options]

    def start(self, command: Sequence[str] = (), more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the command, or another one in its stead."""
        words = command or [sys.executable, "-m", "jobs.cli", *self.arguments()]
        environment = {**os.environ, **self.place.environment, **(more or {})}
        with self.log.open("ab") as log:
            self.started.append(subprocess.Popen(words, stdout=log, stderr=log, env=environment))
        return self.started[-1]

    def begun(self, command: Sequence[str] = (), more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the command and return when its moment has come. Raises Unavailable where it ends before."""
        process, until = self.start(command, more), time.monotonic() + LATEST_S
        while self.there() < self.moment:
            if process.poll() is not None or time.monotonic() > until:
                raise Unavailable(f"{self.name}: rar {self.verb} did not come to its moment: {self.log.read_text()[-800:]}")
            time.sleep(0.05)
        self.before = self.log.stat().st_size
        return process

    def there(self) -> float:
        """The share of the rows that is written."""
        if self.verb == "memory":
            found = [one.counts.get("images", 0) for one in catalog.generations(self.place.store, self.name)]
            return max(found, default=0) / (120 * SHOTS)
        with suppress(OSError, Unavailable):  # storage that is away
            return len(list((storage.place(self.out) / "done").glob("part-*"))) * SHARD / (120 * TESTS)
        return 0.0

    def end(self, process: subprocess.Popen[bytes]) -> int:
        return process.wait(LATEST_S)

    def again(self) -> int:
        return self.end(self.start())

    def rows(self) -> tuple[Rows, int, bool]:
        """What it left, how much of it twice, and whether its counts add up."""
        if self.verb == "memory":
            stored = catalog.find(self.place.store, self.name)
            parts = [Collection(self.place.store, f"{self.name}_{part}") for part in catalog.ENTRIES]
            entries = [one.fetch(vectors=False) for one in parts]
            rows: Rows = {i: name for one in entries for i, name in zip(one.entry_ids, one.class_names, strict=True)}
            return rows, sum(stored.counts[part] for part in catalog.ENTRIES) - len(rows), bool(stored.digest)
        folder = RunFolder(self.out)
        found = [*folder.predictions().to_pylist(), *folder.errors().to_pylist()]
        counts = folder.read("run.json")["counts"]
        whole = counts["ok"] + counts["failed"] + counts["skipped"] == counts["input"] == len({row["row"] for row in found})
        fair = all(row["uri"] in self.touched or "error" not in row for row in found)
        return (
            {row["row"]: {**row, "uri": ""} for row in found},
            len(found) - len({row["row"] for row in found}),
            whole and fair,
        )


def processes(named: str) -> list[int]:
    """Below this one, by a regular expression on how they call themselves."""
    found = []
    for pid in family(os.getpid()):
        with suppress(OSError):
            if re.match(named, (PROCESSES / str(pid) / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")):
                found.append(pid)
    return sorted(found)


def kill_one(named: str, draw: random.Random) -> None:
    """Kill one of the processes of such a name below this one; waits for one. Raises Unavailable."""
    until = time.monotonic() + 60
    while not (found := processes(named)):
        if time.monotonic() > until:
            raise Unavailable(f"no process is called {named}")
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.kill(draw.choice(found), signal.SIGKILL)


def killed(named: str, trial: Trial) -> list[int]:
    process = trial.begun()
    kill_one(named, trial.draw)
    return [trial.end(process)]


def driver(kind: signal.Signals, trial: Trial) -> list[int]:
    """The driver gets a signal, and the command is started again as soon as it has gone."""
    process = trial.begun()
    process.send_signal(kind)
    return [trial.end(process), trial.again()]


def node(trial: Trial) -> list[int]:
    process, cluster = trial.begun(), trial.place.within
    lost = trial.draw.choice(sorted(cluster.worker_nodes, key=lambda one: one.node_id))
    cluster.remove_node(lost, allow_graceful=False)
    code = trial.end(process)
    cluster.add_node(num_cpus=3)
    return [code]


def milvus(trial: Trial) -> list[int]:
    process = trial.begun()
    trial.place.within.restart(trial.draw.uniform(1, 20))
    return [trial.end(process)]


def full_disk(trial: Trial) -> list[int]:
    """Room for a drawn part of what a run writes."""
    disk, kept = Path(tempfile.mkdtemp(dir=trial.place.folder)), Path(trial.out)
    kept.mkdir()
    size = int(4096 * (40 + trial.moment * 5 * 120 * TESTS / SHARD))  # marks and small files take a page each
    command = [sys.executable, "-m", "jobs.cli", *trial.arguments(str(disk))]
    ended = trial.end(trial.start(["unshare", "-rm", "sh", "-c", ROOM, "sh", str(size), str(disk), str(kept), *command]))
    if not (kept / "first").exists():
        raise UserError("a full disk needs `unshare` of mount namespaces; leave it out with --only")
    trial.out = str(kept / "run")
    return [int((kept / "first").read_text()), ended]


def files(trial: Trial) -> list[int]:
    """Pictures of the corpus vanish, and others are overwritten with something else, while it is read."""
    photos = trial.place.folder / f"{trial.name}_photos"
    shutil.copytree(trial.place.folder / "world" / "novel" / "test", photos)
    trial.options += (f"corpus.uri={photos}",)
    process = trial.begun()
    some = trial.draw.sample(sorted(photos.rglob("*.png")), 2 * TOUCHED)
    for number, photo in enumerate(some):
        photo.write_bytes(b"no picture") if number % 2 else photo.unlink()
    trial.touched = {str(photo) for photo in some}
    return [trial.end(process)]


def poison(trial: Trial) -> list[int]:
    shard = trial.draw.randrange(120 * TESTS // SHARD)
    index = sorted(str(one) for one in (trial.place.folder / "world" / "novel" / "test").rglob("*.png"))
    trial.touched = set(index[shard * SHARD : (shard + 1) * SHARD])
    trial.moment = shard * SHARD / len(index)
    return [trial.end(trial.start([sys.executable, "-c", POISONED, *trial.arguments()], {POISON: str(shard)}))]


def throttled(trial: Trial) -> list[int]:
    """A third of all requests is told to slow down, from the first one on."""
    trial.place.within.refused = 1 / 3
    try:
        return [trial.end(trial.begun())]
    finally:
        trial.place.within.refused = 0.0


def store_away(trial: Trial) -> list[int]:
    process = trial.begun()
    trial.place.within.refused = 1.0
    time.sleep(trial.draw.uniform(10, 40))
    trial.place.within.refused = 0.0
    return [trial.end(process)]


KNN = ("retriever.mode=knn", "ranker.method=none", "memory.name=whole_memory")
Fault = tuple[str, str, tuple[str, ...], Callable[[Trial], list[int]]]
FAULTS: dict[str, Fault] = {  # name -> where, which verb, with which settings, what
    "milvus_searched": ("server", "classify", KNN, milvus),
    "milvus_written": ("server", "memory", (), milvus),
    "memory_worker": ("server", "memory", (), partial(killed, WORKER)),
    "memory_driver": ("server", "memory", (), partial(driver, signal.SIGKILL)),
    "memory_preempted": ("server", "memory", (), partial(driver, signal.SIGTERM)),
    "throttled": ("s3", "classify", (), throttled),
    "store_away": ("s3", "classify", (), store_away),
    "node": ("cluster", "classify", (), node),
    "cluster_driver": ("cluster", "classify", (), partial(driver, signal.SIGKILL)),
    "worker": ("laptop", "classify", (), partial(killed, WORKER)),
    "encoder": ("laptop", "classify", (), partial(killed, ENCODER)),
    "desk": ("laptop", "classify", (), partial(killed, DESK)),
    "replica": ("laptop", "classify", (), partial(killed, REPLICA)),
    "controller": ("laptop", "classify", (), partial(killed, CONTROLLER)),
    "driver": ("laptop", "classify", (), partial(driver, signal.SIGKILL)),
    "preempted": ("laptop", "classify", (), partial(driver, signal.SIGTERM)),
    "disk": ("laptop", "classify", (), full_disk),
    "files": ("laptop", "classify", (), files),
    "poison": ("laptop", "classify", (), poison),
}


def run(only: Sequence[str] = (), runs: int | None = None, seed: int = 0) -> Row:
    """faults: NAME -> exits, moment (share of the rows), identical, alike and of (rows), failed rows, counts, twice, left
    (processes of models that outlived the command), seconds_lost, noise (lines of Ray's own), and what was said first.

    only: names of faults; runs: how many strikes in all, the faults in turns, each time at another moment.

    Raises UserError for a fault that there is none of, or whose server is not installed.
    """
    if unknown := set(only) - FAULTS.keys():
        raise UserError(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    chosen = [name for name in FAULTS if not only or name in only]
    runs = len(chosen) if runs is None else runs
    times = {name: len(range(place, runs, len(chosen))) for place, name in enumerate(chosen)}
    found: Row = {}
    with tempfile.TemporaryDirectory(prefix="rar_faults_") as temporary:
        folder = Path(temporary)
        write_world(folder / "world", 0, shots=SHOTS, tests=TESTS, scenes=1)
        write_config(folder)
        for where in dict.fromkeys(FAULTS[name][0] for name in chosen if times[name]):
            with PLACES[where](folder) as place:
                found |= struck(place, {name: times[name] for name in chosen if FAULTS[name][0] == where}, seed)
    return {"faults": found, "runs": len(found), "whole": sum(one["identical"] == one["of"] for one in found.values())}


def write_config(folder: Path) -> None:
    memory = {"uri": str(folder / "lite"), "name": "lite", "support": {"uri": str(folder / "world" / "novel" / "support")}}
    sections = {"memory": {**memory, "shots": 1}, "ranker": {"batch_size": SHARD}, "route": {"mode": "always"}}
    corpus = {"uri": str(folder / "world" / "novel" / "test")}
    (folder / "config.yaml").write_text(yaml.safe_dump({"corpus": corpus, "run": {"shard_size": SHARD}, **sections}))


def struck(place: Place, times: Mapping[str, int], seed: int) -> Row:
    """The faults of one place, each so many times, after what they are held against."""
    found: Row = {}
    whole: dict[tuple[str, ...], tuple[Rows, float]] = {}
    for name, count in times.items():
        _, verb, options, fault = FAULTS[name]
        for one in [("memory",)] * (options == KNN) + [(verb, *options)]:
            if one not in whole:
                whole[one] = left_alone(place, *one)
        for number in range(count):
            called = f"{name}_{number + 1}" if count > 1 else name
            trial = Trial(place, verb, f"{called}_{seed}", random.Random(f"{seed} {called}"), options)
            try:
                codes, seconds = timed(trial, fault)
                found[called] = outcome(trial, codes, *whole[verb, *options], seconds)
            except (Unavailable, subprocess.TimeoutExpired) as error:  # the others are worth knowing
                found[called] = {"exits": "-", "identical": 0, "of": len(whole[verb, *options][0]), "said": str(error)}
            print(f"  {called}: {found[called]}", file=sys.stderr, flush=True)
    return found


def left_alone(place: Place, verb: str, *options: str) -> tuple[Rows, float]:
    """Rows and seconds of a command without a fault."""
    trial = Trial(place, verb, "whole_searched" if options else f"whole_{verb}", random.Random(0), options)
    seconds = timed(trial, lambda one: [one.again()])[1]
    return trial.rows()[0], seconds


def timed(trial: Trial, fault: Callable[[Trial], list[int]]) -> tuple[list[int], float]:
    """Raises Unavailable where the last start ended with neither 0 nor 3."""
    started = time.monotonic()
    try:
        codes = fault(trial)
    finally:
        for process in trial.started:
            process.kill()
    if codes[-1] not in (0, 3):
        raise Unavailable(f"{trial.name}: rar {trial.verb} ended with {codes}: {trial.log.read_text()[-1500:]}")
    return codes, time.monotonic() - started


def outcome(trial: Trial, codes: list[int], whole: Rows, alone_s: float, seconds: float) -> Row:
    rows, twice, adds_up = trial.rows()
    failed = [row for row in rows.values() if isinstance(row, dict) and "error" in row]
    lines = trial.log.read_bytes()[trial.before :].decode(errors="replace").splitlines()
    said = sorted((line.strip() for line in lines if re.search(SAID, line)), key=lambda line: not line.startswith("rar: "))
    until = time.monotonic() + GONE_S
    while (left := len(processes(r"ray::(ServeReplica|ModelActor)"))) and time.monotonic() < until:
        time.sleep(0.5)
    return {
        "exits": " then ".join(map(str, codes)),
        "moment": round(trial.moment, 2),
        "identical": sum(rows.get(key) == row for key, row in whole.items()),
        "alike": sum(key in rows and alike(rows[key], row) for key, row in whole.items()),
        "of": len(whole) - len(failed),
        "failed": len(failed),
        "counts": adds_up and len(rows) == len(whole),
        "twice": twice,
        "left": left,
        "seconds_lost": round(seconds - alone_s, 1),
        "noise": sum(bool(re.search(NOISE, line)) for line in lines),
        "said": said[0] if said else "",
    }


def alike(one: Any, other: Any) -> bool:
    """Equal classes and rankings, and scores but for rounding: a row that fails leaves its shard's batch to others."""
    if isinstance(one, str) or "error" in one or "error" in other:
        return bool(one == other)
    same = all(one[key] == other[key] for key in ("class_id", "ranking", "rank_status", "routed"))
    return same and all(abs(a - b) <= NEAR for a, b in zip(one["scores"], other["scores"], strict=True))


@contextmanager
def laptop(folder: Path) -> Iterator[Place]:
    place = Place(folder, str(folder))
    if not (folder / "lite").exists():
        build = [sys.executable, "-m", "jobs.cli", "memory", str(folder / "config.yaml"), "--out", str(folder / "memory")]
        built = subprocess.run(build, capture_output=True, text=True, timeout=LATEST_S)
        if built.returncode:
            raise Unavailable(f"rar memory ended with {built.returncode}: {built.stderr[-800:]}")
    yield place


@contextmanager
def cluster(folder: Path) -> Iterator[Place]:
    """A head without CPUs and two nodes of three."""
    from ray.cluster_utils import Cluster

    with laptop(folder), tempfile.TemporaryDirectory(prefix="rar_faults_") as runs:
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                made.add_node(num_cpus=3)
            yield Place(folder, runs, environment={"RAY_ADDRESS": made.address}, within=made)
        finally:
            made.shutdown()


@contextmanager
def server(folder: Path) -> Iterator[Place]:
    with milvus_server(folder / "milvus") as running:
        yield Place(folder, str(folder / "server"), (f"memory.uri={running.address}",), store=running.address, within=running)


@contextmanager
def s3(folder: Path) -> Iterator[Place]:
    with laptop(folder), s3_server() as running:
        running.put(folder / "world" / "novel" / "test", "photos")
        yield Place(folder, "s3://rar", ("corpus.uri=s3://rar/photos",), running.environment, within=running)


PLACES = {"laptop": laptop, "cluster": cluster, "server": server, "s3": s3}
