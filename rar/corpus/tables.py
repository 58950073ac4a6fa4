"""Tables that name images or vectors: CSV and parquet files, one row each, with a name and perhaps a label."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rar import storage
from rar.config import Corpus
from rar.schema import UserError

DEFAULT_LABEL_COLUMN: str = Corpus.model_fields["label_column"].default


def read_manifest(corpus: Corpus, file: str) -> tuple[pa.Table, list[str]]:
    """The uri and label columns, and the names of all columns. CSV cells stay text: a label 007 is not 7."""
    wanted = (corpus.uri_column, corpus.label_column)
    with storage.open_file(file) as stream:
        if storage.suffix(file) == ".parquet":
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            return parquet.read([name for name in names if name in wanted]), names
        as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()))
        table = pyarrow.csv.read_csv(stream, convert_options=as_text)
        return table, table.column_names


def has_bytes(corpus: Corpus, file: str) -> bool:
    """Whether a parquet's bytes column is there and binary; Hugging Face's image columns are structs with a field `bytes`."""
    schema = parquet_schema(file)
    if corpus.bytes_column not in schema.names:
        return False
    kind = schema.field(corpus.bytes_column).type
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def parquet_schema(file: str) -> pa.Schema:
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        return parquet.schema_arrow


def label_column(corpus: Corpus, columns: Sequence[str], file: str) -> str | None:
    """The label column, or None if there is none of the default name; one asked for by name must be there."""
    if corpus.label_column in columns:
        return corpus.label_column
    if corpus.label_column != DEFAULT_LABEL_COLUMN:
        raise UserError(f"corpus: {file} has no column {corpus.label_column!r}; set corpus.label_column: {list(columns)}")
    return None


def label(value: Any) -> str | None:
    """Any cell as a label: stripped and in NFC, to be compared. Empty cells and NaN (a missing number) are none."""
    return None if value is None or value != value else unicodedata.normalize("NFC", str(value)).strip() or None
