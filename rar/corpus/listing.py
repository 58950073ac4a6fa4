"""Where images come from: one index row per image, then bytes on demand. Any fsspec location, five formats of images.

A sixth, `embeddings`, brings vectors instead (see vectors): its rows are listed here too, and read by `vectors.read_vectors`.

`list_images` runs once, on the driver; `read_many` runs on the workers, many images at a time. Between the two travels only the
INDEX table, so nothing but names is shipped. Names are gathered, sorted and labelled as Arrow columns: of a million files, no
more than a batch exists as Python objects. What was left out or decided on the way is told by `remarks`.

Choices, and what they cost:
- Every image gets a row, broken or not: a file that cannot be read or decoded becomes one row of errors/, never a missing one.
- A suffix tells a picture; a file without one is opened for its first bytes, one request each. Other suffixes are left out,
  and counted.
- A tar is indexed by its headers and then read by byte range: any worker reads any member without the ones before it. Costs one
  pass over the headers first (on object stores, over most of the tar); compressed tars have no ranges and are refused.
- A row of a parquet file is reached by decoding its row group up to that row: row groups of some hundred images are fast, a
  single huge one is slow.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rar import storage
from rar.columns import repeats
from rar.config import Corpus
from rar.corpus import decode, tables, tars, truth, vectors
from rar.corpus.jsonstream import items
from rar.schema import INDEX, RowError, Unavailable, UserError

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FORMAT_OF_SUFFIX = {
    ".csv": "manifest",
    ".tsv": "manifest",
    ".json": "coco",
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".npz": "embeddings",
    ".npy": "embeddings",
}
BATCH = 65_536  # index rows held as Python objects at a time
SNIFFED = 256  # files whose first bytes are asked for together
PARQUET_BATCH = 64  # encoded images of a row group held at a time
PARQUET_ROW = re.compile(r"(?P<file>.+)#(?P<row>\d+)(?::(?P<column>.+))?", re.DOTALL)
CONTAINER = re.compile(r"(.+?\.(?:tar|arrow))#", re.DOTALL)
REMARKS = b"rar.remarks"
ROWS = pa.schema(list(INDEX)[1:])  # INDEX without `row`

Remarks = list[str]  # what a lister has to tell, a line each


def list_images(corpus: Corpus) -> pa.Table:
    """Index every image of a corpus: schema.INDEX columns, row = 0..N-1, in an order that does not depend on the file system.

    Folders are sorted by name; manifests, COCO files, parquet files and tars keep their own order, several of them in natural
    order (`part_2` before `part_10`). A tar member's uri is `path/to.tar#member`, with the byte range of its content; a parquet
    row's is `file.parquet#ROW` (`file.parquet#ROW:column` where the bytes are in another column than `bytes`). A vector's is
    its id, or `file.npz#ROW`. Labels are stripped and in NFC.
    Raises UserError (nothing there, a missing column, an unreadable file), Unavailable (storage that does not answer).
    """
    listers = {"folder": _folder, "manifest": _manifest, "webdataset": _webdataset, "parquet": _parquet, "coco": _coco}
    listers["embeddings"] = _embeddings
    kind = format_of(corpus)
    told: Remarks = []
    parts = [ROWS.empty_table()]
    with storage.explained("corpus", corpus.uri):
        for part in listers[kind](corpus, told):
            parts.append(part)
            if corpus.limit and sum(map(len, parts)) >= corpus.limit:
                break
    table = pa.concat_tables(parts).slice(0, corpus.limit)
    if not table.num_rows:
        more = f" ({told[0]})" if told else ""
        raise UserError(f"corpus: no images in {corpus.uri}, read as {kind}{more}; check corpus.uri, or set corpus.format")
    return with_remarks(table.add_column(0, INDEX.field("row"), pa.array(range(table.num_rows), pa.int64())), told)


def with_remarks(index: pa.Table, told: Remarks) -> pa.Table:
    """An index with what there is to tell of it, a line each, and one more where pictures stand twice."""
    told = [tables.text(" ".join(line.split())) for line in told]  # names of files may hold anything
    again = len(repeats(index["uri"]))
    if again:
        told.append(f"{again:,} rows name a picture that an earlier row names too; each keeps its own label")
    return index.replace_schema_metadata({REMARKS: json.dumps(told)})


def remarks(index: pa.Table) -> list[str]:
    """What `list_images` has to tell of an index, a line each: files left out, labels not taken, names that repeat."""
    return json.loads((index.schema.metadata or {}).get(REMARKS, b"[]"))


def format_of(corpus: Corpus) -> str:
    """corpus.format, or what `auto` stands for: the suffix decides; for a folder, what lies in it; for parquet, its columns.

    Raises UserError where neither tells, and as `list_images` does.
    """
    if corpus.format != "auto":
        return corpus.format
    with storage.explained("corpus", corpus.uri):
        return _guess_format(corpus)


def read_many(uris: Sequence[str], offsets: Sequence[int | None], sizes: Sequence[int | None]) -> list[bytes | RowError]:
    """Read the encoded bytes of many index rows; one that cannot be read is a RowError at its position.

    Only storage that stays away is raised, as Unavailable: it says nothing of the picture.

    Whole files and byte ranges go to their file system in one call (concurrent on object stores); parquet rows are grouped by
    file and row group.
    """
    results: list[bytes | RowError] = [RowError("not read")] * len(uris)
    ranges: dict[fsspec.AbstractFileSystem, list[tuple[int, str]]] = defaultdict(list)
    rows: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, (uri, offset) in enumerate(zip(uris, offsets, strict=True)):
        found = PARQUET_ROW.fullmatch(uri) if offset is None and ".parquet#" in uri else None
        if found:
            rows[found["file"], found["column"] or tables.DEFAULT_BYTES_COLUMN][int(found["row"])].append(position)
            continue
        try:
            fs, path = storage.locate(uri if offset is None else _tar_of(uri))
        except Exception as error:  # an empty name, an unknown protocol, a client library that is not installed
            results[position] = _row_error(error)
        else:
            ranges[fs].append((position, path))
    for fs, places in ranges.items():
        for (position, _), blob in zip(places, _read_ranges(fs, places, offsets, sizes), strict=True):
            results[position] = blob
    for (file, column), positions in rows.items():
        for row, blob in _read_parquet_patiently(file, column, sorted(positions)).items():
            for position in positions[row]:
                results[position] = blob
    return results


def class_names(spec: str | list[str]) -> list[str]:
    """The vocabulary, in class_id order: a list, a .txt file (one name a line) or a .json file.

    JSON: a list of names, a list of categories, or a COCO/LVIS file with `categories`; categories are sorted by id.
    Raises UserError for a missing file, another layout, no name, an empty name, or duplicates (naming them).
    """
    names = [tables.label(name) or "" for name in (_read_names(spec) if isinstance(spec, str) else spec)]
    where = f"classes in {spec}" if isinstance(spec, str) else "classes"
    if not names:
        raise UserError(f"{where}: there are none; give at least one name")
    if "" in names:
        raise UserError(f"{where}: number {names.index('') + 1} is empty; every class needs a name")
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UserError(f"{where}: names must be unique, but these repeat: {', '.join(repeated[:5])}{more}")
    return names


# Listing: one generator of tables (schema ROWS) a format


def _guess_format(corpus: Corpus) -> str:
    if corpus.uri.endswith(COMPRESSED_TARS):
        return "webdataset"
    kind = FORMAT_OF_SUFFIX.get(storage.suffix(corpus.uri))
    if kind == "parquet":
        return _guess_parquet(corpus, storage.files(corpus.uri, ".parquet")[0])
    if kind:
        return kind
    fs, path = storage.locate(corpus.uri)
    place = storage.kind_of(fs, path)
    if not place:
        raise FileNotFoundError(2, "no such file", corpus.uri)
    if place != "directory":
        raise UserError(f"corpus: the name of {corpus.uri} does not tell its format; set corpus.format, or give a folder")
    suffixes: set[str] = set()
    for name in storage.walk(fs, path):
        suffix = storage.suffix(name)
        if suffix in decode.SUFFIXES:
            return "folder"
        suffixes.add(suffix)
    for suffix in (".tar", ".npz", ".npy"):
        if suffix in suffixes:
            return FORMAT_OF_SUFFIX[suffix]
    if ".parquet" in suffixes:
        return "embeddings" if vectors.has_vectors(corpus, storage.files(corpus.uri, ".parquet")[0]) else "parquet"
    if "" in suffixes:
        return "folder"
    found = f": its files are {', '.join(sorted(suffixes)[:5])}" if suffixes else ""
    raise UserError(f"corpus: no images, tars or parquet files in folder {corpus.uri}{found}; check corpus.uri")


def _guess_parquet(corpus: Corpus, file: str) -> str:
    """Images where there are bytes, else embeddings where there are vectors, else a manifest."""
    if tables.bytes_column(corpus, file):
        return "parquet"
    return "embeddings" if vectors.has_vectors(corpus, file) else "manifest"


def _folder(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    """Labels are the first sub-folder's name; images right in the folder have none."""
    fs, root = storage.locate(corpus.uri)
    if storage.kind_of(fs, root) != "directory":
        raise UserError(f"corpus: {corpus.uri} is not a folder; check corpus.uri")
    root = root.rstrip("/")
    found: list[pa.Array] = []
    left_out: Counter[str] = Counter()
    names = storage.walk(fs, root or "/")
    while batch := list(islice(names, BATCH)):
        suffixes = list(map(storage.suffix, batch))
        known = [name for name, suffix in zip(batch, suffixes, strict=True) if suffix in decode.SUFFIXES]
        bare = [name for name, suffix in zip(batch, suffixes, strict=True) if not suffix]
        pictures = known + _sniffed(fs, root, bare)
        found.append(pa.array(list(map(tables.text, pictures)), pa.string()))
        left_out.update(suffix for suffix in suffixes if suffix and suffix not in decode.SUFFIXES)
        left_out[""] += len(known) + len(bare) - len(pictures)
    if any(left_out.values()):
        told.append(
            f"{left_out.total():,} files are no pictures by their name or first bytes, and left out: {_by_suffix(left_out)}"
        )
    if found:
        relative = pa.chunked_array(found).combine_chunks()
        relative = relative.take(pc.sort_indices(relative))
        parts = pc.split_pattern(relative, "/", max_splits=1)
        label = pc.if_else(pc.greater(pc.list_value_length(parts), 1), pc.list_element(parts, 0), None)
        deep = relative.filter(pc.match_substring_regex(relative, "^[^/]+/[^/]+/[^/]+"))
        if len(deep):
            told.append(
                f"{len(deep):,} pictures lie deeper than a folder a class; the first folder is their label, e.g. of {deep[0]}; "
                "where the inner folders are the classes, give a table of uri and label instead"
            )
        start = storage.full_name(fs, f"{root}/")
        yield _rows(pc.binary_join_element_wise(start, relative, ""), tables.labels(pa.chunked_array([label])))


def _sniffed(fs: fsspec.AbstractFileSystem, root: str, names: Sequence[str]) -> list[str]:
    """Of files without a suffix, those that begin as a picture does; one that cannot be read is taken, to fail alone."""
    pictures = []
    for first in range(0, len(names), SNIFFED):
        some = names[first : first + SNIFFED]
        heads = fs.cat_ranges([f"{root}/{name}" for name in some], 0, decode.HEAD, on_error="return")
        pictures += [
            name
            for name, head in zip(some, heads, strict=True)
            if not isinstance(head, bytes) or decode.begins_as_picture(head)
        ]
    return pictures


def _by_suffix(counts: Counter[str]) -> str:
    named = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counts.most_common(5) if count]
    rest = counts.total() - sum(count for _, count in counts.most_common(5))
    return ", ".join([*named, f"{rest:,} others"] if rest else named)


def _manifest(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    """A row without a name stays a row: reading it fails by itself."""
    for file in storage.files(corpus.uri, *tables.SUFFIXES):
        names = tables.read_names(corpus, file)
        if names.uris is None:
            raise UserError(f"corpus: {file} has no column {corpus.uri_column!r}; set corpus.uri_column: {names.columns}")
        if names.labels is None:
            told.append(
                f"{file} has no column {corpus.label_column!r}, so no labels; corpus.label_column may be one of {names.columns}"
            )
        base = truth.folder_of(corpus, file)
        uris = pc.fill_null(names.uris, "")
        whole = pc.or_(pc.match_substring_regex(uris, "^(/|~/|$)"), pc.match_substring(uris, "://"))
        uris = pc.if_else(pc.match_substring(uris, "/"), uris, pc.replace_substring(uris, "\\", "/"))  # as truth.joined
        uris = pc.if_else(whole, uris, pc.binary_join_element_wise(truth.joined(base, "x")[:-1], uris, ""))
        yield _rows(uris, names.labels)


def _webdataset(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    if corpus.uri.endswith(COMPRESSED_TARS):
        raise UserError(f"corpus: {corpus.uri} is compressed, so members cannot be read by range; unpack it to a plain .tar")
    yield from tars.list_members(corpus, storage.files(corpus.uri, ".tar"), told)


def _parquet(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    for file in storage.files(corpus.uri, ".parquet"):
        column = tables.bytes_column(corpus, file)
        if column is None:
            raise UserError(f"corpus: {file} has no image bytes in column {corpus.bytes_column!r}; set corpus.bytes_column")
        with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
            labels, rows = tables.read_labels(corpus, parquet, file), parquet.metadata.num_rows
            columns = parquet.schema_arrow.names
        if labels is None:
            told.append(
                f"{file} has no column {corpus.label_column!r}, so no labels; corpus.label_column may be one of {columns}"
            )
        end = "" if column == tables.DEFAULT_BYTES_COLUMN else f":{column}"
        numbers = pa.array(range(rows), pa.int64()).cast(pa.string())
        yield _rows(pc.binary_join_element_wise(f"{file}#", numbers, end, ""), labels)


def _coco(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    """COCO, LVIS and V3Det ground truth: only its pictures are asked for here; names are as `detect` finds them."""
    for file in storage.files(corpus.uri, ".json"):
        yield _rows(pa.array(truth.uris(truth.read(file, boxes=False), truth.folder_of(corpus, file)), pa.string()), None)


def _embeddings(corpus: Corpus, told: Remarks) -> Iterator[pa.Table]:
    yield _rows(*vectors.list_rows(corpus))


def _rows(uris: pa.Array | pa.ChunkedArray, labels: pa.ChunkedArray | None) -> pa.Table:
    """Of whole files: without byte ranges."""
    none = pa.nulls(len(uris), pa.int64())
    return pa.table([uris, none, none, pa.nulls(len(uris), pa.string()) if labels is None else labels], schema=ROWS)


# Reading


def _tar_of(uri: str) -> str:
    """`a/b.tar#member` -> `a/b.tar`, and `a/b.arrow#ROW`; both the folder's and the member's name may hold another #."""
    found = CONTAINER.match(uri)
    return found[1] if found else uri.partition("#")[0]


def _read_ranges(
    fs: fsspec.AbstractFileSystem,
    places: Sequence[tuple[int, str]],
    offsets: Sequence[int | None],
    sizes: Sequence[int | None],
) -> Iterator[bytes | RowError]:
    """One result a place (position in offsets and sizes, path). Without an offset, the whole file.

    Raises Unavailable where storage stays away.
    """
    starts = [offsets[position] for position, _ in places]
    lengths = [None if start is None else sizes[position] for start, (position, _) in zip(starts, places, strict=True)]
    ends = [None if start is None or length is None else start + length for start, length in zip(starts, lengths, strict=True)]
    blobs: list[Any] = [None] * len(places)
    lacking = list(range(len(places)))

    def ask() -> None:
        """For what is lacking; raises what kept storage from answering for any of them."""
        parts = [[values[one] for one in lacking] for values in ([path for _, path in places], starts, ends)]
        try:
            found = fs.cat_ranges(*parts, on_error="return")
        except Exception as error:  # the whole call failed: no credentials, no such bucket, no network
            found = [error] * len(lacking)
        for one, blob in zip(lacking, found, strict=True):
            blobs[one] = blob
        lacking[:] = [one for one in lacking if isinstance(blobs[one], BaseException) and storage.is_away(fs, blobs[one])]
        if lacking:
            raise blobs[lacking[0]]

    storage.patiently(fs, storage.full_name(fs, places[0][1]), ask)
    for blob, length in zip(blobs, lengths, strict=True):
        if isinstance(blob, BaseException):
            yield _row_error(blob)
        elif length is not None and len(blob) != length:
            yield RowError(f"cut short: {len(blob)} of {length} bytes; the file changed after it was indexed")
        else:
            yield blob


def _read_parquet_patiently(file: str, column: str, rows: Sequence[int]) -> dict[int, bytes | RowError]:
    try:
        fs, _ = storage.locate(file)
    except Exception as error:  # an unknown protocol, a client library that is not installed
        return dict.fromkeys(rows, _row_error(error))
    return storage.patiently(fs, file, partial(_read_parquet, fs, file, column, rows))


def _read_parquet(fs: fsspec.AbstractFileSystem, file: str, column: str, rows: Sequence[int]) -> dict[int, bytes | RowError]:
    """One result a row number (ascending); a broken row group does not take the others along. Raises what `is_away` knows."""
    results: dict[int, bytes | RowError] = dict.fromkeys(rows, RowError("no such row: the file changed after it was indexed"))
    try:
        with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < end]
                try:
                    results.update(_read_row_group(parquet, group, column, start, wanted, file.rpartition("/")[0]))
                except Exception as error:
                    if storage.is_away(fs, error):
                        raise
                    results.update(dict.fromkeys(wanted, _row_error(error)))
                start = end
    except Exception as error:  # the file is gone or no parquet any more
        if storage.is_away(fs, error):
            raise
        return dict.fromkeys(rows, _row_error(error))
    return results


def _read_row_group(
    parquet: pq.ParquetFile, group: int, column: str, start: int, rows: Sequence[int], folder: str
) -> Iterator[tuple[int, bytes | RowError]]:
    """(row, bytes) of the wanted rows; `start` is the group's first row. Stops decoding after the last of them."""
    batches = parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=[column]) if rows else iter(())
    for batch in batches:
        for row in rows:
            if start <= row < start + batch.num_rows:
                yield row, _image_bytes(batch[column][row - start].as_py(), folder)
        start += batch.num_rows
        if start > rows[-1]:
            break


def _image_bytes(value: Any, folder: str) -> bytes | RowError:
    """A cell: bytes, or Hugging Face's struct, whose bytes may be null where its path names a file beside the table."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None or not path:
        return RowError("null instead of image bytes") if data is None else data
    try:
        fs, place = storage.locate(truth.joined(folder, path))
        return storage.patiently(fs, path, partial(fs.cat_file, place))
    except Unavailable:
        raise
    except Exception as error:  # as any file that cannot be read
        return _row_error(error)


def _row_error(error: BaseException) -> RowError:
    if isinstance(error, FileNotFoundError):
        return RowError("file not found")
    return RowError(f"cannot read: {type(error).__name__}: {' '.join(str(error).split())}")


def _read_names(spec: str) -> list[str]:
    if storage.suffix(spec) not in (".txt", ".json"):
        raise UserError(f"classes: {spec} is neither a .txt nor a .json file; give one of these, or a list of names")
    if storage.suffix(spec) == ".json":
        return _names_in_json(spec)
    with storage.explained("classes", spec):
        with storage.open_file(spec) as stream:
            data = stream.read()
        return [line for line in re.split(r"\r\n?|\n", data.decode(tables.encoding_of(data))) if line.strip()]


def _names_in_json(spec: str) -> list[str]:
    entries = [value for key, number, value in items(spec, "classes") if number is not None and key in ("", "categories")]
    if entries and all(isinstance(entry, str) for entry in entries):
        return entries
    try:
        if not entries:
            raise KeyError("categories")
        ordered = sorted(entries, key=lambda entry: truth.id_order(entry["id"]))
        return ["" if entry["name"] is None else str(entry["name"]) for entry in ordered]
    except (KeyError, TypeError):
        raise UserError(f"classes: {spec} must hold a list of names, or categories with 'id' and 'name'") from None
