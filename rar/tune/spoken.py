"""Names as the labels of a list: how likely each is to be written, from one prefix a picture and a branch a name.

A softmax over the listed names is to methods that read names what the label tokens are to `letters`. The text of right replies
alone teaches the names that are learned from, whatever is listed, and a model then writes them in lists that do not hold them
(`rar bench tuning --only describer`, arms `rar` and `loss_of_text`).

Prefix and branches are those of ranking (`rar.ranker.prefix`): gradients are of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rar.ranker import prefix
from rar.ranker.mllm import Mllm, Prompt
from rar.ranker.prompt import generate_answer


@dataclass(frozen=True)
class Spoken:
    """Prompts with replies. rows: tokens of each prompt and its replies; inputs: the prompts by `Mllm.encode`; longest: tokens
    of each prompt and its longest reply; named: how many first tokens of each reply tell its name."""

    rows: list[prefix.Row]
    inputs: dict[str, Any]
    longest: list[int]
    named: list[list[int]]

    def said(self) -> list[list[list[int]]]:
        """Tokens of each prompt's replies, after those that all of them begin with."""
        return [[ids[row.common :] for ids in row.ids[1:]] for row in self.rows]


def names(mllm: Mllm, asked: list[str], listed: list[list[str]], images: Sequence[np.ndarray]) -> Spoken:
    """Each listed name is a reply, and ends; what `likelihood` reads."""
    replies = [[text + mllm.lead + name for name in row] for text, row in zip(asked, listed, strict=True)]
    end = [mllm.end_id] if mllm.end_id is not None else []
    said = [[ids + end for ids in mllm.token_ids(row)] for row in replies]
    return _spoken(mllm, asked, images, said, [[len(ids) for ids in row] for row in said])


def lists(mllm: Mllm, asked: list[str], listed: list[list[str]], images: Sequence[np.ndarray]) -> Spoken:
    """The list as it stands, then lists that begin with each of its other names, up to where their second name begins."""
    said, named = [], []
    for text, row in zip(asked, listed, strict=True):
        begun = [text + mllm.lead + generate_answer([name, second]) for name in row for second in ("a", "b")]
        whole, *pairs = mllm.token_ids([text + mllm.lead + generate_answer(row), *begun])
        ends = [prefix.shared(pairs[place : place + 2]) for place in range(0, len(pairs), 2)]
        ends[0] = prefix.shared([whole, pairs[0], pairs[1]])
        whole += [mllm.end_id] if mllm.end_id is not None else []
        said.append([whole, *(ids[:end] for ids, end in zip(pairs[2::2], ends[1:], strict=True))])
        named.append(ends)
    return _spoken(mllm, asked, images, said, named)


def _spoken(
    mllm: Mllm, asked: list[str], images: Sequence[np.ndarray], said: list[list[list[int]]], ends: list[list[int]]
) -> Spoken:
    """ends: how many first tokens of prompt and reply tell the reply's name."""
    prompts = [Prompt(0, 0, [image], text) for image, text in zip(images, asked, strict=True)]
    inputs, lengths = mllm.encode(prompts)
    rows = [
        prefix.row_of([prompt], [ids, *row], spare=0)
        for prompt, ids, row in zip(prompts, mllm.token_ids(asked), said, strict=True)
    ]
    longest = [length + max(map(len, row.ids)) - len(row.ids[0]) for row, length in zip(rows, lengths, strict=True)]
    return Spoken(rows, inputs, longest, [[end - row.common for end in told] for row, told in zip(rows, ends, strict=True)])


def logs_of(mllm: Mllm, spoken: Spoken) -> list[list[torch.Tensor]]:
    """(T, V) log-probabilities at the T tokens of each reply to each prompt."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    prompts = prefix.prefix_of(mllm, spoken.rows, spoken.inputs)
    for chunk in prefix.chunks_of(spoken.rows, len(spoken.rows), first=1):
        for branch, logs in zip(chunk, prefix.logs_of(mllm, prompts, chunk), strict=True):
            found[branch.row, branch.place - 1] = logs[: len(branch.ids)]
    return [[found[number, place] for place in range(len(row.ids) - 1)] for number, row in enumerate(spoken.rows)]


def written(logs: list[list[torch.Tensor]], spoken: Spoken) -> list[list[torch.Tensor]]:
    """(T,) log-probability of each token of each reply."""
    return [
        [at.gather(1, torch.tensor(ids, device=at.device)[:, None])[:, 0] for at, ids in zip(row, said, strict=True)]
        for row, said in zip(logs, spoken.said(), strict=True)
    ]
