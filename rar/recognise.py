"""Recognising a corpus: calibrate the ranker on the memory, then send every image (or box) through the chain.

`classify` and `detect` differ in two places: where the index comes from, and the crop stage that turns an image into its
boxes. What a row of the index becomes is in `stages`; what a run leaves on disk in `runfolder`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from rar import build, corpus, detect, metrics, pipeline, retrieve, route, serve, stages
from rar.config import Config
from rar.evaluate import evaluate
from rar.memory import Collection, open_store
from rar.runfolder import RunFolder
from rar.schema import ERRORS, Candidate, Ranking, RankStatus, UserError
from rar.sinks import ShardSink

PAPER = route.Calibration(weight_retriever=0.0, weight_ranker=1.0)  # the ranker's order is final, and it is always asked


@dataclass(frozen=True)
class Work:
    """The rows of a run: an index of images and, for detection, their boxes; `faults` are rows that failed before the start."""

    index: pa.Table
    boxed: bool
    faults: pa.Table

    @property
    def rows_of_images(self) -> np.ndarray:
        """(N,) how many rows each image of the index becomes."""
        if not self.boxed:
            return np.ones(self.index.num_rows, np.int64)
        return pc.list_value_length(self.index["boxes_xyxy"]).to_numpy()

    @property
    def empty_images(self) -> int:
        return int((self.rows_of_images == 0).sum())

    def expected(self, size: int) -> dict[int, int]:
        """shard -> its rows."""
        rows = self.rows_of_images
        return {shard: int(rows[shard * size : (shard + 1) * size].sum()) for shard in range(-(-len(rows) // size))}


def classify_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the images to classify")
    index = corpus.list_images(settings.corpus)
    return Work(index, False, _no_faults())


def detect_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the COCO or LVIS JSON of the images to detect in")
    index, faults = detect.read_boxes(settings.corpus, settings.detect)
    return Work(index, True, pa.Table.from_pylist(faults, _no_faults().schema))


def _no_faults() -> pa.Table:
    return ERRORS.empty_table()


@contextmanager
def session(settings: Config, *, create: bool = False) -> Iterator[str]:
    """Milvus and Ray for the length of a command; yields the address that workers reach the memory at.

    With `create` an embedded store may be new; one that a user's mistake leaves empty is removed again.
    """
    uri = settings.memory.uri
    missing = "://" not in uri and not Path(uri).exists()
    if missing and not create:
        raise UserError(f"there is no memory at {uri}; build it with `rar memory CONFIG`")
    try:
        with open_store(uri, settings.memory.token) as address, pipeline.local_ray():
            yield address
    except UserError:
        if missing:
            shutil.rmtree(uri, ignore_errors=True)
        raise


def prepare(settings: Config, address: str) -> Vocabulary:
    """Load the models and open the memory, before anything is written. Raises UserError for what the user must mend."""
    with ThreadPoolExecutor(1) as pool:  # the replica loads while the encoder does
        deployed = pool.submit(serve.deploy, settings.ranker) if settings.ranker.method != "none" else None
        vocabulary = open_memory(settings, address)
        if deployed is not None:
            deployed.result()
    return vocabulary


def run(
    settings: Config,
    address: str,
    vocabulary: Vocabulary,
    work: Work,
    folder: RunFolder,
    embedded: Dataset | None = None,
) -> dict[str, float]:
    """The whole of a verb in an open session; does only what is not in the folder yet. Returns the metrics.

    vocabulary: of `prepare`. embedded: the shards of `work` by `embed`, all of them, where several runs share them.
    """
    started = time.monotonic()
    work = replace(work, index=folder.freeze_index(work.index))
    numbers = folder.pending(pipeline.n_shards(work.index, settings.run.shard_size))
    calibration = calibrate(settings, address, vocabulary, folder)
    expected = work.expected(settings.run.shard_size)
    if numbers:
        if embedded is None:
            embedded = embed(settings, work, vocabulary.facts, numbers)
        with pipeline.progress(folder, sum(expected.values()), folder.path.name):
            rank(settings, embedded, vocabulary, calibration, ShardSink(folder.path, expected))
    return finish(settings, work, folder, calibration, vocabulary, time.monotonic() - started)


def dry_run(settings: Config, work: Work, path: Path) -> str:
    """What a run would do, from the index alone: counts, sizes and MLLM requests; nothing is opened or written."""
    rows, images = int(work.rows_of_images.sum()), work.index.num_rows
    size = settings.run.shard_size
    shards = pipeline.n_shards(work.index, size)
    done = shards - len(RunFolder(path).pending(shards))
    local = [uri for uri in work.index["uri"].to_pylist()[:1000] if os.path.exists(uri)]
    sampled = sum(os.path.getsize(uri) for uri in local) / max(len(local), 1)
    asked = 0 if settings.ranker.method == "none" else rows
    batches = -(-asked // settings.ranker.batch_size)
    lines = [
        f"would recognise {rows:,} {'boxes' if work.boxed else 'images'} of {images:,} images in {shards:,} shards of {size}",
        f"  {done:,} shards are in {path} already; {work.faults.num_rows:,} boxes cannot be used",
        f"  about {sampled * images / 1e6:,.1f} MB to read" if local else "  size of the files unknown",
        f"  encoder {settings.encoder.model}, {settings.encoder.workers} worker(s), batches of {settings.encoder.batch_size}",
        f"  ranker {settings.ranker.model} ({settings.ranker.method}): at most {asked:,} images in {batches:,} requests",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Vocabulary:
    """A built memory as the pipeline needs it: where to search, and the name of each class."""

    collection: Collection
    names: dict[int, str]
    facts: pipeline.EncoderFacts


def open_memory(settings: Config, address: str) -> Vocabulary:
    """The collection that a retrieval mode searches. Raises UserError where the memory is missing or of another encoder."""
    facts = pipeline.encoder_facts(settings.encoder.model_dump_json())
    mode = settings.retriever.mode
    head = build.collection(settings, address, "head_text" if mode in ("all", "knn") else f"head_{mode}")
    searched = build.collection(settings, address, "images") if mode == "knn" else head
    if not searched.exists():
        name, uri = settings.memory.name, settings.memory.uri
        raise UserError(f"memory {name!r} at {uri} has nothing for retriever.mode {mode}; build it with `rar memory CONFIG`")
    made_by = searched.meta()["fingerprint"]
    if made_by != facts.fingerprint:
        raise UserError(
            f"memory {settings.memory.name!r} was made by another encoder, templates or precision ({made_by}, not "
            f"{facts.fingerprint}); rebuild it with `rar memory CONFIG --fresh`, or use the encoder it was made with"
        )
    entries = head.fetch()
    return Vocabulary(searched, dict(zip(entries.class_ids.tolist(), entries.class_names, strict=True)), facts)


def embed(settings: Config, work: Work, facts: pipeline.EncoderFacts, numbers: list[int]) -> Dataset:
    """The shards' vectors and encoded bytes: what every arm over the same corpus and encoder shares."""
    shards = pipeline.shards_of(work.index, settings.run.shard_size, numbers)
    pictures = pipeline.decoded(shards, facts, settings.detect.crop if work.boxed else None)
    return pictures if settings.retriever.mode == "all" else pipeline.embedded(pictures, settings.encoder)


def rank(settings: Config, embedded: Dataset, vocabulary: Vocabulary, calibration: route.Calibration, sink: ShardSink) -> None:
    """The rest of the chain: retrieve, route, rank, predict, write."""
    ask = serve.ask(settings.ranker)
    found = pipeline.through(embedded, "retrieve", stages.Retrieve(settings.retriever, vocabulary.collection, vocabulary.names))
    ranked = pipeline.through(found, "rank", stages.Rank(ask, calibration, settings.ranker.batch_size))
    ranked.write_datasink(sink)


def calibrate(settings: Config, address: str, vocabulary: Vocabulary, folder: RunFolder) -> route.Calibration:
    """Fusion weights and routing threshold for this memory and ranker; kept in the run folder, for a resumed run.

    The memory's own images are the held-out set: each gets the candidates of heads fitted without it, and the ranker's answer.
    A memory without images has nothing to fit on and takes the defaults of `route.Calibration`.
    """
    if (folder.path / "calibration.json").exists():
        return route.Calibration.from_dict(folder.read("calibration.json"))
    calibration = PAPER if settings.route.mode == "always" else route.Calibration()
    if settings.route.mode == "calibrated" and settings.ranker.method != "none" and settings.memory.support is not None:
        calibration = _fit(settings, address, vocabulary)
    folder.write("calibration.json", calibration.to_dict())
    return calibration


def _fit(settings: Config, address: str, vocabulary: Vocabulary) -> route.Calibration:
    proposed, truth = _held_out_candidates(settings, address, vocabulary)
    planned = build.plan(settings)
    size = settings.run.shard_size
    rows = pipeline.shards_of(planned.support, size, range(pipeline.n_shards(planned.support, size)))
    rows = pipeline.through(rows, "read", stages.load)
    rows = pipeline.through(rows, "recall", stages.Recall(proposed))
    ranked = pipeline.through(rows, "rank", stages.Rank(serve.ask(settings.ranker), PAPER, settings.ranker.batch_size))
    table = pipeline.collect(ranked).sort_by("image_id")  # tasks finish in any order; the fit's folds must not depend on it
    table = table.filter(pc.is_in(table["image_id"], pa.array(list(proposed), pa.string())))
    return route.fit(
        stages.candidates_of(table), rankings_of(table), [truth[image_id] for image_id in table["image_id"].to_pylist()]
    )


def _held_out_candidates(
    settings: Config, address: str, vocabulary: Vocabulary
) -> tuple[dict[str, list[Candidate]], dict[str, int]]:
    """image_id -> candidates by heads fitted without that image, and its class; at most `route.max_calibration_images`."""
    mode = settings.retriever.mode
    if mode == "knn" or mode == "all":
        raise UserError(
            f"route.mode calibrated needs retriever.mode fused, text or centroid; with {mode} set route.mode: always"
        )
    images = build.entries_of(build.collection(settings, address, "images"))
    texts = build.entries_of(build.collection(settings, address, "texts"))
    if images is None:
        raise UserError(f"memory {settings.memory.name!r} has no images though memory.support is set; build it again")
    drawn = np.random.default_rng([settings.run.seed, 5]).permutation(len(images))[: settings.route.max_calibration_images]
    rows = np.sort(drawn)
    scores = retrieve.held_out_scores(mode, images, texts, settings.run.seed, rows.tolist())
    ids = np.array(sorted(vocabulary.names))
    names = [vocabulary.names[class_id] for class_id in ids.tolist()]
    candidates = retrieve.candidates_from_scores(scores, ids, names, min(settings.retriever.top_k, len(ids)))
    image_ids = [images.entry_ids[row].rsplit("-", 1)[0] for row in rows]
    return dict(zip(image_ids, candidates, strict=True)), dict(zip(image_ids, images.class_ids[rows].tolist(), strict=True))


def rankings_of(table: pa.Table) -> list[Ranking]:
    """What the ranker said of each row, rebuilt from the stored columns."""
    found = []
    columns = (table[name].to_pylist() for name in ("ranking", "scores", "rank_status", "response"))
    for order, scores, status, response in zip(*columns, strict=True):
        found.append(Ranking(tuple(order), RankStatus(status), tuple(scores), response or ""))
    return found


def finish(
    settings: Config, work: Work, folder: RunFolder, calibration: route.Calibration, vocabulary: Vocabulary, seconds: float
) -> dict[str, float]:
    """Write run.json's counts and metrics.json; returns the metrics. Raises RuntimeError where rows are missing."""
    if work.faults.num_rows:
        folder.write_faults(work.faults)
    predicted, failed = folder.progress()
    total = int(work.rows_of_images.sum()) + work.faults.num_rows + work.empty_images
    counts = {"input": total, "ok": predicted, "failed": failed, "skipped": work.empty_images}
    if predicted + failed + work.empty_images != total:
        raise RuntimeError(f"{folder.path}: {total} rows went in, {predicted} + {failed} + {work.empty_images} came out")
    values = dict(measure(settings, work, folder, calibration, vocabulary))
    folder.finish(counts, values, seconds)
    return values


def measure(
    settings: Config, work: Work, folder: RunFolder, calibration: route.Calibration, vocabulary: Vocabulary
) -> dict[str, float]:
    """metrics.json of a run: accuracies where labels are known; for detection also AP against the corpus' own boxes."""
    predictions, names = folder.predictions(), list(vocabulary.names.values())
    if not work.boxed:
        truth = dict(zip(work.index["uri"].to_pylist(), work.index["label"].to_pylist(), strict=True))
        return metrics.classification(predictions, [truth[uri] for uri in predictions["uri"].to_pylist()], names)
    rows = predictions.to_pylist()
    at = _boxes_of(work.index)
    found = [at[row["uri"], tuple(row["box_xyxy"])] for row in rows]
    labels = [label for _, _, label in found]
    values = metrics.classification(predictions, labels, names) if any(labels) else {}
    assert settings.corpus is not None
    categories = detect.category_names(settings.corpus.uri)
    known = set(categories.values())
    if not known.issuperset(names):
        return values  # a vocabulary of its own: there is no truth to hold it against
    fused = [
        route.fuse(candidates, ranking, calibration)[1]
        for candidates, ranking in zip(stages.candidates_of(predictions), rankings_of(predictions), strict=True)
    ]
    results = detect.coco_results(
        [coco_id for coco_id, _, _ in found],
        np.array([row["box_xyxy"] for row in rows]),
        [score for _, score, _ in found],
        [[candidate["class_name"] for candidate in row["candidates"]] for row in rows],
        fused,
        categories,
    )
    folder.write("detections.json", results)
    return values | evaluate(results, settings.corpus.uri, settings.detect.style)


def _boxes_of(index: pa.Table) -> dict[tuple[str, tuple[float, ...]], tuple[int, float, str | None]]:
    """(uri, box) -> (the JSON's image id, proposal score, label)."""
    columns = (index[name].to_pylist() for name in ("uri", "coco_id", "boxes_xyxy", "box_scores", "box_labels"))
    return {
        (uri, tuple(box)): (coco_id, score, label)
        for uri, coco_id, boxes, scores, labels in zip(*columns, strict=True)
        for box, score, label in zip(boxes, scores, labels, strict=True)
    }
