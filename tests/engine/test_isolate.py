"""Bisection by counting: fakes that fail on chosen rows or above a size, any set of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.engine.isolate import Broken, Isolate, is_memory, parted
from rar.schema import Unavailable, UserError


class Fake:
    """Doubles its rows; raises where a poisonous one is among them, or where there are more than it has memory for."""

    def __init__(self, poison: set[int], room: int = 1000) -> None:
        self.poison, self.room = poison, room
        self.calls: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> list[int]:
        self.calls.append(list(rows))
        if len(rows) > self.room:
            raise RuntimeError("CUDA error: out of memory. Tried to allocate 2 GiB")
        if found := self.poison & set(rows):
            raise ValueError(f"cannot stand {sorted(found)}\nand more lines")
        return [2 * row for row in rows]


@given(st.data(), st.integers(1, 70))
def test_any_set_of_poisonous_rows_fails_and_no_other_in_few_calls(data: st.DataObject, n: int) -> None:
    poison = data.draw(st.sets(st.integers(0, n - 1)))
    fake = Fake(poison)
    answers = Isolate(fake)(range(n))
    assert [row for row, answer in enumerate(answers) if isinstance(answer, Exception)] == sorted(poison)
    assert all(answer == 2 * row for row, answer in enumerate(answers) if row not in poison)
    assert len(fake.calls) <= 1 + 2 * len(poison) * math.ceil(math.log2(n))
    assert fake.calls[0] == list(range(n)), "a batch is tried whole, so that a good one has the numbers it always had"


def test_the_reason_is_one_line() -> None:
    good, values, faults = parted(Isolate(Fake({1}))([0, 1, 2]))
    assert (good, values, faults) == ([0, 2], [0, 4], {1: "ValueError: cannot stand [1] and more lines"})


@given(st.integers(1, 70), st.integers(1, 70))
def test_a_batch_too_large_for_memory_is_halved_and_the_size_remembered(n: int, room: int) -> None:
    fake, relieved = Fake(set(), room), []
    isolated = Isolate(fake, lambda: relieved.append(1))
    assert isolated(range(n)) == [2 * row for row in range(n)]
    assert bool(relieved) == (n > room)
    fake.calls.clear()
    assert isolated(range(n)) == [2 * row for row in range(n)]
    assert all(len(rows) <= room for rows in fake.calls), "no batch is tried again that was too large"
    assert len(fake.calls) <= max(1, 2 * math.ceil(n / room)), "and none is smaller than half of what fits"


def test_a_row_too_large_for_memory_is_at_fault_alone() -> None:
    def work(rows: list[int]) -> list[int]:
        if 3 in rows:
            raise MemoryError
        return rows

    isolated = Isolate(work)
    assert parted(isolated(range(8)))[2] == {3: "MemoryError"}
    assert isolated.limit is None


@pytest.mark.parametrize("error", [UserError("mend it"), Unavailable("gone")])
def test_what_concerns_all_rows_is_raised_at_once(error: Exception) -> None:
    calls = []

    def work(rows: list[int]) -> list[int]:
        calls.append(rows)
        raise error

    with pytest.raises(type(error)):
        Isolate(work)(range(8))
    assert len(calls) == 1
    assert Isolate(work, raised=())(range(2)) == [error, error], "where it concerns one row alone"


def test_a_device_that_is_gone_blames_no_row() -> None:
    def work(rows: list[int]) -> list[int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(Broken, match="device-side"):
        Isolate(work)(range(8))


def test_columns_are_cut_together_and_what_is_shared_is_given_each_time() -> None:
    """And the answers are told once, with the seconds that they took."""
    noted = []

    def work(rows: list[int], names: list[str], *, sign: int) -> list[tuple[int, str]]:
        if 2 in rows:
            raise ValueError("two")
        return [(sign * row, name) for row, name in zip(rows, names, strict=True)]

    answers = Isolate(work, noted=lambda *told: noted.append(told))(range(4), "abcd", sign=-1)
    assert [one for one in answers if not isinstance(one, Exception)] == [(0, "a"), (-1, "b"), (-3, "d")]
    ((told, seconds),) = noted
    assert told is answers and seconds > 0


def test_no_rows_are_no_call() -> None:
    assert Isolate(Fake({0}))([]) == []


def test_torch_says_out_of_memory_in_its_own_type() -> None:
    import torch

    assert is_memory(torch.cuda.OutOfMemoryError("tried")) and not is_memory(ValueError("odd shape"))
