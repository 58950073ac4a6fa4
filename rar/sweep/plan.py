"""What a sweep would do (`--dry-run`): cells, shared steps, MLLM questions, and hours by the rates measured in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rar.sweep.grid import Cell, Grid, cells, groups
from rar.sweep.state import chosen


def dry_run(grid: Grid, out: Path, only: Sequence[str], limit: int | None) -> str:
    """Lines; nothing is opened or written, and no data set is listed."""
    wanted = chosen(cells(grid), only)
    state = json.loads((out / "sweep.json").read_text()) if (out / "sweep.json").is_file() else {"done": {}}
    left = [cell for cell in wanted if cell.name not in state["done"]][:limit]
    asking = [cell for cell in left if _asks(grid, cell)]
    lines = [f"{cell.name}{' (done)' if cell.name in state['done'] else ''}" for cell in wanted]
    by_memory = list(groups(left))
    sets = {(cell.dataset, cell.encoder) for cell in left}
    lines.append(f"{len(wanted):,} cells, {len(wanted) - len([c for c in wanted if c.name not in state['done']]):,} done")
    lines.append(f"would run {len(left):,} cells over {len(by_memory):,} memories of {len(sets):,} data sets and encoders")
    pairs = {(cell.dataset, cell.encoder, cell.shots, cell.seed, _retriever(grid, cell)) for cell in left}
    lines.append(f"  shared steps: {len(sets)} embeddings, {len(by_memory)} memories, {len(pairs)} candidate lists")
    lines.append(f"  {len(asking):,} cells ask the MLLM, at most once a test picture, and for their calibration")
    seconds = _estimate(left, state["done"])
    lines.append(
        f"  about {seconds / 3600:.2f} hours by the cells done so far"
        if seconds
        else "  no rate is measured yet; run a few with --limit"
    )
    return "\n".join(lines)


def _asks(grid: Grid, cell: Cell) -> bool:
    sections = {**grid.base.get("ranker", {}), **grid.arms[cell.arm].config.get("ranker", {})}
    return sections.get("method", "letters") != "none"


def _retriever(grid: Grid, cell: Cell) -> str:
    return json.dumps({**grid.base.get("retriever", {}), **grid.arms[cell.arm].config.get("retriever", {}), "k": cell.top_k})


def _estimate(left: Sequence[Cell], done: dict[str, float]) -> float:
    """Seconds, by the mean of each arm's finished cells (of all, for an arm without any); 0 where nothing is measured."""
    if not done:
        return 0.0
    everywhere = sum(done.values()) / len(done)
    total = 0.0
    for cell in left:
        own = [seconds for name, seconds in done.items() if f"-{cell.arm}-" in name]
        total += sum(own) / len(own) if own else everywhere
    return total
