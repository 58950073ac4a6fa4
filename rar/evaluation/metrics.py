"""How good a run is: accuracies from its predictions, each with a 95 % interval.

Metrics read the stored predictions and join the labels only here, so that a new metric needs no new run. A plain accuracy has a
Wilson interval (`.ci_low`, `.ci_high`); `top1` has one over classes, too (`.class_ci_low`, `.class_ci_high`), which is the one
for a claim about other classes; a difference of two methods on the same images is paired. See `intervals`.

An accuracy over no image is NaN, never 0; metrics.json has null for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.columns import codes
from rar.evaluation.intervals import accuracy, mean_per_class, paired_difference, wilson
from rar.schema import RankStatus

ABSENT = np.iinfo(np.int64).max  # the place of a class that is not among the candidates


class Outcomes(NamedTuple):
    """What became of each row; every array is (N,) bool. A row without a label is False in all but `asked`."""

    labelled: np.ndarray  # the row has a true name
    correct: np.ndarray  # the prediction is the true name
    correct_at_5: np.ndarray  # the true name is among the first five of the final order
    retriever_correct: np.ndarray  # the retriever's first candidate is the true name
    recalled: np.ndarray  # the true name is among the candidates
    asked: np.ndarray  # the ranker was asked, whatever came of it


Truth: TypeAlias = Sequence[str | None] | pa.ChunkedArray  # (N,) class names, None or null: unlabelled


class Judged(NamedTuple):
    """What the metrics need of N rows: some 20 bytes and its label each, whatever the rows carried."""

    outcomes: Outcomes
    labels: pa.ChunkedArray  # (N,) string
    statuses: Counter[str]
    label_mass: np.ndarray  # where labels were read
    label_first: np.ndarray
    candidates: int  # of all rows


def judged(predictions: pa.Table, truth: Truth) -> Judged:
    """Judge rows of schema.PREDICTIONS. Raises ValueError as `classification` does."""
    counts = pc.value_counts(predictions["rank_status"]).to_pylist()
    mass, first = (predictions[name].drop_null().to_numpy() for name in ("label_mass", "label_first"))
    statuses = Counter({one["values"]: one["counts"] for one in counts})
    shown = int(lengths(predictions["candidates"]).sum())
    return Judged(outcomes(predictions, truth), _as_labels(truth), statuses, mass, first, shown)


def together(parts: Sequence[Judged]) -> Judged:
    """Rows that were judged a part at a time. parts: at least one."""
    return Judged(
        Outcomes(*map(np.concatenate, zip(*(part.outcomes for part in parts), strict=True))),
        pa.chunked_array([chunk for part in parts for chunk in part.labels.chunks], pa.string()),
        sum((part.statuses for part in parts), Counter()),
        np.concatenate([part.label_mass for part in parts]),
        np.concatenate([part.label_first for part in parts]),
        sum(part.candidates for part in parts),
    )


def classification(predictions: pa.Table, truth: Truth, vocabulary: Collection[str] | None = None) -> dict[str, float]:
    """`summary` of rows judged at once. predictions: N rows of schema.PREDICTIONS, candidates in the retriever's order.

    Raises ValueError where the lengths differ or a ranking does not fit its candidates.
    """
    return summary(judged(predictions, truth), vocabulary)


def summary(rows: Judged, vocabulary: Collection[str] | None = None) -> dict[str, float]:
    """Flat dotted keys -> numbers. Accuracies are fractions of the labelled rows, with `.ci_low`/`.ci_high` (95 %, Wilson).

    Rows without a label are counted in `images` and left out of every accuracy. vocabulary: the memory's class names; where
    given, labels outside it are counted in `out_of_vocabulary` (they are wrong in every accuracy, as nothing could propose
    them).

    top1, top5, retriever_top1, candidate_recall: as named, see Outcomes. top1.class_ci_low, .class_ci_high, mean_per_class (the
    mean of each class's top1): intervals of a bootstrap over classes. conditional_rank_accuracy: top1 among the rows whose
    true name is a candidate and whose ranker was asked; answers that could not be parsed count. rank_gain: top1 minus
    retriever_top1, interval from `paired_difference` over classes. flips_won, flips_lost: rows that ranking set right, wrong.
    ranked_fraction: rows whose ranker was asked, of all rows. parse_failures, repaired: rows of status fallback, repaired.
    label_mass, label_first: mean, and share of the rows, where labels were read (schema.Ranking); NaN where none were.
    """
    found, statuses = rows.outcomes, rows.statuses
    names, groups = codes(rows.labels.drop_null())
    correct, retriever = found.correct[found.labelled], found.retriever_correct[found.labelled]
    contested = found.recalled & found.asked
    _, class_low, class_high = accuracy(correct, groups, seed=0)
    values = {
        **_accuracy("top1", correct),
        "top1.class_ci_low": class_low,
        "top1.class_ci_high": class_high,
        **_with_interval("mean_per_class", *mean_per_class(correct, groups, seed=0)),
        **_accuracy("top5", found.correct_at_5[found.labelled]),
        **_accuracy("retriever_top1", retriever),
        **_accuracy("candidate_recall", found.recalled[found.labelled]),
        **_accuracy("conditional_rank_accuracy", found.correct[contested]),
        **_with_interval("rank_gain", *paired_difference(correct, retriever, groups, seed=0)),
        "flips_won": float(np.sum(correct & ~retriever)),
        "flips_lost": float(np.sum(~correct & retriever)),
        "ranked_fraction": _mean(found.asked),
        "parse_failures": float(statuses[RankStatus.FALLBACK]),
        "repaired": float(statuses[RankStatus.REPAIRED]),
        "label_mass": _mean(rows.label_mass),
        "label_first": _mean(rows.label_first),
        "mean_candidates": rows.candidates / len(found.asked) if len(found.asked) else math.nan,
        "images": float(len(found.asked)),
        "labelled": float(len(groups)),
    }
    if vocabulary is not None:
        strange = ~np.isin(names, np.array(list(vocabulary), dtype=str))
        values["out_of_vocabulary"] = float(strange[groups].sum())
    return values


def outcomes(predictions: pa.Table, truth: Truth) -> Outcomes:
    """Judge every row (see Outcomes). The final order is the predicted class, then the ranking without it."""
    if len(truth) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions but {len(truth)} labels")
    labels = _as_labels(truth).combine_chunks()
    predicted = predictions["class_name"].combine_chunks()
    correct = _true(pc.equal(predicted, labels))
    retrieved, ranked = _places(predictions, labels)
    _, ranked_prediction = _places(predictions, predicted)
    moved = ranked + (ranked < ranked_prediction)  # one place later than a prediction that is pulled to the front
    final = np.where(correct, 0, np.where(ranked == ABSENT, ABSENT, moved))
    return Outcomes(
        labelled=_true(pc.is_valid(labels)),
        correct=correct,
        correct_at_5=final < 5,
        retriever_correct=retrieved == 0,
        recalled=retrieved != ABSENT,
        asked=~_true(pc.equal(predictions["rank_status"], RankStatus.SKIPPED.value)),
    )


def per_class(predictions: pa.Table, truth: Truth) -> pa.Table:
    """One row a true class, sorted by name: class_name, images, top1, ci_low, ci_high (Wilson), candidate_recall."""
    found = outcomes(predictions, truth)
    names, group = codes(_as_labels(truth).drop_null())
    images = np.bincount(group, minlength=len(names))
    correct = np.bincount(group, weights=found.correct[found.labelled], minlength=len(names))
    recalled = np.bincount(group, weights=found.recalled[found.labelled], minlength=len(names))
    intervals = [wilson(int(right), int(total)) for right, total in zip(correct, images, strict=True)]
    return pa.table(
        {
            "class_name": pa.array(names.tolist(), pa.string()),
            "images": pa.array(images, pa.int64()),
            "top1": pa.array(correct / images, pa.float64()),
            "ci_low": pa.array([low for low, _ in intervals], pa.float64()),
            "ci_high": pa.array([high for _, high in intervals], pa.float64()),
            "candidate_recall": pa.array(recalled / images, pa.float64()),
        }
    )


def confusions(predictions: pa.Table, truth: Sequence[str | None], limit: int = 20) -> list[tuple[str, str | None, int]]:
    """The most frequent (true name, predicted name, count), most first, ties by name; None: nothing was predicted."""
    pairs = zip(truth, predictions["class_name"].to_pylist(), strict=True)
    counts = Counter((true, predicted) for true, predicted in pairs if true is not None and true != predicted)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or ""))
    return [(true, predicted, count) for (true, predicted), count in ordered[:limit]]


def asked_curve(predictions: pa.Table, truth: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """top1 had the ranker been asked only about the least certain images: (fraction asked, top1), two (A + 1,) float64.

    A of the labelled rows were asked. They are taken by the retriever's margin (first score minus second), smallest first; the
    others keep the retriever's first candidate. The curve starts with nothing asked and ends at the run's own top1.
    """
    found = outcomes(predictions, truth)
    asked = np.flatnonzero(found.labelled & found.asked)
    by_margin = asked[np.argsort(_margins(predictions)[asked], kind="stable")]
    unasked = found.correct[found.labelled & ~found.asked].sum()
    gains = found.correct[by_margin].astype(np.int64) - found.retriever_correct[by_margin]
    right = unasked + found.retriever_correct[asked].sum() + np.concatenate([[0], np.cumsum(gains)])
    total = max(1, int(found.labelled.sum()))
    return np.arange(len(asked) + 1) / total, right / total


def harmonic_mean(base: np.ndarray, novel: np.ndarray) -> np.ndarray:
    """H = 2 b n / (b + n) of accuracies on base and on novel classes (CoCoOp, 2203.05557), of any shape; 0 where both are 0."""
    total = base + novel
    return np.divide(2 * base * novel, total, out=np.zeros_like(total), where=total > 0)


def places_of_candidates(predictions: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many candidates each of N rows has (N,), and of all M of them, row after row, the places (M,) in the retriever's
    order and in the ranking; int64, 0 = first. Raises ValueError where a ranking does not fit its candidates.
    """
    counts = lengths(predictions["candidates"])
    if not np.array_equal(counts, lengths(predictions["ranking"])):
        raise ValueError("a ranking is not as long as its candidates")
    start = np.repeat(np.cumsum(counts) - counts, counts)
    retrieved = np.arange(len(start)) - start
    ranking = np.asarray(pc.list_flatten(predictions["ranking"]).to_numpy(), dtype=np.int64)
    ranked = np.full(len(start), -1)
    inside = (ranking >= 0) & (ranking < np.repeat(counts, counts))
    ranked[(start + ranking)[inside]] = retrieved[inside]
    if (ranked < 0).any():
        raise ValueError("a ranking is not a permutation of its candidates' positions")
    return counts, retrieved, ranked


def _as_labels(truth: Truth) -> pa.ChunkedArray:
    return truth if isinstance(truth, pa.ChunkedArray) else pa.chunked_array([pa.array(truth, pa.string())])


def _accuracy(name: str, correct: np.ndarray) -> dict[str, float]:
    return _with_interval(name, _mean(correct), *wilson(int(correct.sum()), len(correct)))


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}.ci_low": low, f"{name}.ci_high": high}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _true(mask: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(N,) bool; null is False."""
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), dtype=bool)


def lengths(lists: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 list lengths; a null list is empty."""
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), dtype=np.int64)


def _margins(predictions: pa.Table) -> np.ndarray:
    """(N,) float64: the retriever's first score minus its second; inf with fewer than two candidates."""
    counts = lengths(predictions["candidates"])
    scores = pc.struct_field(pc.list_flatten(predictions["candidates"]), "score").to_numpy().astype(np.float64)
    margins = np.full(len(counts), np.inf)
    several = counts > 1
    first = (np.cumsum(counts) - counts)[several]
    margins[several] = scores[first] - scores[first + 1]
    return margins


def _places(predictions: pa.Table, names: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's name stands among its candidates: places in the retriever's order and in the ranking.

    names: N strings or nulls. Returns two (N,) int64, 0 = first, ABSENT = not a candidate; the best place where a name occurs
    twice. Works on the flattened lists, so that a row costs no Python object.
    """
    counts, retrieved, ranked = places_of_candidates(predictions)
    parent = np.repeat(np.arange(len(counts)), counts)
    recalled = pc.struct_field(pc.list_flatten(predictions["candidates"]), "class_name")
    hits = np.flatnonzero(_true(pc.equal(recalled, names.take(pa.array(parent)))))
    places = []
    for place in (retrieved, ranked):
        best = np.full(len(counts), ABSENT)
        np.minimum.at(best, parent[hits], place[hits])
        places.append(best)
    return places[0], places[1]
