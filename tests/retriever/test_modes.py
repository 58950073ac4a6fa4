from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rar.memory.entries import Entries, ExactIndex, Hits
from rar.retriever import gaussian, heads, modes, votes
from rar.schema import Candidate, UserError
from tests.conftest import SHARED_DATA

SLOW = pytest.mark.slow
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


def propose(
    head: modes.Head, images: Entries, queries: np.ndarray, top_k: int, n_neighbors: int, sharpness: float | None = None
) -> list[list[Candidate]]:
    exact = ExactIndex(images.vectors.shape[1])
    exact.upsert(images.entry_ids, images.class_ids, images.class_names, images.vectors)
    found = modes.retrieve_by_votes(head, exact.search, queries, top_k, n_neighbors, sharpness)
    return found.candidates(head.class_ids, head.class_names)


def top1(head: modes.Head, images: Entries, queries: np.ndarray) -> np.ndarray:
    """(N,) the class that a mode proposes first."""
    if "votes" in head.meta:
        return np.array([row[0].class_id for row in propose(head, images, queries, 1, modes.N_NEIGHBORS)])
    return head.class_ids[head.scores(queries).argmax(axis=1)]


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
    head = modes.fit_head("text", None, entries(prototypes, [7, 3]))
    assert head.class_ids.tolist() == [3, 7] and head.class_names == ["class 3", "class 7"]
    np.testing.assert_allclose(head.scores(prototypes), [[0, 100], [100, 0]])
    assert not head.bias.any() and head.meta["held_out"] == 0


def test_synonyms_are_averaged_and_renormalised() -> None:
    texts = entries(np.array([[1.0, 0], [0, 1.0], [-1.0, 0]]), [0, 0, 1])
    weights = modes.fit_head("fused", None, texts).weights
    np.testing.assert_allclose(weights, [[50**0.5 * 10, 50**0.5 * 10], [-100, 0]], rtol=1e-6)


def test_centroid_head_points_at_the_class_means() -> None:
    images = entries(unit(np.array([[1, 0.1, 0], [1, -0.1, 0], [0, 1, 0.1], [0, 1, -0.1]])), [0, 0, 1, 1])
    head = modes.fit_head("centroid", images, None)
    np.testing.assert_allclose(unit(head.weights), [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    assert not head.bias.any()


def test_fused_beats_both_of_its_parts_and_is_calibrated() -> None:
    world = World()
    support, truth = np.repeat(np.arange(20), 4), np.repeat(np.arange(20), 100)
    images, texts, queries = entries(world.images(support), support), entries(world.names, np.arange(20)), world.images(truth)
    fused = modes.fit_head("fused", images, texts)
    top1 = accuracy(fused.scores(queries), truth)
    parts = [modes.fit_head("fused", images, None), modes.fit_head("text", images, texts)]
    assert top1 > max(accuracy(part.scores(queries), truth) for part in parts) + 0.02
    assert softmax(fused.scores(queries)).max(axis=1).mean() == pytest.approx(top1, abs=0.08)
    assert min(fused.meta["scales"]) > 0 and fused.meta["held_out"] == 80


def test_text_that_says_nothing_is_left_out() -> None:
    world = World()
    support = np.repeat(np.arange(20), 5)
    images, noise = (
        entries(world.images(support), support),
        entries(unit(world.rng.normal(size=world.names.shape)), np.arange(20)),
    )
    image_scale, text_scale = modes.fit_head("fused", images, noise).meta["scales"]
    assert text_scale < 0.15 * image_scale
    truth = np.repeat(np.arange(20), 100)
    queries = world.images(truth)
    with_noise, without = (accuracy(modes.fit_head("fused", images, texts).scores(queries), truth) for texts in (noise, None))
    assert with_noise == pytest.approx(without, abs=0.03)


def test_class_without_images_or_without_text_stays_possible() -> None:
    world = World()
    support = np.repeat(np.arange(15), 4)  # classes 15..19 have a name alone, classes 0..4 images alone
    images = entries(world.images(support), support)
    texts = entries(world.names[5:], np.arange(5, 20))
    head = modes.fit_head("fused", images, texts)
    truth = np.repeat(np.arange(20), 50)
    hits = head.scores(world.images(truth)).argmax(axis=1) == truth
    chance = 1 / 20
    for group in (truth < 5, truth >= 15):
        assert hits[group].mean() > 6 * chance
    assert hits.mean() > 0.5


def test_memory_whose_kinds_share_no_class() -> None:
    world = World()
    support = np.repeat(np.arange(10), 3)
    head = modes.fit_head("fused", entries(world.images(support), support), entries(world.names[10:], np.arange(10, 20)))
    assert head.class_ids.tolist() == list(range(20)) and np.isfinite(head.weights).all() and np.isfinite(head.bias).all()


@pytest.mark.parametrize("mode", ["knn", "centroid", "lda", "fused"])
def test_one_shot_takes_the_defaults(mode: modes.Mode) -> None:
    world = World()
    images = entries(world.images(np.arange(20)), np.arange(20))
    head = modes.fit_head(mode, images, None)
    if mode == "knn":
        assert head.meta["votes"] == {"kind": "knn", "sharpness": votes.KNN.sharpness, "scale": votes.KNN.scale}
    else:
        assert head.meta["held_out"] == 0 and head.meta["scales"] == [heads.IMAGE_SCALE]
    truth = np.repeat(np.arange(20), 20)
    found = top1(head, images, world.images(truth))
    assert (found == truth).mean() > 0.25


def test_one_shot_beside_names_is_at_least_as_good_as_the_names() -> None:
    """The image of a class cannot vouch for itself; what it may add is held to a quarter of the names' weight."""
    gains = []
    for seed in range(5):
        world = World(seed=seed)
        images, texts = entries(world.images(np.arange(20)), np.arange(20)), entries(world.names, np.arange(20))
        truth = np.repeat(np.arange(20), 50)
        queries = world.images(truth)
        fused, text = (accuracy(modes.fit_head(mode, images, texts).scores(queries), truth) for mode in ("fused", "text"))
        gains.append(fused - text)
    assert np.mean(gains) > 0


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize("n_images", [1, 3])
def test_one_class(mode: modes.Mode, n_images: int) -> None:
    images, texts = entries(unit(np.ones((n_images, 4)) + np.eye(4)[:n_images]), [5] * n_images), entries(np.eye(4)[:1], [5])
    head = modes.fit_head(mode, images, texts)
    assert head.class_ids.tolist() == [5] and np.isfinite(head.scores(np.ones((2, 4)))).all()
    assert top1(head, images, unit(np.ones((2, 4)))).tolist() == [5, 5]
    assert modes.held_out_scores(mode, images, texts).shape == (n_images, 1)


def test_held_out_scores_are_those_of_a_head_without_the_fold() -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    vectors = world.images(support)
    images, texts = entries(vectors, support), entries(world.names, np.arange(20))
    scores = modes.held_out_scores("fused", images, texts)
    fitted = heads.fit(heads.Problem.of("fused", images, texts), 0)
    for fold in range(3):
        inside = fitted.problem.folds == fold
        assert np.bincount(support[inside], minlength=20).tolist() == [1] * 20
        alone = replace(
            fitted.problem, vectors=vectors[~inside], whole=gaussian.moments_of(vectors[~inside], support[~inside], 20)
        )
        head = heads.head_of(replace(fitted, problem=alone, biases=fitted.fold_biases[fold]))
        np.testing.assert_allclose(scores[inside], head.scores(vectors[inside]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(modes.held_out_scores("fused", images, texts, rows=[7, 2]), scores[[7, 2]], atol=1e-5)


def test_a_class_bias_is_how_often_it_is_right_over_how_often_expected_outside_the_fold() -> None:
    world = World()
    support = np.repeat(np.arange(20), 4)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    fitted = heads.fit(heads.Problem.of("fused", images, texts), 0)
    folds = fitted.problem.folds
    chances = softmax(modes.held_out_scores("fused", images, texts) - fitted.fold_biases[folds])
    for fold in range(4):
        seen, expected = np.bincount(support[folds != fold]), chances[folds != fold].sum(axis=0)
        np.testing.assert_allclose(fitted.fold_biases[fold], np.log((seen + 4) / (expected + 4)), atol=1e-4)
    np.testing.assert_allclose(fitted.biases, np.log((4 + 4) / (chances.sum(axis=0) + 4)), atol=1e-4)


def test_a_name_that_claims_the_images_of_another_is_held_back() -> None:
    """The name of class 0 lies between its own images and those of class 1."""
    rng = np.random.default_rng(0)
    means = unit(rng.normal(size=(6, 16)))
    names = means.copy()
    names[0] = unit(means[0] + 1.2 * means[1])
    labels = np.repeat(np.arange(6), 8)
    images = entries(unit(means[labels] + 0.5 * rng.normal(size=(48, 16))), labels)
    biases, fair = (
        heads.fit(heads.Problem.of("fused", images, entries(texts, np.arange(6))), 0).biases for texts in (names, means)
    )
    assert biases[0] - biases[1] < fair[0] - fair[1] - 0.1


@pytest.mark.parametrize("mode", ["knn", "tip"])
def test_held_out_votes_are_those_of_the_other_folds(mode: modes.Mode) -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    vectors = world.images(support)
    images, texts = entries(vectors, support), entries(world.names, np.arange(20))
    scores = modes.held_out_scores(mode, images, texts, n_neighbors=7)
    head = modes.fit_head(mode, images, texts, n_neighbors=7)
    folds = heads.Problem.of(mode, images, None if mode == "knn" else texts).folds
    for row in (0, 17, 59):
        kept = np.flatnonzero(folds != folds[row])
        found = propose(head, entries(vectors[kept], support[kept]), vectors[[row]], 3, 7)[0]
        assert [candidate.score for candidate in found] == pytest.approx(np.sort(scores[row])[::-1][:3].tolist(), abs=1e-4)
    np.testing.assert_allclose(
        modes.held_out_scores(mode, images, texts, rows=[7, 2], n_neighbors=7), scores[[7, 2]], atol=1e-5
    )


@pytest.mark.parametrize("mode", modes.MODES)
def test_held_out_scores_tell_the_accuracy_on_new_images(mode: modes.Mode) -> None:
    world = World()
    support, truth = np.repeat(np.arange(20), 8), np.repeat(np.arange(20), 100)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    held_out = accuracy(modes.held_out_scores(mode, images, texts), support)
    new = (top1(modes.fit_head(mode, images, texts), images, world.images(truth)) == truth).mean()
    assert held_out == pytest.approx(new, abs=0.08)


@pytest.mark.parametrize("mode", ["knn", "centroid", "lda", "fused"])
def test_copies_of_an_image_do_not_vouch_for_each_other(mode: modes.Mode) -> None:
    """Every image twice, and labels at random: whoever sees its own copy does better than chance."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 4)
    vectors = unit(rng.normal(size=(40, 16)))
    twice = entries(np.repeat(vectors, 2, axis=0), np.repeat(labels, 2))
    assert accuracy(modes.held_out_scores(mode, twice, None), np.repeat(labels, 2)) < 0.3


def test_single_shot_classes_are_spread_over_the_folds() -> None:
    labels = np.r_[np.arange(20), 20, 20, 20, 20]
    folds, n_folds = heads._folds(np.arange(24), labels)
    assert n_folds == 4 and sorted(folds[20:]) == [0, 1, 2, 3]
    assert np.bincount(folds[:20]).tolist() == [5, 5, 5, 5]


def test_only_image_of_a_class_is_scored_by_its_name() -> None:
    world = World()
    support = np.r_[np.repeat(np.arange(19), 4), 19]
    vectors = world.images(support)
    vectors[-1] = world.names[19]
    scores = modes.held_out_scores("fused", entries(vectors, support), entries(world.names, np.arange(20)))
    assert scores[-1].argmax() == 19


def test_fit_is_deterministic() -> None:
    world = World()
    support = np.repeat(np.arange(20), 5)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    first, second = (modes.fit_head("fused", images, texts, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.meta == second.meta


def test_head_round_trip_is_exact_and_searchable() -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    head = modes.fit_head("fused", entries(world.images(support), support), None)
    stored = head.to_entries()
    shuffled = np.random.default_rng(0).permutation(20)
    again = modes.Head.from_entries(
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
    np.testing.assert_allclose(modes.augment(queries) @ stored.vectors.T, head.scores(queries), atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "word"),
    [("text", "empty"), ("knn", "support"), ("centroid", "support"), ("tip", "empty"), ("lda", "empty"), ("fused", "empty")],
)
def test_missing_kinds_are_the_users_mistake(mode: modes.Mode, word: str) -> None:
    with pytest.raises(UserError, match=word):
        modes.fit_head(mode, None, None)
    assert not modes.allows(mode, images=False, texts=False)


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize("kinds", ["images", "texts", "both"])
def test_allows_says_what_can_be_fitted(mode: modes.Mode, kinds: str) -> None:
    images = entries(np.eye(3), [0, 1, 2]) if kinds != "texts" else None
    texts = entries(np.eye(3), [0, 1, 2]) if kinds != "images" else None
    if modes.allows(mode, images=images is not None, texts=texts is not None):
        assert modes.fit_head(mode, images, texts).class_ids.tolist() == [0, 1, 2]
    else:
        with pytest.raises(UserError, match=f"mode {mode} needs"):
            modes.fit_head(mode, images, texts)


def test_two_encoders_in_one_memory_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="dimension"):
        modes.fit_head("fused", entries(np.eye(3), [0, 1, 2]), entries(np.eye(4), [0, 1, 2, 3]))


def test_hits_of_a_head_are_its_classes_with_ties_by_class_id() -> None:
    scores = np.array([[0.9, 0.8, 0.8], [0.5, -np.inf, -np.inf]], np.float32)
    hits = Hits(scores, np.array([[4, 9, 2], [3, -1, -1]]), [["a", "b", "c"], ["e", "", ""]])
    class_ids, names = np.array([2, 3, 4, 9]), ["two", "three", "four", "nine"]
    found = modes.retrieve_from_hits(hits, class_ids, 3).candidates(class_ids, names)
    assert [[candidate.class_name for candidate in row] for row in found] == [["four", "two", "nine"], ["three"]]
    assert found[0][0].score == pytest.approx(0.9 - np.logaddexp.reduce([0.9, 0.8, 0.8])) and found[1][0].score == 0


def test_one_neighbor_is_the_plain_nearest() -> None:
    world = World()
    support, truth = np.repeat(np.arange(20), np.arange(1, 21)), np.repeat(np.arange(20), 20)  # classes of 1 to 20 images
    images, queries = entries(world.images(support), support), world.images(truth)
    expected = support[(queries @ images.vectors.T).argmax(axis=1)]
    head = modes.fit_head("knn", images, None)
    for n_neighbors, sharpness in ((1, None), (1, 1000.0)):
        found = propose(head, images, queries, 5, n_neighbors, sharpness)
        assert [row[0].class_id for row in found] == expected.tolist()
        assert all(len({candidate.class_id for candidate in row}) == 5 for row in found)


def test_equally_near_entries_go_to_the_lower_class() -> None:
    """Copies of one picture in four classes; the search sees one neighbor and entry ids that say otherwise."""
    vectors = np.tile(np.eye(3, dtype=np.float32)[:1], (4, 1))
    images = Entries(["a", "b", "c", "d"], np.array([9, 5, 2, 7]), ["nine", "five", "two", "seven"], vectors)
    head = modes.fit_head("knn", images, None)
    found = propose(head, images, vectors[:1], 3, 1)[0]
    assert [candidate.class_id for candidate in found] == [2, 5, 7]


@pytest.mark.parametrize("mode", ["knn", "tip"])
@pytest.mark.parametrize(("top_k", "n_neighbors"), [(3, 1), (20, 5), (50, 20), (2, 16_384)])
def test_candidates_are_unique_and_as_many_as_can_be(mode: modes.Mode, top_k: int, n_neighbors: int) -> None:
    world = World()
    support = np.repeat(np.arange(20), 3)
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    head = modes.fit_head(mode, images, texts)
    for row in propose(head, images, world.images(np.arange(20)), top_k, n_neighbors):
        assert len({candidate.class_id for candidate in row}) == len(row) == min(top_k, 20)
        scores = [candidate.score for candidate in row]
        assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()


def test_votes_of_a_search_are_votes_over_all_entries() -> None:
    """Slow and obvious: every cosine, sorted; 20 neighbors vote, with the rule that was fitted."""
    world = World()
    support = np.repeat(np.arange(20), np.arange(1, 21))
    images, queries = entries(world.images(support), support), world.images(np.arange(20))
    head = modes.fit_head("knn", images, None)
    rule, sizes = head.meta["votes"], np.bincount(support)
    for query, row in zip(queries, propose(head, images, queries, 3, 20), strict=True):
        cosines = (images.vectors @ query).astype(np.float64)
        totals = np.zeros(20)
        for entry in np.argsort(-cosines)[:20]:
            totals[support[entry]] += np.exp(rule["sharpness"] * (cosines[entry] - 1)) / sizes[support[entry]]
        order = np.argsort(-totals, kind="stable")[: min(3, (totals > 0).sum())]
        assert [candidate.class_id for candidate in row][: len(order)] == order.tolist()
        expected = (rule["scale"] * np.log(totals[order])).tolist()
        assert [candidate.score for candidate in row][: len(order)] == pytest.approx(expected, rel=1e-3)


def test_tip_is_text_and_votes() -> None:
    world = World()
    support = np.repeat(np.arange(15), 4)  # classes 15..19 have a name alone
    images, texts = entries(world.images(support), support), entries(world.names, np.arange(20))
    head = modes.fit_head("tip", images, texts, n_neighbors=10)
    rule, queries = head.meta["votes"], world.images(np.arange(20))
    text = modes.fit_head("text", None, texts).scores(queries)
    factor = np.linalg.norm(head.weights[0]) / 100
    for query, names, row in zip(queries, text, propose(head, images, queries, 20, 10), strict=True):
        cosines = (images.vectors @ query).astype(np.float64)
        expected = factor * names.astype(np.float64)
        for entry in np.argsort(-cosines)[:10]:
            expected[support[entry]] += rule["scale"] * np.exp(-rule["sharpness"] * (1 - cosines[entry]))
        assert {candidate.class_id: candidate.score for candidate in row} == pytest.approx(dict(enumerate(expected)), abs=1e-3)


def test_knn_knows_the_classes_of_images_and_tip_all() -> None:
    world = World()
    images, texts = (
        entries(world.images(np.repeat(np.arange(12), 2)), np.repeat(np.arange(12), 2)),
        entries(world.names[8:], np.arange(8, 20)),
    )
    assert modes.fit_head("knn", images, texts).class_ids.tolist() == list(range(12))
    tip = modes.fit_head("tip", images, texts)
    assert tip.class_ids.tolist() == list(range(20)) and np.isfinite(tip.weights).all() and np.isfinite(tip.bias).all()
    assert np.isfinite(modes.held_out_scores("tip", images, texts)).all()


def test_the_rule_of_the_votes_survives_the_store() -> None:
    world = World()
    support = np.repeat(np.arange(20), np.arange(1, 21))
    images, queries = entries(world.images(support), support), world.images(np.arange(20))
    head = modes.fit_head("knn", images, None)
    meta = json.loads(json.dumps(head.meta))
    again = modes.Head.from_entries(head.to_entries(), meta)
    assert propose(again, images, queries, 5, 20) == propose(head, images, queries, 5, 20)


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
            head = modes.fit_head("fused", entries(vectors[kept], labels[kept]), None)
            fused.append(accuracy(head.scores(vectors[out]), labels[out]))
            nearest.append((labels[kept][(vectors[out] @ vectors[kept].T).argmax(axis=1)] == labels[out]).mean())
        gains[name] = np.mean(fused) - np.mean(nearest)
    assert min(gains.values()) >= 0.10, gains
    assert np.mean(list(gains.values())) >= 0.13, gains


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(("shots", "gain"), [pytest.param(1, 0.0, marks=SLOW), (4, 0.07), pytest.param(16, 0.03, marks=SLOW)])
def test_real_grocery_embeddings_beat_one_nearest_neighbor(shots: int, gain: float) -> None:
    """MobileNet embeddings of the train photos, random support images of each class, the others as queries.

    The photos of a class are near copies of each other, so that 1-NN is strong on this split.
    """
    data = np.load(SHARED_DATA / "grocery" / "mobilenet_v1_train.npz")
    vectors, labels = unit(data["embeddings"].astype(np.float32)), data["class_id"].astype(np.int64)
    differences = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        chosen = [rng.permutation(np.flatnonzero(labels == label)) for label in range(labels.max() + 1)]
        kept = np.concatenate([rows[: min(shots, len(rows) - 1)] for rows in chosen])
        out = np.setdiff1d(np.arange(len(labels)), kept)
        head = modes.fit_head("fused", entries(vectors[kept], labels[kept]), None)
        nearest = (labels[kept][(vectors[out] @ vectors[kept].T).argmax(axis=1)] == labels[out]).mean()
        differences.append(accuracy(head.scores(vectors[out]), labels[out]) - nearest)
    assert np.mean(differences) >= gain, differences
