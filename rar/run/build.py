"""Building a memory: support images and class names -> entries in Milvus -> a fitted head, also in Milvus.

A memory NAME is a handful of collections (see memory.catalog): images (one entry a support image), texts (one a class name) and
a head a retrieval mode: of the configured mode here, of others when first asked for (see fitting). Entry ids are content hash +
encoder fingerprint, so building twice changes nothing, and a build embeds only what the memory lacks. A class keeps its id for
life; new names get new ids. Nothing is taken away by a build: a class that the config no longer names stays until `remove`.

Shards go read -> ask -> decode -> embed -> MilvusSink in parallel, as they come. Each asks Milvus for its own ids, so that a
killed build embeds again only the shards that were in flight. The driver learns content ids, labels and faults (some 80 bytes a
picture, less than its row of the index), never a vector; with those it settles, by the rule of corpus.support, which label the
entry of a picture has that stands under several, whoever wrote last. What is written is also kept (engine.keeping), so that the
head is fitted without reading it back. The exception is the index REDUCED, whose projection is fitted on up to SAMPLE vectors
before the first is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from rar import identity
from rar.columns import digest, fitted, positions, vectors_of, with_vectors
from rar.config import Config
from rar.corpus import support, vectors
from rar.corpus.support import Plan
from rar.encoder import templates
from rar.engine import entering, models, pipeline, placement, reading
from rar.engine.entering import HELD, RESUMED
from rar.engine.keeping import Keeper, Kept, as_stored
from rar.engine.session import Session
from rar.engine.sinks import MilvusSink
from rar.engine.stages import Stage
from rar.memory import catalog
from rar.memory.collection import Collection, Entries
from rar.retriever import modes
from rar.run import fitting, generation
from rar.run.fitting import index_of
from rar.run.generation import Draft
from rar.run.vocabulary import PARTS, check_index, check_kind, check_mode, class_ids, collection, facts_of, treatment
from rar.schema import ERRORS, UserError, content_id, entry_id

SAMPLE = 4096  # support images, at most, that the projection of REDUCED is fitted on
BROUGHT, LEAST_SHARDS = 16, 8  # shards of vectors: times run.shard_size, as they weigh little, but not fewer than these
TOLD = ("row", "content", "label", "stage", "error")  # of a row, to the driver


def plan(settings: Config) -> Plan:
    """Read the class names and draw the support set. Raises UserError for a memory of nothing."""
    check_kind(settings, settings.memory.support)
    planned = support.plan(settings.memory, settings.run.seed, settings.corpus)
    file = settings.encoder.descriptions
    if file is None:
        return planned
    return replace(planned, undescribed=templates.unused_descriptions(templates.read_descriptions(file), planned.classes, file))


@dataclass(frozen=True)
class Built:
    """rows: support images and names that the memory was to hold; failed: those that it could not (ERRORS).

    stats: of the stages (runfolder.stages_of). remarks: lines on what was odd.
    """

    rows: int
    failed: pa.Table
    metrics: dict[str, float]
    stats: dict[str, float]
    remarks: list[str]


@dataclass(frozen=True)
class Lookup:
    """Stages that look up what was embedded before: index rows -> image_id, vector and faults; texts by their names."""

    images: Stage
    texts: Stage


def build_memory(
    session: Session, settings: Config, *, fresh: bool, planned: Plan | None = None, known: Lookup | None = None
) -> Built:
    """Embed and write what the memory lacks, fit the head, and make the result the live generation, all at once.

    planned: of `plan`, where the caller has it. known: in place of the encoder, where several memories share embeddings (see
    run.shared).
    """
    if settings.memory.version is not None:
        raise UserError("memory.version names a snapshot, which is never changed; leave it out to build the live memory")
    planned, address = planned or plan(settings), session.memory_address
    facts = facts_of(session, settings, None)
    if settings.memory.classes is not None and not facts.embeds_texts and settings.memory.support is None:
        raise UserError(f"encoder.model {settings.encoder.model} embeds images alone: set memory.support, or use a CLIP")
    meta = {"fingerprint": facts.fingerprint, "encoder": settings.encoder.model, "dim": facts.dim}
    meta["crop"] = treatment(settings, facts) if planned.boxed else None
    draft = generation.begin(settings, address, meta, _identity(planned), fresh=fresh)
    base = {kind: one for kind in PARTS if (one := draft.base_part(kind)) is not None}
    class_of = class_ids(planned.classes, [one.classes() for one in base.values()])
    named = bool(facts.embeds_texts or settings.memory.class_embeddings)
    check_index(settings, len(class_of))
    check_mode(settings, bool(planned.support.num_rows or "images" in base), named or "texts" in base)
    texts, names = _write_texts(session, settings, planned, facts, draft, class_of, known)
    images, stats, keeper = _write_images(session, settings, planned, facts, draft, class_of, known)
    maker = _maker(settings, planned.support, facts)
    changes = pipeline.in_a_worker(_settle, images, class_of, maker)  # it numbers all ids
    if draft.base is None or texts or changes.new or changes.labels or not generation.same_index(settings, draft.base):
        _complete(settings, draft, texts, changes, keeper)
    else:
        draft.drop()
    if not named:
        changes.remarks.extend(_never_retrieved(planned, base))
    found = catalog.find(address, settings.memory.name, None, settings.memory.token)
    _ensure_head(settings, address, found.generation, meta)
    failed = pa.concat_tables([planned.faults, _failed(images, planned) if images.num_rows else ERRORS.empty_table()])
    metrics: dict[str, float] = {"classes": len(class_of), "embedded": names + changes.written}
    metrics |= {f"entries.{kind}": found.counts.get(kind, 0) for kind in PARTS}
    metrics |= {key: count for key, count in (("copies", changes.copies), ("conflicts", changes.conflicts)) if count}
    if planned.undescribed:
        metrics["undescribed"] = planned.undescribed
    metrics |= _held_out(settings, address, found.generation)
    rows = planned.support.num_rows + planned.faults.num_rows + (len(planned.classes) if named else 0)
    return Built(rows, failed, metrics, stats, changes.remarks)


def _never_retrieved(planned: Plan, base: dict[str, Collection]) -> list[str]:
    """A line on the classes of which a memory without names has no picture; [] where there are none."""
    pictured = set(planned.support["label"].unique().to_pylist()) | (
        set(base["images"].classes()) if "images" in base else set()
    )
    bare = [name for name in planned.classes if name not in pictured]
    what = "1 class has no picture and is" if len(bare) == 1 else f"{len(bare):,} classes have no picture and are"
    return [f"{what} never proposed, as encoder.model embeds images alone, e.g. {bare[0]!r}"] if bare else []


def _identity(planned: Plan) -> str:
    """Of a plan: what a killed build must have in common with the one that takes it up."""
    return identity.fingerprint([planned.classes, digest(planned.support, "uri", "label", "box_xyxy")])


def _write_texts(
    session: Session,
    settings: Config,
    planned: Plan,
    facts: models.EncoderFacts,
    draft: Draft,
    class_of: dict[str, int],
    known: Lookup | None,
) -> tuple[int, int]:
    """Embed and write the names that neither the memory nor a killed build has.

    Returns how many are not in the memory, and how many were embedded.
    """
    held = {stage: one.classes() for stage, one in draft.places("texts").items()}
    new = [name for name in planned.classes if name not in held.get(HELD, {})]
    names = [name for name in new if name not in held.get(RESUMED, {})]
    if settings.encoder.model == "precomputed":
        rows = _brought_texts(settings, planned, names, facts.dim)
        new = new if settings.memory.class_embeddings else []
        data = pipeline.shards_of(rows.drop_columns(["shard"]), pipeline.evenly(rows, settings.run.shard_size))
    elif facts.embeds_texts:
        table = pa.table({"text": pa.array(names, pa.string())})
        shards = pipeline.shards_of(table, pipeline.evenly(table, settings.run.shard_size))
        data = pipeline.plainly(shards, as_image_rows)
        data = pipeline.plainly(data, known.texts) if known else pipeline.by_model(data, session.encoder(settings.encoder))
    else:
        return 0, 0
    if names and new:
        sink = MilvusSink(draft.create("texts", facts.dim, len(class_of)))
        pipeline.plainly(pipeline.plainly(data, _named), entering.AsEntries(class_of, facts.fingerprint)).write_datasink(sink)
    return len(new), len(names) if new else 0


def _named(table: pa.Table) -> pa.Table:
    """A name's content id stands in for that of a picture."""
    ids = [content_id(text.encode()) for text in table["text"].to_pylist()]
    return table.drop_columns(["image_id"]).append_column("image_id", pa.array(ids, pa.string()))


def _write_images(
    session: Session,
    settings: Config,
    planned: Plan,
    facts: models.EncoderFacts,
    draft: Draft,
    class_of: dict[str, int],
    known: Lookup | None,
) -> tuple[pa.Table, dict[str, float], Keeper | None]:
    """Embed and write the support images that are nowhere yet; returns the columns TOLD of all of them, what the stages
    took, and what keeps the vectors that were written.
    """
    if not planned.support.num_rows:
        return pa.table({}), {}, None
    base = draft.base_part("images")
    size = planned.support.num_rows + (base.count() if base else 0)
    sample = None
    if index_of(settings, "images", size).kind == "REDUCED" and base is None and not draft.part("images").exists():
        few = planned.support.take(np.unique(np.linspace(0, planned.support.num_rows - 1, SAMPLE).astype(int)))
        found = pipeline.collect(_vectors(session, settings, few, facts, {}, class_of, known))
        sample = vectors_of(found.filter(pc.is_null(found["error"]))) if found.num_rows else None
    places = draft.places("images")
    written = draft.create("images", facts.dim, size, sample)
    some = planned.support.num_rows > sum(place.count() for place in places.values())  # else nothing is new, most likely
    keeper = Keeper() if some else None
    sink = MilvusSink(written, TOLD, keeper)
    rows = _vectors(session, settings, planned.support, facts, places, class_of, known)
    with pipeline.progress(written, planned.support.num_rows, f"memory {settings.memory.name}"):
        rows.write_datasink(sink)
    return sink.told, {**sink.stats, **placement.at_once(session, settings, ranks=False)}, keeper


def _vectors(
    session: Session,
    settings: Config,
    index: pa.Table,
    facts: models.EncoderFacts,
    places: dict[str, Collection],
    class_of: dict[str, int],
    known: Lookup | None,
) -> Dataset:
    """Rows of an index as entries with vectors; those that a place holds, and faulty ones, have an `error`."""
    precomputed, maker = settings.encoder.model == "precomputed", _maker(settings, index, facts)
    size = settings.run.shard_size
    if precomputed:
        size = max(size, min(BROUGHT * size, index.num_rows // LEAST_SHARDS))
    rows = pipeline.shards_of(index, pipeline.evenly(index, size))
    assert settings.memory.support is not None
    reader = reading.reader(index, settings.detect.crop.sized(facts.side), None)
    read = reading.LoadVectors(settings.memory.support) if precomputed else known.images if known else reader
    rows = pipeline.through(rows, "read", read)
    if places:
        rows = pipeline.through(rows, "ask", entering.Lacking(places, maker))
    if not precomputed and known is None:
        rows = pipeline.through(rows, "decode", reading.Decode(facts.fit, facts.min_side))
        rows = pipeline.plainly(rows, lambda table: table.drop_columns(["bytes"]))
        rows = pipeline.by_model(rows, session.encoder(settings.encoder))
    return pipeline.plainly(rows, entering.AsEntries(class_of, maker))


def _maker(settings: Config, index: pa.Table, facts: models.EncoderFacts) -> str:
    """What names an entry beside its content: the encoder's fingerprint; of a box, with that of how it was cut out."""
    if "box_xyxy" not in index.column_names:
        return facts.fingerprint
    return f"{facts.fingerprint}.{identity.fingerprint(treatment(settings, facts))}"


def _is_fault(told: pa.Table) -> pa.ChunkedArray:
    return pc.and_(pc.is_valid(told["error"]), pc.invert(pc.is_in(told["stage"], pa.array([HELD, RESUMED], pa.string()))))


@dataclass(frozen=True)
class Changes:
    """written: rows that were embedded. new: images that the live memory lacks.

    labels: entry_id -> class (id, name), where another is, or may be, written.
    """

    written: int
    new: int
    labels: dict[str, tuple[int, str]]
    copies: int
    conflicts: int
    remarks: list[str]


def _failed(told: pa.Table, planned: Plan) -> pa.Table:
    """The rows that could not become entries (ERRORS)."""
    faulty = told.filter(_is_fault(told))
    uris = planned.support["uri"].take(pa.array(positions(faulty["row"], planned.support)))
    return fitted(faulty.append_column("uri", uris), ERRORS)


def _settle(told: pa.Table, class_of: dict[str, int], fingerprint: str) -> Changes:
    """One entry a picture, by the rule of corpus.support, whichever of its rows was written last."""
    if not told.num_rows:
        return Changes(0, 0, {}, 0, 0, [])
    rows = told.filter(pc.invert(_is_fault(told)))
    settled = support.settle(rows["content"], rows["label"])
    unsure = np.flatnonzero((settled.entry != np.arange(len(settled.entry))) | rows["error"].is_valid().to_numpy())
    unsure = np.union1d(unsure, settled.entry[unsure])  # all others are written as they are wanted
    wanted = rows["label"].take(pa.array(settled.entry[unsure]))
    some = rows.take(pa.array(unsure)).append_column("wanted", wanted)
    has = pc.coalesce(some["error"], some["label"])  # the class of an entry that was there is told as its error
    other = some.filter(pc.not_equal(has, some["wanted"]))
    pairs = zip(other["content"].to_pylist(), other["wanted"].to_pylist(), strict=True)
    changed = {entry_id(content.hex(), fingerprint): (class_of[name], name) for content, name in pairs}
    elsewhere = rows.filter(pc.fill_null(pc.not_equal(rows["stage"], HELD), True))
    new = pc.count_distinct(elsewhere["content"]).as_py()
    return Changes(rows["stage"].null_count, new, changed, settled.copies, settled.conflicts, settled.remarks())


def _complete(settings: Config, draft: Draft, texts: int, changes: Changes, keeper: Keeper | None) -> None:
    """Take over what the base holds, put labels right, seal, and fit the head: sealing it makes the generation the live one."""
    counts = {kind: draft.base.counts.get(kind, 0) if draft.base else 0 for kind in PARTS}
    counts = {"images": counts["images"] + changes.new, "texts": counts["texts"] + texts}
    for kind, count in counts.items():
        pipeline.in_a_worker(Draft.take_over, draft, kind)  # its vectors pass through
        if count == 0:
            draft.part(kind).drop()
    if changes.labels:
        draft.part("images").relabel(changes.labels)
    _commit(settings, draft, counts, keeper)


def _commit(settings: Config, draft: Draft, counts: dict[str, int], keeper: Keeper | None) -> None:
    parts = {kind: (draft.part(kind), count) for kind, count in counts.items() if count}
    mode: modes.Mode = "fused" if settings.retriever.mode == "all" else settings.retriever.mode
    arguments = (settings, mode, parts, draft.part(f"head_{mode}"), dict(draft.meta))
    if keeper is not None:
        keeper.run(_finish, *arguments)
    else:
        pipeline.in_a_worker(_finish, *arguments, None)


def _finish(
    settings: Config,
    mode: modes.Mode,
    parts: dict[str, tuple[Collection, int]],
    head: Collection,
    meta: dict[str, Any],
    kept: Kept | None,
) -> None:
    """Seal the parts, each with its count, and write a head that was fitted on them.

    kept: images, as they were written: the head is fitted on them while the store seals, and is right where it holds the same.
    """
    entries: dict[str, Entries | None] = {}
    known = kept.entries() if kept is not None else None
    fitted = None
    if "texts" in parts:
        one, count = parts["texts"]
        one.seal(count)
        entries["texts"] = fitting.entries_of(one)
    if "images" in parts:
        one, count = parts["images"]
        with ThreadPoolExecutor(1) as aside:
            sealing = aside.submit(one.seal, count, keep=known is not None)
            if known is not None and len(known) == count:
                fitted = fitting.head_of(settings, mode, {**entries, "images": known})
            bare = sealing.result()
        stored = as_stored(known, one, bare) if known is not None and bare is not None else fitting.entries_of(one)
        entries["images"], fitted = stored, fitted if stored is known else None
    meta |= {"entries": catalog.entries_digest({kind: one for kind, (one, _) in parts.items()})}
    fitting.write_head(settings, fitted or fitting.head_of(settings, mode, entries), head, meta)


def _ensure_head(settings: Config, address: str, number: int, meta: dict) -> None:
    """Fit the head of the configured mode, where there is none or one of other entries."""
    mode: modes.Mode = "fused" if settings.retriever.mode == "all" else settings.retriever.mode
    head = collection(settings, address, f"head_{mode}", number)
    parts = {kind: one for kind in PARTS if (one := collection(settings, address, kind, number)).exists()}
    digest = catalog.entries_digest(parts)
    if not head.exists() or not head.state() or head.meta().get("entries") != digest:
        fitting.fit(settings, mode, parts, head, {**meta, "entries": digest})


def _held_out(settings: Config, address: str, number: int) -> dict[str, float]:
    """On how many left-out images the head was fitted, of how many groups of near duplicates, and how often it was right."""
    mode: modes.Mode = "fused" if settings.retriever.mode == "all" else settings.retriever.mode
    meta = collection(settings, address, f"head_{mode}", number).meta()["head"]
    told = {"images": "held_out", "groups": "groups"}
    fitted = {f"held_out.{mode}.{key}": meta[name] for key, name in told.items() if name in meta}
    return fitted | ({f"held_out.{mode}.top1": meta["held_out_top1"]} if meta.get("held_out_top1") and meta["held_out"] else {})


def remove(settings: Config, address: str, names: Sequence[str]) -> dict[str, float]:
    """Take classes with all their entries out of a memory, and refit the head. Raises UserError for a name that it lacks."""
    memory = settings.memory
    if memory.version is not None:
        raise UserError("memory.version names a snapshot, which is never changed; leave it out to change the live memory")
    catalog.digest(address, memory.name, None, memory.token)
    live = catalog.find(address, memory.name, None, memory.token)
    parts = {kind: collection(settings, address, kind, live.generation) for kind in PARTS if kind in live.counts}
    class_of = class_ids([], [one.classes() for one in parts.values()])
    if strange := [name for name in names if name not in class_of]:
        raise UserError(f"memory {memory.name!r} has no class {strange[0]!r}; `rar memory CONFIG --describe` lists them")
    meta = {key: next(iter(parts.values())).meta().get(key) for key in ("fingerprint", "encoder", "dim", "crop")}
    draft = generation.begin(settings, address, meta, f"without {sorted(names)}", fresh=False)
    gone = frozenset(class_of[name] for name in names)
    counts = {}
    for kind in parts:
        pipeline.in_a_worker(Draft.take_over, draft, kind, gone)
        counts[kind] = draft.part(kind).count()
        if not counts[kind]:
            draft.part(kind).drop()
    _commit(settings, draft, counts, None)
    removed: dict[str, float] = {f"removed.{kind}": live.counts.get(kind, 0) - counts.get(kind, 0) for kind in PARTS}
    return removed | _held_out(settings, address, draft.number)


def _brought_texts(settings: Config, planned: Plan, names: Sequence[str], dim: int) -> pa.Table:
    """Text rows of the classes `names` from memory.class_embeddings; none where the user brings none."""
    file = settings.memory.class_embeddings
    if file is None:
        return with_vectors(COLUMNS.empty_table(), np.zeros((0, dim), np.float32))
    if settings.memory.classes is None:
        raise UserError("memory.class_embeddings needs memory.classes: the names, in the order of its rows")
    brought = vectors.class_embeddings(file, len(planned.classes))
    if brought.shape[1] != dim:
        raise UserError(f"{file} has {brought.shape[1]} dimensions and memory.support {dim}; bring both from one encoder")
    rows = [planned.classes.index(name) for name in names]
    table = as_image_rows(pa.table({"text": pa.array(names, pa.string()), "shard": pa.nulls(len(names), pa.int32())}))
    return with_vectors(table, brought[rows])


COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        *((name, pa.string()) for name in ("uri", "image_id", "label", "stage", "error", "text")),
        ("pixels", pa.large_binary()),
    ]
)


def as_image_rows(names: pa.Table) -> pa.Table:
    empty = {field.name: pa.nulls(names.num_rows, field.type) for field in COLUMNS}
    return pa.table({**empty, "shard": names["shard"], "text": names["text"], "label": names["text"]}, schema=COLUMNS)
