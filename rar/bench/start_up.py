"""How long a command takes that has next to nothing to do, each in a process of its own, and where its driver's time goes.

The share of a phase is told by looking at the main thread's stack every 20 ms: a look counts for the innermost function that is
in PHASES. So nothing in the command is changed, imports are seen wherever they stand, and what is beside the main thread (a
ranker that loads while the encoder does) shows as the wait that it causes. Cost: a phase of fewer than some 50 ms is noise.
`python` is what is over before the first look and after the last: the interpreter's own start and end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from rar.bench.timing import spread
from rar.miniature.data import write_world
from rar.schema import Unavailable

LOOK = """
import collections, json, os, sys, threading, time
names, looks, main = {names!r}, collections.Counter(), threading.main_thread().ident
def look():
    while True:
        frame, name = sys._current_frames().get(main), "other"
        while frame is not None:
            key = os.path.basename(frame.f_code.co_filename) + ":" + frame.f_code.co_name
            if key in names:
                name = names[key]
                break
            frame = frame.f_back
        looks[name] += 1
        time.sleep(0.02)
began = time.perf_counter()
threading.Thread(target=look, daemon=True).start()
try:
    from jobs.cli import main as command
    command()
finally:
    total, seconds = sum(looks.values()), time.perf_counter() - began
    json.dump({{name: count / total * seconds for name, count in looks.items()}}, open({told!r}, "w"))
"""
PHASES = {
    "<frozen importlib._bootstrap>:_find_and_load": "imports",
    "session.py:_start": "Ray starts",
    "worker.py:shutdown": "Ray ends",
    "store.py:open_store": "Milvus opens and closes",
    "vocabulary.py:open_memory": "memory and encoder load",
    "recognise.py:prepare": "ranker loads, beyond that",
    "calibrate.py:calibrate": "calibration",
    "recognise.py:run": "rows",
    "recognise.py:finish": "metrics",
    "nearest.py:keep": "pictures for the page",
    "page.py:write_report": "page",
}
Row = dict[str, Any]


def run(repeats: int = 3) -> Row:
    """{command: {"seconds": median, "low":, "high":, "phases": {name: seconds, of the median run}}}.

    help, config: no run at all. one: a picture that is classified without a ranker; ranked: with letters, asked in any case;
    again: `ranked` once more, finished before. `one written`, `ranked written`: until the prediction is on disk, after which a
    command measures, draws its page and ends Ray.
    """
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        write_world(folder / "world", 0, shots=1, tests=1, scenes=1)
        _started(folder, ["memory", _config(folder), "--out", str(folder / "memory")])
        result: Row = {}
        for name, arguments in {
            "help": ["--help"],
            "config": ["config"],
            "one": ["classify", _config(folder), "--fresh", "--out", str(folder / "one"), "--set", "ranker.method=none"],
            "ranked": ["classify", _config(folder), "--fresh", "--out", str(folder / "ranked"), "--set", "route.mode=always"],
            "again": ["classify", _config(folder), "--out", str(folder / "ranked"), "--set", "route.mode=always"],
        }.items():
            runs, written = [], []
            for _ in range(repeats):
                began = time.time()
                runs.append(_started(folder, arguments))
                written += [file.stat().st_mtime - began for file in (folder / name / "predictions").glob("*.parquet")]
            runs.sort(key=lambda one: one[0])
            middle = runs[len(runs) // 2]
            result[name] = spread([one[0] for one in runs])
            result[name]["phases"] = dict(sorted(middle[1].items(), key=lambda one: -one[1]))
            if written:
                result[f"{name} written"] = spread(written)
    return {"commands": result, "repeats": repeats}


def _config(folder: Path) -> str:
    file = folder / "start_up.yaml"
    world = folder / "world" / "novel"
    memory = {"uri": str(folder / "memory.milvus"), "support": {"uri": str(world / "support")}}
    file.write_text(yaml.safe_dump({"corpus": {"uri": str(world / "test"), "limit": 1}, "memory": memory}))
    return str(file)


def _started(folder: Path, arguments: list[str]) -> tuple[float, dict[str, float]]:
    """(seconds, phases) of a command. Raises Unavailable where it fails."""
    told = folder / "phases.json"
    script = LOOK.format(names=PHASES, told=str(told))
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise Unavailable(f"rar {arguments[0]} ended with {done.returncode}: {done.stderr[-800:]}")
    phases = json.loads(told.read_text())
    return seconds, phases | {"python": seconds - sum(phases.values())}
