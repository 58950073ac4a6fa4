"""A sentence encoder: names to unit vectors, by which two of them are judged near in meaning (sACC). It makes no prediction.

A local folder of transformers with its tokenizer, or one that sentence-transformers has saved, such as FineR's
all-mpnet-base-v2: pooling (mean over tokens, or the first one) is what its `1_Pooling/config.json` says, the mean without one.
What else such a folder may do to a vector (a dense layer, a prompt before each text, other poolings) is refused, not left out:
the numbers would be another encoder's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, PreTrainedTokenizerBase

from rar import checkpoint
from rar.device import pick_device
from rar.encoder.names import check_sentence_encoder
from rar.schema import UserError, first_line

BATCH = 64
LONGEST = 512  # tokens, where the folder allows so many; what is longer is cut, and no name is
MODULES = ("Transformer", "Pooling", "Normalize")  # vectors are normalised in any case
POOLINGS = ("mean", "cls")


class Layout(NamedTuple):
    """What a folder says beside its weights. weights: their folder. pooling: mean or cls. longest: tokens."""

    weights: Path
    pooling: str
    longest: int
    lower_case: bool


class SentenceEncoder:
    """Embeds texts. Raises UserError, naming the config key, for a folder that holds no such encoder.

    dim: length of a vector.
    """

    def __init__(self, folder: str, key: str = "run.sentence_encoder") -> None:
        check_sentence_encoder(folder, key)
        self.layout = layout_of(Path(folder), f"{key}: {folder}")
        self.device = pick_device("auto", key)
        self.tokenizer, model = checkpoint.load(str(self.layout.weights), key, AutoModel, "fp32", needless=("pooler.",))
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"{key}: {folder} holds no encoder of text alone, but one that takes pictures, or has no tokenizer")
        self.model = model.to(self.device).eval()
        positions = getattr(model.config, "max_position_embeddings", LONGEST)
        self.longest = min(self.layout.longest, self.tokenizer.model_max_length, positions - 2)  # RoBERTa counts from 2
        try:
            self.dim = self._embed(["a"]).shape[1]
        except Exception as error:  # what models do without a picture or a decoder's input has no type in common
            raise UserError(f"{key}: {folder} holds no encoder of text alone: {first_line(error)}") from None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(N, dim) float32, unit norm."""
        parts = [self._embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        batch = [text.lower() if self.layout.lower_case else text for text in texts]
        tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        states = self.model(**tokens.to(self.device)).last_hidden_state
        return F.normalize(_pooled(states, tokens["attention_mask"], self.layout.pooling), dim=1).cpu().numpy()


def _pooled(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """(N, T, D) states and (N, T) mask, 1 for what is no padding -> (N, D)."""
    if pooling == "cls":
        first = mask.argmax(dim=1)  # of a tokenizer that pads on the left it is not 0
        return states[torch.arange(len(states), device=states.device), first]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def layout_of(folder: Path, what: str) -> Layout:
    """A folder's layout. what: how it is called in an error. Raises UserError for what is not done."""
    modules = _read(folder / "modules.json") or []
    kinds = {str(one["type"]).rpartition(".")[2]: str(one["path"]) for one in modules}
    if strange := sorted(kinds.keys() - set(MODULES)):
        raise UserError(f"{what} ends in a module {strange[0]!r}; only {', '.join(MODULES)} are done")
    weights = folder / kinds.get("Transformer", "")
    if (_read(folder / "config_sentence_transformers.json") or {}).get("default_prompt_name"):
        raise UserError(f"{what} puts a prompt before each text; only encoders without one are done")
    stored = _read(weights / "sentence_bert_config.json") or {}
    pooling = _pooling(folder / kinds.get("Pooling", "1_Pooling") / "config.json", what)
    return Layout(weights, pooling, stored.get("max_seq_length") or LONGEST, bool(stored.get("do_lower_case")))


def _pooling(file: Path, what: str) -> str:
    told = _read(file)
    if told is None:
        return "mean"
    named = [key for key, value in told.items() if key.startswith("pooling_mode_") and value]
    chosen = {key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key in named}
    chosen |= {told["pooling_mode"]} if isinstance(told.get("pooling_mode"), str) else set()
    if len(chosen) != 1 or not chosen.issubset(POOLINGS):
        raise UserError(f"{what} pools by {' and '.join(sorted(chosen)) or 'nothing'}; one of {' and '.join(POOLINGS)} is done")
    return chosen.pop()


def _read(file: Path) -> Any:
    """JSON; None where there is no such file. Raises UserError for one that is broken."""
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {first_line(error)}") from None
