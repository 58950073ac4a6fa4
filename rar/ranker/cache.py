"""Answers of the ranker by content: what was asked once, in whatever run, is not asked again.

One small file an answer, in 256 folders, written under a name of its own and moved into place. So any number of processes may
read and write at once, on NFS too, where SQLite's locks cannot be relied on, and nothing has to be opened, locked or compacted.
It costs an inode and a disk block an answer; delete the folder to be rid of it. Every file carries a checksum: one that is torn
or damaged is a miss, and is written anew.

Only for deterministic requests: all methods decode greedily. What cost no call is not kept: a list of one, and a FALLBACK
because the request failed, which may succeed the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rar import storage
from rar.schema import Ranking, RankStatus, Unavailable, UserError

Asks = Callable[[list[bytes], list[list[str]]], list[Ranking]]  # encoded images, candidates' names of each
KEPT = ("order", "status", "scores", "response", "label_mass", "label_first")


class AnswerCache:
    """Answers under one fingerprint, in a folder that many runs and processes share.

    fingerprint: of what decides an answer besides the picture and the names (identity.of_answers).
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        """Raises UserError for a folder that cannot be made or written."""
        self.folder, self.fingerprint = Path(folder), fingerprint
        if "://" in str(folder):
            raise UserError(f"ranker.cache must be a local or mounted folder, not {folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"ranker.cache {folder} cannot be made: {error.strerror}") from None
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"ranker.cache {folder} cannot be read and written")

    def get(self, images: Sequence[bytes], names: Sequence[Sequence[str]]) -> list[Ranking | None]:
        """What was answered for each image (encoded bytes) and its candidates in this order; None for a miss.

        A Ranking comes back as it was but for calls and tokens, which are 0: this time nothing was asked.
        """
        return [self._read(image, listed) for image, listed in zip(images, names, strict=True)]

    def put(self, images: Sequence[bytes], names: Sequence[Sequence[str]], rankings: Sequence[Ranking]) -> None:
        """Keep the answers that cost a call. Raises Unavailable where the folder takes no more."""
        for image, listed, ranking in zip(images, names, rankings, strict=True):
            if ranking.calls:
                self._write(self._path(image, listed), _packed(ranking))

    def filled(self, ask: Asks, images: Sequence[bytes], names: Sequence[list[str]]) -> list[Ranking]:
        """What was answered for each image and its candidates, the rest by `ask`, which is kept from now on."""
        kept = self.get(images, names)
        rows = [row for row, ranking in enumerate(kept) if ranking is None]
        lacking = ([images[row] for row in rows], [names[row] for row in rows])
        found = ask(*lacking) if rows else []
        self.put(*lacking, found)
        new = iter(found)
        return [next(new) if ranking is None else ranking for ranking in kept]

    def _read(self, image: bytes, names: Sequence[str]) -> Ranking | None:
        try:
            return _unpacked(self._path(image, names).read_bytes(), len(names))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write(path, data)
        except OSError as error:
            raise Unavailable(f"ranker.cache {self.folder} cannot be written: {error.strerror}") from None

    def _path(self, image: bytes, names: Sequence[str]) -> Path:
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
        digest.update(hashlib.blake2b(image, digest_size=16).digest())
        digest.update(json.dumps(list(names)).encode())
        key = digest.hexdigest()
        return self.folder / key[:2] / key[2:]


def _packed(ranking: Ranking) -> bytes:
    fields = {name: getattr(ranking, name) for name in KEPT}
    text = json.dumps(fields).encode()
    return _checksum(text) + b"\n" + text


def _unpacked(data: bytes, count: int) -> Ranking:
    """Raises ValueError, KeyError or TypeError for anything but a whole entry about `count` candidates."""
    checksum, _, text = data.partition(b"\n")
    if checksum != _checksum(text):
        raise ValueError("damaged")
    fields = json.loads(text)
    labels = {name: fields[name] for name in ("label_mass", "label_first")}
    ranking = Ranking(
        tuple(fields["order"]), RankStatus(fields["status"]), tuple(fields["scores"]), fields["response"], **labels
    )
    if len(ranking.order) != count:
        raise ValueError("of another list")
    return ranking


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()
