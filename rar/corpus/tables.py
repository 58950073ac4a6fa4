"""Tables that name images or vectors: CSV, TSV and parquet files, one row each, with a name and perhaps a label.

CSV is read as spreadsheets and scripts really write it: UTF-8 with or without a mark, UTF-16, comma, semicolon, tab or bar
(told by the header, or by Excel's `sep=` line), quoted line ends, cells of any size, headers with spaces around them. It is
streamed through Python's csv into Arrow, two columns at a time: about a second per million rows, and one batch of Python text
in memory. What has two readings is refused with its line: a row of more or fewer cells than the header, an open quote, a column
that is there twice with different cells. Cells stay text: a label 007 is not 7.

Of Hugging Face's parquet files the schema is read too: `image` structs of bytes and path, and the class names of ClassLabels.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rar import storage
from rar.config import Corpus
from rar.schema import UserError

SUFFIXES = (".csv", ".tsv", ".parquet")
DEFAULT_LABEL_COLUMN: str = Corpus.model_fields["label_column"].default
DEFAULT_BYTES_COLUMN: str = Corpus.model_fields["bytes_column"].default
DELIMITERS = ",;\t|"
HEAD = 65_536  # bytes that tell encoding and delimiter; also rows of a batch
EDGES = re.compile(r"^[\s\u200b\u200e\u200f\u2060\ufeff]+|[\s\u200b\u200e\u200f\u2060\ufeff]+$")
CELL_LIMIT = 2**31 - 1  # Python's own is 128 KiB


@dataclass(frozen=True)
class Names:
    """What a table says of its rows. uris, labels: (N,) string, None where there is no such column. columns: all names."""

    uris: pa.ChunkedArray | None
    labels: pa.ChunkedArray | None
    columns: list[str]


def read_names(corpus: Corpus, file: str) -> Names:
    """The uri and label columns of a table. Labels are cleaned as by `label`; uris are as they stand, null where there is none.

    Raises UserError for a file without rows to read or with two readings, and as `label_column` does.
    """
    if storage.suffix(file) == ".parquet":
        return _read_parquet(corpus, file)
    with storage.open_file(file) as stream:
        try:
            return _read_csv(corpus, file, stream)
        except UnicodeDecodeError:
            raise UserError(f"corpus: {file} is neither UTF-8 nor UTF-16; save it as UTF-8") from None


def encoding_of(head: bytes) -> str:
    """Of a text file, from its first bytes: UTF-16 and 32 by their marks, or by every second byte being zero, else UTF-8."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = head[0:2].find(b"\0") if len(head) > 1 else -1
    return {0: "utf-16-be", 1: "utf-16-le"}.get(zeros, "utf-8-sig")


def label(value: Any) -> str | None:
    """Any cell as a label: stripped (marks without width, too), in NFC. Empty cells and NaN (a missing number) are None."""
    if value is None or value != value:
        return None
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return EDGES.sub("", unicodedata.normalize("NFC", text)) or None


def text(name: object) -> str:
    """Arrow text is UTF-8. A name that is not keeps its row: escaped, so that it fails to be read, alone."""
    return str(name).encode(errors="backslashreplace").decode()


def labels(values: pa.ChunkedArray, class_names: Sequence[str] | None = None) -> pa.ChunkedArray:
    """A column as labels (string): each distinct value is cleaned once. class_names: of integers; any other number is none."""
    if pa.types.is_nested(values.type):
        raise UserError(f"corpus: the label column holds {values.type}, not names; set corpus.label_column")
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not len(values) or pa.types.is_null(values.type):
        return pa.chunked_array([pa.nulls(len(values), pa.string())])
    encoded = values.combine_chunks().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    if class_names is not None:
        distinct = [class_names[value] if value is not None and 0 <= value < len(class_names) else None for value in distinct]
    return pa.chunked_array([pa.array([label(value) for value in distinct], pa.string()).take(encoded.indices)])


def label_column(corpus: Corpus, columns: Sequence[str], file: str, classes: Mapping[str, Sequence[str]] = {}) -> str | None:
    """The name of the label column, as it stands in the file; None if there is none of the default name.

    classes: ClassLabel columns; a single one serves where there is no column of the default name. Raises UserError where one
    asked for by name is missing.
    """
    found = _column(columns, corpus.label_column)
    if found is None and corpus.label_column != DEFAULT_LABEL_COLUMN:
        raise UserError(f"corpus: {file} has no column {corpus.label_column!r}; set corpus.label_column: {list(columns)}")
    return next(iter(classes)) if found is None and len(classes) == 1 else found


def bytes_column(corpus: Corpus, file: str) -> str | None:
    """The parquet column of image bytes: corpus.bytes_column, else the only struct of bytes and path, or the only binary column
    of a table that names no files; None: there is none. Raises UserError where there are two.
    """
    schema = parquet_schema(file)
    if corpus.bytes_column in schema.names:
        return corpus.bytes_column if _holds_bytes(schema.field(corpus.bytes_column).type) else None
    holding = [field for field in schema if _holds_bytes(field.type)]
    found = [field.name for field in holding if pa.types.is_struct(field.type)]
    if not found and _column(schema.names, corpus.uri_column) is None:
        found = [field.name for field in holding]
    if corpus.bytes_column != DEFAULT_BYTES_COLUMN or not found:
        return None
    if len(found) > 1:
        raise UserError(f"corpus: {file} has several columns of pictures; set corpus.bytes_column to one of {found}")
    return found[0]


def parquet_schema(file: str) -> pa.Schema:
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        return parquet.schema_arrow


def class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """{column: names} of the ClassLabel columns that Hugging Face's datasets note in a parquet's schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        known = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # another writer's, or none
        return {}
    return {name: list(map(str, names)) for name, names in known.items() if name in schema.names and isinstance(names, list)}


def read_labels(corpus: Corpus, parquet: pq.ParquetFile, file: str) -> pa.ChunkedArray | None:
    """The labels of a parquet file; None where it has no such column."""
    schema = parquet.schema_arrow
    classes = class_labels(schema)
    column = label_column(corpus, schema.names, file, classes)
    if column is None:
        return None
    numbers = pa.types.is_integer(schema.field(column).type)
    return labels(parquet.read([column])[0], classes.get(column) if numbers else None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _column(columns: Sequence[str], wanted: str) -> str | None:
    """The column of this name, spaces around it apart."""
    return next((name for name in columns if name == wanted or name.strip() == wanted.strip()), None)


def _read_parquet(corpus: Corpus, file: str) -> Names:
    with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
        columns = parquet.schema_arrow.names
        uri = _column(columns, corpus.uri_column)
        uris = None if uri is None else _uris(parquet.read([uri])[0])
        return Names(uris, read_labels(corpus, parquet, file), columns)


def _uris(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as names (string); null where there is none. Text, the usual case, never becomes Python objects."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.if_else(pc.equal(values, ""), None, values).cast(pa.string())
    return pa.chunked_array([pa.array(map(_name, values.to_pylist()), pa.string())])


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _read_csv(corpus: Corpus, file: str, stream: IO[bytes]) -> Names:
    head = stream.read(HEAD)
    stream.seek(0)
    encoding = encoding_of(head)
    start = codecs.getincrementaldecoder(encoding)(errors="ignore").decode(head)
    text = io.TextIOWrapper(stream, encoding=encoding, newline="")
    csv.field_size_limit(CELL_LIMIT)
    delimiter = _separator(start)
    if delimiter:
        start = start[len(text.readline()) :]
    delimiter = delimiter or _delimiter(start, (corpus.uri_column, corpus.label_column))
    padded = any(name.startswith(" ") for name in _header(start, delimiter))
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=padded, strict=True)
    rows = _checked(reader, file)
    columns = [name.strip() for name in next(rows, [])]
    if not columns:
        raise UserError(f"corpus: {file} is empty; give it a header and a row an image")
    label = label_column(corpus, columns, file)
    places = [[at for at, name in enumerate(columns) if name == wanted] for wanted in (corpus.uri_column.strip(), label)]
    for own in places:
        rows = _agreeing(rows, own, columns, file) if len(own) > 1 else rows
    pairs = map(itemgetter(*(own[0] if own else 0 for own in places)), rows)  # of other cells, however large, none is kept
    parts: list[list[pa.Array]] = [[], []]
    while batch := list(islice(pairs, HEAD)):
        for cells, part in zip(zip(*batch, strict=True), parts, strict=True):
            part.append(pa.array([(cell.strip() if padded else cell) or None for cell in cells], pa.string()))
    text.detach()
    uris, found = (pa.chunked_array(part, pa.string()) if own else None for own, part in zip(places, parts, strict=True))
    return Names(uris, None if found is None else labels(found), columns)


def _checked(reader: Any, file: str) -> Iterator[list[str]]:
    """Header and rows, all as wide as the header (empty cells too many are dropped); blank lines are none."""
    width = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"corpus: {file}, line {reader.line_num}: {error}; check the quotes of this row") from None
        if len(row) == width and width:
            yield row
            continue
        if not row or (len(row) == 1 < width and not row[0].strip()):
            continue
        width = width or len(row)
        if len(row) < width or any(row[width:]):
            raise UserError(
                f"corpus: {file}, line {reader.line_num}: {len(row)} cells under {width} columns; quote what holds a delimiter "
                "or a line end"
            )
        yield row[:width]


def _agreeing(rows: Iterator[list[str]], places: Sequence[int], columns: Sequence[str], file: str) -> Iterator[list[str]]:
    """The rows, of which each says the same in all places of a column."""
    for row in rows:
        if any(row[place] != row[places[0]] for place in places):
            raise UserError(f"corpus: {file} has column {columns[places[0]]!r} twice, with different cells; rename one of them")
        yield row


def _separator(start: str) -> str | None:
    """Of a first line `sep=;`, as Excel writes and reads it."""
    line = io.StringIO(start, newline="").readline().strip("\r\n\"' ")
    return line[4] if line[:4].lower() == "sep=" and len(line) == 5 else None


def _delimiter(start: str, wanted: Sequence[str]) -> str:
    """By the header: what finds most of the wanted columns, then what makes most columns, then the comma."""

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in _header(start, delimiter)]
        return sum(name.strip() in names for name in wanted), len(names)

    return max(DELIMITERS, key=found)


def _header(start: str, delimiter: str) -> list[str]:
    """The first row, as far as it can be told from a file's first characters."""
    try:
        return next(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []
