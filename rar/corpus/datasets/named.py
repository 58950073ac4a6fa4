"""Any corpus as an index and a vocabulary: a data set by name through the reader of its family, anything else as listed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from rar import storage
from rar.config import Corpus
from rar.corpus import listing
from rar.corpus.datasets import clip_benchmark, coop, finegrained, huggingface, imagenet
from rar.corpus.datasets.known import Known, Listed, Place, known
from rar.schema import UserError

WEBDATASET = "wds_"
HUGGING_FACE = "huggingface"
READERS: dict[str, Callable[[Place], Listed]] = {
    "coop": coop.read_split,
    "aircraft": coop.read_aircraft,
    "imagenet": imagenet.read_folders,
    "cub": finegrained.read_cub,
    "dogs": finegrained.read_dogs,
    "flowers": finegrained.read_flowers,
    "pets": finegrained.read_pets,
    "raf_db": finegrained.read_raf_db,
}


def read(corpus: Corpus) -> Listed:
    """The pictures of a corpus and their vocabulary: of a data set by name, its classes (or a half of them) in its own order.

    Of a corpus that is no data set by name, the vocabulary is its distinct labels, sorted. Rows come in the order of the data
    set's own files. Raises UserError with one line that names what is missing and where people get it.
    """
    if corpus.dataset is None:
        index = listing.list_images(corpus)
        return Listed(index, sorted(index["label"].drop_null().unique().to_pylist()), [])
    if corpus.dataset.startswith(WEBDATASET):
        name = corpus.dataset.replace("/", "-")
        found = clip_benchmark.read(name, _below(corpus.root, name), corpus.split)
    elif corpus.dataset == HUGGING_FACE:
        found = huggingface.read(corpus, corpus.root)
    else:
        place = place_of(corpus)
        if fault := place.missing():
            raise UserError(fault)
        found = _boxes(corpus, place) if place.known.family == "boxes" else READERS[place.known.family](place)
    found = _half(found, corpus.classes)
    index = found.index.slice(0, corpus.limit)
    return found._replace(index=index.set_column(0, "row", pa.array(range(index.num_rows), pa.int64())))


def as_file(corpus: Corpus) -> Corpus:
    """A data set of boxes by name as the corpus of its JSON; any other corpus as it is. Raises UserError for a missing file."""
    if (one := known().get(corpus.dataset or "")) is None or one.family != "boxes":
        return corpus
    place = place_of(corpus)
    if fault := place.missing():
        raise UserError(fault)
    images = place.folder if place.pictures == "." else f"{place.folder}/{place.pictures}"
    return Corpus(uri=f"{place.folder}/{place.labels}", images=images, format="coco", limit=corpus.limit)


def place_of(corpus: Corpus) -> Place:
    """Where a known data set lies. Raises UserError for an unknown name or split, with what there is."""
    name, table = corpus.dataset or "", known()
    if name not in table:
        nearest = difflib.get_close_matches(name, [*table, HUGGING_FACE], n=1, cutoff=0.0)[0]
        raise UserError(f"corpus.dataset: no data set is called {name!r}; did you mean {nearest!r}? `rar data` lists them")
    one = table[name]
    if corpus.split not in one.splits:
        raise UserError(f"corpus.split: {name} has no split {corpus.split!r}; it has {', '.join(one.splits)}")
    return Place(name, one, _below(corpus.root, one.folder), corpus.split)


def _below(root: str, folder: str) -> str:
    """root/folder; or the root, where that is the data set's folder itself. Raises UserError for a root that is not there."""
    fs, path = storage.locate(root)
    if storage.kind_of(fs, path) != "directory":
        raise UserError(f"corpus.root: {root} is no folder; name the one that the data sets lie in")
    root = storage.full_name(fs, path).rstrip("/")
    itself = root.rpartition("/")[2] == folder and storage.kind_of(*storage.locate(f"{root}/{folder}")) != "directory"
    return root if itself else f"{root}/{folder}"


def _boxes(corpus: Corpus, place: Place) -> Listed:
    file = as_file(corpus)
    return Listed(listing.list_images(file), listing.class_names(file.uri), place.known.templates)


def _half(found: Listed, which: str) -> Listed:
    """The classes that base-to-novel work trains on (the first half, rounded up) or tests on (the rest), and their pictures."""
    if which == "all":
        return found
    middle = math.ceil(len(found.classes) / 2)
    classes = found.classes[:middle] if which == "base" else found.classes[middle:]
    return found._replace(
        index=found.index.filter(pc.is_in(found.index["label"], pa.array(classes, pa.string()))), classes=classes
    )


class Checked(NamedTuple):
    """One split: what is there against what was published (None: nothing was). fault: one line, or None where all is well."""

    split: str
    pictures: int
    published: int | None
    absent: int
    classes: int
    published_classes: int | None
    fault: str | None


def check(name: str, root: str, split: str | None = None) -> list[Checked]:
    """Read a data set's splits (or one) and compare. Raises UserError for a name or split that is not known."""
    if name in known():
        splits = [split] if split is not None else list(known()[name].splits)
        place_of(Corpus(dataset=name, root=root, split=splits[0]))
        return [_check(name, root, one, known()[name]) for one in splits]
    if not name.startswith(WEBDATASET) and name != HUGGING_FACE:
        place_of(Corpus(dataset=name, root=root, split=split or "test"))  # raises: the name is unknown
    return [_check(name, root, one, None) for one in ([split] if split is not None else _splits_there(name, root))]


def _splits_there(name: str, root: str) -> list[str]:
    """Of a folder that names its own splits: those of the usual ones that it has; test, where it has none."""
    folder = root if name == HUGGING_FACE else _below(root, name)
    fs, path = storage.locate(folder)
    names = list(storage.walk(fs, path)) if storage.kind_of(fs, path) == "directory" else []
    found = [
        one
        for one in ("train", "validation", "val", "test")
        if any(one in part.split("/")[:-1] or f"{one}-" in part for part in names)
    ]
    return found or ["test"]


def _check(name: str, root: str, split: str, one: Known | None) -> Checked:
    published, classes = (one.splits[split], one.classes) if one else (None, None)
    try:
        found = read(Corpus(dataset=name, root=root, split=split))
    except UserError as error:
        return Checked(split, 0, published, 0, 0, classes, str(error))
    absent = _absent(found.index)
    count = found.index.num_rows
    fault = None
    if absent:
        fault = (
            f"{name}: {len(absent):,} of the {count:,} pictures of {split} are missing, the first is {absent[0]}{_where(one)}"
        )
    elif published is not None and count != published:
        fault = f"{name}: split {split} has {count:,} pictures, {published:,} were published{_where(one)}"
    elif classes is not None and len(found.classes) != classes:
        fault = f"{name}: split {split} has {len(found.classes):,} classes, {classes:,} were published{_where(one)}"
    return Checked(split, count, published, len(absent), len(found.classes), classes, fault)


def _where(one: Known | None) -> str:
    return f"; get them from {list(one.files.values())[-1]}" if one else ""


def _absent(index: pa.Table) -> list[str]:
    """Files that are named but not there. Folders are listed once, not asked file by file."""
    files = [uri for uri, offset in zip(index["uri"].to_pylist(), index["offset"].to_pylist(), strict=True) if offset is None]
    files = [uri for uri in files if ".parquet#" not in uri]
    there: dict[str, set[str]] = {}
    for folder in {uri.rpartition("/")[0] for uri in files}:
        fs, path = storage.locate(folder)
        names = fs.ls(path, detail=False) if storage.kind_of(fs, path) == "directory" else []
        there[folder] = {str(one).rpartition("/")[2] for one in names}
    return [uri for uri in files if uri.rpartition("/")[2] not in there[uri.rpartition("/")[0]]]
