"""What is learned from: labelled pictures with the candidates of the served retriever, as if it had never seen them.

A picture that the memory holds gets the candidates of heads fitted without it and its near duplicates (as calibration does),
any other one what the retriever proposes. Near duplicates, known among the memory's pictures, go to one split together. A class
that is kept out of training (`novel`) is no candidate there either: a name that is always wrong would be learned as such.

Boxes are cut out once, as the ranker sees them, and kept beside the data as PNG: training, judging and other people's trainers
then read plain pictures.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from rar import config
from rar.columns import box_positions, fitted, positions
from rar.config import Config, Tune
from rar.corpus import coco, support
from rar.corpus.decode import decode
from rar.engine import pipeline, reading
from rar.engine.session import Session
from rar.memory.store import open_store
from rar.run import build, steps, work
from rar.run.calibrate import held_out_candidates
from rar.run.vocabulary import Vocabulary, open_memory
from rar.run.work import Work
from rar.schema import CANDIDATES, ERRORS, UserError
from rar.tune import draw

POOL = 20  # candidates kept of a picture, at least: the lists of an epoch are drawn from them

# `truth`: the true class's place among the candidates, -1 where it is none of them. `picture`: where a box's crop lies, null
# for a whole picture. `difficulty`: easy, the retriever's first candidate is right; hard, another of its top_k
# is; missed, none is.
# `target`: of a list that stands as it is (see paper), its places best first; null where lists are drawn from the candidates.
DATA = pa.schema(
    [
        ("row", pa.int64()),
        ("place", pa.int32()),
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("box_xyxy", pa.list_(pa.float32())),
        ("picture", pa.string()),
        ("label", pa.string()),
        ("candidates", CANDIDATES),
        ("truth", pa.int64()),
        ("difficulty", pa.string()),
        ("split", pa.string()),
        ("group", pa.int64()),
        ("target", pa.list_(pa.int64())),
    ]
)
TOLD = pa.schema(  # of a row, to the driver
    [
        *(DATA.field(name) for name in ("row", "place", "image_id", "box_xyxy", "candidates")),
        *((name, pa.string()) for name in ("stage", "error")),
    ]
)


@dataclass(frozen=True)
class Collected:
    """rows: DATA, but for `split`, which is null. failed: ERRORS. skipped: rows without a label that the memory knows, and
    copies of a picture."""

    rows: pa.Table
    failed: pa.Table
    skipped: int


def listed(settings: Config) -> Work:
    """The pictures (or boxes) to learn from, not opened yet. Raises UserError where there are no labelled ones."""
    if settings.tune.corpus is not None:
        return _labelled(settings, settings.tune.corpus)
    if settings.memory.support is None:
        raise UserError("rar tune learns from labelled pictures: set tune.corpus or memory.support")
    planned = build.plan(settings)
    if planned.boxed:
        raise UserError("memory.support holds boxes, and rar tune would learn from their whole pictures: set tune.corpus")
    return Work(planned.support, False, ERRORS.empty_table())


def collect(session: Session, settings: Config, folder: Path) -> Collected:
    """The pictures to learn from, with candidates. folder: where crops of boxes are kept. Raises UserError as `listed`."""
    return _retrieved(session, settings, listed(settings), folder, remembered=settings.tune.corpus is None)


def collect_other(session: Session, settings: Config, name: str, folder: Path) -> pa.Table:
    """Another data set to judge by, named in `tune.others`: at most `tune.judged` of its pictures, as DATA of that split."""
    path = settings.tune.others[name]
    other = config.load(path)
    corpus = other.corpus
    if corpus is None:
        raise UserError(f"tune.others.{name}: {path} names no corpus to judge by")
    own = {"ranker": settings.ranker, "tune": settings.tune, "run": settings.run}
    other = other.model_copy(update=own | {"retriever": other.retriever.model_copy(update={"top_k": settings.retriever.top_k})})
    found = _labelled(other, corpus)
    some = np.random.default_rng([settings.run.seed, 21]).permutation(found.index.num_rows)[: settings.tune.judged]
    found = replace(found, index=found.index.take(np.sort(some)))
    same = "://" not in other.memory.uri and Path(other.memory.uri).resolve() == Path(settings.memory.uri).resolve()
    same |= other.memory.uri == settings.memory.uri
    with nullcontext(session.memory_address) if same else open_store(other.memory.uri, other.memory.token) as address:
        rows = _retrieved(replace(session, memory=address), other, found, folder / name, remembered=False).rows
    return with_split(rows, [name] * rows.num_rows)


def _labelled(settings: Config, corpus: config.Corpus) -> Work:
    """The pictures of a corpus, or all given boxes of a COCO JSON."""
    given = settings.detect.model_copy(update={"proposals": None, "detector": None})
    listed = settings.model_copy(update={"corpus": corpus, "detect": given})
    return work.detect_work(listed) if coco.is_json(corpus) else work.classify_work(listed)


def _retrieved(session: Session, settings: Config, found: Work, folder: Path, *, remembered: bool) -> Collected:
    """The pictures of `found` with a pool of candidates each. remembered: whether the memory was built of these very ones."""
    pool = max(POOL, draw.longest(settings) + 1, *settings.tune.lengths, settings.retriever.top_k + 1)
    deep = settings.model_copy(update={"retriever": settings.retriever.model_copy(update={"top_k": pool})})
    vocabulary = open_memory(session, deep)
    if not remembered:
        rows = steps.vectors(session, deep, found, vocabulary.facts)
        rows = steps.retrieve(vocabulary, rows)
    else:
        bounds = found.bounds(settings.run.shard_size)
        rows = pipeline.through(pipeline.shards_of(found.index, bounds), "read", reading.load)
    told = pipeline.collect(pipeline.plainly(rows, partial(_told, folder=folder if found.boxed else None)))
    told = fitted(told.sort_by([("row", "ascending"), ("place", "ascending")] if found.boxed else "row"), TOLD)
    rows, labels, skipped, failed = _settled(vocabulary, found, told)
    held, groups = _held_out(session, deep, vocabulary, rows["image_id"].to_pylist())
    ids, listed = rows["image_id"].to_pylist(), rows["candidates"].to_pylist()
    candidates = [held.get(image_id, own or []) for image_id, own in zip(ids, listed, strict=True)]
    there = pa.array([bool(row) for row in candidates], pa.bool_())
    data = _data(found, rows, labels, candidates, groups, folder, settings.retriever.top_k).filter(there)
    return Collected(data, failed, skipped + rows.num_rows - data.num_rows)


def _told(table: pa.Table, folder: Path | None) -> pa.Table:
    """What the driver learns of a shard; the crops of boxes are written."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for image_id, data in zip(table["image_id"].to_pylist(), table["bytes"].to_pylist(), strict=True):
            if data is not None:
                crop_file(folder, image_id).write_bytes(png(decode(data)))
    return table.select([name for name in TOLD.names if name in table.column_names])


def crop_file(folder: Path, image_id: str) -> Path:
    return folder / f"{image_id}.png"


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _settled(vocabulary: Vocabulary, found: Work, told: pa.Table) -> tuple[pa.Table, pa.ChunkedArray, int, pa.Table]:
    """(TOLD of one row a picture with a known label, by the rule of corpus.support; labels; how many were left out; ERRORS)."""
    labels = _labels(found, told)
    faulty = pc.is_valid(told["error"])
    known = pc.is_in(labels, pa.array(list(vocabulary.names.values()), pa.string()))
    uris = found.index["uri"].take(pa.array(positions(told["row"], found.index)))
    failed = fitted(told.append_column("uri", uris).filter(faulty), ERRORS)
    kept = pc.and_(pc.invert(faulty), known)
    rows, labels = told.filter(kept), labels.filter(kept)
    entry = support.settle(rows["image_id"], labels).entry
    single = pa.array(np.flatnonzero(entry == np.arange(len(entry))))
    return rows.take(single), labels.take(single), told.num_rows - failed.num_rows - len(single), failed


def _held_out(
    session: Session, settings: Config, vocabulary: Vocabulary, image_ids: Sequence[str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """image_id -> candidates of heads that have not seen it, and its group of near duplicates; of the memory's pictures."""
    if settings.memory.support is None or settings.encoder.model == "precomputed":
        return {}, {}
    found, _, groups = held_out_candidates(session, settings, vocabulary, image_ids)
    return {image_id: [vars(one) for one in row] for image_id, row in found.items()}, groups


def _labels(found: Work, told: pa.Table) -> pa.ChunkedArray:
    if not found.boxed:
        return found.index["label"].take(pa.array(positions(told["row"], found.index)))
    places = pc.fill_null(told["place"], 0)  # of a picture that failed as a whole: whichever, as its row is left out
    own = told.set_column(told.column_names.index("place"), "place", places)
    return found.labels.take(pa.array(box_positions(own, found.index)))


def _data(
    found: Work,
    rows: pa.Table,
    labels: pa.ChunkedArray,
    candidates: list[list[dict[str, Any]]],
    groups: dict[str, int],
    folder: Path,
    top_k: int,
) -> pa.Table:
    at = pa.array(positions(rows["row"], found.index))
    names = [[one["class_name"] for one in row] for row in candidates]
    truth = [row.index(label) if label in row else -1 for row, label in zip(names, labels.to_pylist(), strict=True)]
    ids = rows["image_id"].to_pylist()
    free = max(groups.values(), default=-1) + 1  # a picture outside the memory is its own group
    columns = {name: rows[name] for name in ("row", "place", "image_id", "box_xyxy")}
    columns |= {name: found.index[name].take(at) for name in ("uri", "offset", "size") if name in found.index.column_names}
    columns |= {
        "picture": pa.array([str(crop_file(folder, one)) if found.boxed else None for one in ids], pa.string()),
        "label": labels,
        "candidates": pa.array(candidates, CANDIDATES),
        "truth": pa.array(truth, pa.int64()),
        "difficulty": pa.array([difficulty(place, top_k) for place in truth], pa.string()),
        "group": pa.array([groups.get(one, free + number) for number, one in enumerate(ids)], pa.int64()),
    }
    return fitted(pa.table(columns), DATA)


def difficulty(place: int, top_k: int) -> str:
    return "easy" if place == 0 else "hard" if 0 < place < top_k else "missed"


def with_split(rows: pa.Table, splits: Sequence[str]) -> pa.Table:
    return rows.set_column(rows.column_names.index("split"), "split", pa.array(splits, pa.string()))


def divided(rows: pa.Table, tune: Tune, seed: int) -> pa.Table:
    """DATA with its splits: novel (classes kept out), and of the others train, val (to stop by) and seen (to judge by).

    Candidates of novel classes are taken out of train and val. Raises UserError where nothing is left to train on.
    """
    splits = split(rows["label"].to_pylist(), rows["group"].to_pylist(), tune, seed)
    counts = Counter(splits)
    if not counts["train"] or not counts["val"]:
        raise UserError(
            f"rar tune has {len(splits)} pictures, {counts['train']} of them to train on and {counts['val']} to stop by; it "
            "needs more labelled pictures, or a smaller tune.novel_classes or another tune.held_out"
        )
    data = with_split(rows, splits)
    novel = {label for label, name in zip(rows["label"].to_pylist(), splits, strict=True) if name == "novel"}
    if not novel:
        return data
    records = data.to_pylist()
    for record in records:
        if record["split"] in ("train", "val"):
            record["candidates"] = [one for one in record["candidates"] if one["class_name"] not in novel]
            names = [one["class_name"] for one in record["candidates"]]
            record["truth"] = names.index(record["label"]) if record["label"] in names else -1
    return pa.Table.from_pylist(records, DATA)


def split(labels: Sequence[str], groups: Sequence[int], tune: Tune, seed: int) -> list[str]:
    """The split of each picture, by its class and its group of near duplicates."""
    rng = np.random.default_rng([seed, 20])
    classes = sorted(set(labels))
    count = math.ceil(tune.novel_classes * len(classes)) if tune.novel_classes else 0
    novel = {classes[place] for place in rng.permutation(len(classes))[:count]}
    order = rng.permutation(sorted({group for label, group in zip(labels, groups, strict=True) if label not in novel}))
    out = order[: max(2, round(tune.held_out * len(order)))].tolist()
    kept = dict.fromkeys(out[::2], "val") | dict.fromkeys(out[1::2], "seen")
    return ["novel" if label in novel else kept.get(group, "train") for label, group in zip(labels, groups, strict=True)]
