"""Tokens of replies that name candidates: what ranking reads by `prefix`, and what tuning trains.

Tokens are those of whole texts, prompt and reply together, so that no tokenizer can put a boundary elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from rar.ranker.mllm import Mllm
from rar.ranker.prefix import shared
from rar.ranker.prompt import generate_answer


def replies(mllm: Mllm, asked: Sequence[str], listed: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Of each prompt (a rendered chat): its tokens, then those with each name as the whole reply, and what ends a reply."""
    end = [mllm.end_id] if mllm.end_id is not None else []
    found = []
    for text, names in zip(asked, listed, strict=True):
        prompt, *whole = mllm.token_ids([text, *(text + mllm.lead + name for name in names)])
        found.append([prompt, *(ids + end for ids in whole)])
    return found


def beginnings(mllm: Mllm, asked: Sequence[str], listed: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The same for a sorted list that begins with each name, up to the token that ends the name. Two names or more.

    That token is a quote, or a quote with its comma, and stands in all: else "cat" were likelier than "cat fish" as its part.
    """
    found = []
    for text, names in zip(asked, listed, strict=True):
        lists = [[name, names[0] if place else names[-1]] for place, name in enumerate(names)]
        texts = [text + mllm.lead + generate_answer(some) for pair in lists for some in (pair, pair[:1])]
        prompt, *ids = mllm.token_ids([text, *texts])
        ends = [shared(ids[place : place + 2]) + 1 for place in range(0, len(ids), 2)]
        found.append([prompt, *(longer[:end] for longer, end in zip(ids[::2], ends, strict=True))])
    return found
