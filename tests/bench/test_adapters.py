from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rar.bench import adapters
from rar.memory.collection import Collection
from rar.memory.store import open_store
from rar.schema import UserError
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")

README_LEAVE_ONE_OUT = {"cub200": 0.407, "cars196": 0.408, "dogs120": 0.197}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    with open_store(str(tmp_path_factory.mktemp("adapters") / "milvus")) as address:
        yield Collection(address, "adapters")


def write_set(folder: Path, name: str, counts: list[int], dim: int = 8) -> np.ndarray:
    """Clusters of these sizes, not normalised, in float16; returns their labels."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)) * 10, counts))
    means = rng.normal(size=(len(counts), dim))
    vectors = 3 * (means[labels // 10] + 0.6 * rng.normal(size=(len(labels), dim)))
    np.savez(folder / f"{name}.npz", embeddings=vectors.astype(np.float16), class_id=labels)
    return labels


@pytest.mark.long
def test_run_measures_every_mode_of_every_set(tmp_path: Path) -> None:
    write_set(tmp_path, "even", [5] * 6)
    write_set(tmp_path, "uneven", [3, 3, 4, 9, 9])
    result = adapters.run(tmp_path, seeds=2, shots=(1, 2, 4))
    assert json.loads(json.dumps(result)) == result  # the bench prints it
    modes = {"knn1", "knn", "centroid", "lda", "fused"}
    assert set(result["sets"]) == {"even", "uneven"}
    for one in result["sets"].values():
        assert set(one["leave_one_out"]) == set(one["leave_shot_out"]) == modes
        assert all(0 <= top1 <= 1 for top1 in [*one["leave_one_out"].values(), *one["leave_shot_out"].values()])
        for by_mode in one["shots"].values():
            assert set(by_mode) == modes
            assert all(values["ci_low"] <= values["top1"] <= values["ci_high"] for values in by_mode.values())
    assert list(result["sets"]["even"]["shots"]) == ["1", "2"]  # at four shots one image of five is no test
    assert list(result["sets"]["uneven"]["shots"]) == ["1", "2", "4"]  # there two classes still have more than five
    assert (result["sets"]["uneven"]["images"], result["sets"]["uneven"]["classes"]) == (28, 5)
    assert result["sets"]["even"]["leave_shot_out"]["fused"] > 0.5


def test_nearest_other_entry_is_that_of_a_loop(tmp_path: Path, collection: Collection) -> None:
    write_set(tmp_path, "some", [4] * 5)
    entries = adapters.read(tmp_path / "some.npz")
    np.testing.assert_allclose(np.linalg.norm(entries.vectors, axis=1), 1, atol=1e-6)
    expected = []
    for row, query in enumerate(entries.vectors):
        cosines = entries.vectors @ query
        cosines[row] = -np.inf
        expected.append(entries.class_ids[cosines.argmax()])
    assert adapters._nearest_others(collection, entries).tolist() == expected


@pytest.mark.long
def test_the_left_out_image_is_not_in_what_scores_it(tmp_path: Path, collection: Collection) -> None:
    """Labels at random: whoever has seen an image does better than chance, which is a fifth."""
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(60, 40)), np.repeat(np.arange(5), 12)
    np.savez(tmp_path / "noise.npz", embeddings=vectors, class_id=labels)
    entries = adapters.read(tmp_path / "noise.npz")
    assert max(adapters._leave_one_out(collection, entries).values()) < 0.4
    assert max(adapters._leave_shot_out(collection, entries).values()) < 0.4


def test_draws_are_seeded_nested_and_leave_the_others_to_test() -> None:
    class_ids = np.repeat([4, 2, 9], [6, 5, 7])
    support, tested = adapters.draw(class_ids, 2, seed=1)
    assert sorted([*support, *tested]) == list(range(18))
    assert np.unique(class_ids[support], return_counts=True)[1].tolist() == [2, 2, 2]
    assert (
        adapters.draw(class_ids, 2, seed=1)[0].tolist() == support.tolist() != adapters.draw(class_ids, 2, seed=2)[0].tolist()
    )
    assert set(support) <= set(adapters.draw(class_ids, 4, seed=1)[0])


def test_interval_is_students() -> None:
    """Of 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt 3, t of 2 degrees of freedom 4.303."""
    summary = adapters._summary([{"fused": value} for value in (0.1, 0.2, 0.3)])["fused"]
    assert summary["top1"] == pytest.approx(0.2)
    assert summary["ci_high"] - 0.2 == pytest.approx(0.1 / 3**0.5 * 4.303) == pytest.approx(0.2 - summary["ci_low"])


def test_a_folder_of_nothing_and_a_file_of_something_else_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no NAME\.npz"):
        adapters.run(tmp_path)
    np.savez(tmp_path / "other.npz", embeddings=np.eye(3))
    with pytest.raises(UserError, match="no array 'class_id'"):
        adapters.run(tmp_path)


@needs_data
@pytest.mark.parametrize("name", sorted(README_LEAVE_ONE_OUT))
def test_recorded_nearest_neighbor_figures_are_reproduced(name: str, collection: Collection) -> None:
    entries = adapters.read(SHARED_DATA / "clip_b16_memories" / f"{name}.npz")
    top1 = (adapters._nearest_others(collection, entries) == entries.class_ids).mean()
    assert round(float(top1), 3) == README_LEAVE_ONE_OUT[name]


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "nearest", "lda"), [("cub200", 0.440, 0.512), ("cars196", 0.463, 0.537), ("dogs120", 0.236, 0.314)]
)
def test_recorded_trial_is_reproduced_and_beaten(name: str, nearest: float, lda: float, collection: Collection) -> None:
    entries = adapters.read(SHARED_DATA / "clip_b16_memories" / f"{name}.npz")
    found = adapters._leave_shot_out(collection, entries)
    assert round(found["knn1"], 3) == nearest
    assert found["lda"] == pytest.approx(lda, abs=0.02)  # theirs shrinks by a fixed 0.6
    assert found["fused"] > max(lda + 0.03, nearest + 0.10)


@pytest.mark.slow
def test_fused_is_the_best_on_the_miniature_world() -> None:
    found = adapters.miniature(seeds=2, shots=(1, 4, 16), tests=8)["sets"]["miniature_novel"]
    assert set(found["average"]) == {"knn1", "text", "knn", "centroid", "tip", "lda", "fused"}
    assert all(values["top1"] > 0 for values in found["gain"].values()), found["gain"]
    assert list(found["shots"]) == ["1", "4", "16"]
