"""rar classify CONFIG: a corpus of images -> predictions, metrics, report."""

from __future__ import annotations

import math
from pathlib import Path

from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say, verdict
from rar import config
from rar.runfolder import RunFolder


def classify(
    config_file: ConfigFile, out: Out = None, sets: Sets = None, dry_run: DryRun = False, fresh: Fresh = False
) -> None:
    """Classify the images of a corpus against a memory.

    Example: rar classify birds.yaml --set corpus.uri=photos/ --out runs/birds
    """
    guarded(lambda: run("classify", config_file, out, sets or [], dry_run, fresh))


def run(verb: str, config_file: Path, out: str | None, sets: list[str], dry_run: bool, fresh: bool) -> int:
    """`rar classify` and `rar detect`, which differ in their work alone."""
    quiet()
    settings = config.load(config_file, sets)
    path = run_folder_path(out, verb, config_file)
    RunFolder.check(path, verb, settings, fresh=fresh)
    if RunFolder(path).finished and not (dry_run or fresh):
        return finished(verb, settings, path, config_file.stem)
    from rar.corpus.listing import remarks
    from rar.corpus.support import strangers
    from rar.engine import session
    from rar.report.page import write_report
    from rar.run import alone, nearest, recognise, work
    from rar.run.vocabulary import odd_treatment

    rows = {"classify": work.classify_work, "detect": work.detect_work}[verb](settings)
    if dry_run:
        say("\n  ".join([work.dry_run(settings, rows, path), *remarks(rows.index)]))
        return 0
    with alone.driving(path), session.opened(settings.memory, patience_s=settings.run.patience_s) as opened:
        vocabulary = recognise.prepare(opened, settings)
        folder = RunFolder.open(path, verb, settings, fresh=fresh, name=config_file.stem, group=verb)
        strange = strangers(rows.labels, list(vocabulary.names.values()))
        counted = f"{rows.index.num_rows:,} images, {len(vocabulary.names):,} classes"
        first = f"{verb}: {counted} -> {path}" + (f"; {strange}, and count as wrong" if strange else "")
        odd = odd_treatment(settings, vocabulary) if rows.boxed else []
        say("\n  ".join([first, *remarks(rows.index), *odd]))
        metrics = recognise.run(opened, settings, vocabulary, rows, folder)
        nearest.keep(opened, settings, vocabulary, folder)
    write_report([path], path, title=f"rar {verb}: {config_file.stem}")
    return told(metrics, folder, settings)


def finished(verb: str, settings: config.Config, path: Path, title: str) -> int:
    """A run that has ended before: nothing is written unless its metrics are now measured otherwise, nothing heavy is loaded.

    The memory is opened to see that it is the same; one that is gone cannot have changed.
    """
    from rar.memory import catalog
    from rar.memory.store import open_store
    from rar.run import measure

    folder, memory = RunFolder(path), settings.memory
    if "://" in memory.uri or Path(memory.uri).exists():
        with open_store(memory.uri, memory.token) as address:
            folder.pin_memory(catalog.digest(address, memory.name, memory.version, memory.token))
    say(f"{verb}: {path} holds this run, finished before; --fresh would repeat it")
    metrics, measured_again = measure.again(settings, folder, verb == "detect")
    if measured_again or not (path / "report.html").exists():
        from rar.report.page import write_report

        write_report([path], path, title=f"rar {verb}: {title}")
    return told(metrics, folder, settings)


def told(metrics: dict[str, float], folder: RunFolder, settings: config.Config) -> int:
    """Say what a run came to; its exit code."""
    for key in ("top1", "top5", "candidate_recall", "ranked_fraction", "ap", "ap_rare"):
        value = metrics.get(key)
        if value is not None and not math.isnan(value):
            say(f"  {key} {value:.4f}")
    if leaked := metrics.get("leaked"):
        say(f"  {leaked:,.0f} of the pictures are in the memory as well, and known by heart; leave them out of memory.support")
    near = (metrics.get("near_leaked") or 0) - (leaked or 0)
    if near > 0:
        say(f"  {near:,.0f} more look like support images in another size or quality, and if they are the same, are known too")
    if twice := metrics.get("duplicates"):
        say(f"  {twice:,.0f} rows show what another row shows, too; each is judged by its own label")
    return verdict(folder, settings)


if __name__ == "__main__":
    import typer

    typer.run(classify)
