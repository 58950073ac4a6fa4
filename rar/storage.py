"""Where files lie: names on any fsspec file system, listed in an order that does not depend on it.

A name without `://` is local, and is made absolute, because workers may run in another folder. Files and folders whose name
starts with a dot are not listed (`.ipynb_checkpoints`, macOS's `._photo.jpg`). Links are followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rar.schema import Unavailable, UserError

NUMBER_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def files(uri: str, *suffixes: str) -> list[str]:
    """A file, a glob, a `{000..123}` range or a folder (its files with these suffixes) -> full names, sorted.

    Raises UserError or FileNotFoundError where there is none.
    """
    numbers = NUMBER_RANGE.search(uri)
    if numbers:
        first, last = numbers.groups()
        filled = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
        return [file for text in filled for file in files(uri[: numbers.start()] + text + uri[numbers.end() :], *suffixes)]
    fs, path = locate(uri)
    kind = kind_of(fs, path)
    if kind == "directory":
        paths = [f"{path.rstrip('/')}/{name}" for name in walk(fs, path) if suffix(name) in suffixes]
    else:
        paths = [path] if kind else fs.glob(path)
    if not paths and kind:
        raise UserError(f"corpus: no {' or '.join(suffixes)} file in folder {uri}; check corpus.uri, or set corpus.format")
    if not paths:
        raise FileNotFoundError(2, "no such file", uri)
    return sorted(full_name(fs, path) for path in paths)


def walk(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it. Follows links; skips hidden files and folders."""
    if not isinstance(fs, LocalFileSystem):
        yield from (name for path in fs.find(root) if not hidden(name := path[len(root) :].lstrip("/")))
        return
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        subfolders[:] = [name for name in subfolders if not hidden(name)]
        prefix = folder[len(root) :].lstrip("/")
        yield from (f"{prefix}/{name}" if prefix else name for name in names if not hidden(name))


def locate(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location and the path in it; without a protocol, the local one."""
    if not uri:
        raise ValueError("the name is empty")
    if "://" in uri:
        return fsspec.core.url_to_fs(uri)
    return LocalFileSystem(), LocalFileSystem._strip_protocol(uri)


def kind_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """`file`, `directory`, or "" for nothing. (fsspec's own isdir and exists take storage that does not answer for nothing.)"""
    try:
        return fs.info(path)["type"]
    except (FileNotFoundError, NotADirectoryError):
        return ""


def full_name(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """What `locate` took apart."""
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def open_file(file: str) -> Any:
    """A seekable binary stream."""
    fs, path = locate(file)
    return fs.open(path, "rb")


def _raise(error: OSError) -> None:
    raise error


def hidden(name: str) -> bool:
    """Whether a part of a relative name starts with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def suffix(name: str) -> str:
    """`a/b.TAR` -> `.tar`."""
    return os.path.splitext(name)[1].lower()


@contextmanager
def explained(what: str, uri: str) -> Iterator[None]:
    """Storage and parser errors in the user's terms."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{what}: {error.filename or uri} does not exist; check the path") from None
    except PermissionError as error:
        raise UserError(f"{what}: no permission to read {error.filename or uri}; change its permissions or the path") from None
    except (ImportError, ValueError) as error:  # ValueError: unknown protocols, and what JSON, Arrow and UTF-8 cannot parse
        raise UserError(f"{what}: cannot read {uri}: {' '.join(str(error).split())}") from None
    except OSError as error:
        if "://" in uri:
            raise Unavailable(f"{what}: {uri} does not answer: {' '.join(str(error).split())}") from error
        raise UserError(f"{what}: cannot read {uri}: {' '.join(str(error).split())}") from None
