"""rar data: the data sets that are known by name; rar data check NAME --root DIR: what of one is there, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import guarded
from rar.corpus.datasets import named
from rar.corpus.datasets.known import known
from rar.schema import UserError

data = typer.Typer(help=__doc__, invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Argument(help="A name that `rar data` prints.", show_default=False)]
Root = Annotated[str, typer.Option("--root", help="The folder that holds the data set's folder, or that folder itself.")]
Split = Annotated[str | None, typer.Option("--split", help="Check this split alone. Default: all of them.")]


@data.callback()
def listing(context: typer.Context) -> None:
    """Data sets known by name, in their usual files. Use one as `corpus: {dataset: NAME, root: DIR, split: test}`."""
    if context.invoked_subcommand is None:
        guarded(_print_known)


@data.command()
def check(name: Name, root: Root, split: Split = None) -> None:
    """Count what is there against what was published. Exit code 0: whole; 2: one line says what is missing.

    Example: rar data check oxford_pets --root /data
    """
    guarded(lambda: _check(name, root, split))


def _print_known() -> None:
    print(f"{'name':<24} {'classes':>7}  {'folder below the root':<22} {'pictures of each split':<48} template")
    for name, one in known().items():
        splits = ", ".join(f"{split} {count:,}" for split, count in one.splits.items())
        print(f"{name:<24} {one.classes:>7,}  {one.folder:<22} {splits:<48} {' | '.join(one.templates)}")
    print(f"{'wds_NAME':<24} {'':>7}  {'wds_NAME':<22} {'as there are (clip_benchmark)':<48} the folder's own")
    print(f"{'huggingface':<24} {'':>7}  {'.':<22} parquet, save_to_disk, or imagefolder with metadata.csv or .jsonl")
    print("Anything else: corpus.uri, a folder with one sub-folder a class, or a manifest with a label column.")


def _check(name: str, root: str, split: str | None) -> None:
    found = named.check(name, root, split)
    print(f"{'split':<12} {'pictures':>10} {'published':>10} {'missing':>10} {'classes':>8} {'published':>10}")
    for one in found:
        published, classes = (f"{count:,}" if count is not None else "-" for count in (one.published, one.published_classes))
        counts = f"{one.pictures:>10,} {published:>10} {one.absent:>10,} {one.classes:>8,} {classes:>10}"
        print(f"{one.split:<12} {counts}")
    faults = [one.fault for one in found if one.fault]
    if faults:
        raise UserError(faults[0] + (f" ({len(faults) - 1} more splits have faults)" if len(faults) > 1 else ""))


if __name__ == "__main__":
    data()
