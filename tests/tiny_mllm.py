"""Tiny randomly initialised checkpoints of every MLLM family, with a word-level tokenizer: what the ranker's tests load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from rar.ranker.wording import LABELS

WORDS = ["cat", "dog", "bird", "red", "blue", "green", "big", "small", "yes", "no", "yes", "Yes", "none"]
WORDS += ["Which", "of", "these", "is", "in", "the", "first", "picture", "Answer", "with", "one", "letter", "or", "Is", "this"]
WORDS += ["Sort", "names", "from", "most", "to", "least", "like", "sorted", "list", "only", "Name", "what", *".,?:'[]"]
SPECIAL = ["<pad>", "<unk>", "<eos>", "<image>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}"
    "{% for part in m.content %}{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '<eos>' if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def word_tokenizer(labels: Iterable[str] = LABELS, extra: tuple[str, ...] = (), **named: Any) -> tf.PreTrainedTokenizerFast:
    words = list(dict.fromkeys([*SPECIAL, *extra, *labels, *WORDS]))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[*SPECIAL[3:], *extra],
        **named,
    )


def text_sizes(tokenizer: tf.PreTrainedTokenizerFast, window: int = 256) -> dict[str, Any]:
    ids: dict[str, Any] = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    return dict(**VISION, **ids, num_key_value_heads=2, max_position_embeddings=window, initializer_range=0.3)


def id_of(tokenizer: tf.PreTrainedTokenizerFast, token: str) -> Any:
    return tokenizer.convert_tokens_to_ids(token)


def save_llava(folder: Path, tokenizer: tf.PreTrainedTokenizerFast | None = None, window: int = 256) -> Path:
    """LLaVA-1.5, like the miniature MLLM: the CLS token is kept ("full") in both model and processor."""
    tokenizer = tokenizer or word_tokenizer()
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=64, patch_size=16),
        text_config=tf.LlamaConfig(**text_sizes(tokenizer, window)),
        image_token_index=id_of(tokenizer, "<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: SigLIP, Qwen2, and pictures of many tiles (any resolution)."""
    tokenizer = word_tokenizer(extra=("<video>",))
    grid = [[64, 64], [64, 128], [128, 64]]
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=64, patch_size=16, vision_use_head=False),
        text_config=tf.Qwen2Config(**text_sizes(tokenizer)),
        image_token_index=id_of(tokenizer, "<image>"),
        video_token_index=id_of(tokenizer, "<video>"),
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
    )
    tf.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size={"height": 64, "width": 64}, image_grid_pinpoints=grid),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(size={"height": 64, "width": 64}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_idefics3(folder: Path) -> Path:
    tokenizer = word_tokenizer(extra=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>"))
    config = tf.Idefics3Config(  # type: ignore[call-arg]
        vision_config={**VISION, "image_size": 64, "patch_size": 16},
        text_config=tf.LlamaConfig(**text_sizes(tokenizer)),
        image_token_id=id_of(tokenizer, "<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    tf.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    tf.Idefics3Processor(
        image_processor=tf.Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_smolvlm(folder: Path) -> Path:
    """SmolVLM: Idefics3's make with a processor of its own, which needs num2words; pictures are split into tiles."""
    marks = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    tokenizer = word_tokenizer(extra=marks + tiles)
    config = tf.SmolVLMConfig(  # type: ignore[call-arg]
        vision_config={**VISION, "image_size": 64, "patch_size": 16},
        text_config=tf.LlamaConfig(**text_sizes(tokenizer)),
        image_token_id=id_of(tokenizer, "<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    tf.SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    tf.SmolVLMProcessor(
        image_processor=tf.SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}),
        tokenizer=tokenizer,
        video_processor=tf.SmolVLMVideoProcessor(  # type: ignore[call-arg]
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, video_sampling={"max_frames": 1, "fps": 1}
        ),
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    ).save_pretrained(folder)
    return folder


def save_qwen25(folder: Path) -> Path:
    tokenizer = word_tokenizer(extra=QWEN_TOKENS)
    start, end, image, video = (id_of(tokenizer, token) for token in QWEN_TOKENS)
    config = tf.Qwen2_5_VLConfig(
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
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    tf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pixels: dict[str, Any] = dict(min_pixels=56 * 56, max_pixels=84 * 84)
    tf.Qwen2_5_VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=tf.Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    ).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path, tokenizer: tf.PreTrainedTokenizerFast | None = None, head: int = 16, window: int = 256) -> Path:
    """Qwen3-VL: features of the vision tower's early layers are added to the language model's (deepstack)."""
    tokenizer = tokenizer or word_tokenizer(extra=QWEN_TOKENS)
    start, end, image, video = (id_of(tokenizer, token) for token in QWEN_TOKENS)
    sections = [head // 4, head // 8, head // 8]
    rope = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True, "rope_theta": 10000.0}
    config = tf.Qwen3VLConfig(
        text_config=dict(**text_sizes(tokenizer, window), head_dim=head, rope_parameters=rope, tie_word_embeddings=False),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    tf.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
    tf.Qwen3VLProcessor(
        image_processor=tf.Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=tf.Qwen3VLVideoProcessor(size=size),
        chat_template=TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    ).save_pretrained(folder)
    return folder


def save_internvl(folder: Path) -> Path:
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = word_tokenizer(extra=tuple(marks.values()), **marks, video_token="<video>")
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**VISION, image_size=64, patch_size=16),
        text_config=tf.Qwen2Config(**text_sizes(tokenizer)),
        image_token_id=id_of(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    tf.InternVLForConditionalGeneration(config).save_pretrained(folder)
    tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size={"height": 64, "width": 64}, max_patches=3),
        tokenizer=tokenizer,
        video_processor=tf.InternVLVideoProcessor(size={"height": 64, "width": 64}),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<IMG_CONTEXT>'"),
    ).save_pretrained(folder)
    return folder


def save_gemma3(folder: Path) -> Path:
    """Gemma 3: attention is bidirectional within a picture, and a short sliding window in every other layer."""
    marks = {"boi_token": "<start_of_image>", "image_token": "<image>", "eoi_token": "<end_of_image>"}
    tokenizer = word_tokenizer(extra=tuple(marks.values()), **marks)
    kinds = ["sliding_attention", "full_attention"]
    config = tf.Gemma3Config(  # type: ignore[call-arg]
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=64, patch_size=16, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(
            **text_sizes(tokenizer), head_dim=16, sliding_window=20, layer_types=kinds, query_pre_attn_scalar=16
        ),
        mm_tokens_per_image=4,
        boi_token_index=id_of(tokenizer, "<start_of_image>"),
        eoi_token_index=id_of(tokenizer, "<end_of_image>"),
        image_token_id=id_of(tokenizer, "<image>"),
    )
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "'<start_of_image>'"),
    ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": save_llava,
    "onevision": save_onevision,
    "qwen25": save_qwen25,
    "qwen3": save_qwen3,
    "internvl": save_internvl,
    "smolvlm": save_smolvlm,
    "idefics3": save_idefics3,
    "gemma3": save_gemma3,
}


def save_family(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    return FAMILIES[family](folder)
