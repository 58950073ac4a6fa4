"""What a finished run is worth: its stored predictions held against the labels, classes and boxes of its corpus.

Labels join here and nowhere earlier, so a new metric needs no new run: a finished run whose settings or code of measuring
have changed (identity.METRICS, MEASURING) is measured again from its folder, without a model, a memory or Ray. Labels, ids
and proposal scores join by row and place. A picture or box that stands twice is kept and judged twice, each time by its own
label; `duplicates` counts the predictions whose content another one before has. For detection, a class probability is the
fused one among the candidates times the candidates' share of the retriever's whole distribution: a softmax over five
candidates says little of a box that shows none of them, and AP compares boxes of different images.

Predictions are read some shards at a time (AT_ONCE), and of each only what the metrics need is kept, in arrays: 16 bytes
a row that name its content; of a labelled row its outcomes and label; of a proposal nothing, but a flag an object of the
truth; of a detection that AP looks at (of LVIS, few), 48 bytes. All detections are in `detections.json` alone, which is written
as they come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import boxes, config, fusion, identity
from rar.columns import box_positions, positions, vectors_of
from rar.corpus import coco
from rar.corpus.datasets import named
from rar.corpus.truth import Truth
from rar.evaluation import box_groups, clustering, metrics, scoring
from rar.evaluation.ap import Sight, evaluate
from rar.runfolder import RunFolder, read_table
from rar.schema import PREDICTIONS, RankStatus

if TYPE_CHECKING:
    from rar.encoder.sentences import SentenceEncoder
    from rar.engine.session import Session  # a finished run is measured again without Ray

JUDGED = ("row", "image_id", "class_name", "candidates", "ranking", "rank_status", "label_mass", "label_first")
BOXED = (*JUDGED, "place", "box_xyxy", "scores")
AT_ONCE = 16 << 20  # bytes of predictions; a shard may be one picture of 300 boxes, and each look at a table costs a little
KEPT = ("leaked", "near_leaked", "cluster_accuracy", "semantic_similarity")


def measured(settings: config.Config, folder: RunFolder, index: pa.Table, boxed: bool) -> dict[str, float]:
    """All metrics that a run folder and the truth of its corpus give; of boxes, writes `detections.json`, too.

    index: with `row` and `label`, or of schema BOXES.
    """
    names, seen = folder.read("classes.json"), Seen()
    if boxed:
        values = detection(settings, seen.passing(_some_shards(folder, BOXED)), index, names, folder)
    else:
        values = metrics.summary(judged(seen.passing(_some_shards(folder, JUDGED)), index), names)
    values["mean_k"] = folder.stats()["mllm.candidates"] / seen.asked if seen.asked else math.nan  # where the ranker was asked
    values["duplicates"] = float(seen.duplicates())
    return values


def _some_shards(folder: RunFolder, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The predictions in their order, in tables of whole shards and about AT_ONCE bytes.

    A shard holds whole pictures, as an index is cut between its rows (Work.bounds), and one that came apart is refused
    (ShardSink): `ap.Sight` leans on it.
    """
    parts: list[pa.Table] = []
    size = 0
    for part in folder.parts_of_predictions(columns):
        parts.append(part)
        size += part.nbytes
        if size >= AT_ONCE:
            yield pa.concat_tables(parts)
            parts, size = [], 0
    if parts:
        yield pa.concat_tables(parts)


class Seen:
    """What is counted of all rows as they pass: those whose ranker was asked, and contents that stand twice."""

    def __init__(self) -> None:
        self.asked = 0
        self._content: list[np.ndarray] = []

    def passing(self, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for part in parts:
            self.asked += pc.sum(pc.not_equal(part["rank_status"], RankStatus.SKIPPED.value)).as_py() or 0
            self._content.append(_digests(part["image_id"]))
            yield part

    def duplicates(self) -> int:
        """Of rows of equal content all but one."""
        content = np.concatenate([np.zeros((0, 2), np.uint64), *self._content])
        ordered = content[np.lexsort((content[:, 1], content[:, 0]))]
        return int((ordered[1:] == ordered[:-1]).all(axis=1).sum())


def _digests(ids: pa.ChunkedArray) -> np.ndarray:
    """(N, 2) uint64 that stand for texts of any length."""
    found = b"".join(blake2b(one.encode(), digest_size=16).digest() for one in ids.to_pylist())
    return np.frombuffer(found, np.uint64).reshape(-1, 2)


def judged(parts: Iterable[pa.Table], index: pa.Table) -> metrics.Judged:
    """The rows of whole images. index: with `row` and `label`."""
    found = [_nothing_judged()]
    for part in parts:
        found.append(metrics.judged(part, index["label"].take(pa.array(positions(part["row"], index)))))
    return metrics.together(found)


def _nothing_judged() -> metrics.Judged:
    return metrics.judged(PREDICTIONS.empty_table(), [])


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
    settings: config.Config, parts: Iterable[pa.Table], index: pa.Table, names: Collection[str], folder: RunFolder
) -> dict[str, float]:
    """Metrics of boxes; writes the detections into the folder in COCO's results format. index: schema BOXES.

    Accuracies (by size and frequency group, too) with given boxes, recall of proposals, and AP; of these, what the corpus
    allows: a folder of pictures has no truth, and a vocabulary of other names than the truth's has no AP. All parts are read
    in any case.
    """
    assert settings.corpus is not None
    truth = coco.truth_of(named.as_file(settings.corpus))
    if truth is None:
        for _ in parts:
            pass
        return {}
    found = Boxes(settings, truth, index, fusion.Calibration.from_dict(folder.read("calibration.json")))
    if not set(truth.names).issuperset(names):
        for part in parts:
            found.judge(part)
        return found.values(names)
    scoring.write_coco_results(folder.path / "detections.json", map(found.detections, parts), truth)
    return found.values(names) | evaluate(scoring.together(found.visible), truth, settings.detect.style)


class Boxes:
    """What is kept of boxes that come in parts: see `detection`. index: schema BOXES.

    visible: the detections that AP looks at, a part after the other.
    """

    def __init__(self, settings: config.Config, truth: Truth, index: pa.Table, calibration: fusion.Calibration) -> None:
        self.truth, self.index, self.rule, self.calibration = truth, index, settings.detect, calibration
        self.labels, scores = (pc.list_flatten(index[name]).combine_chunks() for name in ("box_labels", "box_scores"))
        self.scores = scores.to_numpy(zero_copy_only=False)
        self.given = bool(pc.any(pc.is_valid(self.labels)).as_py())
        self.sight = Sight(truth, self.rule.style)
        self.recall = box_groups.ProposalRecall(truth)
        self.frequencies = box_groups.frequencies(truth)
        self.judged: list[metrics.Judged] = [_nothing_judged()]
        self.groups: list[dict[str, np.ndarray]] = [self._groups(np.zeros((0, 4)), [])]
        self.visible: list[scoring.Detections] = []

    @cached_property
    def categories(self) -> dict[str, int]:
        return scoring.category_places(self.truth.names)

    def judge(self, part: pa.Table) -> None:
        """Name against label, of given boxes; box against objects, of proposals."""
        xyxy = _xyxy(part)
        if not self.given:
            self.recall.add(part["row"].to_numpy(), xyxy)
            return
        labels = pa.chunked_array([self.labels.take(pa.array(box_positions(part, self.index)))])
        self.judged.append(metrics.judged(part, labels))
        self.groups.append(self._groups(xyxy, labels.to_pylist()))

    def _groups(self, xyxy: np.ndarray, labels: Sequence[str | None]) -> dict[str, np.ndarray]:
        return box_groups.by_size(boxes.area(xyxy)) | box_groups.by_frequency(labels, self.frequencies)

    def detections(self, part: pa.Table) -> scoring.Detections:
        """Judge the boxes, and score them: all detections of theirs."""
        self.judge(part)
        found = scoring.detections(
            part["row"].to_numpy(),  # a picture's place in the JSON
            _xyxy(part),
            self.scores[box_positions(part, self.index)],
            _lists_like(part["candidates"], pc.struct_field(pc.list_flatten(part["candidates"]), "class_name")),
            _lists_like(part["candidates"], pa.chunked_array([chances(part, self.calibration)])),
            self.categories,
            self.rule.score,
            self.rule.classes_per_box,
        )
        self.visible.append(self.sight.seen(found))
        return found

    def values(self, names: Collection[str]) -> dict[str, float]:
        """All but AP. names: the vocabulary."""
        rows = metrics.together(self.judged)
        if not len(rows.labels):
            return self.recall.values()
        groups = {name: np.concatenate([part[name] for part in self.groups]) for name in self.groups[0]}
        return metrics.summary(rows, names) | box_groups.group_accuracies(rows.outcomes, groups)


def _xyxy(part: pa.Table) -> np.ndarray:
    """(N, 4) float64 boxes of N rows."""
    return pc.list_flatten(part["box_xyxy"]).to_numpy().astype(np.float64).reshape(part.num_rows, 4)


def _lists_like(lists: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ListArray:
    """Lists of the same lengths, of other values."""
    ends = np.concatenate([[0], np.cumsum(metrics.lengths(lists))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), values.combine_chunks())


def chances(predictions: pa.Table, calibration: fusion.Calibration) -> np.ndarray:
    """(M,) float64 probabilities of the candidates of all rows, row after row, as shares of the whole vocabulary.

    They are what `fusion.fuse` gives, to the last digit: rows of as many candidates are computed together, so that numpy adds
    in the same order. Raises ValueError where a ranking or its scores do not fit their candidates.
    """
    counts, _, ranked = metrics.places_of_candidates(predictions)
    own = pc.struct_field(pc.list_flatten(predictions["candidates"]), "score").to_numpy().astype(np.float64)
    said = -np.log1p(np.arange(counts.max(initial=0)))[ranked]
    scored = metrics.lengths(predictions["scores"])
    if not np.isin(scored[scored != counts], 0).all():
        raise ValueError("a ranking has more or fewer scores than candidates")
    said[np.repeat(scored > 0, counts)] = pc.list_flatten(predictions["scores"]).to_numpy()
    silent = pc.is_in(predictions["rank_status"], pa.array([RankStatus.SKIPPED.value, RankStatus.FALLBACK.value])).to_numpy()
    starts, found = np.cumsum(counts) - counts, np.empty(len(own))
    for count in np.unique(counts).tolist():
        rows = np.flatnonzero(counts == count)
        at = starts[rows, None] + np.arange(count)
        found[at] = _chances(own[at], said[at], silent[rows, None], calibration)
    return found


def _chances(own: np.ndarray, said: np.ndarray, silent: np.ndarray, calibration: fusion.Calibration) -> np.ndarray:
    """(n, K) of the retriever's and the ranker's scores (n, K); silent (n, 1): the ranking says nothing of the image."""
    both = calibration.weight_retriever * own + calibration.weight_ranker * said
    logits = np.where(silent, calibration.retriever_scale * own, both)
    fused = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    return fused * np.minimum(np.exp(own).sum(axis=1, keepdims=True), 1.0)
