"""The vocabulary-free bench on a small made set, where every answer can be told, and on the recorded guesses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rar.bench.vocabulary_free import rank_by_names, run
from rar.encoder.sentences import SentenceEncoder
from rar.schema import UserError
from tests import tiny_bert
from tests.conftest import SHARED_DATA, needs_shared_data

GULL, OWL = ["herring gull", "sea bird", "gull"], ["tawny owl", "night bird", "owl"]


def write(folder: Path, guesses: list[list[str]], names: tuple[str, str] = ("Larus argentatus", "Strix aluco")) -> Path:
    """Three pictures of a gull, three of an owl, far apart."""
    vectors = np.array([[1, 0, 0.1], [1, 0, 0.2], [1, 0, 0.3], [0, 1, 0.1], [0, 1, 0.2], [0, 1, 0.3]], np.float16)
    np.savez(folder / "birds.npz", embeddings=vectors, class_id=np.repeat([0, 1], 3))
    told = {"class_names": names, "files": ["x"] * 6, "guessed_names": guesses}
    (folder / "birds.json").write_text(json.dumps(told))
    return folder


@pytest.mark.long
def test_consistent_names_make_whole_clusters(tmp_path: Path) -> None:
    """All call the gull so: cACC 1, though no guess is the true name; the truth is not used."""
    result = run(write(tmp_path, [GULL] * 3 + [OWL] * 3))["sets"]["birds"]
    assert (result["images"], result["names"]) == (6, 6)
    for arm in ("guess", "knn1", "retriever", "ranked"):
        assert result[arm] == {"cacc": 1.0, "sacc": None}


@pytest.mark.long
def test_a_stray_guess_is_a_cluster_of_its_own_until_ranked(tmp_path: Path) -> None:
    """One owl is first called a kite, which the memory without it does not know; its second guess, owl, is a candidate."""
    stray = ["kite", "owl", "hawk"]
    result = run(write(tmp_path, [["gull"]] * 3 + [["owl"], ["owl"], stray]))["sets"]["birds"]
    assert result["guess"]["cacc"] == pytest.approx(5 / 6)
    assert result["ranked"]["cacc"] == 1.0


@pytest.mark.long
def test_similarity_by_a_text_tower(tmp_path: Path) -> None:
    """By the miniature's, in words that it knows; by words that it does not know, it says nothing."""
    known = [["red star", "star", "red sun"]] * 3 + [["blue ring", "ring", "blue moon"]] * 3
    unknown = run(write(tmp_path, [GULL] * 3 + [OWL] * 3), "miniature")
    assert unknown["encoder"] == "miniature" and np.isnan(unknown["sets"]["birds"]["guess"]["sacc"])
    assert set(run(write(tmp_path, known), "miniature")["sets"]["birds"]["guess"]) == {"cacc", "sacc"}


@pytest.mark.long
def test_similarity_by_a_sentence_encoder(tmp_path: Path) -> None:
    """Of names in words that it knows, the mean cosine of guess and truth; itself, 1."""
    guesses = [["red star"], ["red sun"], ["red star"], ["blue ring"], ["blue ring"], ["blue moon"]]
    judge = str(tiny_bert.write(tmp_path / "bert"))
    found = run(write(tmp_path, guesses, ("red star", "blue ring")), sentence_encoder=judge)
    embed = SentenceEncoder(judge).embed
    cosines = (embed([one[0] for one in guesses]) * embed(["red star"] * 3 + ["blue ring"] * 3)).sum(axis=1)
    assert found["encoder"] == judge
    assert found["sets"]["birds"]["guess"]["sacc"] == pytest.approx(cosines.mean()) and cosines.min() < 1


def test_two_judges_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by one of them"):
        run(write(tmp_path, [GULL] * 6), "miniature", "bert")


def test_ranking_by_names() -> None:
    assert rank_by_names(["owl", "herring gull", "tern"], ["Tern", "kite", "owl"]) == ["tern", "owl", "herring gull"]
    assert rank_by_names(["owl", "tern"], []) == ["owl", "tern"]


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no NAME"):
        run(tmp_path)


@pytest.mark.long
@needs_shared_data
def test_recorded_guesses_run_end_to_end(tmp_path: Path) -> None:
    """Every arm predicts a guessed name for every picture of the smallest of the three sets."""
    for suffix in (".npz", ".json"):
        (tmp_path / f"dogs120{suffix}").symlink_to(SHARED_DATA / f"clip_b16_memories/dogs120{suffix}")
    found = run(tmp_path)["sets"]["dogs120"]
    assert found["images"] == 360 and all(0.15 < found[arm]["cacc"] < 0.9 for arm in ("guess", "knn1", "retriever", "ranked"))
