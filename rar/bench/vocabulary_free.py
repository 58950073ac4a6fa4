"""Vocabulary-free recognition on recorded embeddings and recorded guesses of a language model (`rar bench vocabulary-free`).

The sets hold CLIP embeddings of three pictures a class and, for each picture, the names that a language model guessed for it
without a vocabulary (FineR's, arXiv 2401.13837). One picture of each class is left out in turn; the memory holds the others
under their guesses, every guess an entry, and no true name anywhere. Arms:

- `guess`: the first guess for the picture itself, no retrieval.
- `knn1`: the first guess of the nearest memory picture, through Milvus: the paper's retriever.
- `retriever`: the k-NN votes of this library over all guessed names, five candidates a picture.
- `ranked`: those candidates ranked by the picture's own guesses, read as a model's answer (`match_name`): the named ones first.
  The recorded guesses stand for the MLLM, which is what FineR's and the paper's text has and their code never asks.

cACC is reported, and sACC where a text encoder is named: `--sentence-encoder`, a local folder such as FineR's
all-mpnet-base-v2, or `--encoder`, a CLIP by open_clip name or folder (the miniature's knows none of these words). No threshold
is fitted and none of the truth is used, so nothing is tuned on the test.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rar.bench.adapters import fill, read, take
from rar.config import Encoder
from rar.evaluation.clustering import cluster_accuracy, semantic_similarity
from rar.memory.collection import Collection
from rar.memory.entries import Entries
from rar.memory.store import open_store
from rar.ranker.spelling import match_name
from rar.retriever import modes
from rar.schema import UserError

TOP_K, N_NEIGHBORS = 5, 20


def run(data: Path, encoder: str | None = None, sentence_encoder: str | None = None) -> dict[str, Any]:
    """{"sets": {NAME: {ARM: {"cacc", "sacc"}, "images", "names"}}, "encoder"}; fractions, sacc null without an encoder.

    Raises UserError where the folder holds no NAME.npz with a NAME.json that has `class_names` and `guessed_names`, and where
    two encoders are to judge.
    """
    if encoder is not None and sentence_encoder is not None:
        raise UserError("--encoder and --sentence-encoder: sACC is by one of them; leave the other out")
    files = sorted(file for file in data.glob("*.npz") if "guessed_names" in _json(file.with_suffix(".json")))
    if not files:
        raise UserError(f"{data} holds no NAME.npz with a NAME.json of guessed_names; give the recorded memories with --data")
    embed: Callable[[list[str]], np.ndarray] | None = None
    if sentence_encoder is not None:
        from rar.encoder.sentences import SentenceEncoder

        embed = SentenceEncoder(sentence_encoder, "--sentence-encoder").embed
    if encoder is not None:
        from rar.encoder.towers import load_encoder

        embed = load_encoder(Encoder(model=encoder)).embed_texts
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/names.milvus") as address:
        sets = {file.stem: _measure(Collection(address, "names"), file, embed) for file in files}
    return {"sets": sets, "encoder": encoder or sentence_encoder}


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _measure(collection: Collection, file: Path, embed: Callable[[list[str]], np.ndarray] | None) -> dict[str, Any]:
    images, told = read(file), _json(file.with_suffix(".json"))
    guesses: list[list[str]] = told["guessed_names"]
    truth = [told["class_names"][class_id] for class_id in images.class_ids.tolist()]
    fold = np.array([(images.class_ids[:row] == images.class_ids[row]).sum() for row in range(len(images))])
    predicted: dict[str, dict[int, str]] = {}
    for left_out in np.unique(fold).tolist():
        kept, tested = np.flatnonzero(fold != left_out), np.flatnonzero(fold == left_out)
        memory = named_entries(take(images, kept), [guesses[row] for row in kept.tolist()])
        for arm, names in _predict(collection, memory, images.vectors[tested], [guesses[row] for row in tested]).items():
            predicted.setdefault(arm, {}).update(zip(tested.tolist(), names, strict=True))
    result: dict[str, Any] = {"images": len(images), "names": len({name for names in guesses for name in names})}
    for arm, by_row in predicted.items():
        names = [by_row[row] for row in range(len(images))]
        similarity = semantic_similarity(names, truth, embed) if embed is not None else None
        result[arm] = {"cacc": cluster_accuracy(names, truth), "sacc": similarity}
    return result


def named_entries(images: Entries, guesses: list[list[str]]) -> Entries:
    """Every guess of every picture as an entry of the picture's vector, in the guesses' order; equal names are one class."""
    pairs = [(row, name) for row, names in enumerate(guesses) for name in dict.fromkeys(names)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in pairs))}
    ids = [f"{row:08d}-{place:08d}" for place, (row, _) in enumerate(pairs)]
    class_ids = np.array([numbers[name] for _, name in pairs], np.int64)
    return Entries(ids, class_ids, [name for _, name in pairs], images.vectors[[row for row, _ in pairs]])


def _predict(collection: Collection, memory: Entries, queries: np.ndarray, guesses: list[list[str]]) -> dict[str, list[str]]:
    fill(collection, memory)
    nearest = collection.search(queries, 1).entry_ids
    first = dict(zip(memory.entry_ids, memory.class_names, strict=True))
    head = modes.fit_head("knn", memory, None)
    found = modes.retrieve_by_votes(head, collection.search, queries, TOP_K, N_NEIGHBORS)
    retrieved = [[one.class_name for one in row] for row in found.candidates(head.class_ids, head.class_names)]
    return {
        "guess": [names[0] for names in guesses],
        "knn1": [first[one[0]] for one in nearest],
        "retriever": [names[0] for names in retrieved],
        "ranked": [rank_by_names(*pair)[0] for pair in zip(retrieved, guesses, strict=True)],
    }


def rank_by_names(candidates: list[str], named: list[str]) -> list[str]:
    """Candidates in the order in which an answer names them, then the others as they were."""
    found = [place for name in named if (place := match_name(name, candidates)) is not None]
    return [candidates[place] for place in dict.fromkeys([*found, *range(len(candidates))])]
