"""Running a grid: shared work first, then cell after cell, each an ordinary run folder; what is done is never done again.

A cell that fails is noted with its reason, its traceback is in out/failed/, and the others go on.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rar import storage
from rar.config import Config
from rar.corpus import support
from rar.memory import catalog
from rar.memory.store import open_store
from rar.run.calibrate import PRIOR_IMAGES
from rar.run.work import Work, classify_work, detect_work
from rar.runfolder import RunFolder
from rar.schema import first_line
from rar.sweep import replay
from rar.sweep.grid import Cell, groups
from rar.sweep.state import Sweep, write_page

if TYPE_CHECKING:
    from rar.engine.session import Session
    from rar.run.shared import Computed
    from rar.run.vocabulary import Vocabulary


class OverBudget(Exception):
    """The budget of MLLM calls does not allow a cell; it is left."""


REFRESH_S = 30.0  # the tables and the page are written again after so long


def run(
    sweep: Sweep,
    every: Sequence[Cell],
    pending: Sequence[Cell],
    budget: int | None,
    say: Callable[[str], None],
    refresh: Callable[[], None],
) -> None:
    """Work off the pending cells. budget: MLLM calls that may be made. refresh: writes the tables and the page."""
    total, began = len(sweep.done) + len(pending), time.monotonic()
    worked, last = [0], [time.monotonic()]

    def told(cell: Cell, line: str) -> None:
        with sweep.lock:
            worked[0] += 1
            left = (time.monotonic() - began) / worked[0] * (len(pending) - worked[0])
            say(f"[{len(sweep.done)}/{total}] {cell.name}: {line}; about {left / 60:.0f} min left")
            sweep.write()
            if time.monotonic() - last[0] > REFRESH_S:
                refresh()
                last[0] = time.monotonic()

    recorded = [cell for cell in pending if sweep.grid.datasets[cell.dataset].replayed]
    for cell in recorded:
        _guarded(sweep, cell, told, partial(_replay, sweep, cell))
    rest = [cell for cell in pending if cell not in set(recorded)]
    if rest:
        from rar.engine import session

        with session.opened() as opened, ThreadPoolExecutor(sweep.grid.parallel) as pool:
            worker = Runner(sweep, opened, every, budget, told)
            futures = [pool.submit(worker.group, members) for members in groups(rest)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    sweep.write()


def _guarded(sweep: Sweep, cell: Cell, told: Callable[[Cell, str], None], work: Callable[[], dict[str, float]]) -> None:
    """Run one cell; what it raises is its failure and nobody else's."""
    from rar.engine import faults

    started = time.monotonic()
    try:
        with faults.crossing():
            values = work()
            write_page(sweep, cell)
    except OverBudget as error:
        with sweep.lock:
            sweep.left[cell.name] = f"budget: {error}"
        told(cell, f"left: {error}")
        return
    except Exception as error:
        with sweep.lock:
            sweep.failed[cell.name] = first_line(error)
            file = sweep.out / "failed" / f"{cell.name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(traceback.format_exc())
        told(cell, f"FAILED: {first_line(error)}")
        return
    metric = sweep.grid.datasets[cell.dataset].metric
    with sweep.lock:
        sweep.done[cell.name] = round(time.monotonic() - started, 2)
        sweep.left.pop(cell.name, None)
    told(cell, f"{metric} {values.get(metric, float('nan')):.3f} ({time.monotonic() - started:.1f} s)")


@dataclass
class Runner:
    """Builds memories and runs their cells, in a session; several threads share it."""

    sweep: Sweep
    session: Session
    every: Sequence[Cell]
    budget: int | None
    told: Callable[[Cell, str], None]
    works: dict[str, Work] = field(default_factory=dict)
    listings: dict[str, str] = field(default_factory=dict)  # of support pictures: their digests
    embedding: dict[str, threading.Lock] = field(default_factory=dict)

    def group(self, members: Sequence[Cell]) -> None:
        """The cells of one memory."""
        from rar.engine import faults, session

        sweep = self.sweep
        try:
            with faults.crossing():
                settings = sweep.settings(members[0])
                session.check_reached(settings.memory.uri)
                with open_store(settings.memory.uri, settings.memory.token) as address:
                    opened = replace(self.session, memory=address)
                    self._build(opened, members[0], settings)
                    for cell in members:
                        _guarded(sweep, cell, self.told, partial(self._cell, opened, cell))
        except Exception as error:  # of the memory: all its cells lack it
            reached = {*sweep.done, *sweep.failed, *sweep.left}
            for cell in members:
                if cell.name not in reached:
                    _guarded(sweep, cell, self.told, partial(_raise, error))

    def _build(self, opened: Session, cell: Cell, settings: Config) -> None:
        from rar.run import build, shared

        known = None
        if settings.encoder.model != "precomputed":
            names = build.plan(settings).classes
            texts = self._kept("names", cell, settings, names)
            images = self._support(cell, settings) if cell.shots else texts
            with self._turn(texts.folder.name):
                self._count(f"names of {cell.dataset}", shared.embed_names(opened, settings, names, texts), texts)
            known = shared.known(images, texts)
        built = any(
            one.digest for one in catalog.generations(opened.memory_address, settings.memory.name, settings.memory.token)
        )
        if not built:
            build.build_memory(opened, settings, fresh=False, known=known)
        self._count("memories", (1 - built, int(built)))

    def _support(self, cell: Cell, settings: Config) -> Computed:
        """The vectors of every support picture that any seed and shot count of the grid draws."""
        from rar.run import build, shared
        from rar.schema import ERRORS

        largest: dict[tuple[int, int], Cell] = {}
        for other in self.every:
            if (other.dataset, other.encoder) == (cell.dataset, cell.encoder) and other.shots:
                largest[other.seed, other.shots] = other
        plans = [build.plan(self.sweep.settings(other)).support for other in largest.values()]
        pool = pa.concat_tables(plans)
        rows = pool.group_by("row", use_threads=False).aggregate([("row", "min")])["row"]
        pool = pool.take(pa.array([pool["row"].to_pylist().index(row) for row in rows.to_pylist()], pa.int64())).sort_by("row")
        assert settings.memory.support is not None
        name = settings.memory.support.model_dump_json()
        with self.sweep.lock:
            if name not in self.listings:
                self.listings[name] = shared.listed(support.read(settings.memory).index)
        kept = self._kept("support", cell, settings, self.listings[name])
        with self._turn(kept.folder.name):
            work = Work(pool, False, ERRORS.empty_table())
            self._count(f"support of {cell.dataset}", shared.embed_images(self.session, settings, work, kept), kept)
        return kept

    def _cell(self, opened: Session, cell: Cell) -> dict[str, float]:
        from rar.run import nearest, recognise, shared

        sweep, settings = self.sweep, self.sweep.settings(cell)
        verb = sweep.grid.datasets[cell.dataset].verb
        work = self._work(verb, settings)
        reserved = self._reserve(settings, int(work.rows_of_images.sum()))
        group = f"{cell.dataset}, {cell.shots} shots, seed {cell.seed}"
        folder = RunFolder.open(sweep.folder(cell), verb, settings, fresh=False, name=cell.arm, group=group)
        vocabulary = recognise.prepare(opened, settings)
        rows, before = None, folder.stats()["mllm.calls"]
        if settings.retriever.mode != "all":
            rows = shared.retrieved(settings, work, self._candidates(opened, cell, settings, work, vocabulary))
        values = recognise.run(opened, settings, vocabulary, work, folder, retrieved=rows)
        with sweep.lock:  # what was routed past the MLLM, or answered before, is free for others
            sweep.calls -= reserved - int(folder.stats()["mllm.calls"] - before)
        nearest.keep(opened, settings, vocabulary, folder)
        return values

    def _candidates(self, opened: Session, cell: Cell, settings: Config, work: Work, vocabulary: Vocabulary) -> Computed:
        from rar.run import shared

        listed, embedded = shared.listed(work.index), None
        if settings.encoder.model != "precomputed":
            embedded = self._kept("test", cell, settings, listed)
            with self._turn(embedded.folder.name):
                self._count(f"test of {cell.dataset}", shared.embed_images(opened, settings, work, embedded), embedded)
        retriever = settings.retriever.model_dump(mode="json")
        kept = self._kept("candidates", cell, settings, listed, vocabulary.digest, retriever, settings.run.seed)
        with self._turn(kept.folder.name):  # memories of two cells may be equal
            self._count("candidates", shared.retrieve(settings, work, vocabulary, embedded, kept))
        return kept

    def _work(self, verb: str, settings: Config) -> Work:
        assert settings.corpus is not None
        name = json.dumps([verb, settings.corpus.model_dump(mode="json"), settings.detect.model_dump(mode="json")])
        if name not in self.works:
            self.works[name] = detect_work(settings) if verb == "detect" else classify_work(settings)
        return self.works[name]

    def _reserve(self, settings: Config, rows: int) -> int:
        """Calls for the rows of a cell, which are given back as far as they are not made; those before them are not.

        Raises OverBudget where the budget does not have so many left.
        """
        most = calls(settings, rows)
        with self.sweep.lock:
            if self.budget is not None and self.sweep.calls + most > self.budget:
                raise OverBudget(f"it may make {most:,} calls, and {max(0, self.budget - self.sweep.calls):,} are left")
            self.sweep.calls += most
        return rows * calls_a_row(settings)

    def _kept(self, part: str, cell: Cell, settings: Config, *decides: Any) -> Computed:
        from rar.run import shared

        kind = "candidates" if part == "candidates" else "embeddings"
        name = f"{cell.dataset}-{part}-{shared.key(settings, *decides)}"
        return shared.Computed(self.sweep.out / "shared" / kind / name)

    def _turn(self, name: str) -> threading.Lock:
        """One thread at a time embeds into a folder."""
        with self.sweep.lock:
            return self.embedding.setdefault(name, threading.Lock())

    def _count(self, step: str, counts: tuple[int, int], kept: Computed | None = None) -> None:
        with self.sweep.lock:
            known = self.sweep.shared.setdefault(step, {"computed": 0, "reused": 0})
            known["computed"] += counts[0]
            known["reused"] += counts[1]
            if kept is not None and (counts[0] or not (kept.folder / "run.json").exists()):
                stages = {key: value for key, value in kept.stages().items() if key.startswith("embed")}
                data = {"verb": "embed", "counts": {"input": kept.rows().num_rows}, "stages": stages}
                storage.write(kept.folder / "run.json", json.dumps(data, indent=1).encode())


def calls(settings: Config, rows: int) -> int:
    """The most MLLM calls that a cell may make: for its rows, its calibration and its label prior."""
    each, ranker = calls_a_row(settings), settings.ranker
    fits = settings.route.mode == "calibrated" and settings.memory.support is not None
    lists = range(2, settings.retriever.top_k + 1)
    prior = PRIOR_IMAGES * sum(lists) if ranker.method == "letters" and ranker.debias == "prior" else 0
    return each * (rows + (settings.route.max_calibration_images if fits else 0)) + prior


def calls_a_row(settings: Config) -> int:
    """At most: a rotation of the labels, or a candidate, is a call, as the method has it; a server may be asked either way."""
    ranker, listed = settings.ranker, settings.retriever.top_k
    rotations = min(ranker.permutations, listed)
    most = {"none": 0, "letters": rotations, "yes_no": listed, "endpoint": listed}
    return most.get(ranker.method, 1)


def _replay(sweep: Sweep, cell: Cell) -> dict[str, float]:
    group = f"{cell.dataset}, recorded, seed {cell.seed}"
    file = Path(str(sweep.grid.datasets[cell.dataset].recorded))
    return replay.run(sweep.folder(cell), (cell.arm, group), file, sweep.settings(cell))


def _raise(error: Exception) -> dict[str, float]:
    raise error
