"""The files of cluster/ against the schemas of those who read them: KubeRay's CRDs, Kubernetes' own, the versions that we pin.

Not covered: a cluster that applies them, Helm charts' values, cloud providers.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from rar.engine.replica import Meters
from tests.conftest import ROOT
from tests.stores import SHARED_DATA

CLUSTER = ROOT / "cluster"
CRDS = SHARED_DATA / "kuberay_crds"
OURS = {"RayCluster", "RayJob", "RayService"}


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(CLUSTER.glob("*.yaml")):
        for number, document in enumerate(yaml.safe_load_all(file.read_text())):
            yield f"{file.name}#{number}", document


def manifests(kinds: set[str]) -> list[Any]:
    return [pytest.param(one, id=name) for name, one in documents() if one.get("kind") in kinds]


@cache
def schema_of(kind: str) -> dict[str, Any]:
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (found,) = [version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1"]
    found["properties"]["metadata"] = {"type": "object"}
    return closed(found)


def closed(schema: Any) -> Any:
    """The API server prunes what a structural schema does not name, in silence: here it is an error."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    if "properties" in out and not out.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in out:
        out["additionalProperties"] = False
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return out


def faults(kind: str, document: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft7Validator(schema_of(kind)).iter_errors(document)
    return [f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in found]


@pytest.mark.skipif(not CRDS.is_dir(), reason="the CRDs of KubeRay are not there (shared/data/kuberay_crds)")
@pytest.mark.parametrize("manifest", manifests(OURS))
def test_kuberay_would_take_them(manifest: dict[str, Any]) -> None:
    assert faults(manifest["kind"], manifest) == []
    wrong = json.loads(json.dumps(manifest)) | {}
    wrong["spec"]["rayClusterSpecs"] = {}  # one letter more than a RayJob has
    assert any("rayClusterSpecs" in one for one in faults(manifest["kind"], wrong)), "an unknown field is not seen"


@pytest.mark.parametrize("manifest", manifests({"Deployment", "Service"}))
def test_kubernetes_would_take_them(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifest, "spec": {**manifest["spec"], "replica": 1}}, "1.31", strict=True)


@pytest.mark.skipif(not CRDS.is_dir(), reason="the CRDs of KubeRay are not there (shared/data/kuberay_crds)")
@pytest.mark.parametrize("manifest", manifests({"Deployment", *OURS}))
def test_pods_are_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    for pod in pods(manifest["spec"]):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
        kubernetes_validate.validate(whole, "1.31", strict=True)
        for container in pod["containers"]:
            limits = container["resources"]["limits"]
            assert container["resources"]["requests"].get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}


def pods(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for one in value.values():
            yield from pods(one)
    elif isinstance(value, list):
        for one in value:
            yield from pods(one)


@pytest.mark.parametrize("manifest", manifests({"RayService"}))
def test_serve_would_take_its_config(manifest: dict[str, Any]) -> None:
    asked = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(asked).applications
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application.args)
    assert isinstance(built, Application)
    assert application.route_prefix != "/", "the gateway answers there"
    mounted = [mount["mountPath"] for pod in pods(manifest["spec"]) for mount in pod["containers"][0]["volumeMounts"]]
    assert mounted and all(application.args["config"].startswith(f"{path}/") for path in mounted)
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate({"applications": [{**asked["applications"][0], "import_path": "nowhere"}]})


def test_skypilots_task_is_bash_and_names_what_it_sets() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["run"])) - {"PATH", "SKYPILOT_NODE_RANK"}
    assert used == set(task["envs"])


def test_clean_up_rules_exclude_each_other() -> None:
    plain, queued = (yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())["spec"] for name in ("rayjob", "rayjob-kueue"))
    assert "deletionRules" in plain["deletionStrategy"] and "shutdownAfterJobFinishes" not in plain
    assert queued["shutdownAfterJobFinishes"] is True and "deletionStrategy" not in queued and "clusterSelector" not in queued
    same = ("entrypoint", "rayClusterSpec", "submissionMode")
    assert {key: plain[key] for key in same} == {key: queued[key] for key in same}


def test_one_version_of_ray_everywhere() -> None:
    named = {
        *re.findall(r"rayproject/ray:([0-9.]+)-py311", (CLUSTER / "Dockerfile").read_text()),
        *re.findall(r"rayproject/ray:([0-9.]+)-py311", (CLUSTER / "README.md").read_text()),
        *re.findall(r"^ray==([0-9.]+)", (ROOT / "requirements.lock").read_text(), re.M),
        *(version for _, one in documents() for version in re.findall(r'"rayVersion": "([0-9.]+)"', json.dumps(one))),
    }
    assert named == {ray.__version__}


def test_entry_points_and_files_exist() -> None:
    text = "\n".join(path.read_text() for path in CLUSTER.iterdir())
    for module in set(re.findall(r"python -m (jobs\.\w+)", text)):
        importlib.import_module(module)
    for name in set(re.findall(r"cluster/([\w.-]+\.(?:yaml|json))", text)) | set(re.findall(r"`([\w-]+\.yaml)`", text)):
        assert (CLUSTER / name).is_file() or name == "birds.yaml", name
    copied = [
        word for line in re.findall(r"^COPY .*$", (CLUSTER / "Dockerfile").read_text(), re.M) for word in line.split()[2:-1]
    ]
    assert copied and all((ROOT / name).exists() for name in copied)


def test_every_number_on_the_board_is_told_by_somebody() -> None:
    board = json.loads((CLUSTER / "grafana.json").read_text())
    shown = set(re.findall(r"\b(ray_\w+|milvus_\w+)", " ".join(t["expr"] for p in board["panels"] for t in p["targets"])))
    told = {f"ray_{meter._name}_total" for meter in vars(Meters()).values()}
    assert told <= shown and shown - told == {"milvus_proxy_sq_latency_bucket"}
