"""How many requests a server gets at once: found out, and found out again when the server changes.

Additive increase, multiplicative decrease, as TCP does it, on two signs. A server that says "too many" (429, 503, a time-out)
gets MULTIPLY times as many, and the number that was too many is not tried again for a while. A server that says nothing and
lets requests wait is judged by its latency: by Little's law n requests that take t seconds each are n / t answers a second, so
a larger n whose t grows as much serves nobody faster, and a smaller one at the same rate costs nothing. The number is doubled
while that pays, then raised by an eighth, then lowered by a fifth, and rests where neither pays.

What it costs: a level is held for about three times its number of requests before it is judged; short jobs run at a guess.
Only requests that began with the level full count, so that a caller with little work teaches nothing wrong.
"""

from __future__ import annotations

from typing import NamedTuple

FIRST = 4
LEAST_SAMPLES = 8
MULTIPLY = 0.7  # after a refusal
LOWER = 0.8
GAIN = 0.1  # a step up pays if the rate grows by this much of what it would with a server without bounds
LOSS = 0.03  # a step down pays if the rate falls by no more
COLLAPSE = 0.5  # of the rate at a level that rests: the server has changed
REST, LONGEST_REST = 4, 32  # judgements at a level before others are tried again


class Began(NamedTuple):
    """A request under way. level: the number of the level that it belongs to; -1 where that was not full."""

    at: float
    level: int


class Pace:
    """The limit of one server, at most `most`. Times are seconds of any one clock."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(FIRST, most)
        self.busy = 0
        self.level = 0  # counts changes of the limit
        self.skipped, self.latencies = 0, list[float]()
        self.kept: tuple[int, float] | None = None  # the best level so far and its rate; None: to be measured
        self.ceiling = most + 1  # a number that was too many
        self.doubling = True
        self.rest, self.patience = 0, REST

    def room(self) -> bool:
        return self.busy < self.limit

    def begin(self, now: float) -> Began:
        self.busy += 1
        return Began(now, self.level if self.busy >= self.limit else -1)

    def end(self, began: Began, now: float, *, too_many: bool = False) -> None:
        """too_many: the server's word for it, or no answer in time."""
        self.busy -= 1
        if too_many:
            if began.level == self.level:  # else it was sent before the last change, which answers for it
                self._cut()
        elif began.level == self.level:
            if self.skipped < self.limit:  # sent while the server was still busy with the level before
                self.skipped += 1
                return
            self.latencies.append(max(now - began.at, 1e-9))
            if len(self.latencies) >= max(LEAST_SAMPLES, 2 * self.limit):
                self._judge()

    def _cut(self) -> None:
        self.ceiling, self.doubling, self.kept, self.rest = self.limit, False, None, 0
        self.patience = min(2 * self.patience, LONGEST_REST)
        self._set(max(1, int(MULTIPLY * self.limit)))

    def _judge(self) -> None:
        limit = self.limit
        rate = limit * len(self.latencies) / sum(self.latencies)
        self.latencies.clear()
        if self.kept is None or limit == self.kept[0]:
            if self.kept is not None and rate < COLLAPSE * self.kept[1]:
                self.kept = None
                return self._set(max(1, int(MULTIPLY * limit)))
            self.kept = (limit, rate)
            if self.rest:
                self.rest -= 1
                if not self.rest:
                    self.ceiling = self.most + 1
                return None
            return self._raise()
        best, best_rate = self.kept
        if limit > best and rate >= best_rate * (1 + GAIN * (limit / best - 1)):
            self.kept = (limit, rate)
            return self._raise()
        if limit < best and rate >= best_rate * (1 - LOSS):
            self.kept = (limit, rate)
            return self._lower()
        if limit > best:
            self.doubling, self.limit = False, best
            return self._lower()
        return self._settle(best)

    def _raise(self) -> None:
        step = self.limit if self.doubling else max(1, self.limit // 8)
        higher = min(self.limit + step, self.ceiling - 1, self.most)
        self._set(higher) if higher > self.limit else self._lower()

    def _lower(self) -> None:
        lower = int(LOWER * self.limit)
        self._set(lower) if lower else self._settle(self.limit)

    def _settle(self, limit: int) -> None:
        self.rest = self.patience
        self.patience = min(2 * self.patience, LONGEST_REST)
        self._set(limit)

    def _set(self, limit: int) -> None:
        self.limit = limit
        self.level += 1
        self.skipped = 0
        self.latencies.clear()
