"""The bench of tuning: what it reads of a run's metrics, its shifted photos, and (slow) a whole experiment of two steps.

Not covered: what is learned, which `rar bench tuning` measures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rar import config
from rar.bench import tuning
from rar.miniature.world import render, rng_of, vocabulary
from rar.tune import recipe


def test_accuracies_and_gains_are_told_by_set_and_length() -> None:
    key = "conditional_rank_accuracy"
    values = {f"before.novel.{key}": 0.2, f"before.novel.{key}.ci_low": 0.1, f"after.novel.{key}_at_20": 0.5}
    values |= {
        f"gain.novel.{key}": 0.3,
        f"gain.novel.{key}.ci_low": 0.25,
        "after.novel.label_mass": 0.9,
        "before.novel.lists": 9,
    }
    assert tuning._told(values) == {
        "before": {"novel": 0.2},
        "after": {"novel_at_20": 0.5},
        "gain": {"novel": 0.3, "novel_low": 0.25},
        "beside": {"novel.label_mass": 0.9},
    }


def test_means_are_over_seeds() -> None:
    rows = [{"before": {"novel": 0.2, "seen": 0.5}, "minutes": 1.0}, {"before": {"novel": 0.4}, "minutes": 3.0}]
    found = tuning._mean(rows)
    assert found["minutes"] == 2.0 and found["before"] == {"novel": pytest.approx(0.3)}


def test_a_shifted_photo_is_darker_and_as_large_and_the_same_each_time() -> None:
    spec = vocabulary("novel", 0)[0]

    def drawn() -> tuple[np.ndarray, np.ndarray]:
        rng = rng_of(0, "shifted", spec.name, 0)
        photo = render(spec, 96, rng)
        return photo, tuning.darkened(photo, rng)

    photo, dark = drawn()
    assert dark.shape == photo.shape and dark.dtype == np.uint8
    assert dark.mean() < 0.75 * photo.mean() and np.array_equal(dark, drawn()[1])


def test_every_arm_is_a_config() -> None:
    """One that `rar tune` would refuse before anything is opened costs the bench an hour."""
    for arms in tuning.ARMS.values():
        for own in arms.values():
            tune = {name: value for name, value in own.items() if name != "ranker"}
            recipe.bare(config.validated(config.Config, {"ranker": own.get("ranker", {}), "tune": tune}))


@pytest.mark.slow
def test_an_experiment_from_end_to_end(tmp_path: Path) -> None:
    found = tuning.run(tmp_path, [0], ["shifted"], steps=2)["shifted"]["shifted"]
    one = found["seeds"]["0"]
    assert one["lost"] == pytest.approx(one["before"]["plain"] - one["before"]["shifted"])
    assert found["mean"]["minutes"] == one["minutes"] > 0 and {"shifted", "plain"} <= one["gain"].keys()
    assert tuning.run(tmp_path, [0], ["shifted"], steps=2)["shifted"]["shifted"] == found, "what was run is not run again"
