"""Recorded CLIP candidates and GPT-4V answers (contract 4.4's layout) as cells: run folders without a model.

GPT-4V was given the whole class list, so it names classes that CLIP did not propose. Such a class joins the candidates of its
image with the lowest retrieval score among them: CLIP said no more of it than that it comes after the ten. Everything else is
the library's own path: `spelling.match_name` reads the names, `fusion.fit` fits fusion and threshold on a random 20 % of the
images, `fusion.skips` and `fusion.fuse` decide on the other 80 %, on which every arm of a seed is judged. What an arm does
follows from its config: ranker.method none is CLIP alone, retriever.mode all GPT-4V alone, route.mode always its order.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rar import fusion
from rar.columns import fitted, with_candidates
from rar.config import Config
from rar.engine.choosing import Fuse
from rar.ranker.spelling import Spellings, match_name
from rar.run import measure
from rar.run.calibrate import PAPER
from rar.runfolder import RunFolder
from rar.schema import ERRORS, INDEX, PREDICTIONS, Candidate, Ranking, RankStatus, UserError, content_id

FIT_SHARE = 0.2
MAX_NAMED = 5  # the recorded prompt asks for five


@dataclass(frozen=True)
class Recorded:
    """One data set: per image the truth, the retriever's candidates (where there is a record of them) and the named classes.

    named is None where the record has no answer at all; `parsed` leaves such images out, as the published figures do.
    """

    files: list[str]
    names: list[str]
    truth: list[int]
    candidates: list[list[Candidate]]
    named: list[list[int] | None]


def run(path: Path, cell: tuple[str, str], file: Path, settings: Config) -> dict[str, float]:
    """Judge an arm on the 80 % of a seed that nothing is fitted on. cell: the run's name and group. Returns the metrics."""
    started = time.monotonic()
    recorded = known(file.parent.parent, file.stem)
    alone = settings.retriever.mode == "all"
    if not alone and not any(recorded.candidates):
        raise UserError(f"{file.stem} has no recorded candidates of CLIP; give the data set the arm of the MLLM alone")
    fit, test = halves(len(recorded.truth), settings.run.seed)
    asked = [alone_with(*pair) if alone else joined(*pair) for pair in zip(recorded.candidates, recorded.named, strict=True)]
    calibration = PAPER
    if settings.ranker.method != "none" and settings.route.mode == "calibrated":
        calibration = fusion.fit([asked[i][0] for i in fit], [asked[i][1] for i in fit], [recorded.truth[i] for i in fit])
    rows = []
    for i in test:
        skipped = settings.ranker.method == "none" or (not alone and fusion.skips(recorded.candidates[i], calibration))
        rows.append((recorded.candidates[i], silent(len(recorded.candidates[i]))) if skipped else asked[i])
    folder = RunFolder.open(path, "classify", settings, fresh=False, name=cell[0], group=cell[1])
    index = folder.freeze_index(_index(recorded, test))
    folder.write("classes.json", recorded.names)
    folder.write("calibration.json", calibration.to_dict())
    ranked = [ranking for _, ranking in rows if ranking.status != RankStatus.SKIPPED]
    shown = sum(len(ranking.order) for ranking in ranked)
    folder.write_shard(
        0, _predictions(index, rows, recorded.names, calibration), ERRORS.empty_table(), {"mllm.candidates": shown}
    )
    values = measure.measured(settings, folder, index, False)
    folder.finish(
        {"input": len(test), "ok": len(test), "failed": 0, "skipped": 0}, values, time.monotonic() - started, settings
    )
    return values


def halves(images: int, seed: int) -> tuple[list[int], list[int]]:
    """Images to fit on (20 %) and to judge by."""
    order = np.random.default_rng(seed).permutation(images)
    cut = math.ceil(FIT_SHARE * len(order))
    return order[:cut].tolist(), sorted(order[cut:].tolist())


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


def alone_with(candidates: list[Candidate], named: list[int] | None) -> tuple[list[Candidate], Ranking]:
    """The named classes, and nothing of the retriever."""
    status = RankStatus.RANKED if named else RankStatus.FALLBACK
    return [Candidate(class_id, "", 0.0) for class_id in named or []], Ranking(tuple(range(len(named or []))), status)


def silent(count: int) -> Ranking:
    return Ranking(tuple(range(count)), RankStatus.SKIPPED)


def _index(recorded: Recorded, rows: Sequence[int]) -> pa.Table:
    labels = [recorded.names[recorded.truth[row]] for row in rows]
    columns = {"row": list(rows), "uri": [recorded.files[row] for row in rows], "label": labels}
    return pa.table([pa.array(columns.get(field.name, [None] * len(rows)), field.type) for field in INDEX], schema=INDEX)


def _predictions(
    index: pa.Table, rows: Sequence[tuple[list[Candidate], Ranking]], names: list[str], calibration: fusion.Calibration
) -> pa.Table:
    table = index.select(["row", "uri"])
    ids = [content_id(uri.encode()) for uri in table["uri"].to_pylist()]
    table = table.append_column("image_id", pa.array(ids, pa.string()))
    retrieved = [[Candidate(one.class_id, names[one.class_id], one.score) for one in candidates] for candidates, _ in rows]
    rankings = [ranking for _, ranking in rows]
    table = with_candidates(table, retrieved)
    table = table.append_column("ranking", pa.array([one.order for one in rankings], pa.list_(pa.int64())))
    table = table.append_column("rank_status", pa.array([one.status.value for one in rankings], pa.string()))
    table = table.append_column("response", pa.array([""] * len(rankings), pa.string()))
    scores = [fusion.rank_scores(one) for one in rankings]
    table = Fuse(calibration)(table.append_column("scores", pa.array(scores, pa.list_(pa.float64()))))
    return fitted(table, PREDICTIONS)


@lru_cache(maxsize=4)
def known(data: Path, name: str) -> Recorded:
    """A set of a folder laid out as contract 4.4 says. Raises UserError where the truth is none of its class names."""
    answers = json.loads((data / "gpt4v_rankings" / f"{name}.json").read_text())
    retrieved = data / "clip_top10" / f"{name}.npz"
    if not retrieved.exists():
        names = list(answers["class_names"])
        files, vocabulary = list(answers["truth"]), Spellings(names)
        found = {true_name: match_name(true_name, vocabulary) for true_name in set(answers["truth"].values())}
        index = {true_name: position for true_name, position in found.items() if position is not None}
        if strange := sorted(found.keys() - index.keys()):
            raise UserError(f"{name}.json: the truth {strange[0]!r} is none of its class_names")
        truth = [index[answers["truth"][file]] for file in files]
        return Recorded(files, names, truth, [[] for _ in files], _named(answers, files, names))
    names = json.loads(retrieved.with_suffix(".classes.json").read_text())
    with np.load(retrieved, allow_pickle=False) as arrays:
        files, truth = [str(file) for file in arrays["files"]], arrays["class_id"].tolist()
        rows = zip(arrays["candidate_ids"].tolist(), arrays["candidate_logits"].astype(float).tolist(), strict=True)
    candidates = [[Candidate(i, names[i], score) for i, score in zip(*row, strict=True)] for row in rows]
    return Recorded(files, names, truth, candidates, _named(answers, files, names))


def _named(answers: dict[str, Any], files: list[str], names: list[str]) -> list[list[int] | None]:
    """The distinct classes that each response names, in its order; names outside the vocabulary are dropped one by one."""
    vocabulary = Spellings(names)
    responses = [answers["responses"].get(file) for file in files]
    meant = {name: match_name(name, vocabulary) for name in {name for response in responses for name in response or []}}
    return [None if response is None else _distinct([meant[name] for name in response]) for response in responses]


def _distinct(found: list[int | None]) -> list[int]:
    return list(dict.fromkeys(position for position in found if position is not None))[:MAX_NAMED]
