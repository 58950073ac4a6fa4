"""Engines that a command starts: how they are called, found, kept alive and ended.

The engine of the default tests is a script by the name of `vllm` that serves the colours of tests/chat_server; with -m server,
`transformers serve` and (RAR_VLLM, see tests/vllm_cpu.sh) vLLM with the miniature MLLM, through Ray. SGLang is never started.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rar import miniature
from rar.config import Ranker
from rar.engine import client, hosted, leash
from rar.engine.hosted import Engine, command
from rar.engine.session import Session, opened
from rar.ranker.endpoint import EndpointRanker
from rar.schema import RankStatus, UserError
from tests.chat_server import BEST, NAMES, picture
from tests.conftest import ROOT

SCRIPT = """#!{python}
import json, os, pathlib, sys
sys.path.insert(0, {root!r})
pathlib.Path({log!r}).open("a").write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
from tests.chat_server import Server
if "--broken" in sys.argv:
    raise ValueError("no such model")
Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))).serve_forever()
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an engine by the name of vllm was started with: a line of JSON each time, its process first."""
    log = tmp_path / "started.jsonl"
    program = tmp_path / "vllm"
    program.write_text(SCRIPT.format(python=sys.executable, root=str(ROOT), log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return log


def starts(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between the opening and the reading
        return True


def test_arguments_are_those_of_the_engines_own_command_line(started: Path) -> None:
    arguments = {"tensor_parallel_size": 2, "enforce-eager": True, "trust_remote_code": False, "seed": None}
    more: dict[str, Any] = {"lora_modules": ["a=/a", "b=/b"], "limit_mm_per_prompt": {"image": 3}}
    program, *words = command("vllm", "org/model", {**arguments, **more}, "127.0.0.1", 7)
    assert Path(program).name == "vllm"
    assert words[:6] == ["serve", "org/model", "--host", "127.0.0.1", "--port", "7"]
    assert words[6:9] == ["--tensor-parallel-size", "2", "--enforce-eager"]
    assert words[9:] == ["--lora-modules", "a=/a", "b=/b", "--limit-mm-per-prompt", '{"image": 3}']
    assert command("transformers", "m", {}, "h", 7)[1:] == ["serve", "m", "--host", "h", "--port", "7"]


@pytest.mark.parametrize(("engine", "extra"), [("vllm", r"rar\[vllm\]"), ("sglang", "sglang")])
def test_an_engine_that_is_not_installed_is_told_in_one_line(ray_session: Session, engine: Any, extra: str) -> None:
    settings = Ranker(method="endpoint", engine=engine, model="org/model")
    with pytest.raises(UserError, match=f"ranker.engine {engine} is not installed on .*pip install '?{extra}") as told:
        client.deploy(ray_session, settings)
    assert "\n" not in str(told.value)


def test_a_server_is_waited_for_asked_started_again_and_ended(started: Path) -> None:
    engine = Engine("vllm", "colours", {"max_model_len": 8192}, "127.0.0.1", None)
    until(lambda: engine.state()[0] == "ready")
    _, url = engine.state()
    ((first, *words),) = starts(started)
    assert words == ["serve", "colours", "--host", "127.0.0.1", "--port", url.split(":")[2][:-3], "--max-model-len", "8192"]
    asker = EndpointRanker(Ranker(method="endpoint", model="colours", base_url=url, attempts=20))
    assert asker.rank([picture("red")], [NAMES])[0].order[0] == BEST["red"]
    os.kill(first, signal.SIGKILL)
    assert asker.rank([picture("blue")], [NAMES])[0].order[0] == BEST["blue"]
    (_, (second, *again)) = starts(started)
    assert again == words and engine.state() == ("ready", url)
    engine.stop()
    assert gone(first) and gone(second) and len(starts(started)) == 2 and not engine.log.exists()


def test_a_server_that_does_not_start_says_why_and_is_not_tried_again(started: Path) -> None:
    engine = Engine("vllm", "colours", {"broken": True}, "127.0.0.1", None)
    until(lambda: engine.state()[0] != "starting")
    assert engine.state() == ("failed", "did not start: ValueError: no such model")
    engine.stop()
    assert len(starts(started)) == 1


def test_a_command_on_the_leash_ends_with_who_holds_it(tmp_path: Path) -> None:
    """However that one ends; and what the command itself started ends, too."""
    said = tmp_path / "pids"
    child = (
        "import os, subprocess; one = subprocess.Popen(['sleep', '60']); "
        f"open({str(said)!r}, 'w').write(f'{{os.getpid()}} {{one.pid}} '); one.wait()"
    )
    holder = (
        "import subprocess, sys; subprocess.Popen([sys.executable, sys.argv[1], sys.executable, '-c', sys.argv[2]], "
        "stdin=subprocess.PIPE).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", holder, leash.__file__, child]) as holding:
        until(lambda: said.exists() and len(said.read_text().split()) == 2)
        pids = [int(pid) for pid in said.read_text().split()]
        assert not any(map(gone, pids))
        holding.kill()
    until(lambda: all(map(gone, pids)))


def transformers_engine(**arguments: Any) -> Ranker:
    return Ranker(method="endpoint", engine="transformers", model="miniature", engine_args={"device": "cpu", **arguments})


def processes() -> list[int]:
    """Of this machine, those that serve the miniature MLLM."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "serve" in words and str(miniature.MLLM) in words and leash.__file__ not in words:
            found.append(int(entry.name))
    return found


@pytest.mark.server
def test_transformers_is_hosted_asked_killed_and_ended(world: Path, ray_session: Session) -> None:
    """Its replies are the local model's; one kill costs time and no row; nothing is left behind."""
    from rar.ranker.rank import MllmRanker
    from tests.ranker.test_endpoint import photos

    settings, (images, names) = transformers_engine(), photos(world)
    files = [encoded(image) for image in images]
    with opened() as session:
        client.deploy(session, settings)
        ask = client.ask(session, settings)
        assert ask is not None
        theirs = ask(files, names)
        local = MllmRanker(Ranker(method="generate", device="cpu"), str(miniature.MLLM)).rank(images, names)
        assert [one.response for one in theirs] == [one.response for one in local]
        (server,) = processes()
        os.kill(server, signal.SIGKILL)
        until(lambda: bool(processes()) and server not in processes())
        again = ask(files, names)
        assert {one.status for one in again} <= {RankStatus.RANKED, RankStatus.REPAIRED}
    until(lambda: not processes())


@pytest.mark.server
def test_an_argument_that_transformers_does_not_know_is_told(ray_session: Session) -> None:
    with opened() as session, pytest.raises(UserError, match=r"ranker.engine transformers did not start: .*no.such"):
        hosted.located(session, transformers_engine(no_such=1))


RANKED = """
import json, sys
from rar.config import Ranker
from rar.engine import client, session
settings, batch = json.loads(sys.stdin.read())
with session.opened(patience_s=1200) as opened:
    ranker = Ranker(**settings)
    client.deploy(opened, ranker)
    found = client.ask(opened, ranker)([bytes.fromhex(one) for one in batch[0]], batch[1])
print(json.dumps([[one.order[0], one.label_mass, *one.scores] for one in found]))
"""


@pytest.mark.server
@pytest.mark.skipif("RAR_VLLM" not in os.environ, reason="needs RAR_VLLM, a folder made by tests/vllm_cpu.sh")
def test_vllm_is_hosted_and_ranks_as_local_letters_do(world: Path) -> None:
    """In a process of its own: vLLM is found by the PATH that Ray was started with."""
    from rar.ranker.rank import MllmRanker
    from tests.ranker.test_endpoint import photos

    images, names = photos(world)
    arguments = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "gpu_memory_utilization": 0.15}
    settings = {"method": "endpoint", "engine": "vllm", "model": "miniature", "engine_args": arguments, "timeout_s": 120}
    sent = json.dumps([settings, [[encoded(image).hex() for image in images], names]])
    path = os.pathsep.join([str(Path(os.environ["RAR_VLLM"]) / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", RANKED]
    told = subprocess.run(run, input=sent, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.splitlines()
    local = MllmRanker(Ranker(method="letters", device="cpu"), str(miniature.MLLM)).rank(images, names)
    for found, right in zip(json.loads(told[-1]), local, strict=True):
        assert found[0] == right.order[0] and found[1:] == pytest.approx([right.label_mass, *right.scores], abs=1e-3)
    until(lambda: not processes())


def encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
