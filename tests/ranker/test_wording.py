"""Prompt files: the built-in one word for word, what a user's file may change, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from rar.ranker.prompt import generate_prompt, letters_prompt, likelihood_prompt, yes_no_prompt
from rar.ranker.wording import BUILT_IN, PICTURE, load_wording, standard_wording
from rar.schema import UserError


def test_built_in_prompts():
    assert letters_prompt(["cat", "dog"]) == "Which of these is in the picture?\nA. cat\nB. dog\nAnswer with one letter."
    assert generate_prompt(["cat"]) == (
        "Sort these names from most to least like the picture: ['cat']. Answer with the sorted list only."
    )
    assert likelihood_prompt(["cat", "dog"]) == "Name what is in the picture."
    assert yes_no_prompt("cat") == "Is this in the picture: cat? Answer yes or no."


def test_exemplars_stand_before_names():
    assert letters_prompt(["cat", "dog"], exemplars=[2, 0]) == (
        f"Which of these is in the first picture?\nA. {PICTURE}{PICTURE}cat\nB. dog\nAnswer with one letter."
    )
    assert letters_prompt(["cat", "dog"], exemplars=[0, 0]) == letters_prompt(["cat", "dog"])
    assert yes_no_prompt("cat", exemplars=1) == f"Is this in the first picture: {PICTURE}cat? Answer yes or no."


def test_names_are_never_read_as_templates():
    assert "A. {label} {0} {{x}}\n" in letters_prompt(["{label} {0} {{x}}", "dog"])


def test_a_file_changes_what_it_says_and_keeps_the_rest(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text('version: mine-2\nletters:\n  ask: "{{Which}} is it?\\n{candidates}"\n')
    wording = load_wording(str(file))
    assert letters_prompt(["cat"], wording) == "{Which} is it?\nA. cat"
    assert generate_prompt(["cat"], wording) == generate_prompt(["cat"])
    assert wording.version == "mine-2"


def test_fingerprint_is_of_the_content(tmp_path: Path):
    one, other, newer = (tmp_path / name for name in ("one.yaml", "other.yaml", "newer.yaml"))
    one.write_text(BUILT_IN.read_text())
    other.write_text("# the same, told otherwise\nversion: 1\n")
    newer.write_text("version: 2\n")
    assert load_wording(str(one)).fingerprint() == load_wording(str(other)).fingerprint() == standard_wording().fingerprint()
    assert load_wording(str(newer)).fingerprint() != standard_wording().fingerprint()
    assert load_wording(None) is standard_wording()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("letters: {}\n", "give the file a version"),
        ("- a\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("version: [", "not valid YAML"),
        ("version: 1\nletter: {}\n", "letter: Extra inputs"),
        ("version: 1\nletters: text\n", "letters: Input should be"),
        ("version: 1\nletters: {tail: x}\n", "letters.tail: Extra inputs"),
        (
            'version: 1\nletters: {ask: "Which? {names}"}\n',
            r"letters.ask: unknown placeholder \{names\}; known are \{candidates\}",
        ),
        ('version: 1\nletters: {ask: "Which?"}\n', r"letters.ask: \{candidates\} is missing"),
        ('version: 1\nletters: {ask: "{candidates} {"}\n', "letters.ask: "),
        ('version: 1\nletters: {ask: "{candidates!r}"}\n', "must be a plain placeholder"),
        ('version: 1\nletters: {ask: "{candidates.__class__}"}\n', "must be a plain placeholder"),
        ('version: 1\nletters: {ask: "{}"}\n', "must be a plain placeholder"),
        ('version: 1\nletters: {candidate: "{label}"}\n', r"letters.candidate: \{name\} is missing"),
        ("version: 1\nyes_no: {affirm: yes}\n", "yes_no.affirm: Input should be a valid string"),
        ('version: 1\nyes_no: {"deny": ""}\n', "yes_no.deny"),
    ],
)
def test_faulty_files_are_refused_in_one_line(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        load_wording(str(file))
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load_wording(str(tmp_path / "none.yaml"))
