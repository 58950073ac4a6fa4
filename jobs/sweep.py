"""rar sweep CONFIG|PRESET: a grid of data sets x shots x seeds x encoders x arms x top_k, with what they share done once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say
from rar.schema import Exit, UserError

if TYPE_CHECKING:
    from rar.sweep.grid import Grid

Which = Annotated[str, typer.Argument(help="YAML file of a grid, or a preset: see --presets.", show_default=False)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Run at most so many cells this time.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Cells by name, with * and ?. Repeatable.")]
Search = Annotated[
    int | None,
    typer.Option("--search", min=1, help="Instead: so many trials over the grid's `search`, judged on the memory alone."),
]
Budget = Annotated[
    int | None,
    typer.Option("--max-calls", min=0, help="MLLM calls that this start may make; a cell that may need more is left."),
]


def sweep(
    grid: Which,
    out: Out = None,
    sets: Sets = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    limit: Limit = None,
    only: Only = None,
    max_calls: Budget = None,
    search: Search = None,
) -> None:
    """Run every cell of a grid that is not done yet, and write leaderboards and a page.

    Example: rar sweep miniature --out runs/miniature
    """
    if search is not None:
        guarded(lambda: searched(grid, out, sets or [], only or [], search))
    guarded(lambda: run(grid, out, sets or [], dry_run, fresh, limit, only or [], max_calls))


def run(
    name: str,
    out: str | None,
    sets: list[str],
    dry_run: bool,
    fresh: bool,
    limit: int | None,
    only: list[str],
    max_calls: int | None,
) -> int:
    quiet()
    from rar.run import alone
    from rar.sweep import grid, plan, sources

    found = grid.load(name, sets)
    sources.check(found)
    path = run_folder_path(out, "sweep", Path(name))
    if "://" in str(path):
        raise UserError("--out of a sweep must be a folder of this machine, or one that is mounted: memories lie in it")
    if dry_run:
        print(plan.dry_run(found, path, only, limit))
        return Exit.DONE
    with alone.driving(path):
        return swept(found, path, fresh, limit, only, max_calls)


def swept(found: Grid, path: Path, fresh: bool, limit: int | None, only: list[str], max_calls: int | None) -> int:
    """Run the cells that are not done; the exit code."""
    from rar import storage
    from rar.sweep import run as sweeping
    from rar.sweep import state, tables

    if fresh:
        storage.remove(path)
    path.mkdir(parents=True, exist_ok=True)
    sweep, every = state.open_sweep(found, path)
    wanted = state.chosen(every, only)
    done = set(state.finished(sweep, every))
    pending = [cell for cell in wanted if cell not in done and cell.name not in sweep.failed]
    now = pending[:limit]
    sweep.left = {cell.name: "limit" for cell in pending[limit:]} if limit else {}
    state.set_aside(sweep, [cell for cell in every if cell not in set(wanted) and cell not in done])
    say(f"sweep: {len(every):,} cells, {len(done):,} done before, {len(now):,} to run -> {path}")
    refresh = partial(tables.write, sweep, every)
    try:
        sweeping.run(sweep, every, now, max_calls, say, refresh)
    finally:
        sweep.write()
        refresh()
    print(tables.summary(sweep, every))
    for cell, reason in sweep.failed.items():
        say(f"  failed: {cell}: {reason}")
    say(f"{path}: {len(sweep.done):,} done, {len(sweep.failed):,} failed, {len(sweep.left):,} left; {path / 'report.html'}")
    return Exit.CRASH if sweep.failed else Exit.DONE


def searched(name: str, out: str | None, sets: list[str], only: list[str], trials: int) -> int:
    """The best settings for one data set (`--only NAME`; default: the grid's first), as JSON on stdout."""
    quiet()
    from rar.run import alone
    from rar.sweep import grid, sources
    from rar.sweep import search as searching

    found = grid.load(name, sets)
    sources.check(found)
    dataset = only[0] if only else next(iter(found.datasets))
    if dataset not in found.datasets:
        raise UserError(f"--only {dataset} is none of the data sets {', '.join(found.datasets)}")
    path = run_folder_path(out, "search", Path(name))
    with alone.driving(path):
        path.mkdir(parents=True, exist_ok=True)
        print(json.dumps(searching.run(found, dataset, path, trials, say)))
    return Exit.DONE


if __name__ == "__main__":
    typer.run(sweep)
