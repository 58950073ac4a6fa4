"""Building a memory: support images and class names -> entries in Milvus -> fitted heads, also in Milvus.

A memory NAME is a handful of collections: NAME_images (one entry a support image), NAME_texts (one a class name) and
NAME_head_MODE for each retrieval mode that its entries allow (see retrieve). Entry ids are content hash + encoder fingerprint,
so building twice changes nothing, and adding images adds only those. Heads are refitted from all entries at every build:
closed form, seconds even for thousands of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar import corpus, pipeline, retrieve
from rar.config import Config
from rar.memory import Collection, Entries
from rar.schema import ERRORS, INDEX, UserError, content_id
from rar.sinks import MilvusSink

MODES: tuple[retrieve.Mode, ...] = ("text", "centroid", "fused")


@dataclass(frozen=True)
class Plan:
    """What a memory will hold. classes: id = position. support: INDEX rows, `shots` a class. ignored: other rows."""

    classes: list[str]
    support: pa.Table
    ignored: int


def plan(settings: Config) -> Plan:
    """Read the class names and draw the support set. Raises UserError for a memory of nothing."""
    memory = settings.memory
    if memory.support is None and memory.classes is None:
        raise UserError("memory needs `classes` (names), `support` (labelled images), or both")
    listed = corpus.list_images(memory.support) if memory.support else INDEX.empty_table()
    labelled = listed.filter(pc.is_valid(listed["label"]))
    if memory.support and not labelled.num_rows:
        raise UserError(f"memory.support {memory.support.uri} has no labels; use one sub-folder a class, or a label column")
    names = memory.classes if memory.classes is not None else sorted(set(labelled["label"].to_pylist()))
    classes = corpus.class_names(names)
    known = labelled.filter(pc.is_in(labelled["label"], pa.array(classes)))
    if memory.support and not known.num_rows:
        raise UserError(f"no label of memory.support is among the {len(classes)} classes; first label: {labelled['label'][0]}")
    support = _draw(known, memory.shots, settings.run.seed)
    return Plan(classes, support, listed.num_rows - known.num_rows)


def _draw(labelled: pa.Table, shots: int | None, seed: int) -> pa.Table:
    """The first `shots` of a seeded permutation of each class: the 2-shot set is part of the 4-shot set of the same seed."""
    if shots is None:
        return labelled
    labels = np.array(labelled["label"].to_pylist())
    chosen: list[int] = []
    for number, label in enumerate(sorted(set(labels.tolist()))):
        rows = np.flatnonzero(labels == label)
        chosen += np.random.default_rng([seed, number]).permutation(rows)[:shots].tolist()
    return labelled.take(sorted(chosen))


def build(settings: Config, address: str, *, fresh: bool) -> tuple[pa.Table, dict[str, float]]:
    """Embed and write everything, fit the heads. Returns the support rows that failed (ERRORS) and metrics."""
    planned = plan(settings)
    facts = pipeline.encoder_facts(settings.encoder.model_dump_json())
    images, texts = (collection(settings, address, kind) for kind in ("images", "texts"))
    heads = {mode: collection(settings, address, f"head_{mode}") for mode in MODES}
    if fresh:
        for one in (images, texts, *heads.values()):
            one.drop()
    meta = {"fingerprint": facts.fingerprint, "encoder": settings.encoder.model, "dim": facts.dim}
    rows = _embed(settings, planned, facts)
    failed = rows.filter(pc.is_valid(rows["error"]))
    good = rows.filter(pc.is_null(rows["error"]))
    kinds = ((images, good.filter(pc.is_null(good["text"]))), (texts, good.filter(pc.is_valid(good["text"]))))
    for one, entries in kinds:
        if entries.num_rows:
            one.create(facts.dim, settings.memory.index, meta, entries.num_rows)
            known = set(one.fetch().entry_ids) if one.count() else set()
            pipeline.write(entries.select(["entry_id", "class_id", "class_name", "vector"]), MilvusSink(one))
            one.seal(len(known | set(entries["entry_id"].to_pylist())))
    metrics = _fit_heads(settings, heads, meta, entries_of(images), entries_of(texts))
    counts = {"classes": len(planned.classes), "entries.images": images.count() if images.exists() else 0}
    return failed.select(ERRORS.names).cast(ERRORS), {**counts, "entries.texts": texts.count(), **metrics}


def collection(settings: Config, address: str, kind: str) -> Collection:
    return Collection(address, f"{settings.memory.name}_{kind}", settings.memory.token)


def entries_of(one: Collection) -> Entries | None:
    return one.fetch() if one.exists() else None


def _embed(settings: Config, planned: Plan, facts: pipeline.EncoderFacts) -> pa.Table:
    """Support images and class names through one pool of encoders: (uri, image_id, stage, error, text, entry columns)."""
    class_of = {name: number for number, name in enumerate(planned.classes)}
    size = settings.run.shard_size
    names = pa.table({"text": pa.array(planned.classes, pa.string())})
    texts = pipeline.shards_of(names, size, range(pipeline.n_shards(names, size))).map_batches(
        _as_image_rows, batch_size=None, batch_format="pyarrow"
    )
    datasets = [texts]
    if planned.support.num_rows:
        index = planned.support
        images = pipeline.decoded(pipeline.shards_of(index, size, range(pipeline.n_shards(index, size))), facts)
        datasets.append(images.map_batches(_keep_image_columns, batch_size=None, batch_format="pyarrow"))
    rows = pipeline.collect(pipeline.embedded(pipeline.together(datasets), settings.encoder))
    return _with_entry_columns(rows, class_of, facts.fingerprint)


COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        *((name, pa.string()) for name in ("uri", "image_id", "label", "stage", "error", "text")),
        ("pixels", pa.large_binary()),
    ]
)


def _as_image_rows(names: pa.Table) -> pa.Table:
    empty = {field.name: pa.nulls(names.num_rows, field.type) for field in COLUMNS}
    return pa.table({**empty, "shard": names["shard"], "text": names["text"], "label": names["text"]}, schema=COLUMNS)


def _keep_image_columns(table: pa.Table) -> pa.Table:
    return table.append_column("text", pa.nulls(table.num_rows, pa.string())).select(COLUMNS.names).cast(COLUMNS)


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


def entry_id(image_id: str, fingerprint: str) -> str:
    return f"{image_id}-{fingerprint}"


def _fit_heads(
    settings: Config,
    heads: Mapping[retrieve.Mode, Collection],
    meta: Mapping[str, object],
    images: Entries | None,
    texts: Entries | None,
) -> dict[str, float]:
    """Fit and write every head that the entries allow; returns the held-out accuracy of each that images can measure."""
    metrics = {}
    for mode, one in heads.items():
        if mode == "centroid" and images is None:
            continue
        head = retrieve.fit_head(mode, images, texts, settings.run.seed)
        entries = head.to_entries()
        one.drop()
        one.create(entries.vectors.shape[1], settings.memory.index, {**meta, "head": head.meta}, len(entries))
        one.upsert(entries.entry_ids, entries.class_ids, entries.class_names, entries.vectors)
        one.seal(len(entries))
        if images is not None:
            scores = retrieve.held_out_scores(mode, images, texts, settings.run.seed)
            right = head.class_ids[scores.argmax(1)] == images.class_ids
            metrics[f"held_out.{mode}.top1"] = float(right.mean())
    return metrics
