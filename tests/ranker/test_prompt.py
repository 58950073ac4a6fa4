"""What the MLLM is asked, word by word."""

from __future__ import annotations

from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt


def test_prompts_are_the_trained_ones():
    assert letters_prompt(["cat", "dog"]) == "Which of these is in the picture?\nA. cat\nB. dog\nAnswer with one letter."
    assert generate_prompt(["cat", "dog"]) == (
        "Sort these names from most to least like the picture: ['cat', 'dog']. Answer with the sorted list only."
    )
    assert generate_answer(["dog", "cat"]) == "['dog', 'cat']"
