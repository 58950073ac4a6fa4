"""Fitting a head on a memory's entries and keeping it with them: at a build for the configured mode, later when asked for.

It runs in a worker where Ray runs, so that the driver never holds vectors; so do the held-out scores of a calibration. A head
notes the digest of the entries that it was fitted on. Cost: that worker holds all image entries at once (2 GB for a million of
512 dimensions in float32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rar import config
from rar.config import Config
from rar.engine import pipeline
from rar.memory.collection import Collection, Entries
from rar.retriever import modes
from rar.retriever.bursts import groups_of
from rar.retriever.exact import EXACT_CLASSES, Retrieved, best_of
from rar.retriever.softmax import log_sum_exp

Parts = Mapping[str, Collection]  # images and texts, those that there are


def fit(settings: Config, mode: modes.Mode, entries: Parts, head: Collection, meta: Mapping[str, Any]) -> None:
    """Fit the head of a mode on the parts `entries` (images, texts) and write it as `head`, sealed.

    meta: kept with it; its `entries` is their digest. Raises UserError where they lack what the mode needs.
    """
    pipeline.in_a_worker(_fit, settings, mode, entries, head, meta)


def held_out(settings: Config, entries: Parts, image_ids: Sequence[str]) -> tuple[list[str], list[int], list[int], Retrieved]:
    """Those of `image_ids` that are among the entries, their classes, their groups of near duplicates (see bursts), and
    candidates by heads fitted without each group.

    Scores are log shares as those of `choosing.Retrieve`.
    """
    return pipeline.in_a_worker(_held_out, settings, entries, image_ids)


def _fit(settings: Config, mode: modes.Mode, entries: Parts, head: Collection, meta: Mapping[str, Any]) -> None:
    write_head(settings, head_of(settings, mode, {kind: entries_of(one) for kind, one in entries.items()}), head, meta)


def head_of(settings: Config, mode: modes.Mode, entries: Mapping[str, Entries | None]) -> modes.Head:
    """The same in this process, on entries that were read."""
    images, texts = (entries.get(kind) for kind in ("images", "texts"))
    return modes.fit_head(mode, images, texts, settings.run.seed, settings.retriever.n_neighbors)


def write_head(settings: Config, fitted: modes.Head, head: Collection, meta: Mapping[str, Any]) -> None:
    classes = fitted.to_entries()
    head.drop()
    index = index_of(settings, "head", len(classes))
    head.create(classes.vectors.shape[1], index, {**meta, "head": fitted.meta}, len(classes), classes.vectors)
    head.upsert(classes.entry_ids, classes.class_ids, classes.class_names, classes.vectors)
    head.seal(len(classes))


def _held_out(settings: Config, entries: Parts, image_ids: Sequence[str]) -> tuple[list[str], list[int], list[int], Retrieved]:
    images, texts = entries_of(entries["images"]), entries_of(entries["texts"]) if "texts" in entries else None
    mode, wanted = settings.retriever.mode, set(image_ids)
    assert images is not None and mode != "all"
    own = [entry.rsplit("-", 1)[0] for entry in images.entry_ids]
    rows = [row for row, image_id in enumerate(own) if image_id in wanted]
    given = (settings.retriever.n_neighbors, settings.retriever.sharpness)
    scores = modes.held_out_scores(mode, images, texts, settings.run.seed, rows, *given)
    by_votes = mode in ("knn", "tip")
    best = best_of(scores if by_votes else scores - log_sum_exp(scores.astype(np.float64))[:, None], settings.retriever.top_k)
    groups = groups_of(np.asarray(images.vectors, np.float32), images.class_ids)[rows].tolist()
    return [own[row] for row in rows], images.class_ids[rows].tolist(), groups, best.shares() if by_votes else best


def entries_of(one: Collection) -> Entries | None:
    """All entries of a part; None where it does not exist or is empty."""
    return one.fetch() if one.exists() and one.count() else None


def index_of(settings: Config, kind: str, size: int) -> config.Index:
    """The index of a part of `size` entries: `memory.index` where it is searched, and none where it is only kept."""
    searched = settings.retriever.mode in ("knn", "tip") if kind == "images" else size > EXACT_CLASSES
    return settings.memory.index if searched and kind != "texts" else config.Index(kind="FLAT")
