"""Many questions about one picture, the picture computed once: the prefix they share is kept as keys and values (KV cache).

Prompts of one row differ late (in a name, or in the order of a list), while most of their tokens are the picture's. The common
tokens go through the model once a row, left-padded; then each branch goes on from its row's cache. Tokens are those of the
whole text cut in two, never of two texts, so that no tokenizer can put a boundary elsewhere. The caches of a chunk are copies,
which costs memory: `ranker.batch_size` bounds both the rows of a prefix and the branches of a chunk.

Gradients flow through a prefix into its branches: `rar.tune.spoken` trains on what is read here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rar.ranker.mllm import Mllm, Prompt, of_ids
from rar.schema import UserError


class Row(NamedTuple):
    """The branches of one row: prompts (the first is encoded for the prefix), tokens of each branch, how many are common."""

    prompts: list[Prompt]
    ids: list[list[int]]
    common: int


class Prefix(NamedTuple):
    """B rows of P common tokens that went through the model."""

    cache: Any
    mask: torch.Tensor  # (B, P), 0 for padding
    last: torch.Tensor  # (B, V) logits after the last token
    rope_deltas: torch.Tensor | None  # (B, 1): Qwen's positions minus the number of tokens; None where positions are plain
    lengths: list[int]


class Branch(NamedTuple):
    row: int  # of the batch
    place: int
    ids: list[int]  # after the prefix


@torch.inference_mode()
def next_logits(mllm: Mllm, rows: Sequence[list[Prompt]], ids: list[int]) -> Iterator[tuple[Prompt, np.ndarray, int]]:
    """`Mllm.next_logits` for rows of prompts that show the same one picture. Yields (prompt, (len(ids) + 1,), tokens read).

    A row's common tokens count for its first prompt. Rows with a prompt beyond the window are left out.
    """
    split = [row_of(prompts, mllm.token_ids([prompt.text for prompt in prompts]), spare=1) for prompts in rows]
    for batch, prefix in _prefixes(mllm, split, room=1):
        for chunk in chunks_of(batch, mllm.config.batch_size):
            logits = _forward(mllm, prefix, chunk, [branch.ids for branch in chunk])
            for branch, steps in zip(chunk, logits, strict=True):
                prompt = batch[branch.row].prompts[branch.place]
                tokens = len(branch.ids) + (prefix.lengths[branch.row] if branch.place == 0 else 0)
                yield prompt, of_ids(steps[None, len(branch.ids) - 1], ids)[0], tokens


@torch.inference_mode()
def scores(
    mllm: Mllm, prompts: Sequence[Prompt], ids: Sequence[list[list[int]]], *, mean: bool
) -> Iterator[tuple[Prompt, np.ndarray, int, int]]:
    """Yield (prompt, log-probability of each reply (R,), tokens of the prompt, tokens of the replies).

    ids: of each prompt, its tokens and those of prompt and reply (naming). mean: a token's mean, else the sum. A reply's tokens
    are those after the common ones of the prompt and of all its replies.
    """
    split = [row_of([prompt], row, spare=0) for prompt, row in zip(prompts, ids, strict=True)]
    for batch, prefix in _prefixes(mllm, split, room=0):
        found = [np.zeros(len(row.ids) - 1) for row in batch]
        for chunk in chunks_of(batch, mllm.config.batch_size, first=1):
            logs = logs_of(mllm, prefix, chunk)
            for number, branch in enumerate(chunk):
                each = logs[number, range(len(branch.ids)), branch.ids].double()
                found[branch.row][branch.place - 1] = float(each.mean() if mean else each.sum())
        for number, row in enumerate(batch):
            length = prefix.lengths[number] + len(row.ids[0]) - row.common
            yield row.prompts[0], found[number], length, sum(len(reply) - row.common for reply in row.ids[1:])


def logs_of(mllm: Mllm, prefix: Prefix, chunk: list[Branch]) -> torch.Tensor:
    """(n, S, V) log-probabilities at each token of branches of up to S. The prefix predicts a branch's first token."""
    rows = torch.tensor([branch.row for branch in chunk], device=mllm.device)
    logits = prefix.last[rows][:, None]
    if max(len(branch.ids) for branch in chunk) > 1:  # the last token predicts nothing that counts
        logits = torch.cat([logits, _forward(mllm, prefix, chunk, [branch.ids[:-1] for branch in chunk])], dim=1)
    return logits.float().log_softmax(-1)


def row_of(prompts: list[Prompt], ids: list[list[int]], spare: int) -> Row:
    """ids: of each branch. spare: tokens that every branch must keep to itself."""
    return Row(prompts, ids, min(shared(ids), min(map(len, ids)) - spare))


def shared(ids: Sequence[list[int]]) -> int:
    """How many first tokens are the same in all."""
    differ = (place for place, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    return next(differ, min(map(len, ids)))


def _prefixes(mllm: Mllm, rows: list[Row], room: int) -> Iterator[tuple[list[Row], Prefix]]:
    """Rows of like length together. Rows whose longest branch and `room` tokens are over the window are left out."""
    window = mllm.window or np.inf
    waiting = sorted(rows, key=lambda row: len(row.prompts[0].text))
    for start in range(0, len(waiting), mllm.config.batch_size):
        batch = waiting[start : start + mllm.config.batch_size]
        inputs, lengths = mllm.encode([row.prompts[0] for row in batch])
        longest = [length + max(map(len, row.ids)) - len(row.ids[0]) for row, length in zip(batch, lengths, strict=True)]
        fitting = [row for row, length in zip(batch, longest, strict=True) if length + room <= window]
        if fitting and len(fitting) < len(batch):
            inputs, lengths = mllm.encode([row.prompts[0] for row in fitting])
        if fitting:
            yield fitting, prefix_of(mllm, fitting, inputs)


def prefix_of(mllm: Mllm, rows: list[Row], inputs: dict[str, Any]) -> Prefix:
    trimmed = mllm.placed(_trimmed(inputs, rows, mllm.model_path))
    output = mllm.model(**trimmed, **mllm.last_only, use_cache=True)
    mask = trimmed["attention_mask"]
    deltas = getattr(mllm.keeps_positions, "rope_deltas", None)
    return Prefix(output.cache, mask, output.logits[:, -1], deltas, mask.sum(dim=1).tolist())


def _trimmed(inputs: dict[str, Any], rows: list[Row], model_path: str) -> dict[str, Any]:
    """Encoded first branches (B, T) without what follows the common tokens, padded on the left anew."""
    shape = inputs["input_ids"].shape
    cuts = [len(row.ids[0]) - row.common for row in rows]
    for encoded, row, cut in zip(inputs["input_ids"].tolist(), rows, cuts, strict=True):
        if cut and encoded[-cut:] != row.ids[0][-cut:]:
            raise UserError(
                f"{model_path!r} puts the picture after the question; use ranker.method 'letters' with ranker.permutations 1"
            )
    per_token = {key: value.clone() for key, value in inputs.items() if getattr(value, "shape", None) == shape}
    for value in per_token.values():
        for number, cut in enumerate(cuts):
            value[number] = value[number].roll(cut)
            value[number, :cut] = 0  # masked; any token will do
    used = int(per_token["attention_mask"].any(dim=0).int().argmax())
    return {**inputs, **{key: value[:, used:] for key, value in per_token.items()}}


def chunks_of(batch: list[Row], size: int, first: int = 0) -> Iterator[list[Branch]]:
    """Branches from place `first` on, of like length together."""
    branches = [
        Branch(number, place, row.ids[place][row.common :])
        for number, row in enumerate(batch)
        for place in range(first, len(row.ids))
    ]
    branches.sort(key=lambda branch: len(branch.ids))
    for start in range(0, len(branches), size):
        yield branches[start : start + size]


def _forward(mllm: Mllm, prefix: Prefix, chunk: list[Branch], ids: list[list[int]]) -> torch.Tensor:
    """Logits (n, S, V) of branches of up to S tokens. Padding is on the right, where causal attention never sees it."""
    rows = torch.tensor([branch.row for branch in chunk], device=mllm.device)
    width = max(map(len, ids))
    tokens = torch.tensor([[*listed, *[0] * (width - len(listed))] for listed in ids], device=mllm.device)
    mask = torch.cat([prefix.mask[rows], torch.ones_like(tokens)], dim=1)
    positions = {}
    if prefix.rope_deltas is not None:
        counted = (mask.cumsum(1) - 1)[:, -width:]
        positions = {"position_ids": (counted + prefix.rope_deltas[rows]).expand(3, -1, -1)}
    return mllm.model(input_ids=tokens, attention_mask=mask, cache=_fork(prefix.cache, rows), **positions).logits


def _fork(cache: Any, rows: torch.Tensor) -> Any:
    """A cache of the chosen rows, repeated where they are; the original stays as it is."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.batch_select_indices(rows)
    return forked
