from __future__ import annotations

import csv
import errno
import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tenacity import wait_none

from rar import storage
from rar.config import Corpus
from rar.corpus.decode import decode
from rar.corpus.listing import class_names, list_images, read_many, remarks
from rar.schema import INDEX, RowError, Unavailable, UserError
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")


def write(root: str | Path, files: dict[str, bytes]) -> str:
    """Write files below a folder of any file system; gives the folder."""
    for name, data in files.items():
        fs, path = fsspec.core.url_to_fs(f"{root}/{name}")
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe(path, data)
    return str(root)


def tar(members: dict[str, bytes], pax: bool = True) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def parquet(columns: dict[str, pa.Array | list], row_group_size: int = 2) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=row_group_size)
    return stream.getvalue()


def picture(grey: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), grey).save(stream, "PNG")
    return stream.getvalue()


def index(uri: str, **settings: Any) -> pa.Table:
    return list_images(Corpus.model_validate({"uri": uri, **settings}))


def names(table: pa.Table) -> list[str]:
    """What follows the last / of every uri."""
    return [uri.rpartition("/")[2] for uri in table["uri"].to_pylist()]


def labels(table: pa.Table) -> list[str | None]:
    return table["label"].to_pylist()


def read(table: pa.Table) -> list[bytes | RowError]:
    return read_many(*(table[column].to_pylist() for column in ("uri", "offset", "size")))


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder, once on the disk and once on a file system that only fsspec knows."""
    if request.param == "local":
        yield str(tmp_path)
        return
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    fs, path = fsspec.core.url_to_fs(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


# Folders


def test_a_folder_lists_every_image_with_its_class(root: str) -> None:
    write(root, {"dog/b.JPG": b"1", "dog/deep/er/a.webp": b"2", "cat/x.tiff": b"3", "top.png": b"4", "cat/notes.txt": b"5"})
    table = index(root)
    assert table.schema == INDEX
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert names(table) == ["x.tiff", "b.JPG", "a.webp", "top.png"]
    assert labels(table) == ["cat", "dog", "dog", None]
    assert table["offset"].null_count == table["size"].null_count == 4
    assert read(table) == [b"3", b"1", b"2", b"4"]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "JPEG", "Png"])
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    assert names(index(write(tmp_path, {f"a.{suffix}": b"broken, and listed"}))) == [f"a.{suffix}"]


def test_the_order_is_by_name_and_limit_takes_the_first(root: str) -> None:
    write(root, {f"{number}.png": b"x" for number in (3, 1, 10, 2)})
    assert names(index(root)) == ["1.png", "10.png", "2.png", "3.png"]
    assert names(index(root, limit=2)) == ["1.png", "10.png"]
    assert len(index(root, limit=99)) == 4


def test_what_is_left_out_is_counted_by_suffix(root: str) -> None:
    files = {
        "a/1.png": b"x",
        "a/2": picture(),
        "a/LICENSE": b"text",
        "b/x.txt": b"",
        "b/y.TXT": b"",
        "b/z.svg": b"",
        "b/.hidden": b"",
    }
    table = index(write(root, files))
    assert names(table) == ["1.png", "2"] and labels(table) == ["a", "a"]
    assert remarks(table) == [
        "4 files are no pictures by their name or first bytes, and left out: 2 .txt, 1 .svg, 1 without a suffix"
    ]


def test_remarks_are_one_line_each_whatever_names_hold(tmp_path: Path) -> None:
    write(tmp_path, {"1.png": b"x"})
    for name in (b"a.t\nxt", b"b.\xe9"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    (line,) = remarks(index(str(tmp_path)))
    assert "\n" not in line and "1 .t xt" in line and line.encode()


def test_a_folder_of_files_without_a_suffix(root: str) -> None:
    write(root, {f"{number}": picture(number) for number in range(300)} | {"notes": b"text"})
    table = index(root)
    assert len(table) == 300 and [decode(data)[0, 0, 0] for data in read(table)[:2] if isinstance(data, bytes)] == [0, 1]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images, tars or parquet files in folder .*: its files are \.mp4, \.txt"):
        index(write(tmp_path, {"a.txt": b"", "b.mp4": b""}))
    with pytest.raises(UserError, match="left out: 1 without a suffix"):
        index(write(tmp_path / "bare", {"README": b"text"}))


def test_folders_within_class_folders_are_told(tmp_path: Path) -> None:
    for name in ("Fruit/Apple/Golden/a.jpg", "Fruit/Pear/b.jpg", "Dairy/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    index = list_images(Corpus(uri=str(tmp_path)))
    assert index["label"].to_pylist() == ["Dairy", "Fruit", "Fruit"]
    (told,) = remarks(index)
    assert told.startswith("2 pictures lie deeper") and "Fruit/Apple/Golden/a.jpg" in told
    (tmp_path / "flat" / "x").mkdir(parents=True)
    (tmp_path / "flat" / "x" / "a.jpg").write_bytes(b"x")
    assert not remarks(list_images(Corpus(uri=str(tmp_path / "flat"))))


def test_folders_of_decomposed_names_have_composed_labels(root: str) -> None:
    table = index(write(root, {"cafe\u0301 /1.png": b"x"}))
    assert labels(table) == ["caf\u00e9"] and read(table) == [b"x"]


def test_hidden_files_are_not_listed(root: str) -> None:
    write(root, {"a/1.png": b"x", "a/._1.png": b"x", ".thumbs/2.png": b"x"})
    assert names(index(root)) == ["1.png"]


def test_a_folder_below_a_hidden_one_is_listed(tmp_path: Path) -> None:
    assert names(index(write(tmp_path / ".cache", {"1.png": b"x"}))) == ["1.png"]


def test_relative_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"photos/cat/1.png": b"x"})
    monkeypatch.chdir(tmp_path)
    for uri in ("photos", "photos/", "./photos"):
        assert index(uri)["uri"].to_pylist() == [str(tmp_path / "photos/cat/1.png")]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store", {"1.png": b"x"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    assert labels(index(str(tmp_path / "set"))) == ["cat"]


def test_strange_file_names(tmp_path: Path) -> None:
    odd = ["a b.png", "a#1.png", "ü.png", "x.tar#y.png", "a?b*[c].png", "p%20q.png", "e:f.png", "g::h.png", "x.parquet#1.png"]
    for name in odd:
        (tmp_path / name).write_bytes(name.encode())
    table = index(str(tmp_path))
    assert sorted(names(table)) == sorted(odd)
    assert read(table) == [name.encode() for name in names(table)]


def test_a_name_that_is_no_utf8_keeps_its_row(tmp_path: Path) -> None:
    write(tmp_path, {"b.png": b"fine"})
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    table = index(str(tmp_path))
    fine, lost = sorted(read(table), key=lambda result: isinstance(result, RowError))
    assert fine == b"fine" and isinstance(lost, RowError)


# Manifests


def test_a_csv_manifest(root: str) -> None:
    write(root, {"m.csv": b"uri,label,note\na/1.png,007,x\nb.png,,y\n", "a/1.png": b"1", "b.png": b"2"})
    table = index(f"{root}/m.csv")
    assert labels(table) == ["007", None]
    assert read(table) == [b"1", b"2"]


def test_manifest_columns_and_images_folder(root: str) -> None:
    write(root, {"lists/m.csv": b"\xef\xbb\xbfpath,class_id\n1.png,3\n", "images/1.png": b"1"})
    table = index(f"{root}/lists/m.csv", images=f"{root}/images", uri_column="path", label_column="class_id")
    assert labels(table) == ["3"]
    assert read(table) == [b"1"]


def test_manifest_keeps_order_duplicates_and_full_names(tmp_path: Path) -> None:
    write(tmp_path, {"z.png": b"z", "a.png": b"a"})
    rows = ["z.png", "a.png", "z.png", str(tmp_path / "a.png"), (tmp_path / "z.png").as_uri()]
    (tmp_path / "m.csv").write_text("uri\n" + "\n".join(rows) + "\n")
    table = index(str(tmp_path / "m.csv"))
    assert labels(table) == [None] * 5
    assert read(table) == [b"z", b"a", b"z", b"a", b"z"]


def test_a_parquet_manifest_is_told_from_a_parquet_of_images(root: str) -> None:
    manifest = {"uri": ["1.png", None, "nowhere.png"], "label": [3, None, 5]}
    write(root, {"m.parquet": parquet(manifest), "1.png": b"1"})
    table = index(f"{root}/m.parquet")
    assert labels(table) == ["3", None, "5"]
    first, empty, missing = read(table)
    assert first == b"1"
    assert isinstance(empty, RowError) and "empty" in str(empty)
    assert isinstance(missing, RowError) and str(missing) == "file not found"


def test_missing_number_labels_are_no_labels(tmp_path: Path) -> None:
    write(tmp_path, {"m.parquet": parquet({"uri": ["1.png", "2.png"], "label": [1.0, float("nan")]})})
    assert labels(index(str(tmp_path / "m.parquet"))) == ["1.0", None]


# WebDataset


SHARD = {
    "0001.jpg": b"first",
    "0001.cls": b"3\n",
    "0001.txt": b"a caption",
    "0002.txt": b"cat",
    "0002.PNG": b"second",
    "dir/0003.webp": b"third",
    "dir/0003.json": b"{}",
    "0003.cls": b"not of dir/0003",
    "._0004.jpg": b"hidden",
}


def test_a_tar_is_read_by_ranges_of_its_members(root: str) -> None:
    write(root, {"s.tar": tar(SHARD)})
    table = index(f"{root}/s.tar")
    assert [uri.partition("s.tar#")[2] for uri in table["uri"].to_pylist()] == ["0001.jpg", "0002.PNG", "dir/0003.webp"]
    assert labels(table) == ["3", "cat", None]
    assert read(table) == [b"first", b"second", b"third"]
    whole = fsspec.open(f"{root}/s.tar").open().read()
    for offset, size, data in zip(table["offset"].to_pylist(), table["size"].to_pylist(), read(table), strict=True):
        assert whole[offset : offset + size] == data


@pytest.mark.parametrize("pattern", ["s-*.tar", "s-{000..002}.tar", "", "s-[0-9]*.tar"])
def test_several_tars(root: str, pattern: str) -> None:
    write(root, {f"s-{number:03d}.tar": tar({f"{number}.jpg": b"%d" % number}) for number in (2, 0, 1)})
    table = index(f"{root}/{pattern}")
    assert read(table) == [b"0", b"1", b"2"]
    assert read(index(f"{root}/{pattern}", limit=2)) == [b"0", b"1"]


def test_long_and_dotted_member_names(tmp_path: Path) -> None:
    long = "deep/" * 60 + "photo.jpg"
    write(tmp_path, {"s.tar": tar({long: b"x", "./a/b.left.jpg": b"y", "./a/b.cls": b"1", "c#d.tar#e.jpg": b"z"})})
    table = index(str(tmp_path / "s.tar"))
    assert labels(table) == [None, "1", None]
    assert read(table) == [b"x", b"y", b"z"]


def test_labels_of_a_tar_in_capitals_or_empty(root: str) -> None:
    write(root, {"a.tar": tar({"A.JPG": b"a", "A.CLS": b"cat\n", "b.jpg": b"b", "b.cls": b""})})
    table = list_images(Corpus(uri=f"{root}/a.tar"))
    assert table["label"].to_pylist() == ["cat", None]
    assert remarks(table) == ["labels: 1 from .cls; 1 pictures have none"]


def test_names_of_windows_are_below_the_folder_too(root: str) -> None:
    write(root, {"m.csv": b"uri,label\nsub\\a.jpg,cat\nsub/b\\c.jpg,dog\n", "sub/a.jpg": b"a", "sub/b\\c.jpg": b"b"})
    write(root, {"m.json": b'{"images": [{"id": 1, "file_name": "sub\\\\a.jpg"}]}'})
    assert read(list_images(Corpus(uri=f"{root}/m.csv"))) == [b"a", b"b"]
    assert read(list_images(Corpus(uri=f"{root}/m.json"))) == [b"a"]


def test_links_in_a_tar_keep_their_row(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"bytes"})
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            archive.add(tmp_path / name, name)
    assert read(index(str(tmp_path / "s.tar"))) == [b"bytes", b"bytes", b""]


def test_a_tar_that_shrinks_after_indexing_loses_only_its_cut_rows(root: str) -> None:
    data = tar({"a.jpg": b"a" * 700, "b.jpg": b"b" * 700})
    write(root, {"s.tar": data})
    table = index(f"{root}/s.tar")
    write(root, {"s.tar": data[: table["offset"][1].as_py() + 300]})
    first, second = read(table)
    assert first == b"a" * 700
    assert isinstance(second, RowError) and str(second).startswith("cut short: 300 of 700 bytes")


@pytest.mark.parametrize("damage", ["cut header", "cut content", "broken header", "no tar", "empty file"])
def test_a_damaged_tar_is_never_half_listed(tmp_path: Path, damage: str) -> None:
    data = tar({"a.jpg": b"a" * 700, "b.jpg": b"b" * 700}, pax=False)
    second = 512 + 1024
    broken = {
        "cut header": data[: second + 100],
        "cut content": data[: second + 600],
        "broken header": data[: second + 10] + b"?" + data[second + 11 :],
        "no tar": b"hello" * 200,
        "empty file": b"",
    }[damage]
    write(tmp_path, {"s.tar": broken})
    with pytest.raises(UserError, match=r"s\.tar is not a whole, plain tar"):
        index(str(tmp_path / "s.tar"))


def test_the_label_of_a_sample(root: str) -> None:
    sample = {"1.jpg": b"x", "1.json": b'{"label": 3, "class_name": "cat", "caption": "a cat"}', "1.txt": b"a cat"}
    write(root, {"s.tar": tar(sample)})
    found = {key: labels(index(f"{root}/s.tar", label_key=key)) for key in (None, "txt", ".txt", "label", "gone")}
    assert found == {None: ["cat"], "txt": ["a cat"], ".txt": ["a cat"], "label": ["3"], "gone": [None]}
    assert remarks(index(f"{root}/s.tar", label_key="gone")) == [
        "labels: none (no sample has 'gone'); corpus.label_key names another member or field"
    ]


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["cat", "red fox", "black footed albatross"], True),
        (["american pit bull terrier"] * 2 + ["cat"] * 2, True),
        (["american pit bull terrier"], False),  # said once, it may be a caption
        (["a dog on a mat", "two cats on the road to rome"], False),
        (["cat\ndog"] * 4, False),
        (["x" * 81] * 4, False),
    ],
)
def test_texts_that_look_like_classes(tmp_path: Path, texts: list[str], classes: bool) -> None:
    members = {
        f"{number}.{suffix}": data
        for number, text in enumerate(texts)
        for suffix, data in (("jpg", b"x"), ("txt", text.encode()))
    }
    table = index(write(tmp_path, {"s.tar": tar(members)}) + "/s.tar")
    assert labels(table) == (texts if classes else [None] * len(texts))


def test_names_several_times_and_with_dots(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in [
            ("0.jpg", b"a"),
            ("0.jpg", b"b"),
            ("0.cls", b"x"),
            ("0.cls", b"y"),
            ("a.b.c.jpg", b"c"),
            ("a.cls", b"z"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    table = index(write(tmp_path, {"s.tar": stream.getvalue()}) + "/s.tar")
    assert (read(table), labels(table)) == ([b"a", b"b", b"c"], ["x", "y", "z"])
    assert remarks(table)[-1].startswith("1 rows name a picture that an earlier row names too")


def test_class_numbers_are_named_by_a_file_beside(root: str) -> None:
    one = tar({"0.jpg": b"x", "0.cls": b"1", "1.jpg": b"y", "1.cls": b"0", "2.jpg": b"z", "clip": b"film", "3.mp4": b"film"})
    write(root, {"test/0.tar": one, "classnames.txt": "cat\ncafe\u0301\n".encode()})
    table = index(f"{root}/test")
    assert labels(table) == ["caf\u00e9", "cat", None]
    assert [line.partition(":")[0] for line in remarks(table)[:2]] == [
        "2 members of the tars are no pictures, and left out",
        "labels",
    ]
    assert remarks(table)[2].startswith("numbers among them are named by ") and remarks(table)[2].endswith("/classnames.txt")
    write(root, {"classnames.txt": b"cat"})
    assert labels(index(f"{root}/test")) == ["1", "0", None]  # not numbers of this file


# Parquet


def test_parquet_with_bytes(root: str) -> None:
    images = [b"0", b"1", b"2", b"3", b"4"]
    write(root, {"p.parquet": parquet({"bytes": images, "label": ["a", "b", None, "", "e"]})})
    table = index(f"{root}/p.parquet")
    assert names(table) == [f"p.parquet#{row}" for row in range(5)]
    assert labels(table) == ["a", "b", None, None, "e"]
    assert read(table) == images
    assert read(table.take([4, 0, 4, 3])) == [b"4", b"0", b"4", b"3"]
    assert len(index(f"{root}/p.parquet", limit=3)) == 3


def test_other_columns_and_several_files(root: str) -> None:
    for number in (1, 0):
        data = parquet({"image": [b"%d" % number], "thumb": [b"t"], "y": [number]})
        write(root, {f"part-{number}.parquet": data})
    for uri in (root, f"{root}/part-*.parquet"):
        table = index(uri, bytes_column="image", label_column="y")
        assert labels(table) == ["0", "1"]
        assert read(table) == [b"0", b"1"]


def test_hugging_face_image_columns(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"0", "path": "a.png"}, None, {"bytes": None, "path": "c.png"}])
    write(tmp_path, {"p.parquet": parquet({"image": images})})
    first, *others = read(index(str(tmp_path / "p.parquet"), bytes_column="image"))
    assert first == b"0"
    assert [str(error) for error in others] == ["null instead of image bytes", "file not found"]


def test_large_row_groups_are_read_in_pieces(tmp_path: Path) -> None:
    images = [b"%d" % number for number in range(1000)]
    write(tmp_path, {"p.parquet": parquet({"bytes": images}, row_group_size=400)})
    table = index(str(tmp_path / "p.parquet"))
    rows = [999, 0, 63, 64, 65, 399, 400, 401, 800]
    assert read(table.take(rows)) == [images[row] for row in rows]


# COCO


def test_coco_and_lvis_files(root: str) -> None:
    images = [{"id": 9, "file_name": "sub/1.jpg"}, {"id": 2, "coco_url": "http://images.example.org/val2017/2.jpg"}]
    write(root, {"ann/a.json": json.dumps({"images": images}).encode(), "images/sub/1.jpg": b"1", "images/2.jpg": b"2"})
    table = index(f"{root}/ann/a.json", images=f"{root}/images")
    assert labels(table) == [None, None]
    assert read(table) == [b"1", b"2"]


def test_a_nameless_picture_of_a_coco_file_stays_a_row(root: str) -> None:
    write(root, {"a.json": json.dumps({"images": [{"id": 1}, {"id": 2, "file_name": "1.jpg"}]}).encode(), "1.jpg": b"1"})
    table = index(f"{root}/a.json")
    assert table["uri"][0].as_py().endswith("a.json#images[0]")
    nameless, good = read(table)
    assert isinstance(nameless, RowError) and good == b"1"


@needs_data
def test_real_photos_by_coco_file() -> None:
    table = index(str(SHARED_DATA / "coco/photos128.json"), images=str(SHARED_DATA / "coco/images"))
    assert len(table) == 128
    results = read(table)
    assert [decode(data).ndim for data in results if isinstance(data, bytes)] == [3] * 128


@needs_data
def test_real_photos_by_folder_and_by_manifest() -> None:
    folder = index(str(SHARED_DATA / "grocery/images"))
    assert len(folder) == 2936 and set(labels(folder)) == {"train", "val"}
    images = str(SHARED_DATA / "grocery/images")
    rows = list(csv.DictReader((SHARED_DATA / "grocery/train.csv").open()))
    table = index(str(SHARED_DATA / "grocery/train.csv"), images=images, uri_column="path", label_column="class_id")
    assert labels(table) == [row["class_id"] for row in rows]
    assert set(table["uri"].to_pylist()) <= set(folder["uri"].to_pylist())
    assert all(isinstance(data, bytes) for data in read(table.slice(0, 50)))


# The user's mistakes


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"uri": "nowhere"}, "nowhere does not exist"),
        ({"uri": "nowhere", "format": "folder"}, "nowhere is not a folder"),
        ({"uri": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"uri": "no-*.tar"}, r"no-\*.tar does not exist"),
        ({"uri": "s-{0..1}.tar"}, "s-0.tar does not exist"),
        ({"uri": "nowhere.parquet"}, "nowhere.parquet does not exist"),
        ({"uri": "empty"}, "no images, tars or parquet files in folder .*empty"),
        ({"uri": "empty", "format": "folder"}, "no images in .*empty"),
        ({"uri": "empty", "format": "webdataset"}, "no .tar file in folder empty"),
        ({"uri": "notes.txt"}, "set corpus.format"),
        ({"uri": "notes.txt", "format": "folder"}, "is not a folder"),
        ({"uri": "a.tar.gz"}, "unpack it to a plain .tar"),
        ({"uri": "members.tar"}, "no images in .*members.tar"),
        ({"uri": "zero.csv"}, "no images in .*zero.csv"),
        ({"uri": "blank.csv"}, "blank.csv is empty"),
        ({"uri": "ragged.csv"}, "ragged.csv, line 3: 3 cells under 2 columns"),
        ({"uri": "columns.csv"}, r"no column 'uri'; set corpus.uri_column: \['path', 'y'\]"),
        ({"uri": "columns.csv", "uri_column": "path", "label_column": "class"}, "no column 'class'"),
        ({"uri": "columns.csv", "uri_column": "path", "images": "gone"}, "gone is not a folder; check corpus.images"),
        ({"uri": "zero.parquet"}, "no images in .*zero.parquet"),
        ({"uri": "broken.parquet"}, "cannot read .*broken.parquet"),
        ({"uri": "zero.parquet", "format": "parquet", "bytes_column": "image"}, "no image bytes in column 'image'"),
        ({"uri": "broken.json"}, "broken.json is not valid JSON"),
        ({"uri": "list.json"}, "is a list, no COCO file"),
        ({"uri": "zero.json"}, "no images in .*zero.json"),
        ({"uri": "nosuchprotocol://x"}, "cannot read nosuchprotocol"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: dict[str, str], message: str
) -> None:
    write(
        tmp_path,
        {
            "notes.txt": b"x",
            "a.tar.gz": b"x",
            "members.tar": tar({"a.txt": b"x"}),
            "zero.csv": b"uri,label\n",
            "blank.csv": b"",
            "ragged.csv": b"uri,label\n1.png,a\n2.png,b,c\n",
            "columns.csv": b"path,y\n1.png,2\n",
            "zero.parquet": parquet({"bytes": pa.array([], pa.binary())}),
            "broken.parquet": b"PAR1 not really",
            "broken.json": b"{",
            "list.json": b"[1]",
            "zero.json": b'{"images": []}',
            "nameless.json": b'{"images": [{"id": 1}]}',
        },
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        index(**corpus)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("corpus: ")


class _AwayFileSystem(fsspec.AbstractFileSystem):
    """Storage that does not answer."""

    protocol = "away"

    def info(self, path: str, **_: object) -> dict[str, object]:
        raise ConnectionError("timed out")

    def ls(self, path: str, detail: bool = True, **_: object) -> list[dict[str, object]]:
        raise ConnectionError("timed out")


@pytest.fixture
def away() -> str:
    fsspec.register_implementation("away", _AwayFileSystem, clobber=True)
    return "away://bucket"


def test_storage_that_stays_away(away: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="away://bucket"):
        index(f"{away}/s.tar")
    monkeypatch.setattr(storage, "PATIENCE_S", 0.01)
    with pytest.raises(Unavailable, match=r"away://bucket/1\.png did not answer for 0\.01 s: timed out"):
        read_many([f"{away}/1.png"], [None], [None])


class _ThrottlingFileSystem(fsspec.AbstractFileSystem):
    """A store that answers one request in three; it lacks one file, and refuses to read another beyond its end."""

    protocol = "throttling"
    asked = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        _ThrottlingFileSystem.asked += 1
        if _ThrottlingFileSystem.asked % 3:
            raise OSError(errno.EBUSY, "reduce your request rate")
        if "gone" in path:
            raise FileNotFoundError(path)
        if "short" in path:
            raise OSError(errno.EINVAL, "the requested range is not satisfiable")
        return path.encode()


def test_storage_that_throttles_loses_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("throttling", _ThrottlingFileSystem, clobber=True)
    monkeypatch.setattr(storage, "wait_random_exponential", lambda *bounds, **more: wait_none())
    names = ["a", "gone", "b", "short", "c"]
    found = read_many([f"throttling://{name}" for name in names], [None] * 5, [None] * 5)
    assert [one for one in found if isinstance(one, bytes)] == [b"a", b"b", b"c"]
    assert str(found[1]) == "file not found" and "not satisfiable" in str(found[3])


# Reading


def test_read_many_keeps_positions_whatever_fails(root: str, tmp_path: Path) -> None:
    write(root, {"1.png": b"1", "s.tar": tar({"a.jpg": b"a"}), "p.parquet": parquet({"bytes": [b"x", None]})})
    member = index(f"{root}/s.tar")
    offset, size = member["offset"][0].as_py(), member["size"][0].as_py()
    rows: list[tuple[str, int | None, int | None, bytes | None]] = [
        (f"{root}/1.png", None, None, b"1"),
        (f"{root}/gone.png", None, None, None),
        (f"{root}/s.tar#a.jpg", offset, size, b"a"),
        (f"{root}/gone.tar#a.jpg", offset, size, None),
        (f"{root}/s.tar#a.jpg", 10**9, size, None),
        (f"{root}/p.parquet#0", None, None, b"x"),
        (f"{root}/p.parquet#1", None, None, None),
        (f"{root}/p.parquet#7", None, None, None),
        (f"{root}/p.parquet#0:other", None, None, None),
        (f"{root}/gone.parquet#0", None, None, None),
        (f"{root}/1.png", None, None, b"1"),
        ("", None, None, None),
        ("nosuchprotocol://x", None, None, None),
        (str(tmp_path), None, None, None),
        ("\0", None, None, None),
    ]
    uris, offsets, sizes, expected = zip(*rows, strict=True)
    results = read_many(uris, offsets, sizes)
    assert [result if isinstance(result, bytes) else None for result in results] == list(expected)
    for result in results:
        assert isinstance(result, bytes) or (isinstance(result, RowError) and str(result) and "\n" not in str(result))
    assert read_many([], [], []) == []


def test_one_broken_row_group_does_not_take_the_others_along(tmp_path: Path) -> None:
    images = [bytes([number]) * 3000 for number in range(6)]
    stream = io.BytesIO()
    options = {"row_group_size": 2, "compression": "NONE", "use_dictionary": False}
    pq.write_table(pa.table({"bytes": images}), stream, **options)
    data = bytearray(stream.getvalue())
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    data[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    write(tmp_path, {"p.parquet": bytes(data)})
    results = read(index(str(tmp_path / "p.parquet")))
    assert results[:2] == images[:2] and results[4:] == images[4:]
    assert all(isinstance(result, RowError) for result in results[2:4])


@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.text(max_size=12), st.sampled_from(["memory://zz/1.png", "a.tar#b", "x.parquet#3", "x.parquet#1:c"])),
            st.one_of(st.none(), st.integers(0, 2**40)),
            st.one_of(st.none(), st.integers(0, 2**20)),
        ),
        max_size=8,
    )
)
@settings(max_examples=150)
def test_any_rows_give_one_result_each(rows: list[tuple[str, int | None, int | None]]) -> None:
    results = read_many([uri for uri, _, _ in rows], [offset for _, offset, _ in rows], [size for _, _, size in rows])
    assert len(results) == len(rows)
    assert all(isinstance(result, bytes | RowError) for result in results)


def test_all_formats_give_the_same_images(root: str) -> None:
    """The slow, obvious oracle: the files themselves."""
    pictures = {f"{name}.png": picture(number) for number, name in enumerate("abc")}
    listing = "uri,label\n" + "".join(f"folder/x/{name},x\n" for name in pictures)
    data = {
        **{f"folder/x/{name}": content for name, content in pictures.items()},
        "m.csv": listing.encode(),
        "s.tar": tar(pictures | {f"{name[0]}.cls": b"x" for name in pictures}),
        "p.parquet": parquet({"bytes": list(pictures.values()), "label": ["x"] * 3}),
        "c.json": json.dumps({"images": [{"file_name": f"folder/x/{name}"} for name in pictures]}).encode(),
    }
    write(root, data)
    for uri in ("folder", "m.csv", "s.tar", "p.parquet", "c.json"):
        table = index(f"{root}/{uri}")
        assert read(table) == list(pictures.values())
        assert labels(table) == [None if uri == "c.json" else "x"] * 3
        assert index(f"{root}/{uri}") == table
        assert [int(decode(blob)[0, 0, 0]) for blob in read(table) if isinstance(blob, bytes)] == [0, 1, 2]


# Class names


def test_class_names_from_a_list_and_files(root: str) -> None:
    write(
        root,
        {
            "a.txt": "\ufeffcat\r\n dog \n\nüber cat\n".encode(),
            "b.json": b'["cat", "dog"]',
            "c.json": b'{"categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]}',
            "d.json": b'[{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}]',
            "e.json": b'{"annotations": [{}, 1], "categories": [{"id": "10", "name": "dog"}, {"id": 9.0, "name": " cat"}]}',
            "f.txt": b"cat\rdog\r",
        },
    )
    assert class_names(["dog", " cat"]) == ["dog", "cat"]
    assert class_names(f"{root}/a.txt") == ["cat", "dog", "über cat"]
    for file in ("b.json", "c.json", "d.json", "e.json", "f.txt"):
        assert class_names(f"{root}/{file}") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "there are none"),
        (["a", " "], "number 2 is empty"),
        (["a", "b", "a ", "c", "b"], "repeat: 'a', 'b'"),
        (["x"] * 2 + [str(number // 2) for number in range(14)], "and 3 more"),
        ("nowhere.txt", "nowhere.txt does not exist"),
        ("cat, dog", "neither a .txt nor a .json file"),
        ("blank.txt", "blank.txt: there are none"),
        ("latin1.txt", "cannot read latin1.txt"),
        ("broken.json", "broken.json is not valid JSON"),
        ("numbers.json", "must hold a list of names"),
        ("object.json", "must hold a list of names"),
        ("noid.json", "must hold a list of names"),
        ("null.json", "number 1 is empty"),
        ("badid.json", "must hold a list of names"),
    ],
)
def test_class_name_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str | list[str], message: str) -> None:
    files = {"blank.txt": b"\n", "latin1.txt": b"caf\xe9", "broken.json": b"[", "numbers.json": b"[1, 2]", "object.json": b"{}"}
    files |= {"noid.json": b'[{"name": "cat"}]', "null.json": b'[{"id": 1, "name": null}]'}
    write(tmp_path, files | {"badid.json": b'[{"id": null, "name": "cat"}]'})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        class_names(spec)
    assert "\n" not in str(caught.value)


@needs_data
def test_real_vocabularies() -> None:
    assert len(class_names(str(SHARED_DATA / "v3det/category_names.txt"))) == 13_204
    lvis = class_names(str(SHARED_DATA / "lvis/categories_v1.json"))
    assert len(lvis) == 1203 and lvis[0] == "aerosol_can"
    assert len(class_names(str(SHARED_DATA / "lvis/lvis_v05_val_100.json"))) == 1230


def test_a_table_on_a_file_system_that_nobody_knows_is_a_row() -> None:
    found = read_many(["nosuch://bucket/a.parquet#0", "nosuch://bucket/a.jpg"], [None, None], [None, None])
    assert all(isinstance(one, RowError) for one in found)
