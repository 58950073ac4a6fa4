"""The bench of fits: what it draws can be told apart, and what it reports is of a process of its own."""

from __future__ import annotations

import numpy as np
import pytest

from rar.bench import fit, scale
from rar.retriever.modes import fit_head
from rar.schema import UserError


def test_a_fit_is_timed_in_a_process_of_its_own() -> None:
    row = fit.run([7], shots=2, dim=16, repeats=1, modes=["fused"])["sizes"]["7"]["fused"]
    assert 0 < row["seconds"] < 60 and 0 < row["cpu_seconds"] < 60 and 0 < row["before_mib"] <= row["peak_mib"]


@pytest.mark.parametrize(("classes", "shots"), [([1], 4), ([20, 0], 4), ([20], 0)])
def test_too_few_to_fit_is_a_line(classes: list[int], shots: int) -> None:
    with pytest.raises(UserError, match="two classes of one shot"):
        fit.run(classes, shots)


@pytest.mark.parametrize("sizes", [[10_000], [10_000, 10_000], [0, 10]])
def test_growth_needs_two_sizes(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="two sizes"):
        scale.run(sizes)


def test_drawn_pictures_are_of_their_class() -> None:
    centres = np.random.default_rng(0).normal(size=(5, 64))
    images = fit.entries(np.repeat(centres, 3, axis=0) + 0.1, 3)
    assert images.class_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] and images.class_names[3] == "class 1"
    np.testing.assert_allclose(np.linalg.norm(images.vectors, axis=1), 1, atol=1e-6)
    scores = fit_head("centroid", images, None).scores(fit.entries(centres, 1).vectors)
    assert scores.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]
