"""Chat completions as bytes: what is read from a reply, whatever it is, and how a picture is put into a request."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import re
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

LEAST_LOGPROB = -1e4  # servers write -9999 or -inf for what is outside their top
MAX_REASON_CHARS = 300
MAX_RETRY_AFTER_S = 60.0
LOSSLESS_PIXELS = 512 * 512
SECONDS = re.compile(r"\d{1,9}(\.\d*)?")


class Fault(Exception):
    """The request may succeed when it is repeated. retry_after_s: how long the server asks to wait."""

    def __init__(self, reason: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s


class Away(Fault):
    """Nobody listens at the server's address."""


class Refused(Exception):
    """The server will not take this request."""


class Reply(NamedTuple):
    """What is used of a chat completion. top: the likeliest first tokens, with log-probabilities; empty where not offered."""

    text: str
    top: list[tuple[str, float]]
    prompt_tokens: int
    output_tokens: int


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
    choice = at(body, "choices", 0)
    message = at(choice, "message")
    if not isinstance(message, dict):
        raise Fault(f"the reply is no chat completion: {data[:80]!r}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [at(part, "text") if isinstance(part, dict) else part for part in parts]
    counts = [token_count(at(body, "usage", name)) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(encodable("".join(text for text in texts if isinstance(text, str))), _top(choice), *counts)


def retry_after_s(header: str) -> float:
    """Seconds to wait by a Retry-After header (seconds or a date), at most MAX_RETRY_AFTER_S; 0 for none or nonsense."""
    if SECONDS.fullmatch(header.strip()):
        return min(float(header), MAX_RETRY_AFTER_S)
    try:
        date = email.utils.parsedate_to_datetime(header)
        return min(max(date.timestamp() - time.time(), 0.0), MAX_RETRY_AFTER_S)
    except (ValueError, OverflowError, OSError):
        return 0.0


def encodable(text: str) -> str:
    """JSON may hold halves of a surrogate pair, which UTF-8 and so Parquet cannot."""
    return text.encode(errors="replace").decode()


def _top(choice: Any) -> list[tuple[str, float]]:
    listed = at(choice, "logprobs", "content", 0, "top_logprobs")
    pairs = [(at(each, "token"), at(each, "logprob")) for each in listed] if isinstance(listed, list) else []
    return [
        (token, float(min(max(score, LEAST_LOGPROB), 0.0)))
        for token, score in pairs
        if isinstance(token, str) and is_number(score)
    ]


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not (isinstance(value, float) and math.isnan(value))


def token_count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 31 else 0


def at(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]..., or None where a step is not there."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and len(value) > step:
            value = value[step]
        else:
            return None
    return value
