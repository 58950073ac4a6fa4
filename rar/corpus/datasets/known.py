"""Data sets known by name: the table (known.yaml), and a data set at a place on some disk, which is what the readers get.

Nothing is ever downloaded or made up: a file that is missing is named in one line with where people get it. A missing split is
never replaced by a random one, as CoOp's own loaders do, because the numbers would be of another test set. Few-shot caches are
pickles and are not looked at.

In this project a class is its name, so the names of a data set must be distinct. Where one name stands for several classes
(ImageNet's two kinds of "sunglasses"), the later ones get a number in brackets, which their prompts then show, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from rar import storage
from rar.config import Strict
from rar.schema import INDEX, UserError


class Known(Strict):
    """One entry of known.yaml, whose head says what the keys mean."""

    family: str
    folder: str
    pictures: str | dict[str, str]
    labels: str | dict[str, str]
    files: dict[str, str]
    splits: dict[str, int]
    classes: int
    templates: list[str]


class Listed(NamedTuple):
    """The pictures of a corpus and what they may show. Labels are out of `classes`, or null; templates may be none."""

    index: pa.Table  # schema INDEX
    classes: list[str]  # distinct, in the order of the data set's own numbers
    templates: list[str]


@cache
def known() -> Mapping[str, Known]:
    """name -> what is known of it, in the table's order."""
    text = resources.files(__package__).joinpath("known.yaml").read_text()
    return {name: Known.model_validate(fields) for name, fields in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class Place:
    """One split of a known data set in a folder."""

    name: str
    known: Known
    folder: str
    split: str

    @property
    def pictures(self) -> str:
        """The folder of this split's pictures, relative to the data set's folder."""
        return self._of_split(self.known.pictures)

    @property
    def labels(self) -> str:
        """The file of this split's labels, relative to the data set's folder."""
        return self._of_split(self.known.labels)

    def _of_split(self, name: str | dict[str, str]) -> str:
        return (name if isinstance(name, str) else name[self.split]).replace("{split}", self.split)

    def files(self) -> dict[str, str]:
        """What must be there for this split, relative to the data set's folder -> where people get it."""
        filled = {"{pictures}": self.pictures, "{labels}": self.labels}
        return {filled.get(name, name.replace("{split}", self.split)): source for name, source in self.known.files.items()}

    def missing(self) -> str | None:
        """One line that names the first file or folder that is not there and where people get it."""
        for name, source in self.files().items():
            if not storage.kind_of(*storage.locate(f"{self.folder}/{name}")):
                return f"{self.name}: {self.folder}/{name} is missing; get it from {source}"
        return None

    def lines(self, file: str) -> list[str]:
        """A text file's lines, stripped, without the empty ones."""
        return [line.strip() for line in self._text(file).splitlines() if line.strip()]

    def json(self, file: str) -> Any:
        text = self._text(file)
        with storage.explained(self.name, f"{self.folder}/{file}"):
            return json.loads(text)

    def _text(self, file: str) -> str:
        with storage.explained(self.name, f"{self.folder}/{file}"), storage.open_file(f"{self.folder}/{file}") as stream:
            return stream.read().decode("utf-8-sig")

    def fault(self, file: str, text: str) -> UserError:
        """A file that is there but not as published."""
        return UserError(f"{self.name}: {self.folder}/{file} {text}; get it again from {self.files().get(file, 'its authors')}")

    def listed(self, pictures: Sequence[tuple[str, int]], names: Sequence[str]) -> Listed:
        """(file below the folder of pictures, class number) -> index rows in that order, labelled by name."""
        classes = distinct(names)
        strange = next((number for _, number in pictures if not 0 <= number < len(classes)), None)
        if strange is not None:
            raise self.fault(self.labels, f"has the class number {strange}, but there are {len(classes)} names")
        base = self.folder if self.pictures == "." else f"{self.folder}/{self.pictures}"
        labels = [classes[number] for _, number in pictures]
        return Listed(index_of([f"{base}/{file}" for file, _ in pictures], labels), classes, self.known.templates)


def distinct(names: Iterable[str]) -> list[str]:
    """Names as people write them (spaces for underscores), the same one twice told apart: bat, bat (2)."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        name = " ".join(name.replace("_", " ").split())
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def index_of(
    uris: Sequence[str],
    labels: Sequence[str | None],
    offsets: Sequence[int | None] | None = None,
    sizes: Sequence[int | None] | None = None,
) -> pa.Table:
    """N pictures as schema INDEX, in the given order; offsets and sizes in bytes, where a picture is a part of its file."""
    nothing = [None] * len(uris)
    columns = [range(len(uris)), uris, nothing if offsets is None else offsets, nothing if sizes is None else sizes, labels]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, INDEX, strict=True)], schema=INDEX)
