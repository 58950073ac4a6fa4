"""Chat completions of an OpenAI-compatible server: one request about one picture, sent until it is answered.

`Server.send` gives a Reply or raises: UserError (wrong key, address or model), Refused (the server will not take this request,
however often it is sent), or Fault (time-out, 408, 425, 429, 5xx, a dropped connection, a reply that is no completion), after
`attempts` tries with growing random pauses, longer by the Retry-After that the server asks for. So a request is answered or
given up within attempts * (timeout_s + MAX_RETRY_AFTER_S + MAX_JITTER_S).

aiohttp comes with ray[serve]; its time-out is of the whole request, where others' begins anew with every byte of a slow reply.
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import os
import re
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rar.config import Ranker
from rar.schema import UserError

KEY = "RAR_API_KEY"
LEAST_LOGPROB = -1e4  # servers write -9999 or -inf for what is outside their top
MAX_REPLY_BYTES = 4 << 20
MAX_REASON_CHARS = 300
MAX_RETRY_AFTER_S = 60.0
MAX_JITTER_S = 30.0
LOSSLESS_PIXELS = 512 * 512

SECONDS = re.compile(r"\d{1,9}(\.\d*)?")
JITTER = wait_random_exponential(multiplier=1, max=MAX_JITTER_S)  # up to 1, 2, 4, ... seconds


class Fault(Exception):
    """The request may succeed when it is repeated. retry_after_s: how long the server asks to wait."""

    def __init__(self, reason: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s


class Refused(Exception):
    """The server will not take this request."""


class Reply(NamedTuple):
    """What is used of a chat completion. top: the likeliest first tokens, with log-probabilities; empty where not offered."""

    text: str
    top: list[tuple[str, float]]
    prompt_tokens: int
    output_tokens: int


class Server:
    """Asks the server at settings.base_url; the key is the environment's RAR_API_KEY. Raises UserError for no valid URL."""

    def __init__(self, settings: Ranker) -> None:
        self.base_url = settings.base_url or ""
        if not _is_http(self.base_url):
            raise UserError(
                f"ranker.base_url must be like http://host:8000/v1 for method 'endpoint', not {settings.base_url!r}"
            )
        self.timeout_s, self.attempts = settings.timeout_s, settings.attempts
        self.key = os.environ.get(KEY, "").strip()

    def session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=self.timeout_s))

    async def send(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        """Raises UserError, Refused, or the last of `attempts` Faults."""
        tries = stop_after_attempt(self.attempts)
        patiently = AsyncRetrying(retry=retry_if_exception_type(Fault), stop=tries, wait=_pause_s, reraise=True)
        return await patiently(self._once, session, body)

    async def _once(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        url = self.base_url.rstrip("/") + "/chat/completions"
        try:
            async with session.post(url, json=body, allow_redirects=False) as response:
                data = await _read(response)
        except TimeoutError:
            raise Fault(f"no reply within {self.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(_encodable(f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS])) from None
        status, reason = response.status, self._reason(response.status, data)
        if status < 300:
            return read_reply(data)
        if status in (401, 402, 404, 405) or status < 400:
            raise UserError(f"{self.base_url} {reason}: check ranker.base_url, ranker.model and the key in {KEY}")
        if status in (408, 425, 429, 500) or status > 501:
            raise Fault(reason, status, retry_after_s(response.headers.get("Retry-After", "")))
        raise Refused(reason)

    def _reason(self, status: int, data: bytes) -> str:
        """One line of what the server says, without the key."""
        said = " ".join(data[: 8 * MAX_REASON_CHARS].decode(errors="replace").split())
        said = said.replace(self.key, "***") if self.key else said
        return f"answered {status} {said[:MAX_REASON_CHARS]}".strip()


def data_url(image: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB as a data: URL; the server fetches nothing.

    PNG, so that small images and crops arrive as they are, and a server ranks as a local model would. Beyond LOSSLESS_PIXELS
    JPEG of quality 95 with full colour, as a photo's PNG is two to four times its size.
    """
    buffer = io.BytesIO()
    if image.shape[0] * image.shape[1] <= LOSSLESS_PIXELS:
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_reply(data: bytes) -> Reply:
    """The body of a chat completion. Raises Fault for anything else, whatever it is."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Fault(f"the reply is no JSON: {data[:80]!r}") from None
    choice = _at(body, "choices", 0)
    message = _at(choice, "message")
    if not isinstance(message, dict):
        raise Fault(f"the reply is no chat completion: {data[:80]!r}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [_at(part, "text") if isinstance(part, dict) else part for part in parts]
    counts = [_count(_at(body, "usage", name)) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(_encodable("".join(text for text in texts if isinstance(text, str))), _top(choice), *counts)


def retry_after_s(header: str) -> float:
    """Seconds to wait by a Retry-After header (seconds or a date), at most MAX_RETRY_AFTER_S; 0 for none or nonsense."""
    if SECONDS.fullmatch(header.strip()):
        return min(float(header), MAX_RETRY_AFTER_S)
    try:
        date = email.utils.parsedate_to_datetime(header)
        return min(max(date.timestamp() - time.time(), 0.0), MAX_RETRY_AFTER_S)
    except (ValueError, OverflowError, OSError):
        return 0.0


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


def _pause_s(state: RetryCallState) -> float:
    """What the server asks for, and jitter, so that callers do not come back together."""
    error = state.outcome.exception() if state.outcome else None
    return JITTER(state) + (error.retry_after_s if isinstance(error, Fault) else 0.0)


def _encodable(text: str) -> str:
    """JSON may hold halves of a surrogate pair, which UTF-8 and so Parquet cannot."""
    return text.encode(errors="replace").decode()


def _top(choice: Any) -> list[tuple[str, float]]:
    listed = _at(choice, "logprobs", "content", 0, "top_logprobs")
    pairs = [(_at(each, "token"), _at(each, "logprob")) for each in listed] if isinstance(listed, list) else []
    return [(token, _logprob(score)) for token, score in pairs if isinstance(token, str) and _is_number(score)]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not (isinstance(value, float) and math.isnan(value))


def _logprob(score: float) -> float:
    return float(min(max(score, LEAST_LOGPROB), 0.0))


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 31 else 0


def _at(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]..., or None where a step is not there."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and len(value) > step:
            value = value[step]
        else:
            return None
    return value
