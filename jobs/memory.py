"""rar memory CONFIG: support images and class names -> embeddings -> Milvus collections and fitted heads; and what is there."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say, verdict
from rar import config
from rar.schema import UserError

if TYPE_CHECKING:
    from rar.memory.catalog import Stored

Listing = Annotated[
    bool, typer.Option("--list", help="Print the memories and snapshots at memory.uri, one a line; build nothing.")
]
Describe = Annotated[bool, typer.Option("--describe", help="Print this memory as JSON, with its classes; build nothing.")]
Snapshot = Annotated[bool, typer.Option("--snapshot", help="Copy the memory to its next version; read it by memory.version.")]
Drop = Annotated[bool, typer.Option("--drop", help="Delete the memory, or the snapshot that memory.version names.")]
Remove = Annotated[list[str] | None, typer.Option("--remove", help="Take a class out, with all its entries. Repeatable.")]
Tune = Annotated[bool, typer.Option("--tune-index", help="Find the least ef of the images' graph with --recall; keep it.")]
Recall = Annotated[float, typer.Option("--recall", min=0.0, max=1.0, help="Of --tune-index, at retriever.n_neighbors.")]


def memory(
    config_file: ConfigFile,
    out: Out = None,
    sets: Sets = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    listing: Listing = False,
    describe: Describe = False,
    snapshot: Snapshot = False,
    drop: Drop = False,
    remove: Remove = None,
    tune_index: Tune = False,
    recall: Recall = 0.99,
) -> None:
    """Build or extend a memory; or look at it, freeze it, or take something out.

    Example: rar memory birds.yaml --set memory.shots=4
    """
    others = {"--list": listing, "--describe": describe, "--snapshot": snapshot, "--drop": drop, "--remove": bool(remove)}
    others["--tune-index"] = tune_index
    chosen = [name for name, wanted in others.items() if wanted]
    if not chosen:
        guarded(lambda: run(config_file, out, sets or [], dry_run, fresh))
    guarded(lambda: other(config_file, sets or [], chosen, remove or [], recall))


def run(config_file: Path, out: str | None, sets: list[str], dry_run: bool, fresh: bool) -> int:
    quiet()
    settings = config.load(config_file, sets)
    from rar.engine import session
    from rar.run import alone, build
    from rar.run.vocabulary import check_index, facts_of
    from rar.runfolder import RunFolder

    planned = build.plan(settings)
    path = run_folder_path(out, "memory", config_file)
    strange = f"; {planned.strangers}" if planned.strangers else ""
    what = "support boxes" if planned.boxed else "support images"
    counted = f"{len(planned.classes):,} classes, {planned.support.num_rows:,} {what}{strange}"
    say("\n  ".join([f"memory {settings.memory.name!r}: {counted}", *planned.remarks]))
    if planned.undescribed:
        say(f"  {planned.undescribed:,} names of encoder.descriptions are no class and are ignored")
    RunFolder.check(path, "memory", settings, fresh=True)
    if dry_run:
        check_index(settings, len(planned.classes))  # those that only the memory knows could but add to them
        rows = planned.support.num_rows + len(planned.classes)
        say(f"would write at most {rows:,} entries to {settings.memory.uri} and a report to {path}")
        return 0
    with alone.driving(path), session.opened(settings.memory, create=True, patience_s=settings.run.patience_s) as opened:
        facts_of(opened, settings, None)
        started = time.monotonic()  # as in a run, the models are there
        built = build.build_memory(opened, settings, fresh=fresh, planned=planned)
        seconds = time.monotonic() - started
    folder = RunFolder.open(path, "memory", settings, fresh=True, name=config_file.stem, group="memory")
    folder.write_faults(built.failed)
    failed = built.failed.num_rows
    counts = {"input": built.rows + planned.ignored, "ok": built.rows - failed, "failed": failed, "skipped": planned.ignored}
    folder.finish(counts, built.metrics, seconds, settings, built.stats)
    for line in built.remarks:
        say(f"  {line}")
    for key, value in built.metrics.items():
        say(f"  {key} {value:,.0f}" if float(value).is_integer() else f"  {key} {value:.4g}")
    return verdict(folder, settings)


def other(config_file: Path, sets: list[str], chosen: list[str], names: list[str], recall: float) -> int:
    """What does not build: one thing at a time, and without loading any model."""
    quiet()
    settings = config.load(config_file, sets)
    if len(chosen) > 1:
        raise UserError(f"{chosen[0]} and {chosen[1]} are two commands; give one of them")
    from rar.memory import catalog
    from rar.memory.collection import open_store
    from rar.run import build
    from rar.run.vocabulary import class_names

    store = settings.memory
    if "://" not in store.uri and not Path(store.uri).exists():
        raise UserError(f"there is no memory at {store.uri}; build it with `rar memory CONFIG`")
    with open_store(store.uri, store.token) as address:
        if chosen == ["--list"]:
            print(table(catalog.memories(address, store.token)))
        elif chosen == ["--describe"]:
            found = catalog.find(address, store.name, store.version, store.token)
            print(json.dumps(asdict(found) | {"class_names": class_names(settings, address)}, indent=1))
        elif chosen == ["--snapshot"]:
            print(f"{store.name} version {catalog.snapshot(address, store.name, store.token)}")
        elif chosen == ["--remove"]:
            print(json.dumps(build.remove(settings, address, names), indent=1))
        elif chosen == ["--tune-index"]:
            tune_index(settings, address, recall)
        else:
            catalog.drop_memory(address, store.name, store.version, store.token)
            print(f"dropped {store.name}" + (f" version {store.version}" if store.version else ""))
    return 0


def tune_index(settings: config.Config, address: str, recall: float) -> None:
    """Raises UserError where the mode searches no graph of images."""
    from rar.memory import catalog, tuning
    from rar.run.vocabulary import collection

    if settings.retriever.mode not in ("knn", "tip"):
        raise UserError(f"retriever.mode {settings.retriever.mode} scores classes exactly; --tune-index is for knn and tip")
    store = settings.memory
    catalog.digest(address, store.name, store.version, store.token)  # raises
    live = catalog.find(address, store.name, store.version, store.token)
    steps = tuning.tune(collection(settings, address, "images", live.generation), settings.retriever.n_neighbors, recall)
    for step in steps:
        print(f"ef {step.ef:>5}  recall@{settings.retriever.n_neighbors} {step.recall:.4f}  {step.per_second:,.0f} queries/s")
    print(f"memory {store.name!r} is searched with ef {steps[-1].ef} from now on")


def table(found: list[Stored]) -> str:
    """One line a memory: name, version, entries of each part, classes, index, digest, when it was made and by which encoder."""
    lines = [
        f"{'memory':<20} {'version':>7} {'images':>9} {'texts':>8} {'classes':>8} {'index':<9} {'digest':<16} created, encoder"
    ]
    for one in found:
        version = "live" if one.version is None else str(one.version)
        counts = f"{one.counts.get('images', 0):>9,} {one.counts.get('texts', 0):>8,} {one.classes:>8,}"
        made = f"{one.digest or 'half written':<16} {one.created}, {one.encoder}"
        lines.append(f"{one.name:<20} {version:>7} {counts} {one.index:<9} {made}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(memory)
