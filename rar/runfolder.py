"""A run on disk: what a run folder holds, when a shard counts as done, and when a folder may be resumed.

The index is frozen at the first start and cut into shards of `run.shard_size` images. A shard is the unit of work, of writing
and of resuming: its rows go through every stage together, in batches that depend on the shard alone, so that a resumed run
computes the same numbers as an uninterrupted one. A shard is done when its mark lies in `done/`: an empty-handed shard has
one, too. The mark is taken away before a shard's files are written and comes back after them, so that a killed run leaves
whole shards and nothing that counts. Its name tells the rows that were predicted and that failed (how far a run is takes one
listing, however many shards there are), its content the seconds and tokens, and when the shard ended. Cost: a kill loses the
shards in flight, at most `shard_size` images a worker; an inode a shard.

A folder is refused to a run of another identity (see identity), in words that say what differs.

The folder lies on any file system that all workers reach (see storage.place): a disk they share, or an object store.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rar import identity, storage
from rar.config import Config
from rar.identity import Identity
from rar.schema import ERRORS, PREDICTIONS, SCHEMA_VERSION, UserError

PACKAGES = ("rar", "ray", "torch", "open_clip_torch", "timm", "transformers", "pillow", "numpy", "pymilvus", "milvus-lite")
BEFORE = "before"  # the part of what failed before there was a shard


class RunFolder:
    """Paths and rules of one run folder. Opening refuses a folder of another verb or identity."""

    def __init__(self, path: str | Path) -> None:
        self.path = storage.place(path)

    @classmethod
    def open(cls, path: str | Path, verb: str, settings: Config, *, fresh: bool, name: str, group: str) -> RunFolder:
        """Create the folder, or take up one of the same identity. Raises UserError as `check` does."""
        cls.check(path, verb, settings, fresh=fresh)
        folder = cls(path)
        if fresh:
            storage.remove(folder.path)
        for part in ("predictions", "errors", "done"):
            (folder.path / part).mkdir(parents=True, exist_ok=True)
        if (folder.path / "run.json").exists():
            folder._pin(identity.of_verb(verb, settings))
        else:
            folder.write("run.json", _beginning(verb, settings, name, group))
        return folder

    @classmethod
    def check(cls, path: str | Path, verb: str, settings: Config, *, fresh: bool) -> None:
        """Raises UserError for a folder that is not a run's, or (unless `fresh`) holds a run of another verb or identity."""
        path = storage.place(path)
        if path.is_file():
            raise UserError(f"{path} is a file; choose a folder for --out")
        if not path.exists() or all(entry.name == storage.DRIVER for entry in path.iterdir()):
            return
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not a run folder and not empty; choose another --out")
        if fresh:
            return
        folder = cls(path)
        known = folder.read("run.json")
        if known["schema_version"] != SCHEMA_VERSION:
            folder._refuse(["it was written by another version of rar"])
        if known["verb"] != verb:
            folder._refuse([f"it is of `rar {known['verb']}`"])
        folder._refuse(identity.differences(known["identity"], identity.of_verb(verb, settings)))

    def pin_memory(self, digest: str) -> None:
        """Keep the memory's state when the run began. Raises UserError where it has changed since."""
        self._pin({**self.read("run.json")["identity"], "memory": digest})

    def _pin(self, now: Identity) -> None:
        known = self.read("run.json")
        self._refuse(identity.differences(known["identity"], now))
        whole = identity.completed(known["identity"], now)
        if whole != known["identity"]:
            self.write("run.json", {**known, "identity": whole})

    def _refuse(self, reasons: list[str]) -> None:
        if reasons:
            said = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
            raise UserError(f"{self.path} holds another run: {said}; use --fresh to replace it, or another --out")

    @property
    def finished(self) -> bool:
        """Whether a run has ended here, its metrics written."""
        return (self.path / "run.json").is_file() and "counts" in self.read("run.json")

    def freeze_index(self, index: pa.Table, name: str = "index.parquet") -> pa.Table:
        """Keep the first index: a resumed run must not see files that came or went since."""
        file = self.path / name
        if not file.exists():
            _write_table(index, file)
        return read_table(file)

    def pending(self, n_shards: int) -> list[int]:
        """Numbers of the shards that are not done yet."""
        done = self._tallies()
        return [shard for shard in range(n_shards) if f"{shard:06d}" not in done]

    def unproposed(self, n_shards: int) -> list[int]:
        """Numbers of the shards of pictures whose boxes are not written yet: their file, of a row a picture, is the mark."""
        return [shard for shard in range(n_shards) if not self.part("proposals", shard).exists()]

    def part(self, kind: str, shard: int) -> Path:
        return self.path / kind / f"part-{shard:06d}.parquet"

    def write_shard(self, shard: int, predictions: pa.Table, errors: pa.Table, stats: Mapping[str, float]) -> None:
        """Write a shard's two files, each whole or not at all, and then its mark."""
        started, rows = time.perf_counter(), predictions.num_rows + errors.num_rows
        self._unmark(f"{shard:06d}")
        if errors.num_rows:
            _write_table(errors.cast(ERRORS), self.part("errors", shard))
        else:  # a killed attempt may have left some
            self.part("errors", shard).unlink(missing_ok=True)
        _write_table(predictions.cast(PREDICTIONS), self.part("predictions", shard))
        written = {"write.rows": rows, "write.seconds": time.perf_counter() - started, "ended": time.time()}
        self._mark(f"{shard:06d}", predictions.num_rows, errors.num_rows, {**stats, **written})

    def write_empty(self, shards: Iterable[int]) -> None:
        """Shards that hold no row, such as pictures without boxes, are done at once; those that are done already stay."""
        done = self._tallies()
        for shard in shards:
            if f"{shard:06d}" not in done:
                self.write_shard(shard, PREDICTIONS.empty_table(), ERRORS.empty_table(), {})

    def write_faults(self, errors: pa.Table) -> None:
        """Rows that failed before there was a shard: faults of the boxes file, or of a memory's support images."""
        if errors.num_rows:
            self._unmark(BEFORE)
            _write_table(errors.cast(ERRORS), self.path / "errors" / f"part-{BEFORE}.parquet")
            self._mark(BEFORE, 0, errors.num_rows, {})

    def _mark(self, part: str, predicted: int, failed: int, stats: Mapping[str, float]) -> None:
        storage.write(self.path / "done" / f"part-{part}_{predicted}_{failed}.json", json.dumps(dict(stats)).encode())

    def _unmark(self, part: str) -> None:
        for mark in (self.path / "done").glob(f"part-{part}_*.json"):
            mark.unlink(missing_ok=True)

    def _tallies(self) -> dict[str, tuple[int, int]]:
        """Part -> (rows predicted, rows failed), from the names of the marks."""
        names = (mark.stem.removeprefix("part-").split("_") for mark in sorted((self.path / "done").glob("part-*.json")))
        return {part: (int(predicted), int(failed)) for part, predicted, failed in names}

    def write_proposals(self, table: pa.Table) -> pa.Table:
        """Write a shard's boxes, and pass on no row: a stage of a pipeline that is run for what it leaves here."""
        file = self.part("proposals", table["shard"][0].as_py())
        file.parent.mkdir(exist_ok=True)
        _write_table(table, file)
        return table.select(["shard"]).slice(0, 0)

    def proposals(self) -> pa.Table:
        """The boxes of all shards, one row an image."""
        return pa.concat_tables([read_table(file) for file in sorted((self.path / "proposals").glob("part-*.parquet"))])

    def predictions(self) -> pa.Table:
        return pa.concat_tables([PREDICTIONS.empty_table(), *self.parts_of_predictions()])

    def parts_of_predictions(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Shard by shard, of all columns or of some: for what need not hold a run's rows at once."""
        return _parts(self.path / "predictions", PREDICTIONS, columns)

    def some_predictions(self, most: int) -> pa.Table:
        """Those of shards that lie evenly over the run, about `most` rows in all; all of them, where there are no more."""
        files, (rows, _) = sorted((self.path / "predictions").glob("*.parquet")), self.progress()
        if rows > most:
            places = np.linspace(0, len(files) - 1, max(1, len(files) * most // rows)).round().astype(int)
            files = [files[place] for place in np.unique(places)]
        return pa.concat_tables([PREDICTIONS.empty_table(), *(_part(file, PREDICTIONS) for file in files)])

    def errors(self) -> pa.Table:
        return pa.concat_tables([ERRORS.empty_table(), *_parts(self.path / "errors", ERRORS)])

    def progress(self) -> tuple[int, int]:
        """(rows predicted, rows failed) so far, by the marks."""
        tallies = self._tallies().values()
        return sum(predicted for predicted, _ in tallies), sum(failed for _, failed in tallies)

    def stats(self) -> defaultdict[str, float]:
        """Stage seconds, stage rows, MLLM calls and tokens, `summed` over all shards ever written here."""
        return summed(json.loads(mark.read_text()) for mark in sorted((self.path / "done").glob("part-*.json")))

    def write_metrics(self, metrics: Mapping[str, float], settings: Config) -> None:
        """Write metrics.json, and in run.json what it was measured by; a folder measured before keeps all else."""
        self.write("metrics.json", {key: None if math.isnan(value) else value for key, value in metrics.items()})
        by = {"config": _without_secrets(settings), "measured": identity.of_metrics(settings)}
        self.write("run.json", {**self.read("run.json"), **by})

    def finish(
        self,
        counts: Mapping[str, int],
        metrics: Mapping[str, float],
        seconds: float,
        settings: Config,
        stats: Mapping[str, float] | None = None,
    ) -> None:
        """Write metrics.json and complete run.json; with that the run has ended.

        stats: of `stats`, with what the caller knows beside it (see `stages_of`).
        """
        self.write_metrics(metrics, settings)
        stats = self.stats() if stats is None else stats
        stages = stages_of(stats)
        told = {stage: entry["busy"] for stage, entry in stages.items() if "busy" in entry}
        mllm: dict[str, float] = {
            key: int(stats.get(f"mllm.{key}", 0)) for key in ("calls", "candidates", "prompt_tokens", "output_tokens")
        }
        mllm["seconds"] = round(stats.get("mllm.seconds", 0.0), 3)
        known = self.read("run.json")
        ended = {
            "counts": dict(counts),
            "stages": stages,
            "slowest": max(told, key=lambda stage: told[stage]) if told else None,
            "pipeline_seconds": round(stats.get("pipeline.seconds", 0.0), 2),
            "mllm": mllm,
            "seconds": round(seconds + known.get("seconds", 0.0), 2),
        }
        self.write("run.json", {**known, **ended})

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def write(self, name: str, data: Any) -> None:
        """Write JSON, whole or not at all. Raises ValueError for a number that JSON lacks (use None)."""
        storage.write(self.path / name, json.dumps(data, indent=1, allow_nan=False).encode())


def summed(marks: Iterable[Mapping[str, float]]) -> defaultdict[str, float]:
    """What shards have noted, each number summed over them, and how long and how closely they followed each other.

    A mark with the time at which its shard `ended` tells when the shard was under way: from there back by what its stages, and
    the waits for models, took. pipeline.seconds: for how long any shard was; the time between a run that was killed and the
    one that took it up is none. pipeline.tasks: how many shards were under way at once, at most.
    """
    total: defaultdict[str, float] = defaultdict(float)
    turns: list[tuple[float, int]] = []
    for mark in marks:
        for key, value in mark.items():
            total[key] += value
        if "ended" in mark:
            stages = [value for key, value in mark.items() if key.endswith((".seconds", ".waited")) and key != "mllm.seconds"]
            turns += [(mark["ended"] - sum(stages), 1), (mark["ended"], -1)]
    if total.pop("ended", None) is None:
        return total
    under_way, since, most, seconds = 0, 0.0, 0, 0.0
    for moment, turn in sorted(turns):
        seconds += moment - since if under_way else 0.0
        under_way, since = under_way + turn, moment
        most = max(most, under_way)
    total |= {"pipeline.seconds": seconds, "pipeline.tasks": most}
    return total


def stages_of(stats: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Stage -> rows, seconds (summed over parallel tasks), rows_per_second, and how busy it was.

    busy: the share of the pipeline's time, times those that were at work at once (at_once), in which the stage was at work. Of
    a stage that a model's processes run, `embed` and `rank`, these are the processes (`stats` has STAGE.at_once, their number
    at the end), and work is what they themselves took; `waited` is what shards spent on the queue to them and on the way
    (with several replicas for one shard, that at least). Of all others it is the tasks, at most as many as there were, which
    also wait. So the stage with the greatest share is the one that the others wait for. A stage whose rows another run has left
    (`before`) has no share. What it is not: a share of the processor. Where all share the cores, as on a laptop, a stage is
    also busy while others have its cores.
    """
    found: dict[str, dict[str, float]] = {}
    for stage in (key.removesuffix(".rows") for key in stats if key.endswith(".rows")):
        rows, seconds = int(stats[f"{stage}.rows"]), stats.get(f"{stage}.seconds", stats.get(f"{stage}.before", 0.0))
        found[stage] = {"rows": rows, "seconds": round(seconds, 3)}
        found[stage]["rows_per_second"] = round(rows / max(seconds, 1e-6), 1)  # before rounding, which leaves 0 of a few rows
        if f"{stage}.before" in stats:
            continue
        if stage == "rank" and "rank.at_once" in stats:
            seconds, waited = stats.get("mllm.seconds", 0.0), seconds - stats.get("mllm.seconds", 0.0)
        else:
            waited = stats.get(f"{stage}.waited", 0.0)
        at_once = stats.get(f"{stage}.at_once", stats.get("pipeline.tasks", 0))
        if f"{stage}.at_once" in stats:
            found[stage]["waited"] = round(max(0.0, waited), 3)
        if room := at_once * stats.get("pipeline.seconds", 0.0):
            found[stage] |= {"at_once": int(at_once), "busy": round(min(1.0, seconds / room), 3)}
    return found


def _beginning(verb: str, settings: Config, name: str, group: str) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "verb": verb,
        "name": name,
        "group": group,
        "config": _without_secrets(settings),
        "identity": identity.of_verb(verb, settings),
        "seed": settings.run.seed,
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _without_secrets(settings: Config) -> dict[str, Any]:
    data = settings.model_dump(mode="json")
    del data["memory"]["token"]
    return data


def git_commit() -> str | None:
    """The commit of this package's checkout; None where it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _parts(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return (_part(file, wanted) for file in sorted(folder.glob("*.parquet")))


def _part(file: Path, wanted: pa.Schema) -> pa.Table:
    with file.open("rb") as stream:
        return pq.read_table(stream, columns=wanted.names).replace_schema_metadata(None).cast(wanted)


def read_table(file: Path) -> pa.Table:
    with file.open("rb") as stream:
        return pq.read_table(stream)


def _write_table(table: pa.Table, file: Path) -> None:
    with storage.writing(file) as stream:
        pq.write_table(table, stream)
