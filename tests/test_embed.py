"""The miniature CLIP through the code that real models take. Not covered: downloads, and numbers of real weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from rar import miniature
from rar.config import Encoder
from rar.decode import fit_square
from rar.embed import ClipEncoder, pick_device
from rar.miniature.data import draw_scene, scene_classes
from rar.miniature.world import render, rng_of, vocabulary
from rar.schema import UserError

NAMES = [spec.name for spec in vocabulary("novel", 0)[:5]]
TEMPLATES = ["a photo of a {}.", "a {}.", "the picture of a {} with a photo."]


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return ClipEncoder(Encoder(templates=TEMPLATES, batch_size=3))


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """(8, 32, 32, 3) uint8: a photo of each of eight classes."""
    return np.stack([render(spec, 32, rng_of("test_embed", spec.name)) for spec in vocabulary("novel", 0)[:8]])


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """(256, 320, 3) uint8: a picture with fine and coarse detail."""
    return draw_scene(*scene_classes(0), rng_of("test_embed"))[0]


def test_the_miniature_is_an_open_clip_folder(encoder: ClipEncoder) -> None:
    assert (encoder.side, encoder.resize_mode, encoder.interpolation) == (32, "shortest", "bicubic")
    assert encoder.dim == encoder.embed_images(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]
    assert encoder.logit_scale > 1


def test_vectors_have_unit_norm(encoder: ClipEncoder, photos: np.ndarray) -> None:
    for vectors in (encoder.embed_images(photos), encoder.embed_texts(NAMES), encoder.prototypes(NAMES)):
        assert vectors.dtype == np.float32 and vectors.shape[1] == encoder.dim
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.linalg.norm(vectors[0] - vectors[1]) > 1e-3  # and they differ


def test_image_vectors_are_open_clips_own(encoder: ClipEncoder, photos: np.ndarray) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{miniature.CLIP}")
    with torch.inference_mode():
        batch = torch.stack([transform(Image.fromarray(photo)) for photo in photos])
        expected = model.eval().encode_image(batch, normalize=True).numpy()
    np.testing.assert_allclose(encoder.embed_images(photos), expected, atol=1e-4)


def test_text_vectors_are_open_clips_own(encoder: ClipEncoder) -> None:
    source = f"local-dir:{miniature.CLIP}"
    with torch.inference_mode():
        ids = open_clip.get_tokenizer(source)(NAMES)
        expected = open_clip.create_model(source).eval().encode_text(ids, normalize=True).numpy()
    np.testing.assert_allclose(encoder.embed_texts(NAMES), expected, atol=1e-5)


def test_prototypes_are_means_over_the_templates(encoder: ClipEncoder) -> None:
    for name, prototype in zip(NAMES, encoder.prototypes(NAMES), strict=True):
        vectors = [encoder.embed_texts([template.format(name)])[0] for template in TEMPLATES]
        mean = np.mean(vectors, axis=0)
        np.testing.assert_allclose(prototype, mean / np.linalg.norm(mean), atol=1e-5)


def test_the_batch_size_does_not_matter(encoder: ClipEncoder, photos: np.ndarray) -> None:
    assert encoder.settings.batch_size == 3  # so the last of three batches is short
    alone = np.concatenate([encoder.embed_images(photo[None]) for photo in photos])
    np.testing.assert_allclose(encoder.embed_images(photos), alone, atol=1e-5)


def test_nothing_in_nothing_out(encoder: ClipEncoder) -> None:
    assert encoder.embed_images(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, encoder.dim)


def test_pixels_may_be_views(encoder: ClipEncoder, photos: np.ndarray) -> None:
    turned = photos[:, ::-1]
    np.testing.assert_array_equal(encoder.embed_images(turned), encoder.embed_images(turned.copy()))


def grey_levels(image: np.ndarray, side: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """(side, side, 3) float: what open_clip's own transform makes of a picture, before its normalisation."""
    cfg = open_clip.transform.PreprocessCfg(
        size=(side, side), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation, resize_mode=resize_mode
    )
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    return transform(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255


SIZES = [(256, 320), (256, 200), (101, 256), (33, 20), (61, 97), (9, 230), (224, 224)]  # height, width


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [32, 224])
def test_fit_square_is_open_clips_preprocessing(scene: np.ndarray, side: int, interpolation: str, resize_mode: str) -> None:
    """To within the rounding (and clipping) between Pillow's two passes, whose order may differ."""
    for height, width in SIZES:
        image = np.ascontiguousarray(scene[:height, :width])
        expected = grey_levels(image, side, resize_mode, interpolation)
        off = np.abs(fit_square(image, side, resize_mode, interpolation) - expected)
        assert off.mean() < 0.5 and np.quantile(off, 0.99) <= 2, (height, width, off.mean(), off.max())


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_whole_way_of_a_picture_is_open_clips(
    encoder: ClipEncoder, scene: np.ndarray, resize_mode: str, tmp_path: Path
) -> None:
    """preprocess_cfg -> fit_square -> normalisation -> tower, against open_clip's transform and tower."""
    shutil.copytree(miniature.CLIP, tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_config.json"
    text = file.read_text().replace('"shortest"', f'"{resize_mode}"')
    file.write_text(text.replace('"mean": [\n   0.5,', '"mean": [\n   0.4,').replace('"std": [\n   0.5,', '"std": [\n   0.3,'))
    own = ClipEncoder(Encoder(model=str(tmp_path / "clip")))
    assert (own.resize_mode, own.preprocess["mean"][0], own.preprocess["std"][0]) == (resize_mode, 0.4, 0.3)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    with torch.inference_mode():
        expected = model.eval().encode_image(transform(Image.fromarray(scene))[None], normalize=True).numpy()[0]
    fitted = np.stack([fit_square(scene, own.side, own.resize_mode, own.interpolation)])
    assert own.embed_images(fitted)[0] @ expected > 0.9999
    assert encoder.embed_images(fitted)[0] @ expected < 0.9999  # the other normalisation is seen


def test_the_fingerprint_names_what_decides_an_embedding(encoder: ClipEncoder, tmp_path: Path) -> None:
    same = ClipEncoder(Encoder(templates=TEMPLATES, batch_size=64, workers=8, model=str(miniature.CLIP)))
    assert same.fingerprint() == encoder.fingerprint()
    others = [
        ClipEncoder(Encoder(templates=TEMPLATES[:1])),
        ClipEncoder(Encoder(templates=TEMPLATES, precision="bf16")),
        ClipEncoder(Encoder(templates=TEMPLATES)),
        ClipEncoder(Encoder(templates=TEMPLATES)),
    ]
    others[2].preprocess["resize_mode"] = "squash"
    with torch.no_grad():
        next(others[3].model.visual.parameters()).view(-1)[0] += 1  # one weight of millions
    fingerprints = {each.fingerprint() for each in (encoder, *others)}
    assert len(fingerprints) == 5 and all(len(one) == 16 for one in fingerprints)


def test_bf16_is_close(encoder: ClipEncoder, photos: np.ndarray) -> None:
    narrow = ClipEncoder(Encoder(templates=TEMPLATES, precision="bf16"))
    vectors = narrow.embed_images(photos)
    assert vectors.dtype == np.float32
    cosines = (vectors * encoder.embed_images(photos)).sum(axis=1)
    assert (cosines > 0.99).all() and (cosines < 1 - 1e-7).any()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit", "'vit' is neither a folder nor 'architecture/pretrained', e.g. ViT-B-16/openai"),
        ("ViT-Q-99/openai", "open_clip knows no architecture 'ViT-Q-99'"),
        ("ViT-B-32/nobody", "ViT-B-32 has no weights 'nobody'; choose from: openai, "),
        ("ViT-B-32/", "ViT-B-32 has no weights ''; choose from: openai, "),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_line(model: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        ClipEncoder(Encoder(model=model))
    assert str(raised.value).startswith(f"encoder.model: {message}")
    assert "\n" not in str(raised.value)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"folder {tmp_path} has no open_clip_config.json; is it an open_clip folder"):
        ClipEncoder(Encoder(model=str(tmp_path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match=f"device '{device}' was asked for, but torch sees no GPU here; use device: cpu"):
        ClipEncoder(Encoder(device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_vectors(encoder: ClipEncoder, photos: np.ndarray) -> None:
    assert pick_device("auto") == "cuda"
    fast = ClipEncoder(Encoder(templates=TEMPLATES, device="cuda"))
    slow = ClipEncoder(Encoder(templates=TEMPLATES, device="cpu"))
    np.testing.assert_allclose(fast.embed_images(photos), slow.embed_images(photos), atol=1e-3)
    np.testing.assert_allclose(fast.prototypes(NAMES), slow.prototypes(NAMES), atol=1e-3)


def test_a_real_architecture_with_random_weights() -> None:
    encoder = ClipEncoder(Encoder(model="ViT-B-32/random"))
    assert (encoder.side, encoder.dim) == (224, 512)
    vectors = encoder.embed_images(np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8))
    assert vectors.shape == (1, 512) and np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)
    assert encoder.prototypes(["owl", "wren"]).shape == (2, 512)
