"""Loading a checkpoint: what is refused and how, adapters, quantisation; and how pictures and labels reach the model.

Not covered: GPUs, hub names, remote code; quantisation where bitsandbytes is not installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from rar import miniature
from rar.config import Ranker
from rar.ranker.mllm import Mllm, Prompt, thickened
from rar.ranker.rank import MllmRanker
from rar.ranker.wording import LABELS
from rar.schema import RankStatus, UserError
from tests.tiny_mllm import SPECIAL, TEMPLATE, save_family, save_idefics3, save_llava, word_tokenizer

NAMES = [["red cat", "blue dog"], ["small bird", "big green cat", "red dog"]]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp("mllm"), "llava"))


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def test_models_that_cannot_serve_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text(json.dumps({"model_type": "llama"}))
    untold = save_llava(tmp_path / "untold")
    (untold / "chat_template.jinja").unlink()
    incomplete = save_llava(tmp_path / "incomplete")
    drop_weights(incomplete)
    for folder, reason in {
        str(tmp_path / "no" / "such"): "is no folder",
        str(tmp_path / "empty"): "has no config.json",
        str(text_only): "cannot be loaded",
        str(untold): "no chat template",
        str(incomplete): "lacks 1 of its weights",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            Mllm(Ranker(device="cpu"), folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "told", "fewer"),
    [
        ("qwen25", {"max_pixels": 3136}, True),
        ("qwen3", {"max_pixels": 4096}, True),
        ("internvl", {"max_patches": 1}, True),
        ("idefics3", {"size": {"longest_edge": 64}}, False),
        ("gemma3", {"do_pan_and_scan": False}, False),
        ("onevision", {"image_grid_pinpoints": [[64, 64]]}, "does not fit"),
        ("llava", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, "does not fit"),
        ("qwen3", {"max_pixel": 4096}, "did you mean 'max_pixels'"),
        ("llava", {"max_patches": 2}, "has no 'max_patches'; it has .*crop_size"),
        ("qwen3", {"max_pixels": "many"}, "does not fit .* expected int"),
    ],
)
def test_how_many_tokens_a_picture_takes_is_a_setting(
    tmp_path: Path, family: str, told: dict[str, Any], fewer: bool | str
) -> None:
    folder = str(save_family(tmp_path, family))
    if isinstance(fewer, str):
        with pytest.raises(UserError, match=fewer) as caught:
            Mllm(Ranker(device="cpu", image_processor=told), folder)
        assert "\n" not in str(caught.value)
        return
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    lengths = []
    for more in ({}, told):
        mllm = Mllm(Ranker(device="cpu", image_processor=more), folder)
        prompt = Prompt(0, 0, [image], mllm.render(["?"])[0])
        [(_, _, length)] = mllm.next_logits([prompt], [1])
        lengths.append(length)
    assert (lengths[1] < lengths[0]) == fewer and lengths[1] <= lengths[0]


def test_a_picture_of_more_tokens_than_the_window_is_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "qwen3")
    told = json.loads((folder / "config.json").read_text())
    told["text_config"]["max_position_embeddings"] = 6
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"does not fit .* window of 6 tokens"):
        Mllm(Ranker(device="cpu", image_processor={"max_pixels": 4096}), str(folder))


def drop_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if "lm_head" in key))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_unknown_device_is_refused(llava: str):
    with pytest.raises(UserError, match=r"ranker\.device 'warp'"):
        Mllm(Ranker(device="warp"), llava)


def save_adapter(folder: Path, model_path: str, targets: list[str], scale: float = 0.5) -> Path:
    """A LoRA adapter with random weights; peft's own start is an adapter that does nothing."""
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration.from_pretrained(model_path)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale)
    adapted.save_pretrained(str(folder))
    return folder


def test_an_adapter_is_added_to_the_weights(llava: str, tmp_path: Path):
    folder = save_adapter(tmp_path / "lora", llava, ["q_proj", "v_proj"])
    bare = MllmRanker(Ranker(device="cpu"), llava)
    ranker = MllmRanker(Ranker(device="cpu", adapter=str(folder)), llava)
    weights, name = load_file(folder / "adapter_model.safetensors"), "language_model.layers.0.self_attn.q_proj"
    (down,) = (value for key, value in weights.items() if f"{name}.lora_A" in key)
    (up,) = (value for key, value in weights.items() if f"{name}.lora_B" in key)
    scaling = LoraConfig.from_pretrained(str(folder)).lora_alpha / 4
    before = bare.mllm.model.get_submodule(f"model.{name}").weight
    torch.testing.assert_close(ranker.mllm.model.get_submodule(f"model.{name}").weight, before + scaling * up @ down)
    for one, other in zip(ranker.rank(images(2), NAMES), bare.rank(images(2), NAMES), strict=True):
        assert one.scores != pytest.approx(other.scores, abs=1e-3)


def test_folders_that_are_no_adapter_of_the_model(llava: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "prompt"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    deep = save_adapter(tmp_path / "deep", llava, ["q_proj"])
    deepen(deep)
    wide = save_adapter(tmp_path / "wide", llava, ["q_proj"])
    widen(wide)
    strange = save_adapter(tmp_path / "strange", llava, ["q_proj"])
    target(strange, ["query_key_value"])
    for folder, reason in {
        tmp_path / "none": "is no adapter",
        tmp_path / "empty": "is no adapter",
        Path(llava): "is no adapter",
        other: "is a PROMPT_TUNING adapter",
        deep: "does not fit ranker.model",
        wide: "does not fit ranker.model",
        strange: "does not fit ranker.model",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            Mllm(Ranker(device="cpu", adapter=str(folder)), llava)
        assert "\n" not in str(caught.value)


def deepen(folder: Path) -> None:
    """As if it were made for a model of more layers."""
    weights = load_file(folder / "adapter_model.safetensors")
    more = {key.replace("layers.0.", "layers.7."): value.clone() for key, value in weights.items()}
    save_file({**weights, **more}, folder / "adapter_model.safetensors")


def widen(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.repeat(2, 2) for key, value in weights.items()}, folder / "adapter_model.safetensors")


def target(folder: Path, modules: list[str]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": modules}))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.4), ("int4", 3.0)])
@pytest.mark.parametrize("method", ["letters", "likelihood"])
def test_quantised_weights_rank_alike(quantization: str, tolerance: float, method: str):
    """On the miniature MLLM: four-bit weights need layers of at least 64 units."""
    names = [["plain red moon", "plain blue ring", "striped green star"]] * 3
    exact = MllmRanker(Ranker(device="cpu", method=method), str(miniature.MLLM))
    ranker = MllmRanker(Ranker(device="cpu", method=method, quantization=quantization, precision="bf16"), str(miniature.MLLM))
    layer = ranker.mllm.model.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype in (torch.int8, torch.uint8)
    for one, other in zip(ranker.rank(images(3), names), exact.rank(images(3), names), strict=True):
        assert one.status is RankStatus.RANKED
        np.testing.assert_allclose(one.scores, other.scores, atol=tolerance)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_names_the_missing_package(llava: str):
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        Mllm(Ranker(device="cpu", quantization="int8"), llava)


def test_labels_follow_the_template_s_space(tmp_path: Path):
    """A byte-level tokenizer tells "A" from " A"; the template writes "ASSISTANT: A", so the spaced one is the label."""
    folder = save_llava(tmp_path / "spaced", spaced_tokenizer())
    spaced = (
        TEMPLATE.replace("IMAGE", "'<image>'")
        .replace("'<assistant> '", "'<assistant>: '")
        .replace("'<assistant>'", "'<assistant>:'")
    )
    for text, labels in ((spaced, [" A", " B", " C"]), (spaced.replace("'<assistant>: '", "'<assistant>:'"), ["A", "B", "C"])):
        (folder / "chat_template.jinja").write_text(text)
        mllm = Mllm(Ranker(device="cpu"), str(folder))
        assert mllm.processor.tokenizer.convert_ids_to_tokens([forms[0] for forms in mllm.label_forms()])[:3] == labels


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading space, as byte-level BPE has them."""
    words = [*SPECIAL, *LABELS, *(f" {label}" for label in LABELS), ":", " "]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
    )


def test_the_template_s_own_end_of_a_reply_comes_first(tmp_path: Path):
    """Idefics3 ends a turn by <end_of_utterance>, while <eos> ends a text; both stop it from writing on."""
    folder = save_idefics3(tmp_path / "ends")
    template = TEMPLATE.replace("IMAGE", "'<image>'").replace("'<eos>'", "'<end_of_utterance>'")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = word_tokenizer(extra=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"))
    eos, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<end_of_utterance>"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, end]}))
    assert Mllm(Ranker(device="cpu"), str(folder)).end_id == end
    (folder / "chat_template.jinja").write_text(template.replace("'<end_of_utterance>'", "' '"))
    assert Mllm(Ranker(device="cpu"), str(folder)).end_id == eos


def test_image_of_three_rows_is_not_taken_for_channels(llava: str):
    red = np.zeros((3, 300, 3), np.uint8)
    red[..., 0] = 255
    pixels = Mllm(Ranker(device="cpu"), llava).encode([Prompt(0, 0, [red], "<image> cat")])[0]["pixel_values"]
    assert pixels[0, 0].min() > 1.9 and pixels[0, 1:].max() < -1.4  # CLIP's normalised 255 and 0


def test_thickened():
    assert thickened(np.zeros((10, 1000, 3), np.uint8)).shape == (10, 1000, 3)
    assert thickened(np.zeros((1, 1001, 3), np.uint8)).shape == (11, 1001, 3)
    assert thickened(np.zeros((1001, 2, 3), np.uint8)).shape == (1001, 12, 3)
