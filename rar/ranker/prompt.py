"""What the MLLM is asked. How its reply becomes a ranking is `reply`."""

from __future__ import annotations

from collections.abc import Sequence

from rar.ranker.wording import Wording, standard_wording


def letters_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """One line a candidate, labelled A, B, ...; the answer is one label. At most 26 names."""
    wording = wording or standard_wording()
    return wording.render(wording.letters, names, exemplars)


def generate_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """The paper's request (3.2) in our words: sort the listed names from most to least like the picture."""
    wording = wording or standard_wording()
    return wording.render(wording.generate, names, exemplars)


def likelihood_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """What each name is a reply to. The built-in one does not list the candidates."""
    wording = wording or standard_wording()
    return wording.render(wording.likelihood, names, exemplars)


def yes_no_prompt(name: str, wording: Wording | None = None, exemplars: int = 0) -> str:
    """Whether it is this one candidate."""
    wording = wording or standard_wording()
    return wording.render(wording.yes_no, [name], [exemplars])


def generate_answer(names: Sequence[str]) -> str:
    """The reply that `generate_prompt` asks for; the training target of the miniature MLLM."""
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
