"""Folders of Hugging Face's `datasets`: parquet, what `save_to_disk` leaves (Arrow streams), and imagefolder; by pyarrow alone.

Which column holds the picture, which the label, and what the label's numbers stand for is written into the schema's metadata
(key `huggingface`: the features), so nothing of it is guessed. Arrow streams are listed by where each picture's bytes lie in
the file, so that workers read byte ranges as they do of a tar; a local stream is memory-mapped for it, one on an object store
is read whole, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.json
from fsspec.implementations.local import LocalFileSystem

from rar import storage
from rar.config import Corpus
from rar.corpus import listing, tables
from rar.corpus.datasets.known import Listed, index_of
from rar.schema import UserError

SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)\.parquet")
METADATA = ("metadata.csv", "metadata.jsonl")


def read(corpus: Corpus, folder: str) -> Listed:
    """One split of a folder, whichever of the three layouts it has. Raises UserError where it has none of them."""
    fs, root = storage.locate(folder)
    folder, split = storage.full_name(fs, root).rstrip("/"), corpus.split
    with storage.explained("huggingface", folder):
        names = set(storage.walk(fs, root)) if storage.kind_of(fs, root) == "directory" else set()
    if state := next((name for name in (f"{split}/state.json", "state.json") if name in names), None):
        return _saved(corpus, folder, state)
    if parquet := sorted(name for name in names if _is_of_split(name, split)):
        _check_shards(folder, parquet)
        return _parquet(corpus, [f"{folder}/{name}" for name in parquet])
    if metadata := next((name for name in METADATA if f"{split}/{name}" in names), None):
        return _metadata(corpus, f"{folder}/{split}/{metadata}")
    if any(name.startswith(f"{split}/") for name in names):
        return _vocabulary(listing.list_images(Corpus(uri=f"{folder}/{split}", format="folder")), None)
    raise UserError(
        f"huggingface: {folder} has no split {split!r}: {split}-*.parquet, {split}/state.json, {split}/metadata.csv or .jsonl, "
        f"or class folders in {split}/; get it with `datasets` and save_to_disk"
    )


def _vocabulary(index: pa.Table, names: list[str] | None) -> Listed:
    """Classes are what the features name, in the order of their numbers; without, the distinct labels, sorted."""
    return Listed(index, sorted(index["label"].drop_null().unique().to_pylist()) if names is None else names, [])


def _is_of_split(name: str, split: str) -> bool:
    """Whether a parquet file's name says this split, as the hub names them: data/test-00000-of-00002, test/0000, test."""
    return bool(re.fullmatch(rf"(.*/)?{re.escape(split)}(-\d+-of-\d+\.parquet|\.parquet|/[^/]+\.parquet)", name))


def _check_shards(folder: str, names: Sequence[str]) -> None:
    for match in filter(None, map(SHARD.fullmatch, names)):
        for number in range(int(match["count"])):
            shard = f"{match['stem']}-{number:0{len(match['number'])}d}-of-{match['count']}.parquet"
            if shard not in names:
                raise UserError(f"huggingface: {folder}/{shard} is missing; get it where its neighbours came from")


def _agreed(names: list[list[str] | None], files: Sequence[str]) -> list[str] | None:
    """The class names that all files have."""
    for file, one in zip(files, names, strict=True):
        if one != names[0]:
            raise UserError(f"huggingface: {file} and {files[0]} name other classes; get the split again")
    return names[0]


def _class_names(corpus: Corpus, schema: pa.Schema, file: str) -> list[str] | None:
    classes = tables.class_labels(schema)
    return classes.get(tables.label_column(corpus, schema.names, file, classes) or "")


def _parquet(corpus: Corpus, files: Sequence[str]) -> Listed:
    given = {"format": "parquet", "bytes_column": corpus.bytes_column, "label_column": corpus.label_column}
    parts = [listing.list_images(Corpus.model_validate({"uri": file, **given})) for file in files]
    with storage.explained("huggingface", files[0]):
        names = _agreed([_class_names(corpus, tables.parquet_schema(file), file) for file in files], files)
    return _vocabulary(pa.concat_tables(parts), names)


def _saved(corpus: Corpus, folder: str, state_file: str) -> Listed:
    """`save_to_disk`: state.json names the Arrow files of a split, in order."""
    base = f"{folder}/{state_file}".rpartition("/")[0]
    with storage.explained("huggingface", f"{folder}/{state_file}"), storage.open_file(f"{folder}/{state_file}") as stream:
        state = json.load(stream)
        files = [f"{base}/{one['filename']}" for one in state["_data_files"]]
    if state_file == "state.json" and state.get("_split") not in (None, corpus.split):
        raise UserError(f"huggingface: {folder} holds the split {state['_split']!r}, not {corpus.split!r}; set corpus.split")
    if missing := [file for file in files if not storage.kind_of(*storage.locate(file))]:
        raise UserError(f"huggingface: {missing[0]} is missing; save the data set again with save_to_disk")
    parts, names = [], []
    for file in files:
        with storage.explained("huggingface", file):
            part, own = _arrow(corpus, file)
        parts.append(part)
        names.append(own)
    return _vocabulary(pa.concat_tables(parts) if parts else index_of([], []), _agreed(names, files) if names else None)


def _arrow(corpus: Corpus, file: str) -> tuple[pa.Table, list[str] | None]:
    """Index rows of a stream, each by where in the file the bytes of its picture lie; and what the labels' numbers mean."""
    fs, path = storage.locate(file)
    whole = pa.memory_map(path).read_buffer() if isinstance(fs, LocalFileSystem) else pa.py_buffer(fs.cat_file(path))
    with pa.ipc.open_stream(whole) as stream:
        table = stream.read_all()
    image = _picture_column(corpus, table.schema, file)
    offsets, sizes = [], []
    for chunk in table[image].chunks:
        starts, lengths = _ranges(chunk, whole, file)
        offsets += starts
        sizes += lengths
    classes = tables.class_labels(table.schema)
    column = tables.label_column(corpus, table.schema.names, file, classes)
    names = classes.get(column or "")
    labels = tables.labels(table[column], names).to_pylist() if column is not None else [None] * table.num_rows
    return index_of([f"{file}#{row}" for row in range(table.num_rows)], labels, offsets, sizes), names


def _picture_column(corpus: Corpus, schema: pa.Schema, file: str) -> str:
    """corpus.bytes_column, or the only column of structs with `bytes`."""
    found = [field.name for field in schema if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
    if corpus.bytes_column in found or len(found) == 1:
        return corpus.bytes_column if corpus.bytes_column in found else found[0]
    raise UserError(
        f"huggingface: {file} has {len(found)} columns of pictures; set corpus.bytes_column to one of {schema.names}"
    )


def _ranges(pictures: pa.StructArray, whole: pa.Buffer, file: str) -> tuple[list[int], list[int]]:
    """Offset in `whole` and size of each value of the field `bytes`; a null is an empty range, which fails as one row."""
    data = pictures.field("bytes")
    width = np.int64 if pa.types.is_large_binary(data.type) else np.int32
    _, places, values = data.buffers()
    bounds = np.frombuffer(places, width)[data.offset : data.offset + len(data) + 1].astype(np.int64)
    base = values.address - whole.address if values is not None else 0
    if not 0 <= base <= whole.size:
        raise UserError(f"huggingface: {file} is compressed, so pictures cannot be read by range; save it without compression")
    return (base + bounds[:-1]).tolist(), np.diff(bounds).tolist()


def _metadata(corpus: Corpus, file: str) -> Listed:
    """imagefolder with `metadata.csv` or `.jsonl`: a row a picture, `file_name` relative to the metadata's folder."""
    if file.endswith(".csv"):
        given = Corpus(uri=file, uri_column="file_name", label_column=corpus.label_column)
        return _vocabulary(listing.list_images(given), None)
    with storage.explained("huggingface", file), storage.open_file(file) as stream:
        table = pyarrow.json.read_json(stream)
    if "file_name" not in table.column_names:
        raise UserError(f"huggingface: {file} has no column 'file_name'; it has {table.column_names}")
    column = tables.label_column(corpus, table.column_names, file)
    labels = tables.labels(table[column]).to_pylist() if column else [None] * table.num_rows
    base = file.rpartition("/")[0]
    return _vocabulary(index_of([f"{base}/{name}" for name in table["file_name"].to_pylist()], labels), None)
