"""rar serve CONFIG: the HTTP API and its page, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded, quiet, run_folder_path, say
from rar import config


def serve(config_file: ConfigFile, out: Out = None, sets: Sets = None, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Answer POST /rank, /recognize and /detect, and show a page to try them. The folder keeps the calibration.

    Example: rar serve birds.yaml --set serve.port=8080
    """
    guarded(lambda: run(config_file, out, sets or [], dry_run, fresh))


def run(config_file: Path, out: str | None, sets: list[str], dry_run: bool, fresh: bool) -> int:
    quiet()
    settings = config.load(config_file, sets)
    from rar.engine import session
    from rar.gateway import app
    from rar.runfolder import RunFolder

    path = run_folder_path(out, "serve", config_file)
    if dry_run:
        say(app.dry_run(settings))
        return 0
    RunFolder.check(path, "serve", settings, fresh=fresh)
    app.check(settings)
    with session.opened(settings.memory if settings.serve.recognizes else None) as opened:
        folder = RunFolder.open(path, "serve", settings, fresh=fresh, name=config_file.stem, group="serve")
        with app.serving(opened, settings, folder) as url:
            stop = _on_signal()
            say(f"serve: {', '.join(f'POST {url}/{name}' for name in settings.serve.endpoints)}; the page is {url}/")
            say(f"  numbers for Prometheus: {app.metrics_address()}   Ctrl-C ends it")
            stop.wait()
            say("serve: finishing what has begun")
    return 0


def _on_signal() -> threading.Event:
    """Set by Ctrl-C and SIGTERM; called when all runs, as Ray sets handlers of its own. A second one does not wait."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


if __name__ == "__main__":
    import typer

    typer.run(serve)
