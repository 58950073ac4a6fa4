"""One driver at a time in a run folder: two would undo each other's marks, and the one that ends first would miss rows.

File systems' own locks are not there on object stores, and not kept by every shared disk. So the driver leaves a file
that says who it is and counts up while it lives. Another one on the same machine sees by the process whether it does; one on
another machine waits for the next counts, and takes over where none comes: no clocks are compared. It costs STILL_S before a
run is taken over from a machine that died, and two drivers that begin within the same second of each other on an object store
may both begin. A driver that stood still for so long and was taken over from goes on, without a sign of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rar import storage
from rar.schema import UserError

BEAT_S, STILL_S = 5.0, 30.0


@contextmanager
def driving(folder: Path, beat_s: float = BEAT_S, still_s: float = STILL_S) -> Iterator[None]:
    """Raises UserError where another driver is at work in a run folder. A folder that holds nothing afterwards is removed."""
    file = folder / storage.DRIVER
    own = {"machine": socket.gethostname(), "process": os.getpid(), "driver": uuid.uuid4().hex}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (known := _read(file)) is not None and _lives(file, known, still_s):
            raise UserError(
                f"{folder}: process {known['process']} on {known['machine']} is at work on this run; wait for it, or stop it "
                "first"
            )
        _write(file, own, 0)
    except OSError as error:
        if error.errno in storage.FULL:
            raise
        raise UserError(f"--out {folder} cannot be made or written: {error.strerror}; choose another") from None
    if (now := _read(file)) is not None and now["driver"] != own["driver"]:
        raise UserError(f"{folder}: process {now['process']} on {now['machine']} began this run at the same time")
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, own, over, beat_s), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        if _is_ours(file, own):
            file.unlink(missing_ok=True)
        if isinstance(folder, os.PathLike):  # elsewhere an empty folder is nothing, and a UPath's rmdir takes all that is in it
            with suppress(OSError):
                folder.rmdir()


def _beat(file: Path, own: dict[str, Any], over: threading.Event, beat_s: float) -> None:
    count = 0
    while not over.wait(beat_s):
        count += 1
        with suppress(OSError):  # a run ends by what it writes itself, not by this
            if _is_ours(file, own):
                _write(file, own, count)


def _is_ours(file: Path, own: dict[str, Any]) -> bool:
    """Or nobody's, as --fresh empties the folder; not that of a driver which took over while this one stood still."""
    known = _read(file)
    return known is None or known["driver"] == own["driver"]


def _lives(file: Path, known: dict[str, Any], still_s: float) -> bool:
    if known["machine"] == socket.gethostname():
        try:
            os.kill(known["process"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's
    print(f"  {file.parent} has a driver on {known['machine']}; looking whether it lives", file=sys.stderr, flush=True)
    until = time.monotonic() + still_s
    while time.monotonic() < until:
        time.sleep(min(1.0, still_s / 10))
        now = _read(file)
        if now is None:
            return False  # it has just ended
        if now != known:
            return True
    return False


def _write(file: Path, own: dict[str, Any], count: int) -> None:
    storage.write(file, json.dumps({**own, "count": count}).encode())


def _read(file: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):  # none, or torn
        return None
    return known if isinstance(known, dict) and {"machine", "process", "driver"} <= known.keys() else None
