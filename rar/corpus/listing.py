"""Where images come from: one index row per image, then bytes on demand. Any fsspec location, five formats of images.

A sixth, `embeddings`, brings vectors instead (see vectors): its rows are listed here too, and read by `vectors.read_vectors`.

`list_images` runs once, on the driver; `read_many` runs on the workers, many images at a time. Between the two travels only the
INDEX table, so nothing but names is shipped.

Choices, and what they cost:
- Every image gets a row, broken or not: a file that cannot be read or decoded becomes one row of errors/, never a missing one.
- A tar is indexed by its headers and then read by byte range: any worker reads any member without the ones before it. Costs one
  pass over the headers first (on object stores, over most of the tar); compressed tars have no ranges and are refused.
- A row of a parquet file is reached by decoding its row group up to that row: row groups of some hundred images are fast, a
  single huge one is slow.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rar import storage
from rar.config import Corpus
from rar.corpus import tables, vectors
from rar.schema import INDEX, RowError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FORMAT_OF_SUFFIX = {
    ".csv": "manifest",
    ".json": "coco",
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".npz": "embeddings",
    ".npy": "embeddings",
}
LABEL_SUFFIXES = (".cls", ".txt")  # a WebDataset sample's class, in order of preference
DEFAULT_BYTES_COLUMN: str = Corpus.model_fields["bytes_column"].default
INDEX_BATCH = 65_536  # index rows held as Python objects at a time
PARQUET_BATCH = 64  # encoded images of a row group held at a time
PARQUET_ROW = re.compile(r"(?P<file>.+)#(?P<row>\d+)(?::(?P<column>.+))?", re.DOTALL)

Entry = tuple[str, int | None, int | None, str | None]  # uri, offset, size, label


def list_images(corpus: Corpus) -> pa.Table:
    """Index every image of a corpus: schema.INDEX columns, row = 0..N-1, in an order that does not depend on the file system.

    Folders are sorted by name; manifests, COCO files, parquet files and tars keep their own order, several of them sorted by
    name. A tar member's uri is `path/to.tar#member`, with the byte range of its content; a parquet row's is `file.parquet#ROW`
    (`file.parquet#ROW:column` where the bytes are in another column than `bytes`). A vector's is its id, or `file.npz#ROW`.
    Raises UserError (nothing there, a missing column, an unreadable file), Unavailable (storage that does not answer).
    """
    listers = {"folder": _folder, "manifest": _manifest, "webdataset": _webdataset, "parquet": _parquet, "coco": _coco}
    listers["embeddings"] = _embeddings
    kind = format_of(corpus)
    with storage.explained("corpus", corpus.uri):
        table = _table(islice(listers[kind](corpus), corpus.limit))
    if not table.num_rows:
        raise UserError(f"corpus: no images in {corpus.uri}, read as {kind}; check corpus.uri, or set corpus.format")
    return table


def format_of(corpus: Corpus) -> str:
    """corpus.format, or what `auto` stands for: the suffix decides; for a folder, what lies in it; for parquet, its columns.

    Raises UserError where neither tells, and as `list_images` does.
    """
    if corpus.format != "auto":
        return corpus.format
    with storage.explained("corpus", corpus.uri):
        return _guess_format(corpus)


def read_many(uris: Sequence[str], offsets: Sequence[int | None], sizes: Sequence[int | None]) -> list[bytes | RowError]:
    """Read the encoded bytes of many index rows; one that cannot be read is a RowError at its position, and none is raised.

    Whole files and byte ranges go to their file system in one call (concurrent on object stores); parquet rows are grouped by
    file and row group.
    """
    results: list[bytes | RowError] = [RowError("not read")] * len(uris)
    ranges: dict[fsspec.AbstractFileSystem, list[tuple[int, str]]] = defaultdict(list)
    rows: dict[tuple[str, str], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for position, (uri, offset) in enumerate(zip(uris, offsets, strict=True)):
        found = PARQUET_ROW.fullmatch(uri) if offset is None and ".parquet#" in uri else None
        if found:
            rows[found["file"], found["column"] or DEFAULT_BYTES_COLUMN][int(found["row"])].append(position)
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
        for row, blob in _read_parquet(file, column, sorted(positions)).items():
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


# Listing: one generator of entries a format


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
    suffixes = {storage.suffix(name) for name in storage.walk(fs, path)}
    if suffixes.intersection(IMAGE_SUFFIXES):
        return "folder"
    for suffix in (".tar", ".npz", ".npy"):
        if suffix in suffixes:
            return FORMAT_OF_SUFFIX[suffix]
    if ".parquet" in suffixes:
        return "embeddings" if vectors.has_vectors(corpus, storage.files(corpus.uri, ".parquet")[0]) else "parquet"
    raise UserError(f"corpus: no images, tars or parquet files in folder {corpus.uri}; check corpus.uri")


def _guess_parquet(corpus: Corpus, file: str) -> str:
    """Images where there are bytes, else embeddings where there are vectors, else a manifest."""
    if tables.has_bytes(corpus, file):
        return "parquet"
    return "embeddings" if vectors.has_vectors(corpus, file) else "manifest"


def _folder(corpus: Corpus) -> Iterator[Entry]:
    """Labels are the first sub-folder's name; images right in the folder have none."""
    fs, root = storage.locate(corpus.uri)
    _require_folder(corpus.uri, "corpus.uri")
    for name in sorted(name for name in storage.walk(fs, root) if storage.suffix(name) in IMAGE_SUFFIXES):
        label, slash, _ = name.partition("/")
        yield storage.full_name(fs, f"{root.rstrip('/')}/{name}"), None, None, label if slash else None


def _manifest(corpus: Corpus) -> Iterator[Entry]:
    """A row without a name stays a row: reading it fails by itself."""
    for file in storage.files(corpus.uri, ".csv", ".parquet"):
        table, columns = tables.read_manifest(corpus, file)
        if corpus.uri_column not in columns:
            raise UserError(f"corpus: {file} has no column {corpus.uri_column!r}; set corpus.uri_column: {columns}")
        label_column = tables.label_column(corpus, columns, file)
        base = _base(corpus, file)
        uris = table[corpus.uri_column].to_pylist()
        labels = table[label_column].to_pylist() if label_column else [None] * len(uris)
        for uri, label in zip(uris, labels, strict=True):
            yield _join(base, str(uri or "")), None, None, tables.label(label)


def _webdataset(corpus: Corpus) -> Iterator[Entry]:
    if corpus.uri.endswith(COMPRESSED_TARS):
        raise UserError(f"corpus: {corpus.uri} is compressed, so members cannot be read by range; unpack it to a plain .tar")
    for file in storage.files(corpus.uri, ".tar"):
        yield from _tar_entries(file)


def _parquet(corpus: Corpus) -> Iterator[Entry]:
    column = "" if corpus.bytes_column == DEFAULT_BYTES_COLUMN else f":{corpus.bytes_column}"
    for file in storage.files(corpus.uri, ".parquet"):
        if not tables.has_bytes(corpus, file):
            raise UserError(f"corpus: {file} has no image bytes in column {corpus.bytes_column!r}; set corpus.bytes_column")
        with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
            label_column = tables.label_column(corpus, parquet.schema_arrow.names, file)
            labels = parquet.read([label_column])[0].to_pylist() if label_column else [None] * parquet.metadata.num_rows
        for row, label in enumerate(labels):
            yield f"{file}#{row}{column}", None, None, tables.label(label)


def _coco(corpus: Corpus) -> Iterator[Entry]:
    """COCO and LVIS ground truth: only `images` is read here. LVIS names its files by `coco_url` alone."""
    for file in storage.files(corpus.uri, ".json"):
        with storage.open_file(file) as stream:
            data = json.load(stream)
        images = data.get("images") if isinstance(data, dict) else None
        if not isinstance(images, list):
            raise UserError(f"corpus: {file} has no list 'images'; give a COCO or LVIS file, or set corpus.format")
        base = _base(corpus, file)
        for number, image in enumerate(images):
            try:
                name = image.get("file_name") or image["coco_url"].rpartition("/")[2]
            except (AttributeError, KeyError):
                raise UserError(f"corpus: {file}: images[{number}] has neither file_name nor coco_url; add one") from None
            yield _join(base, name), None, None, None


def _embeddings(corpus: Corpus) -> Iterator[Entry]:
    for uri, label in vectors.list_rows(corpus):
        yield uri, None, None, label


def _table(entries: Iterator[Entry]) -> pa.Table:
    """Entries -> INDEX columns, a batch at a time: a long index never exists as Python objects."""
    batches: list[pa.RecordBatch] = []
    start = 0
    while chunk := list(islice(entries, INDEX_BATCH)):
        uris, offsets, sizes, labels = zip(*chunk, strict=True)
        rows = range(start, start + len(chunk))
        columns = [rows, map(_text, uris), offsets, sizes, map(tables.label, map(_text, labels))]
        arrays = [pa.array(list(column), field.type) for column, field in zip(columns, INDEX, strict=True)]
        batches.append(pa.record_batch(arrays, schema=INDEX))
        start += len(chunk)
    return pa.Table.from_batches(batches, schema=INDEX)


def _base(corpus: Corpus, file: str) -> str:
    """The folder that relative names of a manifest or COCO file start from."""
    if corpus.images is None:
        return file.rpartition("/")[0]
    _require_folder(corpus.images, "corpus.images")
    return storage.full_name(*storage.locate(corpus.images))


def _require_folder(uri: str, key: str) -> None:
    if storage.kind_of(*storage.locate(uri)) != "directory":
        raise UserError(f"corpus: {uri} is not a folder; check {key}")


def _join(base: str, name: str) -> str:
    if not name or name.startswith("/") or "://" in name:
        return name
    return f"{base}{name}" if base.endswith("/") else f"{base}/{name}"


def _text(name: str | None) -> str | None:
    """Arrow text is UTF-8. A file name that is not keeps its row: escaped, so that it fails to be read, alone."""
    return None if name is None else name.encode(errors="backslashreplace").decode()


# Containers


def _tar_entries(file: str) -> list[Entry]:
    """Members of one tar, in its order. A sample is what shares a key: WebDataset's rule, the name up to its first dot.

    Links come as entries too: a hard link with the bytes of what it names, a symbolic one empty, to fail as one row.
    """
    places: dict[str, tuple[int, int]] = {}
    images: list[tuple[str, tuple[int, int]]] = []
    labels: dict[str, str] = {}
    try:
        with storage.open_file(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isdir() or storage.hidden(member.name):
                    continue
                own = (member.offset_data, 0 if member.issym() else member.size)
                places[member.name] = places.get(member.linkname, (0, 0)) if member.islnk() else own
                if storage.suffix(member.name) in IMAGE_SUFFIXES:
                    images.append((member.name, places[member.name]))
                elif member.name.endswith(LABEL_SUFFIXES) and (content := tar.extractfile(member)):
                    labels[member.name] = content.read().decode(errors="replace").strip()
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("damaged header")
    except tarfile.TarError as error:
        raise UserError(f"corpus: {file} is not a whole, plain tar ({error}); copy it again or take it out") from None
    return [(f"{file}#{name}", offset, size, _tar_label(name, labels)) for name, (offset, size) in images]


def _tar_label(image: str, labels: dict[str, str]) -> str | None:
    folder, slash, last = image.rpartition("/")
    key = f"{folder}{slash}{last.partition('.')[0]}"
    return next((text for suffix in LABEL_SUFFIXES if (text := labels.get(key + suffix))), None)


def _tar_of(uri: str) -> str:
    """`a/b.tar#member` -> `a/b.tar`; both the folder's and the member's name may hold another #."""
    head, mark, _ = uri.partition(".tar#")
    return f"{head}.tar" if mark else uri.partition("#")[0]


# Reading


def _read_ranges(
    fs: fsspec.AbstractFileSystem,
    places: Sequence[tuple[int, str]],
    offsets: Sequence[int | None],
    sizes: Sequence[int | None],
) -> Iterator[bytes | RowError]:
    """One result a place (position in offsets and sizes, path). Without an offset, the whole file."""
    starts = [offsets[position] for position, _ in places]
    lengths = [None if start is None else sizes[position] for start, (position, _) in zip(starts, places, strict=True)]
    ends = [None if start is None or length is None else start + length for start, length in zip(starts, lengths, strict=True)]
    try:
        blobs = fs.cat_ranges([path for _, path in places], starts, ends, on_error="return")
    except Exception as error:  # the whole call failed: no credentials, no such bucket, no network
        blobs = [error] * len(places)
    for blob, length in zip(blobs, lengths, strict=True):
        if isinstance(blob, BaseException):
            yield _row_error(blob)
        elif length is not None and len(blob) != length:
            yield RowError(f"cut short: {len(blob)} of {length} bytes; the file changed after it was indexed")
        else:
            yield blob


def _read_parquet(file: str, column: str, rows: Sequence[int]) -> dict[int, bytes | RowError]:
    """One result a row number (ascending); a broken row group does not take the others along."""
    results: dict[int, bytes | RowError] = dict.fromkeys(rows, RowError("no such row: the file changed after it was indexed"))
    try:
        with storage.open_file(file) as stream, pq.ParquetFile(stream) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                wanted = [row for row in rows if start <= row < end]
                try:
                    results.update(_read_row_group(parquet, group, column, start, wanted))
                except Exception as error:
                    results.update(dict.fromkeys(wanted, _row_error(error)))
                start = end
    except Exception as error:  # the file is gone or no parquet any more
        return dict.fromkeys(rows, _row_error(error))
    return results


def _read_row_group(
    parquet: pq.ParquetFile, group: int, column: str, start: int, rows: Sequence[int]
) -> Iterator[tuple[int, bytes | RowError]]:
    """(row, bytes) of the wanted rows; `start` is the group's first row. Stops decoding after the last of them."""
    batches = parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=[column]) if rows else iter(())
    for batch in batches:
        for row in rows:
            if start <= row < start + batch.num_rows:
                value = batch[column][row - start].as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                yield row, RowError("null instead of image bytes") if data is None else data
        start += batch.num_rows
        if start > rows[-1]:
            break


def _row_error(error: BaseException) -> RowError:
    if isinstance(error, FileNotFoundError):
        return RowError("file not found")
    return RowError(f"cannot read: {type(error).__name__}: {' '.join(str(error).split())}")


def _read_names(spec: str) -> list[str]:
    if storage.suffix(spec) not in (".txt", ".json"):
        raise UserError(f"classes: {spec} is neither a .txt nor a .json file; give one of these, or a list of names")
    with storage.explained("classes", spec):
        with storage.open_file(spec) as stream:
            text = stream.read().decode("utf-8-sig")
        if storage.suffix(spec) == ".json":
            return _names_in_json(json.loads(text), spec)
        return [line for line in text.split("\n") if line.strip()]


def _names_in_json(data: Any, spec: str) -> list[str]:
    entries: Any = data.get("categories") if isinstance(data, dict) else data
    if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
        return entries
    try:
        return [str(entry["name"]) for entry in sorted(entries, key=lambda entry: entry["id"])]
    except (KeyError, TypeError):
        raise UserError(f"classes: {spec} must hold a list of names, or categories with 'id' and 'name'") from None
