"""The steps of `rar tune`, each kept in the run folder and not done again: data, before, training, after, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rar import storage
from rar.config import Config
from rar.engine.session import Session
from rar.runfolder import RunFolder, read_table
from rar.tune import card, data, export, judge, page, paper, recipe

ROWS = Path("data") / "rows.parquet"


def check(settings: Config) -> None:
    """Raises UserError for settings that cannot be trained, before anything is opened."""
    recipe.bare(settings)


def dry_run(settings: Config, path: Path) -> str:
    """What would be done, from the list of pictures alone."""
    pictures, tune = data.listed(settings).index.num_rows, settings.tune
    learned = int(pictures * (1 - tune.novel_classes) * (1 - tune.held_out))
    steps = tune.max_steps or tune.epochs * max(1, learned // tune.batch_size)
    longest = tune.max_list or settings.retriever.top_k
    asked = tune.judged * (2 + len(tune.others))
    return "\n".join(
        [
            f"would learn from {pictures:,} labelled pictures -> {path}",
            f"  about {steps:,} steps of {tune.batch_size} lists of up to {longest} names",
            f"  {settings.ranker.model} ({settings.ranker.method}) judged on up to {asked:,} pictures, before and after",
        ]
    )


def make_data(session: Session, settings: Config, folder: RunFolder, say: Callable[[str], None]) -> pa.Table:
    """DATA of all splits; made once."""
    path = folder.path / ROWS
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        collected = data.collect(session, settings, path.parent / "pictures")
        rows, lists = data.divided(collected.rows, settings.tune, settings.run.seed), None
        if settings.tune.preset != "rar":
            rows, lists = paper.with_windows(session, settings, rows)
        others = [data.collect_other(session, settings, name, path.parent / "pictures") for name in settings.tune.others]
        rows = pa.concat_tables([rows, *others])
        folder.write_faults(collected.failed)
        counts = {"ok": collected.rows.num_rows, "failed": collected.failed.num_rows, "skipped": collected.skipped}
        folder.write("data_card.json", card.of(settings, rows, collected, lists) | {"counts": counts})
        _write(rows, path)  # last: with it the data is there
    say(card.told(folder.read("data_card.json")))
    return read_table(path)


def run(session: Session, settings: Config, folder: RunFolder, rows: pa.Table, say: Callable[[str], None]) -> dict[str, float]:
    """Judge, train, judge again. Returns the metrics."""
    from rar.tune import fit

    started = time.monotonic()
    before = _judged(session, settings, folder, rows, "before")
    adapter = folder.path / ("adapter" if settings.tune.weights == "lora" else "model")
    if not adapter.exists():
        say(f"tune: {settings.ranker.model} -> {adapter}")
        told = fit.fit(session, settings, folder.path / ROWS, folder.path / "train", adapter)
        say(f"  {told['steps']:,} steps; the best is of step {told['best_step']}: {told['best']:.3f} on pictures kept out")
    after = _judged(session, tuned(settings, adapter), folder, rows, "after")
    values = judge.compared(before, after, settings.retriever.top_k)
    counts = folder.read("data_card.json")["counts"]
    folder.finish({"input": sum(counts.values()), **counts}, values, time.monotonic() - started, settings, {})
    page.write(folder, rows, before, after)
    return values


def tuned(settings: Config, adapter: Path) -> Config:
    """The same config with what was trained."""
    own = {"adapter": str(adapter)} if settings.tune.weights == "lora" else {"model": str(adapter)}
    return settings.model_copy(update={"ranker": settings.ranker.model_copy(update=own)})


def _judged(session: Session, settings: Config, folder: RunFolder, rows: pa.Table, when: str) -> pa.Table:
    path = folder.path / f"{when}.parquet"
    if not path.exists():
        _write(judge.judge(session, settings, rows), path)
    return read_table(path)


def _write(table: pa.Table, path: Path) -> None:
    with storage.writing(path) as stream:
        pq.write_table(table, stream)


def exported(settings: Config, rows: pa.Table, folder: RunFolder, kind: str) -> Path:
    """The first epoch's lists for another trainer; see export."""
    return export.write(settings, rows, folder.path / "export", kind)
