"""Stages that choose: vector -> candidates -> the ranker's answer -> class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from rar import config, fusion
from rar.columns import candidates_of, rankings_of, vectors_of, with_candidates, with_retrieved
from rar.engine.stages import with_columns
from rar.memory.collection import Collection
from rar.ranker.cache import Asks
from rar.retriever import exact, modes
from rar.schema import Candidate, Ranking, RankStatus


class Retrieve:
    """vector -> candidates by a fitted head: scored whole, or (knn, tip) beside image entries; all: the whole vocabulary.

    A candidate's score is the log of its probability. A linear head's is exact, normalised over the whole vocabulary, for up to
    `exact_up_to` classes; a larger one is searched in Milvus and normalised over the SHARE_DEPTH best. By votes it is
    normalised over the candidates alone, as more of them would be a deeper search.
    """

    def __init__(
        self,
        settings: config.Retriever,
        head: Callable[[], modes.Head],
        classes: Collection,
        images: Collection,
        exact_up_to: int = exact.EXACT_CLASSES,
    ) -> None:
        """head: gives the fitted head. classes: the collection that holds it. images: the entries that knn and tip search."""
        self.settings, self.head, self.classes, self.images, self.exact_up_to = settings, head, classes, images, exact_up_to

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = np.flatnonzero(table["error"].is_null().to_numpy())
        if not len(rows):
            return with_candidates(self._without_inputs(table), [[]] * table.num_rows)
        head = self.head()
        found = self._retrieve(head, table if len(rows) == table.num_rows else table.take(rows))
        names = pa.array(head.class_names, pa.string())
        return with_retrieved(self._without_inputs(table), rows, head.class_ids, names, found.columns, found.scores)

    @staticmethod
    def _without_inputs(table: pa.Table) -> pa.Table:
        return table.drop_columns([name for name in ("vector", "pixels") if name in table.column_names])

    def _retrieve(self, head: modes.Head, table: pa.Table) -> exact.Retrieved:
        settings, n_classes = self.settings, len(head.class_ids)
        if settings.mode == "all":
            shape = (table.num_rows, n_classes)
            return exact.Retrieved(
                np.tile(np.arange(n_classes), (shape[0], 1)), np.full(shape, -math.log(n_classes), np.float32)
            )
        queries, top_k = vectors_of(table), min(settings.top_k, n_classes)
        if settings.mode in ("knn", "tip"):
            asked = (queries, top_k, settings.n_neighbors, settings.sharpness)
            return modes.retrieve_by_votes(head, self.images.search, *asked).shares()
        if n_classes <= self.exact_up_to:
            return exact.retrieve(head, queries, top_k)
        hits = self.classes.search(modes.augment(queries), min(max(top_k, SHARE_DEPTH), n_classes))
        return modes.retrieve_from_hits(hits, head.class_ids, top_k)


SHARE_DEPTH = 64


class Recall:
    """image_id -> candidates known beforehand: calibration ranks memory entries by heads fitted without them."""

    def __init__(self, known: Mapping[str, list[Candidate]]) -> None:
        self.known = known

    def __call__(self, table: pa.Table) -> pa.Table:
        return with_candidates(table, [self.known.get(image_id, []) for image_id in table["image_id"].to_pylist()])


class Spent(Exception):
    """The calls that a run may make do not reach for a shard."""


class Rank:
    """candidates -> the columns of a Ranking, by `ask` for the images that need the MLLM.

    The others keep the retriever's order as `skipped`. The ranking is the ranker's own; what is made of it is up to `Fuse`.
    ask: called with `batch` images of the shard at a time (None: with all), `in_flight` times at once: what a batch holds
    depends on the shard alone, never on timing. Where it raises Spent, the shard loses its rows: it stays to be done.
    """

    def __init__(self, ask: Asks | None, calibration: fusion.Calibration, batch: int | None = None, in_flight: int = 1) -> None:
        self.ask, self.calibration, self.batch, self.in_flight = ask, calibration, batch, in_flight

    def __call__(self, table: pa.Table) -> pa.Table:
        retrieved = candidates_of(table)
        rankings = [Ranking(tuple(range(len(candidates))), RankStatus.SKIPPED) for candidates in retrieved]
        shown = [fusion.n_shown(candidates, self.calibration) for candidates in retrieved]
        rows = [row for row, count in enumerate(shown) if count]
        if self.ask is not None and rows:
            images = table["bytes"].take(rows).to_pylist()
            names = [[candidate.class_name for candidate in retrieved[row][: shown[row]]] for row in rows]
            size = self.batch or len(rows)
            batches = [(images[s : s + size], names[s : s + size]) for s in range(0, len(rows), size)]
            with ThreadPoolExecutor(self.in_flight) as pool:
                try:
                    answers = list(pool.map(self.ask, *zip(*batches, strict=True)))
                except Spent:
                    return self(table.slice(0, 0))
            for row, ranking in zip(rows, (ranking for answered in answers for ranking in answered), strict=True):
                rankings[row] = fusion.among(ranking, len(retrieved[row]))
        else:
            shown = [0] * len(retrieved)
        columns = {
            "ranking": pa.array([ranking.order for ranking in rankings], pa.list_(pa.int64())),
            "rank_status": pa.array([ranking.status.value for ranking in rankings], pa.string()),
            "label_mass": pa.array([ranking.label_mass for ranking in rankings], pa.float32()),
            "label_first": pa.array([ranking.label_first for ranking in rankings], pa.bool_()),
            "response": pa.array([ranking.response for ranking in rankings], pa.string()),
            "scores": pa.array([fusion.rank_scores(ranking) for ranking in rankings], pa.list_(pa.float64())),
            "mllm_candidates": pa.array(shown, pa.int64()),
        }
        for key in ("calls", "prompt_tokens", "output_tokens"):
            columns[f"mllm_{key}"] = pa.array([getattr(ranking, key) for ranking in rankings], pa.int64())
        columns["mllm_seconds"] = pa.array([ranking.seconds for ranking in rankings], pa.float64())
        return with_columns(table.drop_columns(["bytes"]), columns)


class Fuse:
    """candidates and the ranker's answer -> the final `ranking`, and the class that it predicts with its probability."""

    def __init__(self, calibration: fusion.Calibration) -> None:
        self.calibration = calibration

    def __call__(self, table: pa.Table) -> pa.Table:
        orders: list[Sequence[int]] = []
        best: list[tuple[Candidate | None, float]] = []
        rankings = rankings_of(table)
        for candidates, ranking in zip(candidates_of(table), rankings, strict=True):
            order, chances = fusion.fuse(candidates, ranking, self.calibration)
            orders.append(order)
            best.append((candidates[order[0]], chances[order[0]]) if order else (None, float("nan")))
        columns = {
            "ranking": pa.array(orders, pa.list_(pa.int64())),
            "routed": pa.array([ranking.status == RankStatus.SKIPPED for ranking in rankings], pa.bool_()),
            "class_id": pa.array([one.class_id if one else None for one, _ in best], pa.int64()),
            "class_name": pa.array([one.class_name if one else None for one, _ in best], pa.string()),
            "score": pa.array([chance for _, chance in best], pa.float32()),
        }
        return with_columns(table.drop_columns(["ranking"]), columns)
