"""What test_corpus.py does not reach through a corpus: names on other file systems, number ranges, errors in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar import storage
from rar.schema import Unavailable, UserError

FILES = ("a/1.tar", "a/2.TAR", "a/note.txt", "a/.hidden/3.tar", "a/._1.tar", "b/4.tar")


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same files in a local folder and in fsspec's memory."""
    folder = str(tmp_path) if request.param == "local" else "memory:///test_storage"
    fs, path = fsspec.url_to_fs(folder)
    for name in FILES:
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", name.encode())
    yield folder
    fs.rm(path, recursive=True)


def test_a_folders_files_by_suffix(root: str) -> None:
    assert storage.files(root, ".tar") == [f"{root}/{name}" for name in ("a/1.tar", "a/2.TAR", "b/4.tar")]
    assert storage.files(root, ".txt", ".tar")[-2:] == [f"{root}/a/note.txt", f"{root}/b/4.tar"]


def test_a_file_whatever_its_suffix(root: str) -> None:
    assert storage.files(f"{root}/a/note.txt", ".tar") == [f"{root}/a/note.txt"]


def test_a_glob(root: str) -> None:
    assert storage.files(f"{root}/*/[14].tar") == [f"{root}/a/1.tar", f"{root}/b/4.tar"]


def test_names_read_back(root: str) -> None:
    for name in storage.files(root, ".tar"):
        with storage.open_file(name) as stream:
            assert name.endswith(stream.read().decode())
            stream.seek(2)
            assert stream.read(1) in b"124"


def test_no_file_of_that_kind(root: str) -> None:
    with pytest.raises(UserError, match=r"no \.csv or \.parquet file in folder"):
        storage.files(root, ".csv", ".parquet")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.tar", "a/1.tar/deeper", "a/{1..3}.tar"])
def test_nothing_there(root: str, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.files(f"{root}/{name}", ".tar")


def test_number_ranges_keep_their_zeros_and_order(tmp_path: Path) -> None:
    names = [f"part-{number:03d}.tar" for number in (98, 99, 100, 101)]
    for name in names:
        (tmp_path / name).touch()
    assert storage.files(f"{tmp_path}/part-{{098..101}}.tar") == [f"{tmp_path}/{name}" for name in names]
    assert storage.files(f"{tmp_path}/part-{{099..099}}.tar") == [f"{tmp_path}/part-099.tar"]


def test_two_ranges_in_one_name(tmp_path: Path) -> None:
    for name in ("1-8", "1-9", "2-8", "2-9"):
        (tmp_path / name).touch()
    assert storage.files(f"{tmp_path}/{{1..2}}-{{8..9}}") == [f"{tmp_path}/{name}" for name in ("1-8", "1-9", "2-8", "2-9")]


def test_numbered_parts_are_in_natural_order(root: str) -> None:
    fs, path = fsspec.url_to_fs(root)
    for number in (10, 9, 2, 100):
        fs.pipe_file(f"{path}/p_{number}.npy", b"")
    found = [f"{root}/p_{number}.npy" for number in (2, 9, 10, 100)]
    assert storage.files(root, ".npy") == storage.files(f"{root}/p_*.npy") == found


@given(st.lists(st.text("a0129_/", max_size=6), max_size=6))
def test_natural_order_is_an_order(names: list[str]) -> None:
    found = sorted(names, key=storage.natural)
    assert sorted(reversed(names), key=storage.natural) == found
    assert sorted(["a10", "a9", "a09", "b1", "a"], key=storage.natural) == ["a", "a09", "a9", "a10", "b1"]


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "1.tar").touch()
    assert storage.files("~/1.tar") == storage.files("~", ".tar") == [f"{tmp_path}/1.tar"]
    monkeypatch.chdir(tmp_path)
    assert storage.locate("~nobody~/1.tar")[1] == f"{tmp_path}/~nobody~/1.tar"


def walked(root: Path) -> list[str]:
    return sorted(storage.walk(*storage.locate(str(root))))


def test_loops_of_links_end(tmp_path: Path) -> None:
    for name in ("store/deep", "set/cat", "set/dog"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "store/1.png").touch()
    (tmp_path / "store/deep/up").symlink_to(tmp_path / "store")
    for name in ("set/cat/all", "set/dog/all"):
        (tmp_path / name).symlink_to(tmp_path / "store")
    (tmp_path / "set/cat/root").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to("self")
    (tmp_path / "set/gone").symlink_to("nowhere")
    assert walked(tmp_path / "set") == ["cat/all/1.png", "dog/all/1.png", "gone", "self"]


@settings(max_examples=60)
@given(
    folders=st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join), min_size=1, max_size=6, unique=True
    ),
    links=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=12),
)
def test_random_trees_with_links_end(
    tmp_path_factory: pytest.TempPathFactory, folders: list[str], links: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "f").touch()
    for number, (source, target) in enumerate(links):
        to = root / folders[target % len(folders)] if target < 6 else root
        (root / folders[source % len(folders)] / f"l{number}").symlink_to(to)
    found = walked(root)
    assert found == walked(root) and len(found) == len(set(found))
    real = {str(file.relative_to(root)) for file in root.rglob("f")}
    assert {os.path.relpath(os.path.realpath(root / name), root) for name in found} == real  # every file, by some name
    tops = {name.partition("/")[0] for name in folders}
    assert len(found) <= len(tops) * len(real)


def test_kinds(root: str) -> None:
    for name, kind in (("a", "directory"), ("a/1.tar", "file"), ("nowhere", ""), ("a/1.tar/deeper", "")):
        assert storage.kind_of(*storage.locate(f"{root}/{name}")) == kind


def test_the_empty_name() -> None:
    with pytest.raises(ValueError, match="empty"):
        storage.locate("")


@pytest.mark.parametrize(
    ("name", "suffix", "hidden"),
    [
        ("a/b.TAR", ".tar", False),
        ("a/b.tar.gz", ".gz", False),
        ("a.d/b", "", False),
        (".a/b.tar", ".tar", True),
        ("a/._b.jpg", ".jpg", True),
        ("../a/./b.png", ".png", False),
    ],
)
def test_suffixes_and_hidden_names(name: str, suffix: str, hidden: bool) -> None:
    assert (storage.suffix(name), storage.hidden(name)) == (suffix, hidden)


@given(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_name_is_hidden_by_any_of_its_parts(parts: list[str]) -> None:
    alone = [storage.hidden(part) for part in parts]
    assert storage.hidden("/".join(parts)) == any(alone)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError(2, "no such file", "photos/1.tar"), UserError, "photos/1.tar does not exist; check the path"),
        (FileNotFoundError(), UserError, "s3://b/photos does not exist; check the path"),
        (NotADirectoryError(20, "not a directory", "1.tar/x"), UserError, "1.tar/x does not exist; check the path"),
        (PermissionError(13, "no", "1.tar"), UserError, "no permission to read 1.tar; change its permissions or the path"),
        (ValueError("two\n  lines"), UserError, "cannot read s3://b/photos: two lines"),
        (pa.ArrowNotImplementedError("wide integers"), UserError, "cannot read s3://b/photos: wide integers"),
        (ImportError("install s3fs"), UserError, "cannot read s3://b/photos: install s3fs"),
        (OSError("timed\nout"), Unavailable, "s3://b/photos does not answer: timed out"),
    ],
)
def test_errors_in_the_users_terms(error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as raised, storage.explained("corpus", "s3://b/photos"):
        raise error
    assert str(raised.value) == f"corpus: {words}"


def test_a_local_disk_that_fails_is_no_absent_dependency() -> None:
    with pytest.raises(UserError, match="cannot read photos: disk full"), storage.explained("corpus", "photos"):
        raise OSError("disk full")


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), storage.explained("corpus", "photos"):
        raise ZeroDivisionError
