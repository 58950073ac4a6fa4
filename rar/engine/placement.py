"""What a command's models want of a cluster, held against what is there before anything starts.

Ray would wait for a GPU that never comes, silently. Where an autoscaler has said how far it can go, that is what is there.
"""

from __future__ import annotations

import sys

import ray
from ray._private.state import state

from rar.config import Config
from rar.engine.session import Session
from rar.schema import UserError


def check(session: Session, settings: Config, *, ranks: bool, detects: bool) -> None:
    """Raises UserError, with both numbers, where the cluster has fewer GPUs or CPUs than the models want together."""
    wants = {"encoder": session.reserves(settings.encoder.device, settings.encoder.num_gpus, settings.encoder.workers)}
    if settings.encoder.model == "precomputed":
        wants = {}
    if detects and (detector := settings.detect.detector) is not None:
        wants["detect.detector"] = session.reserves(detector.device, detector.num_gpus, detector.workers)
    if ranks and settings.ranker.method not in ("none", "endpoint"):
        ranker = settings.ranker
        wants["ranker"] = session.reserves(ranker.device, ranker.num_gpus, ranker.min_replicas)
        if ranker.num_gpus == 0 and ranker.model != "miniature" and ray.cluster_resources().get("GPU"):
            print("  ranker.num_gpus is 0: the ranker runs on CPUs, though there are GPUs", file=sys.stderr, flush=True)
    at_most = state.get_max_resources_from_cluster_config() or {}
    for resource, place in (("GPU", 0), ("CPU", 1)):
        wanted = sum(one[place] for one in wants.values())
        there = max(ray.cluster_resources().get(resource, 0.0), at_most.get(resource, 0.0))
        spare = session.task_cpus if resource == "CPU" else 0.0
        if wanted + spare > there + 1e-6:
            parts = ", ".join(f"{name} {one[place]:g}" for name, one in wants.items() if one[place])
            parts += f", tasks {spare:g}" if spare else ""
            raise UserError(
                f"the models want {wanted + spare:g} {resource}s ({parts}) and the cluster has {there:g}; lower workers, "
                "min_replicas or num_gpus (a fraction shares a GPU), or add nodes"
            )
