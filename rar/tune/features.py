"""What the frozen part of the model makes of a picture, computed once: a training shows each picture many times.

With LoRA on the language model alone, tower and projector never change, and neither does what they make of a picture. It is
kept by the picture's pixels, so that lists of training and of checking find it alike, and given to the model in place of pixels
(`mm_encoder_outputs` of transformers). It costs memory, tokens x width of the language model a picture (4.7 MB for 576 tokens
of 4,096 in bf16): once KEPT bytes are full, further pictures are computed each time.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from rar.ranker.mllm import Mllm, Prompt

KEPT = 4 * 2**30  # bytes a worker

Fields = dict[str, Any]  # of the tower's output: tensors; lists of one a picture; lists of these, one a layer


class Features:
    """Puts features in the place of pixels: what `Mllm.features` is for. Prompts show one picture each."""

    def __init__(self, mllm: Mllm, kept: int = KEPT) -> None:
        self.mllm, self.kept, self.left = mllm, kept, kept
        self.known: dict[bytes, Fields] = {}
        self.computed = 0
        self.takes = inspect.signature(mllm.model.get_image_features).parameters

    @staticmethod
    def fit(mllm: Mllm) -> bool:
        """Whether this model takes features; one of foreign code may not."""
        sees = hasattr(mllm.model, "get_image_features")
        return sees and "mm_encoder_outputs" in inspect.signature(mllm.model.forward).parameters

    def __call__(self, prompts: Sequence[Prompt], inputs: dict[str, Any]) -> dict[str, Any]:
        """The processor's inputs without what the tower alone reads, and with what it made of the pictures."""
        rows = [self._of(prompt) for prompt in prompts]
        joined = self.kind(**{name: _joined([row[name] for row in rows]) for name in rows[0]})
        rest = {key: value for key, value in inputs.items() if not key.startswith("pixel_")}
        return rest | {"mm_encoder_outputs": {"image": joined}}

    def _of(self, prompt: Prompt) -> Fields:
        (image,) = prompt.images
        key = hashlib.blake2b(image.tobytes(), salt=repr(image.shape).encode()[:16], digest_size=16).digest()
        fields = self.known.get(key)
        if fields is None:
            fields = self._seen(prompt)
            size = _bytes(list(fields.values()))
            if size <= self.left:
                self.known[key] = fields
                self.left -= size
        return fields

    def _seen(self, prompt: Prompt) -> Fields:
        self.computed += 1
        inputs = self.mllm.placed(self.mllm.processed([prompt]))
        model, training = self.mllm.model, self.mllm.model.training
        model.eval()
        with torch.no_grad():
            output = model.get_image_features(
                **{key: value for key, value in inputs.items() if key in self.takes}, return_dict=True
            )
        model.train(training)
        self.kind = type(output)
        return {name: output[name] for name in ("pooler_output", "deepstack_features") if output.get(name) is not None}


def _joined(parts: list[Any]) -> Any:
    """Of several pictures as of one batch."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first[0], torch.Tensor):
        return [one for part in parts for one in part]
    return [_joined(list(layer)) for layer in zip(*parts, strict=True)]


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else sum(map(_bytes, value))
