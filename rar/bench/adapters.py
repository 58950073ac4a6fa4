"""Accuracy of the retrieval modes with few images a class (`rar bench adapters`): recorded embeddings, the miniature world.

Two protocols leave images of a set out, and they give different figures. `leave_one_out`: each image alone, all others in the
memory; every other class then has an image more than its own, which costs all modes accuracy. `leave_shot_out`: one image of
each class at a time. `shots` draws the support images of each class at random and tests on all others, over seeds.

No image is scored by anything that has seen it. In `leave_one_out` the numbers that are fitted (scales, shrinkage) come from
the memory without one image of each class, the weights from all images but the one: hundreds of full fits would take hours.
`knn1` is the paper's retriever, plain 1-NN by cosine, and goes through Milvus.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rar.config import Encoder, Index
from rar.memory.collection import Collection
from rar.memory.entries import Entries, ExactIndex
from rar.memory.store import open_store
from rar.retriever import gaussian, heads, modes, votes
from rar.retriever.modes import Mode
from rar.schema import UserError

SHOTS = (1, 2, 4, 8, 16)
IMAGE_MODES: tuple[Mode, ...] = ("knn", "centroid", "lda", "fused")
MAX_FOLDS = 5  # of leave_shot_out: the i-th images of all classes share fold i mod 5
MAX_LEFT_OUT, SAMPLED = 600, 100  # a set of more images is sampled for leave_one_out, except by knn1
T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom


def run(data: Path, seeds: int = 5, shots: tuple[int, ...] = SHOTS) -> dict[str, Any]:
    """Every NAME.npz of a folder, with `embeddings` (N, D) and `class_id` (N,) as contract 4.4 says. Accuracies are fractions.

    {"sets": {NAME: {"leave_one_out": {MODE: top1}, "leave_shot_out": {MODE: top1}, "shots": {"4": {MODE: {top1, ci_low,
    ci_high}}}, "images", "classes"}}}; intervals are 95 % over seeds. Raises UserError where there is nothing to read.
    """
    files = sorted(data.glob("*.npz"))
    if not files:
        raise UserError(f"{data} holds no NAME.npz; give a folder of recorded embeddings with --data")
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/adapters.milvus") as address:
        collection = Collection(address, "adapters")
        return {"sets": {file.stem: _measure(collection, read(file), seeds, shots) for file in files}}


def read(file: Path) -> Entries:
    """Recorded embeddings as entries: unit vectors in float32, ids in the order of class and row, so that ties go by class."""
    with np.load(file) as stored:
        missing = [name for name in ("embeddings", "class_id") if name not in stored.files]
        if missing:
            raise UserError(f"{file} holds no array {missing[0]!r}; it needs embeddings (N, D) and class_id (N,)")
        vectors, class_ids = stored["embeddings"].astype(np.float32), stored["class_id"].astype(np.int64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"{class_id:08d}-{row:08d}" for row, class_id in enumerate(class_ids.tolist())]
    return Entries(ids, class_ids, [f"class {class_id}" for class_id in class_ids.tolist()], vectors)


def _measure(collection: Collection, entries: Entries, seeds: int, shots: tuple[int, ...]) -> dict[str, Any]:
    counts = np.unique(entries.class_ids, return_counts=True)[1]
    result: dict[str, Any] = {"images": len(entries), "classes": len(counts)}
    if counts.min() > 1:
        result["leave_one_out"] = _leave_one_out(collection, entries)
        result["leave_shot_out"] = _leave_shot_out(collection, entries)
    by_shots = {}
    for n in shots:
        enough = take(entries, np.flatnonzero(np.isin(entries.class_ids, np.unique(entries.class_ids)[counts > n + 1])))
        if len(np.unique(enough.class_ids)) > 1:
            runs = [_trial(collection, enough, None, *draw(enough.class_ids, n, seed), IMAGE_MODES) for seed in range(seeds)]
            by_shots[str(n)] = _summary(runs)
    return {**result, "shots": by_shots}


def miniature(seeds: int = 5, shots: tuple[int, ...] = SHOTS, tests: int = 16) -> dict[str, Any]:
    """The same on the novel classes of the miniature world, whose names no weight has seen; seed s draws world s mod 9.

    {"sets": {"miniature_novel": {"shots": {...}, "average": {MODE: {top1, ci_low, ci_high}}, "gain": {MODE: {...}}, "images",
    "classes"}}}: `average` is over shots, `gain` is what fused has over each other mode there, paired by seed.
    """
    worlds = [_world(seed, max(shots), tests) for seed in range(seeds)]
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in shots}
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/adapters.milvus") as address:
        for photos, names in worlds:
            order = np.arange(len(photos)) % (max(shots) + tests)
            for n in shots:
                split = np.flatnonzero(order < n), np.flatnonzero(order >= max(shots))
                runs[n].append(_trial(Collection(address, "adapters"), photos, names, *split, modes.MODES))
    averages = [{mode: float(np.mean([runs[n][w][mode] for n in shots])) for mode in runs[shots[0]][0]} for w in range(seeds)]
    gains = [{mode: one["fused"] - top1 for mode, top1 in one.items() if mode != "fused"} for one in averages]
    size = {"images": len(worlds[0][0]), "classes": len(worlds[0][1])}
    by_shots = {str(n): _summary(runs[n]) for n in shots}
    return {"sets": {"miniature_novel": {**size, "shots": by_shots, "average": _summary(averages), "gain": _summary(gains)}}}


def _world(seed: int, shots: int, tests: int) -> tuple[Entries, Entries]:
    """Photos (shots + tests a class, in turn) and names of the novel classes of a world, by the miniature CLIP."""
    from rar.corpus.decode import fit_square
    from rar.encoder.towers import ClipEncoder
    from rar.miniature.data import DRAWN
    from rar.miniature.world import render, rng_of, vocabulary

    encoder, specs = ClipEncoder(Encoder()), vocabulary("novel", seed % 9)
    vectors = []
    for spec in specs:
        photos = [render(spec, DRAWN, rng_of(seed, "adapters", spec.name, number)) for number in range(shots + tests)]
        squares = [fit_square(photo, encoder.side, encoder.resize_mode, encoder.interpolation) for photo in photos]
        vectors.append(encoder.embed_images(np.stack(squares)))
    names = [spec.name for spec in specs]
    class_ids = np.repeat(np.arange(len(specs)), shots + tests)
    ids = [f"{class_id:08d}-{row:08d}" for row, class_id in enumerate(class_ids.tolist())]
    texts = Entries(names, np.arange(len(specs)), names, encoder.prototypes(names))
    return Entries(ids, class_ids, [names[class_id] for class_id in class_ids], np.concatenate(vectors)), texts


def draw(class_ids: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `shots` random images of each class, and all other rows."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(class_ids == class_id))[:shots] for class_id in np.unique(class_ids)]
    support = np.sort(np.concatenate(chosen))
    return support, np.setdiff1d(np.arange(len(class_ids)), support)


def take(entries: Entries, rows: np.ndarray) -> Entries:
    ids, names = [entries.entry_ids[row] for row in rows], [entries.class_names[row] for row in rows]
    return Entries(ids, entries.class_ids[rows], names, entries.vectors[rows])


def _trial(
    collection: Collection,
    images: Entries,
    texts: Entries | None,
    support: np.ndarray,
    tested: np.ndarray,
    wanted: tuple[Mode, ...],
) -> dict[str, float]:
    """Top-1 on the tested rows with the support rows as memory, by knn1 and every mode."""
    memory, truth, queries = take(images, support), images.class_ids[tested], images.vectors[tested]
    fill(collection, memory)
    result = {"knn1": float((collection.search(queries, 1).class_ids[:, 0] == truth).mean())}
    for mode in wanted:
        head = modes.fit_head(mode, memory, texts)
        if mode in ("knn", "tip"):
            exact = ExactIndex(memory.vectors.shape[1])
            exact.upsert(memory.entry_ids, memory.class_ids, memory.class_names, memory.vectors)
            found = modes.retrieve_by_votes(head, exact.search, queries, 1, modes.N_NEIGHBORS)
            predicted = head.class_ids[found.columns[:, 0]]
        else:
            predicted = head.class_ids[head.scores(queries).argmax(axis=1)]
        result[mode] = float((predicted == truth).mean())
    return result


def fill(collection: Collection, memory: Entries) -> None:
    """The collection holds this memory and nothing else."""
    collection.drop()
    collection.create(memory.vectors.shape[1], Index(kind="FLAT"), {"fingerprint": "adapters"}, len(memory))
    collection.upsert(memory.entry_ids, memory.class_ids, memory.class_names, memory.vectors)
    collection.seal(len(memory))


def _leave_shot_out(collection: Collection, entries: Entries) -> dict[str, float]:
    """The i-th images of all classes are tested on the others, in turn; every image counts the same."""
    position = np.array([(entries.class_ids[:row] == entries.class_ids[row]).sum() for row in range(len(entries))])
    n_folds = min(MAX_FOLDS, np.unique(entries.class_ids, return_counts=True)[1].min())
    right: dict[str, float] = {}
    for fold in range(n_folds):
        tested = np.flatnonzero(position % n_folds == fold)
        kept = np.flatnonzero(position % n_folds != fold)
        for mode, top1 in _trial(collection, entries, None, kept, tested, IMAGE_MODES).items():
            right[mode] = right.get(mode, 0.0) + top1 * len(tested)
    return {mode: total / len(entries) for mode, total in right.items()}


def _leave_one_out(collection: Collection, entries: Entries) -> dict[str, float]:
    """Each image alone is tested on all others."""
    tested = len(entries) if len(entries) <= MAX_LEFT_OUT else SAMPLED
    rows = np.sort(np.random.default_rng(0).permutation(len(entries))[:tested])
    problems = {mode: heads.Problem.of(mode, entries, None) for mode in IMAGE_MODES}
    folds, labels = problems["fused"].folds, problems["fused"].labels
    right = dict.fromkeys(IMAGE_MODES, 0)
    for fold in np.unique(folds[rows]).tolist():
        rest = take(entries, np.flatnonzero(folds != fold))
        rule = votes.Rule(**modes.fit_head("knn", rest, None).meta["votes"])
        fitted = {mode: heads.fit(heads.Problem.of(mode, rest, None), 0) for mode in IMAGE_MODES if mode != "knn"}
        whole = {mode: replace(problems[mode], prior=one.problem.prior) for mode, one in fitted.items()}
        for row in rows[folds[rows] == fold].tolist():
            own = gaussian.moments_of(entries.vectors[[row]], labels[[row]], len(problems["fused"].class_ids))
            others = problems["fused"].whole - own  # one object for all modes: they share its spectrum
            for mode, one in fitted.items():
                weights, bias = heads.combine(whole[mode].parts(others), one)
                right[mode] += int((weights @ entries.vectors[row] + bias + one.biases).argmax() == labels[row])
            right["knn"] += int(
                _voted_without(row, rule, entries, labels, problems["knn"].whole.counts).argmax() == labels[row]
            )
    knn1 = float((_nearest_others(collection, entries) == entries.class_ids).mean())
    return {"knn1": knn1, **{mode: count / len(rows) for mode, count in right.items()}}


def _nearest_others(collection: Collection, entries: Entries) -> np.ndarray:
    """(N,) class of the entry nearest to each other than itself."""
    fill(collection, entries)
    hits = collection.search(entries.vectors, 2)
    itself = [found[0] == own for found, own in zip(hits.entry_ids, entries.entry_ids, strict=True)]
    return np.where(itself, hits.class_ids[:, 1], hits.class_ids[:, 0])


def _voted_without(row: int, rule: votes.Rule, entries: Entries, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(C,) knn scores of one image by all other entries."""
    others = np.delete(np.arange(len(labels)), row)
    cosines = (entries.vectors[others] @ entries.vectors[row])[None]
    return votes.knn(rule, *votes.nearest(cosines, labels[others][None]), sizes, modes.N_NEIGHBORS)[0]


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over runs, and its 95 % t-interval; NaN ends where one run says nothing about the spread."""
    summary = {}
    for mode in runs[0]:
        values = np.array([run[mode] for run in runs])
        spread = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        reach = float(spread * (T_95[len(values) - 1] if len(values) <= len(T_95) else 1.96))
        top1 = float(values.mean())
        summary[mode] = {"top1": top1, "ci_low": top1 - reach, "ci_high": top1 + reach}
    return summary
