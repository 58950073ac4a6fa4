"""rar embed CONFIG --out FOLDER: a corpus as parquet of ids and vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common import ConfigFile, DryRun, Fresh, Sets, guarded, quiet, say
from rar import config
from rar.schema import Exit, UserError

Out = Annotated[str, typer.Option("--out", help="Folder for the parquet files, on any file system (a path, s3://...).")]


def embed(config_file: ConfigFile, out: Out, sets: Sets = None, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Embed a corpus, for other programs or for `encoder.model: precomputed`.

    Example: rar embed birds.yaml --out s3://bucket/birds
    """
    guarded(lambda: run(config_file, out, sets or [], dry_run, fresh))


def run(config_file: Path, out: str, sets: list[str], dry_run: bool, fresh: bool) -> int:
    quiet()
    settings = config.load(config_file, sets)
    from rar import storage
    from rar.corpus import listing
    from rar.engine import session
    from rar.run import alone
    from rar.run import embed as verb

    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the images to embed")
    if dry_run:
        index = listing.list_images(settings.corpus)
        say("\n  ".join([f"would embed {index.num_rows:,} images to {out}", *listing.remarks(index)]))
        return 0
    with alone.driving(storage.place(out)), session.opened(patience_s=settings.run.patience_s) as opened:
        counts = verb.embed(opened, settings, out, fresh=fresh)
    say(f"{out}: {counts['ok']:,} ok, {counts['failed']:,} failed of {counts['input']:,}")
    return Exit.TOO_MANY_FAILED if counts["failed"] > settings.run.max_failed_fraction * counts["input"] else Exit.DONE


if __name__ == "__main__":
    typer.run(embed)
