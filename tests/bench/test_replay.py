"""`rar bench replay`: on a folder small enough to be worked out by hand, and on the recorded answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rar.bench import replay
from rar.schema import Candidate, RankStatus, UserError
from tests.conftest import SHARED_DATA, needs_shared_data


def write_set(folder: Path, name: str, responses: dict[str, list[str]], candidates: list[list[int]] | None) -> None:
    names = ["Red Kite", "Blue_Jay", "Colt's Foot"]
    truth = {f"{i}.jpg": names[i % 3] for i in range(150)}
    (folder / "gpt4v_rankings").mkdir(exist_ok=True)
    answers = {"class_names": names, "truth": truth, "responses": responses}
    (folder / "gpt4v_rankings" / f"{name}.json").write_text(json.dumps(answers))
    if candidates is not None:
        (folder / "clip_top10").mkdir(exist_ok=True)
        logits = np.tile([3.0, 2.0], (150, 1))
        arrays: dict[str, Any] = {
            "files": list(truth),
            "class_id": np.arange(150) % 3,
            "candidate_ids": candidates,
            "candidate_logits": logits,
        }
        np.savez(folder / "clip_top10" / f"{name}.npz", **arrays)
        (folder / "clip_top10" / f"{name}.classes.json").write_text(json.dumps(["red kite", "blue jay", "colts foot"]))


def test_names_that_the_retriever_did_not_propose_join_with_its_lowest_score() -> None:
    every, ranking = replay.joined([Candidate(4, "a", 0.9), Candidate(2, "b", 0.1)], [7, 2])
    assert [(one.class_id, one.score) for one in every] == [(4, 0.9), (2, 0.1), (7, 0.1)]
    assert (ranking.order, ranking.status) == ((2, 1, 0), RankStatus.RANKED)


def test_an_mllm_that_is_always_right_is_followed_and_a_missing_answer_is_not_counted(tmp_path: Path) -> None:
    right = ["Red Kite", "blue jay", "colt’s foot"]
    responses = {f"{i}.jpg": [right[i % 3]] for i in range(150) if i != 7}
    write_set(tmp_path, "birds", responses, [[0, 1]] * 150)
    found = replay.run(tmp_path, seeds=2)["sets"]["birds"]
    assert (found["parsed"], found["unanswered"]) == (1.0, 1)
    assert found["fused"] >= 119 / 120 > found["retriever"]
    assert found["routed"] <= found["fused"] and found["ranked_fraction"] > 0


def test_a_set_without_candidates_has_its_parsed_accuracy_alone(tmp_path: Path) -> None:
    write_set(tmp_path, "birds", {f"{i}.jpg": ["red kite", "???"] for i in range(150)}, None)
    found = replay.run(tmp_path)["sets"]["birds"]
    assert found == {"parsed": 50 / 150, "images": 150, "unanswered": 0}


def test_a_folder_without_answers_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        replay.run(tmp_path)


@needs_shared_data
def test_the_recorded_sets_reach_the_published_accuracy_and_fusion_adds_to_it() -> None:
    sets = replay.run(SHARED_DATA, seeds=1)["sets"]
    for name, published in {"aircraft": 0.566, "cars": 0.627, "dtd": 0.577, "eurosat": 0.468, "caltech101": 0.937}.items():
        assert sets[name]["parsed"] > published - 0.005
    assert sets["cars"]["fused"] >= 0.715 and sets["aircraft"]["fused"] >= 0.562
    assert sets["cars"]["routed"] >= 0.715 - 0.003 and sets["cars"]["ranked_fraction"] <= 0.62
