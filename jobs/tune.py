"""rar tune CONFIG: ranking data from the retriever's own confusions -> an adapter for the ranker, judged before and after."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say, verdict
from rar import config
from rar.runfolder import RunFolder
from rar.schema import Exit, UserError


class Preset(StrEnum):
    RAR = "rar"
    PAPER_CODE = "paper-code"
    PAPER_TEXT = "paper-text"


class Trainer(StrEnum):
    LLAVA = "llava"
    SWIFT = "swift"


DataOnly = Annotated[bool, typer.Option("--data-only", help="Stop when the data is written.")]
Which = Annotated[Preset | None, typer.Option("--preset", help="How lists are made; short for --set tune.preset=...")]
Export = Annotated[
    list[Trainer] | None, typer.Option("--export", help="Also write the lists for LLaVA or ms-swift trainers; repeatable.")
]


def tune(
    config_file: ConfigFile,
    out: Out = None,
    sets: Sets = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    data_only: DataOnly = False,
    preset: Which = None,
    export: Export = None,
) -> None:
    """Fine-tune the ranker on lists that the retriever confuses; `ranker.adapter` then names the folder it leaves.

    Example: rar tune birds.yaml --out runs/tuned; rar classify birds.yaml --set ranker.adapter=runs/tuned/adapter
    """
    more = [*(sets or []), *([f"tune.preset={preset.value}"] if preset else [])]
    guarded(lambda: run(config_file, out, more, dry_run, fresh, data_only, export or []))


def run(
    config_file: Path, out: str | None, sets: list[str], dry_run: bool, fresh: bool, data_only: bool, export: list[Trainer]
) -> int:
    quiet()
    settings = config.load(config_file, sets)
    path = run_folder_path(out, "tune", config_file)
    if "://" in str(path):
        raise UserError("--out of rar tune must be a folder of this machine, or one that is mounted: trainers write to it")
    if not dry_run:
        RunFolder.check(path, "tune", settings, fresh=fresh)
    if RunFolder(path).finished and not (dry_run or fresh or export):
        say(f"tune: {path} holds this run, finished before; --fresh would repeat it")
        return told(RunFolder(path), settings)
    from rar.tune import run as tuning

    tuning.check(settings)
    if dry_run:
        say(tuning.dry_run(settings, path))
        return Exit.DONE
    from rar.engine import session
    from rar.run import alone

    with alone.driving(path), session.opened(settings.memory, patience_s=settings.run.patience_s) as opened:
        folder = RunFolder.open(path, "tune", settings, fresh=fresh, name=config_file.stem, group="tune")
        rows = tuning.make_data(opened, settings, folder, say)
        for trainer in export:
            say(f"  exported: {tuning.exported(settings, rows, folder, trainer.value)}")
        if data_only:
            return Exit.DONE
        tuning.run(opened, settings, folder, rows, say)
    return told(folder, settings)


def told(folder: RunFolder, settings: config.Config) -> int:
    """Say what a tuning came to; its exit code."""
    from rar.tune import judge

    lora = settings.tune.weights == "lora"
    say(judge.told(folder.read("metrics.json")))
    key, name = ("ranker.adapter", "adapter") if lora else ("ranker.model", "model")
    say(f"report: {folder.path / 'report.html'}   use it: --set {key}={folder.path / name}")
    return verdict(folder, settings)


if __name__ == "__main__":
    typer.run(tune)
