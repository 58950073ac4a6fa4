"""The console command `rar`: one sub-command a verb, each also runnable as `python -m jobs.<verb>`."""

from __future__ import annotations

import typer

from jobs.ask import ask
from jobs.bench import bench
from jobs.classify import classify
from jobs.config import config
from jobs.data import data
from jobs.demo import demo
from jobs.detect import detect
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.memory import memory
from jobs.report import report
from jobs.serve import serve
from jobs.submit import submit
from jobs.sweep import sweep
from jobs.tune import tune

app = typer.Typer(
    help="Retrieve-and-rank visual recognition: CLIP and Milvus propose classes, an MLLM on Ray Serve ranks them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (demo, memory, classify, detect, embed, tune, sweep, evaluate, serve, ask, report, submit, config):
    app.command()(verb)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
