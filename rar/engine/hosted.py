"""Engines that a command starts itself (`ranker.engine`): their own servers, each in an actor that reserves what it needs.

Why not `ray.serve.llm`, or the processor of `ray.data.llm`? Serve LLM hands on chat, scores and tokens, of vLLM and SGLang
alone: their decisions and rerankings stay behind, and every request passes an ingress and a replica that batch nothing. The
processor's engine is one stage's of one job; calibration, `rar serve` and the jobs of a sweep could not ask it. An engine's
own server batches by itself, whatever stands in front. Workers ask it directly, at the pace that it keeps up with, and leave
out one that dies (see direct), so a shard stays the unit of resuming, and an answer has the bits that this engine gives to
anybody. Cost: nothing grows with the load; there are `ranker.min_replicas` servers from the first question to the end of the
command.

A server that dies after it has answered is started again at its address. A node that dies takes its servers along.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rar import config
from rar.engine import leash, waiting
from rar.engine.actors import free_resources
from rar.engine.replica import model_path
from rar.engine.session import Session
from rar.schema import UserError

INSTALL = {"vllm": "'rar[vllm]'", "sglang": "sglang", "transformers": "'rar[serving]'"}  # rar[vllm] is the vLLM that Ray pins
PAUSE_S = 1.0  # before a server that died is started again
STOP_S = leash.GRACE_S + 5
State = tuple[str, str]  # failed, starting or ready; with why, what it said last, or its URL


def located(session: Session, settings: config.Ranker) -> config.Ranker:
    """With the addresses of its engines as base_url, started if they do not run yet; as it is where it names no engine.

    Raises UserError for an engine that is not installed or does not take the model, Unavailable for one that does not come.
    """
    if settings.engine is None:
        return settings
    key = settings.model_dump_json(
        include={"engine", "engine_args", "model", "min_replicas", "num_gpus", "num_cpus", "resources"}
    )
    with session.starting:
        if key not in session.engines:
            session.engines[key] = _start(session, settings)
    return settings.model_copy(update={"base_url": session.engines[key], "model": model_path(settings)})


def _start(session: Session, settings: config.Ranker) -> list[str]:
    host = None if session.joined else "127.0.0.1"
    count = settings.min_replicas
    arguments = (settings.engine, model_path(settings), settings.engine_args, host, session.threads_of(count))
    actor: Any = ray.remote(Engine).options(**session.options(settings))
    engines = [actor.remote(*arguments) for _ in range(count)]
    session.endings.callback(_stop, engines)
    states: list[State] = [("starting", "")] * count

    def ready(seconds: float) -> bool:
        try:
            states[:] = ray.get([engine.state.remote() for engine in engines], timeout=seconds)
        except GetTimeoutError:
            states[:] = [("waiting", f"no place for it yet; {free_resources()}")] * count
            return False
        for phase, said in states:
            if phase == "failed":
                raise UserError(f"ranker.engine {settings.engine} {said}")
        if all(phase == "ready" for phase, _ in states):
            return True
        time.sleep(min(0.5, seconds))
        return False

    def told() -> str:
        return next(said for phase, said in states if phase != "ready")

    waiting.until(ready, told, f"the ranker's engine {settings.engine}", session.patience_s)
    return [url for _, url in states]


def _stop(engines: list[Any]) -> None:
    for stopping in [engine.stop.remote() for engine in engines]:
        try:
            ray.get(stopping, timeout=STOP_S)
        except Exception:  # it is gone already, and its server with it
            continue
    for engine in engines:
        ray.kill(engine)


def command(engine: str, model: str, arguments: Mapping[str, Any], host: str, port: int) -> list[str]:
    """How an engine's server is started here. Raises UserError where it is not installed.

    arguments: {name: value} as --name value; True is --name alone, None and False are left out, a mapping is JSON.
    """
    program = _program(engine)
    named = {"vllm": ["serve", model], "transformers": ["serve", model], "sglang": ["--model-path", model]}[engine]
    words = [*program, *named, "--host", host, "--port", str(port)]
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _program(engine: str) -> list[str]:
    if engine == "sglang" and find_spec("sglang"):
        return [sys.executable, "-m", "sglang.launch_server"]
    beside = Path(sys.executable).with_name(engine)
    program = str(beside) if beside.is_file() else shutil.which(engine)
    if program is None or engine == "sglang":
        raise UserError(
            f"is not installed on {socket.gethostname()}: pip install {INSTALL[engine]}, or name a server by base_url"
        )
    return [program]


class Engine:
    """One engine's server, on this node, as an actor holds it. It ends with the process."""

    def __init__(self, engine: str, model: str, arguments: dict[str, Any], host: str | None, threads: int | None) -> None:
        """host: to listen on; None: the node's own address. threads: of an engine on a CPU; None: as Ray gives."""
        descriptor, log = tempfile.mkstemp(prefix=f"{engine}-", suffix=".log")
        os.close(descriptor)
        self.log = Path(log)
        self.host = host or ray.util.get_node_ip_address()
        with socket.create_server((self.host, 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.fault, self.answered, self.stopping = "", False, threading.Event()
        try:
            self.command = command(engine, model, arguments, self.host, self.port)
        except UserError as error:
            self.fault = str(error)
            return
        self._launch()

    def state(self) -> State:
        if self.fault:
            return "failed", self.fault
        if self._answers():
            self.answered = True
            return "ready", f"http://{self.host}:{self.port}/v1"
        if self.process.poll() is not None and not self.answered:
            return "failed", f"did not start: {self._said()}"
        return "starting", self._said()

    def stop(self) -> None:
        self.stopping.set()
        if not self.fault:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(STOP_S)
        self.log.unlink(missing_ok=True)

    def _launch(self) -> None:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, leash.__file__, *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self.process.wait()
        if self.answered and not self.stopping.wait(PAUSE_S):
            self._launch()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=2):
                return True
        except OSError:
            return False

    def _said(self) -> str:
        """The last line of its log that says something, an error's if there is one."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing yet"]
        return next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]
