"""An application of Serve ends with its job also where the driver was killed: Serve outlives drivers, and replicas keep GPUs.

Beside the driver's own farewell (`client.deploy`) stands an actor that outlives the job by a moment. One small process a job.
"""

from __future__ import annotations

import time
from contextlib import suppress

import ray
from ray import serve
from ray._private import state
from ray.exceptions import RayActorError

LOOK_EVERY_S = 2.0


@ray.remote(num_cpus=0, max_restarts=-1)
class Ending:
    """Deletes an application when a job is over, and goes."""

    def __init__(self, app: str, job: str) -> None:
        while any(one["JobID"] == job and not one["IsDead"] for one in state.state.job_table()):
            time.sleep(LOOK_EVERY_S)
        with suppress(Exception):  # Serve itself has ended
            if app in serve.status().applications:
                serve.delete(app)
        ray.kill(ray.get_runtime_context().current_actor)


def with_this_job(app: str) -> None:
    """See to it that an application ends when this job does, however that ends."""
    job = ray.get_runtime_context().get_job_id()
    with suppress(ValueError, RayActorError):  # there is one
        Ending.options(name=f"ending-{app}", namespace="rar", lifetime="detached").remote(app, job)  # type: ignore[attr-defined]
