"""What is minimised: each loss is a mean over lists, so that cutting a batch over workers changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def label_table(forms: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (L, F) of L labels with up to F forms each, and which of them are there (L, F) bool."""
    widest = max(map(len, forms))
    ids = torch.tensor([[*ids, *[0] * (widest - len(ids))] for ids in forms], device=device)
    return ids, torch.tensor([[place < len(ids) for place in range(widest)] for ids in forms], device=device)


def label_logits(logits: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], shown: torch.Tensor) -> torch.Tensor:
    """(B, V) logits of a reply's first token -> (B, L) of its labels, -inf beyond those that each list shows (B,).

    A label's forms ("A", " A") add up, as `ranker.labels.together` adds them.
    """
    ids, there = table
    found = logits[:, ids].masked_fill(~there, -torch.inf).logsumexp(-1)
    return found.masked_fill(torch.arange(len(ids), device=logits.device) >= shown[:, None], -torch.inf)


def of_labels(
    logits: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    shown: torch.Tensor,
    answer: torch.Tensor,
    order: torch.Tensor,
    *,
    mass: float,
    listwise: float,
) -> torch.Tensor:
    """Cross entropy of the answer (B,) among the labels shown: what `letters` reads. (B, V) logits of the first token.

    mass: weight of -log p(some label shown), which a softmax over labels says nothing of: a model that was never asked so must
    learn to answer with a label at all. listwise: weight of `rank_net` by `order` (B, K).
    """
    logits = logits.float()
    found = label_logits(logits, table, shown)
    loss = F.cross_entropy(found, answer)
    if mass:
        loss = loss + mass * (logits.logsumexp(-1) - found.logsumexp(-1)).mean()
    if listwise:
        loss = loss + listwise * rank_net(found, order)
    return loss


def rank_net(scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """RankNet over all pairs of a list, each weighted by 1 / (rank + rank), as in FIRST (2406.15657, section 3.2).

    scores (B, L); order (B, K): places best first, -1 where a list is over. The weighted mean of a list's pairs, then the mean.
    """
    there = order >= 0
    ordered = scores.gather(1, order.clamp(min=0)).masked_fill(~there, 0.0)  # (B, K)
    gaps = ordered[:, None, :] - ordered[:, :, None]  # (B, i, j): score of j minus score of i
    rank = torch.arange(1, order.shape[1] + 1, device=scores.device)
    weights = (1.0 / (rank[:, None] + rank[None])).triu(1) * there[:, :, None] * there[:, None, :]
    return ((weights * F.softplus(gaps)).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-9)).mean()


def of_names(written: Sequence[Sequence[torch.Tensor]], *, mean: bool) -> torch.Tensor:
    """Cross entropy of each list's first reply among its replies: what `first` and `likelihood` read.

    written: (T,) log-probabilities of the tokens of each reply of each list. mean: a reply's score is their mean, else the sum.
    """
    scores = [torch.stack([one.mean() if mean else one.sum() for one in row]) for row in written]
    return -torch.stack([row.log_softmax(0)[0] for row in scores]).mean()


def drift(before: Sequence[Sequence[torch.Tensor]], now: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """KL divergence from what the model was, (T, V) log-probabilities of each reply of each list: the mean of a list's tokens,
    then that of the lists."""
    pairs = [(torch.cat(list(then)), torch.cat(list(new))) for then, new in zip(before, now, strict=True)]
    return torch.stack([(then.exp() * (then - new)).sum(-1).mean() for then, new in pairs]).mean()


def of_text(logits: torch.Tensor, tokens: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the last `reply` (B,) tokens of each row: their mean, then that of the lists.

    tokens (B, T), padded on the left; logits (B, N, V) of their last N positions, N beyond the longest reply.
    """
    longest = int(reply.max())
    losses = F.cross_entropy(logits[:, -longest - 1 : -1].float().transpose(1, 2), tokens[:, -longest:], reduction="none")
    counted = torch.arange(longest, 0, -1, device=tokens.device) <= reply[:, None]  # (B, longest)
    return ((losses * counted).sum(1) / reply).mean()
