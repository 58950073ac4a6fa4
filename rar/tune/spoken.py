"""Names as the labels of a list: how likely each is to be written, from one prefix a picture and a branch a name.

A softmax over the listed names is to `first` and `likelihood` what the label tokens are to `letters`.

Prefix and branches are those of ranking (`rar.ranker.prefix`, `naming`): gradients are of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rar.ranker import prefix
from rar.ranker.mllm import Mllm, Prompt


@dataclass(frozen=True)
class Spoken:
    """Prompts with replies. rows: tokens of each prompt and its replies; inputs: the prompts by `Mllm.encode`; longest: tokens
    of each prompt and its longest reply."""

    rows: list[prefix.Row]
    inputs: dict[str, Any]
    longest: list[int]


def spoken(mllm: Mllm, asked: list[str], ids: list[list[list[int]]], images: Sequence[np.ndarray]) -> Spoken:
    """ids: of each prompt, its tokens and those of prompt and reply (naming)."""
    prompts = [Prompt(0, 0, [image], text) for image, text in zip(images, asked, strict=True)]
    inputs, lengths = mllm.encode(prompts)
    rows = [prefix.row_of([prompt], row, spare=0) for prompt, row in zip(prompts, ids, strict=True)]
    longest = [length + max(map(len, row)) - len(row[0]) for row, length in zip(ids, lengths, strict=True)]
    return Spoken(rows, inputs, longest)


def logs_of(mllm: Mllm, given: Spoken) -> list[list[torch.Tensor]]:
    """(T, V) log-probabilities at the T tokens of each reply to each prompt."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    prompts = prefix.prefix_of(mllm, given.rows, given.inputs)
    for chunk in prefix.chunks_of(given.rows, len(given.rows), first=1):
        for branch, logs in zip(chunk, prefix.logs_of(mllm, prompts, chunk), strict=True):
            found[branch.row, branch.place] = logs[: len(branch.ids)]
    return [[found[number, place] for place in range(1, len(row.ids))] for number, row in enumerate(given.rows)]


def written(logs: list[list[torch.Tensor]], given: Spoken) -> list[list[torch.Tensor]]:
    """(T,) log-probability of each token of each reply."""
    return [
        [
            at.gather(1, torch.tensor(ids[row.common :], device=at.device)[:, None])[:, 0]
            for at, ids in zip(found, row.ids[1:], strict=True)
        ]
        for found, row in zip(logs, given.rows, strict=True)
    ]
