"""The liking of a model for certain labels, estimated and divided out; and how often the order of the candidates decides.

A model that would rather say "A" is corrected as PriDe does (Zheng et al. 2309.03882, section 4): on a few images without truth
the candidates are rotated through all places, so that each label meets each candidate; what is left of the labels'
probabilities after averaging is their prior. It is estimated once for a deployment and then costs nothing, where
`ranker.permutations` costs a question a rotation. It mends the labels alone: a model whose answer depends on which candidate
comes before which stays as it is, and so does the miniature MLLM (`rar bench consistency`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rar.schema import Ranking, UserError

Prior = Mapping[str, Sequence[float]]  # "5": log-prior of the labels A to E in lists of five, of mean zero; fit for JSON


def label_prior(observed: Sequence[np.ndarray]) -> list[float]:
    """Log-prior (n,) of the labels, of mean zero. observed: an image each, (n, n) log-probabilities of labels by rotation.

    Log-probabilities are averaged over images as over rotations (PriDe averages probabilities over images): so a constant that
    the model adds to a label's logit is taken out exactly, however sure of some images it is.
    """
    logs = np.mean([rotated.mean(axis=0) for rotated in observed], axis=0)
    return (logs - logs.mean()).tolist()


def prior_of(prior: Prior, count: int) -> np.ndarray:
    """Log-prior (count,): that of lists of `count`, else the start of that of the next longer ones. UserError beyond those."""
    known = sorted(int(key) for key in prior if int(key) >= count)
    if not known:
        raise UserError(f"the label prior knows no lists of {count} candidates; fit the calibration again (a fresh memory)")
    logs = np.array(prior[str(known[0])])[:count]
    return logs - logs.mean()


def position_consistency(
    rank: Callable[[list[np.ndarray], list[list[str]]], list[Ranking]],
    images: list[np.ndarray],
    names: list[list[str]],
    seed: int,
) -> float:
    """Share of images whose first candidate stays the first when the list is shuffled. 1 for no images."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(listed)) for listed in names]
    given = rank(images, names)
    shuffled = rank(images, [[listed[place] for place in order] for listed, order in zip(names, orders, strict=True)])
    same = [
        not one.order or one.order[0] == order[other.order[0]]
        for one, other, order in zip(given, shuffled, orders, strict=True)
    ]
    return float(np.mean(same)) if same else 1.0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n,) logits -> (n,) log-probabilities."""
    return logits - np.logaddexp.reduce(logits)
