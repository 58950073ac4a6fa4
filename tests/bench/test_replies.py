"""rar bench replies: counts over a file of replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rar.bench import replies
from rar.schema import UserError
from tests.conftest import SHARED_DATA

CASES = SHARED_DATA.parent / "cases" / "replies.json"


def test_right_and_wrong_are_counted(tmp_path: Path) -> None:
    cases = [
        {"kind": "right", "reply": "dog", "names": ["cat", "dog"], "best": "dog"},
        {"kind": "wrong", "reply": "dog", "names": ["cat", "dog"], "best": "cat"},
        {"kind": "sure and wrong", "reply": "dog > cat", "names": ["cat", "dog"], "best": "cat"},
    ]
    (tmp_path / "replies.json").write_text(json.dumps(cases))
    found = replies.run(tmp_path / "replies.json")
    assert (found["right"], found["of"], found["ranked_but_wrong"]) == (1, 3, 1)
    assert list(found["missed"]) == ["wrong", "sure and wrong"]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"kind": "a"}]', '{"a": 1}'])
def test_another_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "replies.json").write_text(text)
    with pytest.raises(UserError, match="is no JSON list of"):
        replies.run(tmp_path / "replies.json")


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases")
def test_replies_of_models_are_read_as_meant() -> None:
    found = replies.run(CASES)
    assert found["right"] >= 47 and found["ranked_but_wrong"] <= 1, found["missed"]
