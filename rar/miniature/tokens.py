"""Word-level tokenizers of the miniature models: one token a word, so that names are short and no vocabulary is downloaded."""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rar.miniature.world import COLOURS, MARKINGS, PATTERNS, SHAPES
from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt
from rar.ranker.wording import LABELS

TEMPLATE = "a photo of a {}."
CAPTION = "Name what is in the picture."


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """For open_clip: <eos> has the highest id, because its text tower pools at the argmax of the ids."""
    words = ["<pad>", "<unk>", "<bos>", *_words(TEMPLATE), "with", *PATTERNS, *COLOURS, *SHAPES, *MARKINGS, "<eos>"]
    tokenizer = _word_level(words)
    bos, eos = tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<eos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    return _wrap(tokenizer)


def mllm_tokenizer() -> PreTrainedTokenizerFast:
    """For the MLLM: the words of the names, of the project's prompts and of the chat template."""
    names = ["plain"] * 2
    texts = [letters_prompt(names), generate_prompt(names), generate_answer(names), CAPTION, "USER: ASSISTANT:"]
    words = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", *LABELS, "with", *PATTERNS, *COLOURS, *SHAPES, *MARKINGS]
    tokenizer = _word_level([*words, *itertools.chain.from_iterable(_words(text) for text in texts)])
    wrapped = _wrap(tokenizer, extra_special_tokens={"image_token": "<image>"})
    wrapped.padding_side = "left"
    return wrapped


def _words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.replace("{}", " "))]


def _word_level(words: list[str]) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _wrap(tokenizer: Tokenizer, **extra: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", **extra
    )
