"""Run folders and embeddings on a real S3 server (moto) and in memory: the rules that hold on a disk hold there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from rar import storage
from rar.config import Config
from rar.runfolder import RunFolder
from rar.schema import ERRORS, PREDICTIONS, UserError
from tests.jobs.test_jobs import environment, rar, write_config

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """s3://BUCKET of a server of our own; where it is and its keys are told to s3fs by the environment, as users do."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    pytest.importorskip("s3fs")
    server.start()
    _, port = server.get_host_and_port()
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    fsspec.filesystem("s3").mkdir("runs")
    yield "s3://runs"
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    server.stop()


@pytest.fixture(params=["memory", "s3", "disk"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "run")


def errors(*rows: int) -> pa.Table:
    lines = [{"row": row, "uri": f"{row}.jpg", "stage": "decode", "error": "no image"} for row in rows]
    return pa.Table.from_pylist(lines, ERRORS)


def opened(root: str, *, fresh: bool = False, verb: str = "classify") -> RunFolder:
    return RunFolder.open(root, verb, Config(), fresh=fresh, name="a", group="b")


def test_shards_are_written_resumed_and_counted(root: str) -> None:
    folder = opened(root)
    assert folder.pending(3) == [0, 1, 2]
    folder.write_shard(1, PREDICTIONS.empty_table(), errors(4, 5), {"rank.rows": 2})
    again = opened(root)
    assert again.pending(3) == [0, 2] and again.progress() == (0, 2) and again.stats()["rank.rows"] == 2
    again.write_shard(1, PREDICTIONS.empty_table(), errors(4), {})  # a second attempt replaces the first
    assert folder.progress() == (0, 1) and folder.errors()["row"].to_pylist() == [4]
    index = pa.table({"uri": ["a", "b"]})
    assert folder.freeze_index(index).equals(index) and again.freeze_index(index.slice(1)).equals(index)


def test_a_folder_of_something_else_is_refused_and_fresh_empties_it(root: str) -> None:
    opened(root).write_shard(0, PREDICTIONS.empty_table(), errors(1), {})
    with pytest.raises(UserError, match="holds another run: it is of `rar classify`"):
        opened(root, verb="detect")
    assert opened(root, fresh=True, verb="detect").progress() == (0, 0)
    storage.place(f"{root}-other").mkdir()
    storage.write(storage.place(f"{root}-other") / "a.txt", b"")
    with pytest.raises(UserError, match="is not a run folder and not empty"):
        opened(f"{root}-other")


def test_a_file_appears_whole_or_not_at_all(root: str) -> None:
    folder = storage.place(root)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "a.bin"
    with pytest.raises(RuntimeError, match="half"), storage.writing(file) as stream:
        stream.write(b"half")
        raise RuntimeError("half")
    assert not file.exists() and list(folder.glob("*")) == []
    storage.write(file, b"one")
    storage.write(file, b"two")
    assert file.read_bytes() == b"two" and [one.name for one in folder.iterdir()] == ["a.bin"]


@pytest.mark.slow
def test_a_run_from_s3_to_s3_killed_and_resumed_is_the_local_run(s3: str, world: Path, tmp_path: Path) -> None:
    photos, out = f"{s3}/photos-{uuid.uuid4().hex}", storage.place(f"{s3}/{uuid.uuid4().hex}")
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    fs.put(str(world / "novel" / "test"), photos, recursive=True)
    file = write_config(tmp_path, world, corpus={"limit": 40}, memory={"shots": 1})
    assert rar("memory", file, "--out", tmp_path / "memory", cwd=tmp_path).returncode == 0
    arguments = ["classify", str(file), "--set", f"corpus.uri={photos}", "--out", str(out)]
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while not list((out / "done").glob("part-*.json")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = {mark.name: mark.stat().st_mtime for mark in (out / "done").glob("part-*.json")}
    assert 0 < len(done) < 10, "the kill came too late to show anything"
    resumed = rar(*arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rar("classify", file, "--out", tmp_path / "local", cwd=tmp_path).returncode == 0
    there, here = RunFolder(out).predictions().to_pylist(), RunFolder(tmp_path / "local").predictions().to_pylist()
    assert [row.pop("uri").rsplit("/", 2)[1:] for row in there] == [row.pop("uri").rsplit("/", 2)[1:] for row in here]
    assert there == here and len(here) == 40
    assert (out / "report.html").is_file() and (out / "metrics.json").is_file()
    page = f"{s3}/{uuid.uuid4().hex}.html"
    assert rar("report", str(out), tmp_path / "local", "--out", page, cwd=tmp_path).returncode == 0
    assert b"<html" in fs.cat_file(page)
