"""The bench of whole commands: its arithmetic on rounds of known numbers, its stages alone, and (slow) the whole of it.

Not covered: speed, which `rar bench end-to-end` measures.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rar.bench import end_to_end, scale
from rar.bench.timing import compared, paired


def test_throughputs_are_compared_run_by_run() -> None:
    assert compared([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {
        **{"ours": 4.0, "reference": 3.0, "ratio": 2.0, "ratio_low": 1.0, "ratio_high": 3.0},
        "repeats": 3,
    }
    found = paired(lambda: None, lambda: sum(range(100_000)), 10, repeats=3)
    assert found["ours"] > found["reference"] and found["repeats"] == 3 and found["ratio"] > 1
    whole, tenth = (paired(lambda: None, lambda: time.sleep(0.01), 10, 1, less)["reference"] for less in (None, 1.0))
    assert 5 < whole / tenth < 20, "a tenth of the work in the same time"


def test_a_command_is_held_against_the_least_of_its_stages_alone() -> None:
    counts = {"counts": {"ok": 600}, "pipeline_seconds": 10.0}
    ended = {"slowest": "embed", **counts, "stages": {"decode": {"busy": 0.25}, "embed": {"busy": 0.9}}}
    rounds: list[dict[str, Any]] = [
        {
            **{"slope": 1 / rate, "intercept": 10.0 + rate, "alone": {"decode": 400.0, "embed": 100.0}, "run": ended},
            "processor": {"models": rate, "tasks": 0.5},
        }
        for rate in (80.0, 90.0, 50.0)
    ]
    found = end_to_end.told(rounds)
    by_size, by_pipeline = found["by_size"], found["by_pipeline"]
    told = [by_size[key] for key in ("ours", "reference", "ratio", "ratio_low", "ratio_high")]
    assert told == pytest.approx([80, 100, 0.8, 0.5, 0.9])
    assert [by_pipeline[key] for key in ("ours", "reference", "ratio")] == pytest.approx([60, 100, 0.6])
    assert found["start"] == 90 and found["stages"] == {"decode": 400, "embed": 100} and found["slowest"] == "embed"
    assert found["processor_ms"] == {"models": 80, "tasks": 0.5}
    assert found["one_after_another"] == pytest.approx(80) and found["busy"] == {"decode": 0.25, "embed": 0.9}


def test_candidates_are_the_class_and_others() -> None:
    names = end_to_end.named([*"abcdefg", "a"])
    assert all(truth in listed and len(set(listed)) == 5 for truth, listed in zip([*"abcdefg", "a"], names, strict=True))


def test_the_stages_alone_have_rates(tmp_path: Path) -> None:
    scale.write_pictures(tmp_path, 40)
    alone = end_to_end.Alone(tmp_path)
    assert len(alone.bytes) == len(alone.squares) == sum(len(batch["input_ids"]) for batch in alone.prepared) == 40
    assert min(alone.rates(("decode", "embed", "rank")).values()) > alone.paper() > 0


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ModelActor.run", "models"),
        ("ray::ServeReplica:ranker-0a1b:ranker.rank", "ranker"),
        ("ray::MapBatches(work)->Write", "tasks"),
        ("ray::IDLE", "tasks"),
        ("ray::ServeController", "others"),
        ("raylet", ""),
    ],
)
def test_what_a_process_spends_is_counted_to_what_it_is_for(title: str, role: str) -> None:
    with subprocess.Popen(["bash", "-c", f"exec -a '{title}' {sys.executable} -c 'while True: pass'"]) as process:
        try:
            deadline = time.monotonic() + 30
            while scale.processor_seconds(process.pid) < 0.2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert scale.role(process.pid) == role and 0.2 <= scale.processor_seconds(process.pid) < 30
        finally:
            process.kill()


@pytest.mark.slow
def test_whole_commands_at_two_sizes() -> None:
    found = end_to_end.run(rows=240, repeats=1)
    for name, stages in end_to_end.STAGES.items():
        assert found[name]["stages"].keys() == set(stages) and found[name]["start"] > 0
        assert found[name]["processor_ms"].keys() == set(scale.ROLES)
        assert {"read", "decode", "embed", "rank", "write"} <= found[name]["busy"].keys()
    assert found["mllm"]["ratio"] > 1 and found["mllm"]["seconds_per_1000"]["ours"] > 0
