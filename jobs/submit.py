"""rar submit VERB CONFIG --address URL: the same verb as a job of a Ray cluster, followed to its end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import DryRun, Fresh, Out, Sets, guarded, quiet, say, shared_place
from rar import config
from rar.schema import Exit, UserError

if TYPE_CHECKING:
    from rar.config import Strict
    from rar.sweep.grid import Grid

Verb = Annotated[str | None, typer.Argument(help="memory, classify, detect, embed, tune or sweep.", show_default=False)]
File = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="As for the verb itself.", show_default=False)]
Address = Annotated[str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Dashboard: http://HEAD:8265.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's name and return.")]
Status = Annotated[str | None, typer.Option("--status", metavar="ID", help="Say how a job is; exits with its code.")]
Stop = Annotated[str | None, typer.Option("--stop", metavar="ID", help="End a job; submitting it again goes on from there.")]
Code = Annotated[bool, typer.Option("--code/--no-code", help="Send this rar along, or use the one in the cluster's image.")]
Requirements = Annotated[Path | None, typer.Option("--requirements", help="Installed first, e.g. requirements.lock.")]


def submit(
    verb: Verb = None,
    config_file: File = None,
    address: Address = "http://127.0.0.1:8265",
    out: Out = None,
    sets: Sets = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    no_wait: NoWait = False,
    status: Status = None,
    stop: Stop = None,
    code: Code = True,
    requirements: Requirements = None,
) -> None:
    """Run a verb on a cluster: print the job's name, follow its log, exit with its code. Submitting twice follows the first.

    Example: rar submit classify birds.yaml --address http://head:8265 --out s3://bucket/birds
    """
    if status is not None or stop is not None:
        guarded(lambda: other(address, status, stop))
    guarded(lambda: send(verb, config_file, address, out, sets or [], fresh, dry_run, no_wait, code, requirements))


def send(
    verb: str | None,
    file: Path | None,
    address: str,
    out: str | None,
    sets: list[str],
    fresh: bool,
    dry_run: bool,
    no_wait: bool,
    code: bool,
    requirements: Path | None,
) -> int:
    quiet()
    from rar.engine import submission

    if verb not in submission.VERBS or file is None:
        raise UserError(f"rar submit VERB CONFIG: VERB is one of {', '.join(submission.VERBS)}")
    if requirements is not None and not requirements.is_file():
        raise UserError(f"--requirements {requirements} is no file")
    settings: Strict
    if verb == "sweep":
        file, settings, store, corpus, weights = of_grid(file, sets)
    else:
        settings, store, corpus, weights = of_config(file, sets)
    place = shared_place(out)
    name, command = submission.submission_id(verb, settings, place), submission.entrypoint(verb, sets, place, fresh)
    with tempfile.TemporaryDirectory(prefix="rar_submit_") as folder:
        sent = submission.pack(Path(folder), file, settings, store, code=code, weights=weights)
        if dry_run:
            along = [submission.CONFIG, *map(str, sent), *(["rar/", "jobs/"] if code else [])]
            say(f"{name}: would send {', '.join(along)} to {address} and run\n  {command}")
            return 0
        environment = {"working_dir": folder} | ({"pip": str(requirements)} if requirements else {})
        told = {"verb": verb, "config": file.name, "corpus": corpus, "out": place}
        client = submission.connect(address)
        new = submission.submit(client, name, command, environment, told)
    print(name, flush=True)
    say(f"{'sent' if new else 'found'} {name} on {address}" + ("" if no_wait else "; Ctrl-C leaves it running"))
    if no_wait:
        return 0
    try:
        return submission.follow(client, name)
    except KeyboardInterrupt:
        say(f"rar: {name} goes on; the same command follows it again, `rar submit --stop {name} --address {address}` ends it")
        return Exit.CRASH


def of_config(file: Path, sets: list[str]) -> tuple[config.Config, str, str, bool]:
    """A config, its memory.uri, what is said of its corpus, and whether it needs the miniature weights."""
    settings = config.load(file, sets)
    corpus = settings.corpus and (settings.corpus.uri or settings.corpus.dataset)
    asked = settings.ranker.model if settings.ranker.starts_models else ""
    return settings, settings.memory.uri, corpus or "", "miniature" in (settings.encoder.model, asked)


def of_grid(name: Path, sets: list[str]) -> tuple[Path, Grid, str, str, bool]:
    """The same of a sweep's grid, and the file that it lies in, where a preset was named."""
    from rar.sweep import grid

    found = grid.load(str(name), sets)
    file = name if name.is_file() else grid.presets()[str(name)]
    store = str(found.base.get("memory", {}).get("uri", config.Memory().uri))
    return file, found, store, ", ".join(found.datasets), True


def other(address: str, status: str | None, stop: str | None) -> int:
    quiet()
    from rar.engine import submission

    client = submission.connect(address)
    details = submission.look(client, status) if status is not None else submission.stop(client, str(stop))
    print(f"{status or stop} {details.status.lower()}: {details.message or ''}".rstrip(": "))
    return submission.exit_code(details) if status is not None and details.status.is_terminal() else 0


if __name__ == "__main__":
    typer.run(submit)
