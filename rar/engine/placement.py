"""What a command's models want of a cluster, held against what is there before anything starts.

Ray would wait for a GPU that never comes, silently. Where an autoscaler has said how far it can go, that is what is there.
"""

from __future__ import annotations

import sys

import ray
from ray._private.state import state

from rar.config import Config, Placed
from rar.engine.session import Session
from rar.schema import UserError


def check(session: Session, settings: Config, *, ranks: bool, detects: bool) -> None:
    """Raises UserError, with both numbers, where the cluster has less of a resource than the models want together."""
    wants: dict[str, dict[str, float]] = {}
    if settings.encoder.model != "precomputed":
        wants["encoder"] = _of(session, settings.encoder, settings.encoder.workers)
    if detects and (detector := settings.detect.detector) is not None:
        wants["detect.detector"] = _of(session, detector, detector.workers)
    if ranks and settings.ranker.starts_models:
        ranker = settings.ranker
        wants["ranker"] = _of(session, ranker, ranker.min_replicas)
        if ranker.num_gpus == 0 and ranker.model != "miniature" and ray.cluster_resources().get("GPU"):
            print("  ranker.num_gpus is 0: the ranker runs on CPUs, though there are GPUs", file=sys.stderr, flush=True)
    at_most = state.get_max_resources_from_cluster_config() or {}
    for resource in dict.fromkeys(["GPU", "CPU", *(name for one in wants.values() for name in one)]):
        parts = {name: one[resource] for name, one in wants.items() if one.get(resource)}
        if resource == "CPU":
            parts["tasks"] = session.task_cpus
        wanted, there = sum(parts.values()), max(ray.cluster_resources().get(resource, 0.0), at_most.get(resource, 0.0))
        if wanted > there + 1e-6:
            told = ", ".join(f"{name} {count:g}" for name, count in parts.items() if count)
            raise UserError(
                f"the models want {wanted:g} {resource}s ({told}) and the cluster has {there:g}; lower workers, "
                "min_replicas or num_gpus (a fraction shares a GPU), or add nodes"
            )


def at_once(session: Session, settings: Config, *, ranks: bool) -> dict[str, float]:
    """Of the stages that processes with a model run, how many of these there are now: {"embed.at_once": 1, ...}."""
    found = {}
    if (pool := session.pools.get(("encoder", settings.encoder.model_dump_json()))) is not None:
        found["embed.at_once"] = ray.get(pool.desk.size.remote())
    if ranks and settings.ranker.method not in ("none", "endpoint"):
        from rar.engine import client  # and with it Serve, which the build of a memory does without

        found["rank.at_once"] = client.running(client.app_name(settings.ranker))
    return found


def _of(session: Session, model: Placed, processes: int) -> dict[str, float]:
    gpus, cpus = session.reserves(model)
    return {name: each * processes for name, each in {"GPU": gpus, "CPU": cpus, **model.resources}.items()}
