"""The one door for failures: what Ray, Ray Data and Serve raise -> the errors of the contract, by the causes inside.

An error on a worker reaches the driver wrapped: by the task, by Ray Data, by the actor in between, each time as another type
with a traceback as its text. What counts is at the bottom: a UserError or Unavailable crosses as itself; a process, node or
replica that is gone is Unavailable in one line; anything else is a crash and keeps its traceback. `jobs.common.guarded` prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data.exceptions import ExecutionTimeoutError, SystemException
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from rar import storage
from rar.engine.isolate import reason
from rar.schema import Unavailable, UserError

GONE = {
    OutOfMemoryError: "a node of the cluster ran out of memory; give it more, or lower run.shard_size",
    OutOfDiskError: "a node of the cluster has no disk space left for Ray's temporary files",
    RayActorError: "a process of the run died and did not come back",
    WorkerCrashedError: "a worker process died again and again",
    NodeDiedError: "a node of the cluster died",
    ObjectLostError: "a node of the cluster died with data that nobody else has; start the command again, it resumes",
    ExecutionTimeoutError: "no shard of the run was done within six times run.patience_s",
    GetTimeoutError: "a process of the run does not answer",
    RaySystemError: "Ray itself failed",
}


def told(error: BaseException) -> UserError | Unavailable | None:
    """The error of the contract at the bottom of what was raised; None for a crash."""
    chain = [error]
    while (inner := _inner(chain[-1])) is not None and inner not in chain:
        chain.append(inner)
    for one in chain:
        if isinstance(one, UserError | Unavailable) and not isinstance(one, RayTaskError):  # Ray makes a type that is both
            words, *advice = str(one).splitlines() or [""]  # Ray Data writes advice on retries below
            return type(one)(words) if advice else one
    last = chain[-1]
    if isinstance(last, OSError) and last.errno in storage.FULL:
        return Unavailable(storage.NO_SPACE)
    if isinstance(last, OSError) and last.errno in storage.AWAY:
        return Unavailable(f"{storage.NO_ANSWER} ({last.strerror})")
    if isinstance(last, OSError) and last.errno in storage.FORBIDDEN:
        where = "a file of the run" if "\n" in str(last.filename) else last.filename  # Ray Data puts its advice in its place
        return UserError(f"{where}: {last.strerror}; see to it that this user may, or choose another place")
    from ray.serve.exceptions import DeploymentUnavailableError  # and with it Serve, which not every command has

    gone = GONE | {DeploymentUnavailableError: "the ranker's application is not there any more"}
    said = next((words for kind, words in gone.items() if isinstance(last, kind)), None)
    return Unavailable(f"{said} ({reason(last)})") if said else None


def _inner(error: BaseException) -> BaseException | None:
    """What an error was raised for. Ray Data adds a SystemException without content as the cause of its own."""
    for one in (getattr(error, "cause", None), error.__cause__):
        if isinstance(one, BaseException) and not isinstance(one, SystemException):
            return one
    return None


@contextmanager
def crossing() -> Iterator[None]:
    """Around all that a command does with Ray."""
    try:
        yield
    except Exception as error:
        known = told(error)
        if known is None or known is error:
            raise
        raise known from None
