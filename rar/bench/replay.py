"""Retrieve and rank with no model: recorded CLIP candidates joined with recorded GPT-4V answers (`rar bench replay`).

How the records are joined, and what is fitted on which images, is in `sweep.replay`, where they are also cells of a sweep. A
skipped image costs its named classes, as in life.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rar import fusion
from rar.schema import Candidate, Ranking, UserError
from rar.sweep.replay import Recorded, halves, joined, known


def run(data: Path, seeds: int = 5) -> dict[str, Any]:
    """Replay every set of a folder laid out as contract 4.4 says. Accuracies are fractions, means over seeded splits.

    Raises UserError where the folder holds no recorded answers.
    """
    files = sorted((data / "gpt4v_rankings").glob("*.json"))
    if not files:
        raise UserError(f"{data} holds no gpt4v_rankings/NAME.json; give the folder of the recorded answers with --data")
    return {"sets": {file.stem: _measure(known(data, file.stem), seeds) for file in files}}


def _measure(recorded: Recorded, seeds: int) -> dict[str, float]:
    pairs = [(named, true) for named, true in zip(recorded.named, recorded.truth, strict=True) if named is not None]
    parsed = _share([named[0] if named else None for named, _ in pairs], [true for _, true in pairs])
    result = {"parsed": parsed, "images": len(recorded.truth), "unanswered": len(recorded.truth) - len(pairs)}
    if not any(recorded.candidates):
        return result
    runs = [_split(recorded, seed) for seed in range(seeds)]
    return {**result, **{key: float(np.mean([run[key] for run in runs])) for key in runs[0]}}


def _split(recorded: Recorded, seed: int) -> dict[str, float]:
    """Fit on 20 % of the images, measure on the others."""
    asked = [joined(*pair) for pair in zip(recorded.candidates, recorded.named, strict=True)]
    fit, test = halves(len(recorded.truth), seed)
    calibration = fusion.fit([asked[i][0] for i in fit], [asked[i][1] for i in fit], [recorded.truth[i] for i in fit])
    truth = [recorded.truth[i] for i in test]
    fused = [_best(asked[i], calibration) for i in test]
    skipped = [fusion.skips(recorded.candidates[i], calibration) for i in test]
    retriever = [recorded.candidates[i][0].class_id for i in test]
    routed = [kept if skip else answer for kept, skip, answer in zip(retriever, skipped, fused, strict=True)]
    return {
        "retriever": _share(retriever, truth),
        "fused": _share(fused, truth),
        "routed": _share(routed, truth),
        "ranked_fraction": 1 - float(np.mean(skipped)),
    }


def _best(asked: tuple[list[Candidate], Ranking], calibration: fusion.Calibration) -> int:
    candidates, ranking = asked
    order, _ = fusion.fuse(candidates, ranking, calibration)
    return candidates[order[0]].class_id


def _share(predicted: list[int | None] | list[int], truth: list[int]) -> float:
    return float(np.mean([one == other for one, other in zip(predicted, truth, strict=True)]))
