"""Asking a server of `rar serve` from a program: typed answers, one line an error, and patience with a full queue.

`AsyncClient` keeps a session; `Client` is the same for programs without an event loop, a session a call. Ranking changes
nothing, so a request that a full queue (429), a server not ready yet (503) or a broken connection met is sent again, after the
Retry-After that the server names and a random pause, `attempts` times in all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import aiohttp
from pydantic import BaseModel
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rar.gateway.api import Box, Classified, ClassifyResponse, DetectResponse, Mistake, RankResponse, RecognizeResponse
from rar.ranker.wire import retry_after_s
from rar.schema import Unavailable, UserError

TOKEN = "RAR_API_TOKEN"
AGAIN = (429, 502, 503, 504)
JITTER = wait_random_exponential(multiplier=0.5, max=20)
Answer = TypeVar("Answer", bound=BaseModel)
Told = TypeVar("Told")
Picture = bytes | str | Path  # an encoded image, or the file that holds one


class _Later(Exception):
    """Worth another try. after_s: how long the server asks to wait."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class AsyncClient:
    """One server. The token is the environment's RAR_API_TOKEN unless given. All methods raise UserError for what the server
    refuses, in its words, and Unavailable where it gave no answer in `attempts` tries."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 60.0, attempts: int = 6) -> None:
        self.url, self.timeout_s, self.attempts = url.rstrip("/"), timeout_s, attempts
        self.token = os.environ.get(TOKEN, "").strip() if token is None else token

    async def __aenter__(self) -> AsyncClient:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self.session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout_s))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def rank(self, picture: Picture, candidates: Sequence[str], adapter: str = "") -> RankResponse:
        return await self._send("rank", {"image": [picture]}, RankResponse, {"candidates": list(candidates)}, adapter)

    async def recognize(self, picture: Picture, adapter: str = "") -> RecognizeResponse:
        return await self._send("recognize", {"image": [picture]}, RecognizeResponse, {}, adapter)

    async def classify(self, pictures: Sequence[Picture], adapter: str = "") -> list[Classified]:
        """`recognize` of several pictures in one request, in their order; one that the server cannot read has an error."""
        return (await self._send("classify", {"images": pictures}, ClassifyResponse, {}, adapter)).pictures

    async def detect(self, picture: Picture, boxes_xyxy: Sequence[Box], adapter: str = "") -> DetectResponse:
        fields = {"boxes_xyxy": [",".join(map(str, box)) for box in boxes_xyxy]}
        return await self._send("detect", {"image": [picture]}, DetectResponse, fields, adapter)

    async def _send(
        self,
        path: str,
        pictures: Mapping[str, Sequence[Picture]],
        kind: type[Answer],
        fields: Mapping[str, Sequence[str]],
        adapter: str,
    ) -> Answer:
        form = {**fields, **({"adapter": [adapter]} if adapter else {})}
        files = [(name, await _bytes_of(picture)) for name, listed in pictures.items() for picture in listed]

        async def once() -> Answer:
            body = aiohttp.FormData()  # the pictures as they are: a third smaller than base64
            for name, image in files:
                body.add_field(name, image, filename="picture", content_type="application/octet-stream")
            for name, values in form.items():
                for value in values:
                    body.add_field(name, value)
            return await self._once(path, body, kind)

        tries = stop_after_attempt(self.attempts)
        patiently = AsyncRetrying(retry=retry_if_exception_type(_Later), stop=tries, wait=_pause_s, reraise=True)
        try:
            return await patiently(once)
        except _Later as reason:
            raise Unavailable(f"{self.url} gave no answer in {self.attempts} attempts: {reason}") from None

    async def _once(self, path: str, body: aiohttp.FormData, kind: type[Answer]) -> Answer:
        try:
            async with self.session.post(f"{self.url}/{path}", data=body, allow_redirects=False) as reply:
                text = await reply.text(errors="replace")
        except TimeoutError:
            raise _Later(f"no answer within {self.timeout_s:g} s") from None
        except aiohttp.InvalidURL:
            raise UserError(f"{self.url!r} is no address; give one like http://127.0.0.1:8000") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Later(f"{type(error).__name__}: {error}") from None
        if reply.status == 200:
            try:
                return kind.model_validate_json(text)
            except ValueError:
                raise UserError(f"{self.url}/{path} does not answer as `rar serve` does: {_line(text)}") from None
        if reply.status in AGAIN:
            raise _Later(f"{reply.status} {_line(text)}", retry_after_s(reply.headers.get("Retry-After", "")))
        raise UserError(f"{self.url}/{path}: {_line(text)} ({reply.status})")


class Client:
    """`AsyncClient` for programs without an event loop."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 60.0, attempts: int = 6) -> None:
        self.asker = AsyncClient(url, token, timeout_s, attempts)

    def rank(self, picture: Picture, candidates: Sequence[str], adapter: str = "") -> RankResponse:
        return self._run(lambda: self.asker.rank(picture, candidates, adapter))

    def recognize(self, picture: Picture, adapter: str = "") -> RecognizeResponse:
        return self._run(lambda: self.asker.recognize(picture, adapter))

    def classify(self, pictures: Sequence[Picture], adapter: str = "") -> list[Classified]:
        return self._run(lambda: self.asker.classify(pictures, adapter))

    def detect(self, picture: Picture, boxes_xyxy: Sequence[Box], adapter: str = "") -> DetectResponse:
        return self._run(lambda: self.asker.detect(picture, boxes_xyxy, adapter))

    def _run(self, ask: Callable[[], Awaitable[Told]]) -> Told:
        async def run() -> Told:
            async with self.asker:
                return await ask()

        return asyncio.run(run())


async def _bytes_of(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    try:
        return await asyncio.to_thread(Path(picture).expanduser().read_bytes)
    except OSError as error:
        raise UserError(f"{picture} cannot be read: {error.strerror}") from None


def _line(text: str) -> str:
    """What the server says is wrong."""
    try:
        said = Mistake.model_validate_json(text).error
    except ValueError:
        said = text
    return " ".join(said.split())[:300] or "no reason given"


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return JITTER(state) + (error.after_s if isinstance(error, _Later) else 0.0)
