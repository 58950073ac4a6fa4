"""Training lists as RAR made them (2403.13805, section 3.3), to be compared with: from its notebook, and from its text.

Both look up DEPTH nearest pictures and cut their classes into windows of SIZE; a window that holds the true class is a list.
A class stands in it as often as it has pictures there.

- `paper-code`: the index holds the very pictures that are asked about, so that a picture's first neighbor is itself. Nothing
  is shuffled; the target moves the true class's copies to the front and leaves the rest as it is.
- `paper-text`: one half of the pictures is looked up among the other half; the list is shuffled, and the target is the order
  in which it was retrieved, wherever the true class stands in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.config import Config
from rar.engine import pipeline
from rar.engine.session import Session
from rar.memory.collection import Collection
from rar.run import fitting
from rar.run.vocabulary import collection
from rar.schema import UserError
from rar.tune.data import DATA

DEPTH, SIZE = 20, 5
BLOCK = 1024  # pictures looked up at once


def with_windows(session: Session, settings: Config, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """DATA whose train rows are windows, a row each, and what became of the windows.

    Raises UserError where the pictures are not those of the memory, whose vectors are looked up.
    """
    train = rows.filter(pc.equal(rows["split"], "train"))
    ids = train["image_id"].to_pylist()
    images = collection(settings, session.memory_address, "images")
    code = settings.tune.preset == "paper-code"
    found = pipeline.in_a_worker(_neighbors, images, ids, code, settings.run.seed)
    if found is None:
        raise UserError(f"tune.preset {settings.tune.preset} looks pictures up in the memory: leave tune.corpus out")
    asked, columns, cosines = found
    names = train["label"].to_pylist()
    ids_of = _class_ids(rows)
    records, total = [], 0
    for query, neighbors, scores in zip(asked.tolist(), columns.tolist(), cosines.tolist(), strict=True):
        row = train.slice(query, 1).to_pylist()[0]
        listed = [names[place] for place in neighbors]
        for start in range(len(listed) - SIZE + 1):
            total += 1
            window = listed[start : start + SIZE]
            if row["label"] in window:
                records.append(row | _window(window, scores[start : start + SIZE], row["label"], ids_of, code))
    if not records:
        raise UserError(f"tune.preset {settings.tune.preset}: no window of {SIZE} neighbors holds its picture's class")
    first = sum(record["truth"] == 0 for record in records)
    told = {
        "pictures": len(asked),
        "windows": total,
        "kept": len(records),
        "yield": round(len(records) / total, 4),
        "truth_first_already": round(first / len(records), 4),
    }
    others = rows.filter(pc.not_equal(rows["split"], "train"))
    return pa.concat_tables([pa.Table.from_pylist(records, DATA), others]), told


def _window(window: list[str], scores: list[float], label: str, ids_of: dict[str, int], code: bool) -> dict[str, Any]:
    """Candidates, truth and target of a list; those of the notebook are sorted by whether they are the truth."""
    candidates = [
        {"class_id": ids_of.get(name, -1), "class_name": name, "score": score}
        for name, score in zip(window, scores, strict=True)
    ]
    places = range(len(window))
    target = sorted(places, key=lambda place: window[place] != label) if code else list(places)
    return {"candidates": candidates, "truth": window.index(label), "target": target}


def _class_ids(rows: pa.Table) -> dict[str, int]:
    flat = pc.list_flatten(rows["candidates"])
    return dict(
        zip(pc.struct_field(flat, "class_name").to_pylist(), pc.struct_field(flat, "class_id").to_pylist(), strict=True)
    )


def _neighbors(
    images: Collection, image_ids: list[str], code: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(queries (Q,), their DEPTH nearest (Q, DEPTH), cosines), all as places in `image_ids`; None where one has no entry."""
    entries = fitting.entries_of(images)
    place_of = {} if entries is None else {entry.rsplit("-", 1)[0]: row for row, entry in enumerate(entries.entry_ids)}
    if entries is None or any(one not in place_of for one in image_ids):
        return None
    vectors = np.asarray(entries.vectors, np.float32)[[place_of[one] for one in image_ids]]
    everything = np.arange(len(vectors))
    halves = np.random.default_rng([seed, 25]).permutation(len(vectors))
    index, queries = (everything, everything) if code else (np.sort(halves[::2]), np.sort(halves[1::2]))
    depth = min(DEPTH, len(index))
    found, scores = [], []
    for start in range(0, len(queries), BLOCK):
        cosines = vectors[queries[start : start + BLOCK]] @ vectors[index].T
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :depth]
        found.append(index[best])
        scores.append(np.take_along_axis(cosines, best, 1))
    return queries, np.concatenate(found), np.concatenate(scores)
