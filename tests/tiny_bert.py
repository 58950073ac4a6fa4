"""A tiny sentence encoder with random weights, in the form that transformers saves: BERT with a word tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ("herring", "gull", "a", "tawny", "owl", "at", "night", "red", "blue", "star", "ring", "sea", "bird", "sun", "moon")


def write(folder: Path, seed: int = 0) -> Path:
    """32 positions, 16 dimensions. Weights are large enough that texts differ."""
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    BertTokenizer(vocabulary).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder
