"""Looks of real and of drawn photos, against copies of another size and quality and against each other."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rar.config import Corpus
from rar.corpus import looks
from rar.corpus.decode import decode, fit_square
from rar.corpus.listing import list_images
from tests.conftest import SHARED_DATA, needs_shared_data


def fit(image: np.ndarray) -> np.ndarray:
    return fit_square(image, 64, "squash", "bicubic")


def copy(image: np.ndarray) -> np.ndarray:
    """Half as large, and saved at a low quality."""
    buffer = io.BytesIO()
    small = Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2))
    small.save(buffer, "JPEG", quality=60)
    return decode(buffer.getvalue())


def held(images: list[np.ndarray], found: float) -> None:
    """Copies of most are known, and none is taken for another."""
    own = np.array([looks.look(fit(image)) for image in images], np.uint64)
    copies = np.array([looks.look(fit(copy(image))) for image in images], np.uint64)
    assert np.mean([looks.near(one[None], known[None])[0] for one, known in zip(copies, own, strict=True)]) >= found
    others = np.bitwise_count(own[:, None] ^ own[None]) + 64 * np.eye(len(own), dtype=np.uint8)
    assert others.min() > looks.NEAR_BITS


@needs_shared_data
def test_copies_of_real_photos_are_known_and_strangers_are_not() -> None:
    files = sorted(SHARED_DATA.rglob("*.jp*g"))
    held([decode(file.read_bytes()) for file in files[:: max(1, len(files) // 250)]], 0.9)


def test_copies_of_drawn_photos_are_known_and_strangers_are_not(world: Path) -> None:
    held([decode(file.read_bytes()) for file in sorted((world / "novel" / "support").rglob("*.*"))[:200]], 0.8)


def test_near_is_a_few_bits_and_pictures_of_one_colour_are_never_near() -> None:
    known = np.array([0, 0b1111_0000, 2**63], np.uint64)
    asked = np.array([0b1111_0000, 0b1111_0111, 0b1111_1111, 0, 2**63 + 7, 2**62], np.uint64)
    assert looks.near(asked, known).tolist() == [True, True, False, False, True, True]
    assert looks.look(np.full((32, 32, 3), 200, np.uint8)) == 0
    assert looks.near(asked, known[:0]).tolist() == [False] * 6 and looks.near(asked[:0], known).tolist() == []


def test_looks_of_a_folder_leave_out_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(5)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "9.png").write_bytes(b"no picture")
    index = list_images(Corpus(uri=str(tmp_path)))
    assert looks.looks_of(index, fit).tolist() == [looks.look(fit(image)) for image in images]
    monkeypatch.setattr(looks, "COMPARED", 2)
    assert looks.looks_of(index.slice(0, 5), fit).tolist() == [looks.look(fit(images[0])), looks.look(fit(images[4]))]
    assert looks.looks_of(pa.Table.from_pylist([], index.schema), fit).tolist() == []
