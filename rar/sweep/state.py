"""The state of a sweep is its folders: which cells are done, by their marks and identities, and where things lie.

out/cells/NAME are the run folders; out/shared/ holds what several cells use: `embeddings` by data set and encoder, `memories`
by shots and seed, `candidates` by memory and retriever, `answers` of the ranker by content. Each is found again by its
identity, which is in its name. So, killed, extended or narrowed, the same command computes what lacks.
"""

from __future__ import annotations

import fnmatch
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rar import storage
from rar.config import Config
from rar.report.page import write_report
from rar.run import measure
from rar.runfolder import RunFolder
from rar.schema import UserError
from rar.sweep.grid import Cell, Grid, Group, cells, group_of, settings_of
from rar.sweep.sources import Source, prepare

PAGE = "report.html"


@dataclass
class Sweep:
    """A grid and what has become of its cells. failed: name -> reason, of this start. shared: step -> rows computed, reused."""

    grid: Grid
    out: Path
    sources: dict[str, Source]
    done: dict[str, float] = field(default_factory=dict)  # name -> seconds
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    shared: dict[str, dict[str, int]] = field(default_factory=dict)
    calls: int = 0  # of the MLLM in this start, those of calibrations at most
    lock: threading.RLock = field(default_factory=threading.RLock)

    def folder(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.name

    def settings(self, cell: Cell) -> Config:
        """Raises UserError."""
        settings = settings_of(self.grid, cell, self.sources[cell.dataset](cell.seed), self.memory_uri(group_of(cell)))
        if settings.ranker.method != "none" and settings.ranker.cache is None:
            answers = str(self.out / "shared" / "answers")
            settings = settings.model_copy(update={"ranker": settings.ranker.model_copy(update={"cache": answers})})
        return settings

    def memory_uri(self, group: Group) -> str:
        dataset, encoder, shots, seed = group
        name = "-".join([dataset, f"{shots}shot", f"seed{seed}", *[encoder] * bool(encoder)])
        return str(self.out / "shared" / "memories" / f"{name}.milvus")

    def write(self) -> None:
        """sweep.json: cells done, failed and left, with reasons; shared steps."""
        with self.lock:
            state = {"title": self.grid.title, "done": self.done, "failed": self.failed, "left": self.left}
            data = {**state, "shared": self.shared, "mllm_calls": self.calls}
            storage.write(self.out / "sweep.json", json.dumps(data, indent=1).encode())


def open_sweep(grid: Grid, out: Path) -> tuple[Sweep, list[Cell]]:
    """A sweep with its data laid out, and its cells; those of a data set that is not there have failed."""
    every = cells(grid)
    sources: dict[str, Source] = {}
    sweep = Sweep(grid, out, sources)
    for name, dataset in grid.datasets.items():
        try:
            sources[name] = prepare(name, dataset, out / "data", grid.seeds)
        except UserError as error:
            sweep.failed |= {cell.name: str(error) for cell in every if cell.dataset == name}
    return sweep, every


def finished(sweep: Sweep, every: Sequence[Cell]) -> list[Cell]:
    """The cells that have ended as they are configured now, page and all, measured again where they are to be judged otherwise.

    A folder of another run is a failure that names what differs.
    """
    found = []
    for cell in every:
        folder = RunFolder(sweep.folder(cell))
        if cell.name in sweep.failed or not folder.finished or not (folder.path / PAGE).exists():
            continue
        try:
            verb, settings = sweep.grid.datasets[cell.dataset].verb, sweep.settings(cell)
            RunFolder.check(folder.path, verb, settings, fresh=False)
            if measure.again(settings, folder, verb == "detect")[1]:
                write_page(sweep, cell)
            sweep.done[cell.name] = folder.read("run.json")["seconds"]
            found.append(cell)
        except UserError as error:
            sweep.failed[cell.name] = str(error)
    return found


def write_page(sweep: Sweep, cell: Cell) -> None:
    """The page of an ordinary run. One at a time, and beside no page of the sweep: matplotlib's settings are the process's."""
    folder = sweep.folder(cell)
    with sweep.lock:
        write_report([folder], folder / PAGE, title=f"{sweep.grid.title}: {cell.name}")


def chosen(every: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose names match one of the patterns; all without any. Raises UserError where none does."""
    found = [cell for cell in every if not only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in only)]
    if not found:
        raise UserError(f"--only {' '.join(only)} matches no cell; the first is {every[0].name}")
    return found


def set_aside(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Cells that --only leaves out are left, not failed, even where their folder is of another run: nobody asked for them."""
    sweep.left |= {cell.name: sweep.failed.pop(cell.name, "--only") for cell in cells}
