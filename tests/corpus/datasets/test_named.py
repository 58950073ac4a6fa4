"""Every known data set, from a tree in its real layout: what is read, and what is said of a tree that lacks something."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from rar.config import Corpus
from rar.corpus.datasets import named
from rar.corpus.datasets.known import known
from rar.corpus.listing import read_many
from rar.schema import INDEX, RowError, UserError
from tests.corpus.datasets import trees

PUBLISHED = {  # classes and test pictures, after the data sets' papers and CoOp's table
    "caltech101": (100, 2465, "a photo of a {}."),
    "oxford_pets": (37, 3669, "a photo of a {}, a type of pet."),
    "stanford_cars": (196, 8041, "a photo of a {}."),
    "oxford_flowers": (102, 2463, "a photo of a {}, a type of flower."),
    "food101": (101, 30300, "a photo of {}, a type of food."),
    "fgvc_aircraft": (100, 3333, "a photo of a {}, a type of aircraft."),
    "sun397": (397, 19850, "a photo of a {}."),
    "dtd": (47, 1692, "{} texture."),
    "eurosat": (10, 8100, "a centered satellite photo of {}."),
    "ucf101": (101, 3783, "a photo of a person doing {}."),
    "imagenet": (1000, 50000, "a photo of a {}."),
    "imagenetv2": (1000, 10000, "a photo of a {}."),
    "imagenet_sketch": (1000, 50889, "a photo of a {}."),
    "imagenet_a": (200, 7500, "a photo of a {}."),
    "imagenet_r": (200, 30000, "a photo of a {}."),
    "cub200": (200, 5794, "a photo of a {}, a type of bird."),
    "stanford_dogs": (120, 8580, "a photo of a {}, a type of dog."),
    "oxford_flowers_official": (102, 6149, "a photo of a {}, a type of flower."),
    "oxford_pets_official": (37, 3669, "a photo of a {}, a type of pet."),
    "raf_db": (7, 3068, "a photo of a {} looking face."),
    "coco": (80, 5000, "a photo of a {}."),
    "lvis": (1203, 19809, "a photo of a {}."),
    "v3det": (13204, 29821, "a photo of a {}."),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, trees.Made]]:
    """All of them below one root, as people keep them (Pets and Flowers serve two names each)."""
    root = tmp_path_factory.mktemp("data")
    return root, {name: trees.make(name, root / name) for name in known()}


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus.root: .*nowhere is no folder"):
        named.check("oxford_pets", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published(name: str) -> None:
    one, (classes, test, template) = known()[name], PUBLISHED[name]
    assert (one.classes, one.splits.get("test", one.splits.get("val")), one.templates[0]) == (classes, test, template)


def test_the_table_is_whole() -> None:
    assert set(known()) == set(PUBLISHED)
    assert known()["lvis"].splits["minival"] == 4809
    assert all(one.family in (*named.READERS, "boxes") and all(one.files.values()) for one in known().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tree_in_the_real_layout(name: str, disk: tuple[Path, dict[str, trees.Made]]) -> None:
    root, made = disk
    one = known()[name]
    assert set(made[name]) == set(one.splits)
    for split, rows in made[name].items():
        found = named.read(Corpus(dataset=name, root=str(root / name), split=split))
        assert found.index.schema == INDEX and found.index["row"].to_pylist() == list(range(len(rows)))
        assert len(set(found.classes)) == len(found.classes) == one.classes and found.templates == one.templates
        if one.family != "boxes":
            folder = root / name / one.folder
            assert [Path(uri).relative_to(folder).as_posix() for uri in found.index["uri"].to_pylist()] == [
                file for file, _ in rows
            ]
            assert found.index["label"].to_pylist() == [label for _, label in rows]
        pictures = read_many(found.index["uri"].to_pylist()[:3], [None] * 3, [None] * 3)
        assert name == "lvis" or pictures == [trees.PICTURE] * 3


MISSING = [(name, split) for name, one in known().items() for split in one.splits]


@pytest.mark.parametrize(("name", "split"), MISSING)
def test_a_missing_file_is_named(name: str, split: str, disk: tuple[Path, dict[str, trees.Made]], tmp_path: Path) -> None:
    """Each thing that the split needs is taken away in turn; the line says which, and where people get it."""
    root, _ = disk
    corpus = Corpus(dataset=name, root=str(root / name), split=split)
    place = named.place_of(corpus)
    for file, source in place.files().items():
        there, away = Path(place.folder) / file, tmp_path / "away"
        there.rename(away)
        try:
            with pytest.raises(UserError) as caught:
                named.read(corpus)
        finally:
            away.rename(there)
        assert str(caught.value) == f"{name}: {there} is missing; get it from {source}"


def test_no_split_is_ever_made_up(tmp_path: Path) -> None:
    """All pictures are there, and a few-shot cache as CoOp's own loaders leave it; it is a pickle, and is not touched."""
    trees.make("dtd", tmp_path)
    folder = tmp_path / "dtd"
    (folder / "split_zhou_DescribableTextures.json").unlink()
    trees.put(folder / "split_fewshot/shot_4-seed_1.pkl", pickle.dumps({"train": []}))
    with pytest.raises(UserError, match=r"split_zhou_DescribableTextures\.json is missing; get it from CoOp's DATASETS\.md"):
        named.read(Corpus(dataset="dtd", root=str(tmp_path), split="test"))


@pytest.mark.parametrize("name", trees.COOP)
def test_base_and_novel_halves(name: str, disk: tuple[Path, dict[str, trees.Made]]) -> None:
    """The first half of the classes, rounded up, and the rest, by the numbers of the split file; nothing is lost or shared."""
    root, made = disk
    base, novel = (
        named.read(Corpus(dataset=name, root=str(root / name), split="test", classes=which)) for which in ("base", "novel")
    )
    middle = trees.half(known()[name].classes)
    names = [f"some class {number}" for number in range(known()[name].classes)]
    assert (base.classes, novel.classes) == (names[:middle], names[middle:])
    labels = [label for _, label in made[name]["test"]]
    assert base.index["label"].to_pylist() == [label for label in labels if label in names[:middle]]
    assert novel.index["label"].to_pylist() == [label for label in labels if label in names[middle:]]
    assert novel.index["row"].to_pylist() == list(range(novel.index.num_rows))


def test_limit_takes_the_first(disk: tuple[Path, dict[str, trees.Made]]) -> None:
    root, made = disk
    found = named.read(Corpus(dataset="dtd", root=str(root / "dtd"), split="train", limit=5))
    assert found.index["label"].to_pylist() == [label for _, label in made["dtd"]["train"][:5]] and len(found.classes) == 47


def test_the_root_may_be_the_folder_itself(disk: tuple[Path, dict[str, trees.Made]]) -> None:
    root, _ = disk
    above, itself = (
        named.read(Corpus(dataset="dtd", root=str(place), split="val")) for place in (root / "dtd", root / "dtd/dtd/")
    )
    assert above.index == itself.index


def test_boxes_are_the_json_and_its_folder(disk: tuple[Path, dict[str, trees.Made]]) -> None:
    root, _ = disk
    minival = named.as_file(Corpus(dataset="lvis", root=str(root / "lvis"), split="minival"))
    assert minival.uri == f"{root}/lvis/lvis/annotations/lvis_v1_minival_inserted_image_name.json"
    assert minival.images == f"{root}/lvis/lvis"
    coco = named.as_file(Corpus(dataset="coco", root=str(root / "coco"), split="val"))
    assert coco.images == f"{root}/coco/coco/val2017"
    other = Corpus(uri="photos")
    assert named.as_file(other) is other


WRONG = [
    ("dtd", "split_zhou_DescribableTextures.json", "{", "cannot read"),
    ("dtd", "split_zhou_DescribableTextures.json", '{"train": [], "val": []}', "holds no 'test' list"),
    ("dtd", "split_zhou_DescribableTextures.json", '{"test": [["a.jpg", 0]]}', "holds no 'test' list"),
    ("dtd", "split_zhou_DescribableTextures.json", '{"test": [["a.jpg", 1, "b"]]}', "numbers its 1 classes with gaps"),
    ("fgvc_aircraft", "images_variant_test.txt", "0000001 Spitfire\n", "a variant that is not in variants.txt: 'Spitfire'"),
    ("cub200", "classes.txt", "1\n", "a line that is no pair: '1'"),
    ("cub200", "classes.txt", "1 001.A\n", "has the class number 1, but there are 1 names"),
    ("cub200", "image_class_labels.txt", "1 one\n", "does not fit images.txt"),
    ("stanford_dogs", "lists/test_list.mat", "no matlab", "is no MATLAB file"),
    ("oxford_flowers_official", "cat_to_name.json", '{"rose": "rose"}', "does not fit setid.mat"),
    ("oxford_pets_official", "annotations/test.txt", "Abyssinian_201 one 1 1\n", "is no list of"),
    ("raf_db", "basic/EmoLabel/list_patition_label.txt", "test_0001.jpg\n", "is no list of"),
    ("raf_db", "basic/EmoLabel/list_patition_label.txt", "test_0001.jpg 8\n", "has the class number 7, but there are 7 names"),
    ("imagenet_a", "classnames.txt", "n10000000 tench\n", "has no name for the folder n10000035 of imagenet-a"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), WRONG)
def test_a_wrong_file_is_named_in_one_line(
    name: str, file: str, content: str, message: str, disk: tuple[Path, dict[str, trees.Made]]
) -> None:
    root, _ = disk
    there = root / name / known()[name].folder / file
    right = there.read_bytes()
    there.write_text(content)
    try:
        with pytest.raises(UserError, match=message) as caught:
            named.read(Corpus(dataset=name, root=str(root / name), split="test"))
    finally:
        there.write_bytes(right)
    assert "\n" not in str(caught.value) and name in str(caught.value) and Path(file).name in str(caught.value)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"dataset": "pets"}, "no data set is called 'pets'; did you mean 'oxford_pets'"),
        ({"dataset": "dtd", "split": "validation"}, "dtd has no split 'validation'; it has train, val, test"),
        ({"dataset": "huggingfac"}, "did you mean 'huggingface'"),
    ],
)
def test_mistaken_names(corpus: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        named.read(Corpus.model_validate({"root": "/data", "split": "test", **corpus}))


def test_check_of_a_whole_set_finds_nothing(tmp_path: Path) -> None:
    """As many pictures as were published, over all three splits; then one goes, then a row of the split file."""
    folder = tmp_path / "dtd"
    counts = {"train": 2820, "val": 1128, "test": 1692}
    splits = {
        split: [(f"{split}_{number}.jpg", number % 47, f"texture_{number % 47}") for number in range(count)]
        for split, count in counts.items()
    }
    trees.put(folder / "split_zhou_DescribableTextures.json", json.dumps(splits))
    (folder / "images").mkdir()
    for rows in splits.values():
        for file, _, _ in rows:
            os.close(os.open(folder / "images" / file, os.O_CREAT))
    whole = named.check("dtd", str(tmp_path))
    assert [one[:6] for one in whole] == [(split, count, count, 0, 47, 47) for split, count in counts.items()]
    assert [one.fault for one in whole] == [None] * 3
    (folder / "images/val_7.jpg").unlink()
    splits["test"].pop()
    trees.put(folder / "split_zhou_DescribableTextures.json", json.dumps(splits))
    _, val, test = named.check("dtd", str(tmp_path))
    assert val.absent == 1 and val.fault is not None and "1 of the 1,128 pictures of val are missing" in val.fault
    assert f"{folder}/images/val_7.jpg" in val.fault and "robots.ox.ac.uk" in val.fault
    assert test.fault is not None and "split test has 1,691 pictures, 1,692 were published" in test.fault
    assert [one.split for one in named.check("dtd", str(tmp_path), "train")] == ["train"]


def test_pictures_are_checked_where_only_a_folder_is_gone(disk: tuple[Path, dict[str, trees.Made]], tmp_path: Path) -> None:
    trees.make("eurosat", tmp_path)
    shutil.rmtree(tmp_path / "eurosat/2750/some_class_3")
    (test,) = named.check("eurosat", str(tmp_path), "test")
    assert test.absent == 1 and test.fault is not None and "some_class_3" in test.fault
    rows = named.read(Corpus(dataset="eurosat", root=str(tmp_path), split="test")).index
    gone = rows.filter([label == "some class 3" for label in rows["label"].to_pylist()])
    (error,) = read_many(gone["uri"].to_pylist(), [None], [None])
    assert isinstance(error, RowError)  # one row of errors, not a lost one
