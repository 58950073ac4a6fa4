"""Lists as the model meets them: prompts of the ranker's own words, targets as token ids, batches by the model's own processor.

What ranking reads is what is trained: the prompt comes from `rar.ranker.prompt` and the checkpoint's chat template, the labels'
tokens from `Mllm.label_forms`, names as labels from `spoken`. Rows are padded on the left, so the tokens of a reply are the
last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rar.ranker import naming
from rar.ranker.mllm import Mllm, Prompt
from rar.ranker.prefix import shared
from rar.ranker.wording import Wording
from rar.schema import UserError
from rar.tune.draw import Lesson, turn
from rar.tune.pictures import Pictures
from rar.tune.spoken import Spoken, spoken

NO_LABEL = -1
ANCHORED = 2  # names of a list whose words are held to what they were: its first and another; more cost time alone


class Course(Dataset):  # type: ignore[type-arg]
    """All lists of a training, one after the other. epoch: the lists of an epoch by its number, whole batches."""

    def __init__(self, epoch: Callable[[int], list[Lesson]], length: int) -> None:
        self.epoch, self.length = epoch, length
        self.lists: list[Lesson] = []
        self.number = -1
        self.size = len(epoch(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Lesson:
        number, within = divmod(place, self.size)
        if number != self.number:
            self.lists, self.number = self.epoch(number), number
        return self.lists[within]


class Teacher:
    """Lessons -> model inputs and targets of a ranking `method`.

    as_text: the reply as text; else its label, or names as labels (of `generate` both, text and names). anchored: with some
    listed names as likelihood asks for them, for `losses.drift`.
    """

    def __init__(
        self, mllm: Mllm, wording: Wording, pictures: Pictures, *, method: str, as_text: bool, anchored: bool = False
    ) -> None:
        self.mllm, self.wording, self.pictures = mllm, wording, pictures
        self.method, self.as_text, self.anchored = method, as_text, anchored

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        """The collator of a DataLoader. `model`: inputs; the rest as `losses` needs it. Raises UserError beyond the window."""
        images = self.pictures([lesson.row for lesson in lessons])
        plain = [replace(lesson, names=[self.mllm.harmless(name) for name in lesson.names]) for lesson in lessons]
        if self.method == "letters" and not self.as_text:
            batch = self._labelled(plain, images)
        else:
            batch = self._replied(plain, images) if self.as_text or self.method == "generate" else {}
            batch |= {} if self.as_text else {"spoken": self._spoken(plain, images, self.method)}
        if self.anchored:
            same = self.method == "likelihood" and not self.as_text
            few = [replace(lesson, order=lesson.order[:ANCHORED]) for lesson in plain]
            batch["anchor"] = batch["spoken"] if same else self._spoken(few, images, "likelihood")
        return batch

    def _labelled(self, lessons: Sequence[Lesson], images: Sequence[np.ndarray]) -> dict[str, Any]:
        asked, _ = self._turns(lessons, self.method)
        inputs, lengths = self.mllm.encode([Prompt(0, 0, [image], text) for image, text in zip(images, asked, strict=True)])
        self._check(lessons, lengths)
        widest = max(len(lesson.names) + lesson.none for lesson in lessons)
        order = [lesson.order + [NO_LABEL] * (widest - len(lesson.order)) for lesson in lessons]
        return {
            "model": inputs,
            "shown": torch.tensor([len(lesson.names) + lesson.none for lesson in lessons]),
            "answer": torch.tensor([lesson.answer for lesson in lessons]),
            "order": torch.tensor(order),
        }

    def _replied(self, lessons: Sequence[Lesson], images: Sequence[np.ndarray]) -> dict[str, Any]:
        asked, replies = self._turns(lessons, self.method)
        whole = [text + self.mllm.lead + reply for text, reply in zip(asked, replies, strict=True)]
        inputs, lengths = self.mllm.encode([Prompt(0, 0, [image], text) for image, text in zip(images, whole, strict=True)])
        inputs = self._ended(inputs)
        self._check(lessons, [length + 1 for length in lengths])
        return {"model": inputs, "reply": torch.tensor(self._reply_tokens(asked, whole))}

    def _spoken(self, lessons: Sequence[Lesson], images: Sequence[np.ndarray], method: str) -> Spoken:
        asked, _ = self._turns(lessons, method)
        listed = [[lesson.names[place] for place in lesson.order] for lesson in lessons]
        ids = (naming.replies if method == "likelihood" else naming.beginnings)(self.mllm, asked, listed)
        found = spoken(self.mllm, asked, ids, images)
        self._check(lessons, found.longest)
        return found

    def _turns(self, lessons: Sequence[Lesson], method: str) -> tuple[list[str], list[str]]:
        """(rendered prompts, replies)."""
        turns = [turn(lesson, self.wording, method) for lesson in lessons]
        return self.mllm.render([asked for asked, _ in turns]), [reply for _, reply in turns]

    def _reply_tokens(self, asked: list[str], replied: list[str]) -> list[int]:
        """How many tokens each reply has, the one that ends it included."""
        both = zip(self.mllm.token_ids(asked), self.mllm.token_ids(replied), strict=True)
        return [len(after) - shared([before, after]) + (self.mllm.end_id is not None) for before, after in both]

    def _ended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """With the token that ends a reply after every row."""
        if self.mllm.end_id is None:
            return inputs
        shape = inputs["input_ids"].shape
        more = {"input_ids": self.mllm.end_id, "attention_mask": 1}
        return {
            key: torch.cat([value, value.new_full((shape[0], 1), more.get(key, 0))], 1)
            if getattr(value, "shape", None) == shape
            else value
            for key, value in inputs.items()
        }

    def _check(self, lessons: Sequence[Lesson], lengths: Sequence[int]) -> None:
        window = self.mllm.window
        longest = int(np.argmax(lengths))
        if window is not None and lengths[longest] > window:
            raise UserError(
                f"a list of {len(lessons[longest].names)} candidates takes {lengths[longest]:,} tokens, and "
                f"{self.mllm.model_path!r} reads {window:,}: lower tune.max_list (or retriever.top_k)"
            )
