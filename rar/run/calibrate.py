"""What a run learns before it starts: fusion weights and routing from the memory's own images, and the ranker's label prior."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import fusion
from rar.columns import candidates_of, rankings_of
from rar.config import Config
from rar.engine import choosing, pipeline, reading
from rar.engine.exemplars import Exemplars
from rar.engine.session import Session
from rar.ranker.debias import Prior
from rar.run import build, fitting, steps
from rar.run.vocabulary import PARTS, Vocabulary, collection
from rar.run.work import Work
from rar.runfolder import RunFolder
from rar.schema import Candidate, UserError

FEW_IMAGES = 100  # below, a calibration is told to be thin
PRIOR_IMAGES = 64  # that the label prior is estimated on
PAPER = fusion.Calibration(weight_retriever=0.0, weight_ranker=1.0)  # the ranker's order is final, and it is always asked


def calibrate(
    session: Session, settings: Config, vocabulary: Vocabulary, folder: RunFolder, prior: Prior | None = None
) -> fusion.Calibration:
    """Fusion weights and routing threshold for this memory and ranker; kept in the run folder, for a resumed run.

    The memory's own images are the held-out set: each gets the candidates of heads fitted without it and its near duplicates,
    and the ranker's answer.
    A memory without images has nothing to fit on and takes the defaults of `fusion.Calibration`.
    """
    if (folder.path / "calibration.json").exists():
        return fusion.Calibration.from_dict(folder.read("calibration.json"))
    calibration = PAPER if settings.route.mode == "always" else fusion.Calibration()
    if settings.route.mode == "calibrated" and settings.ranker.method != "none" and settings.memory.support is not None:
        calibration = _fit(session, settings, vocabulary, prior).rounded()
    folder.write("calibration.json", calibration.to_dict())
    return calibration


def _fit(session: Session, settings: Config, vocabulary: Vocabulary, prior: Prior | None) -> fusion.Calibration:
    if settings.retriever.mode == "all":
        raise UserError(
            "route.mode calibrated needs a retriever that prefers some classes; with mode all set route.mode: always"
        )
    support = build.plan(settings).support
    drawn = np.random.default_rng([settings.run.seed, 5]).permutation(support.num_rows)[: settings.route.max_calibration_images]
    few = support.take(np.sort(drawn))  # no other picture is read
    reader = reading.reader(few, None, settings.detect.shown)
    read = pipeline.through(pipeline.shards_of(few, pipeline.evenly(few, settings.run.shard_size)), "read", reader)
    read = read.materialize()
    ids = pipeline.collect(pipeline.plainly(read, lambda table: table.select(["image_id"])))
    image_ids = sorted(set(ids["image_id"].drop_null().to_pylist()))
    retrieved, truth, groups = held_out_candidates(session, settings, vocabulary, image_ids)
    if len(retrieved) < FEW_IMAGES:
        print(f"  calibrated on {len(retrieved)} images alone; {FEW_IMAGES} and more are wanted", file=sys.stderr, flush=True)
    rows = pipeline.through(read, "recall", choosing.Recall(retrieved))
    from rar.engine import client  # and with it Serve

    ask = client.ask(session, settings.ranker, prior, exemplars(settings, support))
    table = pipeline.collect(steps.rank(session, settings.ranker, ask, PAPER, rows))
    table = table.sort_by("image_id")  # tasks finish in any order; the fit's folds must not depend on it
    table = table.filter(pc.is_in(table["image_id"], pa.array(list(retrieved), pa.string())))
    labels, alike = ([of[image_id] for image_id in table["image_id"].to_pylist()] for of in (truth, groups))
    kept = table["scores"].cast(pa.list_(pa.float32()))  # as a run folder keeps them
    table = table.set_column(table.column_names.index("scores"), "scores", kept)
    return fusion.fit(candidates_of(table), rankings_of(table), labels, settings.route.coverage, alike)


def judged(session: Session, settings: Config, vocabulary: Vocabulary) -> float:
    """Leave-one-out accuracy on the memory's own images: of the retriever, or fused with the ranker (cross-validated).

    Nothing but the memory is looked at. Raises UserError where it has no images.
    """
    if settings.ranker.method != "none" and settings.route.mode == "calibrated":
        fused = _fit(session, settings, vocabulary, None).fused_top1
        if fused is not None:
            return fused
    parts = {"images": collection(settings, session.memory_address, "images")}
    ids = sorted({entry.rsplit("-", 1)[0] for entry in parts["images"].entry_ids()} if parts["images"].exists() else set())
    retrieved, truth, _ = held_out_candidates(session, settings, vocabulary, ids)
    return float(np.mean([row[0].class_id == truth[image_id] for image_id, row in retrieved.items()]))


def held_out_candidates(
    session: Session, settings: Config, vocabulary: Vocabulary, image_ids: Sequence[str]
) -> tuple[dict[str, list[Candidate]], dict[str, int], dict[str, int]]:
    """image_id -> candidates by heads fitted without that image's near duplicates, its class, and the number of their group; of
    those that the memory holds.
    """
    parts = {kind: one for kind in PARTS if (one := collection(settings, session.memory_address, kind)).exists()}
    if "images" not in parts:
        raise UserError(f"memory {settings.memory.name!r} has no images though memory.support is set; build it again")
    found, class_ids, groups, best = fitting.held_out(settings, parts, image_ids)
    ids = np.array(sorted(vocabulary.names))
    candidates = best.candidates(ids, [vocabulary.names[one] for one in ids.tolist()])
    return (
        dict(zip(found, candidates, strict=True)),
        dict(zip(found, class_ids, strict=True)),
        dict(zip(found, groups, strict=True)),
    )


def exemplars(settings: Config, support: pa.Table | None = None) -> Exemplars | None:
    """Where the pictures lie that the ranker is shown beside the names of candidates; None where it is shown none."""
    if not settings.ranker.exemplars:
        return None
    if settings.memory.support is None:
        raise UserError("ranker.exemplars shows support images: set memory.support")
    return support_places(settings, settings.ranker.exemplars, support)


def support_places(settings: Config, most: int, support: pa.Table | None = None) -> Exemplars:
    """Where the first support images of each class lie, at most so many. support: of the plan, where it is known."""
    found: Exemplars = {}
    support = build.plan(settings).support if support is None else support
    shown = settings.detect.shown.model_dump_json()
    for row in support.sort_by("row").to_pylist():
        places, place = found.setdefault(row["label"], []), (row["uri"], row["offset"], row["size"])
        if len(places) < most:
            box = row.get("box_xyxy")
            places.append(place if box is None else (*place, (tuple(box), (row["width"], row["height"]), shown)))
    return found


def label_prior(session: Session, settings: Config, work: Work, vocabulary: Vocabulary, folder: RunFolder) -> Prior | None:
    """What the ranker says of any picture (`ranker.debias: prior`), by the run's own first ones; kept for a resumed run."""
    if settings.ranker.debias == "none" or settings.ranker.method != "letters":
        return None
    if not (folder.path / "prior.json").exists():
        few = replace(work, index=work.index.slice(0, PRIOR_IMAGES))
        rows = steps.vectors(session, settings, few, vocabulary.facts)
        table = pipeline.collect(steps.retrieve(vocabulary, rows))
        table = table.filter(pc.is_null(table["error"])).sort_by("image_id").slice(0, PRIOR_IMAGES)
        names = [[candidate.class_name for candidate in row] for row in candidates_of(table)]
        from rar.engine import client

        folder.write("prior.json", client.estimate_prior(session, settings.ranker, table["bytes"].to_pylist(), names))
    return folder.read("prior.json")
