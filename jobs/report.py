"""rar report RUN...: one self-contained HTML page from one or more run folders."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common import guarded, quiet, say

Runs = Annotated[list[str], typer.Argument(help="Run folders.", show_default=False)]
Against = Annotated[str | None, typer.Option("--against", help="A run to compare the others with, picture by picture.")]
Out = Annotated[str, typer.Option("--out", help="The page to write.")]


def report(runs: Runs, out: Out = "report.html", against: Against = None) -> None:
    """Write a page that compares runs: arms, plots, pictures of won and lost cases, errors, timing.

    Example: rar report runs/a --against runs/b --out comparison.html
    """
    guarded(lambda: run(runs, out, against))


def run(runs: list[str], out: str, against: str | None) -> int:
    quiet()
    from rar import storage
    from rar.report.page import write_report

    other = None if against is None else storage.place(against)
    write_report([storage.place(run) for run in runs], storage.place(out), against=other)
    say(f"wrote {out}")
    return 0


if __name__ == "__main__":
    typer.run(report)
