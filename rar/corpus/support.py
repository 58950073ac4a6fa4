"""The support set: which labelled pictures a memory is made of, and what is odd about them.

Rules, each counted and told, none applied in silence:
- Labels and class names are compared stripped and in Unicode's NFC (`tables.label`): folders of macOS are decomposed.
- `shots` are drawn from a seeded permutation of each class, so that the 2-shot set is part of the 4-shot set of a seed; or
  (memory.draw: first) they are each class's first in the corpus' own order, as the paper's code takes them, whatever the seed.
- One picture is one entry of the memory, however many copies of it the support set holds. Where its copies disagree, it keeps
  the label that most of them carry; between equals, the first by name. The order of rows, files or workers plays no part, so
  building again changes nothing. It costs the other class that picture: an entry has one class.
- A picture that is in the memory and among those to classify is a leak: counted by content, never removed, because leaving
  pictures out of a test set changes what is measured. Copies of another size or quality are other contents; those are told
  apart from strangers by how they look (corpus.looks), and warned of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.columns import codes
from rar.config import Corpus, Memory
from rar.corpus import listing, objects
from rar.corpus.datasets import named
from rar.schema import ERRORS, INDEX, UserError


@dataclass(frozen=True)
class Plan:
    """What a memory will hold. classes: the names to embed. support: INDEX rows (of boxes: objects.OBJECTS), `shots` a class.

    ignored: other rows. strangers: of `strangers`, for the labels that are no class. remarks: lines on what is odd.
    undescribed: how many names of encoder.descriptions are no class. faults: boxes that cannot be used (ERRORS).
    """

    classes: list[str]
    support: pa.Table
    ignored: int
    strangers: str = ""
    remarks: tuple[str, ...] = ()
    undescribed: int = 0
    faults: pa.Table = field(default_factory=ERRORS.empty_table)

    @property
    def boxed(self) -> bool:
        """Whether the support set is one of boxes."""
        return "box_xyxy" in self.support.column_names


def plan(memory: Memory, seed: int, corpus: Corpus | None = None) -> Plan:
    """Read the class names and draw the support set. Raises UserError for a memory of nothing.

    Without memory.classes the names are the support's labels (of a data set by name, its classes in their order); without
    support, too, those of the corpus that is to be classified, where that is a data set by name.
    """
    if memory.support is None and memory.classes is None and (corpus is None or corpus.dataset is None):
        raise UserError("memory needs `classes` (names), `support` (labelled images), or both")
    found = read(memory) if memory.support else None
    listed = found.index if found else INDEX.empty_table()
    if memory.support and listed["label"].null_count == listed.num_rows:
        where = memory.support.uri or memory.support.dataset
        raise UserError(f"memory.support {where} has no labels; use one sub-folder a class, or a label column")
    if memory.classes is None and found is None:
        assert corpus is not None
        found = Support(*named.read(corpus)[:2])
    classes = listing.class_names(memory.classes if memory.classes is not None else found.classes if found else [])
    known = listed.filter(pc.is_in(listed["label"], pa.array(classes, pa.string())))
    if memory.support and not known.num_rows:
        first = listed["label"].drop_null()[0]
        raise UserError(f"no label of memory.support is among the {len(classes)} classes; first label: {first}")
    chosen = draw(known, memory.shots, None if memory.draw == "first" else seed)
    faults = found.faults if found else ERRORS.empty_table()
    remarks = [*found.told, *thin_classes(chosen["label"], classes)] if memory.support and found else []
    odd = strangers(listed["label"], classes)
    return Plan(classes, chosen, listed.num_rows - known.num_rows, odd, tuple(remarks), faults=faults)


class Support(NamedTuple):
    """A support set before shots are drawn: its index, vocabulary, rows that cannot be used (ERRORS), and lines on it."""

    index: pa.Table
    classes: list[str]
    faults: pa.Table = ERRORS.empty_table()
    told: Sequence[str] = ()


def read(memory: Memory) -> Support:
    """The pictures or boxes of memory.support, all of them. The vocabulary of boxes is their labels, sorted, but for a data set
    by name, which has its own.
    """
    assert memory.support is not None
    corpus = named.as_file(memory.support)
    if not objects.holds_boxes(corpus):
        found = named.read(memory.support)
        return Support(found.index, found.classes, told=listing.remarks(found.index))
    index, faults, told = objects.read_objects(corpus, memory.min_side)
    by_name = memory.support.dataset is not None
    classes = listing.class_names(corpus.uri) if by_name else sorted(index["label"].drop_null().unique().to_pylist())
    return Support(index, classes, faults, told)


def draw(labelled: pa.Table, shots: int | None, seed: int | None) -> pa.Table:
    """At most `shots` rows of each label, in the order of the table. labelled: no label is null. seed None: the first ones."""
    if shots is None or not labelled.num_rows:
        return labelled
    names, numbers = codes(labelled["label"])
    rows_of = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers, minlength=len(names)))[:-1])
    if seed is not None:
        rows_of = [np.random.default_rng([seed, number]).permutation(rows) for number, rows in enumerate(rows_of)]
    drawn = [rows[:shots] for rows in rows_of]
    return labelled.take(np.sort(np.concatenate(drawn)))


def strangers(labels: pa.ChunkedArray, classes: Collection[str]) -> str:
    """The labels that are no class, in words, with the most frequent as an example; "" where there are none."""
    labels = labels.drop_null()
    counts = pc.value_counts(labels.filter(pc.invert(pc.is_in(labels, pa.array(list(classes), pa.string())))))
    strange = {one["values"]: one["counts"] for one in counts.to_pylist()}
    if not strange:
        return ""
    name, count = min(strange.items(), key=lambda item: (-item[1], item[0]))
    what = "1 label is no class" if len(strange) == 1 else f"{len(strange):,} labels are no class"
    return f"{what} ({sum(strange.values()):,} rows), e.g. {name!r} ({count:,})"


def thin_classes(labels: pa.ChunkedArray, classes: Sequence[str]) -> list[str]:
    """Lines on the classes with no picture or with one, which leaving one out cannot judge; [] where there are none."""
    counts = {one["values"]: one["counts"] for one in pc.value_counts(labels).to_pylist()}
    lines = []
    for pictures, words in ((0, "no support image"), (1, "one support image, so leaving it out leaves none to judge by")):
        thin = [name for name in classes if counts.get(name, 0) == pictures]
        if thin:
            what = "1 class has" if len(thin) == 1 else f"{len(thin):,} classes have"
            lines.append(f"{what} {words}, e.g. {thin[0]!r}")
    return lines


@dataclass(frozen=True)
class Settled:
    """What one entry a picture leaves. entry: (N,) int64, for each row the row of the same picture that becomes the entry.

    copies: rows left out because an equal picture of the same class stays. conflicts: pictures under several labels;
    overruled: their rows whose label lost; example: the labels of one of them.
    """

    entry: np.ndarray
    copies: int
    conflicts: int
    overruled: int
    example: tuple[str, ...] = ()

    def remarks(self) -> list[str]:
        lines = [f"{self.copies:,} copies of a picture under the same label are one entry"] if self.copies else []
        if self.conflicts:
            example = " and ".join(map(repr, self.example))
            lines.append(
                f"{self.conflicts:,} pictures stand under several labels, e.g. {example}; the label of most copies (or first "
                f"by name) counts, {self.overruled:,} rows are left out"
            )
        return lines


def settle(image_ids: pa.Array | pa.ChunkedArray, labels: pa.Array | pa.ChunkedArray) -> Settled:
    """One row a picture, by the rule above. The ids and labels kept do not depend on the order of the rows.

    Both are strings, (N,); only of pictures that stand twice or more does anything become a Python object.
    """
    numbers = pc.index_in(image_ids, pc.unique(image_ids)).to_numpy()
    entry = np.arange(len(numbers))
    repeated = np.flatnonzero(np.bincount(numbers)[numbers] > 1)
    repeated = repeated[np.argsort(numbers[repeated], kind="stable")]
    copies = overruled = 0
    examples: list[tuple[str, ...]] = []
    for rows in np.split(repeated, np.flatnonzero(np.diff(numbers[repeated])) + 1) if len(repeated) else []:
        stated = labels.take(pa.array(rows)).to_pylist()
        votes = Counter(stated)
        label = min(votes, key=lambda name: (-votes[name], name))
        entry[rows] = rows[stated.index(label)]
        copies += votes[label] - 1
        if len(votes) > 1:
            examples.append(tuple(sorted(votes)))
        overruled += len(rows) - votes[label]
    return Settled(entry, copies, len(examples), overruled, min(examples, default=()))
