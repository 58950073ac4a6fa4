"""A batch that fails -> exactly the rows that make it fail, and the answers of the others. The one piece of code for the
encoder, the detector and the ranker; it knows nothing of any of them.

A model fails for many reasons that no type tells apart: a picture whose shape its processor refuses, a batch that is too large
for memory, a GPU that is gone. What tells them apart is trying again with fewer rows: a batch that fails is halved until the
row is found that fails alone. That costs about 2 log2(n) calls a faulty row. A batch that never fails goes through in one call,
so its numbers are what they would be without this file; those of a halved one may differ in their last digits.

Memory: where the halves of a batch that ran out of it work, the size that worked is kept, and later batches are no larger. A
row that runs out of memory alone is at fault itself, and changes no later batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from rar.schema import RowError, Unavailable, UserError

Answer = TypeVar("Answer")
REASON_CHARS = 300


class Broken(Exception):
    """The device answers nothing more in this process, whatever it is asked (a sticky CUDA error): only a new one helps."""


class Isolate(Generic[Answer]):
    """Calls `work`, columns of rows -> one answer a row, and gives each row its answer, or the exception that it raises alone.

    relieve: called after running out of memory, before the next try; e.g. torch.cuda.empty_cache. raised: what concerns all
    rows and is raised as it is. noted: told the answers of a batch and the seconds that they took. `limit` is the largest batch
    that is tried; None until one was too large for memory.
    """

    def __init__(
        self,
        work: Callable[..., Sequence[Answer]],
        relieve: Callable[[], object] = lambda: None,
        raised: tuple[type[Exception], ...] = (UserError, Unavailable),
        noted: Callable[[list[Answer | Exception], float], object] = lambda answers, seconds: None,
    ) -> None:
        self.work, self.relieve, self.raised, self.noted = work, relieve, raised, noted
        self.limit: int | None = None

    def __call__(self, *columns: Sequence[Any], **shared: Any) -> list[Answer | Exception]:
        """columns: what `work` takes, a value a row. shared: what it takes once. Raises Broken, and the errors of `raised`."""
        started, count = time.perf_counter(), len(columns[0])
        size = self.limit or count or 1
        answers: list[Answer | Exception] = []
        for start in range(0, count, size):
            part = [list(column[start : start + size]) for column in columns]
            try:
                answers += self.work(*part, **shared)
            except self.raised:
                raise
            except Exception as error:
                answers += self._found(part, shared, error)
        self.noted(answers, time.perf_counter() - started)
        return answers

    def _found(self, columns: list[list], shared: dict[str, Any], fault: Exception) -> list[Answer | Exception]:
        """The answers of a batch that failed; a size that worked where it had been too large for memory is kept."""
        worked: list[int] = []
        answers = self._halves(columns, shared, fault, worked)
        if is_memory(fault) and not any(isinstance(answer, Exception) for answer in answers):
            self.limit = max(worked)
        return answers

    def _halves(
        self, columns: list[list], shared: dict[str, Any], fault: Exception, worked: list[int]
    ) -> list[Answer | Exception]:
        """Answers of rows that failed together. worked: gets the sizes of the parts that did not."""
        if is_broken(fault):
            raise Broken(reason(fault)) from fault
        fault.with_traceback(None)  # its frames hold the batch's tensors
        if is_memory(fault):
            self.relieve()
        if len(columns[0]) == 1:
            return [fault]
        middle = (len(columns[0]) + 1) // 2
        answers: list[Answer | Exception] = []
        for half in ([column[:middle] for column in columns], [column[middle:] for column in columns]):
            try:
                answers += self.work(*half, **shared)
                worked.append(len(half[0]))
            except self.raised:
                raise
            except Exception as error:
                answers += self._halves(half, shared, error, worked)
        return answers


def reason(error: BaseException) -> str:
    """An error in one line; of a row's own fault its words alone."""
    text = " ".join(str(error).split())[:REASON_CHARS]
    if isinstance(error, RowError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the process."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or type(error).__name__ == "OutOfMemoryError"


def is_broken(error: BaseException) -> bool:
    """CUDA answers every call after an illegal access or a failed assertion on the device with that same error."""
    return not is_memory(error) and ("CUDA error" in str(error) or type(error).__name__ == "AcceleratorError")


def parted(answers: Sequence[Any]) -> tuple[list[int], list[Any], dict[int, str]]:
    """Positions and values of the answers, and what is wrong with the others by position."""
    good = [row for row, answer in enumerate(answers) if not isinstance(answer, Exception)]
    bad = {row: reason(answer) for row, answer in enumerate(answers) if isinstance(answer, Exception)}
    return good, [answers[row] for row in good], bad
