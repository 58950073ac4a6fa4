"""Two drivers and one run folder, on this machine and (by another name of it) on two. Not covered: real shared disks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from rar import storage
from rar.config import Config
from rar.run import alone
from rar.runfolder import RunFolder
from rar.schema import UserError
from tests.conftest import ROOT
from tests.jobs.test_jobs import one_line, typed, write_config

HOLD = """
import sys, time
from pathlib import Path
from rar.config import Config
from rar.run import alone
with alone.driving(Path(sys.argv[1]), beat_s=0.05):
    print("driving", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_while_the_first_lives_and_takes_over_at_once_when_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"driving\n"
        with pytest.raises(UserError, match=f"process {first.pid} on {socket.gethostname()} is at work"), alone.driving(folder):
            pass
    finally:
        first.kill()
        first.wait()
    began = time.monotonic()
    with alone.driving(folder):
        assert time.monotonic() - began < 2 and json.loads((folder / "driver.json").read_text())["process"] != first.pid
    assert not folder.exists()


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_made_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    why = r"--out .* cannot be made or written: (Not a directory|File exists); choose"
    with pytest.raises(UserError, match=why), alone.driving(tmp_path / place):
        pass


@pytest.mark.parametrize("verb", ["memory", "classify", "embed", "sweep"])
def test_every_verb_that_leaves_a_folder_looks_for_another_driver(verb: str, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = "miniature" if verb == "sweep" else write_config(tmp_path, world)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT) as first:
        assert first.stdout is not None and first.stdout.readline() == b"driving\n"
        result = typed(verb, file, "--out", folder)
        first.kill()
    assert result.exit_code == 2 and f"process {first.pid} on {socket.gethostname()} is at work" in one_line(result)


def test_a_driver_of_another_machine_is_known_by_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    held, over = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with alone.driving(folder, beat_s=0.05):
            held.set()
            over.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    held.wait()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with pytest.raises(UserError, match="is at work on this run"), alone.driving(folder, still_s=5):
        pass
    over.set()
    thread.join()


def test_a_machine_that_died_is_taken_over_from_and_what_it_left_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "driver.json").write_text(json.dumps({"machine": "gone", "process": 1, "driver": "x", "count": 3}))
    RunFolder.check(folder, "classify", Config(), fresh=False)
    began = time.monotonic()
    with alone.driving(folder, still_s=0.5):
        assert time.monotonic() - began >= 0.5


def test_what_a_run_leaves_on_an_object_store_stays() -> None:
    folder = storage.place(f"memory://{uuid.uuid4().hex}")
    with alone.driving(folder):
        assert (folder / storage.DRIVER).exists()
        storage.write(folder / "run.json", b"{}")
    assert [file.name for file in folder.iterdir()] == ["run.json"]


def test_a_torn_file_is_no_driver(tmp_path: Path) -> None:
    (tmp_path / "driver.json").write_text("{")
    (tmp_path / "run.json").write_text("{}")
    with alone.driving(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_driver_that_was_taken_over_from_leaves_the_others_sign_alone(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", {"machine": "other", "process": 1, "driver": "y", "count": 0}
    with alone.driving(folder, beat_s=0.05):
        (folder / "driver.json").write_text(json.dumps(other))
        time.sleep(0.3)
    assert json.loads((folder / "driver.json").read_text()) == other
