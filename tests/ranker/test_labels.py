"""Labels as tokens, on tokenizers made of a table. Whole tokenizers are in test_mllm, whole vocabularies in test_rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.ranker.labels import judged, label_forms, label_texts, together
from rar.ranker.readings import label_read
from rar.ranker.wording import LABELS
from rar.schema import Ranking, RankStatus

TAIL = "assistant:"


def tokenized(known: str, unknown: int = 1) -> dict[str, list[int]]:
    """A tokenizer that knows "A" as 10 and " A" as 40, for the letters of `known`; anything else is `unknown`."""
    ids = {TAIL: [7, 8]}
    for place, label in enumerate(LABELS):
        ids[TAIL + label] = [7, 8, 10 + place if label in known else unknown]
        ids[f"{TAIL} {label}"] = [7, 8, 40 + place if label in known else unknown]
    return ids


def test_both_forms_of_a_label_count_up_to_the_first_that_has_none() -> None:
    assert set(label_texts(TAIL)) == set(tokenized(LABELS))
    assert label_forms(tokenized("ABCE"), TAIL) == [(10, 40), (11, 41), (12, 42)]
    assert label_forms(tokenized(LABELS), TAIL)[-1] == (35, 65)
    assert label_forms(tokenized(""), TAIL) == []


def test_a_form_that_changes_the_tail_or_takes_two_tokens_does_not_count() -> None:
    ids = tokenized(LABELS)
    ids[TAIL + "B"] = [7, 9]  # ":B" is one token of this tokenizer
    ids[f"{TAIL} C"] = [7, 8, 5, 12]
    ids[f"{TAIL}D"] = ids[f"{TAIL} D"] = [13]
    assert label_forms(ids, TAIL) == [(10, 40), (41,), (12,)]


def test_one_unknown_label_is_found_out_by_its_id() -> None:
    ids = tokenized(LABELS.replace("C", ""))
    assert len(label_forms(ids, TAIL, unknown=1)) == 2


def test_forms_add_up_and_the_likeliest_token_is_looked_for_among_all() -> None:
    read = together(np.log([0.2, 0.1, 0.4]), [(1, 2), (3,)], best=np.log(0.4))
    np.testing.assert_allclose(np.exp(read.logprobs), [0.3, 0.4])
    assert (read.mass, read.first) == (pytest.approx(0.7), True)
    assert not together(np.log([0.1, 0.1, 0.1]), [(1, 2), (3,)], best=np.log(0.5)).first


@given(st.lists(st.floats(1e-9, 1.0), min_size=2, max_size=26), st.floats(1e-9, 1.0))
def test_a_servers_alternatives_say_the_same_as_a_whole_vocabulary(weights: list[float], other: float) -> None:
    total = sum(weights) + other
    logs = np.log(np.array(weights) / total)
    forms = [(place,) for place in range(len(weights))]
    whole = together(logs, forms, best=float(np.log(max(*weights, other) / total)))
    top = [(f"token_id:{place}", float(score)) for place, score in enumerate(logs)] + [
        ("token_id:99", float(np.log(other / total)))
    ]
    told = label_read(top, len(weights), forms)
    np.testing.assert_allclose(told.logprobs, whole.logprobs)
    assert (told.mass, told.first) == (pytest.approx(whole.mass), whole.first)


@pytest.mark.parametrize(("mass", "status"), [(0.9, "ranked"), (0.4, "repaired"), (0.002, "repaired"), (0.00005, "fallback")])
def test_what_a_row_may_be_called(mass: float, status: str) -> None:
    read = together(np.log([mass * 0.25, mass * 0.75]), [(1,), (2,)], best=0.0)
    row = judged(Ranking((1, 0), RankStatus.RANKED, (-1.4, -0.3)), [read, read])
    assert (row.status, row.label_mass, row.label_first) == (status, pytest.approx(mass), False)
    assert (row.order, bool(row.scores)) == (((0, 1), False) if status == "fallback" else ((1, 0), True))
    kept = judged(Ranking((1, 0), RankStatus.REPAIRED, (-1.4, -0.3)), [read])
    assert kept.status == ("fallback" if status == "fallback" else "repaired")
