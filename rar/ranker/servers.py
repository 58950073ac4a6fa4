"""OpenAI-compatible servers that answer for one model: a request goes to the least busy one, until it is answered.

`Servers.post` gives an answer or raises: UserError (wrong key, address or model), Refused (no server will take this request,
however often it is sent), or Fault (time-out, 408, 425, 429, 5xx, a dropped connection, a reply that is no completion), after
`attempts` tries with growing random pauses; Away where the last of them found nobody at the address. Every server has a pace
of its own (see pace). One that asks to be left alone (Retry-After) or does not listen rests, and its share goes to the others;
then it is tried again. So a try begins when a server has room, and it and the pause after it are over within timeout_s +
MAX_RETRY_AFTER_S + MAX_JITTER_S.

aiohttp comes with ray[serve]; its time-out is of the whole request, where others' begins anew with every byte of a slow reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rar.config import Ranker
from rar.ranker.pace import Pace
from rar.ranker.wire import MAX_REASON_CHARS, Away, Fault, Refused, encodable, retry_after_s
from rar.schema import UserError

KEY = "RAR_API_KEY"
MAX_REPLY_BYTES = 4 << 20
MAX_JITTER_S = 30.0
FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0  # of a server that does not listen; doubled each time
IDLE_S = 4.0  # a connection unused for longer is opened anew: uvicorn closes it after 5 s
BUSY = (429, 503, 529)
TIMED_OUT = -1  # the status of no answer
CHAT = "chat/completions"
Answer = TypeVar("Answer")
JITTER = wait_random_exponential(multiplier=1, max=MAX_JITTER_S)  # up to 1, 2, 4, ... seconds, so that callers part


class Server:
    """One address, and what was learnt of it."""

    def __init__(self, base_url: str, most: int) -> None:
        self.base_url = base_url.rstrip("/")
        self.pace = Pace(most)
        self.rests_until, self.strikes = 0.0, 0  # strikes: how often in a row nobody listened

    def strike(self, now: float) -> None:
        self.rests_until = max(self.rests_until, now + min(FIRST_REST_S * 2**self.strikes, LONGEST_REST_S))
        self.strikes += 1


class Servers:
    """Asks the servers at settings.base_url; the key is the environment's RAR_API_KEY. Raises UserError for no valid URL."""

    def __init__(self, settings: Ranker) -> None:
        listed = settings.base_url if isinstance(settings.base_url, list) else [settings.base_url or ""]
        for url in listed or [""]:
            if not _is_http(url):
                raise UserError(f"ranker.base_url must be like http://host:8000/v1 for method 'endpoint', not {url!r}")
        self.each = [Server(url, settings.concurrency) for url in dict.fromkeys(listed)]
        self.timeout_s, self.attempts = settings.timeout_s, settings.attempts
        self.key = os.environ.get(KEY, "").strip()
        self.waiting: deque[asyncio.Future[None]] = deque()

    @property
    def name(self) -> str:
        return ", ".join(server.base_url for server in self.each)

    @property
    def away(self) -> bool:
        """Nobody listened at any address when it was last tried."""
        return all(server.strikes for server in self.each)

    def session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
        return aiohttp.ClientSession(headers=headers, connector=connector, timeout=aiohttp.ClientTimeout(total=self.timeout_s))

    async def post(
        self, session: aiohttp.ClientSession, body: dict[str, Any], read: Callable[[bytes], Answer], path: str = CHAT
    ) -> Answer:
        """What `read` (which raises Fault) makes of the answer. path: after the base URL; with a slash, beside its /v1.

        Raises UserError, Refused (also for a path but CHAT that is not there), or the last of `attempts` Faults.
        """

        async def once() -> Answer:
            server = await self._turn()
            began, too_many = server.pace.begin(time.monotonic()), False
            try:
                answer = read(await self._once(session, server, body, path))
                server.strikes = 0
                return answer
            except Fault as fault:
                too_many = fault.status in BUSY or fault.status == TIMED_OUT
                now = time.monotonic()
                if isinstance(fault, Away):
                    server.strike(now)
                server.rests_until = max(server.rests_until, now + fault.retry_after_s)
                raise
            finally:
                server.pace.end(began, time.monotonic(), too_many=too_many)
                self._wake()

        tries = stop_after_attempt(self.attempts)
        return await AsyncRetrying(retry=retry_if_exception_type(Fault), stop=tries, wait=JITTER, reraise=True)(once)

    async def _turn(self) -> Server:
        """The least busy server that has room and does not rest; waits for one."""
        while True:
            now = time.monotonic()
            free = [server for server in self.each if server.pace.room()]
            ready = [server for server in free if server.rests_until <= now]
            if ready:
                return min(ready, key=lambda server: server.pace.busy / server.pace.limit)
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            rest = min((server.rests_until - now for server in free), default=None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(turn, rest)

    def _wake(self) -> None:
        """As many as there is room for now; who finds none after all waits again, behind the others."""
        room = sum(max(0, server.pace.limit - server.pace.busy) for server in self.each)
        while room > 0 and self.waiting:
            turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

    async def _once(self, session: aiohttp.ClientSession, server: Server, body: dict[str, Any], path: str) -> bytes:
        url = server.base_url.removesuffix("/v1") + path if path.startswith("/") else f"{server.base_url}/{path}"
        try:
            async with session.post(url, json=body, allow_redirects=False) as response:
                data = await _read(response)
        except TimeoutError:
            raise Fault(f"no reply within {self.timeout_s:g} s", TIMED_OUT) from None
        except aiohttp.ClientConnectorError as error:
            raise Away(encodable(f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS])) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(encodable(f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS])) from None
        status, reason = response.status, self._reason(response.status, data)
        if status < 300:
            return data
        if path != CHAT and status in (404, 405, 501):
            raise Refused(reason)
        if status in (401, 402, 404, 405) or status < 400:
            raise UserError(f"{server.base_url} {reason}: check ranker.base_url, ranker.model and the key in {KEY}")
        if status in (408, 425, 429, 500) or status > 501:
            raise Fault(reason, status, retry_after_s(response.headers.get("Retry-After", "")))
        raise Refused(reason)

    def _reason(self, status: int, data: bytes) -> str:
        """One line of what the server says, without the key."""
        said = " ".join(data[: 8 * MAX_REASON_CHARS].decode(errors="replace").split())
        said = said.replace(self.key, "***") if self.key else said
        return f"answered {status} {said[:MAX_REASON_CHARS]}".strip()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or a bracket that is none
        return False


async def _read(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_REPLY_BYTES:
            raise Fault(f"the reply is longer than {MAX_REPLY_BYTES} bytes")
    return bytes(data)
