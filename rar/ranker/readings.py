"""What a reply to a ranking question says: its labels' log-probabilities, a decision, or the labels that a JSON list names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np

from rar.ranker.labels import Read
from rar.ranker.wire import LEAST_LOGPROB, Fault, Reply, at, is_number, token_count
from rar.ranker.wording import LABELS

QUOTED_LABEL = re.compile(r'"([A-Z])"')
SMALLEST = 1e-9  # probability of a document, as servers write 0 and 1 for what is nearly so
ROUNDING = 1e-3  # by which a sum of probabilities may be above 1
AROUND_LABEL = " \t\n\"'(*▁Ġ"  # what tokenizers write before a label, and quotes
Top = Sequence[tuple[str, float]]  # the first token's alternatives: what it is called, log-probability


def label_scores(top: Top, count: int, forms: Sequence[Sequence[int]] = ()) -> list[float | None]:
    """Log-probability of each of the first `count` labels among the first token's alternatives; None where it is not there.

    forms: the token ids of each label; a server that was asked for ids calls them "token_id:7". "A" and " A" are two tokens of
    one label: their probabilities add up.
    """
    found = [-np.inf] * count
    for place, score in _labelled(top, count, forms):
        if place is not None:
            found[place] = float(np.logaddexp(found[place], score))
    return [None if score == -np.inf else score for score in found]


def label_read(top: Top, count: int, forms: Sequence[Sequence[int]] = ()) -> Read:
    """The labels as `labels.Read`. One that is not there is put at a nat below the least likely token that is."""
    scores = label_scores(top, count, forms)
    floor = min((score for _, score in top), default=0.0) - 1
    mass = min(float(np.exp([score for score in scores if score is not None]).sum()), 1.0)
    alternatives = list(_labelled(top, count, forms))
    best = max((score for place, score in alternatives if place is not None), default=-np.inf)
    others = [score for place, score in alternatives if place is None]
    # a server that lists labels alone does not say what else there was: at worst one token with all the rest
    first = best >= max(others) if others else np.exp(best) >= 1 - mass
    return Read(np.array([floor if score is None else score for score in scores]), mass, bool(first))


def read_decision(data: bytes, question: str, names: Sequence[str]) -> tuple[Read, Reply]:
    """The body of a decision: its options as labels, and what it cost. Raises Fault for anything else, whatever it is.

    The mass stands in the answer or, as vLLM has it, beside it; only vLLM tells whether the likeliest token is a label.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Fault(f"the decision is no JSON: {data[:80]!r}") from None
    shares = [at(body, "answers", question, "probabilities", name) for name in names]
    mass, first = (at(body, "diagnostics", question, name) for name in ("label_mass", "argmax_is_label"))
    mass = at(body, "answers", question, "label_mass") if mass is None else mass
    if not all(is_number(value) and 0 <= value <= 1 + ROUNDING for value in [*shares, mass]):
        raise Fault(f"the decision lacks probabilities or their mass: {data[:80]!r}")
    with np.errstate(divide="ignore"):
        logprobs = np.maximum(np.log(np.array(shares, np.float64) * mass), LEAST_LOGPROB)
    mass = min(float(mass), 1.0)
    sure = np.exp(logprobs.max()) >= 1 - mass  # at worst one token has all the rest
    spent = [token_count(at(body, "usage", name)) for name in ("input_tokens", "prompt_tokens", "output_tokens")]
    return Read(logprobs, mass, bool(sure) if first is None else first is True), Reply("", [], spent[0] or spent[1], spent[2])


def read_relevance(data: bytes, places: int) -> tuple[np.ndarray, int]:
    """The body of a reranking or scoring: (places,) log-odds that each document is relevant, by its probability; prompt tokens.

    Raises Fault for anything else, whatever it is: documents left out, named twice, or scored outside 0 to 1 (raw logits).
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Fault(f"the reranking is no JSON: {data[:80]!r}") from None
    results, told = (at(body, "results"), "relevance_score") if at(body, "data") is None else (at(body, "data"), "score")
    pairs = [(at(one, "index"), at(one, told)) for one in results] if isinstance(results, list) else []
    chances = {place: score for place, score in pairs if type(place) is int and is_number(score) and 0 <= score <= 1}
    if sorted(chances) != list(range(places)) or len(pairs) != places:
        raise Fault(f"the reranking has no probability for each of {places} documents: {data[:80]!r}")
    chance = np.clip([chances[place] for place in range(places)], SMALLEST, 1 - SMALLEST)
    return np.log(chance) - np.log1p(-chance), token_count(at(body, "usage", "prompt_tokens"))


def sorted_labels(text: str, count: int) -> list[int]:
    """Positions of the quoted labels of a JSON reply, in order, each once; what was cut off is missing."""
    positions = (LABELS.index(label) for label in QUOTED_LABEL.findall(text))
    return list(dict.fromkeys(position for position in positions if position < count))


def _labelled(top: Top, count: int, forms: Sequence[Sequence[int]]) -> list[tuple[int | None, float]]:
    """(which label, log-probability) of each alternative; None for a token that is no label of the first `count`."""
    places = {f"token_id:{token}": place for place, ids in enumerate(forms[:count]) for token in ids}
    places |= {label: place for place, label in enumerate(LABELS[:count])}
    return [(places.get(token, places.get(token.strip(AROUND_LABEL))), score) for token, score in top]
