"""Building a memory: support images and class names -> entries in Milvus -> fitted heads, also in Milvus.

A memory NAME is a handful of collections: NAME_images (one entry a support image), NAME_texts (one a class name) and
NAME_head_MODE for each retrieval mode that its entries allow (see retrieve). Entry ids are content hash + encoder fingerprint,
so building twice changes nothing, and a build embeds only what the memory lacks. A class keeps its id for life; new names get
new ids. Nothing is taken away by a build: a class that the config no longer names stays until `remove`.

Heads are refitted from all entries at every build, in closed form: seconds for thousands of classes, and all entries in the
driver's memory at once, which is what bounds the size of an image memory (a million of 512 dimensions are 2 GB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import config
from rar.columns import fitted, vectors_of, with_vectors
from rar.config import Config
from rar.corpus import support, vectors
from rar.corpus.support import Plan
from rar.encoder import templates
from rar.engine import pipeline, stages
from rar.engine.session import Session
from rar.engine.sinks import MilvusSink
from rar.memory.collection import Collection, Entries
from rar.retriever import modes
from rar.run.vocabulary import PARTS, check_kind, check_maker, class_ids, collection, entries_of, facts_of
from rar.schema import ERRORS, UserError, content_id, entry_id

ENTRY_COLUMNS = ["entry_id", "class_id", "class_name", "vector"]


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
    """rows: support images and names that the memory was to hold; failed: those that it could not (ERRORS)."""

    rows: int
    failed: pa.Table
    metrics: dict[str, float]


def build_memory(session: Session, settings: Config, *, fresh: bool) -> Built:
    """Embed and write what the memory lacks, and fit the heads."""
    if settings.memory.version is not None:
        raise UserError("memory.version names a snapshot, which is never changed; leave it out to build the live memory")
    planned, address = plan(settings), session.memory_address
    facts = facts_of(session, settings, None)
    if settings.memory.classes is not None and not facts.embeds_texts and settings.memory.support is None:
        raise UserError(f"encoder.model {settings.encoder.model} embeds images alone: set memory.support, or use a CLIP")
    parts = {kind: collection(settings, address, kind) for kind in PARTS}
    if fresh:
        _drop(settings, address)
    for one in parts.values():
        check_maker(settings, one, facts)
    had = {kind: entries_of(one) for kind, one in parts.items()}
    class_of = class_ids(planned.classes, had.values())
    rows = _embed(session, settings, planned, facts, had)
    rows = _with_entry_columns(rows, class_of, facts.fingerprint)
    failed = rows.filter(pc.is_valid(rows["error"]))
    good = rows.filter(pc.is_null(rows["error"]))
    meta = {"fingerprint": facts.fingerprint, "encoder": settings.encoder.model, "dim": facts.dim}
    for kind, entries in zip(
        PARTS, (good.filter(pc.is_null(good["text"])), good.filter(pc.is_valid(good["text"]))), strict=True
    ):
        if entries.num_rows:
            _write(settings, parts[kind], had[kind], entries, meta)
    metrics = fit_heads(settings, address, meta)
    counts: dict[str, float] = {"classes": len(class_of), "embedded": good.num_rows}
    counts |= {f"entries.{kind}": one.count() if one.exists() else 0 for kind, one in parts.items()}
    if planned.undescribed:
        counts["undescribed"] = planned.undescribed
    named = len(planned.classes) if facts.embeds_texts or settings.memory.class_embeddings else 0
    return Built(planned.support.num_rows + named, fitted(failed, ERRORS), {**counts, **metrics})


def _write(settings: Config, one: Collection, had: Entries | None, entries: pa.Table, meta: Mapping[str, object]) -> None:
    known = set(had.entry_ids) if had is not None else set()
    every = known | set(entries["entry_id"].to_pylist())
    one.create(int(str(meta["dim"])), settings.memory.index, meta, len(every), vectors_of(entries))
    pipeline.write(entries.select(ENTRY_COLUMNS), MilvusSink(one))
    one.seal(len(every))


def remove(settings: Config, address: str, names: Sequence[str]) -> dict[str, float]:
    """Take classes with all their entries out of a memory, and refit the heads. Raises UserError for a name that it lacks."""
    if settings.memory.version is not None:
        raise UserError("memory.version names a snapshot, which is never changed; leave it out to change the live memory")
    removed = {kind: 0 for kind in PARTS}
    parts = {kind: one for kind in PARTS if (one := collection(settings, address, kind)).exists()}
    held = {kind: one.fetch() for kind, one in parts.items()}
    class_of = class_ids([], held.values())
    if strange := [name for name in names if name not in class_of]:
        raise UserError(
            f"memory {settings.memory.name!r} has no class {strange[0]!r}; `rar memory CONFIG --describe` lists them"
        )
    for kind, one in parts.items():
        removed[kind] = sum(one.remove_class(class_of[name]) for name in names)
        one.seal(len(held[kind]) - removed[kind])
    meta = next(iter(parts.values())).meta()
    metrics = fit_heads(settings, address, {key: meta[key] for key in ("fingerprint", "encoder", "dim")})
    return {**{f"removed.{kind}": count for kind, count in removed.items()}, **metrics}


def _drop(settings: Config, address: str) -> None:
    for kind in (*PARTS, *(f"head_{mode}" for mode in modes.MODES)):
        collection(settings, address, kind).drop()


def _embed(
    session: Session, settings: Config, planned: Plan, facts: stages.EncoderFacts, had: Mapping[str, Entries | None]
) -> pa.Table:
    """The rows that the memory lacks, with their vectors (columns COLUMNS and `vector`), and those that failed."""
    size = settings.run.shard_size
    written = set(had["texts"].class_names) if had["texts"] is not None else set()
    names = [name for name in planned.classes if name not in written]
    pictures = pipeline.shards_of(planned.support, pipeline.evenly(planned.support, size))
    if settings.encoder.model == "precomputed":
        assert settings.memory.support is not None
        read = pipeline.through(pictures, "read", stages.LoadVectors(settings.memory.support))
        new = pipeline.through(read, "skip", stages.Lacking(had["images"], facts.fingerprint))
        brought = pipeline.collect(pipeline.plainly(new, _brought_columns))
        texts = _brought_texts(settings, planned, names, facts.dim)
        return pa.concat_tables([brought, texts]) if brought.num_rows else texts
    datasets = []
    if planned.support.num_rows:
        read = pipeline.through(pictures, "read", stages.load)
        new = pipeline.through(read, "skip", stages.Lacking(had["images"], facts.fingerprint))
        datasets.append(pipeline.plainly(pipeline.with_pixels(new, facts), _as_columns))
    if facts.embeds_texts and names:
        table = pa.table({"text": pa.array(names, pa.string())})
        datasets.append(pipeline.plainly(pipeline.shards_of(table, pipeline.evenly(table, size)), _as_image_rows))
    rows = (
        pipeline.collect(pipeline.by_model(pipeline.together(datasets), session.encoder(settings.encoder)))
        if datasets
        else pa.table({})
    )
    return rows if rows.num_rows else _empty_rows(facts.dim)


def _brought_texts(settings: Config, planned: Plan, names: Sequence[str], dim: int) -> pa.Table:
    """Text rows of the classes `names` from memory.class_embeddings; none where the user brings none."""
    file = settings.memory.class_embeddings
    if file is None:
        return _empty_rows(dim)
    if settings.memory.classes is None:
        raise UserError("memory.class_embeddings needs memory.classes: the names, in the order of its rows")
    brought = vectors.class_embeddings(file, len(planned.classes))
    if brought.shape[1] != dim:
        raise UserError(f"{file} has {brought.shape[1]} dimensions and memory.support {dim}; bring both from one encoder")
    rows = [planned.classes.index(name) for name in names]
    table = _as_image_rows(pa.table({"text": pa.array(names, pa.string()), "shard": pa.nulls(len(names), pa.int32())}))
    return with_vectors(table, brought[rows])


COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        *((name, pa.string()) for name in ("uri", "image_id", "label", "stage", "error", "text")),
        ("pixels", pa.large_binary()),
    ]
)


def _empty_rows(dim: int) -> pa.Table:
    return with_vectors(COLUMNS.empty_table(), np.zeros((0, dim), np.float32))


def _as_image_rows(names: pa.Table) -> pa.Table:
    empty = {field.name: pa.nulls(names.num_rows, field.type) for field in COLUMNS}
    return pa.table({**empty, "shard": names["shard"], "text": names["text"], "label": names["text"]}, schema=COLUMNS)


def _as_columns(table: pa.Table) -> pa.Table:
    return table.append_column("text", pa.nulls(table.num_rows, pa.string())).select(COLUMNS.names).cast(COLUMNS)


def _brought_columns(table: pa.Table) -> pa.Table:
    """As COLUMNS, but with the vector that came along in the place of pixels."""
    pixels = table.append_column("pixels", pa.nulls(table.num_rows, pa.large_binary()))
    return _as_columns(pixels).drop_columns(["pixels"]).append_column("vector", table["vector"])


def _with_entry_columns(rows: pa.Table, class_of: Mapping[str, int], fingerprint: str) -> pa.Table:
    texts, image_ids = rows["text"].to_pylist(), rows["image_id"].to_pylist()
    labels = rows["label"].to_pylist()
    ids = [
        entry_id(image_id or content_id((text or "").encode()), fingerprint)
        for text, image_id in zip(texts, image_ids, strict=True)
    ]
    rows = rows.append_column("entry_id", pa.array(ids, pa.string()))
    rows = rows.append_column("class_id", pa.array([class_of[label] for label in labels], pa.int64()))
    return rows.append_column("class_name", pa.array(labels, pa.string()))


def fit_heads(settings: Config, address: str, meta: Mapping[str, object]) -> dict[str, float]:
    """Fit and write every head that the entries allow; returns the held-out accuracy of each linear one, where there is one."""
    images, texts = (entries_of(collection(settings, address, kind)) for kind in PARTS)
    metrics = {}
    for mode in modes.MODES:
        one = collection(settings, address, f"head_{mode}")
        one.drop()
        if not modes.allows(mode, images, texts):
            continue
        head = modes.fit_head(mode, images, texts, settings.run.seed, settings.retriever.n_neighbors)
        entries = head.to_entries()
        one.create(entries.vectors.shape[1], config.Index(), {**meta, "head": head.meta}, len(entries))
        one.upsert(entries.entry_ids, entries.class_ids, entries.class_names, entries.vectors)
        one.seal(len(entries))
        if mode not in ("knn", "tip") and head.meta["held_out"]:
            metrics[f"held_out.{mode}.top1"] = head.meta["held_out_top1"]
    return metrics
