"""The client against the API itself over real HTTP, with a backend that counts; and the command `rar ask`.

The whole service behind the API is in test_app.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image
from tenacity import wait_none
from typer.testing import CliRunner

from jobs.cli import app as command
from rar import config
from rar.gateway import api, client
from rar.gateway.client import AsyncClient, Client
from rar.schema import Candidate, Ranking, RankStatus, RowError, Unavailable, UserError

TOKEN = "not a secret"


class Backend:
    """Likes the last candidate; says what it is told to, first."""

    def __init__(self) -> None:
        self.first: list[Exception] = []
        self.wait_s, self.busy, self.most_busy = 0.0, 0, 0
        self.seen: list[tuple[float, bytes]] = []

    async def rank(self, image: bytes, names: list[str], adapter: str) -> Ranking:
        self.seen.append((time.monotonic(), image))
        if self.first:
            raise self.first.pop(0)
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        await asyncio.sleep(self.wait_s)
        self.busy -= 1
        scores = tuple(-float(len(names) - 1 - place) for place in range(len(names)))
        return Ranking(tuple(reversed(range(len(names)))), RankStatus.RANKED, scores, "", 1, 40, 1)

    async def recognize(self, image: bytes, adapter: str) -> api.Recognised:
        ranking = await self.rank(image, ["cat", "dog"], adapter)
        candidates = [Candidate(0, "cat", -0.1), Candidate(1, "dog", -2.0)]
        return api.Recognised(candidates, ranking, ranking.order, (0.25, 0.75))

    async def detect(self, image: bytes, boxes_xyxy: list[api.Box], adapter: str) -> list[api.Recognised]:
        self.boxes = boxes_xyxy
        return [await self.recognize(image, adapter) for _ in boxes_xyxy]

    async def support(self, class_id: int, place: int) -> bytes | None:
        return None

    async def health(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Backend]]:
    backend = Backend()
    app = api.create_app(backend, config.Serve(), hashlib.sha256(TOKEN.encode()).digest())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who comes before the server is up waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", backend
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def known_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.TOKEN, TOKEN)
    monkeypatch.setattr(client, "JITTER", wait_none())


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(data, "PNG")
    return data.getvalue()


def test_answers_are_typed_and_the_picture_arrives_as_it_is(served: tuple[str, Backend], tmp_path: Path) -> None:
    url, backend = served
    file = tmp_path / "red.png"
    file.write_bytes(png())
    answer = Client(url).rank(file, ["a cat", "a dog, or so"])
    assert (answer.best, answer.ranking, answer.scores) == ("a dog, or so", [1, 0], [-1.0, 0.0])
    assert backend.seen[-1][1] == png()
    assert Client(url).rank(png(), ["one"]).best == "one"
    found = Client(url).recognize(png())
    assert (found.class_name, found.probability, found.status) == ("dog", 0.75, RankStatus.RANKED)
    boxes = [(0.1, 1 / 3, 8, 4), (2, 2, 3, 9)]
    assert Client(url).detect(file, boxes).boxes == [found, found] and backend.boxes == boxes


def test_several_pictures_in_one_request(served: tuple[str, Backend], tmp_path: Path) -> None:
    url, backend = served
    file = tmp_path / "red.png"
    file.write_bytes(png())
    backend.first = [api.Busy()]  # of one of them: all are asked again
    good, bad, also = Client(url).classify([png(), b"no picture", file])
    assert good.answer is not None and (good.answer.class_name, good.error) == ("dog", None) and also == good
    assert bad.answer is None and bad.error is not None and "not a readable" in bad.error


def test_many_at_once_in_one_session(served: tuple[str, Backend]) -> None:
    url, _ = served

    async def run() -> list[str]:
        async with AsyncClient(url) as asker:
            return [one.best for one in await asyncio.gather(*(asker.rank(png(), ["cat", f"{n}"]) for n in range(20)))]

    assert asyncio.run(run()) == [str(number) for number in range(20)]


def test_a_full_queue_is_waited_for_as_long_as_it_asks(served: tuple[str, Backend]) -> None:
    url, backend = served
    backend.first = [api.Busy(), Unavailable("the ranker is starting")]
    assert Client(url).recognize(png()).class_name == "dog"
    (first, _), (second, _), (third, _) = backend.seen[-3:]
    assert second - first >= api.RETRY_AFTER_S and third - second >= api.RETRY_AFTER_S


def test_what_a_server_refuses_is_one_line(served: tuple[str, Backend], tmp_path: Path) -> None:
    url, backend = served
    backend.first = [RowError("cut off")]
    calls = len(backend.seen)
    with pytest.raises(UserError, match=r"image: cut off \(422\)"):
        Client(url).recognize(png())
    assert len(backend.seen) == calls + 1
    with pytest.raises(UserError, match=r"there already.*422"):
        Client(url).rank(png(), ["cat", "cat"])
    with pytest.raises(UserError, match=r"asks for its token.*401"):
        Client(url, token="wrong").recognize(png())
    with pytest.raises(UserError, match="404"):
        Client(f"{url}/elsewhere").recognize(png())
    with pytest.raises(UserError, match="cannot be read"):
        Client(url).recognize(tmp_path / "none.png")


def test_a_server_that_is_away() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="2 attempts"):
            Client(f"http://127.0.0.1:{unused.getsockname()[1]}", attempts=2).recognize(png())


def test_the_command_for_a_person_and_for_a_program(served: tuple[str, Backend], tmp_path: Path) -> None:
    url, backend = served
    file = tmp_path / "red.png"
    file.write_bytes(png())
    told = CliRunner().invoke(command, ["ask", str(file), "--url", url])
    assert told.exit_code == 0
    assert told.stdout.splitlines() == [f"{file} (ranked)", "    75.0%  dog", "    25.0%  cat"]
    told = CliRunner().invoke(command, ["ask", str(file), "--url", url, "--candidate", "x", "--candidate", "y", "--json"])
    assert json.loads(told.stdout)["best"] == "y"
    backend.wait_s, backend.most_busy = 0.05, 0
    told = CliRunner().invoke(command, ["ask", *[str(file)] * 20, "--url", url])
    assert told.stdout.count("75.0%  dog") == 20 and backend.most_busy == 8  # in flight, printed in order
    backend.wait_s = 0.0
    told = CliRunner().invoke(command, ["ask", str(tmp_path / "none.png"), "--url", url])
    assert told.exit_code == 2 and "cannot be read" in told.output
    told = CliRunner().invoke(command, ["ask", str(file), "--url", url, "--box", "0,0,9,9", "--box", "1,1,4,4.5"])
    assert told.stdout.splitlines()[1:] == ["    75.0%  dog in 0,0,9,9", "    75.0%  dog in 1,1,4,4.5"]
    told = CliRunner().invoke(command, ["ask", str(file), "--url", url, "--box", "0,0,9"])
    assert told.exit_code == 2 and "not four numbers" in told.output
