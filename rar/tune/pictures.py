"""The pictures of the data, read when they are needed: for training, judging, exporting and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rar.corpus.decode import decode
from rar.corpus.listing import read_many
from rar.schema import RowError, UserError


class Pictures:
    """Reads pictures by their rows in the data."""

    def __init__(self, data: pa.Table) -> None:
        self.places = data.select(["uri", "offset", "size", "picture"]).to_pylist()

    def __call__(self, rows: Sequence[int]) -> list[np.ndarray]:
        """(H, W, 3) uint8 each. Raises UserError for a picture that cannot be read any more."""
        return [self._pixels(row, data) for row, data in zip(rows, self.encoded(rows), strict=True)]

    def encoded(self, rows: Sequence[int]) -> list[bytes]:
        places = [self.places[row] for row in rows]
        found: list[bytes | RowError] = [Path(one["picture"]).read_bytes() if one["picture"] else b"" for one in places]
        whole = [number for number, one in enumerate(places) if not one["picture"]]
        read = read_many(*([places[number][key] for number in whole] for key in ("uri", "offset", "size")))
        for number, data in zip(whole, read, strict=True):
            found[number] = data
        for row, data in zip(rows, found, strict=True):
            if isinstance(data, RowError):
                raise UserError(f"{self.places[row]['uri']} was read before and cannot be now: {data}")
        return found  # type: ignore[return-value]

    def _pixels(self, row: int, data: bytes) -> np.ndarray:
        try:
            return decode(data)
        except RowError as error:
            raise UserError(f"{self.places[row]['uri']} was read before and cannot be now: {error}") from None
