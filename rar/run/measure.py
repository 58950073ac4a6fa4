"""What a finished run is worth: its stored predictions held against the labels, classes and boxes of its corpus.

Labels join here and nowhere earlier, so a new metric needs no new run. For detection, a class probability is the fused one
among the candidates times the candidates' share of the retriever's whole distribution: a softmax over five candidates says
little of a box that shows none of them, and AP compares boxes of different images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rar import boxes, config, fusion
from rar.columns import candidates_of, rankings_of, vectors_of
from rar.corpus import coco
from rar.corpus.datasets import named
from rar.engine.session import Session
from rar.evaluation import box_groups, clustering, metrics, scoring
from rar.evaluation.ap import evaluate
from rar.schema import Candidate, Ranking


def classification(predictions: pa.Table, index: pa.Table, names: Collection[str]) -> dict[str, float]:
    """Metrics of whole images. index: with `uri` and `label`."""
    truth = dict(zip(index["uri"].to_pylist(), index["label"].to_pylist(), strict=True))
    return metrics.classification(predictions, [truth[uri] for uri in predictions["uri"].to_pylist()], names)


def vocabulary_free(session: Session, settings: config.Config, predictions: pa.Table, index: pa.Table) -> dict[str, float]:
    """cACC, and where the encoder embeds names also sACC, by prototypes of its text tower, of the labelled images."""
    truth = dict(zip(index["uri"].to_pylist(), index["label"].to_pylist(), strict=True))
    pairs = zip(predictions["class_name"].to_pylist(), predictions["uri"].to_pylist(), strict=True)
    labelled = [(guess, truth[uri]) for guess, uri in pairs if truth[uri] is not None]
    guesses, labels = [guess for guess, _ in labelled], [label for _, label in labelled]
    values = {"cluster_accuracy": clustering.cluster_accuracy(guesses, labels)}
    if settings.encoder.model == "precomputed" or not session.encoder(settings.encoder).facts.embeds_texts:
        return values

    def embed(names: list[str]) -> np.ndarray:
        nothing, shard = pa.nulls(len(names), pa.large_binary()), pa.array([0] * len(names), pa.int32())
        table = pa.table({"shard": shard, "pixels": nothing, "text": pa.array(names, pa.string())})
        return vectors_of(session.encoder(settings.encoder).run(table))

    return values | {"semantic_similarity": clustering.semantic_similarity(guesses, labels, embed)}


def detection(
    settings: config.Config,
    predictions: pa.Table,
    index: pa.Table,
    names: Collection[str],
    calibration: fusion.Calibration,
    file: Path,
) -> dict[str, float]:
    """Metrics of boxes; writes the detections to `file` in COCO's results format. index: schema BOXES.

    Accuracies (by size and frequency group, too) with given boxes, recall of proposals, and AP; of these, what the corpus
    allows: a folder of pictures has no truth, and a vocabulary of other names than the truth's has no AP.
    """
    assert settings.corpus is not None
    at = _boxes_of(index)
    found = [
        at[uri, tuple(box)] for uri, box in zip(*(predictions[key].to_pylist() for key in ("uri", "box_xyxy")), strict=True)
    ]
    images, box_scores, labels = ([row[column] for row in found] for column in range(3))
    xyxy = np.array(predictions["box_xyxy"].to_pylist(), np.float64).reshape(-1, 4)
    truth = coco.truth_of(named.as_file(settings.corpus))
    if truth is None:
        return {}
    values: dict[str, float] = {}
    if any(labels):
        values = metrics.classification(predictions, labels, names)
        groups = box_groups.by_size(boxes.area(xyxy))
        groups |= box_groups.by_frequency(labels, box_groups.frequencies(truth))
        values |= box_groups.group_accuracies(metrics.outcomes(predictions, labels), groups)
    else:
        values = box_groups.proposal_recall(truth, np.array(images, np.int64), xyxy)
    if not set(truth.names).issuperset(names):
        return values
    candidates = candidates_of(predictions)
    detections = scoring.detections(
        images,
        xyxy,
        box_scores,
        [[candidate.class_name for candidate in row] for row in candidates],
        [chances(row, ranking, calibration) for row, ranking in zip(candidates, rankings_of(predictions), strict=True)],
        truth.names,
        settings.detect.score,
        settings.detect.classes_per_box,
    )
    scoring.write_coco_results(file, [detections], truth)
    return values | evaluate(detections, truth, settings.detect.style)


def chances(candidates: Sequence[Candidate], ranking: Ranking, calibration: fusion.Calibration) -> list[float]:
    """Probabilities of the candidates as shares of the whole vocabulary."""
    _, fused = fusion.fuse(candidates, ranking, calibration)
    share = np.exp([candidate.score for candidate in candidates]).sum()
    return (np.array(fused) * min(share, 1.0)).tolist()


def _boxes_of(index: pa.Table) -> Mapping[tuple[str, tuple[float, ...]], tuple[Any, ...]]:
    """(uri, box) -> (the picture's place in the JSON, proposal score, label)."""
    columns = (index[name].to_pylist() for name in ("uri", "row", "boxes_xyxy", "box_scores", "box_labels"))
    return {
        (uri, tuple(box)): (row, box_score, label)
        for uri, row, found, scores, labels in zip(*columns, strict=True)
        for box, box_score, label in zip(found, scores, labels, strict=True)
    }
