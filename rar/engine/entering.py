"""Stages that lead into a memory: which rows it lacks, and the entries that the others become."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from rar.columns import with_errors
from rar.engine.stages import with_columns
from rar.memory.collection import Collection
from rar.schema import entry_id

HELD, RESUMED = "held", "resumed"  # `stage` of a row whose entry is in the memory, or in what a killed build has written


class Lacking:
    """Asks a memory which rows it holds: these go no further, as if they were faulty; `error` says under which class.

    places: stage -> the collection that is asked. A shard asks for its own ids, so that no worker carries those of the memory.
    """

    def __init__(self, places: Mapping[str, Collection], fingerprint: str) -> None:
        self.places, self.fingerprint = dict(places), fingerprint

    def __call__(self, table: pa.Table) -> pa.Table:
        image_ids = [
            None if error else one for one, error in zip(*(table[c].to_pylist() for c in ("image_id", "error")), strict=True)
        ]
        for stage, place in self.places.items():
            ids = [None if one is None else entry_id(one, self.fingerprint) for one in image_ids]
            known = place.labels_of(sorted({one for one in ids if one is not None}))
            table = with_errors(table, stage, [known.get(one) if one else None for one in ids])
            image_ids = [one if label not in known else None for one, label in zip(image_ids, ids, strict=True)]
        return table


class AsEntries:
    """image_id and label -> entry_id, class_id, class_name and content. class_of: class name -> id.

    content: the image_id's digits as 16 bytes, a third of what they weigh as text: they are told to the driver.
    """

    def __init__(self, class_of: Mapping[str, int], fingerprint: str) -> None:
        self.class_of, self.fingerprint = dict(class_of), fingerprint

    def __call__(self, table: pa.Table) -> pa.Table:
        labels, image_ids = table["label"].to_pylist(), table["image_id"].to_pylist()
        ids = [None if one is None else entry_id(one, self.fingerprint) for one in image_ids]
        content = [None if one is None else bytes.fromhex(one) for one in image_ids]
        columns = {
            "content": pa.array(content, pa.binary(16)),
            "entry_id": pa.array(ids, pa.string()),
            "class_id": pa.array([self.class_of[label] for label in labels], pa.int64()),
            "class_name": pa.array(labels, pa.string()),
        }
        return with_columns(table.drop_columns([name for name in ("bytes", "pixels") if name in table.column_names]), columns)
