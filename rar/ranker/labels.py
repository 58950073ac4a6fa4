"""Labels as tokens: which ids say A, B, ..., and how far their probabilities may be trusted.

A reply may begin with "A" or " A", which are different tokens; both count. An id that two labels share is the tokenizer's
unknown token and says nothing.

How much of the whole vocabulary's probability the labels hold (their mass) tells a bad prompt from a hard picture: a model that
understood the question puts nearly all of it on the labels, however unsure it is among them. So below SURE_MASS, where the
reply is likelier to begin with something else, a row is REPAIRED: the labels' order is read, but it is not what the model would
have said. Below LEAST_MASS it is a FALLBACK: a model that begins with a thought or an excuse leaves labels a millionth, and
their order within that is noise. Between the two are models that were never tuned to answer (the order of their labels is
worth something), which is why the lower bound is not higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rar.ranker.wording import LABELS
from rar.schema import Ranking, RankStatus

LEADS = ("", " ")
SURE_MASS = 0.5
LEAST_MASS = 1e-4


class Read(NamedTuple):
    """The labels of one question. logprobs: (n,) over the whole vocabulary; mass: their sum as probabilities, at most 1.

    first: whether the likeliest token of all is a label.
    """

    logprobs: np.ndarray
    mass: float
    first: bool


def label_texts(tail: str, leads: Sequence[str] = LEADS) -> list[str]:
    """What must be tokenized to find the labels after a prompt that ends in `tail`."""
    return [tail, *(tail + lead + label for lead in leads for label in LABELS)]


def label_forms(
    ids_of: Mapping[str, Sequence[int]], tail: str, leads: Sequence[str] = LEADS, unknown: int | None = None
) -> list[tuple[int, ...]]:
    """The token ids of A, B, ... as the first token of a reply, up to the first label that has none.

    ids_of: the ids of every one of `label_texts`. A form counts where it adds one token to those of the tail.
    """
    before = list(ids_of[tail])
    forms: dict[str, list[int]] = {label: [] for label in LABELS}
    owners: dict[int, set[str]] = {}
    for label in LABELS:
        for lead in leads:
            *start, last = ids_of[tail + lead + label] or [-1]
            if start == before and last != unknown:
                forms[label].append(last)
                owners.setdefault(last, set()).add(label)
    found: list[tuple[int, ...]] = []
    for label in LABELS:
        own = tuple(dict.fromkeys(token for token in forms[label] if len(owners[token]) == 1))
        if not own:
            break
        found.append(own)
    return found


def together(logprobs: np.ndarray, forms: Sequence[Sequence[int]], best: float) -> Read:
    """logprobs: those of all ids of `forms`, in order; best: that of the likeliest token of the vocabulary."""
    bounds = np.cumsum([0, *map(len, forms)])
    labels = np.logaddexp.reduceat(logprobs, bounds[:-1])
    return Read(labels, min(float(np.exp(labels).sum()), 1.0), bool(logprobs.max() >= best))


def judged(ranking: Ranking, reads: Sequence[Read]) -> Ranking:
    """A row with what its rotations say of the labels, and what it may be called by their mean mass; a FALLBACK as it is."""
    if ranking.status == RankStatus.FALLBACK:
        return ranking
    mass, first = float(np.mean([read.mass for read in reads])), all(read.first for read in reads)
    ranking = replace(ranking, label_mass=mass, label_first=first)
    if mass < LEAST_MASS:
        return replace(ranking, order=tuple(range(len(ranking.order))), status=RankStatus.FALLBACK, scores=())
    if mass < SURE_MASS and ranking.status == RankStatus.RANKED:
        return replace(ranking, status=RankStatus.REPAIRED)
    return ranking
