"""How good each way of ranking is on the miniature world, and how often the mere order of the candidates decides.

Photos of novel classes, the miniature CLIP's own five candidates in its order. `fused` is two-fold cross-validated: each half
is fused with weights fitted on the other. `order_decides` is the share of images whose first candidate changes when the list is
shuffled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rar import fusion, miniature
from rar.config import Encoder, Ranker
from rar.corpus.decode import fit_square
from rar.encoder.towers import ClipEncoder
from rar.miniature.world import render, rng_of, vocabulary
from rar.ranker.debias import position_consistency
from rar.ranker.rank import MllmRanker
from rar.schema import Candidate, Ranking

TOP_K = 5
PRIOR_IMAGES = 64
WAYS: dict[str, dict[str, Any]] = {
    "letters": {},
    "letters_prior": {"debias": "prior"},
    "letters_2_rotations": {"permutations": 2},
    "letters_5_rotations": {"permutations": 5},
    "letters_5_rotations_prior": {"permutations": 5, "debias": "prior"},
    "likelihood": {"method": "likelihood"},
    "first": {"method": "first"},
    "generate": {"method": "generate", "max_new_tokens": 64},
}


def run(images: int = 200, seed: int = 0) -> dict[str, Any]:
    """{"retriever": top1, "candidate_recall": ..., "ways": {NAME: {top1, fused, order_decides, images_per_s}}}; fractions."""
    pictures, candidates, truth = draw(images, seed)
    first = [row[0].class_id for row in candidates]
    inside = [true in {candidate.class_id for candidate in row} for row, true in zip(candidates, truth, strict=True)]
    names = [[candidate.class_name for candidate in row] for row in candidates]
    ways = {name: measure(Ranker(**settings), pictures, names, candidates, truth) for name, settings in WAYS.items()}
    return {"images": images, "retriever": share(first, truth), "candidate_recall": float(np.mean(inside)), "ways": ways}


def measure(
    settings: Ranker,
    pictures: list[np.ndarray],
    names: list[list[str]],
    candidates: list[list[Candidate]],
    truth: list[int],
) -> dict[str, float]:
    ranker = MllmRanker(settings, str(miniature.MLLM))
    prior = ranker.estimate_prior(pictures[:PRIOR_IMAGES], names[:PRIOR_IMAGES]) if settings.debias == "prior" else None
    rank = partial(ranker.rank, prior=prior)
    started = time.perf_counter()
    rankings = rank(pictures, names)
    seconds = time.perf_counter() - started
    chosen = [row[ranking.order[0]].class_id for row, ranking in zip(candidates, rankings, strict=True)]
    return {
        "top1": share(chosen, truth),
        "fused": share(cross_fused(candidates, rankings, truth), truth),
        "order_decides": 1 - position_consistency(rank, pictures, names, seed=0),
        "images_per_s": len(pictures) / seconds,
    }


def cross_fused(candidates: list[list[Candidate]], rankings: list[Ranking], truth: list[int]) -> list[int]:
    """The fused first class of every image, by weights fitted on the images of the other parity."""
    chosen = []
    fits = [fusion.fit(candidates[other::2], rankings[other::2], truth[other::2]) for other in (1, 0)]
    for number, (row, ranking) in enumerate(zip(candidates, rankings, strict=True)):
        order, _ = fusion.fuse(row, ranking, fits[number % 2])
        chosen.append(row[order[0]].class_id)
    return chosen


def draw(images: int, seed: int) -> tuple[list[np.ndarray], list[list[Candidate]], list[int]]:
    """Photos (96, 96, 3) uint8 that no model was trained on, the retriever's candidates, and the true classes."""
    specs = vocabulary("novel", seed)
    truth = [number % len(specs) for number in range(images)]
    pictures = [render(specs[true], 96, rng_of(seed, "consistency", number)) for number, true in enumerate(truth)]
    encoder = ClipEncoder(Encoder())
    squares = [fit_square(picture, encoder.side, encoder.resize_mode, encoder.interpolation) for picture in pictures]
    scores = encoder.embed_images(np.stack(squares)) @ encoder.prototypes([spec.name for spec in specs]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
    candidates = [
        [Candidate(int(class_id), specs[class_id].name, float(row[class_id])) for class_id in top]
        for row, top in zip(scores, best, strict=True)
    ]
    return pictures, candidates, truth


def share(chosen: Sequence[int], truth: Sequence[int]) -> float:
    return float(np.mean([one == other for one, other in zip(chosen, truth, strict=True)]))
