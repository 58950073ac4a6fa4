"""WebDataset tars: their members as index rows, and each picture's class from the members beside it.

Members with one key are a sample: the key is the name up to a dot, the longest one that some label has (`img.v1.jpg` goes with
`img.v1.cls`, else with `img.cls`). Where a name is there several times, the k-th picture goes with the k-th label of its name.

Which member is the label: `corpus.label_key` where it is set (a member's suffix, or a field of the sample's .json). Else
`.cls`, then the fields LABEL_FIELDS of the .json, then `.txt` where the texts look like classes and not like captions: no .json
of the sample calls it a caption, it is one short line, and either of at most PLAIN_WORDS words or said of two samples or more
on average. That is decided once, on the first tar with such texts, and told. Numbers get names from a file CLASS_FILES beside
the tars or one folder up, as CLIP benchmarks store them.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from rar import storage
from rar.config import Corpus
from rar.corpus import decode, tables
from rar.schema import INDEX, UserError

ROWS = pa.schema(list(INDEX)[1:])  # INDEX without `row`
LABEL_FIELDS = ("class_name", "label", "class", "category")
CAPTION_FIELDS = ("caption", "text", "TEXT", "prompt")
CLASS_FILES = ("classnames.txt", "classes.txt")
PLAIN_WORDS, LONGEST = 3, 80  # of a .txt that may be a class: words without being repeated, characters in any case
LARGEST_LABEL = 1 << 20  # bytes of a member that is read for a label
AT_ONCE = 16  # tars whose headers are read: what an object store takes to answer is waited for once
SIDECARS = (".cls", ".txt", ".json")


@dataclass
class Members:
    """One tar. pictures: (name, offset, size) in its order. texts: a sidecar's name -> its contents, in order."""

    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    others: Counter[str] = field(default_factory=Counter)


def list_members(corpus: Corpus, files: Sequence[str], told: list[str]) -> Iterator[pa.Table]:
    """One table (INDEX without `row`) a tar. told: gets a line on where labels came from, one on members left out."""
    asked = (corpus.label_key or "").lstrip(".")
    texts_are_classes: bool | None = None
    sources: Counter[str] = Counter()
    others: Counter[str] = Counter()
    names = _class_file(files[0])
    for file, members in _read_ahead(files, (*SIDECARS, f".{asked}") if asked else SIDECARS):
        if texts_are_classes is None and not asked:
            texts_are_classes = _look_like_classes(members)
        labels = []
        for source, label in _labels_of(members, asked, bool(texts_are_classes)):
            sources[source] += 1
            labels.append(label)
        others += members.others
        uris = pa.array(
            [f"{file}#{name}".encode(errors="backslashreplace").decode() for name, _, _ in members.pictures], pa.string()
        )
        places = [pa.array([one[column] for one in members.pictures], pa.int64()) for column in (1, 2)]
        column = tables.labels(pa.chunked_array([pa.array(labels, pa.string())]))
        yield pa.table([uris, *places, names.of(column) if names else column], schema=ROWS)
    _tell(told, asked, sources, texts_are_classes, others, names)


def _read_ahead(files: Sequence[str], sidecars: Sequence[str]) -> Iterator[tuple[str, Members]]:
    """Tars and their members, in their order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for start in range(0, len(files), AT_ONCE):
            some = files[start : start + AT_ONCE]
            yield from zip(some, pool.map(partial(read_members, sidecars=sidecars), some), strict=True)


def read_members(file: str, sidecars: Sequence[str] = SIDECARS) -> Members:
    """Index a tar by its headers. Links come as pictures too: a hard link with the bytes of what it names, a symbolic one
    empty, to fail as one row. Raises UserError for a tar that is damaged, cut or compressed.
    """
    found = Members()
    places: dict[str, tuple[int, int]] = {}
    try:
        with storage.open_file(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                if member.isdir() or storage.hidden(member.name):
                    continue
                suffix = storage.suffix(member.name)
                own = (member.offset_data, 0 if member.issym() else member.size)
                places[member.name] = places.get(member.linkname, (0, 0)) if member.islnk() else own
                offset, size = places[member.name]
                if suffix in decode.SUFFIXES or (
                    not suffix and decode.begins_as_picture(_at(stream, offset, min(size, decode.HEAD)))
                ):
                    found.pictures.append((member.name, offset, size))
                elif suffix in sidecars and size <= LARGEST_LABEL:
                    name = member.name[: len(member.name) - len(suffix)] + suffix  # A.CLS is a label, too
                    found.texts[name].append(_at(stream, offset, size).decode("utf-8-sig", errors="replace").strip())
                elif suffix not in SIDECARS:
                    found.others[suffix] += 1
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, OverflowError) as error:
        raise UserError(f"corpus: {file} is not a whole, plain tar ({error}); copy it again or take it out") from None
    return found


def _at(stream: Any, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def _labels_of(members: Members, asked: str, texts_are_classes: bool) -> Iterator[tuple[str, str | None]]:
    """(where it came from, label) of each picture."""
    seen: Counter[str] = Counter()
    for name, _, _ in members.pictures:
        copy, found = seen[name], None
        seen[name] += 1
        for source in [asked] if asked else [".cls", ".json", ".txt"] if texts_are_classes else [".cls", ".json"]:
            found = _label(members, name, copy, source)
            if found is not None:
                break
        yield (source if found is not None else "", found)


def _label(members: Members, picture: str, copy: int, source: str) -> str | None:
    """From a sidecar (`.cls`, `.txt`, `.json`), or from what corpus.label_key names: either."""
    if source == ".json":
        return _field(_beside(members, picture, copy, ".json"), LABEL_FIELDS)
    if source.startswith("."):
        return _beside(members, picture, copy, source)
    text = _beside(members, picture, copy, f".{source}")
    return text if text is not None else _field(_beside(members, picture, copy, ".json"), (source,))


def _beside(members: Members, picture: str, copy: int, suffix: str) -> str | None:
    """The text of a sample's member; of several under one name, that of the picture's own copy."""
    folder, slash, key = picture.rpartition("/")
    key = key.rpartition(".")[0] or key
    while key:
        texts = members.texts.get(f"{folder}{slash}{key}{suffix}")
        if texts:
            return (texts[0] if len(texts) == 1 else texts[copy] if copy < len(texts) else None) or None
        key = key.rpartition(".")[0]
    return None


def _field(text: str | None, fields: Sequence[str]) -> str | None:
    try:
        data = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    return next(
        (found for name in fields if isinstance(data.get(name), str | int) and (found := tables.label(data[name]))), None
    )


def _look_like_classes(members: Members) -> bool | None:
    """Whether the .txt members of a tar are classes rather than captions; None where there are none beside pictures."""
    texts = []
    for name, _, _ in members.pictures:
        text = _beside(members, name, 0, ".txt")
        if text and _beside(members, name, 0, ".cls") is None:
            texts.append(text)
            if _field(_beside(members, name, 0, ".json"), CAPTION_FIELDS) is not None:
                return False
    if not texts:
        return None
    if any("\n" in text or len(text) > LONGEST for text in texts):
        return False
    return all(len(text.split()) <= PLAIN_WORDS for text in texts) or 2 * len(set(texts)) <= len(texts)


@dataclass(frozen=True)
class ClassFile:
    """Names of class numbers, in their order."""

    file: str
    names: list[str]

    def of(self, labels: pa.ChunkedArray) -> pa.ChunkedArray:
        """Numbers below the number of names become names; a column of anything else stays as it is."""
        distinct = labels.drop_null().unique().to_pylist()
        if not all(label.isascii() and label.isdigit() and int(label) < len(self.names) for label in distinct):
            return labels
        numbers = pa.array([None if label is None else int(label) for label in labels.to_pylist()], pa.int64())
        return tables.labels(pa.chunked_array([numbers]), self.names)


def _class_file(file: str) -> ClassFile | None:
    folder = file.rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]):
        for name in CLASS_FILES:
            found = f"{place}/{name}"
            if place and storage.kind_of(*storage.locate(found)) == "file":
                with storage.open_file(found) as stream:
                    data = stream.read()
                return ClassFile(found, data.decode(tables.encoding_of(data)).strip().splitlines())
    return None


def _tell(
    told: list[str], asked: str, sources: Counter[str], texts: bool | None, others: Counter[str], names: ClassFile | None
) -> None:
    if others:
        kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common(5))
        told.append(f"{others.total():,} members of the tars are no pictures, and left out: {kinds}")
    missing = sources.pop("", 0)
    if sources:
        taken = ", ".join(f"{count:,} from {source}" for source, count in sources.most_common())
        told.append(f"labels: {taken}" + (f"; {missing:,} pictures have none" if missing else ""))
        if names:
            told.append(f"numbers among them are named by {names.file}")
    elif missing:
        hint = f"no sample has {asked!r}" if asked else "no .cls, and no class in a .json"
        told.append(f"labels: none ({hint}); corpus.label_key names another member or field")
    if texts is False:
        told.append("the .txt members look like captions and are not taken for labels; corpus.label_key: txt takes them")
