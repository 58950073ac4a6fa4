"""What test_corpus.py does not reach through a corpus: names on other file systems, number ranges, errors in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
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


@settings(deadline=None)
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
