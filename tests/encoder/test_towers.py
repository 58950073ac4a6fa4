"""The miniature CLIP, and small SigLIP and timm models of random weights, through the code that real models take.

Not covered: downloads, and numbers of real weights.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rar import miniature
from rar.config import Encoder
from rar.corpus.decode import fit_square
from rar.device import Lanes, pick_device
from rar.encoder import towers
from rar.encoder.towers import ClipEncoder, ImageEncoder, load_encoder
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


@pytest.mark.usefixtures("three_threads")
def test_batches_go_through_several_lanes_in_order(
    encoder: ClipEncoder, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, met = np.concatenate([photos] * 3), threading.Barrier(2)
    one_by_one = np.concatenate([encoder.embed_images(many[start : start + 3]) for start in range(0, len(many), 3)])
    monkeypatch.setattr(encoder, "lanes", Lanes(encoder.device))
    forward, passes = encoder.forward, itertools.count()

    def watched(batch: torch.Tensor) -> torch.Tensor:
        if next(passes) < 2:
            met.wait(60)  # breaks where one waits for the other
        return forward(batch)

    monkeypatch.setattr(encoder, "forward", watched)
    np.testing.assert_allclose(encoder.embed_images(many), one_by_one, atol=1e-6)


def test_nothing_in_nothing_out(encoder: ClipEncoder) -> None:
    assert encoder.embed_images(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, encoder.dim)
    assert encoder.embed_texts([]).shape == encoder.prototypes([]).shape == (0, encoder.dim)


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
    assert (own.resize_mode, own.preprocess.mean[0], own.preprocess.std[0]) == (resize_mode, 0.4, 0.3)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    with torch.inference_mode():
        expected = model.eval().encode_image(transform(Image.fromarray(scene))[None], normalize=True).numpy()[0]
    fitted = np.stack([fit_square(scene, own.side, own.resize_mode, own.interpolation)])
    assert own.embed_images(fitted)[0] @ expected > 0.9999
    assert encoder.embed_images(fitted)[0] @ expected < 0.9999  # the other normalisation is seen


def test_the_fingerprint_names_what_decides_an_embedding(encoder: ClipEncoder, tmp_path: Path) -> None:
    same = ClipEncoder(Encoder(templates=TEMPLATES, batch_size=64, workers=8, model=str(miniature.CLIP)))
    assert same.fingerprint() == encoder.fingerprint()
    sentences, others_sentences = tmp_path / "a.json", tmp_path / "b.json"
    sentences.write_text('{"owl": ["An owl."]}')
    others_sentences.write_text('{"owl": ["The owl."]}')
    others = [
        ClipEncoder(Encoder(templates=TEMPLATES[:1])),
        ClipEncoder(Encoder(templates=TEMPLATES, precision="bf16")),
        ClipEncoder(Encoder(templates=TEMPLATES, precision="fp16")),
        ClipEncoder(Encoder(templates=TEMPLATES, views="flip")),
        ClipEncoder(Encoder(templates=TEMPLATES, views="crops")),
        ClipEncoder(Encoder(templates=TEMPLATES, descriptions=str(sentences))),
        ClipEncoder(Encoder(templates=TEMPLATES, descriptions=str(others_sentences))),
        ClipEncoder(Encoder(templates=TEMPLATES)),
        ClipEncoder(Encoder(templates=TEMPLATES)),
        ClipEncoder(Encoder(templates=TEMPLATES)),
    ]
    others[-3].preprocess = replace(encoder.preprocess, resize_mode="squash")
    with torch.no_grad():
        next(others[-2].model.visual.parameters()).view(-1)[-1] += 1  # one weight of millions
        others[-1].model.logit_scale += 1  # a weight without dimensions
    fingerprints = {each.fingerprint() for each in (encoder, *others)}
    assert len(fingerprints) == 11 and all(len(one) == 16 for one in fingerprints)


@pytest.mark.parametrize("changed", ["activation", "tokenizer"])
def test_the_fingerprint_sees_what_weights_do_not_show(encoder: ClipEncoder, tmp_path: Path, changed: str) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(miniature.CLIP, folder)
    if changed == "activation":
        settings = json.loads((folder / "open_clip_config.json").read_text())
        settings["model_cfg"]["quick_gelu"] = True
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
    else:
        tokens = json.loads((folder / "tokenizer.json").read_text())
        tokens["normalizer"] = {"type": "Prepend", "prepend": "a "}
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
    other = ClipEncoder(Encoder(templates=TEMPLATES, model=str(folder)))
    assert np.abs(other.prototypes(NAMES) - encoder.prototypes(NAMES)).max() > 1e-4
    assert other.fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_numbers_are_close(encoder: ClipEncoder, photos: np.ndarray, precision: Any) -> None:
    narrow = ClipEncoder(Encoder(templates=TEMPLATES, precision=precision))
    for vectors, expected in (
        (narrow.embed_images(photos), encoder.embed_images(photos)),
        (narrow.prototypes(NAMES), encoder.prototypes(NAMES)),
    ):
        assert vectors.dtype == np.float32
        cosines = (vectors * expected).sum(axis=1)
        assert (cosines > 0.99).all() and np.abs(vectors - expected).max() > 1e-5  # close, and not the same computation


# Prompts


def test_a_data_set_s_templates_by_name(encoder: ClipEncoder) -> None:
    named = ClipEncoder(Encoder(templates="pets"))
    expected = encoder.embed_texts([f"a photo of a {name}, a type of pet." for name in NAMES])
    np.testing.assert_allclose(named.prototypes(NAMES), expected, atol=1e-5)
    assert named.fingerprint() == ClipEncoder(Encoder(templates=["a photo of a {}, a type of pet."])).fingerprint()


def test_underscores_are_spaces(encoder: ClipEncoder) -> None:
    underscored = [name.replace(" ", "_") for name in NAMES]
    assert underscored != NAMES
    np.testing.assert_array_equal(encoder.prototypes(underscored), encoder.prototypes(NAMES))


def test_descriptions_weigh_as_much_as_templates(encoder: ClipEncoder, tmp_path: Path) -> None:
    told = {NAMES[1]: ["a red thing.", "a thing with a blue edge."], NAMES[3]: ["a small green one."], "no class": ["a."]}
    (tmp_path / "d.json").write_text(json.dumps(told))
    own = ClipEncoder(Encoder(templates=TEMPLATES, descriptions=str(tmp_path / "d.json")))
    plain, found = encoder.prototypes(NAMES), own.prototypes(NAMES)
    np.testing.assert_allclose(found[[0, 2, 4]], plain[[0, 2, 4]], atol=1e-6)
    for row in (1, 3):
        mean = encoder.embed_texts(told[NAMES[row]]).mean(axis=0)
        mean /= np.linalg.norm(mean)
        np.testing.assert_allclose(found[row], (plain[row] + mean) / np.linalg.norm(plain[row] + mean), atol=1e-5)
        assert found[row] @ plain[row] == pytest.approx(found[row] @ mean, abs=1e-5)  # halfway between the two
    np.testing.assert_allclose(own.prototypes(NAMES[1:2]), found[1:2], atol=1e-5)  # a shard of the classes gives the same


# Views


def test_views_are_averaged(encoder: ClipEncoder, photos: np.ndarray) -> None:
    """The oracle cuts and enlarges with Pillow, view by view."""
    box = [(0, 0), (4, 0), (0, 4), (4, 4)]
    corners = [
        np.stack(
            [
                np.asarray(Image.fromarray(photo).crop((x, y, x + 28, y + 28)).resize((32, 32), Image.Resampling.BICUBIC))
                for photo in photos
            ]
        )
        for x, y in box
    ]
    for kind, squares in (("one", []), ("flip", [photos]), ("crops", [photos, *corners])):
        own = ClipEncoder(Encoder(templates=TEMPLATES, views=kind, batch_size=3))  # type: ignore[arg-type]
        seen = [photos] if not squares else [view for square in squares for view in (square, square[:, :, ::-1])]
        assert len(seen) == {"one": 1, "flip": 2, "crops": 10}[kind]
        mean = np.mean([encoder.embed_images(view) for view in seen], axis=0)
        expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        found = own.embed_images(photos)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert ((found * expected).sum(axis=1) > (0.999 if kind == "crops" else 0.99999)).all()
        np.testing.assert_array_equal(own.prototypes(NAMES), encoder.prototypes(NAMES))


def test_a_mirrored_picture_has_the_same_averaged_vector(photos: np.ndarray) -> None:
    for kind in ("flip", "crops"):
        own = ClipEncoder(Encoder(views=kind))  # type: ignore[arg-type]
        np.testing.assert_allclose(own.embed_images(photos), own.embed_images(photos[:, :, ::-1]), atol=1e-5)


# SigLIP


SIGLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 40,
            "hf_tokenizer_name": "a/repository/that/must/not/be/asked",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def write_siglip(folder: Path, settings: dict[str, Any] = SIGLIP) -> str:
    """A folder as open_clip's hub repositories of SigLIP: custom text tower, timm image tower, letters for tokens."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    vocabulary = {symbol: number for number, symbol in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    model = open_clip.model.CustomTextCLIP(**{k: v for k, v in settings["model_cfg"].items() if k != "custom_text"})
    with torch.no_grad():
        model.text.positional_embedding.normal_()  # so that texts differ by more than rounding
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_siglip(tmp_path_factory.mktemp("siglip") / "model")


def test_a_siglip_is_open_clips_own(siglip_folder: str, scene: np.ndarray) -> None:
    own = load_encoder(Encoder(model=siglip_folder, templates=["{}"]))
    assert isinstance(own, ClipEncoder)
    assert (own.side, own.resize_mode, own.dim) == (160, "squash", 64)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{siglip_folder}")
    assert model.eval().logit_bias.item() == -10
    tokenizer = open_clip.get_tokenizer(f"local-dir:{siglip_folder}")
    texts = ["owl", "a horned owl", "a name that is longer than the context"]
    assert own.tokenizer(texts).shape == (3, 12)
    with torch.inference_mode():
        expected = model.encode_text(tokenizer(texts), normalize=True).numpy()
        image = model.encode_image(transform(Image.fromarray(scene))[None], normalize=True).numpy()[0]
    np.testing.assert_allclose(own.prototypes(texts), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    fitted = fit_square(scene, own.side, own.resize_mode, own.interpolation)
    assert own.embed_images(fitted[None])[0] @ image > 0.9999


def test_a_siglip_cleans_texts_its_own_way(siglip_folder: str) -> None:
    own = ClipEncoder(Encoder(model=siglip_folder))
    np.testing.assert_array_equal(own.tokenizer(["Aerosol_Can!"]), own.tokenizer(["aerosol can"]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_narrow_siglip_is_close(siglip_folder: str, scene: np.ndarray, precision: Any) -> None:
    wide, narrow = (ClipEncoder(Encoder(model=siglip_folder, precision=each)) for each in ("fp32", precision))
    fitted = fit_square(scene, 160, "squash", "bicubic")[None]
    assert (wide.embed_images(fitted) @ narrow.embed_images(fitted).T).item() > 0.99
    assert ((wide.prototypes(NAMES) * narrow.prototypes(NAMES)).sum(axis=1) > 0.99).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "longest"}, "has resize mode 'longest'; only shortest and squash are done"),
        ({"interpolation": "nearest"}, "resizes by 'nearest'; only bicubic and bilinear are done"),
    ],
)
def test_preprocessing_that_is_not_done_here(tmp_path: Path, change: dict[str, str], message: str) -> None:
    settings = SIGLIP | {"preprocess_cfg": {**SIGLIP["preprocess_cfg"], **change}}
    with pytest.raises(UserError, match=message):
        load_encoder(Encoder(model=write_siglip(tmp_path / "model", settings)))


def test_inputs_that_are_not_square(tmp_path: Path) -> None:
    model_cfg = {**SIGLIP["model_cfg"], "vision_cfg": {**SIGLIP["model_cfg"]["vision_cfg"], "image_size": [160, 192]}}
    with pytest.raises(UserError, match=r"takes 160 x 192 pixels; only square inputs are done"):
        load_encoder(Encoder(model=write_siglip(tmp_path / "model", SIGLIP | {"model_cfg": model_cfg})))


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("ViT-B-32/openai", True),
        ("ViT-B-16/openai", True),
        ("ViT-B-16-quickgelu/openai", True),
        ("ViT-B-16/dfn2b", True),
        ("ViT-B-16/laion2b_s34b_b88k", False),
        ("ViT-B-16-SigLIP/webli", False),
    ],
)
def test_weights_trained_with_quick_gelu_get_it(name: str, quick: bool) -> None:
    """Where the architecture's config does not say so, open_clip itself only warns."""
    source, loading = towers._open_clip_name(name)
    assert towers._is_quick(source, loading) == quick
    loading.pop("pretrained")
    model = open_clip.create_model(source, **loading) if name == "ViT-B-32/openai" else None
    assert model is None or "QuickGELU" in str(model.visual)


# timm


def write_timm(folder: Path, name: str = "test_resnet", **pretrained_cfg: Any) -> str:
    """A folder as timm saves it, with its preprocessing changed."""
    torch.manual_seed(1)
    timm.models.save_for_hf(timm.create_model(name, num_classes=7), str(folder), safe_serialization=True)
    settings = json.loads((folder / "config.json").read_text())
    settings["pretrained_cfg"] |= pretrained_cfg
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_timm_folder_is_timms_own(tmp_path: Path, scene: np.ndarray, name: str) -> None:
    own = load_encoder(Encoder(model=write_timm(tmp_path / "model", name)))
    assert isinstance(own, ImageEncoder)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model(transform(Image.fromarray(scene))[None]).numpy()[0]
    assert own.dim == len(expected)
    fitted = fit_square(scene, own.side, own.resize_mode, own.interpolation)
    assert own.embed_images(fitted[None])[0] @ expected / np.linalg.norm(expected) > 0.9999


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "slack"), [(1.0, 0), (0.95, 0), (0.9, 1), (0.875, 1)])
def test_the_shipped_square_holds_timms_preprocessing(
    tmp_path: Path, scene: np.ndarray, crop_pct: float, slack: int, interpolation: str, crop_mode: str
) -> None:
    """To within rounding, and `slack` pixels where the margin is odd."""
    changed: dict[str, Any] = {
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "crop_mode": crop_mode,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    own = ImageEncoder(Encoder(model=write_timm(tmp_path / "model", **changed)))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(own.model), is_training=False)
    assert (own.preprocess.crop, own.side) == (160, int(160 / crop_pct))
    for height, width in SIZES:
        image = np.ascontiguousarray(scene[:height, :width])
        expected = transform(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255
        square = torch.from_numpy(fit_square(image, own.side, own.resize_mode, own.interpolation).copy())
        found = towers._middle(square.permute(2, 0, 1)[None], 160)[0].permute(1, 2, 0).numpy()
        inner = slice(1, -1) if slack else slice(None)
        off = min(
            (
                np.abs(np.roll(found, (down, right), (0, 1)).astype(float) - expected)[inner, inner]
                for down in range(-slack, slack + 1)
                for right in range(-slack, slack + 1)
            ),
            key=np.mean,
        )
        assert off.mean() < 0.5 and np.quantile(off, 0.99) <= 2, (height, width, off.mean(), off.max())


def test_a_timm_model_by_name() -> None:
    own = load_encoder(Encoder(model="timm/test_vit/random", precision="bf16", views="flip"))
    assert (type(own), own.side, own.preprocess.crop, own.dim) == (ImageEncoder, 168, 160, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 168, 168, 3), np.uint8)
    np.testing.assert_allclose(np.linalg.norm(own.embed_images(pixels), axis=1), 1, atol=1e-5)
    again = load_encoder(Encoder(model="timm/test_vit/random", precision="bf16", views="flip", templates="pets"))
    assert again.fingerprint() == own.fingerprint()  # templates play no part
    others = [{"precision": "fp32"}, {"views": "one"}, {"model": "timm/test_vit2/random"}]
    settings = {"model": "timm/test_vit/random", "precision": "bf16", "views": "flip"}
    fingerprints = {load_encoder(Encoder.model_validate(settings | other)).fingerprint() for other in others}
    assert len(fingerprints | {own.fingerprint()}) == 4


def test_an_image_encoder_has_no_texts() -> None:
    own = load_encoder(Encoder(model="timm/test_vit/random"))
    assert not own.embeds_texts and ClipEncoder.embeds_texts
    for ask in (own.embed_texts, own.prototypes):
        with pytest.raises(UserError, match=r"embeds images alone.*leave out memory.classes.*or use a CLIP"):
            ask(NAMES)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm/test_vit_", "timm knows no model 'test_vit_'; did you mean 'test_vit"),
        ("timm/", "timm knows no model ''"),
        ("timm/test_vit/pretrained", "is not 'timm/NAME' or 'timm/NAME/random'"),
        ("timm/test_vit.nope/random", r"could not load .*Invalid pretrained tag \(nope\)"),
        ("timm/test_vit", "could not load timm/test_vit: .*local cache"),
        ("precomputed", "precomputed embeds nothing"),
    ],
)
def test_timm_mistakes(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_encoder(Encoder(model=model))
    assert str(raised.value).startswith("encoder.model: ") and "\n" not in str(raised.value)


# The user's mistakes


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit", "'vit' is neither a folder nor 'architecture/pretrained', e.g. ViT-B-16/openai"),
        ("ViT-B-23/openai", "open_clip knows no architecture 'ViT-B-23'; did you mean 'ViT-B-32'?"),
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
    with pytest.raises(UserError, match=r"has neither open_clip_config.json \(a CLIP\) nor config.json \(a timm model\)"):
        load_encoder(Encoder(model=str(tmp_path)))


@pytest.mark.parametrize("missing", ["open_clip_model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_folder_that_is_not_whole(tmp_path: Path, missing: str, broken: bool) -> None:
    """open_clip itself goes on with random weights where there are none."""
    shutil.copytree(miniature.CLIP, tmp_path / "clip")
    (tmp_path / "clip" / missing).unlink()
    if broken:
        (tmp_path / "clip" / missing).write_bytes(b"{")
    with pytest.raises(UserError, match="could not load") as raised:
        load_encoder(Encoder(model=str(tmp_path / "clip")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [{"config.json": b"{}"}, {"config.json": b"{"}, {"model.safetensors": b"x"}])
def test_a_timm_folder_that_is_not_whole(tmp_path: Path, damage: dict[str, bytes]) -> None:
    folder = write_timm(tmp_path / "model")
    for name, data in damage.items():
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(UserError, match="could not load"):
        load_encoder(Encoder(model=folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    assert pick_device("auto", "") == pick_device("cpu", "") == torch.device("cpu")
    with pytest.raises(UserError, match=f"encoder.device '{device}' cannot be used here"):
        ClipEncoder(Encoder(device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_vectors(encoder: ClipEncoder, photos: np.ndarray) -> None:
    assert pick_device("auto", "").type == "cuda"
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
