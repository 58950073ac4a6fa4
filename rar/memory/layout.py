"""How a memory lies in Milvus: the fields of its collection, its index, and the JSON kept in its properties.

Fields: entry_id (primary key), class_id, class_name, vector, and with the index REDUCED also `full`: there, `vector` is the
projected one and `full` the whole vector as text. The vector field has the only index; a Milvus of 2.3 holds one vector field a
collection.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rar.config import Index
from rar.memory import reduced
from rar.memory.entries import FIELDS, MAX_ID_BYTES, MAX_NAME_BYTES
from rar.schema import UserError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

METRIC = "IP"
META_KEY, STATE_KEY = "rar.meta", "rar.state"  # collection properties; descriptions are dropped by Milvus Lite
FLAT_UP_TO = 50_000
IN_MILVUS = {"FLAT": "FLAT", "HNSW": "HNSW", "HNSW_SQ8": "HNSW_SQ", "REDUCED": "HNSW"}
MAX_PAGE = 16_384  # rows per page on a server
INDEXED_ROWS = 1024  # the least that a server indexes (its minSegmentNumRowsToEnableIndex)
PAGE_BYTES = 16 << 20
ROW_BYTES = 64  # of ids and class columns, roughly


def index_kind(index: Index, size_hint: int) -> str:
    """The kind of index that will be made. `auto` is FLAT, exact, up to FLAT_UP_TO entries and HNSW above.

    At 50,000 entries of 512 dimensions an exact search on Milvus Lite took 2.8 ms a query (one core, 512 queries a request),
    which is less than a CLIP encoder needs for an image on that core, and it loses nothing and has no build to wait for.
    HNSW answers faster much earlier (`rar.bench.retrieve.crossover` on a busy core, 256 queries a request: 0.87 times the speed
    of FLAT at 5,000 entries, 1.4 at 20,000, 2.5 at 50,000, 1.9 at 100,000), but the time its graph takes to build comes back
    only after 20,000 to 100,000 queries: name it for a corpus of more.
    HNSW_SQ8 and REDUCED trade accuracy or time for memory, so they are chosen by name only.
    """
    if index.kind != "auto":
        return index.kind
    return "FLAT" if size_hint <= FLAT_UP_TO else "HNSW"


def fields(meta: dict[str, Any]) -> list[str]:
    """The names of all fields."""
    return [*FIELDS, "full"] if meta["index"] == "REDUCED" else FIELDS


def create_collection(client: MilvusClient, name: str, meta: dict[str, Any]) -> None:
    """Nothing happens where it exists."""
    from pymilvus import DataType

    if client.has_collection(name):
        return
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("entry_id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
    schema.add_field("class_id", DataType.INT64)
    schema.add_field("class_name", DataType.VARCHAR, max_length=MAX_NAME_BYTES)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=meta.get("reduced_dim", meta["dim"]))
    if meta["index"] == "REDUCED":
        schema.add_field("full", DataType.VARCHAR, max_length=reduced.text_length(meta["dim"]))
    client.create_collection(name, schema=schema, properties={META_KEY: json.dumps(meta)}, consistency_level="Bounded")


def create_index(client: MilvusClient, name: str, meta: dict[str, Any]) -> None:
    """Nothing happens where there is one. A collection whose index the server lacks is dropped: it could never be loaded."""
    from pymilvus.exceptions import MilvusException

    if client.list_indexes(name):
        return
    params = {} if meta["index"] == "FLAT" else {"M": meta["m"], "efConstruction": meta["ef_construction"]}
    if meta["index"] == "HNSW_SQ8":
        params["sq_type"] = "SQ8"
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type=IN_MILVUS[meta["index"]], index_name="vector", metric_type=METRIC, params=params)
    try:
        client.create_index(name, indexes, sync=False)  # else pymilvus sleeps half a second; `seal` waits for the index
    except MilvusException as error:
        if meta["index"] != "HNSW_SQ8" or "index" not in str(error):
            raise
        client.drop_collection(name)
        version = client.get_server_version()
        raise UserError(
            f"this Milvus ({version}) has no index HNSW_SQ8; set memory.index.kind to HNSW, or to REDUCED to save memory"
        ) from None


def load(client: MilvusClient, name: str) -> None:
    """Raises UserError for a collection that was not made here, or was indexed anew for another metric."""
    read_meta(client, name)
    metric = (client.describe_index(name, "vector") or {}).get("metric_type")
    if metric != METRIC:
        raise UserError(f"memory {name!r} is indexed for the metric {metric}, not {METRIC}; drop it and build it again")
    client.load_collection(name)


def is_ours(client: MilvusClient, name: str) -> bool:
    return META_KEY in client.describe_collection(name)["properties"]


def read_meta(client: MilvusClient, name: str) -> dict[str, Any]:
    """What `create_collection` was given. Raises UserError for a collection that was not made here."""
    meta = client.describe_collection(name)["properties"].get(META_KEY)
    if meta is None:
        raise UserError(f"the collection {name!r} was not made by `rar memory`; choose another memory.name")
    return json.loads(meta)


def read_state(client: MilvusClient, name: str) -> dict[str, Any]:
    """What was last sealed; empty: never."""
    return json.loads(client.describe_collection(name)["properties"].get(STATE_KEY, "{}"))


def page_size(client: MilvusClient, columns: list[str], dim: int) -> int:
    """How many rows to ask for at once: as many as are wise to hold, which from a server are at most MAX_PAGE.

    Milvus Lite goes through the whole collection for every page, so that few are better.
    """
    row_bytes = ROW_BYTES + (4 * dim if {"vector", "full"} & set(columns) else 0)
    size = max(1, PAGE_BYTES // row_bytes)
    return size if is_lite(client) else min(size, MAX_PAGE)


def page(client: MilvusClient, name: str, columns: list[str], condition: str, after: str, size: int) -> list[dict[str, Any]]:
    """At most `size` rows that come next after an entry_id, in the order of entry_ids; none: that was all.

    A server stops early where one of its segments has run out, and may give fewer rows than there are.
    What pymilvus' query_iterator does, without a state that a lost connection takes with it.
    """
    rows = client.query(
        name,
        filter=f'entry_id > "{after}"' + (f" and {condition}" if condition else ""),
        limit=size,
        output_fields=columns,
        consistency_level="Strong",
        iterator="True",  # sorted by primary key
        reduce_stop_for_best="True",  # the first rows of all segments, not of some
        strict_float32=True,  # vectors as arrays: as lists they take five times as long to read
    )
    return [{column: row[column] for column in columns} for row in rows]


def is_lite(client: MilvusClient) -> bool:
    return client.get_server_version().startswith("milvus_lite")


def is_handed_over(client: MilvusClient, name: str) -> bool:
    """Whether everything flushed is searched by its own index. Embedded: always, a segment without one is searched exactly.

    A server searches new entries by a coarse index of its own, and goes on for seconds after theirs is built: at 20,000 entries
    of 512 dimensions recall@10 was 0.82 until then. A segment of less than INDEXED_ROWS gets no index and is searched exactly.
    """
    from pymilvus.client.types import SegmentState

    if is_lite(client):
        return True
    segments = client.list_persistent_segments(name)
    flushed = {one.segment_id for one in segments if one.state == SegmentState.Flushed and one.num_rows >= INDEXED_ROWS}
    return flushed <= {one.segment_id for one in client.list_loaded_segments(name) if one.index_name}


def named(client: MilvusClient, name: str, entry_ids: list[str], columns: list[str]) -> list[dict[str, Any]]:
    """Columns of the entries with these ids that are there, in any order."""
    return client.query(name, ids=entry_ids, output_fields=columns, consistency_level="Strong", strict_float32=True)
