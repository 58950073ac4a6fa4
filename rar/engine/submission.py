"""A verb as a job of a Ray cluster, by Ray's Jobs API: what is sent, under which name, and how it is followed to its end.

- What is sent is a folder: the config, the small files that it names by a relative path (prompts, class names), and, unless the
  cluster's image has it, this package without tests; the weights of the miniature models only where the config names them.
- The name is made of what the job does (verb, settings, run folder): the same command finds its job again and follows it, or,
  where that failed or was stopped, sends it again, which goes on in the same run folder.
- Secrets are never sent: they belong in the environment of the cluster's processes.
- `ray job submit` loses the exit code of what it ran; the job's details have it.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from rar import identity
from rar.config import Strict
from rar.schema import Exit, Unavailable, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

VERBS = ("memory", "classify", "detect", "embed", "tune", "sweep")
NAMING = {"uri", "images", "ids", "root", "classes", "class_embeddings", "descriptions", "model", "prompts", "adapter"}
NAMING |= {"tokenizer", "cache", "proposals"}  # settings that name files
STARTING_S = 60.0  # that a new head is given
SENT_BYTES = 10 << 20  # of a file that goes along; larger ones belong where every node reaches them
PACKAGES = Path(__file__).parents[2]
CONFIG = "config.yaml"
TELLING = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # of each package and socket
SHORT_OF_HTTP = "--address is where the cluster's dashboard listens, http://HEAD:8265"


def connect(address: str) -> JobSubmissionClient:
    """Raises UserError for what is no address of a dashboard, Unavailable where nobody answers."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{SHORT_OF_HTTP}, not {address!r}")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in TELLING:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"the cluster at {address} wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN") from None
    except ConnectionError:
        raise Unavailable(f"no Ray dashboard answers at {address}; {SHORT_OF_HTTP}") from None
    except RuntimeError as error:
        raise Unavailable(f"the Ray dashboard at {address} refused: {' '.join(str(error).split())[:300]}") from None


def submission_id(verb: str, settings: Strict, out: str) -> str:
    return f"rar-{verb}-{identity.fingerprint([verb, settings.model_dump(mode='json'), out])[:12]}"


def entrypoint(verb: str, overrides: Sequence[str], out: str, fresh: bool) -> str:
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["python", "-m", f"jobs.{verb}", CONFIG, "--out", out, *sets, *(["--fresh"] if fresh else [])])


def pack(folder: Path, config_file: Path, settings: Strict, store: str, *, code: bool, weights: bool) -> list[Path]:
    """Fill a folder with what the job needs; returns the small files that go along.

    settings: what the file holds, a config or a sweep's grid. store: its memory.uri. code: this package goes along, and with
    `weights` the miniature models. Raises UserError for a secret, and for a relative path that only this machine would have.
    """
    texts = dict(_texts(settings.model_dump(mode="json", exclude_defaults=True), ""))
    if any(key.rpartition(".")[2] == "token" for key in texts):
        raise UserError("memory.token would lie in the job's files; set MILVUS_TOKEN in the cluster's environment instead")
    if "://" not in store:
        raise UserError(f"memory.uri {store} is a folder of this machine; on a cluster use a Milvus server (http://host:19530)")
    sent = [Path(value) for key, value in texts.items() if _is_relative(key, value) and _goes_along(key, Path(value))]
    shutil.copyfile(config_file, folder / CONFIG)
    for file in sent:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file)
    if code:
        left_out = shutil.ignore_patterns("__pycache__", *(() if weights else ("weights",)))
        for package in ("rar", "jobs"):
            shutil.copytree(PACKAGES / package, folder / package, ignore=left_out)
    return sent


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of the settings that are texts."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else name)
    elif isinstance(value, str):
        yield key, value


def _is_relative(key: str, value: str) -> bool:
    """Whether a setting names a file by a path that depends on the folder."""
    return key.rpartition(".")[2] in NAMING and "://" not in value and not Path(value).is_absolute()


def _goes_along(key: str, path: Path) -> bool:
    if not path.exists():
        return False  # a hub name, or the job says what is missing
    if path.is_dir() or path.stat().st_size > SENT_BYTES:
        raise UserError(
            f"{key} {path} lies on this machine and is a folder, or larger than {SENT_BYTES >> 20} MiB; name it by an absolute "
            "path that every node has, or by an address (s3://...)"
        )
    if ".." in path.parts:
        raise UserError(f"{key} {path} lies outside of this folder; run rar submit from where it lies, or copy it here")
    return True


def submit(client: JobSubmissionClient, name: str, command: str, environment: dict[str, Any], told: dict[str, str]) -> bool:
    """Send a job, unless the one of this name runs or is done. Returns whether it was sent.

    environment: Ray's runtime_env. told: what Ray's dashboard shows of it.
    """
    known = _details(client, name)
    if known is not None and known.status not in ("FAILED", "STOPPED"):
        return False
    if known is not None:
        client.delete_job(name)
    started = Retrying(  # a head that has just started has no agent yet
        retry=retry_if_exception(lambda error: "No available agent" in str(error)),
        stop=stop_after_delay(STARTING_S),
        wait=wait_fixed(1),
        reraise=True,
    )
    try:
        started(client.submit_job, entrypoint=command, submission_id=name, runtime_env=environment, metadata=told)
    except RuntimeError as error:
        raise Unavailable(f"the cluster refused the job: {' '.join(str(error).split())[:300]}") from None
    return True


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the job's log as it grows; its exit code."""
    shown = 0
    while not (details := look(client, name)).status.is_terminal():
        shown = asyncio.run(_tail(client, name, shown))
        time.sleep(0.2)
    sys.stdout.write(client.get_job_logs(name)[shown:])
    sys.stdout.flush()
    return exit_code(details)


async def _tail(client: JobSubmissionClient, name: str, shown: int) -> int:
    """Print what follows the first `shown` characters of the log until the job ends or the line is lost; how many now."""
    import aiohttp

    seen = 0
    try:
        async for lines in client.tail_job_logs(name):
            sys.stdout.write(lines[max(shown - seen, 0) :])
            sys.stdout.flush()
            seen += len(lines)
    except (RuntimeError, aiohttp.ClientError):  # told by the status that is asked for next
        pass
    return max(shown, seen)


def look(client: JobSubmissionClient, name: str) -> JobDetails:
    """Raises UserError for a job that the cluster does not know."""
    details = _details(client, name)
    if details is None:
        raise UserError(f"the cluster knows no job {name!r}; `ray job list` shows those that it has")
    return details


def _details(client: JobSubmissionClient, name: str) -> JobDetails | None:
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise Unavailable(f"the cluster does not say how job {name} is: {' '.join(str(error).split())[:300]}") from None
    except ConnectionError:
        raise Unavailable("the cluster's dashboard is gone; the job may go on, and the same command follows it again") from None


def stop(client: JobSubmissionClient, name: str, patience_s: float = 60.0) -> JobDetails:
    """End a job and wait until it has ended. What its run folder holds stays."""
    look(client, name)
    client.stop_job(name)
    until = time.monotonic() + patience_s
    while not (details := look(client, name)).status.is_terminal():
        if time.monotonic() > until:
            raise Unavailable(f"job {name} has not ended within {patience_s:g} s of being asked to")
        time.sleep(0.2)
    return details


def exit_code(details: JobDetails) -> int:
    """The contract's codes; a job that was stopped or killed has none of its own, and counts as a crash."""
    if details.status == "SUCCEEDED":
        return Exit.DONE
    own = details.driver_exit_code
    return own if own in (Exit.USER_ERROR, Exit.TOO_MANY_FAILED) else Exit.CRASH
