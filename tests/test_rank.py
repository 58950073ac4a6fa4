"""The MLLM ranker against slow oracles, on tiny randomly initialised checkpoints built here: LLaVA, Idefics3, Qwen2.5-VL.

Run: pytest tests/test_rank.py. Not covered: whether a ranking is any good (random weights), GPUs, remote code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rar.config import Ranker
from rar.prompt import LABELS, letters_prompt
from rar.rank import MllmRanker, Prompt, log_softmax, rotations, thickened
from rar.schema import RankStatus, UserError

WORDS = [
    "cat",
    "dog",
    "bird",
    "red",
    "blue",
    "green",
    "big",
    "small",
    *["Which", "of", "these", "is", "in", "the", "picture", "Answer", "with", "one", "letter"],
]
WORDS += [*["Sort", "names", "from", "most", "to", "least", "like", "sorted", "list", "only"], *".,?:'[]"]
SPECIAL = ["<pad>", "<unk>", "<eos>", "<image>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}"
    "{% for part in m.content %}{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<eos>' if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NAMES = [["red cat", "blue dog"], ["small bird", "big green cat", "red dog"], ["cat", "dog", "bird", "red bird", "big cat"]]


def word_tokenizer(labels: str = LABELS, extra: tuple[str, ...] = (), **named: str) -> PreTrainedTokenizerFast:
    words = list(dict.fromkeys([*SPECIAL, *extra, *labels, *WORDS]))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [*SPECIAL[3:], *extra]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=special,
        **named,
    )


def text_sizes(tokenizer: PreTrainedTokenizerFast, window: int = 256) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    ids: dict[str, Any] = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    return dict(**sizes, **ids, max_position_embeddings=window, initializer_range=0.3)


def save_llava(folder: Path, tokenizer: PreTrainedTokenizerFast, window: int = 256) -> Path:
    """Like the miniature MLLM: the CLS token is kept ("full") in both model and processor."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_sizes(tokenizer, window)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),  # type: ignore[arg-type]
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_idefics3(folder: Path) -> Path:
    tokenizer = word_tokenizer(extra=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"))
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    config = Idefics3Config(  # type: ignore[call-arg]
        vision_config=vision,
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),  # type: ignore[arg-type]
        pad_token_id=0,
        scale_factor=2,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    extra = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = word_tokenizer(extra=extra)
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in extra)
    config = Qwen2_5_VLConfig(
        text_config=dict(**text_sizes(tokenizer), rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
        image_token_id=image,  # type: ignore[arg-type]
        video_token_id=video,  # type: ignore[arg-type]
        vision_start_token_id=start,  # type: ignore[arg-type]
        vision_end_token_id=end,  # type: ignore[arg-type]
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pixels: dict[str, Any] = dict(min_pixels=56 * 56, max_pixels=84 * 84)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("mllm")
    return {
        "llava": save_llava(root / "llava", word_tokenizer()),
        "idefics3": save_idefics3(root / "idefics3"),
        "qwen": save_qwen(root / "qwen"),
    }


@pytest.fixture(scope="module")
def llava(folders: dict[str, Path]) -> str:
    return str(folders["llava"])


def images(count: int, sides: tuple[int, ...] = (64, 48, 100)) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (sides[i % len(sides)], 64, 3), dtype=np.uint8) for i in range(count)]


def slow_scores(ranker: MllmRanker, image: np.ndarray, names: list[str]) -> np.ndarray:
    """Log-likelihood of each label by appending it to the prompt, normalised over the labels in use. One call a label."""
    logs = []
    for label in LABELS[: len(names)]:
        content = [{"type": "image"}, {"type": "text", "text": letters_prompt(names)}]
        turn = [{"role": "user", "content": content}]
        text = ranker.processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = ranker.processor(images=[[image]], text=[text + " " + label], return_tensors="pt")
        with torch.inference_mode():
            logits = ranker.model(**inputs).logits[0, -2]
        assert ranker.processor.tokenizer.decode(inputs["input_ids"][0, -1]) == label
        logs.append(float(logits.log_softmax(0)[inputs["input_ids"][0, -1]]))
    return np.array(logs) - np.log(np.exp(logs).sum())


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen"])
def test_letters_equal_the_likelihood_of_appended_labels(folders: dict[str, Path], family: str):
    """Batched and left-padded (three sizes of image, 2 to 5 candidates) against one label at a time without padding."""
    ranker = MllmRanker(Ranker(batch_size=3), str(folders[family]))
    rankings = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, rankings, strict=True):
        expected = slow_scores(ranker, image, names)
        np.testing.assert_allclose(ranking.scores, expected, atol=1e-4)
        assert ranking.order == tuple(np.argsort(-expected, kind="stable"))
        assert (ranking.status, ranking.calls, ranking.output_tokens, ranking.response) == (RankStatus.RANKED, 1, 1, "")
    assert rankings[0].scores != pytest.approx(np.log([0.5, 0.5]), abs=1e-3)  # the weights do say something


def test_answers_do_not_depend_on_the_batch(llava: str):
    ranker = MllmRanker(Ranker(batch_size=4), llava)
    pictures, names = images(9), [NAMES[row % 3] for row in range(9)]
    together = ranker.rank(pictures, names)
    backwards = ranker.rank(pictures[::-1], names[::-1])[::-1]
    alone = [ranker.rank([picture], [listed])[0] for picture, listed in zip(pictures, names, strict=True)]
    for one, two, three in zip(together, backwards, alone, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
        np.testing.assert_allclose(one.scores, three.scores, atol=1e-4)
        assert one.prompt_tokens == two.prompt_tokens == three.prompt_tokens
    assert together[0].scores != pytest.approx(together[3].scores, abs=1e-4)  # same names, other image


@pytest.mark.parametrize("permutations", [2, 3, 26])
def test_permutations_average_rotations(llava: str, permutations: int):
    once, many = MllmRanker(Ranker(), llava), MllmRanker(Ranker(permutations=permutations, batch_size=2), llava)
    for image, names, ranking in zip(images(3), NAMES, many.rank(images(3), NAMES), strict=True):
        by_name: dict[str, list[float]] = {name: [] for name in names}
        for shift in rotations(len(names), permutations):
            turned = names[shift:] + names[:shift]
            for name, score in zip(turned, once.rank([image], [turned])[0].scores, strict=True):
                by_name[name].append(score)
        np.testing.assert_allclose(ranking.scores, [np.mean(by_name[name]) for name in names], atol=1e-4)
        assert ranking.calls == ranking.output_tokens == min(permutations, len(names))


def test_rotations_are_evenly_spaced():
    assert rotations(5, 1) == [0]
    assert rotations(5, 2) == [0, 2]
    assert rotations(4, 2) == [0, 2]
    assert rotations(3, 26) == [0, 1, 2]


def test_prompt_tokens_leave_padding_out(llava: str):
    short, long = MllmRanker(Ranker(), llava).rank(images(2), [NAMES[0], NAMES[2]])
    # <user> and <assistant>, 16 patches and CLS, "Which ... ?" 8, one line a name of label, dot and words, "Answer ... ." 5
    assert short.prompt_tokens == 2 + 17 + 8 + (4 + 4) + 5
    assert long.prompt_tokens == 2 + 17 + 8 + (3 + 3 + 3 + 4 + 4) + 5


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen"])
def test_generate_is_greedy_and_unpadded(folders: dict[str, Path], family: str):
    ranker = MllmRanker(Ranker(method="generate", max_new_tokens=6), str(folders[family]))
    together = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, together, strict=True):
        alone = ranker.rank([image], [names])[0]
        assert (ranking.response, ranking.order, ranking.output_tokens) == (alone.response, alone.order, alone.output_tokens)
        assert ranking.calls == 1 and 1 <= ranking.output_tokens <= 6 and ranking.scores == ()
        assert ranking.response and "<" not in ranking.response


def test_generated_names_are_read_as_a_ranking(folders: dict[str, Path]):
    """A model made to write "bird dog <eos>": its language head is replaced by a walk through these words."""
    ranker = MllmRanker(Ranker(method="generate", max_new_tokens=20), str(folders["llava"]))
    ids = ranker.processor.tokenizer.convert_tokens_to_ids(["bird", "dog", "<eos>"])
    ranker.model.lm_head = Forced(iter(ids), len(ranker.processor.tokenizer))
    (ranking,) = ranker.rank(images(1), [["cat", "dog", "bird"]])
    assert ranking.response == "bird dog"
    assert (ranking.order, ranking.status) == ((2, 1, 0), RankStatus.REPAIRED)
    assert (ranking.calls, ranking.output_tokens) == (1, 3)


class Forced(torch.nn.Module):
    """A language head that says the given token ids, one a step."""

    def __init__(self, ids: Iterator[int], vocabulary: int) -> None:
        super().__init__()
        self.ids, self.vocabulary = ids, vocabulary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        said = torch.full((*hidden.shape[:2], self.vocabulary), -1e9)
        said[..., next(self.ids)] = 0
        return said


def test_equal_scores_keep_retrieval_order_and_nan_falls_back(llava: str):
    ranker = MllmRanker(Ranker(), llava)
    ranker.model.lm_head.weight.data.zero_()
    (flat,) = ranker.rank(images(1), [["dog", "cat", "bird"]])
    assert (flat.order, flat.status) == ((0, 1, 2), RankStatus.RANKED)
    assert flat.scores == pytest.approx([-np.log(3)] * 3)
    ranker.model.lm_head.weight.data.fill_(torch.nan)
    (broken,) = ranker.rank(images(1), [["dog", "cat", "bird"]])
    assert (broken.order, broken.status, broken.scores) == ((0, 1, 2), RankStatus.FALLBACK, ())


@pytest.mark.parametrize("method", ["letters", "generate"])
def test_one_candidate_costs_no_call(llava: str, method: str):
    ranker = MllmRanker(Ranker(method=method, max_new_tokens=2), llava)
    one, two, none = ranker.rank(images(3), [["cat"], ["cat", "dog"], []])
    assert (one.order, one.status, one.calls) == ((0,), RankStatus.RANKED, 0)
    assert (none.order, none.calls, two.calls) == ((), 0, 1)
    assert ranker.rank([], []) == []


@pytest.mark.parametrize(("method", "room"), [("letters", 1), ("generate", 6)])
def test_prompts_beyond_the_window_fall_back_alone(llava: str, method: str, room: int):
    config = Ranker(method=method, max_new_tokens=6)
    expected = MllmRanker(config, llava).rank(images(3), NAMES)
    longest = expected[2].prompt_tokens
    for window, fits in ((longest + room, True), (longest + room - 1, False)):
        ranker = MllmRanker(config, llava)
        ranker.window = window
        short, middle, long = ranker.rank(images(3), NAMES)
        assert (short.order, middle.order) == (expected[0].order, expected[1].order)
        assert (long.calls == 1) is fits
        assert fits or (long.order, long.status, long.response) == ((0, 1, 2, 3, 4), RankStatus.FALLBACK, "")


def test_window_is_read_from_the_checkpoint(llava: str):
    assert MllmRanker(Ranker(), llava).window == 256


def test_hostile_names_and_stripes(llava: str):
    """A name with an image token or an end token, and images of one pixel's height, are only odd, not fatal."""
    ranker = MllmRanker(Ranker(), llava)
    stripes = [np.zeros((1, 300, 3), np.uint8), np.zeros((300, 1, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)]
    rankings = ranker.rank(stripes, [["<image>", "<image> cat <eos>"], ["<user>", "dog"], ["cat", "dog"]])
    assert [ranking.status for ranking in rankings] == [RankStatus.RANKED] * 3


def test_image_of_three_rows_is_not_taken_for_channels(llava: str):
    ranker = MllmRanker(Ranker(), llava)
    red = np.zeros((3, 300, 3), np.uint8)
    red[..., 0] = 255
    inputs, _ = ranker._encode([red], [Prompt(0, 0, "<image> cat")])
    assert (
        inputs["pixel_values"][0, 0].min() > 1.9 and inputs["pixel_values"][0, 1:].max() < -1.4
    )  # CLIP's normalised 255 and 0


def test_thickened():
    assert thickened(np.zeros((10, 1000, 3), np.uint8)).shape == (10, 1000, 3)
    assert thickened(np.zeros((1, 1001, 3), np.uint8)).shape == (11, 1001, 3)
    assert thickened(np.zeros((1001, 2, 3), np.uint8)).shape == (1001, 12, 3)


def test_log_softmax():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([1000.0, 1000.0]))), [0.5, 0.5])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(llava: str, precision: str):
    ranker = MllmRanker(Ranker(precision=precision), llava)
    assert ranker.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    full = MllmRanker(Ranker(), llava).rank(images(3), NAMES)
    for half, exact in zip(ranker.rank(images(3), NAMES), full, strict=True):
        np.testing.assert_allclose(half.scores, exact.scores, atol=0.3)


def test_labels_follow_the_template_s_space(tmp_path: Path):
    """A byte-level tokenizer tells "A" from " A"; the template writes "ASSISTANT: A", so the spaced one is the label."""
    folder = save_llava(tmp_path / "spaced", spaced_tokenizer())
    processor_file = folder / "chat_template.jinja"
    spaced = (
        TEMPLATE.replace("IMAGE", "'<image>'")
        .replace("'<assistant> '", "'<assistant>: '")
        .replace("'<assistant>'", "'<assistant>:'")
    )
    processor_file.write_text(spaced)
    ranker = MllmRanker(Ranker(), str(folder))
    assert ranker.processor.tokenizer.convert_ids_to_tokens(ranker._label_ids)[:3] == [" A", " B", " C"]
    processor_file.write_text(spaced.replace("'<assistant>: '", "'<assistant>:'"))
    ranker = MllmRanker(Ranker(), str(folder))
    assert ranker.processor.tokenizer.convert_ids_to_tokens(ranker._label_ids)[:3] == ["A", "B", "C"]


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


def test_too_many_candidates_name_top_k(llava: str, tmp_path: Path):
    ranker = MllmRanker(Ranker(), llava)
    with pytest.raises(UserError, match=r"26 candidates .* not 27: lower retriever\.top_k"):
        ranker.rank(images(1), [["cat"] * 27])
    ranker = MllmRanker(Ranker(), str(save_llava(tmp_path / "few", word_tokenizer(labels="ABC"))))
    assert ranker.rank(images(1), [["cat", "dog", "bird"]])[0].status is RankStatus.RANKED
    with pytest.raises(UserError, match="3 candidates"):
        ranker.rank(images(1), [["cat", "dog", "bird", "red cat"]])


def test_models_that_cannot_serve_are_refused_in_one_line(llava: str, tmp_path: Path):
    unlabelled = save_llava(tmp_path / "unlabelled", word_tokenizer(labels=""))
    (tmp_path / "empty").mkdir()
    text_only = tmp_path / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text(json.dumps({"model_type": "llama"}))
    untold = save_llava(tmp_path / "untold", word_tokenizer())
    (untold / "chat_template.jinja").unlink()
    incomplete = save_llava(tmp_path / "incomplete", word_tokenizer())
    drop_weights(incomplete)
    for folder, reason in {
        str(tmp_path / "no" / "such"): "is no folder",
        str(tmp_path / "empty"): "cannot be loaded",
        str(text_only): "cannot be loaded",
        str(unlabelled): "no single tokens",
        str(untold): "no chat template",
        str(incomplete): "lacks 1 of its weights",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            MllmRanker(Ranker(), folder)
        assert "\n" not in str(caught.value)


def drop_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if "lm_head" in key))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_unknown_device_is_refused(llava: str):
    with pytest.raises(UserError, match=r"ranker\.device 'warp'"):
        MllmRanker(Ranker(device="warp"), llava)
