"""rar memory CONFIG: support images and class names -> embeddings -> Milvus collections and fitted heads."""

from __future__ import annotations

import time
from pathlib import Path

from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say, verdict
from rar import config


def memory(config_file: ConfigFile, out: Out = None, sets: Sets = None, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Build or extend a memory.

    Example: rar memory birds.yaml --set memory.shots=4
    """
    guarded(lambda: run(config_file, out, sets or [], dry_run, fresh))


def run(config_file: Path, out: Path | None, sets: list[str], dry_run: bool, fresh: bool) -> int:
    quiet()
    settings = config.load(config_file, sets)
    from rar import build, recognise, runfolder

    planned = build.plan(settings)
    path = run_folder_path(out, "memory", config_file)
    rows = planned.support.num_rows + len(planned.classes)
    say(f"memory {settings.memory.name!r}: {len(planned.classes):,} classes, {planned.support.num_rows:,} support images")
    if dry_run:
        say(f"would write {rows:,} entries to {settings.memory.uri} and a report to {path}")
        return 0
    runfolder.RunFolder.check(path, "memory", settings, fresh=True)
    started = time.monotonic()
    with recognise.session(settings, create=True) as address:
        failed, metrics = build.build(settings, address, fresh=fresh)
    folder = runfolder.RunFolder.open(path, "memory", settings, fresh=True, name=config_file.stem, group="memory")
    folder.write_faults(failed)
    counts = {
        "input": rows + planned.ignored,
        "ok": rows - failed.num_rows,
        "failed": failed.num_rows,
        "skipped": planned.ignored,
    }
    folder.finish(counts, metrics, time.monotonic() - started)
    for key, value in metrics.items():
        say(f"  {key} {value:.4g}")
    return verdict(folder, settings)


if __name__ == "__main__":
    import typer

    typer.run(memory)
