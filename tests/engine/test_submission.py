"""What is sent with a job and under which name; with -m slow, a real head with a dashboard: sent, followed, stopped, resumed.

Not covered: installing requirements on the cluster, heads on other machines, TLS.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from rar import config
from rar.bench.server import free_port, is_taken
from rar.engine import submission
from rar.memory.collection import open_store
from rar.schema import UserError
from tests.conftest import ROOT
from tests.jobs.test_jobs import one_line

SERVER = {"uri": "http://milvus:19530"}


def typed(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["submit", *map(str, arguments)])


def written(folder: Path, **sections: dict) -> Path:
    data = {"corpus": {"uri": "s3://bucket/photos"}, "memory": SERVER, **sections}
    file = folder / "birds.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_what_a_job_needs_goes_along_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "birds.txt").write_text("wren\nheron\n")
    (tmp_path / "secrets.txt").write_text("mine")
    file = written(
        tmp_path,
        memory={**SERVER, "classes": "lists/birds.txt"},
        encoder={"model": "ViT-B-16/openai"},
        ranker={"method": "none"},
    )
    settings = config.load(file)
    for code in (True, False):
        folder = tmp_path / f"sent_{code}"
        folder.mkdir()
        assert submission.pack(folder, file, settings, SERVER["uri"], code=code, weights=False) == [Path("lists/birds.txt")]
        assert config.load(folder / submission.CONFIG) == settings
        assert (folder / "lists/birds.txt").read_text() == "wren\nheron\n"
        found = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
        assert found == {"config.yaml", "lists"} | ({"rar", "jobs"} if code else set())
    sent = {str(path.relative_to(tmp_path / "sent_True")) for path in (tmp_path / "sent_True").rglob("*")}
    assert "rar/engine/submission.py" in sent and not any("safetensors" in one or "__pycache__" in one for one in sent)


def test_ray_takes_the_lock_as_it_is() -> None:
    """Pins, hashes and their continued lines, each in its place; only comments may go."""
    from ray.runtime_env import RuntimeEnv

    told = RuntimeEnv(pip=str(ROOT / "requirements.lock")).to_dict()["pip"]["packages"]  # type: ignore[arg-type]
    there = (ROOT / "requirements.lock").read_text().splitlines()
    assert [line for line in told if "#" not in line] == [line for line in there if "#" not in line]


def test_the_code_that_is_sent_runs_by_itself(tmp_path: Path) -> None:
    file = written(tmp_path.parent)
    submission.pack(tmp_path, file, config.load(file), SERVER["uri"], code=True, weights=True)
    where = "import rar, jobs; print(rar.__path__, jobs.__path__)"
    told = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.count(str(tmp_path)) == 2


def test_a_name_is_of_what_the_job_does(tmp_path: Path) -> None:
    settings = config.load(written(tmp_path))
    name = submission.submission_id("classify", settings, "s3://bucket/run")
    assert name == submission.submission_id("classify", config.load(written(tmp_path)), "s3://bucket/run")
    others = {
        submission.submission_id("detect", settings, "s3://bucket/run"),
        submission.submission_id("classify", settings, "s3://bucket/other"),
        submission.submission_id("classify", config.load(written(tmp_path), ["retriever.top_k=7"]), "s3://bucket/run"),
    }
    assert len(others | {name}) == 4


@pytest.mark.parametrize(
    ("verb", "sections", "options", "wanted"),
    [
        ("classify", {"memory": {"uri": "runs/memory.milvus"}}, (), "use a Milvus server"),
        ("classify", {"memory": {**SERVER, "token": "root:hidden"}}, (), "set MILVUS_TOKEN"),
        ("classify", {"corpus": {"uri": "photos"}}, (), "corpus.uri photos lies on this machine"),
        ("classify", {"ranker": {"prompts": "../mine.yaml"}}, (), "lies outside"),
        ("classify", {}, ("--out", "runs/x"), "every node reaches"),
        ("classify", {}, ("--address", "ray://head:10001"), "http://HEAD:8265"),
        ("serve", {}, (), "VERB is one of"),
        ("classify", {}, ("--requirements", "nowhere.lock"), "is no file"),
        ("sweep", {}, (), "datasets: Field required"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_sent(
    verb: str, sections: dict, options: tuple, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "photos").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    result = typed(verb, written(tmp_path, **sections), "--address", "http://127.0.0.1:9", "--out", "s3://b/run", *options)
    assert result.exit_code == 2 and wanted in one_line(result)
    assert "hidden" not in result.output


def test_a_dashboard_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = typed("classify", written(tmp_path), "--address", "http://127.0.0.1:9", "--out", "s3://b/run")
    assert result.exit_code == 1 and "http://127.0.0.1:9" in one_line(result)


def test_a_plan_says_what_would_be_sent(tmp_path: Path) -> None:
    options = ("--set", "retriever.top_k=3", "--out", "s3://b/run", "--dry-run")
    result = typed("classify", written(tmp_path), *options)
    assert result.exit_code == 0
    assert "python -m jobs.classify config.yaml --out s3://b/run --set retriever.top_k=3" in result.stderr


PLANTED = {name: f"planted-{secrets.token_hex(16)}" for name in ("MILVUS_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAR_API_KEY")}
PLANTED |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


@dataclass(frozen=True)
class Head:
    """The dashboard's address, and the folder of Ray's logs and of what jobs sent."""

    address: str
    folder: Path


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """A head whose dashboard takes jobs from who has its token, with secrets to keep.

    Its folder must have a short name; a job finds its cluster by that folder. A second node would share it here, and Ray
    unpacks what a job sends once a node, over what is there: files were gone while the job read them.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    gcs, port, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="rar")
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block"]
    ports = [f"--port={gcs}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]  # another Ray may run
    ports += [f"--temp-dir={folder}", "--num-cpus=4"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*start, "--head", *ports], **quiet) as running:  # type: ignore[call-overload]
        until = time.monotonic() + 240
        while not is_taken(port):
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield Head(f"http://127.0.0.1:{port}", Path(folder))
        running.terminate()
    shutil.rmtree(folder, ignore_errors=True)


def told_secrets(*folders: Path) -> list[str]:
    """Files below folders that hold a planted secret, and its name."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 50, "there is nothing to look through"
    return [f"{file}: {name}" for file in files for name, secret in PLANTED.items() if secret.encode() in file.read_bytes()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """A store that the job reaches as it reaches a server."""
    with open_store(str(tmp_path / "store")) as address:
        yield address


@pytest.mark.slow
def test_a_job_is_sent_followed_stopped_and_resumed(
    head: Head, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, count in (("support", 24), ("queries", 4_000)):
        vectors = np.random.default_rng(1).normal(size=(count, 16)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", embeddings=vectors, label=[f"class {row % 4}" for row in range(count)])
    memory = {"uri": store, "support": {"uri": str(tmp_path / "support.npz")}}
    file = written(
        tmp_path,
        corpus={"uri": str(tmp_path / "queries.npz")},
        memory=memory,
        encoder={"model": "precomputed"},
        ranker={"method": "none"},
        run={"shard_size": 20},
    )

    def ended(verb: str, *options: str) -> tuple[int, str, str]:
        given = [verb, str(file), "--out", str(tmp_path / verb)] if verb in submission.VERBS else [verb]
        command = [sys.executable, "-m", "jobs.cli", "submit", *given, *options, "--address", head.address]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        return done.returncode, done.stdout, done.stderr

    with pytest.MonkeyPatch.context() as without:
        without.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        code, told, said = ended("memory")
        assert code == 2 and "wants a token" in said, told + said
    code, told, said = ended("memory", "--set", "retriever.mode=tip")
    assert code == 2 and "which needs class names and support images" in told, told + said
    code, told, said = ended("memory")
    assert code == 0 and "entries.images 24" in told, told + said
    code, told, said = ended("memory")
    assert code == 0 and "entries.images 24" in told and "found rar-memory-" in said, told + said

    name = ended("classify", "--no-wait")[1].strip()
    until = time.monotonic() + 200
    while not list((tmp_path / "classify" / "done").glob("part-*")):
        assert time.monotonic() < until
        time.sleep(0.1)
    code, told, said = ended("--stop", name)
    assert code == 0 and f"{name} stopped" in told, told + said
    done = len(list((tmp_path / "classify" / "done").glob("part-*")))
    assert 0 < done < 200
    code, told, said = ended("classify")
    assert code == 0 and f"sent {name}" in said and "4,000 ok, 0 failed" in told, told + said
    assert ended("--status", name)[0] == 0
    assert json.loads((tmp_path / "classify" / "run.json").read_text())["counts"]["ok"] == 4_000
    assert told_secrets(tmp_path, head.folder) == []
    jobs = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", head.address], capture_output=True, text=True
    )
    assert name in jobs.stdout and not [one for one in PLANTED.values() if one in jobs.stdout + jobs.stderr]


@pytest.mark.slow
def test_a_tuning_and_a_sweep_are_sent_and_followed(head: Head, store: str, world: Path, tmp_path: Path) -> None:
    """Memory, tuning and classification with what it leaves, and a grid whose memories a server holds."""
    tune = {"max_steps": 4, "batch_size": 4, "check_every": 2, "judged": 12}
    support = {"uri": str(world / "novel" / "support")}
    corpus = {"uri": str(world / "novel" / "test"), "limit": 12}
    file = written(tmp_path, corpus=corpus, memory={"uri": store, "support": support}, tune=tune, route={"mode": "always"})
    drawn = {"miniature": {"classes": 6, "support": 2, "tests": 1}}
    arms = {name: {"config": {"retriever": {"mode": name}, "ranker": {"method": "none"}}} for name in ("text", "fused")}
    grid = {"base": {"memory": {"uri": store}}, "datasets": {"plain": drawn}, "arms": arms, "shots": [2], "seeds": [0]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    def ended(verb: str, name: Path, *options: str) -> tuple[int, str]:
        given = ["submit", verb, str(name), "--out", str(tmp_path / "runs" / verb), "--address", head.address, *options]
        command = [sys.executable, "-m", "jobs.cli", *given]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
        return done.returncode, done.stdout + done.stderr

    for verb, name in (("memory", file), ("tune", file), ("sweep", tmp_path / "grid.yaml")):
        code, told = ended(verb, name)
        assert code == 0, told
    assert (tmp_path / "runs" / "tune" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "sweep" / "leaderboard.csv").read_text().count("\n") == 3
    code, told = ended("classify", file, "--set", f"ranker.adapter={tmp_path / 'runs' / 'tune' / 'adapter'}")
    assert code == 0 and "12 ok, 0 failed" in told, told


def test_a_stopped_job_has_no_exit_code_of_its_own() -> None:
    from ray.job_submission import JobDetails, JobStatus, JobType

    codes = [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", 1, 1), ("FAILED", -9, 1), ("STOPPED", None, 1)]
    for status, own, wanted in codes:
        details = JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="", driver_exit_code=own)
        assert submission.exit_code(details) == wanted


def test_a_relative_memory_is_no_servers() -> None:
    with pytest.raises(UserError, match="folder of this machine"):
        submission.pack(Path(), Path(), config.Config(), config.Memory().uri, code=False, weights=False)
