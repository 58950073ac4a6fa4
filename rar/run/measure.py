"""What a finished run is worth: its stored predictions held against the labels, classes and boxes of its corpus.

Labels join here and nowhere earlier, so a new metric needs no new run: a finished run whose settings or code of measuring
have changed (identity.METRICS, MEASURING) is measured again from its folder, without a model, a memory or Ray. Labels, ids
and proposal scores join by row and place. A picture or box that stands twice is kept and judged twice, each time by its own
label; `duplicates` counts the predictions whose content another one before has. For detection, a class probability is the
fused one among the candidates times the candidates' share of the retriever's whole distribution: a softmax over five
candidates says little of a box that shows none of them, and AP compares boxes of different images.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import boxes, config, fusion, identity
from rar.columns import box_positions, candidates_of, positions, rankings_of, repeats, vectors_of
from rar.corpus import coco
from rar.corpus.datasets import named
from rar.evaluation import box_groups, clustering, metrics, scoring
from rar.evaluation.ap import evaluate
from rar.runfolder import RunFolder, read_table
from rar.schema import PREDICTIONS, Candidate, Ranking, RankStatus

if TYPE_CHECKING:
    from rar.encoder.sentences import SentenceEncoder
    from rar.engine.session import Session  # a finished run is measured again without Ray

JUDGED = ("row", "image_id", "class_name", "candidates", "ranking", "rank_status", "label_mass", "label_first")
KEPT = ("leaked", "near_leaked", "cluster_accuracy", "semantic_similarity")


def measured(settings: config.Config, folder: RunFolder, index: pa.Table, boxed: bool) -> dict[str, float]:
    """All metrics that a run folder and the truth of its corpus give; of boxes, writes `detections.json`, too.

    Whole images are judged shard by shard, so that of a large run no more than a shard's rows are held beside what was judged.
    """
    names = folder.read("classes.json")
    if boxed:
        predictions = folder.predictions()
        calibration = fusion.Calibration.from_dict(folder.read("calibration.json"))
        values = detection(settings, predictions, index, names, calibration, folder.path / "detections.json")
        asked = pc.sum(pc.not_equal(predictions["rank_status"], RankStatus.SKIPPED.value)).as_py() or 0
        content = predictions["image_id"]
    else:
        rows, content = judged(folder, index)
        values, asked = metrics.summary(rows, names), int(rows.outcomes.asked.sum())
    values["mean_k"] = folder.stats()["mllm.candidates"] / asked if asked else math.nan  # shown, where the ranker was asked
    values["duplicates"] = float(len(repeats(content)))
    return values


def judged(folder: RunFolder, index: pa.Table) -> tuple[metrics.Judged, pa.ChunkedArray]:
    """The rows of whole images, one shard after the other, and their content ids. index: with `row` and `label`."""
    parts, ids = [metrics.judged(PREDICTIONS.empty_table(), [])], []
    for part in folder.parts_of_predictions(JUDGED):
        parts.append(metrics.judged(part, index["label"].take(pa.array(positions(part["row"], index)))))
        ids += part["image_id"].chunks
    return metrics.together(parts), pa.chunked_array(ids, pa.string())


def again(settings: config.Config, folder: RunFolder, boxed: bool) -> tuple[dict[str, float], bool]:
    """(metrics of a finished run, whether they are new): they are kept unless they were measured by something else.

    What is asked of the memory or the encoder stays as it is: neither predictions nor memory have changed. A sentence encoder
    judges anew; without one where there was one, nothing is left to judge by.
    """
    known: dict[str, float] = folder.read("metrics.json")
    before, now = folder.read("run.json")["measured"], identity.of_metrics(settings)
    if before == now:
        return known, False
    index = read_table(folder.path / "index.parquet")
    values = measured(settings, folder, index, boxed) | {key: known[key] for key in KEPT if key in known}
    if "sentences" in {**before, **now} and not boxed:
        values.pop("semantic_similarity", None)
        if (sentences := settings.run.sentence_encoder) is not None:
            values["semantic_similarity"] = similarity(sentences, *guesses_and_labels(folder.predictions(), index))
    folder.write_metrics(values, settings)
    return values, True


def vocabulary_free(session: Session, settings: config.Config, predictions: pa.Table, index: pa.Table) -> dict[str, float]:
    """cACC and sACC of the labelled images. sACC is by the sentence encoder, else by the encoder's text tower, if any."""
    from rar.engine import pipeline

    guesses, labels = guesses_and_labels(predictions, index)
    values = {"cluster_accuracy": clustering.cluster_accuracy(guesses, labels)}
    if (sentences := settings.run.sentence_encoder) is not None:
        return values | {"semantic_similarity": pipeline.in_a_worker(similarity, sentences, guesses, labels)}
    if settings.encoder.model == "precomputed" or not session.encoder(settings.encoder).facts.embeds_texts:
        return values

    def embed(names: list[str]) -> np.ndarray:
        nothing, shard = pa.nulls(len(names), pa.large_binary()), pa.array([0] * len(names), pa.int32())
        table = pa.table({"shard": shard, "pixels": nothing, "text": pa.array(names, pa.string())})
        return vectors_of(session.encoder(settings.encoder).run(table))

    return values | {"semantic_similarity": clustering.semantic_similarity(guesses, labels, embed)}


def guesses_and_labels(predictions: pa.Table, index: pa.Table) -> tuple[list[str], list[str]]:
    """Predicted and true names of the labelled images."""
    truth = index["label"].take(pa.array(positions(predictions["row"], index))).to_pylist()
    pairs = zip(predictions["class_name"].to_pylist(), truth, strict=True)
    labelled = [(guess, label) for guess, label in pairs if label is not None]
    return [guess for guess, _ in labelled], [label for _, label in labelled]


def similarity(sentence_encoder: str, guesses: Sequence[str], labels: Sequence[str]) -> float:
    """sACC by a sentence encoder in a folder. Raises UserError."""
    return clustering.semantic_similarity(guesses, labels, _judge(sentence_encoder).embed)


@lru_cache(maxsize=1)  # a sweep asks for each cell
def _judge(folder: str) -> SentenceEncoder:
    from rar.encoder.sentences import SentenceEncoder

    return SentenceEncoder(folder)


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
    own = pa.array(box_positions(predictions, index))
    labels, box_scores = (pc.list_flatten(index[name]).take(own).to_pylist() for name in ("box_labels", "box_scores"))
    images = predictions["row"].to_pylist()  # a picture's place in the JSON
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
