from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar import retrieve
from rar.memory import Entries, Hits
from rar.schema import UserError

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def entries(vectors: np.ndarray, class_ids: np.ndarray | list[int]) -> Entries:
    class_ids = np.asarray(class_ids, np.int64)
    names = [f"class {class_id}" for class_id in class_ids]
    return Entries([f"{row:06d}" for row in range(len(class_ids))], class_ids, names, np.asarray(vectors, np.float32))


def accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == truth).mean())


def softmax(scores: np.ndarray) -> np.ndarray:
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    return chances / chances.sum(axis=1, keepdims=True)


class World:
    """Clusters whose noise is larger in a few directions than in the others, and names that are rough class means."""

    def __init__(self, n_classes: int = 20, dim: int = 32, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.means = self.rng.normal(size=(n_classes, dim))
        self.noise = np.r_[np.full(3, 3.0), np.full(dim - 3, 1.7)]
        self.names = unit(self.means + self.rng.normal(size=self.means.shape))

    def images(self, labels: np.ndarray) -> np.ndarray:
        return unit(self.means[labels] + self.noise * self.rng.normal(size=(len(labels), self.means.shape[1])))


def test_text_head_is_clip_zero_shot() -> None:
    prototypes = unit(np.array([[1.0, 0, 0], [0, 1, 0]]))
    head = retrieve.fit_head("text", None, entries(prototypes, [7, 3]))
    assert head.class_ids.tolist() == [3, 7] and head.class_names == ["class 3", "class 7"]
    np.testing.assert_allclose(head.scores(prototypes), [[0, 100], [100, 0]])
    assert not head.bias.any() and head.meta["held_out"] == 0


def test_synonyms_are_averaged_and_renormalised() -> None:
    texts = entries(np.array([[1.0, 0], [0, 1.0], [-1.0, 0]]), [0, 0, 1])
    weights = retrieve.fit_head("fused", None, texts).weights
    np.testing.assert_allclose(weights, [[50**0.5 * 10, 50**0.5 * 10], [-100, 0]], rtol=1e-6)


def test_centroid_head_points_at_the_class_means() -> None:
    images = entries(unit(np.array([[1, 0.1, 0], [1, -0.1, 0], [0, 1, 0.1], [0, 1, -0.1]])), [0, 0, 1, 1])
    head = retrieve.fit_head("centroid", images, None)
    np.testing.assert_allclose(unit(head.weights), [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    assert not head.bias.any()


def test_whitened_part_is_the_normalised_lda_direction() -> None:
    """Against the formula written out with an explicit inverse over explicit residuals."""
    world = World(n_classes=5, dim=6)
    labels = np.repeat(np.arange(5), 4)
    vectors = world.images(labels).astype(np.float64)
    means = np.array([vectors[labels == label].mean(axis=0) for label in range(5)])
    residuals = vectors - means[labels]
    within = residuals.T @ residuals
    shrinkage = 0.5 * 6 / (0.5 * 6 + 15)
    covariance = (1 - shrinkage) * within / (np.trace(within) / 6) + shrinkage * np.eye(6)
    expected = np.zeros((5, 6))
    for label in range(5):
        offset = means[label] - means.mean(axis=0)
        expected[label] = np.linalg.inv(covariance) @ offset / np.sqrt(offset @ np.linalg.inv(covariance) @ offset)
    part = retrieve._whitened(retrieve._moments(vectors, labels, 5), 0.5)
    np.testing.assert_allclose(part.weights, expected, atol=1e-6)
    np.testing.assert_allclose(part.bias, -expected @ means.mean(axis=0), atol=1e-6)


def test_fused_beats_both_of_its_parts_and_is_calibrated() -> None:
    world = World()
    support, truth = np.repeat(np.arange(20), 4), np.repeat(np.arange(20), 100)
    images, texts, queries = entries(world.images(support), support), entries(world.names, np.arange(20)), world.images(truth)
    fused = retrieve.fit_head("fused", images, texts)
    top1 = accuracy(fused.scores(queries), truth)
    parts = [retrieve.fit_head("fused", images, None), retrieve.fit_head("text", images, texts)]
    assert top1 > max(accuracy(part.scores(queries), truth) for part in parts) + 0.02
    assert softmax(fused.scores(queries)).max(axis=1).mean() == pytest.approx(top1, abs=0.06)
    assert min(fused.meta["scales"]) > 0 and fused.meta["held_out"] == 80


def test_text_that_says_nothing_is_left_out() -> None:
    world = World()
    support = np.repeat(np.arange(20), 5)
    noise = entries(unit(world.rng.normal(size=world.names.shape)), np.arange(20))
    image_scale, text_scale = retrieve.fit_head("fused", entries(world.images(support), support), noise).meta["scales"]
    assert text_scale < 0.15 * image_scale


def test_class_without_images_or_without_text_stays_possible() -> None:
    world = World()
    support = np.repeat(np.arange(15), 4)  # classes 15..19 have a name alone, classes 0..4 images alone
    images = entries(world.images(support), support)
    texts = entries(world.names[5:], np.arange(5, 20))
    head = retrieve.fit_head("fused", images, texts)
    truth = np.repeat(np.arange(20), 50)
    hits = head.scores(world.images(truth)).argmax(axis=1) == truth
    chance = 1 / 20
    for group in (truth < 5, truth >= 15):
        assert hits[group].mean() > 6 * chance
    assert hits.mean() > 0.5


def test_memory_whose_kinds_share_no_class() -> None:
    world = World()
    support = np.repeat(np.arange(10), 3)
    head = retrieve.fit_head("fused", entries(world.images(support), support), entries(world.names[10:], np.arange(10, 20)))
    assert head.class_ids.tolist() == list(range(20)) and np.isfinite(head.weights).all() and np.isfinite(head.bias).all()


@pytest.mark.parametrize("mode", ["centroid", "fused"])
@pytest.mark.parametrize("with_texts", [False, True])
def test_one_shot_takes_the_defaults(mode: retrieve.Mode, with_texts: bool) -> None:
    world = World()
    images = entries(world.images(np.arange(20)), np.arange(20))
    texts = entries(world.names, np.arange(20)) if with_texts else None
    head = retrieve.fit_head(mode, images, texts)
    assert head.meta["held_out"] == 0
    if mode == "centroid" or texts is None:
        assert head.meta["scales"] == [retrieve.IMAGE_SCALE]
    else:
        assert head.meta["scales"][0] == head.meta["scales"][1] > 0
    truth = np.repeat(np.arange(20), 20)
    assert accuracy(head.scores(world.images(truth)), truth) > 0.25


def test_one_class_and_one_image() -> None:
    head = retrieve.fit_head("fused", entries(unit(np.ones((1, 4))), [5]), None)
    assert head.class_ids.tolist() == [5] and np.isfinite(head.scores(np.ones((2, 4)))).all()


def test_held_out_scores_are_those_of_a_head_without_the_fold() -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    vectors = world.images(support)
    images, texts = entries(vectors, support), entries(world.names, np.arange(20))
    scores = retrieve.held_out_scores("fused", images, texts)
    problem = retrieve._Problem.of("fused", images, texts)
    meta = retrieve.fit_head("fused", images, texts).meta
    for fold in range(3):
        inside = problem.folds == fold
        assert np.bincount(support[inside], minlength=20).tolist() == [1] * 20
        rest = replace(retrieve._Problem.of("fused", entries(vectors[~inside], support[~inside]), None), prior=meta["prior"])
        parts = [rest.parts()[0], problem.parts()[1]]
        weights, bias = retrieve._combine(parts, np.array(meta["scales"]), np.zeros(2))
        np.testing.assert_allclose(scores[inside], vectors[inside] @ weights.T + bias, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(retrieve.held_out_scores("fused", images, texts, rows=[7, 2]), scores[[7, 2]], atol=1e-5)


def test_held_out_scores_tell_the_accuracy_on_new_images() -> None:
    world = World()
    support, truth = np.repeat(np.arange(20), 8), np.repeat(np.arange(20), 100)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    held_out = accuracy(retrieve.held_out_scores("fused", images, texts), support)
    new = accuracy(retrieve.fit_head("fused", images, texts).scores(world.images(truth)), truth)
    assert held_out == pytest.approx(new, abs=0.08)


def test_copies_of_an_image_do_not_vouch_for_each_other() -> None:
    """Every image twice, and labels at random: whoever sees its own copy does better than chance."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 4)
    vectors = unit(rng.normal(size=(40, 16)))
    twice = entries(np.repeat(vectors, 2, axis=0), np.repeat(labels, 2))
    assert accuracy(retrieve.held_out_scores("fused", twice, None), np.repeat(labels, 2)) < 0.3


def test_single_shot_classes_are_spread_over_the_folds() -> None:
    labels = np.r_[np.arange(20), 20, 20, 20, 20]
    folds, n_folds = retrieve._folds(np.random.default_rng(0).normal(size=(24, 3)), labels)
    assert n_folds == 4 and sorted(folds[20:]) == [0, 1, 2, 3]
    assert np.bincount(folds[:20]).tolist() == [5, 5, 5, 5]


def test_only_image_of_a_class_is_scored_by_its_name() -> None:
    world = World()
    support = np.r_[np.repeat(np.arange(19), 4), 19]
    vectors = world.images(support)
    vectors[-1] = world.names[19]
    scores = retrieve.held_out_scores("fused", entries(vectors, support), entries(world.names, np.arange(20)))
    assert scores[-1].argmax() == 19


def test_fit_is_deterministic() -> None:
    world = World()
    support = np.repeat(np.arange(20), 5)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    first, second = (retrieve.fit_head("fused", images, texts, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.meta == second.meta


def test_head_round_trip_is_exact_and_searchable() -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    head = retrieve.fit_head("fused", entries(world.images(support), support), None)
    stored = head.to_entries()
    shuffled = np.random.default_rng(0).permutation(20)
    again = retrieve.Head.from_entries(
        Entries(
            [stored.entry_ids[row] for row in shuffled],
            stored.class_ids[shuffled],
            [stored.class_names[row] for row in shuffled],
            stored.vectors[shuffled],
        ),
        head.meta,
    )
    np.testing.assert_array_equal(again.weights, head.weights)
    np.testing.assert_array_equal(again.bias, head.bias)
    assert again.class_names == head.class_names and again.meta == head.meta
    queries = world.images(support)
    np.testing.assert_allclose(retrieve.augment(queries) @ stored.vectors.T, head.scores(queries), atol=1e-4)


@pytest.mark.parametrize(("mode", "word"), [("text", "classes"), ("centroid", "support"), ("fused", "empty")])
def test_missing_kinds_are_the_users_mistake(mode: retrieve.Mode, word: str) -> None:
    with pytest.raises(UserError, match=word):
        retrieve.fit_head(mode, None, None)


def test_two_encoders_in_one_memory_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="dimension"):
        retrieve.fit_head("fused", entries(np.eye(3), [0, 1, 2]), entries(np.eye(4), [0, 1, 2, 3]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_candidates_are_the_sorted_classes(rows: list[list[int]], top_k: int) -> None:
    class_ids = np.array([40, 10, 30, 20, 60, 50])
    names = [f"class {class_id}" for class_id in class_ids]
    for row, found in zip(rows, retrieve.candidates_from_scores(np.array(rows), class_ids, names, top_k), strict=True):
        oracle = sorted(zip(row, class_ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:top_k]
        assert [(candidate.score, candidate.class_id) for candidate in found] == oracle
        assert all(candidate.class_name == f"class {candidate.class_id}" for candidate in found)


def test_neighbors_merge_into_unique_classes() -> None:
    hits = Hits(
        np.array([[0.9, 0.8, 0.8, 0.7], [0.5, 0.4, -np.inf, -np.inf]], np.float32),
        np.array([[4, 4, 2, 1], [3, 3, -1, -1]]),
        [["a", "b", "c", "d"], ["e", "f", "", ""]],
    )
    found = retrieve.knn_candidates(hits, {1: "one", 2: "two", 3: "three", 4: "four"}, 2)
    assert [[candidate.class_name for candidate in row] for row in found] == [["four", "two"], ["three"]]
    assert found[0][0].score == pytest.approx(0.9)


def test_ties_of_neighbors_go_to_the_lower_class_id() -> None:
    hits = Hits(np.array([[0.5, 0.5]], np.float32), np.array([[9, 2]]), [["a", "b"]])
    assert [candidate.class_id for candidate in retrieve.knn_candidates(hits, {2: "two", 9: "nine"}, 5)[0]] == [2, 9]


def shots_of(class_ids: np.ndarray) -> np.ndarray:
    """Position of each image within its class, in file order."""
    return np.array([(class_ids[:row] == class_ids[row]).sum() for row in range(len(class_ids))])


@needs_data
def test_real_clip_memories_beat_one_nearest_neighbor() -> None:
    """CLIP ViT-B/16, one of the three images of each class left out in turn; both see the same two."""
    gains = {}
    for name in ("cub200", "cars196", "dogs120"):
        data = np.load(SHARED_DATA / "clip_b16_memories" / f"{name}.npz")
        vectors, labels = unit(data["embeddings"].astype(np.float32)), data["class_id"].astype(np.int64)
        shots, fused, nearest = shots_of(labels), [], []
        for shot in range(3):
            kept, out = shots != shot, shots == shot
            head = retrieve.fit_head("fused", entries(vectors[kept], labels[kept]), None)
            fused.append(accuracy(head.scores(vectors[out]), labels[out]))
            nearest.append((labels[kept][(vectors[out] @ vectors[kept].T).argmax(axis=1)] == labels[out]).mean())
        gains[name] = np.mean(fused) - np.mean(nearest)
    assert min(gains.values()) >= 0.06, gains
    assert np.mean(list(gains.values())) >= 0.10, gains


@needs_data
@pytest.mark.parametrize(("shots", "gain"), [(4, 0.07), (16, 0.03)])
def test_real_grocery_embeddings_beat_one_nearest_neighbor(shots: int, gain: float) -> None:
    """MobileNet embeddings of the train photos, random support images of each class, the others as queries.

    The photos of a class are near copies of each other, so that 1-NN is strong on this split.
    """
    data = np.load(SHARED_DATA / "grocery" / "mobilenet_v1_train.npz")
    vectors, labels = unit(data["embeddings"].astype(np.float32)), data["class_id"].astype(np.int64)
    differences = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        chosen = [rng.permutation(np.flatnonzero(labels == label)) for label in range(labels.max() + 1)]
        kept = np.concatenate([rows[: min(shots, len(rows) - 1)] for rows in chosen])
        out = np.setdiff1d(np.arange(len(labels)), kept)
        head = retrieve.fit_head("fused", entries(vectors[kept], labels[kept]), None)
        nearest = (labels[kept][(vectors[out] @ vectors[kept].T).argmax(axis=1)] == labels[out]).mean()
        differences.append(accuracy(head.scores(vectors[out]), labels[out]) - nearest)
    assert np.mean(differences) >= gain, differences
