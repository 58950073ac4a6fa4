"""COCO, LVIS and V3Det JSON as people really have them: one reader for `classify`, `detect` and `evaluate`.

What it forgives, and by which rule:
- Ids are of any type. They are compared as written (1 and 1.0 are one number) and, where nothing is so written, as numbers:
  "000001" is 1. Where two ids differ as written and are one number, a third spelling names neither.
- `iscrowd` and `ignore` may be text or missing; an `area` that is missing, null or no number is the box's own.
- A picture without a usable `file_name` is named by the end of its `coco_url` (LVIS v1 has no other): `val2017/9.jpg`.
- Names of categories are stripped and in NFC, as labels are.

What cannot be used is told, never dropped: an annotation is a Fault that names it; an id that stands twice in `images` or
`categories` makes all references to it guesses, so whoever needs ids refuses the file. Columns are filled as the
annotations go by (72 bytes each; a file of gigabytes never exists as Python objects), so the three lists may come in any order.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rar import storage
from rar.config import Corpus
from rar.corpus import tables
from rar.corpus.jsonstream import items
from rar.schema import UserError

LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
WHOLE = re.compile(r"\s*([+-]?\d+)(?:\.0*)?\s*", re.ASCII)
URL_START = re.compile(r"^[^/]*://[^/]*|[?#].*$", re.DOTALL)  # and its end: what is no path
COCO_FOLDER = re.compile(r"(?:train|val|test|unlabeled)\d{4}")
NO, YES = (None, "", "0", "false", "no"), ("1", "true", "yes")  # texts and null as a flag


class Ids:
    """Where each of N ids stands, compared as written and then as numbers. `twice`: the first id that stands twice, or None."""

    def __init__(self, ids: Iterable[Any]) -> None:
        self.written: dict[Hashable, int] = {}
        self.loose: dict[Hashable, int] = {}
        self.twice: Any = None
        for place, value in enumerate(ids):
            if not _usable(value):
                continue
            if value in self.written and self.twice is None:
                self.twice = value
            self.written.setdefault(value, place)
            key = _loose(value)
            self.loose[key] = place if key not in self.loose else -1

    def place(self, value: Any) -> int:
        """-1 for an id that is not there, that fits several, or that is no id at all."""
        if not _usable(value):
            return -1
        found = self.written.get(value)
        return self.loose.get(_loose(value), -1) if found is None else found

    def places(self, values: Sequence[Any]) -> np.ndarray:
        """(N,) int64 of N ids."""
        return np.fromiter(map(self.place, values), np.int64, len(values))


def _usable(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _loose(value: Any) -> Hashable:
    if not isinstance(value, str):
        return value
    whole = WHOLE.fullmatch(value)
    return int(whole[1]) if whole and len(value) < 100 else value.strip()


def id_order(value: Any) -> tuple[bool, Any]:
    """A key that orders ids as numbers, as far as they are such, and then as text. Raises TypeError for what is no id."""
    if not _usable(value):
        raise TypeError(f"no id: {value!r}")
    key = _loose(value)
    return isinstance(key, str), key


class Picture(NamedTuple):
    """An image of the file. Lists of categories are LVIS': ids as written, None where the file has no such list."""

    id: Any  # as written
    name: str | None  # relative to the folder of images
    url_folder: str | None  # the folder in `coco_url` that the name begins with, where it came from there
    size: tuple[int, int] | None  # (width, height) as the file states them
    negative: list[Any] | None
    not_exhaustive: list[Any] | None


class Category(NamedTuple):
    id: Any
    name: str | None
    frequency: Any  # r, c or f in LVIS


class Fault(NamedTuple):
    """What cannot be used. image: the place of its picture, or -1; annotations: how many it stands for."""

    image: int
    text: str
    annotations: int = 1


class Columns(NamedTuple):
    """A boxes, in file order."""

    image: np.ndarray  # (A,) int64, place among the pictures
    category: np.ndarray  # (A,) int64, place among the categories
    xywh: np.ndarray  # (A, 4) float64
    area: np.ndarray  # (A,) float64, as the file has it (a mask's, often), else the box's
    crowd: np.ndarray  # (A,) bool
    ignore: np.ndarray  # (A,) bool, LVIS' own flag
    id: np.ndarray  # (A,) int64: the annotation's id, its place in the file where that is no whole number


@dataclass
class Truth:
    """A ground truth file. `boxes` and `faults` together hold every annotation (see `read`)."""

    source: str
    pictures: list[Picture]
    categories: list[Category]
    boxes: Columns
    faults: list[Fault] = field(default_factory=list)
    keys: frozenset[str] = frozenset()  # the lists that the file has
    picture_ids: Ids = field(default_factory=lambda: Ids(()))
    category_ids: Ids = field(default_factory=lambda: Ids(()))

    def refuse_ids_twice(self) -> None:
        """Raises UserError where references to pictures or categories would be guesses."""
        for what, ids in (("image", self.picture_ids), ("category", self.category_ids)):
            if ids.twice is None:
                continue
            names = [one.name for one in (self.pictures if what == "image" else self.categories) if one.id == ids.twice]
            raise UserError(
                f"{self.source}: {what} id {ids.twice!r} is used twice ({', '.join(map(repr, names[:3]))}); make ids unique"
            )

    @property
    def names(self) -> list[str | None]:
        return [category.name for category in self.categories]


def read(source: Any, what: str = "corpus", *, boxes: bool = True) -> Truth:
    """A ground truth: the path of its JSON on any file system, or the object (never changed).

    what: whose file it is, for messages. boxes=False reads pictures and categories alone. Every annotation is in `boxes` or,
    with its fault, in `faults`. Raises UserError for a file of another kind, naming the record.
    """
    name = str(source) if not isinstance(source, dict | list) else f"the {what}"
    records: dict[str, list[Any]] = {"images": [], "categories": []}
    gathered = _Gathered()
    keys: set[str] = set()
    for key, number, value in items(source, what):
        if number is None:
            if key == "":
                raise UserError(f"{what}: {name} is a list, no COCO file of `images`, `annotations` and `categories`")
            if isinstance(value, list):
                keys.add(key)
            elif key in ("images", "categories", "annotations") and value is not None:
                raise UserError(f"{what}: `{key}` of {name} is no list of objects but {value!r:.60}")
        elif key == "images":
            records[key].append(_picture(value, number, name))
        elif key == "categories":
            records[key].append(_category(value, number, name))
        elif key == "annotations" and boxes:
            gathered.add(value, number)
    if "images" not in keys:
        raise UserError(f"{what}: {name} has no COCO `images` (a list of objects with id and file_name or coco_url)")
    truth = Truth(name, records["images"], records["categories"], gathered.columns(), [], frozenset(keys))
    truth.picture_ids = Ids(picture.id for picture in truth.pictures)
    truth.category_ids = Ids(category.id for category in truth.categories)
    gathered.resolve(truth)
    return truth


def _picture(value: Any, number: int, source: str) -> Picture:
    if not isinstance(value, dict):
        raise UserError(f"{source}: images[{number}] is no object but {value!r:.60}")
    name, folder = value.get("file_name"), None
    if not isinstance(name, str) or not name.strip():
        name, url = None, value.get("coco_url")
        if isinstance(url, str) and (parts := [part for part in URL_START.sub("", url).split("/") if part.strip()]):
            name = "/".join(parts[-2:])
            folder = parts[-2] if len(parts) > 1 else None
    width: Any = value.get("width")
    height: Any = value.get("height")
    size = (int(width), int(height)) if _is_length(width) and _is_length(height) else None
    negative, not_exhaustive = (one if isinstance(one := value.get(key), list) else None for key in LVIS_LISTS)
    return Picture(_written(value.get("id")), None if name is None else _text(name), folder, size, negative, not_exhaustive)


def _category(value: Any, number: int, source: str) -> Category:
    if not isinstance(value, dict):
        raise UserError(f"{source}: categories[{number}] is no object but {value!r:.60}")
    name = value.get("name")
    name = tables.label(name) if isinstance(name, int | float | str) and not isinstance(name, bool) else None
    return Category(_written(value.get("id")), name and _text(name), value.get("frequency"))


def _written(value: Any) -> Any:
    """An id; what is none (null, a list, NaN) is null: nothing can refer to it."""
    return value if _usable(value) else None


def _text(name: str) -> str:
    """Arrow text is UTF-8, which half a surrogate pair is not."""
    return name.encode(errors="backslashreplace").decode()


def _is_length(value: Any) -> bool:
    return is_number(value) and 1 <= value < 2**31


def is_number(value: Any) -> bool:
    """A finite number, as opposed to text and true / false."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1000


def bbox_fault(bbox: Any) -> str | None:
    """What is wrong with a box of COCO's, or None."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        return f"has bbox {bbox!r:.80}, not 4 finite numbers (left, top, width, height)"
    return None


def _flag(value: Any) -> bool | None:
    """None for what is neither yes nor no."""
    if isinstance(value, str):
        value = value.strip().lower()
    if value is None or isinstance(value, str):
        return False if value in NO else True if value in YES else None
    return bool(value) if isinstance(value, bool) or is_number(value) else None


class _Gathered:
    """Annotations as they go by, before it is known which pictures and categories there are."""

    def __init__(self) -> None:
        self.ids: list[dict[Any, int]] = [{}, {}]  # of pictures, of categories: (type, as written) -> code
        self.codes = array("q"), array("q")
        self.numbers = array("d")  # left, top, width, height, area
        self.flags = array("b")  # 1: crowd, 2: ignore
        self.own = array("q")
        self.places = array("q")  # in the file
        self.faulty: list[tuple[Any, str]] = []  # (image id as written, text)

    def add(self, value: Any, number: int) -> None:
        if not isinstance(value, dict):
            self.faulty.append((None, f"annotations[{number}] is no object but {value!r:.60}"))
            return
        bbox: Any = value.get("bbox")
        crowd, ignore = _flag(value.get("iscrowd")), _flag(value.get("ignore"))
        fault = bbox_fault(bbox)
        if fault is None and (crowd is None or ignore is None):
            key = "iscrowd" if crowd is None else "ignore"
            fault = f"has {key} {value.get(key)!r:.40}, neither 0 nor 1"
        if fault:
            self.faulty.append((_written(value.get("image_id")), f"annotation {_called(value, number)} {fault}"))
            return
        for ids, codes, key in zip(self.ids, self.codes, ("image_id", "category_id"), strict=True):
            written = value.get(key)
            known = (type(written), written) if _usable(written) else (None, f"{written!r:.60}")
            codes.append(ids.setdefault(known, len(ids)))
        area: Any = value.get("area")
        self.numbers.extend(map(float, bbox))
        self.numbers.append(float(area) if is_number(area) else float(bbox[2]) * float(bbox[3]))
        self.flags.append(crowd + 2 * ignore)  # type: ignore[operator]
        self.own.append(annotation_id(value, number))
        self.places.append(number)

    def columns(self) -> Columns:
        numbers = np.frombuffer(self.numbers, np.float64).reshape(-1, 5) if self.numbers else np.zeros((0, 5))
        flags = np.array(self.flags, np.int8)
        image, category, own = (np.array(column, np.int64) for column in (*self.codes, self.own))
        return Columns(image, category, numbers[:, :4], numbers[:, 4], (flags & 1) > 0, (flags & 2) > 0, own)

    def resolve(self, truth: Truth) -> None:
        """Codes of ids -> places of pictures and categories; what has none becomes a fault."""
        known = (truth.picture_ids, truth.category_ids)
        places = [
            np.array([one.place(value if kind else None) for kind, value in ids] + [-1])
            for one, ids in zip(known, self.ids, strict=True)
        ]
        called = [[repr(value) if kind else value for kind, value in ids] for ids in self.ids]
        coded = truth.boxes
        image, category = places[0][coded.image], places[1][coded.category]
        truth.faults += [Fault(truth.picture_ids.place(value), text) for value, text in self.faulty]
        truth.faults += [
            Fault(-1, f"{count} boxes of image_id {called[0][code]}, which the corpus lacks", count)
            for code, count in Counter(coded.image[image < 0].tolist()).items()
        ]
        for row in np.flatnonzero((image >= 0) & (category < 0)).tolist():
            own = _called({"id": int(coded.id[row])}, self.places[row])
            text = f"annotation {own} has unknown category_id {called[1][coded.category[row]]}"
            truth.faults.append(Fault(int(image[row]), text))
        truth.boxes = coded._replace(image=image, category=category)
        if len(good := np.flatnonzero((image >= 0) & (category >= 0))) < len(image):
            truth.boxes = take(truth.boxes, good)


def take(boxes: Columns, rows: np.ndarray) -> Columns:
    """Some rows of the columns."""
    return Columns(*(column[rows] for column in boxes))


def annotation_id(value: dict[str, Any], number: int) -> int:
    """An annotation's id where that is a whole number, as a number or as text; else its place in the file."""
    own = _loose(_written(value.get("id")))
    return int(own) if isinstance(own, int | float) and own == own // 1 and abs(own) < 2**63 else number


def _called(value: dict[str, Any], number: int) -> str:
    return f"{value.get('id')!r:.40} (annotations[{number}])"


def folder_of(corpus: Corpus, file: str) -> str:
    """Where relative names of a manifest or COCO file begin: `corpus.images`, or the file's own folder. Raises UserError."""
    if corpus.images is None:
        return storage.full_name(*storage.locate(file)).rpartition("/")[0]
    if not _is_folder(corpus.images):
        raise UserError(f"corpus: {corpus.images} is not a folder; check corpus.images")
    return storage.full_name(*storage.locate(corpus.images))


def uris(truth: Truth, folder: str) -> list[str]:
    """The uri of each picture; folder: of `folder_of`.

    Both layouts are known: with LVIS' `val2017/9.jpg`, from a `coco_url` or in `file_name`, the folder holds `val2017/`, or is
    itself what holds 9.jpg; with V3Det's `images/a/9.jpg` it holds `images/`, or is itself that `images`. One look at the file
    system a sub-folder's name tells. A picture without a name keeps its place, and fails to be read.
    """
    flat: dict[str, bool] = {}
    found = []
    for number, picture in enumerate(truth.pictures):
        name = picture.name
        if name is None:
            found.append(f"{truth.source}#images[{number}]")
            continue
        first, _, rest = name.partition("/")
        known = first in (picture.url_folder, folder.rstrip("/").rpartition("/")[2]) or COCO_FOLDER.fullmatch(first)
        if rest and first and known and "://" not in name:
            if first not in flat:
                flat[first] = _is_folder(folder) and not _is_folder(joined(folder, first))
            name = rest if flat[first] else name
        found.append(joined(folder, name))
    return found


def _is_folder(uri: str) -> bool:
    return storage.kind_of(*storage.locate(uri)) == "directory"


def joined(folder: str, name: str) -> str:
    r"""A name in a table or JSON, relative to a folder unless it is whole (or empty). Windows' `a\b.jpg` is `a/b.jpg`."""
    if not name or name.startswith(("/", "~/")) or "://" in name:
        return name
    name = name if "/" in name else name.replace("\\", "/")
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"


def as_written(value: Any) -> str:
    """An id as JSON, to be written back as it was."""
    return json.dumps(value)
