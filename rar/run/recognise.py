"""Recognising a corpus: calibrate the ranker on the memory, then send every image (or box) through the chain.

`classify` and `detect` differ in two places: where the index comes from, and the crop stage that turns an image into its
boxes. What a row of the index becomes is in `stages`; what a run leaves on disk in `runfolder`.
"""

from __future__ import annotations

import math
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

from rar import fusion
from rar.config import Config
from rar.corpus import coco, listing
from rar.engine import application, pipeline, stages
from rar.engine.sinks import ShardSink
from rar.memory import catalog
from rar.memory.collection import open_store
from rar.retriever import modes
from rar.run import build, measure
from rar.runfolder import RunFolder
from rar.schema import ERRORS, Candidate, RankStatus, UserError

PRIOR_IMAGES = 64  # that the label prior is estimated on
PAPER = fusion.Calibration(weight_retriever=0.0, weight_ranker=1.0)  # the ranker's order is final, and it is always asked


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
    def labels(self) -> pa.ChunkedArray:
        """Of the images, or of all their boxes; null where a row has none."""
        return pc.list_flatten(self.index["box_labels"]) if self.boxed else self.index["label"]

    @property
    def empty_images(self) -> int:
        return int((self.rows_of_images == 0).sum())

    def bounds(self, size: int) -> np.ndarray:
        """Where the index is cut into shards of at most `size` rows."""
        return pipeline.cut(self.rows_of_images, size)

    def expected(self, size: int) -> dict[int, int]:
        """shard -> its rows."""
        rows, bounds = self.rows_of_images, self.bounds(size)
        return {shard: int(rows[slice(*bounds[shard : shard + 2])].sum()) for shard in range(len(bounds) - 1)}


def classify_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the images to classify")
    build.check_kind(settings, settings.corpus)
    index = listing.list_images(settings.corpus)
    return Work(index, False, _no_faults())


def detect_work(settings: Config) -> Work:
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the COCO or LVIS JSON of the images to detect in")
    if settings.detect.detector is not None:  # its boxes are found in the run
        listed = coco.is_json(settings.corpus)
        pictures = coco.list_pictures(settings.corpus) if listed else coco.without_boxes(listing.list_images(settings.corpus))
        return Work(pictures, True, _no_faults())
    index, faults = coco.read_boxes(settings.corpus, settings.detect)
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
        deployed = pool.submit(application.deploy, settings.ranker) if settings.ranker.method != "none" else None
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
    folder.pin("memory", vocabulary.digest)
    if work.boxed and settings.detect.detector is not None:
        work = propose(settings, work, folder)
    work = replace(work, index=folder.freeze_index(work.index))
    expected = work.expected(settings.run.shard_size)
    numbers = folder.pending(len(expected))
    prior = label_prior(settings, work, vocabulary, folder)
    calibration = calibrate(settings, address, vocabulary, folder, prior)
    if numbers:
        if embedded is None:
            embedded = embed(settings, work, vocabulary.facts, numbers)
        with pipeline.progress(folder, sum(expected.values()), folder.path.name):
            rank(settings, embedded, vocabulary, calibration, prior, ShardSink(folder.path, expected))
    return finish(settings, work, folder, calibration, vocabulary, time.monotonic() - started)


def propose(settings: Config, work: Work, folder: RunFolder) -> Work:
    """The pictures with the detector's boxes; those that cannot be read become faults.

    Boxes are kept in the run folder shard by shard before any is recognised, because how many rows a run has must be known
    first: counts add up, and a killed run goes on where it stopped. It costs reading every picture twice.
    """
    work = replace(work, index=folder.freeze_index(work.index, "pictures.parquet"))
    bounds = work.bounds(settings.run.shard_size)
    numbers = folder.pending(len(bounds) - 1, "proposals")
    if numbers:
        read = pipeline.through(pipeline.shards_of(work.index, bounds, numbers), "read", stages.load)
        pipeline.collect(pipeline.through(pipeline.proposed(read, settings.detect), "keep", folder.write_proposals))
    found = folder.proposals()
    good = found.filter(pc.is_null(found["error"])).sort_by("row")
    bad = found.filter(pc.is_valid(found["error"]))
    return Work(coco.with_proposals(good), True, bad.select(ERRORS.names).cast(ERRORS))


def dry_run(settings: Config, work: Work, path: Path) -> str:
    """What a run would do, from the index alone: counts, sizes and MLLM requests; nothing is opened or written."""
    rows, images = int(work.rows_of_images.sum()), work.index.num_rows
    size = settings.run.shard_size
    shards = len(work.bounds(size)) - 1
    done = shards - len(RunFolder(path).pending(shards))
    local = [uri for uri in work.index["uri"].to_pylist()[:1000] if os.path.exists(uri)]
    sampled = sum(os.path.getsize(uri) for uri in local) / max(len(local), 1)
    asked = 0 if settings.ranker.method == "none" else rows
    detector = settings.detect.detector if work.boxed else None
    what = f"the boxes that {detector.model} will find" if detector else f"{rows:,} {'boxes' if work.boxed else 'images'}"
    batches = -(-asked // settings.ranker.batch_size)
    lines = [
        f"would recognise {what} of {images:,} images in {shards:,} shards of {size}",
        f"  {done:,} shards are in {path} already; {work.faults.num_rows:,} boxes cannot be used",
        f"  about {sampled * images / 1e6:,.1f} MB to read" if local else "  size of the files unknown",
        f"  encoder {settings.encoder.model}, {settings.encoder.workers} worker(s), batches of {settings.encoder.batch_size}",
        f"  ranker {settings.ranker.model} ({settings.ranker.method}): at most {asked:,} images in {batches:,} requests",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Vocabulary:
    """A built memory as the pipeline needs it. names: class id -> name. digest: the memory's state."""

    names: dict[int, str]
    facts: stages.EncoderFacts
    retrieve: stages.Retrieve
    digest: str


def open_memory(settings: Config, address: str) -> Vocabulary:
    """What a retrieval mode searches. Raises UserError where the memory is missing, lacks it, or is of another encoder."""
    facts = build.facts_of(settings, settings.corpus)
    memory, mode = settings.memory, settings.retriever.mode
    digest = catalog.digest(address, memory.name, memory.version, memory.token)
    head, images = (
        build.collection(settings, address, kind) for kind in (f"head_{'fused' if mode == 'all' else mode}", "images")
    )
    if not head.exists():
        needs = {"text": "class names", "tip": "class names and support images"}.get(mode, "support images")
        raise UserError(f"memory {memory.name!r} has nothing for retriever.mode {mode}, which needs {needs}; see `rar memory`")
    build.check_maker(settings, head, facts)
    fitted = modes.Head.from_entries(head.fetch(), head.meta()["head"])
    names = dict(zip(fitted.class_ids.tolist(), fitted.class_names, strict=True))
    return Vocabulary(names, facts, stages.Retrieve(settings.retriever, fitted, head, images), digest)


def embed(settings: Config, work: Work, facts: stages.EncoderFacts, numbers: list[int] | None = None) -> Dataset:
    """The shards' (by default all) vectors and encoded bytes: what every arm over the same corpus and encoder shares."""
    shards = pipeline.shards_of(work.index, work.bounds(settings.run.shard_size), numbers)
    if settings.encoder.model == "precomputed":
        assert settings.corpus is not None
        return pipeline.through(shards, "read", stages.LoadVectors(settings.corpus))
    read = pipeline.through(shards, "read", stages.load)
    pictures = pipeline.with_pixels(read, facts, settings.detect.crop if work.boxed else None)
    return pictures if settings.retriever.mode == "all" else pipeline.embedded(pictures, settings.encoder)


def rank(
    settings: Config,
    embedded: Dataset,
    vocabulary: Vocabulary,
    calibration: fusion.Calibration,
    prior: application.Prior | None,
    sink: ShardSink,
) -> None:
    """The rest of the chain: retrieve, route, rank, predict, write."""
    ask = application.ask(settings.ranker, prior, exemplars(settings))
    found = pipeline.through(embedded, "retrieve", vocabulary.retrieve)
    ranked = pipeline.through(found, "rank", stages.Rank(ask, calibration, settings.ranker.batch_size))
    ranked.write_datasink(sink)


def exemplars(settings: Config) -> application.Exemplars | None:
    """Where the pictures lie that are shown beside the names of candidates: the first support images of each class."""
    if not settings.ranker.exemplars:
        return None
    if settings.memory.support is None:
        raise UserError("ranker.exemplars shows support images: set memory.support")
    found: application.Exemplars = {}
    for row in build.plan(settings).support.sort_by("row").to_pylist():
        places = found.setdefault(row["label"], [])
        if len(places) < settings.ranker.exemplars:
            places.append((row["uri"], row["offset"], row["size"]))
    return found


def label_prior(settings: Config, work: Work, vocabulary: Vocabulary, folder: RunFolder) -> application.Prior | None:
    """What the ranker says of any picture (`ranker.debias: prior`), by the run's own first ones; kept for a resumed run."""
    if settings.ranker.debias == "none" or settings.ranker.method != "letters":
        return None
    if not (folder.path / "prior.json").exists():
        few = replace(work, index=work.index.slice(0, PRIOR_IMAGES))
        table = pipeline.collect(pipeline.through(embed(settings, few, vocabulary.facts), "retrieve", vocabulary.retrieve))
        table = table.filter(pc.is_null(table["error"])).sort_by("image_id").slice(0, PRIOR_IMAGES)
        names = [[candidate.class_name for candidate in row] for row in stages.candidates_of(table)]
        folder.write("prior.json", application.estimate_prior(settings.ranker, table["bytes"].to_pylist(), names))
    return folder.read("prior.json")


def calibrate(
    settings: Config, address: str, vocabulary: Vocabulary, folder: RunFolder, prior: application.Prior | None = None
) -> fusion.Calibration:
    """Fusion weights and routing threshold for this memory and ranker; kept in the run folder, for a resumed run.

    The memory's own images are the held-out set: each gets the candidates of heads fitted without it, and the ranker's answer.
    A memory without images has nothing to fit on and takes the defaults of `fusion.Calibration`.
    """
    if (folder.path / "calibration.json").exists():
        return fusion.Calibration.from_dict(folder.read("calibration.json"))
    calibration = PAPER if settings.route.mode == "always" else fusion.Calibration()
    if settings.route.mode == "calibrated" and settings.ranker.method != "none" and settings.memory.support is not None:
        calibration = _fit(settings, address, vocabulary, prior)
    folder.write("calibration.json", calibration.to_dict())
    return calibration


def _fit(settings: Config, address: str, vocabulary: Vocabulary, prior: application.Prior | None) -> fusion.Calibration:
    proposed, truth = _held_out_candidates(settings, address, vocabulary)
    support = build.plan(settings).support
    rows = pipeline.through(pipeline.shards_of(support, pipeline.evenly(support, settings.run.shard_size)), "read", stages.load)
    rows = pipeline.through(rows, "recall", stages.Recall(proposed))
    asked = stages.Rank(application.ask(settings.ranker, prior, exemplars(settings)), PAPER, settings.ranker.batch_size)
    table = pipeline.collect(pipeline.through(rows, "rank", asked))
    table = table.sort_by("image_id")  # tasks finish in any order; the fit's folds must not depend on it
    table = table.filter(pc.is_in(table["image_id"], pa.array(list(proposed), pa.string())))
    labels = [truth[image_id] for image_id in table["image_id"].to_pylist()]
    return fusion.fit(stages.candidates_of(table), measure.rankings_of(table), labels, settings.route.coverage)


def _held_out_candidates(
    settings: Config, address: str, vocabulary: Vocabulary
) -> tuple[dict[str, list[Candidate]], dict[str, int]]:
    """image_id -> candidates by heads fitted without that image, and its class; at most `route.max_calibration_images`."""
    mode = settings.retriever.mode
    if mode == "all":
        raise UserError(
            "route.mode calibrated needs a retriever that prefers some classes; with mode all set route.mode: always"
        )
    images = build.entries_of(build.collection(settings, address, "images"))
    texts = build.entries_of(build.collection(settings, address, "texts"))
    if images is None:
        raise UserError(f"memory {settings.memory.name!r} has no images though memory.support is set; build it again")
    drawn = np.random.default_rng([settings.run.seed, 5]).permutation(len(images))[: settings.route.max_calibration_images]
    rows = np.sort(drawn)
    given = (settings.retriever.n_neighbors, settings.retriever.sharpness)
    scores = modes.held_out_scores(mode, images, texts, settings.run.seed, rows.tolist(), *given)
    ids = np.array(sorted(vocabulary.names))
    names = [vocabulary.names[class_id] for class_id in ids.tolist()]
    top_k = min(settings.retriever.top_k, len(ids))
    deep = modes.candidates_from_scores(scores, ids, names, top_k if mode in ("knn", "tip") else stages.SHARE_DEPTH)
    candidates = [stages.log_shares(row)[:top_k] for row in deep]
    image_ids = [images.entry_ids[row].rsplit("-", 1)[0] for row in rows]
    return dict(zip(image_ids, candidates, strict=True)), dict(zip(image_ids, images.class_ids[rows].tolist(), strict=True))


def finish(
    settings: Config, work: Work, folder: RunFolder, calibration: fusion.Calibration, vocabulary: Vocabulary, seconds: float
) -> dict[str, float]:
    """Write run.json's counts and metrics.json; returns the metrics. Raises RuntimeError where rows are missing."""
    if work.faults.num_rows:
        folder.write_faults(work.faults)
    predicted, failed = folder.progress()
    total = int(work.rows_of_images.sum()) + work.faults.num_rows + work.empty_images
    counts = {"input": total, "ok": predicted, "failed": failed, "skipped": work.empty_images}
    if predicted + failed + work.empty_images != total:
        raise RuntimeError(f"{folder.path}: {total} rows went in, {predicted} + {failed} + {work.empty_images} came out")
    predictions, names = folder.predictions(), list(vocabulary.names.values())
    if work.boxed:
        values = measure.detection(settings, predictions, work.index, names, calibration, folder.path / "detections.json")
    else:
        values = measure.classification(predictions, work.index, names)
    values["mean_k"] = _mean_k(folder)
    folder.finish(counts, values, seconds)
    return values


def _mean_k(folder: RunFolder) -> float:
    """Candidates shown to the ranker per image that it was asked about; NaN where it was asked about none."""
    asked = pc.sum(pc.not_equal(folder.predictions()["rank_status"], RankStatus.SKIPPED.value)).as_py()
    return folder.stats()["mllm.candidates"] / asked if asked else math.nan
