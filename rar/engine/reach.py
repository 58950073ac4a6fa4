"""Whether every node reads and writes the run folder, asked before anything is computed: a disk that only some of them mount
would otherwise be met when the first shard is done there. Nodes that join later are not asked.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rar import storage
from rar.engine.isolate import reason
from rar.engine.session import Session
from rar.schema import UserError


def check(session: Session, folder: Path) -> None:
    """Raises UserError that names a node which does not see what the driver writes, or whose file the driver does not see."""
    if not session.joined:
        return
    here = folder / f".{uuid.uuid4().hex}"
    storage.write(here, b"")
    theirs = {node["NodeID"]: here.with_name(f"{here.name}-{node['NodeID']}") for node in ray.nodes() if node["Alive"]}
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    asked = {node: _sees.options(scheduling_strategy=_at(node)).remote(here, there) for node, there in theirs.items()}
    try:
        for node, task in asked.items():
            try:
                why = ray.get(task, timeout=session.patience_s) or (
                    "" if theirs[node].exists() else "what it writes is not seen"
                )
            except RayError:  # it has gone, and its work goes elsewhere
                continue
            if why:
                raise UserError(f"--out {folder} is not the same place on node {hosts[node]}: {why}; name one that all reach")
    finally:
        for mark in (here, *theirs.values()):
            with suppress(OSError):
                mark.unlink(missing_ok=True)


def _at(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def _sees(here: Path, there: Path) -> str:
    """What keeps this node from the folder; "" where nothing does."""
    try:
        if not here.exists():
            return "what the driver writes is not seen"
        storage.write(there, b"")
    except OSError as error:
        return reason(error)
    return ""
