"""Images ranked a second: `letters` in batches against a loop written the paper's way, and against the bare forward passes.

The reference asks as the original code does: one image a call, free text of the whole sorted list, the list then looked for
between brackets. It has the same model in the same process, and Pillow pictures that are decoded already, as ours are. The bare
forward is what a ranker could reach at most: the batches that `letters` makes, prepared beforehand, through the model alone.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from rar import miniature
from rar.bench.timing import paired
from rar.config import Ranker
from rar.device import pick_device
from rar.engine import client, session
from rar.miniature.tokens import mllm_tokenizer
from rar.miniature.train_mllm import TEMPLATE
from rar.miniature.world import render, rng_of, vocabulary
from rar.ranker.mllm import Prompt
from rar.ranker.prompt import generate_prompt, letters_prompt
from rar.ranker.rank import MllmRanker

CANDIDATES = 5
BATCH = 32
ASKED = 64  # pictures that the paper's loop is given, at most
PAPER_TOKENS = 512  # max_new_tokens of the original code


@dataclass(frozen=True)
class Work:
    """Pictures (H, W, 3) uint8 and the candidates of each."""

    images: list[np.ndarray]
    names: list[list[str]]


def run(images: int = 960, repeats: int = 5) -> dict[str, Any]:
    """The miniature MLLM on the CPU (or the GPU where there is one). Rows as of `timing.paired`, images per second."""
    work = draw(images)
    ranker = MllmRanker(Ranker(batch_size=BATCH), str(miniature.MLLM))
    rows = against(lambda: ranker.rank(work.images, work.names), ranker, work, repeats)
    return {"images": images, "rows": {"letters": rows}, "split": split(ranker, work)}


def through_serve(images: int = 960, repeats: int = 5) -> dict[str, Any]:
    """The same rows for `letters` as a batch job asks for it: encoded pictures through Ray Serve, several at once."""
    work, settings = draw(images), Ranker(batch_size=BATCH)
    encoded = [png(image) for image in work.images]
    starts = range(0, images, BATCH)
    batches = [[column[start : start + BATCH] for start in starts] for column in (encoded, work.names)]
    with session.opened() as opened:
        client.deploy(opened, settings)
        ask, ranker = client.ask(opened, settings), MllmRanker(settings, str(miniature.MLLM))
        assert ask is not None
        with ThreadPoolExecutor(settings.in_flight) as pool:
            return {"serve": against(lambda: list(pool.map(ask, *batches)), ranker, work, repeats)}


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def against(
    rank: Callable[[], object], ranker: MllmRanker, work: Work, repeats: int, forced_tokens: int | None = None
) -> dict[str, dict[str, float]]:
    """A way to rank `work` (bare, through Ray Serve, ...) against the paper's loop and bare forward passes of `ranker`."""
    prepared, few = prepare(ranker, work), Work(work.images[:ASKED], work.names[:ASKED])
    return {
        "paper": paired(rank, lambda: paper_loop(ranker, few, forced_tokens), len(work.images), repeats, len(few.images)),
        "bare_forward": paired(rank, lambda: bare_forward(ranker, prepared), len(work.images), repeats),
    }


def draw(images: int) -> Work:
    """Photos of novel classes, each with its class and four others as candidates."""
    specs, random = vocabulary("novel", 0), np.random.default_rng(0)
    pictures, names = [], []
    for number in range(images):
        picks = random.choice(len(specs), CANDIDATES, replace=False)
        pictures.append(render(specs[picks[0]], 96, rng_of(0, "bench rank", number)))
        names.append([specs[pick].name for pick in random.permutation(picks)])
    return Work(pictures, names)


@torch.inference_mode()
def paper_loop(ranker: MllmRanker, work: Work, forced_tokens: int | None = None) -> list[list[str]]:
    """One image a call. forced_tokens: a reply's length for a model whose weights are random and never end one."""
    processor, model, device = ranker.mllm.processor, ranker.mllm.model, ranker.mllm.device
    limits = {"max_new_tokens": forced_tokens or PAPER_TOKENS, "min_new_tokens": forced_tokens}
    sorted_names = []
    for image, names in zip(work.images, work.names, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": generate_prompt(names)}]
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt").to(device, model.dtype)
        written = model.generate(**inputs, **limits, do_sample=False)
        reply = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found = re.search(r"\[(.*?)\]", reply)
        sorted_names.append([name.strip(" '\"") for name in found.group(1).split(",")] if found else names)
    return sorted_names


def prepare(ranker: MllmRanker, work: Work) -> list[dict[str, torch.Tensor]]:
    """The model inputs of every batch that `letters` makes of the work."""
    return [inputs for _, inputs, _ in ranker.mllm.batches(_prompts(ranker, work), 1)]


def _prompts(ranker: MllmRanker, work: Work) -> list[Prompt]:
    texts = ranker.mllm.render([letters_prompt(names) for names in work.names])
    return [Prompt(row, 0, [image], text) for row, (image, text) in enumerate(zip(work.images, texts, strict=True))]


@torch.inference_mode()
def bare_forward(ranker: MllmRanker, prepared: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The logits on the CPU, which also waits for a GPU."""
    return [ranker.mllm.model(**inputs, **ranker.mllm.last_only, use_cache=False).logits[:, -1].cpu() for inputs in prepared]


def split(ranker: MllmRanker, work: Work) -> dict[str, float]:
    """Seconds of one pass over the work: the chat template, the processor, the forward pass; and the whole of `letters`."""
    started = time.perf_counter()
    prompts = _prompts(ranker, work)
    rendered = time.perf_counter()
    prepared = [inputs for _, inputs, _ in ranker.mllm.batches(prompts, 1)]
    encoded = time.perf_counter()
    bare_forward(ranker, prepared)
    done = time.perf_counter()
    ranker.rank(work.images, work.names)
    whole = time.perf_counter() - done
    return {"template": rendered - started, "processor": encoded - rendered, "forward": done - encoded, "whole": whole}


def random_weights(
    images: int = 64, repeats: int = 3, reply_tokens: int = 64, config: LlavaConfig | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """The same rows for LLaVA-1.5-7B's architecture (or `config`) in bf16, with random weights.

    Replies of the reference are forced to `reply_tokens`, the length of a real sorted list of five.
    tokens_per_s: prompt tokens that `letters` reads; tflops: 2 x parameters of the language model x those; memory_gib: peak.
    """
    pick_device(device, "the device")
    work = draw(images)
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), config or llava_7b(), device)
        ranker = MllmRanker(Ranker(batch_size=BATCH, precision="bf16", device=device), folder)
    rows = against(lambda: ranker.rank(work.images, work.names), ranker, work, repeats, reply_tokens)
    tokens = sum(ranking.prompt_tokens for ranking in ranker.rank(work.images, work.names)) / images
    speed = rows["bare_forward"]["ours"] * tokens
    parameters = sum(weight.numel() for weight in ranker.mllm.model.model.language_model.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    use = {"tokens_per_s": speed, "tflops": 2 * parameters * speed / 1e12, "memory_gib": peak}
    return {"images": images, "reply_tokens": reply_tokens, "rows": {"letters": rows}, "use": use, "split": split(ranker, work)}


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, Vicuna-7B (its published config.json)."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)  # LlamaConfig's own defaults are those of 7B
    return LlavaConfig(vision_config=vision, text_config=text)


def save_random(folder: Path, config: LlavaConfig, device: str) -> None:
    """A checkpoint of random weights, with the miniature's word-level tokenizer."""
    tokenizer = mllm_tokenizer()
    config.image_token_index = int(tokenizer.convert_tokens_to_ids("<image>"))  # type: ignore[arg-type]
    text: Any = config.text_config
    vision: Any = config.vision_config
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    side = vision.image_size
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
