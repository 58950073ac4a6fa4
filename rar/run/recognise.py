"""Recognising a corpus: calibrate the ranker on the memory, then send every image (or box) through the chain.

`classify` and `detect` differ in two places: where the index comes from, and the crop stage that turns an image into its
boxes. What a row of the index becomes is in the stages of `engine`; what a run leaves on disk in `runfolder`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from rar.columns import fitted, positions
from rar.config import LETTERS, Config, Ranker
from rar.corpus import coco, looks
from rar.engine import pipeline, placement, reach, reading
from rar.engine.actors import free_resources
from rar.engine.session import Session
from rar.engine.sinks import ShardSink
from rar.memory import catalog
from rar.memory.collection import Collection
from rar.ranker.cache import Asks
from rar.ranker.debias import Prior
from rar.run import build, measure, steps
from rar.run.calibrate import calibrate, exemplars, label_prior
from rar.run.vocabulary import Vocabulary, open_memory
from rar.run.work import Work
from rar.runfolder import RunFolder
from rar.schema import ERRORS, Unavailable, UserError


def prepare(session: Session, settings: Config) -> Vocabulary:
    """Load the models and open the memory, before anything is written. Raises UserError for what the user must mend."""
    placement.check(session, settings, ranks=True, detects=settings.detect.detector is not None)
    memory = settings.memory
    catalog.digest(session.memory_address, memory.name, memory.version, memory.token)  # one that is absent is told at once
    vocabulary = open_memory(session, settings) if settings.retriever.mode == "all" else None  # it loads no encoder
    if vocabulary is not None:
        check_labels(settings, len(vocabulary.names))
    with ThreadPoolExecutor(1) as pool:  # the replica loads while the encoder does
        deployed = pool.submit(_deploy, session, settings.ranker) if settings.ranker.method != "none" else None
        if deployed is not None and settings.ranker.base_url is not None:
            deployed.result()  # a server that is not there is told before the encoder loads
        vocabulary = vocabulary or open_memory(session, settings)
        if deployed is not None:
            deployed.result()
    return vocabulary


def _deploy(session: Session, ranker: Ranker) -> None:
    from rar.engine import client  # and with it Serve, which a run without a ranker does not need

    client.deploy(session, ranker)


def _asked(session: Session, settings: Config, prior: Prior | None) -> tuple[Asks | None, Callable[[], str]]:
    """How the ranker is asked, and what tells of it while rows are waited for."""
    if settings.ranker.method == "none":
        return None, free_resources
    from rar.engine import client

    asked = client.ask(session, settings.ranker, prior, exemplars(settings), limited=True)
    return asked, lambda: client.standing(settings.ranker)


def check_labels(settings: Config, classes: int) -> None:
    """Raises UserError where letters are too few to show all classes."""
    if settings.ranker.method == "letters" and classes + settings.ranker.none_of_these > LETTERS:
        raise UserError(
            f"ranker.method letters has {LETTERS} labels, too few for retriever.mode all over {classes:,} classes: choose "
            "another mode, or set ranker.method to likelihood"
        )


def run(
    session: Session,
    settings: Config,
    vocabulary: Vocabulary,
    work: Work,
    folder: RunFolder,
    retrieved: Callable[[list[int]], Dataset] | None = None,
) -> dict[str, float]:
    """The whole of a verb in an open session; does only what is not in the folder yet. Returns the metrics.

    vocabulary: of `prepare`. retrieved: shards by number, with candidates and encoded bytes (null without a ranker), where
    several runs share the steps so far.
    """
    started = time.monotonic()
    reach.check(session, folder.path)
    folder.pin_memory(vocabulary.digest)
    folder.write("classes.json", list(vocabulary.names.values()))
    if work.boxed and settings.detect.detector is not None:
        work = propose(session, settings, work, folder)
    work = replace(work, index=folder.freeze_index(work.index))
    expected = work.expected(settings.run.shard_size)
    folder.write_empty(shard for shard, rows in expected.items() if not rows)
    numbers = folder.pending(len(expected))
    prior = label_prior(session, settings, work, vocabulary, folder)
    calibration = calibrate(session, settings, vocabulary, folder, prior)
    if numbers:
        ask, standing = _asked(session, settings, prior)
        if retrieved is not None:
            rows = retrieved(numbers)
        else:
            rows = steps.read(settings, work, vocabulary.facts, numbers)
            rows = steps.crop(settings, work, vocabulary.facts, rows)
            rows = steps.embed(session, settings, vocabulary.facts, rows, remembered_looks(settings, work, vocabulary))
            rows = steps.retrieve(vocabulary, rows)
        rows = steps.rank(session, settings.ranker, ask, calibration, rows)
        rows = steps.fuse(calibration, rows)
        with pipeline.progress(folder, sum(expected.values()), folder.path.name, standing):
            rows.write_datasink(ShardSink(folder.path, expected))
    check_spent(settings, folder, len(expected))
    return finish(session, settings, work, folder, vocabulary, time.monotonic() - started)


def remembered_looks(settings: Config, work: Work, vocabulary: Vocabulary) -> np.ndarray | None:
    """How the memory's pictures look, by its support set as far as that is still there; None where there are no pictures."""
    seen = not work.boxed and settings.encoder.model != "precomputed" and settings.retriever.mode != "all"
    if not seen or settings.memory.support is None:
        return None
    try:
        return pipeline.in_a_worker(_looks, settings, vocabulary.facts.fit)
    except (UserError, Unavailable):  # it served to build the memory, and may be gone since
        return None


def _looks(settings: Config, fit: looks.Fit) -> np.ndarray:
    return looks.looks_of(build.plan(settings).support, fit)


def check_spent(settings: Config, folder: RunFolder, shards: int) -> None:
    """Raises UserError where `ranker.max_calls` or `ranker.token_budget` left shards undone."""
    left, ranker = len(folder.pending(shards)), settings.ranker
    limits = {"ranker.max_calls": ranker.max_calls, "ranker.token_budget": ranker.token_budget}
    told = " or ".join(f"{name} {limit:,}" for name, limit in limits.items() if limit is not None)
    if left and told:
        raise UserError(
            f"{told} are spent: {shards - left:,} of {shards:,} shards are done and in {folder.path}; the same command goes on "
            "with the rest (a shard takes about run.shard_size calls)"
        )


def propose(session: Session, settings: Config, work: Work, folder: RunFolder) -> Work:
    """The pictures with the detector's boxes; those that cannot be read become faults.

    Boxes are kept in the run folder shard by shard before any is recognised, because how many rows a run has must be known
    first: counts add up, and a killed run goes on where it stopped. It costs reading every picture twice.
    """
    work = replace(work, index=folder.freeze_index(work.index, "pictures.parquet"))
    bounds = work.bounds(settings.run.shard_size)
    numbers = folder.unproposed(len(bounds) - 1)
    if numbers:
        read = pipeline.through(pipeline.shards_of(work.index, bounds, numbers), "read", reading.load)
        pipeline.collect(
            pipeline.through(pipeline.by_model(read, session.detector(settings.detect)), "keep", folder.write_proposals)
        )
    found = folder.proposals()
    good = found.filter(pc.is_null(found["error"])).sort_by("row")
    bad = found.filter(pc.is_valid(found["error"]))
    return Work(coco.with_proposals(good), True, fitted(bad, ERRORS))


def leaked(folder: RunFolder, images: Collection, fingerprint: str) -> int:
    """How many rows are of pictures that are in the memory, by content.

    The ids of a memory of no more entries than the run has rows are read once; of a larger one, each shard asks for its own.
    """
    held = pa.array(images.entry_ids(), pa.string()) if images.count() <= folder.progress()[0] else None
    count = 0
    for part in folder.parts_of_predictions(("image_id",)):
        ids = pc.binary_join_element_wise(part["image_id"], fingerprint, "-")  # schema.entry_id
        known = pa.array(list(images.labels_of(pc.unique(ids).to_pylist())), pa.string()) if held is None else held
        count += pc.sum(pc.is_in(ids, value_set=known)).as_py() or 0
    return count


def _boxes_of_no_picture(work: Work, folder: RunFolder) -> int:
    """How many boxes are no row of their own: pictures of another size than their boxes are one row each, of errors."""
    if not work.boxed:
        return 0
    errors = folder.errors()
    whole = errors.filter(pc.and_(pc.equal(errors["stage"], "crop"), pc.is_null(errors["place"])))
    return int((work.rows_of_images[positions(whole["row"], work.index)] - 1).sum())


def finish(
    session: Session, settings: Config, work: Work, folder: RunFolder, vocabulary: Vocabulary, seconds: float
) -> dict[str, float]:
    """Write run.json's counts and metrics.json; returns the metrics. Raises RuntimeError where rows are missing."""
    stats = {**folder.stats(), **placement.at_once(session, settings, ranks=True)}  # before any model is let go
    folder.write_faults(work.faults)
    predicted, failed = folder.progress()
    total = int(work.rows_of_images.sum()) + work.faults.num_rows + work.empty_images - _boxes_of_no_picture(work, folder)
    counts = {"input": total, "ok": predicted, "failed": failed, "skipped": work.empty_images}
    if predicted + failed + work.empty_images != total:
        raise RuntimeError(f"{folder.path}: {total} rows went in, {predicted} + {failed} + {work.empty_images} came out")
    values = pipeline.in_a_worker(measure.measured, settings, folder, work.index, work.boxed)  # it reads all rows
    if not work.boxed and (images := vocabulary.retrieve.images).exists():
        values["leaked"] = float(pipeline.in_a_worker(leaked, folder, images, vocabulary.facts.fingerprint))
    if (near := stats.get("near_duplicates")) is not None:
        values["near_leaked"] = near
    if not work.boxed and settings.run.vocabulary_free:
        values |= measure.vocabulary_free(session, settings, folder.predictions(), work.index)
    folder.finish(counts, values, seconds, settings, stats)
    return values
