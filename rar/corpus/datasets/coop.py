"""Few-shot sets as CoOp (arXiv 2109.01134) lays them out: fixed splits in one JSON, and FGVC-Aircraft in its authors' lists.

`split_zhou_NAME.json` is {"train" | "val" | "test": [[file, class number, class name], ...]}, files relative to the folder of
pictures. Its order is kept: "the first n of each class" (memory.draw: first) are the first in it.
"""

from __future__ import annotations

from rar.corpus.datasets.known import Listed, Place


def read_split(place: Place) -> Listed:
    """A split of a `split_zhou_*.json`; classes in the order of their numbers, over all splits."""
    splits = place.json(place.labels)
    try:
        rows = {split: [(str(file), int(number), str(name)) for file, number, name in splits[split]] for split in splits}
        pictures = [(file, number) for file, number, _ in rows[place.split]]
    except (KeyError, TypeError, ValueError):
        raise place.fault(place.labels, f"holds no {place.split!r} list of [file, class number, class name]") from None
    names = {number: name for split in rows.values() for _, number, name in split}
    if sorted(names) != list(range(len(names))):
        raise place.fault(place.labels, f"numbers its {len(names)} classes with gaps")
    return place.listed(pictures, [names[number] for number in range(len(names))])


def read_aircraft(place: Place) -> Listed:
    """`variants.txt` names the classes; a line of `images_variant_SPLIT.txt` is a picture's number and its variant."""
    names = place.lines("variants.txt")
    numbers = {name: number for number, name in enumerate(names)}
    pictures = []
    for line in place.lines(place.labels):
        picture, _, variant = line.partition(" ")
        if variant.strip() not in numbers:
            raise place.fault(place.labels, f"has a variant that is not in variants.txt: {variant.strip()!r}")
        pictures.append((f"{picture}.jpg", numbers[variant.strip()]))
    return place.listed(pictures, names)
