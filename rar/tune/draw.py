"""The lists of an epoch: which picture is shown with which candidates, in which order, and what is to be answered.

Every epoch draws anew, by (seed, epoch) alone: so a resumed training sees what an uninterrupted one does, and the truth's place
is uniform and never learned. Classes come in turns, so that a class of many pictures does not drown others; of a class, a
picture of which the retriever is wrong anyway is taken more often than one of which it is right (`tune.easy`). The other
candidates are drawn from the retriever's first D, D between as few as are needed (the hardest list) and the whole pool.

The target has the truth first. Behind it stand, for a listwise loss over labels, the others in the retriever's order, and in a
list that is written as text, the others as they were shown, as no picture tells the retriever's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa

from rar.config import Config, Tune
from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt, likelihood_prompt
from rar.ranker.wording import LABELS, Wording
from rar.schema import UserError

NONE_SHOWN = 0.5  # share of lists that show `none of these`, where ranking does not always
BUCKET = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Lesson:
    """One list about one picture. row: of the data. names: as they are shown. order: places in `names`, best first, as the
    target has them. answer: the place that is right; len(names) is "none of these", which stands last where it is shown."""

    row: int
    names: list[str]
    order: list[int]
    answer: int
    none: bool = False

    @property
    def length(self) -> int:
        return sum(map(len, self.names))


@dataclass(frozen=True)
class Source:
    """What lists are drawn from. names: the pool of each row, in the retriever's order. always_none: whether every list shows
    "none of these". letters: whether labels are asked for; a list that is written as text shows it never."""

    rows: list[int]
    labels: list[str]
    easy: list[bool]
    names: list[list[str]]
    top_k: int
    always_none: bool = False
    letters: bool = True


def turn(lesson: Lesson, wording: Wording, method: str) -> tuple[str, str]:
    """(what is asked, what is to be answered)."""
    if method == "letters":
        names = [*lesson.names, *([wording.none_of_these] if lesson.none else [])]
        return letters_prompt(names, wording), LABELS[lesson.answer]
    best = [lesson.names[place] for place in lesson.order]
    if method == "likelihood":
        return likelihood_prompt(lesson.names, wording), best[0]
    return generate_prompt(lesson.names, wording), generate_answer(best)


def longest(settings: Config) -> int:
    """Of the lists that are trained on."""
    return settings.tune.max_list or settings.retriever.top_k


def epoch_of(settings: Config, rows: pa.Table) -> Callable[[int], list[Lesson]]:
    """The lists of an epoch by its number. Raises UserError where there is nothing to train on."""
    tune, seed = settings.tune, settings.run.seed
    if tune.preset != "rar":
        return partial(windows, rows, "train", seed, shuffle=tune.preset == "paper-text")
    letters = settings.ranker.method == "letters"
    given = source(rows, "train", longest(settings), always_none=settings.ranker.none_of_these, letters=letters)
    if not given.rows:
        raise UserError("rar tune found no picture to train on that has two candidates or more")
    return partial(epoch, given, tune, seed)


def source(data: pa.Table, split: str, top_k: int, *, always_none: bool, letters: bool) -> Source:
    """The rows of a split of DATA with at least one wrong candidate."""
    records = data.select(["label", "difficulty", "candidates", "split"]).to_pylist()
    pools = [[one["class_name"] for one in record["candidates"]] for record in records]
    rows = [
        row
        for row, record in enumerate(records)
        if record["split"] == split and any(name != record["label"] for name in pools[row])
    ]
    labels = [records[row]["label"] for row in rows]
    easy = [records[row]["difficulty"] == "easy" for row in rows]
    return Source(rows, labels, easy, [pools[row] for row in rows], top_k, always_none, letters)


def epoch(given: Source, tune: Tune, seed: int, number: int) -> list[Lesson]:
    """As many lists as there are rows."""
    rng = np.random.default_rng([seed, 22, number])
    return [_lesson(given, place, tune, rng) for place in islice(_turns(given, tune.easy, rng), len(given.rows))]


def _turns(given: Source, easy: float, rng: np.random.Generator) -> Iterator[int]:
    """Places of rows, a class at a time. A class's pictures of a kind are all shown before one is shown again."""
    kinds: dict[str, tuple[list[int], list[int]]] = {label: ([], []) for label in sorted(set(given.labels))}
    for place, (label, plain) in enumerate(zip(given.labels, given.easy, strict=True)):
        kinds[label][plain].append(place)
    waiting: dict[tuple[str, bool], list[int]] = {}
    labels = list(kinds)
    while True:
        for label in (labels[one] for one in rng.permutation(len(labels))):
            wanted = bool(rng.random() < easy)
            kind = wanted if kinds[label][wanted] else not wanted
            if not waiting.get((label, kind)):
                waiting[label, kind] = rng.permutation(kinds[label][kind]).tolist()
            yield waiting[label, kind].pop()


def _lesson(given: Source, place: int, tune: Tune, rng: np.random.Generator) -> Lesson:
    label, pool = given.labels[place], given.names[place]
    others = [name for name in pool if name != label]
    size = int(rng.integers(2, given.top_k + 1))
    shown = given.always_none or (given.letters and bool(rng.random() < NONE_SHOWN))
    share = tune.rejections if given.always_none else tune.rejections / NONE_SHOWN
    refused = given.letters and shown and bool(rng.random() < share)
    wrong = min(size if refused else size - 1, len(others))
    depth = int(rng.integers(wrong, len(others) + 1))
    chosen = set(rng.permutation(depth)[:wrong].tolist())
    best = [name for number, name in enumerate(others) if number in chosen]
    best = best if refused else [label, *best]  # the target's order
    listed = [best[one] for one in rng.permutation(len(best))] if tune.shuffle else [name for name in pool if name in best]
    listed += [name for name in best if name not in listed]  # a truth that was not retrieved
    behind = best if given.letters else [*best[:1], *(name for name in listed if name != label)]
    order = [listed.index(name) for name in behind]
    return Lesson(given.rows[place], listed, order, len(listed) if refused else order[0], shown)


def windows(data: pa.Table, split: str, seed: int, number: int, *, shuffle: bool) -> list[Lesson]:
    """An epoch of lists that stand as they are (`paper`): the target is in `order` of the rows. shuffle: what is shown."""
    rng = np.random.default_rng([seed, 22, number])
    records = data.select(["label", "candidates", "split", "target"]).to_pylist()
    rows = [row for row, record in enumerate(records) if record["split"] == split]
    lessons = []
    for row in (rows[one] for one in rng.permutation(len(rows))):
        names = [one["class_name"] for one in records[row]["candidates"]]
        moved = rng.permutation(len(names)) if shuffle else np.arange(len(names))
        back = np.argsort(moved)
        order = [int(back[place]) for place in records[row]["target"]]
        listed = [names[place] for place in moved]
        lessons.append(Lesson(row, listed, order, listed.index(records[row]["label"])))
    return lessons


def bucketed(lessons: Sequence[Lesson], batch: int, seed: int, number: int) -> list[Lesson]:
    """The same, in whole batches of lists of like length (the last is filled up from the start), in random order."""
    rng = np.random.default_rng([seed, 23, number])
    filled = [lessons[place % len(lessons)] for place in range(-(-len(lessons) // batch) * batch)]
    batches = []
    for start in range(0, len(filled), batch * BUCKET):
        part = sorted(filled[start : start + batch * BUCKET], key=lambda lesson: lesson.length)
        batches += [part[first : first + batch] for first in range(0, len(part), batch)]
    return [lesson for one in rng.permutation(len(batches)) for lesson in batches[one]]


def judged(data: pa.Table, split: str, size: int, seed: int, most: int) -> list[Lesson]:
    """Lists to judge by, always the same: the retriever's first `size`, shuffled, of rows whose truth is among them."""
    rng = np.random.default_rng([seed, 24, size])
    records = data.select(["label", "candidates", "truth", "split"]).to_pylist()
    rows = [row for row, one in enumerate(records) if one["split"] == split and 0 <= one["truth"] < size]
    lessons = []
    for row in sorted(rng.permutation(rows)[:most].tolist()):
        names = [one["class_name"] for one in records[row]["candidates"][:size]]
        moved = rng.permutation(len(names))
        back = np.argsort(moved)
        truth = int(back[records[row]["truth"]])
        order = [truth, *(int(place) for place in back if place != truth)]
        lessons.append(Lesson(row, [names[place] for place in moved], order, truth))
    return [lesson for lesson in lessons if len(lesson.names) > 1]
