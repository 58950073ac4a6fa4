"""Groups of near duplicates against a plain search, and what they make of a memory of bursts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.retriever import bursts, modes
from tests.conftest import SHARED_DATA
from tests.retriever.test_modes import accuracy, entries, unit


def flooded(unit_vectors: np.ndarray, labels: np.ndarray, least: float) -> list[set[int]]:
    """Slowly and obviously: from each image to all that are alike, and on from there."""
    left, found = set(range(len(labels))), []
    while left:
        group, ahead = set(), [min(left)]
        while ahead:
            one = ahead.pop()
            group.add(one)
            near = np.flatnonzero((unit_vectors @ unit_vectors[one] > least) & (labels == labels[one])).tolist()
            ahead += [other for other in near if other not in group]
        found.append(group)
        left -= group
    return found


@given(st.integers(0, 2**32 - 1), st.floats(-0.5, 0.95), st.integers(1, 9), st.integers(1, 40), st.integers(1, 4))
def test_linked_images_are_those_that_a_plain_search_reaches(
    seed: int, least: float, block: int, edges: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors, labels = unit(rng.normal(size=(30, 4))), np.sort(rng.integers(classes, size=30))
    known = bursts.BLOCK, bursts.EDGES
    bursts.BLOCK, bursts.EDGES = block, edges
    try:
        found = bursts._linked(vectors, np.unique(labels, return_index=True)[1], least)
    finally:
        bursts.BLOCK, bursts.EDGES = known
    groups = [set(np.flatnonzero(found == first).tolist()) for first in np.unique(found).tolist()]
    assert groups == flooded(vectors, labels, least)


def in_bursts(rng: np.random.Generator, means: np.ndarray, each: int, photos: int) -> tuple[np.ndarray, np.ndarray]:
    """`each` scenes a class about its mean, `photos` of each scene, nearly alike."""
    labels = np.repeat(np.arange(len(means)), each)
    scenes = means[labels] + 2.5 * rng.normal(size=(len(labels), means.shape[1]))
    photo = np.repeat(scenes, photos, axis=0) + 0.25 * rng.normal(size=(len(labels) * photos, means.shape[1]))
    return unit(photo), np.repeat(labels, photos)


@pytest.mark.parametrize("mode", ["knn", "lda", "fused"])
def test_held_out_bursts_tell_the_accuracy_on_new_scenes(mode: modes.Mode) -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(30, 64))
    vectors, labels = in_bursts(rng, means, 5, 6)
    fresh, truth = in_bursts(rng, means, 40, 1)
    groups = bursts.groups_of(vectors, labels)
    scenes = np.arange(len(labels)) // 6
    assert len(np.unique(np.column_stack([groups, scenes]), axis=0)) == 150  # a scene is never parted
    assert len(np.unique(groups)) > 140
    images = entries(vectors, labels)
    held_out = accuracy(modes.held_out_scores(mode, images, None), labels)
    head = modes.fit_head(mode, images, None)
    if mode == "knn":
        new = (labels[(fresh @ vectors.T).argmax(axis=1)] == truth).mean()
    else:
        new = accuracy(head.scores(fresh), truth)
        assert head.meta["groups"] == len(np.unique(groups))
    alone = np.where(np.eye(len(labels), dtype=bool), -1, vectors @ vectors.T)  # a photo of the same scene is always there
    assert (labels[alone.argmax(axis=1)] == labels).mean() > 0.95
    assert new - 0.13 < held_out < new + 0.05 and new < 0.6  # a scene fewer of five is worth something


def test_close_classes_are_not_taken_for_bursts() -> None:
    """Every class is far closer than the classes are to each other: nothing can tell, so that images stay apart."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 6)
    vectors = unit(rng.normal(size=(10, 64)))[labels] + 0.02 * rng.normal(size=(60, 64))
    assert len(np.unique(bursts.groups_of(vectors, labels))) == 60
    twice = bursts.groups_of(np.repeat(vectors, 2, axis=0), np.repeat(labels, 2))
    assert np.array_equal(twice[::2], twice[1::2]) and len(np.unique(twice)) == 60


def test_one_class_alone_and_no_image() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(8, 5)))
    assert len(np.unique(bursts.groups_of(vectors, np.zeros(8, np.int64)))) == 8
    assert len(bursts.groups_of(vectors[:0], np.zeros(0, np.int64))) == 0


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(("shots", "fresh"), [(4, 0.487), (8, 0.528), (16, 0.574)])
def test_recorded_grocery_photos_are_judged_as_the_official_test_photos_are(shots: int, fresh: float) -> None:
    """fresh: 1-NN of these embeddings on the official test photos (data/README.md), which are not here."""
    data = np.load(SHARED_DATA / "grocery" / "mobilenet_v1_train.npz")
    vectors, labels = unit(data["embeddings"].astype(np.float32)), data["class_id"]
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)])
        groups = bursts.groups_of(vectors[rows], labels[rows])
        cosines = np.where(groups[:, None] == groups[None], -1, vectors[rows] @ vectors[rows].T)
        found.append((labels[rows][cosines.argmax(axis=1)] == labels[rows]).mean())
    assert np.mean(found) == pytest.approx(fresh, abs=0.03)


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["cub200", "cars196", "dogs120"])
def test_photos_that_came_one_by_one_are_no_bursts(name: str) -> None:
    data = np.load(SHARED_DATA / "clip_b16_memories" / f"{name}.npz")
    vectors, labels = unit(data["embeddings"].astype(np.float32)), data["class_id"]
    assert len(np.unique(bursts.groups_of(vectors, labels))) > 0.99 * len(labels)
