"""What all verbs share: options, run folders, exit codes. One line on stderr for a user's mistake, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from rar import storage
from rar.config import Config
from rar.runfolder import RunFolder
from rar.schema import Exit, Unavailable, UserError

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see the README for every key.", show_default=False)]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set retriever.top_k=10. Repeatable.")]
Out = Annotated[str | None, typer.Option("--out", help="Run folder (a path, s3://...). Default: runs/<verb>-<config's name>.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it would cost; touch nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over, or (default) go on where an equal run stopped.")]


def guarded(work: Callable[[], int | None]) -> None:
    """Run a verb and exit with the contract's codes. SIGTERM (`ray job stop`, a preempted node) ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what listing a corpus took
    try:
        code = work()
    except UserError as error:
        print(f"rar: {error}", file=sys.stderr)
        code = Exit.USER_ERROR
    except Unavailable as error:
        print(f"rar: {error}", file=sys.stderr)
        code = Exit.CRASH
    except OSError as error:
        if error.errno not in (*storage.FULL, *storage.AWAY):
            raise
        told = storage.NO_SPACE if error.errno in storage.FULL else f"{storage.NO_ANSWER} ({error})"
        print(f"rar: {told}", file=sys.stderr)
        code = Exit.CRASH
    except KeyboardInterrupt:
        print("rar: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        code = Exit.CRASH
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.flush()
    sys.stderr.flush()
    raise typer.Exit(int(code or 0))


def say(text: str) -> None:
    """Progress for a person; stdout is kept for results."""
    print(text, file=sys.stderr, flush=True)


def run_folder_path(out: str | None, verb: str, config_file: Path) -> Path:
    """Raises UserError for a folder that only this machine would have, where the job runs on a cluster."""
    if "RAY_ADDRESS" in os.environ:
        shared_place(out)
    return storage.place(out or Path("runs") / f"{verb}-{config_file.stem}")


def shared_place(out: str | None) -> str:
    """An --out that other machines have, too. Raises UserError for any other."""
    if out is None or not ("://" in out or Path(out).is_absolute()):
        raise UserError(
            "on a cluster --out must be a place that every node reaches: an absolute path on a shared disk, or s3://..."
        )
    return out


def verdict(folder: RunFolder, settings: Config) -> int:
    """Exit code of a finished run: 3 where more rows failed than `run.max_failed_fraction`."""
    ended = folder.read("run.json")
    counts, slowest = ended["counts"], ended.get("slowest")
    share = counts["failed"] / max(counts["input"], 1)
    told = f"{counts['ok']:,} ok, {counts['failed']:,} failed, {counts['skipped']:,} skipped of {counts['input']:,}"
    busy = f"; the slowest stage was {slowest}, {ended['stages'][slowest]['busy']:.0%} busy" if slowest else ""
    say(f"{folder.path}: {told}{busy}")
    if share > settings.run.max_failed_fraction:
        say(f"rar: {share:.1%} of the rows failed, more than run.max_failed_fraction {settings.run.max_failed_fraction:.1%}")
        return Exit.TOO_MANY_FAILED
    return Exit.DONE


def quiet() -> None:
    """Third parties' banners, progress bars and surprises off; to be called first, as Ray reads some when imported."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else each worker starts by `uv run` in an uploaded copy
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault(
        "RAY_ENABLE_AUTO_CONNECT", "0"
    )  # else a late Serve thread starts a second Ray after the first stopped
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
