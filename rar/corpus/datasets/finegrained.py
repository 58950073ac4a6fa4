"""Fine-grained sets in their authors' own layouts and splits: CUB-200-2011, Stanford Dogs, Oxford Flowers, Oxford Pets, RAF-DB.

Stanford Dogs and the official split of Flowers exist as MATLAB files alone, so those are read by scipy (a container of arrays:
unlike a pickle it runs nothing). Everything else is text.
"""

from __future__ import annotations

from typing import Any

from rar import storage
from rar.corpus.datasets.known import Listed, Place

EMOTIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")  # RAF-DB's 1 to 7


def read_cub(place: Place) -> Listed:
    """Four tables joined by a picture's number: its file, its class, whether it is of the training set; the classes' names."""
    tables = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    files, labels, training, classes = (dict(_pair(place, table, line) for line in place.lines(table)) for table in tables)
    wanted = "1" if place.split == "train" else "0"
    try:
        pictures = [(file, int(labels[number]) - 1) for number, file in files.items() if training[number] == wanted]
    except (KeyError, ValueError):
        raise place.fault("image_class_labels.txt", "does not fit images.txt") from None
    return place.listed(pictures, [name.partition(".")[2] for name in classes.values()])  # 001.Black_footed_Albatross


def read_dogs(place: Place) -> Listed:
    """`lists/SPLIT_list.mat`: files (n02085620-Chihuahua/n02085620_5927.jpg) and class numbers from 1."""
    data = _matlab(place, place.labels)
    files, labels = _column(place, place.labels, data, "file_list"), _column(place, place.labels, data, "labels")
    pictures = [(str(file), int(label) - 1) for file, label in zip(files, labels, strict=True)]
    names = {number: file.partition("/")[0].partition("-")[2] for file, number in pictures}
    if sorted(names) != list(range(len(names))):
        raise place.fault(place.labels, f"numbers its {len(names)} classes with gaps")
    return place.listed(pictures, [names[number] for number in range(len(names))])


def read_flowers(place: Place) -> Listed:
    """`setid.mat`: picture numbers of each split; `imagelabels.mat`: their classes from 1; `cat_to_name.json`: the names."""
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[place.split]
    numbers = _column(place, "setid.mat", _matlab(place, "setid.mat"), key)
    labels = _column(place, "imagelabels.mat", _matlab(place, "imagelabels.mat"), "labels")
    names = place.json("cat_to_name.json")
    try:
        pictures = [(f"image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in map(int, numbers)]
        return place.listed(pictures, [str(names[str(number)]) for number in range(1, len(names) + 1)])
    except (IndexError, KeyError, TypeError):
        raise place.fault("cat_to_name.json", "does not fit setid.mat and imagelabels.mat") from None


def read_pets(place: Place) -> Listed:
    """A line of `annotations/SPLIT.txt` is `Abyssinian_201 1 1 1`: file, class from 1, species, breed. Names are lower case."""
    rows = [line.split() for line in place.lines(place.labels) if not line.startswith("#")]
    try:
        names = {int(number) - 1: file.rpartition("_")[0].lower() for file, number, *_ in rows}
        pictures = [(f"{file}.jpg", int(number) - 1) for file, number, *_ in rows]
        return place.listed(pictures, [names[number] for number in range(len(names))])
    except (KeyError, ValueError):
        raise place.fault(place.labels, "is no list of `file class species breed`") from None


def read_raf_db(place: Place) -> Listed:
    """A line of the list is `train_00001.jpg 5`; the aligned picture is train_00001_aligned.jpg. Both splits are one list."""
    rows = [line.split() for line in place.lines(place.labels) if line.startswith(f"{place.split}_")]
    try:
        pictures = [(f"{file.removesuffix('.jpg')}_aligned.jpg", int(number) - 1) for file, number in rows]
    except ValueError:
        raise place.fault(place.labels, "is no list of `file emotion`, emotions 1 to 7") from None
    return place.listed(pictures, EMOTIONS)


def _pair(place: Place, file: str, line: str) -> tuple[str, str]:
    number, space, value = line.partition(" ")
    if not space:
        raise place.fault(file, f"has a line that is no pair: {line!r}")
    return number, value.strip()


def _matlab(place: Place, file: str) -> dict[str, Any]:
    from scipy.io import loadmat

    with storage.explained(place.name, f"{place.folder}/{file}"), storage.open_file(f"{place.folder}/{file}") as stream:
        try:
            return loadmat(stream, simplify_cells=True)
        except Exception as error:  # what scipy raises on a damaged file is of many kinds
            raise place.fault(file, f"is no MATLAB file that scipy reads ({error})") from None


def _column(place: Place, file: str, data: dict[str, Any], key: str) -> list[Any]:
    if key not in data:
        raise place.fault(file, f"has no {key!r}")
    return data[key].ravel().tolist()
