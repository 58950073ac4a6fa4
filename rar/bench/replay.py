"""Retrieve and rank with no model: recorded CLIP candidates joined with recorded GPT-4V answers (`rar bench replay`).

GPT-4V was given the whole class list, so it names classes that CLIP did not propose. Such a class joins the candidates of its
image with the lowest retrieval score among them: CLIP said no more of it than that it comes after the ten. Everything else is
the library's own path: `spelling.match_name` reads the names, `fusion.fit` fits fusion and threshold on a random 20 % of the
images, `fusion.routed` and `fusion.fuse` decide on the other 80 %. A skipped image costs its named classes, as in life.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rar import fusion
from rar.ranker.spelling import Vocabulary, match_name
from rar.schema import Candidate, Ranking, RankStatus, UserError

FIT_SHARE = 0.2
MAX_NAMED = 5  # the recorded prompt asks for five


@dataclass(frozen=True)
class Recorded:
    """One data set: per image the truth, the retriever's candidates (where there is a record of them) and the named classes.

    named is None where the record has no answer at all; `parsed` leaves such images out, as the published figures do.
    """

    truth: list[int]
    candidates: list[list[Candidate]]
    named: list[list[int] | None]


def run(data: Path, seeds: int = 5) -> dict[str, Any]:
    """Replay every set of a folder laid out as contract 4.4 says. Accuracies are fractions, means over seeded splits.

    Raises UserError where the folder holds no recorded answers.
    """
    files = sorted((data / "gpt4v_rankings").glob("*.json"))
    if not files:
        raise UserError(f"{data} holds no gpt4v_rankings/NAME.json; give the folder of the recorded answers with --data")
    return {"sets": {file.stem: _measure(_read(data, file.stem), seeds) for file in files}}


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
    order = np.random.default_rng(seed).permutation(len(recorded.truth))
    cut = math.ceil(FIT_SHARE * len(order))
    asked = [joined(*pair) for pair in zip(recorded.candidates, recorded.named, strict=True)]
    fit, test = order[:cut].tolist(), order[cut:].tolist()
    calibration = fusion.fit([asked[i][0] for i in fit], [asked[i][1] for i in fit], [recorded.truth[i] for i in fit])
    truth = [recorded.truth[i] for i in test]
    fused = [_best(asked[i], calibration) for i in test]
    skipped = [fusion.routed(recorded.candidates[i], calibration) for i in test]
    retriever = [recorded.candidates[i][0].class_id for i in test]
    routed = [kept if skip else answer for kept, skip, answer in zip(retriever, skipped, fused, strict=True)]
    return {
        "retriever": _share(retriever, truth),
        "fused": _share(fused, truth),
        "routed": _share(routed, truth),
        "ranked_fraction": 1 - float(np.mean(skipped)),
    }


def joined(candidates: list[Candidate], named: list[int] | None) -> tuple[list[Candidate], Ranking]:
    """The candidates and the named classes among or after them, and the ranking: named ones first, then retrieval order."""
    named = named or []
    position = {candidate.class_id: place for place, candidate in enumerate(candidates)}
    lowest = min(candidate.score for candidate in candidates)
    every = candidates + [Candidate(class_id, "", lowest) for class_id in named if class_id not in position]
    position = {candidate.class_id: place for place, candidate in enumerate(every)}
    first = [position[class_id] for class_id in named]
    order = first + [place for place in range(len(every)) if place not in set(first)]
    return every, Ranking(tuple(order), RankStatus.RANKED if named else RankStatus.FALLBACK)


def _best(asked: tuple[list[Candidate], Ranking], calibration: fusion.Calibration) -> int:
    candidates, ranking = asked
    order, _ = fusion.fuse(candidates, ranking, calibration)
    return candidates[order[0]].class_id


def _share(predicted: list[int | None] | list[int], truth: list[int]) -> float:
    return float(np.mean([one == other for one, other in zip(predicted, truth, strict=True)]))


def _read(data: Path, name: str) -> Recorded:
    answers = json.loads((data / "gpt4v_rankings" / f"{name}.json").read_text())
    retrieved = data / "clip_top10" / f"{name}.npz"
    if not retrieved.exists():
        names = list(answers["class_names"])
        files, vocabulary = list(answers["truth"]), Vocabulary(names)
        found = {true_name: match_name(true_name, vocabulary) for true_name in set(answers["truth"].values())}
        index = {true_name: position for true_name, position in found.items() if position is not None}
        if strange := sorted(found.keys() - index.keys()):
            raise UserError(f"{name}.json: the truth {strange[0]!r} is none of its class_names")
        truth = [index[answers["truth"][file]] for file in files]
        return Recorded(truth, [[] for _ in files], _named(answers, files, names))
    names = json.loads(retrieved.with_suffix(".classes.json").read_text())
    with np.load(retrieved, allow_pickle=False) as arrays:
        files, truth = [str(file) for file in arrays["files"]], arrays["class_id"].tolist()
        rows = zip(arrays["candidate_ids"].tolist(), arrays["candidate_logits"].astype(float).tolist(), strict=True)
    candidates = [[Candidate(i, names[i], score) for i, score in zip(*row, strict=True)] for row in rows]
    return Recorded(truth, candidates, _named(answers, files, names))


def _named(answers: dict[str, Any], files: list[str], names: list[str]) -> list[list[int] | None]:
    """The distinct classes that each response names, in its order; names outside the vocabulary are dropped one by one."""
    vocabulary = Vocabulary(names)
    responses = [answers["responses"].get(file) for file in files]
    meant = {name: match_name(name, vocabulary) for name in {name for response in responses for name in response or []}}
    return [None if response is None else _distinct([meant[name] for name in response]) for response in responses]


def _distinct(found: list[int | None]) -> list[int]:
    return list(dict.fromkeys(position for position in found if position is not None))[:MAX_NAMED]
