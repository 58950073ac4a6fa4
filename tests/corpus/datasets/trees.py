"""Small data sets in the real layouts, after the published descriptions: all their classes, few pictures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rar.corpus.datasets.known import known

COOP = ("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "sun397", "dtd", "eurosat", "ucf101")
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
Made = dict[str, list[tuple[str, str]]]  # split -> (file below the data set's folder, class name), in the files' order


def picture(shade: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 40, 90)).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURE = picture()


def put(file: Path, content: bytes | str = PICTURE) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    try:
        file.write_bytes(data)
    except FileNotFoundError:
        file.parent.mkdir(parents=True)
        file.write_bytes(data)


def make(name: str, root: Path) -> Made:
    """Write the data set `name` below root, with its published number of classes."""
    one = known()[name]
    folder = root / one.folder
    makers: dict[str, Callable[..., Made]] = {
        "coop": coop,
        "aircraft": aircraft,
        "imagenet": imagenet,
        "cub": cub,
        "dogs": dogs,
        "flowers": flowers,
        "pets": pets,
        "raf_db": raf_db,
        "boxes": boxes,
    }
    return makers[one.family](name, folder, one.classes)


def coop(name: str, folder: Path, classes: int) -> Made:
    """Class numbers and names as in the real JSON; files shuffled, as they are there. val lacks the last class."""
    one = known()[name]
    counts = {"train": 2 * classes, "val": classes - 1, "test": classes + 1}
    made: Made = {}
    splits: dict[str, list[Any]] = {}
    for split, count in counts.items():
        numbers = np.random.default_rng(count).permutation(count) % classes
        rows = [(f"some_class_{number}/{split}_{place}.jpg", int(number)) for place, number in enumerate(numbers)]
        if name == "stanford_cars":
            rows = [
                (f"cars_{'test' if split == 'test' else 'train'}/{split}_{place}.jpg", n) for place, (_, n) in enumerate(rows)
            ]
        splits[split] = [[file, number, f"some_class_{number}"] for file, number in rows]
        made[split] = [(str(Path(str(one.pictures)) / file), f"some class {number}") for file, number in rows]
        for file, _ in made[split]:
            put(folder / file)
    put(folder / str(one.labels), json.dumps(splits))
    return made


def aircraft(name: str, folder: Path, classes: int) -> Made:
    names = [f"Model {number}-200 / B" for number in range(classes)]
    put(folder / "variants.txt", "\n".join(names) + "\n")
    made: Made = {}
    for start, split in enumerate(("train", "val", "test")):
        made[split] = [(f"images/{start:02d}{number:05d}.jpg", names[number]) for number in reversed(range(classes))]
        lines = [f"{Path(file).stem} {label}" for file, label in made[split]]
        put(folder / f"images_variant_{split}.txt", "\n".join(lines) + "\n")
        for file, _ in made[split]:
            put(folder / file)
    return made


def imagenet(name: str, folder: Path, classes: int) -> Made:
    """classnames.txt always has all 1,000; two of the names are the same, as CLIP's are."""
    wnids = [f"n{10_000_000 + 7 * number}" for number in range(1000)]
    names = ["sunglasses" if number in (3, 5) else f"thing {number}" for number in range(1000)]
    put(folder / "classnames.txt", "".join(f"{wnid} {text}\n" for wnid, text in zip(wnids, names, strict=True)))
    right = [text if number != 5 else "sunglasses (2)" for number, text in enumerate(names)]
    step = 1000 // classes
    made: Made = {}
    for split, below in dict(known()[name].pictures).items():  # type: ignore[arg-type]
        rows = []
        for number in range(0, 1000, step):
            directory = str(number) if name == "imagenetv2" else wnids[number]
            rows.append((f"{below}/{directory}/{split}_{number}.JPEG", right[number]))
        made[split] = sorted(rows)
        for file, _ in rows:
            put(folder / file)
        put(folder / below / "README.txt", "no picture")
    return made


def cub(name: str, folder: Path, classes: int) -> Made:
    made: Made = {"train": [], "test": []}
    tables: dict[str, list[str]] = {file: [] for file in ("images", "image_class_labels", "train_test_split", "classes")}
    for number in range(1, classes + 1):
        directory = f"{number:03d}.Some_footed_Bird_{number}"
        tables["classes"].append(f"{number} {directory}")
        for part, split in enumerate(("test", "train")):
            picture_number = 2 * number + part
            tables["images"].append(f"{picture_number} {directory}/Bird_{picture_number}.jpg")
            tables["image_class_labels"].append(f"{picture_number} {number}")
            tables["train_test_split"].append(f"{picture_number} {part}")
            made[split].append((f"images/{directory}/Bird_{picture_number}.jpg", f"Some footed Bird {number}"))
            put(folder / made[split][-1][0])
    for file, lines in tables.items():
        put(folder / f"{file}.txt", "\n".join(lines) + "\n")
    return made


def dogs(name: str, folder: Path, classes: int) -> Made:
    made: Made = {}
    for split in ("train", "test"):
        files = [f"n{number:08d}-Some_dog-{number}/n{number:08d}_{split}.jpg" for number in range(1, classes + 1)]
        made[split] = [(f"Images/{file}", f"Some dog-{number}") for number, file in enumerate(files, start=1)]
        cells = np.array(files, dtype=object).reshape(-1, 1)
        matlab(folder / f"lists/{split}_list.mat", {"file_list": cells, "labels": np.arange(1, classes + 1).reshape(-1, 1)})
        for file, _ in made[split]:
            put(folder / file)
    return made


def flowers(name: str, folder: Path, classes: int) -> Made:
    """Picture i shows class i mod 102 + 1; names in the JSON are keyed by text."""
    numbers = {"trnid": range(3, 203), "valid": range(203, 403), "tstid": range(403, 603)}
    labels = [number % classes + 1 for number in range(1, 603)]
    put(folder / "cat_to_name.json", json.dumps({str(number): f"some flower_{number}" for number in range(1, classes + 1)}))
    matlab(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    matlab(folder / "setid.mat", {key: np.array([list(found)], np.uint16) for key, found in numbers.items()})
    made: Made = {}
    for split, found in zip(("train", "val", "test"), numbers.values(), strict=True):
        made[split] = [(f"jpg/image_{number:05d}.jpg", f"some flower {labels[number - 1]}") for number in found]
        for file, _ in made[split]:
            put(folder / file)
    return made


def pets(name: str, folder: Path, classes: int) -> Made:
    made: Made = {}
    for split in ("trainval", "test"):
        rows = [(f"Some_Pet_{chr(65 + number // 26)}{chr(65 + number % 26)}_{split}9", number) for number in range(classes)]
        lines = ["# Image CLASS-ID SPECIES BREED ID", *(f"{file} {number + 1} 1 1" for file, number in rows)]
        put(folder / f"annotations/{split}.txt", "\n".join(lines) + "\n")
        made[split] = [(f"images/{file}.jpg", file.rpartition("_")[0].lower().replace("_", " ")) for file, _ in rows]
        for file, _ in made[split]:
            put(folder / file)
    return made


def raf_db(name: str, folder: Path, classes: int) -> Made:
    emotions = ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]
    made: Made = {"train": [], "test": []}
    lines = []
    for split in made:
        for number in range(1, 15):
            lines.append(f"{split}_{number:05d}.jpg {number % 7 + 1}")
            made[split].append((f"basic/Image/aligned/{split}_{number:05d}_aligned.jpg", emotions[number % 7]))
            put(folder / made[split][-1][0])
    put(folder / "basic/EmoLabel/list_patition_label.txt", "\n".join(lines) + "\n")
    return made


def boxes(name: str, folder: Path, classes: int) -> Made:
    """Ground truths as published: LVIS names its files by coco_url alone, V3Det's file names begin with images/."""
    one = known()[name]
    made: Made = {}
    for split in one.splits:
        below = {"lvis": "val2017", "v3det": "images/a1", "coco": f"{split}2017"}[name]
        files = [f"{below}/{split}_{number}.jpg" for number in range(3)]
        made[split] = [(file, "") for file in files]
        images = []
        for number, file in enumerate(files):
            put(folder / file)
            named = {"coco_url": f"http://images.cocodataset.org/{file}"} if name == "lvis" else {"file_name": file}
            named = {"file_name": Path(file).name} if name == "coco" else named
            federated: dict[str, Any] = {"neg_category_ids": [], "not_exhaustive_category_ids": []} if name == "lvis" else {}
            images.append({"id": number, "width": 4, "height": 4, **named, **federated})
        categories = [
            {"id": 2 * number + 1, "name": f"thing {number}", "frequency": "rcf"[number % 3]} for number in range(classes)
        ]
        box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [0, 0, 3, 3], "area": 9, "iscrowd": 0}
        labels = one.labels if isinstance(one.labels, str) else one.labels[split]
        put(
            folder / labels.replace("{split}", split),
            json.dumps({"images": images, "annotations": [box], "categories": categories}),
        )
    if name == "lvis":
        (folder / "train2017").mkdir()
    return made


def matlab(file: Path, data: dict[str, Any]) -> None:
    from scipy.io import savemat

    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, data)


def half(classes: int) -> int:
    """How many classes are base."""
    return math.ceil(classes / 2)
