"""Lists as the model meets them: prompts of the ranker's own words, targets as token ids, batches by the model's own processor.

What ranking reads is what is trained: the prompt comes from `rar.ranker.prompt` and the checkpoint's chat template, and the
labels' tokens from `Mllm.label_forms`. Rows are padded on the left, so a reply's tokens are always the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rar.ranker.mllm import Mllm, Prompt
from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt
from rar.ranker.wording import LABELS, Wording
from rar.schema import UserError
from rar.tune.draw import Lesson
from rar.tune.pictures import Pictures

NO_LABEL = -1


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
    """Lessons -> model inputs and targets. as_text: the reply as text, else its label alone; letters: how the list is asked."""

    def __init__(self, mllm: Mllm, wording: Wording, pictures: Pictures, *, letters: bool, as_text: bool) -> None:
        self.mllm, self.wording, self.pictures = mllm, wording, pictures
        self.letters, self.as_text = letters, as_text

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        """The collator of a DataLoader. `model`: inputs; the rest as `losses` needs it. Raises UserError beyond the window."""
        images = self.pictures([lesson.row for lesson in lessons])
        asked = self.mllm.render([self._question(lesson) for lesson in lessons])
        if not self.as_text:
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
        replies = [text + self.mllm.lead + self._reply(lesson) for text, lesson in zip(asked, lessons, strict=True)]
        inputs, lengths = self.mllm.encode([Prompt(0, 0, [image], text) for image, text in zip(images, replies, strict=True)])
        inputs = self._ended(inputs)
        self._check(lessons, [length + 1 for length in lengths])
        return {"model": inputs, "reply": torch.tensor(self._reply_tokens(asked, replies))}

    def _question(self, lesson: Lesson) -> str:
        names = [self.mllm.harmless(name) for name in lesson.names]
        if not self.letters:
            return generate_prompt(names, self.wording)
        return letters_prompt([*names, *([self.wording.none_of_these] if lesson.none else [])], self.wording)

    def _reply(self, lesson: Lesson) -> str:
        return LABELS[lesson.answer] if self.letters else generate_answer([lesson.names[place] for place in lesson.order])

    def _reply_tokens(self, asked: list[str], replied: list[str]) -> list[int]:
        """How many tokens each reply has, the one that ends it included."""
        counts = []
        for before, after in zip(self.mllm.token_ids(asked), self.mllm.token_ids(replied), strict=True):
            pairs = zip(before, after, strict=False)
            same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(before), len(after)))
            counts.append(len(after) - same + (self.mllm.end_id is not None))
        return counts

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
