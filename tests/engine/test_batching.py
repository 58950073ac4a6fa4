"""The batcher against its promises, on a clock of the test's own making: events, not sleeps."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar.engine.batching import Batcher


class Slow:
    """Doubles numbers when told to go on; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(items)
        await self.go.wait()
        return [ValueError(f"{item} is odd") if item % 2 else item * 2 for item in items]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_arrives_during_one_batch_is_the_next_one() -> None:
    async def run() -> list[list[int]]:
        work = Slow()
        batcher = Batcher(work, lambda items: len(items) <= 4, 0.0)
        first = asyncio.create_task(batcher(0))
        await settle()
        others = [asyncio.create_task(batcher(2 * number)) for number in range(1, 7)]
        await settle()
        assert work.batches == [[0]]
        work.go.set()
        assert await asyncio.gather(first, *others) == [0, 4, 8, 12, 16, 20, 24]
        return work.batches

    assert asyncio.run(run()) == [[0], [2, 4, 6, 8], [10, 12]]


def test_two_lanes_work_at_the_same_time_and_no_more() -> None:
    async def run() -> list[list[int]]:
        work = Slow()
        batcher = Batcher(work, lambda items: len(items) <= 2, 0.0, lanes=2)
        asking = [asyncio.create_task(batcher(2 * number)) for number in range(5)]
        await settle()
        assert work.batches == [[0, 2], [4, 6]]
        work.go.set()
        assert await asyncio.gather(*asking, batcher(10)) == [0, 4, 8, 12, 16, 20]
        await settle()
        assert not batcher.workers
        return work.batches

    assert asyncio.run(run())[2:] == [[8, 10]]


def test_who_comes_while_the_last_worker_leaves_is_answered() -> None:
    async def run() -> None:
        work = Slow()
        work.go.set()
        batcher = Batcher(work, lambda items: True, 0.0)

        async with asyncio.timeout(5):
            for turns in range(8):
                assert await batcher(2) == 4
                for _ in range(turns):  # of the loop, after an answer
                    await asyncio.sleep(0)

    asyncio.run(run())


def test_one_fault_is_its_own_callers_alone_and_the_batcher_goes_on() -> None:
    async def run() -> None:
        work = Slow()
        work.go.set()
        batcher = Batcher(work, lambda items: True, 0.0)
        found = await asyncio.gather(batcher(2), batcher(3), batcher(4), return_exceptions=True)
        assert found[0] == 4 and found[2] == 8 and str(found[1]) == "3 is odd"
        assert await batcher(6) == 12 and len(work.batches) == 2

    asyncio.run(run())


def test_an_error_of_the_work_reaches_every_caller() -> None:
    async def broken(items: list[int]) -> list[int | Exception]:
        raise RuntimeError("out of memory")

    async def run() -> None:
        batcher = Batcher(broken, lambda items: True, 0.0)
        for error in await asyncio.gather(batcher(1), batcher(2), return_exceptions=True):
            assert isinstance(error, RuntimeError)

    asyncio.run(run())


def test_a_caller_that_went_away_is_not_worked_for() -> None:
    async def run() -> list[list[int]]:
        work = Slow()
        batcher = Batcher(work, lambda items: True, 0.0)
        first = asyncio.create_task(batcher(0))
        await settle()
        gone, stays = asyncio.create_task(batcher(2)), asyncio.create_task(batcher(4))
        await settle()
        gone.cancel()
        work.go.set()
        assert await asyncio.gather(first, stays) == [0, 8]
        with pytest.raises(asyncio.CancelledError):
            await gone
        return work.batches

    assert asyncio.run(run()) == [[0], [4]]


@settings(max_examples=100)
@given(st.lists(st.integers(1, 9).map(lambda number: 2 * number), max_size=40), st.integers(1, 40))
def test_every_item_is_answered_in_order_and_no_batch_is_over_its_limit(items: list[int], limit: int) -> None:
    async def run() -> None:
        work = Slow()
        work.go.set()
        batcher = Batcher(work, lambda batch: sum(batch) <= limit, 0.0)
        assert await asyncio.gather(*(batcher(item) for item in items)) == [2 * item for item in items]
        assert [item for batch in work.batches for item in batch] == items
        assert all(len(batch) == 1 or sum(batch) <= limit for batch in work.batches)
        assert all(sum(batch) + following[0] > limit for batch, following in pairwise(work.batches))  # as full as can be

    asyncio.run(run())
