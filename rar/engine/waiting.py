"""Waits that end: what is waited for is said every 10 s, in the words of who knows; after its patience it is Unavailable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rar.schema import Unavailable

SAID_EVERY_S = 10.0


def until(ready: Callable[[float], bool], told: Callable[[], str], what: str, patience_s: float) -> None:
    """Return when `ready` is true; it is given the seconds it may take. told: what keeps it, asked when that is said."""
    began = time.monotonic()
    said = 0.0
    while not ready(min(1.0, patience_s)):
        waited = time.monotonic() - began
        if waited >= patience_s:
            raise Unavailable(f"{what} did not come within run.patience_s {patience_s:g}: {told()}")
        if waited - said >= SAID_EVERY_S:
            said = waited
            print(f"  waiting for {what} ({waited:.0f} s): {told()}", file=sys.stderr, flush=True)
