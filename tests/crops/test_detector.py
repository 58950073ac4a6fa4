"""Proposals by open detectors, on tiny randomly initialised checkpoints built here: OWLv2, Grounding DINO, MM-Grounding DINO.

Not covered: whether a proposal is any good (random weights), GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
)

from rar.boxes import MIN_SIDE
from rar.config import Detector
from rar.crops.detector import Proposer
from rar.schema import UserError

FAMILIES = ["owlv2", "grounding-dino", "mm-grounding-dino"]
MODELS: dict[str, Any] = {
    "owlv2": Owlv2ForObjectDetection,
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}
CONFIGS: dict[str, Any] = {"grounding-dino": GroundingDinoConfig, "mm-grounding-dino": MMGroundingDinoConfig}
SIDE = 64  # of OWLv2's square input: 4 x 4 patches


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's ids where Grounding DINO has them built in: [CLS] 101, [SEP] 102 and the full stop 1012."""
    words = [f"w{i}" for i in range(1030)]
    for index, word in {0: "[PAD]", 1: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 7: "object", 8: "thing"}.items():
        words[index] = word
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def save_dino(folder: Path, family: str) -> Path:
    backbone = dict(
        model_type="swin", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2] * 4, window_size=4, out_indices=[2, 3, 4]
    )
    text = dict(
        model_type="bert",
        vocab_size=1030,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    sizes: dict[str, Any] = dict(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=30
    )
    heads: dict[str, Any] = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=64, init_std=0.5)
    torch.manual_seed(0)
    MODELS[family](CONFIGS[family](backbone_config=backbone, text_config=text, **sizes, **heads)).save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    GroundingDinoProcessor(image_processor, bert_tokenizer()).save_pretrained(folder)
    return folder


def save_owlv2(folder: Path) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = Owlv2Config(  # type: ignore[call-arg]
        text_config=dict(**sizes, vocab_size=1030, max_position_embeddings=16, bos_token_id=101, eos_token_id=102),
        vision_config=dict(**sizes, image_size=SIDE, patch_size=16),
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(config)
    for head in (model.box_head, model.objectness_head):
        head.dense2.weight.data *= 0.005  # as initialised they saturate every sigmoid
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE}), bert_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("detectors")
    made = {family: str(save_dino(root / family, family)) for family in FAMILIES[1:]}
    return {"owlv2": str(save_owlv2(root / "owlv2")), **made}


def images() -> list[np.ndarray]:
    """Landscape, portrait, square, and the first size again."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 150), (150, 60), (80, 80), (60, 150))]


def proposer(model: str, **settings: Any) -> Proposer:
    return Proposer(Detector(**{"model": model, "threshold": 0.0, "nms_iou": 1.0, **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_the_processors_own(folders: dict[str, str], family: str) -> None:
    """One image at a time through the plain model and the documented post-processing, against all of them in batches."""
    found = proposer(folders[family], batch_size=2).propose(images(), 1000)
    for image, (boxes, scores) in zip(images(), found, strict=True):
        expected_boxes, expected_scores = documented_way(folders[family], family, image)
        assert len(boxes) == len(expected_boxes) > 3
        assert (boxes.dtype, scores.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
        np.testing.assert_allclose(boxes, expected_boxes, atol=1e-2)
        assert (np.diff(scores) <= 0).all()


def documented_way(folder: str, family: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (P, 4) and scores (P,), best first, clipped, those under a pixel left out."""
    height, width = image.shape[:2]
    model = MODELS[family].from_pretrained(folder).eval()
    processor: Any = (Owlv2Processor if family == "owlv2" else GroundingDinoProcessor).from_pretrained(folder)
    inputs = processor(text=[["thing"]] if family == "owlv2" else "object.", images=image, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    if family == "owlv2":
        outputs.logits = outputs.objectness_logits[..., None]
    result = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=[(height, width)])[0]
    boxes = result["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height])).numpy()
    usable = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    order = np.argsort(-result["scores"].numpy()[usable], kind="stable")
    return boxes[usable][order], result["scores"].numpy()[usable][order]


def test_owlv2_boxes_are_in_pixels_of_the_unpadded_image(folders: dict[str, str]) -> None:
    """With its last layer zeroed the box head says its built-in grid: patch (r, c) of 4 x 4 is centred on its far corner.

    The image is padded to 120 x 120 at the bottom, so a patch is 30 pixels, and only the corners with y < 60 + 15 lie in it.
    """
    found = proposer(folders["owlv2"])
    last = found.model.box_head.dense2
    last.weight.data.zero_()
    last.bias.data.zero_()
    ((boxes, _),) = found.propose([np.zeros((60, 120, 3), np.uint8)], 100)
    expected = [
        (x - 15, y - 15, min(x + 15, 120), min(y + 15, 60)) for y in (30, 60) for x in (30, 60, 90, 120)
    ]  # the row of y = 90 begins at 75, in the padding
    np.testing.assert_allclose(sorted(boxes.tolist()), sorted(expected), atol=0.05)


def test_grounding_dino_keeps_the_ratio(folders: dict[str, str]) -> None:
    """A box that the last layer moves to the whole picture is the whole image, whatever its shape."""
    found = proposer(folders["grounding-dino"])
    for layer in found.model.bbox_embed:
        layer.layers[-1].weight.data.zero_()
        layer.layers[-1].bias.data[:] = torch.tensor([0.0, 0.0, 50.0, 50.0])  # width and height saturate at 1
    for image, (boxes, _) in zip(images(), found.propose(images(), 100), strict=True):
        height, width = image.shape[:2]
        assert len(boxes) and (boxes[:, 0] == 0).any() and (boxes[:, 3] == height).any()
        assert (boxes[:, 2] - boxes[:, 0] >= width / 2 - 1e-3).all() and (boxes[:, 3] - boxes[:, 1] >= height / 2 - 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_suppression_and_limit(folders: dict[str, str], family: str) -> None:
    (everything,) = proposer(folders[family]).propose(images()[:1], 1000)
    boxes, scores = everything
    cut = float(np.sort(scores)[len(scores) // 2])
    (above,) = proposer(folders[family], threshold=cut).propose(images()[:1], 1000)
    assert above[1].tolist() == scores[scores > cut].tolist() and 0 < len(above[1]) < len(scores)
    (three,) = proposer(folders[family]).propose(images()[:1], 3)
    assert np.array_equal(three[0], boxes[:3]) and np.array_equal(three[1], scores[:3])
    (apart,) = proposer(folders[family], nms_iou=0.3).propose(images()[:1], 1000)
    assert slow_nms(boxes, 0.3) == [boxes.tolist().index(box) for box in apart[0].tolist()]


def slow_nms(boxes: np.ndarray, limit: float) -> list[int]:
    """Boxes come best first."""
    kept: list[int] = []
    for i in range(len(boxes)):
        if all(iou(boxes[i], boxes[j]) <= limit for j in kept):
            kept.append(i)
    return kept


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inside = max(width, 0) * max(height, 0)
    return inside / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inside)


def test_the_prompt_matters_to_grounding_dino_alone(folders: dict[str, str]) -> None:
    for family in FAMILIES:
        one, other = (proposer(folders[family], prompt=prompt).propose(images()[:1], 9)[0][1] for prompt in ("object", "thing"))
        assert np.array_equal(one, other) is (family == "owlv2")


def test_several_phrases_are_one_question(folders: dict[str, str]) -> None:
    assert proposer(folders["grounding-dino"], prompt="object. thing.").phrases == ["object", "thing"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_and_stripes(folders: dict[str, str], family: str) -> None:
    found = proposer(folders[family])
    assert found.propose([], 10) == []
    for shape in ((3, 200, 3), (200, 3, 3), (1, 1, 3)):
        ((boxes, scores),) = found.propose([np.zeros(shape, np.uint8)], 10)
        assert boxes.shape == (len(scores), 4)
        assert (boxes[:, 2] <= shape[1]).all() and (boxes[:, 3] <= shape[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(folders: dict[str, str], family: str) -> None:
    exact = proposer(folders[family]).propose(images(), 1000)
    half = proposer(folders[family], precision="bf16").propose(images(), 1000)
    for (_, scores), (boxes, rounded) in zip(exact, half, strict=True):
        assert boxes.dtype == rounded.dtype == np.float32
        np.testing.assert_allclose(rounded.max(), scores.max(), atol=0.1)


def test_wrong_models_are_refused_in_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torn = save_owlv2(tmp_path / "torn")
    weights = load_file(torn / "model.safetensors")
    weights.pop("objectness_head.dense0.weight")
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    for model, reason in {
        str(tmp_path / "no" / "such"): "is no folder",
        str(tmp_path / "empty"): "has no config.json",
        str(other): "is a bert model; proposals need one of grounding-dino",
        str(torn): "lacks 1 of its weights",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            proposer(model)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"detect\.detector\.device 'warp'"):
        proposer(folders["owlv2"], device="warp")
    with pytest.raises(UserError, match="has no word"):
        proposer(folders["grounding-dino"], prompt=" . ")
