"""Where files lie: names on any fsspec file system, listed in an order that does not depend on it; and files that are written
whole or not at all.

A name without `://` is local, and is made absolute, because workers may run in another folder. Files and folders whose name
starts with a dot are not listed (`.ipynb_checkpoints`, macOS's `._photo.jpg`). `~` is the user's home.

Links are followed, and loops of links end: below each sub-folder of the folder listed (a class, most often) a folder is entered
once, by the same one of its names every time. Two classes may link to one store, and no tangle takes longer than classes times
folders.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from rar.schema import Unavailable, UserError

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # what is sent there is whole or not there
DRIVER = "driver.json"  # in a run folder: who is at work there
PATIENCE_S = 300.0  # with storage that does not answer, beyond the few seconds that its client has by itself
OF_A_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
REFUSED = (errno.EINVAL, errno.EPERM, errno.ENOSYS)  # what a store says of a request that it will never like
BUSY = ("429", "500", "502", "503", "504", "InternalError", "ServiceUnavailable")  # codes of an S3 server
S3_TRIES = 8  # ten seconds in all, each try with those of botocore
AWAY = (errno.EBUSY, errno.EIO, errno.ETIMEDOUT)  # what clients make of these
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_ANSWER = "storage does not answer; once it does, the same command goes on"
NO_SPACE = "no space is left where the run writes; make room, and the same command goes on"
CLIENTS = ("aiohttp", "botocore", "urllib3", "gcsfs", "google", "azure")  # whose errors are no OSError
T = TypeVar("T")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
NUMBER = re.compile(r"([0-9]+)")
NUMBER_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def files(uri: str, *suffixes: str) -> list[str]:
    """A file, a glob, a `{000..123}` range or a folder (its files with these suffixes) -> full names.

    In natural order: `part_2` before `part_10`. A range is in its own.

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
    return sorted((full_name(fs, path) for path in paths), key=natural)


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that orders numbers in names by their value."""
    return [int(part) if place % 2 else part for place, part in enumerate(NUMBER.split(name))], name


def walk(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it. Follows links; skips hidden files and folders."""
    if not isinstance(fs, LocalFileSystem):
        yield from (name for path in fs.find(root) if not hidden(name := path[len(root) :].lstrip("/")))
        return
    pending: list[tuple[str, set[tuple[int, int]]]] = [("", {_identity(root)})]
    while pending:
        prefix, entered = pending.pop()
        subfolders = []
        with os.scandir(f"{root}/{prefix}") as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    subfolders.append(entry.name)
                else:
                    yield prefix + entry.name
        for name in sorted(subfolders):
            known, own = (entered if prefix else set(entered)), _identity(f"{root}/{prefix}{name}")
            if own not in known:
                known.add(own)
                pending.append((f"{prefix}{name}/", known))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def locate(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a location and the path in it; without a protocol, the local one."""
    if not uri:
        raise ValueError("the name is empty")
    if "://" in uri:
        _steady(uri.partition("://")[0])
        return fsspec.core.url_to_fs(uri)
    local = os.path.expanduser(uri)
    return LocalFileSystem(), LocalFileSystem._strip_protocol(f"./{local}" if local.startswith("~") else local)


@cache
def _steady(protocol: str) -> None:
    """Have a store's client ask again where it would not by itself: s3fs knows a busy store by its words alone, and the answer
    to a HEAD request has none."""
    if protocol in ("s3", "s3a"):
        with suppress(ImportError):  # who needs it says so
            from s3fs import S3FileSystem
            from s3fs.core import set_custom_error_handler

            set_custom_error_handler(lambda error: any(f"({code})" in str(error) for code in BUSY))
            S3FileSystem.retries = S3_TRIES


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


def is_away(fs: fsspec.AbstractFileSystem, error: BaseException) -> bool:
    """Whether it is storage that fails, and may come back, and not this one file.

    A local disk does not come back by itself; of the web, a host that is gone is a file that is gone.
    """
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if isinstance(fs, LocalFileSystem) or names & {"http", "https"} or isinstance(error, OF_A_FILE):
        return False
    if isinstance(error, OSError):
        return error.errno not in REFUSED
    return isinstance(error, asyncio.TimeoutError) or type(error).__module__.split(".")[0] in CLIENTS


def patiently(fs: fsspec.AbstractFileSystem, name: str, action: Callable[[], T]) -> T:
    """Repeat what changes nothing when it is done twice while storage is away. Raises Unavailable after PATIENCE_S."""
    again = Retrying(
        retry=retry_if_exception(lambda error: is_away(fs, error)),
        stop=stop_after_delay(PATIENCE_S),
        wait=wait_random_exponential(0.5, max=10),
        reraise=True,
    )
    try:
        return again(action)
    except Exception as error:
        if not is_away(fs, error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise Unavailable(f"{name} did not answer for {PATIENCE_S:g} s: {said[:200]}") from None


def is_model_folder(path: str, key: str) -> bool:
    """Whether a model is a folder here; else it is the name of one on a hub. Raises UserError for what can be neither."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{key} {path!r} is a folder without a model: it has no config.json")
        return True
    if not HUB_NAME.fullmatch(path) or path.startswith("."):
        raise UserError(f"{key} {path!r} is no folder; give a local model folder or a hub name")
    return False


def place(name: str | Path) -> Path:
    """A file or folder on any file system, with the methods of pathlib; a local one is absolute, `~` is the user's home.

    Elsewhere it is a UPath, which has the same methods; what it lists is never remembered, as other processes write there, too.
    """
    if "://" not in str(name):
        return Path(name).expanduser().absolute()
    if not isinstance(name, str):
        return name
    from upath import UPath

    _steady(name.partition("://")[0])
    return cast(Path, UPath(name, use_listings_cache=False))


@contextmanager
def writing(file: Path) -> Iterator[IO[bytes]]:
    """A binary stream for a file that appears when it is whole, or not at all; also when two processes write the same one.

    On a local disk under another name that is then moved. Elsewhere a local file that is then sent, to another name where that
    file system shows half of what is sent (an object store does not, and moves by copying).
    """
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    if isinstance(file, os.PathLike):
        try:
            with scratch.open("xb") as stream:
                yield stream
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
        return
    fs, path = locate(str(file))
    with tempfile.NamedTemporaryFile() as local:
        yield cast(IO[bytes], local)
        local.flush()
        if OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            patiently(fs, str(file), lambda: fs.put_file(local.name, str(scratch)))
            fs.mv(str(scratch), path)
        else:
            patiently(fs, str(file), lambda: fs.put_file(local.name, path))


def write(file: Path, data: bytes | pa.Buffer) -> None:
    with writing(file) as stream:
        stream.write(data)


def remove(folder: Path) -> None:
    """A folder with all that is in it; nothing where there is none."""
    fs, path = locate(str(folder))
    if kind_of(fs, path):
        fs.rm(path, recursive=True)


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
    except (ImportError, ValueError, pa.ArrowException) as error:  # unknown protocols; what JSON, Arrow and UTF-8 cannot parse
        raise UserError(f"{what}: cannot read {uri}: {' '.join(str(error).split())}") from None
    except OSError as error:
        if "://" in uri:
            raise Unavailable(f"{what}: {uri} does not answer: {' '.join(str(error).split())}") from error
        raise UserError(f"{what}: cannot read {uri}: {' '.join(str(error).split())}") from None
