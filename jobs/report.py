"""rar report RUN...: one self-contained HTML page from one or more run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common import guarded, quiet, say

Runs = Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="The page to write.")]


def report(runs: Runs, out: Out = Path("report.html")) -> None:
    """Write a page that compares runs: arms, plots, pictures of won and lost cases, errors, timing.

    Example: rar report runs/a runs/b --out comparison.html
    """
    guarded(lambda: run(runs, out))


def run(runs: list[Path], out: Path) -> int:
    quiet()
    from rar.report.page import write_report

    write_report(runs, out)
    say(f"wrote {out}")
    return 0


if __name__ == "__main__":
    typer.run(report)
