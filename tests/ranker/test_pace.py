"""The pace against engines in virtual time: three kinds of latency and one that refuses, each beside every fixed number.

Times are simulated, so that a busy machine changes nothing. The pace over real HTTP is in
test_endpoint.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from rar.ranker.pace import Began, Pace

MOST, SECONDS = 64, 20.0
FIXED = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64)


@dataclass
class Engine:
    """Latencies (seconds) by the number of requests at work, with 20 % of noise. 20 places, or a knee at 24."""

    kind: str
    random: random.Random
    busy: int = 0
    free_at: list[float] = field(default_factory=lambda: [0.0] * 20)

    def take(self, now: float) -> tuple[float, bool]:
        """(when the answer comes, whether it is a refusal)."""
        self.busy += 1
        noise = self.random.uniform(0.8, 1.2)
        if self.kind == "places":  # the others wait in its queue
            done = max(now, heapq.heappop(self.free_at)) + 0.05 * noise
            heapq.heappush(self.free_at, done)
            return done, False
        if self.kind == "shared":  # everybody gets a part of it: never full, ever less worth it
            return now + (0.05 + 0.004 * self.busy) * noise, False
        if self.kind == "thrashing":  # beyond the knee, more requests cost more than they bring
            return now + (0.05 + 0.001 * self.busy + 0.001 * max(0, self.busy - 24) ** 2) * noise, False
        refused = self.busy > 20
        return now + (0.002 if refused else 0.05 * noise), refused


class Fixed(Pace):
    """Always `most`."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.limit = most

    def end(self, began: Began, now: float, *, too_many: bool = False) -> None:
        self.busy -= 1


def rate(kind: str, pace: Pace, seed: int = 0) -> float:
    """Answers a second in the second half of the time."""
    engine, now, asked, answered = Engine(kind, random.Random(seed)), 0.0, 0, 0
    under_way: list[tuple[float, int, Began, bool]] = []
    while now < SECONDS:
        while pace.room():
            done, refused = engine.take(now)
            asked += 1
            heapq.heappush(under_way, (done, asked, pace.begin(now), refused))
        now, _, began, refused = heapq.heappop(under_way)
        engine.busy -= 1
        pace.end(began, now, too_many=refused)
        answered += now > SECONDS / 2 and not refused
    return answered / (SECONDS / 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["places", "shared", "thrashing", "refusing"])
def test_the_pace_is_within_a_fifth_of_the_best_fixed_number(kind: str) -> None:
    best = max(rate(kind, Fixed(number)) for number in FIXED)
    assert min(rate(kind, Pace(MOST), seed) for seed in range(3)) >= 0.8 * best
    assert rate(kind, Fixed(4)) < 0.8 * best  # where it starts would not do


def test_an_engine_with_places_is_not_given_many_more() -> None:
    pace = Pace(MOST)
    rate("places", pace)
    assert 16 <= pace.limit <= 32


def test_little_work_teaches_nothing() -> None:
    """One request at a time is quick; that says nothing of many."""
    pace = Pace(MOST)
    for step in range(1000):
        pace.end(pace.begin(step), step + 0.01)
    assert (pace.limit, pace.busy, pace.room()) == (4, 0, True)


def test_one_burst_of_refusals_is_one_cut() -> None:
    pace = Pace(MOST)
    pace.limit = 40
    began = [pace.begin(0.0) for _ in range(40)]
    for each in began:
        pace.end(each, 0.1, too_many=True)
    assert pace.limit == 28


def test_a_server_that_gets_slow_gets_less_at_once() -> None:
    pace = Pace(8)
    latency, least = 0.1, 8
    for step in range(4000):
        latency = 0.1 if step < 2000 else 1.0
        while pace.room():
            began = pace.begin(0.0)
        pace.end(began, latency)
        least = min(least, pace.limit) if step >= 2000 else 8
    assert least < 8
