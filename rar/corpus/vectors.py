"""Embeddings that somebody else made: .npz, .npy or parquet files as a corpus of vectors instead of images.

A row's place is its number in the corpus (INDEX's `row`: the files sorted by name, one after the other), so that its uri may
be an id of the user's. `read_vectors` is to vectors what `corpus.read_many` is to images: it runs on the workers, and one bad
vector is one bad row.

- .npz: vectors in the array `embeddings` (or corpus.vector_column), ids in `ids`, `uri` or `files`, labels in `label`,
  `labels`, `class_name` or `class_id` (or corpus.label_column).
- .parquet: columns corpus.vector_column (lists of numbers), corpus.uri_column, corpus.label_column.
- .npy: vectors alone. The table corpus.ids names its rows and their labels; it may do so for the others too. Parts
  (`img_emb_0.npy` ... with `metadata_0.parquet` ...) pair in natural order, and their counts must be equal.
Ids are optional: a vector without one is `FILE#ROW`.

Choices, and what they cost:
- Vectors are scaled to unit norm here, whatever they were: every score is a cosine. Lengths are lost, and with them what an
  encoder may have put there.
- A local .npy is memory-mapped: a worker reads its rows alone. An .npz, a remote .npy and a row group of a parquet file are
  held whole by each worker that reads from them; above some GB, give a local .npy, or row groups of some ten thousand rows.
- Shapes are checked on the driver from headers alone, values (zero, infinite, missing) where they are read.
- What made the vectors cannot be seen from them: `fingerprint` takes the user's word (encoder.source) and the dimension.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from rar import storage
from rar.columns import repeats
from rar.config import Corpus
from rar.corpus import tables
from rar.schema import RowError, UserError, content_id

SUFFIXES = (".npy", ".npz", ".parquet")
NPZ_VECTORS = "embeddings"
NPZ_IDS = ("ids", "uri", "files")
NPZ_LABELS = ("label", "labels", "class_name", "class_id")


def list_rows(corpus: Corpus) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Ids and labels (string, (N,)) of every vector, in the order of `row`; a label may be null.

    Raises UserError for other shapes and for ids that repeat.
    """
    layout = _layout(corpus)
    parts = list(_manifest_names(corpus, layout) if corpus.ids else _file_names(corpus, layout))
    uris = pa.chunked_array([chunk for ids, _ in parts for chunk in ids.chunks], pa.string())
    labels = [pa.chunked_array([pa.nulls(len(ids), pa.string())]) if own is None else own for ids, own in parts]
    if len(again := repeats(uris)):
        raise UserError(f"corpus: {again[0].as_py()!r} names two rows of {corpus.uri}; every vector needs an id of its own")
    return uris, pa.chunked_array([chunk for own in labels for chunk in own.chunks], pa.string())


def read_vectors(corpus: Corpus, rows: Sequence[int]) -> tuple[np.ndarray, list[RowError | None]]:
    """(len(rows), D) float32 of unit norm, and each row's fault or None; a faulty row's vector is zero. Nothing is raised.

    rows: INDEX's `row`, in any order. The files must not change while a command runs: a worker remembers where rows lie.
    """
    layout = _known_layout(corpus)
    wanted = np.asarray(rows, np.int64)
    vectors = np.zeros((len(wanted), layout.dim), np.float32)
    faults: list[RowError | None] = [None] * len(wanted)
    owner = np.searchsorted(layout.starts, wanted, side="right") - 1
    for number in np.unique(owner).tolist():
        positions = np.flatnonzero(owner == number)
        file = layout.files[number]
        try:
            raw = _read(corpus, file, wanted[positions] - layout.starts[number], layout.dim)
        except Exception as error:  # the file is gone, cut short, or no longer what it was
            fault = RowError(f"cannot read {file}: {type(error).__name__}: {' '.join(str(error).split())}")
            for position in positions.tolist():
                faults[position] = fault
            continue
        vectors[positions], reasons = _unit(raw)
        for position, reason in zip(positions.tolist(), reasons, strict=True):
            faults[position] = RowError(reason) if reason else None
    return vectors, faults


def vector_id(vector: np.ndarray) -> str:
    """The image_id of a vector (D,) float32: a hash of its bytes."""
    return content_id(np.ascontiguousarray(vector, np.float32).tobytes())


def has_vectors(corpus: Corpus, file: str) -> bool:
    """Whether a parquet's vector column is there and holds lists of numbers."""
    schema = tables.parquet_schema(file)
    return corpus.vector_column in schema.names and _is_vector(schema.field(corpus.vector_column).type)


def dim_of(corpus: Corpus) -> int:
    """Numbers in a vector. Raises UserError where the corpus holds no embeddings."""
    with storage.explained("corpus", corpus.uri):
        return _layout(corpus).dim


def fingerprint(source: str, dim: int) -> str:
    """16 hex digits, in the place of an encoder's fingerprint. source: encoder.source."""
    return hashlib.sha256(json.dumps(["precomputed", source, dim]).encode()).hexdigest()[:16]


def class_embeddings(path: str, n_classes: int) -> np.ndarray:
    """Text vectors of the classes from an .npy, one a class in their order: (n_classes, D) float32, unit norm.

    Raises UserError for another shape and for a row without a direction.
    """
    with storage.explained("memory.class_embeddings", path):
        if storage.suffix(path) != ".npy":
            raise UserError(f"memory.class_embeddings: {path} is not an .npy; save one array (classes, dimensions)")
        with storage.open_file(path) as stream:
            raw = np.load(stream, allow_pickle=False)
    _check("memory.class_embeddings", path, raw.shape, raw.dtype)
    if len(raw) != n_classes:
        raise UserError(
            f"memory.class_embeddings: {path} has {len(raw):,} rows for {n_classes:,} classes; one a class is needed"
        )
    vectors, reasons = _unit(raw)
    bad = [(row, reason) for row, reason in enumerate(reasons) if reason]
    if bad:
        raise UserError(f"memory.class_embeddings: {path}, row {bad[0][0]}: {bad[0][1]}; {len(bad):,} such rows in all")
    return vectors


# Where rows lie


@dataclass(frozen=True)
class _Layout:
    """files: full names. starts: (files,) the first row of each. total: rows of all."""

    files: tuple[str, ...]
    starts: np.ndarray
    total: int
    dim: int


def _layout(corpus: Corpus) -> _Layout:
    files = storage.files(corpus.uri, *SUFFIXES)
    shapes = [_shape(corpus, file) for file in files]
    filled = [(file, dim) for file, (rows, dim) in zip(files, shapes, strict=True) if rows]
    if not filled:
        raise UserError(f"corpus: no embeddings in {corpus.uri}; check corpus.uri")
    for file, dim in filled:
        if dim != filled[0][1]:
            raise UserError(f"corpus: {filled[0][0]} has {filled[0][1]} dimensions, {file} has {dim}; take one of them out")
    rows = np.array([rows for rows, _ in shapes], np.int64)
    return _Layout(tuple(files), np.cumsum(rows) - rows, int(rows.sum()), filled[0][1])


_known_layout = lru_cache(maxsize=8)(_layout)


def _shape(corpus: Corpus, file: str) -> tuple[int, int]:
    """(rows, dimensions), from a header. Raises UserError for what is no table of numbers."""
    if storage.suffix(file) not in SUFFIXES:
        raise UserError(f"corpus: {file} is no .npy, .npz or .parquet of embeddings; check corpus.uri and corpus.format")
    if storage.suffix(file) == ".parquet":
        return _parquet_shape(corpus, file)
    with storage.open_file(file) as stream:
        if storage.suffix(file) == ".npy":
            shape, dtype = _header(stream)
        else:
            with _archive(stream) as archive, archive.open(f"{_npz_vectors(corpus, file, archive)}.npy") as member:
                shape, dtype = _header(member)
    _check("corpus", file, shape, dtype)
    return shape[0], shape[1]


def _header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Of an .npy, without its content."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _check(key: str, file: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 2 or shape[1] == 0:
        raise UserError(f"{key}: {file} holds an array of shape {shape}; embeddings are (rows, dimensions)")
    if dtype.kind not in "fiu":
        raise UserError(f"{key}: {file} holds {dtype}, not numbers; save float32 or float16")


def _archive(stream: Any) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(stream)
    except zipfile.BadZipFile as error:
        raise ValueError(f"not an .npz: {error}") from None


def _npz_vectors(corpus: Corpus, file: str, archive: zipfile.ZipFile) -> str:
    """The name of the array of vectors in an .npz."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    for name in (corpus.vector_column, NPZ_VECTORS):
        if name in names:
            return name
    raise UserError(f"corpus: {file} has no array {NPZ_VECTORS!r}; set corpus.vector_column to one of {names}")


def _parquet_shape(corpus: Corpus, file: str) -> tuple[int, int]:
    column = corpus.vector_column
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        names = parquet.schema_arrow.names
        if column not in names:
            raise UserError(f"corpus: {file} has no column {column!r}; set corpus.vector_column to one of {names}")
        kind = parquet.schema_arrow.field(column).type
        if not _is_vector(kind):
            raise UserError(f"corpus: column {column!r} of {file} holds {kind}, not lists of numbers; set corpus.vector_column")
        if pa.types.is_fixed_size_list(kind):
            return parquet.metadata.num_rows, kind.list_size
        for batch in parquet.iter_batches(1024, columns=[column]):
            lengths = pc.drop_null(pc.list_value_length(batch[column]))
            if len(lengths):
                return parquet.metadata.num_rows, lengths[0].as_py()
    return 0, 0


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


# Names


def _spans(layout: _Layout) -> Iterator[tuple[str, int, int]]:
    """(file, its first row, the row after its last)."""
    ends = [*layout.starts[1:].tolist(), layout.total]
    yield from zip(layout.files, layout.starts.tolist(), ends, strict=True)


Part = tuple[pa.ChunkedArray, pa.ChunkedArray | None]  # ids and labels of the rows of a file


def _numbered(file: str, rows: int) -> pa.ChunkedArray:
    """The ids of rows that have none."""
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    return pa.chunked_array([pc.binary_join_element_wise(tables.text(f"{file}#"), numbers, "")])


def _file_names(corpus: Corpus, layout: _Layout) -> Iterator[Part]:
    """What the files themselves say."""
    for file, start, end in _spans(layout):
        ids: pa.ChunkedArray | None = None
        labels: pa.ChunkedArray | None = None
        if storage.suffix(file) == ".npz":
            ids, labels = _npz_names(corpus, file, end - start)
        elif storage.suffix(file) == ".parquet":
            ids, labels = _table_names(corpus, file)
        yield _numbered(file, end - start) if ids is None else ids, labels


def _manifest_names(corpus: Corpus, layout: _Layout) -> Iterator[Part]:
    """What corpus.ids says: one table of all rows, or one a file of vectors. A table of labels alone leaves the rows their
    `FILE#ROW`. Raises UserError where the counts do not pair.
    """
    assert corpus.ids is not None
    files = storage.files(corpus.ids, *tables.SUFFIXES)
    spans = [(corpus.uri, 0, layout.total)] if len(files) == 1 else list(_spans(layout))
    if len(files) != len(spans):
        raise UserError(
            f"corpus: {corpus.ids} is {len(files):,} tables for {len(spans):,} files of vectors; give one each, or one of all"
        )
    places = pa.chunked_array([_numbered(file, end - start).chunk(0) for file, start, end in _spans(layout)], pa.string())
    for file, (vectors, start, end) in zip(files, spans, strict=True):
        ids, labels = _table_names(corpus, file)
        if ids is None and labels is None:
            raise UserError(f"corpus: {file} has no column {corpus.uri_column!r}; set corpus.uri_column to that of the ids")
        count = len(ids if ids is not None else labels or ())
        if count != end - start:
            raise UserError(f"corpus: {file} names {count:,} rows, {vectors} has {end - start:,}; they must be the same rows")
        yield places.slice(start, count) if ids is None else ids, labels


def _table_names(corpus: Corpus, file: str) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
    """(ids, labels) of a CSV or parquet; None: no such column."""
    names = tables.read_names(corpus, file)
    if names.uris is not None and names.uris.null_count:
        raise UserError(f"corpus: {file}: column {corpus.uri_column!r} has rows without an id; every vector needs one")
    return names.uris, names.labels


def _npz_names(corpus: Corpus, file: str, rows: int) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
    """(ids, labels) of an .npz; None: no such array."""
    asked = corpus.label_column != tables.DEFAULT_LABEL_COLUMN
    with storage.open_file(file) as stream, np.load(stream, allow_pickle=False) as arrays:
        if asked and corpus.label_column not in arrays.files:
            raise UserError(f"corpus: {file} has no array {corpus.label_column!r}; set corpus.label_column: {arrays.files}")
        found: list[pa.ChunkedArray | None] = []
        for choices, clean in ((NPZ_IDS, tables.text), ((corpus.label_column,) if asked else NPZ_LABELS, tables.label)):
            name = next((name for name in choices if name in arrays.files), None)
            values = None if name is None else arrays[name]
            if values is not None and values.shape != (rows,):
                raise UserError(f"corpus: {file}: array {name!r} has shape {values.shape}; one value a vector makes ({rows},)")
            if values is not None and values.dtype.kind == "S":
                values = np.char.decode(values, "utf-8")
            cleaned = None if values is None else pa.array(map(clean, values.tolist()), pa.string())  # type: ignore[operator]
            found.append(None if cleaned is None else pa.chunked_array([cleaned]))
    return found[0], found[1]


# Values


def _read(corpus: Corpus, file: str, rows: np.ndarray, dim: int) -> np.ndarray:
    """Rows of one file as they are: (len(rows), dim) of its own dtype. Raises whatever reading raises."""
    if storage.suffix(file) != ".parquet":
        return np.asarray(_array(corpus, file)[rows])
    raw = np.full((len(rows), dim), np.nan, np.float32)
    starts = _group_starts(file)
    owner = np.searchsorted(starts, rows, side="right") - 1
    for group in np.unique(owner).tolist():
        raw[owner == group] = _row_group(file, corpus.vector_column, group, dim)[rows[owner == group] - starts[group]]
    return raw


@lru_cache(maxsize=2)
def _array(corpus: Corpus, file: str) -> np.ndarray:
    fs, path = storage.locate(file)
    if storage.suffix(file) == ".npy" and isinstance(fs, LocalFileSystem):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with storage.open_file(file) as stream:
        if storage.suffix(file) == ".npy":
            return np.load(stream, allow_pickle=False)
        try:
            with _archive(stream) as archive, archive.open(f"{_npz_vectors(corpus, file, archive)}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        except zlib.error as error:
            raise ValueError(str(error)) from None


@lru_cache(maxsize=8)
def _group_starts(file: str) -> np.ndarray:
    """(row groups,) the first row of each."""
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return np.cumsum([0, *rows])[:-1]


@lru_cache(maxsize=2)
def _row_group(file: str, column: str, group: int, dim: int) -> np.ndarray:
    """(rows, dim) float32 of a row group; a missing vector, or one of another length, is all NaN."""
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        lists = parquet.read_row_group(group, columns=[column])[column].combine_chunks()
    matrix = np.full((len(lists), dim), np.nan, np.float32)
    good = pc.fill_null(pc.equal(pc.list_value_length(lists), dim), False).to_numpy(zero_copy_only=False)
    values = lists.filter(pa.array(good)).flatten().cast(pa.float32())
    matrix[good] = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    return matrix


def _unit(raw: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """(N, D) numbers -> (N, D) float32 of unit norm, and why a row has none (it is zero then).

    Scaled by the largest number first, in float64: squares of float16 vectors of any length neither overflow nor vanish.
    """
    wide = raw.astype(np.float64)
    largest = np.abs(wide).max(axis=1, initial=0)  # NaN and infinity show up here
    reasons: list[str | None] = [None] * len(wide)
    for row in np.flatnonzero(~np.isfinite(largest)).tolist():
        reasons[row] = f"the vector is missing, or not of {raw.shape[1]} finite numbers"
    for row in np.flatnonzero(largest == 0).tolist():
        reasons[row] = "the vector is zero: it has no direction"
    good = np.isfinite(largest) & (largest > 0)
    scaled = wide[good] / largest[good, None]
    vectors = np.zeros(wide.shape, np.float32)
    vectors[good] = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    return vectors, reasons
