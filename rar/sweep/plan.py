"""What a sweep would do (`--dry-run`): cells, shared steps, MLLM calls, and hours by the rates measured in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rar.config import Config
from rar.schema import UserError
from rar.sweep.grid import Cell, Grid, cells, group_of, groups, settings_of
from rar.sweep.run import calls
from rar.sweep.sources import placeholder, test_pictures
from rar.sweep.state import chosen

NO_RATE = "  no rate is measured yet; run a few with --limit"
READS: Any = {"corpus": True, "detect": True, "memory": {"support", "min_side"}}  # of a config: what a listing depends on


class Foretold(NamedTuple):
    """A cell that could run. rows: test pictures, or boxes. asks: calls of the MLLM at most, its calibration included."""

    cell: Cell
    settings: Config
    rows: int
    asks: int


def dry_run(grid: Grid, out: Path, only: Sequence[str], limit: int | None) -> str:
    """Lines. Data sets are listed, and one that is not there is named; nothing else is opened, and nothing written."""
    every, file = cells(grid), out / "sweep.json"
    wanted = chosen(every, only)
    done: dict[str, float] = json.loads(file.read_text())["done"] if file.is_file() else {}
    left = [cell for cell in wanted if cell.name not in done][:limit]
    known, missing = _foretold(grid, {*left, *(cell for cell in every if cell.name in done)}, every)
    able = [known[cell] for cell in left if cell in known]
    lines = [f"{cell.name}{' (done)' if cell.name in done else ''}" for cell in wanted]
    lines.append(f"{len(wanted):,} cells, {sum(cell.name in done for cell in wanted):,} done")
    for dataset in dict.fromkeys(one.cell.dataset for one in able):
        most = max(one.rows for one in able if one.cell.dataset == dataset)
        lines.append(f"  {dataset}: {most:,} {'boxes' if grid.datasets[dataset].verb == 'detect' else 'test pictures'}")
    lines += [f"  {dataset} is not there, and its cells would fail: {reason}" for dataset, reason in missing.items()]
    live = [one for one in able if not grid.datasets[one.cell.dataset].replayed]
    memories = len(list(groups([one.cell for one in live])))
    sets = len({(one.cell.dataset, one.cell.encoder) for one in live})
    lists = len({(group_of(one.cell), one.settings.retriever.model_dump_json()) for one in live})
    lines.append(f"would run {len(able):,} cells over {memories:,} memories of {sets:,} data sets and encoders")
    lines.append(f"  shared steps: {sets} embeddings, {memories} memories, {lists} candidate lists")
    asks = [one.asks for one in able if one.asks]
    lines.append(f"  {len(asks):,} cells ask the MLLM, in {sum(asks):,} calls at most; equal questions are asked once")
    hours = _seconds(able, [known[cell] for cell in every if cell.name in done and cell in known], done) / 3600
    lines.append(f"  about {hours:.2f} hours by the cells done so far" if hours else NO_RATE)
    return "\n".join(lines)


def _foretold(grid: Grid, some: set[Cell], every: Sequence[Cell]) -> tuple[dict[Cell, Foretold], dict[str, str]]:
    """(some cells, those that could run; data set -> what it lacks). What several cells read is listed once."""
    found: dict[Cell, Foretold] = {}
    missing: dict[str, str] = {}
    counts: dict[str, int] = {}
    for cell in every:
        if cell not in some or cell.dataset in missing:
            continue
        dataset = grid.datasets[cell.dataset]
        try:
            settings = settings_of(grid, cell, placeholder(dataset))
            read = json.dumps([cell.dataset, settings.model_dump(mode="json", include=READS)])
            if read not in counts:
                counts[read] = test_pictures(dataset, settings)
        except UserError as error:
            missing[cell.dataset] = str(error).removeprefix(f"{cell.dataset}: ")
            continue
        found[cell] = Foretold(cell, settings, counts[read], 0 if dataset.replayed else calls(settings, counts[read]))
    return {cell: one for cell, one in found.items() if cell.dataset not in missing}, missing


def _seconds(able: Sequence[Foretold], done: Sequence[Foretold], seconds: dict[str, float]) -> float:
    """By the seconds a row of each arm's finished cells (of all, for an arm without any); 0 where nothing is measured."""

    def rate(cells: Sequence[Foretold]) -> float:
        return sum(seconds[one.cell.name] for one in cells) / max(1, sum(one.rows for one in cells))

    by_arm = {one.cell.arm: rate([other for other in done if other.cell.arm == one.cell.arm]) for one in done}
    return sum(one.rows * by_arm.get(one.cell.arm, rate(done)) for one in able)
