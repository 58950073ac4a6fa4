"""cACC and sACC against slow oracles that say what they mean."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.evaluation.clustering import cluster_accuracy, semantic_similarity

PAIRS = st.lists(st.tuples(st.sampled_from("ABCD"), st.sampled_from(["owl", "wren", "crow"])), min_size=1, max_size=30)


def best_pairing(predicted: list[str], truth: list[str]) -> float:
    """Every way to give each class a cluster of its own (or none), one after the other."""
    classes = sorted(set(truth))
    clusters = [*sorted(set(predicted)), *[f"none {number}" for number in range(len(classes))]]
    hits = [
        sum(dict(zip(chosen, classes, strict=True)).get(guess) == true for guess, true in zip(predicted, truth, strict=True))
        for chosen in permutations(clusters, len(classes))
    ]
    return max(hits) / len(truth)


@given(PAIRS)
def test_clusters_against_every_pairing(pairs: list[tuple[str, str]]) -> None:
    predicted, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    assert cluster_accuracy(predicted, truth) == pytest.approx(best_pairing(predicted, truth))


@given(PAIRS)
def test_names_of_clusters_do_not_matter(pairs: list[tuple[str, str]]) -> None:
    predicted, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    renamed = [{"A": "E", "B": "A", "C": "B", "D": "C", "E": "D"}[guess] for guess in predicted]
    assert cluster_accuracy(renamed, truth) == cluster_accuracy(predicted, truth)


def test_a_small_table_by_hand() -> None:
    """x covers owl twice and wren three times, y wren twice: x to owl and y to wren gives 4, x to wren alone 3."""
    predicted, truth = ["x"] * 5 + ["y"] * 2, ["owl", "owl", "wren", "wren", "wren", "wren", "wren"]
    assert cluster_accuracy(predicted, truth) == pytest.approx(4 / 7)


@given(PAIRS, st.integers(0, 5))
def test_similarity_against_a_loop(pairs: list[tuple[str, str]], seed: int) -> None:
    names = sorted({name for pair in pairs for name in pair})
    vectors = dict(zip(names, np.random.default_rng(seed).normal(size=(len(names), 6)), strict=True))
    cosines = []
    for guess, true in pairs:
        a, b = vectors[guess], vectors[true]
        cosines.append(math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b)))
    predicted, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    got = semantic_similarity(predicted, truth, lambda texts: np.array([vectors[text] for text in texts]))
    assert got == pytest.approx(math.fsum(cosines) / len(cosines))


def test_an_encoder_that_knows_no_word_says_nothing() -> None:
    blind = semantic_similarity(["gull", "tern", "owl"], ["wren", "kite", "crow"], lambda texts: np.ones((len(texts), 4)))
    assert math.isnan(blind)


def test_nothing_to_judge() -> None:
    assert math.isnan(cluster_accuracy([], [])) and math.isnan(semantic_similarity([], [], lambda texts: np.zeros((0, 1))))
    with pytest.raises(ValueError, match="2 predictions but 1 labels"):
        cluster_accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions but 1 labels"):
        semantic_similarity([], ["a"], lambda texts: np.zeros((1, 1)))
