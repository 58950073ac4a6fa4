"""Two runs over the same pictures, one by one: which predictions differ, and whether retrieval or ranking decided it.

A picture (or a box) is known by its content and file, and what has moved by its content alone; equal ones pair in the order of
the index. So the runs may be of different listings, and share some of their pictures alone. Of large runs the shards of their
pages are compared (view.SHOWN). A row that the two corpora label differently is not judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rar.evaluation import intervals
from rar.report import cards
from rar.report.view import RunView
from rar.schema import RankStatus, UserError

# Why a prediction is wrong: what was the last to have the true class in its hand.
WHY = {
    "absent": "retrieval: the true class is not among the candidates",
    "unasked": "retrieval: another candidate was first, and the ranker was not asked",
    "unread": "ranking: nothing usable was answered, and another candidate was first",
    "ranked": "ranking: asked, and another candidate was put first",
}
PICTURES = 12


@dataclass(frozen=True)
class Pairing:
    """The rows that two runs share. rows_a, rows_b: (N,) int64, row i of one shows what row i of the other shows."""

    a: RunView
    b: RunView
    rows_a: np.ndarray
    rows_b: np.ndarray

    @property
    def judged(self) -> np.ndarray:
        """(N,) bool: labelled alike in both."""
        alike = [self.a.truth[i] == self.b.truth[j] for i, j in self.rows]
        return self.a.found.labelled[self.rows_a] & np.array(alike, bool)

    @property
    def rows(self) -> list[tuple[int, int]]:
        return list(zip(self.rows_a.tolist(), self.rows_b.tolist(), strict=True))

    @property
    def differ(self) -> np.ndarray:
        """(N,) bool: the runs predict different names."""
        names = [run.predictions["class_name"].to_pylist() for run in (self.a, self.b)]
        return np.array([names[0][i] != names[1][j] for i, j in self.rows], bool)


def pair(a: RunView, b: RunView) -> Pairing:
    """Raises UserError for runs that share no picture."""
    shared: dict[int, int] = {}
    for known_by in (("image_id", "uri"), ("image_id",)):
        left = _keys(b, known_by, set(shared.values()))
        mine = _keys(a, known_by, set(shared))
        shared |= {row: left[key] for key, row in mine.items() if key in left}
    if not shared:
        raise UserError(f"runs {a.name!r} and {b.name!r} share no picture; --against compares runs over the same corpus")
    rows_a, rows_b = np.array(sorted(shared.items()), np.int64).T
    return Pairing(a, b, rows_a, rows_b)


def _keys(run: RunView, known_by: Sequence[str], without: set[int]) -> dict[tuple[Any, ...], int]:
    """What names each other prediction, and the how manieth of that name it is by its place in the index -> its row."""
    rows, places = (run.predictions[name].fill_null(0).to_numpy() for name in ("row", "place"))
    names = list(zip(*(run.predictions[name].to_pylist() for name in known_by), strict=True))
    seen: Counter[tuple[Any, ...]] = Counter()
    keys = {}
    for row in np.lexsort((places, rows)).tolist():
        if row not in without:
            keys[*names[row], seen[names[row]]] = row
            seen[names[row]] += 1
    return keys


def why(run: RunView, row: int) -> str:
    """A key of WHY: what kept a wrong prediction from being right."""
    if not run.found.recalled[row]:
        return "absent"
    if not run.found.asked[row]:
        return "unasked"
    return "unread" if run.predictions["rank_status"][row].as_py() == RankStatus.FALLBACK else "ranked"


def comparison(a: RunView, b: RunView) -> dict[str, Any]:
    """What the page shows of run `a` against run `b`. Raises UserError as `pair` does."""
    paired = pair(a, b)
    judged, differ = paired.judged, paired.differ
    right_a, right_b = a.found.correct[paired.rows_a], b.found.correct[paired.rows_b]
    won, lost = judged & right_a & ~right_b, judged & right_b & ~right_a
    either_wrong = judged & ~right_a & ~right_b
    labels = np.array([str(a.truth[row]) for row in paired.rows_a[judged].tolist()])
    gain, low, high = intervals.paired_difference(right_a[judged], right_b[judged], labels, seed=0)
    counts = {"both_right": right_a & right_b & judged, "both_wrong": either_wrong, "renamed": either_wrong & differ}
    galleries = [
        _gallery(paired, f"{a.name} is right, {b.name} is not", won, b),
        _gallery(paired, f"{b.name} is right, {a.name} is not", lost, a),
        _gallery(paired, "Neither is right, and they differ", counts["renamed"], None),
    ]
    if not judged.any():
        galleries = [_gallery(paired, "They differ; no labels to judge by", differ, None)]
    return {
        "a": a.name,
        "b": b.name,
        "shared": len(judged),
        "unshared": len(a.truth) + len(b.truth) - 2 * len(judged),
        "judged": int(judged.sum()),
        "differ": int(differ.sum()),
        **{name: int(mask.sum()) for name, mask in counts.items()},
        "won": int(won.sum()),
        "lost": int(lost.sum()),
        "gain": gain,
        "low": low,
        "high": high,
        "p": intervals.mcnemar(right_a[judged], right_b[judged]),
        "reasons": _reasons(paired, won, lost),
        "galleries": [one for one in galleries if one["total"]],
    }


def _reasons(paired: Pairing, won: np.ndarray, lost: np.ndarray) -> list[dict[str, Any]]:
    """One row a reason that occurs: of the pictures that one run alone is right on, why the other is wrong.

    `won` and `lost` are (all, of these right by the retriever's first candidate, right by ranking).
    """
    counts: dict[str, dict[str, list[int]]] = {}
    sides = (paired.a, paired.rows_a), (paired.b, paired.rows_b)
    for name, mask, ((right, rows_right), (wrong, rows_wrong)) in (("won", won, sides), ("lost", lost, sides[::-1])):
        for good, bad in zip(rows_right[mask].tolist(), rows_wrong[mask].tolist(), strict=True):
            entry = counts.setdefault(why(wrong, bad), {"won": [0, 0, 0], "lost": [0, 0, 0]})[name]
            entry[0] += 1
            entry[1 if right.found.retriever_correct[good] else 2] += 1
    return [{"why": text, **counts[key]} for key, text in WHY.items() if key in counts]


def _gallery(paired: Pairing, title: str, mask: np.ndarray, wrong: RunView | None) -> dict[str, Any]:
    """Cards of run a, each with what run b makes of the picture (`other`). wrong: the run whose mistake is explained."""
    places = np.flatnonzero(mask)
    shown = cards.spread(places, PICTURES) if len(places) else places
    rows_a, rows_b = paired.rows_a[shown], paired.rows_b[shown]
    items = []
    for a, b, card, other in zip(rows_a, rows_b, cards.cards(paired.a, rows_a), cards.told(paired.b, rows_b), strict=True):
        reason = None if wrong is None else WHY[why(wrong, int(a if wrong is paired.a else b))]
        items.append({"card": card, "other": other, "why": reason})
    return {"title": title, "total": len(places), "items": items}
