"""Lanes, a batch a core each, and the clock that several threads share.

Not covered: how fast lanes are (`rar bench rank`, `end-to-end`).
"""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rar import device
from rar.device import LANES, Lanes, SharedClock


def test_torch_is_imported_late() -> None:
    code = "import sys, rar.device; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("three_threads")
def test_lanes_work_at_once_on_a_share_of_the_threads_and_leave_the_others_alone() -> None:
    lanes, meeting = Lanes(torch.device("cpu")), threading.Barrier(3)

    def work(number: int) -> tuple[int, int]:
        meeting.wait(60)  # breaks where fewer than three are at work
        return number, torch.get_num_threads()

    assert lanes.count == 3 and lanes.map(work, range(6)) == [(number, 1) for number in range(6)]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2 * LANES + 1)
    many = Lanes(torch.device("cpu"))
    assert many.count == LANES and set(many.map(lambda _: torch.get_num_threads(), range(9))) == {2}


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("kind", "most"), [("cpu", 1), ("meta", LANES)])
def test_one_lane_is_the_caller_itself(kind: str, most: int) -> None:
    lanes = Lanes(torch.device(kind), most)
    assert lanes.count == 1 and set(lanes.map(lambda _: threading.get_ident(), "abc")) == {threading.get_ident()}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 9)), max_size=30))
def test_a_shared_clock_gives_out_the_time_in_which_somebody_works(events: list[tuple[str, float]]) -> None:
    """Each event lets time pass, then somebody begins or ends. Oracle: every stretch of time, cut by who was at work in it."""
    now, clock = [0.0], SharedClock.__new__(SharedClock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device.time, "perf_counter", lambda: now[0])
        clock.__init__()  # type: ignore[misc]
        turns: dict = {}
        due = dict.fromkeys("abc", 0.0)
        told = dict.fromkeys("abc", 0.0)
        for who, passed in events:
            now[0] += passed
            for one in turns:
                due[one] += passed / len(turns)
            if who in turns:
                turn, taken = turns.pop(who)
                told[who] += taken()
                turn.__exit__(None, None, None)
            else:
                turn = clock.turn()
                turns[who] = (turn, turn.__enter__())
        for who, (turn, taken) in turns.items():
            told[who] += taken()
            turn.__exit__(None, None, None)
    assert told == pytest.approx(due, abs=1e-6)
